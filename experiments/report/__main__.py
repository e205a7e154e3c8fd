"""Run `python -m experiments report`."""

import experiments.report
from experiments.__main__ import run_module

run_module(experiments.report.__file__)
