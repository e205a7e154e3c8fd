"""Embeddings on disk, so that no image is embedded twice."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from eval.files import sweep, write_bytes

log = logging.getLogger(__name__)

# Part of the cache's path: raise it when load_image or the layout changes what is stored.
CACHE_VERSION = "v2"


class EmbeddingCache:
    """Embeddings on disk, by content hash and encoder id: renamed and repeated images are embedded once.

    Layout: `folder/v2/<encoder id>/<shard>.safetensors`, in each shard one tensor [D] an image, named by its
    hash, and a digest of all of them. Shards are written once, under a name made of their keys, by an atomic rename, so
    several processes may share a cache. A damaged one is removed with a warning, and its images are embedded again.

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
    """Return a digest of embeddings and their keys, whatever the order."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].numpy().tobytes())
    return digest.hexdigest()
