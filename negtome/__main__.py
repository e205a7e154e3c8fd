"""Images of one prompt that differ more, or that keep away from a picture: negative token merging (arXiv 2412.01339).

  negtome generate "a photo of a dog" --compare                  without and with it, side by side, on the small model
  negtome generate "a photo of a dog" --model ORGANISATION/NAME  any diffusers folder, or repository of the hub
  negtome generate "a photo of a dog" -n 4 --alpha 0.9 --threshold 0.7 --timesteps 850:1000 --seed 3
  negtome generate "a photo of a panda" --reference panda.png --mask panda.mask.png    away from that design
  negtome generate --from with-0.png                             again what a picture says of itself
  negtome demo                                                   the same in a browser
  negtome doctor                                                 what is installed here, and which models are
  python -m negtome.guard                                        policies, and guards that read them

generate writes the images, each with its whole recipe inside, and a script that makes them in Python, into --out DIR.
COMMAND --help lists the options. Bad input ends in one line and exit code 2; NEGTOME_TRACEBACK=1 shows where from.
"""

import argparse
import functools
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

COMMANDS = ("generate", "demo", "doctor")
#: What a value is called that the pipeline or the published settings have.
AUTO = "auto"
#: Characters of an error's message that are printed.
LONGEST = 1000


class _Parser(argparse.ArgumentParser):
    """One whose errors are raised, and end in one line as all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists the options")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; see the module. Returns the exit code."""
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name of a folder may not fit into the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    if command in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    try:
        if command == "generate":
            given = _parser().parse_args(arguments)
            importlib.import_module("negtome.generate").main(given)  # which loads torch
            return 0
        if command in COMMANDS:
            return _hand_over(command, arguments)
        near = "".join(f", did you mean {one}?" for one in get_close_matches(command, COMMANDS, 1))
        raise ValueError(f"expected one of {', '.join(COMMANDS)}, got {command}{near}")
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("NEGTOME_TRACEBACK"):
            raise
        print(f"{command}: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: BaseException) -> str:
    """Return a message as one line without control characters, which may be out of somebody's file."""
    text = " ".join(str(error).split())
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return printable if len(printable) <= LONGEST else f"{printable[:LONGEST]}..."


def _hand_over(command: str, arguments: list[str]) -> int:
    """Run a command of the checkout that this package lies in; of doctor first the part that needs none."""
    checkout = Path(__file__).parents[1]
    there = (checkout / "experiments" / "__init__.py").is_file() and importlib.util.find_spec("hydra") is not None
    if command == "doctor" and not arguments:
        importlib.import_module("negtome.doctor").main()
    elif not there:
        raise ValueError(
            f"expected a checkout of the repository with all that it needs for {command}, got the library alone: git "
            "clone it, and there pip install -e '.[demo]'"
        )
    if not there:
        return 0
    sys.path.insert(0, str(checkout))
    code: int = importlib.import_module("experiments.__main__").main([command, *arguments])
    return code


def _parser() -> argparse.ArgumentParser:
    """Return what reads `generate`; options that decide pixels are absent where they are not given."""
    parser = _Parser(
        prog="negtome generate", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Make images of a prompt that are pushed apart, or away from a picture. What is not given is as "
        "the model's folder (its negtome.json) or else the pipeline has it; auto is what the pipeline has.",
    )  # fmt: skip
    parser.add_argument("prompt", nargs="?")
    what = parser.add_argument_group("what is made")
    what.add_argument("--model", metavar="M", help="diffusers folder or hub repository (models/mini-sdxl)")
    what.add_argument("-n", dest="images", type=int, metavar="N", help="images, generated together (4)")
    what.add_argument("--seed", type=int, metavar="S", help="of the first image's noise; the next has S + 1 (0)")
    what.add_argument("--steps", type=_or_auto(int), metavar="N")
    what.add_argument("--guidance-scale", type=_or_auto(float), metavar="X")
    what.add_argument("--size", type=width_x_height, metavar="WxH", help="in pixels")
    what.add_argument("--negative-prompt", metavar="TEXT")
    what.add_argument(
        "--call", dest="options", action="append", type=name_value, metavar="NAME=JSON",
        help="a further argument of the pipeline's call, as max_sequence_length=256; may be repeated",
    )  # fmt: skip
    what.add_argument("--dtype", metavar="D", help="of the weights: float32 (default), bfloat16 or float16")
    what.add_argument(
        "--variant", type=_or_auto(str), metavar="V",
        help="of the weights' files (fp16 for float16, or where there are no others)",
    )  # fmt: skip
    how = parser.add_argument_group("NegToMe")
    setting = functools.partial(_setting, how)
    setting("--alpha", "alpha", float, "X", "strength; below 0 pulls together")
    setting("--threshold", "threshold", _or_auto(float), "X", "cosine above which a token is pushed")
    setting("--timesteps", "timestep_range", _or_auto(low_high), "LOW:HIGH", "steps that take part; 1000 is noise")
    setting("--matching", "matching", str, "M", "paper, or released for the authors' code")
    setting("--push-from", "reference", str, "R", "first image of the group, previous ones, or others")
    setting("--sites", "sites", _or_auto(names), "A,B", "blocks that take part")
    setting("--min-side", "min_side", _or_auto(int), "N", "smallest feature map that takes part, in tokens (UNets)")
    how.add_argument("--cross-attention", dest="config.cross_attention", action=argparse.BooleanOptionalAction)
    how.add_argument("--reference", metavar="FILE", help="a picture to push away from")
    how.add_argument("--mask", metavar="FILE", help="where in that picture, white on black, of its size")
    how.add_argument("--without", action="store_true", help="the stock pipeline alone")
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--from", dest="source", default=None, metavar="PNG",
        help="all of the above from a picture made so; repeat its --model, unless it is embedded, --reference and "
        "--mask to allow them",
    )  # fmt: skip
    run.add_argument("--compare", action="store_true", default=False, help="the same noises without NegToMe, too")
    run.add_argument("--out", default=None, metavar="DIR", help="of this recipe alone (negtome-images/PROMPT-DIGEST)")
    run.add_argument("--device", default=None, metavar="D", help="cuda, mps or cpu (the fastest here)")
    run.add_argument("--low-memory", action="store_true", default=False, help="keep idle parts off the GPU")
    return parser


def _setting(group: Any, option: str, name: str, kind: Callable[[str], Any], metavar: str, text: str) -> None:
    group.add_argument(option, dest=f"config.{name}", type=kind, metavar=metavar, help=text)


def _or_auto(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return what reads a value, or auto as None."""

    def read(text: str) -> Any:
        return None if text == AUTO else kind(text)

    read.__name__ = kind.__name__  # which argparse names in its message
    return read


def width_x_height(text: str) -> tuple[int | None, int | None]:
    if text == AUTO:
        return None, None
    try:
        width, height = map(int, text.split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected WxH, such as 1024x768, got {text!r}") from error
    return width, height


def low_high(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(":"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected LOW:HIGH, such as 850:1000, got {text!r}") from error
    return low, high


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def name_value(text: str) -> tuple[str, Any]:
    """Read NAME=JSON, NAME=TEXT where that is none, or NAME=auto as what the pipeline has: an ellipsis."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    if value == AUTO:
        return name, ...
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


if __name__ == "__main__":
    sys.exit(main())
