"""Phases never overlap, so they add up to the total."""

import pytest

from pmpo_megatron.monitor import PhaseTimer


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_nested_and_repeated_phases_add_up():
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    clock.now += 1  # outside every phase
    with timer.phase("train"):
        clock.now += 2
        with timer.phase("push"):
            clock.now += 5
        clock.now += 3
    with timer.phase("push"):
        clock.now += 7
    assert timer.take() == {"time/train_s": 5, "time/push_s": 12, "time/total_s": 18}
    assert timer.take() == {"time/total_s": 0}


def test_an_error_inside_a_phase_is_timed_and_passes_through():
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    with pytest.raises(KeyError), timer.phase("train"):
        clock.now += 4
        raise KeyError
    clock.now += 1
    assert timer.take() == {"time/train_s": 4, "time/total_s": 5}


def test_take_inside_a_phase_splits_it():
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    with timer.phase("train"):
        clock.now += 4
        assert timer.take() == {"time/train_s": 4, "time/total_s": 4}
        clock.now += 2
    assert timer.take() == {"time/train_s": 2, "time/total_s": 2}
