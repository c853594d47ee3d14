#!/usr/bin/env python3
"""Starts vLLM servers for a run's rollouts, from the run's configuration, on a machine whose GPUs do not train.

python tools/serve.py --config examples/qwen2.5-32b/config.yaml
python tools/serve.py --config examples/qwen2.5-math-7b/config.yaml --port 9000 rollout.max_num_seqs=512

One server for every rollout.tensor_parallel GPUs, on ports from --port on; the GPUs are theirs alone, so they use --memory
of them. The trainer is given their addresses: rollout.engine=server 'rollout.urls=[http://HOST:8000, ...]'. Options of vLLM's
own server may follow --. When one server ends, or this is asked to end, all do.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from pmpo_megatron.config import apply_overrides, build, read_yaml
from pmpo_megatron.errors import ConfigError, PmpoError
from pmpo_megatron.rollout.vllm_engine import engine_settings
from pmpo_megatron.training.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
RECEIVER = "pmpo_megatron.bridge.vllm_worker.WeightReceiver"
GRACE_S = 30  # for a server that was asked to end


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--gpus", type=int, default=8, help="of this machine; 0: one server on the CPU (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all, for a trainer on another "
        "host. Whoever reaches a server controls it (default: %(default)s)")  # fmt: skip
    parser.add_argument("--port", type=int, default=8000, help="of the first server (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=0.9, help="share of each GPU's memory (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print a line `PORT COMMAND` for each server; start nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override of one field, read as YAML")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return parser.parse_intermixed_args(arguments[:end]), arguments[end + 1 :]


def commands(options: argparse.Namespace, more: list[str]) -> list[tuple[int, list[str], dict[str, str]]]:
    """(port, command, variables) of each server.

    Raises:
        ConfigError: the configuration is wrong, or rollout.tensor_parallel does not divide the GPUs.
    """
    config = build(RunConfig, apply_overrides(read_yaml(options.config), options.overrides))
    size, device = config.rollout.tensor_parallel, "cuda" if options.gpus else "cpu"
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = listed.split(",") if listed else [str(gpu) for gpu in range(options.gpus)]
    if options.gpus > len(gpus):
        raise ConfigError("--gpus", f"{options.gpus}; CUDA_VISIBLE_DEVICES names {len(gpus)}")
    if options.gpus % size or options.gpus < 0:
        raise ConfigError("rollout.tensor_parallel", f"{size} must divide the machine's {options.gpus} GPUs (--gpus)")
    cache = config.rollout.kv_cache_gib if device == "cpu" else None  # on a GPU it was chosen beside a trainer
    rollout = replace(config.rollout, gpu_memory_utilization=options.memory, kv_cache_gib=cache)
    settings = engine_settings(rollout, model_path=config.model.path, device=device, worker_extension=RECEIVER)
    flags = ["--enable-scale-out", "--host", options.host]
    for name, value in settings.items():
        if value is not False:
            flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    found = []
    for number in range(max(1, options.gpus // size)):
        command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *flags]
        variables = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        if options.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[number * size : (number + 1) * size])
        port = options.port + number
        found.append((port, [*command, "--port", str(port), *more], variables))
    return found


def serve(servers: list[tuple[int, list[str], dict[str, str]]]) -> int:
    """Until one of them ends, or SIGTERM or SIGINT; 1 if one ended by itself."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    processes = [subprocess.Popen(command, env=os.environ | variables) for _, command, variables in servers]
    while not asked and all(process.poll() is None for process in processes):
        time.sleep(0.5)
    ended = [port for (port, *_), process in zip(servers, processes, strict=True) if process.poll() is not None]
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    if asked:
        return 0
    print(f"error: the servers on ports {ended} ended; ending the others", file=sys.stderr)
    return 1


def main() -> int:
    options, more = parse(sys.argv[1:])
    try:
        servers = commands(options, more)
    except PmpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not options.dry_run:
        return serve(servers)
    for port, command, variables in servers:
        shown = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items() if name != "PYTHONPATH")
        print(port, shown, shlex.join(command))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
