"""SPELL: predicted images are moved out of balls around the other images of their group, or around reference images."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from experiments.methods.assets import Retriever
from experiments.methods.method import Method, MethodContext
from experiments.methods.setting import Setting, numbers
from experiments.methods.steps import Prediction, predictions
from experiments.prompts import Group
from negtome.encoding import encode, scale_latents
from negtome.reference import Reference, fit
from negtome.sites import find_architecture
from negtome.validation import check_float


def repellency(latents: torch.Tensor, shielded: torch.Tensor, radius: float) -> torch.Tensor:
    """Return sum_k relu(radius / |x - z_k| - 1) (x - z_k), which moves an x in one ball onto the ball's surface.

    Args:
        latents: x, float32 [G, K, N].
        shielded: z, [G or 1, R, N]; a z that equals x adds nothing.
        radius: of the balls around z.

    Returns:
        [G, K, N].
    """
    distance = torch.cdist(latents, shielded.expand(len(latents), -1, -1), compute_mode="donot_use_mm_for_euclid_dist")
    weight = torch.where(distance > 0, radius / distance - 1, 0).relu()  # [G, K, R]
    return latents * weight.sum(dim=2, keepdim=True) - weight @ shielded


@dataclass
class SPELL(Method):
    """SPELL, sparse repellency, within a group (Kirchhof et al., arXiv 2410.06025).

    At every step, overcompensation * `repellency` from the other images of the group is added to the predicted clean
    latents. All images of a group move at once.

    Attributes:
        radius: of the balls, at least 0, in root mean squares of an element. It is multiplied by sqrt(N) for N latent
            elements, so that it means the same at every resolution; independent latents of unit variance are sqrt(2)
            apart. The paper gives a length for each of its models.
        overcompensation: lambda, at least 0: 1.6 in the paper.
    """

    title = "SPELL"
    columns = numbers("radius")
    version = 1

    name: str
    radius: float = 1.0
    overcompensation: float = 1.6

    def __post_init__(self) -> None:
        for name in ("radius", "overcompensation"):
            setattr(self, name, check_float(f"method.{name}", getattr(self, name), 0, math.inf))

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        with self._shielding(pipe, group.size if group.size > 1 else 0):
            yield MethodContext(dict(call))

    @contextlib.contextmanager
    def _shielding(self, pipe: Any, group_size: int, shielded: torch.Tensor | None = None) -> Iterator[None]:
        """Repel predictions from `shielded`, [1, R, N], or from each other in groups; a `group_size` of 0 is off."""

        def repel(prediction: Prediction) -> torch.Tensor:
            latents = prediction.clean.flatten(1).unflatten(0, (-1, group_size))
            radius = self.radius * math.sqrt(latents.shape[-1])
            away = repellency(latents, latents if shielded is None else shielded.to(latents), radius)
            return prediction.clean + self.overcompensation * away.view_as(prediction.clean)

        with contextlib.ExitStack() as stack:
            if group_size and self.radius and self.overcompensation:
                stack.enter_context(predictions(pipe, repel))
            yield


@dataclass
class SPELLFromAssets(SPELL):
    """SPELL from the protected concept that is nearest to the prompt; without a near concept it does nothing.

    Reference images are scaled to fit, and padded by repeating their edges; masks are not used.

    Attributes:
        radius, overcompensation: as of `SPELL`.
        retriever: finds the concept's reference images.
        images: the number of reference images to use, the nearest first; None for all.
    """

    title = "shielded from the asset"
    columns = (
        *SPELL.columns,
        Setting("images", ("pictures",), "pictures", number=True),
    )

    retriever: Retriever = field(kw_only=True)
    images: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is not None and self.images < 1:
            raise ValueError(f"method.images must be at least 1, or null for all of an asset, got {self.images}")

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "reference": "assets", "retriever": self.retriever.settings()}

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        references = self.retriever.find(pipe, group, call)[: self.images]
        shielded = self._latents(pipe, [asset.image for asset, _ in references], call) if references else None
        with self._shielding(pipe, 1 if references else 0, shielded):
            yield MethodContext(dict(call), references={asset.label: score for asset, score in references})

    def _latents(self, pipe: Any, pictures: list[torch.Tensor], call: Mapping[str, Any]) -> torch.Tensor:
        """Encode images at the size of a call, scaled and packed as its latents: float32 [1, R, N]."""
        architecture = find_architecture(pipe)
        default = getattr(pipe, "default_sample_size", 0) * pipe.vae_scale_factor
        height, width = (call.get(side) or default for side in ("height", "width"))
        fitted = [fit(picture, None, height, width)[0] for picture in Reference(pictures).images]
        with torch.no_grad():
            latents = scale_latents(architecture, pipe, encode(architecture, pipe, 2 * torch.stack(fitted) - 1)[0])
        packed = latents if architecture.pack is None else architecture.pack(pipe, latents)
        return packed.flatten(1).unsqueeze(0)
