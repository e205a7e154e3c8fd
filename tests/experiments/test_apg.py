"""APG compared with the independent implementation in diffusers, and on a pipeline."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
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


def test_projection_by_hand():
    update, along = torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    assert torch.allclose(projected(update, along, 0.5, 1.0), torch.tensor([[0.3, 0.8], [0.3, 0.2]]))
    assert torch.equal(projected(update, along, 1.0, None), update)
    assert torch.equal(projected(torch.zeros(1, 4), torch.ones(1, 4), 0.0, 1.0), torch.zeros(1, 4))


@pytest.mark.slow  # diffusers' guiders take seconds to import
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("variant", ["paper", "diffusers"])
@pytest.mark.parametrize(
    ("scheduler", "prediction"), [(EulerDiscreteScheduler, "epsilon"), (DDIMScheduler, "v_prediction")]
)
def test_every_step_equals_the_guider_of_diffusers(tiny_sdxl, scheduler, prediction, variant, settings):
    """For two calls of two images; the guider takes clean latents ("paper") or the denoiser's outputs."""
    from diffusers.guiders import AdaptiveProjectedGuidance
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

    extra = {"clip_sample": False} if scheduler is DDIMScheduler else {}
    tiny_sdxl.scheduler = scheduler(prediction_type=prediction, **extra)
    outputs, steps = [], []
    call = CALLS["sdxl"] | {"guidance_scale": 4.0, "num_inference_steps": 3}

    def clean_of(output, step):
        """Ask a new scheduler for the clean latents, because the pipeline's has stepped on."""
        fresh = scheduler.from_config(tiny_sdxl.scheduler.config)
        fresh.set_timesteps(3)
        return fresh.step(output, fresh.timesteps[step], steps[step].sample).pred_original_sample

    with (
        # Hooks that are registered first are called first.
        denoiser_calls(tiny_sdxl, after=lambda _, output: outputs.append(output) or output),
        APG("m", **settings, variant=variant).apply(tiny_sdxl, GROUP, call),
        predictions(tiny_sdxl, lambda prediction: steps.append(prediction) or prediction.clean),
    ):
        sample(tiny_sdxl, GROUP, call)
        sample(tiny_sdxl, GROUP, call)
    guider = AdaptiveProjectedGuidance(
        guidance_scale=3.0 if variant == "paper" else 4.0, use_original_formulation=variant == "paper",
        adaptive_projected_guidance_momentum=settings["momentum"], eta=settings["eta"],
        adaptive_projected_guidance_rescale=settings["norm_threshold"] or 0.0,
    )  # fmt: skip
    guider.momentum_buffer = MomentumBuffer(settings["momentum"])
    assert len(steps) == 6
    for step, output in enumerate(outputs[:3]):
        unconditional, conditional = output.chunk(2)
        if variant == "paper":
            expected = guider.forward(clean_of(conditional, step), clean_of(unconditional, step)).pred
        else:
            expected = clean_of(guider.forward(conditional, unconditional).pred, step)
        assert torch.allclose(steps[step].clean, expected, rtol=1e-3, atol=2e-3 * float(expected.abs().max()))
        assert torch.equal(steps[step].clean, steps[3 + step].clean), "each call of the pipeline resets the momentum"


def test_without_projection_it_is_plain_guidance_at_the_methods_scale(tiny_sdxl):
    method = APG("m", eta=1, norm_threshold=1e9, momentum=0, scale=2.0)
    images, expected, baseline = (
        torch.from_numpy(one.generate(tiny_sdxl, GROUP, CALLS["sdxl"]).images)
        for one in (method, LowerGuidance("m", 2.0), Baseline())
    )
    assert torch.allclose(images, expected, atol=1e-4) and not torch.allclose(images, baseline, atol=1e-3)


@pytest.mark.parametrize("variant", ["paper", "diffusers"])
def test_no_row_depends_on_another(tiny_sdxl, variant):
    method = APG("m", norm_threshold=0.5, variant=variant)
    both = method.generate(tiny_sdxl, GROUP, CALLS["sdxl"]).images
    with method.apply(tiny_sdxl, GROUP, CALLS["sdxl"]) as context:
        second = sample(tiny_sdxl, GROUP, context.call, GROUP.image_seeds()[1:])
    assert torch.allclose(torch.from_numpy(both[1:]), torch.from_numpy(second), atol=2e-3)
