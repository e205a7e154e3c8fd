"""The commands that make the embedded models, on the artwork of public npm packages.

    python -m training train --out outputs/mini                       every stage from nothing (a GPU, 20 minutes)
    python -m training train --from models --stage unet --out DIR --hours 3 --device cpu --bf16
    python -m training export --work outputs/mini --models models

The second line goes on from published weights; the same line again goes on from its last checkpoint, at most five
minutes old. Nothing is written into results/ without `--out results`.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

#: Where the embedded models, downloads and tables lie unless a command is told otherwise.
MODELS, NPM, TABLES = Path("models"), Path("outputs/npm"), Path("outputs/results")
#: Commands and the functions that run them, which take the options by name.
FUNCTIONS = {
    "train": "train.train",
    "ablation": "train.compare_recipes",
    "export": "export.export",
    "distil": "distill.distil",
    "samples": "samples.draw_samples",
    "reference": "reference.lay_out",
    "protected": "protected.lay_out",
    "people": "people.lay_out",
    "memorised": "memorised.measure_models",
    "deliberation": "deliberation.table.compare_stages",
    "guard": "deliberation.table.export_guard",
}


def _add_distil_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--teacher", type=Path, required=True, help="folder of mini-sdxl or mini-flux")
    command.add_argument("--out", type=Path, required=True, help="folder of the LoRA weights")
    command.add_argument("--minutes", type=float, default=5.0, help="of training on one CPU core")
    command.add_argument("--steps", type=int, help="limit of the steps, in place of a time")
    command.add_argument("--seed", type=int, default=0, help="of the weights and the noise")
    command.add_argument("--bf16", action="store_true", help="bf16 on a CPU that has instructions for it")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m training", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    def add_path(command: argparse.ArgumentParser, name: str, default: Path | None, text: str) -> None:
        command.add_argument(name, type=Path, default=default, required=default is None, help=text)

    npm = "folder of the npm tarballs; fetched where absent"
    train = add("train", "train every stage, or one")
    ablation = add("ablation", "compare short trainings of the denoisers, each with one part of the recipe changed")
    for command in (train, ablation):
        add_path(command, "--out", None, "folder of data, checkpoints and trained stages")
        add_path(command, "--npm", NPM, npm)
        command.add_argument("--from", dest="source", type=Path, help="folder of the models whose parts are taken over")
        command.add_argument("--limit", type=int, help="number of images to keep, for trying out")
        command.add_argument("--device", help="torch device; CUDA where there is one")
        command.add_argument("--bf16", action="store_true", help="bf16 on a CPU that has instructions for it")
        command.add_argument("--steps", type=int, help="limit of a stage's steps, in place of a time")
        command.add_argument("--batch", type=int, help="rows in a step")
    train.add_argument("--stage", help="train one stage in this process")
    train.add_argument("--hours", type=float, help="of training: of the stage, interruptions not counted, or of all")
    train.add_argument("--lr", type=float, default=1.0, help="factor of the denoisers' learning rates")
    train.add_argument("--compile", action="store_true", help="compile on a CPU too")
    train.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)  # of stages that run together
    ablation.add_argument("--stages", nargs="+", choices=("flux", "unet"), default=["flux", "unet"])

    export = add("export", "assemble trained stages into pipeline folders with model cards")
    add_path(export, "--work", None, "the folder that train wrote")
    add_path(export, "--models", MODELS, "folder of mini-sdxl, mini-flux and mini-clip, which are replaced")
    distil = add("distil", "distil mini-sdxl or mini-flux to four steps without guidance, as LoRA weights")
    _add_distil_options(distil)
    add_path(add("samples", "draw a contact sheet of each pipeline"), "--models", MODELS, "folder of the pipelines")
    reference = add("reference", "lay out the real images that the models are compared with")
    add_path(reference, "--data", None, "the folder data/ that train wrote")
    add_path(reference, "--out", MODELS / "mini-reference", "folder of the images")
    protected = add("protected", "lay out the designs that play the protected concepts")
    people = add("people", "fit the classifiers of skin tone and gender, and lay out the people to validate them on")
    for command, name in ((protected, "mini-protected"), (people, "mini-people")):
        add_path(command, "--npm", NPM, npm)
        add_path(command, "--out", MODELS / name, "folder to write")
    add_path(add("memorised", "measure how well the models draw the designs"), "--out", TABLES, "folder of the tables")

    deliberation = add("deliberation", "compare what examples, rewards and traces teach a small guard")
    add_path(deliberation, "--out", TABLES, "folder of the table")
    add_path(deliberation, "--work", Path("outputs/deliberation"), "folder of trained models, which are kept")
    deliberation.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    deliberation.add_argument("--workers", type=int, default=2, help="processes at a time, each on one core")
    deliberation.add_argument("--steps", type=int, help="steps of learning from rewards")
    deliberation.add_argument("--rate", type=float, help="learning rate of rewards")
    deliberation.add_argument("--examples", type=int, help="number of right replies")
    deliberation.add_argument("--development", action="store_true", help="only measure on the development requests")
    guard = add("guard", "train the embedded guard and write it with its card")
    add_path(guard, "--out", MODELS / "mini-guard", "folder of the model")
    guard.add_argument("--examples", type=int, default=36_000, help="number of requests and right replies")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends in one line and exit code 2."""
    options = vars(build_parser().parse_args(argv))
    command = options.pop("command")
    module, _, function = FUNCTIONS[command].rpartition(".")
    try:
        return getattr(importlib.import_module(f"training.{module}"), function)(**options) or 0
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("NEGTOME_TRACEBACK"):
            raise
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
