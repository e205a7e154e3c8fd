"""Every method at work on tiny pipelines: what it changes, what it leaves alone, and what it says that it did."""

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
from experiments.methods.method import Baseline, GroupResult, Method, MethodContext, sample
from experiments.methods.negative import NegativeIPAdapter, NegativePrompt
from experiments.methods.negtome import NegToMe, NegToMeFromAssets
from experiments.prompts import Group

NEAR, FAR = Group("near", "a red thing", "red", 0, 2), Group("far", "a thing", "red", 0, 2)
CALLS = {
    "sdxl": {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "blurry"},
    "flux": {
        "height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.5, "max_sequence_length": 16,
    },
}  # fmt: skip
STRENGTH = {"alpha": 0.9, "threshold": -1.0, "timestep_range": [0, 1000], "min_side": 4}


@pytest.fixture
def retriever(tmp_path):
    """Two pictures of one asset, the nearer one masked; `retriever(prompt=None, preview=0.5)` for other thresholds."""
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
    """Do what experiments.generate does: the images as one array, and what was applied."""
    generators = [torch.Generator().manual_seed(seed) for seed in group.image_seeds()]
    before = dict(call)
    with method.apply(pipe, group, call) as applied:
        images = pipe(group.prompt, num_images_per_prompt=group.size, generator=generators, **applied.call).images
    assert call == before, "the configured call is everybody's"
    return np.stack([np.array(image) for image in images]), applied


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
    """Check that the pipeline is and makes afterwards what it was and made before."""
    made = generate(pipe, Baseline(), NEAR, call)[0]
    before = shape_of(pipe)  # after a first call: a pipeline keeps its call's options
    yield
    assert shape_of(pipe) == before
    assert np.array_equal(generate(pipe, Baseline(), NEAR, call)[0], made)


def test_the_baseline_is_the_stock_pipeline_bit_for_bit(pipe, kind):
    generators = [torch.Generator().manual_seed(seed) for seed in NEAR.image_seeds()]
    stock = pipe(NEAR.prompt, num_images_per_prompt=2, generator=generators, **CALLS[kind]).images
    images, applied = generate(pipe, Baseline(), NEAR, CALLS[kind])
    assert np.array_equal(images, np.stack([np.array(image) for image in stock]))
    assert applied.statistics() == {} and applied.references is None
    assert (Baseline().settings(), Baseline().version) == ({}, 0)


def test_negtome_among_the_images_of_a_group(pipe, kind):
    baseline, _ = generate(pipe, Baseline(), NEAR, CALLS[kind])
    with untouched(pipe, CALLS[kind]):
        images, applied = generate(pipe, NegToMe("negtome", **STRENGTH), NEAR, CALLS[kind])
    assert np.array_equal(images[0], baseline[0]) and not np.array_equal(images[1], baseline[1])
    assert applied.statistics()["tokens_pushed"] > 0 and applied.references is None


@pytest.mark.parametrize("method", [NegToMeFromAssets, NegativePrompt])
@pytest.mark.parametrize("preview", [None, 0.999], ids=["prompt", "prompt and preview"])
def test_where_no_asset_is_near_the_images_are_the_baselines(pipe, kind, method, preview, retriever):
    baseline, _ = generate(pipe, Baseline(), FAR, CALLS[kind])
    strength = STRENGTH if method is NegToMeFromAssets else {"true_cfg_scale": 4.0}
    with untouched(pipe, CALLS[kind]):
        images, applied = generate(pipe, method("m", retriever(0.99, preview), **strength), FAR, CALLS[kind])
    assert np.array_equal(images, baseline)
    assert applied.call == CALLS[kind] and applied.references == {} and applied.statistics() == {}


def test_negtome_from_assets_is_an_attached_reference(pipe, kind, retriever):
    """All pictures of the asset with their masks, as `negtome.attach` would be called by hand."""
    baseline, _ = generate(pipe, Baseline(), NEAR, CALLS[kind])
    method = NegToMeFromAssets("m", retriever(), **STRENGTH)
    with untouched(pipe, CALLS[kind]):
        images, applied = generate(pipe, method, NEAR, CALLS[kind])
    assert not any(np.array_equal(image, stock) for image, stock in zip(images, baseline, strict=True))
    assert list(applied.references) == ["the red one/1.png", "the red one/2.png"]
    scores = list(applied.references.values())
    assert 0.9 < scores[1] < scores[0] <= 1
    assert applied.statistics()["tokens_pushed"] > 0

    found = retriever().find(None, NEAR, {})
    reference = negtome.Reference([asset.image for asset, _ in found], mask=[asset.mask for asset, _ in found])
    config = negtome.NegToMeConfig(**STRENGTH)
    generators = [torch.Generator().manual_seed(seed) for seed in NEAR.image_seeds()]
    with negtome.attach(pipe, config, references=reference):
        by_hand = pipe(NEAR.prompt, num_images_per_prompt=2, generator=generators, **CALLS[kind]).images
    assert np.array_equal(images, np.stack([np.array(image) for image in by_hand]))


def test_what_is_used_of_the_assets_is_a_setting(tiny_sdxl, retriever):
    def made(**options):
        method = NegToMeFromAssets("m", retriever(), **STRENGTH, **options)
        images, applied = generate(tiny_sdxl, method, NEAR, CALLS["sdxl"])
        return images.tobytes(), method.settings(), list(applied.references)

    variants = [{}, {"images": 1}, {"masks": False}, {"noise": False}, {"prompt": "a drawing of {}"},
                {"posterior": "sample"}]  # fmt: skip
    found = [made(**options) for options in variants]
    assert len({pixels for pixels, _, _ in found}) == len(variants), "each changes pixels"
    settings = [settings for _, settings, _ in found]
    assert all(one != other for i, one in enumerate(settings) for other in settings[:i]), "and the run's identity"
    assert [len(references) for _, _, references in found] == [2, 1, 2, 2, 2, 2]
    assert found[1][2] == ["the red one/1.png"], "the nearest"
    assert settings[0]["reference"] == "assets" and settings[0]["retriever"] == retriever().settings()
    with pytest.raises(ValueError, match="images must be at least 1"):
        NegToMeFromAssets("m", retriever(), images=0)


def test_a_negative_prompt_is_appended_to_the_models_own(pipe, kind, retriever):
    """True guidance only where it is asked for: that is, for Flux."""
    scale = {"sdxl": None, "flux": 2.0}[kind]
    method = NegativePrompt("m", retriever(), "a picture of {}", scale)
    with untouched(pipe, CALLS[kind]):
        images, applied = generate(pipe, method, NEAR, CALLS[kind])
    expected = {"sdxl": {"negative_prompt": "blurry, a picture of the red one"},
                "flux": {"negative_prompt": "a picture of the red one", "true_cfg_scale": 2.0}}  # fmt: skip
    assert applied.call == CALLS[kind] | expected[kind]
    # One asset is named once, and every one of its pictures is recorded.
    assert list(applied.references) == ["the red one/1.png", "the red one/2.png"]
    assert not np.array_equal(images, generate(pipe, Baseline(), NEAR, CALLS[kind])[0])
    by_hand, _ = generate(pipe, Baseline(), NEAR, CALLS[kind] | expected[kind])
    assert np.array_equal(images, by_hand)


def test_a_pipeline_that_takes_no_negative_prompt_is_refused(retriever):
    class Distilled:
        def __call__(self, prompt, guidance_scale=4.0): ...

    method = NegativePrompt("m", retriever())
    with pytest.raises(ValueError, match=r"method=m needs .* negative prompt, which a Distilled does not: leave"):
        generate(Distilled(), method, NEAR, {})


def test_both_at_once(pipe, kind, retriever):
    scale = {"sdxl": None, "flux": 2.0}[kind]
    alone = NegativePrompt("negative_prompt", retriever(), true_cfg_scale=scale)
    pushed = NegToMeFromAssets("negtome_reference", retriever(), **STRENGTH)
    method = Combined("both", {"negative_prompt": alone, "negtome_reference": pushed})
    with untouched(pipe, CALLS[kind]):
        images, applied = generate(pipe, method, NEAR, CALLS[kind])
    prompted, alone_applied = generate(pipe, alone, NEAR, CALLS[kind])
    assert applied.call == alone_applied.call
    assert applied.references == alone_applied.references and len(applied.references) == 2, "recorded once"
    assert applied.statistics()["tokens_pushed"] > 0
    # The push on top of the negative prompt, as the one is applied to a call that has the other.
    on_top, _ = generate(pipe, pushed, NEAR, applied.call)
    assert np.array_equal(images, on_top)
    assert not np.array_equal(images, prompted)
    assert not np.array_equal(images, generate(pipe, pushed, NEAR, CALLS[kind])[0])
    # Nothing found: the baseline.
    images, applied = generate(pipe, method, FAR, CALLS[kind])
    assert np.array_equal(images, generate(pipe, Baseline(), FAR, CALLS[kind])[0]) and applied.references == {}


class BestOf(Method):
    """Of several drafts of every image, each from a noise of its own, the one that is least like the first."""

    name, version = "best_of", 1

    def __init__(self, drafts):
        self.drafts = drafts

    def settings(self):
        return {"drafts": self.drafts}

    def generate(self, pipe, group, call):
        drafts = np.stack([
            sample(pipe, group, call, [seed + draft for seed in group.image_seeds()]) for draft in range(self.drafts)
        ])  # fmt: skip
        best = np.abs(drafts - drafts[0]).mean(axis=(2, 3, 4)).argmax(axis=0)
        return GroupResult(drafts[best, np.arange(group.size)], {"chosen": best.tolist()})


def test_a_method_may_call_the_pipeline_several_times_and_choose(pipe, kind):
    stock, _ = generate(pipe, Baseline(), NEAR, CALLS[kind])
    with untouched(pipe, CALLS[kind]):
        one, best = (BestOf(drafts).generate(pipe, NEAR, CALLS[kind]) for drafts in (1, 4))
    assert np.array_equal((255 * one.images).round().astype(np.uint8), stock), "the first draft is the baseline's"
    assert best.images.shape == one.images.shape == (2, *stock.shape[1:])
    assert min(best.statistics["chosen"]) > 0 and best.references is None
    for index, draft in enumerate(best.statistics["chosen"]):
        again = sample(pipe, NEAR, CALLS[kind], [seed + draft for seed in NEAR.image_seeds()])
        assert np.array_equal(best.images[index], again[index])
    with pytest.raises(ValueError, match=r"combines methods of one call, got \['best_of'\]"):
        Combined("both", {"a": Baseline(), "b": BestOf(2)})


def test_a_method_of_one_call_draws_what_it_makes_of_that(pipe, kind):
    method = NegToMe("negtome", **STRENGTH)
    images, applied = generate(pipe, method, NEAR, CALLS[kind])
    drawn = method.generate(pipe, NEAR, CALLS[kind])
    assert np.array_equal((255 * drawn.images).round().astype(np.uint8), images)
    assert drawn.statistics == applied.statistics() and drawn.references is None


class Spy(Baseline):
    """Changes nothing and remembers the call that it was applied to."""

    seen = None

    @contextlib.contextmanager
    def apply(self, pipe, group, call):
        self.seen = dict(call)
        yield MethodContext(dict(call))


def test_combined_methods_look_for_assets_as_they_do_alone(tiny_sdxl, retriever):
    """Else a negative prompt would drive the asset out of the preview by which the next method is to find it."""
    spy = Spy()
    method = Combined("both", {"a": NegativePrompt("a", retriever()), "b": spy, "c": Baseline()})
    with method.apply(tiny_sdxl, NEAR, CALLS["sdxl"]) as applied:
        assert spy.seen == CALLS["sdxl"]
        assert applied.call["negative_prompt"] == "blurry, the red one"
    twice = Combined("twice", {"a": NegativePrompt("a", retriever()), "b": NegativePrompt("b", retriever())})
    with (
        pytest.raises(ValueError, match=r"method=twice combines .*\['negative_prompt'\]"),
        twice.apply(tiny_sdxl, NEAR, CALLS["sdxl"]),
    ):
        pass


def test_the_preview_leaves_no_trace(pipe, kind, retriever):
    """It is a call of the pipeline like any other, and neither the images nor their log know of it."""
    looking = retriever(None, -1.0)
    found = looking.find(pipe, NEAR, CALLS[kind])
    knowing = SimpleNamespace(find=lambda *_: found)
    with untouched(pipe, CALLS[kind]):
        previewed, applied = generate(pipe, NegToMeFromAssets("m", looking, **STRENGTH), NEAR, CALLS[kind])
    told, expected = generate(pipe, NegToMeFromAssets("m", knowing, **STRENGTH), NEAR, CALLS[kind])
    assert np.array_equal(previewed, told)
    assert applied.references == expected.references and len(applied.references) == 2
    assert applied.statistics() == expected.statistics()


def test_identities_of_the_methods(retriever):
    """Settings of a combination are those of its parts, and a part of another version makes another run."""
    parts = {"a": NegativePrompt("a", retriever()), "b": NegToMeFromAssets("b", retriever(), **STRENGTH)}
    both = Combined("both", parts)
    assert [part["name"] for part in both.settings()["methods"]] == ["a", "b"]
    assert {key: both.settings()[key] for key in ("alpha", "reference", "negative_prompt")} == {
        "alpha": 0.9, "reference": "assets", "negative_prompt": "{}",
    }  # fmt: skip
    parts["b"].version += 1
    assert Combined("both", parts).version == both.version + 1


# --- negative IP-Adapter ----------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["plain", "plus"])
def ip_adapter(request, tiny_sdxl, tmp_path):
    return save_ip_adapter(tmp_path / "ip", tiny_sdxl.unet, plus=request.param)


def test_a_negative_ip_adapter_shows_the_assets_to_the_unconditional_half(tiny_sdxl, retriever, ip_adapter):
    call = CALLS["sdxl"]
    baseline, _ = generate(tiny_sdxl, Baseline(), NEAR, call)
    with untouched(tiny_sdxl, call):
        images, applied = generate(tiny_sdxl, NegativeIPAdapter("m", retriever(), ip_adapter, 0.5), NEAR, call)
        assert not np.array_equal(images, baseline)
        assert list(applied.references) == ["the red one/1.png", "the red one/2.png"]
        # Of no effect at scale 0; and nothing is loaded where no asset is near.
        images, _ = generate(tiny_sdxl, NegativeIPAdapter("m", retriever(), ip_adapter, 0.0), NEAR, call)
        assert np.array_equal(images, baseline)
        nowhere = ip_adapter | {"pretrained_model_name_or_path_or_dict": "/nowhere"}
        images, applied = generate(tiny_sdxl, NegativeIPAdapter("m", retriever(), nowhere), FAR, call)
        assert np.array_equal(images, generate(tiny_sdxl, Baseline(), FAR, call)[0]) and applied.references == {}
    # What the pipeline itself makes of an image prompt, with the halves exchanged: both of its pictures on the one
    # side, and on the other what the adapter was trained to take for none.
    pictures = [load_picture(asset.file) for asset, _ in retriever().find(None, NEAR, {})]
    with NegativeIPAdapter("m", retriever(), ip_adapter).apply(tiny_sdxl, NEAR, call) as applied, torch.no_grad():
        (usual,) = tiny_sdxl.prepare_ip_adapter_image_embeds([pictures], None, "cpu", 1, True)
        (given,) = applied.call["ip_adapter_image_embeds"]
    assert torch.equal(given[0], usual[1]) and torch.equal(given[1], usual[0])
    assert given.shape[:2] == (2, 2) and not torch.equal(given[0], given[1])


def test_the_ip_adapter_is_unloaded_when_generation_fails(tiny_sdxl, retriever, ip_adapter):
    with (
        untouched(tiny_sdxl, CALLS["sdxl"]),
        pytest.raises(KeyboardInterrupt),
        NegativeIPAdapter("m", retriever(), ip_adapter).apply(tiny_sdxl, NEAR, CALLS["sdxl"]),
    ):
        raise KeyboardInterrupt


def test_a_negative_ip_adapter_needs_weights_and_guidance(tiny_sdxl, retriever):
    with pytest.raises(FileNotFoundError, match=r"method\.weights=\{pretrained_model_name_or_path_or_dict: .*leave"):
        NegativeIPAdapter("m", retriever(), None)
    method = NegativeIPAdapter("m", retriever(), {"weight_name": "x"}, 0.3)
    assert method.settings()["scale"] == 0.3 and method.settings()["ip_adapter"] == {"weight_name": "x"}
    with (
        pytest.raises(ValueError, match=r"needs guidance, got guidance_scale=1"),
        method.apply(tiny_sdxl, NEAR, CALLS["sdxl"] | {"guidance_scale": 1.0}),
    ):
        pass
