"""Two approximations of NegToMe's matching: use one match at several hook points, or match in a random projection.

Both make the matching cheaper at full size (docs/roofline.md). Here they save no time: the exact match is computed too,
so that the log of a run says how many matches are equal.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

import negtome
from experiments.methods.method import MethodContext
from experiments.methods.negtome import NegToMe
from experiments.methods.setting import Setting
from experiments.prompts import Group
from negtome.merge import cannot_move
from negtome.sites import find_architecture
from negtome.validation import check_int


class Match(NamedTuple):
    """The nearest reference token of every token.

    Attributes:
        similarity: the cosine with it, [G, n].
        index: its number, [G, n].
    """

    similarity: torch.Tensor
    index: torch.Tensor


def nearest(tokens: torch.Tensor, reference: torch.Tensor, projection: torch.Tensor | None = None) -> Match:
    """Match every token with the reference token of the largest cosine.

    Args:
        tokens: [G, n, C].
        reference: [G, N, C].
        projection: [C, D]; cosines are those of the tokens multiplied by it. None: of the tokens themselves.
    """
    if projection is not None:
        tokens, reference = (features.to(projection.dtype) @ projection for features in (tokens, reference))
    unit = torch.nn.functional.normalize(reference, dim=-1)
    product, index = (tokens @ unit.mT).max(dim=-1)
    length = torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.promote_types(tokens.dtype, torch.float32))
    return Match(product / length.clamp_min(torch.finfo(length.dtype).tiny), index)


@functools.cache
def gaussian_projection(channels: int, dim: int, seed: int) -> torch.Tensor:
    """Draw a matrix of independent normal numbers, float32 [channels, dim], on the CPU.

    The cosine of two projected tokens has a distribution that depends on their cosine c and on `dim` alone, with a
    standard deviation of about (1 - c^2) / sqrt(dim). So `dim` means the same for models of few and of many channels.
    An orthogonal matrix would nearly keep the cosines of a model whose channels are hardly more than `dim`.
    """
    return torch.randn(channels, dim, generator=torch.Generator().manual_seed(seed))


class ApproximatePush:
    """Replaces the push at every hook point of a denoiser; see `push` of `negtome.attach`.

    A match with its similarity is used at `reuse_sites` hook points in a row, so that the same tokens move at all of
    them. A hook point matches anew if its feature map has another number of tokens, or if it is the first that is
    reached in a call of the denoiser. A module that is called twice in a call matches anew too.

    Args:
        alpha, threshold: as in `negtome.NegToMeConfig`. The threshold is compared with the approximate similarity.
        reuse_sites, projection_dim, seed: as of `ApproximateMatch`.
    """

    def __init__(
        self, alpha: float, threshold: float, reuse_sites: int = 1, projection_dim: int | None = None, seed: int = 0
    ) -> None:
        self.alpha, self.threshold = alpha, threshold
        self.reuse_sites, self.projection_dim, self.seed = reuse_sites, projection_dim, seed
        self._match: Match | None = None
        self._uses_left = 0
        self._reached: set[str] = set()  # hook points of the running call of the denoiser
        # Tensors, so that no hook point waits for the device.
        self._pushed: list[torch.Tensor] = []
        self._equal: list[torch.Tensor] = []
        self._approximate = 0

    def __call__(self, site: str, tokens: torch.Tensor, exact: torch.Tensor, group_size: int) -> torch.Tensor:
        """Push the images of each group away from the group's first image.

        Args:
            site: name of the hook point.
            tokens: [G * K, N, C] the tokens of G groups of K = `group_size` images.
            exact: [G * K, N, C] the same after the push with the exact match.
            group_size: K.

        Returns:
            [G * K, N, C]; `exact` itself where the match is the exact one.
        """
        if cannot_move(self.alpha, self.threshold):
            return exact
        images = tokens.unflatten(0, (-1, group_size))
        moving, first = images[:, 1:].flatten(1, 2), images[:, 0]  # [G, (K - 1) * N, C] and [G, N, C]
        exact_match = nearest(moving, first)
        match = self._take_match(site, moving, first, exact_match)
        is_moved = match.similarity > self.threshold
        self._pushed.append(is_moved.sum())
        if match is exact_match:
            return exact
        self._approximate += match.index.numel()
        self._equal.append((match.index == exact_match.index).sum())
        target = first.gather(1, match.index.unsqueeze(-1).expand_as(moving))
        weight = is_moved.to(tokens.dtype).mul_(-self.alpha).unsqueeze(-1)
        moved = moving.lerp(target, weight)
        return torch.cat([images[:, :1], moved.view_as(images[:, 1:])], dim=1).flatten(0, 1)

    def _take_match(self, site: str, moving: torch.Tensor, first: torch.Tensor, exact_match: Match) -> Match:
        """Return the match of an earlier hook point, or a new one."""
        if site in self._reached:
            self._reached.clear()
            self._match = None
        self._reached.add(site)
        earlier, index = self._match, exact_match.index
        if earlier is not None and self._uses_left and earlier.index.shape == index.shape:
            self._uses_left -= 1
            return Match(earlier.similarity.to(index.device), earlier.index.to(index.device))
        match = exact_match
        if self.projection_dim is not None:
            projection = gaussian_projection(first.shape[-1], self.projection_dim, self.seed)
            precise = torch.promote_types(first.dtype, torch.float32)
            match = nearest(moving, first, projection.to(first.device, precise))
        self._match, self._uses_left = match, self.reuse_sites - 1
        return match

    def statistics(self) -> dict[str, int]:
        """Return the tokens that moved, the matches that were not computed exactly, and how many of these are equal.

        A match is equal if it is the reference token that the exact matching finds for the same features.
        """
        return {
            "tokens_pushed": sum(map(int, self._pushed)),
            "approximate_matches": self._approximate,
            "equal_matches": sum(map(int, self._equal)),
        }


class ApproximateMatch(NegToMe):
    """NegToMe with an approximate match.

    Args:
        reuse_sites: hook points in a row that use the match of the first of them, at least 1, which matches at each.
        projection_dim: channels of the random projection in which tokens are matched, at least 1; None: no projection.
            The push is that of the full features.
        seed: of the projection, which is the same at all hook points of as many channels, in all steps and groups.
        **config: as of `NegToMe`.

    Raises:
        ValueError: a setting is out of range, or the matching or the reference is one that this is not defined for.
    """

    title = "NegToMe, approximate match"
    columns = (
        *NegToMe.columns,
        Setting("reuse_sites", heading="hook points per match", number=True),
        Setting("projection_dim", heading="projected channels", number=True),
    )
    version = 1

    def __init__(
        self, name: str, reuse_sites: int = 1, projection_dim: int | None = None, seed: int = 0, **config: Any
    ) -> None:
        super().__init__(name, **config)
        self.check_paper_matching()
        check_int("method.reuse_sites", reuse_sites, 1, advice=" hook points.")
        if projection_dim is not None:
            check_int("method.projection_dim", projection_dim, 1, advice=" channels, or null for no projection.")
        check_int("method.seed", seed, 0, 2**63 - 1, advice=".")
        self.approximation: dict[str, Any] = {
            "reuse_sites": reuse_sites,
            "projection_dim": projection_dim,
            "seed": seed,
        }

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **self.approximation}

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        strength = self.config.published_for(find_architecture(pipe).name.lower()).strength()
        push = ApproximatePush(strength["alpha"], strength["threshold"], **self.approximation)
        with negtome.attach(pipe, self.config, group_size=group.size, push=push) as attached:
            yield MethodContext(dict(call), lambda: attached.summary() | push.statistics())
