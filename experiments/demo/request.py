"""A request for images: checked, written as a link, read from one, and turned into a recipe."""

import dataclasses
import hashlib
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

from PIL import Image

from eval.files import write_bytes
from experiments import PROJECT
from experiments.demo.models import DEFAULT_MODEL, Model, is_linkable
from experiments.runs import catalogue
from negtome import NegToMeConfig
from negtome.merge import MATCHINGS
from negtome.recipe import Recipe
from negtome.validation import read_step_range

#: Folder of the reference images and masks, where a script, a command and a link find them again.
PICTURES = PROJECT / "outputs" / "demo"
#: Largest number of images of a request.
MAX_IMAGES = 8
#: Number of seeds that the page draws from.
SEEDS = 10**6
#: Reference in the recipe of a blurred copy: the file in which the recipe's script saves the image.
ITSELF = "without-0.png"


class Mode(NamedTuple):
    """A way to use the method.

    Attributes:
        title: label of its button.
        description: one line.
        alpha: default strength; None: the model's.
        controls: fields of `GenerationRequest` that only some modes use.
    """

    title: str
    description: str
    alpha: float | None = None
    controls: tuple[str, ...] = ()


STRENGTH = ("alpha", "threshold", "low", "high", "step_range", "matching")
MODES = {
    "diversity": Mode(
        "Diversity", "The images of a prompt are pushed apart from the first one, which stays as it is.", None, STRENGTH
    ),
    "away": Mode(
        "Away from an image",
        "Images are pushed away from a reference image. Paint over the part that they must not resemble.",
        None,
        (*STRENGTH, "picture"),
    ),
    "style": Mode(
        "Style",
        "Images are pushed away from the style of a reference image; the prompt says what they show.",
        0.9,
        (*STRENGTH, "picture"),
    ),
    "quality": Mode("Quality", "Every image is pushed away from a blurred copy of itself.", 0.6, (*STRENGTH, "blur")),
    "towards": Mode(
        "Towards an image", "Alpha below 0 pulls images towards a reference image.", -0.4, (*STRENGTH, "picture")
    ),
    "compare": Mode(
        "Compare methods",
        "The same seeds through several training-free methods, each with the hyperparameter chosen for this model.",
        None,
        ("methods",),
    ),
}


@dataclass(frozen=True)
class GenerationRequest:
    """The settings of one run of the demo.

    Attributes:
        mode: one of `MODES`.
        prompt: of all images.
        model: a name, folder or repository that `experiments.demo.models.find` accepts.
        images: 1 to `MAX_IMAGES`; at least 2 if they are pushed apart.
        seed: of the first image; the next images have the next seeds.
        steps: None: the model's default.
        alpha, threshold, matching: settings of NegToMe.
        low, high: its timestep range.
        step_range: replaces it, as on the command line, such as "0:0"; "" for none.
        picture, mask: names of saved reference images, see `save_picture`; "" for none.
        blur: radius of the blur as a share of the image's side.
        methods: names in conf/method/.
    """

    mode: str = "diversity"
    prompt: str = "a photo of a dog"
    model: str = DEFAULT_MODEL
    images: int = 4
    seed: int = 0
    steps: int | None = None
    alpha: float = 0.9
    threshold: float = 0.7
    low: float = 850
    high: float = 1000
    step_range: str = ""
    matching: str = "paper"
    picture: str = ""
    mask: str = ""
    blur: float = 0.06
    methods: tuple[str, ...] = ("negtome", "cads", "lower_guidance")

    def uses(self, field: str) -> bool:
        """Tell whether the mode uses a field that only some modes use."""
        return field in MODES[self.mode].controls

    def check(self) -> None:
        """Raise ValueError with an advice if no images can be made."""
        if self.mode not in MODES:
            raise ValueError(f"expected one of {', '.join(MODES)} as mode, got {self.mode!r}")
        if not self.prompt.strip():
            raise ValueError("The prompt is empty: write what the images should show, such as “a photo of a dog”.")
        if not 1 <= self.images <= MAX_IMAGES:
            raise ValueError(f"expected 1 to {MAX_IMAGES} images, got {self.images}")
        if self.mode in ("diversity", "compare") and self.images < 2:
            raise ValueError("One image cannot be pushed from others: choose at least two, or another mode.")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"expected a seed from 0 to {SEEDS - 1}, got {self.seed}")
        if self.steps is not None and not 1 <= self.steps <= 200:
            raise ValueError(f"expected 1 to 200 steps, got {self.steps}")
        if self.step_range:
            _read_step_range(self.step_range)
        elif self.low > self.high:
            raise ValueError(f"The timestep range is empty, from {self.high:g} down to {self.low:g}: swap its ends.")
        if self.uses("picture") and not self.picture:
            raise ValueError("There is no reference image: upload or paste one, or choose another mode.")
        if self.mode == "compare" and not self.methods:
            raise ValueError("No method is chosen: tick at least one.")
        if unknown := set(self.methods) - catalogue.entries().keys():
            raise ValueError(f"expected names of conf/method as methods, got {', '.join(sorted(unknown))}")

    def recipe(self, model: Model) -> Recipe:
        """Return the recipe of the images.

        A recipe has neither blurred copies nor other methods: with blurred copies its reference is `ITSELF`, and with
        other methods it is the baseline's.

        Raises:
            ValueError: a setting is out of range.
        """
        call = model.call
        arguments = ("negative_prompt", "guidance_scale", "height", "width")
        fields = {name: call.pop(name, None) for name in arguments}
        default_steps = call.pop("num_inference_steps", None)
        config = model.group_config if self.mode == "diversity" else model.reference_config
        config = config.replace(alpha=self.alpha, threshold=self.threshold, matching=self.matching)
        if self.step_range:
            config = config.replace(step_range=_read_step_range(self.step_range))
        else:
            config = config.replace(timestep_range=(self.low, self.high))
        reference = ITSELF if self.uses("blur") else None
        if self.uses("picture"):
            reference = _project_file(self.picture)
        return Recipe(
            model=model.cfg.source,
            prompt=self.prompt.strip(),
            images=self.images,
            seed=self.seed,
            steps=default_steps if self.steps is None else self.steps,
            options=call,
            dtype=str(model.cfg.dtype),
            config=None if self.mode == "compare" else config,
            reference=reference,
            mask=_project_file(self.mask) if self.mask and self.uses("picture") else None,
            **fields,
        )

    def link(self) -> str:
        """Return the page's address with these settings, from its root."""
        always = {"mode", "prompt", "seed", *MODES[self.mode].controls, "mask"}
        query = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "methods":
                value = ",".join(value) if self.uses("methods") else ""
            if value not in (None, "") and (field.name in always or value != field.default):
                query[field.name] = value
        return f"?{urlencode(query)}"

    @classmethod
    def from_query(cls, query: Mapping[str, str], page_model: str = DEFAULT_MODEL) -> "GenerationRequest":
        """Read what `link` wrote; unknown names and invalid values are left out.

        A link may come from anybody: it names images on this machine by a hash, never by a path.

        Args:
            query: names and values in an address.
            page_model: the model that the page was started with, the only folder that a link may name.
        """
        values = {}
        for field in dataclasses.fields(cls):
            value = _parse(field.name, query.get(field.name, ""), page_model)
            if value is not None:
                values[field.name] = value
        if not _is_mask_of(values.get("mask", ""), values.get("picture", "")):
            values.pop("mask", None)
        return cls(**values)


def _parse(name: str, text: str, page_model: str) -> Any:
    """Return the value of a field in an address; None if the text is not a value of it."""
    if not text:
        return None
    if name in ("images", "seed", "steps"):
        return int(text) if re.fullmatch(r"\d{1,6}", text) else None
    if name in ("alpha", "threshold", "low", "high", "blur"):
        try:
            number = float(text)
        except ValueError:
            return None
        return number if math.isfinite(number) else None
    if name == "methods":
        return tuple(method for method in text.split(",") if method in catalogue.entries()) or None
    valid = {
        "picture": _is_saved,
        "mask": _is_saved,
        "model": lambda model: model == page_model or is_linkable(model),
        "mode": MODES.__contains__,
        "matching": MATCHINGS.__contains__,
        "step_range": _is_step_range,
    }
    return text if name not in valid or valid[name](text) else None


def _read_step_range(text: str) -> tuple[float, float]:
    """Read a step range; raise ValueError with an advice if it is none."""
    try:
        ends = read_step_range(text.strip())
    except ValueError as error:
        raise ValueError(f"The step range {error}.") from error
    return NegToMeConfig(step_range=ends).step_range


def _is_step_range(text: str) -> bool:
    try:
        _read_step_range(text)
    except ValueError:
        return False
    return True


def save_picture(picture: Image.Image) -> str:
    """Save a reference image or a mask as PNG and return its name, a hash of its pixels."""
    file = io.BytesIO()
    picture.save(file, format="png")
    name = hashlib.sha256(f"{picture.mode}{picture.size}".encode() + picture.tobytes()).hexdigest()[:16]
    if not picture_file(name).is_file():
        write_bytes(picture_file(name), file.getvalue())
    return name


def picture_file(name: str) -> Path:
    """Return the file of a saved image."""
    return PICTURES / f"{name}.png"


def _project_file(name: str) -> str:
    """Return the file of a saved image, relative to the project, where commands are run."""
    path = picture_file(name)
    return (path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path).as_posix()


def _is_saved(name: str) -> bool:
    return re.fullmatch("[0-9a-f]{16}", name) is not None and picture_file(name).is_file()


def _is_mask_of(mask: str, picture: str) -> bool:
    """Tell whether two saved images have the same size."""
    if not (mask and picture):
        return False
    with Image.open(picture_file(mask)) as inside, Image.open(picture_file(picture)) as image:
        return inside.size == image.size


def split_prompt(prompt: str) -> tuple[str, str]:
    """Split a prompt into the template and the category of the benchmark's prompts: "a photo of a" and "dog".

    The category follows the last article, or is the last word; a prompt of one word has no template.
    """
    match = re.fullmatch(r"(.*\b(?:an?|the)) (\S.*)", prompt) or re.fullmatch(r"(.*\S) (\S+)", prompt)
    return (match[1], match[2]) if match else ("", prompt)
