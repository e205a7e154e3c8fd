"""Closed forms, independent implementations and constructed sets for the distances between sets of images."""

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

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
from eval.images import read_manifest
from eval.imageset import EmbeddingCache, ImageSet
from eval.metric import is_current, measure


def computed(metric, features, reference):
    """Return what a metric computes of features, as all of torchmetrics is used."""
    metric.update(reference, real=True)
    metric.update(features, real=False)
    return metric.compute().item()


def inception_score(logits, splits=1):
    return InceptionScore(splits=splits).score(logits)


def frechet_distance(features, reference):
    return computed(FrechetDistance(), features, reference)


def kernel_distance(features, reference):
    return computed(KernelDistance(), features, reference)


def cmmd(features, reference, unbiased=False):
    return computed(Cmmd(unbiased=unbiased), features, reference)


class RawPixels(Encoder):
    """Three features, the mean colour, not of length 1, and a classifier of five classes on them."""

    name = "mean colour"
    id = "mean-colour"
    normalised = False

    def __init__(self):
        self.embedded = 0

    def embed_images(self, images):
        self.embedded += len(images)
        return torch.stack([image.float().mean(dim=(1, 2)) / 25 for image in images])

    def logits_from_features(self, features):
        return features @ torch.arange(15.0).reshape(3, 5).cos()


def sample(n, d, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + shift


def noise_file(path, seed, mode="RGB", size=(12, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    # a colour of its own for every image, and noise around it
    pixels = generator.integers(0, 200, 3) + generator.integers(0, 50, (*size, 3))
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path)


@pytest.fixture
def real(tmp_path):
    folder = tmp_path / "real"
    for index in range(24):
        noise_file(folder / ("bird" if index % 2 else "fish") / f"{index:02d}.png", 1000 + index)
    return folder


@pytest.fixture
def made(tmp_path):
    folder = tmp_path / "made"
    for index in range(48):
        noise_file(folder / f"prompt {index // 4:02d}" / f"{index:02d}.png", index)
    return folder


def metrics(reference, encoder=None):
    encoder = encoder or RawPixels()
    return [
        FrechetDistance(encoder, reference),
        KernelDistance(encoder, reference),
        Cmmd(encoder, reference),
        Cmmd(encoder, reference, unbiased=True, name="cmmd_unbiased"),
        Precision(encoder, reference),
        Recall(encoder, reference),
        Density(encoder, reference),
        Coverage(encoder, reference),
        InceptionScore(encoder),
        InceptionScore(encoder, splits=2, name="inception_score_2"),
    ]


# --- Frechet distance ------------------------------------------------------------------------------------------------


def exactly(mean, covariance, seed):
    """Return 200 samples that have these moments to the last digit."""
    x = sample(200, len(mean), seed)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / 199)).T
    return torch.tensor(mean).double() + x @ torch.linalg.cholesky(torch.tensor(covariance).double()).T


def test_frechet_distance_of_known_gaussians():
    a = exactly([1.0, 0, 0], np.diag([4.0, 9.0, 1.0]), 1)
    b = exactly([0, 2.0, 0], np.diag([1.0, 1.0, 16.0]), 2)
    # diagonal covariances: |difference of means|^2 + sum of (sigma_a - sigma_b)^2
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 4 + 9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    # covariances that do not commute, in two dimensions: tr sqrt(AB) = sqrt(tr AB + 2 sqrt(det AB))
    covariances = np.array([[[2.0, 1.0], [1.0, 3.0]], [[5.0, -2.0], [-2.0, 1.0]]])
    product = covariances[0] @ covariances[1]
    root = math.sqrt(product.trace() + 2 * math.sqrt(np.linalg.det(product)))
    a, b = (exactly([0.0, 0.0], covariance, seed) for seed, covariance in enumerate(covariances))
    assert frechet_distance(a, b) == pytest.approx(11 - 2 * root)


def two_samples(d):
    mixing = sample(d, d, seed=9) / math.sqrt(d)
    return sample(300, d, 1, scale=1.3, shift=0.2) @ mixing, sample(400, d, 2)


@pytest.mark.skipif(
    "disp" not in inspect.signature(scipy.linalg.sqrtm).parameters,
    reason="clean-fid and torch-fidelity call scipy.linalg.sqrtm(disp=...), which scipy 1.18 no longer has",
)
@pytest.mark.parametrize("d", [6, 64])
def test_frechet_distance_agrees_with_clean_fid_and_torch_fidelity(d):
    from cleanfid.fid import frechet_distance as clean_fid
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = two_samples(d)
    found = frechet_distance(x, y)
    moments = [fid_features_to_statistics(features) for features in (x, y)]
    expected = fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(expected, rel=1e-3)
    (a, b) = moments
    assert found == pytest.approx(clean_fid(a["mu"], a["sigma"], b["mu"], b["sigma"]), rel=1e-3)


class _Flat(torch.nn.Module):
    """A feature extractor as torchmetrics takes it, for images that are their features."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, images):
        return images.flatten(1)


def test_frechet_distance_refuses_singular_covariances():
    real = sample(40, 16)
    with pytest.raises(ValueError, match=r"at least 17 images .*got 16.*singular"):
        frechet_distance(sample(16, 16), real)
    with pytest.raises(ValueError, match=r"at least 17 reference images.*got 16"):
        frechet_distance(sample(17, 16), real[:16])
    assert math.isfinite(frechet_distance(sample(17, 16), real))


# --- kernels ---------------------------------------------------------------------------------------------------------


def naive_mmd(x, y, kernel, unbiased):
    """Squared MMD by the double sums of its definition."""
    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if not unbiased or i != j)
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if not unbiased or i != j)
    xy = sum(kernel(a, b) for a in x for b in y)
    return xx / (n * (n - unbiased)) + yy / (m * (m - unbiased)) - 2 * xy / (n * m)


def test_kernel_distance_against_the_definition_and_the_libraries(monkeypatch):
    from cleanfid.fid import kernel_distance as clean_kid
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = sample(13, 6, 1, scale=1.5), sample(17, 6, 2, shift=0.5)
    cubic = lambda a, b: (a @ b / len(a) + 1) ** 3  # noqa: E731
    expected = naive_mmd(x.numpy(), y.numpy(), cubic, unbiased=True)
    assert kernel_distance(x, y) == pytest.approx(expected)
    monkeypatch.setattr("eval.fidelity.ROWS", 5)  # the sums are taken in blocks
    assert kernel_distance(x, y) == pytest.approx(expected)
    # with sets of one size, the libraries' subsets can be the sets themselves
    y = y[:13]
    assert kernel_distance(x, y) == pytest.approx(clean_kid(x.numpy(), y.numpy(), num_subsets=1), rel=1e-3)
    metric = KernelInceptionDistance(_Flat(6), subsets=1, subset_size=13)
    metric.update(y[..., None, None].float(), real=True)
    metric.update(x[..., None, None].float(), real=False)
    assert kernel_distance(x, y) == pytest.approx(metric.compute()[0].item(), rel=1e-3)


def test_kernel_distance_is_unbiased():
    # two samples of one distribution: 0 in expectation, at any n
    values = [kernel_distance(sample(10, 4, 2 * seed), sample(15, 4, 2 * seed + 1)) for seed in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))
    assert min(values) < 0


@pytest.mark.parametrize("unbiased", [False, True])
def test_cmmd_against_the_definition(unbiased, monkeypatch):
    x, y = sample(11, 6, 1), sample(14, 6, 2, shift=0.4)
    a, b = (z / z.norm(dim=1, keepdim=True) for z in (x, y))
    gaussian = lambda u, v: math.exp(-((u - v) ** 2).sum() / (2 * 10**2))  # noqa: E731
    expected = 1000 * naive_mmd(a.numpy(), b.numpy(), gaussian, unbiased)
    monkeypatch.setattr("eval.fidelity.ROWS", 4)
    assert cmmd(x, y, unbiased) == pytest.approx(expected, rel=1e-6)
    assert cmmd(7 * x, y, unbiased) == pytest.approx(expected, rel=1e-6)


def test_cmmd_of_equal_sets_and_its_bias():
    x = sample(20, 6)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)
    # the bias that the docstring states
    mean_cosine = (torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(x, dim=1).T).double()
    mean_cosine = (mean_cosine.sum().item() - 20) / (20 * 19)
    y = sample(30, 6, 5)
    assert cmmd(x, y) - cmmd(x, y, unbiased=True) == pytest.approx(10 * (1 - mean_cosine) * (1 / 20 + 1 / 30), rel=0.05)


# --- Inception Score -------------------------------------------------------------------------------------------------


def test_inception_score_bounds():
    # every image predicted alike, sure or not: 1; sure predictions, evenly over c classes: c
    assert inception_score(torch.zeros(20, 7)) == pytest.approx(1)
    assert inception_score(torch.eye(7)[[3] * 20] * 1000) == pytest.approx(1)
    for splits in (1, 2):
        even = inception_score(torch.eye(5).repeat(20, 1) * 1000, splits)
        assert even == pytest.approx(5, rel=0 if splits == 1 else 0.05)
    # unbalanced: exp of the entropy of the classes
    logits = torch.eye(2)[[0] * 15 + [1] * 5] * 1000
    assert inception_score(logits) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


@pytest.mark.filterwarnings("ignore:std:UserWarning:torchmetrics")  # of one split, which has none
@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score_agrees_with_the_libraries(splits):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = sample(203, 12, scale=3.0)
    expected = isc_features_to_metric(logits, splits, shuffle=True, rng_seed=2020)["inception_score_mean"]
    assert inception_score(logits, splits) == pytest.approx(expected, rel=1e-9)
    if splits == 1:
        from torchmetrics.image.inception import InceptionScore as Theirs

        metric = Theirs(_Flat(12), splits=1)
        metric.update(logits[..., None, None].float())
        assert inception_score(logits) == pytest.approx(metric.compute()[0].item(), rel=1e-3)


def test_inception_score_refuses_few_images_and_wrong_shapes():
    with pytest.raises(ValueError, match="at least 100 images for 10 splits, got 99"):
        inception_score(torch.zeros(99, 4), splits=10)
    with pytest.raises(ValueError, match="at least one split"):
        inception_score(torch.zeros(99, 4), splits=0)
    with pytest.raises(ValueError, match=r"logits \[N, C\]"):
        inception_score(torch.zeros(99))


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measured", [frechet_distance, kernel_distance, cmmd])
def test_order_does_not_matter_and_nonsense_is_refused(measured):
    x, y = sample(60, 4, 1), sample(50, 4, 2)
    assert measured(x, y) == pytest.approx(measured(x.flip(0), y[torch.randperm(50)]), rel=1e-9)
    assert measured(x.float(), y.float()) == pytest.approx(measured(x, y), rel=1e-4)
    with pytest.raises(ValueError, match="one encoder"):
        measured(x, y[:, :3])
    with pytest.raises(ValueError, match="finite"):
        measured(x * math.nan, y)


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_the_functions_of_the_features(made, real):
    encoder = RawPixels()
    images = ImageSet.open(made)
    found = {metric.name: measure(metric, images) for metric in metrics(real, encoder)}
    x = images.embeddings(encoder)
    y = ImageSet.open(real).embeddings(encoder)
    expected = {
        "frechet_distance": frechet_distance(x, y),
        "kernel_distance": kernel_distance(x, y),
        "cmmd": cmmd(x, y),
        "cmmd_unbiased": cmmd(x, y, unbiased=True),
        **{kind.name: computed(kind(), x, y) for kind in (Precision, Recall, Density, Coverage)},
        "inception_score": inception_score(encoder.logits_from_features(x)),
        "inception_score_2": inception_score(encoder.logits_from_features(x), splits=2),
    }
    assert {name: document["value"] for name, document in found.items()} == pytest.approx(expected, rel=1e-9)
    for document in found.values():
        assert len(document["subsets"]) == 20 and {part["n_images"] for part in document["subsets"]} == {24}
        assert all(math.isfinite(part["value"]) for part in document["subsets"])


def test_which_images_were_made_together_does_not_change_a_kernel_distance(made, real):
    rows = read_manifest(made)  # one subfolder a prompt: one group a category
    grouped = [replace(row, group_seed=row.index // 2, index=row.index % 2) for row in rows]
    for metric in (KernelDistance(RawPixels(), real), Cmmd(RawPixels(), real, unbiased=True)):
        one, two = (metric.results(ImageSet(made, each)) for each in (rows, grouped))
        assert (one["n_groups"], two["n_groups"]) == (12, 24)
        assert one["value"] == two["value"]


def test_a_document_states_its_reference(made, real):
    document = measure(KernelDistance(RawPixels(), real), made)
    assert document["details"] == {
        "reference": "real",
        "n_reference": 24,
        "feature_dimension": 3,
        "features": "raw",
    }
    assert measure(Cmmd(PixelEncoder(), real), made)["details"]["features"] == "length 1"
    metric = KernelDistance(RawPixels(), real)
    assert is_current(document, metric, made)
    noise_file(real / "bird" / "01.png", 7)  # another reference: another number
    assert not is_current(document, KernelDistance(RawPixels(), real), made)
    moved = real.rename(real.with_name("elsewhere"))
    assert KernelDistance(RawPixels(), moved).settings() == KernelDistance(RawPixels(), moved).settings()


def test_images_and_reference_are_embedded_once(made, real, tmp_path):
    cache = EmbeddingCache(tmp_path / "cache")
    encoder = RawPixels()
    for metric in metrics(real, encoder):
        measure(metric, ImageSet.open(made, cache))
    assert encoder.embedded == 48 + 24


def test_neither_order_nor_batch_size_matters(made, real):
    for metric, again in zip(metrics(real), metrics(real), strict=True):
        rows = read_manifest(made)
        first = metric.results(ImageSet(made, rows, batch_size=32))
        second = again.results(ImageSet(made, rows[::-1], batch_size=5))
        assert first == second


def test_mixed_sizes_grey_and_transparency(made, real):
    for index, (mode, size) in enumerate([("L", (30, 11)), ("RGBA", (5, 5)), ("P", (64, 20)), ("LA", (9, 9))]):
        noise_file(made / "prompt 00" / f"{index:02d}.png", index, mode, size)
    for metric in metrics(real):
        assert math.isfinite(measure(metric, made)["value"])


def test_a_damaged_image_is_named(made, real):
    (real / "fish" / "00.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"readable image.*fish/00\.png"):
        measure(KernelDistance(RawPixels(), real), made)


def test_too_few_images_are_refused(tmp_path, real):
    one = tmp_path / "one"
    noise_file(one / "prompt" / "0.png", 0)
    for metric in metrics(real):
        with pytest.raises(ValueError, match=r"at least \d+ images for "):
            measure(metric, one)
    for index in range(10):
        noise_file(one / "prompt" / f"{index}.png", index)
    # enough for a number, but halves of one group there are none
    document = measure(FrechetDistance(RawPixels(), real), one)
    assert document["subsets"] == [] and math.isfinite(document["value"])
    # 64 dimensions and one constant: the covariance of 10 images is singular
    with pytest.raises(ValueError, match="at least 194 images for frechet_distance, got 10"):
        measure(FrechetDistance(PixelEncoder(8), real), one)


def test_a_reference_of_one_image_is_refused(made, tmp_path):
    folder = tmp_path / "single"
    noise_file(folder / "one.png", 0)
    for metric in metrics(folder)[:8]:
        with pytest.raises(ValueError, match=r"at least \d+ reference images.*got 1"):
            measure(metric, made)


def test_what_a_reference_may_look_like(real, make_run, tmp_path):
    assert len(read_manifest(real, flat=True)) == 24
    assert len(read_manifest(make_run(), flat=True)) == 16
    flat = tmp_path / "flat"
    for index in range(3):
        noise_file(flat / f"{index}.png", index)
    (flat / "README.md").write_text("real images")
    assert [row.path for row in read_manifest(flat, flat=True)] == ["0.png", "1.png", "2.png"]
    (real / "README.md").write_text("not an image")
    assert len(read_manifest(real, flat=True)) == 24
    noise_file(real / "stray.png", 0)
    with pytest.raises(ValueError, match=r"1 beside the subfolders bird, fish"):
        read_manifest(real, flat=True)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        KernelDistance(RawPixels(), tmp_path / "absent").prepare()


def test_inception_score_needs_a_classifier():
    with pytest.raises(TypeError, match="classifier head"):
        InceptionScore(PixelEncoder())
    with pytest.raises(ValueError, match="at least one split"):
        InceptionScore(RawPixels(), splits=0)
