"""NegToMe on tiny real pipelines: it does what an independent transcription does, and never silently nothing."""

import warnings

import diffusers
import numpy as np
import pytest
import torch
from tiny import CONFIGS, ONE_KIND, denoiser, generate, hook_attentions
from torch.nn.functional import normalize

import negtome


@pytest.fixture
def config(kind):
    return CONFIGS[kind]


# An independent transcription, with torch's hooks


def push(images, config):
    """Push images 1.. of one group [K, N, C] from image 0, in float64."""
    result = images.clone()
    first = images[0].double()
    for k in range(1, len(images)):
        x = images[k].double()
        similarity = normalize(x, dim=1) @ normalize(first, dim=1).T  # [source, reference]
        if config.matching == "paper":
            best, index = similarity.max(dim=1)
        else:
            best, index = similarity.max(dim=0)
        moved = x + config.alpha * (x - first[index])
        result[k] = torch.where((best > config.threshold)[:, None], moved, x)
    return result


def transcribed(pipe, config, **options):
    """Generate one group of 3 images with hooks that do what NegToMe should."""
    model, (low, high) = denoiser(pipe), config.timestep_range
    text_length = options.get("max_sequence_length", 12)
    step = {}

    def start(module, args, kwargs):
        t = float(args[1]) if hasattr(pipe, "unet") else float(kwargs["timestep"][0]) * 1000
        step["active"] = low <= t <= high + 0.01
        step["size"] = args[0].shape[-2:] if hasattr(pipe, "unet") else None

    def change(tokens, after_text):
        if not step["active"]:
            return tokens
        text = text_length if after_text else 0
        if step["size"]:
            height, width = step["size"]
            if tokens.shape[1] != height * width:
                height, width = (height + 1) // 2, (width + 1) // 2
            assert tokens.shape[1] == height * width
            if min(height, width) < config.min_side:
                return tokens
        image = torch.cat([push(group, config) for group in tokens[:, text:].split(3)])
        return torch.cat([tokens[:, :text], image], dim=1)

    handles = hook_attentions(pipe, change, config.cross_attention)
    handles.append(model.register_forward_pre_hook(start, with_kwargs=True))
    result = generate(pipe, **options)
    for handle in handles:
        handle.remove()
    return result


ODD = torch.randn(3, 4, 9, 13, generator=torch.Generator().manual_seed(0))
#: Pipeline, changes to its settings, and options of the call.
CASES = {
    "SDXL, released": ("sdxl", {"matching": "released", "cross_attention": True}, {}),
    "SDXL, released, without guidance": ("sdxl", {"matching": "released"}, {"guidance_scale": 1.0}),
    "SDXL, larger maps only": ("sdxl", {"min_side": 16, "cross_attention": True}, {}),
    "SDXL, not square": ("sdxl", {"min_side": 6}, {"height": 24, "width": 40}),
    "SDXL, odd sizes": ("sdxl", {"min_side": 5}, {"latents": ODD}),
    "Flux, released": ("flux", {"matching": "released"}, {}),
    "Flux, true guidance": ("flux", {}, {"true_cfg_scale": 3.0, "negative_prompt": "a cat"}),
    "Flux, longer text, not square": ("flux", {}, {"max_sequence_length": 30, "height": 24, "width": 40}),
    "Flux, not distilled": ("schnell", {}, {}),
}


@pytest.mark.parametrize(("kind", "changes", "options"), CASES.values(), ids=CASES)
def test_it_is_the_transcription(kind, changes, options, request):
    pipe = request.getfixturevalue(f"tiny_{kind}").to(torch.float64)  # where no match hangs on rounding
    config = CONFIGS["sdxl" if kind == "sdxl" else "flux"].replace(**changes)
    options = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    base = generate(pipe, **options)
    expected = transcribed(pipe, config, **options)
    with negtome.attach(pipe, config) as attached:
        result = generate(pipe, **options)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert (result - base).abs().amax() > 1e-2
    summary = attached.summary()
    assert 0.05 < summary["tokens_pushed"] / summary["tokens_compared"] < 0.95


# Which images change


def test_each_reference_moves_its_images(pipe, config):
    results = {}
    for reference in ("first", "previous", "others"):
        with negtome.attach(pipe, config.replace(reference=reference)):
            results[reference] = generate(pipe)
    base = generate(pipe)
    first, previous, others = results.values()
    # Image 1 has the same references under "first" and "previous"; only under "others" does image 0 move.
    assert torch.equal(previous[:2], first[:2])
    assert not torch.equal(previous[2], first[2])
    assert not any(torch.equal(first[k], base[k]) for k in (1, 2))
    assert torch.equal(first[0], base[0])
    assert not torch.equal(others[0], base[0])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sdxl", {"guidance_scale": 5.0}),
        ("sdxl", {"guidance_scale": 1.0}),
        ("flux", {"true_cfg_scale": 3.0, "negative_prompt": ["a cat", "a cat"]}),
    ],
)
def test_groups_do_not_influence_each_other(pipe, config, options):
    pipe.to(torch.float64)  # where no match hangs on rounding
    prompts = ["a dog", "a red bus"]
    with negtome.attach(pipe, config, group_size=2):
        result = generate(pipe, (0, 1, 2, 3), prompt=prompts, **options)
    options |= {"negative_prompt": "a cat"} if "negative_prompt" in options else {}
    with negtome.attach(pipe, config):
        alone = [generate(pipe, (2 * g, 2 * g + 1), prompt=prompt, **options) for g, prompt in enumerate(prompts)]
    torch.testing.assert_close(result, torch.cat(alone), rtol=1e-6, atol=1e-6)


@ONE_KIND
def test_features_that_a_hook_keeps_are_not_written_to(pipe, config):
    """A hook, such as a cache's, that keeps what an attention returned keeps that."""
    with negtome.attach(pipe, config):
        expected = generate(pipe)
    kept = []

    def keep(module, args, output):
        for tensor in output if isinstance(output, tuple) else (output,):
            kept.append((tensor, tensor.clone()))

    def add_hooks(_, index, timestep, tensors):
        for module in denoiser(pipe).modules() if index == 0 else ():
            if hasattr(module, "processor"):
                module.register_forward_hook(keep)
        return tensors

    with negtome.attach(pipe, config):
        result = generate(pipe, callback_on_step_end=add_hooks)
        assert torch.equal(generate(pipe), result)
    assert kept and all(torch.equal(tensor, copy) for tensor, copy in kept)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [("EDMEuler", {}), ("EulerDiscrete", {"timestep_type": "continuous", "prediction_type": "v_prediction"})],
)
def test_timesteps_in_another_unit_are_refused(tiny_sdxl, name, options):
    """EDM's are quarters of logarithms of the noise level, from 1 down to -2: a range up to 1000 would hold a few."""
    scheduler = getattr(diffusers, f"{name}Scheduler")
    tiny_sdxl.scheduler = scheduler.from_config(tiny_sdxl.scheduler.config, **options)
    config = CONFIGS["sdxl"].replace(timestep_range=(0, 1000))
    with pytest.raises(ValueError, match=rf"of this {name}Scheduler go from -\d"), negtome.attach(tiny_sdxl, config):
        generate(tiny_sdxl)


def test_a_scheduler_of_second_order_has_every_step_twice(tiny_sdxl):
    tiny_sdxl.scheduler = diffusers.HeunDiscreteScheduler.from_config(tiny_sdxl.scheduler.config)
    calls = []
    tiny_sdxl.unet.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(float(kwargs["timestep"])), with_kwargs=True
    )
    with negtome.attach(tiny_sdxl, CONFIGS["sdxl"]) as attached:
        generate(tiny_sdxl)
    assert [step.timestep for step in attached.steps] == calls
    assert len(calls) == 7  # of 4 steps, all but the last twice


def test_steps_outside_the_timestep_range_do_not_change(pipe, config, kind):
    latents = []

    def watch(p, index, timestep, tensors):
        latents.append(tensors["latents"].clone())
        return tensors

    generate(pipe, callback_on_step_end=watch)
    base, latents[:] = list(latents), []
    # The second of four steps only.
    timestep_range = (500, 502) if kind == "sdxl" else (749, 751)
    with negtome.attach(pipe, config.replace(timestep_range=timestep_range)) as attached:
        generate(pipe, callback_on_step_end=watch)
    assert [torch.equal(a, b) for a, b in zip(latents, base, strict=True)] == [True, False, False, False]
    timesteps = [751, 501, 251, 1] if kind == "sdxl" else [1000, 750, 500, 250]
    assert attached.steps == [(t, i == 1) for i, t in enumerate(timesteps)]


def test_the_timestep_range_is_exact_in_bfloat16(tiny_flux):
    # The transformer receives 0.8984 for 900 / 1000 there, which would be outside.
    tiny_flux.to(torch.bfloat16)
    with negtome.attach(tiny_flux, CONFIGS["flux"].replace(timestep_range=(900, 1000))) as attached:
        generate(tiny_flux, sigmas=[1.0, 0.9, 0.899, 0.5], num_inference_steps=4)
    assert [step.active for step in attached.steps] == [True, True, False, False]


def test_the_first_step_alone_is_that_of_a_timestep_range(pipe, config, kind):
    timestep_range = (700, 1000) if kind == "sdxl" else (999, 1000)
    pipe.to(torch.float16)
    with negtome.attach(pipe, config.replace(timestep_range=timestep_range)):
        expected = generate(pipe)
    for step_range in ((0, 0), (0, 0.25)):
        with negtome.attach(pipe, config.replace(step_range=step_range)) as attached:
            assert torch.equal(generate(pipe), expected)
        assert [step.active for step in attached.steps] == [True, False, False, False]
    assert not torch.equal(generate(pipe), expected)


@pytest.mark.parametrize(
    "name",
    [
        "HeunDiscrete",
        "LCM",
        *(pytest.param(f"{name}Discrete", marks=pytest.mark.slow) for name in ("EulerAncestral", "KDPM2Ancestral")),
        pytest.param("DDIM", marks=pytest.mark.slow),
    ],
)
def test_a_step_range_counts_the_steps_of_any_scheduler(tiny_sdxl, name):
    scheduler = getattr(diffusers, f"{name}Scheduler")
    tiny_sdxl.scheduler = scheduler.from_config(tiny_sdxl.scheduler.config)
    for step_range, steps in (((1, 2), [False, True, True, False]), ((0.5, 0.99), [False, False, True, True])):
        with negtome.attach(tiny_sdxl, CONFIGS["sdxl"].replace(step_range=step_range)) as attached:
            generate(tiny_sdxl)
        calls = [active for active in steps for _ in range(scheduler.order)]
        assert [step.active for step in attached.steps] == calls[: len(attached.steps)]
        assert len(attached.steps) == 4 * scheduler.order - (scheduler.order - 1)


def test_a_step_range_counts_a_repeated_timestep_once(tiny_sdxl):
    tiny_sdxl.scheduler = diffusers.PNDMScheduler.from_config(tiny_sdxl.scheduler.config, skip_prk_steps=True)
    for step_range, active in (((0, 1), [True, True, True, False, False]), ((0.5, 0.99), [False] * 3 + [True] * 2)):
        with negtome.attach(tiny_sdxl, CONFIGS["sdxl"].replace(step_range=step_range)) as attached:
            generate(tiny_sdxl)
        assert attached.steps[1].timestep == attached.steps[2].timestep
        assert [step.active for step in attached.steps] == active
    attachment = negtome.attach(tiny_sdxl, CONFIGS["sdxl"].replace(step_range=(4, 9)))
    with pytest.raises(RuntimeError, match="This call has 4 steps, from 0 to 3;"), attachment:
        generate(tiny_sdxl)


# What is counted


def test_compared_tokens_are_counted_exactly(pipe, config, kind):
    with negtome.attach(pipe, config, group_size=2) as attached:
        generate(pipe, (0, 1, 2, 3))
        once = attached.counts()
        generate(pipe, (0, 1, 2, 3))
    assert tuple(once) == attached.sites
    for name, count in once.items():
        # Two groups, one moving image each; SDXL has two halves, and its first up block works at half the resolution.
        tokens = 64 if kind == "flux" or name.startswith("up_blocks.0") else 256
        steps, halves = (2, 2) if kind == "sdxl" else (2, 1)
        assert count.compared == 2 * steps * halves * tokens
        assert 0 <= count.pushed <= count.compared
        assert attached.counts()[name] == (2 * count.compared, 2 * count.pushed)
    assert attached.summary()["tokens_pushed"] == sum(count.pushed for count in attached.counts().values())
    assert len(attached.steps) == 8


@ONE_KIND
def test_calls_in_one_block_do_not_influence_each_other(pipe, config):
    with negtome.attach(pipe, config):
        first = generate(pipe)
        with torch.inference_mode():
            generate(pipe, (5, 6, 7, 8), prompt="a bus", height=40, num_inference_steps=3)
        assert torch.equal(generate(pipe), first)


# Never in silence


def counted_calls(pipe):
    """Return a list that grows at every step that the denoiser really takes."""
    calls = []
    first = next(module for module in denoiser(pipe).modules() if isinstance(module, torch.nn.Linear))
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_a_range_without_a_step_is_an_error_that_names_both_before_the_first_step(pipe, config, kind):
    calls = counted_calls(pipe)
    cases = [((800, 900), "751, 501, 251, 1" if kind == "sdxl" else "1000, 750, 500, 250", {})]
    if kind == "sdxl":
        cases.append(((0, 300), "751, 501", {"denoising_end": 0.5}))
    for (low, high), timesteps, options in cases:
        attachment = negtome.attach(pipe, config.replace(timestep_range=(low, high)))
        message = rf"timestep_range=\({low}, {high}\).*are {timesteps}; widen.*few_step"
        with pytest.raises(RuntimeError, match=message), attachment:
            generate(pipe, **options)
    attachment = negtome.attach(pipe, config.replace(step_range=(4, 9)))
    with pytest.raises(RuntimeError, match=r"step_range=\(4, 9\).*has 4 steps, from 0 to 3; widen"), attachment:
        generate(pipe)
    assert calls == []


def test_feature_maps_that_are_too_small_are_an_error_that_names_the_largest(tiny_sdxl):
    calls = counted_calls(tiny_sdxl)
    # Late in the run, too, it is known before the first step.
    config = CONFIGS["sdxl"].replace(min_side=32, timestep_range=(0, 300))
    with (
        pytest.raises(RuntimeError, match=r"12x20 tokens and min_side=32.*lower min_side to 12"),
        negtome.attach(tiny_sdxl, config),
    ):
        generate(tiny_sdxl, height=24, width=40)
    # The largest one that exists at a site, not that of the latent.
    with (
        pytest.raises(RuntimeError, match="8x8 tokens"),
        negtome.attach(tiny_sdxl, config.replace(sites=["up_blocks.0"])),
    ):
        generate(tiny_sdxl)
    assert calls == []


def test_sites_that_are_not_reached_are_an_error(tiny_flux, monkeypatch):
    monkeypatch.setattr(
        type(tiny_flux.transformer.transformer_blocks[0]),
        "forward",
        lambda self, hidden_states, encoder_hidden_states, **k: (encoder_hidden_states, hidden_states),
    )
    message = r"none of its 2 sites was reached.*transformer_blocks.0.attn.to_out.0"
    config = CONFIGS["flux"].replace(sites=["transformer_blocks"])
    with pytest.raises(RuntimeError, match=message), negtome.attach(tiny_flux, config):
        generate(tiny_flux)


@ONE_KIND
def test_a_threshold_that_no_token_exceeds_warns_with_the_highest_similarity(pipe, config):
    base = generate(pipe)
    attachment = negtome.attach(pipe, config.replace(threshold=0.9999))
    with pytest.warns(RuntimeWarning, match=r"highest similarity was 0\.\d+, not above threshold=0.9999"), attachment:
        assert torch.equal(generate(pipe), base)
    # 1 means off, even where rounding lifts the cosine of a copy above it, and needs no warning; neither does alpha=0.
    for off, seeds in (({"threshold": 1}, (0, 0, 0)), ({"threshold": 0.9999, "alpha": 0}, (0, 1, 2))):
        with (
            warnings.catch_warnings(action="error", category=RuntimeWarning),
            negtome.attach(pipe, config.replace(**off)) as attached,
        ):
            generate(pipe, seeds)
        assert attached.summary()["tokens_pushed"] == 0


@ONE_KIND
def test_group_sizes_that_do_not_fit_are_refused(pipe, config):
    with pytest.raises(ValueError, match="num_images_per_prompt=2 or more"), negtome.attach(pipe, config):
        generate(pipe, (0,))
    for size in (1, 0, True, 2.0):
        with pytest.raises(ValueError, match="group_size must be a whole number of at least 2"):
            negtome.attach(pipe, config, group_size=size)
    with pytest.raises(TypeError, match="must be a NegToMeConfig, or None, got a dict"):
        negtome.attach(pipe, {"alpha": 0.9})
    attachment = negtome.attach(pipe, config, group_size=np.int64(2))
    assert attachment.group_size == 2 and type(attachment.group_size) is int
    with pytest.raises(ValueError, match="complete groups of 2 images, got 3 images"), attachment:
        generate(pipe)
    attachment = negtome.attach(pipe, config, group_size=2)
    with pytest.raises(ValueError, match="group_size=2 and num_images_per_prompt=3"), attachment:
        generate(pipe, range(6), prompt=["a dog", "a cat"])
    with negtome.attach(pipe, config, group_size=3):
        generate(pipe, range(6), prompt=["a dog", "a cat"])
    for size in (8, 9):
        attachment = negtome.attach(pipe, config.replace(reference="others"))
        with warnings.catch_warnings(record=True, action="always", category=RuntimeWarning) as caught, attachment:
            generate(pipe, range(size), num_inference_steps=2)
        messages = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
        assert [f"for {size} images" in message for message in messages] == [True] * (size > 8)


def test_the_images_of_a_prompt_are_a_group(pipe, config):
    options = {"seeds": (0, 1, 2, 3), "prompt": ["a dog", "a cat"]}
    with negtome.attach(pipe, config, group_size=2):
        expected = generate(pipe, **options)
    with negtome.attach(pipe, config):
        assert torch.equal(generate(pipe, **options), expected)
        generate(pipe)  # another call may have another number of images
    with negtome.attach(pipe, config, group_size=4):  # a group across prompts, on demand
        assert not torch.equal(generate(pipe, **options), expected)


def test_prompts_of_one_image_each_need_a_group_size(pipe, kind, config):
    pipe.to(torch.float64)
    different = [{"prompt": ["a dog", "a cat"]}, {"prompt": ["a dog", "a dot"]}]
    if kind == "flux":
        different.append({"prompt": ["a photo", "a photo"], "prompt_2": ["a dog", "a cat"]})
        different.append({"prompt": ["a dog", "a cat"], "prompt_2": ["a photo", "a photo"]})
    for prompts in different:
        with pytest.raises(ValueError, match=r"several prompts.*num_images_per_prompt=2"), negtome.attach(pipe, config):
            generate(pipe, (0, 1), **prompts)
    with negtome.attach(pipe, config):  # one prompt written twice is one prompt
        twice = generate(pipe, (0, 1), prompt=["a dog", "a dog"])
        once = generate(pipe, (0, 1))
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sink", [1.0, 7e5])
def test_embeddings_of_several_prompts_are_distinguished_despite_attention_sinks(tiny_flux, dtype, sink):
    """Language models have activations of up to a million times a usual one in the first token, whatever it is."""
    tiny_flux.to(dtype)
    texts, pooled = torch.randn(2, 12, 32), torch.randn(1, 32).expand(2, -1)
    texts[:, 0, :2] = sink
    texts[1, :-1] = texts[0, :-1]  # the last token alone differs, as behind a common beginning

    def call(texts):
        embeds = {"prompt_embeds": texts.to(dtype), "pooled_prompt_embeds": pooled.to(dtype)}
        with negtome.attach(tiny_flux, CONFIGS["flux"]):
            return tiny_flux(**embeds, num_inference_steps=2, height=32, width=32, output_type="latent").images

    with pytest.raises(ValueError, match="got several prompts"):
        call(texts)
    texts[1] = texts[0] * (1 + 2e-3 * torch.randn(12, 32))  # computed side by side
    call(texts)


@pytest.mark.parametrize("in_place", [False, True])
def test_embeddings_that_a_callback_changes_are_compared_again(tiny_sdxl, in_place):
    def change(p, index, timestep, tensors):
        texts = tensors["prompt_embeds"]
        if index == 0:
            texts = texts if in_place else texts.clone()
            texts[-1] = other
        return {"prompt_embeds": texts}

    other = tiny_sdxl.encode_prompt("a red bus", do_classifier_free_guidance=True)[0][0]
    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.raises(ValueError, match="got several prompts"), negtome.attach(tiny_sdxl, CONFIGS["sdxl"]):
        generate(tiny_sdxl, **options)
    with negtome.attach(tiny_sdxl, CONFIGS["sdxl"], group_size=3):
        generate(tiny_sdxl, **options)


def derived(pipe, call):
    """Return a pipeline of a class derived from the pipeline's, with the same components and this `__call__`."""
    other = type("Derived", (type(pipe),), {"__call__": call})(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


def test_prompts_that_a_derived_pipeline_writes_are_compared(pipe, config):
    """What its own call says is not what the stock pipeline gets."""

    def call(self, prompt, num_images_per_prompt=1, **options):
        prompts = [f"{prompt}, number {number}" for number in range(num_images_per_prompt)]
        return type(pipe).__call__(self, prompts, **options)

    other = derived(pipe, call)
    with pytest.raises(ValueError, match="got several prompts"), negtome.attach(other, config):
        other("a dog", num_images_per_prompt=2, height=32, width=32)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_images_that_a_derived_pipeline_adds_are_noticed(tiny_sdxl, guidance_scale):
    """Two halves of one image, or four of two, would be another layout of the batch than there is."""

    def call(self, prompt, num_images_per_prompt=1, **options):
        return type(tiny_sdxl).__call__(self, prompt, num_images_per_prompt=2 * num_images_per_prompt, **options)

    other = derived(tiny_sdxl, call)
    with pytest.raises(ValueError, match="rows for each image, got"), negtome.attach(other, CONFIGS["sdxl"]):
        other("a dog", num_images_per_prompt=2, guidance_scale=guidance_scale, height=32, width=32)


@ONE_KIND
def test_a_bad_prompt_is_refused_by_the_pipeline_as_without_negtome(pipe, config):
    for prompt in (5, {}, None):
        with pytest.raises(ValueError, match="prompt"), negtome.attach(pipe, config):
            pipe(prompt, num_images_per_prompt=2)


# Something else in the place of the push


@ONE_KIND
def test_a_custom_push_replaces_the_result(pipe, config):
    plain, called = generate(pipe), []

    def keep(site, tokens, pushed, group_size):
        called.append((site, torch.equal(tokens, pushed)))
        assert tokens.shape == pushed.shape and len(tokens) % group_size == 0 and group_size == 3
        return tokens

    with negtome.attach(pipe, config, push=keep) as attached:
        assert torch.equal(generate(pipe), plain)
    assert {site for site, _ in called} == set(attached.sites) and not all(same for _, same in called)
    assert attached.summary()["tokens_pushed"] > 0, "as the method counts"
    with negtome.attach(pipe, config):
        expected = generate(pipe)
    with negtome.attach(pipe, config, push=lambda site, tokens, pushed, group_size: pushed):
        assert torch.equal(generate(pipe), expected) and not torch.equal(expected, plain)
    with pytest.raises(ValueError, match="leave it or the references out"):
        negtome.attach(pipe, config, references=negtome.Reference(torch.rand(3, 32, 32)), push=keep)
