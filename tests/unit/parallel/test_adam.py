"""Our Adam against torch.optim.AdamW and against its own saved state."""

import copy

import torch

from pmpo_megatron.parallel.adam import GroupStepAdam
from tests.tolerances import assert_near


def problem(optimizer_class, **settings):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(5, 3, generator=generator).requires_grad_(), torch.randn(4, generator=generator).requires_grad_()]
    return parameters, optimizer_class(parameters, lr=0.03, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, **settings)


def run(parameters, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_equals_adamw():
    ours, reference = problem(GroupStepAdam), problem(torch.optim.AdamW)
    run(*ours, 7)
    run(*reference, 7)
    for mine, theirs in zip(ours[0], reference[0], strict=True):
        assert_near(mine, theirs, spacings=4, relative=1e-6)
    for mine, theirs in zip(ours[0], reference[0], strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert_near(ours[1].state[mine][key], reference[1].state[theirs][key], key, spacings=4, relative=1e-6)


def test_without_decoupled_decay_equals_adam():
    ours, reference = problem(GroupStepAdam, adam_w_mode=False), problem(torch.optim.Adam)
    run(*ours, 4)
    run(*reference, 4)
    for mine, theirs in zip(ours[0], reference[0], strict=True):
        assert_near(mine, theirs, spacings=4, relative=1e-6)


def test_state_layout_and_resume():
    parameters, optimizer = problem(GroupStepAdam)
    run(parameters, optimizer, 3)
    assert optimizer.param_groups[0]["step"] == 3
    assert set(optimizer.state[parameters[0]]) == {"exp_avg", "exp_avg_sq"}
    state, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in parameters]
    run(parameters, optimizer, 2, start=3)
    fresh, other = problem(GroupStepAdam)
    with torch.no_grad():
        for parameter, value in zip(fresh, values, strict=True):
            parameter.copy_(value)
    other.load_state_dict(state)
    run(fresh, other, 2, start=3)
    assert all(torch.equal(a, b) for a, b in zip(parameters, fresh, strict=True))
