"""Load a configured model as a stock diffusers pipeline, or say which of its files are missing."""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from eval.files import read_json, settled_status
from eval.weights import Download, missing_vocabulary, network_failure
from experiments import PROJECT, project_path
from negtome.model_files import LORA

# diffusers is imported where a pipeline is loaded: nothing else needs the seconds that it takes.


class Architecture(NamedTuple):
    """How to find and load the pipelines of an architecture.

    Attributes:
        pipeline: name of diffusers' class.
        denoiser: name of the component.
        patch: side of an image token in latents.
        options: of `from_pretrained`; a component that is None there is not loaded, and not missing if it is absent.
    """

    pipeline: str
    denoiser: str = "transformer"
    patch: int = 2
    options: Mapping[str, Any] = MappingProxyType({})


ARCHITECTURES = {
    # A safety checker would blacken some images, and so change what is measured.
    "sd15": Architecture(
        "StableDiffusionPipeline",
        "unet",
        patch=1,
        options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    # An installed invisible-watermark package would otherwise change SDXL's pixels.
    "sdxl": Architecture("StableDiffusionXLPipeline", "unet", patch=1, options={"add_watermarker": False}),
    "sd3": Architecture("StableDiffusion3Pipeline"),
    "pixart": Architecture("PixArtSigmaPipeline"),
    "sana": Architecture("SanaPipeline", patch=1),
    "flux": Architecture("FluxPipeline"),
    "flux2": Architecture("Flux2Pipeline"),
    "flux2-klein": Architecture("Flux2KleinPipeline"),
    "chroma": Architecture("ChromaPipeline"),
    "qwen": Architecture("QwenImagePipeline"),
    "zimage": Architecture("ZImagePipeline"),
    "krea2": Architecture("Krea2Pipeline"),
    "cogview4": Architecture("CogView4Pipeline"),
    "lumina2": Architecture("Lumina2Pipeline"),
    "auraflow": Architecture("AuraFlowPipeline"),
}

#: Arguments of the pipelines' calls that are floats or lists of floats; all other numbers are integers.
FLOATS = {
    "caption_upsample_temperature", "cfg_trunc_ratio", "cfg_truncation", "denoising_end", "eta", "guidance_rescale",
    "guidance_scale", "mu", "sigmas", "skip_layer_guidance_scale", "skip_layer_guidance_start",
    "skip_layer_guidance_stop", "true_cfg_scale",
}  # fmt: skip

#: Stems of the weights' files, by transformers' and diffusers' conventions.
STEMS = ("model", "diffusion_pytorch_model")

#: Suffixes of a component's other files: its settings, vocabulary and chat template.
SETTINGS = (".json", ".txt", ".model", ".jinja")

#: Components without weights, by a part of their classes' names: their configuration file, one of several.
CONFIGURATIONS = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer_config.json",),
    "processor": ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json"),
}

#: Components that are not loaded.
UNUSED = {name for architecture in ARCHITECTURES.values() for name, it in architecture.options.items() if it is None}

#: Keys of autoencoders' configurations that have a list with an item for each level.
LEVELS = ("block_out_channels", "encoder_block_out_channels", "dim_mult")


class Checkpoint(NamedTuple):
    """A checkpoint on disk: its folder, and a fingerprint of its content, which does not depend on the folder."""

    folder: Path
    fingerprint: str


def find_checkpoint(model: DictConfig, fetch: bool = True) -> Checkpoint:
    """Find the model's checkpoint in a local folder, in the hub's cache, or (with a network) on the hub.

    Args:
        model: a conf/model/ group with `source`, `architecture`, `revision`, `variant`.
        fetch: whether to download from the hub what is not on this machine.

    Raises:
        FileNotFoundError: a file is missing; the message lists the files and the ways to get them.
        ValueError: the architecture is unknown, or the model does not support the image size of its call.
    """
    if model.architecture not in ARCHITECTURES:
        raise ValueError(f"model.architecture must be one of {sorted(ARCHITECTURES)}, got {model.architecture!r}")
    local = _local(model.source)
    if local is not None and not local.is_dir():
        shown = local.relative_to(PROJECT) if local.is_relative_to(PROJECT) else local
        raise FileNotFoundError(
            f"no folder {shown}: model.source of model={model.name} must be a folder in the diffusers layout, or a "
            "repository of the hub, OWNER/NAME"
        )
    folder = local or _from_hub(model, fetch)
    missing = missing_files(folder, model.architecture, model.variant)
    if missing:
        problem = f"{folder} is not a complete {model.architecture} pipeline folder"
        raise FileNotFoundError(_advice(model, problem, missing))
    _check_size(model, folder)
    return Checkpoint(folder, fingerprint(folder, model.variant))


def _local(source: str) -> Path | None:
    """Return the folder that a source names, or None for a repository of the hub."""
    local = project_path(source)
    means_folder = local.exists() or Path(source).is_absolute() or source.startswith((".", "~", "models/"))
    return Path(os.path.normpath(local)) if means_folder else None


def is_repository(model: DictConfig) -> bool:
    """Return whether a model's source is a repository of the hub and not a folder."""
    return _local(model.source) is None


@dataclass(frozen=True)
class CheckpointDownload(Download):
    """The files of a pipeline on the hub; components that lack the variant are downloaded without it."""

    variant: str | None = None

    def wanted(self, names: Collection[str]) -> list[str]:
        chosen = super().wanted(names)
        if self.variant is None:
            return chosen
        with_weights = {name.partition("/")[0] for name in chosen if name.endswith(".safetensors")}
        others = [name for name in names if name.partition("/")[0] not in with_weights]
        return sorted({*chosen, *Download(self.source, tuple(_patterns(None))).wanted(others)})


def download_of(model: DictConfig) -> CheckpointDownload | None:
    """Return what `find_checkpoint` downloads if no file is on this machine; None for a folder."""
    if not is_repository(model):
        return None
    return CheckpointDownload(model.source, tuple(_patterns(model.variant)), model.revision, variant=model.variant)


def count_parameters(folder: Path, variant: str | None = None) -> dict[str, int]:
    """Count the parameters of each component with weights, by the headers of a checkpoint's files."""
    from safetensors import safe_open

    counts: dict[str, int] = {}
    for name, (_, weights) in _components(folder, variant).items():
        for file in weights:
            with safe_open(folder / name / file, "pt") as tensors:
                shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118
            counts[name] = counts.get(name, 0) + sum(map(math.prod, shapes))
    return counts


def canonical_source(source: str) -> str:
    """Normalize a source: a folder within the project relative to it, any other folder absolute."""
    folder = _local(source)
    if folder is None:
        return source
    return (folder.relative_to(PROJECT) if folder.is_relative_to(PROJECT) else folder).as_posix()


def licence(model: DictConfig) -> str | None:
    """Return the licence of the model's source, and whether it is gated, if the configuration says so."""
    return model.get("licence", {}).get(model.source)


def torch_dtype(model: DictConfig) -> torch.dtype:
    """Return the dtype of `model.dtype`; raise ValueError if torch has no such dtype."""
    dtype = getattr(torch, str(model.dtype), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"model.dtype must name a torch dtype such as float32, float16 or bfloat16, got {model.dtype!r}"
        )
    return dtype


def call_arguments(model: DictConfig) -> dict[str, Any]:
    """Return `model.call` with numbers of the declared types: 5 becomes 5.0 for a scale, 128.0 becomes 128 for a side.

    Raises:
        ValueError: a text is given for a number.
    """
    call = OmegaConf.to_container(model.call, resolve=True)
    return {name: _as_declared(name, value) for name, value in call.items()}


def _as_declared(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_as_declared(name, item) for item in value]
    if name in FLOATS:
        if isinstance(value, (str, bool)):
            raise ValueError(f"model.call.{name} must be a number, got {value!r}")
        return float(value) if type(value) is int else value
    return int(value) if type(value) is float and value.is_integer() else value


def _pixels_of_token(model: DictConfig, folder: Path) -> int:
    """Return the side of an image token in pixels: each level of the autoencoder but the last halves a side."""
    vae = json.loads((folder / "vae" / "config.json").read_text())
    levels = next((len(vae[name]) for name in LEVELS if name in vae), 0)
    return 2 ** max(levels - 1, 0) * ARCHITECTURES[model.architecture].patch


def _check_size(model: DictConfig, folder: Path) -> None:
    """Refuse sizes that the pipeline would replace by its default or round, and numbers of steps below 1."""
    multiple = _pixels_of_token(model, folder)
    for name, step in (("height", multiple), ("width", multiple), ("num_inference_steps", 1)):
        value = model.get("call", {}).get(name)
        if value is not None and (type(value) not in (int, float) or not value > 0 or value % step):
            raise ValueError(
                f"model.call.{name} must be a positive multiple of {step} for model={model.name}, got {value!r}"
            )


def timesteps(model: DictConfig, folder: Path) -> list[float]:
    """Return the training timesteps of a call's steps, 1000 = pure noise, as the checkpoint's scheduler spaces them.

    Returns an empty list for other architectures than SD1.5, SDXL and Flux, and for calls with timesteps or sigmas.
    """
    call = call_arguments(model)
    if model.architecture not in ("sd15", "sdxl", "flux") or {"timesteps", "sigmas"} & call.keys():
        return []
    tokens = call["height"] * call["width"] // _pixels_of_token(model, folder) ** 2
    return _spaced(folder / "scheduler", call["num_inference_steps"], tokens, model.architecture == "flux")


@functools.lru_cache(maxsize=64)
def _spaced(folder: Path, steps: int, tokens: int, flux: bool) -> list[float]:
    import diffusers

    kind = read_json(folder / "scheduler_config.json")["_class_name"]
    scheduler = getattr(diffusers, kind).from_pretrained(folder)
    if not flux:
        scheduler.set_timesteps(steps)
        return scheduler.timesteps.tolist()
    shift = {}
    if scheduler.config.use_dynamic_shifting:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        limits = "base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"
        shift = {"mu": calculate_shift(tokens, *(scheduler.config[limit] for limit in limits))}
    scheduler.set_timesteps(sigmas=[1 - index / steps for index in range(steps)], **shift)
    return scheduler.timesteps.tolist()


def local_fingerprint(model: DictConfig) -> str | None:
    """Return the fingerprint of a checkpoint in a local folder, or None; nothing is fetched."""
    folder = project_path(model.source)
    if not folder.is_dir() or missing_files(folder, model.architecture, model.variant):
        return None
    return fingerprint(folder, model.variant)


def _components(folder: Path, variant: str | None) -> dict[str, tuple[str, list[str]]]:
    """Return the components of the pipeline in a folder: name -> configuration file, and files of weights if any."""
    components = {}
    for name, value in sorted(read_json(folder / "model_index.json").items()):
        # The index also has settings of the pipeline, some of them lists; a component is [library, class].
        is_component = isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)
        if not is_component or name in UNUSED:
            continue
        library, kind = value
        names = next((names for part, names in CONFIGURATIONS.items() if part in kind.lower()), None)
        if names:
            components[name] = next((file for file in names if (folder / name / file).is_file()), names[0]), []
        else:
            components[name] = "config.json", _weight_files(folder / name, STEMS[library == "diffusers"], variant)
    return components


def missing_files(folder: Path, architecture: str, variant: str | None = None) -> list[str]:
    """Return the files of the diffusers layout that `folder` lacks, as relative paths."""
    if not (folder / "model_index.json").is_file():
        return ["model_index.json"]
    components = _components(folder, variant)
    needed = (ARCHITECTURES[architecture].denoiser, "vae")
    missing = [f"{name}/config.json" for name in needed if name not in components]
    for name, (config, weights) in components.items():
        missing += [f"{name}/{file}" for file in (config, *weights) if not (folder / name / file).is_file()]
        if config == "tokenizer_config.json":
            missing += [f"{name}/{file}" for file in missing_vocabulary(folder / name)]
    return missing


def fingerprint(folder: Path, variant: str | None = None) -> str:
    """Return 16 hex digits of a SHA-256 over the configuration files and a sample of the weights.

    Of weights above 16 MiB it hashes the size and 64 blocks of 64 KiB, so that 24 GB take a second; fine-tuned weights
    differ in every block. Files are read again only when they have changed.
    """
    files = [folder / "model_index.json"]
    for name, (_, weights) in _components(folder, variant).items():
        files += sorted(path for path in (folder / name).iterdir() if path.suffix in SETTINGS)
        files += [folder / name / file for file in weights]
    files += [path for path in [folder / LORA] if path.is_file()]
    statuses = tuple(map(settled_status, files))
    return (_sampled if None in statuses else _remembered)(folder, tuple(files), statuses)


def _sampled(folder: Path, files: tuple[Path, ...], _: tuple[tuple[int, ...] | None, ...]) -> str:
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            if size <= 1 << 24:
                digest.update(file.read())
            else:
                for block in range(64):
                    file.seek(block * (size - (1 << 16)) // 63)
                    digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]


#: Every stage compares the weights of each of its runs with those on this machine.
_remembered = functools.lru_cache(maxsize=64)(_sampled)


def load(
    model: DictConfig, checkpoint: Checkpoint, device: str, *, compile_denoiser: bool = False, offload: bool = False
) -> Any:
    """Load the stock pipeline of a model from its checkpoint.

    Args:
        compile_denoiser: `torch.compile` the denoiser in place.
        offload: keep only the active component on `device` (`enable_model_cpu_offload`).

    Raises:
        ValueError: an unknown dtype.
    """
    dtype = torch_dtype(model)
    import diffusers
    import transformers

    # Their progress bars would break the one of experiments.generate.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    architecture = ARCHITECTURES[model.architecture]
    variant = model.variant if any(checkpoint.folder.glob(f"*/*.{model.variant}[.-]*")) else None
    pipe = getattr(diffusers, architecture.pipeline).from_pretrained(
        checkpoint.folder, dtype=dtype, variant=variant, local_files_only=True, **architecture.options
    )
    pipe.set_progress_bar_config(disable=True)
    if (checkpoint.folder / LORA).is_file():
        pipe.load_lora_weights(checkpoint.folder, weight_name=LORA)
    if architecture.denoiser == "unet":  # whose convolutions take a seventh less time with channels last, on a CPU too
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    # Where SDXL's autoencoder needs float32, its pipeline calls a deprecated method of its own, and each cast warns of
    # an empty list of modules: two lines a group.
    warnings.filterwarnings("ignore", message="`upcast_vae` is deprecated", category=FutureWarning)
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_names_modules)
    if offload:
        # Without an index, diffusers takes GPU 0 in every process.
        pipe.enable_model_cpu_offload(torch.cuda.current_device() if device == "cuda" else None, device)
    elif device != "cpu":  # where it is already
        pipe.to(device)
    if compile_denoiser:
        getattr(pipe, architecture.denoiser).compile()
    return pipe


def _names_modules(record: logging.LogRecord) -> bool:
    """Filter out warnings of a cast to float32 that name no module."""
    return "should be kept in float32: []" not in record.getMessage()


def _weight_files(folder: Path, stem: str, variant: str | None) -> list[str]:
    """Return the weight files of one component's folder, as the index of a sharded component lists them.

    The variant's files are preferred; a component without them falls back to files without variant, as in diffusers.
    If there are no files at all, the variant's file is returned.
    """
    suffixes = [f".{variant}", ""] if variant else [""]
    for suffix in suffixes:
        single = f"{stem}{suffix}.safetensors"
        if (folder / single).is_file():
            return [single]
        for index in (f"{stem}.safetensors.index{suffix}.json", f"{stem}{suffix}.safetensors.index.json"):
            if (folder / index).is_file():
                return sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
    return [f"{stem}{suffixes[0]}.safetensors"]


def _from_hub(model: DictConfig, fetch: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    arguments = {"repo_id": model.source, "revision": model.revision, "allow_patterns": _patterns(model.variant)}
    with contextlib.suppress(LocalEntryNotFoundError):
        cached = Path(snapshot_download(**arguments, local_files_only=True))
        if not missing_files(cached, model.architecture, model.variant):
            return cached
    problem = f"{model.source} is not in the hub's cache"
    if fetch and (reason := network_failure(None)):
        raise FileNotFoundError(_advice(model, f"{problem}, and {reason}"))
    if not fetch:
        raise FileNotFoundError(_advice(model, problem))
    try:
        folder = Path(snapshot_download(**arguments))
        if model.variant and (missing := missing_files(folder, model.architecture, model.variant)):
            # Components without the variant are fetched without it.
            arguments["allow_patterns"] = [name.replace(f".{model.variant}.", ".") for name in missing]
            snapshot_download(**arguments)
        return folder
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"model={model.name}: {model.source} is gated and not in the hub's cache: {how_to_accept(model.source)}, "
            "then run the same command again"
        ) from error
    except Exception as error:  # the kind of exception depends on the HTTP library of the installed version
        problem = f"{problem} and could not be downloaded ({error}); the same command goes on where it stopped"
        raise FileNotFoundError(_advice(model, problem)) from error


def how_to_accept(repository: str) -> str:
    """Return what to do before a gated repository can be downloaded."""
    from huggingface_hub import constants

    return f"accept its licence at {constants.ENDPOINT}/{repository} and run `hf auth login`"


def _patterns(variant: str | None) -> list[str]:
    """Return patterns of the files to fetch: the components' folders, with the variant's weights only."""
    suffix = f".{variant}" if variant else ""
    shards = dict.fromkeys((suffix, f"{suffix}-0*", "-0*"))
    weights = [f"*/{stem}{rest}.safetensors" for stem in STEMS for rest in shards]
    return ["model_index.json", *(f"*/*{suffix}" for suffix in SETTINGS), *weights]


def _advice(model: DictConfig, problem: str, files: Iterable[str] = ()) -> str:
    repository = model.source if is_repository(model) else "OWNER/NAME"
    gated = "gated" in (licence(model) or "")
    patterns = " ".join(f"--include '{pattern}'" for pattern in _patterns(model.variant))
    lines = [
        f"model={model.name}: {problem}.",
        *(f"  missing: {name}" for name in files),
        f"To get them, on a machine with a network: hf download {repository} {patterns}"
        f"{f' (a gated repository: first {how_to_accept(repository)})' if gated else ''}",
        "or, for a folder in the diffusers layout that you have already: model.source=/path/to/folder",
        "The embedded models need no download: model=mini-sdxl or model=mini-flux.",
    ]
    return "\n".join(lines)
