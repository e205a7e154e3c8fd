"""Everything that decides the images of one comparison, as a value that checks itself.

    recipe = Recipe.of("a photo of a dog", "models/mini-sdxl")
    print(recipe.python())     # a script that makes these images with diffusers and negtome
    print(recipe.command())    # the same as a command line
    recipe.to_dict()           # JSON values, stored in every image; Recipe.from_dict reads them

`negtome.generate.generate(pipe, recipe)` makes the images. This module does not import diffusers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from negtome.config import NegToMeConfig
from negtome.model_files import default_variant, find_file
from negtome.validation import check_float, check_int
from negtome.version import __version__

#: File in a model's folder with its recommended settings; see `ModelDefaults`.
FILE = "negtome.json"
#: Small models of the checkout; the first is the default.
EMBEDDED = ("models/mini-sdxl", "models/mini-flux")
#: Dtypes of the weights; all but the first want a GPU.
DTYPES = ("float32", "bfloat16", "float16")
#: Value on the command line that means "as the pipeline has it".
AUTO = "auto"
#: Fields of a recipe by the argument of the pipeline's call.
_ARGUMENTS = {
    "num_inference_steps": "steps", "guidance_scale": "guidance_scale", "height": "height", "width": "width"
}  # fmt: skip
#: Arguments that a recipe sets itself, or that change what a call returns.
_RESERVED = {
    "self", "prompt", "negative_prompt", "num_images_per_prompt", "generator", "latents", "output_type", "return_dict",
    "callback_on_step_end", "callback_on_step_end_tensor_inputs",
}  # fmt: skip
#: Command-line options with a single value: of a recipe, and of its NegToMeConfig.
_OPTIONS = {
    "-n": "images", "--seed": "seed", "--steps": "steps", "--guidance-scale": "guidance_scale",
    "--negative-prompt": "negative_prompt", "--dtype": "dtype", "--variant": "variant", "--reference": "reference",
    "--mask": "mask",
}  # fmt: skip
_SETTINGS = {
    "--alpha": "alpha", "--threshold": "threshold", "--timestep-range": "timestep_range", "--step-range": "step_range",
    "--matching": "matching", "--push-from": "reference", "--sites": "sites", "--min-side": "min_side",
}  # fmt: skip
_DEFAULTS = NegToMeConfig()
#: Every autoencoder accepts sides of a multiple of this; some pipelines need a larger one and say so.
_SIDE = 8
#: Upper bounds, far above what pipelines are used for: a recipe may come from somebody else's image.
_MOST = {"images": 256, "steps": 1000, "height": 8192, "width": 8192}
#: Key of the library's version in the JSON of a recipe.
_VERSION = "version"


@dataclass(frozen=True)
class ModelDefaults:
    """Recommended settings of a model, from `negtome.json` in its folder.

    Attributes:
        call: keyword arguments of the pipeline's call.
        group: settings of NegToMe to push the images of a group apart.
        reference: settings of NegToMe to push away from a reference image.
    """

    call: Mapping[str, Any] = field(default_factory=dict, hash=False)
    group: NegToMeConfig = _DEFAULTS
    reference: NegToMeConfig = _DEFAULTS

    @classmethod
    def of(cls, model: str) -> ModelDefaults:
        """Read the file from a folder or a repository of the hub; without it, use the library's defaults.

        Raises:
            ValueError: the file holds something else.
        """
        path = find_file(model, FILE)
        if path is None:
            return cls()
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            group, reference = (NegToMeConfig(**document.pop(name)) for name in ("group", "reference"))
            return cls(dict(document.pop("call")), group, reference, **document)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} must be JSON with call, group and reference ({error}); correct it, or delete it to use the "
                "library's defaults"
            ) from error

    def to_json(self) -> str:
        """Return the text of the file: alpha, and all settings that differ from the library's defaults."""
        document = {
            "call": dict(self.call),
            "group": _changed_settings(self.group),
            "reference": _changed_settings(self.reference),
        }
        return json.dumps(document, indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Recipe:
    """The settings of one comparison: the same model and initial latents, without and with NegToMe.

    Image i has its own initial latents, from a generator on the CPU with the seed `seed + i`. They are the same on
    every device and in every batch. Processors still differ in the last bits.

    Attributes:
        model: a folder in the diffusers layout, or a repository of the Hugging Face hub.
        prompt: not empty.
        negative_prompt: or None.
        images: how many images are generated together, 1 to 256; at least 2 without a reference.
        seed: of the first image, at least 0.
        steps: of the pipeline's call, 1 to 1000. None here and below: the pipeline's default.
        guidance_scale: of the pipeline's call, at least 0.
        height, width: in pixels, multiples of 8 up to 8192; both or neither.
        options: further keyword arguments of the pipeline's call, as JSON values, such as max_sequence_length.
        dtype: of the weights: "float32", "bfloat16" or "float16".
        variant: of the weight files, such as "fp16"; None: the files without a variant.
        config: the settings of NegToMe; None: the stock pipeline.
        reference: file of an image to push away from; None: push the images apart.
        mask: file of the reference's mask; see `negtome.Reference`.

    Raises:
        ValueError: a value has the wrong type or is out of range. Files are not opened.
    """

    model: str
    prompt: str
    negative_prompt: str | None = None
    images: int = 4
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    dtype: str = "float32"
    variant: str | None = None
    config: NegToMeConfig | None = _DEFAULTS
    reference: str | None = None
    mask: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "prompt"):
            if not _check_text(name, getattr(self, name)).strip():
                raise ValueError(f"{name} must not be empty")
        for name in ("negative_prompt", "reference", "mask"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        check_int("images", self.images, 1, _MOST["images"], "; make more by further runs, each with another seed")
        check_int("seed", self.seed, 0, 2**63 - self.images)
        if self.steps is not None:
            check_int("steps", self.steps, 1, _MOST["steps"])
        if self.guidance_scale is not None:
            scale = check_float("guidance_scale", self.guidance_scale, 0, math.inf)
            object.__setattr__(self, "guidance_scale", scale)
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width must be set together, or neither")
        for name in ("height", "width") if self.height is not None else ():
            if check_int(name, getattr(self, name), _SIDE, _MOST[name]) % _SIDE:
                raise ValueError(f"{name} must be a multiple of {_SIDE} pixels, got {getattr(self, name)}")
        object.__setattr__(self, "options", _check_options(self.options))
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.variant is not None and not re.fullmatch(r"[\w-]+", _check_text("variant", self.variant), re.ASCII):
            raise ValueError(f"variant must be the name of a variant of weights, such as fp16, got {self.variant!r}")
        self._check_settings()

    def _check_settings(self) -> None:
        if not isinstance(self.config, NegToMeConfig | None):
            raise ValueError(f"config must be a NegToMeConfig or None, got a {type(self.config).__name__}")
        # The command line separates sites by commas, and has a word for None.
        sites = () if self.config is None else self.config.sites or ()
        if sites == (AUTO,) or any("," in name for name in sites):
            raise ValueError(f"sites must have no commas and must not be {AUTO} alone, got {sites}")
        if self.mask is not None and self.reference is None:
            raise ValueError(f"mask needs a reference image, got the mask {self.mask} alone")
        if self.config is None and self.reference is not None:
            raise ValueError("a reference image needs settings of NegToMe, got none")
        if self.config is not None and self.reference is None and self.images < 2:
            raise ValueError("images must be at least 2 without a reference image, got 1: it has no other to move from")

    @classmethod
    def of(cls, prompt: str, model: str | None = None, **fields: Any) -> Recipe:
        """Make a recipe that takes everything you do not name from the `ModelDefaults`.

        A repository is looked up in the hub's cache or on the hub, if that can be reached.

        Args:
            prompt: of the images.
            model: None: the embedded one.
            fields: other fields of a recipe; `options` replaces the model's own. Without `variant`, "fp16" if there are
                such weights and the dtype is float16, or if a component has no others.

        Raises:
            ValueError: a field is wrong, or the model's file cannot be read.
            FileNotFoundError: no model is named, and the embedded one is absent.
        """
        model = _default_model() if model is None else model
        defaults = ModelDefaults.of(model)
        options = dict(defaults.call)
        values: dict[str, Any] = {_ARGUMENTS[name]: options.pop(name) for name in _ARGUMENTS if name in options}
        values["config"] = defaults.group if fields.get("reference") is None else defaults.reference
        values["options"] = options
        if "variant" not in fields:
            values["variant"] = default_variant(model, fields.get("dtype", DTYPES[0]))
        return cls(**{"model": model, "prompt": prompt, **values, **fields})

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Recipe:
        """Read the output of `to_dict`, of this version of the library or another.

        Absent fields, except model and prompt, have their defaults. Look at the model and the files before you run the
        recipe: its author chose them.

        Raises:
            ValueError: the document is no recipe, or has fields that this version does not know.
        """
        if not isinstance(document, Mapping):
            raise ValueError(f"a recipe must be an object with a model and a prompt, got a {type(document).__name__}")
        fields = dict(document)
        version = fields.pop(_VERSION, None)
        _check_fields("recipe", fields, cls, {"model", "prompt"}, version)
        if isinstance(fields.get("config"), Mapping):
            _check_fields("recipe's config", fields["config"], NegToMeConfig, set(), version)
            fields["config"] = NegToMeConfig(**fields["config"])
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values, with all defaults and the version of the library."""
        document = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)} | {_VERSION: __version__}
        document["options"] = dict(self.options)
        if self.config is not None:
            settings = dataclasses.asdict(self.config).items()
            document["config"] = {n: list(value) if isinstance(value, tuple) else value for n, value in settings}
        return document

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def without(self) -> Recipe:
        """Return the recipe of the baseline: the same images without NegToMe."""
        return self.replace(config=None, reference=None, mask=None)

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the pipeline's call, except the generators."""
        optional = {"negative_prompt": self.negative_prompt}
        optional |= {argument: getattr(self, name) for argument, name in _ARGUMENTS.items()}
        present = {name: value for name, value in optional.items() if value is not None}
        return {"prompt": self.prompt, "num_images_per_prompt": self.images, **present, **self.options}

    def seeds(self) -> range:
        """Return the seeds of the images."""
        return range(self.seed, self.seed + self.images)

    def setting(self) -> str:
        """Describe the settings of NegToMe in a line, for labels."""
        if self.config is None:
            return "without NegToMe"
        parts = [f"alpha {self.config.alpha:g}"]
        if self.config.threshold is not None:
            parts.append(f"threshold {self.config.threshold:g}")
        if self.config.timestep_range is not None:
            low, high = self.config.timestep_range
            parts.append(f"timesteps {low:g} to {high:g}")
        if self.config.step_range is not None:
            parts.append(f"step range {_range_text(self.config.step_range)}")
        printed = {"alpha", "threshold", "timestep_range", "step_range", "min_side"}
        rest = _changed_settings(self.config).keys() - printed
        parts += [f"{name} {getattr(self.config, name)}" for name in sorted(rest)]
        if self.reference is not None:
            parts.append(f"away from {Path(self.reference).name}")
        return f"with NegToMe: {', '.join(parts)}"

    def python(self, device: str = "cpu", offload: bool = False) -> str:
        """Write a script that makes and saves the images with diffusers and negtome, without it and then with it.

        Args:
            device: where to run the pipeline, by torch's name.
            offload: keep only the active component on the device.
        """
        # Without torch_dtype, transformers takes that of each text encoder's config, and diffusers takes float32.
        weights = f"torch_dtype=torch.{self.dtype}, use_safetensors=True"
        if self.variant is not None:
            weights += f", variant={_literal(self.variant)}"
        lines = ["import torch", "from diffusers import DiffusionPipeline", ""]
        lines.append(f"pipe = DiffusionPipeline.from_pretrained({_literal(self.model)}, {weights})")
        if offload:
            lines.append(f"pipe.enable_model_cpu_offload(device={_literal(device)})")
        elif device != "cpu":
            lines.append(f"pipe.to({_literal(device)})")
        lines.append("call = {")
        lines += [f"    {_literal(name)}: {_literal(value)}," for name, value in self.arguments().items()]
        lines.append("}")
        lines.append(_SCRIPT_BASELINE.format(seeds=self.seeds()))
        if self.config is not None:
            lines.insert(0, "import negtome")
            attached = ""
            if self.reference is not None:
                mask = "" if self.mask is None else f", mask={_literal(self.mask)}"
                lines.append(f"\nreference = negtome.Reference({_literal(self.reference)}{mask})")
                attached = ", references=reference"
            settings = _changed_settings(self.config).items()
            config = ", ".join(f"{name}={_literal(value)}" for name, value in settings)
            lines.append(_SCRIPT_NEGTOME.format(config=config, references=attached))
        return "\n".join(lines) + "\n"

    def command(self) -> str:
        """Write the command line that makes these images; it omits what the model's folder chooses."""
        defaults = Recipe.of(self.prompt, self.model, reference=self.reference, dtype=self.dtype)
        defaults = defaults.replace(reference=None, dtype=DTYPES[0])
        words = _option("--model", self.model)
        for option, name in _OPTIONS.items():
            if getattr(self, name) != getattr(defaults, name):
                words += _option(option, getattr(self, name))
        if (self.width, self.height) != (defaults.width, defaults.height):
            words += _option("--size", AUTO if self.width is None else f"{self.width}x{self.height}")
        for name in sorted({*self.options, *defaults.options}):
            if name not in self.options:
                words += _option("--call", f"{name}={AUTO}")
            elif name not in defaults.options or self.options[name] != defaults.options[name]:
                words += _option("--call", f"{name}={json.dumps(self.options[name])}")
        words += self._setting_options(defaults.config or _DEFAULTS)
        prompt = ["--", self.prompt] if self.prompt.startswith("-") else [self.prompt]
        words = [*words, *prompt] if len(prompt) == 2 else [*prompt, *words]
        return shlex.join(["negtome", "generate", *words])

    def _setting_options(self, defaults: NegToMeConfig) -> list[str]:
        if self.config is None:
            return ["--without"]
        words: list[str] = []
        for option, name in _SETTINGS.items():
            if getattr(self.config, name) != getattr(defaults, name):
                words += _option(option, getattr(self.config, name))
        if self.config.cross_attention != defaults.cross_attention:
            words.append("--cross-attention" if self.config.cross_attention else "--no-cross-attention")
        return words


_SCRIPT_BASELINE = """

def generators():
    \"\"\"Return a generator for each image, on the CPU: the same initial latents on every device.\"\"\"
    return [torch.Generator().manual_seed(seed) for seed in {seeds!r}]


without = pipe(**call, generator=generators()).images
for i, image in enumerate(without):
    image.save(f"without-{{i}}.png")"""

_SCRIPT_NEGTOME = """
config = negtome.NegToMeConfig({config})
with negtome.attach(pipe, config{references}) as attached:
    pushed = pipe(**call, generator=generators()).images
for i, image in enumerate(pushed):
    image.save(f"with-{{i}}.png")
print(attached.summary())"""


def find_embedded(name: str) -> str | None:
    """Return the folder of an embedded model, in the working folder or in negtome's checkout, or None."""
    folders = (Path(name), Path(__file__).parents[1] / name)
    return next((folder.as_posix() for folder in folders if (folder / "model_index.json").is_file()), None)


def is_embedded(model: str) -> bool:
    """Tell whether a model is an embedded one that is present."""
    folders = filter(None, map(find_embedded, EMBEDDED))
    return Path(model).resolve() in [Path(folder).resolve() for folder in folders]


def _default_model() -> str:
    folder = find_embedded(EMBEDDED[0])
    if folder is None:
        raise FileNotFoundError(
            f"the embedded {EMBEDDED[0]} is not here: name a folder in the diffusers layout or a repository of the "
            "Hugging Face hub"
        )
    return folder


def _check_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {value!r}")
    # Neither file names nor command lines hold a NUL, and UTF-8 has no surrogates.
    if "\0" in value or re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name} must hold whole characters only, got {value!r}")
    return value


def _check_fields(what: str, fields: Mapping[str, Any], cls: Any, required: set[str], version: object) -> None:
    """Refuse unknown or missing fields of a class, and name the versions of the library."""
    unknown = fields.keys() - {one.name for one in dataclasses.fields(cls)}
    absent = required - fields.keys()
    if not unknown and not absent:
        return
    problems = [f"lacks {', '.join(sorted(absent))}"] if absent else []
    if unknown:
        problems.append(f"has unknown fields {', '.join(sorted(map(repr, unknown)))}")
    writer = "an unnamed version" if version is None else f"version {version!r}"
    raise ValueError(
        f"this {what}, written by {writer}, {' and '.join(problems)}; this is negtome {__version__}: use the version "
        "that wrote it"
    )


def _check_options(options: object) -> dict[str, Any]:
    """Return a copy of further arguments as JSON values, or refuse them."""
    if not isinstance(options, Mapping) or not all(isinstance(name, str) and name.isidentifier() for name in options):
        raise ValueError(f"options must map names of arguments to values, got {options!r}")
    if reserved := sorted((_RESERVED | _ARGUMENTS.keys()) & options.keys()):
        raise ValueError(f"options must not hold arguments that a recipe sets itself, got {', '.join(reserved)}")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(options), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"options must be JSON values, got {options!r} ({error})") from error
    return copied


def _changed_settings(config: NegToMeConfig) -> dict[str, Any]:
    """Return alpha, and the other settings that differ from the library's defaults."""
    fields = {one.name: getattr(config, one.name) for one in dataclasses.fields(config)}
    return {name: value for name, value in fields.items() if name == "alpha" or value != getattr(_DEFAULTS, name)}


def _literal(value: Any) -> str:
    """Write a value as Python, with double quotes."""
    if isinstance(value, str) and value.isprintable():
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def _option(option: str, value: Any) -> list[str]:
    """Write an option and its value as words of a command line."""
    if value is None:
        text = AUTO
    elif isinstance(value, tuple):
        text = ",".join(value) if isinstance(value[0], str) else _range_text(value)
    else:
        text = _number_text(value)
    # A value that begins with a dash would be taken for another option.
    return [f"{option}={text}"] if text.startswith("-") else [option, text]


def _range_text(ends: tuple[float, float]) -> str:
    return ":".join(map(_number_text, ends))


def _number_text(value: Any) -> str:
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
