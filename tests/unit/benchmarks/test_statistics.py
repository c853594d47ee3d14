"""pass@k against enumeration, standard errors against closed forms, the bootstrap and simulation."""

import itertools
import math

import numpy as np
import pytest

from pmpo_megatron.benchmarks.statistics import (
    accuracy,
    average,
    default_ks,
    estimate,
    pass_at_k,
    pass_probability,
)


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_choices_of_k_responses_with_a_correct_one(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        responses = [True] * correct + [False] * (samples - correct)
        choices = [any(choice) for choice in itertools.combinations(responses, k)]
        assert pass_probability(samples, correct, k) == pytest.approx(sum(choices) / len(choices), abs=1e-14)


def test_pass_at_k_of_many_responses_stays_exact():
    exact = 1 - math.comb(1013, 256) / math.comb(1024, 256)
    assert pass_probability(1024, 11, 256) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("wrong", [(4, 1, 0), (4, 1, 5), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_that_does_not_exist(wrong):
    with pytest.raises(ValueError, match="does not exist"):
        pass_probability(*wrong)


def test_pass_at_1_is_the_accuracy():
    scores = [[1.0, 0.0, 0.0, 1.0], [0.0] * 4, [1.0, 1.0, 1.0, 0.0]]
    assert pass_at_k(scores, 1) == accuracy(scores)
    assert pass_at_k(scores, 1).value == pytest.approx((0.5 + 0 + 0.75) / 3)
    assert pass_at_k(scores, 2).value == pytest.approx((5 / 6 + 0 + 1) / 3)


def test_accuracy_counts_correct_responses_whatever_numbers_a_reward_of_ones_own_gives():
    scores = [[3.0, -2.0, 0.5, 0.4], [-7.0, 0.0, 100.0, -0.1]]
    assert accuracy(scores).value == pytest.approx((2 / 4 + 1 / 4) / 2) and pass_at_k(scores, 1) == accuracy(scores)


def test_error_of_one_response_per_problem_is_the_binomial_one():
    scores = [[1.0]] * 21 + [[0.0]] * 9
    assert accuracy(scores).value == 0.7
    assert accuracy(scores).error == pytest.approx(math.sqrt(0.7 * 0.3 / 29), rel=1e-12)


def test_error_is_that_of_the_bootstrap_over_problems():
    rng = np.random.default_rng(0)
    difficulty = rng.beta(0.5, 0.8, 60)
    scores = (rng.random((60, 8)) < difficulty[:, None]).astype(float)
    resampled = scores.mean(1)[rng.integers(0, 60, (20000, 60))].mean(1)
    expected = resampled.std() * math.sqrt(60 / 59)  # the bootstrap divides by P, the estimate by P - 1
    assert accuracy(scores.tolist()).error == pytest.approx(expected, rel=0.02)


def test_error_is_the_deviation_over_repeated_evaluations_although_responses_to_a_problem_agree():
    rng = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(2000):
        difficulty = rng.beta(0.3, 0.3, 40)  # nearly always or nearly never solved
        found = accuracy((rng.random((40, 16)) < difficulty[:, None]).astype(float).tolist())
        values.append(found.value)
        errors.append(found.error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.05)
    as_if_independent = math.sqrt(0.25 / (40 * 16))
    assert np.mean(errors) > 2 * as_if_independent


def test_one_problem_has_no_error():
    assert math.isnan(estimate([0.5]).error)
    assert estimate([0.5]).percent() == "50.0"
    assert estimate([0.0, 1.0]).percent() == "50.0 ± 50.0"
    with pytest.raises(ValueError, match="no problems"):
        estimate([])


def test_average_has_the_error_of_a_mean_of_independent_figures():
    rng = np.random.default_rng(2)
    columns = [rng.random(20) < 0.3, rng.random(500) < 0.8]
    found = average([estimate(column.astype(float).tolist()) for column in columns])
    resampled = np.mean([column[rng.integers(0, len(column), (20000, len(column)))].mean(1) for column in columns], axis=0)
    assert found.value == pytest.approx((columns[0].mean() + columns[1].mean()) / 2)
    assert found.error == pytest.approx(resampled.std(), rel=0.04)


def test_ks_that_are_shown():
    assert default_ks(1) == ()
    assert default_ks(2) == (2,)
    assert default_ks(6) == (2, 4, 6)
    assert default_ks(8) == (2, 4, 8)
