"""The notebooks: run top to bottom on the committed tables, they give the committed outputs."""

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


def read(file):
    return nbformat.read(file, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell):
    """Return the images that a cell shows, decoded."""
    encoded = [text for output in cell.outputs for kind, text in output.get("data", {}).items() if "image/" in kind]
    return [Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB") for text in encoded]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_is_valid_has_run_in_order_and_names_no_path_of_a_machine(file):
    notebook = read(file)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids) and not any(re.fullmatch("[0-9a-f]{8}", cell) for cell in ids), "random ids"
    assert file.stat().st_size <= 300_000 and any(pictures(cell) for cell in code(notebook))
    for number, cell in enumerate(code(notebook), 1):
        assert cell.execution_count == number
        for output in cell.outputs:
            assert output.output_type in ("stream", "execute_result") and output.get("name", "stdout") == "stdout"
            data = output.get("data", {})
            for text in (output.get("text", ""), *(data[kind] for kind in data if "text/" in kind)):
                assert not re.search(r"(^|[\s'\"(=])(/|~|[A-Z]:\\)\w|0x[0-9a-f]{6}", text), text[:200]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.slow
def test_a_notebook_gives_the_committed_outputs(file, monkeypatch):
    """Texts and tables are equal; images look the same, since their last digits depend on the processor."""
    monkeypatch.chdir(file.parent)
    committed, rerun = code(read(file)), code(notebooks.run(read(file)))
    for before, after in zip(committed, rerun, strict=True):
        for one, other in zip(before.outputs, after.outputs, strict=True):
            assert one.output_type == other.output_type and one.get("data", {}).keys() == other.get("data", {}).keys()
            for kind, text in one.get("data", {}).items():
                assert "image/" in kind or text == other.data[kind], before.id
            if file.stem != QUICKSTART:
                assert one.get("text") == other.get("text"), before.id
        for one, other in zip(pictures(before), pictures(after), strict=True):
            assert one.size == other.size, before.id
            # Means of 8 x 8 pixels: they show a mark that moved, but not how letters are smoothed.
            blocks = [np.array(picture.reduce(8), float) for picture in (one, other)]
            assert abs(blocks[0] - blocks[1]).max() < 64 and abs(blocks[0] - blocks[1]).mean() < 2, before.id


def test_a_notebook_shows_what_a_kernel_would_show_and_is_written_again_alike(tmp_path):
    sources = (
        "import pandas\nprint('printed')\npandas.DataFrame({'a': [1]})", "x = 3", "None",
        "from experiments.figures.style import Drawing\nDrawing(figsize=(x, 1))", "x",
    )  # fmt: skip
    file = tmp_path / "some.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources]), file)
    assert notebooks.refresh(file) == file
    once = file.read_bytes()
    table, assigned, nothing, figure, number = code(read(file))
    assert [output.output_type for output in table.outputs] == ["stream", "execute_result"]
    assert table.outputs[0].text == "printed\n" and set(table.outputs[1].data) == {"text/html"}
    assert assigned.outputs == nothing.outputs == [] and number.outputs[0].data == {"text/plain": "3"}
    assert set(figure.outputs[0].data) == {"image/png"} and pictures(figure)[0].size == (270, 90)
    notebooks.refresh(file)
    assert file.read_bytes() == once


def test_a_missing_extra_and_an_unknown_notebook_are_one_line(monkeypatch, capsys):
    monkeypatch.delenv("NEGTOME_TRACEBACK", raising=False)
    monkeypatch.setattr(notebooks, "refresh", lambda file: pytest.fail(f"{file} was run"))
    assert main(["notebooks", QUICKSTART, "quickstrat"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and QUICKSTART in error and "quickstrat" in error
    monkeypatch.setitem(sys.modules, "nbformat", None)
    monkeypatch.delitem(sys.modules, "experiments.report.notebooks")
    assert main(["notebooks", "--help"]) == 0 and "python -m experiments notebooks" in capsys.readouterr().out
    assert main(["notebooks"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "pip install -e '.[notebooks]'" in error
