"""vLLM engines that the run starts, each in a process of its own, here or on every node; those that fail are started again.

Never in the trainer's process: vLLM initialises torch.distributed and, when it ends, destroys the trainer's groups.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.parallel.processes import temporary_directory
from pmpo_megatron.rollout.config import RolloutConfig, SamplingConfig
from pmpo_megatron.rollout.engine import request_seed
from pmpo_megatron.rollout.vllm_process import EngineDied, Launch, LocalProcess, NodeAddress, RemoteProcess, VLLMProcess
from pmpo_megatron.types import Prompt, Rollout, RolloutGroup
from pmpo_megatron.units import GIB

logger = logging.getLogger(__name__)
T = TypeVar("T")
Request = tuple[str, list[int], dict[str, Any]]
DEFAULT_CPU_KV_CACHE_GIB = 0.5


class VLLMEngine:
    """`RolloutEngine` on ``config.engines`` vLLMs here and on each of ``nodes``. See `engine.RolloutEngine` for the methods.

    Each holds the whole model. Prompt k goes to engine k modulo their number, with all its responses, so that they share the
    prompt's cache and the same configuration always divides a batch in the same way.
    """

    holds_weights = same_host = True

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model_path: str,
        device: str,
        worker_extension: str | None,
        nodes: Sequence[NodeAddress] = (),
    ) -> None:
        self.config, self.version = config, 0
        self.on_restart: Callable[[VLLMEngine], None] | None = None
        self.broken: str | None = None
        self.elsewhere, self.on_loopback = bool(nodes), all(node.host.startswith("127.") for node in nodes)
        self._directory = temporary_directory("pmpo-vllm-")
        settings = engine_settings(config, model_path=model_path, device=device, worker_extension=worker_extension)
        launches = [Launch(settings, device, config.threads, number, config.engines) for number in range(config.engines)]
        here = [LocalProcess(launch, Path(self._directory.name) / f"engine-{launch.number}.log") for launch in launches]
        self._processes: list[VLLMProcess] = [*here, *(RemoteProcess(launch, node) for node in nodes for launch in launches)]
        self._start(self._processes)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, round_index: int) -> list[RolloutGroup]:
        requests = make_requests(prompts, sampling, round_index)
        finished: dict[str, tuple] = {}
        restarts = 0
        while len(finished) < len(requests):
            self._check_whole()
            died = self._run([request for request in requests if request[0] not in finished], finished)
            restarts += bool(died)  # several at once have one cause
            if restarts > self.config.max_restarts:
                process, error = next(iter(died.items()))
                raise RolloutError(f"{error}; it was restarted {self.config.max_restarts} times. {process.log_tail()}")
            if died:
                missing = len(requests) - len(finished)
                for error in died.values():
                    logger.warning("%s; starting it again, %d of %d responses are missing", error, missing, len(requests))
                self._start(list(died))
                if self.on_restart is not None:
                    self.on_restart(self)
        return self._groups(prompts, sampling, round_index, finished)

    def collective_rpc(self, method: str, *arguments: Any) -> list[Any]:
        """See `engine.RolloutEngine`. If an engine dies, all end, so that none waits for it; `revive` starts them again."""
        problems: list[str] = []  # in the order in which they came

        def call(process: VLLMProcess) -> list[Any]:
            try:
                return process.call(method, arguments, timeout_s=self.config.stall_s, what=f"{method} of the rollout engine")
            except EngineDied as error:
                problems.append(f"{error}. {process.log_tail()}")
                for each in self._processes:
                    each.interrupt()
                return []

        answers = _all_at_once(call, self._processes)
        if problems:
            raise RolloutError(problems[0])
        return [answer for of_engine in answers for answer in of_engine]

    def reset_prefix_cache(self) -> None:
        self.collective_rpc("reset_prefix_cache")

    def mark_broken(self, reason: str | None) -> None:
        self.broken = reason

    def revive(self) -> None:
        self._start(self._processes)

    def close(self) -> None:
        _end(self._processes)
        self._directory.cleanup()

    @property
    def process_ids(self) -> list[int]:
        """Those of the engines on this host."""
        return [process.process_id for process in self._processes if isinstance(process, LocalProcess)]

    def _start(self, processes: list[VLLMProcess]) -> None:
        """Those that run are ended first. If one does not start, none goes on: another try begins with nothing held."""

        def start(process: VLLMProcess) -> None:
            process.kill()
            process.start(self.config.start_timeout_s)

        try:
            _all_at_once(start, processes)
        except BaseException:  # also an interrupt
            _end(self._processes)
            raise

    def _run(self, requests: list[Request], finished: dict[str, tuple]) -> dict[VLLMProcess, EngineDied]:
        """Divides ``requests`` among the engines and fills ``finished``; which engines died. The others end their share."""

        def keep(outputs: list[tuple]) -> None:
            finished.update({output[0]: (*output[1:], self.version) for output in outputs})

        def run(process: VLLMProcess, share: list[Request]) -> EngineDied | None:
            if share:
                try:
                    process.call(
                        "generate", (share,), timeout_s=self.config.stall_s, what="the rollout engine", on_finished=keep
                    )
                except EngineDied as error:
                    return error
            return None

        shares = divide(requests, len(self._processes))
        results = _all_at_once(run, self._processes, shares)
        return {process: error for process, error in zip(self._processes, results, strict=True) if error is not None}

    @staticmethod
    def _groups(
        prompts: Sequence[Prompt], sampling: SamplingConfig, round_index: int, finished: Mapping[str, tuple]
    ) -> list[RolloutGroup]:
        groups = []
        for position, prompt in enumerate(prompts):
            rollouts = []
            for sample in range(sampling.samples_per_prompt):
                token_ids, log_probs, text, reason, version = finished[f"{position}/{sample}"]
                seed = request_seed(sampling, round_index, prompt.index, sample)
                rollouts.append(Rollout(token_ids, log_probs, text, reason, version, seed))
            groups.append(RolloutGroup(prompt, tuple(rollouts)))
        return groups

    def _check_whole(self) -> None:
        if self.broken is not None:
            raise RolloutError(f"the engine's weights are not whole ({self.broken}); a full update must succeed first")


def _all_at_once(call: Callable[..., T], processes: Sequence[VLLMProcess], *more: Sequence[Any]) -> list[T]:
    """What ``call`` returned for each process, when all have returned; then the first exception, so that no answer waits."""
    if len(processes) == 1:
        return [call(processes[0], *(values[0] for values in more))]
    with ThreadPoolExecutor(max_workers=len(processes), thread_name_prefix="vllm") as pool:
        calls = [pool.submit(call, *arguments) for arguments in zip(processes, *more, strict=True)]
    return [done.result() for done in calls]


def _end(processes: Sequence[VLLMProcess]) -> None:
    _all_at_once(lambda process: process.kill(), processes)


def divide(requests: Sequence[Request], engines: int) -> list[list[Request]]:
    """Prompt by prompt in turn: the responses of a prompt stay together."""
    shares: list[list[Request]] = [[] for _ in range(engines)]
    prompts = {name.split("/")[0]: None for name, *_ in requests}  # in order
    where = {prompt: number % engines for number, prompt in enumerate(prompts)}
    for request in requests:
        shares[where[request[0].split("/")[0]]].append(request)
    return shares


def make_requests(prompts: Sequence[Prompt], sampling: SamplingConfig, round_index: int) -> list[Request]:
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
            prompt.token_ids.tolist(),
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
        # A prompt that is computed in pieces breaks a seeded request there: PyTorch's CPU generators have no offset. Whole
        # prompts need a batch of at least max_model_len tokens, which is vLLM's default without chunks.
        settings |= dict(enforce_eager=True, enable_chunked_prefill=False)
        settings["kv_cache_memory_bytes"] = int((config.kv_cache_gib or DEFAULT_CPU_KV_CACHE_GIB) * GIB)
    else:
        settings |= dict(enforce_eager=config.enforce_eager, gpu_memory_utilization=config.gpu_memory_utilization)
        if config.kv_cache_gib is not None:
            settings["kv_cache_memory_bytes"] = int(config.kv_cache_gib * GIB)
    return settings
