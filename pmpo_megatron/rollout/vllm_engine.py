"""vLLM engines that the run starts, each in a process of its own, here or on other nodes; those that fail are started again.

Never in the trainer's process: vLLM initialises torch.distributed and, when it ends, destroys the trainer's groups.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.parallel.processes import temporary_directory
from pmpo_megatron.rollout.config import RolloutConfig, SamplingConfig
from pmpo_megatron.rollout.remote_process import NodeAddress
from pmpo_megatron.rollout.vllm_child import SLEEP
from pmpo_megatron.rollout.vllm_group import all_at_once, call_all, end_all, make_processes
from pmpo_megatron.rollout.vllm_jobs import Job, Part, batches, divide, job_number, make_jobs, missing_parts
from pmpo_megatron.rollout.vllm_process import LocalProcess, VLLMProcess
from pmpo_megatron.rollout.vllm_settings import Launch, engine_settings
from pmpo_megatron.types import Prompt, RolloutGroup, RouteFormat

logger = logging.getLogger(__name__)
SETTLE_S = 0.2  # engines that die within it died of one cause


class VLLMEngine:
    """`RolloutEngine` on ``config.engines`` vLLMs on this host and on each of ``nodes``. See `engine.RolloutEngine`.

    Each holds the whole model. All of a prompt's responses go to one engine, so that they share the prompt's cache; which,
    `RolloutConfig.sharing` says. One thread takes what the engines say and gives them further prompts; another starts those
    again that died. ``_state`` guards the jobs, ``_life`` starts and updates: neither happens during the other.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model_path: str,
        device: str,
        worker_extension: str | None,
        nodes: Sequence[NodeAddress] = (),
        in_flight: bool = False,
        routes: RouteFormat | None = None,
        logs: Path | None = None,
    ) -> None:
        self.config, self.version = config, 0
        self.on_restart: Callable[[VLLMEngine], None] | None = None
        self.broken: str | None = None
        self._state, self._life = threading.RLock(), threading.RLock()
        self._failure: RolloutError | None = None
        self._closed = self._updating = self._asleep = False
        self._jobs: dict[int, Job] = {}
        self._waiting: deque[Part] = deque()
        self._restarts = 0  # since the last update, or since there was nothing to do
        self._parts = ExitStack()
        logs = logs or Path(self._parts.enter_context(temporary_directory("pmpo-vllm-")))
        settings = engine_settings(config, model_path, device, worker_extension, in_flight=in_flight, routes=routes is not None)
        numbers = range(config.engines)
        launches = [Launch(settings, device, config.threads, number, config.engines, routes) for number in numbers]
        self._processes = make_processes(config, launches, nodes, logs)
        self.hosts = tuple(dict.fromkeys(process.host for process in self._processes))
        self._events: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        self._died: queue.SimpleQueue[tuple[VLLMProcess, Exception] | None] = queue.SimpleQueue()
        for process in self._processes:
            process.on_finished = lambda process, responses: self._events.put((process, responses, None))
            process.on_ended = lambda process, error: self._events.put((process, [], error))
        self._start(self._processes)
        for process in self._processes:
            process.fresh = True
        for work in (self._dispatch, self._supervise):
            threading.Thread(target=work, daemon=True, name=f"vllm{work.__name__}").start()

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, round_index: int) -> list[RolloutGroup]:
        divided = self.config.sharing == "divided"
        jobs = make_jobs(prompts, sampling, round_index, divided=divided)
        return [future.result() for future in self.ask(jobs, divided=divided)]

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, round_index: int) -> list[Future[RolloutGroup]]:
        return self.ask(make_jobs(prompts, sampling, round_index, divided=False), divided=False)

    def ask(self, jobs: Sequence[Job], *, divided: bool) -> list[Future[RolloutGroup]]:
        with self._state:
            if self._failure is not None:
                raise self._failure
            if self.broken is not None:
                raise RolloutError(f"the engine's weights are not whole ({self.broken}); a full update must succeed first")
            if self._asleep:
                raise RolloutError("the engine is asleep; an update wakes it")
            if not self._jobs:
                self._restarts = 0
            for job in jobs:
                self._jobs[job.number] = job
                job.future.add_done_callback(partial(self._cancel, job))
            parts = [(job, range(len(job.seeds))) for job in jobs]
            if divided and not self._updating and all(process.fresh for process in self._processes):
                for process, share in zip(self._processes, divide(parts, len(self._processes)), strict=True):
                    self._ask(process, share)
            else:
                self._waiting.extend(parts)
            self._share_out()
            return [job.future for job in jobs]

    @contextmanager
    def update(self, version: int) -> Iterator[None]:
        with self._life:
            with self._state:
                self._updating = True
            try:
                if self._asleep:  # those that died meanwhile had no room to start in
                    self._start([process for process in self._processes if not process.running])
                yield
            except Exception as error:
                self.broken = str(error)
                raise
            finally:
                self._updating = False
            with self._state:
                recompute = self.config.recompute_kv and version != self.version
                self.version, self.broken, self._restarts, self._asleep = version, None, 0, False
                for process in self._processes:
                    process.fresh = process.running
                    process.send("resume", (version, recompute))
                self._share_out()

    def collective_rpc(self, method: str, *arguments: Any) -> list[Any]:
        """See `engine.RolloutEngine`. If an engine dies, all end; `revive` starts them again."""
        return call_all([process for process in self._processes if process.running], method, arguments)

    def sleep(self) -> None:
        """See `engine.RolloutEngine`. Whoever dies has nothing left to free, and is started again by the next `update`."""
        with self._state:
            jobs = list(self._jobs.values())
        for job in jobs:
            job.future.cancel()
        with self._life:
            self._asleep = True
            running = [process for process in self._processes if process.running]
            try:
                call_all(running, SLEEP, (self.config.sleep,))
            except RolloutError:
                if running and all(process.running for process in running):
                    raise
                end_all(running)

    def revive(self) -> None:
        with self._life:
            self._start(self._processes)

    def close(self) -> None:
        self._closed = True
        for process in self._processes:
            process.interrupt()  # also one that is just being started
        with self._life:
            end_all(self._processes)
        self._events.put(None)
        self._died.put(None)
        self._fail(RolloutError("the engine was closed"))
        self._parts.close()

    @property
    def process_ids(self) -> list[int]:
        """Of the engines on this host."""
        return [process.process_id for process in self._processes if isinstance(process, LocalProcess)]

    def _start(self, processes: Sequence[VLLMProcess]) -> None:
        """Those that run are ended first. If one does not start, none goes on: another try begins with nothing held."""

        def start(process: VLLMProcess) -> None:
            with self._state:
                self._take_back(process)
            process.kill()
            if self._closed:
                raise RolloutError("the engine was closed")
            process.start(self.config.start_timeout_s)

        try:
            all_at_once(start, processes)
        except BaseException:  # also an interrupt
            end_all(self._processes)
            raise

    def _ask(self, process: VLLMProcess, parts: Sequence[Part]) -> None:
        """In one message, so that the engine's batches depend on nothing but ``parts``."""
        for job, _ in parts:
            job.home = self._processes.index(process)
        if parts:
            process.ask(batches(parts))

    def _share_out(self) -> None:
        """Prompts that wait go to the engines with the most room."""
        if self.broken is not None or self._updating:
            return
        room = {process: self.config.max_num_seqs - len(process.requests) for process in self._processes if process.fresh}
        shares: dict[VLLMProcess, list[Part]] = {process: [] for process in room}
        while self._waiting and room and max(room.values()) > 0:
            job, samples = self._waiting.popleft()
            home = None if job.home is None else self._processes[job.home % len(self._processes)]
            process = home if home is not None and room.get(home, 0) > 0 else max(room, key=room.__getitem__)
            shares[process].append((job, samples))
            room[process] -= len(samples)
        for process, share in shares.items():
            self._ask(process, share)

    def _take_back(self, process: VLLMProcess) -> None:
        """What ``process`` was asked and did not answer waits for another, before what waits already."""
        parts = missing_parts(process.requests, self._jobs)
        process.requests.clear()
        self._waiting.extendleft(reversed(parts))

    def _cancel(self, job: Job, _: object) -> None:
        """A future that is done needs nothing; one that was cancelled, nobody."""
        if not job.future.cancelled():
            return
        with self._state:
            self._jobs.pop(job.number, None)
            self._waiting = deque(part for part in self._waiting if part[0] is not job)
            for process in self._processes:
                names = [name for name in process.requests if job_number(name) == job.number]
                process.requests.difference_update(names)
                process.send("abort", names)
            self._share_out()

    def _dispatch(self) -> None:
        """Takes what the engines say, as long as there are any."""
        while (event := self._events.get()) is not None:
            process, responses, error = event
            try:
                with self._state:
                    for name, *response in responses:
                        process.requests.discard(name)
                        job = self._jobs.get(job_number(name))
                        if job is not None and job.take(name, *response):
                            del self._jobs[job.number]
                    if error is not None and not process.running and not self._closed:  # `revive` may have been faster
                        self._ended(process, error)
                    self._share_out()
            except Exception as defect:  # nobody may wait for ever because of one
                self._fail(RolloutError(f"{type(defect).__name__}: {defect}"))
                raise

    def _ended(self, process: VLLMProcess, error: Exception) -> None:
        if isinstance(error, RolloutError):
            self._fail(error)
            return
        logger.warning("%s; starting it again, %d responses are missing", error, len(process.requests))
        process.fresh = False
        self._take_back(process)
        self._died.put((process, error))

    def _supervise(self) -> None:
        """Starts engines again that died, and has them get the newest weights, while the others go on."""
        while (first := self._died.get()) is not None:
            time.sleep(SETTLE_S)
            died = [first, *(self._died.get() for _ in range(self._died.qsize()))]
            try:
                self._replace([entry for entry in died if entry is not None])
            except RolloutError as error:
                self._fail(error)

    def _replace(self, died: Sequence[tuple[VLLMProcess, Exception]]) -> None:
        with self._life:
            stopped = [process for process, _ in died if not process.running]  # `revive` may have been here
            if not stopped or self._closed or self._asleep:
                return
            self._restarts += 1
            if self._restarts > self.config.max_restarts:
                process, error = died[0]
                raise RolloutError(f"{error}; it was restarted {self.config.max_restarts} times. {process.log_tail()}")
            self._start(stopped)
        if self.on_restart is not None:
            self.on_restart(self)
        with self._state:
            for process in stopped:
                process.fresh = process.running
            self._share_out()

    def _fail(self, error: RolloutError) -> None:
        """Nobody waits for responses any more."""
        with self._state:
            self._failure = self._failure or error
            jobs, self._jobs = list(self._jobs.values()), {}
            self._waiting.clear()
        for job in jobs:
            job.fail(error)
