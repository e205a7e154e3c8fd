"""Group inference: choose a group's images among candidates, most of which are denoised for only a few steps."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eval.encoders import Encoder
from experiments.methods.method import sample
from experiments.methods.selection import Selection, distances, embedded
from experiments.methods.setting import numbers
from experiments.methods.steps import (
    Prediction,
    decoded,
    denoiser_calls,
    initial_noise,
    predictions,
    replaced,
    some_rows,
    unpacked,
)
from experiments.prompts import Group
from negtome.call_inspection import DenoiserCall
from negtome.sites import find_architecture
from negtome.validation import check_float


def best_subset(score: torch.Tensor, distance: torch.Tensor, count: int, weight: float) -> list[int]:
    """Choose `count` of n candidates with a large sum_i u_i + weight * sum_{i < j} b_ij.

    From each of the n candidates, a greedy search adds the candidate with the largest gain until there are enough; then
    candidates are exchanged while that increases the sum. The best of these n subsets is mostly the best of all.

    Args:
        score: u, [n].
        distance: b, symmetric [n, n].
        count: number of candidates to choose.
        weight: of the distances.

    Returns:
        The indices of the chosen candidates, in ascending order.
    """
    distance, score = weight * distance.double().fill_diagonal_(0), score.double()
    best, most = score, -math.inf
    for first in range(len(score)):
        inside = torch.zeros(len(score), dtype=torch.bool)
        inside[first] = True
        for _ in range(count - 1):
            inside[(score + distance[:, inside].sum(dim=1)).masked_fill(inside, -math.inf).argmax()] = True
        while True:
            worth = score + distance[:, inside].sum(dim=1)  # of each candidate, together with the chosen ones
            gain = worth[None] - worth[:, None] - distance  # [out, in]: no distance to the candidate that goes out
            gain[~inside], gain[:, inside] = -math.inf, -math.inf
            if not gain.max() > 1e-9:
                break
            out, into = divmod(int(gain.argmax()), len(score))
            inside[out], inside[into] = False, True
        if (total := float((score + worth)[inside].sum() / 2)) > most:
            best, most = inside, total
    return best.nonzero().flatten().tolist()


def counts(candidates: int, keep: float, final: int) -> list[int]:
    """Return the number of candidates after each step until `final` remain; each step drops at least one."""
    remaining = []
    while candidates > final:
        candidates = max(min(math.ceil(round(candidates * keep, 9)), candidates - 1), final)
        remaining.append(candidates)
    return remaining


@contextlib.contextmanager
def decoding(pipe: Any, rows: list[int]) -> Iterator[None]:
    """Let the autoencoder decode only some rows of its input."""
    original = pipe.vae.decode
    with replaced(pipe.vae, "decode", lambda latents, *args, **kwargs: original(latents[rows], *args, **kwargs)):
        yield


@dataclass
class GroupInference(Selection):
    """Scalable group inference (Parmar et al., arXiv 2508.15773): drop candidates while they are denoised.

    After every step the share `keep` of the candidates goes on, until there are as many as the group has images: those
    with the largest sum of scores and weighted distances (`best_subset`) of their predicted clean images. All are
    denoised in one batch.

    The authors choose by CLIP ViT-B/32 and DINOv2 base with a solver of integer programs. Their distance is a mean over
    an image's patches or, by an option, that of entire images, as here. For FLUX.1-dev they have 128 candidates for 4
    images, keep 0.5; for FLUX.1-schnell 64, keep 0.1. Their code predicts the clean image from the noisier step's
    velocity at the next step's latents, and leaves guidance out of the first step; here both are as in the paper.

    Attributes:
        keep: the share of candidates that go on after a step, in (0, 1); rounded up, but at least one is dropped.
        distance_weight: lambda of the distances, at least 0; 1.5 in the released code.
        scorer: an encoder of texts and images, whose cosine is an image's score; None: all scores are 0.
    """

    title = "group inference"
    columns = (*Selection.columns, *numbers("keep"))
    version = 1

    keep: float = 0.5
    distance_weight: float = 1.5
    scorer: Encoder | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.keep = check_float("method.keep", self.keep, 0.001, 0.999)
        self.distance_weight = check_float("method.distance_weight", self.distance_weight, 0, math.inf)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "scorer": None if self.scorer is None else self.scorer.id}

    def choose(
        self, pipe: Any, group: Group, call: Mapping[str, Any], seeds: Sequence[int]
    ) -> tuple[np.ndarray, list[int]]:
        architecture = find_architecture(pipe)
        if architecture.list_inputs or architecture.scale is not None:
            raise ValueError(
                f"method={self.name} is not defined for {type(pipe).__name__}, whose batch is a list or whose latents "
                "are scaled by more than two numbers: use method=best_of"
            )
        plan = counts(len(seeds), self.keep, group.size)
        if len(plan) > (steps := call.get("num_inference_steps", len(plan))):
            raise ValueError(
                f"method={self.name} takes {len(plan)} steps to leave {group.size} of {len(seeds)}, got {steps}: "
                "keep fewer of them, or make more steps"
            )
        going = list(range(len(seeds)))  # the remaining candidates; changed in place
        size: list[int] = []  # of the image, in pixels

        def rows(denoiser: DenoiserCall) -> list[int]:
            return [half * denoiser.images + one for half in range(denoiser.cfg_chunks) for one in going]

        def before(denoiser: DenoiserCall, arguments: dict[str, Any]) -> dict[str, Any]:
            return some_rows(pipe, denoiser, arguments, rows(denoiser))

        def after(denoiser: DenoiserCall, output: torch.Tensor) -> torch.Tensor:
            all_rows = output.new_zeros(denoiser.rows, *output.shape[1:])
            all_rows[rows(denoiser)] = output
            return all_rows

        def measure(noise: torch.Tensor) -> torch.Tensor:
            size.extend(side * pipe.vae_scale_factor for side in noise.shape[-2:])
            return noise

        def prune(prediction: Prediction) -> torch.Tensor:
            if plan:
                # `decoding` decodes only the remaining candidates.
                images = decoded(pipe, unpacked(pipe, prediction.clean, *size))
                score = torch.zeros(len(going))
                if self.scorer is not None:
                    score = embedded(self.scorer, images) @ self.scorer.embed_texts([group.prompt])[0]
                distance = distances(embedded(self.encoder, images))
                best = best_subset(score, distance, plan.pop(0), self.distance_weight)
                going[:] = [going[one] for one in best]
            return prediction.clean

        with (
            denoiser_calls(pipe, before, after),
            initial_noise(pipe, measure),
            predictions(pipe, prune),
            decoding(pipe, going),
        ):
            return sample(pipe, group, call, seeds), going
