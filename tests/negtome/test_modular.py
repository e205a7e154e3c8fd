"""NegToMe on ModularPipelines: by `attach`, and by a guider. Tiny pipelines with random weights, without decoding."""

import copy
import functools
import gc
import importlib
import json
import pickle
import weakref
from pathlib import Path
from unittest import mock

import diffusers
import pytest
import tiny
import torch
from diffusers.utils import dynamic_modules_utils
from packaging.version import Version
from PIL import Image

import negtome
from negtome import NegToMeConfig, Reference

pytestmark = pytest.mark.skipif(Version(diffusers.__version__) < Version("0.42"), reason="guiders were others before")
guider = pytest.importorskip("negtome.guider", reason="this diffusers has other guiders", exc_type=ImportError)
NegToMeGuidance = guider.NegToMeGuidance

#: Every token of every step.
SETTINGS = {"threshold": -1, "timestep_range": (0, 1000), "min_side": 4}
CONFIG = NegToMeConfig(**SETTINGS)
_KONTEXT = {"image": Image.new("RGB", (32, 32), "red"), "max_area": 32 * 32, "_auto_resize": False}

#: A case of `tiny.CASES` -> the ModularPipeline of the same components; its guidance, None where it has no guider; and
#: further options of its call.
CASES = {
    "SDXL": ("StableDiffusionXLModularPipeline", {"guidance_scale": 5.0}, {}),
    "SDXL unguided": ("StableDiffusionXLModularPipeline", {"guidance_scale": 1.0}, {}),
    "SDXL img2img": ("StableDiffusionXLModularPipeline", {"guidance_scale": 5.0}, {}),
    "Flux": ("FluxModularPipeline", None, {}),
    "Flux Kontext": ("FluxKontextModularPipeline", None, _KONTEXT),
    # Without a negative prompt, both conditions have the prompt's embeddings.
    "SD3": ("StableDiffusion3ModularPipeline", {"guidance_scale": 7.0}, {"negative_prompt": ""}),
    "FLUX.2 dev": ("Flux2ModularPipeline", None, {}),
    "FLUX.2 klein": ("Flux2KleinBaseModularPipeline", {"guidance_scale": 4.0}, {}),
    "FLUX.2 klein, unguided": ("Flux2KleinModularPipeline", None, {}),
    "Qwen-Image, guided": ("QwenImageModularPipeline", {"guidance_scale": 3.0}, {}),
    "Qwen-Image Edit": ("QwenImageEditModularPipeline", {"guidance_scale": 3.0}, {}),
    "Qwen-Image Edit-Plus": ("QwenImageEditPlusModularPipeline", {"guidance_scale": 3.0}, {}),
    "Z-Image": (
        "ZImageModularPipeline",
        {"guidance_scale": 5.0, "enabled": True, "use_original_formulation": True},
        {},
    ),
    "Krea 2": ("Krea2ModularPipeline", {"guidance_scale": 4.5}, {}),
    "Krea 2, unguided": ("Krea2TurboModularPipeline", None, {}),
    "Wan": ("WanModularPipeline", {"guidance_scale": 5.0}, {}),
    "LTX": ("LTXModularPipeline", {"guidance_scale": 3.0}, {}),
}
VIDEOS = ("Wan", "LTX")
PROMPTS = ["a dog", "a dog", "a cat", "a cat"]


def cases(*default, among=tuple(CASES)):
    """Return cases as parameters of which all but some are slow tests."""
    return [pytest.param(name, marks=() if name in default else pytest.mark.slow) for name in among]


class Tiny:
    """A tiny ModularPipeline and the stock pipeline of the same components."""

    def __init__(self, case, bases):
        name, guidance, further = CASES[case]
        tiny.since(name)
        self.stock, self.stock_options = tiny.build(case, bases)
        components = {part: value for part, value in self.stock.components.items() if value is not None}
        if case == "Wan":  # without an autoencoder, latents have 16 channels
            config = {**components["transformer"].config, "in_channels": 16, "out_channels": 16}
            components["transformer"] = diffusers.WanTransformer3DModel.from_config(config).eval()
        cls = getattr(diffusers, name)
        blocks = getattr(diffusers, cls.default_blocks_name)()
        blocks.sub_blocks.pop("decode")
        self.pipe = cls(blocks)
        expected = {spec.name for spec in blocks.expected_components}
        self.components = {part: value for part, value in components.items() if part in expected}
        self.pipe.update_components(**self.components)
        if guidance is not None:
            self.pipe.update_components(guider=self.pipe.guider.new(**guidance))
        inputs = {parameter.name for parameter in blocks.inputs}
        options = self.stock_options | further
        self.options = {key: value for key, value in options.items() if key in inputs}
        self.count = "num_videos_per_prompt" if case in VIDEOS else "num_images_per_prompt"

    def __call__(self, seeds=(0, 1, 2), prompt="a dog", count=None, **options):
        """Return the latents of one call."""
        generator = generators(seeds)
        if "strength" in self.options:  # the one input image is encoded with it
            generator = generator[0]
        options = {self.count: count or len(seeds), "generator": generator} | self.options | options
        return self.pipe(prompt=prompt, output="latents", **options)

    def call_stock(self, seeds=(0, 1, 2)):
        """Return the latents of one call of the stock pipeline, packed in some of them."""
        options = {self.count: len(seeds), "generator": generators(seeds)} | self.stock_options
        return self.stock(prompt="a dog", output_type="latent", **options)[0]


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Replace what diffusers has fixed for large checkpoints."""
    krea2, qwen = (importlib.import_module(f"diffusers.modular_pipelines.{n}.encoders") for n in ("krea2", "qwenimage"))
    monkeypatch.setattr(krea2, "KREA2_TEXT_ENCODER_SELECT_LAYERS", (0, 1))
    monkeypatch.setattr(qwen, "calculate_dimensions", lambda area, ratio: (32, 32, None))
    for name in ("QWENIMAGE_EDIT", "QWENIMAGE_EDIT_PLUS"):
        monkeypatch.setattr(qwen, f"{name}_PROMPT_TEMPLATE", "{}")
        monkeypatch.setattr(qwen, f"{name}_PROMPT_TEMPLATE_START_IDX", 0)


@pytest.fixture
def build(_tiny_pipelines):
    return lambda case: Tiny(case, _tiny_pipelines)


@pytest.mark.parametrize("case", cases("SDXL", "Flux", "Qwen-Image, guided", "Z-Image"))
def test_attached_images_of_a_group_move_and_no_others(build, case):
    pair = build(case)
    base, before = pair(), tiny.state(pair.pipe)
    with negtome.attach(pair.pipe, CONFIG) as attached:
        result = pair()
    assert result.isfinite().all() and torch.equal(result[0], base[0])
    assert all((result[k] - base[k]).abs().max() > 1e-3 for k in (1, 2))
    summary = attached.summary()
    assert summary["tokens_pushed"] == summary["tokens_compared"] > 0
    steps = pair.pipe.scheduler.timesteps.tolist()
    assert summary["timesteps"] == steps[-len(summary["timesteps"]) :], "each once"
    with negtome.attach(pair.pipe, CONFIG.replace(alpha=0)):
        assert torch.equal(pair(), base)
    assert tiny.state(pair.pipe) == before
    assert torch.equal(pair(), base)


def test_groups_do_not_influence_each_other(build):
    pair = build("SDXL")
    with negtome.attach(pair.pipe, CONFIG, group_size=2):
        result, first, second = (pair(seeds) for seeds in ((0, 1, 2, 3), (0, 1, 8, 9), (8, 9, 2, 3)))
    assert torch.equal(result[:2], first[:2]) and torch.equal(result[2:], second[2:])
    base = pair((0, 1, 2, 3), PROMPTS, count=1)
    with negtome.attach(pair.pipe, CONFIG, group_size=2):
        result = pair((0, 1, 2, 3), PROMPTS, count=1)
    assert torch.equal(result[::2], base[::2])
    assert all((result[k] - base[k]).abs().max() > 1e-3 for k in (1, 3))
    with negtome.attach(pair.pipe, CONFIG):
        with pytest.raises(ValueError, match=r"got several prompts; pass num_images_per_prompt=2"):
            pair((0, 1), ["a dog", "a cat"], count=1)
        with pytest.raises(ValueError, match=r"this ModularPipeline of diffusers mixes the prompts up"):
            pair((0, 1, 2, 3), ["a dog", "a cat"], count=2)  # it gives images the pooled text of others


@pytest.mark.slow
def test_prompts_are_groups_where_diffusers_keeps_them_apart(build):
    pair = build("Flux")
    base = pair((0, 1, 2, 3), ["a dog", "a cat"], count=2)
    with negtome.attach(pair.pipe, CONFIG):
        result = pair((0, 1, 2, 3), ["a dog", "a cat"], count=2)
    assert torch.equal(result[::2], base[::2])
    assert all((result[k] - base[k]).abs().max() > 1e-3 for k in (1, 3))


def equal_or_close(stock, modular):
    """Tell how nearly two results agree: the largest difference, of elements in ascending order if one is packed."""
    if stock.shape != modular.shape:
        stock, modular = (rows.flatten(1).sort(dim=1).values for rows in (stock, modular))
    return float((stock - modular).abs().max())


@pytest.mark.parametrize(
    "case",
    cases(
        "SDXL unguided", "SDXL", among=("SDXL unguided", "SDXL", "Flux", "FLUX.2 dev", "FLUX.2 klein", "SD3", "Z-Image")
    ),
)
@pytest.mark.parametrize("alone", [True, False])
def test_attached_images_are_those_of_the_stock_pipeline(build, case, alone):
    """They differ by no more than without NegToMe: guidance in one batch sums in another order than in two calls."""
    pair = build(case)
    if case == "FLUX.2 klein":  # the stock pipeline alone returns latents without the autoencoder's normalization
        pair.stock.vae.bn.running_mean.zero_()
        pair.stock.vae.bn.running_var.fill_(1 - pair.stock.vae.config.batch_norm_eps)
    differs = equal_or_close(pair.call_stock(), pair())
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:, 16:] = True
    options = {} if alone else {"references": Reference(tiny.OTHER[0], mask=mask, seed=3, prompt="a cat")}
    images, moves = [], []
    for pipe, call in ((pair.stock, pair.call_stock), (pair.pipe, pair)):
        base = call()
        with negtome.attach(pipe, CONFIG, **options):
            images.append(call())
        moves += [float((image - other).abs().max()) for image, other in zip(images[-1][1:], base[1:], strict=True)]
    assert min(moves) > 1e-3
    if case in ("SDXL unguided", "FLUX.2 dev", "FLUX.2 klein"):
        assert differs == equal_or_close(*images) == 0
    else:
        assert differs < 1e-3 and equal_or_close(*images) < 0.05 * min(moves)


@pytest.mark.slow
def test_the_reference_replaces_the_prompt_in_conditional_calls_alone(build, monkeypatch):
    pair, rows = build("Qwen-Image, guided"), []
    forward = type(pair.pipe.transformer).forward

    @functools.wraps(forward)
    def spy(self, *args, encoder_hidden_states, **kwargs):
        rows.append(encoder_hidden_states)
        return forward(self, *args, encoder_hidden_states=encoder_hidden_states, **kwargs)

    with negtome.attach(pair.pipe, CONFIG, references=Reference(tiny.OTHER[0], prompt="a cow")):
        monkeypatch.setattr(type(pair.pipe.transformer), "forward", spy)
        pair()
    for number, text in enumerate(rows):
        assert len(text) == 4 and torch.equal(text[0], text[2])
        assert torch.equal(text[3], text[0]) == bool(number % 2)


def test_unsupported_modular_pipelines_are_refused(build):
    for name in ("Wan22ModularPipeline", "StableDiffusionXLModularPipeline"):  # the second has no denoiser yet
        with pytest.raises(TypeError, match=f"cannot be attached to a {name}.*supported") as caught:
            negtome.attach(getattr(diffusers, name)())
        assert "\n" not in str(caught.value)
    video = build("LTX")
    with pytest.raises(ValueError, match="whose output is a video; use groups"):
        negtome.attach(video.pipe, references=Reference(tiny.OTHER[0]))


#: A step_range, further options of a call with 4 steps, and the steps that are active.
STEP_RANGES = (
    ((0, 0), {}, [True, False, False, False]),
    ((0.25, 0.75), {}, [False, True, True, False]),
    ((0.5, 0.9), {"denoising_end": 0.5}, [False, True]),  # shares of the steps that are run
)


@pytest.mark.parametrize("case", cases("SDXL", among=("SDXL", "Flux", "Z-Image")))
def test_attach_takes_a_step_range(build, case):
    pair = build(case)
    pair.options["num_inference_steps"] = 4
    for step_range, options, active in STEP_RANGES if case == "SDXL" else STEP_RANGES[:2]:
        with negtome.attach(pair.pipe, CONFIG.replace(step_range=step_range)) as attached:
            result = pair(**options)
        assert [step.active for step in attached.steps] == active
        active_timesteps = attached.summary()["active_timesteps"]
        with negtome.attach(pair.pipe, CONFIG.replace(timestep_range=(active_timesteps[-1], active_timesteps[0]))):
            assert torch.equal(pair(**options), result)


GUIDED = tuple(case for case, (_, guidance, _) in CASES.items() if guidance is not None)


@pytest.mark.parametrize("case", cases("SDXL", "Qwen-Image, guided", "Z-Image", among=GUIDED))
def test_a_guider_makes_the_images_of_attach(build, case):
    pair = build(case)
    with negtome.attach(pair.pipe, CONFIG) as attached:
        expected = pair()
    before = tiny.state(pair.pipe)
    pair.pipe.update_components(guider=NegToMeGuidance.for_pipeline(pair.pipe, **SETTINGS))
    assert torch.equal(pair(), expected)
    assert pair.pipe.guider.summary() == attached.summary()
    assert pair.pipe.guider.counts() == attached.counts()
    assert tiny.state(pair.pipe)[1:] == before[1:], "of all modules"
    pair.pipe.update_components(guider=pair.pipe.guider.new(alpha=0))
    still = pair()
    pair.pipe.update_components(guider=diffusers.ClassifierFreeGuidance.from_config(pair.pipe.guider.config))
    assert torch.equal(pair(), still)


def test_a_guider_takes_groups_and_refuses_mixed_prompts(build):
    pair = build("SDXL")
    with negtome.attach(pair.pipe, CONFIG, group_size=2):
        expected = pair((0, 1, 2, 3), PROMPTS, count=1)
    pair.pipe.update_components(guider=NegToMeGuidance.for_pipeline(pair.pipe, **SETTINGS))
    before = tiny.state(pair.pipe)
    with pytest.raises(ValueError, match=r"share their prompt.*group_size"):
        pair((0, 1, 2, 3), PROMPTS, count=1)
    assert tiny.state(pair.pipe)[1:] == before[1:], "also after an error in the denoiser's call"
    pair.pipe.update_components(guider=pair.pipe.guider.new(group_size=2))
    assert torch.equal(pair((0, 1, 2, 3), PROMPTS, count=1), expected)


def test_a_guider_has_the_settings_of_the_architecture_and_warns_if_nothing_moves(build):
    pair = build("SDXL")
    pair.pipe.update_components(guider=NegToMeGuidance.for_pipeline(pair.pipe, threshold=1 - 1e-6, min_side=4))
    pair.options["num_inference_steps"] = 5
    assert pair.pipe.guider.guidance_scale == 5.0
    with pytest.warns(RuntimeWarning, match="pushed no token: the highest similarity"):
        pair()
    active = pair.pipe.guider.summary()["active_timesteps"]
    assert active == [step for step in pair.pipe.scheduler.timesteps.tolist() if step >= 800]
    assert 0 < len(active) < len(pair.pipe.guider.steps) == 5
    pair.pipe.update_components(guider=pair.pipe.guider.new(timestep_range=(0, 0)))
    with pytest.warns(RuntimeWarning, match="nothing to do: no step lies in timestep_range"):
        pair()


def test_a_guider_takes_a_step_range(build):
    pair = build("SDXL")
    pair.options["num_inference_steps"] = 4
    settings = {"threshold": -1, "min_side": 4}
    for step_range, options, active in STEP_RANGES:
        with negtome.attach(pair.pipe, NegToMeConfig(**settings, step_range=step_range)):
            expected = pair(**options)
        replacement = NegToMeGuidance.for_pipeline(pair.pipe, **settings, step_range=step_range)
        pair.pipe.update_components(guider=replacement)
        assert torch.equal(pair(**options), expected)
        assert [step.active for step in pair.pipe.guider.steps] == active
        pair.pipe.update_components(guider=diffusers.ClassifierFreeGuidance.from_config(replacement.config))
    pair.pipe.update_components(guider=NegToMeGuidance.for_pipeline(pair.pipe, **settings, step_range=(4, 9)))
    with pytest.warns(RuntimeWarning, match=r"step_range=\(4, 9\). This call has 4 steps, from 0 to 3"):
        pair()
    pair.pipe.update_components(
        guider=pair.pipe.guider.new(step_range=(0, 0)),
        scheduler=diffusers.HeunDiscreteScheduler.from_config(pair.pipe.scheduler.config),
    )
    with pytest.warns(RuntimeWarning, match=r"counted every timestep as a step.*second-order"):
        pair()


@pytest.mark.parametrize(
    "steps", [{"timestep_range": (500, 900)}, {"step_range": (0, 1)}, {"step_range": (0.0, 0.25)}], ids=str
)
def test_a_guider_is_saved_and_loaded(tmp_path, steps):
    saved = NegToMeGuidance(guidance_scale=3.0, alpha=1.5, sites=("up_blocks.1",), group_size=4, **steps)
    saved.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "guider_config.json").read_text())["alpha"] == 1.5
    loaded = NegToMeGuidance.from_pretrained(tmp_path)
    assert (loaded.settings, loaded.group_size, loaded.guidance_scale) == (saved.settings, 4, 3.0)
    for settings in ({"threshold": 2}, {"group_size": 1}):
        with pytest.raises(ValueError, match=r"threshold|group_size"):
            NegToMeGuidance(**settings)


def test_a_guider_refuses_what_it_cannot_do(build):
    pair = build("SDXL")
    pair.pipe.update_components(guider=NegToMeGuidance.for_pipeline(pair.pipe, **SETTINGS))
    with negtome.attach(pair.pipe, CONFIG), pytest.raises(RuntimeError, match=r"use either negtome[.]attach or"):
        pair()
    pair.pipe.update_components(guider=diffusers.AdaptiveProjectedGuidance())
    with pytest.raises(TypeError, match=r"has a AdaptiveProjectedGuidance; use negtome[.]attach"):
        NegToMeGuidance.for_pipeline(pair.pipe)
    with pytest.raises(TypeError, match=r"has no guider; use negtome[.]attach"):
        NegToMeGuidance.for_pipeline(pair.stock)
    step = NegToMeGuidance()
    step.set_state(0, 2, torch.tensor(900.0))
    with pytest.raises(TypeError, match="cannot guide a Linear; supported are UNet2DConditionModel"):
        step.prepare_models(torch.nn.Linear(2, 2))


def test_a_call_that_failed_before_the_denoiser_leaves_no_trace_in_what_follows(build, monkeypatch):
    """A ControlNet that raises, for example, stands between the guider's hook and the denoiser."""
    pair = build("SDXL")
    base = pair()
    before = tiny.state(pair.pipe)[1:]
    with negtome.attach(pair.pipe, CONFIG):
        expected = pair()

    def fail():
        """Let a call of the pipeline fail; return its guider."""
        pair.pipe.update_components(guider=NegToMeGuidance.for_pipeline(pair.pipe, **SETTINGS))
        prepare = NegToMeGuidance.prepare_models

        def prepare_and_raise(self, denoiser):
            prepare(self, denoiser)
            raise MemoryError("of a ControlNet")

        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(NegToMeGuidance, "prepare_models", prepare_and_raise)
            pair()
        assert tiny.state(pair.pipe)[1:] != before
        return pair.pipe.guider

    failed = fail()
    failed.remove()
    assert tiny.state(pair.pipe)[1:] == before
    fail()
    negtome.detach(pair.pipe)
    assert tiny.state(pair.pipe)[1:] == before
    with pytest.raises(RuntimeError, match="not attached"):
        negtome.detach(pair.pipe)
    fail()
    assert torch.equal(pair(), expected), "by the same guider"
    fail()
    pair.pipe.update_components(guider=pair.pipe.guider.new(**SETTINGS))
    assert torch.equal(pair(), expected), "by another guider"
    failed = fail()
    pair.pipe.update_components(guider=diffusers.ClassifierFreeGuidance.from_config(failed.config))
    with negtome.attach(pair.pipe, CONFIG) as attached:
        assert torch.equal(pair(), expected)
    assert attached.summary()["tokens_pushed"] > 0
    assert tiny.state(pair.pipe)[1:] == before and torch.equal(pair(), base)


def test_a_guider_keeps_no_weights_of_a_call_that_failed(build, monkeypatch):
    pair = build("SDXL")
    unet = pair.pipe.unet
    pair.pipe.update_components(unet=copy.deepcopy(unet), guider=NegToMeGuidance.for_pipeline(pair.pipe, **SETTINGS))
    failed, weights = pair.pipe.guider, weakref.ref(pair.pipe.unet)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(type(pair.pipe.scheduler), "step", mock.Mock(side_effect=MemoryError))
        pair()
    copied = pickle.loads(pickle.dumps(failed))
    assert (copied.settings, copied.summary()) == (failed.settings, failed.summary())
    pair.pipe.update_components(unet=unet)
    gc.collect()
    assert weights() is None


def test_a_guider_is_made_for_the_pipelines_of_attach_alone(build):
    for name in ("Wan22ModularPipeline", "QwenImageLayeredModularPipeline", "StableDiffusionXLModularPipeline"):
        with pytest.raises(TypeError, match=f"cannot be attached to a {name}.*supported") as caught:
            NegToMeGuidance.for_pipeline(getattr(diffusers, name)())
        assert "\n" not in str(caught.value)
    pair = build("SDXL")
    pair.pipe.unet_2 = pair.pipe.unet
    with pytest.raises(ValueError, match="has unet_2 for its late steps"):
        NegToMeGuidance.for_pipeline(pair.pipe)


def test_a_guider_keeps_guidance_switched_off(build):
    pair = build("Qwen-Image, guided")
    pair.pipe.guider.disable()
    unguided = pair()
    replacement = NegToMeGuidance.for_pipeline(pair.pipe, alpha=0)
    pair.pipe.update_components(guider=replacement)
    assert torch.equal(pair(), unguided)
    assert NegToMeGuidance.for_pipeline(pair.pipe, enabled=True).num_conditions == 2


def test_on_sdxl_a_scale_of_1_turns_the_guidance_off_and_enabled_false_is_refused(build):
    pair = build("SDXL")
    pair.pipe.guider.disable()
    with pytest.raises(ValueError, match="guidance_scale=1"):
        NegToMeGuidance.for_pipeline(pair.pipe)
    pair.pipe.update_components(guider=NegToMeGuidance.for_pipeline(pair.pipe, **SETTINGS, enabled=True))
    guided = pair()
    pair.pipe.update_components(guider=pair.pipe.guider.new(guidance_scale=1.0))
    unguided, summary = pair(), pair.pipe.guider.summary()
    assert not torch.equal(unguided, guided) and summary["tokens_pushed"] > 0
    pair.pipe.update_components(guider=pair.pipe.guider.new(guidance_scale=1.0, alpha=0))
    torch.testing.assert_close(pair(negative_prompt="a cat"), pair())


@pytest.mark.slow
def test_a_guider_refuses_prompts_of_several_lengths_with_advice_that_holds(build):
    pair = build("LTX")
    prompts = ["a dog", "a dog", "a cat on a red mat", "a cat on a red mat"]
    with negtome.attach(pair.pipe, CONFIG, group_size=2):
        pair((0, 1, 2, 3), prompts, count=1)
    pair.pipe.update_components(guider=NegToMeGuidance.for_pipeline(pair.pipe, **SETTINGS, group_size=2))
    with pytest.raises(ValueError, match=r"use negtome.attach with num_videos_per_prompt=1 and group_size"):
        pair((0, 1, 2, 3), prompts, count=1)


def test_attach_works_with_other_guiders(build):
    """Every condition is a call; a perturbed one is pushed too."""
    pair = build("SDXL")
    pair.pipe.update_components(guider=diffusers.AdaptiveProjectedGuidance(guidance_scale=5.0))
    base = pair()
    with negtome.attach(pair.pipe, CONFIG):
        result = pair()
    assert torch.equal(result[0], base[0])
    assert not any(torch.equal(result[k], base[k]) for k in (1, 2))


def test_another_api_of_guiders_is_an_error():
    class Other(diffusers.ClassifierFreeGuidance):
        def prepare_models(self, denoiser_and_more):
            pass

    guider.check_api(diffusers.ClassifierFreeGuidance)
    with pytest.raises(ImportError, match=r"expected Other.prepare_models to take denoiser.*negtome.attach\(pipe\)"):
        guider.check_api(Other)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_mini_sdxl(scale):
    folder = Path(__file__).parents[2] / "models" / "mini-sdxl"
    stock = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    pipe = diffusers.ModularPipeline.from_pretrained(folder)
    pipe.update_components(**{name: stock.components[name] for name in pipe.components if name in stock.components})
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=scale))
    options = {"prompt": "a photo of a dog", "num_images_per_prompt": 3, "num_inference_steps": 4, "output_type": "pt"}
    config = NegToMeConfig(threshold=0.5, timestep_range=(500, 1000))
    with negtome.attach(stock, config):
        expected = stock(**options, guidance_scale=scale, generator=generators((0, 1, 2))).images
    with negtome.attach(pipe, config) as attached:
        images = pipe(**options, generator=generators((0, 1, 2)), output="images")
    assert attached.summary()["tokens_pushed"] > 0
    pipe.update_components(guider=NegToMeGuidance.for_pipeline(pipe, threshold=0.5, timestep_range=(500, 1000)))
    assert torch.equal(pipe(**options, generator=generators((0, 1, 2)), output="images"), images)
    if scale == 1:
        assert torch.equal(images, expected)
    else:
        torch.testing.assert_close(images, expected, atol=0.02, rtol=0)


def test_the_block_loads_without_a_network(build, tmp_path, monkeypatch):
    """It puts the guider into the pipeline it is inserted into, with the guidance that was there."""
    folder = Path(__file__).parents[2] / "integrations" / "diffusers"
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    block = diffusers.ModularPipelineBlocks.from_pretrained(str(folder), trust_remote_code=True)
    pair = build("SDXL")
    with negtome.attach(pair.pipe, CONFIG):
        expected = pair()
    components = {**pair.components, "guider": pair.pipe.guider}
    blocks = pair.pipe.blocks
    blocks.sub_blocks.insert("negtome", block, 0)
    pair.pipe = blocks.init_pipeline()
    pair.pipe.update_components(**components)
    settings = {"negtome_threshold": -1, "negtome_timestep_range": (0, 1000), "negtome_min_side": 4}
    assert torch.equal(pair(**settings), expected)
    assert pair.pipe.guider.summary()["tokens_pushed"] > 0
