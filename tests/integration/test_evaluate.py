"""pmpo-evaluate with real vLLM on a Megatron checkpoint: killed in the middle, it goes on and answers every problem once."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from pmpo_megatron.commands.evaluate import main
from pmpo_megatron.convert import hf_to_megatron
from tests.integration.engine_worker import save_model
from tests.integration.rewards import letters
from tests.integration.runs import ROOT, wait_until

SAMPLES, PROBLEMS, OTHERS = 3, 24, 3
LONG = 7  # this problem does not fit into the model's 256 tokens


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Problems, the checkpoint, and the results of an evaluation that was killed and continued."""
    place = tmp_path_factory.mktemp("evaluate")
    save_model("qwen2", place / "hf")
    hf_to_megatron(place / "hf", place / "model")
    problems = [{"problem": f"What is {i} + {i}?" * (40 if i == LONG else 1), "answer": str(2 * i)} for i in range(PROBLEMS)]
    (place / "amc23.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    (place / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems[:OTHERS]))
    first = start(place)
    wait_until(lambda: lines(place) >= 4 or first.poll() is not None, timeout=120, what="the fourth record")
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, (place / "log").read_text()
    place.joinpath("killed.jsonl").write_bytes((place / "out/model/amc23.jsonl").read_bytes())
    place.joinpath("exported").write_text(str((place / "out/model/exported/config.json").is_file()))
    assert start(place).wait(timeout=150) == 0, (place / "log").read_text()
    return place


def arguments(place: Path) -> list[str]:
    options = (
        f"--data-dir {place} --benchmarks AMC {place}/mine.jsonl --out {place}/out --template plain --samples {SAMPLES}"
        " --temperature 1 --max-tokens 60 --reward tests.integration.rewards:letters --chunk 2 --workers 1"
        " --rollout threads=1 kv_cache_gib=0.1 max_num_seqs=8"
    )
    return [str(place / "model"), *options.split()]


def start(place: Path) -> subprocess.Popen:
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pmpo_megatron.commands.evaluate", *arguments(place)]
    with open(place / "log", "ab") as log, open(place / "table", "wb") as table:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=table, stderr=log, start_new_session=True)


def lines(place: Path) -> int:
    path = place / "out/model/amc23.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def records(place: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (place / f"out/model/{name}.jsonl").read_text().splitlines()]


def test_every_problem_is_there_once_and_what_was_recorded_before_the_kill_is_kept(place):
    before = (place / "killed.jsonl").read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert 4 <= before.count(b"\n") < PROBLEMS, "it was killed in the middle"
    assert (place / "out/model/amc23.jsonl").read_bytes().startswith(before)
    for name, count in (("amc23", PROBLEMS), ("mine", OTHERS)):
        assert sorted(record["index"] for record in records(place, name)) == list(range(count))
    total, left = PROBLEMS + OTHERS, PROBLEMS + OTHERS - before.count(b"\n")
    assert f"{left} of {total} problems are to be answered" in (place / "log").read_text()
    assert "Warning" not in (place / "log").read_text(), "nothing that no user could act upon"


def test_the_export_survives_the_kill_and_is_gone_at_the_end(place):
    assert (place / "exported").read_text() == "True"
    assert not (place / "out/model/exported").exists()
    assert (place / "log").read_text().count("converting ...") == 1


def test_records_hold_every_response_with_its_score(place):
    for record in records(place, "amc23"):
        i = record["index"]
        assert record["answers"] == [str(2 * i)] and record["problem"].startswith(f"What is {i} + {i}?")
        assert len(record["responses"]) == SAMPLES
        for response in record["responses"]:
            if i == LONG:
                assert response == {"text": "", "score": 0.0, "finish_reason": "prompt too long", "tokens": 0}
                continue
            assert response["score"] == min(max(letters(response["text"], record["answers"]), 0.0), 1.0)
            reason, tokens = response["finish_reason"], response["tokens"]
            assert reason == "stop" or (reason, tokens) == ("length", 60)  # the sixtieth may be the end token
            assert tokens <= 60
    texts = [response["text"] for record in records(place, "amc23") for response in record["responses"] if response["text"]]
    assert len(set(texts)) > 0.9 * len(texts), "every response has a random stream of its own"


def test_figures_are_those_of_the_records(place):
    summary = json.loads((place / "out/summary.json").read_text())
    assert summary["benchmarks"] == ["AMC", "mine"]
    [model] = summary["models"]
    accuracies = []
    for name, stem in (("AMC", "amc23"), ("mine", "mine")):
        scores = [[response["score"] for response in record["responses"]] for record in records(place, stem)]
        means = [sum(score >= 0.5 for score in each) / SAMPLES for each in scores]
        figures = model["benchmarks"][name]
        assert figures["accuracy"] == pytest.approx(
            [statistics.mean(means), statistics.stdev(means) / len(means) ** 0.5], abs=1e-12
        )
        pairs = [[max(pair) >= 0.5 for pair in combinations(each, 2)] for each in scores]
        assert figures["pass_at_k"]["2"][0] == pytest.approx(statistics.mean(statistics.mean(each) for each in pairs))
        assert set(figures["pass_at_k"]) == {"2", "3"}
        accuracies.append(figures["accuracy"][0])
    assert model["benchmarks"]["AMC"]["prompts_too_long"] == 1
    assert model["average"][0] == pytest.approx(statistics.mean(accuracies))
    table = (place / "table").read_text()
    assert table == (place / "out/summary.md").read_text()
    assert (
        f"| model | {100 * accuracies[0]:.1f} ± " in table and "avg@3, temperature 1" in table and "1 prompts too long" in table
    )


def test_a_complete_evaluation_starts_no_engine(place, capsys, monkeypatch):
    monkeypatch.setattr("pmpo_megatron.benchmarks.evaluation.make_engine", None)
    assert main(arguments(place)) == 0
    assert capsys.readouterr().out == (place / "table").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--temperature", "0.9"], "error: temperature: is 0.9, but the evaluation in .* began with 1.0"),
        (["--template", "qwen-math"], "error: template: is 'qwen-math', but .* began with 'plain'"),
        (["--benchmarks", "Olympaidbench"], "did you mean OlympiadBench"),
        (["--benchmarks", "{place}/none.jsonl"], "none.jsonl: no such file"),
        (["--rollout", "tensor_paralel=2"], "--rollout.tensor_paralel: unknown key .* did you mean 'tensor_parallel'"),
        (["--reward", "maths"], "'maths' is none of math, boxed, exact"),
        (["--pass-k", "4"], "--pass-k: .*between 1 and --samples, which is 3"),
        (["--template", "chat", "--out", "{place}/other"], "--template: chat: the tokenizer in .* has no chat template"),
        (["--samples", "2", "--temperature", "0"], "--samples: 2 with temperature 0"),
        (["--rollout", "nodes=all"], "--rollout.nodes: an evaluation has one node"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(place, capfd, change, message):
    change = [text.replace("{place}", str(place)) for text in change]
    assert main([*arguments(place), *change]) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert re.search(message, line)


def test_other_weights_under_the_same_name_are_refused(place, capfd, tmp_path):
    save_model("qwen2-tied", tmp_path / "model")
    assert main([str(tmp_path / "model"), *arguments(place)[1:]]) == 2
    assert "error: weights: is '" in capfd.readouterr().err
    assert main(["other=" + str(tmp_path / "none"), *arguments(place)[1:]]) == 2
    assert "none: no such directory" in capfd.readouterr().err


def test_a_bad_line_of_a_file_is_named(place, capfd, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"problem": "1 + 1?", "answer": "2"}\n{"problem": "2 + 2?"}\n')
    assert main([*arguments(place), "--benchmarks", str(path)]) == 1
    assert "bad.jsonl:2: no field 'answer'; it has problem" in capfd.readouterr().err
