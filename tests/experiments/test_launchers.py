"""Several GPUs and Slurm jobs make what one process makes. The processes are real; GPUs and Slurm are fake."""

import contextlib
import os
import pickle
import subprocess
import sys
import time

import pytest
import torch
from omegaconf import OmegaConf
from plans import plan_of

from eval.images import read_manifest
from experiments import PROJECT
from experiments.__main__ import main
from experiments.compose import first
from experiments.generate import generate
from experiments.plan import Plan
from experiments.runs import checkpoints
from experiments.runs.jobs import jobs_of_other_device, visible_gpus, worker_devices
from experiments.runs.locks import has_locks
from experiments.runs.slurm import Job, submit
from experiments.runs.store import Run

#: A setting and its baseline.
SWEEP = "method.alpha=0.9"


@pytest.fixture(scope="module")
def serial(tmp_path_factory, tiny_overrides, tabulated):
    plan = plan_of(tiny_overrides("sweep", tmp_path_factory.mktemp("serial"), SWEEP))
    generate(plan)
    return tabulated(plan)


# --- several GPUs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """Let torch see the GPUs of these names: `gpus("H100", "H100")`."""

    def see(*names):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
        visible_gpus.cache_clear()

    yield see
    visible_gpus.cache_clear()


@pytest.mark.parametrize(
    ("workers", "device", "expected"),
    [
        ("auto", "cuda", ["cuda:0", "cuda:2"]),
        (1, "cuda", ["cuda:0"]),
        (3, "cuda", ["cuda:0", "cuda:2", "cuda:0"]),
        ("auto", "cuda:1", ["cuda:1"]),
        ("auto", "cpu", ["cpu"]),
        (2, "cpu", ["cpu", "cpu"]),
    ],
)
def test_each_gpu_of_the_first_ones_kind_has_a_process(workers, device, expected, gpus, caplog):
    gpus("H100", "T4", "H100")
    cfg = OmegaConf.create({"workers": workers, "model": {"kind": "real"}})
    assert list(worker_devices(cfg, device)) == expected
    assert ("T4" in caplog.text) == (device == "cuda"), "a GPU that is not used is named"


def test_an_offloaded_pipeline_stays_on_the_gpu_of_its_process(tiny_overrides, tmp_path, monkeypatch):
    calls = []
    offload = "diffusers.StableDiffusionXLPipeline.enable_model_cpu_offload"
    monkeypatch.setattr(offload, lambda pipe, gpu_id=None, device=None: calls.append((gpu_id, device)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    model = plan_of(tiny_overrides("sweep", tmp_path, "method=none")).cfg.model
    for device in ("cuda", "cuda:1"):
        checkpoints.load(model, checkpoints.find_checkpoint(model), device, offload=True)
    assert calls == [(3, "cuda"), (None, "cuda:1")]


#: The command on a machine with two GPUs, in whose place the CPU works. A process notes which GPU is its own when it
#: loads a pipeline and when it scores a run; it goes on when both have.
TWO_GPUS = """
import functools, os, sys, time, types
from pathlib import Path
import torch

notes, bound = Path(os.environ["NOTES"]), []
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_name = lambda device=None: "Fake"
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(total_memory=2**33)
torch.cuda.set_device = bound.append

from experiments import evaluate
from experiments.runs import checkpoints

def note(event):
    (notes / f"{event} {bound}").touch()
    while len(list(notes.glob(f"{event} *"))) < 2:
        time.sleep(0.01)

def load(model, checkpoint, device, load=checkpoints.load, **options):
    note(f"load on {device}")
    return load(model, checkpoint, "cpu", **options)

@functools.wraps(evaluate._score_run)
def score(*task, score=evaluate._score_run):
    note("score")
    return score(*task)

checkpoints.load, evaluate._score_run = load, score
if __name__ == "__main__":
    from experiments.__main__ import main
    sys.exit(main(["generate", *sys.argv[1:]]) or main(["evaluate", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_two_gpus_divide_groups_and_runs(serial, tmp_path, tiny_overrides):
    (tmp_path / "notes").mkdir()
    script = tmp_path / "two_gpus.py"  # a file, which the processes of the command import too
    script.write_text(TWO_GPUS)
    overrides = tiny_overrides("sweep", tmp_path, SWEEP)
    env = os.environ | {"OMP_NUM_THREADS": "1", "NOTES": str(tmp_path / "notes"), "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, script, *overrides], cwd=PROJECT, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {f"{event} ['cuda:{gpu}']" for event in ("load on cuda", "score") for gpu in (0, 1)}
    assert {path.name for path in (tmp_path / "notes").iterdir()} == expected
    runs = [Run.of(spec) for spec in plan_of(overrides).runs]
    assert [(run.folder / row.path).read_bytes() for run in runs for row in read_manifest(run.folder)] == serial[1]
    assert all(list((run.folder / "metrics").glob("*.json")) for run in runs)
    assert runs[0].identity["machine"]["device"] == "Fake"


# --- Slurm ------------------------------------------------------------------------------------------------------------

#: Starts the tasks of a job array at once, as Slurm does on free nodes, and records what they were submitted with.
SBATCH = """#!/bin/bash
cp "$1" "$SLURM/script"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
unset HF_HUB_OFFLINE
for task in $(seq 0 "$last"); do
  SLURM_JOB_ID=$((8 + task)) SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task bash "$SLURM/script" >>"$SLURM/log" 2>&1 &
done
echo "Submitted batch job 7"
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == --unbuffered ]] && shift || shift 2; done
echo "offline=$HF_HUB_OFFLINE"
exec "$@"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder of stand-ins for Slurm's commands on the PATH, which runs the jobs on this machine."""
    pytest.importorskip("submitit", reason='needs pip install -e ".[launchers]"')
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM", str(folder))
    return folder


def launcher_plan(tiny_overrides, folder, *overrides):
    plan = plan_of(tiny_overrides("sweep", folder, "method=none"))
    plan.launcher = first(["launcher=slurm", *overrides]).launcher
    return plan


@pytest.mark.slow
def test_slurm_jobs_divide_an_experiment_while_the_command_returns(slurm, serial, tmp_path, tiny_overrides, tabulated):
    overrides = tiny_overrides("sweep", tmp_path, SWEEP, "workers=1")
    of_jobs = [
        "launcher=slurm",
        "launcher.jobs=2",
        "launcher.partition=long",
        "launcher.account=me",
        "launcher.time=60",
    ]
    command = [sys.executable, "-m", "experiments", "reproduce", *overrides, *of_jobs]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    options = (slurm / "script").read_text()
    for option in ("array=0-1%2", "partition=long", "account=me", "time=60", "gpus-per-node=1", "mem=64GB"):
        assert f"#SBATCH --{option}\n" in options
    end = time.monotonic() + 900
    while len(results := list((tmp_path / "outputs" / ".slurm").glob("*/*_result.pkl"))) < 2:
        assert time.monotonic() < end, (slurm / "log").read_text()[-3000:]
        time.sleep(0.1)
    assert [pickle.loads(path.read_bytes()) for path in results] == [("success", None)] * 2
    assert (slurm / "log").read_text().count("offline=1") == 2
    plan = plan_of(overrides)
    runs = [Run.of(spec) for spec in plan.runs]
    scores = {path: path.stat().st_mtime_ns for run in runs for path in (run.folder / "metrics").glob("*.json")}
    assert scores
    assert tabulated(plan) == serial
    assert {path: path.stat().st_mtime_ns for path in scores} == scores, "a run is scored again"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("launcher.jobs=0", "launcher.jobs must be a whole number of at least 1, got 0"),
        ("launcher.time=day", "launcher.time must be a whole number of at least 1, got 'day'"),
        ("launcher.partition=[gpu]", r"launcher.partition must be a text, got \['gpu'\]"),
        ("launcher.setup=module", r"launcher.setup must be a list .* give \['module'\]"),
        ("+launcher.gpu=2", "Unavailable parameter.*'gpu'"),
    ],
)
def test_a_wrong_setting_of_jobs_is_refused_before_they_are_submitted(
    override, message, slurm, tmp_path, tiny_overrides
):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        submit(["generate"], launcher_plan(tiny_overrides, tmp_path, override))
    assert not (slurm / "script").exists()


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_wrong_setting_of_jobs_is_refused_before_anything_is_looked_for(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.runs.preflight.find_checkpoint", lambda *_, **__: pytest.fail("looked for"))
    overrides = ["experiment=diversity", "model=sdxl", "method=none", f"outputs={tmp_path}", "launcher=slurm"]
    for command in ("generate", "reproduce"):
        assert main([command, *overrides, "launcher.jobs=0", *options]) == 2
        assert "launcher.jobs must be a whole number" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_lists_what_this_machine_lacks_to_submit_jobs(tmp_path, monkeypatch, tiny_overrides, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("experiments.runs.slurm.find_spec", lambda name: None)
    overrides = tiny_overrides("sweep", tmp_path, "method=none", "launcher=slurm")
    assert main(["generate", *overrides, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "Faults that would stop it: 2" in out and "no sbatch and no srun" in out and "needs submitit" in out


def test_a_job_does_not_replace_the_plan_that_the_user_wrote_meanwhile(tmp_path, tiny_overrides):
    sent = plan_of(tiny_overrides("sweep", tmp_path, "method=none"))
    copy = sent.write(sent.file.with_name("launched.json"))
    newer = plan_of(tiny_overrides("sweep", tmp_path, "method=none", "model.call.num_inference_steps=3"))
    before = newer.write().read_text()
    job = Plan.of([f"plan={copy}"])
    assert job.write() == newer.file and newer.file.read_text() == before
    job.complete(job.runs[0], "0123456789ab")
    assert [spec.settings for spec in Plan.read(newer.file).runs] == [spec.settings for spec in newer.runs]
    assert plan_of(tiny_overrides("sweep", tmp_path, "method=none")).runs[0].id == "0123456789ab"
    newer.file.unlink()
    assert job.write().is_file(), "a machine to which the copy alone was brought"


# --- afterwards, on a machine without a GPU ---------------------------------------------------------------------------


def test_runs_of_another_device_are_scored_and_tabulated_here(scored_copy, monkeypatch, caplog):
    caplog.set_level("INFO", "experiments")
    plan, outputs, folders = scored_copy
    plan.add_ids({spec.settings: folder.name for spec, folder in zip(plan.runs, folders, strict=True)})
    plan.write()
    monkeypatch.setattr("experiments.runs.jobs.kind_of_device", lambda device: "login node")
    monkeypatch.setattr("experiments.runs.preflight.find_checkpoint", lambda *_, **__: pytest.fail("looked for"))
    before = {path: path.stat().st_mtime_ns for path in outputs.glob("runs/*/images/**/*.png")}
    for command in ("generate", "evaluate", "tabulate"):
        assert main([command, f"plan={plan.file}"]) == 0
    assert "cpu made them, and this machine (login node) makes none" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in outputs.glob("runs/*/images/**/*.png")} == before
    assert sorted(path.name for path in (outputs / "runs").glob("[0-9a-f]*")) == sorted(f.name for f in folders)


def test_runs_of_another_device_are_not_mixed_with_those_of_this_one(scored_copy, monkeypatch, caplog):
    plan, _, folders = scored_copy
    for spec, folder in zip(plan.runs, folders, strict=True):
        spec.id = folder.name
    assert jobs_of_other_device(plan.runs) is None, "they are of this device"
    monkeypatch.setattr("experiments.runs.jobs.kind_of_device", lambda device: "H100")
    assert all(not job.missing for job in jobs_of_other_device(plan.runs))
    with monkeypatch.context() as patch:
        patch.setattr("experiments.runs.jobs.local_fingerprint", lambda model: "another")
        assert jobs_of_other_device(plan.runs) is None, "the weights here are others, so the runs are made anew"
        patch.setattr("experiments.runs.jobs.local_fingerprint", lambda model: None)
        assert jobs_of_other_device(plan.runs), "there are no weights here"
    plan.cfg.device = "cpu"
    assert jobs_of_other_device(plan.runs) is None, "the user asks for a device"
    plan.cfg.device = "auto"
    image = next(folders[1].rglob("*.png"))
    image.write_bytes(image.read_bytes() + b"x")
    with pytest.raises(ValueError, match=rf"{image.name} is not the image.*cpu made the run"):
        jobs_of_other_device(plan.runs)
    (folders[1] / "complete").unlink()
    assert jobs_of_other_device(plan.runs) is None, "one is incomplete"


def test_a_machine_without_slurm_says_so(slurm, tmp_path, tiny_overrides, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="srun"):
        submit(["generate"], launcher_plan(tiny_overrides, tmp_path))


def test_a_job_fails_with_its_command_and_is_the_same_after_an_interruption(slurm, capsys):
    job = Job((("generate", "workers=0"), ("evaluate", "workers=0")))
    with pytest.raises(RuntimeError, match="generate failed"):
        job()
    assert capsys.readouterr().err.startswith("generate: workers must be auto")
    assert job.checkpoint().function == job


# --- file systems without locks ---------------------------------------------------------------------------------------


def test_a_file_system_without_locks_is_recognised(tmp_path, monkeypatch):
    assert has_locks(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    monkeypatch.setattr("experiments.runs.locks.FileLock", lambda *_, **__: contextlib.nullcontext())
    assert not has_locks(tmp_path), "every lock is granted"


def test_images_are_made_with_a_warning_where_nothing_is_locked(tmp_path, tiny_overrides, monkeypatch, caplog):
    def interrupted(jobs):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.generate.has_locks", lambda _: False)
    monkeypatch.setattr("experiments.generate.generate_groups", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(plan_of(tiny_overrides("sweep", tmp_path, "method=none")))
    assert "does not lock files" in caplog.text and str(tmp_path / "outputs") in caplog.text


def test_jobs_that_could_not_divide_the_work_are_refused(slurm, tmp_path, tiny_overrides, monkeypatch):
    monkeypatch.setattr("experiments.runs.slurm.has_locks", lambda _: False)
    with pytest.raises(ValueError, match=r"does not lock files.*launcher\.jobs=1"):
        submit(["generate"], launcher_plan(tiny_overrides, tmp_path))
    assert not (slurm / "script").exists()
