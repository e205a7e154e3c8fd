"""A negative control edits the images that the baseline's run has, group by group, and is a run as any other."""

import numpy as np
import pytest
import torch
from plans import plan_of

from eval.controls import CONTROLS
from eval.images import load_image
from experiments.configs import build
from experiments.generate import generate
from experiments.methods.edited import EditedBaseline
from experiments.runs import checkpoints
from experiments.runs.jobs import prepare_job
from experiments.runs.locks import locked
from experiments.runs.store import Run
from experiments.runs.workers import _generate_group, load_pipeline_and_method


@pytest.fixture
def overrides(tiny_overrides):
    """Overrides of a baseline and of controls in a folder; these have no settings of NegToMe."""

    def of(folder, methods):
        every = tiny_overrides("diversity", folder, f"method={methods}", "workers=1", "prompts.categories=[bird,fish]")
        return [text for text in every if not text.startswith("method.")]

    return of


def groups_of(plan, number):
    """Return the groups of a plan's run, each with its images."""
    run = Run.of(plan.runs[number])
    return {group: [load_image(path) for path in run.images(group)] for group in build(plan.cfg.prompts).groups()}


def forbid_pipelines(monkeypatch):
    monkeypatch.setattr("experiments.runs.workers._pipeline", lambda *a: pytest.fail("loaded a pipeline"))


@pytest.mark.parametrize("names", [["noisy"], pytest.param([*CONTROLS], marks=pytest.mark.slow)])
def test_controls_are_edits_of_the_baselines_images_and_load_no_pipeline(tmp_path, overrides, monkeypatch, names):
    plan = plan_of(overrides(tmp_path, ",".join(["none", *(f"control_{name}" for name in names)])))
    generate(plan_of(overrides(tmp_path, "none")))
    forbid_pipelines(monkeypatch)
    generate(plan)
    for number, edit in enumerate((CONTROLS[name] for name in names), 1):
        baseline, edited = groups_of(plan, 0), groups_of(plan, number)
        for group, images in baseline.items():
            for index, image in enumerate(images):
                assert torch.equal(edited[group][index], edit(image, index, group.image_seeds()[index]))


def test_noise_differs_between_groups_and_images():
    plain = [torch.full((3, 8, 8), 128, dtype=torch.uint8)] * 2
    groups = build(plan_of(["prompts.categories=[bird,fish]", "model.groups_per_category=1"]).cfg.prompts).groups()
    control = EditedBaseline("c", "noisy")
    noises = [image for group in groups for image in control.edit_images(_pair(group), plain)]
    assert len({image.numpy().tobytes() for image in noises}) == 4


def _pair(group):
    return type(group)(group.prompt_id, group.prompt, group.category, group.seed, 2)


def test_without_the_baselines_run_the_same_images_are_generated(tmp_path, overrides):
    """The control's task makes the baseline's missing group; the method alone makes equal images."""
    plan = plan_of(overrides(tmp_path, "control_mirrored"))
    (control,) = [spec for spec in plan.runs if spec.cfg.method.name != "none"]
    job = prepare_job(control, checkpoints.find_checkpoint(control.cfg.model))
    group = job.groups[0]
    assert _generate_group(job.task, group, wait=False) and job.task.edits.run.has(group)
    files = [load_image(path) for path in job.task.run.images(group)]
    pipe, method, call = load_pipeline_and_method(job.task.model, job.task.method, job.task.checkpoint, job.task.device)
    alone = method.generate(pipe, group, call).images
    assert np.array_equal(np.round(255 * alone), torch.stack(files).permute(0, 2, 3, 1).numpy())


def test_a_group_that_another_process_generates_is_left_for_later(tmp_path, overrides, monkeypatch):
    forbid_pipelines(monkeypatch)
    plan = plan_of(overrides(tmp_path, "control_mirrored"))
    (control,) = [spec for spec in plan.runs if spec.cfg.method.name != "none"]
    job = prepare_job(control, checkpoints.find_checkpoint(control.cfg.model))
    with locked(job.task.edits.run.lock(job.groups[0])):
        assert not _generate_group(job.task, job.groups[0], wait=False)
    assert not job.task.run.has(job.groups[0])


def test_a_damaged_image_of_a_control_is_made_again(tmp_path, overrides, monkeypatch):
    plan = plan_of(overrides(tmp_path, "none,control_blurred"))
    generate(plan)
    run, group = Run.of(plan.runs[1]), build(plan.cfg.prompts).groups()[0]
    file = run.images(group)[0]
    before = file.read_bytes()
    file.write_bytes(before[:-1])
    forbid_pipelines(monkeypatch)
    generate(plan)
    assert file.read_bytes() == before


def test_an_unknown_edit_is_refused():
    with pytest.raises(ValueError, match=r"method\.edit must be one of mirrored, .*'sharpened'"):
        EditedBaseline("c", "sharpened")
