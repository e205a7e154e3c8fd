"""Closed forms, independent implementations and constructed sets for the distances between sets of images."""

import inspect
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from scipy.stats import entropy

from eval.encoders import Encoder, PixelEncoder
from eval.fidelity import (
    Cmmd,
    Coverage,
    Density,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    Precision,
    Recall,
)
from eval.images import UNKNOWN_SEED, ManifestRow, read_manifest
from eval.imageset import EmbeddingCache, ImageSet
from eval.intervals import difference_of, interval_of
from eval.metric import is_current, measure
from eval.released import ReleasedInceptionScore, imagenet_templates

NEIGHBOURS = (Precision, Recall, Density, Coverage)
DISTANCES = (FrechetDistance, KernelDistance, Cmmd, *NEIGHBOURS)


def computed(metric, features, reference=None):
    """Return the number of a metric for features, by torchmetrics' interface."""
    if reference is not None:
        metric.update(reference, real=True)
    metric.update(features, real=False)
    return metric.compute().item()


def sample(n, d, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + shift


class _Flat(torch.nn.Module):
    """A feature extractor for torchmetrics whose images are their features."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, images):
        return images.flatten(1)


# --- Frechet distance ------------------------------------------------------------------------------------------------


def exactly(mean, covariance, seed):
    """Return 200 samples with exactly this mean and covariance."""
    x = sample(200, len(mean), seed)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / 199)).T
    return torch.tensor(mean).double() + x @ torch.linalg.cholesky(torch.tensor(covariance).double()).T


def test_frechet_distance_of_known_gaussians():
    """For covariances A and B that do not commute, in two dimensions: tr sqrt(AB) = sqrt(tr AB + 2 sqrt(det AB))."""
    a = exactly([1.0, 0, 0], np.diag([4.0, 9.0, 1.0]), 1)
    b = exactly([0, 2.0, 0], np.diag([1.0, 1.0, 16.0]), 2)
    assert computed(FrechetDistance(), a, b) == pytest.approx(5 + 1 + 4 + 9)
    assert computed(FrechetDistance(), a, a) == pytest.approx(0, abs=1e-9)
    covariances = np.array([[[2.0, 1.0], [1.0, 3.0]], [[5.0, -2.0], [-2.0, 1.0]]])
    product = covariances[0] @ covariances[1]
    root = math.sqrt(product.trace() + 2 * math.sqrt(np.linalg.det(product)))
    a, b = (exactly([0.0, 0.0], covariance, seed) for seed, covariance in enumerate(covariances))
    assert computed(FrechetDistance(), a, b) == pytest.approx(11 - 2 * root)


@pytest.mark.skipif(
    "disp" not in inspect.signature(scipy.linalg.sqrtm).parameters,
    reason="clean-fid and torch-fidelity call scipy.linalg.sqrtm(disp=...), which scipy 1.18 no longer has",
)
def test_frechet_distance_agrees_with_clean_fid_and_torch_fidelity():
    from cleanfid.fid import frechet_distance as clean_fid
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = sample(300, 6, 1, scale=1.3, shift=0.2) @ sample(6, 6, seed=9), sample(400, 6, 2)
    distance = computed(FrechetDistance(), x, y)
    a, b = (fid_features_to_statistics(features) for features in (x, y))
    expected = fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]
    assert distance == pytest.approx(expected, rel=1e-3)
    assert distance == pytest.approx(clean_fid(a["mu"], a["sigma"], b["mu"], b["sigma"]), rel=1e-3)


# --- kernels ---------------------------------------------------------------------------------------------------------


def naive_mmd(x, y, kernel, unbiased):
    """Return the squared MMD by the double sums of its definition."""
    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if not unbiased or i != j)
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if not unbiased or i != j)
    xy = sum(kernel(a, b) for a in x for b in y)
    return xx / (n * (n - unbiased)) + yy / (m * (m - unbiased)) - 2 * xy / (n * m)


def cubic(a, b):
    return (a @ b / len(a) + 1) ** 3


def gaussian(a, b):
    return math.exp(-((a - b) ** 2).sum() / (2 * 10**2))


def test_kernel_distance_against_the_definition_and_the_libraries(monkeypatch):
    from cleanfid.fid import kernel_distance as clean_kid
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = sample(13, 6, 1, scale=1.5), sample(17, 6, 2, shift=0.5)
    expected = naive_mmd(x.numpy(), y.numpy(), cubic, unbiased=True)
    assert computed(KernelDistance(), x, y) == pytest.approx(expected)
    monkeypatch.setattr("eval.fidelity.ROWS", 5)  # the sums are taken in blocks
    assert computed(KernelDistance(), x, y) == pytest.approx(expected)
    # if both sets have the same size, the subsets of the libraries can be the sets
    y = y[:13]
    distance = computed(KernelDistance(), x, y)
    assert distance == pytest.approx(clean_kid(x.numpy(), y.numpy(), num_subsets=1), rel=1e-3)
    metric = KernelInceptionDistance(_Flat(6), subsets=1, subset_size=13)
    metric.update(y[..., None, None].float(), real=True)
    metric.update(x[..., None, None].float(), real=False)
    assert distance == pytest.approx(metric.compute()[0].item(), rel=1e-3)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cmmd_against_the_definition_and_its_bias(unbiased, monkeypatch):
    x, y = sample(11, 6, 1), sample(14, 6, 2, shift=0.4)
    a, b = (z / z.norm(dim=1, keepdim=True) for z in (x, y))
    expected = 1000 * naive_mmd(a.numpy(), b.numpy(), gaussian, unbiased)
    monkeypatch.setattr("eval.fidelity.ROWS", 4)
    assert computed(Cmmd(unbiased=unbiased), 7 * x, y) == pytest.approx(expected, rel=1e-6)
    x, y = sample(20, 6), sample(30, 6, 5)
    assert computed(Cmmd(), x, x) == pytest.approx(0, abs=1e-9)
    unit = torch.nn.functional.normalize(x, dim=1)
    mean_cosine = ((unit @ unit.T).sum().item() - 20) / (20 * 19)
    bias = computed(Cmmd(), x, y) - computed(Cmmd(unbiased=True), x, y)
    assert bias == pytest.approx(10 * (1 - mean_cosine) * (1 / 20 + 1 / 30), rel=0.05), "as the docstring says"


# --- nearest neighbours ----------------------------------------------------------------------------------------------


def overlap(x, y, **options):
    """Return precision, recall, density and coverage."""
    return tuple(computed(kind(**options), x, y) for kind in NEIGHBOURS)


def test_overlaps_of_constructed_sets():
    x = sample(50, 8)
    # a ball without its surface contains its centre and k - 1 of its k neighbours
    assert overlap(x, x) == (1, 1, 1, 1) == overlap(x.float(), x.float()[torch.randperm(50)])
    assert overlap(x + 100, x) == (0, 0, 0, 0)
    # two distant clusters, of which one set has only one
    a, b = sample(40, 4, 1), sample(40, 4, 2) + 1000
    assert overlap(a, torch.cat([a, b])) == (1, 0.5, 1, 0.5)
    assert overlap(torch.cat([a, b]), a) == (0.5, 1, 0.5, 1)
    real = sample(60, 4)
    collapsed = real[:1].repeat(30, 1)
    assert overlap(collapsed, real)[:2] == (1, pytest.approx(1 / 60)), "balls of radius 0 contain the one image"
    assert computed(Density(), sample(1000, 3, 1), sample(500, 3, 2)) == pytest.approx(1, abs=0.08)
    # in many dimensions, the mean lies within everyone's k-th neighbour, so density has no upper bound
    real = sample(100, 40)
    assert computed(Density(), real.mean(0, keepdim=True), real) == 100 / 5


def test_overlaps_against_torch_fidelity_and_the_definition():
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    x, y = sample(70, 5, 1, scale=0.8), sample(50, 5, 2)
    precision, recall, density, coverage = overlap(x, y)
    assert (precision, recall) == pytest.approx(calculate_precision_recall_full(x, y, neighborhood=3))
    k, real, made = 5, y.numpy(), x.numpy()
    radii = np.sort(np.linalg.norm(real[:, None] - real[None], axis=2), axis=1)[:, k]
    across = np.linalg.norm(real[:, None] - made[None], axis=2)
    assert density == pytest.approx((across < radii[:, None]).sum(axis=0).mean() / k)
    assert coverage == pytest.approx((across.min(axis=1) < radii).mean())


@pytest.mark.parametrize("shift", [0, 30])
def test_equal_distances_are_ties_whatever_their_rounding(shift):
    """Points of a grid, whose integer distances are exact."""
    generator = torch.Generator().manual_seed(0)
    made, real = (torch.randint(0, 3, (n, 4), generator=generator) for n in (60, 50))
    radii = torch.cdist(real.double(), real.double()).square().round().sort(dim=1).values[:, 3]
    distances = (made[:, None] - real).square().sum(dim=2)
    within = distances < radii
    expected = [(distances <= radii).any(dim=1), within.sum(dim=1) / 3, within.any(dim=0)]
    x, y = made * 0.1 + shift, real * 0.1 + shift
    numbers = [computed(kind(k=3), x, y) for kind in (Precision, Density, Coverage)]
    assert numbers == pytest.approx([values.double().mean().item() for values in expected])


@pytest.mark.parametrize("kind", DISTANCES)
def test_order_does_not_matter_and_nonsense_is_refused(kind):
    x, y = sample(60, 4, 1), sample(50, 4, 2)
    number = computed(kind(), x, y)
    assert computed(kind(), x.flip(0), y[torch.randperm(50)]) == pytest.approx(number, rel=1e-9)
    assert computed(kind(), x.float(), y.float()) == pytest.approx(number, rel=1e-4)
    for images, real, message in ((x, y[:, :3], "one encoder"), (x * math.nan, y, "finite")):
        with pytest.raises(ValueError, match=message):
            computed(kind(), images, real)


@pytest.mark.parametrize(
    ("metric", "n_made", "n_real", "message"),
    [
        (FrechetDistance(), 3, 9, "at least 4 images .*got 3.*singular"),
        (FrechetDistance(), 9, 3, "at least 4 reference images.*got 3"),
        (KernelDistance(), 1, 9, "at least 2 images, got 1"),
        (Recall(), 3, 9, "at least 4 images, got 3"),
        (Precision(), 9, 3, "at least 4 reference images, got 3"),
        (Density(), 9, 5, "at least 6 reference images, got 5"),
        (Density(k=1), 0, 9, "nothing to measure"),
    ],
)
def test_too_few_features_are_refused(metric, n_made, n_real, message):
    with pytest.raises(ValueError, match=message):
        computed(metric, sample(n_made, 3), sample(n_real, 3))


# --- Inception Score -------------------------------------------------------------------------------------------------


def inception_score(logits, splits=1):
    return InceptionScore(splits=splits).score(logits)


def test_inception_score_in_closed_form():
    # equal predictions, certain or not: 1; certain predictions, evenly over c classes: c
    assert inception_score(torch.zeros(20, 7)) == pytest.approx(1)
    assert inception_score(torch.eye(7)[[3] * 20] * 1000) == pytest.approx(1)
    assert inception_score(torch.eye(5).repeat(20, 1) * 1000) == pytest.approx(5)
    # otherwise exp of the entropy of the classes
    logits = torch.eye(2)[[0] * 15 + [1] * 5] * 1000
    assert inception_score(logits) == pytest.approx(math.exp(entropy([0.75, 0.25])))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: inception_score(torch.zeros(99, 4), splits=10), ValueError, "at least 100 images for 10 splits"),
        (lambda: InceptionScore(splits=0), ValueError, "at least one split"),
        (lambda: inception_score(torch.zeros(99)), ValueError, r"logits \[N, C\]"),
        (lambda: InceptionScore(PixelEncoder()), TypeError, "classifier head"),
        (lambda: Precision(k=0), ValueError, "k >= 1"),
    ],
)
def test_impossible_settings_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.filterwarnings("ignore:std:UserWarning:torchmetrics")  # a single split has no deviation
@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score_agrees_with_the_libraries(splits):
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torchmetrics.image.inception import InceptionScore as Theirs

    logits = sample(203, 12, scale=3.0)
    theirs = isc_features_to_metric(logits, splits, shuffle=True, rng_seed=2020)["inception_score_mean"]
    assert inception_score(logits, splits) == pytest.approx(theirs, rel=1e-9)
    if splits == 1:
        metric = Theirs(_Flat(12), splits=1)
        metric.update(logits[..., None, None].float())
        assert inception_score(logits) == pytest.approx(metric.compute()[0].item(), rel=1e-3)


def test_the_released_inception_score_is_of_consecutive_parts_without_the_rest():
    logits = torch.cat([3 * torch.randn(20, 7, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 7)])
    p = logits[:20].double().softmax(dim=1).numpy()
    parts = [np.exp(np.mean([entropy(row, part.mean(axis=0)) for row in part])) for part in (p[:10], p[10:])]
    assert computed(ReleasedInceptionScore(splits=2), logits) == pytest.approx(np.mean(parts))
    assert computed(InceptionScore(splits=2), logits) != pytest.approx(np.mean(parts), rel=1e-3)
    with pytest.raises(ValueError, match="at least 10 images"):
        computed(ReleasedInceptionScore(splits=3), logits)
    assert {template.count("{}") for template in imagenet_templates()} == {1} and len({*imagenet_templates()}) == 80


# --- folders ---------------------------------------------------------------------------------------------------------


class MeanColour(Encoder):
    """Three features, the mean colour, not of length 1, with a classifier of five classes."""

    name = id = "mean-colour"
    normalised = False

    def __init__(self):
        self.embedded = 0

    def embed_images(self, images):
        self.embedded += len(images)
        return torch.stack([image.float().mean(dim=(1, 2)) / 25 for image in images])

    def logits_from_features(self, features):
        return features @ torch.arange(15.0).reshape(3, 5).cos()


def noise_file(path, seed, mode="RGB", size=(12, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    # every image has its own colour and noise around it
    pixels = generator.integers(0, 200, 3) + generator.integers(0, 50, (*size, 3))
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path)


@pytest.fixture
def real(tmp_path):
    for index in range(24):
        noise_file(tmp_path / "real" / ("bird" if index % 2 else "fish") / f"{index:02d}.png", 1000 + index)
    return tmp_path / "real"


@pytest.fixture
def made(tmp_path):
    for index in range(24):
        noise_file(tmp_path / "made" / f"prompt {index // 4:02d}" / f"{index:02d}.png", index)
    return tmp_path / "made"


def metrics(reference, encoder=None):
    encoder = encoder or MeanColour()
    kinds = [kind(encoder, reference) for kind in DISTANCES]
    return [*kinds, Cmmd(encoder, reference, unbiased=True, name="cmmd_unbiased"), InceptionScore(encoder)]


def test_a_folders_numbers_are_those_of_its_features(made, real, tmp_path):
    encoder, images = MeanColour(), ImageSet.open(made, EmbeddingCache(tmp_path / "cache"))
    results = {metric.name: metric.results(images) for metric in metrics(real, encoder)}
    assert encoder.embedded == 24 + 24, "each image is embedded once"
    x, y = (ImageSet.open(folder).embeddings(encoder) for folder in (made, real))
    expected = {kind.name: computed(kind(), x, y) for kind in DISTANCES}
    expected["cmmd_unbiased"] = computed(Cmmd(unbiased=True), x, y)
    expected["inception_score"] = inception_score(encoder.logits_from_features(x))
    assert {name: result["value"] for name, result in results.items()} == pytest.approx(expected, rel=1e-9)
    for result in results.values():
        assert len(result["subsets"]) == 20 and {part["n_images"] for part in result["subsets"]} == {12}
        assert all(math.isfinite(part["value"]) for part in result["subsets"])
    rows = read_manifest(made)
    grouped = [replace(row, group_seed=row.index // 2, index=row.index % 2) for row in rows]
    for metric in (KernelDistance(encoder, real), Coverage(encoder, real)):
        first, two = results[metric.name], metric.results(ImageSet(made, grouped))
        assert first == metric.results(ImageSet(made, rows[::-1], batch_size=5)), "neither order nor batch matters"
        assert (first["n_groups"], two["n_groups"]) == (6, 12) and first["value"] == two["value"]


def test_a_document_states_its_reference(made, real):
    metric = KernelDistance(MeanColour(), real)
    document = measure(metric, made)
    details = {"reference": "real", "n_reference": 24, "feature_dimension": 3, "features": "raw"}
    assert document["details"] == details and is_current(document, metric, made)
    assert measure(Cmmd(PixelEncoder(2), real), made)["details"]["features"] == "length 1"
    moved = KernelDistance(MeanColour(), real.rename(real.with_name("elsewhere")))
    assert is_current(document, moved, made)
    noise_file(real.with_name("elsewhere") / "bird" / "01.png", 7)
    assert not is_current(document, KernelDistance(MeanColour(), real.with_name("elsewhere")), made)


def test_images_of_other_sizes_and_modes_and_few_or_damaged_images(tmp_path, made, real):
    for index, (mode, size) in enumerate([("L", (30, 11)), ("RGBA", (5, 5)), ("P", (64, 20)), ("LA", (9, 9))]):
        noise_file(made / "prompt 00" / f"{index:02d}.png", index, mode, size)
    assert all(math.isfinite(metric.results(ImageSet.open(made))["value"]) for metric in metrics(real))
    noise_file(tmp_path / "one" / "prompt" / "0.png", 0)
    for metric in metrics(real):
        with pytest.raises(ValueError, match=r"at least \d+ images for "):
            measure(metric, tmp_path / "one")
    for metric in metrics(tmp_path / "one")[:8]:
        with pytest.raises(ValueError, match=r"at least \d+ reference images.*got 1"):
            measure(metric, made)
    # there are enough images for a number, but a single group has no halves
    results = FrechetDistance(MeanColour(), real).results(ImageSet(made, read_manifest(made)[:4]))
    assert results["subsets"] == [] and math.isfinite(results["value"])
    with pytest.raises(ValueError, match="at least 194 images for frechet_distance, got 24"):
        measure(FrechetDistance(PixelEncoder(8), real), made)
    (real / "fish" / "00.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"readable image.*fish/00\.png"):
        measure(KernelDistance(MeanColour(), real), made)


def test_which_folders_can_be_a_reference(real, tmp_path):
    assert len(read_manifest(real, flat=True)) == 24
    for index in range(3):
        noise_file(tmp_path / "flat" / f"{index}.png", index)
    (tmp_path / "flat" / "README.md").write_text("real images")
    assert [row.path for row in read_manifest(tmp_path / "flat", flat=True)] == ["0.png", "1.png", "2.png"]
    noise_file(real / "stray.png", 0)
    with pytest.raises(ValueError, match=r"1 beside the subfolders bird, fish"):
        read_manifest(real, flat=True)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        KernelDistance(MeanColour(), tmp_path / "absent").prepare()


# --- halves of a set and of the real images --------------------------------------------------------------------------

K, MADE, REAL, D = 20, 8, 16, 8
CATEGORIES = [f"c{number:02d}" for number in range(K)]


def image_set(folder, categories, n, prompts=1):
    """Return n images of each category, spread over its prompts; the folder's name selects their `features`."""
    rows = [
        ManifestRow(f"{category}/{index}.png", f"{category}-{index % prompts}", "", category, 0, index, UNKNOWN_SEED)
        for category in categories
        for index in range(n)
    ]
    return ImageSet(folder, rows)


@pytest.fixture
def features(monkeypatch):
    """Embeddings by the name of the folder, [N, D] or [categories, n, D]."""
    known = {}
    monkeypatch.setattr(ImageSet, "embeddings", lambda self, _: known[self.folder.name].reshape(-1, D))
    return known


def metric_of(kind, real, cluster="category"):
    metric = kind(PixelEncoder())
    metric.real, metric.cluster = real, cluster
    return metric


def normal(rng, *shape):
    return torch.from_numpy(rng.normal(size=shape))


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance, Coverage])
def test_a_half_is_compared_with_the_real_images_of_its_own_categories(kind, features):
    rng = np.random.default_rng(0)
    means = 3 * normal(rng, K, 1, D)
    made, real = means + normal(rng, K, MADE, D), means + normal(rng, K, REAL, D)
    features |= {"made": made, "real": real}
    results = metric_of(kind, image_set("real", CATEGORIES, REAL)).results(image_set("made", CATEGORIES, MADE))
    halves = [np.random.default_rng(seed).permutation(K)[: K // 2] for seed in range(20)]
    naive = [kind().score(made[half].reshape(-1, D), real[half].reshape(-1, D)) for half in halves]
    assert [half["value"] for half in results["subsets"]] == pytest.approx(naive)
    assert results["value"] == pytest.approx(kind().score(made.reshape(-1, D), real.reshape(-1, D)))
    if kind is KernelDistance:  # which is unbiased; other categories would be a larger distance
        other = kind().score(made[: K // 2].reshape(-1, D), real[K // 2 :].reshape(-1, D))
        assert abs(np.mean(naive) - results["value"]) < 0.2 * other


def test_which_real_images_make_a_half():
    """Those of the categories that are drawn; of categories that no image has, a random half."""
    images = image_set("made", CATEGORIES[:6], 4, prompts=2)
    drawn = [*range(0, 4), *range(8, 12), *range(20, 24)]  # c00, c02 and c05

    def halves(categories, cluster="category", positions=drawn):
        metric = metric_of(KernelDistance, image_set("real", categories, 10), cluster)
        for seed in range(8):
            made, real = metric.half(images, positions, seed)
            assert made == positions and real == sorted(set(real)) == metric.half(images, positions, seed)[1]
            yield dict(Counter(metric.real.rows[position].category for position in real))

    matching = dict.fromkeys(("c00", "c02", "c05"), 10)
    assert all(half == matching for half in halves(CATEGORIES[:6]))
    assert all(half == {"reference": 5} for half in halves(["reference"]))
    for known, others in (([], "uvwxyz"), (CATEGORIES[:6], "uvwx")):
        counts = list(halves([*known, *others]))
        assert {name for half in counts for name in half} == {*others, *(matching if known else ())}
        for half in counts:
            assert set(half.values()) == {10} and len(half.keys() & {*others}) == len(others) // 2
            assert half.keys() - {*others} == (matching.keys() if known else set())
    # if prompts are drawn, a part of a category is drawn
    parts = [position for position, row in enumerate(images.rows) if row.prompt_id.endswith("-1") or position < 2]
    for half in halves(CATEGORIES[:6], "prompt", parts):
        assert half == {"c00": 10} | dict.fromkeys(CATEGORIES[1:6], 5)
    assert all(sum(half.values()) == 15 and len(half) == 3 for half in halves("xyz", "prompt", parts))


def test_there_are_no_halves_if_one_has_too_few_real_images(features):
    rng = np.random.default_rng(0)
    for n in (1, 2):
        features |= {"made": normal(rng, 8, 5, D), "real": normal(rng, 8, n, D)}
        for kind, n_halves in ((KernelDistance, 20), (Coverage, 0 if n == 1 else 20)):
            metric = metric_of(kind, image_set("real", CATEGORIES[:8], n))
            results = metric.results(image_set("made", CATEGORIES[:8], 5))
            assert len(results["subsets"]) == n_halves and np.isfinite(results["value"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KernelDistance, FrechetDistance, Coverage])
def test_intervals_from_halves_cover_what_other_categories_would_give(kind, features):
    """Coverage of the expectation over new categories with new images and real images, alone and paired.

    The images of both methods differ from the real images, partly by the same shift in all categories.
    """
    rng = np.random.default_rng(1)
    sets, real = [image_set(name, CATEGORIES, MADE) for name in ("a", "b")], image_set("real", CATEGORIES, REAL)
    intervals = []
    for _ in range(200):
        means, shift = 1.5 * normal(rng, K, 1, D), 0.5 + 0.5 * normal(rng, K, 1, D)
        features["real"] = means + normal(rng, K, REAL, D)
        for name, width in (("a", 0.7), ("b", 0.8)):
            features[name] = means + shift + width * normal(rng, K, MADE, D)
        metric = metric_of(kind, real)
        documents = [{"metric": kind.name, "aggregate": "subsets", **metric.results(images)} for images in sets]
        intervals.append([interval_of(documents[0]), difference_of(*documents)[:3]])
    values, low, high = np.array(intervals).transpose(2, 1, 0)
    truth = values.mean(axis=1, keepdims=True)
    # binomial error of 200 trials: 1.5 points
    covered = ((low <= truth) & (truth <= high)).mean(axis=1)
    assert ((covered >= 0.9) & (covered <= 0.99)).all()
