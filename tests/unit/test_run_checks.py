"""Wrong input to pmpo-train: one line that names the field, exit code 2, nothing started and nothing written."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pmpo_megatron.commands.train import main
from pmpo_megatron.config import build
from pmpo_megatron.hf.tiny_model import make_tokenizer
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[2]


def dry_run(capfd, directory, *overrides):
    settings = ["model.path=Qwen/Qwen2.5-0.5B", "data.source=arithmetic", f"run.directory={directory}/run"]
    return main(["--dry-run", *settings, *overrides]), capfd.readouterr()


def test_a_right_configuration_passes_and_writes_nothing(capfd, tmp_path):
    code, output = dry_run(capfd, tmp_path)
    assert code == 0 and output.out.endswith("dry run: nothing wrong found\n") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--world-size", "0"], "error: --world-size: 0 must be at least 1"),
        (["run.directory=/proc/version/x"], "error: run.directory: /proc/version/x: /proc/version is a file, not a directory"),
        (["monitor.wandb_project=x"], "error: monitor.wandb_project: needs the package wandb"),
        (["episode.function=json:nothing"], "error: episode.function: 'json:nothing' cannot be imported: AttributeError"),
        (["episode.function=json:dumps"], "error: episode.function: 'json:dumps' must be an async def episode(prompt, policy)"),
        (["rewards.functions={maths: 1}"], "error: rewards.functions: 'maths' is none of math, boxed, exact"),
        (["optimizer.learning_rate=[1"], "error: optimizer.learning_rate: '[1' is not valid YAML: "),
        (["data.source=/no/such.jsonl"], "error: data.source: /no/such.jsonl: No such file or directory"),
        (["parallel.tensor=3"], "error: parallel.tensor: tensor 3"),
        (
            ["run.device=cuda", "model.dtype=float32", "parallel.context=2", "--world-size", "2"],
            "error: model.dtype: float32 with parallel.context = 2 has no attention in Transformer Engine; use bfloat16",
        ),
        (
            ["round.routing_replay=old"],
            "error: round.routing_replay: has no effect: Qwen/Qwen2.5-0.5B has no mixture of experts",
        ),
        (
            ["objective.balance_coefficient=0.1"],
            "error: objective.balance_coefficient: has no effect: Qwen/Qwen2.5-0.5B has no",
        ),
        (["rollout.expert_parallel=true"], "error: rollout.expert_parallel: has no effect with tensor_parallel 1"),
        (
            ["model.path=Qwen/Qwen3-30B-A3B", "rollout.expert_parallel=true", "rollout.tensor_parallel=2", "run.device=cpu"],
            "error: rollout.expert_parallel: vLLM divides whole experts on GPUs only",
        ),
        (["rollout.quantization=fp8", "run.device=cpu"], "error: rollout.quantization: fp8: vLLM computes in fp8 on GPUs only"),
        (["rollout.sleep=kv", "run.device=cpu"], "error: rollout.sleep: kv: vLLM has no sleep mode on CPU"),
        (
            ["rollout.sleep=all", "round.mode=in_flight"],
            "error: rollout.sleep: all with round.mode in_flight: engines generate while the trainer trains",
        ),
        (
            ["round.routing_replay=old", "round.old_log_probs=rollout"],
            "error: round.routing_replay: takes what the trainer's routers do at the round's start; round.old_log_probs",
        ),
        (["optimizer.learningrate=1"], "error: optimizer.learningrate: unknown key"),
    ],
)
def test_wrong_input_is_one_line(capfd, tmp_path, overrides, message):
    if "wandb" in message and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    code, output = dry_run(capfd, tmp_path, *overrides)
    assert code == 2 and output.err.startswith(message) and output.err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, variables, message",
    [
        ([], {}, "error: model.path: is required"),
        (
            ["model.path=x", "data.source=arithmetic"],
            {"WORLD_SIZE": "many", "RANK": "x"},
            "error: environment: WORLD_SIZE='many'",
        ),
    ],
)
def test_the_command_itself(arguments, variables, message):
    command = [sys.executable, "-W", "ignore", "-m", "pmpo_megatron.commands.train", "--dry-run", *arguments]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), **variables)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr


def model_with_tokenizer(directory):
    """A tiny model that knows the characters of the generated task."""
    tokenizer = make_tokenizer()
    save_tiny_model("qwen2", directory, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(directory)
    return directory


def test_a_disk_too_small_for_any_checkpoint_is_an_error_before_anything_starts(capfd, tmp_path, monkeypatch):
    from pmpo_megatron.checkpoint import files

    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    model, directory = model_with_tokenizer(tmp_path / "model"), tmp_path / "run"
    settings = ["data.source=arithmetic", "sampling.max_tokens=16", "data.max_prompt_tokens=16", "run.device=cpu"]
    settings += ["rollout.max_model_len=64", "rollout.kv_cache_gib=0.1"]
    code = main([f"model.path={model}", f"run.directory={directory}", *settings])
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert code == 2 and not directory.exists()
    assert line.startswith(f"error: run.directory: {directory}/checkpoints: a checkpoint needs ")
    assert line.endswith(" bytes, 1000 bytes are free; choose a larger disk")


def test_the_run_takes_the_prompts_that_the_check_has_read(tmp_path, monkeypatch):
    from pmpo_megatron.training import assembly
    from pmpo_megatron.training.checks import check_run
    from pmpo_megatron.training.run_config import RunConfig

    data = {"source": "arithmetic", "problems": 20, "max_prompt_tokens": 16}
    values = {"model": {"path": str(model_with_tokenizer(tmp_path / "model"))}, "data": data, "sampling": {"max_tokens": 16}}
    values |= {"evaluation": {"data": data | {"split": "test"}}, "run": {"directory": str(tmp_path / "run"), "device": "cpu"}}
    config = build(RunConfig, values | {"rollout": {"max_model_len": 64}})
    read = check_run(config, 1).prompts
    again = assembly._load_data(config, {})
    monkeypatch.setattr(assembly, "load_prompts", lambda *_, **__: pytest.fail("tokenised again"))
    taken = assembly._load_data(config, read)
    assert taken == (read["data"], read["evaluation.data"])
    assert [[prompt.text for prompt in prompts] for prompts in again] == [[p.text for p in prompts] for prompts in taken]


def test_the_best_checkpoints_cannot_be_told_without_an_evaluation(capfd, tmp_path):
    code, output = dry_run(capfd, tmp_path, "checkpoint.keep_best=1")
    assert code == 2 and "checkpoint.keep_best: needs evaluation.data" in output.err


def test_a_directory_in_use_is_an_error_before_anything_expensive(capfd, tmp_path):
    """pmpo-train itself, while another process holds the run's directory."""
    hold = "import sys, time; from pmpo_megatron.checkpoint.run_lock import RunLock; lock = RunLock(sys.argv[1])"
    model, directory = model_with_tokenizer(tmp_path / "model"), tmp_path / "run"
    command = [sys.executable, "-c", f"{hold}; print(1, flush=True); time.sleep(100)", str(directory)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"1\n"
        settings = ["data.source=arithmetic", "sampling.max_tokens=16", "data.max_prompt_tokens=16", "run.device=cpu"]
        settings += ["rollout.max_model_len=64", "rollout.kv_cache_gib=0.1"]
        code = main([f"model.path={model}", f"run.directory={directory}", *settings])
    finally:
        holder.kill()
        holder.wait()
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert code == 2 and line.startswith(f"error: run.directory: {directory} is in use by process {holder.pid} on host ")
    assert [path.name for path in directory.iterdir()] == ["run.lock"]
