"""Outside references: what rides along is what an independent transcription adds, and the pipeline never notices."""

import copy
import functools

import diffusers
import pytest
import tiny
import torch
from PIL import Image
from tiny import ONE_KIND, denoiser, hook_attentions, state
from torch.nn.functional import adaptive_avg_pool2d, normalize

import negtome
from negtome import NegToMeConfig, Reference
from negtome.reference import fit, token_mask
from negtome.reference_batch import ReferenceBatch

# Two of four steps.
CONFIGS = {
    "sdxl": NegToMeConfig(alpha=0.9, threshold=0.5, timestep_range=(500, 1000), min_side=8),
    "flux": NegToMeConfig(alpha=0.9, threshold=0.5, timestep_range=(600, 1000)),
}
SEEDS = (0, 1)
PICTURE = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(7))
OTHER = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(8))
LEFT = torch.zeros(32, 32, dtype=torch.bool)
LEFT[:, :12] = True


@pytest.fixture
def config(kind):
    return CONFIGS[kind]


def generate(pipe, seeds=SEEDS, **options):
    return tiny.generate(pipe, seeds, **options)


def push(x, reference, config, allowed):
    """Push the tokens of one image [N, C] from those of references [M, C], by the definition."""
    similarity = normalize(x, dim=1) @ normalize(reference, dim=1).T
    if config.matching == "paper":
        similarity[:, ~allowed] = -2
        best, index = similarity.max(dim=1)
        moves = best > config.threshold
    else:
        best, index = similarity.max(dim=0)
        moves = (best > config.threshold) & allowed
    return torch.where(moves[:, None], x + config.alpha * (x - reference[index]), x)


def transcribed(pipe, config, pictures, masks, seed, own_prompt=None, noise=True, seeds=SEEDS, **options):
    """Generate with torch's hooks, which append rows to the batch and take them away: all images, all references."""
    sdxl, vae, dtype = hasattr(pipe, "unet"), pipe.vae, pipe.dtype
    clean = vae.encode(2 * torch.stack(pictures).to(dtype) - 1).latent_dist.mean
    epsilon = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    clean = (clean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    low, high = config.timestep_range
    halves = 2 if sdxl and options.get("guidance_scale", 5.0) > 1 else 1
    step = {}

    def pack(x):
        r, c, h, w = x.shape
        return x.view(r, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(r, h * w // 4, 4 * c)

    def append(rows, value=None, last_only=False):
        """For each half, the images' rows and then the first image's once a picture, or `value`."""
        result = []
        parts = rows.chunk(halves)
        for half, part in enumerate(parts):
            extra = part[:1].expand(len(pictures), *part.shape[1:])
            if value is not None and (not last_only or half == halves - 1):
                extra = value.to(part).expand(len(pictures), *part.shape[1:])
            result.append(torch.cat([part, extra]))
        return torch.cat(result)

    def start(module, args, kwargs):
        names = ("sample", "timestep", "encoder_hidden_states")
        arguments = dict(zip(names, args, strict=False)) | kwargs
        t = float(arguments["timestep"]) if sdxl else float(arguments["timestep"][0]) * 1000
        step["active"] = low <= t <= high + 0.01
        if not step["active"]:
            return None
        repeated, step["t"] = step.get("t") == t, t
        embedded = {} if own_prompt is None or repeated else own_prompt
        if sdxl:
            beta = pipe.scheduler.alphas_cumprod[int(t)].double()
            sigma = ((1 - beta) / beta).sqrt() if noise else 0.0
            scale = float(((1 - beta) / beta + 1).sqrt())
            rows = (clean + float(sigma) * epsilon) / scale
            arguments["sample"] = append(arguments["sample"], rows)
            added = arguments["added_cond_kwargs"]
            arguments["added_cond_kwargs"] = {
                "text_embeds": append(added["text_embeds"], embedded.get("pooled"), last_only=True),
                "time_ids": append(added["time_ids"]),
            }
            arguments["encoder_hidden_states"] = append(
                arguments["encoder_hidden_states"], embedded.get("tokens"), last_only=True
            )
        else:
            sigma = t / 1000 if noise else 0.0
            arguments["hidden_states"] = append(arguments["hidden_states"], pack((1 - sigma) * clean + sigma * epsilon))
            for name, value in (("encoder_hidden_states", "tokens"), ("pooled_projections", "pooled")):
                arguments[name] = append(arguments[name], embedded.get(value))
            for name in ("timestep", "guidance"):
                if arguments.get(name) is not None:
                    arguments[name] = append(arguments[name])
        return (), arguments

    def images(rows):
        return torch.cat([half[: len(seeds)] for half in rows.chunk(halves)])

    def finish(module, args, output):
        return (images(output[0]),) if step["active"] else None

    def change(features, after_text):
        if not step["active"]:
            return features
        text = 12 if after_text else 0
        side = int((features.shape[1] - text) ** 0.5)
        if sdxl and side < config.min_side:
            return features
        allowed = torch.cat(
            [
                torch.ones(side * side, dtype=torch.bool)
                if mask is None
                else (adaptive_avg_pool2d(mask[None].double(), side) > 0.5).flatten()
                for mask in masks
            ]
        )
        result = features.clone()
        for half in result.chunk(halves):
            reference = half[len(seeds) :, text:].flatten(0, 1)
            for image in range(len(seeds)):
                half[image, text:] = push(half[image, text:], reference, config, allowed)
        return result

    handles = hook_attentions(pipe, change)
    handles.append(denoiser(pipe).register_forward_pre_hook(start, with_kwargs=True))
    handles.append(denoiser(pipe).register_forward_hook(finish))
    result = generate(pipe, seeds, **options)
    for handle in handles:
        handle.remove()
    return result


#: Pipeline, changes to its settings, the reference, and options of the call.
CASES = {
    "SDXL, masked, another seed": ("sdxl", {}, {"mask": LEFT, "seed": 3}, {}),
    "SDXL, its own prompt": ("sdxl", {}, {"prompt": "a mouse"}, {}),
    "SDXL, released, clean and masked": ("sdxl", {"matching": "released"}, {"noise": False, "mask": LEFT}, {}),
    "SDXL, without guidance": ("sdxl", {}, {}, {"guidance_scale": 1.0}),
    "Flux, two, one of them masked": ("flux", {}, {"images": [PICTURE, OTHER], "mask": [LEFT, None]}, {}),
    "Flux, released, clean": ("flux", {"matching": "released"}, {"noise": False}, {}),
    "Flux, its own prompt and true guidance": (
        "flux", {}, {"prompt": "a mouse"}, {"true_cfg_scale": 3.0, "negative_prompt": "a cat"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "of_reference", "options"),
    [
        pytest.param(
            *case, id=name, marks=[pytest.mark.slow] * (name in ("SDXL, without guidance", "Flux, released, clean"))
        )
        for name, case in CASES.items()
    ],
)
def test_it_is_the_transcription(pipe, kind, config, changes, of_reference, options):
    pipe.to(torch.float64)  # where no match hangs on rounding
    config = config.replace(**changes)
    reference = Reference(**({"images": PICTURE} | of_reference))
    own_prompt = None
    if reference.prompt is not None and kind == "sdxl":
        tokens, _, pooled, _ = pipe.encode_prompt(reference.prompt, do_classifier_free_guidance=False)
        own_prompt = {"tokens": tokens, "pooled": pooled}
    elif reference.prompt is not None:
        tokens, pooled, _ = pipe.encode_prompt(reference.prompt, None, max_sequence_length=12)
        own_prompt = {"tokens": tokens, "pooled": pooled}
    base = generate(pipe, **options)
    with negtome.attach(pipe, config, references=reference) as attached:
        result = generate(pipe, **options)
    pictures, masks = list(reference.images), list(reference.mask)
    expected = transcribed(pipe, config, pictures, masks, reference.seed, own_prompt, reference.noise, **options)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)  # noise levels are float32
    assert (result - base).abs().max() > 1e-2, "nothing was pushed"
    summary = attached.summary()
    assert 0 < summary["tokens_pushed"] <= summary["tokens_compared"]


def test_the_images_random_numbers_are_untouched(pipe, kind, config):
    if kind == "sdxl":  # a scheduler that draws from the images' generators at every step
        pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    base = generate(pipe, generators=generators)
    after = [generator.get_state() for generator in generators]
    everyone = torch.get_rng_state()
    for posterior in ("mode", "sample"):
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        with negtome.attach(pipe, config.replace(alpha=0), references=Reference(PICTURE, posterior=posterior)):
            result = generate(pipe, generators=generators)
        assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, after, strict=True))
        assert torch.equal(torch.get_rng_state(), everyone)
        # up to the rounding that another batch size brings
        torch.testing.assert_close(result, base, rtol=1e-4, atol=1e-4)


def test_each_image_is_pushed_from_its_reference_only(pipe, config):
    pipe.to(torch.float64)
    one, two = Reference(PICTURE), Reference(OTHER, seed=1)
    base = generate(pipe, (0, 1, 2))
    with negtome.attach(pipe, config, references=[one, None, two]):
        result = generate(pipe, (0, 1, 2))
    torch.testing.assert_close(result[1], base[1], rtol=1e-6, atol=1e-6)
    for k, reference in ((0, one), (2, two)):
        with negtome.attach(pipe, config, references=reference):
            alone = generate(pipe, (k,))
        torch.testing.assert_close(result[k], alone[0], rtol=1e-4, atol=1e-4)
        assert (result[k] - base[k]).abs().max() > 1e-2


def test_images_of_several_prompts_do_not_share_their_conditioning(pipe, config):
    pipe.to(torch.float64)
    reference, prompts = Reference(PICTURE), ["a dog", "a red bus"]
    with negtome.attach(pipe, config, references=reference):
        together = generate(pipe, (0, 1, 2, 3), prompt=prompts)
        alone = [generate(pipe, seeds, prompt=p) for seeds, p in zip(((0, 1), (2, 3)), prompts, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_prompts_that_differ_in_flux_pooled_embedding_alone_are_lent_one_by_one(tiny_flux):
    tiny_flux.to(torch.float64)
    prompts = ["a dog", "a red bus"]
    with negtome.attach(tiny_flux, CONFIGS["flux"], references=Reference(PICTURE)):
        together = generate(tiny_flux, (0, 1), prompt=prompts, prompt_2=["a photo"] * 2)
        alone = [generate(tiny_flux, (k,), prompt=p, prompt_2="a photo") for k, p in enumerate(prompts)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_outside_the_timestep_range_no_row_is_added(pipe, config, monkeypatch):
    rows = []
    original = type(denoiser(pipe)).forward

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        rows.append(len(args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(denoiser(pipe)), "forward", forward)
    with negtome.attach(pipe, config, references=Reference([PICTURE, OTHER])) as attached:
        generate(pipe)
    halves = 2 if hasattr(pipe, "unet") else 1
    assert rows == [halves * (4 if step.active else 2) for step in attached.steps]
    assert len(set(rows)) == 2


@ONE_KIND
def test_it_is_encoded_once_and_removed_without_a_trace(pipe, config, monkeypatch):
    calls = []
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: calls.append(x.shape) or encode(x))
    weights = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
    base = generate(pipe)
    before = state(pipe)
    with negtome.attach(pipe, config, references=Reference(PICTURE)):
        assert torch.equal(generate(pipe), generate(pipe))
    assert len(calls) == 1 and state(pipe) == before
    assert all(torch.equal(value, weights[name]) for name, value in pipe.vae.state_dict().items())
    assert torch.equal(generate(pipe), base)


@ONE_KIND
def test_another_autoencoder_encodes_again(pipe, config):
    other = copy.deepcopy(pipe.vae)
    for parameter in other.encoder.parameters():
        parameter.data *= 1.5
    with negtome.attach(pipe, config, references=Reference(PICTURE)):
        generate(pipe)
        pipe.vae = other
        swapped = generate(pipe)
    with negtome.attach(pipe, config, references=Reference(PICTURE)):
        assert torch.equal(generate(pipe), swapped)


def test_half_precision_autoencoders_come_back_unchanged_also_after_an_error(tiny_sdxl, monkeypatch):
    pipe, config = tiny_sdxl, CONFIGS["sdxl"]
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.to(torch.float16)
    weights = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
    with negtome.attach(pipe, config, references=Reference(PICTURE)):
        result = generate(pipe)
    assert result.isfinite().all()

    def fail(*args):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(type(pipe.vae), "encode", fail)
    with pytest.raises(torch.OutOfMemoryError), negtome.attach(pipe, config, references=Reference(PICTURE)):
        generate(pipe)
    assert pipe.vae.dtype is torch.float16
    assert all(torch.equal(value, weights[name]) for name, value in pipe.vae.state_dict().items())


def test_a_reference_keeps_its_prompt_with_a_scheduler_of_second_order(tiny_sdxl, monkeypatch):
    tiny_sdxl.scheduler = diffusers.HeunDiscreteScheduler.from_config(tiny_sdxl.scheduler.config)
    rows, extend = [], ReferenceBatch.extend

    def note(*args, **kwargs):
        arguments, layout = extend(*args, **kwargs)
        rows.append(arguments["encoder_hidden_states"].unflatten(0, (2, -1))[1, -1])
        return arguments, layout

    monkeypatch.setattr(ReferenceBatch, "extend", note)
    with negtome.attach(tiny_sdxl, CONFIGS["sdxl"], references=Reference(PICTURE, prompt="a cat")):
        generate(tiny_sdxl)
    (own, _, _, _) = tiny_sdxl.encode_prompt("a cat", do_classifier_free_guidance=False)
    assert len(rows) >= 3
    for row in rows:
        torch.testing.assert_close(row, own[0])


def test_a_references_prompt_is_embedded_as_the_images_are(tiny_sdxl):
    """With the call's clip_skip: then a reference of the same prompt is as if each image lent its own."""
    results = []
    for prompt in ("a dog", None):
        with negtome.attach(tiny_sdxl, CONFIGS["sdxl"], references=Reference(PICTURE, prompt=prompt)):
            results += [generate(tiny_sdxl, clip_skip=skip) for skip in (None, 1)]
    torch.testing.assert_close(results[:2], results[2:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results[0], results[1])


def test_embeddings_of_another_length_than_a_references_prompt_are_refused(tiny_sdxl):
    options = embedded(tiny_sdxl, 1)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        options[name] = options[name].repeat(1, 2, 1)
    with negtome.attach(tiny_sdxl, CONFIGS["sdxl"], references=Reference(PICTURE)):
        assert len(generate(tiny_sdxl, **options)) == 2
    attachment = negtome.attach(tiny_sdxl, CONFIGS["sdxl"], references=Reference(PICTURE, prompt="a mouse"))
    with pytest.raises(ValueError, match=r"of 77 tokens, as those of a Reference's prompt, got 154"), attachment:
        generate(tiny_sdxl, **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::DeprecationWarning:numpy")
@pytest.mark.parametrize(
    "name", ["DDIM", pytest.param("HeunDiscrete", marks=pytest.mark.slow), "KDPM2AncestralDiscrete"]
)
def test_a_reference_is_as_noisy_as_the_images_at_every_step(tiny_sdxl, name, monkeypatch):
    """Its row is x + sigma n, scaled as the images' rows are, at the steps between two of the schedule too."""
    tiny_sdxl.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(tiny_sdxl.scheduler.config)
    rows = []
    original = type(tiny_sdxl.unet).forward

    @functools.wraps(original)
    def forward(self, sample, timestep, *args, **kwargs):
        scheduler = tiny_sdxl.scheduler
        scale = float(scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep))
        if scale == 1:  # DDIM and its like hold the variance; training timesteps tell it
            scale = float(scheduler.alphas_cumprod[int(timestep)]) ** 0.5
        rows.append((sample[-1].double(), scale))
        return original(self, sample, timestep, *args, **kwargs)

    monkeypatch.setattr(type(tiny_sdxl.unet), "forward", forward)
    config = CONFIGS["sdxl"].replace(timestep_range=(0, 1000))
    with negtome.attach(tiny_sdxl, config, references=Reference(PICTURE, seed=3)) as attached:
        generate(tiny_sdxl)
    assert len(rows) == len(attached.steps) >= 4
    clean = tiny_sdxl.vae.encode(2 * PICTURE[None] - 1).latent_dist.mean[0] * tiny_sdxl.vae.config.scaling_factor
    noise = torch.randn(1, *clean.shape, generator=torch.Generator().manual_seed(3))[0].double()
    for row, scale in rows:
        sigma = (1 / scale**2 - 1) ** 0.5
        torch.testing.assert_close(row, scale * (clean.double() + sigma * noise), rtol=1e-3, atol=1e-3)


def test_a_cache_is_refused_before_and_inside_the_block(tiny_flux):
    """It would bring a row of the timestep range back in the steps after it: one prompt, two images."""
    attachment = negtome.attach(tiny_flux, CONFIGS["flux"], references=Reference(PICTURE))
    with pytest.raises(RuntimeError, match=r"a cache, the \w+ on .*; call disable_cache\(\)"), attachment:
        tiny_flux.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5))
        generate(tiny_flux, (0,))
    with pytest.raises(RuntimeError, match="or leave the Reference out"):
        negtome.attach(tiny_flux, CONFIGS["flux"], references=Reference(PICTURE))
    with negtome.attach(tiny_flux, CONFIGS["flux"]):
        assert generate(tiny_flux).isfinite().all()
    tiny_flux.transformer.disable_cache()
    with negtome.attach(tiny_flux, CONFIGS["flux"], references=Reference(PICTURE)):
        assert len(generate(tiny_flux, (0,))) == 1


@pytest.mark.parametrize("reference", [None, Reference(PICTURE)])
def test_a_denoiser_that_returns_other_rows_than_asked_for_is_an_error(tiny_sdxl, reference):
    """As one does that keeps features between its calls in a way nobody knows of."""
    attachment = negtome.attach(tiny_sdxl, CONFIGS["sdxl"], references=reference)
    tiny_sdxl.unet.register_forward_hook(lambda module, args, output: (torch.cat([output[0], output[0][-1:]]),))
    with pytest.raises(RuntimeError, match="the 4 rows that the pipeline asked for, got"), attachment:
        generate(tiny_sdxl)


@pytest.mark.slow
def test_a_compiled_denoiser_and_offloading_see_the_rows_too(pipe, config):
    with negtome.attach(pipe, config, references=Reference(PICTURE, mask=LEFT)) as attached:
        expected = generate(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    torch._dynamo.reset()
    denoiser(pipe).compile(backend="eager")
    with negtome.attach(pipe, config, references=Reference(PICTURE, mask=LEFT)) as compiled:
        result = generate(pipe)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    assert compiled.summary()["tokens_compared"] == attached.summary()["tokens_compared"]


# What may be handed over


def test_files_images_and_tensors_are_read_alike(tmp_path):
    picture = Image.effect_noise((20, 10), 80).convert("RGB")
    picture.save(tmp_path / "a.png")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(10, 20, 3).permute(2, 0, 1)
    for source in (picture, tmp_path / "a.png", str(tmp_path / "a.png"), pixels, pixels / 255):
        assert torch.equal(Reference(source).images[0], pixels / 255)
    grey = Reference(picture.convert("L")).images[0]
    assert torch.equal(grey[0], grey[1])
    glass = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert torch.equal(Reference(glass).images[0], torch.ones(3, 2, 2))  # white behind


def test_other_shapes_fit_in_and_their_margin_is_never_matched():
    wide = torch.rand(3, 10, 40, generator=torch.Generator().manual_seed(0))
    image, share = fit(wide, None, 32, 32)
    assert image.shape == (3, 32, 32)
    inside = slice(12, 20)  # 8 of 32 rows
    assert torch.equal(share.nonzero()[:, 0].unique(), torch.arange(12, 20))
    assert (share[inside] == 1).all()
    assert torch.equal(image[:, 0], image[:, 12])  # the edge repeated
    inner = token_mask(share, 8, 8).view(8, 8)
    assert inner[3:5].all()
    assert inner.sum() == 16
    assert fit(torch.rand(3, 64, 64), None, 32, 32)[1] is None
    # a mask moves with its image
    mask = torch.zeros(10, 40, dtype=torch.bool)
    mask[:, :20] = True
    assert torch.equal(token_mask(fit(wide, mask, 32, 32)[1], 8, 8).view(8, 8)[3:5, :4], torch.ones(2, 4) > 0)
    assert token_mask(fit(wide, mask, 32, 32)[1], 8, 8).sum() == 8


def test_bad_input_is_refused(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (4, 4)).save(tmp_path / "print.jpg")
    for name, message in (
        ("broken.png", "damaged or foreign file in .*broken.png"),
        ("moving.gif", "an animation of 2 frames in .*moving.gif"),
        ("print.jpg", "mode CMYK in .*print.jpg"),
    ):
        with pytest.raises(ValueError, match=message):
            Reference(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"got no file"):
        Reference(tmp_path / "none.png")
    for arguments, message in (
        ((PICTURE, torch.zeros(32, 32, dtype=torch.bool)), "empty mask"),
        ((PICTURE, torch.ones(8, 8, dtype=torch.bool)), "its image's size, 32x32 pixels, got 8x8"),
        (([PICTURE, OTHER], LEFT), "one mask for each of its 2 images, got a single one"),
        (([PICTURE, OTHER], [LEFT]), "one mask for each of its 2 images, got 1"),
        (([],), "at least one image"),
        ((2 * PICTURE,), r"floats in \[0, 1\]"),
        ((PICTURE[0],), r"\[3, H, W\]"),
        ((3,), "a path, a PIL image or a tensor"),
        # Before memory is taken for 120 GB.
        ((torch.zeros(()).expand(3, 100_000, 100_000),), "at most .* pixels, got 100000 x 100000"),
        ((torch.zeros((), dtype=torch.uint8).expand(3, 100_000, 100_000),), "at most .* pixels"),
        ((PICTURE, torch.zeros(()).expand(100_000, 100_000)), "its image's size, 32x32 pixels, got 100000x100000"),
    ):
        with pytest.raises(ValueError, match=message):
            Reference(*arguments)
    assert Reference(PICTURE, seed=torch.tensor(3)).seed == 3
    for setting in ({"noise": 1}, {"seed": -1}, {"prompt": ["a"]}, {"posterior": "mean"}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            Reference(PICTURE, **setting)


@ONE_KIND
def test_references_that_do_not_fit_the_call_are_refused(pipe, config):
    with pytest.raises(TypeError, match=r"negtome\.Reference\(image\)"):
        negtome.attach(pipe, config, references=PICTURE)
    with pytest.raises(ValueError, match="at least one"):
        negtome.attach(pipe, config, references=[None, None])
    with pytest.raises(ValueError, match="between two images only"):
        negtome.attach(pipe, config.replace(matching="released"), references=Reference([PICTURE, OTHER]))
    with (
        pytest.raises(ValueError, match="each of the 2 images of the call, got 3"),
        negtome.attach(pipe, config, references=[Reference(PICTURE)] * 3),
    ):
        generate(pipe)
    dot = torch.zeros(32, 32, dtype=torch.bool)
    dot[3, 3] = True
    with (
        pytest.raises(ValueError, match="more than half of no token"),
        negtome.attach(pipe, config.replace(min_side=8), references=Reference(PICTURE, mask=dot)),
    ):
        generate(pipe)


def embedded(pipe, rows):
    """Embed a prompt for a call with two images and no text encoders; Flux is given so many rows, and SDXL one."""
    if hasattr(pipe, "unet"):
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return dict(zip(names, pipe.encode_prompt("a dog"), strict=True)) | {"prompt": None, "per_prompt": 2}
    tokens, pooled, _ = pipe.encode_prompt("a dog", None, num_images_per_prompt=rows, max_sequence_length=12)
    return {"prompt": None, "prompt_embeds": tokens, "pooled_prompt_embeds": pooled, "per_prompt": 2 // rows}


@pytest.mark.parametrize("prompt", [None, "a mouse"])
def test_one_row_of_embeddings_is_of_all_images(tiny_flux, prompt):
    """Flux broadcasts what it is given; a reference, with a prompt of its own even, needs a row of its own."""
    results = []
    for rows in (2, 1):
        with negtome.attach(tiny_flux, CONFIGS["flux"], references=[Reference(PICTURE, prompt=prompt), None]):
            results.append(generate(tiny_flux, **embedded(tiny_flux, rows)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_embeddings_with_other_rows_are_refused(tiny_flux):
    attachment = negtome.attach(tiny_flux, CONFIGS["flux"], references=Reference(PICTURE))
    with pytest.raises(ValueError, match="one for each of 3 images, got 2"), attachment:
        generate(tiny_flux, (0, 1, 2), **embedded(tiny_flux, 2) | {"latents": torch.zeros(3, 64, 4)})


@ONE_KIND
def test_missing_encoders_are_refused(pipe, config):
    options = embedded(pipe, 1)
    pipe.text_encoder = pipe.text_encoder_2 = None
    with negtome.attach(pipe, config, references=Reference(PICTURE)):
        assert len(generate(pipe, **options)) == 2
    with pytest.raises(ValueError, match=r"expected all text encoders.*leave the prompt out"):
        negtome.attach(pipe, config, references=[None, Reference(PICTURE, prompt="a mouse")])
    pipe.vae, vae = None, pipe.vae
    with pytest.raises(ValueError, match=r"expected an autoencoder.*got vae=None"):
        negtome.attach(pipe, config, references=Reference(PICTURE))
    pipe.vae = vae
    with negtome.attach(pipe, config, references=Reference(PICTURE)):
        pipe.vae = None
        for _ in range(2):  # the refused call is over
            with pytest.raises(ValueError, match=r"expected an autoencoder.*got vae=None"):
                generate(pipe, **options)
        pipe.vae = vae
        assert len(generate(pipe, **options)) == 2


@ONE_KIND
def test_a_tiny_autoencoder_has_a_mode_and_no_posterior(pipe, kind, config):
    blocks = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    blocks |= {f"num_{part}_blocks": (1, 1) for part in ("encoder", "decoder")}
    pipe.vae = diffusers.AutoencoderTiny(latent_channels=4 if kind == "sdxl" else 1, **blocks).eval()
    results = []
    for reference in (Reference(PICTURE), Reference(OTHER)):
        with negtome.attach(pipe, config, references=reference):
            results.append(generate(pipe))
    assert not torch.equal(*results)
    attachment = negtome.attach(pipe, config, references=Reference(PICTURE, posterior="sample"))
    with pytest.raises(ValueError, match='got a AutoencoderTiny; use "mode"'), attachment:
        generate(pipe)


def test_a_reference_of_a_flow_that_acts_in_pure_noise_alone_warns(tiny_flux):
    def attached_images(image, **settings):
        with negtome.attach(tiny_flux, CONFIGS["flux"].replace(**settings), references=Reference(image, noise=noise)):
            return generate(tiny_flux)

    noise = True
    with pytest.warns(RuntimeWarning, match="pure noise") as caught:
        images = [attached_images(image, step_range=(0, 0)) for image in (PICTURE, OTHER)]
    assert torch.equal(*images)  # so the warning is right: the images do not depend on the reference
    assert {record.filename for record in caught} == {tiny.__file__}  # whose line calls the pipeline
    assert not torch.equal(*[attached_images(image, step_range=(0, 1)) for image in (PICTURE, OTHER)])
    noise = False  # a clean reference is an image in every step
    assert not torch.equal(*[attached_images(image, step_range=(0, 0)) for image in (PICTURE, OTHER)])
