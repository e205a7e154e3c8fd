"""Try the method in the browser: the same prompt and seeds without and with it.

    python -m experiments demo [--model mini-sdxl] [--port 7860]

The page is open to this machine alone (127.0.0.1) and sends nothing anywhere. --model is a name of conf/model/, a
folder in the diffusers layout, or a repository in the hub's cache: weights are never fetched.
"""

import argparse
import importlib
from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ImportError: gradio is not installed.
        ValueError: an argument or the port is invalid.
        OSError: the port is taken.
    """
    parser = argparse.ArgumentParser(prog="demo", exit_on_error=False)
    parser.add_argument("--model", default="mini-sdxl")
    parser.add_argument("--port", type=int)
    try:
        arguments, unknown = parser.parse_known_args(argv)
    except (argparse.ArgumentError, SystemExit):
        unknown = argv
    if unknown:
        raise ValueError(f"expected only --model NAME and --port NUMBER, got {' '.join(argv)}")
    if arguments.port is not None and not 1 <= arguments.port <= 65535:
        raise ValueError(f"expected a port from 1 to 65535, got {arguments.port}: leave --port out for a free one")
    try:
        page = importlib.import_module("experiments.demo.page")  # the only module that needs gradio
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        raise ImportError("expected gradio for the demo, got none: pip install -e '.[demo]', or make demo") from error
    page.serve(arguments.model, arguments.port)
