"""Run the notebooks and keep in them what they show, so that they can be read where they lie.

    python -m experiments.notebooks [NAME ...]

Cells are run as a kernel runs them, top to bottom and each in its notebook's folder, but in this process: no server and
no state of before. Equal tables give equal files.
"""

import ast
import base64
import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from IPython.core.formatters import DisplayFormatter
from nbformat.v4 import new_output

from eval.files import write_text
from experiments import PROJECT

FOLDER = PROJECT / "notebooks"
#: Kinds of outputs that are kept, as far as a value has them; pages and GitHub show the last of them that they know.
KEPT = ("text/plain", "text/html", "image/png", "image/jpeg")


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run a notebook's code and return the notebook with its outputs, in the folder where the process is."""
    names: dict[str, Any] = {}
    for count, cell in enumerate([cell for cell in notebook.cells if cell.cell_type == "code"], start=1):
        body = ast.parse(cell.source).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(ast.Module(body, []), cell.id, "exec"), names)
            value = last and eval(compile(ast.Expression(last.value), cell.id, "eval"), names)
        cell.execution_count, cell.outputs = count, []
        if text := printed.getvalue():
            cell.outputs.append(new_output("stream", name="stdout", text=text))
        if value is not None:
            cell.outputs.append(new_output("execute_result", data=shown(value), execution_count=count))
    return notebook


def shown(value: Any) -> dict[str, str]:
    """Return what a kernel shows of a value, by its kinds."""
    data, _ = DisplayFormatter().format(value, include=KEPT)
    if len(data) > 1:
        del data["text/plain"]  # which is for terminals
    return {
        kind: base64.b64encode(one).decode() + "\n" if isinstance(one, bytes) else one for kind, one in data.items()
    }


def refresh(file: Path) -> Path:
    """Run a notebook and write it with its outputs."""
    notebook = nbformat.read(file, as_version=4)
    with contextlib.chdir(file.parent):
        run(notebook)
    return write_text(file, nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in sys.argv[1:] or sorted(file.stem for file in FOLDER.glob("*.ipynb")):
        print(refresh(FOLDER / f"{name}.ipynb"), flush=True)
