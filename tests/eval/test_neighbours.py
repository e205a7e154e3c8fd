"""Constructed sets, an independent implementation and the definitions for the overlap of two sets."""

import numpy as np
import pytest
import torch

from eval.fidelity import Coverage, Density, Precision, Recall


def sample(n, d, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale


def computed(metric, x, y):
    metric.update(y, real=True)
    metric.update(x)
    return metric.compute().item()


def precision_recall(x, y):
    return computed(Precision(), x, y), computed(Recall(), x, y)


def density_coverage(x, y):
    return computed(Density(), x, y), computed(Coverage(), x, y)


def test_identical_sets():
    x = sample(50, 8)
    assert precision_recall(x, x) == (1, 1)
    # a ball without its surface holds its centre and k - 1 of its k neighbours
    assert density_coverage(x, x) == (1, 1)
    assert precision_recall(x.float(), x.float()[torch.randperm(50)]) == (1, 1)


def test_disjoint_sets():
    x = sample(50, 8)
    assert precision_recall(x + 100, x) == (0, 0)
    assert density_coverage(x + 100, x) == (0, 0)


def test_a_subset_is_precise_and_recalls_its_part():
    # two far clusters; the images have only one of them
    a, b = sample(40, 4, 1), sample(40, 4, 2) + 1000
    real = torch.cat([a, b])
    assert precision_recall(a, real) == (1, 0.5)
    assert density_coverage(a, real) == (1, 0.5)
    # the images have both, the real ones only one
    assert precision_recall(real, a) == (0.5, 1)
    assert density_coverage(real, a) == (0.5, 1)


def test_a_collapsed_set():
    real = sample(60, 4)
    collapsed = real[:1].repeat(30, 1)
    assert precision_recall(collapsed, real) == (1, pytest.approx(1 / 60))  # balls of radius 0: the one image itself


def test_manifolds_against_the_libraries_and_the_definition():
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    x, y = sample(70, 5, 1, scale=0.8), sample(50, 5, 2)
    assert precision_recall(x, y) == pytest.approx(calculate_precision_recall_full(x, y, neighborhood=3))
    k = 5
    real, made = y.numpy(), x.numpy()
    within = np.linalg.norm(real[:, None] - real[None], axis=2)
    radii = np.sort(within, axis=1)[:, k]
    across = np.linalg.norm(real[:, None] - made[None], axis=2)
    depth = (across < radii[:, None]).sum(axis=0).mean() / k
    assert density_coverage(x, y) == pytest.approx((depth, (across.min(axis=1) < radii).mean()))


def test_density_is_one_and_unbounded():
    x, y = sample(2000, 3, 1), sample(1000, 3, 2)
    assert density_coverage(x, y)[0] == pytest.approx(1, abs=0.05)
    # with many dimensions, the middle lies within everyone's k-th neighbour
    y = sample(100, 40)
    assert density_coverage(y.mean(0, keepdim=True), y)[0] == 100 / 5


def test_manifolds_refuse_few_images():
    x = sample(4, 3)
    assert precision_recall(x, x) == (1, 1)
    with pytest.raises(ValueError, match="at least 4 images, got 3"):
        precision_recall(x[:3], x)
    with pytest.raises(ValueError, match="at least 4 reference images, got 3"):
        precision_recall(x, x[:3])
    with pytest.raises(ValueError, match="at least 6 reference images, got 4"):
        density_coverage(x, x)
    with pytest.raises(ValueError, match="k >= 1"):
        Precision(k=0)
    with pytest.raises(ValueError, match="nothing to measure"):
        computed(Density(k=1), x[:0], x)


@pytest.mark.parametrize("kind", [Precision, Recall, Density, Coverage])
def test_order_does_not_matter_and_nonsense_is_refused(kind):
    x, y = sample(60, 4, 1), sample(50, 4, 2)
    shuffled = computed(kind(k=3), x.flip(0), y[torch.randperm(50)])
    assert shuffled == pytest.approx(computed(kind(k=3), x, y), rel=1e-9)
    with pytest.raises(ValueError, match="one encoder"):
        computed(kind(), x[:, :3], y)
    with pytest.raises(ValueError, match="finite"):
        computed(kind(), x * np.nan, y)


@pytest.mark.parametrize("shift", [0, 30])
def test_equal_distances_are_ties_whatever_their_rounding(shift):
    """Points of a grid, of which integers tell exactly how far they are from each other."""
    generator = torch.Generator().manual_seed(0)
    made, real = (torch.randint(0, 3, (n, 4), generator=generator) for n in (60, 50))
    radii = torch.cdist(real.double(), real.double()).square().round().sort(dim=1).values[:, 3]
    apart = (made[:, None] - real).square().sum(dim=2)
    found = [computed(kind(k=3), made * 0.1 + shift, real * 0.1 + shift) for kind in (Precision, Density, Coverage)]
    within = apart < radii
    expected = [(apart <= radii).any(dim=1), within.sum(dim=1) / 3, within.any(dim=0)]
    assert found == pytest.approx([each.double().mean().item() for each in expected])
