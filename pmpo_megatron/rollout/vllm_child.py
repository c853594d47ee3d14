"""The process that holds a vLLM engine: answers calls over a pipe until its parent goes away."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

HEARTBEAT_S = 1.0
ELSEWHERE = "PMPO_ELSEWHERE"  # in the environment of a vLLM that is not on rank 0's node


def serve(
    connection: Connection,
    alive: Connection,
    log_path: str,
    settings: dict[str, Any],
    environment: dict[str, str],
) -> None:
    """Main function of the child. Messages out: ("ready" | "value" | "finished" | "alive" | "error", content)."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        from vllm import LLM

        llm = LLM(**settings)
        connection.send(("ready", None))
    except BaseException:
        connection.send(("error", traceback.format_exc()))
        raise
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            if name == "generate":
                _generate(llm, connection, *arguments)
            else:
                own = name == "reset_prefix_cache"  # a method of the engine, not of its workers
                connection.send(("value", [llm.reset_prefix_cache()] if own else llm.collective_rpc(name, args=arguments)))
        except Exception:
            connection.send(("error", traceback.format_exc()))


def _end_with_parent(alive: Connection) -> None:
    """Ends this process when the parent's end of ``alive`` closes, whatever the main thread is doing."""
    try:
        alive.recv()
    except (EOFError, OSError):
        os._exit(0)


def _generate(llm: Any, connection: Connection, requests: list[tuple[str, list[int], dict[str, Any]]]) -> None:
    """Runs all requests, sending each as it finishes, and a sign of life at least every second of progress."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    engine = llm.llm_engine
    for identifier, token_ids, parameters in requests:
        engine.add_request(identifier, TokensPrompt(prompt_token_ids=token_ids), SamplingParams(**parameters))
    last = time.monotonic()
    while engine.has_unfinished_requests():
        finished = [_plain(output) for output in engine.step() if output.finished]
        if finished:
            connection.send(("finished", finished))
        if time.monotonic() - last > HEARTBEAT_S:
            connection.send(("alive", None))
            last = time.monotonic()
    connection.send(("value", None))


def _plain(output: Any) -> tuple[str, np.ndarray, np.ndarray, str, str]:
    """(request, token ids, int32, log-prob of each sampled token, float32, text, finish reason)."""
    import numpy as np

    [sample] = output.outputs
    token_ids = np.array(sample.token_ids, dtype=np.int32)
    log_probs = [entry[token].logprob for token, entry in zip(sample.token_ids, sample.logprobs, strict=True)]
    log_probs = np.array(log_probs, dtype=np.float32)
    return output.request_id, token_ids, log_probs, sample.text, sample.finish_reason


if __name__ == "__main__":
    sys.exit("started by pmpo_megatron.rollout.vllm_process")
