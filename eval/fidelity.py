"""How close is a set of images to a set of real images? Distances of distributions and overlaps of neighbourhoods.

All metrics compute in float64 on the features of any network; with Inception they are FID, KID and so on. Only unbiased
kernel distances are comparable between sets of different sizes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from eval.encoders import Encoder, Scorer
from eval.images import read_manifest
from eval.imageset import ImageSet
from eval.metric import Folder, Metric, SetMetric

CMMD_SIGMA = 10.0
# rows of a matrix of kernel values or distances that are in memory at once
ROWS = 2048
# Distances that differ by less than this share of the squared lengths are equal: the products in float64 are more
# precise than that, and float32 features less.
TIE = 1e-12

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def checked_pair(features: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Check that two sets of features can be compared, and return them in float64."""
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"expected features [N, D] and reference features [M, D] of one encoder, got {list(features.shape)} and "
            f"{list(reference.shape)}; embed both with the same encoder"
        )
    if not torch.isfinite(features).all() or not torch.isfinite(reference).all():
        raise ValueError("expected finite features, got NaN or infinity; look at the images and the weights")
    return features.double(), reference.double()


def require_images(features: torch.Tensor, minimum: int, kind: str, reason: str) -> None:
    """Raise ValueError if there are fewer than `minimum` features of a kind of images."""
    if (n := len(features)) < minimum:
        raise ValueError(f"expected at least {minimum} {kind}, got {n}: {reason}; give more images, or leave this out")


def cubic_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return (x.y / D + 1)^3 for all rows of [N, D] and [M, D]: [N, M]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return exp(-|x - y|^2 / 2 sigma^2), sigma = 10, for all rows of [N, D] and [M, D] scaled to length 1: [N, M]."""
    # the squared distance of unit vectors is 2 - 2 cos
    return ((F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T - 1) / CMMD_SIGMA**2).exp()


def kernel_mean(kernel: Kernel, x: torch.Tensor, y: torch.Tensor | None = None) -> float:
    """Average a kernel over all pairs of a row of x and a row of y; without y, over pairs of different rows of x."""
    total = 0.0
    for start in range(0, len(x), ROWS):
        values = kernel(x[start : start + ROWS], x if y is None else y)
        total += values.sum().item()
        if y is None:
            total -= values.diagonal(start).sum().item()
    return total / (len(x) * (len(x) - 1 if y is None else len(y)))


@lru_cache(maxsize=4)  # the metrics of all runs compare with one folder
def _read_real_images(folder: Path, state: tuple[tuple[str, int, int], ...]) -> ImageSet:
    return ImageSet(folder, read_manifest(folder, flat=True))


def read_real_images(folder: Path) -> ImageSet:
    """Read the list of the images in a folder, again only when a file in it has changed."""
    files = ((path, path.stat()) for path in sorted(folder.rglob("*")))
    return _read_real_images(folder, tuple((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in files))


class ReferenceMetric(Metric):
    """A metric that compares images with real images.

    Args:
        encoder: embeds the images and the real images.
        reference: folder of the real images: a run, a subfolder per category, or images without subfolders.
    """

    def __init__(self, encoder: Scorer | None = None, reference: Folder = None, **options: Any) -> None:
        super().__init__(encoder, **options)
        self.reference = reference
        self._embeddings: torch.Tensor | None = None

    @cached_property
    def real(self) -> ImageSet:
        return read_real_images(Path(self.folder("reference")))

    def embed_real(self, images: ImageSet) -> torch.Tensor:
        """Return the features [M, D] of the real images, embedded once with the cache of `images`."""
        if self._embeddings is None:
            self._embeddings = images.with_images_of(self.real).embeddings(self.encoder)
        return self._embeddings

    def settings(self) -> dict[str, Any]:
        """Identify the reference by its content."""
        return {**super().settings(), "reference_sha256": self.real.manifest_hash}


class FidelityMetric(ReferenceMetric, SetMetric):
    """A metric of a set of images and a set of real images; arguments are those of `ReferenceMetric`."""

    version = 2

    @abstractmethod
    def score(self, features: torch.Tensor, reference: torch.Tensor) -> float:
        """Compare the features of N images, float64 [N, D], with those of M real images, [M, D]."""

    def compute(self) -> torch.Tensor:
        return torch.tensor(self.score(*checked_pair(*map(self._all, self.STATES))), dtype=torch.float64)

    def require(self, images: ImageSet) -> None:
        super().require(images)
        if (n_real := len(self.real.rows)) < self.minimum:
            raise ValueError(
                f"expected at least {self.minimum} reference images for {self.name}, got {n_real} in "
                f"{self.real.folder}; give more, or leave this metric out"
            )

    def half(self, images: ImageSet, positions: Sequence[int], seed: int) -> tuple[Sequence[int], Sequence[int]]:
        """Return the positions and those of the real images to compare with, so that the contents of both agree.

        Of a category with images, the same share of real images is chosen. Of the real images of all other categories,
        a random half is chosen: by category if categories are drawn and there are several, else by image.
        """
        rng, drawn = np.random.default_rng(seed), set(positions)
        pools = images.pools("category")
        real: list[int] = []
        unmatched: list[list[int]] = []
        for category, members in self.real.pools("category").items():
            if category in pools:
                share = len(drawn.intersection(pools[category])) / len(pools[category])
                real += [*rng.permutation(members)[: round(share * len(members))]]
            else:
                unmatched.append(members)
        if self.cluster != "category" or len(unmatched) == 1:
            unmatched = [[position] for members in unmatched for position in members]
        for index in rng.permutation(len(unmatched))[: int(len(unmatched) * self.SHARE)]:
            real += unmatched[index]
        return positions, sorted(real)

    def inputs(
        self, images: ImageSet, positions: Sequence[int], real: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        reference = self.embed_real(images)
        if real is not None:
            reference = reference[real]
        return self.encoder.of(images, positions).double(), reference.double()

    def details(self, images: ImageSet) -> dict[str, Any]:
        return {
            "reference": self.real.folder.name,
            "n_reference": len(self.real.rows),
            "feature_dimension": images.embeddings(self.encoder).shape[1],
            "features": "length 1" if self.encoder.normalised else "raw",
        }


class FrechetDistance(FidelityMetric):
    """Frechet distance between Gaussians fitted to the features of the images and of the real images.

    It is FID if the encoder is Inception (Heusel et al., NeurIPS 2017), biased upwards (Chong and Forsyth, CVPR 2020).
    torchmetrics computes it. Features [N, D] need `minimum` = D + 1 images.
    """

    name = "frechet_distance"
    higher_is_better = False
    unit = "squared distance of features, >= 0"
    bounds = (0.0, None)
    extrapolate = False  # a constant setting in the documents of this version
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
        extractor: Any = torch.nn.Identity()
        extractor.num_features = d
        # `features` has been gathered from all processes already
        distance = FrechetInceptionDistance(extractor, sync_on_compute=False)
        distance = distance.set_dtype(torch.float64).to(features.device)
        for kind, values, real in (("reference images", reference, True), ("images", features, False)):
            kind = f"{kind} for a Frechet distance of {d} features"
            require_images(values, d + 1, kind, "with fewer, the covariance is singular")
            distance.update(values, real=real)
        return distance.compute().item()


class KernelDistance(FidelityMetric):
    """Unbiased squared maximum mean discrepancy under the kernel (x.y / D + 1)^3 of the features.

    It is KID if the encoder is Inception (Binkowski et al., ICLR 2018). All images are used at once; the paper averages
    over blocks of 1,000, which has the same expectation and more variance. Many papers print 1000 times this number.
    The expectation is 0 for equal distributions, so values can be negative.
    """

    name = "kernel_distance"
    version = 4
    higher_is_better = False
    unit = "squared MMD, times 1"
    kernel: Kernel = staticmethod(cubic_kernel)
    scale = 1.0
    unbiased = True

    def score(self, features: torch.Tensor, reference: torch.Tensor) -> float:
        within = 0.0
        for kind, values in (("reference images", reference), ("images", features)):
            require_images(values, 2, kind, "the kernel is averaged over pairs")
            within += kernel_mean(self.kernel, values, None if self.unbiased else values)
        return self.scale * (within - 2 * kernel_mean(self.kernel, features, reference))


class Cmmd(KernelDistance):
    """1000 times the squared MMD of embeddings of length 1 under a Gaussian kernel of sigma 10.

    Jayasumana et al. (CVPR 2024) use CLIP ViT-L/14 at 336 pixels and squash images that are not square, where
    `eval.clip.OpenClip` crops. Their code computes the biased estimate, which includes the diagonals and adds about
    10 (1 - mean cosine) (1/N + 1/M). This is the default here.

    Args:
        encoder, reference: see `FidelityMetric`.
        unbiased: compute the unbiased estimate instead.
    """

    name = "cmmd"
    unit = "1000 x squared MMD"
    kernel: Kernel = staticmethod(gaussian_kernel)
    scale = 1000.0
    SETTINGS = ("unbiased",)

    def __init__(
        self, encoder: Scorer | None = None, reference: Folder = None, unbiased: bool = False, **options: Any
    ) -> None:
        super().__init__(encoder, reference, **options)
        self.unbiased = unbiased
        self.bounds = (None, None) if unbiased else (0.0, None)


class Manifold:
    """The balls around M points [M, D], M > k, whose radii are the distances to the k-th neighbours.

    Squared distances are computed by products, which are many times faster than differences but round. Ties are common,
    because the k-th neighbour lies on the ball, so distances within `TIE` count as equal.
    """

    def __init__(self, points: torch.Tensor, k: int, kind: str = "reference images") -> None:
        require_images(points, k + 1, kind, f"each needs a neighbour number {k}")
        self.points = points.double()
        # k + 1, because a point is its own nearest neighbour
        self.radii = torch.cat([rows.kthvalue(k + 1, dim=1).values for rows, _ in self.distances(points)])

    def distances(self, points: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield blocks of the squared distances of N points to the M centres, and of their rounding errors, [.., M]."""
        points, centres = checked_pair(points, self.points)
        require_images(points, 1, "images", "there is nothing to measure")
        mean = centres.mean(dim=0)  # centred points are shorter, which makes the rounding errors smaller
        centres = centres - mean
        for rows in (points - mean).split(ROWS):
            lengths = rows.square().sum(dim=1)[:, None] + centres.square().sum(dim=1)
            yield lengths - 2 * rows @ centres.T, TIE * lengths

    def holds(self, points: torch.Tensor, surface: bool) -> torch.Tensor:
        """Return which of the M balls, with or without their surface, contain each of N points: bool [N, M]."""
        blocks = self.distances(points)
        if surface:
            return torch.cat([distances <= self.radii + tie for distances, tie in blocks])
        return torch.cat([distances < self.radii - tie for distances, tie in blocks])


class NeighbourMetric(FidelityMetric):
    """An overlap of two sets by their k-th nearest neighbours; the default `k` is the paper's.

    Precision and recall follow Kynkaanniemi et al. (NeurIPS 2019), density and coverage follow Naeem et al. (ICML
    2020), with balls only around real images, without their surface.
    """

    higher_is_better = True
    bounds: tuple[float | None, float | None] = (0.0, 1.0)
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
    """Share of images within a real image's distance to its k-th real neighbour."""

    name = "precision"
    unit = "share of images, 0 to 1"
    k = 3

    def score(self, features: torch.Tensor, reference: torch.Tensor) -> float:
        return Manifold(reference, self.k).holds(features, surface=True).any(dim=1).double().mean().item()


class Recall(NeighbourMetric):
    """Share of real images within an image's distance to its k-th neighbour among the images."""

    name = "recall"
    unit = "share of real images, 0 to 1"
    k = 3

    def score(self, features: torch.Tensor, reference: torch.Tensor) -> float:
        require_images(reference, self.k + 1, "reference images", "as many as for precision")
        return Manifold(features, self.k, "images").holds(reference, surface=True).any(dim=1).double().mean().item()


class Density(NeighbourMetric):
    """Mean over images of the number of real images within whose k-th neighbour they lie, over k.

    The expectation is 1 for equal distributions.
    """

    name = "density"
    bounds = (0.0, None)
    unit = "1 for equal distributions, >= 0"
    k = 5

    def score(self, features: torch.Tensor, reference: torch.Tensor) -> float:
        return Manifold(reference, self.k).holds(features, surface=False).sum(dim=1).double().mean().item() / self.k


class Coverage(NeighbourMetric):
    """Share of real images with an image nearer than their k-th real neighbour."""

    name = "coverage"
    unit = "share of real images, 0 to 1"
    k = 5

    def score(self, features: torch.Tensor, reference: torch.Tensor) -> float:
        return Manifold(reference, self.k).holds(features, surface=False).any(dim=0).double().mean().item()


class InceptionScore(SetMetric):
    """exp of the mean KL divergence of the images' predicted classes from their mean.

    Salimans et al. (NeurIPS 2016). There are no real images. The score is biased down by few images and many splits,
    and near 1 for images of one category, whatever their quality. Before splitting, images are shuffled with a fixed
    seed, as in torch-fidelity.

    Args:
        encoder: encoder with a classifier (`logits_from_features`); without an encoder, `update` takes logits [N, C].
        splits: number of parts over which the score is averaged. Papers use 10; 1 does not depend on the order.
    """

    name = "inception_score"
    higher_is_better = True
    bounds = (1.0, None)
    unit = "classes, 1 to the classifier's number of them"
    SETTINGS = ("splits",)
    # with fewer images, the mean prediction shows no variety
    IMAGES_A_SPLIT = 10

    def __init__(self, encoder: Encoder | None = None, splits: int = 1, **options: Any) -> None:
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
        n, reason = len(logits), f"the mean prediction needs {self.IMAGES_A_SPLIT} a split"
        require_images(logits, self.minimum, f"images for {self.splits} splits", reason)
        order = np.random.RandomState(2020).permutation(n) if self.splits > 1 else np.arange(n)
        log_p = logits.double()[torch.from_numpy(order)].log_softmax(dim=1)
        scores = []
        for index in range(self.splits):
            part = log_p[index * n // self.splits : (index + 1) * n // self.splits]
            marginal = part.logsumexp(dim=0) - np.log(len(part))
            # a probability of 0 contributes 0, not 0 * infinity = NaN
            divergence = torch.where(part.exp() > 0, part.exp() * (part - marginal), 0).sum(dim=1)
            scores.append(divergence.mean().exp().item())
        return float(np.mean(scores))
