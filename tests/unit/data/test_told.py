"""What an episode tells the policy is context alone: the objective is that of the sampled tokens by themselves."""

import numpy as np
import pytest
import torch

from pmpo_megatron.algo.objective import PRESETS, evaluate_objective
from pmpo_megatron.data.packing import pack
from pmpo_megatron.data.split import step_weights
from pmpo_megatron.types import Sample, TrajectoryTable
from tests.unit.algo.reference import reference_objective

TURNS = ((9, 4, 30), (1, 2, 5, 3, 8), (6,))  # tokens of each trajectory: sampled, told, sampled, ...


def trajectories():
    rng = np.random.default_rng(4)
    made = []
    for number, turns in enumerate(TURNS):
        sampled = np.concatenate([np.full(length, turn % 2 == 0) for turn, length in enumerate(turns)])
        ids = rng.integers(2, 90, 5 + len(sampled)).astype(np.int32)
        log_probs = np.where(sampled, rng.normal(-1, 0.3, len(sampled)), 0.0).astype(np.float32)
        advantage = (-1.0) ** number * (0.5 + number)
        made.append(Sample(number, 0, ids[:5], ids[5:], log_probs, False, advantage, sampled))
    return made


@pytest.mark.parametrize("preset", ["pmpo", "gmpo", "dapo"])
@pytest.mark.parametrize("kind", ["length", "constant"])
def test_the_objective_is_the_references_over_sampled_tokens_alone(preset, kind):
    given = trajectories()
    weights_N = step_weights(
        [np.arange(3)], TrajectoryTable.of(given, [0.0] * 3), kind=kind, max_length=60, mask_truncated=False
    )
    packed = pack(given, weights_N, sequence_multiple=8)
    generator = torch.Generator().manual_seed(2)
    old_T = torch.randn(packed.boundaries[-1], generator=generator, dtype=torch.float64) - 2
    drift_T = 0.3 * torch.randn(packed.boundaries[-1], generator=generator, dtype=torch.float64)
    new_T = (old_T + drift_T).requires_grad_()
    out = evaluate_objective(new_T, old_T, packed.trajectory_T, packed.advantages_N, packed.weights_N, PRESETS[preset])
    [gradient_T] = torch.autograd.grad(out.surrogate, new_T)

    # Which positions were sampled, counted by hand: after 5 tokens of the prompt the position before a token predicts it.
    starts = np.cumsum([0, *(-(-(5 + sum(turns)) // 8) * 8 for turns in TURNS)])
    positions, trajectory = [], []
    for number, turns in enumerate(TURNS):
        at = starts[number] + 4
        for turn, length in enumerate(turns):
            positions += range(at, at + length) if turn % 2 == 0 else ()
            trajectory += [number] * length if turn % 2 == 0 else []
            at += length
    lengths = np.array([39, 14, 6])
    c_N = torch.tensor(lengths / (lengths.sum() if kind == "length" else 3 * 60)).float()
    alone_T = new_T.detach()[positions].requires_grad_()
    loss, _ = reference_objective(
        alone_T, old_T[positions], torch.tensor(trajectory), packed.advantages_N, c_N, PRESETS[preset], progress=0.0
    )
    [expected_T] = torch.autograd.grad(loss, alone_T)
    assert float(out.loss) == pytest.approx(float(loss), rel=1e-6) and out.length_N.tolist() == lengths.tolist()
    assert torch.allclose(gradient_T[positions], expected_T, rtol=1e-5, atol=1e-9) and expected_T.abs().max() > 1e-3
    others_T = torch.ones_like(gradient_T, dtype=torch.bool)
    others_T[positions] = False
    assert (gradient_T[others_T] == 0).all() and others_T.sum() > 18
