"""kill -9, a full disk, a lost worker, another process at the same run: the table is that of an undisturbed run."""

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

from experiments import PROJECT, select_device
from experiments.configs import build
from experiments.generate import RunJob, RunTask, _generate_groups, generate
from experiments.runs import checkpoints
from experiments.runs.locks import locked
from experiments.runs.store import LOCKS, Run

#: A baseline and a method; of few categories, and of many where processes must meet.
FEW = ("method=none,negtome", "prompts.categories=[flower,fruit,horse]")
MANY = (FEW[0], "prompts.categories=[flower,fruit,horse,train,hat,shoe]")
GENERATE = ("-m", "experiments.generate")


def leftovers(outputs):
    """What is in run folders and ought not to be: temporary files and folders, and locks."""
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
def asked(sweep, tmp_path, tiny_overrides):
    """The same, to be disturbed."""
    return tiny_overrides("sweep", tmp_path, *sweep)


def start(program, *arguments):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *program, *arguments]
    return subprocess.Popen(command, cwd=PROJECT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, "it ended before it could be disturbed"
        time.sleep(0.01)
    return found


def spawned(process):
    """The processes that generate for a command."""
    found = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # gone, or about to
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [MANY], indirect=True, ids=["many"])
@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_a_worker_and_then_the_whole_command_are_killed(undisturbed, asked, tmp_path, tabulated):
    """A lost worker is replaced, a killed command takes its workers along, and called again it goes on."""
    plan = plan_of(asked)
    cfg = plan.cfg
    run, _ = Run.plan(cfg, checkpoints.find_checkpoint(cfg.model).fingerprint, select_device(cfg.device))

    def groups():
        return list((tmp_path / "outputs").rglob("[0-9]*/group.json"))

    # However fast it is, it cannot be done before it is killed: some of its groups are claimed here meanwhile.
    with contextlib.ExitStack() as last, contextlib.ExitStack() as later:
        for number, group in enumerate(build(cfg.prompts).groups()):
            if number > 1:
                assert (last if number == 5 else later).enter_context(run.claim(group, wait=False))
        process = start(GENERATE, *asked, "workers=2")
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
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was done was done again"
    assert tabulated(plan) == undisturbed
    assert not leftovers(tmp_path / "outputs")


@pytest.mark.parametrize(
    ("made", "ends"),
    [((0, 3), True), ((1, 0, 2), True), ((0, 1, 0, 2), True), ((0, 0), False), ((1, 0, 0), False)],
)
def test_a_process_is_lost(made, ends, monkeypatch):
    """`made` groups by each pool before it loses a process: without any twice in a row, it would not end."""
    pools = iter(made)

    class Pool:
        def __init__(self):
            self.left = next(pools)

        def submit(self, *_):
            future = Future()
            future.set_result(True) if self.left > 0 else future.set_exception(BrokenProcessPool())
            self.left -= 1
            return future

    monkeypatch.setattr("experiments.generate._executor", functools.cache(lambda _: Pool()))
    monkeypatch.setattr("experiments.generate.as_completed", iter)
    job = RunJob(None, RunTask("run", *[None] * 6), {}, [], ["a", "b", "c"], workers=2)
    with contextlib.nullcontext() if ends else pytest.raises(RuntimeError, match="workers=1"):
        assert list(_generate_groups([job])) == ["run"] * 3


def test_evaluation_and_table_are_killed(undisturbed, asked, tmp_path, tabulated, monkeypatch):
    """Stopped between any two files, the next call ends as one that was never stopped."""
    plan = plan_of(asked)
    generate(plan)
    replace = os.replace
    for files in (2, 1, 3, 1):
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
    "what",
    [
        "an image",
        "the manifest",
        *(pytest.param(what, marks=pytest.mark.slow) for what in ("the record", "the identity")),
    ],
)
def test_a_full_disk_leaves_nothing_half_written(what, undisturbed, asked, tmp_path, tabulated, monkeypatch):
    """Real writes that fail half-way as on a full disk: part of the bytes are there, then ENOSPC."""
    plan = plan_of([*asked, "workers=1"])
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    suffix = {"an image": ".png", "the record": "group.json", "the identity": "config.yaml", "the manifest": ".jsonl"}

    def failing(write, after):
        count = 0

        def wrapped(self, *arguments, **options):
            nonlocal count
            path = Path(arguments[0]) if isinstance(self, Image.Image) else Path(self)
            count += suffix[what] in path.name
            if suffix[what] in path.name and count > after:
                path.write_bytes(b"half") if path.parent.is_dir() else None
                raise full
            return write(self, *arguments, **options)

        return wrapped

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        if what == "an image":
            patch.setattr(Image.Image, "save", failing(Image.Image.save, 3))
        elif what == "the record":
            patch.setattr(Path, "write_text", failing(Path.write_text, 2))
        else:
            patch.setattr(os, "replace", failing(os.replace, 0))
        generate(plan)
    for record in (tmp_path / "outputs").rglob("group.json"):
        json.loads(record.read_text())
        for image in record.parent.glob("*.png"):
            with Image.open(image) as opened:
                opened.load()
    assert not list((tmp_path / "outputs").rglob("images/*/.*")) and not list((tmp_path / "outputs").rglob(".*.tmp"))
    assert not list((tmp_path / "outputs").rglob("complete"))
    generate(plan)
    assert tabulated(plan) == undisturbed


#: The command, which notes what it saves in a file, one a process, and ends its first group when the other has one too.
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


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [MANY], indirect=True, ids=["many"])
@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_two_commands_at_the_same_run_share_its_groups(undisturbed, asked, tmp_path, tabulated):
    """Whoever comes second takes what the first has not begun; nothing is made twice, and nobody waits for ever."""
    notes = tmp_path / "notes"
    notes.mkdir()
    processes = [start(["-c", NOTING, str(notes)], *asked, "workers=1") for _ in range(2)]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    made = [line for file in notes.iterdir() for line in file.read_text().splitlines()]
    assert len(set(made)) == 2 * 6 and len(made) == len(set(made)), "something was made twice"
    plan = plan_of(asked)
    assert all(Run.of(spec).complete for spec in plan.runs)
    assert tabulated(plan) == undisturbed
    assert not leftovers(tmp_path / "outputs")


HOLD = """
import sys, time
from pathlib import Path
from experiments.runs.locks import locked
with locked(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_a_claim_ends_with_the_process_that_held_it(asked, tmp_path):
    """Claimed elsewhere, a group is left alone; once its holder was killed without a word, it is free."""
    cfg = plan_of(asked).cfg
    group = build(cfg.prompts).groups()[0]
    run = Run(tmp_path / "run")
    lock = tmp_path / LOCKS / f"{run.id}.{group.prompt_id}.{group.seed:06d}"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline().strip() == "True"
        with run.claim(group, wait=False) as mine:
            assert mine is False
        holder.kill()
        with run.claim(group, wait=True) as mine:
            assert mine is True
            with locked(lock, wait=False) as again:
                assert again is False, "held by this process already"
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_the_disk_knows_no_locks_the_work_goes_on(tmp_path, monkeypatch, code):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "a" / "lock") as mine, locked(tmp_path / "a" / "lock", wait=False) as another:
        assert mine is another is True


def test_a_folder_of_locks_that_can_never_be_made_is_said(tmp_path):
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    with pytest.raises(FileExistsError, match="nowhere"), locked(tmp_path / "nowhere" / "lock"):
        pass
