"""Hooks into a pipeline: the predictions of a step, compared with the scheduler's own, and the initial noise."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LMSDiscreteScheduler,
)
from test_methods import CALLS

from experiments.methods.method import Baseline
from experiments.methods.prompt_mog import PromptMoG
from experiments.methods.seed_variance import SeedVariance
from experiments.methods.sparke import SPARKE
from experiments.methods.steps import denoiser_calls, initial_noise, levels, predictions, with_tokens
from experiments.methods.stride import STRIDE
from experiments.prompts import Group
from negtome.call_inspection import value_at
from negtome.sites import find_architecture


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [(EulerDiscreteScheduler, "epsilon"), (EulerDiscreteScheduler, "v_prediction"), (DDIMScheduler, "epsilon"),
     (DDIMScheduler, "v_prediction"), (DDIMScheduler, "sample")],
)  # fmt: skip
def test_the_clean_latents_are_those_that_the_scheduler_says_it_predicts(scheduler, kind):
    stepping = scheduler(prediction_type=kind, **({"clip_sample": False} if scheduler is DDIMScheduler else {}))
    stepping.set_timesteps(10)
    sample, output, target = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    with predictions(SimpleNamespace(scheduler=stepping), lambda p: seen.append(p) or target):
        changed = stepping.step(output, stepping.timesteps[0], 5 * sample)
    stepping.set_timesteps(10)
    stock = stepping.step(output, stepping.timesteps[0], 5 * sample)
    assert torch.allclose(seen[0].clean, stock.pred_original_sample, rtol=1e-4, atol=1e-3)
    assert torch.allclose(changed.pred_original_sample, target, atol=1e-3)
    assert seen[0].timestep == float(stepping.timesteps[0])


def test_of_a_flow_a_prediction_that_is_the_truth_ends_at_it():
    stepping = FlowMatchEulerDiscreteScheduler(shift=1.5)
    stepping.set_timesteps(4)
    clean, noise = torch.randn(2, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    sample = noise
    with predictions(SimpleNamespace(scheduler=stepping), lambda prediction: clean):
        for timestep in stepping.timesteps:
            sample = stepping.step(torch.zeros_like(sample), timestep, sample, return_dict=False)[0]
    assert torch.allclose(sample, clean, atol=1e-5)


def test_levels_of_a_multistep_solver_are_those_of_its_training():
    stepping = DPMSolverMultistepScheduler()
    stepping.set_timesteps(10)
    for timestep in stepping.timesteps[:3]:
        signal, noise = levels(stepping, timestep)
        assert signal**2 == pytest.approx(float(stepping.alphas_cumprod[int(timestep)]), rel=1e-3)
        assert signal**2 + noise**2 == pytest.approx(1)


def test_an_unknown_scheduler_is_refused_before_anything_is_generated():
    with pytest.raises(ValueError, match=r"got LMSDiscreteScheduler: choose"):
        levels(LMSDiscreteScheduler())


def images_of(pipe, kind):
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe("a red thing", generator=generator, output_type="np", **CALLS[kind]).images)


def test_a_change_of_nothing_is_bit_identical(pipe, kind):
    stock = images_of(pipe, kind)
    for nothing in (
        denoiser_calls(pipe, lambda call, arguments: arguments, lambda call, output: output),
        predictions(pipe, lambda prediction: prediction.clean),
        initial_noise(pipe, lambda noise: noise),
    ):
        with nothing:
            assert torch.equal(images_of(pipe, kind), stock)


def test_the_noise_that_a_pipeline_begins_from(pipe, kind):
    """Of unit variance and unpacked; the same noise put back is the same image, to rounding."""
    seen, stock = [], images_of(pipe, kind)
    with initial_noise(pipe, lambda noise: seen.append(noise) or noise.clone()):
        assert torch.allclose(images_of(pipe, kind), stock, atol=1e-5)
    drawn = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(0))
    assert seen[0].shape[1] == pipe.vae.config.latent_channels and torch.allclose(seen[0], drawn, atol=1e-5)
    with initial_noise(pipe, lambda noise: -noise):
        assert not torch.allclose(images_of(pipe, kind), stock, atol=1e-3)


def test_what_steps_in_twice_is_taken_out_in_turn(pipe, kind):
    """Noise turned round twice is as it was; what is predicted is changed by one of two."""
    stock = images_of(pipe, kind)
    with initial_noise(pipe, lambda noise: -noise), predictions(pipe, lambda p: p.clean + 1):
        one = images_of(pipe, kind)
        with initial_noise(pipe, lambda noise: -noise), predictions(pipe, lambda p: p.clean - 1):
            assert torch.allclose(images_of(pipe, kind), stock, atol=1e-4)
        assert torch.equal(images_of(pipe, kind), one) and not torch.allclose(one, stock, atol=1e-2)
    assert torch.equal(images_of(pipe, kind), stock)
    assert "step" not in vars(pipe.scheduler) and "prepare_latents" not in vars(pipe)


#: Ways to hold the rows of a batch and its texts, with the rows that are conditioned on the prompt, call by call of a
#: step with two images.
ROWS = {
    "SDXL PAG": ["--++++"],
    "PixArt": ["--++"],
    "PixArt, unguided": ["++"],
    "Z-Image": ["++--"],
    "Z-Image, unguided": ["++"],
    "CogView4": ["++", "--"],
    "Krea 2": ["++", "--"],
}
PAIR = Group("one", "a red thing", "red", 0, 2)


@pytest.fixture(params=ROWS)
def laid_out(request, _tiny_pipelines):
    pipe, options = tiny.build(request.param, _tiny_pipelines)
    return pipe, options, ROWS[request.param]


def test_texts_change_in_the_rows_of_the_prompt_alone(laid_out):
    pipe, options, expected = laid_out
    name = find_architecture(pipe).prompts[0]
    rows = []

    def before(call, arguments):
        changed = with_tokens(call, arguments, lambda tokens: tokens + 1)
        signs = ""
        for old, new in zip(value_at(arguments, name), value_at(changed, name), strict=True):
            signs += "-" if torch.equal(new, old) else "+"
            assert signs[-1] == "-" or torch.equal(new, old + 1), "a list's texts keep their lengths"
        rows.append(signs)
        return changed

    with denoiser_calls(pipe, before):
        Baseline().generate(pipe, PAIR, options | {"num_inference_steps": 1})
    assert rows == expected


@pytest.mark.parametrize("method", [SeedVariance("m"), PromptMoG("m", modes=4), SPARKE("m", entropy_scale=0.5)])
def test_methods_act_however_rows_are_laid_out(laid_out, method):
    pipe, options, _ = laid_out
    base, one, again = (m.generate(pipe, PAIR, options).images for m in (Baseline(), method, method))
    assert np.isfinite(one).all() and np.array_equal(one, again) and not np.array_equal(one, base)


def test_stride_acts_on_stable_diffusion_3(_tiny_pipelines):
    pipe, options = tiny.build("SD3", _tiny_pipelines)
    base, one = (m.generate(pipe, PAIR, options).images for m in (Baseline(), STRIDE("m", noise_length=1.0)))
    assert np.isfinite(one).all() and not np.array_equal(one, base)


def test_stride_refuses_a_model_without_its_blocks(_tiny_pipelines):
    pipe, options = tiny.build("PixArt", _tiny_pipelines)
    with pytest.raises(ValueError, match=r"method=m is defined for Flux.*got a PixArtSigmaPipeline: leave it out"):
        STRIDE("m").generate(pipe, PAIR, options)
