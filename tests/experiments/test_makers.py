"""One setting, one id: what is equal is one run, and by what and when it was made is recorded beside it."""

import shutil

import pytest
import torch
from plans import plan_from

from experiments import PROJECT, collect
from experiments.evaluate import evaluate
from experiments.generate import generate, generate_jobs, prepare_job
from experiments.methods.negtome import NegToMe
from experiments.plan import expand
from experiments.runs import checkpoints
from experiments.runs.identity import request, short_digest
from experiments.runs.store import Run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_overrides):
    folder = tmp_path_factory.mktemp("makers")
    (cfg,) = expand(tiny_overrides("sweep", folder, "method=none"))
    generate(plan_from(cfg))
    return cfg, folder / "outputs"


@pytest.fixture
def half(finished, tmp_path):
    """A configuration, and its run folder with one of its two groups."""
    cfg, outputs = finished
    shutil.copytree(outputs, tmp_path / "outputs")
    cfg = cfg.copy()
    cfg.outputs = str(tmp_path / "outputs")
    folder = Run.of(plan_from(cfg).runs[0]).folder
    for name in ("complete", "manifest.jsonl"):
        (folder / name).unlink()
    shutil.rmtree(next(folder.glob("images/*fruit/*")))
    return cfg, folder


def pngs(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.glob("images/**/*.png"))}


def test_the_kind_of_cpu_is_recorded_and_in_no_id(finished):
    run = Run.of(plan_from(finished[0]).runs[0])
    assert run.environment["cpu"] == torch.backends.cpu.get_cpu_capability()
    assert "cpu" not in run.identity["machine"], "ids stay"


def test_a_run_of_another_version_of_the_method_is_not_taken_for_it(finished, tiny_overrides, tmp_path, monkeypatch):
    none, outputs = finished
    none = none.copy()
    none.outputs = str(shutil.copytree(outputs, tmp_path / "outputs"))
    cfg = none.copy()
    cfg.method = expand(tiny_overrides("sweep", tmp_path, "method=negtome"))[0].method

    def find():
        return Run.of(plan_from(none, cfg).runs[1])

    before = Run(generate(plan_from(none, cfg))[1])
    assert before.identity["code"] == NegToMe.version and find() == before
    monkeypatch.setattr(NegToMe, "version", NegToMe.version + 1)
    with pytest.raises(FileNotFoundError, match="method=negtome"):
        find()
    after = Run(generate(plan_from(none, cfg))[1])
    assert after != before and pngs(after.folder) == pngs(before.folder) and find() == after
    assert Run.of(plan_from(none).runs[0]).identity["code"] is None


def test_a_run_that_is_named_twice_is_one(finished, caplog):
    caplog.set_level("INFO", "experiments")
    plan = plan_from(finished[0])
    job = prepare_job(plan.runs[0], checkpoints.find_checkpoint(plan.cfg.model))
    generate_jobs(plan, [job, job])
    assert len(caplog.records) == 1


def test_a_lost_environment_is_not_made_up(half):
    cfg, folder = half
    (folder / "environment.json").unlink()
    plan = plan_from(cfg)
    generate(plan)
    assert not (folder / "environment.json").exists()
    assert Run.of(plan.runs[0]).environment["commit"] == "unknown"
    evaluate(plan)
    table, problems = collect.collect(cfg.outputs)
    assert problems.empty and set(table["commit"]) == set(table["cpu"]) == {"unknown"}
    (folder / "environment.json").write_text("{")
    with pytest.raises(ValueError, match=f"expected JSON in {folder}/environment.json"):
        _ = Run(folder).environment
    for other in ("1", "[]", '{"commit": "c"}'):
        (folder / "environment.json").write_text(other)
        with pytest.raises(ValueError, match=f"made in {folder}/environment.json, got other JSON"):
            _ = Run(folder).environment


def test_what_a_killed_process_left_of_a_group_is_swept_once_all_are_there(half):
    cfg, folder = half
    left = next(folder.glob("images/*")) / ".000000.abc"
    left.mkdir()
    run, identity = Run.plan(cfg, checkpoints.find_checkpoint(cfg.model).fingerprint, "cpu")
    run.begin(identity, "cpu")
    assert left.exists(), "it may be another process's"
    generate(plan_from(cfg))
    assert not left.exists()


# --- equal settings ---------------------------------------------------------------------------------------------------

EQUAL = [
    ("guidance_scale", ["model.call.guidance_scale=5"], ["model.call.guidance_scale=5.0"]),
    ("side", ["model.call.height=64", "model.call.width=64.0"], ["model.call.height=64.0", "model.call.width=64"]),
    ("list", ["+model.call.sigmas=[1, 0.5]"], ["+model.call.sigmas=[1.0, 0.5]"]),
    ("dtype", ["model.dtype=float"], ["model.dtype=float32"]),
    ("half", ["model.dtype=half"], ["model.dtype=float16"]),
    ("source", ["model.source=models/mini-sdxl"], ["model.source=./models/mini-sdxl"]),
    ("absolute", ["model.source=models/mini-sdxl"], [f"model.source={PROJECT}/models/../models/mini-sdxl/"]),
    ("alpha", ["method=negtome", "method.alpha=1"], ["method=negtome", "method.alpha=1.0"]),
    ("threshold", ["method=negtome", "method.threshold=0"], ["method=negtome", "method.threshold=0.0"]),
    ("window", ["method=negtome", "method.timestep_range=[0,9]"], ["method=negtome", "method.timestep_range=[0.0,9]"]),
]


@pytest.mark.parametrize(("ours", "theirs"), [two for _, *two in EQUAL], ids=[name for name, *_ in EQUAL])
def test_what_means_the_same_is_one_run(ours, theirs, tiny_overrides, tmp_path):
    ids = set()
    for changes in (ours, theirs):
        method = [] if any(change.startswith("method=") for change in changes) else ["method=none"]
        (cfg,) = expand(tiny_overrides("sweep", tmp_path, *method, *changes))
        ids.add(short_digest(request(cfg)))
    assert len(ids) == 1


def test_the_committed_spelling_keeps_its_ids():
    """As far as they do not depend on weights, machine and code: the committed tables name runs by them."""
    configs = expand(["experiment=diversity", "model=mini-sdxl,mini-flux,flux-dev", "method=none"])
    assert {cfg.model.name: short_digest(request(cfg)) for cfg in configs} == {
        "mini-sdxl": "abc876671e10", "mini-flux": "73617d507637", "flux-dev": "875f905ae089",
    }  # fmt: skip


def test_numbers_that_mean_the_same_make_the_same_images(finished, tmp_path):
    cfg, _ = finished
    before = Run.of(plan_from(cfg).runs[0])
    other = cfg.copy()
    other.outputs = str(tmp_path)
    other.model.call.guidance_scale, other.model.call.height, other.model.dtype = 5, 32.0, "float"
    (folder,) = generate(plan_from(other))
    assert pngs(folder) == pngs(before.folder) and folder.name == before.id


def test_an_unknown_dtype_is_refused_before_anything_else(finished):
    cfg = finished[0].copy()
    cfg.model.dtype = "float31"
    with pytest.raises(ValueError, match=r"model\.dtype must name a torch dtype"):
        request(cfg)
    assert checkpoints.canonical_source("SG161222/RealVisXL_V4.0") == "SG161222/RealVisXL_V4.0"
