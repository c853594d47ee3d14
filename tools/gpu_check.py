#!/usr/bin/env python3
"""Proves a machine before a first run: what is installed, whether its numbers are right, whether a run trains and resumes,
and how fast the parts are. With GPUs it takes under 10 minutes.

python tools/gpu_check.py --out runs/gpu_check
python tools/gpu_check.py --only environment training     # some parts
python tools/gpu_check.py --device cpu                     # the parts that need no GPU

Each part is a process of its own with a time limit, its output in OUT/PART.log; one that cannot run here says why. Needs
requirements/dev.txt beside the project's own, because the parts that compare numbers are tests/gpu. OUT/report.json holds
everything. Exit code: 0 no part failed, 1 one did, 2 bad input.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pmpo_megatron.checkpoint.files import replace_text
from pmpo_megatron.data.generated import make_problems
from pmpo_megatron.data.tokenizer import load_tokenizer
from pmpo_megatron.monitor.jsonl import read_json_lines
from pmpo_megatron.rollout.config import SamplingConfig
from pmpo_megatron.rollout.replay import RecordingEngine
from pmpo_megatron.types import Prompt, Rollout, RolloutGroup

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "megatron.core", "transformer_engine", "apex", "vllm", "flash_attn", "transformers")
TRAINING = [
    "run.rounds=2",
    "data={source: arithmetic, problems: 32, max_prompt_tokens: 16}",
    "sampling={samples_per_prompt: 4, max_tokens: 12}",
    "batch={prompts_per_round: 16, steps_per_round: 4, max_tokens_per_micro_batch: 512}",
    "optimizer.learning_rate=0.001",
    "rewards={functions: {tests.integration.rewards:letters: 1.0}, workers: 1}",
    "rollout.kv_cache_gib=0.25",
    "checkpoint.every_rounds=1",
    "evaluation.data=null",
    "monitor={progress: line, report: false, tensorboard: false}",
]


class Skipped(Exception):
    """A part cannot run here; says why."""


class Failed(Exception):
    """A part did not do what it should; says what, and where the log is."""


@dataclass(frozen=True)
class Check:
    """Where the parts run: directory of the results, ``cpu`` or ``cuda``."""

    out: Path
    device: str

    def run(self, part: str, command: list[str], limit_s: float) -> str:
        """The output of ``command``, which also goes to the part's log.

        Raises:
            Failed: it ended with another exit code than 0, or did not end in time.
        """
        log = self.out / f"{part}.log"
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
        if self.device == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": ""}
        begin = log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code is None:
            raise Failed(f"not done after {limit_s:.0f} s; see {log}")
        output = log.read_bytes()[begin:].decode(errors="replace")
        if code:
            last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
            raise Failed(f"exit code {code}: {last.strip()[:200]}; see {log}")
        return output

    def needs_gpu(self) -> None:
        if self.device == "cpu":
            raise Skipped("needs a GPU")


Part = Callable[[Check], dict[str, Any]]  # what it found; raises Skipped or Failed


def environment(check: Check) -> dict[str, Any]:
    """Versions, also of what does not import, and the machine."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "cores": os.cpu_count()}
    found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    for package in PACKAGES:
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            found[package] = None
            continue
        program = f"import {package} as p; print('version', getattr(p, '__version__', 'unknown'))"
        try:
            output = check.run("environment", [sys.executable, "-W", "ignore", "-c", program], 180)
            found[package] = output.split("version ")[-1].strip()
        except Failed as error:
            found[package] = f"does not import: {error}"
    if check.device == "cuda":
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        found["gpus"] = [f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB" for gpu in gpus]
        found |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def tests(name: str) -> Part:
    """A part that is a file of tests/gpu."""

    def run(check: Check) -> dict[str, Any]:
        check.needs_gpu()
        results = check.out / f"{name}.xml"
        try:
            check.run(name, [sys.executable, "-m", "pytest", f"tests/gpu/test_{name}.py", f"--junitxml={results}"], 300)
        finally:
            cases = ElementTree.parse(results).iter("testcase") if results.exists() else []
            outcome = {case.get("name", ""): _outcome(case) for case in cases}
            (check.out / f"{name}.json").write_text(json.dumps(outcome, indent=1))
        return outcome

    return run


def _outcome(case: ElementTree.Element) -> str:
    for child in case:
        if child.tag in ("skipped", "failure", "error"):
            return f"{child.tag}: {(child.get('message') or '').splitlines()[0][:160]}"
    return "passed"


def training(check: Check) -> dict[str, Any]:
    """Two rounds at once, and one, a kill and the other: the same numbers. With vLLM where it is, else recorded responses."""
    model = check.out / "model"
    check.run("training", [sys.executable, "tools/make_tiny_model.py", "--out", str(model), "--steps", "20"], 120)
    settings = [*TRAINING, f"model.path={model}"]
    if importlib.util.find_spec("vllm") is None:
        recorded = check.out / "recorded.jsonl"
        recorded.unlink(missing_ok=True)
        RandomEngine(model).record(recorded, rounds=2)
        settings += ["rollout.engine=replay", f"rollout.replay_from={recorded}"]
    command = [sys.executable, "-W", "ignore", "-m", "pmpo_megatron.commands.train", *settings]
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    runs = check.out / "runs"
    shutil.rmtree(runs, ignore_errors=True)  # of an earlier check
    for name, rounds in (("whole", (2,)), ("resumed", (1, 2))):
        for count in rounds:
            directory = runs / name
            check.run("training", [*command, f"run.directory={directory}", f"run.rounds={count}"], 240)
        lines = read_json_lines(directory / "metrics.jsonl")
        rows[name] = {line["step"]: line for line in lines if "objective/loss" in line}
    names = ("objective/loss", "policy/grad_norm", "reward/mean", "mismatch/mean_abs")
    ends = {name: [row[2][metric] for metric in names] for name, row in rows.items()}
    if ends["whole"] != ends["resumed"]:
        raise Failed(f"the resumed run differs: {ends['resumed']} for {ends['whole']}; see {check.out / 'training.log'}")
    return dict(zip(names, ends["whole"], strict=True)) | {"resumed": "bit by bit"}


class RandomEngine:
    """Stands in for vLLM where there is none: random responses, with the log-probs that transformers gives them."""

    def __init__(self, model: Path) -> None:
        import transformers

        self._model = transformers.AutoModelForCausalLM.from_pretrained(model)
        self._tokenizer = load_tokenizer(model)
        self._generator = torch.Generator().manual_seed(0)

    def record(self, path: Path, *, rounds: int) -> None:
        """Responses to every problem of `TRAINING` in every round, to the file ``path``."""
        recording = RecordingEngine(self, path)  # type: ignore[arg-type]
        texts = [problem.text for problem in make_problems("arithmetic", 32)]
        ids = [np.array(self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32) for text in texts]
        prompts = [Prompt(index, token_ids, text, ()) for index, (text, token_ids) in enumerate(zip(texts, ids, strict=True))]
        for number in range(rounds):
            recording.generate(prompts, SamplingConfig(samples_per_prompt=4, max_tokens=12), round_index=number)

    def generate(self, prompts: list[Prompt], sampling: SamplingConfig, *, round_index: int) -> list[RolloutGroup]:
        samples = range(sampling.samples_per_prompt)
        return [RolloutGroup(prompt, tuple(self._respond(prompt, sampling.max_tokens) for _ in samples)) for prompt in prompts]

    def _respond(self, prompt: Prompt, length: int) -> Rollout:
        ids = torch.randint(2, len(self._tokenizer), (length,), generator=self._generator)
        with torch.no_grad():
            whole = torch.cat([torch.from_numpy(prompt.token_ids).long(), ids])
            logits = self._model(whole[None]).logits[0, len(prompt.token_ids) - 1 : -1]
        log_probs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0].float().numpy()
        versions = np.zeros(length, dtype=np.int32)
        return Rollout(ids.numpy().astype(np.int32), log_probs, self._tokenizer.decode(ids), "length", versions, 0)


def bench(script: str, *arguments: str, on_gpu: tuple[str, ...] = (), needs: str | None = None) -> Part:
    """A part that is a script of tools/bench; its figures are what it prints. ``on_gpu``: arguments there, in their place."""

    def run(check: Check) -> dict[str, Any]:
        if needs is not None and importlib.util.find_spec(needs) is None:
            raise Skipped(f"{needs} is not installed")
        chosen = on_gpu if on_gpu and check.device == "cuda" else arguments
        command = [sys.executable, "-W", "ignore", f"tools/bench/{script}.py", "--device", check.device, *chosen]
        return {"printed": check.run(script, command, 240).splitlines()}

    return run


PARTS: dict[str, Part] = {
    "environment": environment,
    "numerics": tests("numerics"),
    "layouts": tests("layouts"),
    "memory": tests("memory"),
    "engine": tests("engine"),
    "training": training,
    "step": bench("step", on_gpu=("--size", "1.5B", "--trajectory", "4096", "--recompute", "selective")),
    "log_probs": bench("log_probs", "--tokens", "512", "--vocabulary", "20000", "--repeats", "1", on_gpu=("--repeats", "3")),
    "weight_sync": bench("weight_sync", "--layers", "2", "--repeats", "1", on_gpu=("--repeats", "3"), needs="vllm"),
}


def check_part(name: str, check: Check) -> dict[str, Any]:
    """What the report holds of a part."""
    began, result = time.monotonic(), {"outcome": "passed", "reason": "", "figures": {}}
    try:
        result["figures"] = PARTS[name](check)
    except Skipped as reason:
        result |= {"outcome": "skipped", "reason": str(reason)}
    except Failed as reason:
        result |= {"outcome": "failed", "reason": str(reason)}
    return result | {"seconds": round(time.monotonic() - began, 1)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu_check"), help="directory of the results (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    return parser.parse_args()


def main() -> int:
    options = parse()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: PyTorch sees no GPU here", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    check, report = Check(options.out.resolve(), device), {}
    for name in options.only:
        report[name] = check_part(name, check)
        outcome, reason = report[name]["outcome"], report[name]["reason"]
        print(f"{name:12} {outcome:8} {report[name]['seconds']:6.1f} s  {reason}", flush=True)
        for key, value in report[name]["figures"].items():
            for line in value if isinstance(value, list) else [f"{key}: {value}"]:
                print(f"{'':13}{line}", flush=True)
        replace_text(options.out / "report.json", json.dumps(report, indent=1) + "\n")
    return 1 if any(part["outcome"] == "failed" for part in report.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
