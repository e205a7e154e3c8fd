"""The entry of all commands: help without waiting, one line for an error, Ctrl-C that keeps complete groups."""

import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future

import pytest

from experiments import PROJECT
from experiments.__main__ import COMMANDS, main
from experiments.compose import expand
from experiments.plan import run_names
from experiments.runs.store import Run
from experiments.runs.workers import parallel_map

QUIET = {key: value for key, value in os.environ.items() if key != "NEGTOME_TRACEBACK"}


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], cwd=PROJECT, env=QUIET, capture_output=True, text=True, **options
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_and_shows_how_the_command_is_called(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 15 and f"python -m experiments {command}" in text


def test_help_imports_nothing_that_takes_time():
    done = run("-X", "importtime", "-m", "experiments.generate", "--help")
    assert done.returncode == 0 and "python -m experiments generate" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "experiments" in imported and not imported & {"torch", "hydra", "pandas", "matplotlib", "diffusers"}


def test_a_command_logs_its_own_steps_and_of_other_packages_warnings_alone():
    """Whatever these call their loggers: open_clip takes the root, and the client of the hub has had several names."""
    steps = [("experiments.generate", "info"), ("eval.imageset", "info"), ("httpx2", "info"), ("torch", "warning")]
    calls = "\n".join(f"logging.getLogger('{name}').{level}('{name}')" for name, level in steps)
    done = run("-c", f"import logging, experiments\nexperiments.start_log()\n{calls}\nlogging.info('root')")
    assert done.stderr.split() == ["experiments.generate", "eval.imageset", "torch"]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["generat"], ["generat", "generate"]),
        (["generate", "model=mini-sdx"], ["model=mini-sdx", "flux-dev", "did you mean mini-sdxl?"]),
        (["generate", "experiment=diversty"], ["did you mean diversity?"]),
        (["generate", "expriment=diversity"], ["expriment", "did you mean experiment?"]),
        (["generate", "--model", "sdxl"], ["use model=sdxl, without dashes"]),
        (["generate", "-m", "hydra/launcher=joblib"], ["hydra/launcher=joblib", "launcher=slurm"]),
        (["doctor", "--experiment=diversity", "--fetch"], ["use experiment=diversity, without dashes"]),
        (["evaluate", "model.call.heigth=12"], ["model.call.heigth", "did you mean model.call.height?"]),
        (["tabulate", "method.alpha=0.3"], ["method.alpha: expected a key"]),
        (["plot", "-m", "alpha"], ["got alpha", "experiment=alpha", "alpha=VALUE"]),
        (["generate", "model.groups_per_category=many"], ["groups_per_category", "got 'many'"]),
        (["generate", "device=null"], ["device=None", "auto"]),
        (["generate", "model.architecture=dit"], ["must be one of ['auraflow', ", "got 'dit'"]),
        (["generate", "model.call.guidance_scale=high"], ["must be a number, got 'high'"]),
        (
            ["latency", "experiment=latency", "method=none", "latency.cases=no"],
            ["latency.cases must be true or false, got 'no'"],
        ),
        (["generate", "device=cuda:77"], ["cuda:77", "auto"]),
        (["generate", "workers=0"], ["workers must be auto", "got 0"]),
        (["evaluate", "model=sdxl", "model.scorer.weights=/x"], ["did you mean model.scorer.weights_dir?"]),
        (["generate", "model=mini-sdxl", "method=negtome", "scorer@method.encodr=sscd"], ["encodr"]),
        (["generate", "method=guarded", "guard=chat"], ["guard.model has no value: give guard.model=VALUE"]),
        (["reproduce"], ["such as experiment=diversity", "few_steps"]),
        (["reproduce", "--dry-run"], ["such as experiment=diversity"]),
        (["compare", "experiment=diversity"], ["expected one of", "got compare"]),
        (["doctor", "now", "here"], ["one name", "now here"]),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(arguments, messages, capsys, monkeypatch):
    monkeypatch.delenv("NEGTOME_TRACEBACK", raising=False)
    assert main(arguments) == 2
    out = capsys.readouterr()
    assert len(out.err.splitlines()) == 1 and all(text in out.err for text in messages), out.err


def test_a_variable_shows_where_an_error_was_raised(monkeypatch):
    monkeypatch.setenv("NEGTOME_TRACEBACK", "1")
    with pytest.raises(ValueError, match="expected one of"):
        main(["generate", "model=nothing"])


def test_a_mistake_in_the_code_is_no_bad_input(monkeypatch):
    import experiments.doctor

    monkeypatch.delenv("NEGTOME_TRACEBACK", raising=False)
    monkeypatch.setattr(experiments.doctor, "examine", lambda name: {}["missing"])
    with pytest.raises(KeyError):
        main(["doctor"])


def test_the_last_run_of_a_sweep_is_checked_before_the_first_starts(tiny_overrides, tmp_path, capsys):
    asked = tiny_overrides("sweep", tmp_path, "method=negtome", "method.alpha=0.9,nan")
    assert main(["generate", *asked]) == 2
    assert "alpha" in capsys.readouterr().err
    assert not list((tmp_path / "outputs").rglob("*.png"))


def test_what_goes_to_other_machines_is_checked_without_their_device(tiny_overrides, tmp_path, monkeypatch, capsys):
    sent = []
    monkeypatch.setattr("experiments.generate.check_launcher", lambda plan: [])
    monkeypatch.setattr("experiments.generate.submit", lambda _, plan: sent.append(plan))
    asked = tiny_overrides("sweep", tmp_path, "method=none", "device=cuda:77", "launcher=slurm")
    assert main(["generate", *asked]) == 0 and [plan.cfg.device for plan in sent] == ["cuda:77"]
    assert not (tmp_path / "outputs" / "runs").exists(), "no folder of a run that this machine would make"
    assert main(["generate", *asked, "prompts.categories=bird"]) == 2 and len(sent) == 1
    assert "must be a list" in capsys.readouterr().err


@pytest.fixture
def missing(scored_copy):
    """The file of a plan whose runs are still to be generated, and their folders."""
    plan, outputs, folders = scored_copy
    shutil.rmtree(outputs / "runs")
    return plan.write(), folders


def test_jobs_score_the_runs_of_a_plan_if_they_are_complete(scored_sweep, missing, monkeypatch, capsys):
    sent = []
    monkeypatch.setattr("experiments.evaluate.check_launcher", lambda plan: [])
    monkeypatch.setattr("experiments.evaluate.submit", lambda stages, plan: sent.append((stages, plan.launcher.jobs)))
    jobs = ["launcher=slurm", "launcher.jobs=3"]
    assert main(["evaluate", f"plan={scored_sweep[0].file}", *jobs]) == 0 and sent == [(["evaluate"], 3)]
    assert main(["evaluate", f"plan={missing[0]}", *jobs]) == 2 and len(sent) == 1
    assert "unfinished or gone" in capsys.readouterr().err


def test_processes_that_generate_never_hear_ctrl_c(monkeypatch):
    """Not while they import, either: they are started so, and this process listens again."""
    heard, before = [], signal.getsignal(signal.SIGINT)
    tasks = [("a",), ("b",)]

    class Executor:
        def submit(self, *_):
            heard.append(signal.getsignal(signal.SIGINT))
            future = Future()
            future.set_result(True)
            return future

    monkeypatch.setattr("experiments.runs.workers._executor", lambda _: Executor())
    assert set(parallel_map(str, tasks, ("cpu", "cpu"))) == {(task, True) for task in tasks}
    assert heard == [signal.SIG_IGN] * 2 and signal.getsignal(signal.SIGINT) is before


def test_processes_receive_all_runs_at_once_and_each_run_ends_with_its_last_group(missing, monkeypatch):
    """A process that has no group of a run left goes on with the next run's."""
    events, finish = [], Run.finish

    class Executor(Future):
        """Generates a group in this process, when its result is requested."""

        def submit(self, generate_group, task, *rest):
            events.append(("submitted", task.run.id))
            future = Executor()
            future.result = lambda: events.append(("generated", task.run.id)) or generate_group(task, *rest)
            return future

    monkeypatch.setattr("experiments.runs.workers._executor", lambda _: Executor())
    monkeypatch.setattr("experiments.runs.workers.as_completed", iter)
    monkeypatch.setattr(Run, "finish", lambda run, groups: events.append(("finished", run.id)) or finish(run, groups))
    file, folders = missing
    assert main(["generate", f"plan={file}", "workers=2"]) == 0
    expected = [("submitted", folder.name) for folder in folders for _ in range(2)]
    expected += [(event, folder.name) for folder in folders for event in ("generated", "generated", "finished")]
    assert events == expected


def test_runs_are_named_by_what_differs():
    names = run_names(expand(["method=none,negtome", "model=mini-sdxl", "method.alpha=0.3,0.9"]))
    assert names == ["mini-sdxl none", "mini-sdxl negtome, alpha 0.3", "mini-sdxl negtome, alpha 0.9"]


def test_a_repeated_command_logs_one_line_a_run(scored_sweep, caplog):
    caplog.set_level("INFO", "experiments")
    for command in ("generate", "evaluate"):
        caplog.clear()
        assert main([command, f"plan={scored_sweep[0].file}"]) == 0
        assert len(caplog.records) == 2, [record.getMessage() for record in caplog.records]


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_ctrl_c_says_what_is_kept_and_a_second_one_ends_at_once():
    patient = (
        "import os, signal, time, types\n"
        "import experiments.__main__ as entry\n"
        "def command(argv):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(600)\n"
        "entry.importlib.import_module = lambda name: types.SimpleNamespace(main=command)\n"
    )
    done = run("-c", patient + "entry.main(['generate'])", timeout=120)
    assert done.returncode == 130 and "interrupted" in done.stderr and "same command goes on" in done.stderr
    assert "Traceback" not in done.stderr
    stubborn = patient.replace(
        "    time.sleep(600)\n",
        "    try:\n        time.sleep(600)\n"
        "    finally:\n        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(600)\n",
    )
    assert run("-c", stubborn + "entry.main(['generate'])", timeout=120).returncode == 130


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_an_interrupted_generation_goes_on_where_it_stopped(missing, monkeypatch, capsys):
    file, folders = missing
    command = ["generate", f"plan={file}", "workers=1"]
    save = Run.save

    def interrupted(*arguments):
        """Send the signal when the first group is ready, instead of waiting for a moment that might not come."""
        save(*arguments)
        os.kill(os.getpid(), signal.SIGINT)

    def ended(code):
        raise SystemExit(code)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(Run, "save", interrupted)
        patch.setattr(os, "_exit", ended)
        main(command)
    message = capsys.readouterr().err
    assert re.search(r"of 4 groups were generated and are kept in .*outputs/runs;", message), message
    (record,) = folders[0].parent.rglob("group.json")
    before = record.stat().st_mtime_ns
    assert main(command) == 0
    assert len(list(folders[0].parent.rglob("group.json"))) == 4 and record.stat().st_mtime_ns == before
    signal.signal(signal.SIGINT, signal.default_int_handler)
