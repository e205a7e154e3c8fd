"""The notebooks: calls and prose, committed without outputs, and run top to bottom on the committed tables."""

import ast
import re

import pandas as pd
import pytest

from experiments import PROJECT
from experiments.tables import REQUIRED, TEXT

nbformat = pytest.importorskip("nbformat")

FILES = sorted((PROJECT / "notebooks").glob("*.ipynb"))
ALLOWED = (ast.Module, ast.ImportFrom, ast.alias, ast.Assign, ast.Expr, ast.Call, ast.keyword, ast.Attribute, ast.Name,
           ast.Constant, ast.Starred, ast.List, ast.Tuple, ast.Load, ast.Store)  # fmt: skip


def read(file):
    return nbformat.read(file, as_version=4)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_holds_calls_and_prose_and_no_outputs(file):
    notebook = read(file)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids) and not any(re.fullmatch("[0-9a-f]{8}", cell) for cell in ids), "made by chance"
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            continue
        assert cell.outputs == [] and cell.execution_count is None
        for node in ast.walk(ast.parse(cell.source)):
            assert isinstance(node, ALLOWED), ast.unparse(node)
            assert not isinstance(node, ast.ImportFrom) or node.module == "experiments"


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A folder of the committed tables with the tested metrics and two more: the others cost time and show no more."""
    folder = tmp_path_factory.mktemp("committed")
    for file in (PROJECT / "results").glob("*.csv"):
        frame = pd.read_csv(file, dtype=TEXT)
        if set(frame.columns) >= REQUIRED:
            tested = set(frame.loc[frame["primary"].notna(), "metric"])
            kept = {*tested, *[metric for metric in frame["metric"].unique() if metric not in tested][:2]}
            frame = frame[frame["metric"].isin(kept)]
            if file.stem not in ("diversity", "sweep"):  # which the notebooks look into
                frame = frame[frame["model"] == frame["model"].iloc[0]]
            frame.to_csv(folder / file.name, index=False)
    return folder


def run(notebook):
    """Run a notebook's code as a kernel does; return the value that each cell ends with, by the cell's id."""
    names, values = {}, {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            body = ast.parse(cell.source).body
            last = body.pop() if isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), cell.id, "exec"), names)
            values[cell.id] = last and eval(compile(ast.Expression(last.value), cell.id, "eval"), names)
    return values


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_runs_top_to_bottom_on_the_committed_tables(file, committed, monkeypatch):
    """What a cell ends with is what a kernel shows; a figure shows itself, as a PNG."""
    monkeypatch.chdir(file.parent)
    notebook = read(file)
    for cell in notebook.cells:
        cell.source = cell.source.replace('folder = "results"', f"folder = {str(committed)!r}")
    shown = {cell: value._repr_png_() for cell, value in run(notebook).items() if hasattr(value, "_repr_png_")}
    assert all(png.startswith(b"\x89PNG") for png in shown.values())
    calls = tuple(f"figures.{kind}(" for kind in ("tradeoff", "forest", "ablation", "heat_map", "pareto"))
    assert list(shown) == [cell.id for cell in notebook.cells if cell.source.startswith(calls)]
