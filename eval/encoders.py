"""Image to embedding vector: what an encoder is, and what those that are networks share.

Every encoder takes uint8 RGB images [3, H, W] and owns what follows: resize, range, normalisation. Its
embeddings are float32, on the CPU, of length 1 unless it says otherwise, and do not depend on what else is in the
batch (but for float rounding). Models are loaded at the first use, so that an encoder's `name` and `weights` can be
asked without loading anything. The CLIP models are in `eval.clip`, encoders of images alone in `eval.features`.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from eval.weights import WeightsFacts


class Scorer:
    """What a number depends on beside the images: an encoder, or whatever else compares or scores them.

    Attributes:
        name: for people, as printed in tables.
        id: identity for caches and result files: it changes when the weights do, or how images are prepared for them.
    """

    name: str
    id: str

    def features(self, given: Any) -> Any:
        """Return what a metric computes with: here images [..., 3, H, W] as a list of uint8 [3, H, W]."""
        return images_of(given)

    def of(self, images: Any, positions: Sequence[int]) -> Any:
        """Return the same of some images of an `eval.imageset.ImageSet`: here the images, a list of uint8 [3, H, W]."""
        return images.load(positions)

    def prepare(self) -> None:
        """Load the weights now, so that a missing file is found before any work is done."""

    def parts(self) -> list[Scorer]:
        """Return the scorers whose weights it needs, itself first."""
        return [self]

    def weights(self) -> WeightsFacts:
        """State the weights: which files, whether they are here, preprocessing, licence. Loads and fetches nothing."""
        return WeightsFacts.of("none", self.name)


class Pixels(Scorer):
    """The scorer of a metric that takes images as they are: there are no weights that its number could depend on."""

    name = "pixels"
    id = "pixels"


class Encoder(Scorer, ABC):
    """An image encoder, perhaps with a text tower.

    Encoders whose embeddings are columns of the same `outputs` share a `cache_id`.
    """

    #: Whether embeddings have length 1, as where cosines count; raw features, for distances of distributions, have not.
    normalised: bool = True
    #: Which columns of the outputs are the embeddings.
    columns: slice = slice(None)
    #: How many features it has, where that can be told before it is loaded.
    dimension: int | None = None

    @property
    def cache_id(self) -> str:
        """Identity of `outputs`."""
        return self.id

    def outputs(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what is kept of N images, float32 [N, C]: the embeddings, perhaps among others."""
        return self.embed_images(images)

    @abstractmethod
    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embed N RGB images, uint8 [3, H, W], whose sizes may differ: float32 [N, D], of length 1 if `normalised`."""

    def features(self, given: Any) -> Any:
        """Embed images, uint8 [..., 3, H, W] or a list of [3, H, W], or a list of texts: float32 [..., D].

        Features pass, and so does whatever else there is.
        """
        if isinstance(given, torch.Tensor):
            if given.dtype == torch.uint8 or (given.ndim > 3 and given.shape[-3] == 3):
                return self.embed_images(images_of(given)).reshape(*given.shape[:-3], -1)
        elif isinstance(given, (list, tuple)):
            texts = given and isinstance(given[0], str)
            return self.embed_texts(given) if texts else self.embed_images(images_of(given))
        return given

    def of(self, images: Any, positions: Sequence[int]) -> torch.Tensor:
        """Return the embeddings of some images of an `eval.imageset.ImageSet`, float32 [N, D]."""
        return images.embeddings(self)[positions]

    def logits_from_features(self, features: torch.Tensor) -> torch.Tensor:
        """Apply the classifier that belongs to the network: float32 [N, D] features to [N, classes] logits."""
        raise TypeError(f"expected an encoder with a classifier, got {self.name}; use Inception or EfficientNet-lite0")

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts into the images' space: float32 [N, D], each row of length 1; too long ones are cut."""
        raise TypeError(f"expected an encoder with a text tower, got {self.name}; use a CLIP model")


class Given(Scorer):
    """In the place of an encoder: features are given, and a folder of images cannot be measured."""

    name = "features as given"
    of = Encoder.of

    def features(self, given: Any) -> Any:
        if isinstance(given, (list, tuple)) or (isinstance(given, torch.Tensor) and given.dtype == torch.uint8):
            raise TypeError("expected features where there is no encoder, got images or texts; give an encoder")
        return given

    @property
    def id(self) -> str:
        raise TypeError("expected an encoder to measure a folder of images with, got None; give one")

    def prepare(self) -> None:
        _ = self.id


class PixelEncoder(Encoder):
    """The image itself, averaged down to `size` pixels a side: for smoke runs, not a perceptual measure."""

    def __init__(self, size: int = 8) -> None:
        if size < 1:
            raise ValueError(f"expected a size of at least 1 pixel, got {size}; 8 is usual")
        self.size = size
        self.name = f"pixels {size}x{size}"
        self.id = f"pixels-{size}x{size}"

    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        small = [F.adaptive_avg_pool2d(checked(image).float() / 255, self.size).flatten() for image in images]
        # The constant gives a black image a direction, too.
        return F.normalize(torch.stack([torch.cat([pixels, torch.ones(1)]) for pixels in small]), dim=-1)

    def weights(self) -> WeightsFacts:
        return WeightsFacts.of("pixels", self.name, size=self.size)


# What loaders raise for a file that is cut off, damaged or of another network.
UNREADABLE = (RuntimeError, KeyError, TypeError, ValueError, OSError, EOFError, pickle.UnpicklingError, SafetensorError)


#: Fetches that failed in this process, by what was wanted for whom and where, with what was said.
_failed: dict[tuple[str, str, tuple[Path, ...]], str] = {}


class Network(Scorer, ABC):
    """Something with weights: they are found or fetched, and loaded once, when they are first needed.

    Attributes:
        ROW: its row in `weights.yaml`.
        PLACE: the argument that names another place of its weights; empty where there is none.
        slug: what it is, the beginning of its `id`.
        device: where it runs.
        given: the file or folder that the user named; None where the usual places are searched.
        values: what stands for the braces in the row's texts.
    """

    ROW: ClassVar[str]
    PLACE: ClassVar[str] = ""

    def __init__(self, name: str, slug: str, device: str, given: str | Path | None = None, **values: Any) -> None:
        self.name = name
        self.slug = slug
        self.device = torch.device(device)
        self.given = None if given is None else Path(given).expanduser()
        self.values = values

    @cached_property
    def id(self) -> str:
        """What it is and the fingerprint of its weights, which are fetched if they are missing."""
        return f"{self.slug}-{self.obtain().fingerprint}"

    def prepare(self) -> None:
        _ = self._network

    def weights(self) -> WeightsFacts:
        return WeightsFacts.find(self.ROW, self.name, self.given, **self.values)

    def obtain(self) -> WeightsFacts:
        """Fetch the weights if they are missing, and return their facts; FileNotFoundError if that fails or failed."""
        facts = self.weights()
        if facts.present:
            return facts
        key = (facts.encoder, facts.source, facts.looked_in)
        if key in _failed:
            raise FileNotFoundError(_failed[key])
        try:
            self._fetch(facts)
        except FileNotFoundError as error:
            _failed[key] = str(error)
            raise
        facts = self.weights()
        if not facts.present:
            raise facts.missing("a file is lacking in what was downloaded")
        return facts

    def can_be_fetched(self, facts: WeightsFacts) -> bool:
        """Tell whether a download of missing weights can be tried."""
        return (facts.url or facts.hub) is not None

    def _fetch(self, facts: WeightsFacts) -> None:
        facts.fetch()

    @cached_property
    def _network(self) -> Any:
        facts = self.obtain()
        try:
            return self._load(facts)
        except UNREADABLE as error:
            files = ", ".join(str(file) for file in facts.files)
            # torch's own text on a file that is more than tensors advises to run whatever is in it
            unsafe = isinstance(error, pickle.UnpicklingError)
            reason = "not a file of tensors alone" if unsafe else str(error).partition("\n")[0]
            raise ValueError(
                f"expected the weights of {self.name} in {files}, got what cannot be loaded on {self.device} "
                f"({reason}); {facts.how_to_get}"
            ) from error

    @abstractmethod
    def _load(self, facts: WeightsFacts) -> Any:
        """Return the network in float32 on the device, ready for inference, and what else it needs."""


class ImageNetwork(Network, Encoder):
    """An encoder that is a network: images that are of one size and follow each other go through it together."""

    @torch.inference_mode()
    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        self.prepare()
        pixels = (self._preprocess(checked(image)) for image in images)
        batches = (torch.stack(list(alike)) for _, alike in groupby(pixels, lambda tensor: tensor.shape))
        rows = torch.cat([self._features(batch.to(self.device)).float().cpu() for batch in batches])
        return F.normalize(rows, dim=-1) if self.normalised else rows

    @abstractmethod
    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        """Return the network's input [3, h, w], float32, on the CPU, for uint8 [3, H, W]."""

    @abstractmethod
    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return [N, D] for [N, 3, h, w] on the device."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' bars: one for a model that loads in a moment only hides the real ones."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def images_of(given: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return images, uint8 [..., 3, H, W] or a sequence of [3, H, W] of any sizes, as a list of at least one."""
    if isinstance(given, torch.Tensor) and given.ndim > 2:
        given = given[None].flatten(0, -4)
    images = [checked(image) for image in given]
    if not images:
        raise ValueError("expected at least one image or text, got none; give some")
    return images


def checked(image: torch.Tensor) -> torch.Tensor:
    """Return `image` if it is uint8 RGB [3, H, W], else raise ValueError."""
    if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
        raise ValueError(f"expected uint8 images [3, H, W], got {got}; read them with load_image")
    return image


def unit_vectors(embeddings: torch.Tensor) -> torch.Tensor:
    """Bring embeddings [..., D] to length 1, in float64; those that are not finite or zero are a ValueError."""
    norms = embeddings.double().norm(dim=-1)
    if not torch.isfinite(norms).all() or (norms == 0).any():
        raise ValueError("expected finite embeddings that are not zero, got others; cosine is undefined for them")
    return F.normalize(embeddings.double(), dim=-1)
