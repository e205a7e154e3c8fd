"""The exports of a run: a script, commands, Hydra overrides of the benchmark, and PNGs that hold their settings."""

import base64
import io
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from experiments.demo.models import Model
from experiments.demo.request import ITSELF, GenerationRequest, split_prompt
from experiments.methods.negtome import NegToMe
from experiments.runs import catalogue
from negtome.image_files import chunks
from negtome.recipe import Recipe

#: Key of the page's link in the texts of a PNG.
LINK = "negtome demo"
#: The end of a script that makes the images of several methods; its braces are doubled for `format`.
METHODS_SCRIPT = """
# The methods are the benchmark's.
from PIL import Image

from experiments.configs import build
from experiments.plan import first
from experiments.prompts import ConsecutiveGroup

group = ConsecutiveGroup.of({prompt!r}, {category!r}, seed={seed}, size={images})
arguments = {{name: value for name, value in call.items() if name not in ("prompt", "num_images_per_prompt")}}
methods = {{
{methods}
}}
for name, overrides in methods.items():
    method = build(first(["model={model}", f"method={{name}}", *overrides]).method)
    images = method.generate(pipe, group, arguments).images
    for i, pixels in enumerate((255 * images).round().astype("uint8")):
        Image.fromarray(pixels).save(f"{{name}}-{{i}}.png")
"""


class Export(NamedTuple):
    """A text to copy: its title, a line on the images that it makes, and the text, "" if there is none."""

    title: str
    description: str
    text: str


def exports(request: GenerationRequest, recipe: Recipe, model: Model) -> list[Export]:
    """Return a script, commands and overrides that make the images again; an incomplete export says so."""
    if request.mode == "compare":
        first = [_methods_script(request, recipe, model), _methods_commands(request, recipe, model)]
    else:
        first = [_script(request, recipe), _command(request, recipe)]
    return [*first, _hydra(request, recipe, model)]


def _script(request: GenerationRequest, recipe: Recipe) -> Export:
    text = recipe.python()
    if request.mode == "quality":
        copy = f"image.filter(ImageFilter.GaussianBlur({request.blur:g} * min(image.size)))"
        text = text.replace(f'negtome.Reference("{ITSELF}")', f"[negtome.Reference({copy}) for image in without]")
        text = text.replace("import DiffusionPipeline\n", "import DiffusionPipeline\nfrom PIL import ImageFilter\n", 1)
    return Export("Python", "These very images, with diffusers and negtome alone.", text)


def _methods_script(request: GenerationRequest, recipe: Recipe, model: Model) -> Export:
    methods = [f"    {name!r}: {list(model.setup(name).overrides)!r}," for name in request.methods]
    text = METHODS_SCRIPT.format(
        prompt=recipe.prompt, category=split_prompt(recipe.prompt)[1], seed=recipe.seed, images=recipe.images,
        model=model.base, methods="\n".join(methods),
    )  # fmt: skip
    return Export("Python", "These very images, if run in the project's folder.", recipe.python() + text)


def _command(request: GenerationRequest, recipe: Recipe) -> Export:
    if request.mode == "quality":
        return Export("Command line", "It has no blurred copies: use the Python above.", "")
    return Export("Command line", "Both rows, if run in the project's folder.", f"{recipe.command()} --compare")


def _methods_commands(request: GenerationRequest, recipe: Recipe, model: Model) -> Export:
    """Return a command for each method that is NegToMe with other settings."""
    configs = {name: method.config for name in request.methods if type(method := model.method(name)) is NegToMe}
    if not configs:
        return Export("Command line", "It makes the baseline alone: use Python or the overrides.", recipe.command())
    commands = [f"{recipe.replace(config=config).command()} --compare" for config in configs.values()]
    titles = ", ".join(catalogue.entries()[name].title for name in configs)
    rest = "" if len(configs) == len(request.methods) else " For the other methods use Python or the overrides."
    description = f"The baseline and {titles}, if run in the project's folder.{rest}"
    return Export("Command line", description, "\n".join(commands))


def _hydra(request: GenerationRequest, recipe: Recipe, model: Model) -> Export:
    """Return commands of the benchmark: a run for each row, or one image grid if there is a reference image."""
    shared = [f"model={model.base}"]
    if model.name != model.base:
        shared += [f"model.source={_quoted(recipe.model)}", "model.variant=null"]
    if recipe.dtype != model.configured_dtype:
        shared.append(f"model.dtype={recipe.dtype}")
    if recipe.steps:
        shared.append(f"model.call.num_inference_steps={recipe.steps}")
    if request.mode == "compare":
        return _runs(request, recipe, shared, {name: model.setup(name).overrides for name in request.methods})
    config = recipe.config
    low, high = config.timestep_range
    settings = [
        f"method.threshold={config.threshold:g}", f"method.timestep_range=[{low:g},{high:g}]",
        f"method.matching={config.matching}", f"method.min_side={config.min_side}",
    ]  # fmt: skip
    if request.mode == "diversity":
        return _runs(request, recipe, shared, {"negtome": (f"method.alpha={config.alpha:g}", *settings)})
    if recipe.mask is not None:
        return Export("Hydra overrides", "They have no painted masks: use the Python above.", "")
    reference = _quoted(recipe.reference)
    if request.mode == "quality":
        reference = f"null, blur: {request.blur:g}"
    seeds = ",".join(map(str, recipe.seeds()))
    grid = (
        f"+applications.demo={{description: demo, prompt: {_quoted(recipe.prompt)}, reference: {reference}, "
        f"alphas: [{config.alpha:g}], seeds: [{seeds}]}}"
    )
    others = [f"~applications.{name}" for name in ("style", "quality", "masked", "interpolation")]
    description = "The same images as a grid with a row for each seed; files in outputs/results."
    return _overrides("applications", description, [*shared, *settings, *others, grid])


def _runs(
    request: GenerationRequest, recipe: Recipe, shared: list[str], methods: Mapping[str, Sequence[str]]
) -> Export:
    """Return the benchmark's command for the baseline and for each method with its overrides."""
    template, category = split_prompt(recipe.prompt)
    if not template:
        description = "The benchmark's prompts have at least two words, a template and a category; this one has one."
        return Export("Hydra overrides", description, "")
    if "${" in recipe.prompt:  # the configuration of the prompts interpolates it again, however it is escaped here
        return Export("Hydra overrides", "The benchmark's prompts cannot hold ${: use the Python above.", "")
    prompts = [
        "prompts._target_=experiments.prompts.ConsecutivePrompts",
        f"prompts.templates=[{_quoted(template)}]", f"prompts.categories=[{_quoted(category)}]",
        f"prompts.seeds=[{request.seed}]", f"prompts.images_per_prompt={request.images}",
        "prompts.groups_per_category=null",
    ]  # fmt: skip
    lines = []
    for name, settings in {"none": (), **methods}.items():
        # metric=none: a few images are too few for most metrics.
        lines.append(["metric=none", *shared, f"method={name}", *settings, *prompts])
    description = "These very images as runs of the benchmark, a command for each row; files in outputs/runs."
    return _overrides("generate", description, *lines)


def _overrides(command: str, description: str, *lines: list[str]) -> Export:
    commands = [shlex.join(["python", "-m", "experiments", command, *overrides]) for overrides in lines]
    return Export("Hydra overrides", description, "\n".join(commands))


def _quoted(text: str) -> str:
    """Quote a text for Hydra's grammar, without interpolation."""
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    escaped = re.sub(r"(\\+)('|$)", r"\1\1\2", escaped).replace("'", "\\'")
    return f"'{escaped}'"


def png(image: Image.Image, recipe: Recipe | None = None, link: str = "") -> bytes:
    """Return a PNG that holds a recipe, for `negtome generate --from`, and the page's link."""
    info = PngInfo() if recipe is None else chunks(recipe)
    if link:
        info.add_itxt(LINK, link)
    file = io.BytesIO()
    image.save(file, format="png", pnginfo=info)
    return file.getvalue()


def data_uri(content: bytes) -> str:
    """Return a PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
