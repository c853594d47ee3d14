"""Sampler, packing and prompts, against direct constructions."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pmpo_megatron.config import build
from pmpo_megatron.data.generated import make_problems
from pmpo_megatron.data.packing import flat_like, flatten, pack, unflatten
from pmpo_megatron.data.prompts import DataConfig, load_prompts, render
from pmpo_megatron.data.sampler import PromptSampler
from pmpo_megatron.data.split import split_into_steps, split_step, step_weights
from pmpo_megatron.errors import ConfigError, DataError
from pmpo_megatron.hf.tiny_model import make_tokenizer
from pmpo_megatron.types import RouteFormat, Sample, TrajectoryTable, to_token_ids


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


def samples(lengths, seed=0, groups=1):
    g = np.random.default_rng(seed)
    made = []
    for i, (prompt, response) in enumerate(lengths):
        ids = g.integers(5, 99, prompt + response).astype(np.int32)
        log_probs = g.normal(size=response).astype(np.float32)
        sampled = np.arange(response) % 4 > 1 if i % 3 == 2 and response else None  # the first two of four were told
        rest = (log_probs, i % 5 == 0, float(i) / 3, sampled)
        made.append(Sample(i, i * groups // len(lengths), ids[:prompt], ids[prompt:], *rest))
    return made


def some_samples(groups=1):
    g = np.random.default_rng(1)
    lengths = [(int(p), int(r)) for p, r in zip(g.integers(1, 20, 37), g.integers(0, 60, 37), strict=True)]
    return samples(lengths, groups=groups)


def split_of(given, **settings):
    return split_step(np.arange(len(given)), TrajectoryTable.of(given, [0.0] * len(given)), **settings)


@pytest.mark.parametrize("dp, multiple, micro_batch_multiple", [(1, 1, 1), (2, 4, 1), (4, 8, 2)])
def test_the_split_loses_nothing_and_balances(dp, multiple, micro_batch_multiple):
    given = some_samples()
    settings = dict(max_tokens=160, replicas=dp, sequence_multiple=multiple, micro_batch_multiple=micro_batch_multiple)
    replicas = split_of(given, **settings)
    assert len(replicas) == dp and len({len(r) for r in replicas}) == 1 and len(replicas[0]) % micro_batch_multiple == 0
    assert sorted(i for replica in replicas for members in replica for i in members.tolist()) == list(range(37))
    padded = [-(-(len(sample.prompt_ids) + len(sample.response_ids)) // multiple) * multiple for sample in given]
    sizes = [[sum(padded[i] for i in members) for members in replica] for replica in replicas]
    assert max(size for replica in sizes for size in replica) <= 160
    loads = [sum(replica) for replica in sizes]
    assert max(loads) - min(loads) <= 0.25 * max(loads)


@pytest.mark.parametrize("multiple", [1, 8])
def test_packed_trajectories_are_the_samples(multiple):
    given, weights = some_samples(), np.linspace(0.1, 1.0, 37)
    packed = pack(given, weights, sequence_multiple=multiple)
    assert packed.boundaries[-1] == packed.tokens_T.numel() and packed.sample_ids == tuple(range(37))
    assert all(n % multiple == 0 for n in np.diff(packed.boundaries))
    for number, (sample, start) in enumerate(zip(given, packed.boundaries, strict=False)):
        ids = [*sample.prompt_ids.tolist(), *sample.response_ids.tolist()]
        assert packed.tokens_T[start : start + len(ids)].tolist() == ids
        where = (packed.trajectory_T == number).nonzero().flatten()
        sampled = [k for k in range(len(sample.response_ids)) if sample.sampled is None or k % 4 > 1]
        assert packed.targets_T[where].tolist() == sample.response_ids[sampled].tolist()
        assert where.tolist() == [start + len(sample.prompt_ids) - 1 + k for k in sampled]
        assert np.array_equal(packed.rollout_log_probs_T[where].numpy(), sample.rollout_log_probs[sampled])
        assert packed.position_ids_T[start : start + len(ids)].tolist() == list(range(len(ids)))
    assert packed.weights_N.numpy() == pytest.approx(weights) and packed.advantages_N.tolist() == pytest.approx(
        [sample.advantage for sample in given]
    )


def test_fewer_trajectories_than_replicas_gives_micro_batches_of_padding():
    replicas = split_of(samples([(3, 4)]), max_tokens=64, replicas=4, sequence_multiple=4)
    assert sorted(len(members) for [members] in replicas) == [0, 0, 0, 1]
    packed = pack([], [], sequence_multiple=4)
    assert (packed.trajectory_T == -1).all() and packed.boundaries == (0, 4) and packed.sample_ids == ()


def test_a_trajectory_that_does_not_fit_is_named():
    with pytest.raises(DataError, match="trajectory 1 has 68 tokens.*at most 64"):
        split_of(samples([(3, 4), (3, 62)]), max_tokens=64, replicas=1, sequence_multiple=4)


def test_steps_take_whole_groups_in_an_order_of_seed_and_round():
    given = some_samples(groups=6)
    table = TrajectoryTable.of(given, [0.0] * len(given))
    split = lambda seed, number: split_into_steps(table, steps=3, seed=seed, round_index=number)  # noqa: E731
    groups = [[given[i].group_id for i in members] for members in split(1, 0)]
    assert sorted(i for members in split(1, 0) for i in members.tolist()) == list(range(37))
    assert [len(set(step)) for step in groups] == [2, 2, 2] and not set(groups[0]) & set(groups[1])
    assert [m.tolist() for m in split(1, 0)] == [m.tolist() for m in split(1, 0)]
    assert len({str([m.tolist() for m in split(*case)]) for case in ((1, 0), (1, 1), (2, 0))}) == 3


@pytest.mark.parametrize("mask", [False, True])
def test_weights_are_those_of_each_step(mask):
    given = some_samples(groups=6)
    table = TrajectoryTable.of(given, [0.0] * len(given))
    steps = split_into_steps(table, steps=3, seed=1, round_index=0)
    found = step_weights(steps, table, kind="length", max_length=60, mask_truncated=mask)
    for members in steps:
        lengths = {i: len(given[i].response_ids) if given[i].sampled is None else given[i].sampled.sum() for i in members}
        for i, length in lengths.items():
            masked = mask and given[i].truncated
            assert found[i] == pytest.approx(0.0 if masked else length / sum(lengths.values()))


def with_routes(given, routes):
    """``given`` with random routes of their tokens, those of the last unknown."""
    rng = np.random.default_rng(4)
    made = []
    for sample in given:
        tokens = len(sample.prompt_ids) + len(sample.response_ids)
        known = rng.integers(0, routes.num_experts, (tokens - 1, routes.layers, routes.per_token))
        made.append(replace(sample, routes=routes.whole(known, tokens)))
    return made


@pytest.mark.parametrize("routes", [None, RouteFormat(3, 2, 255), RouteFormat(1, 8, 256)])
@pytest.mark.parametrize("members", [[], [5], [4], [36, 0, 12, 8]])
def test_samples_come_back_from_the_arrays_that_are_sent(members, routes):
    given = some_samples(groups=6) if routes is None else with_routes(some_samples(groups=6), routes)
    table, chosen = TrajectoryTable.of(given, [0.0] * len(given)), np.array(members, dtype=np.int64)
    arrays = flatten([given[i] for i in members], routes)
    assert [(len(array), array.dtype) for array in arrays] == flat_like(chosen, table, routes)
    assert len(arrays[2]) == sum(len(given[i].response_ids) for i in members if given[i].sampled is not None)
    found = unflatten(arrays, chosen, table, routes)
    assert [sample.sample_id for sample in found] == members
    for one, other in zip(found, [given[i] for i in members], strict=True):
        for name, value in vars(other).items():
            assert np.array_equal(getattr(one, name), value), name
        assert np.shares_memory(one.prompt_ids, arrays[0]), "a view"
        assert routes is None or one.routes.dtype == routes.dtype == (np.uint8 if routes.num_experts < 256 else np.uint16)


def test_routes_lie_with_their_tokens_and_padding_has_none():
    routes = RouteFormat(3, 2, 16)
    given = with_routes(some_samples(groups=2), routes)
    packed = pack(given, [1.0] * len(given), sequence_multiple=8, routes=routes)
    for sample, start, end in zip(given, packed.boundaries, packed.boundaries[1:], strict=False):
        tokens = len(sample.routes)
        assert np.array_equal(packed.routes_T[start : start + tokens].numpy(), sample.routes)
        assert (packed.routes_T[start + tokens : end] == routes.unknown).all()
        assert packed.padding_T[start:end].tolist() == [False] * tokens + [True] * (end - start - tokens)
    with pytest.raises(ValueError, match=r"routes of \(2, 2\) layers and experts, the model has \(3, 2\)"):
        routes.whole(np.zeros((4, 2, 2)), 5)


def test_token_ids_are_checked_where_they_come_in():
    assert to_token_ids([3, 2**31 - 1]).tolist() == [3, 2**31 - 1] and to_token_ids(()).dtype == np.int32
    for bad in ([1.5], [-1], [2**31], [10**30], [True], [[1]], ["1"]):
        with pytest.raises(ValueError, match="whole numbers"):
            to_token_ids(bad)


def test_prompts_from_json_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"q": "1+1=", "a": "2", "id": "x"}, {"q": "1" * 50, "a": "1"}, {"q": "2+2=", "a": ["4", 4]}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    config = build(DataConfig, dict(source=str(path), problem_field="q", answer_field="a", max_prompt_tokens=10))
    prompts = load_prompts(config, make_tokenizer())
    assert len(prompts) == 2 and prompts.too_long == 1
    assert prompts[0].text == "1+1=" and prompts[0].answers == ("2",)
    assert [dict(prompt.metadata) for prompt in prompts.prompts] == [{"id": "x"}, {}]
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
    one, other = ([p.token_ids.tolist() for p in s.prompts] for s in found)
    assert one == other
    with pytest.raises(DataError, match="neither a .jsonl or .parquet file nor a data set"):
        load_prompts(DataConfig(source=str(tmp_path / "absent")), make_tokenizer())


def test_templates():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    text = lambda **k: tokenizer.decode(load_prompts(DataConfig(source="arithmetic", problems=1, **k), tokenizer)[0].token_ids)  # noqa: E731
    problem = make_problems("arithmetic", 1)[0].text
    assert text(template="Q: {problem} A:") == f"Q: {problem} A:"
    assert text(template="chat", system_prompt="S") == f"<system>S<user>{problem}<a>"
    assert text(template="qwen-math").endswith(f"user\n{problem}<|im_end|>\n<|im_start|>assistant\n") and "boxed{}" in text(
        template="qwen-math"
    )
    with pytest.raises(ConfigError, match="no chat template"):
        load_prompts(DataConfig(source="arithmetic", template="chat"), make_tokenizer())
    for bad in (dict(template="nothing"), dict(system_prompt="x"), dict(split="dev"), dict(levels=(9,))):
        with pytest.raises(ConfigError):
            DataConfig(source="arithmetic", **bad)
