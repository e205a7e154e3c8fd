"""Files of a model by its name: those of its folder, or of its repository in the hub's cache or on the hub."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

#: In the diffusers layout, the class of the pipeline and its components.
INDEX = "model_index.json"
#: The variant of weights in half precision, as publishers name it.
HALF = "fp16"
#: Weights of a component, whole or in shards, such as unet/diffusion_pytorch_model.fp16.safetensors and
#: text_encoder_3/model.fp16-00001-of-00002.safetensors; an older spelling has the variant behind the shard.
_WEIGHTS = re.compile(r"([^/]+)/[^/.]+(?:\.([\w-]+?))?(?:-\d+-of-\d+)?\.safetensors", re.ASCII)


def find_file(model: str, name: str) -> Path | None:
    """Find a file of a model, in its folder or, for a repository, in the hub's cache or on the hub.

    Returns:
        Its path on this machine; None where there is no such file, or the hub cannot be asked.
    """
    if Path(model).is_dir():
        path = Path(model, name)
        return path if path.is_file() else None
    return _fetch(model, name)


@functools.lru_cache
def _fetch(repository: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name))
    except Exception:  # of a network there are many kinds; loading the weights will say what is wrong with it
        return None


def read_index(model: str) -> dict[str, Any]:
    """Return a model's `model_index.json`; empty where it has none that can be read."""
    path = find_file(model, INDEX)
    try:
        document = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def find_variants(model: str) -> dict[str, set[str | None]]:
    """Return the variants of each component's weights; None stands for the weights without a variant's name."""
    components: dict[str, set[str | None]] = {}
    index = read_index(model)
    for name in _list_files(model):
        weights = _WEIGHTS.fullmatch(name)
        if weights and weights[1] in index:
            components.setdefault(weights[1], set()).add(weights[2])
    return components


def usual_variant(model: str, dtype: str) -> str | None:
    """Return "fp16" where weights of that variant are to be loaded, else None.

    They are where the model runs in float16, and where a component has no other weights.
    """
    components = [variants for variants in find_variants(model).values() if HALF in variants]
    alone = any(None not in variants for variants in components)
    return HALF if components and (alone or dtype == "float16") else None


def _list_files(model: str) -> list[str]:
    """List the files in the folders of a model, by their paths from its own."""
    if Path(model).is_dir():
        return _list_folder(Path(model))
    listed = _list_repository(model)
    if listed is not None:
        return list(listed)
    index = _fetch(model, INDEX)  # offline: what lies in the cache
    return [] if index is None else _list_folder(index.parent)


def _list_folder(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]


@functools.lru_cache
def _list_repository(repository: str) -> tuple[str, ...] | None:
    from huggingface_hub import HfApi

    try:
        return tuple(HfApi().list_repo_files(repository))
    except Exception:  # as above
        return None
