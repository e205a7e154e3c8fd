"""Equal settings are one run with one id, and the circumstances of its making are recorded beside it."""

import shutil

import pytest
import torch
from omegaconf import OmegaConf
from plans import plan_from

from experiments import PROJECT, collect
from experiments.compose import expand
from experiments.configs import build
from experiments.evaluate import evaluate
from experiments.generate import generate, generate_jobs
from experiments.methods.negtome import NegToMe
from experiments.runs import checkpoints
from experiments.runs.identity import config_digest, request, short_digest
from experiments.runs.jobs import prepare_job
from experiments.runs.store import Run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_overrides):
    """A configuration whose run is complete, and the folder of outputs."""
    folder = tmp_path_factory.mktemp("makers")
    (cfg,) = expand(tiny_overrides("sweep", folder, "method=none"))
    generate(plan_from(cfg))
    return cfg, folder / "outputs"


@pytest.fixture
def half(finished, tmp_path):
    """A configuration, and its run folder with one of its two groups."""
    cfg, outputs = finished
    cfg = cfg.copy()
    cfg.outputs = str(shutil.copytree(outputs, tmp_path / "outputs"))
    folder = Run.of(plan_from(cfg).runs[0]).folder
    for name in ("complete", "manifest.jsonl"):
        (folder / name).unlink()
    shutil.rmtree(next(folder.glob("images/*fruit/*")))
    return cfg, folder


def pngs(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.glob("images/**/*.png"))}


def test_a_run_of_another_version_of_the_method_is_another_run(finished, tiny_overrides, tmp_path, monkeypatch):
    none, outputs = finished
    none = none.copy()
    none.outputs = str(shutil.copytree(outputs, tmp_path / "outputs"))
    cfg = none.copy()
    cfg.method = expand(tiny_overrides("sweep", tmp_path, "method=negtome"))[0].method
    before = Run(generate(plan_from(none, cfg))[1])
    assert before.identity["code"] == NegToMe.version and Run.of(plan_from(none, cfg).runs[1]) == before
    monkeypatch.setattr(NegToMe, "version", NegToMe.version + 1)
    with pytest.raises(FileNotFoundError, match="method=negtome"):
        Run.of(plan_from(none, cfg).runs[1])
    after = Run(generate(plan_from(none, cfg))[1])
    assert after != before and pngs(after.folder) == pngs(before.folder)
    assert Run.of(plan_from(none, cfg).runs[1]) == after
    assert Run.of(plan_from(none).runs[0]).identity["code"] is None


def test_a_run_that_is_named_twice_is_one(finished, caplog):
    caplog.set_level("INFO", "experiments")
    plan = plan_from(finished[0])
    job = prepare_job(plan.runs[0], checkpoints.find_checkpoint(plan.cfg.model))
    generate_jobs(plan, [job, job])
    assert len(caplog.records) == 1


def test_the_cpu_is_recorded_and_a_lost_environment_is_not_invented(finished, half):
    run = Run.of(plan_from(finished[0]).runs[0])
    assert run.environment["cpu"] == torch.backends.cpu.get_cpu_capability()
    assert "cpu" not in run.identity["machine"], "ids stay"
    cfg, folder = half
    (folder / "environment.json").unlink()
    left = next(folder.glob("images/*")) / ".000000.abc"
    left.mkdir()  # by a killed process
    generate(plan_from(cfg))
    assert not left.exists() and not (folder / "environment.json").exists()
    plan = plan_from(cfg)
    evaluate(plan)
    table, problems = collect.collect(cfg.outputs)
    assert problems.empty and set(table["commit"]) == set(table["cpu"]) == {"unknown"}
    for text, message in (
        ("{", "expected JSON in"),
        ("1", "made in"),
        ("[]", "made in"),
        ('{"commit": "c"}', "made in"),
    ):
        (folder / "environment.json").write_text(text)
        with pytest.raises(ValueError, match=f"{message} {folder}/environment.json"):
            _ = Run(folder).environment


#: Changes that mean the same, two each.
EQUAL = [
    ({"model.call.guidance_scale": 4}, {"model.call.guidance_scale": 4.0}),
    ({"model.call.height": 64, "model.call.width": 64.0}, {"model.call.height": 64.0, "model.call.width": 64}),
    ({"model.call.sigmas": [1, 0.5]}, {"model.call.sigmas": [1.0, 0.5]}),
    ({"model.dtype": "float"}, {"model.dtype": "float32"}),
    ({"model.dtype": "half"}, {"model.dtype": "float16"}),
    ({"model.source": "models/mini-sdxl"}, {"model.source": "./models/mini-sdxl"}),
    ({"model.source": "models/mini-sdxl"}, {"model.source": f"{PROJECT}/models/../models/mini-sdxl/"}),
    ({"method.alpha": 1}, {"method.alpha": 1.0}),
    ({"method.threshold": 0}, {"method.threshold": 0.0}),
    ({"method.timestep_range": [0, 9]}, {"method.timestep_range": [0.0, 9]}),
]


def test_equal_settings_are_one_run(tiny_overrides, tmp_path):
    (composed,) = expand(tiny_overrides("sweep", tmp_path, "method=negtome"))
    composed, ids = OmegaConf.create(OmegaConf.to_container(composed, resolve=True)), []
    for pair in EQUAL:
        for changes in pair:
            cfg = composed.copy()
            for key, value in changes.items():
                OmegaConf.update(cfg, key, value)
            ids.append(short_digest(request(cfg, build(cfg.method))))
    assert ids[::2] == ids[1::2]
    assert len(set(ids)) == len(EQUAL) - 1, "two pairs are of the same source"


def test_the_committed_spelling_keeps_its_ids(with_model):
    """The part that does not depend on weights, machine and code: the committed tables name runs by them."""
    expected = {"mini-sdxl": "39a2f016abd0", "mini-flux": "935eea36476a", "flux-dev": "8fb4e80a8262"}
    configs = {name: with_model(name) for name in expected}
    assert {name: short_digest(request(cfg, build(cfg.method))) for name, cfg in configs.items()} == expected


def test_an_absent_step_range_is_in_no_digest(tiny_overrides, tmp_path):
    (composed,) = expand(tiny_overrides("sweep", tmp_path, "method=negtome"))
    cfg = OmegaConf.create(OmegaConf.to_container(composed, resolve=True))
    before = config_digest(cfg), request(cfg, build(cfg.method))
    del cfg.method.step_range
    assert (config_digest(cfg), request(cfg, build(cfg.method))) == before
    cfg.method.step_range, cfg.method.timestep_range = [0, 0], None
    assert config_digest(cfg) != before[0] and request(cfg, build(cfg.method)) != before[1]


def test_numbers_that_mean_the_same_make_the_same_images(finished, tmp_path):
    cfg, _ = finished
    before = Run.of(plan_from(cfg).runs[0])
    other = cfg.copy()
    other.outputs = str(tmp_path)
    other.model.call.guidance_scale, other.model.call.height, other.model.dtype = 5, 32.0, "float"
    (folder,) = generate(plan_from(other))
    assert pngs(folder) == pngs(before.folder) and folder.name == before.id


def test_a_digest_is_of_the_content_of_folders_without_their_cards(with_model, tmp_path):
    def digest():
        cfg = OmegaConf.create(OmegaConf.to_container(with_model("mini-sdxl"), resolve=True))
        cfg.method.folder = str(tmp_path)
        return config_digest(cfg)

    (tmp_path / "weights.bin").write_bytes(b"1")
    before = digest()
    (tmp_path / "README.md").write_text("a card")
    assert digest() == before
    (tmp_path / "weights.bin").write_bytes(b"2")
    assert digest() != before
