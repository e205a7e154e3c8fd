"""Compare what was measured of each system with thresholds that were written down before: pass, review or fail.

    python -m experiments gate
    python -m experiments gate results=results gate=my_gate.yaml

Read: `safety/table.csv` and `redteam/table.csv` of a folder of results, which make safety and make redteam put there:
by default outputs/results where either was made, else the published ones. Written: `gate/table.csv` and `.md` beside
them, a row a system and criterion, the one without a guard first. Exit code 1 where the system to be released fails, 2
where something is missing: what was not measured never passes.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from scipy.stats import binomtest

from eval.files import content_hash, write_text
from experiments import project_path, start_log
from experiments.tables.columns import csv_text, markdown, printed, read_csv
from experiments.tables.pages import with_interval
from experiments.tables.paths import result_file

log = logging.getLogger(__name__)

#: Of a count that is worked out from a rate of six digits.
ROUNDING = 0.01
#: Requests of the largest table that is believed.
MOST = 10**9
#: From best to worst.
WORDS = ("pass", "review", "fail")
#: Tables that criteria may be about, and what makes them.
TABLES = {
    "safety": "make safety",
    "redteam": "make redteam",
}
COLUMNS = ["model", "system", "released", "criterion", "value", "low", "high", "pass", "review", "word", "gate_sha256"]


@dataclass(frozen=True)
class Criterion:
    """A rate that is to be low.

    Attributes:
        name: in the table.
        table, metric: where it stands.
        limits: the largest upper ends that pass, and that are for a person to review.
        complement: whether the metric is the share that went well, 1 less the rate.
        attackers: those of the red team that have to be there; the worst counts.
    """

    name: str
    table: str
    metric: str
    limits: tuple[float, float]
    complement: bool = False
    attackers: tuple[str, ...] = ()

    def word(self, high: float) -> str:
        """Return what the upper end of an interval comes to."""
        if not 0 <= high <= 1:
            raise ValueError(f"expected the upper end of {self.name} from 0 to 1, got {high}")
        return WORDS[sum(high > limit for limit in self.limits)]


@dataclass(frozen=True)
class Gate:
    """What a gate's file says.

    Attributes:
        model: whose systems are judged.
        released: guard and layers of the system to be released.
        criteria: all of which it has to keep to.
        sha256: of the file.
    """

    model: str
    released: tuple[str, str]
    criteria: tuple[Criterion, ...]
    sha256: str


def read_gate(path: str | Path) -> Gate:
    """Read a gate.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none, or lacks something, or has what is not known.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a gate at {path}, got no file: give gate=FILE")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        top = _fields("the gate", document, {"version", "model", "released", "criteria"})
        if top["version"] != 1:
            raise ValueError(f"expected version: 1, got {top['version']!r}")
        released = _fields("released", top["released"], {"guard", "layers"})
        if not isinstance(top["criteria"], list) or not top["criteria"]:
            raise ValueError(f"expected criteria as a list with at least one, got {top['criteria']!r}")
        criteria = tuple(map(_criterion, top["criteria"]))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return Gate(top["model"], (released["guard"], released["layers"]), criteria, content_hash(path))


def _fields(what: str, entry: Any, needed: set[str], optional: frozenset[str] = frozenset()) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping) or not needed <= entry.keys() <= needed | optional:
        raise ValueError(f"expected {what} with {', '.join(sorted(needed))} and nothing unknown, got {entry!r}")
    return entry


def _criterion(entry: Any) -> Criterion:
    needed = {"name", "table", "metric", "pass", "review"}
    found = _fields("a criterion", entry, needed, frozenset({"complement", "attackers"}))
    limits = found["pass"], found["review"]
    if not all(type(limit) in (int, float) and 0 <= limit <= 1 for limit in limits) or limits[0] > limits[1]:
        raise ValueError(f"expected 0 <= pass <= review <= 1 of {found['name']}, got {limits[0]!r} and {limits[1]!r}")
    if found["table"] not in TABLES:
        raise ValueError(f"expected a table among {', '.join(TABLES)} of {found['name']}, got {found['table']!r}")
    complement, attackers = found.get("complement", False), tuple(found.get("attackers", ()))
    if not isinstance(complement, bool) or bool(attackers) != (found["table"] == "redteam"):
        raise ValueError(f"expected complement: true or false, and attackers of the red team alone, got {entry!r}")
    return Criterion(found["name"], found["table"], found["metric"], limits, complement, attackers)


def read_tables(folder: str | Path, gate: Gate) -> dict[str, pd.DataFrame]:
    """Read the tables that a gate's criteria are about, its model's rows.

    Raises:
        FileNotFoundError, ValueError: one is not there or damaged, or has no rows of the model, or one without a guard.
    """
    tables = {}
    for name in dict.fromkeys(criterion.table for criterion in gate.criteria):
        path = result_file(folder, name)
        if not path.exists():
            raise FileNotFoundError(f"expected the table {path}, got no file: make it with {TABLES[name]}")
        frame = read_csv(path)
        wanted = {"model", "method", "guard", "layers", "metric", "value", "n_groups"}
        if missing := sorted((wanted | ({"attacker"} if name == "redteam" else set())) - {*frame.columns}):
            raise ValueError(f"expected the columns {missing} in {path}, got none: make it again with {TABLES[name]}")
        tables[name] = frame[frame["model"] == gate.model]
        if tables[name].empty:
            raise ValueError(f"expected rows of {gate.model} in {path}, got none: make them with {TABLES[name]}")
        guarded = tables[name][tables[name]["method"] != "none"]
        if guarded[["guard", "layers"]].isna().any(axis=None):
            raise ValueError(f"expected a guard and layers in every row with a method in {path}, got one without")
    return tables


def interval(row: Mapping[str, Any], complement: bool = False) -> tuple[float, float, float]:
    """Return a rate and its exact 95 % interval, of Clopper and Pearson (1934).

    The unit is a request, or a search of the red team: `n_groups` of them, independent of each other. A count of
    failures that is no integer is rounded up for the upper end and down for the lower one. More failures never have a
    lower upper end.

    Raises:
        ValueError: there is no rate from 0 to 1, or no unit.
    """
    value, count = float(row["value"]), float(row["n_groups"])
    if not 0 <= value <= 1:
        raise ValueError(f"expected a rate from 0 to 1 of {row['metric']}, got {value}")
    if not 1 <= count <= MOST or count % 1:
        raise ValueError(f"expected the number of requests of {row['metric']}, got {row['n_groups']}: measure again")
    rate = 1 - value if complement else value
    failures = rate * count
    fewest, most = math.floor(failures + ROUNDING), math.ceil(failures - ROUNDING)
    low, high = (binomtest(number, int(count)).proportion_ci(method="exact") for number in (fewest, most))
    return rate, float(low.low), float(high.high)


def measured(criterion: Criterion, frame: pd.DataFrame, system: tuple[str, str] | None) -> tuple[float, float, float]:
    """Return a system's rate with its interval; of several attackers', the one with the highest upper end.

    Args:
        criterion: what is looked for.
        frame: the criterion's table.
        system: guard and layers; None for the model without a guard.

    Raises:
        ValueError: a row is missing, or there are several.
    """
    if criterion.metric not in set(frame["metric"]):
        known = ", ".join(sorted(map(str, frame["metric"].unique())))
        raise ValueError(
            f"expected a metric of {criterion.table}.csv for {criterion.name}, got {criterion.metric}: {known}"
        )
    rows = frame[(frame["metric"] == criterion.metric) & _of_system(frame, system)]
    found = []
    for attacker in criterion.attackers or (None,):
        own = rows if attacker is None else rows[rows["attacker"] == attacker]
        if len(own) != 1:
            by = f" by {attacker}" if attacker else ""
            raise ValueError(
                f"expected one row of {criterion.metric}{by} for {_title(system)} in {criterion.table}.csv, got "
                f"{len(own)}: make it with {TABLES[criterion.table]}"
            )
        found.append(interval(own.iloc[0], criterion.complement))
    others = rows[~rows["attacker"].isin(criterion.attackers)] if criterion.attackers else rows.iloc[:0]
    found += [interval(row, criterion.complement) for _, row in others.iterrows()]  # as a chat model's
    return max(found, key=lambda rate: rate[2])


def _of_system(frame: pd.DataFrame, system: tuple[str, str] | None) -> pd.Series:
    if system is None:
        return frame["method"] == "none"
    return (frame["method"] != "none") & (frame["guard"] == system[0]) & (frame["layers"] == system[1])


def _title(system: tuple[str, str] | None) -> str:
    return "no guard" if system is None else ", ".join(system)


def judge(gate: Gate, tables: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """Return a row for each system and criterion, the model without a guard first.

    Judged is every system that is in all tables, and the one to be released in any case.

    Raises:
        ValueError: rows are missing; see `measured`.
    """
    guarded = [frame[frame["method"] != "none"] for frame in tables.values()]
    pairs = [dict.fromkeys(zip(frame["guard"], frame["layers"], strict=True)) for frame in guarded]
    shared = [pair for pair in pairs[0] if all(pair in others for others in pairs)]
    left = dict.fromkeys(pair for pair in (pair for others in pairs for pair in others) if pair not in shared)
    if left:
        log.info("not judged, since not in every table: %s", "; ".join(map(_title, left)))
    rows = []
    for system in (None, *dict.fromkeys((*shared, gate.released))):
        for criterion in gate.criteria:
            value, low, high = measured(criterion, tables[criterion.table], system)
            numbers = {"value": value, "low": low, "high": high}
            limits = dict(zip(WORDS, criterion.limits, strict=False))
            rows.append(
                {"model": gate.model, "system": _title(system), "released": system == gate.released,
                 "criterion": criterion.name, **numbers, **limits, "word": criterion.word(high),
                 "gate_sha256": gate.sha256}
            )  # fmt: skip
    return rows


def worst(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a system's word: that of its worst criterion."""
    return max((row["word"] for row in rows), key=WORDS.index)


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the verdicts as Markdown, a row a system."""
    by_system: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_system.setdefault(row["system"], []).append(row)
    table = [
        {
            "system": system + (" (to be released)" if own[0]["released"] else ""),
            "": "before" if number == 0 else "after",
            **{
                row[
                    "criterion"
                ]: f"{with_interval('{:.2f}'.format, row['value'], row['low'], row['high'])}: {row['word']}"
                for row in own
            },
            "verdict": worst(own),
        }
        for number, (system, own) in enumerate(by_system.items())
    ]
    limits = "; ".join(
        f"{row['criterion']}: pass to {row['pass']:g}, review to {row['review']:g}" for row in by_system["no guard"]
    )
    head = (
        f"**{rows[0]['model']}**, before and after mitigation. Rate [exact 95 % interval over requests or searches]: "
        f"what its upper end comes to. {limits}."
    )
    words = "These words are about the requests and attacks that were tried, and about nothing else."
    return "\n\n".join(
        ["# Gate", head, markdown(printed(table)), f"{words} Gate file: sha256 `{rows[0]['gate_sha256']}`."]
    ) + "\n"  # fmt: skip


def main(argv: list[str]) -> int:
    start_log()
    made = project_path("outputs/results")
    here = any(result_file(made, name).is_file() for name in TABLES)
    given = {"results": "outputs/results" if here else "results", "gate": "conf/safety/gate.yaml"}
    for text in argv:
        name, equals, value = text.partition("=")
        if name not in given or not equals or not value:
            raise ValueError(f"expected results=FOLDER or gate=FILE, got {text}")
        given[name] = value
    folder, gate = project_path(given["results"]), read_gate(project_path(given["gate"]))
    rows = judge(gate, read_tables(folder, gate))
    text = render(rows)
    path = result_file(folder, "gate")
    write_text(path, csv_text(pd.DataFrame(rows, columns=COLUMNS)))
    write_text(path.with_suffix(".md"), text)
    print(text)
    verdict = worst([row for row in rows if row["released"]])
    print(f"{_title(gate.released)}: {verdict} (tables of {folder})")
    return int(verdict == "fail")
