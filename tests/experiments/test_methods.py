"""NegToMe and negative prompts on tiny pipelines: the images, the restored pipeline, and the records."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import Colours, save_ip_adapter

import negtome
from eval.images import load_picture
from experiments.methods.assets import Retriever
from experiments.methods.combined import Combined
from experiments.methods.method import Baseline, MethodContext, sample
from experiments.methods.negative import NegativeIPAdapter, NegativePrompt
from experiments.methods.negtome import NegToMe, NegToMeFromAssets
from experiments.prompts import Group

PAIR = Group("one", "a red thing", "red", 0, 2)
NEAR, FAR = Group("near", "a red thing", "red", 0, 2), Group("far", "a thing", "red", 0, 2)
CALLS = {
    "sdxl": {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "blurry"},
    "flux": {
        "height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.5, "max_sequence_length": 16,
    },
}  # fmt: skip
STRENGTH = {"alpha": 0.9, "threshold": -1.0, "timestep_range": [0, 1000], "min_side": 4}
#: Guidance away from the negative prompt, which only Flux needs.
TRUE_SCALE = {"sdxl": None, "flux": 2.0}


@pytest.fixture
def retriever(tmp_path):
    """Two images of one concept, the nearer one masked; `retriever(prompt=None, preview=0.5)` for other thresholds."""
    folder = tmp_path / "assets" / "the red one"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, floor in (("1", 0), ("2", 60)):
        pixels = generator.integers(floor, 90, (32, 32, 3))
        pixels[..., 0] += 160
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[8:, 8:] = 255
    Image.fromarray(mask).save(folder / "1.mask.png")

    def make(prompt=0.9, preview=None):
        return Retriever(tmp_path / "assets", Colours(), {"prompt": prompt, "preview": preview}, preview_steps=1)

    return make


def generate(pipe, method, group, call):
    """Return the images of a group, uint8 [K, H, W, 3], and the method's context."""
    before = dict(call)
    with method.apply(pipe, group, call) as context:
        images = sample(pipe, group, context.call)
    assert call == before, "the configured call is shared"
    return (255 * images).round().astype(np.uint8), context


def shape_of(pipe):
    """Everything about a pipeline that a method might leave behind."""
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return (
        type(pipe), sorted(pipe.__dict__), sorted({*denoiser.__dict__, *denoiser._modules}), dict(denoiser.config),
        {name: type(part) for name, part in pipe.components.items()},
        [(name, type(module), len(module._forward_hooks)) for name, module in denoiser.named_modules()],
        {name: type(processor) for name, processor in denoiser.attn_processors.items()},
        list(denoiser.state_dict()),
    )  # fmt: skip


@contextlib.contextmanager
def untouched(pipe, call):
    """Check that the pipeline afterwards is what it was, and generates what it generated."""
    images = generate(pipe, Baseline(), NEAR, call)[0]
    before = shape_of(pipe)  # after a first call: a pipeline keeps its call's options
    yield images
    assert shape_of(pipe) == before
    assert np.array_equal(generate(pipe, Baseline(), NEAR, call)[0], images)


def test_the_baseline_is_the_stock_pipeline_bit_for_bit(pipe, kind):
    generators = [torch.Generator().manual_seed(seed) for seed in NEAR.image_seeds()]
    stock = pipe(NEAR.prompt, num_images_per_prompt=2, generator=generators, **CALLS[kind]).images
    images, context = generate(pipe, Baseline(), NEAR, CALLS[kind])
    assert np.array_equal(images, np.stack([np.array(image) for image in stock]))
    assert context.statistics() == {} and context.references is None
    assert (Baseline().settings(), Baseline().version) == ({}, 0)


def test_negtome_pushes_the_images_of_a_group_from_the_first(pipe, kind):
    method = NegToMe("negtome", **STRENGTH)
    with untouched(pipe, CALLS[kind]) as baseline:
        images, context = generate(pipe, method, NEAR, CALLS[kind])
        result = method.generate(pipe, NEAR, CALLS[kind])
    assert np.array_equal(images[0], baseline[0]) and not np.array_equal(images[1], baseline[1])
    assert context.statistics()["tokens_pushed"] > 0 and context.references is None
    assert np.array_equal((255 * result.images).round().astype(np.uint8), images)
    assert result.statistics == context.statistics() and result.references is None


@pytest.mark.parametrize("method", [NegToMeFromAssets, NegativePrompt])
@pytest.mark.parametrize("preview", [None, 0.999], ids=["prompt", "prompt and preview"])
def test_without_a_near_concept_the_images_are_the_baselines(pipe, kind, method, preview, retriever):
    baseline, _ = generate(pipe, Baseline(), FAR, CALLS[kind])
    strength = STRENGTH if method is NegToMeFromAssets else {"true_cfg_scale": 4.0}
    with untouched(pipe, CALLS[kind]):
        images, context = generate(pipe, method("m", retriever(0.99, preview), **strength), FAR, CALLS[kind])
    assert np.array_equal(images, baseline)
    assert context.call == CALLS[kind] and context.references == {} and context.statistics() == {}


def test_negtome_from_assets_is_an_attached_reference(pipe, kind, retriever):
    """All images of the concept with their masks, as `negtome.attach` would be called by hand."""
    with untouched(pipe, CALLS[kind]) as baseline:
        images, context = generate(pipe, NegToMeFromAssets("m", retriever(), **STRENGTH), NEAR, CALLS[kind])
    assert not any(np.array_equal(image, stock) for image, stock in zip(images, baseline, strict=True))
    assert list(context.references) == ["the red one/1.png", "the red one/2.png"]
    scores = list(context.references.values())
    assert 0.9 < scores[1] < scores[0] <= 1
    assert context.statistics()["tokens_pushed"] > 0

    assets = [asset for asset, _ in retriever().find(None, NEAR, {})]
    reference = negtome.Reference([asset.image for asset in assets], mask=[asset.mask for asset in assets])
    with negtome.attach(pipe, negtome.NegToMeConfig(**STRENGTH), references=reference):
        assert np.array_equal(images, generate(pipe, Baseline(), NEAR, CALLS[kind])[0])


def test_every_use_of_the_references_is_a_setting_that_changes_images(tiny_sdxl, retriever):
    variants = [{}, {"images": 1}, {"masks": False}, {"noise": False}, {"prompt": "a drawing of {}"},
                {"posterior": "sample"}]  # fmt: skip
    pixels, settings = set(), set()
    for options in variants:
        method = NegToMeFromAssets("m", retriever(), **STRENGTH, **options)
        images, context = generate(tiny_sdxl, method, NEAR, CALLS["sdxl"])
        pixels.add(images.tobytes())
        settings.add(str(method.settings()))
        assert list(context.references) == ["the red one/1.png", "the red one/2.png"][: options.get("images")]
    assert len(pixels) == len(settings) == len(variants)
    assert method.settings()["reference"] == "assets" and method.settings()["retriever"] == retriever().settings()


def test_a_negative_prompt_is_appended_to_the_models_own(pipe, kind, retriever):
    method = NegativePrompt("m", retriever(), "a picture of {}", TRUE_SCALE[kind])
    with untouched(pipe, CALLS[kind]) as baseline:
        images, context = generate(pipe, method, NEAR, CALLS[kind])
    expected = {"sdxl": {"negative_prompt": "blurry, a picture of the red one"},
                "flux": {"negative_prompt": "a picture of the red one", "true_cfg_scale": 2.0}}  # fmt: skip
    assert context.call == CALLS[kind] | expected[kind]
    # A concept is named once, and every one of its images is recorded.
    assert list(context.references) == ["the red one/1.png", "the red one/2.png"]
    assert not np.array_equal(images, baseline)
    assert np.array_equal(images, generate(pipe, Baseline(), NEAR, CALLS[kind] | expected[kind])[0])


def test_a_combination_pushes_on_top_of_the_negative_prompt(pipe, kind, retriever):
    alone = NegativePrompt("negative_prompt", retriever(), true_cfg_scale=TRUE_SCALE[kind])
    pushed = NegToMeFromAssets("negtome_reference", retriever(), **STRENGTH)
    method = Combined("both", {"negative_prompt": alone, "negtome_reference": pushed})
    with untouched(pipe, CALLS[kind]):
        images, context = generate(pipe, method, NEAR, CALLS[kind])
    prompted, alone_context = generate(pipe, alone, NEAR, CALLS[kind])
    assert context.call == alone_context.call
    assert context.references == alone_context.references and len(context.references) == 2, "recorded once"
    assert context.statistics()["tokens_pushed"] > 0
    # The push on top of the negative prompt.
    assert np.array_equal(images, generate(pipe, pushed, NEAR, context.call)[0])
    assert not np.array_equal(images, prompted)
    assert not np.array_equal(images, generate(pipe, pushed, NEAR, CALLS[kind])[0])
    images, context = generate(pipe, method, FAR, CALLS[kind])
    assert np.array_equal(images, generate(pipe, Baseline(), FAR, CALLS[kind])[0]) and context.references == {}


class Spy(Baseline):
    """Changes nothing and keeps the call that it was applied to."""

    seen = None

    @contextlib.contextmanager
    def apply(self, pipe, group, call):
        self.seen = dict(call)
        yield MethodContext(dict(call))


def test_combined_methods_look_for_assets_as_they_do_alone(tiny_sdxl, retriever):
    """Otherwise a negative prompt would drive the concept out of the preview that the next method searches."""
    spy = Spy()
    method = Combined("both", {"a": NegativePrompt("a", retriever()), "b": spy, "c": Baseline()})
    with method.apply(tiny_sdxl, NEAR, CALLS["sdxl"]) as context:
        assert spy.seen == CALLS["sdxl"]
        assert context.call["negative_prompt"] == "blurry, the red one"
    twice = Combined("twice", {"a": NegativePrompt("a", retriever()), "b": NegativePrompt("b", retriever())})
    context = twice.apply(tiny_sdxl, NEAR, CALLS["sdxl"])
    with pytest.raises(ValueError, match=r"method=twice combines .*\['negative_prompt'\]"), context:
        pass


def test_the_preview_leaves_no_trace(pipe, kind, retriever):
    """It is a call of the pipeline like any other, and neither the images nor the statistics depend on it."""
    previewing = retriever(None, -1.0)
    assets = previewing.find(pipe, NEAR, CALLS[kind])
    fixed = SimpleNamespace(find=lambda *_: assets)
    with untouched(pipe, CALLS[kind]):
        images, context = generate(pipe, NegToMeFromAssets("m", previewing, **STRENGTH), NEAR, CALLS[kind])
    expected, expected_context = generate(pipe, NegToMeFromAssets("m", fixed, **STRENGTH), NEAR, CALLS[kind])
    assert np.array_equal(images, expected)
    assert context.references == expected_context.references and len(context.references) == 2
    assert context.statistics() == expected_context.statistics()


def test_a_combination_has_the_settings_and_the_versions_of_its_parts(retriever):
    parts = {"a": NegativePrompt("a", retriever()), "b": NegToMeFromAssets("b", retriever(), **STRENGTH)}
    both = Combined("both", parts)
    assert [part["name"] for part in both.settings()["methods"]] == ["a", "b"]
    values = {key: both.settings()[key] for key in ("alpha", "reference", "negative_prompt")}
    assert values == {"alpha": 0.9, "reference": "assets", "negative_prompt": "{}"}
    parts["b"].version += 1
    assert Combined("both", parts).version == both.version + 1


# --- negative IP-Adapter ----------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["plain", "plus"])
def ip_adapter(request, tiny_sdxl, tmp_path):
    return save_ip_adapter(tmp_path / "ip", tiny_sdxl.unet, plus=request.param)


def test_a_negative_ip_adapter_shows_the_assets_to_the_unconditional_half(tiny_sdxl, retriever, ip_adapter):
    call = CALLS["sdxl"]
    with untouched(tiny_sdxl, call) as baseline:
        images, context = generate(tiny_sdxl, NegativeIPAdapter("m", retriever(), ip_adapter, 0.5), NEAR, call)
        assert not np.array_equal(images, baseline)
        assert list(context.references) == ["the red one/1.png", "the red one/2.png"]
        # It has no effect at scale 0, and loads nothing where no concept is near.
        images, _ = generate(tiny_sdxl, NegativeIPAdapter("m", retriever(), ip_adapter, 0.0), NEAR, call)
        assert np.array_equal(images, baseline)
        nowhere = ip_adapter | {"pretrained_model_name_or_path_or_dict": "/nowhere"}
        images, context = generate(tiny_sdxl, NegativeIPAdapter("m", retriever(), nowhere), FAR, call)
        assert np.array_equal(images, generate(tiny_sdxl, Baseline(), FAR, call)[0]) and context.references == {}
        interrupted = NegativeIPAdapter("m", retriever(), ip_adapter).apply(tiny_sdxl, NEAR, call)
        with pytest.raises(KeyboardInterrupt), interrupted:
            raise KeyboardInterrupt
    # The pipeline's own embeddings of an image prompt, with the halves exchanged: both images on the one side, and on
    # the other the adapter's embedding of no image.
    pictures = [load_picture(asset.file) for asset, _ in retriever().find(None, NEAR, {})]
    with NegativeIPAdapter("m", retriever(), ip_adapter).apply(tiny_sdxl, NEAR, call) as context, torch.no_grad():
        (usual,) = tiny_sdxl.prepare_ip_adapter_image_embeds([pictures], None, "cpu", 1, True)
        (exchanged,) = context.call["ip_adapter_image_embeds"]
    assert torch.equal(exchanged[0], usual[1]) and torch.equal(exchanged[1], usual[0])
    assert exchanged.shape[:2] == (2, 2) and not torch.equal(exchanged[0], exchanged[1])


def test_a_negative_ip_adapter_needs_weights(retriever):
    with pytest.raises(FileNotFoundError, match=r"method\.weights=\{pretrained_model_name_or_path_or_dict: .*leave"):
        NegativeIPAdapter("m", retriever(), None)
    method = NegativeIPAdapter("m", retriever(), {"weight_name": "x"}, 0.3)
    assert method.settings()["scale"] == 0.3 and method.settings()["ip_adapter"] == {"weight_name": "x"}
