"""The process that holds a vLLM engine: one step after another, messages between two steps, until its parent goes away.

Messages in: ("add", [(parameters, prompts), ...]), ("abort", names), ("call", (number, method, arguments)) and
("resume", (version, recompute)). Out: ("ready" | "alive", None), ("finished", responses), ("value" | "error", (number,
content)); an error without a number ends the process. A call of `SLEEP` frees memory, which new weights and then "resume"
take again.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from itertools import repeat
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pmpo_megatron.data.tokenizer import load_tokenizer
from pmpo_megatron.rollout.vllm_settings import Launch
from pmpo_megatron.types import RouteFormat, Routes

HEARTBEAT_S = 1.0
NODE = "PMPO_NODE"  # in the environment of a vLLM that is not on rank 0's node: which of the trainer's it is on, or OWN_NODE
OWN_NODE = "own"
RECEIVE = "pmpo_receive_weights"
SLEEP = "sleep"


def serve(connection: Connection, alive: Connection, log_path: str, launch: Launch, environment: dict[str, str]) -> None:
    """Main function of the child."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        from vllm import LLM

        loop = _Loop(LLM(**launch.settings), load_tokenizer(launch.settings["model"]), connection, launch.routes)
        connection.send(("ready", None))
        loop.run()
    except BaseException:
        connection.send(("error", (None, traceback.format_exc())))
        raise


def _end_with_parent(alive: Connection) -> None:
    """Ends this process when the parent's end of ``alive`` closes, whatever the main thread is doing."""
    try:
        alive.recv()
    except (EOFError, OSError):
        os._exit(0)


class _Loop:
    """vLLM's steps, and what is done between them."""

    def __init__(self, llm: Any, tokenizer: Any, connection: Connection, routes: RouteFormat | None) -> None:
        self._engine, self._tokenizer, self._connection = llm.llm_engine, tokenizer, connection
        self._routes = routes
        self._by_workers = routes is not None and not self._engine.vllm_config.aux_output_config.enabled
        if self._by_workers:
            self._engine.collective_rpc("pmpo_record_routes", args=(routes,))
        self._version, self._held, self._spoke = 0, False, time.monotonic()
        self._asleep: set[str] = set()  # vLLM's tags of what was freed
        self._engine.set_weight_version("0")

    def run(self) -> None:
        """Until the parent closes its end."""
        while True:
            try:
                while self._connection.poll(self._patience()):
                    self._take(*self._connection.recv())
            except EOFError:
                return
            busy = self._engine.has_unfinished_requests()
            if busy and not self._held:
                self._step()
            if busy and time.monotonic() - self._spoke > HEARTBEAT_S:
                self._say("alive", None)

    def _step(self) -> None:
        finished = [output for output in self._engine.step() if output.finished]
        if finished:
            self._say("finished", [*map(_plain, finished, repeat(self._tokenizer), self._routes_of(finished))])

    def _routes_of(self, finished: list[Any]) -> list[Routes | None]:
        """Of the tokens of each prompt and its response."""
        if self._routes is None:
            return [None] * len(finished)
        if self._by_workers:
            known = self._engine.collective_rpc("pmpo_take_routes", args=([output.request_id for output in finished],))[0]
        else:
            known = [output.outputs[0].routed_experts for output in finished]
        lengths = [len(output.prompt_token_ids) + len(output.outputs[0].token_ids) for output in finished]
        # A step may be under way already in which the last token is computed: nobody will need what it gives.
        pairs = zip(known, lengths, strict=True)
        return [self._routes.whole(routes[: length - 1], length) for routes, length in pairs]

    def _patience(self) -> float | None:
        """How long the next message may be waited for: not at all, until a sign of life is due, or for ever."""
        if not self._engine.has_unfinished_requests():
            return None
        return HEARTBEAT_S if self._held else 0

    def _take(self, kind: str, content: Any) -> None:
        if kind == "add":
            for parameters, prompts in content:
                self._add(parameters, prompts)
        elif kind == "abort":
            self._engine.abort_request(content)
        elif kind == "call":
            self._call(*content)
        elif kind == "resume":
            self._resume(*content)

    def _add(self, parameters: dict[str, Any], prompts: list[tuple[np.ndarray, list[tuple[str, int]]]]) -> None:
        """One request for each (name, seed). The salt keeps prefixes that other weights computed from new requests.

        Text is needed while a response grows only to look for texts that end it; else it is made once, by `_plain`.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        common = parameters | {"output_kind": RequestOutputKind.FINAL_ONLY, "detokenize": bool(parameters["stop"])}
        for token_ids, requests in prompts:
            prompt = TokensPrompt(prompt_token_ids=token_ids.tolist(), cache_salt=str(self._version))
            for name, seed in requests:
                self._engine.add_request(name, prompt, SamplingParams(**common, seed=seed))

    def _call(self, number: int, method: str, arguments: tuple) -> None:
        """A method of the workers, or `SLEEP`. After new weights there is no further step until they are known to be whole."""
        self._held = self._held or method in (RECEIVE, SLEEP)
        try:
            if method == SLEEP:
                answers = self._sleep(*arguments)
            else:
                if method == RECEIVE:
                    self._wake("weights")
                answers = self._engine.collective_rpc(method, args=arguments)
            self._say("value", (number, answers))
        except Exception:
            self._say("error", (number, traceback.format_exc()))

    def _sleep(self, mode: str) -> list[Any]:
        """Frees what `RolloutConfig.sleep` says, when nothing runs any more; prefixes in the cache are forgotten.

        With ``kv`` weights stay where they are. With ``all`` (vLLM's level 2) they are lost, and the model's buffers, which no
        update brings, are kept on the host by vLLM itself. CUDA graphs stay: they hold addresses, which are mapped again.
        """
        core = self._engine.engine_core.engine_core
        while core.scheduler.has_requests() or core.batch_queue:  # also the step that clears up after the last request
            self._step()
        if mode == "kv":
            self._engine.sleep(level=0)  # no step is scheduled
            self._engine.release_kv_cache_memory()
            self._asleep = {"kv_cache"}
        else:
            self._engine.sleep(level=2)
            self._asleep = {"weights", "kv_cache"}
        return self._engine.collective_rpc(_give_back_cache)

    def _wake(self, tag: str) -> None:
        """Takes the memory of ``tag`` again; its content is undefined."""
        if tag in self._asleep:
            self._engine.wake_up([tag])
            self._asleep.discard(tag)

    def _resume(self, version: int, recompute: bool) -> None:
        """Goes on with the weights that came last; running responses keep what the old ones computed, or not."""
        if "weights" in self._asleep:
            raise RuntimeError("the engine's weights were freed and none came since")
        self._wake("kv_cache")
        self._held = False
        if version == self._version:  # another engine was given them again
            return
        self._version = version
        self._engine.set_weight_version(str(version))
        if recompute or not self._engine.has_unfinished_requests():
            self._engine.reset_prefix_cache(reset_running_requests=recompute)

    def _say(self, kind: str, content: Any) -> None:
        self._connection.send((kind, content))
        self._spoke = time.monotonic()


def _give_back_cache(worker: Any) -> None:
    """Called with every worker: what PyTorch keeps of the last forward passes."""
    if worker.device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def _plain(
    output: Any, tokenizer: Any, routes: Routes | None
) -> tuple[str, np.ndarray, np.ndarray, str, str, list[tuple[int, int]], int, Routes | None]:
    """(request, token ids, log-probs, text, finish reason, (version, number of its tokens) in order, cached prompt tokens,
    routes)."""
    [sample] = output.outputs
    token_ids = np.array(sample.token_ids, dtype=np.int32)
    log_probs = np.array(sample.logprobs.logprobs, dtype=np.float32)  # the sampled token's alone
    versions = [(int(span.version), span.end - span.start) for span in sample.weight_versions]
    text = sample.text or whole_text(tokenizer, token_ids.tolist())
    cached = output.num_cached_tokens or 0
    return output.request_id, token_ids, log_probs, text, sample.finish_reason, versions, cached, routes


def whole_text(tokenizer: Any, token_ids: list[int]) -> str:
    """The text of a response: what vLLM makes token by token, without the bytes of a character that was cut off."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd")


if __name__ == "__main__":
    sys.exit("started by pmpo_megatron.rollout.vllm_process")
