"""What the processes of the GPU tests run."""

from __future__ import annotations

from pmpo_megatron.algo.objective import PRESETS
from pmpo_megatron.model.architecture import transformer_engine_available
from pmpo_megatron.model.optimizer import OptimizerConfig
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.model.step import optimizer_step, score
from pmpo_megatron.parallel.shards import join_context_shards
from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down
from tests.distributed.parity_worker import TEMPERATURE, micro_batches


def train(path: str, layout: dict, dtype: str) -> dict:
    """Two steps on the parity tests' micro-batches; losses, gradient norms, and whether Transformer Engine was used."""
    parallel = ParallelConfig(**layout)
    state = initialize(parallel, device="cuda")
    policy = Policy.build(
        ModelConfig(path=path, dtype=dtype, log_prob_chunk=16), OptimizerConfig(learning_rate=1e-3), parallel, state
    )
    batches = micro_batches(state.dp_size, state.dp_rank, parallel.pipeline * (parallel.virtual_pipeline or 0))
    old = score(policy, batches, temperature=TEMPERATURE)
    settings = dict(objective=PRESETS["pmpo"], progress=0.0, temperature=TEMPERATURE)
    results = [optimizer_step(policy, batches, old, **settings) for _ in range(2)]
    found = {
        "first": results[0].trajectories,
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "applied": all(result.applied for result in results),
        "transformer_engine": transformer_engine_available(),
    }
    if state.is_last_stage and state.cp_size == 1:
        boundaries = batches[0].cu_seqlens.tolist()
        found["log_probs"] = join_context_shards([old[0].log_probs_T.cpu()], boundaries).numpy()
    shut_down()
    return found
