"""Embeddings of a folder's images, and a cache so that no image is embedded twice."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from eval.encoders import Encoder
from eval.files import ContentHashes, content_hash, sweep
from eval.images import ManifestRow, load_image

log = logging.getLogger(__name__)

# Images a file of the cache: what a killed run loses at most.
IMAGES_PER_SHARD = 512
# Part of the cache's path: raise it when load_image or the layout changes what is stored.
CACHE_VERSION = "v2"


class EmbeddingCache:
    """Embeddings on disk, by content hash and encoder id: renamed and repeated images are embedded once.

    Layout: `folder/v2/<encoder id>/<shard>.safetensors`, in each shard one tensor [D] an image, named by its
    hash, and a digest of all of them. Shards are written once, under a name made of their keys, by an atomic rename, so
    several processes may share a cache. A damaged one is removed, with a warning, and its images are embedded again.
    `folder/hashes.jsonl` has the hashes of files that were read before.

    Args:
        folder: made when first needed; can be deleted at any time.

    Attributes:
        hash_of: gives a file's content hash; see `eval.files.ContentHashes`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._shard_of: dict[str, dict[str, Path]] = {}
        self._read: dict[str, set[Path]] = {}
        self.hash_of = ContentHashes(self.folder / "hashes.jsonl")

    def get(self, encoder_id: str, hashes: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the embeddings [D] that are there, by content hash; absent ones are left out."""
        index = self._index(encoder_id)
        wanted: dict[Path, list[str]] = {}
        for key in dict.fromkeys(hashes):
            if key in index:
                wanted.setdefault(index[key], []).append(key)
        found = {}
        for shard, keys in wanted.items():
            stored = _read_shard(shard)
            found.update({key: stored[key] for key in keys if key in stored})
        return found

    def put(self, encoder_id: str, embeddings: Mapping[str, torch.Tensor]) -> None:
        """Store embeddings [D] by content hash."""
        if not embeddings:
            return
        folder = self._folder_of(encoder_id)
        folder.mkdir(parents=True, exist_ok=True)
        keys = sorted(embeddings)
        shard = folder / f"{_shard_name(keys)}.safetensors"
        sweep(folder, "*.tmp")
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        os.close(handle)
        try:
            tensors = {key: embeddings[key].float().contiguous().clone() for key in keys}
            save_file(tensors, temporary, {"sha256": _content(tensors)})
            os.replace(temporary, shard)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _folder_of(self, encoder_id: str) -> Path:
        return self.folder / CACHE_VERSION / quote(encoder_id, safe=" ")

    def _index(self, encoder_id: str) -> dict[str, Path]:
        index = self._shard_of.setdefault(encoder_id, {})
        seen = self._read.setdefault(encoder_id, set())
        for shard in sorted(self._folder_of(encoder_id).glob("*.safetensors")):
            if shard not in seen:
                try:
                    with safe_open(shard, framework="pt") as file:
                        index.update(dict.fromkeys(file.keys(), shard))
                        seen.add(shard)
                except SafetensorError:
                    _discard(shard)
                except OSError as error:
                    _leave(shard, error)
        return index


def _shard_name(keys: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:24]


def _content(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of embeddings and their keys, whatever the order."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].numpy().tobytes())
    return digest.hexdigest()


def _read_shard(path: Path) -> dict[str, torch.Tensor]:
    """Return all of a shard's embeddings; none, and a warning, where they are not those that were written."""
    try:
        with safe_open(path, framework="pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
            if (file.metadata() or {}).get("sha256") == _content(stored):
                return stored
    except SafetensorError:
        pass
    except OSError as error:
        _leave(path, error)
        return {}
    _discard(path)
    return {}


def _discard(path: Path) -> None:
    log.warning("%s is damaged, and removed: its images are embedded again", path)
    path.unlink(missing_ok=True)


def _leave(path: Path, error: OSError) -> None:
    """Say of a shard that cannot be read, and may well be whole; one that another process has just removed is gone."""
    if not isinstance(error, FileNotFoundError):
        log.warning("%s cannot be read (%s): its images are embedded again", path, error)


def embed_folder(
    rows: Sequence[ManifestRow],
    folder: str | Path,
    encoder: Encoder,
    cache: EmbeddingCache | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> torch.Tensor:
    """Embed the images of a folder, taking from the cache what is there and adding what is not.

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
        ValueError: an image cannot be read or its embedding is not finite; the message names it.
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
    hashes = [cache.hash_of(path) if cache else content_hash(path) for path in paths]
    found = cache.get(encoder.id, hashes) if cache else {}
    todo = [(key, path) for key, path in dict(zip(hashes, paths, strict=True)).items() if key not in found]
    fresh: dict[str, torch.Tensor] = {}
    with tqdm(total=len(todo), desc=f"embed ({encoder.name})", unit="image", disable=not (progress and todo)) as bar:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            embeddings = encoder.embed_images([load_image(path) for _, path in batch])
            for (key, path), embedding in zip(batch, embeddings, strict=True):
                if not torch.isfinite(embedding).all():
                    raise ValueError(
                        f"expected finite embeddings from {encoder.name}, got NaN or infinity for {path}; "
                        "check the image and the weights"
                    )
                fresh[key] = embedding
            if cache and len(fresh) >= IMAGES_PER_SHARD:
                cache.put(encoder.id, fresh)
                found.update(fresh)
                fresh = {}
            bar.update(len(batch))
    if cache:
        cache.put(encoder.id, fresh)
    found.update(fresh)
    return torch.stack([found[key] for key in hashes])
