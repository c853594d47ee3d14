"""What is done with several vLLMs at once: made, called, ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.rollout.config import RolloutConfig
from pmpo_megatron.rollout.remote_process import NodeAddress, RemoteProcess
from pmpo_megatron.rollout.vllm_process import LocalProcess, VLLMProcess
from pmpo_megatron.rollout.vllm_settings import Launch


def make_processes(
    config: RolloutConfig, launches: Sequence[Launch], nodes: Sequence[NodeAddress], logs: Path
) -> list[VLLMProcess]:
    """One process for each of ``launches`` on this host, unless engines have nodes of their own, and on each of ``nodes``."""
    logs.mkdir(parents=True, exist_ok=True)
    here = [LocalProcess(each, logs / f"engine-{each.number}.log", stall_s=config.stall_s) for each in launches]
    there = [RemoteProcess(each, node, stall_s=config.stall_s) for node in nodes for each in launches]
    return [*(here if config.nodes != "own" else ()), *there]


def call_all(processes: Sequence[VLLMProcess], method: str, arguments: tuple) -> list[Any]:
    """What ``method`` returned in each worker of each process. If one process dies, all end, so that none waits for it.

    Raises:
        RolloutError: none was given; or one died, or failed.
    """
    if not processes:
        raise RolloutError("no rollout engine runs")
    calls = [process.call(method, arguments) for process in processes]
    wait(calls, return_when=FIRST_EXCEPTION)
    first = next((call.exception() for call in calls if call.done() and call.exception()), None)
    if first is not None and not all(process.running for process in processes):
        for process in processes:
            process.interrupt()
    wait(calls)
    if first is not None:
        raise first
    return [answer for call in calls for answer in call.result()]


def all_at_once(call: Callable[[VLLMProcess], None], processes: Sequence[VLLMProcess]) -> None:
    """Calls ``call`` with every process; when all have returned, raises the first exception, so that no answer waits."""
    if not processes:
        return
    with ThreadPoolExecutor(max_workers=len(processes), thread_name_prefix="vllm") as pool:
        calls = [pool.submit(call, process) for process in processes]
    for done in calls:
        done.result()


def end_all(processes: Sequence[VLLMProcess]) -> None:
    all_at_once(lambda process: process.kill(), processes)
