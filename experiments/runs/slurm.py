"""Slurm jobs that divide the work of a plan: each takes what no other has claimed by a lock."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from experiments import project_path
from experiments.plan import Plan
from experiments.runs.identity import short_digest
from experiments.runs.locks import has_locks

log = logging.getLogger(__name__)


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


def check_slurm() -> None:
    """Raise RuntimeError if this machine cannot submit jobs."""
    absent = [command for command in ("sbatch", "srun") if shutil.which(command) is None]
    if absent:
        raise RuntimeError(
            f"launcher=slurm needs Slurm, and this machine has no {' and no '.join(absent)}: run the command on a "
            "login node of the cluster, or leave launcher=slurm out"
        )


def submit(stages: Sequence[str], plan: Plan) -> None:
    """Submit the jobs of `launcher=slurm` at once, and return without waiting for them.

    The jobs use no network. They read a copy of the plan that no later command replaces.

    Args:
        stages: commands of `experiments` that each job runs on the whole plan, one after the other.

    Raises:
        ValueError: a setting of the launcher is wrong, or the jobs could not divide the work.
        RuntimeError: submitit or Slurm is missing, or Slurm refused the jobs.
    """
    settings = OmegaConf.to_container(plan.launcher, resolve=True)
    n_jobs, setup, max_num_timeout = (settings.pop(name) for name in ("jobs", "setup", "max_num_timeout"))
    if not isinstance(n_jobs, int) or n_jobs < 1:
        raise ValueError(f"launcher.jobs must be a whole number of at least 1, got {n_jobs!r}")
    if not isinstance(setup, list):
        raise ValueError(f"launcher.setup must be a list of shell commands, got {setup!r}: give [{setup!r}]")
    outputs = project_path(plan.cfg.outputs)
    if n_jobs > 1 and not has_locks(outputs):
        raise ValueError(
            f"The file system of {outputs} does not lock files, so each of {n_jobs} jobs would make all images: set "
            "outputs=FOLDER on another one (Lustre needs the mount option flock), or launcher.jobs=1"
        )
    try:
        import submitit
    except ImportError as error:
        raise RuntimeError('launcher=slurm needs submitit: run pip install -e ".[launchers]"') from error
    executor = submitit.SlurmExecutor(outputs / ".slurm" / "%j", max_num_timeout)
    options = {name: value for name, value in settings.items() if value is not None}
    executor.update_parameters(job_name="negtome", setup=["export HF_HUB_OFFLINE=1", *setup], **options)
    file = plan.write(plan.file.with_name(f"launched-{short_digest(plan.as_json())}.json"))
    job = Job(tuple((stage, f"plan={file}") for stage in stages))
    ids = [submitted.job_id for submitted in executor.submit_array([job] * n_jobs)]
    log.info("Submitted %d jobs to Slurm, %s to %s; their logs: %s", n_jobs, ids[0], ids[-1], outputs / ".slurm")
