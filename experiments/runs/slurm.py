"""Slurm jobs that divide the work of a plan: each takes what no other has claimed by a lock."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments import project_path
from experiments.plan import Plan
from experiments.runs.faults import Fault
from experiments.runs.identity import short_digest
from experiments.runs.locks import has_locks

log = logging.getLogger(__name__)

#: Settings of `launcher=slurm` that are whole numbers, with the least of each; and those that are texts.
NUMBERS = {"jobs": 1, "max_num_timeout": 0, "time": 1, "gpus_per_node": 0, "cpus_per_task": 1}
TEXTS = ("partition", "account", "qos", "constraint", "mem")
#: Settings that are not options of sbatch.
OURS = ("jobs", "setup", "max_num_timeout")


@dataclass(frozen=True)
class Job:
    """The commands of one job, each of which goes on where it was interrupted."""

    commands: tuple[tuple[str, ...], ...]

    def __call__(self) -> None:
        from experiments.__main__ import main

        for command in self.commands:
            if main(command):
                raise RuntimeError(f"{command[0]} failed, see the message above")

    def checkpoint(self) -> Any:
        """Return what submitit puts back into the queue when the job is preempted or out of time: the same job."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def check_launcher(plan: Plan) -> list[Fault]:
    """Check the settings of the jobs, and return why this machine cannot submit them.

    Raises:
        ValueError: a setting is wrong.
    """
    settings = OmegaConf.to_container(plan.launcher, resolve=True)
    for name, least in NUMBERS.items():
        value = settings.get(name)
        is_optional = value is None and name not in ("jobs", "max_num_timeout")
        if not is_optional and (type(value) is not int or value < least):
            raise ValueError(f"launcher.{name} must be a whole number of at least {least}, got {value!r}")
    for name in TEXTS:
        if type(value := settings.get(name)) not in (str, int, type(None)):
            raise ValueError(f"launcher.{name} must be a text, got {value!r}: give launcher.{name}=NAME")
    if not isinstance(settings["setup"], list):
        setup = settings["setup"]
        raise ValueError(f"launcher.setup must be a list of shell commands, got {setup!r}: give [{setup!r}]")
    faults = []
    if absent := [command for command in ("sbatch", "srun") if shutil.which(command) is None]:
        faults.append(
            Fault(
                f"launcher=slurm needs Slurm, and this machine has no {' and no '.join(absent)}: run the command on a "
                "login node of the cluster, or leave launcher=slurm out"
            )
        )
    if find_spec("submitit") is None:
        faults.append(Fault('launcher=slurm needs submitit: run pip install -e ".[launchers]"'))
    if not faults:
        _executor(settings, project_path(plan.cfg.outputs))
    return faults


def _executor(settings: dict[str, Any], outputs: Path) -> Any:
    """Return submitit's executor; raise ValueError for options that it does not know."""
    import submitit

    options = {name: value for name, value in settings.items() if value is not None and name not in OURS}
    executor = submitit.SlurmExecutor(outputs / ".slurm" / "%j", settings["max_num_timeout"])
    executor.update_parameters(job_name="negtome", setup=["export HF_HUB_OFFLINE=1", *settings["setup"]], **options)
    return executor


def submit(stages: Sequence[str], plan: Plan) -> None:
    """Submit the jobs of `launcher=slurm` at once, and return without waiting for them.

    The jobs use no network. They read a copy of the plan that no later command replaces.

    Args:
        stages: commands of `experiments` that each job runs on the whole plan, one after the other.

    Raises:
        ValueError: a setting of the launcher is wrong, or the jobs could not divide the work.
        RuntimeError: submitit or Slurm is missing, or Slurm refused the jobs.
    """
    if faults := check_launcher(plan):
        raise RuntimeError(faults[0].problem)
    settings: Any = OmegaConf.to_container(plan.launcher, resolve=True)
    n_jobs: int = settings["jobs"]
    outputs = project_path(plan.cfg.outputs)
    if n_jobs > 1 and not has_locks(outputs):
        raise ValueError(
            f"The file system of {outputs} does not lock files, so each of {n_jobs} jobs would make all images: set "
            "outputs=FOLDER on another one (Lustre needs the mount option flock), or launcher.jobs=1"
        )
    executor = _executor(settings, outputs)
    file = plan.write(plan.file.with_name(f"launched-{short_digest(plan.as_json())}.json"))
    job = Job(tuple((stage, f"plan={file}") for stage in stages))
    ids = [submitted.job_id for submitted in executor.submit_array([job] * n_jobs)]
    log.info("Submitted %d jobs to Slurm, %s to %s; their logs: %s", n_jobs, ids[0], ids[-1], outputs / ".slurm")
