"""Measure whether guards read the policy: the share of decisions that change with it as they must, and that stay.

    python -m experiments sensitivity               (this project's guards, and one that allows everything)
    python -m experiments sensitivity guard=own guard.name=MODULE:ATTRIBUTE
    python -m experiments sensitivity model.copyright.policy=my_policy.yaml results=FOLDER

Every guard decides the policy's examples, and the same under edits of single clauses, see `negtome.guard.testing`.
Writes `<results>/policy_sensitivity/table.csv` and `.md`, with a row for each guard and edit; rows of other guards
stay.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

from typing import Any

import pandas as pd

from eval.files import write_text
from eval.intervals import GroupValue, bootstrap_interval
from experiments.configs import build
from experiments.runs.identity import current_commit
from experiments.safety.guards import guarded_systems
from experiments.tables.columns import markdown, printed, put_rows
from experiments.tables.pages import with_interval
from experiments.tables.paths import result_file
from negtome.guard import Guard, Policy, read_policy
from negtome.guard.testing import run_edits, run_examples, tally

#: Overrides for what the command line leaves open.
DEFAULTS = ("experiment=safety", "guard=allow_all,keyword,nearest,mini", "method.layers=decide")
KEY = ["guard", "edit", "must"]
COLUMNS = [
    *KEY, "value", "ci_low", "ci_high", "n_right", "n_invalid", "n_requests", "n_clauses", "guard_id", "policy_sha256",
    "commit",
]  # fmt: skip
#: Headings of the page, by what must come of a decision.
HEADINGS = {"right": "be right", "changed as they must": "change", "stayed as they must": "stay"}
LEGEND = """\
example: the policy's own examples, under the policy as it is. Under edits no examples are shown: one clause gets \
another action (flip), is removed (delete), gets another id (rename) or moves to an end (reorder), or all clauses are \
removed (strip). changed: share of the requests about the edited clause that are decided rightly before and after the \
edit. stayed: share of the other requests that are decided by the same clauses, with the action that now follows. \
invalid: replies that did not follow from the edited policy, or that a guard refused because it knows another one; \
they are never right. 95 % centred bootstrap over clauses; no interval where all are alike. The requests are the \
policy's own examples: they do not show how a guard decides requests that nobody foresaw."""


def rows_of(policy: Policy, guard: Guard) -> list[dict[str, Any]]:
    """Return a guard's rows of the table; errors are those of `negtome.guard.testing.run_examples`."""
    outcomes = run_examples(policy, guard) + run_edits(policy, guard)
    rows = []
    for count in tally(outcomes):
        values: list[GroupValue] = [
            {"group": f"{one.clause}/{number}", "category": one.clause, "n_images": 1, "value": float(one.right)}
            for number, one in enumerate(outcomes)
            if (one.kind, one.must) == (count.kind, count.must)
        ]
        value, low, high = bootstrap_interval(values)
        rows.append(
            {"guard": guard.name, "edit": count.kind, "must": count.must, "value": value,
             "ci_low": None if low is None else max(low, 0), "ci_high": None if high is None else min(high, 1),
             "n_right": count.right, "n_invalid": count.invalid, "n_requests": count.n,
             "n_clauses": len({value["category"] for value in values}), "guard_id": guard.id,
             "policy_sha256": policy.sha256, "commit": current_commit()}
        )  # fmt: skip
    return rows


def render(frame: pd.DataFrame) -> str:
    """Return the table as Markdown, a row for each guard and edit."""
    table = []
    for (guard, edit), rows in frame.groupby(["guard", "edit"], sort=False):
        cells = {row["must"]: _cell(row) for _, row in rows.iterrows()}
        invalid = f"{rows['n_invalid'].sum():.0f} of {rows['n_requests'].sum():.0f}"
        shares = {heading: cells.get(must, "") for heading, must in HEADINGS.items()}
        table.append({"guard": guard, "edit": edit, **shares, "invalid": invalid})
    policies = ", ".join(str(digest)[:12] for digest in frame["policy_sha256"].unique())
    made_by = f"Policy {policies}. Made by `python -m experiments sensitivity`."
    return f"# policy sensitivity\n\n{made_by}\n\n{markdown(printed(table))}\n\n{LEGEND}\n"


def _cell(row: pd.Series) -> str:
    share = with_interval("{:.2f}".format, row["value"], row["ci_low"], row["ci_high"])
    return f"{share}; {row['n_right']:.0f} of {row['n_requests']:.0f}"


def main(argv: list[str]) -> None:
    """Run the command."""
    systems = [cfg for cfg in guarded_systems(argv, DEFAULTS) if cfg.method.name != "none"]
    policy = read_policy(systems[0].model.copyright.policy)
    rows = [row for cfg in systems for row in rows_of(policy, build(cfg.guard))]
    path = result_file(systems[0].results, "policy_sensitivity")
    page = render(put_rows(path, rows, COLUMNS, KEY))
    write_text(path.with_suffix(".md"), page)
    print(page)
