"""The gradient of an optimizer step is that of the formula: autograd through transformers and the slow objective.

Layouts are compared with each other in test_parity; here is what all of them must equal.
"""

from itertools import pairwise

import pytest
import torch

from pmpo_megatron.hf.mapping import WeightMapping
from pmpo_megatron.hf.safetensors import SafetensorsReader
from pmpo_megatron.hf.shape import read_shape
from tests.distributed.gradient_worker import OPTIMIZER
from tests.distributed.harness import run_ranks
from tests.distributed.parity_worker import SAMPLED_TOKENS, STEPS, TEMPERATURE, micro_batches
from tests.tiny_models import save_tiny_model
from tests.tolerances import assert_near
from tests.unit.algo.reference import reference_objective


def scores_of(model, batch):
    """Log-probs of the targets and entropies, every sequence alone, with gradient."""
    bounds = pairwise(batch.boundaries)
    logits = torch.cat([model(batch.tokens_T[None, start:end]).logits[0] for start, end in bounds])
    table = (logits / TEMPERATURE).log_softmax(-1)
    return table.gather(1, batch.targets_T[:, None])[:, 0], -(table.exp() * table).sum(-1)


def step_loss(model, batches, old, config):
    """(what is differentiated, the loss that is reported): sections 2 to 4 of the objective, written out."""
    whole = surrogate = 0.0
    for batch, old_T in zip(batches, old, strict=True):
        log_probs, entropy = scores_of(model, batch)
        leaf, response = log_probs.detach().requires_grad_(), batch.trajectory_T >= 0
        objective, _ = reference_objective(
            leaf, old_T, batch.trajectory_T, batch.advantages_N, batch.weights_N, config, progress=0.5
        )
        [gradient] = torch.autograd.grad(objective, leaf)
        if config.importance == "sequence":
            for index in range(len(batch.sample_ids)):
                chosen = batch.trajectory_T == index
                gap = (old_T[chosen] - batch.rollout_log_probs_T[chosen]).mean()
                gradient[chosen] *= min(float(gap.exp()), config.importance_cap)
        d = (log_probs - old_T)[response]  # the reference policy is the old one here
        penalty = config.kl_coefficient * (torch.exp(-d) - 1 + d).sum() / SAMPLED_TOKENS
        penalty = penalty - config.entropy_coefficient * entropy[response].sum() / SAMPLED_TOKENS
        surrogate = surrogate + (gradient * log_probs).sum() + penalty
        whole = whole + objective.detach() + penalty.detach()
    return surrogate, float(whole)


DENSE = [(kind, number) for kind in ("qwen2", "qwen3-tied") for number in range(len(STEPS))]
CASES = [*DENSE, ("qwen2-moe", 0), ("qwen3-moe-mixed", 1), ("mixtral", 0)]


@pytest.mark.parametrize("kind, number", CASES)
def test_gradients_are_those_of_the_formula(kind, number, tmp_path):
    import transformers

    path = save_tiny_model(kind, tmp_path / "model")
    [found] = run_ranks(1, "tests.distributed.gradient_worker:two_steps", str(path), number)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    surrogate, loss = step_loss(model, micro_batches(1, 0, 0), found["old"], STEPS[number])
    surrogate.backward()
    assert found["results"][0].loss == pytest.approx(loss, rel=1e-5)
    # In files, unlike in memory, every expert has tensors of its own: gradients are written as weights are.
    model.save_pretrained(tmp_path / "gradients", state_dict={name: p.grad for name, p in model.named_parameters()})
    gradients, mapping = SafetensorsReader(tmp_path / "gradients"), WeightMapping(read_shape(path))
    assert mapping.hf_shapes.keys() == set(gradients.names) and len(found["gradients"][0]) == len(mapping.entries)
    for name, gradient in found["gradients"][0].items():
        entry = mapping.entry(name)
        expected = entry.merge([gradients(tensor) for tensor in entry.hf])
        assert expected.abs().max() > 0
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max(), name
    check_update(found)


def check_update(found):
    """Two steps of AdamW on gradients clipped by their whole norm (in the first, moments of any decay give the same
    update); norms and biases do not decay. A weight near 1 changes by little more than its spacing: hence spacings."""
    factors = []
    for gradients, result in zip(found["gradients"], found["results"], strict=True):
        norm = float(torch.sqrt(sum((gradient.double() ** 2).sum() for gradient in gradients.values())))
        assert result.grad_norm == pytest.approx(norm, rel=1e-5) and norm > 2 * OPTIMIZER.clip_grad
        factors.append(OPTIMIZER.clip_grad / norm)
    for name, before in found["before"].items():
        weight = before.clone().requires_grad_()
        decay = OPTIMIZER.weight_decay if weight.dim() > 1 else 0.0
        betas = (OPTIMIZER.beta1, OPTIMIZER.beta2)
        adam = torch.optim.AdamW([weight], lr=OPTIMIZER.learning_rate, betas=betas, eps=OPTIMIZER.epsilon, weight_decay=decay)
        for gradients, factor in zip(found["gradients"], factors, strict=True):
            weight.grad = gradients[name] * factor
            adam.step()
        assert_near(found["after"][name], weight, name, spacings=2, relative=1e-4, of=weight - before)
