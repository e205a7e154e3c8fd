"""Requirements of all methods, whatever their formula, and the settings and calls that they refuse: a row each."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from stand_ins import Finds
from test_methods import CALLS, STRENGTH, shape_of

from experiments.methods.apg import APG
from experiments.methods.cads import CADS
from experiments.methods.combined import Combined
from experiments.methods.contextual_repulsion import ContextualRepulsion
from experiments.methods.contrastive_noise import ContrastiveNoise
from experiments.methods.controls import NoiseControl
from experiments.methods.diverse_flow import DiverseFlow
from experiments.methods.feature_guidance import FeatureGuidance
from experiments.methods.group_inference import GroupInference
from experiments.methods.guidance import IntervalGuidance, LowerGuidance
from experiments.methods.method import Baseline
from experiments.methods.nag import NAG
from experiments.methods.negative import NegativeIPAdapter, NegativePrompt
from experiments.methods.negtome import NegToMe, NegToMeFromAssets
from experiments.methods.particle_guidance import ParticleGuidance
from experiments.methods.pink_noise import PinkNoise
from experiments.methods.prompt_mog import PromptMoG
from experiments.methods.rewriting import Rewriting
from experiments.methods.seed_variance import SeedVariance
from experiments.methods.selection import BestOf
from experiments.methods.sparke import SPARKE
from experiments.methods.spell import SPELL, SPELLFromAssets
from experiments.methods.stride import STRIDE
from experiments.prompts import Group

REWRITES = {"red": ["scarlet", "crimson", "ruby"], "blue": ["azure", "navy"]}
GROUP, OTHER = Group("one", "a red thing", "red", 0, 2), Group("two", "some blue thing", "blue", 0, 2)


class Case(NamedTuple):
    """A method of one call.

    Attributes:
        make: returns it, strong enough to be seen on random weights.
        off: arguments of `make` with which it must do nothing at all.
        kinds: kinds of pipelines for which it is defined.
        alone: whether it does anything to a group of one image.
        several: whether one call may be for several groups.
    """

    make: Callable
    strong: Mapping[str, Any]
    off: Mapping[str, Any]
    kinds: tuple[str, ...] = ("sdxl", "flux")
    alone: bool = True
    several: bool = True


CASES = {
    "lower guidance": Case(LowerGuidance, {"scale": 1.5}, {"scale": None}),
    "limited interval": Case(IntervalGuidance, {"sigma_range": (0.5, 1.0)}, {"sigma_range": (0, None)}),
    "feature self-guidance": Case(
        FeatureGuidance, {"w": 0.2, "relative": True}, {"w": 0}, kinds=("flux",), alone=False
    ),
    "contextual repulsion": Case(
        ContextualRepulsion, {"eta": 5, "relative": True}, {"eta": 0}, kinds=("flux",), alone=False
    ),
    "attention guidance": Case(partial(NAG, retriever=Finds("a blue thing")), {"alpha": 1}, {"scale": 1}),
    "particle guidance": Case(ParticleGuidance, {"coefficient": 20}, {"coefficient": 0}, alone=False),
    "shield": Case(SPELL, {"radius": 8}, {"radius": 0}, alone=False),
    "CADS": Case(CADS, {"noise_scale": 0.5, "tau1": 0.2, "halves": "both"}, {"noise_scale": 0}),
    "pink noise": Case(PinkNoise, {"exponent": 1}, {"exponent": 0}),
    "seed variance": Case(SeedVariance, {"strength": 3}, {"strength": 0}),
    "SPARKE": Case(SPARKE, {"entropy_scale": 0.5}, {"entropy_scale": 0}, alone=False),
    "DiverseFlow": Case(DiverseFlow, {"dpp_scale": 0.5}, {"dpp_scale": 0}, alone=False),
    "PromptMoG": Case(PromptMoG, {"distance": 2, "modes": 8}, {"distance": 0, "modes": 8}),
    "STRIDE": Case(STRIDE, {"noise_length": 1}, {"noise_length": 0}),
    "projected guidance": Case(
        APG,
        {"norm_threshold": 1},
        {"eta": 1, "norm_threshold": None, "momentum": 0},
        kinds=("sdxl",),
    ),
    "rewriting": Case(Rewriting, {"rewrites": REWRITES, "share": 1}, {"rewrites": REWRITES, "share": 0}, several=False),
}


PAIRS = [(name, kind) for name, case in CASES.items() for kind in case.kinds]


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request):
    return request.param


@pytest.fixture
def case(pair):
    return CASES[pair[0]]


@pytest.fixture
def kind(pair):
    return pair[1]


def images_of(pipe, method, kind, *groups, size=2):
    """Return what a method makes of groups in one call, float [images, 32, 32, 3]."""
    generators = [torch.Generator().manual_seed(seed) for group in groups for seed in group.image_seeds()[:size]]
    with method.apply(pipe, dataclasses.replace(groups[0], size=size), CALLS[kind]) as applied:
        asked = {"prompt": [group.prompt for group in groups], "num_images_per_prompt": size, "output_type": "np"}
        asked |= applied.call
        if "negative_prompt" in asked:
            asked["negative_prompt"] = [asked["negative_prompt"]] * len(asked["prompt"])
        return pipe(**asked, generator=generators).images


@pytest.fixture(scope="module")
def baselines():
    """Return the function of a pipeline, its kind and a size that makes the baseline's images, once for all tests."""
    images = {}

    def baseline(pipe, kind, size=2):
        if (kind, size) not in images:
            images[kind, size] = images_of(pipe, Baseline(), kind, GROUP, size=size)
        return images[kind, size]

    return baseline


def test_it_changes_images_and_leaves_the_pipeline_as_it_was(case, pipe, kind):
    before = images_of(pipe, Baseline(), kind, GROUP)  # a first call gives the pipeline more attributes
    shape = shape_of(pipe)
    changed = images_of(pipe, case.make("m", **case.strong), kind, GROUP)
    assert np.isfinite(changed).all() and not np.array_equal(changed, before)
    assert shape_of(pipe) == shape and "step" not in pipe.scheduler.__dict__
    assert np.array_equal(images_of(pipe, Baseline(), kind, GROUP), before)


def test_of_no_strength_the_images_are_the_baselines_bit_for_bit(case, pipe, kind, baselines):
    method = case.make("m", **case.off)
    assert np.array_equal(images_of(pipe, method, kind, GROUP), baselines(pipe, kind))


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if CASES[pair[0]].several], ids="-".join)
def test_groups_of_one_call_do_not_touch_each_other(case, pipe, kind):
    """Beside another prompt's group, a group is what it is beside a copy of itself."""
    method = case.make("m", **case.strong)
    mixed = images_of(pipe, method, kind, GROUP, OTHER)
    same = images_of(pipe, method, kind, GROUP, GROUP)
    assert np.allclose(mixed[:2], same[:2], atol=2e-3)  # a batch of other contents may be rounded otherwise
    assert not np.allclose(mixed[2:], same[2:], atol=2e-3)


def test_an_image_alone_has_no_group(case, pipe, kind, baselines):
    image = images_of(pipe, case.make("m", **case.strong), kind, GROUP, size=1)
    assert np.array_equal(image, baselines(pipe, kind, size=1)) != case.alone


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", ["CADS", "limited interval", "pink noise"])
def test_beside_negtome_the_first_image_is_as_without_and_the_other_is_pushed(name, pipe, kind):
    alone = CASES[name].make("m", **CASES[name].strong)
    drawn = alone.generate(pipe, GROUP, CALLS[kind]).images
    both = Combined("both", {"a": alone, "b": NegToMe("b", **STRENGTH)}).generate(pipe, GROUP, CALLS[kind])
    assert both.statistics["tokens_pushed"] > 0
    assert np.allclose(both.images[0], drawn[0], atol=2e-3) and not np.allclose(both.images[1], drawn[1], atol=2e-3)


class Distilled:
    def __call__(self, prompt, guidance_scale=4.0): ...


#: Calls for which a method is not defined: pipeline, arguments, and the error.
UNDEFINED = [
    (FeatureGuidance("m"), "tiny_sdxl", {}, "joint blocks of Flux's transformer, got StableDiffusionXLPipeline"),
    (ContextualRepulsion("m"), "tiny_sdxl", {}, "joint blocks of Flux's transformer, got StableDiffusionXLPipeline"),
    (FeatureGuidance("m", block=3), "tiny_flux", {}, r"method\.block must be at most 2"),
    (APG("m"), "tiny_flux", {}, "got a FluxPipeline: leave it out"),
    (APG("m"), "tiny_sdxl", {"guidance_rescale": 0.7}, r"guidance_rescale=0\.7"),
    (NegativePrompt("m", None), "distilled", {}, "negative prompt, which a Distilled does not: leave"),
    (NegativeIPAdapter("m", None, {"a": 1}), "tiny_sdxl", {"guidance_scale": 1.0}, "needs guidance, got .*=1"),
]


@pytest.fixture
def distilled():
    return Distilled()


@pytest.mark.parametrize(("method", "pipe", "call", "message"), UNDEFINED)
def test_a_call_for_which_it_is_not_defined_is_refused_before_anything_is_generated(
    method, pipe, call, message, request
):
    context = method.apply(request.getfixturevalue(pipe), GROUP, CALLS["sdxl"] | call)
    with pytest.raises(ValueError, match=message), context:
        pass


#: Settings that are out of range, and the error.
BAD = [
    (CADS, {"noise_scale": -1}, "noise_scale"), (CADS, {"tau1": 0.9, "tau2": 0.6}, "tau1"),
    (CADS, {"mixing": 2}, "mixing"),
    (CADS, {"rescale": "batch"}, "one of sample, token, none"), (CADS, {"halves": "none"}, "one of conditional, both"),
    (ContrastiveNoise, {"inner_steps": -1}, "inner_steps"), (ContrastiveNoise, {"learning_rate": -1}, "learning_rate"),
    (ContrastiveNoise, {"temperature": 0}, "temperature"), (ContrastiveNoise, {"gamma": 0}, "gamma"),
    (ContrastiveNoise, {"window": 0}, "window"), (ContrastiveNoise, {"loss": "nce"}, "loss"),
    (FeatureGuidance, {"w": -1}, "method.w must be at least 0"), (FeatureGuidance, {"mix": 2}, "between 0 and 1"),
    (FeatureGuidance, {"n_opt": 2.5}, "n_opt must be a whole number"),
    (FeatureGuidance, {"timestep_range": (900, 800)}, "low <= high, got"),
    (ContextualRepulsion, {"eta": math.inf}, "finite number"), (ContextualRepulsion, {"first_steps": 0}, "least 1"),
    (NAG, {"retriever": None, "norm": "L3"}, "norm must be one of"), (NAG, {"retriever": None, "scale": 0}, "scale"),
    (NAG, {"retriever": None, "alpha": 2}, "alpha"), (NAG, {"retriever": None, "end": 0}, "end"),
    (ParticleGuidance, {"coefficient": -1}, "coefficient"), (ParticleGuidance, {"bandwidth": "median"}, "bandwidth"),
    (ParticleGuidance, {"sigma_low": "one"}, "sigma_low"), (APG, {"eta": -1}, "eta"),
    (APG, {"momentum": 2}, "momentum"),
    (APG, {"norm_threshold": 0}, "above 0"), (APG, {"scale": 0.5}, "scale"), (APG, {"variant": "raw"}, "one of paper"),
    (SeedVariance, {"strength": -1}, "method.strength must be at least 0"),
    (SeedVariance, {"strength": math.nan}, "method.strength must be a finite number, got nan"),
    (SeedVariance, {"noised_share": 2}, "noised_share"), (SeedVariance, {"early_share": "all"}, "early_share"),
    (SPARKE, {"entropy_scale": -1}, "entropy_scale"), (SPARKE, {"interval": 0}, "interval must be a whole number"),
    (SPARKE, {"sigma": 0}, "method.sigma must be"), (SPARKE, {"sigma_text": math.inf}, "sigma_text"),
    (DiverseFlow, {"dpp_scale": -1}, "method.dpp_scale must be at least 0"), (DiverseFlow, {"spread": -1}, "spread"),
    (DiverseFlow, {"percentile": 0.4}, "between 0.5 and 1"), (DiverseFlow, {"least_quality": 0}, "least_quality"),
    (PromptMoG, {"distance": -1}, "method.distance must be at least 0"),
    (PromptMoG, {"sigma": math.inf}, "finite number"),
    (PromptMoG, {"modes": 1}, "modes must be a whole number from 2"),
    (STRIDE, {"noise_length": -1}, "method.noise_length must be"), (STRIDE, {"components": 0}, "components must be a"),
    (STRIDE, {"block": 0}, "method.block"), (STRIDE, {"first_steps": 1.5}, "first_steps"),
    (STRIDE, {"exponent": math.nan}, "exponent must be a finite number"),
    (SPELL, {"radius": -1}, "radius"), (SPELL, {"overcompensation": "much"}, "overcompensation"),
    (SPELLFromAssets, {"retriever": None, "images": 0}, "images"),
    (NegToMeFromAssets, {"retriever": None, "images": 0}, "images must be at least 1"),
    (NoiseControl, {"reference": "others"}, "reference"), (Rewriting, {"rewrites": REWRITES, "share": 2}, "share"),
    (Rewriting, {"rewrites": "mini"}, "lists of phrases by category, got 'mini'"),
    *((Rewriting, {"rewrites": {"red": bad}}, "red must be a list of distinct") for bad in ([], ["a", "a"], "a")),
    (BestOf, {"encoder": None, "candidates": 6.5}, "candidates must be a whole number from 1 to 1000000, got 6.5"),
    (GroupInference, {"encoder": None, "candidates": 0}, "candidates"),
    (GroupInference, {"encoder": None, "keep": 1}, "keep"),
    (GroupInference, {"encoder": None, "distance_weight": -1}, "distance_weight"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "settings", "message"), BAD, ids=lambda value: getattr(value, "__name__", None))
def test_a_setting_out_of_range_is_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make("m", **settings)


@pytest.mark.parametrize("name", CASES)
def test_every_setting_is_part_of_the_identity(name):
    case = CASES[name]
    one, other = case.make("m", **case.strong).settings(), case.make("m", **case.off).settings()
    assert one.keys() == other.keys() and one != other and set(case.strong) <= set(one)
