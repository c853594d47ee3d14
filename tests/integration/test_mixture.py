"""A run on two sources as users start it: vLLM, a reward of each source's own, stopped and continued; what it reports."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.integration import runs
from tests.integration.engine_worker import save_model


def test_a_run_on_two_sources_reports_each_and_goes_on(tmp_path):
    rows = [{"problem": f"{number}+1=", "answer": number + 1, "unit": 4} for number in range(10)]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = f"short: {{source: {tmp_path}/short.jsonl, rewards: {{'tests.integration.rewards:shorter': 1.0}}}}"
    settings = [
        "data.source=null",
        f"data.sources={{sums: {{source: arithmetic, weight: 2}}, {short}}}",
        f"evaluation.data={{max_prompt_tokens: 16, sources: {{sums: {{source: arithmetic, split: test}}, {short}}}}}",
        "evaluation.max_problems=4",
        "evaluation.temperature=1.0",
        "evaluation.greedy=true",
        "rewards.functions={tests.integration.rewards:letters: 4.0}",
    ]
    model, directory = save_model("qwen2", tmp_path / "model"), tmp_path / "run"
    runs.train(model, directory, *settings, "run.rounds=2")
    text = runs.train(model, directory, *settings, "run.rounds=3")
    assert "going on after round 2 of 3" in text and "reward tests.integration.rewards:shorter: " in text
    found = runs.metrics(directory)
    rounds, evaluations = [r for r in found if "reward/mean" in r], [r for r in found if "eval/accuracy_mean" in r]
    assert len(rounds) == 3
    for row in rounds:  # a round has 4 prompts of sums and 2 of short, with 4 responses each
        for name in ("reward_mean", "p_mean", "ess_fraction", "clip_fraction"):
            of_all = {"reward_mean": "reward/mean", "p_mean": "objective/p_mean"}.get(name, f"objective/{name}")
            mean = (2 * row[f"source/sums/{name}"] + row[f"source/short/{name}"]) / 3
            assert abs(mean - row[of_all]) <= 1e-6 * max(1.0, abs(mean)), (name, row)
        assert row["source/short/reward_min"] == 0.0, "the longest of a group"
        assert row["rewards/tests.integration.rewards:shorter/errors"] == 0
    for row in evaluations:
        for name in ("accuracy_mean", "greedy_accuracy_mean"):
            assert row[f"eval/{name}"] == (row[f"eval/sums/{name}"] + row[f"eval/short/{name}"]) / 2
        assert row["eval/short/greedy_accuracy_mean"] == 0.0, "a group of one has no response that is shorter than another"
        assert 0 <= row["eval/accuracy_mean"] <= 1 < 4 * row["eval/reward"] + 1, "a weight of 4 is in the reward alone"
    report = (directory / "report.html").read_text()
    assert "Mean p of each source" in report and "<td>short</td>" in report
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    assert {"source/sums/p_mean", "source/short/p_mean", "eval/short/accuracy_mean"} <= set(events.Tags()["scalars"])
