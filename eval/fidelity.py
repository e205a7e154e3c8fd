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
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torchmetrics.utilities import dim_zero_cat

from eval.encoders import Scorer
from eval.images import ManifestRow, read_manifest
from eval.imageset import ImageSet
from eval.metric import SetMetric

CMMD_SIGMA = 10.0
# Rows of a matrix of kernel values or distances that are in memory at once.
ROWS = 2048

PAIRS = "the kernel is averaged over pairs"

#: What is known of images, of which those of a group or category depend on each other; None for independent ones.
Rows = Sequence[ManifestRow] | None
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
    """Raise a ValueError if there are fewer rows than `minimum`."""
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
    def of(cls, features: torch.Tensor, what: str = "images") -> Gaussian:
        """Fit features, float64 [N, D], N > D: with fewer, the distance measures what is missing, not what differs.

        Raises:
            ValueError: there are fewer; `what` they are is said in it.
        """
        d = features.shape[1]
        what = f"{what} for a Frechet distance of {d} features"
        require_images(features, d + 1, what, "with fewer, the covariance is singular")
        return cls(features.mean(dim=0), features.T.cov())

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


def cubic_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return (x.y / D + 1)^3 of all rows of [N, D] and [M, D]: [N, M]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return exp(-|x - y|^2 / 2 sigma^2), sigma = 10, of all rows of [N, D] and [M, D], brought to length 1: [N, M]."""
    # of vectors of length 1, the squared distance is 2 - 2 cos
    return ((F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T - 1) / CMMD_SIGMA**2).exp()


class Design(NamedTuple):
    """How images were sampled, as far as it makes some of them more alike than independent draws are.

    Attributes:
        groups: which were made together, int64 [N].
        strata: which are of one category, where how many images each has was fixed beforehand, int64 [N].
    """

    groups: torch.Tensor
    strata: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[ManifestRow], together: bool = True) -> Design:
        """Describe the images of rows. Where a category has a single group, the groups are taken for draws.

        A distance is too low then, the more so the fewer and the more different the categories, but alike for every
        method.

        Args:
            rows: N of them.
            together: whether the images of a group depend on each other; those of a real set do not.

        Raises:
            ValueError: there is one group only.
        """
        names = np.array([(row.group_id, row.category) for row in rows])
        groups, strata = (torch.from_numpy(np.unique(column, return_inverse=True)[1]) for column in names.T)
        groups = groups if together else torch.arange(len(rows))
        if groups.max() == 0:
            raise ValueError(
                "expected images of at least 2 groups, got 1: the images of a group are alike, and the kernel is "
                "averaged over pairs of different ones; generate more groups, or leave this number out"
            )
        groups_of = torch.stack([groups, strata]).unique(dim=1)[1].bincount()
        return cls(groups, strata if groups_of.min() > 1 else torch.zeros_like(strata))


def kernel_mean(kernel: Kernel, x: torch.Tensor, y: torch.Tensor) -> float:
    """Average a kernel over all pairs of rows of x and y."""
    return sum(kernel(rows, y).sum().item() for rows in x.split(ROWS)) / (len(x) * len(y))


def kernel_mean_within(kernel: Kernel, x: torch.Tensor, design: Design | None = None) -> float:
    """Estimate without bias the mean of a kernel over pairs of independent draws like the rows of x.

    Images that were made together are no such pair: they are more alike, so they make a set seem narrower than it is,
    and a method that pushes them apart would be credited with quality. Nor is a pair of different groups where every
    category has its fixed number of images: it is too seldom of one category. So a mean over pairs of different groups
    is taken for every pair of categories, and counts by the images that both have.

    Args:
        kernel: of [N, D] and [M, D] to [N, M].
        x: float64 [N, D], N >= 2.
        design: independent images if not given; it is then the mean over all pairs of different ones, as published.
    """
    groups, strata = design or (torch.arange(len(x)), torch.zeros(len(x), dtype=torch.int64))
    member = F.one_hot(strata).double()
    sums = pairs = torch.zeros(member.shape[1], member.shape[1], dtype=torch.float64)
    for rows in torch.arange(len(x)).split(ROWS):
        apart = groups[rows, None] != groups
        sums = sums + member[rows].T @ (kernel(x[rows], x) * apart) @ member
        pairs = pairs + member[rows].T @ apart.double() @ member
    shares = member.mean(dim=0)
    return (shares @ (sums / pairs) @ shares).item()


class FidelityMetric(SetMetric):
    """A number of a set of images and a set of real ones.

    Args:
        reference: folder of the real images: a run, one subfolder a category, or images without subfolders.
    """

    def __init__(self, encoder: Scorer | None = None, reference: str | Path | None = None, **options: Any) -> None:
        super().__init__(encoder, **options)
        self.reference = reference
        self._summary: Any = None
        self.add_state("real_features", [], dist_reduce_fx="cat")

    @abstractmethod
    def summarise(self, reference: torch.Tensor, rows: Rows = None) -> Any:
        """Compute from the reference's features, float64 [M, D], what every comparison needs."""

    @abstractmethod
    def score(self, features: torch.Tensor, summary: Any, rows: Rows = None) -> float:
        """Measure features, float64 [N, D], of N images against the summary of the reference."""

    def update(self, images: torch.Tensor, real: bool = False) -> None:
        """Add images to measure, or `real` ones to compare with: uint8 [N, 3, H, W], or their features [N, D]."""
        (self.real_features if real else getattr(self, self._state)).append(self.encoder.features(images))

    def compute(self) -> torch.Tensor:
        features, real = checked_pair(*map(dim_zero_cat, (getattr(self, self._state), self.real_features)))
        return torch.tensor(self.score(features, self.summarise(real)), dtype=torch.float64)

    @cached_property
    def real(self) -> ImageSet:
        return ImageSet(self.reference, read_manifest(self.reference, flat=True))

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[torch.Tensor, Any, list[ManifestRow]]:
        if self._summary is None:  # once for all subsets
            real = images.beside(self.real).embeddings(self.encoder).double()
            self._summary = self.summarise(real, self.real.rows)
        features = images.features(self.encoder, positions).double()
        return features, self._summary, [images.rows[position] for position in positions]

    def settings(self) -> dict[str, Any]:
        """Identify the reference by its content, wherever it lies."""
        return {"reference_sha256": self.real.manifest_hash}

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Say how many real images there are, and what the features are."""
        return {
            "reference": self.real.folder.name,
            "n_reference": len(self.real.rows),
            "feature_dimension": images.embeddings(self.encoder).shape[1],
            "features": "length 1" if self.encoder.normalised else "raw",
        }


class FrechetDistance(FidelityMetric):
    """Frechet distance between the Gaussians fitted to two sets of features; "FID" if the encoder is Inception.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (NeurIPS
    2017). It is biased up by about a constant over N, the constant depending on what generated the images, so that
    two methods may change places with N (Chong and Forsyth, "Effectively Unbiased FID and Inception Score and
    Where to Find Them", CVPR 2020).

    Args:
        encoder: what embeds the images, raw features [N, D]; `minimum` is D + 1, known once they are there.
        reference: folder of the real images, more than D.
    """

    name = "frechet_distance"
    version = 1
    higher_is_better = False
    unit = "squared distance of features, >= 0"
    description = "Frechet distance between Gaussians fitted to the features of the images and of the real ones"
    bounds = (0.0, None)

    def settings(self) -> dict[str, Any]:
        # as every document of this version says
        return {**super().settings(), "extrapolate": False}

    def results(self, images: ImageSet) -> dict[str, Any]:
        self.minimum = images.embeddings(self.encoder).shape[1] + 1
        return super().results(images)

    def summarise(self, reference: torch.Tensor, rows: Rows = None) -> Gaussian:
        return Gaussian.of(reference, "reference images")

    def score(self, features: torch.Tensor, summary: Gaussian, rows: Rows = None) -> float:
        return frechet_distance_of_gaussians(Gaussian.of(features), summary)


class KernelDistance(FidelityMetric):
    """Squared maximum mean discrepancy under the kernel (x.y / D + 1)^3; "KID" if the encoder is Inception.

    Binkowski et al., "Demystifying MMD GANs" (ICLR 2018). Of all images at once: they average over blocks of 1,000,
    which has the same expectation and more variance. Many papers print it times 1000; this is times 1.

    Unbiased at every n, given which images were made together: see `kernel_mean_within`, and `Design` of where not.
    0 in expectation for equal distributions, hence sometimes negative.
    """

    name = "kernel_distance"
    version = 2
    higher_is_better = False
    unit = "squared MMD, times 1"
    description = "unbiased squared MMD under the kernel (x.y / D + 1)^3 of the features; times 1, not 1000"
    kernel: Kernel = staticmethod(cubic_kernel)
    scale = 1.0
    unbiased = True

    def _within(self, features: torch.Tensor, rows: Rows, together: bool = True) -> float:
        if not self.unbiased:
            return kernel_mean(self.kernel, features, features)
        return kernel_mean_within(self.kernel, features, None if rows is None else Design.of(rows, together))

    def summarise(self, reference: torch.Tensor, rows: Rows = None) -> tuple[torch.Tensor, float]:
        require_images(reference, 2, "reference images", PAIRS)
        return reference, self._within(reference, rows, together=False)

    def score(self, features: torch.Tensor, summary: tuple[torch.Tensor, float], rows: Rows = None) -> float:
        require_images(features, 2, "images", PAIRS)
        reference, within = summary
        across = kernel_mean(self.kernel, features, reference)
        return self.scale * (self._within(features, rows) + within - 2 * across)


class Cmmd(KernelDistance):
    """1000 times the squared MMD of embeddings of length 1 under a Gaussian kernel of sigma 10.

    Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation" (CVPR 2024), with
    embeddings of CLIP ViT-L/14 at 336 pixels. Their code computes the BIASED estimate, the diagonals included, and
    calls the difference small, as it is at their 30,000 images. It is the default here, so that numbers can be
    compared with theirs, for square images: they squash others to 336 x 336, where `eval.clip.OpenClip` crops.
    It adds about 10 (1 - mean cosine) (1/N + 1/M), which is not small at some hundreds.

    Args:
        encoder: a CLIP model.
        reference: folder of the real images.
        unbiased: unlike the paper's code, take the estimate of `KernelDistance`.
    """

    name = "cmmd"
    unit = "1000 x squared MMD"
    description = "1000 x squared MMD of embeddings of length 1 under a Gaussian kernel of sigma 10"
    kernel: Kernel = staticmethod(gaussian_kernel)
    scale = 1000.0

    def __init__(
        self,
        encoder: Scorer | None = None,
        reference: str | Path | None = None,
        unbiased: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(encoder, reference, **options)
        self.unbiased = unbiased
        self.bounds = (None, None) if unbiased else (0.0, None)
        self.description = f"{self.description}, {'unbiased' if unbiased else 'biased as published'}"

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "unbiased": self.unbiased}
