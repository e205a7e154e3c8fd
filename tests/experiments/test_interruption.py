"""The table is that of an undisturbed run after kill -9, a full disk, a lost worker, or two commands at once."""

import contextlib
import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import pytest
from PIL import Image
from plans import plan_of

from experiments import PROJECT
from experiments.generate import generate
from experiments.runs import checkpoints
from experiments.runs.jobs import RunJob, RunTask, prepare_job
from experiments.runs.locks import locked
from experiments.runs.store import Run
from experiments.runs.workers import _generate_group, generate_groups

#: A baseline and a method with few categories, and with more where processes must meet.
FEW = ("method=none,negtome", "prompts.categories=[flower,fruit]")
MANY = (FEW[0], "prompts.categories=[flower,fruit,horse,train,hat,shoe]")
needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="no such locks")


def leftovers(outputs):
    """Temporary files and folders, and locks."""
    return [path for path in outputs.glob("runs/*/**/.*") if path.name != ".hydra"]


@pytest.fixture(scope="module", params=[FEW], ids=["few"])
def sweep(request):
    return request.param


@pytest.fixture(scope="module")
def undisturbed(sweep, tmp_path_factory, tiny_overrides, tabulated):
    plan = plan_of(tiny_overrides("sweep", tmp_path_factory.mktemp("undisturbed"), *sweep))
    generate(plan)
    return tabulated(plan)


@pytest.fixture
def overrides(sweep, tmp_path, tiny_overrides):
    """The same, to be disturbed."""
    return tiny_overrides("sweep", tmp_path, *sweep)


def start(program, *arguments, **options):
    command = [sys.executable, *program, *arguments]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options
    return subprocess.Popen(command, cwd=PROJECT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **streams)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "waited in vain"
        assert process.poll() is None, "it ended before it could be disturbed"
        time.sleep(0.01)
    return result


def spawned(process):
    """The processes that generate for a command."""
    workers = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # gone, or about to
            if "spawn_main" in " ".join(child.cmdline()):
                workers.append(child)
    return workers


@needs_locks
@pytest.mark.slow
@pytest.mark.parametrize("sweep", [MANY], indirect=True, ids=["many"])
def test_a_worker_and_then_the_whole_command_are_killed(undisturbed, overrides, tmp_path, tabulated):
    """A lost worker is replaced, a killed command takes its workers along, and called again it goes on."""
    plan = plan_of(overrides)
    cfg = plan.cfg
    job = prepare_job(plan.runs[0], checkpoints.find_checkpoint(cfg.model))

    def groups():
        return list((tmp_path / "outputs").glob("runs/*/images/*/[0-9]*/group.json"))

    # It cannot be done before it is killed, however fast it is: some of its groups are claimed here meanwhile.
    with contextlib.ExitStack() as last, contextlib.ExitStack() as later:
        for number, group in enumerate(job.groups):
            if number > 1:
                assert (last if number == 5 else later).enter_context(locked(job.task.run.lock(group), wait=False))
        process = start(["-m", "experiments.generate"], *overrides, "workers=2")
        last.callback(process.kill)
        wait_for(groups, process)
        workers = spawned(process)
        assert len(workers) == 2
        workers[0].send_signal(signal.SIGKILL)
        wait_for(lambda: len(set(spawned(process)) - set(workers)) == 2, process)
        later.close()
        wait_for(lambda: len(groups()) == 5, process)
        others = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(others, timeout=60)
        assert not alive, "processes outlive the one that started them"

    kept = {path: path.stat().st_mtime_ns for path in groups()}
    assert len(kept) == 5
    assert len(generate(plan)) == 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a group was generated again"
    assert tabulated(plan) == undisturbed
    assert not leftovers(tmp_path / "outputs")


@pytest.mark.parametrize(
    ("done", "ends"),
    [((0, 3), True), ((1, 0, 2), True), ((0, 1, 0, 2), True), ((0, 0), False), ((1, 0, 0), False)],
)
def test_a_process_is_lost(done, ends, monkeypatch):
    """Each pool generates `done` groups before it loses a process: two pools in a row without any end the command."""
    pools = iter(done)

    class Pool:
        def __init__(self):
            self.left = next(pools)

        def submit(self, *_):
            future = Future()
            future.set_result(True) if self.left > 0 else future.set_exception(BrokenProcessPool())
            self.left -= 1
            return future

    monkeypatch.setattr("experiments.runs.workers._executor", functools.cache(lambda _: Pool()))
    monkeypatch.setattr("experiments.runs.workers.as_completed", iter)
    job = RunJob(None, RunTask("run", *[None] * 6), {}, [], ["a", "b", "c"], devices=("cpu", "cpu"))
    with contextlib.nullcontext() if ends else pytest.raises(RuntimeError, match="workers=1"):
        assert list(generate_groups([job])) == ["run"] * 3


def test_evaluation_and_table_are_killed(undisturbed, overrides, tmp_path, tabulated, monkeypatch):
    """Stopped between any two files, the next call ends as one that was never stopped."""
    plan = plan_of(overrides)
    generate(plan)
    replace = os.replace
    for files in (2, 3):
        left = iter(range(files))

        def killed(*paths, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(*paths)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", killed)
            tabulated(plan)
    assert tabulated(plan) == undisturbed
    assert not leftovers(tmp_path / "outputs")


@pytest.mark.parametrize(
    ("suffix", "owner", "name", "after"),
    [
        (".png", Image.Image, "save", 3),
        pytest.param(".jsonl", os, "replace", 0, marks=pytest.mark.slow),
        pytest.param("group.json", Path, "write_text", 1, marks=pytest.mark.slow),
        pytest.param("config.yaml", os, "replace", 0, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_leaves_nothing_half_written(
    suffix, owner, name, after, undisturbed, overrides, tmp_path, tabulated, monkeypatch
):
    """Real writes that fail half-way as on a full disk: part of the bytes are there, then ENOSPC."""
    plan = plan_of([*overrides, "workers=1"])
    write, count = getattr(owner, name), 0

    def failing(first, *arguments, **options):
        nonlocal count
        path = Path(arguments[0] if owner is Image.Image else first)
        count += suffix in path.name
        if suffix in path.name and count > after:
            path.write_bytes(b"half") if path.parent.is_dir() else None
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(first, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(owner, name, failing)
        generate(plan)
    outputs = tmp_path / "outputs"
    for record in outputs.rglob("group.json"):
        json.loads(record.read_text())
        for image in record.parent.glob("*.png"):
            with Image.open(image) as opened:
                opened.load()
    assert not [*outputs.rglob("images/*/.*"), *outputs.rglob(".*.tmp"), *outputs.rglob("complete")]
    generate(plan)
    assert tabulated(plan) == undisturbed


#: The command, which notes each group that it saves, and saves its first one when the other command has one, too.
NOTING = """
import os, sys, time
from pathlib import Path
from experiments.generate import main
from experiments.runs.store import Run

notes, save = Path(sys.argv.pop(1)), Run.save

def noting(run, group, *rest):
    with (notes / str(os.getpid())).open("a") as file:
        print(run.id, group.prompt_id, group.seed, file=file)
    while len(list(notes.iterdir())) < 2:
        time.sleep(0.01)
    save(run, group, *rest)

Run.save = noting
main(sys.argv[1:])
"""


@needs_locks
@pytest.mark.slow
@pytest.mark.parametrize("sweep", [MANY], indirect=True, ids=["many"])
def test_two_commands_at_the_same_run_share_its_groups(undisturbed, overrides, tmp_path, tabulated):
    """The second takes the groups that the first has not begun; none is generated twice, and both end."""
    notes = tmp_path / "notes"
    notes.mkdir()
    processes = [start(["-c", NOTING, str(notes)], *overrides, "workers=1") for _ in range(2)]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    saved = [line for file in notes.iterdir() for line in file.read_text().splitlines()]
    assert len(set(saved)) == len(saved) == 2 * 6
    plan = plan_of(overrides)
    assert all(Run.of(spec).complete for spec in plan.runs)
    assert tabulated(plan) == undisturbed
    assert not leftovers(tmp_path / "outputs")


HOLD = """
import sys, time
from pathlib import Path
from experiments.runs.locks import locked
with locked(Path(sys.argv[1])) as is_locked:
    print(is_locked, flush=True)
    time.sleep(600)
"""


@needs_locks
def test_a_lock_ends_with_the_process_that_held_it(overrides, tmp_path):
    """A group that is locked elsewhere is left alone; once its holder was killed, it is free."""
    plan = plan_of(overrides)
    job = prepare_job(plan.runs[0], checkpoints.find_checkpoint(plan.cfg.model))
    group, run = job.groups[0], job.task.run
    with start(["-c", HOLD, str(run.lock(group))], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline().strip() == "True"
            assert not _generate_group(job.task, group, wait=False) and not run.has(group)
        finally:
            holder.kill()
    assert _generate_group(job.task, group, wait=True) and run.has(group)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_on_the_disk_the_work_goes_on(tmp_path, monkeypatch, code):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "a" / "lock") as one, locked(tmp_path / "a" / "lock", wait=False) as another:
        assert one is another is True


def test_a_folder_of_locks_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    with pytest.raises(FileExistsError, match="nowhere"), locked(tmp_path / "nowhere" / "lock"):
        pass
