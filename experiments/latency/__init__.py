"""Measure the cost of NegToMe: time and memory of the same calls without and with it, in turns, in one process.

    python -m experiments latency experiment=latency
    python -m experiments latency experiment=latency latency.only=[sdxl-1024] force=true

The configuration says what is measured (conf/experiment/latency.yaml), this folder how. Each case is one row a variant
and window in `<results>/latency/table.csv`, written when the case is done; a case that is there already, of this
device and these versions, is skipped. Tables and figures are made of the CSV; of the CSV as it is with
latency.cases=false latency.curves=false.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from experiments import select_device, start_log
from experiments.configs import flag
from experiments.figures.style import using
from experiments.latency import report
from experiments.latency.cases import composed, configured_cases
from experiments.latency.measure import find_weights, measure_case, origin
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
        measured = [common | row for row in measure_case(case, weights, cfg, device)]
        put_rows(path, measured, COLUMNS, CONFIGURATION, SAME_CASE)
    if not path.exists():
        raise FileNotFoundError(f"expected the table {path}, got no file: let latency.cases or latency.curves be true.")
    return report.write(read_rows(path), cfg, path.parent)


def main(argv: Sequence[str]) -> None:
    """Measure the configured cases that the table lacks, and print tables and the names of the files."""
    start_log()
    cfg = composed(*argv)
    with using(cfg.style, cfg.width):
        print(run(argv))
    print(*sorted(result_file(cfg.results, cfg.name).parent.glob("[!.]*")), sep="\n")
