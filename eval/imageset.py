"""The images of a folder as metrics see them: in groups, with their prompts, embedded at most once, on disk too."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from eval.encoders import Encoder
from eval.files import remembered_hash, sweep, write_bytes
from eval.images import (
    ManifestRow,
    WithheldRow,
    canonical_order,
    load_image,
    load_picture,
    read_manifest,
    read_withheld,
    rows_hash,
)
from eval.intervals import Cluster, GroupValue

log = logging.getLogger(__name__)

# Images a file of the cache: what a killed run loses at most.
IMAGES_PER_SHARD = 512
# Part of the cache's path: raise it when load_image or the layout changes what is stored.
CACHE_VERSION = "v2"


class EmbeddingCache:
    """Embeddings on disk, by content hash and encoder's cache id: renamed and repeated images are embedded once.

    Layout: `folder/v2/<cache id>/<shard>.safetensors`, in each shard one tensor [D] an image, named by its
    hash, and a digest of all of them. Shards are written once, under a name made of their keys, by an atomic rename, so
    several processes may share a cache. A damaged one is removed with a warning, and its images are embedded again. The
    folder is made when first needed, and can be deleted at any time.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def get(self, encoder_id: str, hashes: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the embeddings [D] that are there, by content hash; absent ones are left out."""
        wanted, found = set(hashes), {}
        for shard in sorted(self._folder_of(encoder_id).glob("*.safetensors")):
            try:
                if keys := wanted & _keys(shard):
                    stored = _read(shard)
                    found.update({key: stored[key] for key in keys})
            except (OSError, SafetensorError, ValueError) as error:
                log.warning("%s cannot be read (%s): its images are embedded again", shard, error)
                if not isinstance(error, OSError):  # damaged: else it would be read, and warned of, for ever
                    shard.unlink(missing_ok=True)
        return found

    def put(self, encoder_id: str, embeddings: Mapping[str, torch.Tensor]) -> None:
        """Store embeddings [D] by content hash."""
        if not embeddings:
            return
        folder = self._folder_of(encoder_id)
        sweep(folder, ".*.tmp")
        tensors = {key: embeddings[key].float().contiguous().clone() for key in sorted(embeddings)}
        name = hashlib.sha256("\n".join(tensors).encode()).hexdigest()[:24]
        write_bytes(folder / f"{name}.safetensors", save(tensors, {"sha256": _digest(tensors)}))

    def _folder_of(self, encoder_id: str) -> Path:
        return self.folder / CACHE_VERSION / quote(encoder_id, safe=" ")


@functools.cache
def _keys(shard: Path) -> frozenset[str]:
    with safe_open(shard, framework="pt") as file:
        return frozenset(file.keys())


def _read(shard: Path) -> dict[str, torch.Tensor]:
    with safe_open(shard, framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
        if file.metadata() != {"sha256": _digest(stored)}:
            raise ValueError("it holds other values than were written")
    return stored


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    return hashlib.sha256(
        b"".join(key.encode() + tensors[key].numpy().tobytes() for key in sorted(tensors))
    ).hexdigest()


@dataclass(eq=False)
class ImageSet:
    """The images of a folder with their groups and texts, embedded at most once by each encoder.

    Attributes:
        folder: what the rows' paths are relative to.
        rows: the images, at least one unless groups were withheld; put into canonical order.
        cache: where embeddings are kept between runs; None keeps them in this object only.
        batch_size: images that are embedded at once, >= 1; does not change any result.
        progress: show a bar while images are embedded.
        withheld: the groups that ended without images.
        groups: for each group id the positions of its images in `rows`, in canonical order.
        texts: the prompt of each row.
    """

    folder: str | Path
    rows: Sequence[ManifestRow]
    cache: EmbeddingCache | None = None
    batch_size: int = 32
    progress: bool = False
    withheld: Sequence[WithheldRow] = ()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"expected a batch size of at least 1, got {self.batch_size}; 32 is usual")
        if not self.rows and not self.withheld:
            raise ValueError(f"expected at least one image in {self.folder}, got none; the folder's manifest is empty")
        self.folder = Path(self.folder)
        self.rows = canonical_order(self.rows)
        self.texts = [row.prompt for row in self.rows]
        self.groups: dict[str, list[int]] = {}
        for position, row in enumerate(self.rows):
            self.groups.setdefault(row.group_id, []).append(position)
        if both := [row.group_id for row in self.withheld if row.group_id in self.groups]:
            raise ValueError(
                f"expected groups of {self.folder} either with images or withheld, got both of {', '.join(both[:10])}; "
                "generate the run again"
            )
        self._images: dict[str, torch.Tensor] = {}
        self._texts: dict[str, torch.Tensor] = {}

    @classmethod
    def open(
        cls, folder: str | Path, cache: EmbeddingCache | None = None, batch_size: int = 32, progress: bool = False
    ) -> ImageSet:
        """Read a run folder or a plain folder; see `eval.images.read_manifest`."""
        return cls(folder, read_manifest(folder), cache, batch_size, progress, read_withheld(folder))

    def only(self, patterns: Sequence[str] | None) -> ImageSet:
        """Return the images whose prompt_id fits a shell pattern, such as "direct-*"; all of them for None.

        Raises:
            ValueError: there are none, and none was withheld.
        """
        if patterns is None:
            return self
        rows, withheld = (
            [row for row in part if any(fnmatchcase(row.prompt_id, pattern) for pattern in patterns)]
            for part in (self.rows, self.withheld)
        )
        if not rows and not withheld:
            raise ValueError(
                f"expected prompts named {' or '.join(patterns)} in {self.folder}, got none, but for example "
                f"{[*self.rows, *self.withheld][0].prompt_id}; leave the metric out or change its `only`"
            )
        return replace(self, rows=rows, withheld=withheld)

    def beside(self, other: ImageSet) -> ImageSet:
        """Return another folder's images, to be embedded with this set's cache, batch size and bar."""
        return replace(self, folder=other.folder, rows=other.rows, withheld=other.withheld)

    @functools.cached_property
    def manifest_hash(self) -> str:
        """Identity of the set of images; see `eval.images.rows_hash`."""
        return rows_hash(self.folder, self.rows)

    @functools.cached_property
    def hashes(self) -> list[str]:
        """The content hash of each image."""
        return [remembered_hash(self.folder / row.path) for row in self.rows]

    def embeddings(self, encoder: Encoder) -> torch.Tensor:
        """Return the images' embeddings, float32 [N, D], in the order of `rows`; what the cache lacks is added to it.

        All images are looked at before the first is embedded, and what was embedded when something fails is kept.

        Raises:
            FileNotFoundError: an image is missing.
            ValueError: images cannot be read, of which the message names all, or an embedding is not finite.
        """
        if encoder.cache_id not in self._images:
            self._images[encoder.cache_id] = self._outputs(encoder)
        return self._images[encoder.cache_id][:, encoder.columns]

    def load(self, positions: Sequence[int]) -> list[torch.Tensor]:
        """Read some images, uint8 [3, H, W]."""
        return [load_image(self.folder / self.rows[position].path) for position in positions]

    def _outputs(self, encoder: Encoder) -> torch.Tensor:
        paths = [self.folder / row.path for row in self.rows]
        found = self.cache.get(encoder.cache_id, self.hashes) if self.cache else {}
        todo = {key: path for key, path in zip(self.hashes, paths, strict=True) if key not in found}
        self._check_readable(todo)
        keys, fresh = list(todo), {}
        shown = self.progress and todo
        try:
            with tqdm(total=len(todo), desc=f"embed ({encoder.name})", unit="image", disable=not shown) as bar:
                for start in range(0, len(keys), self.batch_size):
                    batch = keys[start : start + self.batch_size]
                    outputs = encoder.outputs([load_image(todo[key]) for key in batch])
                    if bad := [todo[key] for key, row in zip(batch, outputs, strict=True) if not row.isfinite().all()]:
                        raise ValueError(
                            f"expected finite embeddings from {encoder.name}, got NaN or infinity for {bad[0]}; "
                            "check the image and the weights"
                        )
                    fresh |= zip(batch, outputs, strict=True)
                    if self.cache and len(fresh) >= IMAGES_PER_SHARD:
                        self.cache.put(encoder.cache_id, fresh)
                        found, fresh = found | fresh, {}
                    bar.update(len(batch))
        finally:
            if self.cache:
                self.cache.put(encoder.cache_id, fresh)
        found |= fresh
        return torch.stack([found[key] for key in self.hashes])

    def _check_readable(self, images: Mapping[str, Path]) -> None:
        """Look at images, given by content hash, unless they are as they were generated."""
        as_generated = {row.sha256 for row in self.rows}
        doubtful = {key: path for key, path in images.items() if key not in as_generated}
        with ThreadPoolExecutor() as pool:  # Pillow decodes beside other threads
            looked = pool.map(_fault, doubtful.values(), doubtful)
            shown = self.progress and doubtful
            bar = tqdm(looked, "check", len(doubtful), unit="image", leave=False, disable=not shown)
            faults = [fault for fault in bar if fault]
        if faults:
            raise ValueError(
                f"expected images that can be read in {self.folder}, got {len(faults)} others: {'; '.join(faults)}"
            )

    def text_embeddings(self, encoder: Encoder) -> torch.Tensor:
        """Return the prompts' embeddings, float32 [N, D], in the order of `rows`."""
        if encoder.id not in self._texts:
            unique = list(dict.fromkeys(self.texts))
            embedded = dict(zip(unique, encoder.embed_texts(unique), strict=True))
            self._texts[encoder.id] = torch.stack([embedded[text] for text in self.texts])
        return self._texts[encoder.id]

    def pools(self, shared: Cluster | None) -> dict[str, list[int]]:
        """Return positions by group, prompt or category: pools are named as groups are, `bird/all`, for clusters."""
        if shared is None:
            return self.groups
        found: dict[str, list[int]] = {}
        for position, row in enumerate(self.rows):
            name = row.category if shared == "category" else row.prompt_id
            found.setdefault(f"{name}/all", []).append(position)
        return dict(sorted(found.items()))

    def group_value(self, group_id: str, members: Sequence[int] | None = None, **found: Any) -> GroupValue:
        """Describe a group, or a pool of members, for a result: id, category, number of images, what was found."""
        members = self.groups[group_id] if members is None else members
        category = self.rows[members[0]].category
        return {"group": group_id, "category": category, "n_images": len(members), **found}


@functools.cache
def _fault(path: Path, digest: str) -> str | None:
    """Say why an image of this content cannot be read; looked at once, however many encoders it is for."""
    try:
        load_picture(path)
    except ValueError as error:
        return str(error)
    return None
