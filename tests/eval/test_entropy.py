"""Entropies with known values, their bias, and the numbers that groups become."""

import math

import numpy as np
import pytest

from eval.intervals import MINIMUM_IMAGES, entropy


@pytest.mark.parametrize(
    ("counts", "plug_in", "seen"),
    [
        ([8, 0, 0], 0.0, 1),
        ([4, 4], math.log(2), 2),
        ([5, 5, 5, 5, 0], math.log(4), 4),
        ([6, 3, 3], 1.5 * math.log(2), 3),
    ],
)
def test_known_entropies(counts, plug_in, seen):
    n = sum(counts)
    assert entropy(counts, miller_madow=False) == pytest.approx(plug_in)
    assert entropy(counts) == pytest.approx(plug_in + (seen - 1) / (2 * n))


def test_miller_madow_removes_most_of_the_bias():
    rng = np.random.default_rng(0)
    counts = rng.multinomial(40, np.full(8, 1 / 8), size=4000)
    plug_in = math.log(8) - np.mean([entropy(row, miller_madow=False) for row in counts])
    corrected = math.log(8) - np.mean([entropy(row) for row in counts])
    assert plug_in > 0.07
    assert abs(corrected) < 0.1 * plug_in


def test_small_n_is_refused():
    assert entropy([MINIMUM_IMAGES, 0]) == 0
    with pytest.raises(ValueError, match=f"at least {MINIMUM_IMAGES} images.*got {MINIMUM_IMAGES - 1}"):
        entropy([MINIMUM_IMAGES - 1, 0])
    with pytest.raises(ValueError, match="got 0"):
        entropy([0, 0])
