"""How responses are sampled, which engine makes them, and its resources."""

from __future__ import annotations

from dataclasses import dataclass

from pmpo_megatron.config import Section, setting
from pmpo_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Section):
    """How responses are sampled."""

    samples_per_prompt: int = setting(8, "responses to each prompt: the group", minimum=1, maximum=65536)
    temperature: float = setting(1.0, "sampling temperature; training uses the same", minimum=0.0, maximum=1000.0)
    top_p: float = setting(
        1.0, "nucleus; below 1 the ratio to the trainer's full distribution is biased", above=0.0, maximum=1.0
    )
    top_k: int = setting(0, "keep the k likeliest tokens; 0: all. Biased like top_p", minimum=0, maximum=2**31 - 1)
    max_tokens: int = setting(3000, "response tokens at most", unit="tokens", minimum=1)
    stop: tuple[str, ...] = setting((), "texts that end a response, beside the tokenizer's end token")
    stop_token_ids: tuple[int, ...] = setting((), "tokens that end one too, e.g. 151645, <|im_end|>, with Qwen base models")
    seed: int = setting(0, "base of the requests' seeds", minimum=0)

    def validate(self) -> None:
        check_temperature(self.temperature)
        if any(token < 0 for token in self.stop_token_ids):
            raise ConfigError("stop_token_ids", f"{list(self.stop_token_ids)}: a token's number is not negative")


def check_temperature(temperature: float) -> None:
    """Raises ConfigError for one that vLLM would take for another: below 1e-5 for 0, and up to 0.01 for 0.01."""
    if 0 < temperature < 0.01:
        raise ConfigError("temperature", f"{temperature:g} must be 0, which is greedy, or at least 0.01")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Section):
    """Which engine makes rollouts, and its resources."""

    engine: str = setting(
        "vllm",
        "vllm: started here; server: running vLLM servers by URL; replay: recorded rollouts from disk",
        choices=("vllm", "server", "replay"),
    )
    urls: tuple[str, ...] = setting(
        (), "engine server: such as http://node7:8000; rollout/server_engine.py says how to start one"
    )
    server_attempts: int = setting(
        6,
        "engine server: attempts before a server is taken for dead, with pauses of 0.5 s, 1 s, 2 s, ...",
        minimum=1,
        maximum=20,
    )
    replay_from: str | None = setting(None, "engine replay: a file that record_to wrote")
    record_to: str | None = setting(None, "append every round's rollouts to this file")
    engines: int = setting(
        1,
        "engine vllm: so many vLLMs, each with the whole model on tensor_parallel GPUs of its own; they share the prompts",
        minimum=1,
        maximum=1024,
    )
    nodes: str = setting(
        "first", "engine vllm: so many on rank 0's node only, or on every node of the trainer", choices=("first", "all")
    )
    tensor_parallel: int = setting(1, "vLLM's tensor-parallel size", minimum=1, maximum=1024)
    dtype: str = setting("auto", "of the engine's weights", choices=("auto", "float32", "bfloat16"))
    max_model_len: int | None = setting(None, "prompt and response at most; null: the model's limit", unit="tokens", minimum=1)
    max_num_seqs: int = setting(256, "requests in one batch of each engine", minimum=1, maximum=65536)
    kv_cache_gib: float | None = setting(
        None, "each engine's KV cache on CPU (0.5), or on each GPU instead of a share of its memory", unit="GiB", minimum=0.001
    )
    gpu_memory_utilization: float = setting(0.5, "GPU: share of memory for weights and KV cache", above=0.0, maximum=1.0)
    enforce_eager: bool = setting(False, "GPU: no CUDA graphs")
    threads: int | None = setting(
        None, "CPU threads of each process of an engine; null: on CPU the cores, divided; on GPUs one", minimum=1, maximum=4096
    )
    start_timeout_s: float = setting(
        1800.0, "longest wait for the engine to start, or for one response of a server", unit="s", minimum=0.001
    )
    stall_s: float = setting(
        120.0,
        "an engine without progress for so long, also while it takes weights, is killed and started again",
        unit="s",
        minimum=0.001,
    )
    max_restarts: int = setting(3, "restarts within one batch before the run stops", minimum=0)

    def validate(self) -> None:
        if (self.engine == "replay") != (self.replay_from is not None):
            raise ConfigError("replay_from", "is needed by engine 'replay', and has no effect with any other")
        if (self.engine == "server") != bool(self.urls):
            raise ConfigError("urls", "are needed by engine 'server', and have no effect with any other")
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ConfigError("urls", f"{url!r} does not begin with http:// or https://")
        if self.engine == "replay" and self.record_to is not None:
            raise ConfigError("record_to", "records nothing new from engine 'replay'")
