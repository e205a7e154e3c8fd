"""The exports of a run: a script, commands, overrides of the benchmark, and images that hold their settings."""

import base64
import io
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from experiments.demo.asked import ITSELF, Asked, split
from experiments.demo.models import Model
from experiments.methods.negtome import NegToMe
from experiments.runs import catalogue
from negtome.image_files import chunks
from negtome.recipe import Recipe

#: The text in a PNG that holds the page's link.
LINK = "negtome demo"


class Export(NamedTuple):
    """A text to copy: what it is, a line on what it makes, and the text itself, empty where there is none."""

    title: str
    what: str
    text: str


def exports(asked: Asked, recipe: Recipe, model: Model) -> list[Export]:
    """Return the ways to make what is shown elsewhere; one that cannot say it all says so."""
    if asked.mode == "compare":
        by_hand = [_python_of_methods(asked, recipe, model), _commands_of_methods(asked, recipe, model)]
    else:
        by_hand = [_python(asked, recipe), _command(asked, recipe)]
    return [*by_hand, _hydra(asked, recipe, model)]


def _python(asked: Asked, recipe: Recipe) -> Export:
    text = recipe.python()
    if asked.mode == "quality":
        copy = f"image.filter(ImageFilter.GaussianBlur({asked.blur:g} * min(image.size)))"
        text = text.replace(f'negtome.Reference("{ITSELF}")', f"[negtome.Reference({copy}) for image in without]")
        text = text.replace("import DiffusionPipeline\n", "import DiffusionPipeline\nfrom PIL import ImageFilter\n", 1)
    return Export("Python", "These very images, with diffusers and negtome alone.", text)


def _python_of_methods(asked: Asked, recipe: Recipe, model: Model) -> Export:
    """Return a script that makes the baseline, and then the images of each method as the benchmark does."""
    _, category = split(recipe.prompt)
    settings = {name: list(model.setup(name).overrides) for name in asked.methods}
    lines = [
        "",
        "# The methods are the benchmark's.",
        "from PIL import Image",
        "",
        "from experiments.configs import build",
        "from experiments.plan import first",
        "from experiments.prompts import ConsecutiveGroup",
        "",
        f"group = ConsecutiveGroup.of({recipe.prompt!r}, {category!r}, seed={recipe.seed}, size={recipe.images})",
        'arguments = {name: value for name, value in call.items() if name not in ("prompt", "num_images_per_prompt")}',
        "methods = {",
        *(f"    {name!r}: {overrides!r}," for name, overrides in settings.items()),
        "}",
        "for name, overrides in methods.items():",
        f'    method = build(first(["model={model.base}", f"method={{name}}", *overrides]).method)',
        "    images = method.generate(pipe, group, arguments).images",
        '    for i, pixels in enumerate((255 * images).round().astype("uint8")):',
        '        Image.fromarray(pixels).save(f"{name}-{i}.png")',
    ]
    what = "These very images, from the project's folder: the methods are the benchmark's."
    return Export("Python", what, recipe.python() + "\n".join(lines) + "\n")


def _commands_of_methods(asked: Asked, recipe: Recipe, model: Model) -> Export:
    """Return a command for each method that NegToMe's own settings describe."""
    configs = {name: method.config for name in asked.methods if type(method := model.method(name)) is NegToMe}
    commands = [f"{recipe.replace(config=config).command()} --compare" for config in configs.values()]
    if not commands:
        return Export("Command line", "It makes the baseline alone: use Python or the overrides.", recipe.command())
    titles = ", ".join(catalogue.entries()[name].title for name in configs)
    rest = "" if len(configs) == len(asked.methods) else " For the other methods use Python or the overrides."
    what = f"The baseline and {titles}, from the project's folder.{rest}"
    return Export("Command line", what, "\n".join(commands))


def _command(asked: Asked, recipe: Recipe) -> Export:
    if asked.mode == "quality":
        return Export("Command line", "It has no blurred copies: use the Python above.", "")
    return Export("Command line", "Both rows, from the project's folder.", f"{recipe.command()} --compare")


def _hydra(asked: Asked, recipe: Recipe, model: Model) -> Export:
    """Return the benchmark's commands: of images pushed apart a run for each row, else a grid of images."""
    shared = [f"model={model.base}"]
    if model.name != model.base:
        shared += [f"model.source={_quoted(recipe.model)}", "model.variant=null"]
    shared += [f"model.dtype={recipe.dtype}"] if recipe.dtype != model.configured_dtype else []
    shared += [f"model.call.num_inference_steps={recipe.steps}"] if recipe.steps else []
    if asked.mode == "compare":
        return _runs(asked, recipe, shared, {name: model.setup(name).overrides for name in asked.methods})
    config = recipe.config
    window = ",".join(f"{end:g}" for end in config.timestep_range)
    settings = [f"method.threshold={config.threshold:g}", f"method.timestep_range=[{window}]"]
    settings += [f"method.matching={config.matching}", f"method.min_side={config.min_side}"]
    if asked.mode == "diversity":
        return _runs(asked, recipe, shared, {"negtome": (f"method.alpha={config.alpha:g}", *settings)})
    if recipe.mask is not None:
        return Export("Hydra overrides", "It has no painted masks: use the Python above.", "")
    reference = "null" if asked.mode == "quality" else _quoted(recipe.reference)
    blur = f", blur: {asked.blur:g}" if asked.mode == "quality" else ""
    seeds = ",".join(map(str, recipe.seeds()))
    own = (
        f"+applications.demo={{description: demo, prompt: {_quoted(recipe.prompt)}, reference: {reference}{blur}, "
        f"alphas: [{config.alpha:g}], seeds: [{seeds}]}}"
    )
    others = [f"~applications.{name}" for name in ("style", "quality", "masked", "interpolation")]
    what = "The same images as a grid with a row for each seed; files in outputs/results."
    return _overrides("applications", what, [*shared, *settings, *others, own])


def _runs(asked: Asked, recipe: Recipe, shared: list[str], methods: Mapping[str, Sequence[str]]) -> Export:
    """Return the benchmark's command for the baseline and for each method with its overrides."""
    template, category = split(recipe.prompt)
    if not template:
        what = "The benchmark's prompts are a template and a category, two words at least: this prompt has one."
        return Export("Hydra overrides", what, "")
    if "${" in recipe.prompt:  # which building the prompts interpolates once more, however it is escaped here
        return Export("Hydra overrides", "The benchmark's prompts cannot hold ${: use the Python above.", "")
    prompts = [
        "prompts._target_=experiments.prompts.ConsecutivePrompts",
        f"prompts.templates=[{_quoted(template)}]", f"prompts.categories=[{_quoted(category)}]",
        f"prompts.seeds=[{asked.seed}]", f"prompts.images_per_prompt={asked.images}",
        "prompts.groups_per_category=null",
    ]  # fmt: skip
    what = "These very images as runs of the benchmark, a command for each row; files in outputs/runs."
    methods = {"none": (), **methods}
    # A few images are too few for most metrics.
    lines = (["metric=none", *shared, f"method={name}", *settings, *prompts] for name, settings in methods.items())
    return _overrides("generate", what, *lines)


def _overrides(command: str, what: str, *lines: list[str]) -> Export:
    """Return a command of the benchmark for each line of overrides."""
    commands = (shlex.join(["python", "-m", "experiments", command, *words]) for words in lines)
    return Export("Hydra overrides", what, "\n".join(commands))


def _quoted(text: str) -> str:
    """Write a text as Hydra's grammar has it, none of which stands for something else."""
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    escaped = re.sub(r"(\\+)('|$)", r"\1\1\2", escaped).replace("'", "\\'")
    return f"'{escaped}'"


def png(image: Image.Image, recipe: Recipe | None = None, link: str = "") -> bytes:
    """Return an image as PNG; as texts in it a recipe, which `negtome generate --from` reads, and the page's link."""
    info = PngInfo() if recipe is None else chunks(recipe)
    if link:
        info.add_itxt(LINK, link)
    file = io.BytesIO()
    image.save(file, format="png", pnginfo=info)
    return file.getvalue()


def address(content: bytes, kind: str = "png") -> str:
    """Return a picture as an address that holds it whole."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
