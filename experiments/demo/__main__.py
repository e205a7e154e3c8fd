"""Run `python -m experiments demo`."""

import experiments.demo
from experiments.__main__ import run_module

run_module(experiments.demo.__file__)
