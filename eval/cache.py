"""Embeddings of a folder's images, and a cache so that no image is embedded twice."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from eval.encoders import Encoder
from eval.files import remembered_hash, sweep, write_bytes
from eval.images import ManifestRow, load_image, load_picture

log = logging.getLogger(__name__)

# Images a file of the cache: what a killed run loses at most.
IMAGES_PER_SHARD = 512
# Part of the cache's path: raise it when load_image or the layout changes what is stored.
CACHE_VERSION = "v2"


class EmbeddingCache:
    """Embeddings on disk, by content hash and encoder id: renamed and repeated images are embedded once.

    Layout: `folder/v2/<encoder id>/<shard>.safetensors`, in each shard one tensor [D] an image, named by its
    hash, and a digest of all of them. Shards are written once, under a name made of their keys, by an atomic rename, so
    several processes may share a cache. The images of a damaged one are embedded again, with a warning.

    Args:
        folder: made when first needed; can be deleted at any time.
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
    """Return a digest of embeddings and their keys, whatever the order."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].numpy().tobytes())
    return digest.hexdigest()


def embed_folder(
    rows: Sequence[ManifestRow],
    folder: str | Path,
    encoder: Encoder,
    cache: EmbeddingCache | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> torch.Tensor:
    """Embed the images of a folder, taking from the cache what is there and adding what is not.

    All images are looked at before the first is embedded, and what is embedded when something fails is kept.

    Args:
        rows: which images, in which order.
        folder: what their paths are relative to.
        encoder: what embeds them.
        cache: where embeddings are kept; None computes all of them.
        batch_size: images a call of the encoder, >= 1; does not change the result.
        progress: show a bar with the time left, if anything has to be computed.

    Returns:
        float32 [N, D] in the order of `rows`.

    Raises:
        FileNotFoundError: images are missing.
        ValueError: images cannot be read, of which the message names all, or an embedding is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}; 32 is usual")
    if not rows:
        raise ValueError("expected at least one image to embed, got none; the folder's manifest is empty")
    paths = [Path(folder) / row.path for row in rows]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"expected {len(paths)} images in {folder}, got {len(missing)} missing, the first {missing[0]}; "
            "generate the run again"
        )
    hashes = [remembered_hash(path) for path in paths]
    found = cache.get(encoder.id, hashes) if cache else {}
    todo = {key: path for key, path in zip(hashes, paths, strict=True) if key not in found}
    as_generated = {row.sha256 for row in rows}
    _check_readable({key: path for key, path in todo.items() if key not in as_generated}, folder, progress)
    fresh: dict[str, torch.Tensor] = {}
    bar = tqdm(total=len(todo), desc=f"embed ({encoder.name})", unit="image", disable=not (progress and todo))
    try:
        for batch in _batches(todo, encoder, batch_size):
            fresh |= batch
            if cache and len(fresh) >= IMAGES_PER_SHARD:
                cache.put(encoder.id, fresh)
                found |= fresh
                fresh = {}
            bar.update(len(batch))
    finally:
        bar.close()
        if cache:
            cache.put(encoder.id, fresh)
    found |= fresh
    return torch.stack([found[key] for key in hashes])


def _batches(images: Mapping[str, Path], encoder: Encoder, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    keys = list(images)
    for start in range(0, len(keys), batch_size):
        batch = keys[start : start + batch_size]
        embeddings = encoder.embed_images([load_image(images[key]) for key in batch])
        for key, embedding in zip(batch, embeddings, strict=True):
            if not torch.isfinite(embedding).all():
                raise ValueError(
                    f"expected finite embeddings from {encoder.name}, got NaN or infinity for {images[key]}; "
                    "check the image and the weights"
                )
        yield dict(zip(batch, embeddings, strict=True))


def _check_readable(images: Mapping[str, Path], folder: str | Path, progress: bool) -> None:
    """Raise ValueError that names all images, given by their content hash, which cannot be read."""
    with ThreadPoolExecutor() as pool:  # Pillow decodes beside other threads
        looked = pool.map(_fault, images.values(), images)
        shown = tqdm(looked, "check", len(images), unit="image", leave=False, disable=not (progress and images))
        faults = [fault for fault in shown if fault]
    if faults:
        raise ValueError(f"expected images that can be read in {folder}, got {len(faults)} others: {'; '.join(faults)}")


@functools.cache
def _fault(path: Path, digest: str) -> str | None:
    """Say why an image of this content cannot be read; looked at once, however many encoders it is for."""
    try:
        load_picture(path)
    except ValueError as error:
        return str(error)
    return None
