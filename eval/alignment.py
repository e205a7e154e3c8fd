"""CLIPScore: does an image show what the prompt asked for?

Hessel et al. (EMNLP 2021) use the factor 2.5. Here it is 100, as in most later papers and in torchmetrics, whose own
class clamps the mean instead of each image's cosine.
"""

from collections.abc import Sequence
from typing import Any

import torch

from eval.imageset import ImageSet
from eval.metric import Metric


def clip_score(image_embeddings: torch.Tensor, text_embeddings: torch.Tensor) -> torch.Tensor:
    """Compute 100 * max(cos, 0) of images [N, D] and their texts [N, D]: float64 [N]; higher is better."""
    if image_embeddings.ndim != 2 or image_embeddings.shape != text_embeddings.shape:
        raise ValueError(
            f"expected one text [D] per image [D], got images {list(image_embeddings.shape)} and texts "
            f"{list(text_embeddings.shape)}; embed both with one model and repeat the text of a group"
        )
    # in float64, because the scores of methods differ in the third digit
    cosine = torch.nn.functional.cosine_similarity(image_embeddings.double(), text_embeddings.double(), dim=-1)
    return 100 * cosine.clamp(min=0)


class ClipScore(Metric):
    """Mean over a group's images of 100 * max(cosine, 0) of image and prompt.

    `update` takes N images and N texts.
    """

    name = "clip_score"
    higher_is_better = True
    unit = "100 max(cosine, 0), 0 to 100"
    bounds = (0, 100)
    score = staticmethod(clip_score)

    def inputs(self, images: ImageSet, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encoder.of(images, positions), images.text_embeddings(self.encoder)[positions]

    def details(self, images: ImageSet) -> dict[str, Any]:
        prompts = sorted(set(images.texts))
        return {"n_prompts": len(prompts), "n_prompts_truncated": self.encoder.count_truncated(prompts)}
