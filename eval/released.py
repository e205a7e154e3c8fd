"""What the paper's evaluation scripts do in ways of their own: see docs/metrics.md, "The authors' printed numbers"."""

import torch

from eval.fidelity import InceptionScore


class ReleasedInceptionScore(InceptionScore):
    """The Inception Score of parts of N // splits images in their order, unshuffled; what remains of N is left out.

    The fewer categories a part has, the lower it is, and in the order of a folder a part has few.
    """

    name = "released_inception_score"
    description = f"{InceptionScore.description}, by parts of the images in their order"

    def score(self, features: torch.Tensor) -> float:
        part, size = InceptionScore(), len(features) // self.splits
        part.encoder = self.encoder
        return sum(part.score(features[k * size : (k + 1) * size]) for k in range(self.splits)) / self.splits


def imagenet_templates() -> list[str]:
    """Return the 80 texts for ImageNet's classes of CLIP's authors, `{}` in the place of the class."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
