"""What was made here beside what is published: confirmed, contradicted, or not comparable; and nothing overwritten."""

import hashlib
import shutil

import pandas as pd
import pytest

from experiments import PROJECT
from experiments.__main__ import main
from experiments.check import compare_tables
from experiments.tables.columns import ROLES, TEXT

#: A comparison is of tables: one run is composed to know which.
ONE_RUN = ("model=mini-sdxl", "method=none")
PUBLISHED = PROJECT / "results" / "diversity" / "table.csv"


@pytest.fixture
def made(tmp_path):
    """A copy of the published table to be perturbed: `made(change)` writes it where results go, and its overrides."""

    def write(change):
        frame = pd.read_csv(PUBLISHED, dtype=TEXT)
        change(frame)
        (tmp_path / "results" / "diversity").mkdir(parents=True, exist_ok=True)
        frame.to_csv(tmp_path / "results" / "diversity" / "table.csv", index=False)
        return ["check", "experiment=diversity", *ONE_RUN, f"results={tmp_path / 'results'}"]

    return write


def primary(frame, method="negtome", model="mini-sdxl", role="diversity"):
    return (frame["primary"] == role) & (frame["method"] == method) & (frame["model"] == model)


def test_rounding_of_another_cpu_is_confirmed(made, capsys):
    def other_digits(frame):
        frame.loc[frame["primary"].isin(ROLES), ["value", "difference"]] *= 1.002

    assert main(made(other_digits)) == 0
    frame = pd.read_csv(PUBLISHED, dtype=TEXT)
    n = int(frame["primary"].isin(ROLES).sum())
    out = capsys.readouterr().out
    assert f"inside the published intervals: {n} of {n}, largest deviation 0.2 %" in out


@pytest.mark.parametrize(
    ("column", "bound"), [("value", "ci_high"), ("difference", "difference_high"), ("difference", "difference_low")]
)
def test_a_value_or_a_difference_outside_its_interval_fails(made, capsys, column, bound):
    def outside(frame):
        row = primary(frame)
        frame.loc[row, column] = frame.loc[row, bound] + (0.01 if bound.endswith("high") else -0.01)

    assert main(made(outside)) == 1
    out = capsys.readouterr().out
    assert out.count("OUTSIDE") == 1 and "mini-sdxl negtome" in out[: out.index("OUTSIDE")].splitlines()[-1]


def test_other_settings_are_named_and_decide_nothing(made, capsys, tmp_path):
    def stronger(frame):
        frame.loc[frame["method"] == "negtome", "alpha"] = 123.0

    assert main(made(stronger)) == 0
    assert "not published with these settings" in capsys.readouterr().out
    table = compare_tables(tmp_path / "results" / "diversity" / "table.csv", PUBLISHED)
    assert table["inside"].isna().sum() == 6  # two models, three primary metrics


def test_the_published_table_is_not_compared_with_itself(capsys):
    assert main(["check", "experiment=diversity", *ONE_RUN, "results=results"]) == 2
    assert "leave out results=" in capsys.readouterr().err


def test_without_a_table_it_is_said_what_makes_one(tmp_path, capsys):
    assert main(["check", "experiment=diversity", *ONE_RUN, f"results={tmp_path}"]) == 2
    assert "make reproduce-diversity" in capsys.readouterr().err


@pytest.mark.slow
def test_reproducing_leaves_what_is_published_as_it_is(tiny_overrides, tmp_path):
    """All acts, without a word on where results go."""

    def digest(folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = digest(PROJECT / "results")
    asked = [text for text in tiny_overrides("diversity", tmp_path, "method=none,negtome") if "results=" not in text]
    assert main(["reproduce", *asked]) == 0
    assert {path.suffix for path in (tmp_path / "outputs" / "results").rglob("*.*")} >= {".csv", ".md", ".png", ".webp"}
    assert digest(PROJECT / "results") == before
    images = {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs").rglob("*.png")}
    assert main(["reproduce", *asked]) == 0  # once more, which makes no image
    again = {path: path.stat().st_mtime_ns for path in images if "images" in path.parts}
    assert again and again.items() <= images.items()
    shutil.rmtree(tmp_path / "outputs")


def test_a_published_zero_and_an_interval_that_was_not_estimable_are_compared_by_value(tmp_path, monkeypatch):
    rows = pd.read_csv(PUBLISHED, dtype=TEXT)
    rows = rows[primary(rows, "none")].head(1).assign(value=0.0, ci_low=float("nan"), ci_high=float("nan"))
    for value, inside, deviation in ((0.0, True, 0.0), (0.5, False, 1.0)):
        for name, frame in (("published", rows), ("made", rows.assign(value=value))):
            frame.to_csv(tmp_path / f"{name}.csv", index=False)
        (found,) = compare_tables(tmp_path / "made.csv", tmp_path / "published.csv").itertuples()
        assert (found.inside, found.deviation) == (inside, deviation)


def test_a_model_that_nobody_has_published_is_shown_beside_the_papers_values(made, capsys):
    def as_sdxl(frame):
        frame.loc[frame["model"] == "mini-sdxl", ["ci_low", "ci_high"]] = float("nan")
        frame["model"] = frame["model"].replace("mini-sdxl", "sdxl")

    assert main(made(as_sdxl)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if "nan" in line or len(line) > 400]
    frame = pd.read_csv(PUBLISHED, dtype=TEXT)
    n = int((frame["primary"].isin(ROLES) & (frame["model"] == "mini-sdxl")).sum())
    assert sum(line.startswith("sdxl ") for line in lines) == n, "what was made, a line each"
    paper = pd.read_csv(PROJECT / "results" / "paper.csv")
    paper = paper[paper["experiment"] == "diversity"]
    assert sum(line.startswith("sdxl:") for line in lines) == 1
    for row in paper.itertuples():
        (line,) = [line for line in lines if f"{row.model}, {row.method}: " in line]
        assert f"{row.metric} {row.value:g}" in line


def test_where_the_paper_has_no_value_either_it_is_one_line(tmp_path, capsys):
    frame = pd.read_csv(PROJECT / "results" / "stereotypes" / "table.csv", dtype=TEXT)
    frame["model"] = "sdxl"
    (tmp_path / "stereotypes").mkdir()
    frame.to_csv(tmp_path / "stereotypes" / "table.csv", index=False)
    assert main(["check", "experiment=stereotypes", *ONE_RUN, f"results={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("sdxl:")] == ["sdxl: nothing is published to compare with"]


def test_reproduce_refuses_the_published_folder_before_it_makes_anything(tmp_path, capsys):
    assert (
        main(["reproduce", "experiment=diversity", *ONE_RUN, "results=results", f"outputs={tmp_path / 'outputs'}"]) == 2
    )
    assert "leave out results=" in capsys.readouterr().err and not (tmp_path / "outputs").exists()
