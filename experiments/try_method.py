"""Make the images of one prompt by any method of the benchmark that needs only a prompt, and the baseline's.

    negtome generate "a photo of a dog" --method cads
    negtome generate "a photo of a dog" --method cads --model mini-flux -n 4 --seed 3 --steps 4
    negtome generate --list                                         the methods of mini-sdxl, or of --model M

`python -m experiments try` takes the same options. The hyperparameter is the one that experiment=peers_grid chose for
the model, else the default of the method's file. --value X sets another. The baseline has the same seeds. --out DIR is
for these settings alone (negtome-images/NAME).
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import argparse
import contextlib
import json
from collections.abc import Sequence
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from eval.files import canonical_json, read_json, write_json
from experiments.configs import build
from experiments.demo import models
from experiments.demo.request import MAX_IMAGES, SEEDS, split_prompt
from experiments.demo.watch import pictures
from experiments.methods.method import Baseline
from experiments.prompts import ConsecutiveGroup
from experiments.runs import catalogue
from experiments.runs.identity import short_digest
from negtome.generate import OUT, check_writable
from negtome.recipe import EMBEDDED

#: The file of a folder of images that says how they were made.
SETTINGS = "settings.json"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --method NAME --help shows examples")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="try", allow_abbrev=False, add_help=False)
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--method")
    parser.add_argument("--value", type=_number_or_range)
    parser.add_argument("--model", default=models.DEFAULT_MODEL)
    parser.add_argument("-n", dest="images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--list", action="store_true")
    return parser


def main(argv: Sequence[str]) -> None:
    """Make the images of a command line, write them and print where.

    Raises:
        ValueError: an option cannot be used, or the folder has other files.
        FileNotFoundError: the model's weights, or what the method needs, are not here.
    """
    options = _parser().parse_args(argv)
    model = models.find(Path(options.model).name if options.model in EMBEDDED else options.model)
    if options.list:
        for name in model.methods():
            print(f"{name:<29} {catalogue.entries()[name].summary}")
        return
    _check(options, model)
    spec, text = _spec(model, options.method, options.value)
    method = build(spec)
    call = model.call | ({} if options.steps is None else {"num_inference_steps": options.steps})
    group = ConsecutiveGroup.of(options.prompt, split_prompt(options.prompt)[1], options.seed, options.images)
    settings = {
        "prompt": options.prompt, "images": options.images, "seed": options.seed, "model": options.model, "call": call,
        "method": {"name": method.name, "version": method.version, "settings": method.settings()},
    }  # fmt: skip
    settings = json.loads(canonical_json(settings))
    folder = options.out or Path(OUT) / f"{group.prompt_id}-{method.name}-{short_digest(settings)[:8]}"
    _check_folder(folder, settings)
    pipe, _ = models.load(model)
    result = method.generate(pipe, group, call)  # before the baseline: its settings may not fit the model
    if result.images is None:
        raise ValueError(f"{method.name} makes no images of this prompt: {result.withheld}")
    rows = {method.name: result.images, "without": Baseline().generate(pipe, group, call).images}
    write_json(folder / SETTINGS, settings)
    for name, images in rows.items():
        for index, image in enumerate(pictures(images)):
            image.save(folder / f"{name}-{index}.png")
    last = options.images - 1
    print(f"{folder}: {', '.join(f'{name}-0.png to {name}-{last}.png' for name in rows)}; {SETTINGS} says how")
    print(f"{options.model}: {method.name}{text}")
    if (rows[method.name] == rows["without"]).all():
        print(f"warning: {method.name} changed none of these images: make more of them, or give another --value")


def _number_or_range(text: str) -> float | list[float]:
    """Read a number, or two as [LOW,HIGH]."""
    with contextlib.suppress(ValueError, OverflowError, RecursionError):
        value = json.loads(text)
        numbers = value if isinstance(value, list) and len(value) == 2 else [value]
        if all(type(number) in (int, float) and isfinite(number) for number in numbers):
            return value
    raise argparse.ArgumentTypeError(f"must be a number, or two such as [0.28,5.42], got {text!r}")


def _check(options: argparse.Namespace, model: models.Model) -> None:
    """Raise ValueError for options that no method can use."""
    names = model.methods()
    if options.method is None:
        raise ValueError("expected a method, such as --method cads, got none: --list lists them")
    if options.method not in names:
        near = "".join(f", did you mean {one}?" for one in get_close_matches(options.method, names, 1))
        raise ValueError(
            f"expected a method that needs only a prompt on {model.name}, got {options.method}{near}: --list lists them"
        )
    if options.prompt is None or not options.prompt.strip():
        raise ValueError('expected a prompt, such as "a photo of a dog", got none')
    if not 2 <= options.images <= MAX_IMAGES:
        raise ValueError(f"expected 2 to {MAX_IMAGES} images, got {options.images}")
    if not 0 <= options.seed < SEEDS:
        raise ValueError(f"expected a seed from 0 to {SEEDS - 1}, got {options.seed}")
    if options.steps is not None and not 1 <= options.steps <= 1000:
        raise ValueError(f"expected 1 to 1000 steps, got {options.steps}")


def _spec(model: models.Model, name: str, value: Any) -> tuple[DictConfig, str]:
    """Return a method's configuration, and where the value of its hyperparameter comes from."""
    setup = model.setup(name)
    if value is None:
        return setup.spec, f", {setup.text}" if setup.text else ""
    setting = OmegaConf.select(setup.spec, "metadata.hyperparameter.setting")
    if setting is None:
        raise ValueError(f"{name} has no hyperparameter: leave --value out")
    spec = setup.spec.copy()  # the model keeps its own
    default = OmegaConf.select(spec, setting)
    if default is not None and OmegaConf.is_list(default) != isinstance(value, list):
        kind = "two numbers" if OmegaConf.is_list(default) else "a number"
        raise ValueError(f"{setting} of {name} must be {kind}, such as {default}, got --value {value}")
    OmegaConf.update(spec, setting, value)
    return spec, f", {setting} {value}"


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError for a folder with other images, or into which nothing can be written."""
    if folder.is_dir() and any(folder.iterdir()):
        file = folder / SETTINGS
        if not file.is_file() or read_json(file) != settings:
            raise ValueError(f"{folder} has other files: choose another folder by --out")
    check_writable(folder)
