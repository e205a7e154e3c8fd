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
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from negtome import pictures
from negtome.architectures import ARCHITECTURES
from negtome.attachment import Attachment, attach
from negtome.doctor import accelerator
from negtome.model_files import INDEX, find_variants, read_index
from negtome.recipe import Recipe, is_embedded
from negtome.reference import Reference
from negtome.sites import find_architecture
from negtome.tally import StepReport

#: Where images go when no folder is named: below it one of the recipe's own.
OUT = "negtome-images"
#: What a folder of images holds beside them: the sheet, and the recipe as Python.
SHEET, SCRIPT = "compare.png", "recipe.py"
#: Options of the command that decide no pixels.
_APART = {"source", "compare", "out", "device", "low_memory"}
#: Pipelines that can do without the image that their call takes; all others that take one need it.
_IMAGE_IS_OPTIONAL = {"FluxKontextPipeline", "Flux2Pipeline", "Flux2KleinPipeline"}


class Made(NamedTuple):
    """Images of a recipe.

    Attributes:
        images: PIL images, in the order of their seeds.
        attached: what NegToMe did, as its `summary()`; None without it.
    """

    images: list[Any]
    attached: Attachment | None


def generate(pipe: Any, recipe: Recipe, on_step: Callable[[StepReport], object] | None = None, **more: Any) -> Made:
    """Make the images of a recipe, with NegToMe where it has settings for it. The pipeline is afterwards as before.

    Args:
        pipe: what `DiffusionPipeline.from_pretrained(recipe.model)` gives.
        recipe: what to make.
        on_step: as of `negtome.attach`; not called for a recipe without NegToMe.
        more: keyword arguments of the pipeline's call that change no pixels, such as callback_on_step_end.

    Raises:
        ValueError: the pipeline does not take an argument, or makes another size than was asked for, or the reference
            picture or its mask cannot be used.
        FileNotFoundError: there is no such picture.
        TypeError, RuntimeError: as of `negtome.attach`.

    Warns of a prompt that a text encoder cuts off.
    """
    reference = _picture(recipe)
    call = recipe.arguments()
    check_arguments(type(pipe), call)
    for message in cut_texts(pipe, call):
        warnings.warn(message, stacklevel=2)
    call |= {"generator": [torch.Generator().manual_seed(seed) for seed in recipe.seeds()], **more}
    if recipe.config is None:
        made = Made(pipe(**call).images, None)
    else:
        with attach(pipe, recipe.config, references=reference, on_step=on_step) as attached:
            made = Made(pipe(**call).images, attached)
    size = made.images[0].size
    if recipe.width is not None and size != (recipe.width, recipe.height):
        raise ValueError(
            f"expected images of {recipe.width}x{recipe.height} pixels, but this {type(pipe).__name__} makes "
            f"{size[0]}x{size[1]} of that; ask for these"
        )
    return made


def _picture(recipe: Recipe) -> Reference | None:
    return None if recipe.reference is None else Reference(recipe.reference, mask=recipe.mask)


def check_arguments(pipeline: type, call: Mapping[str, Any]) -> None:
    """Refuse arguments that the call of a pipeline's class does not take, or would ignore.

    Raises:
        ValueError: one is unknown, or is no number where the call has one as default; or a negative prompt would have
            no effect.
    """
    name, takes = pipeline.__name__, inspect.signature(pipeline.__call__).parameters
    if unknown := [argument for argument in call if argument not in takes]:
        raise ValueError(f"expected arguments that a {name} takes, got {', '.join(unknown)}; leave it out")
    for argument, value in call.items():
        default = takes[argument].default
        if isinstance(default, bool):
            expected, fits = "true or false", isinstance(value, bool)
        elif isinstance(default, int | float):
            expected, fits = "a number", isinstance(value, int | float | None) and not isinstance(value, bool)
        else:
            continue
        if not fits:
            raise ValueError(f"expected {expected} as {argument} of a {name}, got {value!r}")
    # What guides without a negative prompt (Flux) is guided by one only where this scale is asked for.
    scale = takes.get("true_cfg_scale")
    if "negative_prompt" in call and scale is not None and (call.get("true_cfg_scale", scale.default) or 0) <= 1:
        raise ValueError(
            f"expected true_cfg_scale above 1 beside a negative prompt, or a {name} ignores it: --call true_cfg_scale=4"
        )


def cut_texts(pipe: Any, call: Mapping[str, Any]) -> list[str]:
    """Say of which texts of a call a text encoder reads only the beginning.

    Args:
        pipe: the pipeline, whose tokenizers count.
        call: arguments of its call.

    Returns:
        A message for each prompt and negative prompt that is cut. CLIP's encoders read as many tokens as their
        tokenizer says, other ones as many as `max_sequence_length` of the call, where it takes that.
    """
    parameter = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    limit = None if parameter is None else call.get("max_sequence_length", parameter.default)
    messages = []
    for argument in ("prompt", "negative_prompt"):
        parts = []
        for name, tokenizer in pipe.components.items():
            if not name.startswith("tokenizer") or not hasattr(tokenizer, "model_max_length"):
                continue
            text = call.get(argument + name.removeprefix("tokenizer")) or call.get(argument)
            if not isinstance(text, str):
                continue
            most = limit
            if most is None or "CLIP" in type(tokenizer).__name__:
                most = getattr(pipe, f"{name}_max_length", tokenizer.model_max_length)
            count = len(tokenizer(text, verbose=False).input_ids)
            if count > most:
                parts.append(f"{name.replace('tokenizer', 'text_encoder')} reads {most} of {count} tokens")
        if parts:
            messages.append(f"the {argument.replace('_', ' ')} is cut: {', '.join(parts)}; shorten it")
    return messages


def load(recipe: Recipe, device: str = "cpu", offload: bool = False) -> Any:
    """Load the stock pipeline of a recipe, from its folder, the hub's cache or the hub.

    Args:
        recipe: what is to be made with it.
        device: where to run it, by torch's name.
        offload: keep on the device only the component that works.

    Raises:
        ValueError: there is no such device or model, files of it are missing, its pipeline is not supported, or its
            call does not take what the recipe has.
    """
    check_device(device, offload)
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    folder = Path(recipe.model)
    if (folder.exists() or recipe.model.startswith((".", "/", "~"))) and not (folder / INDEX).is_file():
        raise ValueError(f"expected a folder in the diffusers layout, with a {INDEX}, at {recipe.model}, got none")
    _check_model(recipe)
    # Without a dtype transformers takes that of each text encoder's config, and diffusers float32 for the rest.
    options = {"torch_dtype": getattr(torch, recipe.dtype), "variant": recipe.variant, "use_safetensors": True}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(recipe.model, **options)
        find_architecture(pipe)
    except (MemoryError, RuntimeError):
        raise
    except Exception as error:  # of files, of the hub, of a network, of weights that are cut off: each of its own kind
        raise ValueError(
            f"{recipe.model} cannot be used: {textwrap.shorten(str(error), 300)} (a folder needs all files of the "
            "diffusers layout, its weights as safetensors, what is on the hub a network and, where it is gated, its "
            "licence accepted)"
        ) from error
    # Of a prompt that is cut transformers says that indexing will fail, which pipelines see to; `cut_texts` says it.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    elif device != "cpu":
        pipe.to(device)
    return pipe


def check_device(device: str, offload: bool = False) -> None:
    """Refuse a device that is not here, by torch's name, or the processor as one to save memory on.

    Raises:
        ValueError: it is one of them.
    """
    kind, _, number = device.partition(":")
    here = accelerator()
    count = 1 if kind == "cpu" else torch.accelerator.device_count()
    if kind not in ("cpu", here) or (number and (not number.isdecimal() or int(number) >= count)):
        raise ValueError(f"expected a device that is here, cpu{'' if here == 'cpu' else f' or {here}'}, got {device}")
    if offload and kind == "cpu":
        raise ValueError("expected a GPU to save memory on, got the CPU, where all weights are anyway")


def _check_model(recipe: Recipe) -> None:
    """Refuse a model before its weights are read or fetched, as far as its files say what is wrong."""
    import diffusers

    index = read_index(recipe.model)
    # diffusers makes an empty tokenizer where its folder is absent, and images of nothing with it.
    stated = [
        name for name, value in index.items() if isinstance(value, list) and isinstance(next(iter(value), None), str)
    ]
    absent = [name for name in stated if Path(recipe.model).is_dir() and not Path(recipe.model, name).is_dir()]
    if absent:
        raise ValueError(
            f"{recipe.model} cannot be used: it has no folder {' and no '.join(absent)}, of which its {INDEX} says "
            "that it is there; copy or fetch the model again"
        )
    name = index.get("_class_name")
    pipeline = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(pipeline, type):
        return  # loading it says what is wrong
    classes = {cls.__name__ for cls in pipeline.__mro__}
    architecture = next((one for one in ARCHITECTURES if classes & set(one.pipelines)), None)
    if architecture is None:
        raise ValueError(
            f"{recipe.model} cannot be used: NegToMe cannot be attached to a {name}; docs/pipelines.md lists those "
            "that are supported"
        )
    if architecture.video:
        raise ValueError(
            f"{recipe.model} cannot be used: a {name} makes videos, which this command does not; use negtome.attach "
            "in Python"
        )
    takes = inspect.signature(pipeline.__call__).parameters
    if takes.keys() & {"image", "control_image"} and name not in _IMAGE_IS_OPTIONAL:
        raise ValueError(
            f"{recipe.model} cannot be used: a {name} starts from an image, which this command does not take; use "
            "negtome.attach in Python"
        )
    check_arguments(pipeline, recipe.arguments())
    if recipe.variant is not None:
        components = find_variants(recipe.model).values()
        variants = sorted({variant for some in components for variant in some if variant is not None})
        if components and recipe.variant not in variants:
            raise ValueError(
                f"{recipe.model} has no weights of the variant {recipe.variant!r}, but "
                f"{', '.join(variants) or 'only ones without a variant'}; choose one of these, or leave --variant out"
            )


def asked(arguments: Namespace) -> Recipe:
    """Return the recipe that a command line means; see `negtome.__main__`.

    Raises:
        ValueError, FileNotFoundError: it means none.
    """
    given = {name: value for name, value in vars(arguments).items() if name not in _APART}
    if arguments.source is not None:
        return _said(arguments.source, **given)
    if "prompt" not in given:
        raise ValueError('expected a prompt, as in negtome generate "a photo of a dog", or --from a picture; got none')
    settings = {name: given.pop(name) for name in list(given) if name.startswith("config.")}
    options, size = given.pop("options", []), given.pop("size", None)
    if size is not None:
        given["width"], given["height"] = size
    if given.pop("without", False):
        if settings:
            raise ValueError("expected no settings of NegToMe with --without, got some: leave them or it out")
        given["config"] = None
    recipe = Recipe.of(given.pop("prompt"), given.pop("model", None), **given)
    if options:
        merged = {**recipe.options, **dict(options)}
        recipe = recipe.replace(options={name: value for name, value in merged.items() if value is not Ellipsis})
    if settings and recipe.config is not None:  # which it is with --without alone, refused above
        changes = {name.removeprefix("config."): value for name, value in settings.items()}
        recipe = recipe.replace(config=recipe.config.replace(**changes))
    return recipe


def _said(source: str, **options: Any) -> Recipe:
    """Return the recipe in a picture. Who sent it chose its model and files, so the user has to name those, too."""
    allowed = {name: options.pop(name, None) for name in ("model", "reference", "mask")}
    if options:
        raise ValueError(
            "expected nothing that the picture says itself beside --from, but for its --model, --reference and --mask, "
            "got a prompt or settings"
        )
    recipe = pictures.read(source)
    for name, value in allowed.items():
        stated = getattr(recipe, name)
        if value == stated or (name == "model" and value is None and is_embedded(stated)):
            continue
        got = "none" if value is None else repr(value)
        if stated is None:
            raise ValueError(f"expected no --{name} beside --from, for {source} was made without one, got {got}")
        raise ValueError(
            f"expected --{name}={stated!r} beside --from, got {got}: that is what {source} names, and whoever made it "
            "chose what would be read or fetched; repeat it to allow it"
        )
    return recipe


def claim(folder: Path, recipe: Recipe, made_from: str, scripts: Collection[str]) -> None:
    """Refuse a folder that holds anything but what this recipe makes of reference pictures of this content.

    Args:
        folder: need not be there.
        recipe: what is to be made.
        made_from: see `negtome.pictures.content`.
        scripts: texts of the script that may be overwritten.

    Raises:
        ValueError: it does; the message says what.
    """
    both = _both(recipe, made_from)
    own = {f"{kind}-{i}.png": one for kind, one in both.items() for i in range(recipe.images)}
    own[SHEET] = (recipe, made_from)
    paths = sorted(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
    paths = [path for path in paths if path == folder or not path.name.startswith(".")]  # such as .DS_Store
    script = next((path for path in paths if path.name == SCRIPT and path != folder), None)
    foreign = [path.name for path in paths if path != script and _says(path) != own.get(path.name, ())]
    if foreign:
        raise ValueError(
            f"expected a new folder, or one of this very recipe and pictures, at {folder}, got {foreign[0]} of "
            "something else: name another one by --out, or none"
        )
    if script is not None and script.read_bytes() not in [text.encode() for text in scripts]:
        raise ValueError(
            f"expected {script} as it is written with these images, got it changed, or for another device: move it "
            "away, or name another folder by --out"
        )


def _says(path: Path) -> tuple[Recipe, str] | None:
    try:
        return pictures.read_both(path)
    except (OSError, ValueError):
        return None


def _both(recipe: Recipe, made_from: str) -> dict[str, tuple[Recipe, str]]:
    """Return what is made with NegToMe and without, and of what content, by what its files' names begin with."""
    return {"without": (recipe.without(), "")} | ({"with": (recipe, made_from)} if recipe.config is not None else {})


def probe(folder: Path) -> None:
    """Find out whether files can be written into a folder, which need not be there; leave nothing behind.

    Raises:
        ValueError: they cannot.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".") as file:
            file.write(bytes(2**16))
            file.flush()
    except OSError as error:
        raise ValueError(
            f"expected a folder that can be written to, got {folder} ({error.strerror or error}): name another by --out"
        ) from error
    finally:
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()


def main(arguments: Namespace) -> None:
    """Make what a command line asks for, write it and say where; warnings are printed as they come."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = _print_warning
        _run(arguments)


def _print_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    if issubclass(category, (UserWarning, RuntimeWarning)):
        print(f"warning: {message}", file=sys.stderr)


def _run(arguments: Namespace) -> None:
    recipe = asked(arguments)
    if arguments.compare and recipe.config is None:
        raise ValueError("expected settings of NegToMe to compare with, got none: leave --without or --compare out")
    _picture(recipe)  # read before the weights are, so that what is wrong with it is known at once
    made_from = pictures.content(recipe)
    if arguments.source is not None and pictures.read_both(arguments.source)[1] not in ("", made_from):
        raise ValueError(
            f"expected the reference picture and mask that {arguments.source} was made from, got others at "
            f"{recipe.reference}: put those back, or ask for new images without --from"
        )
    folder = Path(arguments.out or Path(OUT) / _name(recipe, made_from))
    device, offload = arguments.device or accelerator(), arguments.low_memory
    check_device(device, offload)
    claim(folder, recipe, made_from, [one.python(device, offload) for one in (recipe, recipe.without())])
    probe(folder)
    kinds = {kind: one for kind, one in _both(recipe, made_from).items() if arguments.compare or one[0] == recipe}
    made = _make(recipe, device, offload, {kind: one for kind, (one, _) in kinds.items()})
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        for i, image in enumerate(made[kind].images):
            pictures.save(image, folder / f"{kind}-{i}.png", *kinds[kind])
    if arguments.compare:
        rows = [(one.setting(), made[kind].images) for kind, (one, _) in kinds.items()]
        note = f"{recipe.model}, seeds {recipe.seeds()[0]} to {recipe.seeds()[-1]}: a column has the same noise"
        pictures.save(pictures.sheet(recipe.prompt, rows, note), folder / SHEET, recipe, made_from)
    pictures.write(folder / SCRIPT, recipe.python(device, offload).encode())
    names = [f"{kind}-0.png to {kind}-{recipe.images - 1}.png" for kind in kinds] + [SHEET] * arguments.compare
    print(f"{folder}: {', '.join(names)}; {SCRIPT} makes them in Python")
    print(f"{recipe.model}: {recipe.setting()}")
    if attached := made[[*kinds][-1]].attached:
        print(describe(attached.summary()))


def _make(recipe: Recipe, device: str, offload: bool, kinds: dict[str, Recipe]) -> dict[str, Made]:
    """Load the pipeline of a recipe, and make the images of each kind with it."""
    try:
        pipe = load(recipe, device, offload)
        # First with NegToMe, whose settings may turn out not to fit the model.
        return {kind: generate(pipe, kinds[kind]) for kind in reversed(kinds)}
    except (ValueError, OSError):
        raise
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error):  # of a CPU there is no kind of its own
            raise
        raise ValueError(
            f"expected enough memory on {device}, got too little: fewer images (-n), a smaller --size, on a GPU "
            "--dtype bfloat16 and --low-memory"
        ) from error
    except Exception as error:  # of an argument that the pipeline does not check, any kind
        advice = "correct what --call gives it, or leave it out" if recipe.options else "its files may be damaged"
        raise ValueError(
            f"{recipe.model} cannot make these images ({type(error).__name__}: {error}): {advice}"
        ) from error


def describe(summary: Mapping[str, Any]) -> str:
    """Say in a sentence what an attachment's `summary()` counts."""
    return (
        f"{len(summary['active_timesteps'])} of {len(summary['timesteps'])} steps active, "
        f"{summary['tokens_pushed']:,} of {summary['tokens_compared']:,} tokens pushed at {summary['sites']} sites"
    )


def _name(recipe: Recipe, made_from: str) -> str:
    """Return a folder's name: words of the prompt, and a digest of all that the recipe says and was made from."""
    words = re.sub(r"[^a-z0-9]+", "-", recipe.prompt.lower())[:40].strip("-")
    document = recipe.to_dict()
    del document["version"]  # which decides no pixels
    digest = hashlib.sha256((json.dumps(document, sort_keys=True) + made_from).encode()).hexdigest()[:8]
    return f"{words or 'images'}-{digest}"
