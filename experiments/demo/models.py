"""The models that the page knows: names of conf/model/, folders, and repositories in the hub's cache."""

import functools
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from huggingface_hub import try_to_load_from_cache
from omegaconf import DictConfig, OmegaConf

from eval.files import read_json
from experiments import PROJECT, project_path, select_device
from experiments.compose import first
from experiments.configs import build
from experiments.methods.method import Method
from experiments.runs import catalogue, checkpoints
from experiments.tables.paths import chosen_file
from negtome import NegToMeConfig

#: In every checkout; replaces a model whose weights are missing.
DEFAULT_MODEL = "mini-sdxl"
#: Bytes that decoding a large image takes at once; with less free memory the autoencoder works in tiles.
DECODING = 6 << 30
#: A repository of the hub, whose names have at most 96 characters.
REPOSITORY = re.compile(r"(?=.{3,96}$)\w[\w.-]*/\w[\w.-]*", re.ASCII)
#: Hydra has one state for the process, and the page has one thread a visitor.
_composing = threading.Lock()


class Setup(NamedTuple):
    """The hyperparameter that a method is shown with.

    Attributes:
        overrides: for Hydra; () if the method's file has all settings.
        text: the value and its origin; "" for a method without a hyperparameter.
        spec: the method's configuration with that value.
    """

    overrides: tuple[str, ...]
    text: str
    spec: DictConfig


@dataclass(frozen=True)
class Model:
    """A model and its settings.

    Attributes:
        name: as the visitor wrote it.
        base: its name in conf/model/, or the name of a model with the same architecture.
        cfg: as in conf/model/, but for a dtype that the CPU lacks.
        group_config, reference_config: settings of NegToMe within a group, and away from a reference image.
    """

    name: str
    base: str
    cfg: DictConfig
    group_config: NegToMeConfig
    reference_config: NegToMeConfig

    @property
    def call(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call."""
        return checkpoints.call_arguments(self.cfg)

    @property
    def steps(self) -> int:
        """Default number of denoising steps."""
        return self.call["num_inference_steps"]

    def method(self, name: str) -> Method:
        """Build a method of conf/method/ with its `setup` for the model.

        Raises:
            ValueError, FileNotFoundError: it has no settings for the model, or needs a file that is not here.
        """
        return build(self.setup(name).spec)

    def setup(self, name: str) -> Setup:
        """Return the hyperparameter that a method of conf/method/ is shown with.

        It is the value that experiment=peers_grid chose for the model, else the default in the method's file, else
        the weakest value of its grid; never a value with which the method has no effect.

        Raises:
            ValueError: there is no such value.
        """
        return _setup(self.base, name)

    def methods(self) -> dict[str, str]:
        """Return name -> title of the methods that need only a prompt, NegToMe first."""
        titles = {}
        for name, entry in catalogue.entries().items():
            spec = OmegaConf.load(PROJECT / "conf" / "method" / f"{name}.yaml")
            grid = OmegaConf.select(spec, "metadata.hyperparameter.values") or {}
            if {self.base, f"mini-{self.cfg.architecture}"} & grid.keys() or name == "negtome_released":
                titles[name] = entry.title
        return {"negtome": catalogue.entries()["negtome"].title} | titles


@functools.lru_cache(maxsize=128)
def _setup(base: str, name: str) -> Setup:
    with _composing:
        cfg = first([f"model={base}", f"method={name}"])
    hyperparameter = OmegaConf.select(cfg, "method.metadata.hyperparameter")
    if hyperparameter is None:
        return Setup((), "", cfg.method)
    setting, without_effect = hyperparameter.setting, hyperparameter.get("nothing")
    grid = (
        hyperparameter["values"].get(base) or hyperparameter["values"].get(f"mini-{cfg.model.architecture}") or [None]
    )
    values = {
        "chosen on development prompts": _chosen_value(cfg.results, base, name),
        "the default of its file": OmegaConf.select(cfg, f"method.{setting}"),
        "the weakest of its grid": grid[0],
    }
    values = {origin: value for origin, value in values.items() if value is not None}
    for origin, value in values.items():
        if value == without_effect:
            continue
        if OmegaConf.is_list(value):
            value = OmegaConf.to_container(value)
        text = " to ".join(f"{end:g}" for end in value) if isinstance(value, list) else f"{value:g}"
        override = f"method.{setting}={str(value).replace(' ', '')}"
        OmegaConf.update(cfg, f"method.{setting}", value)
        return Setup((override,), f"{setting.rpartition('.')[2].replace('_', ' ')} {text}, {origin}", cfg.method)
    if values:
        raise ValueError(
            f"expected a value of {setting} that changes images of {base}, got {without_effect}: leave {name} out"
        )
    return Setup((), "", cfg.method)  # the library's default for models without settings of their own


def _chosen_value(results: str, base: str, name: str) -> Any:
    """Return the chosen value of a method's hyperparameter, made here or else published; None without one."""
    for file in map(chosen_file, (results, "results")):
        value = OmegaConf.load(file).get(base, {}).get(name) if file.is_file() else None
        if value is not None:
            return value
    return None


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of conf/model/, the embedded models last: a visitor who types "sdxl" means that one."""
    stems = sorted(file.stem for file in (PROJECT / "conf" / "model").glob("*.yaml"))
    return tuple(sorted(stems, key=lambda name: (name.startswith("mini-"), name)))


def is_linkable(name: str) -> bool:
    """Tell whether a link may name a model: a name of conf/model/ or a repository of the hub, never a folder."""
    return name in names() or (REPOSITORY.fullmatch(name) is not None and not project_path(name).exists())


def has_weights(name: str) -> bool:
    """Tell whether a model's weights are on this machine."""
    try:
        checkpoints.find_checkpoint(find(name).cfg, fetch=False)
    except FileNotFoundError:
        return False
    return True


@functools.lru_cache(maxsize=64)
def find(name: str) -> Model:
    """Return a model by its name in conf/model/, its folder or its repository, without looking for its weights.

    Raises:
        FileNotFoundError: there is no such model on this machine.
        ValueError: its pipeline is not supported.
    """
    if name in names():
        return _compose(name, name)
    folder = _folder(name)
    if not isinstance(index := read_json(folder / "model_index.json"), dict):
        raise ValueError(f"expected a model_index.json that maps names in {folder}, got a {type(index).__name__}")
    pipeline = index.get("_class_name")
    kinds = {key for key, architecture in checkpoints.ARCHITECTURES.items() if architecture.pipeline == pipeline}
    base = next((name for name, kind in _architectures().items() if kind in kinds), None)
    if base is None:
        supported = ", ".join(sorted(architecture.pipeline for architecture in checkpoints.ARCHITECTURES.values()))
        raise ValueError(f"expected a model of one of {supported}, got a {pipeline} in {folder}: choose another one")
    variant = "fp16" if any(folder.glob("*/*.fp16.*")) else None
    return _compose(name, base, source=str(folder), revision=None, variant=variant)


def _folder(name: str) -> Path:
    folder = project_path(name)
    if os.path.isfile(folder / "model_index.json"):  # False, not an error, for a name that no file can have
        return folder
    if REPOSITORY.fullmatch(name) and not folder.parent.is_dir():  # else it is a mistyped folder
        cached = try_to_load_from_cache(name, "model_index.json")
        if isinstance(cached, str):
            return Path(cached).parent
        raise FileNotFoundError(
            f"expected {name} in the hub's cache, got no model_index.json of it: hf download {name}, on a machine with "
            f"a network, or choose {DEFAULT_MODEL}"
        )
    raise FileNotFoundError(
        f"expected a name of conf/model, a folder in the diffusers layout or OWNER/NAME of the hub, got {name!r} "
        f"without a model_index.json: choose {DEFAULT_MODEL}, or give another folder"
    )


@functools.cache
def _architectures() -> dict[str, str]:
    """Return name -> architecture of conf/model/, published checkpoints before the embedded models."""
    specs = {name: OmegaConf.load(PROJECT / "conf" / "model" / f"{name}.yaml") for name in names()}
    return {name: spec.architecture for name, spec in specs.items() if "architecture" in spec}


def _compose(name: str, base: str, **changes: Any) -> Model:
    with _composing:
        cfg, reference = (first([f"model={base}", f"method={method}"]) for method in ("negtome", "negtome_reference"))
    model = cfg.model
    if changes:
        # The size comes from the checkpoint's own configuration.
        size = {side: None for side in ("height", "width") if side in model.call}
        model.merge_with(changes, {"call": size})
    if select_device("auto") == "cpu" and model.dtype == "float16":
        model.dtype = "float32"  # the CPU lacks half of the operations
    configs = []
    for method in (cfg.method, reference.method):
        values = {field: method.get(field) for field in NegToMeConfig.__dataclass_fields__}
        config = NegToMeConfig(**{field: value for field, value in values.items() if value is not None})
        configs.append(config.published_for(model.architecture))
    return Model(name, base, model, *configs)


class MemoryPlan(NamedTuple):
    """How memory is saved: only the component that runs is on the device; the autoencoder works in tiles."""

    offload: bool
    tiled: bool


def plan_memory(free: int, weights: int, device: str) -> MemoryPlan:
    """Decide how to save memory from the free bytes on a device and the bytes of the pipeline's weights."""
    offload = device != "cpu" and 1.25 * weights > free
    return MemoryPlan(offload, free - (0 if offload else weights) < DECODING)


def load(model: Model) -> tuple[Any, MemoryPlan]:
    """Load a model's pipeline from this machine in the memory that is free.

    Raises:
        FileNotFoundError: its weights are missing; the message names the files.
    """
    device = select_device("auto")
    checkpoint = checkpoints.find_checkpoint(model.cfg, fetch=False)
    weights = sum(file.stat().st_size for file in checkpoint.folder.glob("*/*.safetensors"))
    is_cuda = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if is_cuda else psutil.virtual_memory().available
    memory = plan_memory(free, weights, device)
    if device == "cpu" and model.cfg.kind == "mini":
        torch.set_num_threads(1)  # its operations are too small to share
    pipe = checkpoints.load(model.cfg, checkpoint, device, offload=memory.offload)
    if memory.tiled and hasattr(pipe.vae, "enable_tiling"):
        pipe.vae.enable_tiling()
    return pipe, memory
