"""Learning-rate schedule by hand, and settings that cannot work."""

import math

import pytest

from pmpo_megatron.config import build
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.model.optimizer import LearningRateSchedule, OptimizerConfig, learning_rate_at


def test_warm_up_then_constant():
    config = OptimizerConfig(learning_rate=4.0, warmup_steps=4)
    assert [learning_rate_at(step, config) for step in range(6)] == [1.0, 2.0, 3.0, 4.0, 4.0, 4.0]


@pytest.mark.parametrize("schedule, middle", [("linear", 0.55), ("cosine", 0.55)])
def test_decay(schedule, middle):
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=2, decay_steps=12, min_learning_rate=0.1)
    assert learning_rate_at(2, config) == 1.0 and learning_rate_at(7, config) == pytest.approx(middle)
    assert learning_rate_at(12, config) == learning_rate_at(500, config) == pytest.approx(0.1)
    quarter = 0.1 + 0.9 * (0.7 if schedule == "linear" else (1 + math.cos(0.3 * math.pi)) / 2)
    assert learning_rate_at(5, config) == pytest.approx(quarter)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"schedule": "cosine"}, "decay_steps: None must be above warmup_steps = 0"),
        ({"schedule": "linear", "decay_steps": 5, "warmup_steps": 5}, "decay_steps: 5 must be above"),
        ({"decay_steps": 5}, "decay_steps: has no effect with schedule 'constant'"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0 must be above 0.0"),
        ({"min_learning_rate": 1.0}, "min_learning_rate: 1.0 is above the peak"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ConfigError, match=message):
        build(OptimizerConfig, values)


class Groups:
    """Stands for an optimizer: the schedule touches nothing but its groups."""

    def __init__(self):
        self.param_groups = [{"wd_mult": 1.0}, {"wd_mult": 0.0}]


def test_the_schedule_sets_groups_and_resumes():
    optimizer = Groups()
    schedule = LearningRateSchedule(optimizer, OptimizerConfig(learning_rate=1.0, warmup_steps=4, weight_decay=0.2))
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    schedule.advance()
    assert optimizer.param_groups[0]["lr"] == 0.5
    other = LearningRateSchedule(Groups(), schedule.config)
    other.load_state_dict(schedule.state_dict())
    assert other.learning_rate == schedule.learning_rate == 0.5
