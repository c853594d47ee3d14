"""Rows as code and choice benchmarks are published: read from a file, scored by their reward, counted by pass@k."""

import base64
import json
import pickle
import zlib
from dataclasses import replace

import pytest

from pmpo_megatron.benchmarks.formats import live_code_bench
from pmpo_megatron.benchmarks.sources import BENCHMARKS, find_benchmarks, problem_file
from pmpo_megatron.benchmarks.statistics import accuracy, pass_at_k
from pmpo_megatron.data.prompts import DataConfig, load_prompts
from pmpo_megatron.errors import ConfigError, DataError
from pmpo_megatron.hf.tiny_model import make_tokenizer
from pmpo_megatron.rewards import RewardPool
from pmpo_megatron.rewards.config import CodeConfig
from pmpo_megatron.rewards.pool import Request
from tests.unit.rewards.test_sandbox import block, sandboxed

EVALPLUS_CHECK = """
def assertion(out, exp, atol):
    assert out == exp, f"out: {out}, exp: {exp}"

def check(candidate):
    inputs = [[1, 2], [-1, 1]]
    results = [3, 0]
    for i, (inp, exp) in enumerate(zip(inputs, results)):
        assertion(candidate(*inp), exp, 0)
"""
HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """a + b"""\n',
    "test": EVALPLUS_CHECK,
    "entry_point": "add",
}
MBPP = {
    "task_id": 2,
    "prompt": "Write a function to add.",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
    "test_imports": ["import math"],
    "test": "import math\ninputs = [[1, 2], [5, 5]]\nfor inp in inputs:\n    assert add(*inp) == math.fsum(inp)\n",
}
CALLS = [{"input": "1\n2", "output": "3", "testtype": "functional"}, {"input": "2\n2", "output": "4", "testtype": "functional"}]
SCRIPTS = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}, {"input": "2 2\n", "output": "4\n", "testtype": "stdin"}]
LIVE_CALLS = {
    "question_content": "Add two numbers.",
    "starter_code": "class Solution:\n    def add(self, a, b):\n",
    "public_test_cases": json.dumps(CALLS[:1]),
    "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(json.dumps(CALLS[1:])))).decode(),
    "metadata": json.dumps({"func_name": "add"}),
}
LIVE_SCRIPTS = LIVE_CALLS | {
    "starter_code": "",
    "public_test_cases": json.dumps(SCRIPTS[:1]),
    "private_test_cases": json.dumps(SCRIPTS[1:]),
    "metadata": "{}",
}
FUNCTION = "def add(a, b):\n    return a + b"
METHOD = "class Solution:\n    def add(self, a, b):\n        return a + b"
SCRIPT = "a, b = map(int, input().split())\nprint(a + b)"
PROGRAMS = {
    "humanevalplus": ([HUMAN_EVAL], FUNCTION, "Complete this function"),
    "mbppplus": ([MBPP], FUNCTION, "add(1, 2) == 3"),
    "livecodebench": ([LIVE_CALLS], METHOD, "class Solution"),
    "livecodebench-scripts": ([LIVE_SCRIPTS], SCRIPT, "standard input"),
}


def load(directory, name, rows):
    """The prompts of the benchmark in a published file, as an evaluation loads them."""
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [benchmark] = find_benchmarks([name], directory)
    data = DataConfig(source=str(problem_file(benchmark, directory / "cache")), max_prompt_tokens=10_000)
    data = replace(data, answer_field=None if benchmark.reward == "code" else "answer")
    return benchmark, load_prompts(data, make_tokenizer()).prompts


@sandboxed
def test_programs_pass_all_tests_of_a_row_or_none_and_pass_at_k_counts_them(tmp_path):
    with RewardPool("code", workers=2, timeout=400.0, code=CodeConfig(wall_s=100.0)) as pool:
        for name, (rows, program, words) in PROGRAMS.items():
            benchmark, [prompt] = load(tmp_path, name.partition("-")[0], rows)
            assert benchmark.reward == "code" and words in prompt.text and prompt.answers == ()
            # The second is right in the first test alone; a constant and a remark are right in none.
            half = program.replace("a + b", "3 if b == 2 and a == 1 else -7")
            responses = [block(program), block(half), block("add = 3"), "I would add them."]
            scores = pool.score_requests([Request(responses, [], prompt.metadata)])[0]["code"]
            assert scores == [1.0, 0.0, 0.0, 0.0], (name, pool.stats.errors)
            assert accuracy([scores]).value == 0.25 and pass_at_k([scores], 2).value == 0.5  # 1 - C(3, 2) / C(4, 2)


ARC = {"question": "Which is red?", "choices": {"text": ["sky", "blood"], "label": ["1", "2"]}, "answerKey": "2"}
SWAG = {"ctx": "A man sits down. He", "endings": ["flies.", "rests."], "label": "1"}
PRO = {"question": "Which is red?", "options": ["sky", "blood"], "answer": "B", "answer_index": 1}


@pytest.mark.parametrize("name, row", [("arc", ARC), ("commonsenseqa", ARC), ("hellaswag", SWAG), ("mmlupro", PRO)])
def test_choices_are_listed_with_letters_and_scored(tmp_path, name, row):
    benchmark, [prompt] = load(tmp_path, name, [row])
    right = prompt.metadata["options"][1]
    assert benchmark.reward == "choice" and f"\nB. {right}\n" in prompt.text and prompt.answers == ("B",)
    with RewardPool("choice", workers=1, timeout=60.0) as pool:
        texts = [r"\boxed{B}", rf"\boxed{{{right}}}", r"\boxed{A}", r"\boxed{A, B}"]
        assert pool.score_requests([Request(texts, prompt.answers, prompt.metadata)])[0]["choice"] == [1.0, 1.0, 0.0, 0.0]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_packed_tests_are_data_and_nothing_that_they_name_is_called(tmp_path):
    packed = base64.b64encode(zlib.compress(pickle.dumps(Bomb(f"{tmp_path}/made")))).decode()
    for hidden in (packed, "no base64!", base64.b64encode(b"no zlib").decode()):
        with pytest.raises(ValueError, match="neither JSON nor packed"):
            live_code_bench(LIVE_CALLS | {"private_test_cases": hidden})
    assert not list(tmp_path.iterdir())


def test_rows_of_another_format_and_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataError, match=r"arc.jsonl:1: no row of ARC: KeyError\('options'\); it has question"):
        load(tmp_path, "arc", [{"question": "Which?"}])
    with pytest.raises(ConfigError, match="--data-dir: LiveCodeBench is no data set .* as livecodebench.jsonl"):
        find_benchmarks(["LiveCodeBench"], tmp_path)
    assert {benchmark.reward for benchmark in BENCHMARKS} == {None, "code", "choice"}
