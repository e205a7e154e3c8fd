"""Every launcher makes the serial run's table, byte for byte, in real processes of its own."""

import os
import subprocess
import sys

import pytest

from experiments import PROJECT
from experiments.configs import expand
from experiments.generate import generate
from experiments.runs import Run

PARTS = {"joblib": "hydra_plugins.hydra_joblib_launcher", "submitit_local": "hydra_plugins.hydra_submitit_launcher",
         "ray": "hydra_plugins.hydra_ray_launcher"}  # fmt: skip


#: Two settings and their baseline.
SWEEP = "model.negtome.alpha=0.9,1.8"


@pytest.fixture(scope="module")
def serial(tmp_path_factory, tiny_overrides, tabulated):
    configs = expand(tiny_overrides("sweep", tmp_path_factory.mktemp("serial"), SWEEP))
    for cfg in configs:
        generate(cfg)
    return tabulated(configs)


@pytest.fixture
def launched(tmp_path, tiny_overrides, tabulated):
    """Generate two runs by the real command with a launcher, the third here: `launched("launcher=joblib")`."""

    def launch(*changes):
        two = tiny_overrides("sweep", tmp_path, "method=none,negtome", "model.negtome.alpha=1.8")
        command = [sys.executable, "-m", "experiments.generate", *two, *changes]
        env = os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        run = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
        assert all(Run.find(cfg).complete for cfg in expand(two))
        configs = expand(tiny_overrides("sweep", tmp_path, SWEEP))
        for cfg in configs:
            generate(cfg)
        return tabulated(configs)

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


@pytest.mark.slow
def test_a_local_ray_makes_the_serial_table(serial, launched):
    pytest.importorskip(PARTS["ray"], reason='needs pip install -e ".[ray]"')
    cpus = ["hydra.launcher.ray.remote.num_gpus=0", "hydra.launcher.ray.remote.num_cpus=1"]
    assert launched("launcher=ray", *cpus) == serial


@pytest.mark.slow
def test_shards_in_any_order_make_the_serial_table(serial, tmp_path, tiny_overrides, tabulated):
    for index in (1, 0):
        for cfg in expand(tiny_overrides("sweep", tmp_path, SWEEP, "shard.count=2", f"shard.index={index}")):
            run = Run(generate(cfg))
            assert run.complete == (index == 0), "complete with the last shard, and not before"
    assert tabulated(expand(tiny_overrides("sweep", tmp_path, SWEEP))) == serial


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0), (0.5, 2)])
def test_shards_that_are_none_are_refused(index, count, tmp_path, tiny_overrides):
    (cfg,) = expand(tiny_overrides("sweep", tmp_path, "method=none"))
    cfg.shard.index, cfg.shard.count = index, count
    with pytest.raises(ValueError, match=r"shard\.index must be a whole number from 0 to shard\.count - 1"):
        generate(cfg)
