"""Protected concepts: a folder of their reference images, and which of these a prompt or an image comes nearest to."""

import functools
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from eval.encoders import Encoder
from eval.files import content_hash
from eval.images import load_image, read_manifest
from eval.resemblance import DetectionRate, calibrate_threshold, similarities
from experiments.prompts import Group, PromptSet

#: What `Retriever` compares with the reference images.
QUERIES = ("prompt", "preview")
#: Stands before the suffix in the name of a mask's file, after the name of its image.
MASK = ".mask"
#: Correlation of two thumbnails above which one image is taken for a copy of the other. In models/mini-protected, other
#: artists' drawings of one emoji reach 0.86; copies after JPEG, resizing, mirroring or a turn by 3 degrees stay above
#: 0.95.
COPY = 0.94


@dataclass(frozen=True)
class Asset:
    """One reference image of a protected concept.

    Attributes:
        name: the concept's, which is the name of the subfolder.
        file: the image.
        mask_file: its mask, white where the concept is; None without a mask.
    """

    name: str
    file: Path
    mask_file: Path | None

    @property
    def label(self) -> str:
        """Concept and file name, for the manifest."""
        return f"{self.name}/{self.file.name}"

    @property
    def image(self) -> torch.Tensor:
        """uint8 [3, H, W]."""
        return load_image(self.file)

    @property
    def mask(self) -> torch.Tensor | None:
        """Where the concept is, bool [H, W]; None: everywhere."""
        return None if self.mask_file is None else load_image(self.mask_file)[0] > 127


def read_assets(folder: str | Path | None, scoring: str | Path | None = None) -> list[Asset]:
    """List the images of a folder with one subfolder a concept: NAME/*.png, each with its NAME/*.mask.png if any.

    Args:
        folder: of the images.
        scoring: folder of the images that similarity is measured to, none of which may be in `folder`; None: unchecked.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is empty, or an image cannot be read or is an animation, or a mask is empty, has no image or
            another size, or an image is scored against (see `check_disjoint`).
    """
    if folder is None:
        raise FileNotFoundError(
            "No protected assets are configured: give your own pictures, one subfolder a character, as "
            "model.copyright.guidance=FOLDER (what methods are given) and other pictures of the same characters as "
            "model.copyright.scoring=FOLDER (what is measured)"
        )
    files = {Path(folder) / row.path: row.category for row in read_manifest(folder)}
    masks = {file for file in files if file.stem.endswith(MASK)}
    mask_of = {file: file.with_name(f"{file.stem}{MASK}.png") for file in files}
    assets = [
        Asset(name, file, mask_of[file] if mask_of[file] in masks else None)
        for file, name in files.items()
        if file not in masks
    ]
    for asset in assets:
        _check(asset)
    unused = masks - {asset.mask_file for asset in assets}
    if unused:
        raise ValueError(f"Masks without a picture: {sorted(map(str, unused))}; name a mask PICTURE{MASK}.png")
    if scoring is not None:
        check_disjoint(assets, scoring)
    return assets


def assets_hash(assets: Sequence[Asset]) -> str:
    """Return a digest of images and masks that does not depend on where they lie."""
    files = [[asset.label, *(content_hash(file) for file in (asset.file, asset.mask_file) if file)] for asset in assets]
    return hashlib.sha256(str(files).encode()).hexdigest()


def _check(asset: Asset) -> None:
    """Read an image and its mask once, so that a bad one is named before anything is generated."""
    size, mask = tuple(asset.image.shape[1:]), asset.mask
    if mask is not None and mask.shape != size:
        raise ValueError(
            f"{asset.mask_file} is a mask of {tuple(mask.shape)} pixels for a picture of {size}: draw it on that very "
            "picture"
        )
    if mask is not None and not mask.any():
        raise ValueError(
            f"{asset.mask_file} is an empty mask, so that nothing could be matched: paint white what is to be avoided, "
            "or remove the file, and the whole picture counts"
        )


def check_disjoint(assets: Sequence[Asset], scoring: str | Path) -> None:
    """Refuse images of which a copy is among the images that similarity is measured to.

    Otherwise the measurement tells only whether a method avoids those very images. Copies have the same pixels, or are
    stored in another format, resized, mirrored, brightened or otherwise changed a little. Crops are not found.

    Raises:
        ValueError: there are copies; the message names them.
    """
    files = [asset.file for asset in assets]
    scored_files = [Path(scoring) / row.path for row in read_manifest(scoring)]
    thumbnails, digests = zip(*map(_fingerprint, files), strict=True)
    scored_thumbnails, scored_digests = zip(*map(_fingerprint, scored_files), strict=True)
    small, scored = torch.stack(thumbnails), torch.stack(scored_thumbnails).flatten(1).T
    correlation = torch.maximum(small.flatten(1) @ scored, small.flip(3).flatten(1) @ scored)  # upright and mirrored
    copies = correlation > COPY
    for place, digest in enumerate(digests):
        copies[place] |= torch.tensor([other == digest for other in scored_digests])
    pairs = [(files[place], scored_files[other]) for place, other in copies.nonzero().tolist()]
    if pairs:
        shown = "; ".join(f"{file} = {other}" for file, other in pairs[:5])
        raise ValueError(
            f"{len({file for file, _ in pairs})} of the pictures that methods are given are also scored against: "
            f"{shown}, as copies or themselves. Keep some pictures of each asset for scoring alone"
        )


def count_shared(files: Sequence[Path], folder: str | Path) -> int:
    """Count the images whose content a folder has too."""
    theirs = {content_hash(Path(folder) / row.path) for row in read_manifest(folder)}
    return sum(content_hash(file) in theirs for file in files)


def near_copies(files: Sequence[Path]) -> list[list[Path]]:
    """Group images with their near copies, as `check_disjoint` finds them; groups and images keep their order."""
    thumbnails, digests = zip(*map(_fingerprint, files), strict=True)
    small = torch.stack(thumbnails)
    flat = small.flatten(1)
    alike = torch.maximum(flat @ flat.T, small.flip(3).flatten(1) @ flat.T) > COPY
    groups: list[list[int]] = []
    for place, digest in enumerate(digests):
        near = [group for group in groups if any(alike[place, other] or digest == digests[other] for other in group)]
        groups = [group for group in groups if group not in near]
        groups.append([*(other for group in near for other in group), place])
    return [[files[place] for place in sorted(group)] for group in sorted(groups, key=min)]


def _fingerprint(file: Path) -> tuple[torch.Tensor, str]:
    """Return an image's thumbnail, and a digest of its pixels, which finds copies of an image of one colour.

    The thumbnail has 16 x 16 pixels [3, 16, 16] less each channel's mean, and length 1, or zeros for one colour alone:
    the product of two is their correlation, which size, format, brightness and contrast change little. Images are read
    one at a time, since the full-size images of a folder do not fit into memory together.
    """
    image = load_image(file)
    pixels = hashlib.sha256(str(tuple(image.shape)).encode() + image.numpy().tobytes()).hexdigest()
    small = F.adaptive_avg_pool2d(image.float(), 16)
    small = small - small.mean(dim=(1, 2), keepdim=True)
    return small / small.norm() if small.norm() > 1 else torch.zeros_like(small), pixels


#: Embeddings of this process, by encoder and contents of the images.
_EMBEDDINGS: dict[tuple[str, ...], torch.Tensor] = {}


class AssetIndex:
    """The reference images of protected concepts in a folder, and which of them images or texts come nearest to.

    Indexes of the same images and the same encoder share their embeddings.

    Args:
        folder, scoring: see `read_assets`.
        encoder: embeds the reference images.

    Raises:
        FileNotFoundError, ValueError: see `read_assets`.
    """

    def __init__(self, folder: str | Path | None, encoder: Encoder, scoring: str | Path | None = None) -> None:
        self.assets = read_assets(folder, scoring)
        self.encoder = encoder

    @functools.cached_property
    def concepts(self) -> frozenset[str]:
        """Names of the protected concepts that have images."""
        return frozenset(asset.name for asset in self.assets)

    @functools.cached_property
    def embeddings(self) -> torch.Tensor:
        """Embeddings of the images, float32 [number of images, D], of length 1."""
        key = (self.encoder.id, *(content_hash(asset.file) for asset in self.assets))
        if key not in _EMBEDDINGS:
            _EMBEDDINGS[key] = self.encoder.embed_images([asset.image for asset in self.assets])
        return _EMBEDDINGS[key]

    def settings(self, concepts: Collection[str] | None = None) -> dict[str, Any]:
        """Return what affects the cosines with the images of some concepts (None: all), as JSON values."""
        assets = [self.assets[place] for place in self._places(concepts)]
        return {"assets_sha256": assets_hash(assets), "encoder": self.encoder.id}

    def nearest(self, queries: torch.Tensor, concepts: Collection[str] | None = None) -> list[tuple[Asset, float]]:
        """Return the images of some concepts (None: all), each with its largest cosine, the nearest first.

        Args:
            queries: embeddings, [N, D]; the largest cosine of an image is over all N.
            concepts: names; others than those of the folder are ignored.
        """
        places = self._places(concepts)
        if not places:
            return []
        scores = similarities(queries, self.embeddings[places]).amax(dim=0).tolist()
        pairs = [(self.assets[place], score) for place, score in zip(places, scores, strict=True)]
        return sorted(pairs, key=lambda pair: -pair[1])

    def calibrate(
        self, negatives: torch.Tensor, false_positive_rate: float, concepts: Collection[str] | None = None
    ) -> float:
        """Return the cosine that a further query without any concept exceeds with at most the given probability.

        Args:
            negatives: embeddings of queries that show or ask for none of the concepts, [N, D].
            false_positive_rate: in (0, 1); see `eval.resemblance.calibrate_threshold`.
            concepts: see `nearest`.

        Raises:
            ValueError: there are too few negatives for the rate.
        """
        cosines = similarities(negatives, self.embeddings[self._places(concepts)])
        return calibrate_threshold(cosines.amax(dim=1), false_positive_rate)

    def without_concepts(self, held_out: str | Path) -> list[Path]:
        """List the images of a folder, without its subfolders that are named like a concept of the index."""
        return [Path(held_out) / row.path for row in read_manifest(held_out) if row.category not in self.concepts]

    def shared_with(self, evaluator: DetectionRate) -> list[str]:
        """Return what the index has in common with an evaluator: the encoder, and a number of reference images.

        Encoders are compared by their weights, images by their content. The list is empty if both are independent.
        """
        encoders = {part.id for part in self.encoder.parts()} & {part.id for part in evaluator.encoder.parts()}
        count = count_shared([asset.file for asset in self.assets], evaluator.folder("references"))
        shared = [f"the encoder {min(encoders)}"] if encoders else []
        return [*shared, f"{count} reference images"] if count else shared

    def _places(self, concepts: Collection[str] | None) -> list[int]:
        return [place for place, asset in enumerate(self.assets) if concepts is None or asset.name in concepts]


class Retriever:
    """Finds the protected concept that a prompt, or a preview of what it makes, comes nearest to.

    A query takes the concept of the nearest image, if its cosine is above the query's threshold. The preview is made
    only if the prompt itself finds nothing.

    Args:
        folder, scoring: see `read_assets`.
        encoder: embeds images; for the query "prompt", texts too.
        thresholds: for each query a cosine in [-1, 1], or None to leave the query out. "prompt": the cosine of the
            prompt's text with an image; "auto" calibrates it on `ordinary`. "preview": the cosine of an image, which
            the pipeline makes of the prompt beforehand from the group's first seed, with an image.
        ordinary: prompts that ask for no concept.
        false_positive_rate: in (0, 1); "auto" is the threshold that a further ordinary prompt exceeds with at most this
            probability.
        preview_steps: denoising steps of the preview.

    Raises:
        FileNotFoundError: there are no images.
        ValueError: the images cannot be read, or are scored against, or a setting is out of range.
    """

    def __init__(
        self,
        folder: str | Path | None,
        encoder: Encoder,
        thresholds: Mapping[str, float | str | None],
        ordinary: PromptSet | None = None,
        false_positive_rate: float = 0.05,
        preview_steps: int = 8,
        scoring: str | Path | None = None,
    ) -> None:
        self._thresholds = {query: value for query, value in thresholds.items() if value is not None}
        if not self._thresholds or not set(self._thresholds) <= set(QUERIES):
            raise ValueError(
                f"retriever.thresholds must be given for at least one of {QUERIES}, got {dict(thresholds)}"
            )
        if self._thresholds.get("prompt") == "auto" and ordinary is None:
            raise ValueError("retriever.thresholds.prompt=auto needs retriever.ordinary, prompts that ask for no asset")
        for query, value in self._thresholds.items():
            if (query, value) != ("prompt", "auto") and not (isinstance(value, (int, float)) and -1 <= value <= 1):
                raise ValueError(f"retriever.thresholds.{query} must be a cosine in [-1, 1], got {value!r}")
        self.index = AssetIndex(folder, encoder, scoring)
        self.encoder = encoder
        self.preview_steps = preview_steps
        self._ordinary = ordinary
        self._false_positive_rate = false_positive_rate

    @property
    def assets(self) -> list[Asset]:
        return self.index.assets

    @functools.cached_property
    def thresholds(self) -> dict[str, float]:
        """The cosine that each query must exceed, with a number in place of "auto"."""
        values = dict(self._thresholds)
        if values.get("prompt") == "auto":
            texts = self.encoder.embed_texts([prompt for _, prompt in self._ordinary.prompts()])
            values["prompt"] = round(self.index.calibrate(texts, self._false_positive_rate), 4)
        return {query: float(values[query]) for query in QUERIES if query in values}

    def settings(self) -> dict[str, Any]:
        """Return what affects the choice, as JSON values."""
        preview = {"preview_steps": self.preview_steps} if "preview" in self.thresholds else {}
        return {**self.index.settings(), "thresholds": self.thresholds, **preview}

    def find(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> list[tuple[Asset, float]]:
        """Return the images of the concept nearest to a group's prompt, each with its cosine, the nearest first.

        Empty where none is above the threshold.
        """
        pictures = self.of_prompt(group.prompt) if "prompt" in self.thresholds else []
        if pictures or "preview" not in self.thresholds:
            return pictures
        generator = torch.Generator().manual_seed(group.image_seeds()[0])
        preview = pipe(group.prompt, generator=generator, **{**call, "num_inference_steps": self.preview_steps})
        pixels = torch.from_numpy(np.array(preview.images[0].convert("RGB"))).permute(2, 0, 1)
        return self._nearest_concept(self.encoder.embed_images([pixels]), self.thresholds["preview"])

    def of_prompt(self, prompt: str, names: Collection[str] | None = None) -> list[tuple[Asset, float]]:
        """Return as `find` does, by the prompt's text alone and among the concepts of these names, or all.

        Raises:
            KeyError: the query "prompt" is left out.
        """
        return self._nearest_concept(self.encoder.embed_texts([prompt]), self.thresholds["prompt"], names)

    def _nearest_concept(
        self, query: torch.Tensor, threshold: float, names: Collection[str] | None = None
    ) -> list[tuple[Asset, float]]:
        pairs = self.index.nearest(query, names)
        if not pairs or pairs[0][1] <= threshold:
            return []
        return [(asset, score) for asset, score in pairs if asset.name == pairs[0][0].name]


class NamedAssets:
    """Finds the images of the concept that a group names: a `Retriever` for a group on which a guard has decided.

    Args:
        folder, scoring: see `read_assets`.

    Raises:
        FileNotFoundError, ValueError: see `read_assets`.
    """

    def __init__(self, folder: str | Path | None, scoring: str | Path | None = None) -> None:
        self.assets = read_assets(folder, scoring)

    def settings(self) -> dict[str, Any]:
        """Return what affects the choice, as JSON values."""
        return {"assets_sha256": assets_hash(self.assets), "by": "name"}

    def find(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> list[tuple[Asset, float]]:
        """Return the images of the group's concept, each with the cosine 1.

        Raises:
            ValueError: the concept has no images.
        """
        pictures = [(asset, 1.0) for asset in self.assets if asset.name == group.concept]
        if not pictures:
            raise ValueError(f"expected pictures of the asset {group.concept!r}, got none: add a folder of that name")
        return pictures
