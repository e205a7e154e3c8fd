"""The exports of a run: a script, commands, and PNGs that hold their settings."""

import base64
import io
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

from experiments.compose import first
from experiments.configs import build
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
    """Return a script and commands that make the images again; an incomplete export says so."""
    if request.mode == "compare":
        return [_methods_script(request, recipe, model), _methods_commands(request, recipe, model)]
    script = recipe.python()
    if request.mode != "quality":
        command = Export("Command line", "Both rows, if run in the project's folder.", f"{recipe.command()} --compare")
    else:
        copy = f"image.filter(ImageFilter.GaussianBlur({request.blur:g} * min(image.size)))"
        script = script.replace(f'negtome.Reference("{ITSELF}")', f"[negtome.Reference({copy}) for image in without]")
        imported = "import DiffusionPipeline\n"
        script = script.replace(imported, f"{imported}from PIL import ImageFilter\n", 1)
        command = Export("Command line", "It has no blurred copies: use the Python above.", "")
    return [Export("Python", "These very images, with diffusers and negtome alone.", script), command]


def _methods_script(request: GenerationRequest, recipe: Recipe, model: Model) -> Export:
    methods = [f"    {name!r}: {list(model.setup(name).overrides)!r}," for name in request.methods]
    text = METHODS_SCRIPT.format(
        prompt=recipe.prompt, category=split_prompt(recipe.prompt)[1], seed=recipe.seed, images=recipe.images,
        model=model.base, methods="\n".join(methods),
    )  # fmt: skip
    return Export("Python", "These very images, if run in the project's folder.", recipe.python() + text)


def _methods_commands(request: GenerationRequest, recipe: Recipe, model: Model) -> Export:
    """Return a command for each method that is NegToMe with other settings."""
    configs = {name: method.config for name in request.methods if type(method := model.method(name)) is NegToMe}
    if not configs:
        return Export("Command line", "It makes the baseline alone: use the Python above.", recipe.command())
    commands = [f"{recipe.replace(config=config).command()} --compare" for config in configs.values()]
    titles = ", ".join(catalogue.entries()[name].title for name in configs)
    rest = "" if len(configs) == len(request.methods) else " For the other methods use the Python above."
    description = f"The baseline and {titles}, if run in the project's folder.{rest}"
    return Export("Command line", description, "\n".join(commands))


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
