"""Gains at equal cost, fronts and hypervolumes, each compared with a naive version of its definition."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from eval.fronts import added_shares, best_gain_at_budget, hypervolume, on_front, resampled_means
from eval.intervals import bootstrap_interval

POINTS = arrays(float, (2, 3, 5), elements=st.integers(-8, 8).map(lambda n: n / 8))


def test_means_are_those_of_the_bootstrap(grouped):
    """The mean of the values, and resamples with the same draws as an interval's."""
    values = np.random.default_rng(0).normal(size=(2, 9))
    means = resampled_means([grouped(row) for row in values], 500, 3, "category")
    assert means.shape == (501, 2) and np.allclose(means[0], values.mean(axis=1))
    for row, column in zip(values, means[1:].T, strict=True):
        interval = bootstrap_interval(grouped(row), n_resamples=500, seed=3)  # whose limits are stretched
        assert interval.low < np.quantile(column, 0.03) < np.quantile(column, 0.97) < interval.high
    assert np.corrcoef(means[1:].T)[0, 1] == pytest.approx(np.corrcoef(values)[0, 1], abs=0.15), "paired"
    groups = grouped([1, 2, 3, 4, 5])
    other = [{**group, "category": "p000"} if i == 1 else group for i, group in enumerate(groups)]
    with pytest.raises(ValueError, match=r"same groups of every setting|all input arrays"):
        resampled_means([groups, other], 10, 0, "category")


@settings(max_examples=50, deadline=None)
@given(POINTS)
def test_the_best_gain_is_the_largest_on_a_fine_walk_along_the_path(points):
    gains, losses = points
    best, positions = best_gain_at_budget(gains, losses, 0.3)
    for path, row, gain, position in zip(gains, losses, best, positions, strict=True):
        indices = range(len(path))
        steps = np.linspace(0, len(path) - 1, 4001)
        walked, lost = (np.interp(steps, indices, values) for values in (path, row))
        at_settings = path[row <= 0.3]
        if not len(at_settings):
            assert np.isnan(gain) and np.isnan(position)
            continue
        assert gain == pytest.approx(np.interp(position, indices, path))
        assert np.interp(position, indices, row) <= 0.3 + 1e-9
        assert gain >= max(at_settings) and gain == pytest.approx(walked[lost <= 0.3].max(), abs=2e-3)


def test_losses_that_are_not_monotone_do_not_end_a_path():
    gains, losses = np.array([0.02, 0.07, 0.11, 0.23]), np.array([0.5, 3.0, 1.4, 12.7])
    gain, position = best_gain_at_budget(gains, losses, 2.5)
    share = (2.5 - 1.4) / (12.7 - 1.4)
    assert gain == pytest.approx(0.11 + share * 0.12) and position == pytest.approx(2 + share)


@settings(max_examples=50, deadline=None)
@given(POINTS)
def test_without_interpolation_the_best_gain_is_the_largest_of_the_settings_within_the_budget(points):
    gains, losses = points
    best, positions = best_gain_at_budget(gains, losses, 0.3, interpolate=False)
    walked, _ = best_gain_at_budget(gains, losses, 0.3)
    for path, row, gain, position, upper in zip(gains, losses, best, positions, walked, strict=True):
        within = [place for place in range(len(path)) if row[place] <= 0.3]
        if not within:
            assert np.isnan(gain) and np.isnan(position) and np.isnan(upper)
            continue
        assert position == min(within, key=lambda place: (-path[place], place)) and gain == path[int(position)] <= upper


def test_a_step_function_gains_what_was_measured_and_not_what_lies_between():
    """Losses of 1 and 3 at a budget of 2: halfway if the method may lie between, else the weaker setting."""
    path = np.array([0.1, 0.3]), np.array([1.0, 3.0]), 2.0
    assert best_gain_at_budget(*path) == pytest.approx((0.2, 0.5))
    assert best_gain_at_budget(*path, interpolate=False) == (0.1, 0)


@settings(max_examples=50, deadline=None)
@given(POINTS)
def test_the_front_has_the_points_that_no_other_dominates(points):
    gains, losses = points
    for path, row, front in zip(gains, losses, on_front(gains, losses, 0.6), strict=True):
        everything = [*zip(path, row, strict=True), (0.0, 0.0)]
        for (gain, loss), kept in zip(everything[:-1], front, strict=True):
            dominated = any(g >= gain and c <= loss and (g > gain or c < loss) for g, c in everything)
            assert kept == (loss <= 0.6 and not dominated)


@settings(max_examples=50, deadline=None)
@given(POINTS)
def test_the_hypervolume_counts_the_dominated_cells_of_a_lattice(points):
    gains, losses = points
    edges = np.arange(0, 8) / 8
    for path, row, volume in zip(gains, losses, hypervolume(gains, losses, 1.0), strict=True):
        cells = sum(((path > gain) & (np.maximum(row, 0) <= loss)).any() for gain, loss in product(edges, edges))
        assert volume == pytest.approx(cells / 64)


def test_a_method_adds_the_share_that_is_lost_without_it():
    gains = {"good": np.array([[0.2, 0.4]]), "beaten": np.array([[0.1, 0.3]]), "alone": np.array([[0.9, 0.9]])}
    losses = {"good": np.array([[0.1, 0.3]]), "beaten": np.array([[0.2, 0.5]]), "alone": np.array([[0.8, 0.9]])}
    total = 0.2 * 0.2 + 0.4 * 0.5 + 0.9 * 0.2  # steps at losses of 0.1, 0.3 and 0.8
    assert added_shares(gains, losses, 1.0, ["beaten"])[0] == pytest.approx(0)
    assert added_shares(gains, losses, 1.0, ["alone"])[0] == pytest.approx((0.9 - 0.4) * 0.2 / total)
    assert added_shares(gains, losses, 1.0, list(gains))[0] == pytest.approx(1)
    assert added_shares({"bad": np.array([[-1.0]])}, {"bad": np.array([[0.5]])}, 1.0, ["bad"])[0] == 0
