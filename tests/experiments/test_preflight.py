"""Faults that would stop an experiment after hours are listed before its first image, with overrides that work."""

import re
import shlex
import shutil
import warnings
from collections import namedtuple

import pytest
import torch
from omegaconf import OmegaConf
from plans import plan_of

from eval.encoders import Network
from eval.imageset import ImageSet
from experiments import PROJECT, generate
from experiments.__main__ import main
from experiments.compose import expand
from experiments.configs import build
from experiments.runs import checkpoints, metrics, preflight
from experiments.runs.store import Run


def slow(*values):
    """Mark values of a parameter, or tuples of several, as slow."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow) for value in values
    ]


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    """A machine without any weights but those of the checkout, and without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("eval.encoders._failed", {})
    monkeypatch.setattr("eval.weights.network_failure", lambda _: "the network is off")
    return tmp_path


def entries(text):
    """Return the entries of a printed list, each as its lines."""
    blocks = re.split(r"(?m)^ *\d+\. ", text)[1:]
    return [[line.strip() for line in block.splitlines()] for block in blocks]


def notes(block):
    parts = (line.partition(":") for line in block)
    return {label: text.strip() for label, _, text in parts if label in ("needed by", "elsewhere", "without it")}


def test_a_real_checkpoint_on_an_empty_machine_is_one_list_and_no_image(empty_home, capsys):
    """The overrides that it names compose; with them the fault is gone, or the weights are looked for elsewhere."""
    overrides = ["experiment=diversity", "model=sdxl", "method=none", f"outputs={empty_home / 'outputs'}"]
    codes = [main([command, *overrides]) for command in ("reproduce", "generate", "doctor")]
    assert codes == [2, 2, 1]
    assert not (empty_home / "outputs").exists()
    out, err = capsys.readouterr()
    measured = sorted(metrics.measured(expand(overrides)[0]))
    for text in (err.partition("reproduce: ")[2].partition("generate: ")[0], out):
        blocks = entries(text)
        assert "SG161222/RealVisXL_V4.0" in blocks[0][0]
        needed = [name for block in blocks for name in notes(block).get("needed by", "").split(", ") if name]
        assert sorted(needed) == measured, "every metric once, whatever else is missing"
    assert err.count("No image can be made without the weights of model=sdxl") == 2 and "metric=none" not in err
    assert "fid" in out.splitlines()[0]
    assert "pairwise_distance_aligned" in notes(blocks[1])["without it"], "nothing else can test the hypothesis"
    for block in blocks[2:3]:  # every one composes anew
        note = notes(block)
        (cfg,) = configs = expand([*overrides, *shlex.split(note["without it"])])
        assert not {*note["needed by"].split(", ")} & {*cfg.metric}
        metrics.check_table(cfg)
        assert not [fault for fault in preflight.of_scoring(configs, True) if fault.problem in block[0]]
        key, _, _ = note["elsewhere"].partition("=")
        elsewhere = expand([*overrides, f"{key}={empty_home / 'mine'}"])
        problems = [fault.problem for fault in preflight.of_scoring(elsewhere, True)]
        assert block[0] not in problems and any(str(empty_home / "mine") in problem for problem in problems)


@pytest.mark.slow
def test_metric_none_generates_what_cannot_be_scored_here(tiny_overrides, empty_home, capsys):
    overrides = [one for one in tiny_overrides("diversity", empty_home, "method=none") if "metric" not in one]
    overrides = [one for one in overrides if not one.startswith(("scorer@", "primary."))]
    assert main(["generate", *overrides]) == 2
    err = capsys.readouterr().err
    assert not list((empty_home / "outputs").rglob("*.png")) and "DreamSim" in err and "metric=none" in err
    assert main(["generate", *overrides, "metric=none"]) == 0
    run = Run.of(plan_of(overrides).runs[0])
    assert run.complete, "evaluate finds it with the overrides of the scores"
    # What can be scored is scored, and the rest is listed once at the end.
    few = [*overrides, "+metric.by_pixels={_target_: eval.diversity.PairwiseDistance, "
           "encoder: {_target_: eval.encoders.PixelEncoder}}"]  # fmt: skip
    capsys.readouterr()
    assert main(["evaluate", *few]) == 1
    err = capsys.readouterr().err
    assert [path.name for path in run.folder.glob("metrics/*")] == ["by_pixels-pixels-8x8.json"]
    listed = err[err.index("evaluate: ") :]
    assert sum("DreamSim" in line for line in listed.splitlines()) == 1 and "~metric.lpips_vgg" in listed


def test_too_few_images_for_metrics_are_all_named_before_the_first(tmp_path, capsys):
    overrides = ["experiment=diversity", "model=mini-sdxl", "method=none", f"outputs={tmp_path / 'outputs'}",
                 "prompts.categories=[bird,fish]", "model.groups_per_category=1"]  # fmt: skip
    assert main(["reproduce", *overrides]) == 2
    blocks = entries(capsys.readouterr().err)
    assert {notes(block)["needed by"] for block in blocks} == {
        "frechet_distance_40_efflite0", "gender_entropy", "skin_tone_entropy",
    }  # fmt: skip
    assert not list(tmp_path.rglob("*.png"))
    dropped = [*overrides, *(override for block in blocks for override in shlex.split(notes(block)["without it"]))]
    assert preflight.examine(plan_of(dropped), tables=True)[1] == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=diversity", "method=none,negtome"],
        *slow(["experiment=copyright", "method=none"], ["experiment=diversity"]),
        *slow(*([f"experiment={name}"] for name in ("copyright", "peers_grid", "safety", "stereotypes", "sweep"))),
    ],
)
def test_the_default_path_has_no_faults_and_loads_no_network(overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(Network, "prepare", lambda self: pytest.fail(f"{self.name} is loaded"))
    configs = expand([*overrides, f"outputs={tmp_path}"], baselines=True)
    assert preflight.of_scoring(configs, tables=True) == []
    for cfg in configs[:2]:
        folder = checkpoints.find_checkpoint(cfg.model).folder
        assert preflight.of_timesteps(cfg.model, folder, cfg.method.name, [900, 1000]) == []


def test_a_baseline_that_is_still_to_be_made_is_no_fault_and_its_encoders_weights_are(tmp_path):
    overrides = ["experiment=copyright", "model=mini-sdxl", f"outputs={tmp_path}", "method=none"]
    broken = [*overrides, f"model.copyright.encoder.folder={tmp_path / 'nowhere'}"]
    (fault,) = preflight.of_scoring(expand(broken), tables=True)
    assert "change_benign" in fault.needed_by and fault.elsewhere == "model.copyright.encoder.folder=FOLDER"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("model.copyright.scoring={}/absent", "absent, which does not exist"),
        ("model.copyright.held_out={}/few", "at least 19 negatives"),
        ("bootstrap.level=0.9", "bootstrap.level=0.95"),
        ("primary.quality=kernel_distance", "that can be tested"),
    ],
)
def test_what_is_compared_with_is_looked_at_too(change, text, tmp_path):
    few = tmp_path / "few" / "things"
    few.mkdir(parents=True)
    for file in sorted((PROJECT / "models" / "mini-protected" / "held_out").glob("*/*.png"))[:3]:
        shutil.copy(file, few)
    configs = expand(["experiment=copyright", "model=mini-sdxl", "method=none", change.format(tmp_path)])
    assert any(text in fault.problem for fault in preflight.of_scoring(configs, tables=True))


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_the_steps_are_those_of_the_pipelines_call(kind, pipe, tiny_checkpoint):
    side = 32 if kind == "sdxl" else 16
    call = {"height": side, "width": side, "num_inference_steps": 5}
    model = OmegaConf.create({"name": kind, "architecture": kind, "call": call})
    extra = {} if kind == "sdxl" else {"max_sequence_length": 32}
    pipe("a bird", **call, **extra, output_type="latent")
    assert checkpoints.timesteps(model, tiny_checkpoint(kind)) == pytest.approx(pipe.scheduler.timesteps.tolist())


def test_a_range_without_a_step_is_found_before_the_baseline_is_made(tiny_overrides, tmp_path, capsys):
    overrides = tiny_overrides("sweep", tmp_path, "method=none,negtome", "method.timestep_range=[995,1000]")
    assert main(["generate", *overrides]) == 2
    (block,) = entries(capsys.readouterr().err)
    assert "timestep_range=[995,1000]" in block[0]
    assert not list((tmp_path / "outputs").rglob("*.png"))
    assert main(["generate", *overrides, notes(block)["without it"]]) == 0


def test_a_step_range_without_a_step_is_a_fault_of_any_architecture():
    model = OmegaConf.create({"name": "any", "call": {"num_inference_steps": 4}})
    for step_range in ((0, 0), (3, 9), (0.75, 0.8)):
        assert preflight.of_step_range(model, "negtome", step_range) == []
    for step_range in ((4, 4), (0.1, 0.2)):
        (fault,) = preflight.of_step_range(model, "negtome", step_range)
        assert "a call has 4 steps, from 0 to 3; widen method.step_range" in fault.problem
    model.call.sigmas = [1.0, 0.5]
    assert preflight.of_step_range(model, "negtome", (4, 4)) == [], "the call says how many steps there are"


def test_a_disk_that_is_too_small_is_found_and_what_is_there_counts_nothing(
    tiny_overrides, tmp_path, monkeypatch, capsys
):
    overrides = tiny_overrides("sweep", tmp_path, "method=none,negtome", "workers=1")
    assert main(["generate", *overrides]) == 0
    shutil.rmtree(next((tmp_path / "outputs" / "runs").glob("[0-9a-f]*")))
    usage = namedtuple("usage", "total used free")
    one_image = 2 * 32 * 32
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 4 * one_image - 1))
    assert main(["generate", *overrides]) == 2
    assert "4 images need" in capsys.readouterr().err, "2 prompts of 2 images of the run that is gone, and no other"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 4 * one_image))
    assert main(["generate", *overrides]) == 0


def test_missing_files_are_fetched_on_request_or_before_the_first_image(empty_home, monkeypatch, tiny_overrides):
    overrides = tiny_overrides("sweep", empty_home, "method=none")
    overrides += ["+metric.lpips={_target_: eval.perceptual.LpipsDistance, net: squeeze}"]
    fetched = []

    def download(url, path):
        from torchvision.models import squeezenet1_1

        fetched.append(url)
        torch.save(squeezenet1_1(weights=None).state_dict(), path)

    monkeypatch.setattr("eval.weights.published_hash", lambda *_: "")
    monkeypatch.setattr("eval.weights.network_failure", lambda _: None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert main(["doctor", *overrides]) == 1 and not fetched
    assert main(["doctor", *overrides, "--fetch"]) == 0 and len(fetched) == 1
    assert main(["doctor", *overrides]) == 0 and not (empty_home / "outputs").exists()
    shutil.rmtree(empty_home / "torch")
    assert main(["generate", *overrides]) == 0 and len(fetched) == 2
    assert (empty_home / "outputs").exists() and main(["evaluate", *overrides]) == 0 and len(fetched) == 2


@pytest.mark.parametrize("suite", ["full", *slow("preference", "released", "copyright", "stereotypes")])
def test_every_network_of_a_suite_takes_its_place_from_a_declared_key(suite):
    pictures = [f"model.{key}=anywhere" for key in ("reference_images", "copyright.scoring", "copyright.held_out")]
    (cfg,) = expand(["model=sdxl", f"metric={suite}", "method=none", *pictures])
    for name in metrics.measured(cfg):
        scorer = metrics.build_metric(cfg, name).encoder
        key = metrics.place_of_weights(cfg, name, scorer).partition("=")[0]
        assert bool(key) == any(getattr(part, "PLACE", "") for part in scorer.parts()), name
        assert not key or OmegaConf.select(cfg, key, default="absent") != "absent", key


def test_an_autoencoder_that_needs_float32_is_upcast_without_a_word(tiny_checkpoint, tmp_path, caplog):
    folder = shutil.copytree(tiny_checkpoint("sdxl"), tmp_path / "sdxl")
    (cfg,) = expand(
        ["model=sdxl", "method=none", f"model.source={folder}", "model.call.height=32", "model.call.width=32"]
    )
    assert cfg.model.dtype == "float16"
    pipe = checkpoints.load(cfg.model, checkpoints.find_checkpoint(cfg.model), "cpu")
    assert pipe.vae.config.force_upcast and pipe.vae.dtype == torch.float16
    caplog.clear()
    with warnings.catch_warnings(record=True) as recorded:
        pipe("a bird", height=32, width=32, num_inference_steps=1, output_type="np")
    assert [str(one.message) for one in recorded] == [] and not caplog.records


def test_planned_images_are_those_that_are_made(tiny_overrides, tmp_path):
    plan = plan_of(tiny_overrides("sweep", tmp_path, "method=none"))
    (folder,) = generate.generate(plan)
    made, planned = ImageSet.open(folder), preflight._planned(build(plan.cfg.prompts).groups())
    assert made.groups == planned.groups and made.texts == planned.texts
    for mine, theirs in zip(made.rows, planned.rows, strict=True):
        assert (mine.prompt_id, mine.category, mine.seed) == (theirs.prompt_id, theirs.category, theirs.seed)


def test_weights_that_a_method_itself_needs_are_found_and_its_baseline_needs_none(empty_home):
    overrides = ["experiment=diversity", "model=mini-sdxl", "method=best_of", f"outputs={empty_home / 'outputs'}"]
    plan = plan_of([*overrides, "scorer@method.encoder=sscd"])
    assert [spec.cfg.method.name for spec in plan.runs] == ["none", "best_of"]
    jobs, (fault,) = preflight.examine(plan, tables=True)
    assert [job.spec.cfg.method.name for job in jobs] == ["none"]
    assert "SSCD" in fault.problem and fault.fetch and fault.without == "method=none"


def test_the_output_check_of_the_safety_experiment_is_independent_of_its_evaluator():
    faults = faults_of_check()
    assert not faults, faults[0].problem


@pytest.mark.parametrize(
    ("override", "shared"),
    [
        ("method.check.encoder=${model.copyright.encoder}", "the encoder mini-clip"),
        *slow(
            ("method.check.held_out=${model.copyright.held_out}", "held-out images"),
            ("metric.not_unsafe.references=${model.copyright.guidance}", "reference images"),
        ),
    ],
)
def test_a_check_that_shares_something_with_its_evaluator_is_refused(override, shared):
    (fault, *_) = faults_of_check(override)
    assert shared in fault.problem and "not_unsafe" in fault.needed_by
    assert not faults_of_check(override, "method.layers=steer")  # where nothing is checked


def faults_of_check(*overrides):
    experiment = ["experiment=safety", "guard=keyword", "method.layers=check"]
    (spec,) = plan_of([*experiment, *overrides], "guarded").runs
    return preflight._of_check(spec.cfg, build(spec.cfg.method))
