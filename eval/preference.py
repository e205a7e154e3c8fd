"""Would people like the image? A score learned from their ratings: an optional second opinion, for real models.

A model's guess has that model's taste, and is named by the model. That of the Human Preference Score is a CLIPScore by
`eval.clip.HpsClip`.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from eval.clip import OpenClip
from eval.encoders import Network
from eval.imageset import ImageSet
from eval.metric import ImageMetric
from eval.weights import WeightsFacts


class AestheticPredictor(Network):
    """LAION's aesthetic predictor v2: five linear layers on the image embedding of OpenAI's CLIP ViT-L/14.

    Trained by least squares on people's ratings of 1 to 10 (SAC, LAION-Logos, AVA). With nothing between the layers but
    dropout, the score is linear in the embedding of length 1.

    Args:
        file: the layers' file; among torch.hub's checkpoints if not given. `weights` are those of the layers.
        weights_dir: where CLIP's weights are; see `eval.clip.OpenClip`.
    """

    ROW = "aesthetic"
    ARCHITECTURE = "ViT-L-14-quickgelu"
    SIZES = (768, 1024, 128, 64, 16, 1)

    def __init__(
        self, file: str | Path | None = None, weights_dir: str | Path | None = None, device: str = "cpu"
    ) -> None:
        super().__init__("LAION aesthetic predictor v2 (CLIP ViT-L/14)", "laion-aesthetic-v2", device, file)
        self.clip = OpenClip(self.ARCHITECTURE, "openai", weights_dir, device=device)

    @cached_property
    def id(self) -> str:
        """That of the layers, and CLIP's."""
        return f"{self.slug}-{self.obtain().fingerprint}-{self.clip.id}"

    def prepare(self) -> None:
        """Load layers and CLIP now, so that a missing file is found before any work is done."""
        super().prepare()
        self.clip.prepare()

    def _load(self, facts: WeightsFacts) -> torch.nn.Module:
        linear = [torch.nn.Linear(*sizes) for sizes in zip(self.SIZES, self.SIZES[1:], strict=False)]
        dropout = torch.nn.Dropout()
        layers = torch.nn.Sequential(linear[0], dropout, linear[1], dropout, linear[2], dropout, *linear[3:])
        model = torch.nn.ModuleDict({"layers": layers})
        model.load_state_dict(torch.load(facts.files[0], map_location="cpu", weights_only=True))
        return layers.eval().requires_grad_(False)

    def score(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Score embeddings of CLIP, float32 [N, 768], each of length 1: [N], about 1 to 10."""
        return self._network(embeddings)[:, 0]


class AestheticScore(ImageMetric):
    """Mean score of LAION's aesthetic predictor over the images of a group; the prompt plays no part.

    Args:
        file: see `AestheticPredictor`.
        weights_dir: see `AestheticPredictor`.
    """

    name = "aesthetic"
    version = 1
    higher_is_better = True
    unit = "predicted rating, about 1 to 10"
    description = "mean over a group's images of LAION's aesthetic predictor v2 on the CLIP ViT-L/14 embedding"

    def __init__(
        self,
        file: str | Path | None = None,
        weights_dir: str | Path | None = None,
        name: str | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(AestheticPredictor(file, weights_dir, device), name)

    def scores(self, images: ImageSet) -> torch.Tensor:
        self.judge.prepare()  # a missing file is found before CLIP embeds thousands of images
        return self.judge.score(images.embeddings(self.judge.clip))
