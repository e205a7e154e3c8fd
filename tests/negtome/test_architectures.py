"""Every pipeline of the table, tiny and with random weights: what holds for all of them."""

import functools
import inspect
import re
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from packaging.version import Version

import negtome
from negtome import NegToMeConfig, Reference
from negtome.architectures import ARCHITECTURES
from negtome.call_inspection import CallReader
from negtome.sites import find_architecture

#: Everything, everywhere, all the time.
CONFIG = NegToMeConfig(threshold=-1, timestep_range=(0, 1000), min_side=4)


def slow_but(*names, among=tuple(tiny.CASES)):
    """Return cases as parameters of which all but some are slow tests."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in among]


#: By default, each way to hold rows, text and tokens is tested once: guidance in one batch, perturbed, reversed, and by
#: further calls; features of several sizes; packed tokens, those of input images, lists, masks, videos.
REPRESENTATIVE = (
    "SDXL PAG", "Flux, true guidance", "SD3", "Sana, unguided", "CogView4", "FLUX.2 dev, given image",
    "Qwen-Image, guided", "Z-Image, guidance truncated", "Lumina 2, guidance truncated", "HunyuanImage", "Wan",
)  # fmt: skip
#: A case of each architecture.
ONE_EACH = [next(name for name, (cls, *_) in tiny.CASES.items() if cls in row.pipelines) for row in ARCHITECTURES]


@pytest.fixture(scope="module", params=slow_but(*REPRESENTATIVE))
def case(request, _tiny_pipelines):
    """A tiny pipeline and the options of its call, shared: every test leaves it as it was."""
    pipe, options = tiny.build(request.param, _tiny_pipelines)
    generate(pipe, options)  # diffusers keeps attributes of the last call
    return pipe, options


@pytest.fixture(autouse=True)
def _certain(monkeypatch):
    """Leave nothing to chance in what encodes: pipelines draw that for all images from the first one's generator."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def generate(pipe, options, seeds=(0, 1, 2), prompt="a dog"):
    """Return the latents of one call, one generator an image, or a video."""
    number = find_architecture(pipe).per_prompt
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompt=prompt, generator=generator, output_type="latent", **{number: len(seeds)}, **options)[0]


def state(pipe):
    modules = [m for part in pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]
    return [(type(owner), sorted(owner.__dict__)) for owner in (pipe, *modules)]


def calls(pipe, options, monkeypatch, change=None, **others):
    """Return the arguments of every call of the denoiser in one call of the pipeline, as it gets them in the end.

    Args:
        change: changes the latents in place before.
    """
    architecture, found = find_architecture(pipe), []
    denoiser = getattr(pipe, architecture.denoiser)
    original = type(denoiser).forward
    names = tuple(inspect.signature(original).parameters)[1:]

    def forward(self, *args, **kwargs):
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if change is not None:
            change(arguments[architecture.sample])
        within = [(name, value) for name, value in arguments.items() if isinstance(value, dict)]
        within = {f"{name}.{key}": value for name, values in within for key, value in values.items()}
        rows = (torch.Tensor, list) if architecture.list_inputs else torch.Tensor
        with_rows = {name: value for name, value in (arguments | within).items() if isinstance(value, rows)}
        found.append(with_rows)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(denoiser, "forward", forward.__get__(denoiser))
        generate(pipe, options, **others)
    return found


def test_every_pipeline_of_the_table_is_tested():
    assert {name for name, *_ in tiny.CASES.values()} == {name for a in ARCHITECTURES for name in a.pipelines}


def test_images_of_a_group_move_and_no_others(case):
    pipe, options = case
    before, base = state(pipe), generate(pipe, options)
    with negtome.attach(pipe, CONFIG) as attached:
        result = generate(pipe, options)
    assert result.isfinite().all() and torch.equal(result[0], base[0])
    assert all((result[k] - base[k]).abs().max() > 1e-3 for k in (1, 2))
    summary = attached.summary()
    assert summary["tokens_pushed"] == summary["tokens_compared"] > 0
    steps = pipe.scheduler.timesteps.tolist()[-getattr(pipe, "num_timesteps", 2) :]  # all, or the last after an image
    assert summary["timesteps"] == steps, "each once"
    with negtome.attach(pipe, CONFIG.replace(alpha=0)):
        assert torch.equal(generate(pipe, options), base)
    assert state(pipe) == before
    assert torch.equal(generate(pipe, options), base)
    base = generate(pipe, options, (0, 1, 2, 3))
    with negtome.attach(pipe, CONFIG, group_size=2):
        result, *others = (generate(pipe, options, seeds) for seeds in ((0, 1, 2, 3), (0, 1, 8, 9), (8, 9, 2, 3)))
    assert torch.equal(result[:2], others[0][:2]) and torch.equal(result[2:], others[1][2:])
    assert torch.equal(result[::2], base[::2])
    assert all((result[k] - base[k]).abs().max() > 1e-3 for k in (1, 3))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize("name", slow_but("Flux", "Sana", among=ONE_EACH))
def test_still_images_are_bit_identical_in_half_precision(_tiny_pipelines, name, dtype):
    """Kernels choose their order of summation by the memory layout, which shows in half precision first."""
    pipe, options = tiny.build(name, _tiny_pipelines)
    pipe.to(dtype)
    base = generate(pipe, options)
    for still in ({"alpha": 0}, {"threshold": 1}):
        with negtome.attach(pipe, CONFIG.replace(**still)) as attached:
            assert torch.equal(generate(pipe, options), base)
        assert attached.summary()["tokens_compared"] > 0
    with negtome.attach(pipe, CONFIG):
        result = generate(pipe, options)
    assert torch.equal(result[0], base[0])
    assert not any(torch.equal(result[k], base[k]) for k in (1, 2))


@pytest.mark.parametrize("name", slow_but("SD1.5", "Sana", among=ONE_EACH))
def test_no_settings_are_needed(_tiny_pipelines, name):
    pipe, options = tiny.build(name, _tiny_pipelines)
    options = {key: value for key, value in options.items() if key not in ("strength", "image")}
    options["num_inference_steps"] = 8
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    base = generate(pipe, options)
    with negtome.attach(pipe) as attached:
        result = generate(pipe, options)
    assert attached.summary()["tokens_pushed"] > 0
    assert torch.equal(result[0], base[0]) and not torch.equal(result[1], base[1])


def test_the_tokens_of_the_image_are_pushed_and_no_others(case, monkeypatch):
    """Where every token attends to itself alone, what changes in the latents changes its own token only."""
    pipe, options = case
    architecture, shape = find_architecture(pipe), generate(pipe, options).shape
    denoiser, patch = getattr(pipe, architecture.denoiser), architecture.patch
    length = shape[1] if len(shape) == 3 else shape[2:].numel() // patch**2
    mixing = (m for m in denoiser.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size != m.stride)
    if any(max(m.kernel_size) > 1 for m in mixing):  # there is nothing else in self-attention
        lengths = set()
        with negtome.attach(pipe, CONFIG, push=lambda site, old, new, size: lengths.add(old.shape[1]) or old):
            generate(pipe, options)
        assert lengths == ({length, length // 4} if architecture.levels else {length})
        return

    def itself(query, key, value, *args, **kwargs):
        return value if value.shape == query.shape else torch.zeros_like(query)  # of the text

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", itself)

    def pushed(token=None):
        def change(sample):
            if token is None:
                return
            row, column = divmod(token, shape[-1] // patch)
            frame, row = divmod(row, shape[-2] // patch)
            for one in sample:  # [N, C], [c, h, w] or [c, F, h, w]
                place = (0, row * patch, column * patch) if one.dim() == 3 else (0, frame, row * patch, column * patch)
                one[(token, 0) if one.dim() == 2 else place] += 1

        tokens = []
        with negtome.attach(pipe, CONFIG, push=lambda site, old, new, size: tokens.append((site, old)) or old) as found:
            seen = calls(pipe, options, monkeypatch, change)
        sample = seen[0][architecture.sample][0]
        return tokens[: len(found.sites)], len(sample) if sample.dim() == 2 else length

    plain, total = pushed()
    for token in (0, 13, length - 1, *range(length, total, 30)):
        for (_, old), (site, new) in zip(plain, pushed(token)[0], strict=True):
            assert new.shape[1] == length, site
            changed = (new != old).any(dim=2).any(dim=0).nonzero().flatten().tolist()
            assert changed == ([token] if token < length else []), site


def encoded(pipe, image):
    """Return an image's latents [1, c, h, w] as the pipeline noises them, and how it packs such, by its own code."""
    name, vae, pixels = find_architecture(pipe).name, pipe.vae, 2 * image[None] - 1
    if name in ("Qwen", "Krea2"):
        latents = vae.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0]
        mean, std = (torch.tensor(vae.config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        return (latents - mean) / std, lambda latents: pipe._pack_latents(latents, *latents.shape)
    latents = vae.encode(pixels)[0]
    latents = latents if isinstance(latents, torch.Tensor) else latents.mean
    if name == "Flux2":
        latents = vae.bn(torch.nn.functional.pixel_unshuffle(latents, 2))
        return latents, lambda latents: latents.flatten(2).mT
    latents = (latents - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor
    if name == "ZImage":
        return latents, lambda latents: latents[:, :, None]
    packs = name in ("Flux", "Chroma")
    return latents, lambda latents: pipe._pack_latents(latents, *latents.shape) if packs else latents


def halved(rows, halves):
    """Return the halves of a batch, be it a tensor or a list."""
    size = len(rows) // halves
    return [rows[k * size : (k + 1) * size] for k in range(halves)]


def test_a_reference_rides_along(case, monkeypatch):
    """Its row is its image, noised as the others are, under its own prompt; no other row changes."""
    pipe, options = case
    architecture, image = find_architecture(pipe), tiny.OTHER[0].flip(2)
    if architecture.video:
        with pytest.raises(ValueError, match=f"no references for a {type(pipe).__name__}.*a video; use groups"):
            negtome.attach(pipe, CONFIG, references=Reference(image))
        return
    generator = torch.Generator().manual_seed(3)
    latents, pack = encoded(pipe, image)
    noise = torch.randn(latents.shape, generator=generator)
    before, base = state(pipe), generate(pipe, options)
    equal = architecture.name in ("Qwen", "Lumina2")  # which do not pad, or take the padding out
    other = "a cow" if equal else "a mouse"
    if "image" in inspect.signature(pipe.encode_prompt).parameters:
        with pytest.raises(ValueError, match="prompt together with the image to edit"):
            negtome.attach(pipe, CONFIG, references=Reference(image, prompt=other))
        other = None
    plain, mouse = (calls(pipe, options, monkeypatch, prompt=prompt) for prompt in ("a dog", other or "a dog"))
    posterior = "sample" if architecture.frames else "mode"  # the same here
    given = [Reference(image, seed=3, prompt=other, posterior=posterior), None, None]
    with negtome.attach(pipe, CONFIG.replace(alpha=0), references=given):
        still = calls(pipe, options, monkeypatch)
        torch.testing.assert_close(generate(pipe, options), base, rtol=1e-3, atol=1e-3)
    assert len(still) == len(plain) == len(mouse)
    for number, (found, stock, own) in enumerate(zip(still, plain, mouse, strict=True)):
        halves = len(stock[architecture.sample]) // 3
        batch, stock_batch = (halved(x[architecture.sample], halves) for x in (found, stock))
        assert {len(half) for half in batch} == {4}
        if not number:
            for half, stock_half in zip(batch, stock_batch, strict=True):
                assert all(torch.equal(*rows) for rows in zip(half[:3], stock_half, strict=True))
        time = torch.as_tensor(stock[architecture.time]).flatten()[0]
        if hasattr(pipe.scheduler, "scale_noise") or pipe.scheduler.config.get("use_flow_sigmas"):
            sigmas, sigma = pipe.scheduler.sigmas, architecture.timestep_scale(time) / 1000
            sigma = sigmas[(sigmas - sigma).abs().argmin()]  # some give whole timesteps
            row = (1 - sigma) * latents + sigma * noise
        else:
            share = pipe.scheduler.alphas_cumprod[int(time)]
            row = share.sqrt() * latents + (1 - share).sqrt() * noise
        row = pack(row)
        leading = tuple(slice(size) for size in row.shape[1:])
        for one in batch:
            torch.testing.assert_close(one[3][leading], row[0], rtol=1e-3, atol=1e-3)
            lent = torch.ones_like(one[3], dtype=torch.bool)
            lent[leading] = False
            assert torch.equal(one[3][lent], one[0][lent])
        # Whatever else has a row for an image, but for what a ControlNet made of its lender.
        others = {name for name, value in found.items() if isinstance(value, list) or value.shape[:1] == (4 * halves,)}
        others -= {architecture.sample, "mid_block_additional_residual"}
        assert others >= {name for name in filter(None, architecture.prompts) if name in stock}
        for name in others:
            for text, dog, cat in zip(*(halved(x[name], halves) for x in (found, stock, own)), strict=True):
                assert all(torch.equal(*rows) for rows in zip(text[:3], dog, strict=True))
                torch.testing.assert_close(text[3], cat[0], rtol=1e-4, atol=1e-4)
    with negtome.attach(pipe, CONFIG, references=given):
        result = generate(pipe, options)
    assert (result[0] - base[0]).abs().max() > 1e-3
    torch.testing.assert_close(result[1:], base[1:], rtol=1e-3, atol=1e-3)
    assert state(pipe) == before


@pytest.mark.parametrize(
    ("name", "mouse"),
    # HunyuanImage encodes what is quoted once more, and that has a mask of its own.
    [
        ("Sana", "a mouse"),
        *(pytest.param(name, "a mouse", marks=pytest.mark.slow) for name in ("Qwen-Image", "LTX")),
        ("HunyuanImage, unguided", 'a "c"'),
    ],
)
def test_prompts_whose_masks_are_mixed_up_are_refused(_tiny_pipelines, name, mouse):
    pipe, options = tiny.build(name, _tiny_pipelines)
    seeds = (0, 1, 2, 3)

    def images(prompts, each, seeds=seeds, **settings):
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        with negtome.attach(pipe, CONFIG, **settings):
            return pipe(prompts, output_type="latent", **{architecture.per_prompt: each}, **options)[0]

    architecture = find_architecture(pipe)
    for settings in ({"group_size": 2}, {"references": Reference(tiny.OTHER[0])})[: 2 - architecture.video]:
        with pytest.raises(ValueError, match=rf"prompts of one length.*PR #14147.*{architecture.per_prompt}=1"):
            images(["a dog", mouse], 2, **settings)
    if name == "Qwen-Image" and Version(diffusers.__version__) < Version("0.42"):
        pytest.skip(
            "this diffusers takes no notice of the masks, so that images depend on the others' prompts without us"
        )
    result = images(["a dog", "a dog", mouse, mouse], 1, group_size=2)
    for half, prompt in (slice(0, 2), "a dog"), (slice(2, 4), mouse):
        torch.testing.assert_close(images(prompt, 2, seeds[half]), result[half], rtol=1e-3, atol=1e-3)
    same = images(["a dog", "a cat"], 2, group_size=2)
    torch.testing.assert_close(same[:2], result[:2], rtol=1e-3, atol=1e-3)


def test_texts_of_several_lengths_are_refused_if_padding_is_dropped(_tiny_pipelines):
    pipe, options = tiny.build("Lumina 2, unguided", _tiny_pipelines)
    reference = Reference(tiny.OTHER[0], prompt="a mouse")
    for number in (1, 2):
        with (
            pytest.raises(ValueError, match="prompts of one length, got several: the image's tokens follow its text"),
            negtome.attach(pipe, CONFIG, group_size=2),
        ):
            pipe(["a dog", "a mouse"], num_images_per_prompt=number, **options)
    with (
        pytest.raises(ValueError, match="embeddings of 31 tokens, as those of a Reference's prompt, got 29"),
        negtome.attach(pipe, CONFIG, references=reference),
    ):
        generate(pipe, options)


@pytest.mark.parametrize(
    ("name", "size", "places"),
    [
        # 66 tokens of the image, padded to 96, and from the second block on those of the text, to 32.
        (
            "Z-Image", {"height": 24, "width": 44},
            {"noise_refiner.0.attention.to_out.0": (96, 0, 66, 32), "layers.0.attention.to_out.0": (128, 0, 66, 32)},
        ),
        # 64 tokens of the image and 256 of the given one, at last behind 12 of the text and with the MLP beside them.
        (
            "FLUX.2 dev, given image", {},
            {"transformer_blocks.0.attn.to_out.0": (320, 0, 64, 32)}
            | {f"single_transformer_blocks.{k}.attn.to_out": (332, 12, 76, 32) for k in range(2)},
        ),
        # Texts come first: of CogView4 padded to 16 tokens, of Lumina as long as it is, from its second block on.
        ("CogView4", {}, {f"transformer_blocks.{k}.attn1.to_out.0": (80, 16, 80, 32) for k in range(2)}),
        (
            "Lumina 2, unguided", {},
            {"noise_refiner.0.attn.to_out.0": (64, 0, 64, 32), "layers.0.attn.to_out.0": (93, 29, 93, 32)},
        ),
    ],
)  # fmt: skip
def test_the_push_agrees_with_one_written_by_hand(_tiny_pipelines, name, size, places):
    pipe, options = tiny.build(name, _tiny_pipelines)
    options |= size
    with negtome.attach(pipe, CONFIG.replace(alpha=0.7)) as attached:
        result = generate(pipe, options)
    assert attached.sites == tuple(places)

    def push(module, arguments, place):
        length, first, last, width = place
        assert arguments[0].shape[1] == length
        new = arguments[0].clone()
        for start in range(0, len(new), 3):
            source = new[start, first:last, :width]
            for row in (start + 1, start + 2):
                tokens = new[row, first:last, :width]
                similarity = torch.nn.functional.cosine_similarity(tokens[:, None], source[None], dim=-1)
                tokens += 0.7 * (tokens - source[similarity.argmax(dim=1)])
        return (new, *arguments[1:])

    base = generate(pipe, options)
    for site, place in places.items():
        pipe.transformer.get_submodule(site).register_forward_pre_hook(functools.partial(push, place=place))
    torch.testing.assert_close(result, generate(pipe, options), rtol=1e-4, atol=1e-4)
    assert (result[1:] - base[1:]).abs().amax(dim=tuple(range(1, base.dim()))).min() > 1e-3


def test_rows_in_lists_do_not_depend_on_each_other(_tiny_pipelines):
    pipe, options = tiny.build("Z-Image", _tiny_pipelines)
    reference = Reference(tiny.OTHER[0])

    def call(prompts, seeds, given):
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        with negtome.attach(pipe, CONFIG, references=given):
            return pipe(prompts, generator=generator, output_type="latent", **options).images

    together = call(["a dog", "a mouse", "a cat"], (0, 1, 2), [reference, reference, None])
    for k, prompt in enumerate(("a dog", "a mouse")):
        torch.testing.assert_close(together[k : k + 1], call([prompt], [k], reference), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="got several prompts"), negtome.attach(pipe, CONFIG):
        pipe(["a dog", "a mouse"], **options)


def test_img2img_that_begins_below_the_timestep_range_is_refused_before_its_first_step(_tiny_pipelines):
    pipe, options = tiny.build("SDXL img2img", _tiny_pipelines)
    attachment = negtome.attach(pipe, CONFIG.replace(timestep_range=(600, 1000)))
    with pytest.raises(RuntimeError, match=r"no step lies in timestep_range.*of this\s+call are 251, 1;"), attachment:
        pipe.unet.forward = None  # which is not called
        generate(pipe, options)


@pytest.mark.parametrize(("scheduler", "calls"), [("EulerDiscrete", 2), ("HeunDiscrete", 3)])
def test_a_step_range_counts_from_the_first_step_that_img2img_runs(_tiny_pipelines, scheduler, calls):
    pipe, options = tiny.build("SDXL img2img", _tiny_pipelines)  # the last two of four steps
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(pipe.scheduler.config)
    for step_range in ((0, 0), (0, 0.5)):
        with negtome.attach(pipe, CONFIG.replace(step_range=step_range)) as attached:
            generate(pipe, options)
        assert [step.active for step in attached.steps] == [True] * (calls - 1) + [False]
    attachment = negtome.attach(pipe, CONFIG.replace(step_range=(2, 3)))
    with pytest.raises(RuntimeError, match="This call has 2 steps, from 0 to 1;"), attachment:
        pipe.unet.forward = None  # which is not called
        generate(pipe, options)


def test_a_second_denoiser_is_refused(_tiny_pipelines):
    pipe, _ = tiny.build("Wan", _tiny_pipelines)
    pipe.transformer_2 = pipe.transformer
    with pytest.raises(ValueError, match="this WanPipeline has transformer_2 for its late steps; use a checkpoint"):
        negtome.attach(pipe, CONFIG)


def test_a_subclass_may_only_pass_its_arguments_on(tiny_sdxl):
    class Own(type(tiny_sdxl)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    pipe = Own(**tiny_sdxl.components)
    pipe.set_progress_bar_config(disable=True)
    with negtome.attach(pipe, CONFIG) as attached:
        pipe("a dog", num_images_per_prompt=2, num_inference_steps=1, height=32, width=32, output_type="latent")
    compared = {name: count.compared for name, count in attached.counts().items()}
    assert set(compared.values()) == {2 * 64, 2 * 256}, "one image of a half"


def test_rows_that_are_no_multiple_of_the_images_are_refused(tiny_sdxl):
    reader, sample = CallReader(find_architecture(tiny_sdxl)), torch.zeros(5, 4, 16, 16)
    for images in (2, None):
        with pytest.raises(ValueError, match=f"got 5 rows for {images} images.*row of embeddings, for each image"):
            reader.read(tiny_sdxl, {"sample": sample}, images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_time_without_a_step_index_is_the_nearest_timestep(tiny_flux, dtype):
    tiny_flux.scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.5])
    arguments = {
        "hidden_states": torch.zeros(2, 6, 4, dtype=dtype),
        "timestep": torch.full((2,), 0.9, dtype=dtype),
        "img_ids": torch.tensor([[0, row, column] for row in range(2) for column in range(3)]),
        "encoder_hidden_states": torch.zeros(2, 12, 32),
        "pooled_projections": torch.zeros(2, 32),
    }
    reader = CallReader(find_architecture(tiny_flux))
    first, second = (reader.read(tiny_flux, arguments, None) for _ in range(2))
    assert first.timestep == second.timestep == float(tiny_flux.scheduler.timesteps[1])
    assert (first.again, second.again) == (False, True)
    assert (first.conditional, second.conditional) == ((0,), ())
    assert (first.grid, first.stream, first.images) == ((2, 3), 6, 2)
    arguments["timestep"] = torch.full((2,), 0.7, dtype=dtype)
    assert reader.read(tiny_flux, arguments, None).timestep == pytest.approx(700, abs=2), "none of them"


def test_a_repeated_timestep_is_one_step_in_both_passes_of_guidance(tiny_flux):
    scheduler = tiny_flux.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(4)
    arguments = {
        "hidden_states": torch.zeros(2, 6, 4), "img_ids": torch.zeros(6, 3),
        "encoder_hidden_states": torch.zeros(2, 9, 32), "pooled_projections": torch.zeros(2, 32),
    }  # fmt: skip
    reader = CallReader(find_architecture(tiny_flux))
    times = [time.expand(2) for time in scheduler.timesteps for _ in range(2)]
    calls = [reader.read(tiny_flux, arguments | {"timestep": time}, None) for time in times]
    assert [call.index for call in calls] == [0, 0, 1, 1, 1, 1, 2, 2, 3, 3]
    assert [call.conditional for call in calls] == [(0,), ()] * 5
    assert {call.steps for call in calls} == {4}


def test_steps_that_are_rounded_to_one_timestep_are_several(tiny_sdxl):
    config = tiny_sdxl.scheduler.config
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    scheduler.set_timesteps(50)
    assert len(scheduler.timesteps.unique()) < 50
    tiny_sdxl.scheduler, reader = scheduler, CallReader(find_architecture(tiny_sdxl))
    arguments = {
        "sample": torch.zeros(2, 4, 16, 16), "encoder_hidden_states": torch.zeros(2, 9, 32),
        "added_cond_kwargs": {"text_embeds": torch.zeros(2, 32)},
    }  # fmt: skip
    calls = [reader.read(tiny_sdxl, arguments | {"timestep": time}, 2) for time in scheduler.timesteps]
    assert [call.index for call in calls] == list(range(50)) and {call.steps for call in calls} == {50}


def test_the_documentation_lists_every_pipeline():
    page = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text(encoding="utf-8")
    for architecture in ARCHITECTURES:
        first, *others = (name.removesuffix("Pipeline") for name in architecture.pipelines)
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {architecture.name} | {first}")]
        assert {first, *(name.removeprefix(first) for name in others)} <= set(re.findall(r"\w+", row))
