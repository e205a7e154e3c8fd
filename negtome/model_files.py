"""Find files of a model by its name: in a folder, or in a repository in the hub's cache or on the hub."""

from __future__ import annotations

import functools
import json
import math
import re
import time
from pathlib import Path
from typing import Any

#: File of the diffusers layout that names the class of the pipeline and its components.
INDEX = "model_index.json"
#: LoRA weights in a folder of the diffusers layout, which its pipeline is loaded with.
LORA = "pytorch_lora_weights.safetensors"
#: The variant of weights in half precision, as publishers name it.
HALF = "fp16"
#: Weights of a component, such as unet/diffusion_pytorch_model.fp16.safetensors and
#: text_encoder_3/model.fp16-00001-of-00002.safetensors; an older spelling has the variant after the shard.
_WEIGHTS = re.compile(r"([^/]+)/[^/.]+(?:\.([\w-]+?))?(?:-\d+-of-\d+)?\.safetensors", re.ASCII)

#: Servers that did not answer: when, by `time.monotonic`, and why.
_silent: dict[str, tuple[float, str]] = {}


def find_file(model: str, name: str) -> Path | None:
    """Return the local path of a model's file, None if there is no such file or the hub cannot be reached."""
    if Path(model).is_dir():
        path = Path(model, name)
        return path if path.is_file() else None
    return _fetch(model, name)


def hub_failure() -> str | None:
    """Return why the Hugging Face hub cannot be reached; None if it answers within seconds.

    Its own client would retry for more than a minute. A hub that did not answer is not asked again for a minute.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    server = constants.ENDPOINT
    since, reason = _silent.get(server, (-math.inf, ""))
    if time.monotonic() - since < 60:
        return reason
    try:
        get_session().head(server, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # the kind of exception depends on the HTTP library of the installed version
        reason = f"{server} does not answer ({' '.join(str(error).split()) or type(error).__name__})"
        _silent[server] = time.monotonic(), reason
        return reason
    return None


@functools.lru_cache
def _fetch(repository: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, local_files_only=hub_failure() is not None))
    except Exception:  # networks fail in many ways; loading the weights reports the reason
        return None


def read_index(model: str) -> dict[str, Any]:
    """Return a model's `model_index.json`; empty if it cannot be read."""
    path = find_file(model, INDEX)
    try:
        document = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def find_variants(model: str) -> dict[str, set[str | None]]:
    """Return the variants of each component's weights; None stands for weights without a variant."""
    components: dict[str, set[str | None]] = {}
    index = read_index(model)
    for name in _list_files(model):
        weights = _WEIGHTS.fullmatch(name)
        if weights and weights[1] in index:
            components.setdefault(weights[1], set()).add(weights[2])
    return components


def default_variant(model: str, dtype: str) -> str | None:
    """Return "fp16" if a component has only such weights, or has them and the dtype is float16; else None."""
    components = [variants for variants in find_variants(model).values() if HALF in variants]
    alone = any(None not in variants for variants in components)
    return HALF if components and (alone or dtype == "float16") else None


def _list_files(model: str) -> list[str]:
    """List the files in the folders of a model, by their relative paths."""
    if Path(model).is_dir():
        return _list_folder(Path(model))
    listed = _list_repository(model)
    if listed is not None:
        return list(listed)
    index = _fetch(model, INDEX)  # offline: the files in the cache
    return [] if index is None else _list_folder(index.parent)


def _list_folder(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]


@functools.lru_cache
def _list_repository(repository: str) -> tuple[str, ...] | None:
    from huggingface_hub import HfApi

    if hub_failure() is not None:
        return None
    try:
        return tuple(HfApi().list_repo_files(repository))
    except Exception:  # as above
        return None
