"""Compare an experiment's table from this machine with the published one, one line per primary value.

    python -m experiments check experiment=diversity

It compares outputs/results/<experiment>/table.csv with results/<experiment>/table.csv. A value is confirmed if it lies
inside the published 95 % interval, and its paired difference to the baseline lies inside that of the difference. Other
CPUs round differently, so that digits may differ. The exit code is 1 if a value is not confirmed. Values without a
published counterpart are listed and do not count.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import math
from pathlib import Path

import pandas as pd

from experiments.plan import Plan
from experiments.tables.columns import KEY, ROLES, TEXT, read_table, row_keys
from experiments.tables.pages import change, paper_table, run_labels, with_interval
from experiments.tables.paths import PUBLISHED, result_file


def compare_tables(made: Path, published: Path) -> pd.DataFrame:
    """Return one row for each primary value that was made.

    Args:
        made: CSV of `experiments.tabulate`.
        published: another one.

    Returns:
        Columns: `model`, `label` (model, method and metric), `made` and `published` (the numbers as printed, the latter
        blank where there is none), `deviation` (share of the published value, NaN without one) and `inside` (missing
        without one).
    """
    mine, theirs = (pd.read_csv(path, dtype=TEXT) for path in (made, published))
    published_rows = {key: row for key, (_, row) in zip(row_keys(published, KEY), theirs.iterrows(), strict=True)}
    labels = run_labels(mine)
    rows = []
    for key, (_, row) in zip(row_keys(made, KEY), mine.iterrows(), strict=True):
        if row["primary"] not in ROLES:
            continue
        entry = {
            "model": row["model"],
            "label": f"{row['model']} {labels[row['run_id']]}: {row['metric']}",
            "made": _printed(row),
        }
        if (other := published_rows.get(key)) is not None:
            value, reference = row["value"], other["value"]
            inside = _within(value, reference, other["ci_low"], other["ci_high"]) and (
                pd.isna(other["difference"])
                or _within(row["difference"], other["difference"], other["difference_low"], other["difference_high"])
            )
            deviation = abs(value / reference - 1) if reference else float(value != reference)
            entry |= {"published": _printed(other), "deviation": deviation, "inside": bool(inside)}
        rows.append(entry)
    return pd.DataFrame(rows, columns=["model", "label", "made", "published", "deviation", "inside"])


def _within(mine: float, theirs: float, low: float, high: float) -> bool:
    """Tell whether a number is in the published interval; where that could not be estimated, whether it is the same.

    None at all, of groups that are withheld, is the same as none.
    """
    if pd.isna(mine) or pd.isna(theirs):
        return pd.isna(mine) and pd.isna(theirs)
    return math.isclose(mine, theirs, rel_tol=1e-4) if pd.isna(low) else low <= mine <= high


def _printed(row: pd.Series) -> str:
    text = with_interval("{:.4g}".format, row["value"], row["ci_low"], row["ci_high"])
    if row.get("n_withheld", 0) > 0:
        text = f"{'no value' if pd.isna(row['value']) else text}, {row['n_withheld']:.0f} groups withheld"
    return text if pd.isna(row["difference"]) else f"{text}, difference {change(row)}"


def not_compared(table: pd.DataFrame, published: Path, experiment: str) -> list[str]:
    """Say of the rows of `compare_tables` without a published value why they have none, a line for each model.

    Of a model that is published nowhere, the paper's values are printed, where there are some.
    """
    theirs = set(pd.read_csv(published, dtype=TEXT)["model"])
    paper, lines = paper_table(experiment), []
    metrics = [column for column in paper.columns if column not in ("source", "model", "method")]
    for model in dict.fromkeys(table.loc[table["published"].isna(), "model"]):
        if model in theirs:
            lines.append(f"{model}: the values that stand alone above are not published with these settings")
        elif paper.empty:
            lines.append(f"{model}: nothing is published to compare with")
        else:
            lines.append(f"{model}: this project has published no values; the paper prints, of setups of its own:")
            for row in paper.to_dict("records"):
                values = ", ".join(f"{metric} {row[metric]:g}" for metric in metrics if pd.notna(row[metric]))
                lines.append(f"  {row['model']}, {row['method']}: {values} ({row['source']})")
    return lines


def files(plan: Plan) -> tuple[Path, Path]:
    """Return the table that is made here, and the published one; ValueError where they are one and the same."""
    table_file, published = (result_file(folder, plan.name) for folder in (plan.results, PUBLISHED))
    if table_file == published:
        raise ValueError(f"expected a table made here, got the published one itself ({table_file}): leave out results=")
    return table_file, published


def main(argv: list[str], plan: Plan | None = None) -> int:
    """Run the command and return its exit code."""
    plan = plan or Plan.of(argv)
    table_file, published = files(plan)
    read_table(plan.name, plan.results)  # says what makes it where it is not there
    if not published.exists():
        print(f"no table of experiment={plan.name} is published: there is nothing to compare {table_file} with")
        return 0
    table = compare_tables(table_file, published)
    for row in table.itertuples():
        if pd.isna(row.published):
            print(f"{row.label}: {row.made}")
        else:
            print(f"{row.label}: {row.made}; published {row.published}: {'inside' if row.inside else 'OUTSIDE'}")
    for line in not_compared(table, published, plan.name):
        print(line)
    compared = table.dropna(subset="inside")
    confirmed = int(compared["inside"].sum())
    if len(compared):
        print(
            f"inside the published intervals: {confirmed} of {len(compared)}, "
            f"largest deviation {100 * compared['deviation'].max():.1f} %"
        )
    print(f"table: {table_file.with_suffix('.md')}; figures: {table_file.parent}/*.png; one page of all: make report")
    return int(confirmed < len(compared))
