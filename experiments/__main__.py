"""The commands of the benchmark.

    python -m experiments                       this list
    python -m experiments generate --help       what a command does, with examples

Bad input ends in one line and exit code 2; NEGTOME_TRACEBACK=1 shows where it was raised. Ctrl-C ends a command with
exit code 130, and a second Ctrl-C ends it at once. Completed groups are on disk: the same command goes on from there.
"""

import ast
import importlib
import os
import signal
import sys
import types
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

#: The commands and the modules that they run.
COMMANDS = {
    "reproduce": "experiments.reproduce",
    "generate": "experiments.generate",
    "evaluate": "experiments.evaluate",
    "tabulate": "experiments.tabulate",
    "plot": "experiments.plot",
    "check": "experiments.check",
    "rank": "experiments.rank",
    "hypotheses": "experiments.hypotheses",
    "report": "experiments.report",
    "latency": "experiments.latency",
    "roofline": "experiments.latency.roofline",
    "collect": "experiments.collect",
    "submit": "experiments.community.submit",
    "verify": "experiments.community.verify",
    "applications": "experiments.figures.applications",
    "stereotypes": "experiments.tables.stereotypes",
    "notebooks": "experiments.report.notebooks",
    "try": "experiments.try_method",
    "demo": "experiments.demo",
    "doctor": "experiments.doctor",
    "floors": "experiments.safety.floors",
    "scorecard": "experiments.safety.scorecard",
    "redteam": "experiments.safety.redteam",
    "outside": "experiments.safety.outside",
    "labels": "experiments.safety.labels",
    "gate": "experiments.safety.gate",
    "sensitivity": "experiments.safety.sensitivity",
}


def describe(command: str) -> str:
    """Return a command's docstring, which is its help, without importing the module."""
    return ast.get_docstring(ast.parse(_file(command).read_text())) or ""


def _file(command: str) -> Path:
    path = Path(__file__).parent.joinpath(*COMMANDS[command].split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def main(argv: Sequence[str], typed: str | None = None) -> int:
    """Run a command, given its name and its arguments, and return the exit code: 2 for input that it cannot use.

    Messages begin with `typed`, the command that the user typed, if it has another name there.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        for command in COMMANDS:
            print(f"  {command:<16} {describe(command).splitlines()[0]}")
        return 0
    command, *arguments = argv
    if command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "python -m experiments lists them"
        return _refuse("experiments", f"expected one of {', '.join(COMMANDS)}, got {command}: {hint}")
    if {"-h", "--help"} & set(arguments):
        print(describe(command))
        return 0
    typed = typed or command
    signal.signal(signal.SIGINT, _interrupt)
    try:
        return importlib.import_module(COMMANDS[command]).main(arguments) or 0
    except KeyboardInterrupt as interruption:
        kept = str(interruption) or "What is complete is on disk: the same command goes on from there."
        print(f"\n{typed}: interrupted. {kept}", file=sys.stderr, flush=True)
        os._exit(130)  # not waiting for other processes: they end with this one, and leave whole files only
    except Exception as error:
        from hydra.errors import HydraException
        from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

        # Errors of input, files and machines; any other one is a mistake in the code.
        of_input = ValueError, OSError, RuntimeError, ImportError, HydraException, OmegaConfBaseException
        if os.environ.get("NEGTOME_TRACEBACK") or not isinstance(error, of_input):
            raise
        if isinstance(error, MissingMandatoryValue):
            return _refuse(typed, f"{error.full_key} has no value: give {error.full_key}=VALUE")
        return _refuse(typed, str(error))


def run_module(file: str) -> None:
    """Run the command whose module was started by its own name, and exit."""
    (command,) = [name for name in COMMANDS if _file(name).samefile(file)]
    sys.exit(main([command, *sys.argv[1:]]))


def _refuse(command: str, message: str) -> int:
    print(f"{command}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _interrupt(signum: int, frame: types.FrameType | None) -> None:
    signal.signal(signum, lambda *_: os._exit(128 + signum))
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
