"""How close is a set of images to a set of real ones? Distances of distributions, overlap of neighbourhoods.

All of it is arithmetic on the features of some network, in float64, and a number means little without that network's
name: "FID" is the Frechet distance of Inception's features, CMMD is of CLIP's. The metrics therefore carry the names of
the functions, and the table's column says whose features they are. No number here can be compared between sets of
different sizes, but for the unbiased kernel distances; every document states both sizes.

Precision and recall are those of Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative
Models" (NeurIPS 2019), density and coverage those of Naeem et al., "Reliable Fidelity and Diversity Metrics for
Generative Models" (ICML 2020), with balls only around real images, surface excluded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from eval.encoders import Encoder, Scorer
from eval.images import read_manifest
from eval.imageset import ImageSet
from eval.metric import Folder, SetMetric

CMMD_SIGMA = 10.0
# Rows of a matrix of kernel values or distances that are in memory at once.
ROWS = 2048
# Relative to the squared lengths: more than a product of float64 is off, and less than float32 features resolve.
TIE = 1e-12

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def checked_pair(features: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Check that two sets of features belong together, and put them into float64."""
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"expected features [N, D] and reference features [M, D] of one encoder, got {list(features.shape)} and "
            f"{list(reference.shape)}; embed both with the same encoder"
        )
    if not torch.isfinite(features).all() or not torch.isfinite(reference).all():
        raise ValueError("expected finite features, got NaN or infinity; look at the images and the weights")
    return features.double(), reference.double()


def require_images(features: torch.Tensor, minimum: int, what: str, why: str) -> None:
    if len(features) < minimum:
        raise ValueError(
            f"expected at least {minimum} {what}, got {len(features)}: {why}; give more images, or leave this "
            "number out"
        )


def cubic_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return (x.y / D + 1)^3 of all rows of [N, D] and [M, D]: [N, M]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return exp(-|x - y|^2 / 2 sigma^2), sigma = 10, of all rows of [N, D] and [M, D], brought to length 1: [N, M]."""
    # of vectors of length 1, the squared distance is 2 - 2 cos
    return ((F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T - 1) / CMMD_SIGMA**2).exp()


def kernel_mean(kernel: Kernel, x: torch.Tensor, y: torch.Tensor | None = None) -> float:
    """Average a kernel over all pairs of a row of x and one of y; without y, of two different rows of x."""
    total = 0.0
    for start in range(0, len(x), ROWS):
        values = kernel(x[start : start + ROWS], x if y is None else y)
        total += (values.sum() if y is not None else values.sum() - values.diagonal(start).sum()).item()
    return total / (len(x) * (len(x) - 1 if y is None else len(y)))


class FidelityMetric(SetMetric):
    """A number of a set of images and a set of real ones.

    Args:
        reference: folder of the real images: a run, one subfolder a category, or images without subfolders.
    """

    version = 2

    def __init__(self, encoder: Scorer | None = None, reference: Folder = None, **options: Any) -> None:
        super().__init__(encoder, **options)
        self.reference = reference
        self._embeddings: torch.Tensor | None = None

    @abstractmethod
    def score(self, features: torch.Tensor, reference: torch.Tensor) -> float:
        """Measure features of N images, float64 [N, D], against those of M real ones, [M, D]."""

    def compute(self) -> torch.Tensor:
        return torch.tensor(self.score(*checked_pair(*map(self._all, self.STATES))), dtype=torch.float64)

    @cached_property
    def real(self) -> ImageSet:
        return ImageSet(self.reference, read_manifest(self.folder("reference"), flat=True))

    def require(self, images: ImageSet) -> None:
        super().require(images)
        if (n_real := len(self.real.rows)) < self.minimum:
            raise ValueError(
                f"expected at least {self.minimum} reference images for {self.name}, got {n_real} in "
                f"{self.real.folder}; give more, or leave this metric out"
            )

    def half(self, images: ImageSet, positions: Sequence[int], seed: int) -> tuple[Sequence[int], Sequence[int]]:
        """Return real images too: of each category the share that is drawn of the images', so that contents agree.

        Of categories that no image has, a random half: of categories where those are drawn and it has several, else of
        their images.
        """
        rng, drawn = np.random.default_rng(seed), set(positions)
        pools = images.pools("category")
        chosen: list[int] = []
        others: list[list[int]] = []
        for category, members in self.real.pools("category").items():
            if category in pools:
                share = len(drawn.intersection(pools[category])) / len(pools[category])
                chosen += [*rng.permutation(members)[: round(share * len(members))]]
            else:
                others.append(members)
        if self.cluster != "category" or len(others) == 1:
            others = [[position] for members in others for position in members]
        for index in rng.permutation(len(others))[: int(len(others) * self.SHARE)]:
            chosen += others[index]
        return positions, sorted(chosen)

    def inputs(
        self, images: ImageSet, positions: Sequence[int], real: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._embeddings is None:  # once for all halves
            self._embeddings = images.beside(self.real).embeddings(self.encoder)
        reference = self._embeddings if real is None else self._embeddings[real]
        return self.encoder.of(images, positions).double(), reference.double()

    def settings(self) -> dict[str, Any]:
        """Identify the reference by its content, wherever it lies."""
        return {**super().settings(), "reference_sha256": self.real.manifest_hash}

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Say how many real images there are, and what the features are."""
        return {
            "reference": self.real.folder.name,
            "n_reference": len(self.real.rows),
            "feature_dimension": images.embeddings(self.encoder).shape[1],
            "features": "length 1" if self.encoder.normalised else "raw",
        }


class FrechetDistance(FidelityMetric):
    """torchmetrics' Frechet distance of Gaussians fitted to two sets of features; "FID" if the encoder is Inception.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (NeurIPS 2017).
    Biased up (Chong and Forsyth, "Effectively Unbiased FID and Inception Score and Where to Find Them", CVPR 2020).
    Of raw features [N, D]: `minimum` is D + 1, known once they are there.
    """

    name = "frechet_distance"
    higher_is_better = False
    unit = "squared distance of features, >= 0"
    description = "Frechet distance between Gaussians fitted to the features of the images and of the real ones"
    bounds = (0.0, None)
    extrapolate = False  # as every document of this version says
    SETTINGS = ("extrapolate",)

    def require(self, images: ImageSet) -> None:
        if self.encoder.dimension is not None:
            self.minimum = self.encoder.dimension + 1
        super().require(images)

    def results(self, images: ImageSet) -> dict[str, Any]:
        self.minimum = images.embeddings(self.encoder).shape[1] + 1
        return super().results(images)

    def score(self, features: torch.Tensor, reference: torch.Tensor) -> float:
        d = features.shape[1]
        given = torch.nn.Identity()
        given.num_features = d
        # what is here is of all processes already
        distance = FrechetInceptionDistance(given, sync_on_compute=False).set_dtype(torch.float64).to(features.device)
        why = "with fewer, the covariance is singular, and what is missing is measured, not what differs"
        for what, of, real in (("reference images", reference, True), ("images", features, False)):
            require_images(of, d + 1, f"{what} for a Frechet distance of {d} features", why)
            distance.update(of, real=real)
        return distance.compute().item()


class KernelDistance(FidelityMetric):
    """Squared maximum mean discrepancy under the kernel (x.y / D + 1)^3; "KID" if the encoder is Inception.

    Binkowski et al., "Demystifying MMD GANs" (ICLR 2018). Of all images at once: they average over blocks of 1,000,
    which has the same expectation and more variance. Many papers print it times 1000; this is times 1.

    Unbiased for independent images: within a set, every pair of different images counts once. 0 in expectation for
    equal distributions, hence sometimes negative.
    """

    name = "kernel_distance"
    version = 4
    higher_is_better = False
    unit = "squared MMD, times 1"
    description = "unbiased squared MMD under the kernel (x.y / D + 1)^3 of the features; times 1, not 1000"
    kernel: Kernel = staticmethod(cubic_kernel)
    scale = 1.0
    unbiased = True

    def score(self, features: torch.Tensor, reference: torch.Tensor) -> float:
        within = 0.0
        for what, of in (("reference images", reference), ("images", features)):
            require_images(of, 2, what, "the kernel is averaged over pairs")
            within += kernel_mean(self.kernel, of, None if self.unbiased else of)
        return self.scale * (within - 2 * kernel_mean(self.kernel, features, reference))


class Cmmd(KernelDistance):
    """1000 times the squared MMD of embeddings of length 1 under a Gaussian kernel of sigma 10.

    Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation" (CVPR 2024), with
    embeddings of CLIP ViT-L/14 at 336 pixels. Their code computes the BIASED estimate, the diagonals included. So does
    this by default, to be compared with theirs, for square images: they squash others, where `eval.clip.OpenClip`
    crops. It adds about 10 (1 - mean cosine) (1/N + 1/M), which is not small at some hundreds.

    Args:
        unbiased: unlike the paper's code, take the estimate of `KernelDistance`.
    """

    name = "cmmd"
    unit = "1000 x squared MMD"
    description = "1000 x squared MMD of embeddings of length 1 under a Gaussian kernel of sigma 10"
    kernel: Kernel = staticmethod(gaussian_kernel)
    scale = 1000.0
    SETTINGS = ("unbiased",)

    def __init__(
        self, encoder: Scorer | None = None, reference: Folder = None, unbiased: bool = False, **options: Any
    ) -> None:
        super().__init__(encoder, reference, **options)
        self.unbiased = unbiased
        self.bounds = (None, None) if unbiased else (0.0, None)
        self.description = f"{self.description}, {'unbiased' if unbiased else 'biased as published'}"


class Manifold:
    """The balls around a set's points that reach to their k-th neighbours.

    Distances, squared, are of products, which are many times faster than differences. Their rounding would tear ties,
    which are common, since the k-th neighbour lies on the ball: what is within `TIE` of equal is equal.

    Args:
        points: [M, D].
        k: which neighbour; M > k.
        what: the points are, for the error.
    """

    def __init__(self, points: torch.Tensor, k: int, what: str = "reference images") -> None:
        require_images(points, k + 1, what, f"each needs a neighbour number {k}")
        self.points = points.double()
        self.k = k
        # a point is its own nearest neighbour, hence k + 1
        self.radii = torch.cat([rows.kthvalue(k + 1, dim=1).values for rows, _ in self.distances(points)])

    def distances(self, points: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the squared distances of some of N points to each of the M, and how far they may be off, [.., M]."""
        points, centres = checked_pair(points, self.points)
        require_images(points, 1, "images", "there is nothing to measure")
        middle = centres.mean(dim=0)  # lengths from there are smaller, and so is the rounding
        centres = centres - middle
        for rows in (points - middle).split(ROWS):
            lengths = rows.square().sum(dim=1)[:, None] + centres.square().sum(dim=1)
            yield lengths - 2 * rows @ centres.T, TIE * lengths

    def holds(self, points: torch.Tensor, surface: bool) -> torch.Tensor:
        """Tell of each of N points which of the M balls it lies in: [N, D] -> bool [N, M]."""
        found = self.distances(points)
        if surface:
            return torch.cat([distances <= self.radii + tie for distances, tie in found])
        return torch.cat([distances < self.radii - tie for distances, tie in found])


class NeighbourMetric(FidelityMetric):
    """Overlap of two sets by nearest neighbours, `k` as in the paper; `minimum` leaves every image a k-th neighbour."""

    higher_is_better = True
    bounds = (0.0, 1.0)
    k: int
    SETTINGS = ("k",)

    def __init__(
        self, encoder: Scorer | None = None, reference: Folder = None, k: int | None = None, **options: Any
    ) -> None:
        super().__init__(encoder, reference, **options)
        if k is not None:
            self.k = k
        if self.k < 1:
            raise ValueError(f"expected a neighbour k >= 1, got {k}; 3 and 5 are usual")
        self.minimum = self.k + 1


class Precision(NeighbourMetric):
    """Share of images that lie in a ball of a real one."""

    name = "precision"
    unit = "share of images, 0 to 1"
    description = "share of images within a real image's distance to its k-th real neighbour"
    k = 3

    def score(self, features: torch.Tensor, reference: torch.Tensor) -> float:
        return Manifold(reference, self.k).holds(features, surface=True).any(dim=1).double().mean().item()


class Recall(NeighbourMetric):
    """Share of real images that lie in a ball of an image."""

    name = "recall"
    unit = "share of real images, 0 to 1"
    description = "share of real images within an image's distance to its k-th neighbour among the images"
    k = 3

    def score(self, features: torch.Tensor, reference: torch.Tensor) -> float:
        require_images(reference, self.k + 1, "reference images", "as many as for precision")
        made = Manifold(features, self.k, "images")
        return made.holds(reference, surface=True).any(dim=1).double().mean().item()


class Density(NeighbourMetric):
    """In how many real images' balls an image lies, over k: 1 in expectation for equal distributions."""

    name = "density"
    bounds = (0.0, None)
    unit = "1 for equal distributions, >= 0"
    description = "mean over images of the real images within whose k-th neighbour they lie, over k"
    k = 5

    def score(self, features: torch.Tensor, reference: torch.Tensor) -> float:
        return Manifold(reference, self.k).holds(features, surface=False).sum(dim=1).double().mean().item() / self.k


class Coverage(NeighbourMetric):
    """Share of the real images' balls that hold an image."""

    name = "coverage"
    unit = "share of real images, 0 to 1"
    description = "share of real images with an image nearer than their k-th real neighbour"
    k = 5

    def score(self, features: torch.Tensor, reference: torch.Tensor) -> float:
        return Manifold(reference, self.k).holds(features, surface=False).any(dim=0).double().mean().item()


class InceptionScore(SetMetric):
    """exp of the mean divergence of an image's predicted classes from the mean prediction; Inception's with Inception.

    Salimans et al., "Improved Techniques for Training GANs" (NeurIPS 2016). It knows no real images. Biased down at
    small N, and by more splits. Of one narrow category it is near 1, whatever the quality. Before splitting, images are
    shuffled with a fixed seed, as in torch-fidelity: in the order of their categories, a split would have few of these.

    Args:
        encoder: one with a classifier head, `logits_from_features`; without, `update` takes logits [N, C].
        splits: the score is averaged over so many parts; papers use 10. 1 does not depend on the order.
    """

    name = "inception_score"
    higher_is_better = True
    bounds = (1.0, None)
    unit = "classes, 1 to the classifier's number of them"
    description = "exp of the mean KL divergence of the images' predicted classes from their mean"
    SETTINGS = ("splits",)
    # A mean prediction of fewer images says nothing about variety.
    IMAGES_A_SPLIT = 10

    def __init__(self, encoder: Scorer | None = None, splits: int = 1, **options: Any) -> None:
        super().__init__(encoder, **options)
        if encoder is not None and type(encoder).logits_from_features is Encoder.logits_from_features:
            raise TypeError(
                f"expected an encoder with a classifier head for {self.name}, got {encoder.name}; "
                "use Inception or EfficientNet-lite0"
            )
        if splits < 1:
            raise ValueError(f"expected at least one split, got {splits}; 1 or 10 is usual")
        self.splits = splits
        self.minimum = self.IMAGES_A_SPLIT * splits

    def score(self, features: torch.Tensor) -> float:
        logits = self.encoder.logits_from_features(features) if isinstance(self.encoder, Encoder) else features
        if logits.ndim != 2:
            raise ValueError(f"expected logits [N, C], got {list(logits.shape)}; give those of a classifier")
        n = len(logits)
        why = f"the mean prediction needs {self.IMAGES_A_SPLIT} a split"
        require_images(logits, self.minimum, f"images for {self.splits} splits", why)
        order = np.random.RandomState(2020).permutation(n) if self.splits > 1 else np.arange(n)
        log_p = logits.double()[torch.from_numpy(order)].log_softmax(dim=1)
        scores = []
        for index in range(self.splits):
            part = log_p[index * n // self.splits : (index + 1) * n // self.splits]
            marginal = part.logsumexp(dim=0) - np.log(len(part))
            # a probability of 0 contributes nothing, where 0 times infinity would be NaN
            divergence = torch.where(part.exp() > 0, part.exp() * (part - marginal), 0).sum(dim=1)
            scores.append(divergence.mean().exp().item())
        return float(np.mean(scores))
