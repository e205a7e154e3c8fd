"""Measure the cost of NegToMe: time and memory of the same calls without and with it, in turns, in one process.

    python -m experiments latency experiment=latency
    python -m experiments latency experiment=latency latency.only=[sdxl-1024] force=true

The configuration says what is measured (conf/experiment/latency.yaml), this folder how. Each case is one row a variant
and window in `<results>/latency/table.csv`, written when the case is done; a case that is there already, of this
device and these versions, is skipped. Tables and figures are made of the CSV; of the CSV as it is with
latency.cases=false latency.curves=false.
"""

import importlib
from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """Measure the configured cases that the table lacks, and print tables and the names of the files."""
    importlib.import_module("experiments.latency.suite").main(argv)  # the help and the report need no pipelines
