"""Measure the cases of a suite that the table lacks, then write tables and figures."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from experiments import select_device, start_log
from experiments.configs import flag
from experiments.figures.style import using
from experiments.latency import report
from experiments.latency.cases import composed, configured_cases
from experiments.latency.measure import find_weights, measure, origin
from experiments.latency.rows import COLUMNS, CONFIGURATION, SAME_CASE
from experiments.tables.columns import put_rows, read_csv
from experiments.tables.paths import result_file

log = logging.getLogger(__name__)


def read_rows(path: Path) -> pd.DataFrame:
    """Read the table, if there is one; columns that an earlier version lacks are empty."""
    return read_csv(path).reindex(columns=COLUMNS) if path.exists() else pd.DataFrame(columns=COLUMNS)


def run(overrides: Sequence[str]) -> str:
    """Measure the cases that the table lacks, write tables and figures, and return the tables as Markdown.

    Raises:
        ValueError: the configuration is not one that can be measured.
        FileNotFoundError: a checkpoint or the table is missing.
    """
    cfg = composed(*overrides)
    force = flag(cfg, "force")
    if flag(cfg, "offload"):
        raise ValueError("expected offload=false: transfers would be measured, not the method; choose a smaller batch.")
    device, path = select_device(cfg.device), result_file(cfg.results, cfg.name)
    for case in configured_cases(overrides):
        weights = find_weights(case.model, cfg.latency.weights)
        common, rows = origin(case, cfg, device, weights), read_rows(path)
        if not force and ((rows["setting"] == common["setting"]) & (rows["part"] == case.part)).any():
            log.info("%s (%s): measured already", case.label, case.part)
            continue
        measured = [common | row for row in measure(case, weights, cfg, device)]
        put_rows(path, measured, COLUMNS, CONFIGURATION, SAME_CASE)
    if not path.exists():
        raise FileNotFoundError(f"expected the table {path}, got no file: let latency.cases or latency.curves be true.")
    return report.write(read_rows(path), cfg, path.parent)


def main(argv: Sequence[str]) -> None:
    """Run the command; see `experiments.latency`."""
    start_log()
    cfg = composed(*argv)
    with using(cfg.style, cfg.width):
        print(run(argv))
    print(*sorted(result_file(cfg.results, cfg.name).parent.glob("[!.]*")), sep="\n")
