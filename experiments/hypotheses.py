"""Judge the primary hypotheses of docs/protocol.md by the published tables.

    python -m experiments hypotheses
    python -m experiments hypotheses results=FOLDER

It reads conf/hypotheses.yaml, and the tables and values of groups of the experiments that it names. It writes
`<results>/hypotheses/table.csv` and `.md`: effect, 95 % interval, p-value, p after Holm's method over all hypotheses,
and a verdict. Hypotheses that are not measured yet count in Holm's method.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from eval.files import write_text
from eval.significance import holm
from experiments import project_path
from experiments.compose import CONF, first
from experiments.tables.columns import csv_text, humanize, markdown, read_table
from experiments.tables.groups import read_groups
from experiments.tables.pages import printed_p, title_of, with_interval
from experiments.tables.paired import paired_test
from experiments.tables.paths import TABLE, result_file

FILE = CONF / "hypotheses.yaml"
#: Verdicts.
SHOWN, EXCLUDED, UNDECIDED, UNMEASURED = "shown", "excluded", "undecided at this size", "not yet measured"
LEGEND = """\
Effect: the method's value minus the reference's, over the same groups. p (Holm): corrected over all hypotheses; those
that are not measured yet count. Shown: corrected p at most 0.05 in the stated direction. Excluded: the interval
excludes an effect of 5 % of the baseline's value in that direction. docs/protocol.md has the rules."""


def verdict(
    direction: str, effect: float, low: float | None, high: float | None, p_holm: float, bound: float, level: float
) -> str:
    """Judge a measured hypothesis.

    Args:
        direction: "higher" or "lower", in which the effect should be.
        effect, low, high: the paired difference and its 95 % interval, None if it cannot be estimated.
        p_holm: corrected p-value.
        bound: smallest effect that matters, > 0, in the metric's unit.
        level: largest corrected p-value at which a hypothesis is shown.

    Raises:
        ValueError: the direction is neither of the two.
    """
    if direction not in ("higher", "lower"):
        raise ValueError(f"direction must be higher or lower, got {direction!r}")
    sign = 1 if direction == "higher" else -1
    if p_holm <= level and sign * effect > 0:
        return SHOWN
    if low is None or high is None:
        return UNDECIDED
    largest = high if direction == "higher" else -low
    return EXCLUDED if largest < bound else UNDECIDED


def judge(hypotheses: Sequence[Mapping[str, Any]], level: float, results: str | Path, bootstrap: Any) -> pd.DataFrame:
    """Return one row for each hypothesis, measured or not.

    Args:
        hypotheses: as in conf/hypotheses.yaml.
        level: of the corrected p-values.
        results: folder of the results.
        bootstrap: settings of intervals and tests.

    Raises:
        ValueError: a table is damaged, or has several rows for a hypothesis.
    """
    rows = []
    for number, hypothesis in enumerate(hypotheses, 1):
        measured = _measure(hypothesis, results, bootstrap)
        rows.append({"number": number, **hypothesis, "settings": _settings_text(hypothesis), **measured})
    # A test that was not made, or cannot be, has not rejected anything.
    p_values = [1.0 if row.get("p_value") is None else row["p_value"] for row in rows]
    for row, p_holm in zip(rows, holm(p_values), strict=True):
        row["verdict"] = UNMEASURED
        if "effect" in row:
            row["p_holm"] = None if row["p_value"] is None else p_holm
            judged = [row[key] for key in ("effect", "effect_low", "effect_high")]
            row["verdict"] = verdict(row["direction"], *judged, p_holm, row["margin"] * abs(row["baseline"]), level)
    return pd.DataFrame(rows, columns=COLUMNS)


COLUMNS = [
    "number", "experiment", "model", "settings", "method", "reference", "metric", "direction", "margin", "baseline",
    "effect", "effect_low", "effect_high", "p_value", "p_holm", "n_groups", "verdict",
]  # fmt: skip


def _settings_text(hypothesis: Mapping[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in hypothesis["settings"].items())


def _measure(hypothesis: Mapping[str, Any], results: str | Path, bootstrap: Any) -> dict[str, Any]:
    """Return the effect of a hypothesis with its test; nothing if the tables lack it."""
    try:
        table = read_table(hypothesis["experiment"], results)
        groups = read_groups(results, hypothesis["experiment"])
    except FileNotFoundError:
        return {}
    rows = table[(table["model"] == hypothesis["model"]) & (table["metric"] == hypothesis["metric"])]
    for name, value in hypothesis["settings"].items():
        rows = rows[rows[name] == value]
    runs = {}
    for method in dict.fromkeys((hypothesis["method"], hypothesis["reference"], "none")):
        of_method = rows[rows["method"] == method]
        if len(of_method) > 1:
            raise ValueError(
                f"expected one row of {method} on {hypothesis['model']} in the table of {hypothesis['experiment']}, "
                f"got {len(of_method)}: name its settings in {FILE}"
            )
        if of_method.empty or of_method["value"].isna().any():
            return {}
        runs[method] = of_method.iloc[0]
    run, reference = (runs[hypothesis[key]]["run_id"] for key in ("method", "reference"))
    test = paired_test(groups, run, reference, hypothesis["metric"], hypothesis["direction"] == "higher", **bootstrap)
    return {
        "baseline": float(runs["none"]["value"]), "effect": test.difference, "effect_low": test.low,
        "effect_high": test.high, "p_value": test.p_value, "n_groups": test.n_groups,
    }  # fmt: skip


def render(frame: pd.DataFrame) -> str:
    """Return the judged hypotheses as a Markdown page."""
    table = pd.DataFrame(
        {
            "": row["number"],
            "model": row["model"],
            "settings": row["settings"],
            "method": title_of(row["method"]),
            "reference": title_of(row["reference"]),
            "measure": f"{humanize(row['metric'])}, {row['direction']}",
            "effect": with_interval("{:+.3f}".format, row["effect"], row["effect_low"], row["effect_high"]),
            "p": printed_p(row["p_value"]),
            "p (Holm)": printed_p(row["p_holm"]),
            "verdict": row["verdict"],
        }
        for _, row in frame.iterrows()
    )
    return f"# Primary hypotheses\n\n{markdown(table)}\n\n{LEGEND}\n"


def write_hypotheses(overrides: Sequence[str]) -> str:
    """Write `<results>/hypotheses/table.csv` and `.md`, and return the Markdown."""
    cfg, declared = first(["results=results", *overrides]), OmegaConf.to_container(OmegaConf.load(FILE))
    results = project_path(cfg.results)
    frame = judge(declared["hypotheses"], declared["level"], results, OmegaConf.to_container(cfg.bootstrap))
    page, file = render(frame), result_file(results, "hypotheses", TABLE)
    write_text(file, csv_text(frame))
    write_text(file.with_suffix(".md"), page)
    return page


def main(argv: list[str]) -> None:
    """Run the command."""
    print(write_hypotheses(argv))
