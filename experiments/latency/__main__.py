"""Run `python -m experiments latency`."""

import experiments.latency
from experiments.__main__ import run_module

run_module(experiments.latency.__file__)
