"""The base classes of encoders, which turn uint8 RGB images [3, H, W] into embedding vectors.

An encoder resizes and normalises images itself. Embeddings are float32 on the CPU and do not depend on the other images
of a batch, except for rounding. Models are loaded at first use. `eval.clip` has CLIP models, `eval.features` the rest.
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

from eval.weights import Download, WeightsFacts


class Scorer:
    """A component that embeds, compares or scores the images of a metric.

    Attributes:
        name: name in tables.
        id: identifier in caches and documents; it changes with the weights and with the preparation of images.
    """

    name: str
    id: str

    def features(self, inputs: Any) -> Any:
        """Return the inputs of `eval.metric.Metric.score`: here images [..., 3, H, W] as a list of uint8 [3, H, W]."""
        return images_of(inputs)

    def of(self, images: Any, positions: Sequence[int]) -> Any:
        """Return the `features` of some images of an `eval.imageset.ImageSet`."""
        return images.load(positions)

    def prepare(self) -> None:
        """Load the weights, so that a missing file is reported before any work is done."""

    def parts(self) -> list[Scorer]:
        """Return the scorers whose weights this one needs, itself first."""
        return [self]

    def weights(self) -> WeightsFacts:
        """Describe the weights without loading or downloading them."""
        return WeightsFacts.of("none", self.name)


class Pixels(Scorer):
    """The scorer of a metric that takes the images themselves and needs no weights."""

    name = "pixels"
    id = "pixels"


class Encoder(Scorer, ABC):
    """An image encoder; CLIP models embed texts too.

    Attributes:
        normalised: whether embeddings have length 1 (for cosines) or are raw (for distances of distributions).
        columns: the columns of `outputs` that are the embeddings.
        dimension: number of features, if it is known before the network is loaded.
        cache_id: identifier of `outputs` in the cache; encoders with the same outputs share it.
    """

    normalised: bool = True
    columns: slice = slice(None)
    dimension: int | None = None

    @property
    def cache_id(self) -> str:
        return self.id

    def outputs(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the cached values of N images, float32 [N, C], whose `columns` are the embeddings."""
        return self.embed_images(images)

    @abstractmethod
    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embed N RGB images, uint8 [3, H, W] of any sizes: float32 [N, D], of length 1 if `normalised`."""

    def features(self, inputs: Any) -> Any:
        """Embed images, uint8 [..., 3, H, W] or a list of [3, H, W], or a list of texts: float32 [..., D].

        Other inputs, such as features, are returned unchanged.
        """
        if isinstance(inputs, torch.Tensor):
            if inputs.dtype == torch.uint8 or (inputs.ndim > 3 and inputs.shape[-3] == 3):
                return self.embed_images(images_of(inputs)).reshape(*inputs.shape[:-3], -1)
        elif isinstance(inputs, (list, tuple)):
            texts = inputs and isinstance(inputs[0], str)
            return self.embed_texts(inputs) if texts else self.embed_images(images_of(inputs))
        return inputs

    def of(self, images: Any, positions: Sequence[int]) -> torch.Tensor:
        return images.embeddings(self)[positions]

    def logits_from_features(self, features: torch.Tensor) -> torch.Tensor:
        """Apply the network's classifier to features [N, D]: float32 [N, classes]."""
        raise TypeError(f"expected an encoder with a classifier, got {self.name}; use Inception or EfficientNet-lite0")

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts into the space of the images, truncated if they are too long: float32 [N, D], of length 1."""
        raise TypeError(f"expected an encoder with a text tower, got {self.name}; use a CLIP model")


class PrecomputedFeatures(Scorer):
    """The scorer of a metric without an encoder: the caller passes features and cannot measure a folder of images."""

    name = "precomputed features"
    of = Encoder.of

    def features(self, inputs: Any) -> Any:
        if isinstance(inputs, (list, tuple)) or (isinstance(inputs, torch.Tensor) and inputs.dtype == torch.uint8):
            raise TypeError("expected features where there is no encoder, got images or texts; give an encoder")
        return inputs

    @property
    def id(self) -> str:
        raise TypeError("expected an encoder to measure a folder of images with, got None; give one")

    def prepare(self) -> None:
        _ = self.id


class PixelEncoder(Encoder):
    """The image itself, averaged to `size` x `size` pixels: for smoke tests, not a perceptual measure."""

    def __init__(self, size: int = 8) -> None:
        if size < 1:
            raise ValueError(f"expected a size of at least 1 pixel, got {size}; 8 is usual")
        self.size = size
        self.name = f"pixels {size}x{size}"
        self.id = f"pixels-{size}x{size}"

    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        small = [F.adaptive_avg_pool2d(checked(image).float() / 255, self.size).flatten() for image in images]
        # The constant gives a black image a direction too.
        return F.normalize(torch.stack([torch.cat([pixels, torch.ones(1)]) for pixels in small]), dim=-1)

    def weights(self) -> WeightsFacts:
        return WeightsFacts.of("pixels", self.name, size=self.size)


# Exceptions that loaders raise for a file that is truncated, damaged or of another network.
UNREADABLE = (
    RuntimeError, LookupError, TypeError, ValueError, OSError, EOFError, pickle.UnpicklingError, SafetensorError,
)  # fmt: skip
# Messages of the downloads that failed in this process, by encoder, source and paths; none is tried again.
_failed: dict[tuple[str, str, tuple[Path, ...]], str] = {}


class Network(Scorer, ABC):
    """A scorer with weights, which are found or downloaded, and loaded at first use.

    Attributes:
        ROW: key of the network in `weights.yaml`.
        PLACE: name of the argument for the path of the weights; empty if there is no such argument.
        slug: the beginning of `id`.
        path: the file or folder that the user named; None to search the publishers' default locations.
        values: values for the braces in the texts of `weights.yaml`.
    """

    ROW: ClassVar[str]
    PLACE: ClassVar[str] = ""

    def __init__(self, name: str, slug: str, device: str, path: str | Path | None = None, **values: Any) -> None:
        self.name = name
        self.slug = slug
        self.device = torch.device(device)
        self.path = None if path is None else Path(path).expanduser()
        self.values = values

    @cached_property
    def id(self) -> str:
        """The slug and the fingerprint of the weights, which are downloaded if they are missing."""
        return f"{self.slug}-{self.obtain().fingerprint}"

    def prepare(self) -> None:
        _ = self._network

    def weights(self) -> WeightsFacts:
        return WeightsFacts.find(self.ROW, self.name, self.path, **self.values)

    def obtain(self) -> WeightsFacts:
        """Download the weights if they are missing, and describe them; raise FileNotFoundError if that fails."""
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

    def downloads(self, facts: WeightsFacts) -> list[Download]:
        """Return what `obtain` downloads if weights are missing; [] if nothing can be downloaded."""
        if facts.url:
            return [Download(facts.url)]
        if facts.hub:
            return [Download(facts.hub["repo_id"], tuple(facts.hub["allow_patterns"]), facts.hub["revision"])]
        return []

    def _fetch(self, facts: WeightsFacts) -> None:
        facts.fetch()

    @cached_property
    def _network(self) -> Any:
        facts = self.obtain()
        try:
            return self._load(facts)
        except UNREADABLE as error:
            files = ", ".join(str(file) for file in facts.files)
            # torch's own message about such a file advises the user to run the code in it
            unsafe = isinstance(error, pickle.UnpicklingError)
            reason = "not a file of tensors alone" if unsafe else str(error).partition("\n")[0]
            raise ValueError(
                f"expected the weights of {self.name} in {files}, got what cannot be loaded on {self.device} "
                f"({reason}); {facts.how_to_get}"
            ) from error

    @abstractmethod
    def _load(self, facts: WeightsFacts) -> Any:
        """Return the network, in float32 on the device and in evaluation mode, and whatever else it needs."""


class ImageNetwork(Network, Encoder):
    """An encoder that is a network; it processes consecutive images of one size together."""

    @torch.inference_mode()
    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        self.prepare()
        pixels = (self._preprocess(checked(image)) for image in images)
        batches = (torch.stack(list(alike)) for _, alike in groupby(pixels, lambda tensor: tensor.shape))
        rows = torch.cat([self._features(batch.to(self.device)).float().cpu() for batch in batches])
        return F.normalize(rows, dim=-1) if self.normalised else rows

    @abstractmethod
    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        """Return the network's input, float32 [3, h, w] on the CPU, for an image, uint8 [3, H, W]."""

    @abstractmethod
    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features [N, D] of inputs [N, 3, h, w] on the device."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the progress bars of transformers for the loading of a small model."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def images_of(inputs: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return images, uint8 [..., 3, H, W] or a sequence of [3, H, W] of any sizes, as a list of at least one image."""
    if isinstance(inputs, torch.Tensor) and inputs.ndim > 2:
        inputs = inputs[None].flatten(0, -4)
    images = [checked(image) for image in inputs]
    if not images:
        raise ValueError("expected at least one image or text, got none; give some")
    return images


def checked(image: torch.Tensor) -> torch.Tensor:
    """Return an image if it is uint8 RGB [3, H, W]; raise ValueError otherwise."""
    if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
        raise ValueError(f"expected uint8 images [3, H, W], got {got}; read them with load_image")
    return image


def unit_vectors(embeddings: torch.Tensor) -> torch.Tensor:
    """Scale embeddings [..., D] to length 1, in float64; raise ValueError if one is zero or not finite."""
    norms = embeddings.double().norm(dim=-1)
    if not torch.isfinite(norms).all() or (norms == 0).any():
        raise ValueError("expected finite embeddings that are not zero, got others; cosine is undefined for them")
    return F.normalize(embeddings.double(), dim=-1)
