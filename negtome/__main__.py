"""Make the images of a prompt more different, or push them away from a reference image (arXiv 2412.01339).

    negtome generate "a photo of a dog" --compare                  with and without NegToMe, side by side, small model
    negtome generate "a photo of a dog" --model ORGANISATION/NAME  any diffusers folder, or repository of the hub
    negtome generate "a photo of a dog" -n 4 --alpha 0.9 --threshold 0.7 --timestep-range 850:1000 --seed 3
    negtome generate "a photo of a panda" --reference panda.png --mask panda.mask.png    away from that image
    negtome generate "a photo of a dog" --method cads              by another method of the benchmark (in a checkout)
    negtome generate "a photo of a dog" --policy P                 decide the prompt by a policy first
    negtome generate --from with-0.png                             again, with the settings stored in an image
    negtome demo, negtome doctor                                   the same in a browser; what is installed here
    negtome guard                                                  policies, guards that apply them, audit and queue
    negtome serve --policy P --guard G                             an OpenAI-compatible server behind a policy

generate writes images that hold their settings, and a script that makes them in Python, into --out DIR.
COMMAND --help lists the options. Bad input ends in one line and exit code 2; NEGTOME_TRACEBACK=1 shows a traceback.
"""

import argparse
import importlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from negtome.validation import one_line, read_step_range

COMMANDS = ("generate", "serve", "guard", "demo", "doctor")
#: Value on the command line that means "as the pipeline or the published settings have it".
AUTO = "auto"
#: Most characters of an error message that are printed.
LONGEST = 1000


class _Parser(argparse.ArgumentParser):
    """Raises its errors, so that they end in one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists the options")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of the module's docstring. Return the exit code."""
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if isinstance(sys.stdout, io.TextIOWrapper):  # the name of a folder may not fit into the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    if command in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    try:
        return _run(command, arguments)
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("NEGTOME_TRACEBACK"):
            raise
        print(f"{command}: {_one_line(error)}", file=sys.stderr)
        return 2


def _run(command: str, arguments: list[str]) -> int:
    if command == "generate":
        return _generate(arguments)
    if command == "serve":
        return _serve(arguments)
    if command == "guard":
        code: int = _import("negtome.guard.__main__", "guard").main(arguments)
        return code
    if command in COMMANDS:
        return _run_in_checkout(command, arguments)
    near = "".join(f"; did you mean {one}?" for one in get_close_matches(command, COMMANDS, 1))
    raise ValueError(f"no command {command}, the commands are {', '.join(COMMANDS)}{near}")


def _import(module: str, extra: str) -> Any:
    """Return a module that needs the packages of an extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"a package is missing ({error}): pip install 'negtome[{extra}]'") from error


def _generate(arguments: list[str]) -> int:
    flags = {argument.split("=")[0] for argument in arguments}
    if {"--method", "--list"} & flags:
        return _run_in_checkout("try", arguments, "generate --method")
    parser = _parser()
    if "--policy" in flags:  # needs the packages of negtome[guard]
        module = _import("negtome.serve.single", "guard")
        module.add_options(parser)
        code: int = module.main(parser.parse_args(arguments))
        return code
    importlib.import_module("negtome.generate").main(parser.parse_args(arguments))  # loads torch
    return 0


def _serve(arguments: list[str]) -> int:
    module = _import("negtome.serve.command", "serve")
    parser = _Parser(prog="negtome serve", allow_abbrev=False, description=module.main.__doc__.split(";")[0] + ".")
    module.add_options(parser)
    code: int = module.main(parser.parse_args(arguments))
    return code


def _one_line(error: BaseException) -> str:
    """Return a message as one line, cut off after `LONGEST` characters."""
    printable = one_line(str(error))
    return printable if len(printable) <= LONGEST else f"{printable[:LONGEST]}..."


def _run_in_checkout(command: str, arguments: list[str], typed: str | None = None) -> int:
    """Run a command of the checkout that contains this package; a bare doctor also works without one.

    Messages name `typed`, the command that the user typed, if it has another name there.
    """
    checkout = Path(__file__).parents[1]
    complete = (checkout / "experiments" / "__init__.py").is_file() and importlib.util.find_spec("hydra") is not None
    if command == "doctor" and not arguments:
        importlib.import_module("negtome.doctor").main()
        if not complete:
            return 0
    if not complete:
        raise ValueError(
            f"{typed or command} needs a checkout of the repository with its packages: git clone it, and run "
            "pip install -e '.[demo]' there"
        )
    sys.path.insert(0, str(checkout))
    code: int = importlib.import_module("experiments.__main__").main([command, *arguments], typed)
    return code


class _DeprecatedTimesteps(argparse.Action):
    """Stores --timesteps as --timestep-range, with a warning."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        print("warning: --timesteps is called --timestep-range now", file=sys.stderr)
        setattr(namespace, self.dest, values)


def _parser() -> argparse.ArgumentParser:
    """Return the parser of `generate`. Options that decide pixels are absent from its result if they are not passed."""
    parser = _Parser(
        prog="negtome generate", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Make images of a prompt that are pushed apart, or away from a reference image. Options that you "
        "leave out come from the model's negtome.json or else from the pipeline; auto is the pipeline's value.",
    )  # fmt: skip
    parser.add_argument("prompt", nargs="?")
    images = parser.add_argument_group("images")
    images.add_argument("--model", metavar="M", help="diffusers folder or hub repository (models/mini-sdxl)")
    images.add_argument("-n", dest="images", type=int, metavar="N", help="images, generated together (4)")
    images.add_argument("--seed", type=int, metavar="S", help="of the first image; the next one has S + 1 (0)")
    images.add_argument("--steps", type=_or_auto(int), metavar="N")
    images.add_argument("--guidance-scale", type=_or_auto(float), metavar="X")
    images.add_argument("--size", type=width_x_height, metavar="WxH", help="in pixels")
    images.add_argument("--negative-prompt", metavar="TEXT")
    images.add_argument(
        "--call", dest="options", action="append", type=name_value, metavar="NAME=JSON",
        help="a further argument of the pipeline's call, such as max_sequence_length=256; may be repeated",
    )  # fmt: skip
    images.add_argument("--dtype", metavar="D", help="of the weights: float32 (default), bfloat16 or float16")
    images.add_argument(
        "--variant", type=_or_auto(str), metavar="V",
        help="of the weight files (fp16 for float16, or if there are no others)",
    )  # fmt: skip
    method = parser.add_argument_group("NegToMe")
    for option, name, kind, metavar, text in _SETTINGS:
        method.add_argument(option, dest=f"config.{name}", type=kind, metavar=metavar, help=text)
    method.add_argument(
        "--timesteps", dest="config.timestep_range", type=_or_auto(low_high), action=_DeprecatedTimesteps,
        help=argparse.SUPPRESS,
    )  # fmt: skip
    method.add_argument(
        "--few-steps", action="store_true",
        help="settings for models of at most 8 steps, in the first step alone; the options above change them",
    )  # fmt: skip
    method.add_argument("--cross-attention", dest="config.cross_attention", action=argparse.BooleanOptionalAction)
    method.add_argument("--reference", metavar="FILE", help="an image to push away from")
    method.add_argument("--mask", metavar="FILE", help="where in that image, white on black, of its size")
    method.add_argument("--without", action="store_true", help="the stock pipeline alone")
    run = parser.add_argument_group("run")
    run.add_argument(
        "--from", dest="source", default=None, metavar="PNG",
        help="take all of the above from an image made so; repeat its --model (unless embedded), --reference and "
        "--mask to allow them",
    )  # fmt: skip
    run.add_argument("--compare", action="store_true", default=False, help="make the baseline too, with the same seeds")
    run.add_argument("--out", default=None, metavar="DIR", help="for this recipe alone (negtome-images/PROMPT-DIGEST)")
    run.add_argument("--device", default=None, metavar="D", help="cuda, mps or cpu (the fastest here)")
    run.add_argument(
        "--policy", metavar="P", help="decide the prompt by this policy first; --policy P --help lists more options"
    )
    run.add_argument(
        "--method", metavar="M", help="another method, in a checkout; --list lists them, --method M --help its options"
    )
    run.add_argument("--low-memory", action="store_true", default=False, help="keep idle parts off the GPU")
    return parser


def _or_auto(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a converter that reads auto as None, and other values by `kind`."""

    def read(text: str) -> Any:
        return None if text == AUTO else kind(text)

    read.__name__ = kind.__name__  # argparse puts it into its messages
    return read


def width_x_height(text: str) -> tuple[int | None, int | None]:
    """Read WxH in pixels."""
    if text == AUTO:
        return None, None
    try:
        width, height = map(int, text.split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be WxH, such as 1024x768, got {text!r}") from error
    return width, height


def low_high(text: str) -> tuple[float, float]:
    """Read LOW:HIGH in training timesteps."""
    try:
        low, high = map(float, text.split(":"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be LOW:HIGH, such as 850:1000, got {text!r}") from error
    return low, high


def first_last(text: str) -> tuple[int, int] | tuple[float, float]:
    """Read FIRST:LAST, steps from 0 or shares of the call's steps."""
    try:
        return read_step_range(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def names(text: str) -> tuple[str, ...]:
    """Read names between commas."""
    return tuple(text.split(","))


def name_value(text: str) -> tuple[str, Any]:
    """Read NAME=JSON; NAME=TEXT if that is no JSON; NAME=auto as an ellipsis."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    if value == AUTO:
        return name, ...
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


#: Options with a value: flag, field of NegToMeConfig, converter, metavar, help.
_SETTINGS: tuple[tuple[str, str, Callable[[str], Any], str, str], ...] = (
    ("--alpha", "alpha", float, "X", "strength; below 0 pulls together"),
    ("--threshold", "threshold", _or_auto(float), "X", "cosine similarity above which a token moves"),
    ("--timestep-range", "timestep_range", _or_auto(low_high), "LOW:HIGH", "steps that take part; 1000 is pure noise"),
    ("--step-range", "step_range", _or_auto(first_last), "A:B", "steps A to B instead, from 0; or shares, as 0:0.25"),
    ("--matching", "matching", str, "M", "paper, or released for the authors' code"),
    ("--push-from", "reference", str, "R", "first image of the group, previous ones, or others"),
    ("--sites", "sites", _or_auto(names), "A,B", "blocks that take part"),
    ("--min-side", "min_side", _or_auto(int), "N", "smallest feature map that takes part, in tokens (UNets)"),
)


if __name__ == "__main__":
    sys.exit(main())
