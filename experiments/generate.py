"""Stage 1: generate the images of an experiment, a folder for each run.

    python -m experiments generate experiment=diversity
    python -m experiments generate experiment=diversity model=sdxl --dry-run    what it needs; nothing is made
    python -m experiments generate model=mini-sdxl method=negtome method.alpha=0.3,0.9

The baseline of each run is generated too, whether you name it or not.
You may interrupt the command at any time: the same command goes on where it stopped. Several commands may run at once,
also on several machines with a shared disk: no group is generated twice.

    python -m experiments generate experiment=sweep model=sdxl
    python -m experiments generate experiment=sweep model=sdxl launcher=slurm launcher.jobs=8 launcher.partition=NAME

The first uses all GPUs of this machine, a process for each. The second fetches what is missing, submits Slurm jobs and
returns. conf/launcher/slurm.yaml has all options of the jobs.
"""

if __name__ == "__main__":  # before anything slow is imported, so that --help is quick
    from experiments.__main__ import run_module

    run_module(__file__)

import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from eval.images import count_withheld, read_withheld
from experiments import project_path, start_log
from experiments.configs import with_device
from experiments.plan import Plan, RunSpec, run_names
from experiments.runs import outlook
from experiments.runs.checkpoints import find_checkpoint
from experiments.runs.faults import Fault, listing
from experiments.runs.jobs import RunJob, prepare_job
from experiments.runs.locks import has_locks
from experiments.runs.metrics import left_out_lines
from experiments.runs.preflight import describe, examine, examine_and_fetch
from experiments.runs.slurm import check_launcher, submit
from experiments.runs.store import Run
from experiments.runs.workers import generate_groups

log = logging.getLogger(__name__)

#: Prints what a command needs, in its place. Exit code 0, also where something is missing; 2 for a wrong setting.
DRY_RUN = "--dry-run"


def generate(plan: Plan) -> list[Path]:
    """Write the plan, generate the missing groups of its runs, and return the runs' folders.

    Raises:
        FileNotFoundError: a checkpoint is missing and cannot be fetched.
        ValueError: a setting is out of range, or an image is not finite.
        RuntimeError: NegToMe was attached and compared nothing; or processes were killed repeatedly.
    """
    plan.write()
    jobs = [prepare_job(spec, find_checkpoint(spec.cfg.model)) for spec in plan.runs]
    generate_jobs(plan, jobs)
    return [job.task.run.folder for job in jobs]


def generate_jobs(plan: Plan, jobs: list[RunJob]) -> None:
    """Generate the missing groups of runs, and complete each run after its last group; errors as of `generate`.

    Raises:
        KeyboardInterrupt: its message says which groups are kept.
    """
    by_run: dict[Run, list[RunJob]] = {}
    for job in jobs:
        job.task.run.begin(job.identity, job.task.device)
        by_run.setdefault(job.task.run, []).append(job)
    distinct = [jobs_of_run[0] for jobs_of_run in by_run.values()]  # a run that is named twice is generated once
    remaining = {job.task.run: len(job.missing) for job in distinct}
    total, titles = sum(remaining.values()), {}
    if total and not has_locks(outputs := project_path(plan.cfg.outputs)):
        text = (
            "The file system of %s does not lock files: run one command at a time, since several would make the same "
            "images, or set outputs=FOLDER on another one (Lustre needs the mount option flock)"
        )
        log.warning(text, outputs)
    for number, (job, name) in enumerate(zip(distinct, run_names([job.spec.cfg for job in distinct]), strict=True), 1):
        titles[job.task.run] = f"run {number} of {len(distinct)}: {name}"
        state = f"{len(job.missing)} of" if job.missing else "nothing to generate, there are all"
        log.info("%s: %s %d groups: %s", name, state, len(job.groups), job.task.run.folder)
    done = [run for run in by_run if not remaining[run]]
    with logging_redirect_tqdm(), tqdm(total=total, unit="group", dynamic_ncols=True, disable=not total) as bar:
        try:
            for run in itertools.chain(done, generate_groups(distinct)):
                if remaining[run]:
                    bar.set_description(titles[run])
                    bar.update()
                    remaining[run] -= 1
                if remaining[run]:
                    continue
                if not run.finish(by_run[run][0].groups):
                    raise RuntimeError(f"Groups vanished from {run.folder} meanwhile: run the same command again")
                for job in by_run[run]:
                    plan.complete(job.spec, run.id)
                if withheld := read_withheld(run.folder):
                    text = "%s: %d of %d groups are withheld: %s"
                    log.info(text, job.spec.label, len(withheld), len(job.groups), count_withheld(withheld))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{bar.n} of {total} groups were generated and are kept in {jobs[0].task.run.folder.parent}; the same "
                "command goes on from there."
            ) from None


def refuse(faults: list[Fault], tables: bool) -> int:
    """Print all faults, and return the exit code.

    Args:
        tables: whether the command is reproduce, which makes tables.
    """
    if len(faults) == 1 and len(faults[0].lines()) == 1:
        raise ValueError(faults[0].problem)
    command = "reproduce" if tables else "generate"
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    print(f"{command}: {count}, and no image was made:\n{listing(faults)}", file=sys.stderr)
    can_be_fetched = [bool(fault.fetch) for fault in faults]
    if any(can_be_fetched) and not all(can_be_fetched):  # otherwise all were tried
        print("python -m experiments doctor --fetch with the same overrides fetches what it can.", file=sys.stderr)
    if models := [fault.name for fault in faults if fault.name.startswith("model=")]:
        print(f"No image can be made without the weights of {', '.join(models)}.", file=sys.stderr)
    elif any(fault.needed_by for fault in faults):
        print(outlook.without_metrics(tables), file=sys.stderr)
    return 2


def launch(stages: Sequence[str], plan: Plan, tables: bool = False) -> int:
    """Check and fetch here what the jobs of a launcher need, submit them, and return the exit code.

    Args:
        stages: the commands of each job; see `experiments.runs.slurm.submit`.
        tables: whether tables will be made, which need the primary metrics.
    """
    if faults := check_launcher(plan):  # before anything is fetched
        return refuse(faults, tables)
    if faults := examine_and_fetch(on_cpu(plan), tables, disk=False)[1]:
        return refuse(faults, tables)
    plan.write()
    submit(stages, plan)
    return 0


def on_cpu(plan: Plan) -> Plan:
    """Return the plan for the CPU: a launched job may run on a machine with other devices than this one."""
    configs = [OmegaConf.to_container(spec.cfg, resolve=True) for spec in plan.runs]
    return Plan([RunSpec(OmegaConf.create(with_device(cfg, lambda _: "cpu")), "") for cfg in configs])


def main(argv: list[str], plan: Plan | None = None) -> int:
    """Generate; `experiments.reproduce` passes its plan, and goes on to scores and tables."""
    start_log()
    tables = plan is not None
    plan = plan or Plan.of([text for text in argv if text != DRY_RUN])
    if DRY_RUN in argv:
        of_launcher = check_launcher(plan) if plan.launcher else []
        examined = on_cpu(plan) if plan.launcher else plan
        jobs, faults = examine(examined, tables, disk=not plan.launcher)
        print(*describe(examined, jobs, [*of_launcher, *faults], tables), sep="\n")
        return 0
    for line in left_out_lines(spec.cfg for spec in plan.runs):
        log.warning("%s", line)
    if plan.launcher:
        return launch(["generate"], plan)
    jobs, faults = examine_and_fetch(plan, tables)
    if faults:
        return refuse(faults, tables)
    plan.write()
    generate_jobs(plan, jobs)
    return 0
