"""What a visitor takes away: a script, a command, the benchmark's overrides, pictures that know their settings."""

import base64
import io
import re
import shlex
from typing import NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from experiments.demo.asked import ITSELF, Asked, split
from experiments.demo.models import Model
from negtome.pictures import chunks
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
    return [_python(asked, recipe), _command(asked, recipe), _hydra(asked, recipe, model)]


def _python(asked: Asked, recipe: Recipe) -> Export:
    text = recipe.python()
    if asked.mode == "compare":
        return Export("Python", "The images without a method; the methods are the benchmark's, below.", text)
    if asked.mode == "quality":
        copy = f"image.filter(ImageFilter.GaussianBlur({asked.blur:g} * min(image.size)))"
        text = text.replace(f'negtome.Reference("{ITSELF}")', f"[negtome.Reference({copy}) for image in without]")
        text = text.replace("import DiffusionPipeline\n", "import DiffusionPipeline\nfrom PIL import ImageFilter\n", 1)
    return Export("Python", "These very images, with diffusers and negtome alone.", text)


def _command(asked: Asked, recipe: Recipe) -> Export:
    if asked.mode == "quality":
        return Export("Command line", "It has no blurred copies: use the Python above.", "")
    if asked.mode == "compare":
        return Export("Command line", "The images without a method, from the project's folder.", recipe.command())
    return Export("Command line", "Both rows, from the project's folder.", f"{recipe.command()} --compare")


def _hydra(asked: Asked, recipe: Recipe, model: Model) -> Export:
    """Return the benchmark's command: of images pushed apart an experiment of one group, else a sheet of pictures."""
    shared = [f"model={model.base}"]
    if model.name != model.base:
        shared += [f"model.source={_quoted(recipe.model)}", "model.variant=null"]
    shared += [f"model.call.num_inference_steps={recipe.steps}"] if recipe.steps else []
    settings = []
    if asked.mode != "compare":
        config = recipe.config
        window = ",".join(f"{end:g}" for end in config.timestep_range)
        settings = [f"method.threshold={config.threshold:g}", f"method.timestep_range=[{window}]"]
        settings += [f"method.matching={config.matching}", f"method.min_side={config.min_side}"]
    if asked.mode in ("diversity", "compare"):
        template, category = split(recipe.prompt)
        if not template:
            what = "The benchmark's prompts are a template and a category, of two words at least: this one is none."
            return Export("Hydra overrides", what, "")
        if "${" in recipe.prompt:  # which building the prompts interpolates once more, however it is escaped here
            return Export("Hydra overrides", "The benchmark's prompts cannot hold ${: use the Python above.", "")
        methods = asked.methods if asked.mode == "compare" else ("negtome",)
        settings += [f"method.alpha={recipe.config.alpha:g}"] if asked.mode == "diversity" else []
        prompts = [
            f"prompts.templates=[{_quoted(template)}]", f"prompts.categories=[{_quoted(category)}]",
            f"prompts.seeds=[{asked.seed}]", f"prompts.images_per_prompt={asked.images}",
            "prompts.groups_per_category=null",
        ]  # fmt: skip
        what = "The same settings in the benchmark, whose noises are its own."
        return _overrides("generate", what, "metric=none", *shared, f"method={','.join(methods)}", *settings, *prompts)
    what = "The same, a sheet of a row a seed; files in outputs/results."
    if recipe.mask is not None:
        return Export("Hydra overrides", "It has no painted masks: use the Python above.", "")
    reference = "null" if asked.mode == "quality" else _quoted(recipe.reference)
    blur = f", blur: {asked.blur:g}" if asked.mode == "quality" else ""
    seeds = ",".join(map(str, recipe.seeds()))
    own = (
        f"+applications.demo={{description: demo, prompt: {_quoted(recipe.prompt)}, reference: {reference}{blur}, "
        f"alphas: [{recipe.config.alpha:g}], seeds: [{seeds}]}}"
    )
    others = [f"~applications.{name}" for name in ("style", "quality", "masked", "interpolation")]
    return _overrides("applications", what, *shared, *settings, *others, own)


def _overrides(command: str, what: str, *words: str) -> Export:
    return Export("Hydra overrides", what, shlex.join(["python", "-m", f"experiments.{command}", *words]))


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
