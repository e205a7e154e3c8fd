"""The committed tables: traceable, honest about their model, and equal to what their CSV renders to."""

import pandas as pd
import pytest
import yaml
from hydra.utils import get_object

from experiments import PROJECT
from experiments.compose import expand
from experiments.runs.checkpoints import find_checkpoint
from experiments.runs.identity import code_digest, config_digest
from experiments.tables.columns import COLUMNS, REQUIRED, TEXT
from experiments.tables.pages import paper_table, render_markdown
from experiments.tables.paths import TABLE

RESULTS = PROJECT / "results"
EXPERIMENTS = {path.stem for path in (PROJECT / "conf" / "experiment").glob("*.yaml")} - {"latency"}  # test_latency.py
TABLES = {path.parent.name: path for path in sorted(RESULTS.glob(f"*/{TABLE}")) if path.parent.name in EXPERIMENTS}
#: These are rendered by default: one of each kind of prompts. The slow tests render the others.
RENDERED = {"diversity", "copyright", "safety"}
READ = [pytest.param(name, marks=[pytest.mark.slow] * (name not in RENDERED)) for name in TABLES]


#: Composing all runs takes seconds a table: by default this one stands for the others.
COMPOSED = {"diversity"}


#: Experiments whose tables are not made yet (`paper` needs a GPU), one that sets floors, and one of a user's own
#: policy, which have none.
UNMEASURED = {"paper", "safety_floors", "own_policy"}


def declared(name, key):
    """Return what the file of an experiment declares, or the file of the one that it is based on."""
    spec = yaml.safe_load((PROJECT / "conf" / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))
    if key in spec:
        return spec[key]
    return declared(next(one for one in spec["defaults"] if isinstance(one, str) and one in EXPERIMENTS), key)


@pytest.mark.parametrize("name", READ)
def test_a_table_is_what_its_csv_renders_to(name):
    frame = pd.read_csv(TABLES[name], dtype=TEXT)
    markdown = render_markdown(frame, declared(name, "description"), paper_table(name, RESULTS / "paper.csv"))
    assert TABLES[name].with_suffix(".md").read_text() == markdown


@pytest.mark.parametrize("name", TABLES)
def test_every_number_can_be_traced(name):
    frame = pd.read_csv(TABLES[name], dtype=TEXT)
    assert list(frame.columns) == [column for column in COLUMNS if column in REQUIRED or column in frame]
    traced = [
        "model",
        "method",
        "metric",
        "encoder",
        "value",
        "n_groups",
        "n_images",
        "run_id",
        "code",
        "commit",
        "device",
    ]
    unmeasured = frame["value"].isna()  # of no images, since all requests were refused
    assert (frame.loc[unmeasured, "n_images"] == 0).all()
    assert frame.loc[~unmeasured, traced].notna().all(axis=None)
    frame = frame[~unmeasured]
    assert frame["run_id"].str.fullmatch("[0-9a-f]{12}").all()
    # An interval lies around its value; where there is none, the units were too few.
    assert (frame["ci_low"].isna() == frame["ci_high"].isna()).all()
    estimated = frame[frame["ci_low"].notna()]
    assert (estimated["ci_low"] <= estimated["value"]).all() and (estimated["value"] <= estimated["ci_high"]).all()
    assert (estimated["n_units"] >= 4).all()
    # What all requests did alike has no interval that a bootstrap could tell.
    alike = frame["metric"].str.startswith(("not_unsafe", "not_overrefuse")) & frame["value"].isin([0, 1])
    assert frame.loc[frame["primary"].notna() & ~alike, "ci_low"].notna().all()
    known = {path.stem for path in (PROJECT / "conf" / "model").glob("*.yaml")}
    assert set(frame["model"]) <= known
    compared = frame[frame["method"] != "none"]
    assert compared["difference"].notna().all()
    estimated = compared["primary"].notna() & ~alike & compared["difference"].ne(0)
    assert (compared["difference_low"] <= compared["difference_high"])[estimated].all()


@pytest.mark.parametrize(
    "table", [pytest.param(name, marks=[] if name in COMPOSED else pytest.mark.slow) for name in TABLES]
)
def test_a_table_is_of_todays_settings_weights_and_versions(table):
    """Whoever changes what a number depends on, or its declared version, makes the table anew."""
    today = set()
    for name in (name for name in EXPERIMENTS if declared(name, "name") == table):  # which make one table
        for cfg in expand([f"experiment={name}", "results=results"], baselines=True):
            settings, weights = config_digest(cfg), find_checkpoint(cfg.model).fingerprint
            for version in {get_object(spec._target_).version for spec in cfg.metric.values()}:
                today.add(code_digest(settings, weights, version))
    assert today == set(pd.read_csv(TABLES[table], dtype=TEXT)["code"])


def test_every_experiment_has_a_table():
    assert {declared(name, "name") for name in EXPERIMENTS} - UNMEASURED == set(TABLES)


def test_the_papers_numbers_are_labelled_and_never_of_our_models():
    paper = pd.read_csv(RESULTS / "paper.csv")
    assert paper[["experiment", "table", "model", "method", "metric", "value"]].notna().all(axis=None)
    assert not paper["model"].str.startswith("mini").any()
    # The figure that is known to be printed under a wrong caption belongs to the diversity comparison alone.
    assert set(paper.loc[paper["metric"] == "DreamSim similarity", "experiment"]) == {"diversity"}


def test_published_numbers_of_other_methods_say_of_what_they_are():
    """Numbers compare within one table of one source: of one model, one size of groups, and one sense of better."""
    published = pd.read_csv(RESULTS / "published.csv")
    said = ["source", "table", "model", "prompts", "group_size", "method", "metric", "value"]
    assert published[said].notna().all(axis=None) and published["source"].str.contains("arXiv").all()
    assert not published["model"].str.startswith("mini").any()
    assert not published.duplicated(["source", "table", "method", "metric"]).any()
    # One metric, one sense: a similarity and a distance are never one name.
    assert (published.groupby("metric")["higher_is_better"].nunique(dropna=False) == 1).all()
    assert not published.loc[published["metric"].str.contains("similarity"), "higher_is_better"].astype(bool).any()
