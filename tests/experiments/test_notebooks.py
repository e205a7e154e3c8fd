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


def tables(folder):
    """Write the committed tables with the tested metrics and two more: the others cost time and show no more."""
    for file in (PROJECT / "results").glob("*.csv"):
        frame = pd.read_csv(file, dtype=TEXT)
        if set(frame.columns) >= REQUIRED:
            tested = set(frame.loc[frame["primary"].notna(), "metric"])
            kept = {*tested, *[metric for metric in frame["metric"].unique() if metric not in tested][:2]}
            frame = frame[frame["metric"].isin(kept)]
            if file.stem not in ("diversity", "sweep"):  # which the notebooks look into
                frame = frame[frame["model"] == frame["model"].iloc[0]]
            frame.to_csv(folder / file.name, index=False)


def test_the_notebooks_run_top_to_bottom_on_the_committed_tables(monkeypatch, tmp_path):
    """In one process, since importing costs most; its names are cleared in between."""
    tables(tmp_path)
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for variable in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebooks = {file.stem: read(file) for file in FILES}
    assert set(notebooks) == {"diversity", "copyright", "ablations", "pareto"}
    together = nbformat.v4.new_notebook()
    for name, notebook in notebooks.items():
        together.cells.append(nbformat.v4.new_code_cell("%reset -f", id=f"{name}-reset"))
        for cell in notebook.cells:
            cell.id = f"{name}-{cell.id}"
            cell.source = cell.source.replace('folder = "results"', f"folder = {str(tmp_path)!r}")
            together.cells.append(cell)
    resources = {"metadata": {"path": str(PROJECT / "notebooks")}}
    done = client.NotebookClient(together, timeout=120, kernel_name="python3", resources=resources).execute()
    for name, notebook in notebooks.items():
        outputs = [
            (cell.id, output) for cell in done.cells if cell.id.startswith(f"{name}-") and cell.cell_type == "code"
            for output in cell.outputs
        ]  # fmt: skip
        data = {cell: output.get("data", {}) for cell, output in outputs}
        drawn = [cell for cell, found in data.items() if "image/png" in found]
        calls = tuple(f"figures.{kind}(" for kind in ("tradeoff", "forest", "ablation", "heat_map", "pareto"))
        assert drawn == [cell.id for cell in notebook.cells if cell.source.startswith(calls)]
