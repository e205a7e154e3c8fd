"""The images of a folder as metrics see them: in groups, with their prompts, embedded at most once."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from eval.aggregates import GroupValue
from eval.cache import EmbeddingCache, embed_folder
from eval.encoders import Encoder
from eval.images import ManifestRow, canonical_order, read_manifest, rows_hash


class ImageSet:
    """The images of a folder with their groups and texts, embedded at most once by each encoder.

    Args:
        folder: what the rows' paths are relative to.
        rows: the images; put into canonical order.
        cache: where embeddings are kept between runs; None keeps them in this object only.
        batch_size: images a call of an encoder; does not change any result.
        progress: show a bar while images are embedded.

    Attributes:
        groups: for each group id the positions of its images in `rows`, in canonical order.
        texts: the prompt of each row.
    """

    def __init__(
        self,
        folder: str | Path,
        rows: Sequence[ManifestRow],
        cache: EmbeddingCache | None = None,
        batch_size: int = 32,
        progress: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.rows = canonical_order(rows)
        self.cache = cache
        self.batch_size = batch_size
        self.progress = progress
        self.texts = [row.prompt for row in self.rows]
        self.groups: dict[str, list[int]] = {}
        for position, row in enumerate(self.rows):
            self.groups.setdefault(row.group_id, []).append(position)
        self._images: dict[str, torch.Tensor] = {}
        self._texts: dict[str, torch.Tensor] = {}

    @classmethod
    def open(
        cls, folder: str | Path, cache: EmbeddingCache | None = None, batch_size: int = 32, progress: bool = False
    ) -> ImageSet:
        """Read a run folder or a plain folder; see `eval.images.read_manifest`."""
        return cls(folder, read_manifest(folder), cache, batch_size, progress)

    def only(self, patterns: Sequence[str] | None) -> ImageSet:
        """Return the images whose prompt_id fits a shell pattern, such as "direct-*"; all of them for None.

        Raises:
            ValueError: there are none.
        """
        if patterns is None:
            return self
        rows = [row for row in self.rows if any(fnmatchcase(row.prompt_id, pattern) for pattern in patterns)]
        if not rows:
            raise ValueError(
                f"expected prompts named {' or '.join(patterns)} in {self.folder}, got none, but for example "
                f"{self.rows[0].prompt_id}; leave the metric out or change its `only`"
            )
        return ImageSet(self.folder, rows, self.cache, self.batch_size, self.progress)

    def beside(self, other: ImageSet) -> ImageSet:
        """Return another folder's images, to be embedded with this set's cache, batch size and bar."""
        return ImageSet(other.folder, other.rows, self.cache, self.batch_size, self.progress)

    @cached_property
    def manifest_hash(self) -> str:
        """Identity of the set of images; see `eval.images.rows_hash`."""
        return rows_hash(self.folder, self.rows)

    def embeddings(self, encoder: Encoder) -> torch.Tensor:
        """Return the images' embeddings, float32 [N, D], in the order of `rows`."""
        if encoder.id not in self._images:
            self._images[encoder.id] = embed_folder(
                self.rows, self.folder, encoder, self.cache, self.batch_size, self.progress
            )
        return self._images[encoder.id]

    def text_embeddings(self, encoder: Encoder) -> torch.Tensor:
        """Return the prompts' embeddings, float32 [N, D], in the order of `rows`."""
        if encoder.id not in self._texts:
            unique = list(dict.fromkeys(self.texts))
            embedded = encoder.embed_texts(unique)
            position = {text: index for index, text in enumerate(unique)}
            self._texts[encoder.id] = embedded[[position[text] for text in self.texts]]
        return self._texts[encoder.id]

    def pools(self, shared: Literal["prompt_id", "category"] | None) -> dict[str, list[int]]:
        """Return positions by what the images share, in canonical order; by group for None.

        Pools of groups are named as groups are, `bird/all`, so that each is a cluster of its own.
        """
        if shared is None:
            return self.groups
        found: dict[str, list[int]] = {}
        for position, row in enumerate(self.rows):
            found.setdefault(f"{getattr(row, shared)}/all", []).append(position)
        return dict(sorted(found.items()))

    def group_value(self, group_id: str, **found: Any) -> GroupValue:
        """Describe a group for a result: id, category and number of images, and what was found in it."""
        members = self.groups[group_id]
        return {
            "group": group_id,
            "category": self.rows[members[0]].category,
            "n_images": len(members),
            **found,
        }
