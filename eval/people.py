"""Classifiers of the skin tone and the gender of emoji people, with the interface of encoders.

The features are a score per class, and the embedding of a class name is a unit vector, so the zero-shot label of an
image is its class. `training.people` fits both classifiers.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from eval.encoders import Encoder, Network, Scorer, checked
from eval.weights import WeightsFacts

#: The five tones of emoji, and the default yellow ("no skin tone").
TONES = tuple(f"{tone} skin tone" for tone in ("no", "light", "medium-light", "medium", "medium-dark", "dark"))
#: Class of each gender word.
GENDERS = {"woman": 0, "man": 1, "girl": 0, "boy": 1}
#: Number of bins of a colour channel, and of positions along a side of an image.
BINS, SIDE = 16, 32


def colour_bins(image: torch.Tensor) -> torch.Tensor:
    """Return the bin of the mean colour at each position of an image, uint8 [3, H, W]: int64 [SIDE, SIDE]."""
    red, green, blue = F.adaptive_avg_pool2d(checked(image).float(), SIDE).long() * BINS // 256
    return (red * BINS + green) * BINS + blue


def log_likelihoods(bins: torch.Tensor, place: torch.Tensor, skin: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Return the log-likelihood of each tone, minus their mean, float32 [T].

    At each position, the colour follows a mixture of two histograms: one for skin and one for everything else.

    Args:
        bins: colours, int64 [S, S].
        place: probability that a position shows skin, [S, S].
        skin: probability of each colour on skin, for each tone, [T, C].
        rest: probability of each colour elsewhere, [C].
    """
    mixture = place * skin[:, bins] + (1 - place) * rest[bins]
    sums = mixture.double().log().sum(dim=(1, 2))
    return (sums - sums.mean()).float()


def one_hot(texts: Sequence[str], classes: Mapping[str, int]) -> torch.Tensor:
    """Return the unit vector of each class name, float32 [N, classes]; raise ValueError for an unknown name."""
    if unknown := sorted({*texts} - {*classes}):
        raise ValueError(f"expected labels among {', '.join(classes)}, got {', '.join(unknown)}; give one of them")
    return torch.eye(max(classes.values()) + 1)[[classes[text] for text in texts]]


class _Fitted(Network, Encoder):
    """A classifier whose file was fitted by this project."""

    PLACE = "file"
    normalised = False
    path: Path

    def weights(self) -> WeightsFacts:
        files = [self.path] if self.path.is_file() else []
        return WeightsFacts.of(self.ROW, self.name, files, [self.path], found=self.path)

    def _load(self, facts: WeightsFacts) -> dict[str, torch.Tensor]:
        return {name: tensor.float() for name, tensor in load_file(facts.files[0]).items()}


class SkinTones(_Fitted):
    """The log-likelihood of each of `TONES`, by colour alone; `file` holds the fitted histograms."""

    ROW = "skin_tones"

    def __init__(self, file: str | Path, device: str = "cpu") -> None:
        super().__init__("skin tones by colour", "skin-tones", device, file)

    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([log_likelihoods(colour_bins(image), **self._network) for image in images])

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return one_hot(texts, {name: index for index, name in enumerate(TONES)})


class Genders(_Fitted):
    """The log-odds of woman and of man, by a logistic probe of other encoders' features.

    Args:
        file: the fitted probe: weight [D] and bias [].
        encoders: the encoders whose features are concatenated.
    """

    ROW = "genders"

    def __init__(self, file: str | Path, encoders: Sequence[Encoder], device: str = "cpu") -> None:
        super().__init__("genders by a probe", "genders", device, file)
        self.encoders = list(encoders)

    @cached_property
    def id(self) -> str:
        """The slug and a hash of the weights of the probe and of the encoders."""
        parts = [self.obtain().fingerprint, *(encoder.id for encoder in self.encoders)]
        return f"{self.slug}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:12]}"

    def prepare(self) -> None:
        super().prepare()
        for encoder in self.encoders:
            encoder.prepare()

    def parts(self) -> list[Scorer]:
        return [self, *self.encoders]

    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        features = torch.cat([encoder.embed_images(images) for encoder in self.encoders], dim=1)
        odds = features @ self._network["weight"] + self._network["bias"]
        return torch.stack([-odds, odds], dim=1)

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return one_hot(texts, GENDERS)
