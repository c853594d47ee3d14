"""How responses are sampled, which engine makes them, and its resources."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pmpo_megatron.config import Section, setting
from pmpo_megatron.errors import ConfigError

ENGINES = {  # by name: the class, module:name, that `factory.make_engine` calls
    "vllm": "pmpo_megatron.rollout.vllm_engine:VLLMEngine",
    "replay": "pmpo_megatron.rollout.replay:ReplayEngine",
}


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Section):
    """How responses are sampled."""

    samples_per_prompt: int = setting(8, "responses to each prompt: the group", minimum=1, maximum=65536)
    temperature: float = setting(1.0, "sampling temperature; training uses the same", minimum=0.0, maximum=1000.0)
    top_p: float = setting(
        1.0, "nucleus; below 1 the ratio to the trainer's full distribution is biased", above=0.0, maximum=1.0
    )
    top_k: int = setting(0, "keep the k likeliest tokens; 0: all. Biased like top_p", minimum=0, maximum=2**31 - 1)
    max_tokens: int = setting(
        3000, "response tokens at most; of an episode those that it was told, too", unit="tokens", minimum=1
    )
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

    engine: str = setting("vllm", "vllm: started for the run; replay: recorded rollouts from disk", choices=tuple(ENGINES))
    replay_from: str | None = setting(None, "engine replay: a file that record_to wrote")
    record_to: str | None = setting(None, "append every round's rollouts to this file")
    engines: int = setting(
        1,
        "vLLMs on each node, each with the whole model on tensor_parallel GPUs of its own; they share the prompts",
        minimum=1,
        maximum=1024,
    )
    nodes: str = setting(
        "first",
        "where vLLMs run: on rank 0's node, on all nodes of the trainer, or on nodes of their own, which are hosts",
        choices=("first", "all", "own"),
    )
    hosts: tuple[str, ...] = setting((), "nodes own: such as node7:7400; pmpo-rollout-node runs on each")
    key_file: str | None = setting(None, "nodes own: a file with the key that pmpo-rollout-node was given, too")
    sharing: str = setting(
        "divided",
        "which engine answers a prompt. divided: prompt k the k-th in turn, so that a round can be repeated bit by bit; "
        "queue: the one that has room, so that none waits for a slower one",
        choices=("divided", "queue"),
    )
    recompute_kv: bool = setting(
        False, "new weights in the middle of a response: compute its keys and values again with them, or keep them"
    )
    tensor_parallel: int = setting(1, "vLLM's tensor-parallel size", minimum=1, maximum=1024)
    expert_parallel: bool = setting(
        False, "GPU, mixtures of experts: each of the tensor_parallel GPUs holds whole experts instead of a part of every one"
    )
    dtype: str = setting("auto", "of the engine's weights", choices=("auto", "float32", "bfloat16"))
    quantization: str = setting(
        "none",
        "GPU: matrices of the layers in fp8 (e4m3, one scale for each, activations scaled for each token), made anew whenever "
        "weights come; use objective.importance with it",
        choices=("none", "fp8"),
    )
    max_model_len: int | None = setting(None, "prompt and response at most; null: the model's limit", unit="tokens", minimum=1)
    max_num_seqs: int = setting(256, "requests in one batch of each engine", minimum=1, maximum=65536)
    block_size: int | None = setting(
        None,
        "tokens in a block of the KV cache; whole blocks are reused, by responses to one prompt and by an episode's next turn. "
        "null: vLLM's, 128 on CPU, where it must be a multiple of 32",
        unit="tokens",
        minimum=1,
        maximum=65536,
    )
    kv_cache_gib: float | None = setting(
        None, "each engine's KV cache on CPU (0.5), or on each GPU instead of a share of its memory", unit="GiB", minimum=0.001
    )
    gpu_memory_utilization: float = setting(0.5, "GPU: share of memory for weights and KV cache", above=0.0, maximum=1.0)
    enforce_eager: bool = setting(False, "GPU: no CUDA graphs")
    sleep: str = setting(
        "none",
        "GPU, round.mode synchronous: what engines beside the trainer free while it trains: nothing, the KV cache, or their "
        "weights as well",
        choices=("none", "kv", "all"),
    )
    threads: int | None = setting(
        None, "CPU threads of each process of an engine; null: on CPU the cores, divided; on GPUs one", minimum=1, maximum=4096
    )
    start_timeout_s: float = setting(
        1800.0, "longest wait for an engine to start, and for the agent of its node", unit="s", minimum=0.001
    )
    stall_s: float = setting(
        120.0,
        "an engine without progress for so long, also while it takes weights, is killed and started again",
        unit="s",
        minimum=0.001,
    )
    max_restarts: int = setting(3, "restarts within one batch, or between two updates, before the run stops", minimum=0)

    @property
    def beside_trainer(self) -> bool:
        """Whether vLLMs take part of the GPUs that train."""
        return self.engine == "vllm" and self.nodes != "own"

    def check_device(self, device: str) -> None:
        """Raises ConfigError for what vLLM does on GPUs only, where ``device`` is ``cpu``."""
        if device != "cpu":
            return
        if self.expert_parallel:
            raise ConfigError("expert_parallel", "vLLM divides whole experts on GPUs only: on CPU it crashes; leave it out")
        if self.quantization != "none":
            raise ConfigError(
                "quantization", f"{self.quantization}: vLLM computes in fp8 on GPUs only; leave it out, or set none"
            )
        if self.sleep != "none":
            raise ConfigError("sleep", f"{self.sleep}: vLLM has no sleep mode on CPU; leave it out, or set none")

    @classmethod
    def base_for(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in ("urls", "server_attempts", "engine"):
            if name in values and (name != "engine" or values[name] == "server"):
                raise ConfigError(name, "HTTP servers are no longer used; instead pmpo-rollout-node, nodes 'own' and hosts")
        return {}

    def validate(self) -> None:
        if (self.engine == "replay") != (self.replay_from is not None):
            raise ConfigError("replay_from", "is needed by engine 'replay', and has no effect with any other")
        if (self.nodes == "own") != bool(self.hosts) or bool(self.hosts) != (self.key_file is not None):
            raise ConfigError("hosts", "and key_file are needed with nodes 'own', and have no effect with any other")
        if self.expert_parallel and self.tensor_parallel == 1:
            raise ConfigError("expert_parallel", "has no effect with tensor_parallel 1: one GPU holds all experts")
        if self.sleep != "none" and not self.beside_trainer:
            raise ConfigError("sleep", f"{self.sleep} has no effect: no vLLM shares a GPU with the trainer; leave it out")
        for host in self.hosts:
            if not re.fullmatch(r"[^:\s]+:[1-9]\d{0,4}", host):
                raise ConfigError("hosts", f"{host!r} is not HOST:PORT")
        if self.engine == "replay" and self.record_to is not None:
            raise ConfigError("record_to", "records nothing new from engine 'replay'")


@dataclass(frozen=True, kw_only=True)
class EpisodeConfig(Section):
    """Trajectories of several turns, by a function of your own (docs/rollouts.md, "Episodes: turns and tools")."""

    function: str | None = setting(
        None, "package.module:name of an async def episode(prompt, policy); null: a response is a single turn"
    )
    max_turns: int = setting(32, "turns that the policy samples in an episode, at most", minimum=1, maximum=10**6)
    timeout_s: float = setting(
        300.0, "time that an episode's own code and tools may take; the engine's is not counted", unit="s", above=0.0
    )
