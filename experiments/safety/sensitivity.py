"""Do guards read the policy? The share of decisions that change with it as they must, and of those that stay.

    python -m experiments sensitivity
    python -m experiments sensitivity --guard MODULE:ATTRIBUTE

Every guard of this project, beside one that allows everything, and any of your own, is asked what
`negtome.guard.testing` asks: the policy's examples, and the same under edits of single clauses. Written:
`<out>/policy_sensitivity/table.csv` and `.md`, a row a guard, edit, and what must come of it; rows of other guards
stay.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from eval.files import write_text
from eval.intervals import GroupValue, bootstrap_interval
from experiments import PROJECT, project_path
from experiments.runs.identity import current_commit
from experiments.safety import guards
from experiments.tables.columns import markdown, printed, put_rows
from experiments.tables.pages import with_interval
from experiments.tables.paths import result_file
from negtome.guard import Guard, Keyword, Policy, read_policy
from negtome.guard.__main__ import load_guard
from negtome.guard.controls import Always
from negtome.guard.testing import Outcome, run_edits, run_examples, tally

KEY = ["guard", "edit", "must"]
COLUMNS = [
    *KEY, "value", "ci_low", "ci_high", "n_right", "n_invalid", "n_requests", "n_clauses", "guard_id", "policy_sha256",
    "commit",
]  # fmt: skip
MINI = "models/mini-guard"
LEGEND = """\
example: the policy as it is, whose own examples are asked. Then one clause gets another action (flip), is left out \
(delete), is called otherwise (rename) or moves to an end (reorder), or all are left out (strip), and no examples are \
shown. changed: of the requests that the edit is about, the share that was decided rightly before it and is after it. \
stayed: of others, the share that cites what it cited before and does what that says now. invalid: replies that did \
not follow from the edited policy, or that a guard refused to give since it knows another one; they are never right. \
95 % centred bootstrap over clauses; no interval where all are alike. The requests are the policy's own examples, by \
those who wrote the policy: how a guard does on requests that nobody foresaw is another question."""


def own_guards() -> list[Guard]:
    """Return this project's guards, as far as their weights are here, and the control."""
    found: list[Guard] = [Always("allow"), Keyword(), guards.nearest()]
    if (folder := project_path(MINI)).is_dir():
        from negtome.guard.mini import Mini

        found.append(Mini(folder))
    return found


def rows_of(policy: Policy, guard: Guard) -> list[dict[str, Any]]:
    """Return a guard's rows of the table; errors are those of `negtome.guard.testing.run_examples`."""
    outcomes = run_examples(policy, guard) + run_edits(policy, guard)
    rows = []
    for count in tally(outcomes):
        some = [one for one in outcomes if (one.kind, one.must) == (count.kind, count.must)]
        interval = bootstrap_interval(_values(some))
        rows.append(
            {
                "guard": guard.name,
                "edit": count.kind,
                "must": count.must,
                "value": interval.value,
                "ci_low": None if interval.low is None else max(interval.low, 0),  # a share
                "ci_high": None if interval.high is None else min(interval.high, 1),
                "n_right": count.right,
                "n_invalid": count.invalid,
                "n_requests": count.n,
                "n_clauses": len({one.clause for one in some}),
                "guard_id": guard.id,
                "policy_sha256": policy.sha256,
                "commit": current_commit(),
            }
        )
    return rows


def _values(outcomes: Sequence[Outcome]) -> list[GroupValue]:
    return [
        {"group": f"{one.clause}/{number}", "category": one.clause, "n_images": 1, "value": float(one.right)}
        for number, one in enumerate(outcomes)
    ]


def rendered(frame: pd.DataFrame) -> str:
    """Return the Markdown of a table."""
    table = []
    for (guard, edit), rows in frame.groupby(["guard", "edit"], sort=False):
        cells = {row["must"]: _cell(row) for _, row in rows.iterrows()}
        invalid = f"{rows['n_invalid'].sum():.0f} of {rows['n_requests'].sum():.0f}"
        named = {"right": "be right", "changed as they must": "change", "stayed as they must": "stay"}
        table.append(
            {"guard": guard, "edit": edit, **{h: cells.get(m, "") for h, m in named.items()}, "invalid": invalid}
        )
    policies = ", ".join(str(digest)[:12] for digest in frame["policy_sha256"].unique())
    return "\n\n".join(
        [
            "# policy sensitivity",
            f"Policy {policies}. Made by `python -m experiments sensitivity`.",
            markdown(printed(table)),
            f"{LEGEND}\n",
        ]
    )


def _cell(row: pd.Series) -> str:
    share = with_interval("{:.2f}".format, row["value"], row["ci_low"], row["ci_high"])
    return f"{share}; {row['n_right']:.0f} of {row['n_requests']:.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure whether guards read the policy")
    parser.add_argument("--policy", type=Path, default=PROJECT / "conf" / "safety" / "policy.yaml")
    parser.add_argument("--guard", action="append", default=[], metavar="MODULE:ATTRIBUTE", help="one of your own")
    parser.add_argument("--out", type=Path, default=PROJECT / "results")
    arguments = parser.parse_args(argv)
    policy = read_policy(arguments.policy)
    asked = [*map(load_guard, arguments.guard)] or own_guards()
    rows = [row for guard in asked for row in rows_of(policy, guard)]
    path = result_file(arguments.out, "policy_sensitivity")
    page = rendered(put_rows(path, rows, COLUMNS, KEY))
    write_text(path.with_suffix(".md"), page)
    print(page)
