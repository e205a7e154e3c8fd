"""Which skin tone and gender does a picture of a person in the emoji's style show? Classifiers in encoders' place.

Their features are a score of each class and their texts the classes' names, an axis each, so that the zero-shot label
of an image is its class. Both are fitted by `training.people`.

* Tones by colour alone: every place of a picture is skin, of the picture's tone, or anything else: a mixture of two
  histograms of colours, weighed by how often the place is skin, all three counted on artwork drawn in every tone.
* Genders by a logistic probe of the features of other encoders.
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

#: Emoji's own five, and the yellow that is none of them.
TONES = tuple(f"{tone} skin tone" for tone in ("no", "light", "medium-light", "medium", "medium-dark", "dark"))
#: What a girl and a boy are called by, too.
GENDERS = {"woman": 0, "man": 1, "girl": 0, "boy": 1}
#: Bins of each colour channel, and of each side of a picture.
BINS, SIDE = 16, 32


def colour_bins(image: torch.Tensor) -> torch.Tensor:
    """Return the bin of the mean colour at every place of an image, uint8 [3, H, W]: int64 [SIDE, SIDE]."""
    red, green, blue = F.adaptive_avg_pool2d(checked(image).float(), SIDE).long() * BINS // 256
    return (red * BINS + green) * BINS + blue


def log_likelihoods(bins: torch.Tensor, place: torch.Tensor, skin: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Return the log-likelihood of each tone, less their mean, float32 [T].

    Args:
        bins: of colours, int64 [S, S].
        place: the probability that a place is skin, [S, S].
        skin: of each tone that of a colour, where there is skin, [T, C].
        rest: that of a colour elsewhere, [C].
    """
    mixed = place * skin[:, bins] + (1 - place) * rest[bins]
    found = mixed.double().log().sum(dim=(1, 2))
    return (found - found.mean()).float()


def axes(texts: Sequence[str], known: Mapping[str, int]) -> torch.Tensor:
    """Return the axis of each named class, float32 [N, classes]; ValueError for a name that is not known."""
    if unknown := sorted({*texts} - {*known}):
        raise ValueError(f"expected labels among {', '.join(known)}, got {', '.join(unknown)}; give one of them")
    return torch.eye(max(known.values()) + 1)[[known[text] for text in texts]]


class _Fitted(Network, Encoder):
    """A classifier in a file of this project."""

    PLACE = "file"
    normalised = False

    def weights(self) -> WeightsFacts:
        files = [self.given] if self.given.is_file() else []
        return WeightsFacts.of(self.ROW, self.name, files, [self.given], found=self.given)

    def _load(self, facts: WeightsFacts) -> dict[str, torch.Tensor]:
        return {name: tensor.float() for name, tensor in load_file(facts.files[0]).items()}


class SkinTones(_Fitted):
    """The log-likelihood of each of `TONES`.

    Args:
        file: the fitted histograms.
    """

    ROW = "skin_tones"

    def __init__(self, file: str | Path, device: str = "cpu") -> None:
        super().__init__("skin tones by colour", "skin-tones", device, file)

    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([log_likelihoods(colour_bins(image), **self._network) for image in images])

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return axes(texts, {name: index for index, name in enumerate(TONES)})


class Genders(_Fitted):
    """The log-odds of woman and of man.

    Args:
        file: the fitted probe: weight [D], bias [].
        encoders: whose features it is of, one after the other.
    """

    ROW = "genders"

    def __init__(self, file: str | Path, encoders: Sequence[Encoder], device: str = "cpu") -> None:
        super().__init__("genders by a probe", "genders", device, file)
        self.encoders = list(encoders)

    @cached_property
    def id(self) -> str:
        """Of its weights and of those of the encoders."""
        parts = [self.obtain().fingerprint, *(encoder.id for encoder in self.encoders)]
        return f"{self.slug}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:12]}"

    def prepare(self) -> None:
        for part in (super(), *self.encoders):
            part.prepare()

    def parts(self) -> list[Scorer]:
        return [self, *self.encoders]

    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        features = torch.cat([encoder.embed_images(images) for encoder in self.encoders], dim=1)
        odds = features @ self._network["weight"] + self._network["bias"]
        return torch.stack([-odds, odds], dim=1)

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return axes(texts, GENDERS)
