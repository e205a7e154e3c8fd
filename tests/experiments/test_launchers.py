"""Every launcher makes the serial run's table, byte for byte, in real processes of its own."""

import os
import re
import subprocess
import sys

import pytest

from experiments import PROJECT, tabulate
from experiments.configs import expand
from experiments.evaluate import evaluate
from experiments.generate import generate
from experiments.runs import Run

PARTS = {"joblib": "hydra_plugins.hydra_joblib_launcher", "submitit_local": "hydra_plugins.hydra_submitit_launcher",
         "ray": "hydra_plugins.hydra_ray_launcher"}  # fmt: skip


def arguments(folder, source, *changes):
    """A sweep of two settings and their baseline on a tiny checkpoint: two prompts, two images, two steps."""
    return [
        "experiment=sweep", "model=sdxl", f"model.source={source}", "model.dtype=float32",
        "model.call.num_inference_steps=2", "model.call.height=64", "model.call.width=64", "model.negtome.min_side=4",
        "model.negtome.timestep_range=[0,1000]", "model.negtome.threshold=-1", "model.negtome.alpha=0.9,1.8",
        "model.groups_per_category=1", "prompts.categories=[flower,fruit]", "prompts.images_per_prompt=2",
        "metric=core", "scorer@model.scorer=pixel", "~metric.clip_score", "primary.quality=vendi_score",
        "bootstrap.n_resamples=100", f"outputs={folder / 'outputs'}", f"results={folder / 'results'}", *changes,
    ]  # fmt: skip


def table(configs):
    """Score what was generated and return the table's three files."""
    for cfg in configs:
        evaluate(cfg)
    tabulate.write_table(configs)
    results = tabulate.project_path(configs[0].results)
    # Whoever commits while this runs changes nothing that is tested here.
    commits = "|".join(re.escape(Run.find(cfg).environment["commit"]) for cfg in configs)
    return {path.name: re.sub(commits, "commit", path.read_text()) for path in sorted(results.iterdir())}


@pytest.fixture(scope="module")
def serial(tmp_path_factory, tiny_checkpoint):
    configs = expand(arguments(tmp_path_factory.mktemp("serial"), tiny_checkpoint("sdxl")))
    for cfg in configs:
        generate(cfg)
    return table(configs)


def launched(folder, source, *changes):
    """Generate two runs by the real command with a launcher, the third here; return the table's files."""
    two = ["method=none,negtome", "model.negtome.alpha=1.8"]
    command = [sys.executable, "-m", "experiments.generate", *arguments(folder, source), *two, *changes]
    env = os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    run = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert all(Run.find(cfg).complete for cfg in expand([*arguments(folder, source), *two]))
    configs = expand(arguments(folder, source))
    for cfg in configs:
        generate(cfg)
    return table(configs)


def test_two_processes_of_joblib_make_the_serial_table(serial, tmp_path, tiny_checkpoint):
    pytest.importorskip(PARTS["joblib"], reason='needs pip install -e ".[launchers]"')
    assert launched(tmp_path, tiny_checkpoint("sdxl"), "launcher=joblib", "hydra.launcher.n_jobs=2") == serial


@pytest.mark.slow
def test_submitits_local_executor_makes_the_serial_table(serial, tmp_path, tiny_checkpoint):
    """What goes to Slurm, without Slurm: jobs pickled, run in processes of their own, results awaited."""
    pytest.importorskip(PARTS["submitit_local"], reason='needs pip install -e ".[launchers]"')
    assert launched(tmp_path, tiny_checkpoint("sdxl"), "launcher=submitit_local") == serial
    assert list((tmp_path / "outputs" / ".hydra").rglob("*_submitted.pkl"))


@pytest.mark.slow
def test_a_local_ray_makes_the_serial_table(serial, tmp_path, tiny_checkpoint):
    pytest.importorskip(PARTS["ray"], reason='needs pip install -e ".[ray]"')
    cpus = ["hydra.launcher.ray.remote.num_gpus=0", "hydra.launcher.ray.remote.num_cpus=1"]
    assert launched(tmp_path, tiny_checkpoint("sdxl"), "launcher=ray", *cpus) == serial


def test_shards_in_any_order_make_the_serial_table(serial, tmp_path, tiny_checkpoint):
    source = tiny_checkpoint("sdxl")
    for index in (1, 0):
        for cfg in expand(arguments(tmp_path, source, "shard.count=2", f"shard.index={index}")):
            run = Run(generate(cfg))
            assert run.complete == (index == 0), "complete with the last shard, and not before"
    assert table(expand(arguments(tmp_path, source))) == serial


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0), (0.5, 2)])
def test_shards_that_are_none_are_refused(index, count, tmp_path, tiny_checkpoint):
    (cfg,) = expand([*arguments(tmp_path, tiny_checkpoint("sdxl"), "method=none", "model.negtome.alpha=0.9")])
    cfg.shard.index, cfg.shard.count = index, count
    with pytest.raises(ValueError, match=r"shard\.index must be a whole number from 0 to shard\.count - 1"):
        generate(cfg)
