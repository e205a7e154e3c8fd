"""The images of a folder in groups, with their prompts and their embeddings, which are cached on disk."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from eval.encoders import Encoder
from eval.files import cached_hash, sweep, write_bytes
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

# Embeddings are written after this many images; a killed run loses at most so many.
IMAGES_PER_SHARD = 512
# Part of the cache's path. Raise it when `load_image` or the layout of the cache changes.
CACHE_VERSION = "v2"


class EmbeddingCache:
    """Embeddings on disk by the encoder's cache id and the image's content hash, so that a copy is embedded only once.

    A file `folder/v2/<cache id>/<shard>.safetensors` holds a tensor [D] per image, named by its hash, and a digest of
    all tensors. Files are written atomically and never changed, so several processes can share a cache. A damaged file
    is removed with a warning, and its images are embedded again. You can delete the folder at any time.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def get(self, encoder_id: str, hashes: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the cached embeddings [D] by content hash; missing ones are left out."""
        wanted, embeddings = set(hashes), {}
        for shard in sorted(self._folder_of(encoder_id).glob("*.safetensors")):
            try:
                if keys := wanted & _keys(shard):
                    stored = _read(shard)
                    embeddings.update({key: stored[key] for key in keys})
            except (OSError, SafetensorError, ValueError) as error:
                log.warning("%s cannot be read (%s): its images are embedded again", shard, error)
                if not isinstance(error, OSError):  # a damaged file would cause a warning in every run
                    shard.unlink(missing_ok=True)
        return embeddings

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
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (a safe_open is no mapping)
        if file.metadata() != {"sha256": _digest(stored)}:
            raise ValueError("it holds other values than were written")
    return stored


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    return hashlib.sha256(
        b"".join(key.encode() + tensors[key].numpy().tobytes() for key in sorted(tensors))
    ).hexdigest()


@dataclass(eq=False)
class ImageSet:
    """The images of a folder with their groups and texts; each encoder embeds an image at most once.

    Attributes:
        folder: folder to which the rows' paths are relative.
        rows: the images in canonical order, at least one unless groups were withheld.
        cache: cache of embeddings on disk; None keeps them in memory only.
        batch_size: number of images that are embedded at once, >= 1; it does not change any result.
        progress: show a progress bar while images are embedded.
        withheld: the groups that ended without images.
        groups: positions in `rows` of the images of each group, by group id.
        texts: the prompt of each row.
    """

    folder: Path
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
        """Read a folder; see `eval.images.read_manifest`."""
        return cls(Path(folder), read_manifest(folder), cache, batch_size, progress, read_withheld(folder))

    def only(self, patterns: Sequence[str] | None) -> ImageSet:
        """Select the images whose prompt_id matches a shell pattern, such as "direct-*"; None selects all.

        Raises:
            ValueError: no image and no withheld group matches.
        """
        if patterns is None:
            return self

        def matches(row: ManifestRow | WithheldRow) -> bool:
            return any(fnmatchcase(row.prompt_id, pattern) for pattern in patterns)

        rows, withheld = list(filter(matches, self.rows)), list(filter(matches, self.withheld))
        if not rows and not withheld:
            raise ValueError(
                f"expected prompts named {' or '.join(patterns)} in {self.folder}, got none, but for example "
                f"{(self.rows or self.withheld)[0].prompt_id}; leave the metric out or change its `only`"
            )
        return replace(self, rows=rows, withheld=withheld)

    def with_images_of(self, other: ImageSet) -> ImageSet:
        """Return another folder's images with this set's cache, batch size and progress bar."""
        return replace(self, folder=other.folder, rows=other.rows, withheld=other.withheld)

    @functools.cached_property
    def manifest_hash(self) -> str:
        """Hash that identifies the set of images; see `eval.images.rows_hash`."""
        return rows_hash(self.folder, self.rows)

    @functools.cached_property
    def hashes(self) -> list[str]:
        """The content hash of each image."""
        return [cached_hash(self.folder / row.path) for row in self.rows]

    def embeddings(self, encoder: Encoder) -> torch.Tensor:
        """Return the images' embeddings, float32 [N, D], in the order of `rows`, from the cache where possible.

        All images are checked before the first is embedded. If an error occurs, finished embeddings are cached.

        Raises:
            FileNotFoundError: an image is missing.
            ValueError: images cannot be read (the message names them all), or an embedding is not finite.
        """
        if encoder.cache_id not in self._images:
            self._images[encoder.cache_id] = self._outputs(encoder)
        return self._images[encoder.cache_id][:, encoder.columns]

    def load(self, positions: Sequence[int]) -> list[torch.Tensor]:
        """Read the images at some positions, uint8 [3, H, W] each."""
        return [load_image(self.folder / self.rows[position].path) for position in positions]

    def _outputs(self, encoder: Encoder) -> torch.Tensor:
        paths = [self.folder / row.path for row in self.rows]
        cached = self.cache.get(encoder.cache_id, self.hashes) if self.cache else {}
        todo = {key: path for key, path in zip(self.hashes, paths, strict=True) if key not in cached}
        self._check_readable(todo)
        keys = list(todo)
        fresh: dict[str, torch.Tensor] = {}
        hidden = not (self.progress and todo)
        try:
            with tqdm(total=len(todo), desc=f"embed ({encoder.name})", unit="image", disable=hidden) as bar:
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
                        cached, fresh = cached | fresh, {}
                    bar.update(len(batch))
        finally:
            if self.cache:
                self.cache.put(encoder.cache_id, fresh)
        cached |= fresh
        return torch.stack([cached[key] for key in self.hashes])

    def _check_readable(self, images: Mapping[str, Path]) -> None:
        """Decode images, given by content hash, except those whose hash the manifest has recorded."""
        generated = {row.sha256 for row in self.rows}
        unchecked = {key: path for key, path in images.items() if key not in generated}
        hidden = not (self.progress and unchecked)
        with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter's lock while it decodes
            messages = pool.map(_read_error, unchecked.values(), unchecked)
            bar = tqdm(messages, "check", len(unchecked), unit="image", leave=False, disable=hidden)
            errors = [message for message in bar if message]
        if errors:
            raise ValueError(
                f"expected images that can be read in {self.folder}, got {len(errors)} others: {'; '.join(errors)}"
            )

    def text_embeddings(self, encoder: Encoder) -> torch.Tensor:
        """Return the prompts' embeddings, float32 [N, D], in the order of `rows`."""
        if encoder.id not in self._texts:
            unique = list(dict.fromkeys(self.texts))
            embedded = dict(zip(unique, encoder.embed_texts(unique), strict=True))
            self._texts[encoder.id] = torch.stack([embedded[text] for text in self.texts])
        return self._texts[encoder.id]

    def pools(self, shared: Cluster | None) -> dict[str, list[int]]:
        """Return the images' positions by group (None), prompt or category; the name of a pool is `bird/all`."""
        if shared is None:
            return self.groups
        pools: dict[str, list[int]] = {}
        for position, row in enumerate(self.rows):
            name = row.category if shared == "category" else row.prompt_id
            pools.setdefault(f"{name}/all", []).append(position)
        return dict(sorted(pools.items()))

    def group_value(self, group_id: str, members: Sequence[int] | None = None, **values: Any) -> GroupValue:
        """Describe a group, or a pool of images, for a document: id, category, number of images, and `values`."""
        members = self.groups[group_id] if members is None else members
        category = self.rows[members[0]].category
        return cast(GroupValue, {"group": group_id, "category": category, "n_images": len(members), **values})


@functools.cache
def _read_error(path: Path, digest: str) -> str | None:
    """Return why an image of this content cannot be read, or None; decode it once for all encoders."""
    try:
        load_picture(path)
    except ValueError as error:
        return str(error)
    return None
