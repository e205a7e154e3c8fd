"""What the page asks for, as a value: checked, written as a link and read from one, and made into a recipe."""

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
from experiments.demo.models import USUAL, Model, may_be_linked
from experiments.runs import catalogue
from negtome.merge import MATCHINGS
from negtome.recipe import Recipe

#: Where pictures that were given to the page lie, so that a script, a command and a link find them again.
PICTURES = PROJECT / "outputs" / "demo"
#: The most that one call makes.
MOST_IMAGES = 8
#: Numbers that the page draws seeds from; those of conf/prompts/, too.
SEEDS = 10**6


#: Stands in a recipe for the image itself, as a script of it saves it: what is blurred, where that is pushed away from.
ITSELF = "without-0.png"


class Mode(NamedTuple):
    """A way of using the method.

    Attributes:
        title: on its button.
        what: what it does, a line.
        alpha: strength; None: the model's own.
        controls: the fields of `Asked` that matter to it alone.
    """

    title: str
    what: str
    alpha: float | None = None
    controls: tuple[str, ...] = ()


STRENGTH = ("alpha", "threshold", "low", "high", "matching")
MODES = {
    "diversity": Mode(
        "Diversity", "The images of a prompt are pushed apart from the first one, which stays as it is.", None, STRENGTH
    ),
    "away": Mode(
        "Away from an image",
        "Images are pushed away from a reference image: a design, a character. Paint over what they must not resemble.",
        None,
        (*STRENGTH, "picture"),
    ),
    "style": Mode(
        "Style",
        "Away from how a reference image looks; the prompt says what is shown. Give an image in the style to leave.",
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
class Asked:
    """What a visitor wants to see.

    Attributes:
        mode: one of `MODES`.
        prompt: of all images.
        model: as `experiments.demo.models.find` takes it.
        images: that are made together, 1 to `MOST_IMAGES`; at least 2 where they are pushed apart.
        seed: of the first image's noise; the others' follow it.
        steps: None: as the model is configured.
        alpha, threshold, low, high, matching: of NegToMe; the window is from timestep `high` down to `low`.
        picture, mask: names of files in `PICTURES`, without ending; "" for none.
        blur: radius of the blur, as a share of an image's side.
        methods: names of conf/method/.
    """

    mode: str = "diversity"
    prompt: str = "a photo of a dog"
    model: str = USUAL
    images: int = 4
    seed: int = 0
    steps: int | None = None
    alpha: float = 0.9
    threshold: float = 0.7
    low: float = 850
    high: float = 1000
    matching: str = "paper"
    picture: str = ""
    mask: str = ""
    blur: float = 0.06
    methods: tuple[str, ...] = ("negtome", "cads", "lower_guidance")

    def check(self) -> None:
        """Raise ValueError, whose text says what to do, where nothing can be made of it."""
        if self.mode not in MODES:
            raise ValueError(f"expected one of {', '.join(MODES)} as mode, got {self.mode!r}")
        if not self.prompt.strip():
            raise ValueError("The prompt is empty: write what the images should show, such as “a photo of a dog”.")
        if not 1 <= self.images <= MOST_IMAGES:
            raise ValueError(f"expected 1 to {MOST_IMAGES} images, got {self.images}")
        if self.mode in ("diversity", "compare") and self.images < 2:
            raise ValueError("One image has nothing to be pushed from: choose at least two, or another mode.")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"expected a seed from 0 to {SEEDS - 1}, got {self.seed}")
        if self.steps is not None and not 1 <= self.steps <= 200:
            raise ValueError(f"expected 1 to 200 steps, got {self.steps}")
        if self.low > self.high:
            raise ValueError(f"The timestep range is empty, from {self.high:g} down to {self.low:g}: swap its ends.")
        if "picture" in MODES[self.mode].controls and not self.picture:
            raise ValueError("No reference image is given: upload or paste one, or choose another mode.")
        if self.mode == "compare" and not self.methods:
            raise ValueError("No method is chosen: tick at least one.")
        if unknown := set(self.methods) - catalogue.entries().keys():
            raise ValueError(f"expected names of conf/method as methods, got {', '.join(sorted(unknown))}")

    def recipe(self, model: Model) -> Recipe:
        """Return what decides the images, as the library has it.

        Blurred copies and other methods cannot be said in one: the reference of the former is `ITSELF`, and of the
        latter it is that of the images without any.

        Raises:
            ValueError: a setting is out of range.
        """
        call = model.call
        known = {
            "negative_prompt": call.pop("negative_prompt", None),
            "guidance_scale": call.pop("guidance_scale", None),
        }
        known |= {side: call.pop(side, None) for side in ("height", "width")}
        steps = call.pop("num_inference_steps", None)
        given = MODES[self.mode].controls
        own = model.group if self.mode == "diversity" else model.given
        reference = _file(self.picture) if "picture" in given else ITSELF if "blur" in given else None
        config = own.replace(
            alpha=self.alpha, threshold=self.threshold, timestep_range=(self.low, self.high), matching=self.matching
        )
        recipe = Recipe(
            model=model.cfg.source,
            prompt=self.prompt.strip(),
            images=self.images,
            seed=self.seed,
            steps=steps if self.steps is None else self.steps,
            options=call,
            dtype=str(model.cfg.dtype),
            config=None if self.mode == "compare" else config,
            reference=reference,
            mask=_file(self.mask) if self.mask and "picture" in given else None,
            **known,
        )
        return recipe

    def link(self) -> str:
        """Return the address of the page with these settings, from its root."""
        usual, values = Asked(), dataclasses.asdict(self) | {"methods": ",".join(self.methods)}
        shown = {"mode", "prompt", "seed", *MODES[self.mode].controls, "mask"}
        changed = {
            name: value
            for name, value in values.items()
            if value is not None and (name in shown or value != getattr(usual, name)) and value != ""
        }
        if "methods" not in MODES[self.mode].controls:
            changed.pop("methods", None)
        return f"?{urlencode(changed)}"

    @classmethod
    def from_query(cls, query: Mapping[str, str], own: str = USUAL) -> "Asked":
        """Read what `link` wrote; other names are nothing to it, and a value that is none is left out.

        A link may come from anybody: it names pictures of this machine by a hash, and never a path.

        Args:
            query: names and values of an address.
            own: the model that the page was started with, which may be a folder.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if (text := query.get(field.name)) is None:
                continue
            if field.name in ("images", "seed", "steps"):
                values |= {field.name: int(text)} if re.fullmatch(r"\d{1,6}", text) else {}
            elif field.name in ("alpha", "threshold", "low", "high", "blur"):
                values |= {field.name: number} if math.isfinite(number := _number(text)) else {}
            elif field.name in ("picture", "mask"):
                values |= {field.name: text} if _is_kept(text) else {}
            elif field.name == "methods":
                known = tuple(name for name in text.split(",") if name in catalogue.entries())
                values |= {"methods": known} if known else {}
            elif field.name == "model":
                values |= {"model": text} if text == own or may_be_linked(text) else {}
            elif field.name not in _CHOICES or text in _CHOICES[field.name]:
                values[field.name] = text
        if not _fits(values.get("mask", ""), values.get("picture", "")):
            values.pop("mask", None)
        return cls(**values)


_CHOICES = {"mode": tuple(MODES), "matching": MATCHINGS}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _is_kept(name: str) -> bool:
    return re.fullmatch("[0-9a-f]{16}", name) is not None and (PICTURES / f"{name}.png").is_file()


def _fits(mask: str, picture: str) -> bool:
    """Tell whether a kept mask is one of a kept picture: they have one size."""
    if not (mask and picture):
        return False
    with Image.open(kept(mask)) as inside, Image.open(kept(picture)) as whole:
        return inside.size == whole.size


def _file(name: str) -> str:
    """Return a kept picture's file, relative to the project where a command is run."""
    path = PICTURES / f"{name}.png"
    return (path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path).as_posix()


def split(prompt: str) -> tuple[str, str]:
    """Return a prompt's template and category, as the benchmark's prompts are made of: "a photo of a" and "dog".

    The category is the last word, or what follows the last article; without a template it is the whole prompt.
    """
    found = re.fullmatch(r"(.*\b(?:an?|the)) (\S.*)", prompt) or re.fullmatch(r"(.*\S) (\S+)", prompt)
    return (found[1], found[2]) if found else ("", prompt)


def keep(picture: Image.Image) -> str:
    """Write a picture where a recipe can name it; return its name, made of its pixels."""
    file = io.BytesIO()
    picture.save(file, format="png")
    name = hashlib.sha256(f"{picture.mode}{picture.size}".encode() + picture.tobytes()).hexdigest()[:16]
    path = PICTURES / f"{name}.png"
    if not path.is_file():
        write_bytes(path, file.getvalue())
    return name


def kept(name: str) -> Path:
    """Return the file of a kept picture."""
    return PICTURES / f"{name}.png"
