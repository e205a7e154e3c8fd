"""Does the image still show what the prompt asked for? The CLIPScore.

Hessel et al. (EMNLP 2021) define 2.5 * max(cos, 0). Here, as in most later papers and in torchmetrics, the
factor is 100; torchmetrics' own class clamps the mean instead of each image's cosine.
"""

from collections.abc import Sequence
from typing import Any

import torch

from eval.imageset import ImageSet
from eval.metric import Metric


def clip_score(image_embeddings: torch.Tensor, text_embeddings: torch.Tensor) -> torch.Tensor:
    """Score images [N, D] each against its own text, [N, D]: 100 * max(cos, 0), float64 [N]; higher is better."""
    if image_embeddings.ndim != 2 or image_embeddings.shape != text_embeddings.shape:
        raise ValueError(
            f"expected one text [D] an image [D], got images {list(image_embeddings.shape)} and texts "
            f"{list(text_embeddings.shape)}; embed both with one model and repeat the text of a group"
        )
    # in float64: the scores of methods differ in the third digit
    cosine = torch.nn.functional.cosine_similarity(image_embeddings.double(), text_embeddings.double(), dim=-1)
    return 100 * cosine.clamp(min=0)


class ClipScore(Metric):
    """Mean CLIPScore of the images of a group against their prompt; `update` takes N images and N texts."""

    name = "clip_score"
    higher_is_better = True
    unit = "100 max(cosine, 0), 0 to 100"
    bounds = (0, 100)
    description = "mean over a group's images of 100 max(cos, 0) of image and prompt (Hessel et al. 2021 use 2.5)"
    score = staticmethod(clip_score)

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encoder.of(images, positions), images.text_embeddings(self.encoder)[positions]

    def details(self, images: ImageSet) -> dict[str, Any]:
        """Say how many different prompts there are and how many the text tower cannot read to the end."""
        prompts = sorted(set(images.texts))
        return {"n_prompts": len(prompts), "n_prompts_truncated": self.encoder.count_truncated(prompts)}
