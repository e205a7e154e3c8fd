"""Measures that the paper's scripts compute differently; see docs/metrics.md, "The authors' printed numbers"."""

import torch

from eval.fidelity import InceptionScore


class ReleasedInceptionScore(InceptionScore):
    """Inception Score averaged over consecutive parts of N // splits images, without shuffling or the remainder.

    A folder is sorted by category, so a part has few categories and a low score.
    """

    name = "released_inception_score"

    def score(self, features: torch.Tensor) -> float:
        part, size = InceptionScore(), len(features) // self.splits
        part.encoder = self.encoder
        return sum(part.score(features[k * size : (k + 1) * size]) for k in range(self.splits)) / self.splits


def imagenet_templates() -> list[str]:
    """Return the 80 templates of CLIP's authors for the classes of ImageNet, with `{}` for the class."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
