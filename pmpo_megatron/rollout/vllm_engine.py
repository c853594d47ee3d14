"""A vLLM engine in a process of its own, forked from a server that has vLLM imported; killed and started again if it fails.

Never in the trainer's process: vLLM initialises torch.distributed and, when it ends, destroys the trainer's groups.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.rollout import vllm_child
from pmpo_megatron.rollout.engine import RolloutConfig, SamplingConfig, request_seed
from pmpo_megatron.types import Prompt, Rollout, RolloutGroup

logger = logging.getLogger(__name__)
GIB = 1 << 30
DEFAULT_CPU_KV_CACHE_GIB = 0.5


class EngineDied(Exception):
    """The engine's process ended, or stopped to answer; inside this file only."""


class VLLMEngine:
    """`RolloutEngine` on a vLLM that this process starts. See `engine.RolloutEngine` for the methods."""

    holds_weights = True
    same_host = on_loopback = True

    def __init__(self, config: RolloutConfig, *, model_path: str, device: str, worker_extension: str | None) -> None:
        self.config, self.version = config, 0
        self.on_restart: Callable[[VLLMEngine], None] | None = None
        self.broken: str | None = None
        self._threads = config.threads or os.cpu_count() or 1
        self._settings = engine_settings(config, model_path=model_path, device=device, worker_extension=worker_extension)
        self._directory = tempfile.TemporaryDirectory(prefix="pmpo-vllm-")
        self._log_path = Path(self._directory.name) / "engine.log"
        os.environ["PMPO_ROLLOUT_DEVICE"] = device
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pmpo_megatron.rollout.vllm_preload"])
        self._process = None
        self._start()

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, round_index: int) -> list[RolloutGroup]:
        requests = make_requests(prompts, sampling, round_index)
        finished: dict[str, tuple] = {}
        restarts = 0
        while len(finished) < len(requests):
            self._check_whole()
            missing = [request for request in requests if request[0] not in finished]
            try:
                self._run(missing, finished)
            except EngineDied as error:
                restarts += 1
                if restarts > self.config.max_restarts:
                    raise RolloutError(
                        f"{error}; it was restarted {self.config.max_restarts} times. {self._log_tail()}"
                    ) from None
                logger.warning(
                    "%s; starting it again, %d of %d responses are missing", error, len(requests) - len(finished), len(requests)
                )
                self.revive()
                if self.on_restart is not None:
                    self.on_restart(self)
        return self._groups(prompts, sampling, round_index, finished)

    def collective_rpc(self, method: str, *arguments: Any) -> list[Any]:
        try:
            self._send((method, arguments))
            return self._wait_for("value", self.config.stall_s, f"{method} of the rollout engine")
        except EngineDied as error:
            raise RolloutError(f"{error}. {self._log_tail()}") from None

    def reset_prefix_cache(self) -> None:
        self.collective_rpc("reset_prefix_cache")

    def mark_broken(self, reason: str | None) -> None:
        self.broken = reason

    def revive(self) -> None:
        self._kill()
        self._start()

    def close(self) -> None:
        self._kill()
        self._directory.cleanup()

    @property
    def process_id(self) -> int:
        return self._process.pid

    def _run(self, requests: list, finished: dict[str, tuple]) -> None:
        self._send(("generate", (requests,)))

        def keep(outputs: list[tuple]) -> None:
            finished.update({output[0]: (*output[1:], self.version) for output in outputs})

        self._wait_for("value", self.config.stall_s, "the rollout engine", on_finished=keep)

    def _groups(self, prompts, sampling, round_index, finished) -> list[RolloutGroup]:
        groups = []
        for position, prompt in enumerate(prompts):
            rollouts = []
            for sample in range(sampling.samples_per_prompt):
                token_ids, log_probs, text, reason, version = finished[f"{position}/{sample}"]
                seed = request_seed(sampling, round_index, prompt.index, sample)
                log_probs = np.array(log_probs, dtype=np.float32)
                rollouts.append(Rollout(tuple(token_ids), log_probs, text, reason, version, seed))
            groups.append(RolloutGroup(prompt, tuple(rollouts)))
        return groups

    def _check_whole(self) -> None:
        if self.broken is not None:
            raise RolloutError(f"the engine's weights are not whole ({self.broken}); a full update must succeed first")

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        alive, self._alive = self._context.Pipe(duplex=False)
        arguments = (theirs, alive, str(self._log_path), self._settings, self._threads)
        self._process = self._context.Process(target=vllm_child.serve, args=arguments, name="vllm")
        self._process.start()
        theirs.close()
        alive.close()
        try:
            self._wait_for("ready", self.config.start_timeout_s, "the start of the rollout engine")
        except (EngineDied, RolloutError) as error:
            self._kill()
            raise RolloutError(f"the rollout engine did not start: {error}. {self._log_tail()}") from None

    def _send(self, message: tuple) -> None:
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise EngineDied(self._why_dead()) from None

    def _wait_for(self, kind: str, timeout_s: float, what: str, on_finished: Callable | None = None) -> Any:
        """The content of the next message of ``kind``; every message counts as a sign of life."""
        while True:
            if not self._connection.poll(timeout_s):
                raise EngineDied(f"{what}: no sign of life for {timeout_s:g} s")
            try:
                found, content = self._connection.recv()
            except (EOFError, ConnectionResetError):
                raise EngineDied(self._why_dead()) from None
            if found == "finished" and on_finished is not None:
                on_finished(content)
            elif found == "error":
                raise RolloutError(f"{what} failed:\n{content}")
            elif found == kind:
                return content

    def _why_dead(self) -> str:
        self._process.join(timeout=5)
        code = self._process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
        return f"the rollout engine's process {self._process.pid} {how}"

    def _log_tail(self) -> str:
        try:
            return "The end of its log:\n" + "\n".join(self._log_path.read_text(errors="replace").splitlines()[-25:])
        except OSError:
            return "It wrote no log."

    def _kill(self) -> None:
        """Ends the process and, with it, its workers: closing our end of the pipe reaches those that a kill does not."""
        if self._process is None:
            return
        self._alive.close()
        self._connection.close()
        self._process.join(timeout=2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None
        deadline = time.monotonic() + 5
        for segment in Path("/dev/shm").glob(f"psm_*{os.getpid()}*"):  # what killed workers leave
            if time.monotonic() < deadline:
                segment.unlink(missing_ok=True)


def make_requests(prompts: Sequence[Prompt], sampling: SamplingConfig, round_index: int) -> list[tuple[str, list[int], dict]]:
    """(name, prompt token ids, SamplingParams' arguments): one request for each response, each with its own seed."""
    common = dict(
        n=1,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or -1,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop) or None,
        stop_token_ids=list(sampling.stop_token_ids) or None,
        logprobs=0,
        include_stop_str_in_output=True,
        skip_special_tokens=True,
    )
    return [
        (
            f"{position}/{sample}",
            list(prompt.token_ids),
            common | {"seed": request_seed(sampling, round_index, prompt.index, sample)},
        )
        for position, prompt in enumerate(prompts)
        for sample in range(sampling.samples_per_prompt)
    ]


def engine_settings(config: RolloutConfig, *, model_path: str, device: str, worker_extension: str | None) -> dict[str, Any]:
    """Arguments of vLLM's LLM. Log-probs are those of the distribution that was sampled from (processed)."""
    settings = dict(
        model=model_path,
        dtype=config.dtype if config.dtype != "auto" else "float32" if device == "cpu" else "bfloat16",
        tensor_parallel_size=config.tensor_parallel,
        max_num_seqs=config.max_num_seqs,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        generation_config="vllm",  # sampling is ours alone, not the checkpoint's generation_config.json
        seed=0,
    )
    if worker_extension is not None:
        settings["worker_extension_cls"] = worker_extension
    if config.max_model_len is not None:
        settings["max_model_len"] = config.max_model_len
    if device == "cpu":
        settings |= dict(enforce_eager=True, kv_cache_memory_bytes=int((config.kv_cache_gib or DEFAULT_CPU_KV_CACHE_GIB) * GIB))
    else:
        settings |= dict(enforce_eager=config.enforce_eager, gpu_memory_utilization=config.gpu_memory_utilization)
        if config.kv_cache_gib is not None:
            settings["kv_cache_memory_bytes"] = int(config.kv_cache_gib * GIB)
    return settings
