"""Sampler, packing, prompts and the generated task, against direct constructions."""

import json

import numpy as np
import pytest
import torch

from pmpo_megatron.config import build
from pmpo_megatron.data.arithmetic import Memory, Problem, is_held_out, make_problems, solve
from pmpo_megatron.data.packing import pack
from pmpo_megatron.data.prompts import DataConfig, load_prompts, render
from pmpo_megatron.data.sampler import PromptSampler
from pmpo_megatron.errors import ConfigError, DataError
from pmpo_megatron.hf.tiny_model import make_tokenizer
from pmpo_megatron.types import Sample


def test_sampler_covers_every_epoch_and_resumes_anywhere():
    whole = PromptSampler(10, seed=3)
    order = whole.next(25)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and order[:10] != order[10:20]
    for split in (0, 1, 9, 10, 11, 20):
        first = PromptSampler(10, seed=3)
        assert first.next(split) == order[:split]
        again = PromptSampler(10, seed=3)
        again.restore(json.loads(json.dumps(first.state())))
        assert again.next(25 - split) == order[split:]
    assert PromptSampler(10, seed=4).next(10) != order[:10]
    with pytest.raises(DataError, match="num_prompts = 10, this run 11"):
        PromptSampler(11, seed=3).restore(whole.state())


def samples(lengths, seed=0):
    g = np.random.default_rng(seed)
    made = []
    for i, (prompt, response) in enumerate(lengths):
        ids = tuple(g.integers(5, 99, prompt + response).tolist())
        log_probs = g.normal(size=response).astype(np.float32)
        made.append(Sample(i, 0, ids[:prompt], ids[prompt:], log_probs, False, 0.0, float(i), 0.5 + i, 0))
    return made


@pytest.mark.parametrize("dp, multiple, micro_batch_multiple", [(1, 1, 1), (2, 4, 1), (4, 8, 2)])
def test_packing_loses_nothing_and_balances(dp, multiple, micro_batch_multiple):
    g = np.random.default_rng(1)
    given = samples([(int(p), int(r)) for p, r in zip(g.integers(1, 20, 37), g.integers(0, 60, 37), strict=True)])
    kwargs = dict(max_tokens=160, data_parallel_size=dp, sequence_multiple=multiple, micro_batch_multiple=micro_batch_multiple)
    ranks = pack(given, **kwargs)
    assert len(ranks) == dp and len({len(r) for r in ranks}) == 1 and len(ranks[0]) % micro_batch_multiple == 0
    seen = []
    for micro_batch in (m for rank in ranks for m in rank):
        assert micro_batch.num_tokens <= 160 and micro_batch.cu_seqlens[-1] == micro_batch.num_tokens
        assert all(n % multiple == 0 for n in micro_batch.cu_seqlens.diff().tolist())
        for number, sample_id in enumerate(micro_batch.sample_ids):
            sample, start = given[sample_id], int(micro_batch.cu_seqlens[number])
            ids = sample.prompt_ids + sample.response_ids
            assert micro_batch.tokens_T[start : start + len(ids)].tolist() == list(ids)
            where = (micro_batch.trajectory_T == number).nonzero().flatten()
            assert micro_batch.targets_T[where].tolist() == list(sample.response_ids)
            assert where.tolist() == list(range(start + len(sample.prompt_ids) - 1, start + len(ids) - 1))
            assert np.array_equal(micro_batch.rollout_log_probs_T[where].numpy(), sample.rollout_log_probs)
            assert micro_batch.position_ids_T[start : start + len(ids)].tolist() == list(range(len(ids)))
            assert micro_batch.advantages_N[number] == sample.advantage and micro_batch.weights_N[number] == sample.weight
            seen.append(sample_id)
    assert sorted(seen) == list(range(37))
    loads = [sum(m.num_tokens for m in rank) for rank in ranks]
    assert max(loads) - min(loads) <= 0.25 * max(loads)
    again = pack(given, **kwargs)
    assert all(
        torch.equal(a.tokens_T, b.tokens_T) for x, y in zip(ranks, again, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_fewer_trajectories_than_ranks_gives_padding_micro_batches():
    ranks = pack(samples([(3, 4)]), max_tokens=64, data_parallel_size=4, sequence_multiple=4)
    assert [len(r) for r in ranks] == [1, 1, 1, 1]
    empty = [r[0] for r in ranks if not r[0].sample_ids]
    assert len(empty) == 3 and all((m.trajectory_T == -1).all() and m.num_tokens == 4 for m in empty)


def test_a_trajectory_that_does_not_fit_is_named():
    with pytest.raises(DataError, match="trajectory 1 has 68 tokens.*at most 64"):
        pack(samples([(3, 4), (3, 62)]), max_tokens=64, data_parallel_size=1, sequence_multiple=4)


def test_arithmetic_is_right_and_held_out_problems_never_train():
    train, test = make_problems(600, seed=1), make_problems(300, seed=1, held_out=True)
    for problem in train + test:
        assert eval(problem.text[:-1]) == int(problem.answer)  # noqa: S307  our own text
    assert not {p.text for p in train} & {p.text for p in test}
    assert all(is_held_out(p.text) for p in test) and {p.level for p in train} == {1, 2, 3}
    assert make_problems(20, seed=1) == train[:20] and make_problems(20, seed=2) != train[:20]


def test_chains_are_worked_out_step_by_step_and_held_apart():
    levels = (4, 6, 8)
    train, test = make_problems(300, levels=levels, seed=3), make_problems(150, levels=levels, seed=3, held_out=True)
    for problem in train + test:
        assert eval(problem.text[:-1]) == int(problem.answer)  # noqa: S307  our own text
        solution = solve(problem)
        assert solution.endswith(f" \\boxed{{{problem.answer}}}") and solution.count("(") == problem.level
        for step in solution.partition(" ")[0].split("(")[1:]:  # e.g. 7+5=12,1+2+1=4)42-11=
            columns, _, rest = step.partition(")")
            assert all(eval(left) == int(right) for left, right in (c.split("=") for c in columns.split(",")))  # noqa: S307
            assert eval(rest.rstrip("=")) == int(problem.answer)  # noqa: S307
    assert not {p.text for p in train} & {p.text for p in test} and {p.level for p in train} == set(levels)
    assert all(80 < len(solve(p)) < 260 for p in train)
    assert solve(Problem("17+25-11=", "31", 4)) == "(7+5=12,1+2+1=4)42-11=(2-1=1,4-1=3)31 \\boxed{31}"


def test_a_bad_memory_mistakes_the_same_facts_for_the_same_results_at_rates_of_their_own():
    memory, generator = Memory(largest_rate=0.9, skew=8.0), np.random.default_rng(0)
    facts = [(f"{a}+{b}", a + b) for a in range(10) for b in range(10)]
    rates = []
    for fact, result in facts:
        recalled = [memory.recall(fact, result, generator) for _ in range(200)]
        wrong = {value for value in recalled if value != result}
        assert len(wrong) <= 1 and all(value // 10 == result // 10 and 0 <= value < 20 for value in wrong)
        rates.append(np.mean([value != result for value in recalled]))
    assert np.mean(rates) == pytest.approx(0.9 / 9, abs=0.05), "0.9 times the mean of u ** 8"
    assert max(rates) > 0.5 and np.median(rates) < 0.05
    assert all(Memory().recall(fact, result, generator) == result for fact, result in facts)


def test_prompts_from_json_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"q": "1+1=", "a": "2", "id": "x"}, {"q": "1" * 50, "a": "1"}, {"q": "2+2=", "a": ["4", 4]}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    config = build(DataConfig, dict(source=str(path), problem_field="q", answer_field="a", max_prompt_tokens=10))
    prompts = load_prompts(config, make_tokenizer())
    assert len(prompts) == 2 and prompts.too_long == 1
    assert prompts[0].text == "1+1=" and prompts[0].answers == ("2",) and prompts[0].metadata == {"id": "x"}
    assert make_tokenizer().decode(prompts[1].token_ids) == "2+2=" and prompts[1].answers == ("4", "4")


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"problem": "a", "answer": "b"', r"p.jsonl:2: not JSON"),
        ("[1]", r"p.jsonl:2: a list, not an object"),
        ('{"problem": "a"}', r"p.jsonl:2: no field 'answer'; it has problem"),
        ('{"problem": 3, "answer": "b"}', r"p.jsonl:2: field 'problem' is a int"),
        ('{"problem": "a", "answer": []}', r"p.jsonl:2: field 'answer'"),
        ('{"problem": "a", "answer": ["b", ""]}', r"p.jsonl:2: field 'answer'"),
        ('{"problem": "a", "answer": true}', r"p.jsonl:2: field 'answer'.*True"),
        ('{"problem": "a", "answer": NaN}', r"p.jsonl:2: field 'answer'.*nan"),
        ('{"problem": "a", "answer": [["b"]]}', r"p.jsonl:2: field 'answer'"),
        ('{"problem": " ", "answer": "b"}', r"p.jsonl:2: field 'problem' is empty"),
        (r'{"problem": "\ud800", "answer": "b"}', r"p.jsonl:2: .*surrogate"),
        ("[" * 100_000, r"p.jsonl:2: not JSON"),
        ("\udce9", r"p.jsonl:2: not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, words):
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "a", "answer": "b"}\n' + line + "\n", encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=words):
        load_prompts(DataConfig(source=str(path)), make_tokenizer())


def test_byte_order_mark_line_ends_and_unicode_separators(tmp_path):
    row = {"problem": "1\u2028+1{{}}", "answer": 2}
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n\r\n")
    [prompt] = load_prompts(DataConfig(source=str(tmp_path / "p.jsonl")), make_tokenizer()).prompts
    assert (prompt.text, prompt.answers) == ("1\u2028+1{{}}", ("2",))
    config = DataConfig(source=str(tmp_path / "p.jsonl"), template="{{}} {problem}")
    assert render(config, prompt.text, None)[0] == "{} 1\u2028+1{{}}"  # the template's braces alone are an escape


def test_parquet_and_data_sets_give_the_same_prompts(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [{"problem": "1+2=", "answer": "3"}, {"problem": "5-2=", "answer": "3"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train.parquet")
    found = [load_prompts(DataConfig(source=str(s)), make_tokenizer()) for s in (tmp_path / "p.parquet", tmp_path / "set")]
    assert [[p.token_ids for p in s.prompts] for s in found][0] == [p.token_ids for p in found[1].prompts]
    with pytest.raises(DataError, match="neither a .jsonl or .parquet file nor a data set"):
        load_prompts(DataConfig(source=str(tmp_path / "absent")), make_tokenizer())


def test_templates():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    text = lambda **k: tokenizer.decode(load_prompts(DataConfig(source="arithmetic", problems=1, **k), tokenizer)[0].token_ids)  # noqa: E731
    problem = make_problems(1)[0].text
    assert text(template="Q: {problem} A:") == f"Q: {problem} A:"
    assert text(template="chat", system_prompt="S") == f"<system>S<user>{problem}<a>"
    assert text(template="qwen-math").endswith(f"user\n{problem}<|im_end|>\n<|im_start|>assistant\n") and "boxed{}" in text(
        template="qwen-math"
    )
    with pytest.raises(ConfigError, match="no chat template"):
        load_prompts(DataConfig(source="arithmetic", template="chat"), make_tokenizer())
    for bad in (dict(template="nothing"), dict(system_prompt="x"), dict(split="dev"), dict(levels=(4,))):
        with pytest.raises(ConfigError):
            DataConfig(source="arithmetic", **bad)
