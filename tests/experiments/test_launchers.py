"""Every launcher makes the serial run's table, byte for byte, in real processes of its own."""

import os
import subprocess
import sys

import pytest
from plans import plan_of

from experiments import PROJECT
from experiments.generate import generate
from experiments.runs.store import Run

PARTS = {"joblib": "hydra_plugins.hydra_joblib_launcher", "submitit_local": "hydra_plugins.hydra_submitit_launcher"}

#: Two settings and their baseline.
SWEEP = "method.alpha=0.9,1.8"


@pytest.fixture(scope="module")
def serial(tmp_path_factory, tiny_overrides, tabulated):
    plan = plan_of(tiny_overrides("sweep", tmp_path_factory.mktemp("serial"), SWEEP))
    generate(plan)
    return tabulated(plan)


@pytest.fixture
def launched(tmp_path, tiny_overrides, tabulated):
    """Generate two runs by the real command with a launcher, the third here: `launched("launcher=joblib")`."""

    def launch(*changes):
        two = tiny_overrides("sweep", tmp_path, "method=none,negtome", "method.alpha=1.8")
        command = [sys.executable, "-m", "experiments.generate", *two, *changes]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
        assert all(Run.of(spec).complete for spec in plan_of(two).runs)
        plan = plan_of(tiny_overrides("sweep", tmp_path, SWEEP))
        generate(plan)
        return tabulated(plan)

    return launch


@pytest.mark.slow
def test_two_processes_of_joblib_make_the_serial_table(serial, launched):
    pytest.importorskip(PARTS["joblib"], reason='needs pip install -e ".[launchers]"')
    assert launched("launcher=joblib", "hydra.launcher.n_jobs=2") == serial


@pytest.mark.slow
def test_submitits_local_executor_makes_the_serial_table(serial, launched, tmp_path):
    """What goes to Slurm, without Slurm: jobs pickled, run in processes of their own, results awaited."""
    pytest.importorskip(PARTS["submitit_local"], reason='needs pip install -e ".[launchers]"')
    assert launched("launcher=submitit_local") == serial
    assert list((tmp_path / "outputs" / ".hydra").rglob("*_submitted.pkl"))
