"""The objective's entry point: how it may be called, what it costs, and the edges of its range."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pmpo_megatron.algo.objective import PRESETS, ObjectiveConfig, evaluate_objective
from pmpo_megatron.errors import ConfigError
from tests.unit.algo.reference import ess_fraction
from tests.unit.algo.test_objective import CONFIGS, gradient, make_batch


@pytest.mark.parametrize("length", [2, 500, 131072])
@pytest.mark.parametrize("p", [-2.0, -0.3, 0.9, 2.0])
def test_orders_of_either_sign_with_heavy_tails(length, p):
    """The whole range of preset holder, log-ratios at both clamps: the sums of the one table against direct ones."""
    x = 0.4 * torch.randn(length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    x[0], x[-1] = -20.0, 20.0
    zeros, trajectory = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.long)
    out = evaluate_objective(
        x, zeros, trajectory, torch.tensor([0.5]), torch.ones(1), PRESETS["holder"], progress=(2.0 - p) / 4
    )
    assert abs(float(out.p_N[0]) - p) < 1e-12
    expected = (torch.logsumexp(p * x, 0) - math.log(length)) / p
    assert abs(out.power_mean_N[0].log() - expected) < 1e-10
    assert abs(out.ess_N[0] / length - ess_fraction(x, p)) < 1e-10


class Watch(TorchDispatchMode):
    """Counts what would make the host wait for a GPU, and notes the largest tensor that was made."""

    def __init__(self):
        super().__init__()
        self.waits, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "unique"):
            self.waits.append(name)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("name", CONFIGS)
def test_no_synchronisation_and_memory_of_vectors(name):
    log_probs, old, trajectory, advantages, weights = make_batch(1, lengths=(60000, 200000), dtype=torch.float32)
    config, token_weights = CONFIGS[name], torch.rand_like(old)
    evaluate_objective(log_probs, old, trajectory, advantages, weights, config)  # tables of constants are made once
    with Watch() as watch:
        out = evaluate_objective(log_probs, old, trajectory, advantages, weights, config, token_weights, 0.5)
        out.surrogate.backward()
    assert not watch.waits
    assert watch.largest <= 8 * len(old), "nothing larger than one float64 for each token"


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(old_log_probs_T=torch.zeros(1)), r"old_log_probs_T: has shape \(1,\); log_probs_T has 5 tokens"),
        (dict(trajectory_T=torch.zeros(5, 1, dtype=torch.long)), "trajectory_T: has shape"),
        (dict(token_weights_T=torch.ones(4)), "token_weights_T: has shape"),
        (dict(weights_N=torch.ones(1)), r"weights_N: has shape \(1,\); advantages_N has 2 trajectories"),
        (dict(log_probs_T=torch.zeros(5, dtype=torch.bfloat16)), "log_probs_T: is torch.bfloat16.*float32 or float64"),
        (dict(progress=1.2), "progress: 1.2 must lie in"),
        (dict(progress=float("nan")), "progress: nan must lie in"),
    ],
)
def test_arguments_that_would_be_broadcast_or_rounded_are_refused(change, words):
    arguments = dict(
        log_probs_T=torch.zeros(5),
        old_log_probs_T=torch.zeros(5),
        trajectory_T=torch.zeros(5, dtype=torch.long),
        advantages_N=torch.ones(2),
        weights_N=torch.ones(2),
        config=PRESETS["holder"],
    )
    with pytest.raises(ConfigError, match=words):
        evaluate_objective(**(arguments | change))


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_inputs_by_position(name):
    """As the entry point is called: float32 everywhere, arguments by position. The arithmetic inside is float64."""
    log_probs, old, trajectory, advantages, weights = make_batch(7, std=0.5, dtype=torch.float32)
    inputs = (log_probs, old, trajectory, advantages.float(), weights.float(), CONFIGS[name])
    out = evaluate_objective(*inputs, None, 0.3, lambda table: table)
    difference = (log_probs.detach() - old).double()  # what float32 log-probs can tell
    double = (old.double() + difference).requires_grad_()
    numbers = advantages.float().double(), weights.float().double()
    expected = evaluate_objective(double, old.double(), trajectory, *numbers, CONFIGS[name], progress=0.3)
    assert abs(out.loss - expected.loss) < 1e-12 and torch.allclose(out.p_N, expected.p_N, atol=1e-10, rtol=0)
    found = gradient(out.surrogate, log_probs)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), gradient(expected.surrogate, double), rtol=1e-6, atol=1e-9)


def test_a_ratio_exactly_at_the_bound_is_not_clipped():
    x = torch.tensor([0.4, 0.4 + 1e-12, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    zeros, trajectory = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    out = evaluate_objective(x, zeros, trajectory, torch.ones(1), torch.ones(1), PRESETS["gmpo"])
    assert out.clip_fraction_N[0] == 0.25
    assert (gradient(out.surrogate, x) != 0).tolist() == [True, False, True, True]


def test_no_gradient_flows_through_the_clamp():
    """A ratio beyond the clamp keeps its weight in the mean, and moves neither way."""
    x = torch.tensor([25.0, -25.0, 20.0, 0.1], dtype=torch.float64, requires_grad=True)
    zeros, trajectory = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    for config in (ObjectiveConfig(rule="fixed", p=0.5, clip_level="sequence"), ObjectiveConfig(rule="fixed", p=0.0)):
        sign = -1.0 if config.clip_level == "sequence" else 1.0
        found = gradient(evaluate_objective(x, zeros, trajectory, torch.tensor([sign]), torch.ones(1), config).surrogate, x)
        assert found[0] == 0 and found[1] == 0 and found[3] != 0
