"""Protected assets: a folder of pictures to stay away from, and which of them a prompt comes nearest to."""

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
from eval.resemblance import calibrate_threshold
from experiments.prompts import Group, PromptSet

#: What is compared with the assets; see `Retriever`.
QUERIES = ("prompt", "preview")
#: What a mask's file is called: that of its image, with this before the suffix.
MASK = ".mask"
#: Correlation of two reduced pictures above which one is taken for a copy of the other. Of models/mini-protected, other
#: artists' drawings of one emoji reach 0.86; copies after JPEG, resizing, mirroring, 3 degrees' turn stay above 0.95.
COPY = 0.94


@dataclass(frozen=True)
class Asset:
    """One picture of a protected asset.

    Attributes:
        name: the asset's, that of its subfolder.
        file: the picture.
        mask_file: its mask, where there is one: white where the asset is.
    """

    name: str
    file: Path
    mask_file: Path | None

    @property
    def label(self) -> str:
        """Name and file, for the manifest."""
        return f"{self.name}/{self.file.name}"

    @property
    def image(self) -> torch.Tensor:
        """uint8 [3, H, W]."""
        return load_image(self.file)

    @property
    def mask(self) -> torch.Tensor | None:
        """Where the asset is, bool [H, W], or None: everywhere."""
        return None if self.mask_file is None else load_image(self.mask_file)[0] > 127


def read_assets(folder: str | Path | None) -> list[Asset]:
    """List the pictures of a folder with one subfolder an asset: NAME/*.png, each with its NAME/*.mask.png if any.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is empty, or a picture cannot be read or is an animation, or a mask is empty, has no picture or
            another size.
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
    return assets


def assets_hash(assets: Sequence[Asset]) -> str:
    """Identify assets by their content, wherever they lie."""
    files = [[asset.label, *(content_hash(file) for file in (asset.file, asset.mask_file) if file)] for asset in assets]
    return hashlib.sha256(str(files).encode()).hexdigest()


def _check(asset: Asset) -> None:
    """Read an asset's picture and mask once, so that a bad one is named before anything is generated."""
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
    """Refuse assets of which a copy is among the pictures that similarity is measured to.

    A method would only be asked whether it avoids those very pictures. Copies are found by their content: the same
    pixels, and what was stored in another format, resized, mirrored, brightened or otherwise changed a little; not
    what was cut out of a picture.

    Raises:
        ValueError: with the pairs.
    """
    scored = [Path(scoring) / row.path for row in read_manifest(scoring)]
    given, pixels = zip(*(_looked_at(asset.file) for asset in assets), strict=True)
    theirs, others = zip(*(_looked_at(file) for file in scored), strict=True)
    small, there = torch.stack(given), torch.stack(theirs).flatten(1).T
    alike = torch.maximum(small.flatten(1) @ there, small.flip(3).flatten(1) @ there)  # as it is, and mirrored
    found = [
        (asset.file, file)
        for asset, same, row in zip(assets, pixels, alike.tolist(), strict=True)
        for file, other, score in zip(scored, others, row, strict=True)
        if score > COPY or same == other
    ]
    if found:
        pairs = "; ".join(f"{asset} = {other}" for asset, other in found[:5])
        raise ValueError(
            f"{len({asset for asset, _ in found})} of the pictures that methods are given are also scored against: "
            f"{pairs}, as copies or themselves. Keep some pictures of each asset for scoring alone"
        )


def _looked_at(file: Path) -> tuple[torch.Tensor, str]:
    """Return a picture reduced, and a digest of its pixels, which one colour alone needs.

    It is reduced to 16 x 16 pixels [3, 16, 16] less each channel's mean, of length 1, or zeros for one colour alone:
    the product of two is their correlation, which neither size nor format, brightness nor contrast changes much. The
    pictures of a folder of full size do not fit into memory together.
    """
    image = load_image(file)
    pixels = hashlib.sha256(str(tuple(image.shape)).encode() + image.numpy().tobytes()).hexdigest()
    small = F.adaptive_avg_pool2d(image.float(), 16)
    small = small - small.mean(dim=(1, 2), keepdim=True)
    return small / small.norm() if small.norm() > 1 else torch.zeros_like(small), pixels


class Retriever:
    """Finds the protected assets that a prompt, or a preview of what it makes, comes nearest to.

    A query takes the asset of the nearest picture, if its cosine is above the query's threshold; the prompt is asked
    first, and the preview only if nothing was found by it.

    Args:
        folder: of the assets; see `read_assets`.
        encoder: what compares; one that embeds texts too for the prompt.
        thresholds: for each query, in [-1, 1], or None to leave it out. "prompt": the cosine of the prompt's text with
            a picture; "auto" calibrates it on `ordinary`. "preview": the cosine with a picture which the pipeline makes
            of the prompt beforehand, from the group's first noise.
        ordinary: prompts that ask for no asset. "auto" is the threshold that a further one exceeds with a probability
            of at most `false_positive_rate` (`eval.resemblance.calibrate_threshold`).
        false_positive_rate: in (0, 1).
        preview_steps: denoising steps of the preview.
        scoring: the pictures that similarity is measured to, none of which may be among the assets; None: unchecked.

    Raises:
        FileNotFoundError: there are no assets.
        ValueError: the assets cannot be read, or are scored against, or a setting is out of range.
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
        asked = {query: value for query, value in thresholds.items() if value is not None}
        if not asked or not set(asked) <= set(QUERIES):
            raise ValueError(
                f"retriever.thresholds must be given for at least one of {QUERIES}, got {dict(thresholds)}"
            )
        if asked.get("prompt") == "auto" and ordinary is None:
            raise ValueError("retriever.thresholds.prompt=auto needs retriever.ordinary, prompts that ask for no asset")
        for query, value in asked.items():
            if (query, value) != ("prompt", "auto") and not (isinstance(value, (int, float)) and -1 <= value <= 1):
                raise ValueError(f"retriever.thresholds.{query} must be a cosine in [-1, 1], got {value!r}")
        self.assets = read_assets(folder)
        if scoring is not None:
            check_disjoint(self.assets, scoring)
        self.encoder = encoder
        self.preview_steps = preview_steps
        self._asked = asked
        self._ordinary = ordinary
        self._false_positive_rate = false_positive_rate

    @functools.cached_property
    def thresholds(self) -> dict[str, float]:
        """The cosine that each query must exceed, "auto" worked out."""
        found = dict(self._asked)
        if found.get("prompt") == "auto":
            texts = [prompt for _, prompt in self._ordinary.prompts()]
            nearest = (self.encoder.embed_texts(texts) @ self._index.T).amax(dim=1)
            found["prompt"] = round(calibrate_threshold(nearest, self._false_positive_rate), 4)
        return {query: float(found[query]) for query in QUERIES if query in found}

    def settings(self) -> dict[str, Any]:
        """Return what affects the choice, as JSON values."""
        return {
            "assets_sha256": assets_hash(self.assets),
            "encoder": self.encoder.id,
            "thresholds": self.thresholds,
            **({"preview_steps": self.preview_steps} if "preview" in self.thresholds else {}),
        }

    def find(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> list[tuple[Asset, float]]:
        """Return the pictures of the asset nearest to a group's prompt, each with its cosine, the nearest first.

        Empty where none is above the threshold.
        """
        found = self.of_prompt(group.prompt) if "prompt" in self.thresholds else []
        if not found and "preview" in self.thresholds:
            generator = torch.Generator().manual_seed(group.image_seeds()[0])
            preview = pipe(group.prompt, generator=generator, **{**call, "num_inference_steps": self.preview_steps})
            pixels = torch.from_numpy(np.array(preview.images[0].convert("RGB"))).permute(2, 0, 1)
            found = self._nearest(self.encoder.embed_images([pixels]), self.thresholds["preview"])
        return found

    def of_prompt(self, prompt: str, names: Collection[str] | None = None) -> list[tuple[Asset, float]]:
        """Return as `find` does by the prompt's text alone, among the assets of these names, or all.

        Raises:
            KeyError: there is no threshold for it.
        """
        return self._nearest(self.encoder.embed_texts([prompt]), self.thresholds["prompt"], names)

    def _nearest(
        self, query: torch.Tensor, threshold: float, names: Collection[str] | None = None
    ) -> list[tuple[Asset, float]]:
        """Return the pictures of the asset nearest to a query [1, D], if that is above the threshold."""
        scores = (self._index @ query[0]).tolist()
        found = sorted(zip(self.assets, scores, strict=True), key=lambda pair: -pair[1])
        if not (found := [pair for pair in found if names is None or pair[0].name in names]):
            return []
        nearest, score = found[0]
        return [pair for pair in found if pair[0].name == nearest.name] if score > threshold else []

    @functools.cached_property
    def _index(self) -> torch.Tensor:
        """The assets' embeddings, float32 [number of pictures, D], of length 1."""
        return self.encoder.embed_images([asset.image for asset in self.assets])


class NamedAssets:
    """Finds the pictures of the asset that a group's category names: a `Retriever` where somebody else has decided.

    Args:
        folder, scoring: as of `Retriever`.

    Raises:
        FileNotFoundError, ValueError: as `Retriever`.
    """

    def __init__(self, folder: str | Path | None, scoring: str | Path | None = None) -> None:
        self.assets = read_assets(folder)
        if scoring is not None:
            check_disjoint(self.assets, scoring)

    def settings(self) -> dict[str, Any]:
        """Return what affects the choice, as JSON values."""
        return {"assets_sha256": assets_hash(self.assets), "by": "name"}

    def find(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> list[tuple[Asset, float]]:
        """Return the pictures of the asset named, each as near as can be.

        Raises:
            ValueError: there is none of that name.
        """
        if not (found := [(asset, 1.0) for asset in self.assets if asset.name == group.category]):
            raise ValueError(f"expected pictures of the asset {group.category!r}, got none: add a folder of that name")
        return found
