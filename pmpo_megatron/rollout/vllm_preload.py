"""Imported once by the fork server that vLLM engines are forked from: an engine then starts in seconds.

The environment must be set before vLLM is imported: the engine's core runs in the child itself (a killed core process
would hang its client), and nothing is compiled on CPU (it costs seconds at the first batch).
"""

import logging
import os
import threading

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # RPC arguments are ours: from this process's parent alone
if os.environ.get("PMPO_ROLLOUT_DEVICE", "cpu") == "cpu":
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
else:  # an engine asks for its GPUs before vLLM starts the workers of its tensor parallelism, and what is forked then has none
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

PARENT, imported = os.getppid(), threading.Event()


def _end_with_parent() -> None:
    """The fork server looks for its parent only when the imports are through, which takes many seconds."""
    while not imported.wait(0.5):
        if os.getppid() != PARENT:
            os._exit(0)


watch = threading.Thread(target=_end_with_parent, daemon=True)
watch.start()
logging.disable(logging.WARNING)  # what vLLM says of this machine while it is imported; the engine's own log is a file
import vllm  # noqa: E402, F401
import vllm.entrypoints.llm  # noqa: E402, F401
import vllm.model_executor.model_loader.reload  # noqa: E402, F401
import vllm.v1.engine.core  # noqa: E402, F401

if os.environ.get("PMPO_ROLLOUT_DEVICE", "cpu") == "cpu":
    import vllm.v1.attention.backends.cpu_attn  # noqa: F401
    import vllm.v1.worker.cpu_model_runner  # noqa: F401

logging.disable(logging.NOTSET)
imported.set()
watch.join()  # what is forked from here on has no other thread
