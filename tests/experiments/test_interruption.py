"""kill -9, a full disk, a lost worker, another process at the same run: the table is that of an undisturbed run."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from eval.images import read_manifest
from experiments import PROJECT, tabulate
from experiments.configs import build, expand
from experiments.evaluate import evaluate
from experiments.generate import generate
from experiments.locks import locked
from experiments.runs import LOCKS, Run


def arguments(folder, source, *changes):
    """A baseline and a method on a tiny checkpoint: six categories, two images, two steps."""
    return [
        "experiment=sweep", "model=sdxl", f"model.source={source}", "model.dtype=float32",
        "model.call.num_inference_steps=2", "model.call.height=64", "model.call.width=64", "model.negtome.min_side=4",
        "model.negtome.timestep_range=[0,1000]", "model.negtome.threshold=-1", "model.negtome.alpha=0.9",
        "model.groups_per_category=1", "prompts.images_per_prompt=2", "method=none,negtome",
        "prompts.categories=[flower,fruit,horse,train,hat,shoe]",
        "metric=core", "scorer@model.scorer=pixel", "~metric.clip_score", "primary.quality=vendi_score",
        "bootstrap.n_resamples=100", f"outputs={folder / 'outputs'}", f"results={folder / 'results'}", *changes,
    ]  # fmt: skip


def table(configs):
    """Score what was generated and return the table's three files and every image."""
    for cfg in configs:
        evaluate(cfg)
    tabulate.write_table(configs)
    results = tabulate.project_path(configs[0].results)
    images = {
        row.path: (Run.find(cfg).folder / row.path).read_bytes()
        for cfg in configs
        for row in read_manifest(Run.find(cfg).folder)
    }
    # Whoever commits while this runs changes nothing that is tested here.
    commits = "|".join(re.escape(Run.find(cfg).environment["commit"]) for cfg in configs)
    return {path.name: re.sub(commits, "commit", path.read_text()) for path in sorted(results.iterdir())}, images


def leftovers(outputs):
    """What is in run folders and ought not to be: temporary files and folders, and locks."""
    return [path for path in outputs.glob("sweep/**/.*") if path.name != ".hydra"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_checkpoint):
    configs = expand(arguments(tmp_path_factory.mktemp("undisturbed"), tiny_checkpoint("sdxl")))
    for cfg in configs:
        generate(cfg)
    return table(configs)


def start(*overrides):
    command = [sys.executable, "-m", "experiments.generate", *overrides]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=PROJECT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, "it ended before it could be disturbed"
        time.sleep(0.01)
    return found


def test_a_worker_and_then_the_whole_command_are_killed(undisturbed, tmp_path, tiny_checkpoint):
    """A lost worker is replaced, a killed command takes its workers along, and called again it goes on."""
    asked = arguments(tmp_path, tiny_checkpoint("sdxl"))
    process = start(*asked, "workers=2")

    def groups():
        return list((tmp_path / "outputs").rglob("[0-9]*/group.json"))

    wait_for(groups, process)
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGKILL)
    seen = len(groups())
    wait_for(lambda: len(groups()) > seen + 1, process)
    others = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(others, timeout=60)
    assert not alive, "processes outlive the one that started them"

    configs = expand(asked)
    kept = {path: path.stat().st_mtime_ns for path in groups()}
    assert 0 < len(kept) < 2 * 6
    for cfg in configs:
        assert generate(cfg)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was done was done again"
    assert table(configs) == undisturbed
    assert not leftovers(tmp_path / "outputs")


def test_evaluation_and_table_are_killed(undisturbed, tmp_path, tiny_checkpoint, monkeypatch):
    """Stopped between any two files, the next call ends as one that was never stopped."""
    configs = expand(arguments(tmp_path, tiny_checkpoint("sdxl")))
    for cfg in configs:
        generate(cfg)
    replace = os.replace
    for files in (2, 1, 3, 1):
        left = iter(range(files))

        def killed(*paths, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(*paths)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", killed)
            table(configs)
    assert table(configs) == undisturbed
    assert not leftovers(tmp_path / "outputs")


@pytest.mark.parametrize("what", ["an image", "the record", "the identity", "the manifest"])
def test_a_full_disk_leaves_nothing_half_written(what, undisturbed, tmp_path, tiny_checkpoint, monkeypatch):
    """Real writes that fail half-way as on a full disk: part of the bytes are there, then ENOSPC."""
    configs = expand(arguments(tmp_path, tiny_checkpoint("sdxl"), "workers=1"))
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
        for cfg in configs:
            generate(cfg)
    for record in (tmp_path / "outputs").rglob("group.json"):
        json.loads(record.read_text())
        for image in record.parent.glob("*.png"):
            with Image.open(image) as opened:
                opened.load()
    assert not list((tmp_path / "outputs").rglob("images/*/.*")) and not list((tmp_path / "outputs").rglob(".*.tmp"))
    assert not list((tmp_path / "outputs").rglob("complete"))
    for cfg in configs:
        generate(cfg)
    assert table(configs) == undisturbed


def test_two_commands_at_the_same_run_share_its_groups(undisturbed, tmp_path, tiny_checkpoint):
    """Whoever comes second takes what the first has not begun; nothing is made twice, and nobody waits for ever."""
    asked = arguments(tmp_path, tiny_checkpoint("sdxl"), "workers=1")
    processes = [start(*asked) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    configs = expand(asked)
    assert all(Run.find(cfg).complete for cfg in configs)
    assert table(configs) == undisturbed
    assert not leftovers(tmp_path / "outputs")


HOLD = """
import sys, time
from pathlib import Path
from experiments.locks import locked
with locked(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_a_claim_ends_with_the_process_that_held_it(tmp_path, tiny_checkpoint):
    """Claimed elsewhere, a group is left alone; once its holder was killed without a word, it is free."""
    (cfg,) = expand(arguments(tmp_path, tiny_checkpoint("sdxl"), "method=none"))
    group = build(cfg.prompts).groups()[0]
    run = Run(tmp_path / "run")
    lock = run.folder / LOCKS / f"{group.prompt_id}.{group.seed:06d}"
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


def test_where_the_disk_knows_no_locks_the_work_goes_on(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "a" / "lock") as mine:
        assert mine is True
