"""Gains at equal cost, fronts and hypervolumes, each beside its definition written naively."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from eval.fronts import added_shares, best_gain_at_budget, hypervolume, on_front, resampled_means
from eval.intervals import bootstrap_interval

POINTS = arrays(float, (2, 3, 5), elements=st.integers(-8, 8).map(lambda n: n / 8))


def groups(values):
    return [
        {"group": f"p{i:02d}/000000", "category": f"c{i:02d}", "n_images": 4, "value": float(v)}
        for i, v in enumerate(values)
    ]


def test_means_are_the_bootstraps_own():
    """The mean of the values, and resamples with the same draws as an interval's."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 9))
    means = resampled_means([groups(row) for row in values], 500, 3, "category")
    assert means.shape == (501, 2) and np.allclose(means[0], values.mean(axis=1))
    for row, column in zip(values, means[1:].T, strict=True):
        interval = bootstrap_interval(groups(row), n_resamples=500, seed=3)
        assert (
            interval.low < np.quantile(column, 0.03) < np.quantile(column, 0.97) < interval.high
        )  # which are stretched
    assert np.corrcoef(means[1:].T)[0, 1] == pytest.approx(np.corrcoef(values)[0, 1], abs=0.15), "paired"


def test_settings_of_other_groups_are_refused():
    one = groups([1, 2, 3, 4, 5])
    other = [{**group, "category": "c00"} if i == 1 else group for i, group in enumerate(one)]
    with pytest.raises(ValueError, match=r"same groups of every setting|all input arrays"):
        resampled_means([one, other], 10, 0, "category")


@settings(max_examples=50, deadline=None)
@given(POINTS)
def test_the_most_within_a_loss_is_at_a_setting_or_where_the_line_to_its_neighbour_crosses_it(points):
    """Beside a fine walk along each path; what it finds at a place is what the path has there."""
    gains, losses = points
    most, places = best_gain_at_budget(gains, losses, 0.3)
    for path, row, found, place in zip(gains, losses, most, places, strict=True):
        steps = np.linspace(0, len(path) - 1, 4001)
        walked, lost = (np.interp(steps, range(len(path)), values) for values in (path, row))
        at_settings = [gain for gain, loss in zip(path, row, strict=True) if loss <= 0.3]
        if not at_settings:
            assert np.isnan(found) and np.isnan(place)
            continue
        assert found == pytest.approx(np.interp(place, range(len(path)), path))
        assert np.interp(place, range(len(path)), row) <= 0.3 + 1e-9
        assert found >= max(at_settings) and found == pytest.approx(walked[lost <= 0.3].max(), abs=2e-3)


def test_losses_that_are_not_monotone_do_not_end_a_path():
    gains, losses = np.array([0.02, 0.07, 0.11, 0.23]), np.array([0.5, 3.0, 1.4, 12.7])
    gain, place = best_gain_at_budget(gains, losses, 2.5)
    share = (2.5 - 1.4) / (12.7 - 1.4)
    assert gain == pytest.approx(0.11 + share * 0.12) and place == pytest.approx(2 + share)


@settings(max_examples=50, deadline=None)
@given(POINTS)
def test_the_front_is_of_those_that_nothing_beats(points):
    gains, losses = points
    for path, row, found in zip(gains, losses, on_front(gains, losses, 0.6), strict=True):
        everything = [*zip(path, row, strict=True), (0.0, 0.0)]
        for (gain, loss), kept in zip(everything[:-1], found, strict=True):
            beaten = any(g >= gain and c <= loss and (g > gain or c < loss) for g, c in everything)
            assert kept == (loss <= 0.6 and not beaten)


@settings(max_examples=50, deadline=None)
@given(POINTS)
def test_the_hypervolume_counts_the_cells_that_are_dominated(points):
    """On a lattice, where a sum over cells is the area."""
    gains, losses = points
    edges = np.arange(0, 8) / 8
    for path, row, found in zip(gains, losses, hypervolume(gains, losses, 1.0), strict=True):
        cells = sum(
            any(gain > g and max(loss, 0) <= c for gain, loss in zip(path, row, strict=True))
            for g in edges for c in edges
        )  # fmt: skip
        assert found == pytest.approx(cells / 64)


def test_what_a_method_adds_is_what_is_lost_without_it():
    gains = {"good": np.array([[0.2, 0.4]]), "beaten": np.array([[0.1, 0.3]]), "alone": np.array([[0.9, 0.9]])}
    losses = {"good": np.array([[0.1, 0.3]]), "beaten": np.array([[0.2, 0.5]]), "alone": np.array([[0.8, 0.9]])}
    whole = 0.2 * 0.2 + 0.4 * 0.5 + 0.9 * 0.2  # steps at losses of 0.1, 0.3 and 0.8
    assert added_shares(gains, losses, 1.0, ["beaten"])[0] == pytest.approx(0)
    assert added_shares(gains, losses, 1.0, ["alone"])[0] == pytest.approx((0.9 - 0.4) * 0.2 / whole)
    assert added_shares(gains, losses, 1.0, list(gains))[0] == pytest.approx(1)
    assert added_shares({"bad": np.array([[-1.0]])}, {"bad": np.array([[0.5]])}, 1.0, ["bad"])[0] == 0
