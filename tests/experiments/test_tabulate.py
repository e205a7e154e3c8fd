"""The table's rules, on documents made by hand: what may be tested, what replaces what, and when quality is kept."""

import shutil
import subprocess
import threading
import time
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from plans import plan_of

from experiments import PROJECT, tabulate
from experiments.runs.metrics import metric_of_run
from experiments.tables import columns, groups, pages
from experiments.tables.columns import merge_rows

OWN = {"matching", "reference", "alpha", "threshold", "t_low", "t_high", "sites"}
ROW = dict.fromkeys(columns.REQUIRED | OWN, 1.0) | {
    "experiment": "e", "model": "m", "method": "negtome", "metric": "clip_score", "encoder": "clip-old",
    "primary": "quality", "run_id": "0123", "true_cfg_scale": None,
}  # fmt: skip


def configured(*overrides):
    return plan_of(["experiment=diversity", "model=mini-flux", "method=negtome", *overrides], "negtome")


def document(values, bounds=(0, 100), **more):
    """A metric's document: one value a category, unless `categories` says otherwise."""
    categories = more.pop("categories", [f"c{index:02d}" for index in range(len(values))])
    groups = [
        {"group": f"p{index:02d}/000000", "category": category, "n_images": 4, "value": float(value)}
        for index, (value, category) in enumerate(zip(values, categories, strict=True))
    ]
    return {
        "metric": "clip_score", "aggregate": "mean", "higher_is_better": True, "bounds": list(bounds),
        "value": float(np.mean(values)), "groups": groups, "n_groups": len(groups), "n_images": 4 * len(groups), **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["primary.quality=clip_scoer"], r"primary.quality .*'clip_scoer'.*clip_score"),
        (["primary.diversity=null"], r"primary.quality and one of diversity, resemblance to be given, .*clip_score"),
        (["primary.quality=null"], r"primary.quality and one of diversity, resemblance .* got .*pairwise_distance"),
        (["primary.resemblance=maximum_resemblance"], r"primary.resemblance .*'maximum_resemblance'"),
        (["primary.resemblance=clip_score"], r"different primary metrics, got .*'resemblance': \['clip_score'\]"),
        (["~metric.clip_score"], r"primary.quality .*'clip_score'"),
        (["metric=tune", "primary.diversity=vendi_score"], r"primary.diversity .*'vendi_score'"),
        (
            ["primary.quality=pairwise_distance_aligned"],
            r"different primary metrics, got .*'pairwise_distance_aligned'\]",
        ),
        (
            ["primary.quality=kernel_distance_scorer", "model.reference_images=null"],
            "primary.quality .*one of the metrics",
        ),
    ],
)
def test_primary_metrics_must_be_two_that_are_measured(overrides, message, tmp_path):
    """Before anything is looked for: a mistyped name must not cost an experiment, nor silently test nothing."""
    with pytest.raises(ValueError, match=message):
        tabulate.rows_of_runs(configured(f"outputs={tmp_path}", *overrides))


def test_intervals_of_another_level_are_not_called_95_percent():
    with pytest.raises(ValueError, match=r"expected bootstrap\.level=0\.95, got 0\.9"):
        tabulate.rows_of_runs(configured("bootstrap.level=0.9"))


def test_runs_that_a_table_cannot_tell_apart_are_refused(tmp_path):
    path = tmp_path / "e.csv"
    merge_rows(path, [ROW])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"Runs 0123 and 4567 differ in nothing that a table tells .*results=FOLDER"):
        merge_rows(path, [ROW, ROW | {"run_id": "4567"}])
    assert path.read_bytes() == before


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("name", ["diversity", "ablate_alpha", "latency"])
def test_what_makes_a_table_is_what_the_makefile_says(name):
    target, *steps = columns.commands(name)
    done = subprocess.run([*target.split(), "-n"], cwd=PROJECT, capture_output=True, text=True, check=True)
    ran = [line.strip().replace(".venv/bin/python", "python") for line in done.stdout.splitlines()]
    assert [line for line in ran if "-m experiments " in line] == steps


def test_a_number_of_a_whole_set_cannot_be_primary(monkeypatch):
    plan = configured("primary.quality=kernel_distance_scorer")
    runs = {spec: Mock(identity={"weights": "w", "machine": "m"}) for spec in (*plan.runs, plan.runs[0].baseline)}
    monkeypatch.setattr(tabulate.Run, "of", runs.get)
    monkeypatch.setattr(tabulate, "find_document", lambda *arguments: {"version": 1})
    monkeypatch.setattr(tabulate, "ImageSet", Mock())
    monkeypatch.setattr(tabulate, "row_of", lambda *arguments: {})
    with pytest.raises(ValueError, match="kernel_distance_scorer, a number of the whole set"):
        tabulate.rows_of_runs(plan)
    plan.cfg.primary.quality = "clip_score"
    assert len(tabulate.rows_of_runs(plan)) == len(plan.cfg.metric)


def test_runs_are_paired_with_a_method_where_their_baseline_has_one(monkeypatch):
    methods = "method=none,negtome,lower_guidance_3"
    plan = plan_of(["experiment=diversity", "model=mini-sdxl,mini-flux", methods, "model.call.num_inference_steps=4,2"])

    def cell(spec):
        return spec.cfg.model.name, spec.cfg.model.call.num_inference_steps, spec.cfg.method.name

    monkeypatch.setattr(tabulate.Run, "of", {spec: Mock() for spec in plan.runs}.get)
    monkeypatch.setattr(tabulate, "find_document", lambda *arguments: {})
    monkeypatch.setattr(tabulate, "ImageSet", Mock())
    plan.runs = [spec for spec in plan.runs if cell(spec) != ("mini-sdxl", 2, "lower_guidance_3")]
    paired = {cell(score.spec) for score in tabulate.read_scores(plan, "lower_guidance_3")}
    assert paired == {cell(spec) for spec in plan.runs if cell(spec)[:2] != ("mini-sdxl", 2)}
    plan.runs = [spec for spec in plan.runs if cell(spec)[::2] != ("mini-sdxl", "lower_guidance_3")]
    with pytest.raises(ValueError, match=r"a run of lower_guidance_3 .* none on mini-sdxl: give model=mini-flux$"):
        tabulate.read_scores(plan, "lower_guidance_3")


def test_the_configured_cluster_reaches_the_halves_too():
    for cluster in ("category", "prompt", None):
        (spec,) = configured(f"bootstrap.cluster={'null' if cluster is None else cluster}").runs
        assert metric_of_run(spec, "kernel_distance_scorer").design()["subset_cluster"] == cluster
        assert metric_of_run(spec, "clip_score").design() == {}


def test_quality_is_held_against_its_margin():
    base, change = np.linspace(20, 40, 12), np.linspace(-2.5, 0.5, 12)
    for margin, kept in ((0.1, True), (0.04, False)):
        for given in (margin, f"{{clip_score:{margin},other:1}}"):
            cfg = configured(f"primary.quality_margin={given}").cfg
            columns = tabulate.statistics_of(cfg, "clip_score", "quality", document(base + change), document(base))
            assert columns["margin"] == pytest.approx(margin * 30)
            assert (columns["difference_low"] > -columns["margin"]) == columns["non_inferior"] == kept
        assert "margin" not in tabulate.statistics_of(
            cfg, "clip_score", "diversity", document(base + change), document(base)
        )


@pytest.mark.parametrize(
    ("base", "bounds"),
    [(np.zeros(8), (0, 1)), (np.linspace(0.1, 1, 8), (-1, 1)), (np.linspace(0.1, 1, 8), (None, None))],
    ids=["a baseline of 0", "may be negative", "bounds unknown"],
)
def test_a_share_of_what_may_be_0_or_less_is_no_margin(base, bounds, tmp_path):
    cfg = configured().cfg
    changed = document(base + np.linspace(0, 0.3, 8), bounds)
    columns = tabulate.statistics_of(cfg, "clip_score", "quality", changed, document(base, bounds))
    assert "margin" not in columns and "non_inferior" not in columns
    assert columns["difference_low"] > 0
    unknown = {"margin": None, "non_inferior": None}
    baseline = ROW | unknown | {"method": "none", "run_id": "4567", "difference": None, "p_value": None}
    frame = merge_rows(tmp_path / "e.csv", [baseline, ROW | unknown | columns])
    assert pages.main_table(frame)["non-inferior"].tolist() == ["", "not estimable"], "the first is the baseline"
    (finding,) = pages.findings(frame)
    assert "non-inferior" not in finding


def test_differences_and_tests_go_by_category():
    """40 groups in 4 categories: four witnesses, however many groups."""
    categories = [f"c{index // 10}" for index in range(40)]
    base = np.random.default_rng(0).normal(30, 3, 40)
    change = np.repeat([0.5, 1.0, 1.5, 2.0], 10) + np.random.default_rng(1).normal(0, 0.01, 40)
    documents = [document(values, categories=categories) for values in (base + change, base)]
    columns = {}
    for cluster in ("category", "null"):
        cfg = configured(f"bootstrap.cluster={cluster}").cfg
        columns[cluster] = tabulate.statistics_of(cfg, "clip_score", "diversity", *documents)
    assert columns["category"]["p_value"] > 0.01 and columns["null"]["p_value"] < 0.001
    assert columns["category"]["effect_size"] == pytest.approx(1.25 / np.std([0.5, 1, 1.5, 2], ddof=1), rel=0.02)
    assert columns["null"]["effect_size"] > 1.1 * columns["category"]["effect_size"]
    widths = {name: found["difference_high"] - found["difference_low"] for name, found in columns.items()}
    # 10**0.5 by the number of units; Student's t with 3 degrees of freedom against 39
    assert widths["category"] > 4 * widths["null"]


def test_what_has_no_test_and_no_spread_is_blank():
    """As in a comparison of two methods on prompts of one category."""
    untested = ROW | {"p_holm": None, "effect_size": None, "difference_low": None}
    (cells,) = pages.against_table(pd.DataFrame([untested]), "random_match").to_dict("records")
    assert (cells["p"], cells["d_z"], cells["win rate"]) == ("", "", "100 %")


def test_a_table_has_the_columns_of_the_methods_that_are_in_it(tmp_path):
    none = ROW | {"method": "none", "run_id": "a"} | dict.fromkeys(OWN)
    frame = merge_rows(tmp_path / "e.csv", [none])
    assert not OWN & set(pd.read_csv(tmp_path / "e.csv")) and set(frame) >= OWN, "absent from the file alone"
    assert list(pages.main_table(frame))[:3] == ["model", "method", "pushed"]
    frame = merge_rows(tmp_path / "e.csv", [ROW | {"sites": None}])
    committed = pd.read_csv(PROJECT / "results" / "diversity" / "table.csv", nrows=0)
    expected = [name for name in committed if name != "scale"]  # of lower guidance alone
    assert list(pd.read_csv(tmp_path / "e.csv")) == expected, "sites too, though they are blank"
    assert frame["alpha"].tolist()[1:] == [1.0] and frame["alpha"].isna()[0]
    assert list(pages.main_table(frame))[:6] == ["model", "method", "alpha", "threshold", "window", "pushed"]


def test_rows_by_an_earlier_encoder_are_replaced(tmp_path):
    path = tmp_path / "table.csv"
    others = [ROW | {"metric": "vendi_score", "primary": None}, ROW | {"model": "other"}, ROW | {"alpha": 0.5}]
    merge_rows(path, [ROW | {"p_value": 0.03}, *others])
    frame = merge_rows(path, [ROW | {"p_value": 0.03, "encoder": "clip-new"}])
    assert len(frame) == 4, "beside the new row its predecessor stands"
    key = (frame["metric"] == "clip_score") & (frame["model"] == "m") & (frame["alpha"] == 1)
    assert frame.loc[key, "encoder"].tolist() == ["clip-new"]
    assert frame.loc[~key, "encoder"].tolist() == ["clip-old"] * 3
    # the family is the two tests that stand in the table, not three
    assert frame.loc[key, "p_holm"].tolist() == [0.06]


def test_the_page_says_what_was_resampled_and_what_is_not_corrected():
    frame = pd.DataFrame(
        [
            ROW | {"method": "none", "run_id": "a", "n_units": 20, "n_groups": 40, "difference": None},
            ROW | {"run_id": "b", "n_units": 20, "n_groups": 40, "ci_low": None, "non_inferior": None, "margin": None},
            ROW | {"run_id": "b", "metric": "gender_entropy", "primary": None, "n_units": 2, "difference_low": None},
        ]
    )
    table = pages.main_table(frame)
    assert table["clusters"].tolist() == [20, 20] and table["groups"].tolist() == [40, 40]
    assert table["non-inferior"].tolist() == ["", "not estimable"]
    assert pages.other_table(frame)["clusters"].tolist() == ["2"]
    page = pages.render_markdown(frame, None, pd.DataFrame())
    assert "40 groups in 20 clusters" in page


def copyright_row(method, run, metric, role, **more):
    higher = metric == "clip_score"
    return ROW | {"experiment": "copyright", "method": method, "run_id": run, "metric": metric, "primary": role,
                  "higher_is_better": higher, "seconds": None, "alpha": None, "threshold": None, "t_low": None,
                  "t_high": None, "pushed_share": None, "n_units": 11, "n_groups": 24,
                  "n_images": 48, **more}  # fmt: skip


def copyright_rows(seconds):
    """What a push away from assets did: less resemblance, as good."""
    compared = {"difference": None, "difference_low": None, "difference_high": None, "p_value": None}
    resemblance = {"value": 0.8, "ci_low": 0.7, "ci_high": 0.9}
    quality = {"value": 40.0, "ci_low": 38.0, "ci_high": 42.0}
    return [
        copyright_row("none", "a", "maximum_resemblance", "resemblance", seconds=seconds and 2.0, effect_size=None,
                      win_rate=None, **resemblance | compared),
        copyright_row("none", "a", "clip_score", "quality", seconds=seconds and 2.0, effect_size=None,
                      win_rate=None, **quality | compared),
        copyright_row("negtome_reference", "b", "maximum_resemblance", "resemblance", seconds=seconds and 2.53125,
                      value=0.6, difference=-0.2, difference_low=-0.25, difference_high=-0.15, p_value=0.001,
                      effect_size=-1.5, win_rate=0.875),
        copyright_row("negtome_reference", "b", "clip_score", "quality", seconds=seconds and 2.53125,
                      value=39.5, difference=-0.5, difference_low=-1.5, difference_high=0.5, p_value=0.3,
                      effect_size=-0.1, win_rate=0.5, margin=2.0, non_inferior=True),
        copyright_row("negtome_reference", "b", "change_benign", None, seconds=seconds and 2.53125, value=0.01),
    ]  # fmt: skip


def test_resemblance_is_tested_beside_quality_and_described_by_its_relative_reduction(tmp_path):
    frame = merge_rows(tmp_path / "copyright.csv", copyright_rows(True))
    table = pages.main_table(frame)
    assert list(table.columns) == [
        "model", "method", "alpha", "threshold", "window", "pushed", "maximum resemblance (down)",
        "maximum resemblance: p", "d_z", "win rate", "clip score (up)", "clip score: p", "non-inferior",
        "seconds", "clusters", "groups", "images",
    ]  # fmt: skip
    none, pushed = table.to_dict("records")
    assert pushed["maximum resemblance (down)"] == "0.600; -0.200 [-0.250, -0.150]"
    assert (pushed["d_z"], pushed["win rate"], pushed["non-inferior"]) == (
        "-1.50",
        "88 %",
        "yes (margin 2, power 98 %)",
    )
    assert (none["maximum resemblance (down)"], none["d_z"], none["non-inferior"]) == ("0.800 [0.700, 0.900]", "", "")
    # One family of two tests, in which the smaller p-value counts double.
    assert frame.set_index(["method", "metric"]).loc[
        ("negtome_reference", "maximum_resemblance"), "p_holm"
    ] == pytest.approx(0.002)
    (finding,) = pages.findings(frame)
    significant, other = finding.split("; ")
    assert all(text in significant for text in ("-0.200 [-0.250, -0.150]", "-25.0 %", "p = 0.002", "88 %"))
    assert all(text in other for text in ("-0.50 [-1.50, +0.50]", "p = 0.300", "not significant", ", non-inferior"))
    assert "not significant" not in significant
    assert "24 groups in 11 clusters" in finding
    assert pages.other_table(frame)["metric"].tolist() == ["change benign"]
    page = pages.render_markdown(frame, "What it costs.", pd.DataFrame())
    assert "maximum resemblance (down)" in page and "2.53" in page
    assert "maximum resemblance" in pages.render_latex(frame)


def test_a_finding_names_the_other_metrics_that_moved(tmp_path):
    """Worse ones first, by their intervals alone; and none whose interval holds 0."""
    moved = [("fid", False, 12.0, 4.0, 1.0), ("vendi_score", True, 2.5, 0.5, 0.1), ("skin_tone", None, 1.0, -0.5, -0.7),
             ("recall", True, 0.5, -0.1, -0.3)]  # fmt: skip
    further = [
        copyright_row("negtome_reference", "b", metric, None, value=value, difference=difference, higher_is_better=up,
                      difference_low=low, difference_high=-0.2 if metric == "skin_tone" else 6.0)
        for metric, up, value, difference, low in moved
    ]  # fmt: skip
    (finding,) = pages.findings(merge_rows(tmp_path / "copyright.csv", [*copyright_rows(None), *further]))
    assert finding.endswith(", fid +50 %; better: vendi score +25 %; moved: skin tone -33 %.")


def test_seconds_are_a_column_only_where_they_were_asked_for(tmp_path):
    """They survive the CSV; and a table without them has no column of blanks."""
    timed, untimed = (merge_rows(tmp_path / f"{seconds}.csv", copyright_rows(seconds)) for seconds in (True, None))
    assert timed["seconds"].tolist() == [2.0, 2.0, 2.53125, 2.53125, 2.53125]
    assert pages.main_table(timed)["seconds"].tolist() == ["2.00", "2.53"]
    assert untimed["seconds"].isna().all() and "seconds" not in pages.main_table(untimed)
    # Both in one CSV: a method that was not timed is blank.
    other = [row | {"model": "untimed"} for row in copyright_rows(None)]
    both = pages.main_table(merge_rows(tmp_path / "True.csv", other))
    assert both["seconds"].tolist() == ["2.00", "2.53", "", ""]


def test_seconds_are_an_images_share_of_a_typical_group(monkeypatch):
    """The median over groups, so that the first one, which loads and compiles, is not the message."""
    run = SimpleNamespace(
        identity={"request": {"method": {"settings": {}}}, "machine": {"device": "cpu"}, "weights": "w"},
        environment={"commit": "c"}, id="0123",
    )  # fmt: skip
    statistics = [{"seconds": seconds} for seconds in (90.0, 4.0, 5.0, 6.0, 4.0)]
    counts = {"n_groups": 8, "n_images": 32, "version": 1}
    measured = document(np.linspace(0.2, 0.6, 8)) | {"encoder": {"id": "e"}} | counts
    (spec,) = configured("report_seconds=true").runs
    assert spec.cfg.prompts.images_per_prompt == 4
    for report, seconds in ((True, 5.0 / 4), (False, None)):
        spec.cfg.report_seconds = report
        row = tabulate.row_of(tabulate.Score(spec, run, "clip_score", "quality", measured, None, statistics))
        assert row["seconds"] == seconds and set(row) <= set(columns.COLUMNS)


def test_the_share_of_equal_matches_is_a_column_only_where_matches_are_approximate(tmp_path):
    shares = {"none": None, "negtome": None, "negtome_reuse_2": 0.375}
    exact, approximate = (
        merge_rows(
            tmp_path / f"{len(methods)}.csv",
            [ROW | {"method": name, "run_id": str(i), "equal_share": shares[name]} for i, name in enumerate(methods)],
        )
        for methods in (["none", "negtome"], list(shares))
    )
    assert pages.main_table(approximate)["equal matches"].tolist() == ["", "", "38 %"]
    assert "share of the approximate matches" in pages.legend(approximate)
    assert "equal_share" not in pd.read_csv(tmp_path / "2.csv") and "equal matches" not in pages.main_table(exact)
    assert "approximate" not in pages.legend(exact)


def test_shares_are_over_all_groups():
    """Also of groups in which nothing was compared; a method without such counts has no share."""
    run = SimpleNamespace(
        identity={"request": {"method": {"settings": {}}}, "machine": {"device": "cpu"}, "weights": "w"},
        environment={"commit": "c"}, id="0123",
    )  # fmt: skip
    counts = {"n_groups": 8, "n_images": 32, "version": 1}
    measured = document(np.linspace(0.2, 0.6, 8)) | {"encoder": {"id": "e"}} | counts
    (spec,) = configured().runs

    def row(*statistics):
        return tabulate.row_of(tabulate.Score(spec, run, "clip_score", "quality", measured, None, list(statistics)))

    groups = [
        {"tokens_compared": 100, "tokens_pushed": 90, "approximate_matches": 50, "equal_matches": 10},
        {"tokens_compared": 300, "tokens_pushed": 10, "approximate_matches": 150, "equal_matches": 140},
    ]
    assert (row(*groups, {})["pushed_share"], row(*groups, {})["equal_share"]) == (0.25, 0.75)
    assert (row({}, {})["pushed_share"], row({}, {})["equal_share"]) == (None, None)


def test_values_of_groups_are_those_of_the_table(tmp_path):
    """A new run takes the place of the one that its row replaced; other metrics and runs stay, to nine digits."""
    path = tmp_path / "e" / groups.GROUPS

    def put(run, metric, value, table):
        row = {"run_id": run, "model": "m", "method": "none", "metric": metric, "encoder": "e"}
        rows = groups.group_rows(row, document([value, 0.25]))
        groups.put_groups(path, rows, pd.DataFrame(table, columns=["run_id", "metric"]))

    put("a", "clip_score", 1 / 3, [("a", "clip_score")])
    put("b", "clip_score", 0.5, [("a", "clip_score"), ("b", "clip_score")])
    put("b", "other", 0.75, [("b", "other"), ("a", "clip_score"), ("b", "clip_score")])
    frame = groups.read_groups(tmp_path, "e")
    found = list(zip(frame["run_id"], frame["metric"], frame["value"], strict=True))
    assert found[::2] == [("b", "other", 0.75), ("a", "clip_score", 0.333333333), ("b", "clip_score", 0.5)]
    before = path.read_bytes()
    put("b", "other", 0.75, [("b", "other"), ("a", "clip_score"), ("b", "clip_score")])
    assert path.read_bytes() == before
    put("c", "clip_score", 0.5, [("c", "clip_score")])
    assert set(groups.read_groups(tmp_path, "e")["run_id"]) == {"c"}
    assert groups.values_of_run(groups.read_groups(tmp_path, "e"), "c", "clip_score")[1] == {
        "group": "p01/000000", "category": "c01", "n_images": 4, "value": 0.25,
    }  # fmt: skip
    whole_set = document([1.0]) | {"aggregate": "subsets"}
    assert groups.group_rows({}, whole_set) == groups.group_rows({}, document([1.0]) | {"value": None}) == []
    for damage in (before[:40], b"no gzip"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"groups\.csv\.gz, got a damaged file"):
            groups.read_groups(tmp_path, "e")
    with pytest.raises(FileNotFoundError, match="reproduce experiment=another"):
        groups.read_groups(tmp_path, "another")


def test_rows_of_two_processes_at_once_are_all_there(tmp_path, monkeypatch):
    """Each reads the table, and writes it slowly: whoever comes second reads what the first wrote."""
    row = dict.fromkeys(columns.COLUMNS, 1.0) | {"experiment": "e", "run_id": "0" * 12}
    write = columns.write_text

    def slow(path, text):
        time.sleep(0.3)
        return write(path, text)

    monkeypatch.setattr(columns, "write_text", slow)
    threads = [
        threading.Thread(target=merge_rows, args=(tmp_path / "e.csv", [row | {"model": model}])) for model in "abc"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert set(pd.read_csv(tmp_path / "e.csv")["model"]) == set("abc")


def test_rows_are_not_put_into_a_table_of_another_kind(tmp_path):
    """Its columns would be lost: such as the measured times of latency.csv."""
    path = tmp_path / "latency.csv"
    shutil.copy(PROJECT / "results" / "latency" / "table.csv", path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"a table of the same kind at .*latency\.csv, got one with the columns"):
        merge_rows(path, [ROW])
    assert path.read_bytes() == before
