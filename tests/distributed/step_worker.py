"""What the processes of test_step.py run."""

from __future__ import annotations

import dataclasses

import torch

from pmpo_megatron.algo.objective import PRESETS, ObjectiveConfig
from pmpo_megatron.config import build
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.model.optimizer import OptimizerConfig
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.model.step import optimizer_step, score
from pmpo_megatron.parallel import state as state_module
from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down
from tests.distributed.parity_worker import TEMPERATURE, prepared
from tests.weights import whole_weights

OBJECTIVE = PRESETS["pmpo"]


def run_layouts(layouts: list[dict], path: str) -> list[dict]:
    found = []
    for layout in layouts:
        options = dict(layout)
        recompute = options.pop("recompute", "none")
        parallel = ParallelConfig(**options)
        state = initialize(parallel, device="cpu")
        world = Case(ModelConfig(path=path, recompute=recompute, log_prob_chunk=16), parallel, state, prepared(state))
        found.append({"twice": [world.two_steps() for _ in range(2)], "broken": world.broken(), "refused": world.refusals()})
        shut_down(keep_world=True)
    shut_down()
    return found


@dataclasses.dataclass
class Case:
    model: ModelConfig
    parallel: ParallelConfig
    state: object
    batches: list

    def build(self) -> Policy:
        return Policy.build(self.model, OptimizerConfig(learning_rate=0.01), self.parallel, self.state)

    def step(self, policy, scored, **changes):
        settings = dict(objective=OBJECTIVE, progress=0.0, temperature=TEMPERATURE) | changes
        return optimizer_step(policy, scored, **settings)

    def two_steps(self):
        """An on-policy step and the one after it, with the weights they lead to."""
        policy = self.build()
        scored = score(policy, self.batches, temperature=TEMPERATURE)
        results = [self.step(policy, scored), self.step(policy, scored)]
        return results, {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}

    def broken(self):
        """(result, whether weights and schedule stayed) for inf in a gradient, a huge advantage, NaN in a weight; and after."""
        policy = self.build()
        scored = score(policy, self.batches, temperature=TEMPERATURE)
        results, replace = [], dataclasses.replace
        victims = [p for name, p in policy.named_parameters() if name == "decoder.layers.0.mlp.linear_fc2.weight"]
        hooks = [victim.register_hook(lambda gradient: gradient * float("inf")) for victim in victims]
        results.append(self.tried(policy, scored))
        for hook in hooks:
            hook.remove()
        large = [replace(item, batch=replace(item.batch, advantages_N=item.batch.advantages_N * 1e38)) for item in scored]
        results.append(self.tried(policy, large))
        kept = [victim.detach().clone() for victim in victims]
        for victim in victims:
            victim.data[0, 0] = float("nan")
        results.append(self.tried(policy, scored))
        for victim, values in zip(victims, kept, strict=True):
            victim.data.copy_(values)
        return [*results, (self.step(policy, scored), policy.scheduler.num_updates)]

    def tried(self, policy, scored):
        before = self.values(policy)
        return self.step(policy, scored), self.same(policy, before)

    def values(self, policy):
        return [parameter.detach().clone() for _, parameter in policy.named_parameters()] + [policy.scheduler.num_updates]

    def same(self, policy, before):
        now = self.values(policy)
        equal = [torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(now[:-1], before[:-1], strict=True)]
        return all(equal) and now[-1] == before[-1]

    def refusals(self):
        """Messages of calls that cannot work."""
        policy = self.build()
        scored = score(policy, self.batches, temperature=TEMPERATURE)
        reference = Policy.build(self.model, None, self.parallel, self.state)
        penalised = build(ObjectiveConfig, {"preset": "pmpo", "kl_coefficient": 0.1})
        messages = []
        for call in (
            lambda: self.step(policy, scored, objective=penalised),
            lambda: self.step(reference, scored),
        ):
            try:
                call()
                messages.append("accepted")
            except ConfigError as error:
                messages.append(str(error))
        return messages


def lengths_out_of_reach(path: str, layouts: list[dict]) -> list[bool]:
    """Whether hidden states are the same where the values of ``cu_seqlens`` cannot be had: on the device "meta" asking
    for them is an error, as on a GPU it makes the host wait."""
    same = []
    for layout in layouts:
        parallel = ParallelConfig(**layout)
        state = initialize(parallel, device="cpu")
        policy = Policy.build(ModelConfig(path=path), OptimizerConfig(), parallel, state)
        batch = prepared(state)[0]
        names = [name for name in vars(batch.sequences) if name.startswith("cu_seqlens")]
        lengths = {name: getattr(batch.sequences, name).to("meta") for name in names}
        with torch.no_grad():
            outputs = [
                policy.modules[0](batch.tokens_1T, batch.position_ids_1T, None, packed_seq_params=packed)
                for packed in (batch.sequences, dataclasses.replace(batch.sequences, **lengths))
            ]
        same.append(torch.equal(*outputs))
        shut_down(keep_world=True)
    shut_down()
    return same


def overlapped_and_not(path: str, layouts: list[dict]) -> list[list[dict]]:
    """For each layout, with and without overlap: results of three steps, the weights they lead to, and gradient buckets."""
    state_module.BUCKET = 5000, 0  # several buckets
    found = []
    for layout in layouts:
        both = []
        for overlap in (True, False):
            parallel = ParallelConfig(**layout, overlap_grad_reduce=overlap, overlap_param_gather=overlap)
            state = initialize(parallel, device="cpu")
            case = Case(ModelConfig(path=path, log_prob_chunk=16), parallel, state, prepared(state))
            # So large an epsilon does not make updates of what should be 0 and is rounding, such as gradients of keys' biases.
            optimizer = OptimizerConfig(learning_rate=0.1, epsilon=0.1)
            policy = Policy.build(case.model, optimizer, parallel, state)
            steps = []
            for batches in (case.batches, 2 * case.batches, case.batches):  # another number of micro-batches every time
                steps.append(case.step(policy, score(policy, batches, temperature=TEMPERATURE)))
            weights = whole_weights(policy)
            buckets = len(policy.chunks[0].bucket_groups)
            assert policy.chunks[0].use_forward_hook == overlap
            both.append({"norms": [(s.loss, s.grad_norm) for s in steps], "weights": weights, "buckets": buckets})
            shut_down(keep_world=True)
        found.append(both)
    shut_down()
    return found
