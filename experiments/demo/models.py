"""Which models the page has: those of conf/model/ by name, a folder, or a repository in the hub's cache."""

import functools
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from huggingface_hub import try_to_load_from_cache
from omegaconf import DictConfig, OmegaConf

from eval.files import read_json
from experiments import PROJECT, project_path, select_device
from experiments.configs import build
from experiments.methods.method import Method
from experiments.plan import first
from experiments.runs import catalogue, checkpoints
from experiments.tables.paths import chosen_file
from negtome import NegToMeConfig

#: What is there in every checkout, and stands in for a model whose weights are missing.
USUAL = "mini-sdxl"
#: Bytes that a large picture's autoencoder takes at once; with less free memory it works in tiles.
DECODING = 6 << 30
#: A repository of the hub, which has no longer names.
REPOSITORY = re.compile(r"(?=.{3,96}$)\w[\w.-]*/\w[\w.-]*", re.ASCII)
#: Hydra is one for the process, and the page has a thread a visitor.
_composing = threading.Lock()


@dataclass(frozen=True)
class Model:
    """A model as the page knows it.

    Attributes:
        name: as it was asked for.
        base: its name in conf/model/, or that of one that is called as it is.
        cfg: as of conf/model/.
        configured_dtype: the dtype in conf/model/, which `cfg` need not have on a CPU.
        group, given: settings of NegToMe among images, and away from a reference image, as configured for it.
    """

    name: str
    base: str
    cfg: DictConfig
    configured_dtype: str
    group: NegToMeConfig
    given: NegToMeConfig

    @property
    def call(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call."""
        return checkpoints.call_arguments(self.cfg)

    @property
    def steps(self) -> int:
        """Steps of denoising that it is configured with."""
        return self.call["num_inference_steps"]

    def method(self, name: str) -> Method:
        """Return a method of conf/method/ as it is configured for the model.

        Raises:
            ValueError, FileNotFoundError: it has no settings for it, or needs something that is not here.
        """
        with _composing:
            cfg = first([f"model={self.base}", f"method={name}", *self.setup(name).overrides]).method
        return build(cfg)

    def setup(self, name: str) -> "Setup":
        """Return the hyperparameter that a method of conf/method/ is shown with.

        It is the value that experiment=peers_grid chose for the model, else the default of its file, else the weakest
        of its grid; never one with which the method does nothing.

        Raises:
            ValueError: there is no such value.
        """
        return _setup(self.base, name)

    def methods(self) -> dict[str, str]:
        """Return the methods that need only a prompt, name -> title: those with a hyperparameter, and the release's."""
        found = {}
        for name, entry in catalogue.entries().items():
            spec = OmegaConf.load(PROJECT / "conf" / "method" / f"{name}.yaml")
            values = OmegaConf.to_container(spec).get("metadata", {}).get("hyperparameter") or {"values": {}}
            fits = {self.base, f"mini-{self.cfg.architecture}"} & values["values"].keys()
            if fits or name == "negtome_released":
                found[name] = entry.title
        return {"negtome": found.pop("negtome", catalogue.entries()["negtome"].title), **found}


class Setup(NamedTuple):
    """The hyperparameter that a method is shown with.

    Attributes:
        overrides: for Hydra, beside the method's name; () where the method's file has all settings.
        text: the value and its origin, for people; "" of a method without a hyperparameter.
    """

    overrides: tuple[str, ...]
    text: str


@functools.lru_cache(maxsize=128)
def _setup(base: str, name: str) -> Setup:
    with _composing:
        cfg = first([f"model={base}", f"method={name}"])
    knob = OmegaConf.select(cfg, "method.metadata.hyperparameter")
    if knob is None:
        return Setup((), "")
    setting, nothing = knob.setting, knob.get("nothing")
    grid = knob["values"].get(base) or knob["values"].get(f"mini-{cfg.model.architecture}") or [None]
    values = {
        "chosen on development prompts": _chosen(cfg.results, base, name),
        "the default of its file": OmegaConf.select(cfg, f"method.{setting}"),
        "the weakest of its grid": grid[0],
    }
    for origin, value in values.items():
        if value is None or value == nothing:
            continue
        plain = OmegaConf.to_container(value) if OmegaConf.is_list(value) else value
        text = " to ".join(f"{end:g}" for end in plain) if isinstance(plain, list) else f"{plain:g}"
        override = f"method.{setting}={str(plain).replace(' ', '')}"
        return Setup((override,), f"{setting.rpartition('.')[2].replace('_', ' ')} {text}, {origin}")
    if any(value is not None for value in values.values()):
        raise ValueError(
            f"expected a value of {setting} that changes images of {base}, got {nothing}: leave {name} out"
        )
    return Setup((), "")  # what the library has for models without settings of their own


def _chosen(results: str, base: str, name: str) -> Any:
    """Return the value that was chosen of a method's hyperparameter, here or else as published; None without one."""
    for file in map(chosen_file, (results, "results")):
        value = OmegaConf.load(file).get(base, {}).get(name) if file.is_file() else None
        if value is not None:
            return value
    return None


class Memory(NamedTuple):
    """How memory is saved: only the component that works is on the device; the autoencoder works in tiles."""

    offload: bool
    tiled: bool


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of conf/model/, the embedded models last: who types "sdxl" means that one."""
    found = sorted(file.stem for file in (PROJECT / "conf" / "model").glob("*.yaml"))
    return tuple(sorted(found, key=lambda name: (name.startswith("mini-"), name)))


def may_be_linked(name: str) -> bool:
    """Tell whether a link may name a model: by a name of conf/model/ or a repository of the hub, never by a folder."""
    return name in names() or (REPOSITORY.fullmatch(name) is not None and not project_path(name).exists())


def is_here(name: str) -> bool:
    """Tell whether the weights of a model of conf/model/ are on this machine."""
    try:
        checkpoints.find_checkpoint(find(name).cfg, fetch=False)
    except FileNotFoundError:
        return False
    return True


@functools.lru_cache(maxsize=64)
def find(name: str) -> Model:
    """Return a model by a name of conf/model/, its folder, or its repository.

    Raises:
        FileNotFoundError: it is none of these on this machine; of a name, the weights are not looked for.
        ValueError: it is no pipeline that is supported here.
    """
    if name in names():
        return _composed(name, name)
    folder = _folder(name)
    if not isinstance(index := read_json(folder / "model_index.json"), dict):
        raise ValueError(f"expected a model_index.json that maps names in {folder}, got a {type(index).__name__}")
    made_of = index.get("_class_name")
    kinds = {key for key, architecture in checkpoints.ARCHITECTURES.items() if architecture.pipeline == made_of}
    bases = [name for name, kind in _architectures().items() if kind in kinds]
    if not bases:
        known = ", ".join(sorted(architecture.pipeline for architecture in checkpoints.ARCHITECTURES.values()))
        raise ValueError(f"expected a model of one of {known}, got a {made_of} in {folder}: choose another one")
    variant = "fp16" if any(folder.glob("*/*.fp16.*")) else None
    return _composed(name, bases[0], source=str(folder), revision=None, variant=variant)


def _folder(name: str) -> Path:
    folder = project_path(name)
    if os.path.isfile(folder / "model_index.json"):  # of a name that no file can have, too
        return folder
    if REPOSITORY.fullmatch(name) and not folder.exists():
        cached = try_to_load_from_cache(name, "model_index.json")
        if isinstance(cached, str):
            return Path(cached).parent
        raise FileNotFoundError(
            f"expected {name} in the hub's cache, got no model_index.json of it: hf download {name}, on a machine with "
            f"a network, or choose {USUAL}"
        )
    raise FileNotFoundError(
        f"expected a name of conf/model, a folder in the diffusers layout or OWNER/NAME of the hub, got {name!r} "
        f"without a model_index.json: choose {USUAL}, or give another folder"
    )


@functools.cache
def _architectures() -> dict[str, str]:
    """Return the architectures of conf/model/ by names, published checkpoints first, which say how to call theirs."""
    specs = {name: OmegaConf.load(PROJECT / "conf" / "model" / f"{name}.yaml") for name in names()}
    return {name: spec.architecture for name, spec in specs.items() if "architecture" in spec}


def _composed(name: str, base: str, **changes: Any) -> Model:
    with _composing:
        cfg, given = (first([f"model={base}", f"method={method}"]) for method in ("negtome", "negtome_reference"))
    model = cfg.model
    if changes:
        model.merge_with(changes)
        # Its own size, which its configuration alone knows.
        model.call.merge_with({side: None for side in ("height", "width") if side in model.call})
    dtype = str(model.dtype)
    if select_device("auto") == "cpu" and dtype == "float16":
        model.dtype = "float32"  # half of the operations are missing there
    settings = (_settings(one.method).published_for(model.architecture) for one in (cfg, given))
    return Model(name, base, model, dtype, *settings)


def _settings(method: Mapping[str, Any]) -> NegToMeConfig:
    values = {field: method.get(field) for field in NegToMeConfig.__dataclass_fields__}
    return NegToMeConfig(**{field: value for field, value in values.items() if value is not None})


def plan(free: int, weights: int, device: str) -> Memory:
    """Decide how to save memory.

    Args:
        free: bytes on the device.
        weights: bytes of the pipeline's.
        device: torch's name of it; nothing can be moved away from a CPU.
    """
    offload = device != "cpu" and 1.25 * weights > free
    return Memory(offload, free - (0 if offload else weights) < DECODING)


def load(model: Model) -> tuple[Any, Memory]:
    """Load a model's pipeline from this machine, in as little memory as is free.

    Raises:
        FileNotFoundError: its weights are missing; the message names the files.
    """
    device = select_device("auto")
    checkpoint = checkpoints.find_checkpoint(model.cfg, fetch=False)
    weights = sum(file.stat().st_size for file in checkpoint.folder.glob("*/*.safetensors"))
    memory = plan(_free(device), weights, device)
    if device == "cpu" and model.cfg.kind == "mini":
        torch.set_num_threads(1)  # its operations are too small to share
    pipe = checkpoints.load(model.cfg, checkpoint, device, offload=memory.offload)
    if memory.tiled and hasattr(pipe.vae, "enable_tiling"):
        pipe.vae.enable_tiling()
    return pipe, memory


def _free(device: str) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available
