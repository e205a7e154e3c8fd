"""The one entry of all commands: help without waiting, one line for what is wrong, Ctrl-C that keeps what is done."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import Future

import pytest

from experiments import PROJECT
from experiments.__main__ import COMMANDS, main
from experiments.configs import run_names
from experiments.generate import _generate_each
from experiments.plan import Plan, expand, launch, launched_run
from experiments.runs.checkpoints import find_checkpoint
from experiments.runs.store import Run

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
    ("arguments", "said"),
    [
        (["generat"], ["generat", "generate"]),
        (["generate", "model=mini-sdx"], ["model=mini-sdx", "flux-dev", "did you mean mini-sdxl?"]),
        (["generate", "experiment=diversty"], ["did you mean diversity?"]),
        (["generate", "expriment=diversity"], ["expriment", "did you mean experiment?"]),
        (["generate", "--model", "sdxl"], ["use model=sdxl, without dashes"]),
        (["tabulate", "--model=sdxl"], ["use model=sdxl, without dashes"]),
        (["doctor", "--experiment=diversity", "--fetch"], ["use experiment=diversity, without dashes"]),
        (["evaluate", "model.call.heigth=12"], ["model.call.heigth", "did you mean model.call.height?"]),
        (["tabulate", "method.alpha=0.3"], ["method.alpha: expected a key"]),
        (["plot", "-m", "alpha"], ["override 'alpha'", "missing EQUAL"]),
        (["generate", "device=null"], ["device=None", "auto"]),
        (["generate", "model=mini-sdxl", "model.architecture=dit"], ["must be one of ['auraflow', ", "got 'dit'"]),
        (["generate", "model=mini-sdxl", "model.call.guidance_scale=high"], ["must be a number, got 'high'"]),
        (["latency", "experiment=latency", "latency.cases=no"], ["latency.cases must be true or false, got 'no'"]),
        (["latency", "experiment=latency", "latency.only=5"], ["latency.only must name cases", "got 5"]),
        (["generate", "device=cuda:77"], ["cuda:77", "auto"]),
        (["generate", "model=mini-sdxl", "workers=0"], ["workers must be auto", "got 0"]),
        (["evaluate", "model=sdxl", "model.scorer.weights=/x"], ["did you mean model.scorer.weights_dir?"]),
        (["generate", "model=mini-sdxl", "method=negtome", "scorer@method.encodr=sscd"], ["encodr"]),
        (["doctor", "expriment=diversity"], ["expriment", "did you mean experiment?"]),
        (["generate", "experiment=safety", "guard=chat"], ["guard.model has no value: give guard.model=VALUE"]),
        (["compare", "experiment=diversity"], ["expected one of", "got compare"]),
        (["doctor", "now", "here"], ["one name", "now here"]),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(arguments, said, capsys, monkeypatch):
    monkeypatch.delenv("NEGTOME_TRACEBACK", raising=False)
    assert main(arguments) == 2
    out = capsys.readouterr()
    assert len(out.err.splitlines()) == 1 and all(text in out.err for text in said), out.err


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
    monkeypatch.setattr("experiments.generate.launch", lambda _, plan: sent.append(plan))
    asked = tiny_overrides("sweep", tmp_path, "method=none", "device=cuda:77", "launcher=joblib")
    assert main(["generate", *asked]) == 0 and [plan.cfg.device for plan in sent] == ["cuda:77"]
    assert not (tmp_path / "outputs" / "runs").exists(), "no folder of a run that this machine would make"
    assert main(["generate", *asked, "prompts.categories=bird"]) == 2 and len(sent) == 1
    assert "must be a list" in capsys.readouterr().err


def failing(cfg):
    plan, spec = launched_run(cfg)
    raise ValueError(f"no {plan.name} of {spec.label}")


def test_the_error_of_a_launched_job_is_raised_here(tmp_path, monkeypatch):
    """And not printed by Hydra with its traceback: it becomes one line as any other."""
    monkeypatch.setattr(sys, "argv", ["generate"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    plan = Plan.make(["-m", "experiment=diversity", "model=mini-sdxl", "method=none", f"outputs={tmp_path}"])
    plan.launcher = ("hydra/job_logging=none", "hydra/hydra_logging=none")
    with pytest.raises(ValueError, match="no diversity of mini-sdxl none"):
        launch(failing, plan)


def test_processes_that_generate_never_hear_ctrl_c(monkeypatch):
    """Not while they import, either: they are started so, and this process listens again."""
    heard, before = [], signal.getsignal(signal.SIGINT)
    todo = [(None, "a"), (None, "b")]

    class Executor:
        def submit(self, *_):
            heard.append(signal.getsignal(signal.SIGINT))
            future = Future()
            future.set_result(True)
            return future

    monkeypatch.setattr("experiments.generate._executor", lambda _: Executor())
    assert set(_generate_each(todo, True, 2)) == set(todo)
    assert heard == [signal.SIG_IGN] * 2 and signal.getsignal(signal.SIGINT) is before


def test_processes_are_given_all_runs_at_once_and_each_ends_with_its_last_group(tiny_overrides, tmp_path, monkeypatch):
    """A process that has no group of a run left goes on with the next run's."""
    asked = tiny_overrides("sweep", tmp_path, "method=none,negtome", "workers=2")
    ids = [Run.plan(cfg, find_checkpoint(cfg.model).fingerprint, "cpu")[0].id for cfg in expand(asked)]
    seen, finish = [], Run.finish

    class Executor(Future):
        """Makes what it is given here, when its result is asked for."""

        def submit(self, make, task, *rest):
            seen.append(("given", task.run.id))
            future = Executor()
            future.result = lambda: seen.append(("made", task.run.id)) or make(task, *rest)
            return future

    monkeypatch.setattr("experiments.generate._executor", lambda _: Executor())
    monkeypatch.setattr("experiments.generate.as_completed", iter)
    monkeypatch.setattr(Run, "finish", lambda run, groups: seen.append(("finished", run.id)) or finish(run, groups))
    assert main(["generate", *asked]) == 0
    given = [("given", run) for run in ids for _ in range(2)]
    assert seen == given + [(what, run) for run in ids for what in ("made", "made", "finished")]


def test_runs_are_named_by_what_differs():
    names = run_names(expand(["method=none,negtome", "model=mini-sdxl", "method.alpha=0.3,0.9"]))
    assert names == ["mini-sdxl none", "mini-sdxl negtome, alpha 0.3", "mini-sdxl negtome, alpha 0.9"]


def test_a_repeated_command_says_one_line_a_run(tiny_overrides, tmp_path, caplog):
    caplog.set_level("INFO", "experiments")
    asked = tiny_overrides("sweep", tmp_path, "method=none,negtome")
    for command in ("generate", "evaluate"):
        assert main([command, *asked]) == 0
        caplog.clear()
        assert main([command, *asked]) == 0
        assert len(caplog.records) == 2, [record.getMessage() for record in caplog.records]
        caplog.clear()


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
def test_an_interrupted_generation_goes_on_where_it_stopped(tiny_overrides, tmp_path, monkeypatch, capsys):
    asked = tiny_overrides("sweep", tmp_path, "method=none", "prompts.categories=[flower,fruit,horse]", "workers=1")
    save = Run.save

    def interrupted(*arguments):
        """The first group that is ready sends the signal: no waiting for a moment that might not come."""
        save(*arguments)
        os.kill(os.getpid(), signal.SIGINT)

    def ended(code):
        raise SystemExit(code)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(Run, "save", interrupted)
        patch.setattr(os, "_exit", ended)
        main(["generate", *asked])
    said = capsys.readouterr().err
    assert re.search(r"of 3 groups were generated and are kept in .*outputs/runs;", said), said
    kept = list((tmp_path / "outputs").rglob("group.json"))
    assert len(kept) == 1
    before = kept[0].stat().st_mtime_ns
    assert main(["generate", *asked]) == 0
    assert len(list((tmp_path / "outputs").rglob("group.json"))) == 3 and kept[0].stat().st_mtime_ns == before
    signal.signal(signal.SIGINT, signal.default_int_handler)
