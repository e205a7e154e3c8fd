"""The method in the browser: the same prompts and noises without it and with it, side by side.

    python -m experiments demo [--model mini-sdxl] [--port 7860]

Opens a page on this machine alone (127.0.0.1), which asks for nothing from anywhere else. --model is a name of
conf/model/, a folder in the diffusers layout, or a repository that is in the hub's cache: weights are never fetched.
"""

import argparse
import importlib
from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ImportError: gradio is not installed.
        ValueError: an argument is unknown, or there is no such port.
        OSError: the port is taken.
    """
    parser = argparse.ArgumentParser(prog="demo", exit_on_error=False)
    parser.add_argument("--model", default="mini-sdxl")
    parser.add_argument("--port", type=int)
    try:
        given = parser.parse_args(argv)
    except (argparse.ArgumentError, SystemExit) as error:
        raise ValueError(f"expected --model NAME and --port NUMBER at most, got {' '.join(argv)}") from error
    if given.port is not None and not 1 <= given.port <= 65535:
        raise ValueError(f"expected a port from 1 to 65535, got {given.port}: leave --port out for a free one")
    try:
        page = importlib.import_module("experiments.demo.page")  # which needs gradio, and nothing else does
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        raise ImportError("expected gradio for the demo, got none: pip install -e '.[demo]', or make demo") from error
    page.serve(given.model, given.port)
