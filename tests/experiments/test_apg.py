"""APG compared with the independent implementation in diffusers, and on a pipeline."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.guiders import AdaptiveProjectedGuidance
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from test_methods import CALLS

from experiments.methods.apg import APG, projected
from experiments.methods.guidance import LowerGuidance
from experiments.methods.method import Baseline, sample
from experiments.methods.steps import denoiser_calls, predictions
from experiments.prompts import Group

GROUP = Group("one", "a red thing", "red", 0, 2)
SETTINGS = [
    {"eta": 0.0, "norm_threshold": 2.0, "momentum": -0.5}, {"eta": 0.3, "norm_threshold": None, "momentum": 0.4},
    {"eta": 1.0, "norm_threshold": 3.0, "momentum": 0.0}, {"eta": 2.0, "norm_threshold": 50.0, "momentum": -0.75},
]  # fmt: skip


def guider(eta, norm_threshold, momentum, scale, original):
    theirs = AdaptiveProjectedGuidance(
        guidance_scale=scale - 1 if original else scale, adaptive_projected_guidance_momentum=momentum, eta=eta,
        adaptive_projected_guidance_rescale=norm_threshold or 0.0, use_original_formulation=original,
    )  # fmt: skip
    theirs.momentum_buffer = MomentumBuffer(momentum)
    return theirs


def test_projection_by_hand():
    update, along = torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    assert torch.allclose(projected(update, along, 0.5, 1.0), torch.tensor([[0.3, 0.8], [0.3, 0.2]]))
    assert torch.equal(projected(update, along, 1.0, None), update)
    assert torch.equal(projected(torch.zeros(1, 4), torch.ones(1, 4), 0.0, 1.0), torch.zeros(1, 4))


@pytest.mark.slow  # diffusers' guiders take seconds to import
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("variant", ["paper", "diffusers"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler])
def test_a_step_is_what_the_guider_of_diffusers_makes_of_the_same_predictions(
    tiny_sdxl, scheduler, prediction, variant, settings
):
    """Of the clean latents that the scheduler says are predicted ("paper"), or of outputs; two calls of two images."""
    extra = {"clip_sample": False} if scheduler is DDIMScheduler else {}
    tiny_sdxl.scheduler = scheduler(prediction_type=prediction, **extra)
    outputs, made = [], []
    call = CALLS["sdxl"] | {"guidance_scale": 4.0, "num_inference_steps": 3}

    def clean_of(output, step):
        """By a scheduler of its own, which has not stepped."""
        alone = scheduler.from_config(tiny_sdxl.scheduler.config)
        alone.set_timesteps(3)
        return alone.step(output, alone.timesteps[step], made[step].sample).pred_original_sample

    method = APG("m", **settings, variant=variant)
    with (
        # Of hooks, those that are registered first are called first.
        denoiser_calls(tiny_sdxl, after=lambda _, output: outputs.append(output) or output),
        method.apply(tiny_sdxl, GROUP, call),
        predictions(tiny_sdxl, lambda prediction: made.append(prediction) or prediction.clean),
    ):
        sample(tiny_sdxl, GROUP, call)
        first, outputs_of_first, made_of_first = len(made), list(outputs), list(made)
        sample(tiny_sdxl, GROUP, call)
    assert first == 3 and len(made) == 6
    theirs = guider(**settings, scale=4.0, original=variant == "paper")
    for step, output in enumerate(outputs_of_first):
        without, prompted = output.chunk(2)
        if variant == "paper":
            without, prompted = (clean_of(part, step) for part in (without, prompted))
        expected = theirs.forward(prompted, without).pred
        expected = expected if variant == "paper" else clean_of(expected, step)
        assert torch.allclose(made[step].clean, expected, rtol=1e-3, atol=2e-3 * float(expected.abs().max()))
    for one, other in zip(made_of_first, made[3:], strict=True):
        assert torch.equal(one.clean, other.clean), "momentum begins anew with a call of the pipeline"


def test_a_call_with_another_scale_is_guided_by_that(tiny_sdxl):
    """Without projection, threshold and momentum, as good as, it is plain guidance: by the method's scale."""
    method = APG("m", eta=1, norm_threshold=1e9, momentum=0, scale=2.0)
    plain = LowerGuidance("m", 2.0)
    images, expected, unguided = (
        torch.from_numpy(one.generate(tiny_sdxl, GROUP, CALLS["sdxl"]).images) for one in (method, plain, Baseline())
    )
    assert torch.allclose(images, expected, atol=1e-4) and not torch.allclose(images, unguided, atol=1e-3)


@pytest.mark.parametrize("variant", ["paper", "diffusers"])
def test_no_row_depends_on_another(tiny_sdxl, variant):
    method = APG("m", norm_threshold=0.5, variant=variant)
    both = method.generate(tiny_sdxl, GROUP, CALLS["sdxl"]).images
    with method.apply(tiny_sdxl, GROUP, CALLS["sdxl"]) as applied:
        second = sample(tiny_sdxl, GROUP, applied.call, GROUP.image_seeds()[1:])
    assert torch.allclose(torch.from_numpy(both[1:]), torch.from_numpy(second), atol=2e-3)
