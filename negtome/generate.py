"""Make the images of a recipe with a stock pipeline; `negtome generate` writes them into a folder."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import re
import sys
import tempfile
import textwrap
import warnings
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from negtome import image_files
from negtome.architectures import ARCHITECTURES
from negtome.attachment import Attachment, attach
from negtome.config import NegToMeConfig
from negtome.doctor import accelerator
from negtome.model_files import INDEX, LORA, find_variants, hub_failure, read_index
from negtome.recipe import Recipe, is_embedded
from negtome.reference import Reference
from negtome.sites import find_architecture
from negtome.stats import StepReport

#: Default folder of the images; each recipe has its own subfolder.
OUT = "negtome-images"
#: Further files in a folder of images: the image grid, and the recipe as Python.
GRID, SCRIPT = "compare.png", "recipe.py"
#: Command-line options that do not change pixels.
_NOT_IN_RECIPE = {"source", "compare", "out", "device", "low_memory"}
#: Pipelines whose call works without an input image; all others that take one need it.
_IMAGE_IS_OPTIONAL = {"FluxKontextPipeline", "Flux2Pipeline", "Flux2KleinPipeline"}


class GenerationResult(NamedTuple):
    """Images of a recipe.

    Attributes:
        images: PIL images, in the order of their seeds.
        attached: the attachment with its counts; None for the baseline.
    """

    images: list[Any]
    attached: Attachment | None


def generate(
    pipe: Any, recipe: Recipe, on_step: Callable[[StepReport], object] | None = None, **options: Any
) -> GenerationResult:
    """Make the images of a recipe, with NegToMe if it has settings for it. The pipeline is unchanged afterwards.

    Warns if a text encoder truncates a prompt.

    Args:
        pipe: the loaded pipeline of `recipe.model`.
        recipe: the settings.
        on_step: as in `negtome.attach`; not called for a baseline.
        options: keyword arguments of the pipeline's call that change no pixels, such as callback_on_step_end.

    Raises:
        ValueError: the pipeline does not take an argument, or makes another image size; or the reference image or its
            mask cannot be used.
        FileNotFoundError: the reference image or its mask does not exist.
        TypeError, RuntimeError: as in `negtome.attach`.
    """
    reference = _load_reference(recipe)
    call = recipe.arguments()
    check_arguments(type(pipe), call)
    for message in truncated_prompts(pipe, call):
        warnings.warn(message, stacklevel=2)
    call |= {"generator": [torch.Generator().manual_seed(seed) for seed in recipe.seeds()], **options}
    if recipe.config is None:
        result = GenerationResult(pipe(**call).images, None)
    else:
        with attach(pipe, recipe.config, references=reference, on_step=on_step) as attached:
            result = GenerationResult(pipe(**call).images, attached)
    width, height = result.images[0].size
    if recipe.width is not None and (width, height) != (recipe.width, recipe.height):
        raise ValueError(
            f"asked for {recipe.width}x{recipe.height} pixels, but this {type(pipe).__name__} makes {width}x{height}; "
            f"use --size {width}x{height}"
        )
    return result


def _load_reference(recipe: Recipe) -> Reference | None:
    return None if recipe.reference is None else Reference(recipe.reference, mask=recipe.mask)


def check_arguments(pipeline: type, call: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments that the call of a pipeline's class does not take, or would ignore."""
    name, parameters = pipeline.__name__, inspect.signature(pipeline.__call__).parameters
    if unknown := [argument for argument in call if argument not in parameters]:
        raise ValueError(f"a {name} does not take {', '.join(unknown)}; leave it out")
    for argument, value in call.items():
        default = parameters[argument].default
        if isinstance(default, bool):
            kind, fits = "true or false", isinstance(value, bool)
        elif isinstance(default, int | float):
            kind, fits = "a number", isinstance(value, int | float | None) and not isinstance(value, bool)
        else:
            continue
        if not fits:
            raise ValueError(f"{argument} of a {name} must be {kind}, got {value!r}")
    # Pipelines with embedded guidance (Flux) use a negative prompt only above this scale.
    scale = parameters.get("true_cfg_scale")
    if "negative_prompt" in call and scale is not None and (call.get("true_cfg_scale", scale.default) or 0) <= 1:
        raise ValueError(
            f"a {name} ignores the negative prompt unless true_cfg_scale is above 1: add --call true_cfg_scale=4"
        )


def truncated_prompts(pipe: Any, call: Mapping[str, Any]) -> list[str]:
    """Find prompts of a call that a text encoder truncates.

    CLIP encoders read as many tokens as their tokenizer says, other encoders `max_sequence_length` of the call if it
    takes that.

    Returns:
        A message for the prompt and for the negative prompt, if truncated.
    """
    parameter = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    sequence_length = None if parameter is None else call.get("max_sequence_length", parameter.default)
    messages = []
    for argument in ("prompt", "negative_prompt"):
        parts = []
        for name, tokenizer in pipe.components.items():
            if not name.startswith("tokenizer") or not hasattr(tokenizer, "model_max_length"):
                continue
            text = call.get(argument + name.removeprefix("tokenizer")) or call.get(argument)
            if not isinstance(text, str):
                continue
            limit = sequence_length
            if limit is None or "CLIP" in type(tokenizer).__name__:
                limit = getattr(pipe, f"{name}_max_length", tokenizer.model_max_length)
            count = len(tokenizer(text, verbose=False).input_ids)
            if count > limit:
                parts.append(f"{name.replace('tokenizer', 'text_encoder')} reads {limit} of {count} tokens")
        if parts:
            messages.append(f"the {argument.replace('_', ' ')} is truncated: {', '.join(parts)}; shorten it")
    return messages


def load(recipe: Recipe, device: str = "cpu", offload: bool = False) -> Any:
    """Load the stock pipeline of a recipe, from its folder, the hub's cache or the hub.

    Args:
        recipe: names the model, and what its call must take.
        device: where to run it, by torch's name.
        offload: keep only the active component on the device.

    Raises:
        ValueError: the device or the model is not there, files are missing, the pipeline is not supported, or its call
            does not take the recipe's arguments.
    """
    check_device(device, offload)
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    _check_model(recipe)
    # Without torch_dtype, transformers takes that of each text encoder's config, and diffusers float32 for the rest.
    options = {"torch_dtype": getattr(torch, recipe.dtype), "variant": recipe.variant, "use_safetensors": True}
    failure = None if Path(recipe.model).is_dir() else hub_failure()
    options["local_files_only"] = failure is not None
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(recipe.model, **options)
        if Path(recipe.model, LORA).is_file():
            pipe.load_lora_weights(recipe.model, weight_name=LORA)
        find_architecture(pipe)
    except (MemoryError, RuntimeError):
        raise
    except Exception as error:  # files, the hub, a network or truncated weights each raise their own kind
        raise ValueError(
            f"{recipe.model} cannot be used: {textwrap.shorten(str(error), 300)} (a folder needs all files of the "
            f"diffusers layout, with safetensors weights; {failure or 'a gated repository needs its licence accepted'})"
        ) from error
    # Transformers warns that indexing will fail for long prompts; pipelines truncate them, and we warn of that.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    elif device != "cpu":
        pipe.to(device)
    return pipe


def check_device(device: str, offload: bool = False) -> None:
    """Raise ValueError for an absent device, by torch's name, or for offloading on a CPU."""
    kind, _, number = device.partition(":")
    present = accelerator()
    count = 1 if kind == "cpu" else torch.accelerator.device_count()
    if kind not in ("cpu", present) or (number and (not number.isdecimal() or int(number) >= count)):
        devices = "cpu" if present == "cpu" else f"cpu or {present}"
        raise ValueError(f"this machine has no device {device}; use {devices}")
    if offload and kind == "cpu":
        raise ValueError("--low-memory needs a GPU; on the CPU all weights are in main memory anyway")


def _check_model(recipe: Recipe) -> None:
    """Refuse a model before its weights are read or fetched, if its other files show that it cannot be used."""
    import diffusers

    model, index = recipe.model, read_index(recipe.model)
    is_folder = Path(model).is_dir()
    if is_folder and not Path(model, INDEX).is_file():
        raise ValueError(f"{model} has no {INDEX}; a model is a folder in the diffusers layout")
    if not is_folder and not index:
        # models/nope is a mistyped folder if models/ is there; owner/name may be a repository.
        repository = re.fullmatch(r"[\w.-]+/[\w.-]+", model, re.ASCII) and not Path(model).parent.is_dir()
        hub = ", and no such repository can be read from the Hugging Face hub" if repository else ""
        failure = hub_failure() if repository else None
        raise ValueError(f"no folder {model}{hub}" + (f": {failure}" if failure else ""))
    # diffusers makes an empty tokenizer if its folder is absent, and meaningless images with it.
    components = [
        name for name, value in index.items() if isinstance(value, list) and isinstance(next(iter(value), None), str)
    ]
    absent = [name for name in components if is_folder and not Path(model, name).is_dir()]
    if absent:
        raise ValueError(
            f"{model} cannot be used: it has no folder {' and no '.join(absent)}, which its {INDEX} lists; copy or "
            "fetch the model again"
        )
    name = index.get("_class_name")
    pipeline = getattr(diffusers, name, None) if isinstance(name, str) else None
    if isinstance(pipeline, type):  # else loading reports the error
        _check_pipeline(recipe, pipeline)
    if recipe.variant is not None:
        components_variants = find_variants(model).values()
        variants = sorted(variant for variant in set().union(*components_variants) if variant is not None)
        if components_variants and recipe.variant not in variants:
            raise ValueError(
                f"{model} has no weights of the variant {recipe.variant!r}, but "
                f"{', '.join(variants) or 'only ones without a variant'}; choose one of these, or leave --variant out"
            )


def _check_pipeline(recipe: Recipe, pipeline: type) -> None:
    """Refuse a pipeline class that is not supported, makes videos, needs an image or does not take the arguments."""
    name = pipeline.__name__
    classes = {cls.__name__ for cls in pipeline.__mro__}
    architecture = next((one for one in ARCHITECTURES if classes & set(one.pipelines)), None)
    needs_image = inspect.signature(pipeline.__call__).parameters.keys() & {"image", "control_image"}
    reason = None
    if architecture is None:
        reason = f"NegToMe cannot be attached to a {name}; docs/pipelines.md lists the supported pipelines"
    elif architecture.video:
        reason = f"a {name} makes videos, and this command makes images; use negtome.attach in Python"
    elif needs_image and name not in _IMAGE_IS_OPTIONAL:
        reason = f"a {name} starts from an image, which this command does not take; use negtome.attach in Python"
    if reason is not None:
        raise ValueError(f"{recipe.model} cannot be used: {reason}")
    check_arguments(pipeline, recipe.arguments())


def recipe_from_args(arguments: Namespace) -> Recipe:
    """Return the recipe of a command line; see `negtome.__main__`.

    Raises:
        ValueError, FileNotFoundError: there is none.
    """
    values = {name: value for name, value in vars(arguments).items() if name not in _NOT_IN_RECIPE}
    if arguments.source is not None:
        return recipe_from_png(arguments.source, **values)
    if "prompt" not in values:
        raise ValueError('a prompt is missing: negtome generate "a photo of a dog", or --from IMAGE.png')
    settings = {name: values.pop(name) for name in list(values) if name.startswith("config.")}
    options, size = values.pop("options", []), values.pop("size", None)
    if size is not None:
        values["width"], values["height"] = size
    if values.pop("without", False):
        if settings or "few_steps" in values:
            raise ValueError("--without cannot be combined with settings of NegToMe; leave one of them out")
        values["config"] = None
    few_steps = values.pop("few_steps", False)
    recipe = Recipe.of(values.pop("prompt"), values.pop("model", None), **values)
    if few_steps:
        config = NegToMeConfig.few_step("unet" if "unet" in read_index(recipe.model) else "transformer")
        recipe = recipe.replace(config=config)
    if options:
        merged = {**recipe.options, **dict(options)}
        recipe = recipe.replace(options={name: value for name, value in merged.items() if value is not Ellipsis})
    if settings and recipe.config is not None:
        changes = {name.removeprefix("config."): value for name, value in settings.items()}
        recipe = recipe.replace(config=recipe.config.replace(**changes))
    return recipe


def recipe_from_png(source: str, **options: Any) -> Recipe:
    """Return the recipe in an image. Its author chose the model and files, so the user must name those too."""
    repeated = {name: options.pop(name, None) for name in ("model", "reference", "mask")}
    if options:
        raise ValueError(
            "--from already sets the prompt and the settings; only --model may be added, and --reference and --mask to "
            "repeat them"
        )
    recipe = image_files.read(source)
    for name, value in repeated.items():
        stored = getattr(recipe, name)
        if value == stored or (name == "model" and value is None and is_embedded(stored)):
            continue
        if stored is None:
            raise ValueError(f"{source} was made without a {name}; leave --{name} out")
        raise ValueError(
            f"{source} names the {name} {stored!r}, got {value!r}. Its author chose what would be read or fetched; add "
            f"--{name}={stored!r} to allow that"
        )
    return recipe


def check_folder(folder: Path, recipe: Recipe, made_from: str, scripts: Collection[str]) -> None:
    """Raise ValueError for a folder that holds anything else than images of this recipe, or an edited script.

    Args:
        folder: need not exist.
        recipe: of the new images.
        made_from: see `negtome.image_files.content`.
        scripts: texts of the script that may be overwritten.
    """
    expected: dict[str, Any] = {GRID: (recipe, made_from)}
    for kind, stored in _recipes_by_kind(recipe, made_from).items():
        expected |= {f"{kind}-{i}.png": stored for i in range(recipe.images)}
    if folder.is_dir():
        paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]  # such as .DS_Store
    else:
        paths = [folder] if folder.exists() else []
    script = folder / SCRIPT if folder / SCRIPT in paths else None
    for path in paths:
        if path != script and (path.name not in expected or _stored_recipe(path) != expected[path.name]):
            raise ValueError(
                f"{folder} must be a new folder, or one of this very recipe, but {path.name} is something else: choose "
                "another folder by --out"
            )
    if script is not None and script.read_bytes() not in [text.encode() for text in scripts]:
        raise ValueError(f"{script} was changed, or is for another device: move it away, or choose another --out")


def _stored_recipe(path: Path) -> tuple[Recipe, str] | None:
    try:
        return image_files.read_both(path)
    except (OSError, ValueError):
        return None


def _recipes_by_kind(recipe: Recipe, made_from: str) -> dict[str, tuple[Recipe, str]]:
    """Return the recipes of the baseline and of NegToMe, with their `content`, by the prefix of the files' names."""
    recipes = {"without": (recipe.without(), "")}
    if recipe.config is not None:
        recipes["with"] = (recipe, made_from)
    return recipes


def check_writable(folder: Path) -> None:
    """Raise ValueError if files cannot be written into a folder, which need not exist; leave nothing behind."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".") as file:
            file.write(bytes(2**16))
            file.flush()
    except OSError as error:
        raise ValueError(f"cannot write into {folder} ({error.strerror or error}): choose another --out") from error
    finally:
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()


def main(
    arguments: Namespace,
    change: Callable[[Recipe], Recipe] = lambda recipe: recipe,
    inspect_image: Callable[[Any], object] = lambda image: None,
) -> None:
    """Make the images of a command line, write them and print where; warnings are printed as they come.

    Args:
        arguments: of the command line.
        change: returns the recipe to make instead of the command line's, or raises.
        inspect_image: gets every PIL image before the first one is written; none is written if it raises.
    """
    with warnings_as_lines():
        _run(arguments, change, inspect_image)


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print warnings for users as one line each, and leave out those for developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = _print_warning
        yield


def _print_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    if issubclass(category, (UserWarning, RuntimeWarning)):
        print(f"warning: {message}", file=sys.stderr)


def _run(arguments: Namespace, change: Callable[[Recipe], Recipe], inspect_image: Callable[[Any], object]) -> None:
    recipe = change(recipe_from_args(arguments))
    if arguments.compare and recipe.config is None:
        raise ValueError("--compare needs settings of NegToMe; leave --without or --compare out")
    _load_reference(recipe)  # before the weights, so that errors come at once
    made_from = image_files.content(recipe)
    if arguments.source is not None and image_files.read_both(arguments.source)[1] not in ("", made_from):
        raise ValueError(
            f"{arguments.source} was made from another reference image or mask than {recipe.reference}: put those "
            "back, or make new images without --from"
        )
    folder = Path(arguments.out or Path(OUT) / _folder_name(recipe, made_from))
    device, offload = arguments.device or accelerator(), arguments.low_memory
    check_device(device, offload)
    check_folder(folder, recipe, made_from, [one.python(device, offload) for one in (recipe, recipe.without())])
    check_writable(folder)
    recipes = _recipes_by_kind(recipe, made_from)
    if not arguments.compare:
        recipes = {kind: stored for kind, stored in recipes.items() if stored[0] == recipe}
    results = _make(recipe, device, offload, {kind: one for kind, (one, _) in recipes.items()})
    for result in results.values():
        for image in result.images:
            inspect_image(image)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, stored in recipes.items():
        for i, image in enumerate(results[kind].images):
            image_files.save(image, folder / f"{kind}-{i}.png", *stored)
    names = [f"{kind}-0.png to {kind}-{recipe.images - 1}.png" for kind in recipes]
    if arguments.compare:
        rows = [(one.setting(), results[kind].images) for kind, (one, _) in recipes.items()]
        note = f"{recipe.model}, seeds {recipe.seeds()[0]} to {recipe.seeds()[-1]}: each column has the same seed"
        image_files.save(image_files.image_grid(recipe.prompt, rows, note), folder / GRID, recipe, made_from)
        names.append(GRID)
    image_files.write(folder / SCRIPT, recipe.python(device, offload).encode())
    print(f"{folder}: {', '.join(names)}; {SCRIPT} makes them in Python")
    print(f"{recipe.model}: {recipe.setting()}")
    if recipe.config is not None:
        print(describe(results["with"].attached.summary()))


def _make(recipe: Recipe, device: str, offload: bool, recipes: dict[str, Recipe]) -> dict[str, Any]:
    """Load the pipeline of a recipe, and make the images of each kind with it."""
    try:
        pipe = load(recipe, device, offload)
        # NegToMe comes first: its settings may not fit the model.
        return {kind: generate(pipe, recipes[kind]) for kind in reversed(recipes)}
    except (ValueError, OSError):
        raise
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error):  # CPUs have no class for it
            raise
        raise ValueError(
            f"too little memory on {device}: use fewer images (-n), a smaller --size, or on a GPU --dtype bfloat16 and "
            "--low-memory"
        ) from error
    except Exception as error:  # arguments that the pipeline does not check raise anything
        advice = "correct the --call options, or leave them out" if recipe.options else "its files may be damaged"
        raise ValueError(
            f"{recipe.model} cannot make these images ({type(error).__name__}: {error}): {advice}"
        ) from error


def describe(summary: Mapping[str, Any]) -> str:
    """Describe an attachment's `summary()` in a sentence."""
    return (
        f"{len(summary['active_timesteps'])} of {len(summary['timesteps'])} steps active, "
        f"{summary['tokens_pushed']:,} of {summary['tokens_compared']:,} tokens moved."
    )


def _folder_name(recipe: Recipe, made_from: str) -> str:
    """Return words of the prompt, and a digest of the recipe and the content of its reference."""
    words = re.sub(r"[^a-z0-9]+", "-", recipe.prompt.lower())[:40].strip("-")
    document = recipe.to_dict()
    del document["version"]  # changes no pixels
    digest = hashlib.sha256((json.dumps(document, sort_keys=True) + made_from).encode()).hexdigest()[:8]
    return f"{words or 'images'}-{digest}"
