"""How close is a set of images to a set of real ones? Pure functions on features [N, D], and the metrics.

All of it is arithmetic on the features of some network, and a number means little without that network's name:
"FID" is the Frechet distance of Inception's features, CMMD is of CLIP's. The metrics therefore carry the names of
the functions, and the table's column says whose features they are. Preprocessing (aspect-preserving resize, centre
crop, antialiasing) is the encoder's, and the same for real and generated images.

Computed in float64. No number here can be compared between sets of different sizes, but for the unbiased kernel
distances; every document states both sizes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from eval.encoders import Encoder
from eval.images import (
    MANIFEST,
    UNKNOWN_SEED,
    ManifestRow,
    images_in,
    read_manifest,
    visible,
)
from eval.imageset import ImageSet
from eval.metric import SetMetric

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
# Images a split of the Inception Score must have: a mean prediction of fewer says nothing about variety.
IMAGES_A_SPLIT = 10
EXTRAPOLATION_POINTS = 15
# Rows of a matrix of kernel values or distances that are in memory at once.
ROWS = 2048

PAIRS = "the kernel is averaged over pairs"

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def checked_pair(features: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Check that two sets of features belong together, and put them into float64."""
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"expected features [N, D] and reference features [M, D] of one encoder, got {list(features.shape)} and "
            f"{list(reference.shape)}; embed both with the same encoder"
        )
    features, reference = features.double(), reference.double()
    if not torch.isfinite(features).all() or not torch.isfinite(reference).all():
        raise ValueError("expected finite features, got NaN or infinity; look at the images and the weights")
    return features, reference


def require_images(features: torch.Tensor, minimum: int, what: str, why: str) -> None:
    if len(features) < minimum:
        raise ValueError(
            f"expected at least {minimum} {what}, got {len(features)}: {why}; give more images, or leave this "
            "number out"
        )


@dataclass(frozen=True)
class Gaussian:
    """The first two moments of a set of features.

    Attributes:
        mean: float64 [D].
        covariance: float64 [D, D], unbiased (divided by n - 1).
    """

    mean: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> Gaussian:
        """Take the moments of features [N, D], N >= 2."""
        require_images(features, 2, "images", "one alone has no covariance")
        mean = features.double().mean(dim=0)
        centred = features.double() - mean
        return cls(mean, centred.T @ centred / (len(features) - 1))

    @cached_property
    def root(self) -> torch.Tensor:
        """The symmetric square root of the covariance, float64 [D, D]."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance_of_gaussians(a: Gaussian, b: Gaussian) -> float:
    """Return |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances (Dowson and Landau 1982).

    The eigenvalues of A B are those of the symmetric B^(1/2) A B^(1/2), so that no complex square root of a
    nearly singular product is needed, which the usual implementations patch up.
    """
    product = b.root @ a.covariance @ b.root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    means = (a.mean - b.mean).square().sum()
    return (means + a.covariance.trace() + b.covariance.trace() - 2 * cross).item()


def frechet_minimum(dimension: int, extrapolate: bool = False) -> int:
    """Return how many images a Frechet distance of features of this dimension needs.

    D + 1 give a covariance of full rank; with fewer, the distance measures what is missing rather than what
    differs. Extrapolation is for lessening the bias of enough images, no way to do with fewer: below D its parts'
    distances are no line in 1/N. On Gaussians (D = 64; flat and decaying spectra; 12 draws each) it was, at N of

        1 D: -0.4 and 0.1    2 D: 0.3 and 0.6    3 D: 0.7 and 0.9    4 D: 0.9 and 0.9    6 D: 0.9 and 1.0

    times the truth, at 4 D with a standard deviation of 0.13, where the plain one was 2.4 and 1.8 times it.
    """
    return 4 * (dimension + 1) if extrapolate else dimension + 1


def frechet_distance(
    features: torch.Tensor, reference: torch.Tensor | Gaussian, extrapolate: bool = False, seed: int = 0
) -> float:
    """Return the Frechet distance between the Gaussians fitted to two sets of features; FID where Inception's.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (NeurIPS
    2017). It is biased up by about a constant over N, the constant depending on what generated the images, so that
    two methods may change places with N (Chong and Forsyth, "Effectively Unbiased FID and Inception Score and
    Where to Find Them", CVPR 2020).

    Args:
        features: [N, D].
        reference: [M, D], or moments of such features; M > D in any case, for its bias is not extrapolated away.
        extrapolate: fit a line in 1/N to the distances of `EXTRAPOLATION_POINTS` random parts of N/2 to N images
            and return its value at 1/N = 0, as Chong and Forsyth do. They start at N/10, where N is 50,000; at
            a smaller N that is below D.
        seed: of the random parts.

    Returns:
        >= 0, lower is better; the extrapolated one may be negative where the distance is small.

    Raises:
        ValueError: fewer than `frechet_minimum` images.
    """
    if not isinstance(reference, Gaussian):
        features, reference = checked_pair(features, reference)
        reference = _full_rank(reference)
    features, _ = checked_pair(features, reference.mean[None])
    dimension = features.shape[1]
    require_images(
        features,
        frechet_minimum(dimension, extrapolate),
        f"images for a Frechet distance of {dimension} features{' extrapolated' if extrapolate else ''}",
        "with fewer, the parts' distances are no line in 1/N"
        if extrapolate
        else "with fewer, the covariance is singular",
    )
    n = len(features)
    if not extrapolate:
        return frechet_distance_of_gaussians(Gaussian.of(features), reference)
    generator = torch.Generator().manual_seed(seed)
    sizes = np.linspace(max(n // 2, 2), n, EXTRAPOLATION_POINTS).astype(int)
    distances = [
        frechet_distance_of_gaussians(Gaussian.of(features[torch.randperm(n, generator=generator)[:size]]), reference)
        for size in sizes
    ]
    return float(np.polyfit(1 / sizes, distances, 1)[1])


def _full_rank(reference: torch.Tensor) -> Gaussian:
    require_images(
        reference,
        reference.shape[1] + 1,
        f"reference images for a Frechet distance of {reference.shape[1]} features",
        "with fewer, the covariance is singular",
    )
    return Gaussian.of(reference)


@dataclass(frozen=True)
class Design:
    """Which images were made together, and what was fixed beforehand.

    The mean of a kernel over pairs of a set should be that over pairs of independent draws. Images that were made
    together are none: they are more alike, so their pairs make a set seem narrower than it is, and a method that
    pushes them apart would be credited with quality. And where every category has its fixed number of images, a pair
    of different groups is too seldom of one category. So pairs of one group count nothing, and the others of a
    category as much as all of them would. Where a category has a single group, as in a folder of one subfolder a
    prompt, there are no others: the groups are then taken for draws. The distance is too low then, the more so the
    fewer and the more different the categories, but alike for every method.

    Attributes:
        groups: what was made together, int64 [N].
        strata: what was fixed, int64 [N]; each has at least two groups.
    """

    groups: torch.Tensor
    strata: torch.Tensor

    @classmethod
    def independent(cls, n: int) -> Design:
        """Describe images that are draws of one distribution, each by itself."""
        return cls(torch.arange(n), torch.zeros(n, dtype=torch.int64))

    @classmethod
    def of(cls, rows: Sequence[ManifestRow], together: bool = True) -> Design:
        """Describe the images of rows: categories are fixed if each has two groups, else the groups are all draws.

        Args:
            rows: N of them.
            together: whether the images of a group depend on each other; those of a real set do not.

        Raises:
            ValueError: there is one group only.
        """
        groups = torch.tensor(_numbered([row.group_id for row in rows])) if together else torch.arange(len(rows))
        strata = torch.tensor(_numbered([row.category for row in rows]))
        if len(groups.unique()) < 2:
            raise ValueError(
                "expected images of at least 2 groups, got 1: the images of a group are alike, and the kernel is "
                "averaged over pairs of different ones; generate more groups, or leave this number out"
            )
        per_stratum = torch.stack([groups, strata]).unique(dim=1)[1].bincount()
        return cls(groups, strata if per_stratum.min() > 1 else torch.zeros_like(strata))

    @cached_property
    def _counts(self) -> torch.Tensor:
        """How much a pair of different groups of each stratum counts, float64 [strata]."""
        sizes = self.strata.bincount().double().square()
        within = torch.zeros_like(sizes)
        members = torch.stack([self.groups, self.strata]).unique(dim=1, return_counts=True)
        within.index_add_(0, members[0][1], members[1].double().square())
        return sizes / (sizes - within)

    def weights(self, start: int, stop: int) -> torch.Tensor:
        """Return how much the pairs of some images with all count: float64 [stop - start, N]; of all, N^2 in sum."""
        same_group = self.groups[start:stop, None] == self.groups
        same_stratum = self.strata[start:stop, None] == self.strata
        return torch.where(same_group, 0, torch.where(same_stratum, self._counts[self.strata], 1))


def _numbered(names: Sequence[str]) -> list[int]:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [numbers[name] for name in names]


def _kernel_mean(kernel: Kernel, x: torch.Tensor, y: torch.Tensor) -> float:
    """Average a kernel over all pairs of rows of x and y."""
    return sum(kernel(rows, y).sum().item() for rows in x.split(ROWS)) / (len(x) * len(y))


def _kernel_within(kernel: Kernel, x: torch.Tensor, design: Design | None) -> float:
    """Average a kernel over the pairs of rows of x, as a design weighs them; each with itself, too, without one."""
    if design is None:
        return _kernel_mean(kernel, x, x)
    total = 0.0
    for start in range(0, len(x), ROWS):
        rows = x[start : start + ROWS]
        total += (kernel(rows, x) * design.weights(start, start + len(rows))).sum().item()
    return total / len(x) ** 2


def _squared_mmd(
    kernel: Kernel,
    features: torch.Tensor,
    reference: torch.Tensor,
    designs: tuple[Design | None, Design | None],
    within_reference: float | None,
) -> float:
    """Return the squared MMD under a kernel, given the designs of the features and of the reference."""
    require_images(features, 2, "images", PAIRS)
    require_images(reference, 2, "reference images", PAIRS)
    if within_reference is None:
        within_reference = _kernel_within(kernel, reference, designs[1])
    within = _kernel_within(kernel, features, designs[0])
    return within + within_reference - 2 * _kernel_mean(kernel, features, reference)


def _cubic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _gaussian(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # of vectors of length 1, the squared distance is 2 - 2 cos
    return ((x @ y.T - 1) / CMMD_SIGMA**2).exp()


def kernel_distance(
    features: torch.Tensor,
    reference: torch.Tensor,
    design: Design | None = None,
    within_reference: float | None = None,
) -> float:
    """Return the squared MMD under the kernel (x.y / D + 1)^3, unbiased; KID where Inception's features.

    Binkowski et al., "Demystifying MMD GANs" (ICLR 2018). Of all images at once: they average over blocks of
    1,000, which has the same expectation and more variance. Many papers print it times 1000; this is times 1.

    Args:
        features: [N, D], N >= 2.
        reference: [M, D], M >= 2; M and N may differ.
        design: of the features; independent images if not given, for which alone the usual estimate is unbiased.
        within_reference: the reference's own term, if it is known from an earlier call.

    Returns:
        Lower is better; 0 in expectation for equal distributions, hence sometimes negative.
    """
    features, reference = checked_pair(features, reference)
    designs = design or Design.independent(len(features)), Design.independent(len(reference))
    return _squared_mmd(_cubic, features, reference, designs, within_reference)


def cmmd(
    features: torch.Tensor,
    reference: torch.Tensor,
    unbiased: bool = False,
    design: Design | None = None,
    within_reference: float | None = None,
) -> float:
    """Return 1000 times the squared MMD of embeddings of length 1 under a Gaussian kernel of sigma 10.

    Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation" (CVPR 2024), with
    embeddings of CLIP ViT-L/14 at 336 pixels. Their code computes the BIASED estimate, the diagonals included, and
    calls the difference small, as it is at their 30,000 images. It is the default here, so that numbers can be
    compared with theirs, for square images: they squash others to 336 x 336, where `eval.clip.OpenClip` crops.
    It adds about 10 (1 - mean cosine) (1/N + 1/M), which is not small at some hundreds.

    Args:
        features: [N, D], N >= 2; brought to length 1 here.
        reference: [M, D], M >= 2; likewise.
        unbiased: leave out the diagonals, and the pairs that a design leaves out.
        design: of the features, for the unbiased estimate; independent images if not given.
        within_reference: the reference's own term, if it is known from an earlier call.

    Returns:
        Lower is better; >= 0 if biased.
    """
    features, reference = (F.normalize(x, dim=-1) for x in checked_pair(features, reference))
    designs = (None, None)
    if unbiased:
        designs = design or Design.independent(len(features)), Design.independent(len(reference))
    return CMMD_SCALE * _squared_mmd(_gaussian, features, reference, designs, within_reference)


def inception_score(logits: torch.Tensor, splits: int = 1, seed: int = 2020) -> float:
    """Return exp of the mean KL divergence of an image's predicted classes from the mean prediction.

    Salimans et al., "Improved Techniques for Training GANs" (NeurIPS 2016). Biased down at small N, and by more
    splits. Of one narrow category it is near 1, whatever the quality.

    Args:
        logits: [N, C] of a classifier, N >= 10 a split.
        splits: the score is averaged over so many parts; papers use 10. 1 does not depend on the order.
        seed: of the shuffle before splitting, as in torch-fidelity: images in the order of their categories would
            leave few categories to a split.

    Returns:
        In [1, min(N / splits, C)]; higher is better.
    """
    if logits.ndim != 2 or splits < 1:
        raise ValueError(
            f"expected logits [N, C] and at least one split, got {list(logits.shape)} and {splits}; 1 or 10 is usual"
        )
    require_images(
        logits, IMAGES_A_SPLIT * splits, f"images for {splits} splits", "the mean prediction needs 10 a split"
    )
    n = len(logits)
    order = np.random.RandomState(seed).permutation(n) if splits > 1 else np.arange(n)
    log_p = logits.double()[torch.from_numpy(order)].log_softmax(dim=1)
    scores = []
    for index in range(splits):
        part = log_p[index * n // splits : (index + 1) * n // splits]
        marginal = part.logsumexp(dim=0) - np.log(len(part))
        # a probability of 0 contributes nothing, where 0 times infinity would be NaN
        divergence = torch.where(part.exp() > 0, part.exp() * (part - marginal), 0).sum(dim=1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores))


def reference_rows(folder: str | Path) -> list[ManifestRow]:
    """List the images of a reference set: a run folder, one subfolder a category, or images without subfolders.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no images, or images both beside and in subfolders.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"expected a folder of reference images, got {folder}, which does not exist; check the path"
        )
    if (folder / MANIFEST).is_file() or any(path.is_dir() for path in visible(folder)):
        return read_manifest(folder)
    if not (images := images_in(folder)):
        return read_manifest(folder)  # which says what was expected
    return [
        ManifestRow(path.name, "reference", "", "reference", 0, index, UNKNOWN_SEED)
        for index, path in enumerate(images)
    ]


class FidelityMetric(SetMetric):
    """A number of a set of images and a set of real ones.

    Args:
        reference: folder of the real images; see `reference_rows`.
    """

    def __init__(self, encoder: Encoder, reference: str | Path, name: str | None = None) -> None:
        super().__init__(encoder, name)
        self.reference = Path(reference)
        self._summary: Any = None

    @cached_property
    def real(self) -> ImageSet:
        """The real images."""
        return ImageSet(self.reference, reference_rows(self.reference))

    def settings(self) -> dict[str, Any]:
        """Identify the reference by its content, wherever it lies."""
        return {"reference_sha256": self.real.manifest_hash}

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Say how many real images there are, and what the features are."""
        return {
            "reference": self.reference.name,
            "n_reference": len(self.real.rows),
            "feature_dimension": images.embeddings(self.encoder).shape[1],
            "features": "length 1" if self.encoder.normalised else "raw",
        }

    def prepare(self) -> None:
        """Read the reference's list and load the encoder; see `Metric.prepare`."""
        _ = self.real
        super().prepare()

    def value_of(self, images: ImageSet, positions: list[int]) -> float:
        if self._summary is None:  # once for all subsets
            self._summary = self.summarise(images.beside(self.real).embeddings(self.encoder).double())
        features = images.embeddings(self.encoder)[positions].double()
        return self.compare(features, self._summary, [images.rows[position] for position in positions])

    @abstractmethod
    def summarise(self, reference: torch.Tensor) -> Any:
        """Compute from the reference's features, float64 [M, D], what every comparison needs."""

    @abstractmethod
    def compare(self, features: torch.Tensor, summary: Any, rows: Sequence[ManifestRow]) -> float:
        """Measure features, float64 [N, D], of N images against the summary of the reference."""


class FrechetDistance(FidelityMetric):
    """Frechet distance; "FID" if the encoder is Inception.

    `minimum` is that of `frechet_minimum`, known once features are there.

    Args:
        encoder: what embeds the images, raw features.
        reference: folder of the real images, more than the features' dimension.
        extrapolate: to infinitely many images; see `frechet_distance`. Fifteen times the work.
    """

    name = "frechet_distance"
    version = 1
    higher_is_better = False
    unit = "squared distance of features, >= 0"
    description = "Frechet distance between Gaussians fitted to the features of the images and of the real ones"
    bounds = (0.0, None)

    def __init__(
        self, encoder: Encoder, reference: str | Path, extrapolate: bool = False, name: str | None = None
    ) -> None:
        super().__init__(encoder, reference, name)
        self.extrapolate = extrapolate
        if extrapolate:
            self.description = f"{self.description}, extrapolated to infinitely many images"
            self.bounds = (None, None)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "extrapolate": self.extrapolate}

    def results(self, images: ImageSet) -> dict[str, Any]:
        self.minimum = frechet_minimum(images.embeddings(self.encoder).shape[1], self.extrapolate)
        return super().results(images)

    def summarise(self, reference: torch.Tensor) -> Gaussian:
        return _full_rank(reference)

    def compare(self, features: torch.Tensor, summary: Gaussian, rows: Sequence[ManifestRow]) -> float:
        return frechet_distance(features, summary, self.extrapolate)


class KernelDistance(FidelityMetric):
    """Kernel distance; "KID" if the encoder is Inception.

    Unbiased at every n, given which images were made together (see `Design`), hence the least `minimum` there is.
    """

    name = "kernel_distance"
    version = 2
    higher_is_better = False
    unit = "squared MMD, times 1"
    description = "unbiased squared MMD under the kernel (x.y / D + 1)^3 of the features; times 1, not 1000"
    minimum = 2

    def summarise(self, reference: torch.Tensor) -> tuple[torch.Tensor, float]:
        require_images(reference, 2, "reference images", PAIRS)
        return reference, _kernel_within(_cubic, reference, Design.of(self.real.rows, together=False))

    def compare(self, features: torch.Tensor, summary: Any, rows: Sequence[ManifestRow]) -> float:
        reference, within = summary
        return kernel_distance(features, reference, Design.of(rows), within)


class Cmmd(FidelityMetric):
    """Maximum mean discrepancy of CLIP embeddings; see `cmmd`.

    Args:
        encoder: a CLIP model.
        reference: folder of the real images.
        unbiased: leave out the diagonals and the pairs of a group, unlike the paper's code; see `Design`.
    """

    name = "cmmd"
    version = 2
    higher_is_better = False
    unit = "1000 x squared MMD"
    description = "1000 x squared MMD of embeddings of length 1 under a Gaussian kernel of sigma 10"
    minimum = 2

    def __init__(
        self, encoder: Encoder, reference: str | Path, unbiased: bool = False, name: str | None = None
    ) -> None:
        super().__init__(encoder, reference, name)
        self.unbiased = unbiased
        self.bounds = (None, None) if unbiased else (0.0, None)
        self.description = f"{self.description}, {'unbiased' if unbiased else 'biased as published'}"

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "unbiased": self.unbiased}

    def summarise(self, reference: torch.Tensor) -> tuple[torch.Tensor, float]:
        require_images(reference, 2, "reference images", PAIRS)
        design = Design.of(self.real.rows, together=False) if self.unbiased else None
        return reference, _kernel_within(_gaussian, F.normalize(reference, dim=-1), design)

    def compare(self, features: torch.Tensor, summary: Any, rows: Sequence[ManifestRow]) -> float:
        reference, within = summary
        return cmmd(features, reference, self.unbiased, Design.of(rows) if self.unbiased else None, within)


class InceptionScore(SetMetric):
    """How sure and how varied a classifier's predictions are; the Inception Score if the encoder is Inception.

    `minimum` is `IMAGES_A_SPLIT` a split, for the mean prediction.

    Args:
        encoder: one with a classifier head, `logits_from_features`.
        splits: the score is averaged over so many parts.
    """

    name = "inception_score"
    version = 1
    higher_is_better = True
    bounds = (1.0, None)
    unit = "classes, 1 to the classifier's number of them"
    description = "exp of the mean KL divergence of the images' predicted classes from their mean"

    def __init__(self, encoder: Encoder, splits: int = 1, name: str | None = None) -> None:
        super().__init__(encoder, name)
        if type(encoder).logits_from_features is Encoder.logits_from_features:
            raise TypeError(
                f"expected an encoder with a classifier head for {self.name}, got {encoder.name}; "
                "use Inception or EfficientNet-lite0"
            )
        if splits < 1:
            raise ValueError(f"expected at least one split, got {splits}; 1 or 10 is usual")
        self.splits = splits
        self.minimum = IMAGES_A_SPLIT * splits

    def settings(self) -> dict[str, Any]:
        return {"splits": self.splits}

    def value_of(self, images: ImageSet, positions: list[int]) -> float:
        logits = self.encoder.logits_from_features(images.embeddings(self.encoder)[positions])
        return inception_score(logits, self.splits)
