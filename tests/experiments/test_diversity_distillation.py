"""Diversity distillation: where the models change, what each gets, and calls that are refused."""

import functools
import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from test_methods import CALLS, shape_of

from experiments.methods.diversity_distillation import DiversityDistillation
from experiments.methods.method import Baseline, sample
from experiments.methods.steps import replaced
from experiments.prompts import Group

PAIR = Group("one", "a red thing", "red", 0, 2)


@pytest.fixture
def call(kind, pipe):
    if kind == "sdxl":
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return CALLS[kind] | {"num_inference_steps": 4}


def images_of(pipe, call, method):
    return method.generate(pipe, PAIR, call).images


def latents_of(pipe, call, run):
    """Return the latents that each step of the scheduler begins with, and those that it returns."""
    begun, ended, original = [], [], pipe.scheduler.step

    @functools.wraps(original)
    def step(output, timestep, latents, *args, **kwargs):
        result = original(output, timestep, latents, *args, **kwargs)
        begun.append(latents)
        ended.append(result[0])
        return result

    with replaced(pipe.scheduler, "step", step):
        run(pipe, PAIR, call)
    return begun, ended


def test_it_changes_images_repeatably_and_leaves_the_pipeline_as_it_was(pipe, call):
    before = images_of(pipe, call, Baseline())
    shape = shape_of(pipe)
    one, again = (images_of(pipe, call, DiversityDistillation("m", base_guidance=1.0)) for _ in range(2))
    assert np.isfinite(one).all() and np.array_equal(one, again) and not np.array_equal(one, before)
    assert shape_of(pipe) == shape and "step" not in pipe.scheduler.__dict__
    assert np.array_equal(images_of(pipe, call, Baseline()), before)


@pytest.mark.parametrize(
    "settings",
    [{"base_steps": 0, "base_guidance": 1.0}, {"base_steps": 1, "substeps": 1}, {"base_steps": 4, "substeps": 1}],
)
def test_without_a_difference_the_images_are_the_baselines_bit_for_bit(pipe, call, settings):
    method = DiversityDistillation("m", **settings)
    assert np.array_equal(images_of(pipe, call, method), images_of(pipe, call, Baseline()))


@pytest.mark.parametrize("base_steps", [1, 3])
def test_the_model_goes_on_from_the_finer_schedule_of_the_base(pipe, call, base_steps):
    fine = call | {"num_inference_steps": 12, "guidance_scale": 2.0}
    _, ended = latents_of(pipe, fine, sample)
    method = DiversityDistillation("m", base_steps=base_steps, substeps=3, base_guidance=2.0)
    begun, _ = latents_of(pipe, call, method.generate)
    base, others = begun[: 3 * base_steps], begun[3 * base_steps :]
    assert len(base) == 3 * base_steps and len(others) == 4
    assert torch.equal(others[base_steps], ended[3 * base_steps - 1])


def test_the_base_is_another_checkpoint(pipe, kind, call, tiny_checkpoint, tmp_path):
    same = DiversityDistillation("m", base_steps=2, substeps=2, base=str(tiny_checkpoint(kind)))
    without = DiversityDistillation("m", base_steps=2, substeps=2)
    assert np.array_equal(images_of(pipe, call, same), images_of(pipe, call, without))
    name = "unet" if kind == "sdxl" else "transformer"
    denoiser, state = (
        getattr(pipe, name),
        {key: value.clone() for key, value in getattr(pipe, name).state_dict().items()},
    )
    expected = images_of(pipe, call, without)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(1.05)
    pipe.save_pretrained(tmp_path)
    denoiser.load_state_dict(state)
    other = DiversityDistillation("m", base_steps=2, substeps=2, base=str(tmp_path))
    assert not np.array_equal(images_of(pipe, call, other), expected)
    assert getattr(pipe, name) is denoiser and np.array_equal(images_of(pipe, call, without), expected)
    assert other.settings()["base"] not in (None, same.settings()["base"])


def test_a_model_without_guidance_begins_with_one_that_has_it(tiny_schnell, tiny_checkpoint):
    call = {key: value for key, value in CALLS["flux"].items() if key != "guidance_scale"}
    weak, strong = (
        DiversityDistillation("m", base=str(tiny_checkpoint("flux")), base_guidance=scale) for scale in (1.0, 7.0)
    )
    assert not np.array_equal(images_of(tiny_schnell, call, weak), images_of(tiny_schnell, call, strong))


def test_a_base_of_another_architecture_is_refused(tiny_sdxl, tiny_checkpoint):
    method = DiversityDistillation("m", base=str(tiny_checkpoint("flux")))
    with pytest.raises(
        ValueError, match=r"method\.base must fit the model, whose denoiser is a unet, got a transformer"
    ):
        images_of(tiny_sdxl, CALLS["sdxl"], method)


def test_a_scheduler_with_two_denoiser_calls_in_a_step_is_refused(tiny_sdxl):
    tiny_sdxl.scheduler = HeunDiscreteScheduler.from_config(tiny_sdxl.scheduler.config)
    with pytest.raises(ValueError, match=r"one denoiser call in a step, .* got a HeunDiscreteScheduler"):
        images_of(tiny_sdxl, CALLS["sdxl"], DiversityDistillation("m", base_steps=1))


def test_more_steps_than_the_call_has_are_refused(tiny_sdxl):
    with pytest.raises(ValueError, match=r"method\.base_steps must be at most 2, the steps of the call, got 3"):
        images_of(tiny_sdxl, CALLS["sdxl"], DiversityDistillation("m", base_steps=3))


def test_a_base_model_that_is_offloaded_is_refused(tiny_sdxl, tiny_checkpoint):
    tiny_sdxl.unet._hf_hook = object()
    with pytest.raises(ValueError, match="offload=false"):
        images_of(tiny_sdxl, CALLS["sdxl"], DiversityDistillation("m", base=str(tiny_checkpoint("sdxl"))))


def steps_of(pipe, call, method):
    """Return (name of the scheduler, timestep, seeds of its noise) of each step."""
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        for cls in {type(pipe.scheduler), DDIMScheduler}:

            def step(self, output, timestep, *args, original=cls.step, **kwargs):
                seeds = {generator.initial_seed() for generator in kwargs.get("generator") or []}
                steps.append((type(self).__name__, int(timestep), seeds))
                return original(self, output, timestep, *args, **kwargs)

            # The pipeline looks at the names of the arguments.
            step.__signature__ = inspect.signature(cls.step)
            patch.setattr(cls, "step", step)
        images_of(pipe, call, method)
    return steps


def test_schedules_that_do_not_meet_change_at_the_closest_timestep(tiny_sdxl):
    tiny_sdxl.scheduler = EulerDiscreteScheduler.from_config(tiny_sdxl.scheduler.config, timestep_spacing="leading")
    call = CALLS["sdxl"] | {"num_inference_steps": 4}  # at 751, 501, 251, 1
    steps = steps_of(tiny_sdxl, call, DiversityDistillation("m", substeps=3))
    timesteps = [timestep for _, timestep, _ in steps]
    assert timesteps[-4:] == [751, 501, 251, 1]
    finer = [83 * number + 1 for number in reversed(range(12))]
    assert timesteps[:-4] == finer[: finer.index(499)]


def test_a_base_of_a_consistency_model_is_sampled_by_ddim(tiny_sdxl):
    scheduler = tiny_sdxl.scheduler = LCMScheduler.from_config(tiny_sdxl.scheduler.config)
    call = CALLS["sdxl"] | {"num_inference_steps": 4}
    names = [name for name, *_ in steps_of(tiny_sdxl, call, DiversityDistillation("m"))]
    assert names[-4:] == ["LCMScheduler"] * 4 and set(names[:-4]) == {"DDIMScheduler"}
    assert tiny_sdxl.scheduler is scheduler


def test_the_noise_of_the_two_models_differs(tiny_sdxl):
    tiny_sdxl.scheduler = EulerAncestralDiscreteScheduler.from_config(tiny_sdxl.scheduler.config)
    steps = steps_of(tiny_sdxl, CALLS["sdxl"] | {"num_inference_steps": 4}, DiversityDistillation("m", substeps=2))
    base, others = ({seed for *_, seeds in part for seed in seeds} for part in (steps[:-4], steps[-4:]))
    assert len(base) == len(others) == 2 and not base & others


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"base_steps": -1}, ValueError, "method.base_steps must be a whole number of at least 0"),
        ({"substeps": 0}, ValueError, "method.substeps must be a whole number from 1"),
        ({"base_guidance": -1}, ValueError, "method.base_guidance must be at least 0"),
        (
            {"base": "no/such/folder"},
            FileNotFoundError,
            "method.base must be a folder of a pipeline, with a folder unet",
        ),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        DiversityDistillation("m", **settings)
