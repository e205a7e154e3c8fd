"""All that decides the images of one comparison, as a value: it checks itself and writes itself down in several ways.

    recipe = Recipe.of("a photo of a dog", "models/mini-sdxl")
    print(recipe.python())     # a script that makes these very images, with diffusers and negtome
    print(recipe.command())    # the same as a command line
    recipe.to_dict()           # JSON values, kept in every picture; Recipe.from_dict reads them

`negtome.generate.generate(pipe, recipe)` runs one. Nothing here knows diffusers.
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
from negtome.model_files import find_file, usual_variant
from negtome.validation import check_float, check_int
from negtome.version import __version__

#: In a model's folder, how it is used best; see `Choices`.
FILE = "negtome.json"
#: Small models of the checkout; the first is that of who names none.
EMBEDDED = ("models/mini-sdxl", "models/mini-flux")
#: Pipelines take weights in these; all but the first want a GPU.
DTYPES = ("float32", "bfloat16", "float16")
#: What a command line calls "as the pipeline has it".
AUTO = "auto"
#: Fields of a recipe by the arguments of the pipelines' calls.
_ARGUMENTS = {
    "num_inference_steps": "steps", "guidance_scale": "guidance_scale", "height": "height", "width": "width"
}  # fmt: skip
#: Further arguments that a recipe decides itself, or that would change what a call returns.
_RESERVED = {
    "self", "prompt", "negative_prompt", "num_images_per_prompt", "generator", "latents", "output_type", "return_dict",
    "callback_on_step_end", "callback_on_step_end_tensor_inputs",
}  # fmt: skip
#: Options of the command line: fields of a recipe, and of the settings in it. Others have a form of their own.
_OPTIONS = {
    "-n": "images", "--seed": "seed", "--steps": "steps", "--guidance-scale": "guidance_scale",
    "--negative-prompt": "negative_prompt", "--dtype": "dtype", "--variant": "variant", "--reference": "reference",
    "--mask": "mask",
}  # fmt: skip
_SETTINGS = {
    "--alpha": "alpha", "--threshold": "threshold", "--timesteps": "timestep_range", "--matching": "matching",
    "--push-from": "reference", "--sites": "sites", "--min-side": "min_side",
}  # fmt: skip
#: The library's defaults.
_PLAIN = NegToMeConfig()
#: Pixels that no autoencoder divides further; what a pipeline itself wants it says when it is called.
_SIDE = 8
#: Bounds of what is asked for, far above what pipelines are used for: a recipe may come from somebody else's picture.
_MOST = {"images": 256, "steps": 1000, "height": 8192, "width": 8192}
#: In the JSON of a recipe, the version of the library that wrote it.
_VERSION = "version"


@dataclass(frozen=True)
class Choices:
    """How a model is used best, as far as its folder says: `negtome.json`, with an object for each of the attributes.

    Attributes:
        call: keyword arguments of the pipeline's call.
        group: settings of NegToMe among the images of a group.
        reference: those away from a given picture.
    """

    call: Mapping[str, Any] = field(default_factory=dict, hash=False)
    group: NegToMeConfig = _PLAIN
    reference: NegToMeConfig = _PLAIN

    @classmethod
    def of(cls, model: str) -> Choices:
        """Read those of a folder or a repository of the hub; without that file they are the library's defaults.

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
                f"expected {path} to be JSON with call, group and reference, got something else ({error}); correct it, "
                "or delete it for the library's defaults"
            ) from error

    def to_json(self) -> str:
        """Return the text of the file; of the settings the strength, and what is not the library's default."""
        document = {"call": dict(self.call), "group": _shown(self.group), "reference": _shown(self.reference)}
        return json.dumps(document, indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Recipe:
    """What decides the images of one comparison: the same model and noises without and with NegToMe.

    Image i has a noise of its own, from a generator on the CPU with the seed `seed + i`: a recipe means the same
    noises on every device and in every batch. Processors still differ in the last bits.

    Attributes:
        model: a folder in the diffusers layout, or a repository of the Hugging Face hub.
        prompt: not empty.
        negative_prompt: or None.
        images: how many are generated together, 1 to 256; at least 2 where they are pushed apart.
        seed: of the first image, at least 0.
        steps: of the pipeline's call, 1 to 1000; None: as the pipeline has it, which holds for all that follow.
        guidance_scale: of the pipeline's call, at least 0.
        height, width: in pixels, multiples of 8 up to 8192; both or none.
        options: further keyword arguments of the pipeline's call, as JSON values, such as max_sequence_length.
        dtype: of the weights, by torch's name: "float32", "bfloat16" or "float16".
        variant: of the weights' files, such as "fp16"; None: the files without a variant's name.
        config: the settings of NegToMe; None: without it.
        reference: file of a picture to push away from, instead of from each other; None: there is none.
        mask: file of the picture's mask; see `negtome.Reference`.

    Raises:
        ValueError: a value is of another kind, or out of range. Files are not looked for.
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
    config: NegToMeConfig | None = _PLAIN
    reference: str | None = None
    mask: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "prompt"):
            if not _text(name, getattr(self, name)).strip():
                raise ValueError(f"expected a {name}, got an empty one")
        for name in ("negative_prompt", "reference", "mask"):
            if getattr(self, name) is not None:
                _text(name, getattr(self, name))
        check_int("images", self.images, 1, _MOST["images"], "; make more by further runs, each with another seed")
        check_int("seed", self.seed, 0, 2**63 - self.images)
        if self.steps is not None:
            check_int("steps", self.steps, 1, _MOST["steps"])
        if self.guidance_scale is not None:
            scale = check_float("guidance_scale", self.guidance_scale, 0, math.inf)
            object.__setattr__(self, "guidance_scale", scale)
        if (self.height is None) != (self.width is None):
            raise ValueError("expected height and width, or neither for the pipeline's own, got one of them")
        for name in ("height", "width") if self.height is not None else ():
            if check_int(name, getattr(self, name), _SIDE, _MOST[name]) % _SIDE:
                raise ValueError(f"expected {name} to be a multiple of {_SIDE} pixels, got {getattr(self, name)}")
        object.__setattr__(self, "options", _options(self.options))
        if self.dtype not in DTYPES:
            raise ValueError(f"expected one of {', '.join(DTYPES)} as dtype, got {self.dtype!r}")
        if self.variant is not None and not re.fullmatch(r"[\w-]+", _text("variant", self.variant), re.ASCII):
            raise ValueError(f"expected the name of a variant of weights, such as fp16, got {self.variant!r}")
        self._check_settings()

    def _check_settings(self) -> None:
        if not isinstance(self.config, NegToMeConfig | None):
            raise ValueError(f"expected a NegToMeConfig or None as config, got a {type(self.config).__name__}")
        # A command line has sites between commas, and a word for none.
        sites = () if self.config is None else self.config.sites or ()
        if sites == (AUTO,) or any("," in name for name in sites):
            raise ValueError(f"expected sites without commas, and not {AUTO} alone, got {sites}")
        if self.mask is not None and self.reference is None:
            raise ValueError(f"expected a reference picture that the mask is of, got the mask {self.mask} alone")
        if self.config is None and self.reference is not None:
            raise ValueError("expected settings of NegToMe beside a reference picture, got none: nothing would use it")
        if self.config is not None and self.reference is None and self.images < 2:
            raise ValueError(
                "expected at least 2 images, or a reference picture, got 1 image: it has nothing to be pushed from"
            )

    @classmethod
    def of(cls, prompt: str, model: str | None = None, **fields: Any) -> Recipe:
        """Make a recipe in which what is not named is as the model's folder says it is used best; see `Choices`.

        A repository is looked up in the hub's cache or on the hub, where that can be reached.

        Args:
            prompt: of the images.
            model: None: the embedded one.
            fields: others of a recipe; `options` in the place of the model's own. Without `variant`, "fp16" where
                there are such weights and the dtype is float16, or where a component has no others.

        Raises:
            ValueError: as of a recipe, or what the folder says cannot be read.
            FileNotFoundError: no model is named, and the embedded one is not there.
        """
        model = _usual_model() if model is None else model
        choices = Choices.of(model)
        call = dict(choices.call)
        known: dict[str, Any] = {_ARGUMENTS[name]: call.pop(name) for name in _ARGUMENTS if name in call}
        known["config"] = choices.group if fields.get("reference") is None else choices.reference
        known["options"] = call
        if "variant" not in fields:
            known["variant"] = usual_variant(model, fields.get("dtype", DTYPES[0]))
        return cls(**{"model": model, "prompt": prompt, **known, **fields})

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Recipe:
        """Read what `to_dict` wrote, in this version of the library or another. Look at its model and files before
        you run it: whoever wrote it chose them.

        A field that is absent, but for model and prompt, has its default: an older version did not have it.

        Raises:
            ValueError: it is something else, or has fields that this version does not know.
        """
        if not isinstance(document, Mapping):
            raise ValueError(f"expected a recipe, with a model and a prompt, got a {type(document).__name__}")
        fields = dict(document)
        version = fields.pop(_VERSION, None)
        _check_fields("recipe", fields, cls, {"model", "prompt"}, version)
        if isinstance(fields.get("config"), Mapping):
            _check_fields("recipe's config", fields["config"], NegToMeConfig, set(), version)
            fields["config"] = NegToMeConfig(**fields["config"])
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values, every setting of this version's defaults and the version included."""
        document = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)} | {_VERSION: __version__}
        document["options"] = dict(self.options)
        if self.config is not None:
            document["config"] = {name: _jsonable(value) for name, value in dataclasses.asdict(self.config).items()}
        return document

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def without(self) -> Recipe:
        """Return the recipe of the same images without NegToMe."""
        return self.replace(config=None, reference=None, mask=None)

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the pipeline's call, all but the generators of the noises."""
        known = {name: getattr(self, own) for name, own in _ARGUMENTS.items()}
        known = {"negative_prompt": self.negative_prompt, **known}
        given = {name: value for name, value in known.items() if value is not None}
        return {"prompt": self.prompt, "num_images_per_prompt": self.images, **given, **self.options}

    def seeds(self) -> range:
        """Return the seeds of the images' noises."""
        return range(self.seed, self.seed + self.images)

    def setting(self) -> str:
        """Say in a line what NegToMe does in it, for labels."""
        if self.config is None:
            return "without NegToMe"
        parts = [f"alpha {self.config.alpha:g}"]
        if self.config.threshold is not None:
            parts.append(f"threshold {self.config.threshold:g}")
        if self.config.timestep_range is not None:
            low, high = self.config.timestep_range
            parts.append(f"timesteps {low:g} to {high:g}")
        rest = _shown(self.config).keys() - {"alpha", "threshold", "timestep_range", "min_side"}
        parts += [f"{name} {getattr(self.config, name)}" for name in sorted(rest)]
        if self.reference is not None:
            parts.append(f"away from {Path(self.reference).name}")
        return f"with NegToMe: {', '.join(parts)}"

    def python(self, device: str = "cpu", offload: bool = False) -> str:
        """Write a script that makes and saves these images with diffusers and negtome: without it, and then with it.

        Args:
            device: where to run the pipeline, by torch's name.
            offload: keep on the device only the component that works.
        """
        place = {
            True: f"pipe.enable_model_cpu_offload(device={_literal(device)})",
            False: f"pipe.to({_literal(device)})",
        }
        # Without a dtype transformers takes that of each text encoder's config, and diffusers float32 for the rest.
        weights = f"torch_dtype=torch.{self.dtype}, use_safetensors=True"
        if self.variant is not None:
            weights += f", variant={_literal(self.variant)}"
        lines = [
            *(["import negtome"] if self.config else []),
            "import torch",
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({_literal(self.model)}, {weights})",
            *([place[offload]] if offload or device != "cpu" else []),
            "call = {",
            *(f"    {_literal(name)}: {_literal(value)}," for name, value in self.arguments().items()),
            "}",
            "",
            "",
            "def noises():",
            '    """Return a generator an image, on the CPU: the same noises on every device."""',
            f"    return [torch.Generator().manual_seed(seed) for seed in {self.seeds()!r}]",
            "",
            "",
            "without = pipe(**call, generator=noises()).images",
            "for i, image in enumerate(without):",
            '    image.save(f"without-{i}.png")',
        ]
        if self.config is not None:
            config = ", ".join(f"{name}={_literal(value)}" for name, value in _shown(self.config).items())
            from_reference = ""
            if self.reference is not None:
                mask = "" if self.mask is None else f", mask={_literal(self.mask)}"
                lines += ["", f"reference = negtome.Reference({_literal(self.reference)}{mask})"]
                from_reference = ", references=reference"
            lines += [
                "",
                f"config = negtome.NegToMeConfig({config})",
                f"with negtome.attach(pipe, config{from_reference}) as attached:",
                "    pushed = pipe(**call, generator=noises()).images",
                "for i, image in enumerate(pushed):",
                '    image.save(f"with-{i}.png")',
                "print(attached.summary())",
            ]
        return "\n".join(lines) + "\n"

    def command(self) -> str:
        """Write the command line that makes these images; what the model's folder chooses is left out."""
        usual = Recipe.of(self.prompt, self.model, reference=self.reference, dtype=self.dtype)
        usual = usual.replace(reference=None, dtype=DTYPES[0])
        given: list[tuple[str, str | None]] = [("--model", self.model)]
        for option, name in _OPTIONS.items():
            if getattr(self, name) != getattr(usual, name):
                given.append((option, _argument(getattr(self, name))))
        if (self.width, self.height) != (usual.width, usual.height):
            given.append(("--size", AUTO if self.width is None else f"{self.width}x{self.height}"))
        for name in sorted({*self.options, *usual.options}):
            if name not in self.options:
                given.append(("--call", f"{name}={AUTO}"))
            elif name not in usual.options or self.options[name] != usual.options[name]:
                given.append(("--call", f"{name}={json.dumps(self.options[name])}"))
        if self.config is None:
            given.append(("--without", None))
        else:
            chosen = usual.config or _PLAIN
            for option, name in _SETTINGS.items():
                if getattr(self.config, name) != getattr(chosen, name):
                    given.append((option, _argument(getattr(self.config, name))))
            if self.config.cross_attention != chosen.cross_attention:
                given.append(("--cross-attention" if self.config.cross_attention else "--no-cross-attention", None))
        prompt = ["--", self.prompt] if self.prompt.startswith("-") else [self.prompt]
        options = [word for option, text in given for word in _words(option, text)]
        words = [*options, *prompt] if len(prompt) == 2 else [*prompt, *options]
        return shlex.join(["negtome", "generate", *words])


def find_embedded(name: str) -> str | None:
    """Return the folder of an embedded model, in the working folder or the checkout that negtome runs from, or None."""
    folders = (Path(name), Path(__file__).parents[1] / name)
    return next((folder.as_posix() for folder in folders if (folder / "model_index.json").is_file()), None)


def is_embedded(model: str) -> bool:
    """Tell whether a model is one of the embedded ones that are here."""
    found = filter(None, map(find_embedded, EMBEDDED))
    return Path(model).resolve() in [Path(folder).resolve() for folder in found]


def _usual_model() -> str:
    found = find_embedded(EMBEDDED[0])
    if found is None:
        raise FileNotFoundError(
            f"expected a model, got none, and the embedded {EMBEDDED[0]} is not here: name a folder in the diffusers "
            "layout or a repository of the Hugging Face hub"
        )
    return found


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text as {name}, got {value!r}")
    if "\0" in value or not _encodable(value):
        raise ValueError(f"expected {name} to be of whole characters, got {value!r}")
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_fields(what: str, fields: Mapping[str, Any], cls: Any, required: set[str], version: object) -> None:
    """Refuse fields that a class does not have, or lacks, and name the versions of the library."""
    unknown = fields.keys() - {one.name for one in dataclasses.fields(cls)}
    absent = required - fields.keys()
    if not unknown and not absent:
        return
    problems = [f"it lacks {', '.join(sorted(absent))}"] if absent else []
    if unknown:
        problems.append(f"this version does not know {', '.join(sorted(map(repr, unknown)))}")
    writer = "an unnamed version" if version is None else f"version {version!r}"
    raise ValueError(
        f"expected a {what} that negtome {__version__} knows, got one of {writer}: {' and '.join(problems)}; "
        "use the version that wrote it"
    )


def _options(options: object) -> dict[str, Any]:
    """Return a copy of further arguments as JSON has them, or refuse it."""
    if not isinstance(options, Mapping) or not all(isinstance(name, str) and name.isidentifier() for name in options):
        raise ValueError(f"expected names of arguments with their values as options, got {options!r}")
    if own := sorted((_RESERVED | _ARGUMENTS.keys()) & options.keys()):
        raise ValueError(f"expected options that a recipe has no other name for, got {', '.join(own)}")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(options), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected JSON values as options, got {options!r} ({error})") from error
    return copied


def _shown(config: NegToMeConfig) -> dict[str, Any]:
    """Return the strength, and the other fields that are not the library's defaults."""
    fields = {one.name: getattr(config, one.name) for one in dataclasses.fields(config)}
    return {name: value for name, value in fields.items() if name == "alpha" or value != getattr(_PLAIN, name)}


def _literal(value: Any) -> str:
    """Write a value as Python, texts in double quotes."""
    if isinstance(value, str) and value.isprintable():
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _argument(value: Any) -> str:
    """Write a value as the command line takes it."""
    if value is None:
        return AUTO
    if isinstance(value, tuple):
        return ("," if isinstance(value[0], str) else ":").join(map(_argument, value))
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _words(option: str, text: str | None) -> list[str]:
    """Return an option with its text as words; one that begins with a dash would be taken for another option."""
    if text is None:
        return [option]
    return [f"{option}={text}"] if text.startswith("-") else [option, text]
