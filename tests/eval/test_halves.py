"""Halves of a set of images and of the real ones that it is compared with, and how well they tell a number's error."""

from collections import Counter

import numpy as np
import pytest
import torch

from eval.encoders import PixelEncoder
from eval.fidelity import Cmmd, Coverage, Density, FrechetDistance, KernelDistance, Precision, Recall
from eval.images import UNKNOWN_SEED, ManifestRow
from eval.imageset import ImageSet
from eval.intervals import difference_of, interval_of

K, MADE, REAL, D = 20, 8, 16, 8
CATEGORIES = [f"c{number:02d}" for number in range(K)]


def image_set(folder, categories, n, prompts=1):
    """n images of each category, dealt to its prompts, whose features `features` has under the folder's name."""
    rows = [
        ManifestRow(f"{category}/{index}.png", f"{category}-{index % prompts}", "", category, 0, index, UNKNOWN_SEED)
        for category in categories
        for index in range(n)
    ]
    return ImageSet(folder, rows)


@pytest.fixture
def features(monkeypatch):
    """Features by the name of the folder, [N, D] or [categories, n, D], instead of an encoder's."""
    known = {}
    monkeypatch.setattr(ImageSet, "embeddings", lambda self, _: known[self.folder.name].reshape(-1, D))
    return known


def metric_of(kind, real, cluster="category"):
    metric = kind(PixelEncoder())
    metric.real, metric.cluster = real, cluster
    return metric


def normal(rng, *shape):
    return torch.from_numpy(rng.normal(size=shape))


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance, Cmmd, Precision, Recall, Density, Coverage])
def test_a_half_is_compared_with_the_real_images_of_its_own_categories(kind, features):
    rng = np.random.default_rng(0)
    means = 3 * normal(rng, K, 1, D)
    made, real = means + normal(rng, K, MADE, D), means + normal(rng, K, REAL, D)
    features |= {"made": made, "real": real}
    found = metric_of(kind, image_set("real", CATEGORIES, REAL)).results(image_set("made", CATEGORIES, MADE))
    halves = [np.random.default_rng(seed).permutation(K)[: K // 2] for seed in range(20)]
    naive = [kind().score(made[half].reshape(-1, D), real[half].reshape(-1, D)) for half in halves]
    assert [half["value"] for half in found["subsets"]] == pytest.approx(naive)
    assert found["value"] == pytest.approx(kind().score(made.reshape(-1, D), real.reshape(-1, D)))


def test_halves_of_unlike_categories_have_the_kernel_distance_of_the_whole(features):
    """Images and real ones of a category are alike: what is left of a half is noise, no lack of content."""
    rng = np.random.default_rng(0)
    means, n = 3 * normal(rng, K, 1, D), 40
    features |= {"made": means + normal(rng, K, n, D), "real": means + normal(rng, K, n, D)}
    found = metric_of(KernelDistance, image_set("real", CATEGORIES, n)).results(image_set("made", CATEGORIES, n))
    lack = KernelDistance().score(features["made"][: K // 2].reshape(-1, D), features["real"].reshape(-1, D))
    assert abs(np.mean([half["value"] for half in found["subsets"]]) - found["value"]) < 0.1 * lack


def test_which_real_images_make_a_half():
    """Those of the categories that are drawn; of categories that no image has, a random half."""
    images = image_set("made", CATEGORIES[:6], 4, prompts=2)
    drawn = [*range(0, 4), *range(8, 12), *range(20, 24)]  # c00, c02 and c05

    def halves(categories, cluster="category", positions=drawn):
        metric = metric_of(KernelDistance, image_set("real", categories, 10), cluster)
        for seed in range(8):
            given, chosen = metric.half(images, positions, seed)
            assert given == positions and chosen == sorted(set(chosen)) == metric.half(images, positions, seed)[1]
            yield dict(Counter(metric.real.rows[position].category for position in chosen))

    own = dict.fromkeys(("c00", "c02", "c05"), 10)
    assert all(found == own for found in halves(CATEGORIES[:6]))
    assert all(found == {"reference": 5} for found in halves(["reference"]))
    for known, others in (([], "uvwxyz"), (CATEGORIES[:6], "uvwx")):
        found = list(halves([*known, *others]))
        assert {name for half in found for name in half} == {*others, *(own if known else ())}
        for half in found:
            assert set(half.values()) == {10} and len(half.keys() & {*others}) == len(others) // 2
            assert half.keys() - {*others} == (own.keys() if known else set())
    # where prompts are drawn, a category is drawn in part
    parts = [position for position, row in enumerate(images.rows) if row.prompt_id.endswith("-1") or position < 2]
    for half in halves(CATEGORIES[:6], "prompt", parts):
        assert half == {"c00": 10} | dict.fromkeys(CATEGORIES[1:6], 5)
    assert all(sum(half.values()) == 15 and len(half) == 3 for half in halves("xyz", "prompt", parts))


def test_there_are_no_halves_where_one_has_too_few_real_images(features):
    rng = np.random.default_rng(0)
    for n in (1, 2):
        features |= {"made": normal(rng, 8, 5, D), "real": normal(rng, 8, n, D)}
        for kind, n_halves in ((KernelDistance, 20), (Coverage, 0 if n == 1 else 20)):
            found = metric_of(kind, image_set("real", CATEGORIES[:8], n)).results(image_set("made", CATEGORIES[:8], 5))
            assert len(found["subsets"]) == n_halves and np.isfinite(found["value"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KernelDistance, FrechetDistance, Coverage])
def test_intervals_from_halves_cover_what_other_categories_would_give(kind, features):
    """Of the expectation over new categories, each with new images and new real ones; for one method and between two.

    Both methods' images differ from the real ones of their category, in part alike in all categories. Categories are
    far apart.
    """
    rng = np.random.default_rng(1)
    sets = [image_set(name, CATEGORIES, MADE) for name in ("a", "b")]
    real = image_set("real", CATEGORIES, REAL)
    found = []
    for _ in range(200):
        means, off = 1.5 * normal(rng, K, 1, D), 0.5 + 0.5 * normal(rng, K, 1, D)
        features["real"] = means + normal(rng, K, REAL, D)
        for name, width in (("a", 0.7), ("b", 0.8)):
            features[name] = means + off + width * normal(rng, K, MADE, D)
        metric = metric_of(kind, real)
        documents = [{"metric": kind.name, "aggregate": "subsets", **metric.results(each)} for each in sets]
        found.append([interval_of(documents[0]), difference_of(*documents)[:3]])
    values, low, high = np.array(found).transpose(2, 1, 0)
    truth = values.mean(axis=1, keepdims=True)
    # binomial error of 200 trials: 1.5 points
    covered = ((low <= truth) & (truth <= high)).mean(axis=1)
    assert ((covered >= 0.9) & (covered <= 0.99)).all()
