"""Run the notebooks and save their outputs in them, so that they can be read without running them.

    python -m experiments notebooks [NAME ...]

NAME is a file in notebooks/ without its ending, such as quickstart (default: all). It needs the extra `notebooks`:
pip install -e '.[notebooks]'. Cells run top to bottom, as a kernel runs them, but in this process and in the
notebook's folder. Equal tables give equal files.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import ast
import base64
import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.files import write_text
from experiments import PROJECT

try:
    import nbformat
    from IPython.core.formatters import DisplayFormatter
    from nbformat.v4 import new_output
except ModuleNotFoundError as error:
    raise ImportError(
        f"expected nbformat and IPython to run notebooks, got no {error.name}: pip install -e '.[notebooks]'"
    ) from error

FOLDER = PROJECT / "notebooks"
#: Kinds of outputs that are kept; pages and GitHub show the last kind that they know.
KINDS = ("text/plain", "text/html", "image/png", "image/jpeg")


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run a notebook's code in the current folder and return the notebook with its outputs."""
    variables: dict[str, Any] = {}
    for count, cell in enumerate([cell for cell in notebook.cells if cell.cell_type == "code"], start=1):
        body = ast.parse(cell.source).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(ast.Module(body, []), cell.id, "exec"), variables)
            value = last and eval(compile(ast.Expression(last.value), cell.id, "eval"), variables)
        cell.execution_count, cell.outputs = count, []
        if text := printed.getvalue():
            cell.outputs.append(new_output("stream", name="stdout", text=text))
        if value is not None:
            cell.outputs.append(new_output("execute_result", data=_display(value), execution_count=count))
    return notebook


def _display(value: Any) -> dict[str, str]:
    """Return what a kernel shows of a value, by kind of output."""
    data, _ = DisplayFormatter().format(value, include=KINDS)
    if len(data) > 1:
        del data["text/plain"]  # a fallback for terminals
    for kind, content in data.items():
        if isinstance(content, bytes):
            data[kind] = base64.b64encode(content).decode() + "\n"
    return data


def refresh(file: Path) -> Path:
    """Run a notebook and write it with its outputs."""
    notebook = nbformat.read(file, as_version=4)
    with contextlib.chdir(file.parent):
        run(notebook)
    return write_text(file, nbformat.writes(notebook) + "\n")


def main(argv: Sequence[str]) -> None:
    """Run the named notebooks, by default all, and print their paths.

    Raises:
        ValueError: there is no notebook of a name; then none is run.
    """
    names = sorted(file.stem for file in FOLDER.glob("*.ipynb"))
    if unknown := [name for name in argv if name not in names]:
        raise ValueError(f"expected names of notebooks, {', '.join(names)}, got {', '.join(unknown)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in argv or names:
        print(refresh(FOLDER / f"{name}.ipynb"), flush=True)
