"""The notebooks: calls and prose, run top to bottom on the committed tables, with the outputs that this gives."""

import ast
import base64
import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import PROJECT
from experiments.__main__ import main

nbformat = pytest.importorskip("nbformat")
notebooks = pytest.importorskip("experiments.report.notebooks", exc_type=ImportError)

FILES = sorted((PROJECT / "notebooks").glob("*.ipynb"))
QUICKSTART = "quickstart"
ALLOWED = (ast.Module, ast.ImportFrom, ast.alias, ast.Assign, ast.Expr, ast.Call, ast.keyword, ast.Attribute, ast.Name,
           ast.Constant, ast.Starred, ast.List, ast.Tuple, ast.Load, ast.Store)  # fmt: skip
#: Of the one that makes images, too.
FURTHER = (ast.Import, ast.With, ast.withitem, ast.Dict, ast.Subscript)


def read(file):
    return nbformat.read(file, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell):
    """Return the pictures that a cell shows, decoded."""
    encoded = [text for output in cell.outputs for kind, text in output.get("data", {}).items() if "image/" in kind]
    return [Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB") for text in encoded]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_holds_calls_and_prose_and_what_they_gave(file):
    notebook = read(file)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids) and not any(re.fullmatch("[0-9a-f]{8}", cell) for cell in ids), "made by chance"
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    allowed = (*ALLOWED, *FURTHER) if file.stem == QUICKSTART else ALLOWED
    for number, cell in enumerate(code(notebook), 1):
        assert cell.execution_count == number
        assert all(output.get("execution_count", number) == number for output in cell.outputs)
        tree = ast.parse(cell.source)
        assert bool(cell.outputs) == isinstance(tree.body[-1], ast.Expr), "a cell that ends with a value shows it"
        for node in ast.walk(tree):
            assert isinstance(node, allowed), ast.unparse(node)
            if file.stem != QUICKSTART:
                assert not isinstance(node, ast.ImportFrom) or node.module == "experiments"
    assert any(pictures(cell) for cell in code(notebook))


def test_notebooks_are_small_and_tell_nothing_of_whose_machine_ran_them():
    assert sum(file.stat().st_size for file in FILES) <= 600_000
    for file in FILES:
        for cell in code(read(file)):
            for output in cell.outputs:
                assert output.output_type in ("stream", "execute_result") and output.get("name", "stdout") == "stdout"
                texts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if "text/" in k)]
                for text in texts:
                    assert not re.search(r"(^|[\s'\"(=])(/|~|[A-Z]:\\)\w|0x[0-9a-f]{6}", text), (file.name, text[:200])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.slow
def test_a_notebook_gives_the_outputs_that_are_committed(file, monkeypatch):
    """Texts and tables are the same, pictures as large; but for the last digits of images, they look the same."""
    monkeypatch.chdir(file.parent)
    kept, made = code(read(file)), code(notebooks.run(read(file)))
    for before, after in zip(kept, made, strict=True):
        for one, other in zip(before.outputs, after.outputs, strict=True):
            assert one.output_type == other.output_type and one.get("data", {}).keys() == other.get("data", {}).keys()
            for kind, text in one.get("data", {}).items():
                assert "image/" in kind or text == other.data[kind], before.id
            if file.stem != QUICKSTART:
                assert one.get("text") == other.get("text"), before.id
        for one, other in zip(pictures(before), pictures(after), strict=True):
            assert one.size == other.size, before.id
            # Means of 8 x 8 pixels: a mark that moved is seen, how letters are smoothed is not.
            blocks = [np.array(picture.reduce(8), float) for picture in (one, other)]
            assert abs(blocks[0] - blocks[1]).max() < 64 and abs(blocks[0] - blocks[1]).mean() < 2, before.id


def test_what_a_notebook_shows_is_what_a_kernel_would_and_a_picture_that_moved_is_noticed(tmp_path, monkeypatch):
    cells = [
        nbformat.v4.new_code_cell("import pandas\nprint('said')\npandas.DataFrame({'a': [1]})"),
        nbformat.v4.new_code_cell("x = 3"),
        nbformat.v4.new_code_cell("None"),
        nbformat.v4.new_code_cell("from experiments.figures.style import Drawing\nDrawing(figsize=(x, 1))"),
        nbformat.v4.new_code_cell("x"),
    ]
    file = tmp_path / "some.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), file)
    assert notebooks.refresh(file) == file
    once = file.read_bytes()
    table, assigned, nothing, figure, number = code(read(file))
    assert [output.output_type for output in table.outputs] == ["stream", "execute_result"]
    assert table.outputs[0].text == "said\n" and set(table.outputs[1].data) == {"text/html"}
    assert assigned.outputs == nothing.outputs == [] and number.outputs[0].data == {"text/plain": "3"}
    assert set(figure.outputs[0].data) == {"image/png"} and pictures(figure)[0].size == (270, 90)
    notebooks.refresh(file)
    assert file.read_bytes() == once


def test_help_needs_no_extra_and_a_missing_one_is_one_line(monkeypatch, capsys):
    monkeypatch.delenv("NEGTOME_TRACEBACK", raising=False)
    monkeypatch.setitem(sys.modules, "nbformat", None)
    monkeypatch.delitem(sys.modules, "experiments.report.notebooks")
    assert main(["notebooks", "--help"]) == 0 and "python -m experiments notebooks" in capsys.readouterr().out
    assert main(["notebooks"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "pip install -e '.[notebooks]'" in error


def test_an_unknown_notebook_is_one_line_and_none_is_run(monkeypatch, capsys):
    monkeypatch.delenv("NEGTOME_TRACEBACK", raising=False)
    monkeypatch.setattr(notebooks, "refresh", lambda file: pytest.fail(f"{file} was run"))
    assert main(["notebooks", QUICKSTART, "quickstrat"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and QUICKSTART in error and "quickstrat" in error


def test_the_readme_links_every_notebook():
    linked = set(re.findall(r"\]\(notebooks/(\w+)\.ipynb\)", (PROJECT / "README.md").read_text(encoding="utf-8")))
    assert linked == {file.stem for file in FILES}
