"""NegToMe on tiny real pipelines: it does what an independent transcription does, only there, and leaves no trace."""

import copy
import inspect
import pickle
import threading
import warnings

import diffusers
import numpy as np
import pytest
import torch
from packaging.version import Version
from tiny import denoiser, generate, hook_attentions, state
from torch.nn.functional import normalize

import negtome
from negtome import NegToMeConfig

# The first two of four steps; at these thresholds some of the tokens of every site are pushed and others are not.
CONFIGS = {
    "sdxl": NegToMeConfig(alpha=0.9, threshold=0.85, timestep_range=(500, 1000), min_side=8),
    "flux": NegToMeConfig(alpha=0.9, threshold=0.9, timestep_range=(600, 1000)),
}
KINDS = ("sdxl", "flux")
SEEDS = (0, 1, 2)


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
CASES = {
    "sdxl": [
        ("paper", {}, {}),
        ("released", {"matching": "released", "cross_attention": True}, {}),
        ("without guidance", {}, {"guidance_scale": 1.0}),
        ("larger maps only", {"min_side": 16, "cross_attention": True}, {}),
        ("not square", {"min_side": 6}, {"height": 24, "width": 40}),
        ("odd sizes", {"min_side": 5}, {"latents": ODD}),
    ],
    "flux": [
        ("paper", {}, {}),
        ("released", {"matching": "released"}, {}),
        ("true guidance", {}, {"true_cfg_scale": 3.0, "negative_prompt": "a cat"}),
        ("longer text", {}, {"max_sequence_length": 30}),
        ("not square", {}, {"height": 24, "width": 40}),
    ],
    "schnell": [("no guidance", {}, {})],
}


@pytest.mark.parametrize(
    ("kind", "changes", "options"),
    [(kind, *case[1:]) for kind in CASES for case in CASES[kind]],
    ids=[f"{kind}, {case[0]}" for kind in CASES for case in CASES[kind]],
)
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


def test_released_without_guidance_is_one_group(tiny_sdxl):
    config = NegToMeConfig.preset("sdxl", "released", threshold=-1, timestep_range=(0, 1000), min_side=8)
    base = generate(tiny_sdxl, (0, 1, 2, 3), guidance_scale=1.0)
    with negtome.attach(tiny_sdxl, config):
        result = generate(tiny_sdxl, (0, 1, 2, 3), guidance_scale=1.0)
    assert [torch.equal(a, b) for a, b in zip(result, base, strict=True)] == [True, False, False, False]


@pytest.mark.parametrize("guidance", [True, False])
def test_groups_do_not_influence_each_other(pipe, config, kind, guidance):
    options = {"prompt": ["a dog", "a red bus"]}
    if kind == "sdxl":
        options["guidance_scale"] = 5.0 if guidance else 1.0
    elif guidance:
        options |= {"true_cfg_scale": 3.0, "negative_prompt": ["a cat", "a cat"]}
    # In float64, where no match hangs on rounding.
    pipe.to(torch.float64)
    with negtome.attach(pipe, config, group_size=2):
        result = generate(pipe, (0, 1, 2, 3), **options)
    with negtome.attach(pipe, config):
        for g, prompt in enumerate(options["prompt"]):
            single = options | {"prompt": prompt}
            if "negative_prompt" in single:
                single["negative_prompt"] = "a cat"
            alone = generate(pipe, (2 * g, 2 * g + 1), **single)
            torch.testing.assert_close(result[2 * g : 2 * g + 2], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("when", ["before", "inside", "global"])
def test_features_that_a_hook_keeps_are_not_written_to(pipe, config, when):
    """A hook, such as a cache's, that keeps what an attention returned keeps that."""
    base = generate(pipe)
    with negtome.attach(pipe, config):
        expected = generate(pipe)
    kept = []

    def keep(module, args, output):
        if hasattr(module, "processor"):
            for tensor in output if isinstance(output, tuple) else (output,):
                kept.append((tensor, tensor.clone()))

    attentions = [module for module in denoiser(pipe).modules() if hasattr(module, "processor")]
    handles = []

    def hook():
        if when == "global":
            handles.append(torch.nn.modules.module.register_module_forward_hook(keep))
        else:
            handles.extend(attention.register_forward_hook(keep) for attention in attentions)

    def at_end_of_step(_, index, timestep, tensors):
        if index == 0 and when == "inside":
            hook()
        return tensors

    if when != "inside":
        hook()
    try:
        with negtome.attach(pipe, config):
            result = generate(pipe, callback_on_step_end=at_end_of_step)
    finally:
        for handle in handles:
            handle.remove()
    assert kept and all(torch.equal(tensor, copy) for tensor, copy in kept)
    torch.testing.assert_close(result, expected)
    assert not torch.equal(result, base)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EDMEuler", {}),
        ("EDMDPMSolverMultistep", {}),
        ("EulerDiscrete", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    ],
)
def test_timesteps_in_another_unit_are_refused(tiny_sdxl, name, options):
    """EDM's are quarters of logarithms of the noise level, from 1 down to -2: a window up to 1000 would hold a few."""
    scheduler = getattr(diffusers, f"{name}Scheduler")
    tiny_sdxl.scheduler = scheduler.from_config(tiny_sdxl.scheduler.config, **options)
    config = CONFIGS["sdxl"].replace(timestep_range=(0, 1000))
    with pytest.raises(ValueError, match=rf"of this {name}Scheduler go from -\d"), negtome.attach(tiny_sdxl, config):
        generate(tiny_sdxl)


def test_a_scheduler_of_second_order_has_every_step_twice(tiny_sdxl):
    from diffusers import HeunDiscreteScheduler

    tiny_sdxl.scheduler = HeunDiscreteScheduler.from_config(tiny_sdxl.scheduler.config)
    calls = []

    def note(module, args, kwargs):
        calls.append(float(kwargs["timestep"]))

    handle = tiny_sdxl.unet.register_forward_pre_hook(note, with_kwargs=True)
    with negtome.attach(tiny_sdxl, CONFIGS["sdxl"]) as attached:
        generate(tiny_sdxl)
    handle.remove()
    assert [step.timestep for step in attached.steps] == calls
    assert len(calls) == 7  # of 4 steps, all but the last twice


def test_a_threshold_of_one_pushes_no_token(pipe, config):
    with negtome.attach(pipe, config.replace(threshold=1)) as attached:
        generate(pipe, seeds=(0, 0, 0))  # cosines of copies are rounded to more than 1, at times
    assert attached.summary()["tokens_pushed"] == 0


def test_steps_outside_the_timestep_range_do_not_change(pipe, config, kind):
    attached_steps = []

    def watch(p, index, timestep, tensors):
        attached_steps.append(tensors["latents"].clone())
        return tensors

    generate(pipe, callback_on_step_end=watch)
    base, attached_steps[:] = list(attached_steps), []
    # The second of four steps only.
    window = (500, 502) if kind == "sdxl" else (749, 751)
    with negtome.attach(pipe, config.replace(timestep_range=window)) as attached:
        generate(pipe, callback_on_step_end=watch)
    assert [torch.equal(a, b) for a, b in zip(attached_steps, base, strict=True)] == [True, False, False, False]
    timesteps = [751, 501, 251, 1] if kind == "sdxl" else [1000, 750, 500, 250]
    assert attached.steps == [(t, i == 1) for i, t in enumerate(timesteps)]


def test_the_timestep_range_is_exact_in_bfloat16(tiny_flux):
    # The transformer receives 0.8984 for 900 / 1000 there, which would be outside.
    tiny_flux.to(torch.bfloat16)
    with negtome.attach(tiny_flux, CONFIGS["flux"].replace(timestep_range=(900, 1000))) as attached:
        generate(tiny_flux, sigmas=[1.0, 0.9, 0.899, 0.5], num_inference_steps=4)
    assert [step.active for step in attached.steps] == [True, True, False, False]


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


def test_calls_in_one_block_do_not_influence_each_other(pipe, config):
    with negtome.attach(pipe, config):
        first = generate(pipe)
        with torch.inference_mode():
            generate(pipe, (5, 6, 7, 8), prompt="a bus", height=40, num_inference_steps=3)
        assert torch.equal(generate(pipe), first)


# Nothing stays behind


def test_the_pipeline_is_restored(pipe, config):
    base, before = generate(pipe), state(pipe)
    with negtome.attach(pipe, config) as attached:
        assert isinstance(pipe, before[0][0])
        assert type(pipe).__name__ == before[0][0].__name__  # diffusers and save_pretrained go by it
        assert state(pipe) != before
        generate(pipe)
    assert state(pipe) == before
    assert torch.equal(generate(pipe), base)
    assert not any(isinstance(value, torch.nn.Module) for value in vars(attached).values()), "weights are kept alive"
    assert pipe not in vars(attached).values()
    attached.remove()  # does nothing the second time
    assert state(pipe) == before
    attached = negtome.attach(pipe, config)
    assert not torch.equal(generate(pipe), base)
    attached.remove()
    assert state(pipe) == before


def test_a_handle_is_entered_once(pipe, config):
    """The second time it would do nothing, and so would the outer of two blocks after the inner one."""
    base = generate(pipe)
    with negtome.attach(pipe, config) as attached:
        generate(pipe)
        with pytest.raises(RuntimeError, match="was entered before; attach again"), attached:
            pass
        assert not torch.equal(generate(pipe), base)  # still attached
    with pytest.raises(RuntimeError, match="was entered before"), attached:
        generate(pipe)
    attached = negtome.attach(pipe, config)
    attached.remove()
    with pytest.raises(RuntimeError, match="was removed before; attach again"), attached:
        generate(pipe)


def test_a_lost_handle_is_detached(pipe, config):
    base, before = generate(pipe), state(pipe)
    sibling = type(pipe)(**pipe.components)
    for attached_to in (pipe, sibling):  # or by a pipeline that shares the denoiser
        negtome.attach(pipe, config)
        negtome.detach(attached_to)
        assert state(pipe) == before
    assert torch.equal(generate(pipe), base)
    with pytest.raises(RuntimeError, match="not attached to this"):
        negtome.detach(pipe)
    with pytest.raises(TypeError, match="supported are"):
        negtome.detach(object())


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy])
def test_a_copy_made_inside_is_a_stock_pipeline(pipe, config, make):
    base, before = generate(pipe), state(pipe)
    with negtome.attach(pipe, config):
        pushed, clone = generate(pipe), make(pipe)
        assert type(clone) is before[0][0]
        if denoiser(clone) is not denoiser(pipe):
            assert state(clone) == before
            assert torch.equal(generate(clone), base)
        assert torch.equal(generate(pipe), pushed)
    assert state(pipe) == before and torch.equal(generate(clone), base)


def test_a_pickle_made_inside_is_a_stock_pipeline(pipe, config):
    before = state(pipe)
    with negtome.attach(pipe, config):
        again = pickle.loads(pickle.dumps(pipe))
        generate(pipe)
    assert state(again) == before
    assert torch.equal(generate(again), generate(pipe))


def test_a_pipeline_made_of_an_attached_one_is_not_attached(pipe, config):
    base, name = generate(pipe), "unet" if hasattr(pipe, "unet") else "transformer"
    original = copy.deepcopy(denoiser(pipe))
    with negtome.attach(pipe, config):
        pushed = generate(pipe)
        other = type(pipe)(**pipe.components | {name: original})
        shallow = copy.copy(pipe)
        assert torch.equal(generate(other), base)
        with pytest.warns(RuntimeWarning, match="something else calls its .* runs unchanged"):
            for shared in (type(pipe)(**pipe.components), shallow):
                assert torch.equal(generate(shared), base)
        assert torch.equal(generate(pipe), pushed)
    assert torch.equal(generate(shallow), base)


def test_copies_of_modules_in_the_place_of_their_originals_are_pushed_once(pipe, config):
    with negtome.attach(pipe, config) as attached:
        expected = generate(pipe)
        for name in attached.sites:
            parent, _, last = name.rpartition(".")
            setattr(denoiser(pipe).get_submodule(parent), last, copy.deepcopy(denoiser(pipe).get_submodule(name)))
        assert torch.equal(generate(pipe), expected)
    assert not any(hasattr(module, "_negtome") for module in denoiser(pipe).modules())


class Doubled(torch.nn.Module):
    """As LoRA's layers do: bears the name of the module inside it, and returns something else."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args, **kwargs):
        return 2 * self.inner(*args, **kwargs)


def test_a_site_follows_to_a_module_around_the_old_one_and_back(pipe, config, kind):
    handle = negtome.attach(pipe, config)
    plain = generate(pipe)
    name = next(name for name in handle.sites if name.endswith("to_out.0" if kind == "flux" else "attn1"))
    parent, _, last = name.rpartition(".")
    parent = denoiser(pipe).get_submodule(parent)
    inner = parent._modules[last]
    setattr(parent, last, Doubled(inner))
    doubled = generate(pipe)
    assert not hasattr(inner, "_negtome") and hasattr(parent._modules[last], "_negtome")
    setattr(parent, last, inner)
    assert torch.equal(generate(pipe), plain)
    setattr(parent, last, Doubled(inner))
    handle.remove()
    assert not any(hasattr(module, "_negtome") for module in denoiser(pipe).modules())
    with negtome.attach(pipe, config):
        assert torch.equal(generate(pipe), doubled)
    assert not torch.equal(doubled, plain)


def load_adapter(pipe):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_out.0"]
    denoiser(pipe).add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def test_a_handle_outlives_adapters(pipe, config):
    """LoRA puts modules in the place of others: the sites follow, so that it is as if attached afterwards."""
    before = state(pipe)
    handle = negtome.attach(pipe, config)
    plain = generate(pipe)
    load_adapter(pipe)
    adapted = generate(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), plain)
    load_adapter(pipe)
    assert torch.equal(generate(pipe), adapted)
    handle.remove()
    assert not any(hasattr(module, "_negtome") for module in denoiser(pipe).modules())
    with negtome.attach(pipe, config):
        assert torch.equal(generate(pipe), adapted)
    assert not torch.equal(generate(pipe), adapted) and not torch.equal(adapted, plain)
    pipe.unload_lora_weights()
    assert [kind for kind, *_ in state(pipe)] == [kind for kind, *_ in before]


def test_an_exception_in_the_block_arrives_and_everything_is_restored(pipe, config):
    base, before = generate(pipe), state(pipe)

    def fail(p, index, timestep, tensors):
        if index == 1:
            raise KeyError("mine")
        return tensors

    with pytest.raises(KeyError, match="mine"), negtome.attach(pipe, config):
        generate(pipe, callback_on_step_end=fail)
    assert state(pipe) == before
    assert torch.equal(generate(pipe), base)
    # A call that failed inside a block does not spoil the next one, and leaves the sites at rest.
    with negtome.attach(pipe, config) as attached:
        site = denoiser(pipe).get_submodule(attached.sites[0])
        tokens = 1 + 0.1 * torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(0))
        with pytest.raises(KeyError):
            generate(pipe, callback_on_step_end=fail)
        assert torch.equal(site(tokens), site.forward(tokens))
        result = generate(pipe)
    with negtome.attach(pipe, config):
        assert torch.equal(generate(pipe), result)


def test_settings_default_to_the_published_ones(pipe, kind):
    def settled(*config):
        attached = negtome.attach(pipe, *config)
        attached.remove()
        return attached.config

    assert settled() == settled(None) == NegToMeConfig.preset(kind)
    assert settled(NegToMeConfig(alpha=1.5, min_side=8)) == NegToMeConfig.preset(kind, alpha=1.5, min_side=8)
    assert settled(NegToMeConfig(threshold=0.1)).threshold == 0.1
    assert settled(NegToMeConfig(timestep_range=(0, 1))).timestep_range == (0, 1)


def test_a_refused_attachment_leaves_the_pipeline_as_it_was(pipe, config):
    generate(pipe)  # diffusers keeps attributes of the last call
    before = state(pipe)
    with pytest.raises(ValueError, match="no site under 'nowhere'"):
        negtome.attach(pipe, config.replace(sites=["nowhere"]))
    assert state(pipe) == before
    with negtome.attach(pipe, config):
        inside = state(pipe)
        with pytest.raises(RuntimeError, match=r"attached to this .* already"):
            negtome.attach(pipe, config)
        assert state(pipe) == inside
        sibling = before[0][0](**pipe.components)
        with pytest.raises(RuntimeError, match=r"attached to this .* already"):
            negtome.attach(sibling, config)
        generate(pipe)
    assert state(pipe) == before


# Never in silence


def test_a_block_without_a_call_is_an_error(pipe, config):
    before = state(pipe)
    with pytest.raises(RuntimeError, match="was not called in the block"), negtome.attach(pipe, config):
        pass
    assert state(pipe) == before


def test_an_error_that_the_user_handles_inside_is_not_followed_by_another(pipe, config):
    before = state(pipe)
    with negtome.attach(pipe, config), pytest.raises(ValueError, match="needs at least 2"):
        generate(pipe, (0,))
    assert [kind for kind, *_ in state(pipe)] == [kind for kind, *_ in before]


def test_a_call_that_is_interrupted_before_the_timestep_range_returns_its_images(pipe, config, kind):
    low, high = (200, 300) if kind == "sdxl" else (200, 260)

    def interrupt(p, index, timestep, tensors):
        p._interrupt = index == 0
        return tensors

    base = generate(pipe, callback_on_step_end=interrupt)
    with (
        pytest.warns(RuntimeWarning, match="interrupted before a step of the timestep range"),
        negtome.attach(pipe, config.replace(timestep_range=(low, high))) as attached,
    ):
        assert torch.equal(generate(pipe, callback_on_step_end=interrupt), base)
    assert len(attached.steps) == 1 and not attached.steps[0].active


def test_a_finished_attachment_is_pickled_with_its_counts(pipe, config):
    attached = negtome.attach(pipe, config, push=lambda site, tokens, pushed, group_size: pushed)
    with attached:
        generate(pipe)
        with pytest.raises(TypeError, match="after its `with` block"):
            pickle.dumps(attached)
    again = pickle.loads(pickle.dumps(attached))
    assert again.summary()["sites"] == len(attached.sites) > 0
    assert again.summary() == attached.summary() and again.counts() == attached.counts()
    assert (again.sites, again.steps, again.config) == (attached.sites, attached.steps, attached.config)


@pytest.mark.parametrize("in_thread", [False, True], ids=["callback", "thread"])
def test_a_running_call_is_not_detached(pipe, config, in_thread):
    with negtome.attach(pipe, config):
        expected = generate(pipe)
    refusals = []

    def detach():
        with pytest.raises(RuntimeError, match=r"cannot be detached .* during a call"):
            negtome.detach(pipe)
        refusals.append(1)

    def meanwhile(p, index, timestep, tensors):
        if in_thread:
            thread = threading.Thread(target=detach)
            thread.start()
            thread.join()
        else:
            detach()
        return tensors

    with negtome.attach(pipe, config):
        assert torch.equal(generate(pipe, callback_on_step_end=meanwhile), expected)
    assert len(refusals) == 4


def test_options_are_keywords_and_given_is_deprecated(pipe, config):
    with pytest.raises(TypeError):
        negtome.attach(pipe, config, 2)
    reference = negtome.Reference(torch.rand(3, 32, 32))
    with pytest.warns(DeprecationWarning, match="references=") as caught:
        old = negtome.attach(pipe, config, given=reference)
    assert caught[0].filename == __file__
    result = generate(pipe)
    old.remove()
    with negtome.attach(pipe, config, references=reference):
        assert torch.equal(generate(pipe), result)
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="passed twice"):
        negtome.attach(pipe, config, given=reference, references=reference)


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
        message = rf"timestep_range=\({low}, {high}\).*are {timesteps}; widen"
        with pytest.raises(RuntimeError, match=message), attachment:
            generate(pipe, **options)
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


def test_sites_that_are_not_reached_are_an_error(pipe, config, monkeypatch):
    for name in ("up_blocks", "transformer_blocks", "single_transformer_blocks"):
        for block in getattr(denoiser(pipe), name, ()):
            for attention in (m for n, m in block.named_modules() if n.endswith(("attn", "attn1"))):
                monkeypatch.setattr(type(attention), "forward", lambda self, hidden_states, *a, **k: hidden_states)
    if hasattr(pipe, "unet"):
        with negtome.attach(pipe, config):  # a module's output is pushed whatever made it
            generate(pipe)
    else:
        monkeypatch.setattr(
            type(denoiser(pipe).transformer_blocks[0]),
            "forward",
            lambda self, hidden_states, encoder_hidden_states, **k: (encoder_hidden_states, hidden_states),
        )
        config = config.replace(sites=["transformer_blocks"])
        with (
            pytest.raises(RuntimeError, match=r"none of its 2 sites was reached.*transformer_blocks.0.attn.to_out.0"),
            negtome.attach(pipe, config),
        ):
            generate(pipe)


def test_a_threshold_that_no_token_exceeds_warns_with_the_highest_similarity(pipe, config):
    base = generate(pipe)
    attachment = negtome.attach(pipe, config.replace(threshold=0.9999))
    with pytest.warns(RuntimeWarning, match=r"highest similarity was 0\.\d+, not above threshold=0.9999"), attachment:
        assert torch.equal(generate(pipe), base)
    # 1 says "off", which needs no warning; neither does alpha=0.
    for off in ({"threshold": 1}, {"threshold": 0.9999, "alpha": 0}):
        attachment = negtome.attach(pipe, config.replace(**off))
        with warnings.catch_warnings(action="error", category=RuntimeWarning), attachment:
            assert torch.equal(generate(pipe), base)


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


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_images_of_a_prompt_are_a_group(pipe, config, guidance_scale):
    options = {"seeds": (0, 1, 2, 3), "prompt": ["a dog", "a cat"], "guidance_scale": guidance_scale}
    with negtome.attach(pipe, config, group_size=2):
        expected = generate(pipe, **options)
    with negtome.attach(pipe, config):
        assert torch.equal(generate(pipe, **options), expected)
        generate(pipe)  # another call may have another number of images
    with negtome.attach(pipe, config, group_size=4):  # a group across prompts, on demand
        assert not torch.equal(generate(pipe, **options), expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_prompts_of_one_image_each_need_a_group_size(pipe, kind, config, guidance_scale):
    pipe.to(torch.float64)
    different = [{"prompt": ["a dog", "a cat"]}, {"prompt": ["a dog", "a dot"]}]
    if kind == "flux":
        different.append({"prompt": ["a photo", "a photo"], "prompt_2": ["a dog", "a cat"]})
        different.append({"prompt": ["a dog", "a cat"], "prompt_2": ["a photo", "a photo"]})
    for prompts in different:
        with pytest.raises(ValueError, match=r"several prompts.*num_images_per_prompt=2"), negtome.attach(pipe, config):
            generate(pipe, (0, 1), guidance_scale=guidance_scale, **prompts)
    with negtome.attach(pipe, config):  # one prompt written twice is one prompt
        twice = generate(pipe, (0, 1), prompt=["a dog", "a dog"], guidance_scale=guidance_scale)
        once = generate(pipe, (0, 1), guidance_scale=guidance_scale)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sink", [1.0, 100.0, 7e5])
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


def test_a_bad_prompt_is_refused_by_the_pipeline_as_without_negtome(pipe, config):
    for prompt in (5, {}, None):
        with pytest.raises(ValueError, match="prompt"), negtome.attach(pipe, config):
            pipe(prompt, num_images_per_prompt=2)


def test_a_site_that_is_gone_is_noticed(pipe, config):
    with negtome.attach(pipe, config) as attached, pytest.raises(RuntimeError, match="is gone from the"):
        generate(pipe)
        block = denoiser(pipe).get_submodule(attached.sites[0].rpartition(".attn")[0])
        block.__class__ = torch.nn.Identity
        block._modules.clear()
        generate(pipe)


def test_a_replaced_denoiser_is_noticed(pipe, config):
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    other = copy.deepcopy(getattr(pipe, name))
    with pytest.raises(RuntimeError, match=f"`pipe.{name}` was replaced"), negtome.attach(pipe, config):
        setattr(pipe, name, other)
        generate(pipe)


def test_a_second_pass_is_made_of_the_attached_pipeline_inside(pipe, config):
    name = type(pipe).__name__.replace("Pipeline", "Img2ImgPipeline")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def make_and_call():
        second = getattr(diffusers, name).from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))
        return generate(second, (0,), image=images[:1], strength=0.5)

    base, expected = generate(pipe), make_and_call()
    with pytest.warns(RuntimeWarning, match="runs unchanged"), negtome.attach(pipe, config):
        pushed = generate(pipe)
        assert torch.equal(make_and_call(), expected)
        assert torch.equal(generate(pipe), pushed)
    assert torch.equal(generate(pipe), base)


def by_name(pipe, meanwhile):
    return {"callback_on_step_end": meanwhile}


def by_position(pipe, meanwhile):
    return {"by_position": meanwhile}


def in_thread(pipe, meanwhile):
    def run(p, index, timestep, tensors):
        thread = threading.Thread(target=meanwhile, args=(p, index, timestep, tensors))
        thread.start()
        thread.join()
        return tensors

    return {"callback_on_step_end": run}


def by_class(pipe, meanwhile):
    from diffusers.callbacks import PipelineCallback

    class Meanwhile(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return meanwhile(pipeline, step_index, timestep, callback_kwargs)

    return {"callback_on_step_end": Meanwhile()}


def several(pipe, meanwhile):
    from diffusers.callbacks import MultiPipelineCallbacks

    return {"callback_on_step_end": MultiPipelineCallbacks([by_class(pipe, meanwhile)["callback_on_step_end"]])}


def deprecated(pipe, meanwhile):
    if not hasattr(pipe, "unet"):
        pytest.skip("this pipeline never had it")
    return {"callback": lambda index, timestep, latents: meanwhile(pipe, index, timestep, {}), "callback_steps": 1}


@pytest.mark.parametrize("options", [by_name, by_position, in_thread, by_class, several, deprecated])
def test_another_pipeline_that_is_called_during_or_after_the_call_runs_unchanged(pipe, config, options):
    """None of its tokens is pushed and none of its steps is counted. Between the steps the modules are inactive."""
    other = type(pipe)(**pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)})
    base = generate(other, num_inference_steps=2)
    with negtome.attach(pipe, config) as attached:
        expected = generate(pipe)
        counts = attached.counts(), attached.steps[:]
    results = []

    def meanwhile(p, index, timestep, tensors):
        results.append(generate(other, num_inference_steps=2))
        site = denoiser(pipe).get_submodule(attached.sites[0])
        tokens = 1 + 0.1 * torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(site(tokens), site.forward(tokens))
        return tensors

    with pytest.warns(RuntimeWarning, match="that call runs unchanged"), negtome.attach(pipe, config) as attached:
        callback = options(pipe, meanwhile)
        if "by_position" in callback:
            parameters = list(inspect.signature(type(pipe).__call__).parameters.values())[1:]
            values = {one.name: one.default for one in parameters if one.kind is not one.VAR_KEYWORD}
            values |= {
                "prompt": "a dog", "num_images_per_prompt": 3, "num_inference_steps": 4, "height": 32, "width": 32,
                "generator": [torch.Generator().manual_seed(seed) for seed in SEEDS], "output_type": "latent",
                "callback_on_step_end": meanwhile,
            }  # fmt: skip
            if "max_sequence_length" in values:
                values["max_sequence_length"] = 12
            result = pipe(*values.values()).images
        else:
            result = generate(pipe, **callback)
        results.append(generate(other, num_inference_steps=2))
    assert len(results) == 5 and all(torch.equal(result, base) for result in results)
    assert torch.equal(result, expected)
    assert (attached.counts(), attached.steps) == counts


def test_callbacks_of_diffusers_classes_work(pipe, config):
    """The pipelines ask for its class, and for the tensors that it wants."""
    from diffusers.callbacks import PipelineCallback

    class Fading(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": callback_kwargs["latents"] * 0.9}

    fading = Fading(cutoff_step_ratio=1.0)
    with negtome.attach(pipe, config.replace(alpha=0)):
        result = generate(pipe, callback_on_step_end=fading)
    assert torch.equal(result, generate(pipe, callback_on_step_end=fading))
    assert not torch.equal(result, generate(pipe))


def test_another_pipeline_with_the_module_inside_a_compiled_denoiser_is_left_alone(tiny_sdxl):
    other = type(tiny_sdxl)(**tiny_sdxl.components | {"scheduler": copy.deepcopy(tiny_sdxl.scheduler)})
    expected, results = generate(other), []

    def meanwhile(p, index, timestep, tensors):
        results.append(generate(other))
        return tensors

    compile_and_replace(tiny_sdxl)
    # What is compiled makes no difference to who calls whom.
    with torch.compiler.set_stance("force_eager"), negtome.attach(tiny_sdxl, CONFIGS["sdxl"]) as attached:
        generate(tiny_sdxl, callback_on_step_end=meanwhile)
    assert len(attached.steps) == len(results) == 4 and all(torch.equal(result, expected) for result in results)


def test_nested_calls_of_the_attached_pipeline_are_refused(pipe, config):
    def again(p, index, timestep, tensors):
        generate(p)

    with pytest.raises(RuntimeError, match=r"one call of its \w+ at a time"), negtome.attach(pipe, config):
        generate(pipe, callback_on_step_end=again)


def split_tokens(module):
    from diffusers import ContextParallelConfig, ParallelConfig

    # What enable_parallelism notes down: it needs two processes with a device each.
    module._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))


def split_weights(module):
    from torch import distributed
    from torch.distributed.tensor import distribute_module

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        distribute_module(next(m.to_q for m in module.modules() if hasattr(m, "to_q")), mesh)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("split", [split_tokens, split_weights])
def test_a_denoiser_split_over_processes_is_refused_before_and_inside_the_block(tiny_flux, split):
    with pytest.raises(RuntimeError, match="split over processes"), negtome.attach(tiny_flux, CONFIGS["flux"]):
        split(tiny_flux.transformer)
        generate(tiny_flux)
    before = state(tiny_flux)
    with pytest.raises(RuntimeError, match=r"split over processes.*load it whole in each process"):
        negtome.attach(tiny_flux, CONFIGS["flux"])
    assert state(tiny_flux) == before


# Beside what else may be done to a pipeline


def offload_pipeline(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_denoiser(pipe):
    import accelerate

    accelerate.cpu_offload(denoiser(pipe), execution_device=torch.device("cpu"))


def offload_groups(pipe):
    if Version(diffusers.__version__) < Version("0.42") and not torch.accelerator.is_available():
        pytest.skip("this diffusers offloads groups where there is an accelerator only")
    denoiser(pipe).enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )


def fuse_projections(pipe):
    if hasattr(pipe, "unet"):
        pipe.fuse_qkv_projections(vae=False)
    else:
        pipe.transformer.fuse_qkv_projections()


@pytest.mark.parametrize("change", [offload_pipeline, offload_denoiser, offload_groups, fuse_projections])
@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
def test_offloading_and_fused_projections_keep_working(pipe, config, change, inside):
    with negtome.attach(pipe, config) as plain:
        expected = generate(pipe)
    if not inside:
        change(pipe)
    with negtome.attach(pipe, config) as attached:
        if inside:
            change(pipe)
        torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)
    assert attached.summary()["tokens_compared"] == plain.summary()["tokens_compared"]
    assert not any(hasattr(module, "_negtome") for module in denoiser(pipe).modules())


def test_a_pipeline_may_change_its_dtype_and_be_saved_inside(pipe, config, tmp_path):
    with negtome.attach(pipe, config) as attached:
        pipe.save_pretrained(tmp_path)
        pipe.to(torch.bfloat16)
        assert generate(pipe).dtype is torch.bfloat16
    assert attached.summary()["tokens_compared"] > 0
    again = type(pipe).from_pretrained(tmp_path)
    assert type(denoiser(again)) is type(denoiser(pipe))


def compile_in_place(pipe, **options):
    denoiser(pipe).compile(**options)


def compile_and_replace(pipe, **options):
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(pipe, name, torch.compile(getattr(pipe, name), **options))


def compile_blocks(pipe, **options):
    denoiser(pipe).compile_repeated_blocks(**options)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["compile then attach", "attach then compile"])
@pytest.mark.parametrize("compiled", [compile_in_place, compile_and_replace, compile_blocks])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_denoisers_are_pushed_too(kind, compiled, inside, request):
    pipe, config = request.getfixturevalue(f"tiny_{kind}"), CONFIGS[kind]
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    base = generate(pipe)
    with negtome.attach(pipe, config) as eager:
        expected = generate(pipe)
    torch._dynamo.reset()
    if not inside:
        compiled(pipe, backend=backend, fullgraph=True)
        torch.testing.assert_close(generate(pipe), base, rtol=1e-3, atol=1e-3)
    with negtome.attach(pipe, config) as attached:
        if inside:
            compiled(pipe, backend=backend, fullgraph=True)
        result = generate(pipe)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    for count, eager_count in zip(attached.counts().values(), eager.counts().values(), strict=True):
        assert count.compared == eager_count.compared
        assert abs(count.pushed - eager_count.pushed) <= 3  # rounding, at the threshold
    torch.testing.assert_close(generate(pipe), base, rtol=1e-3, atol=1e-3)
    # Attaching again finds everything compiled, at the latest the second time.
    assert graphs
    for _ in range(2):
        graphs.clear()
        with negtome.attach(pipe, config):
            torch.testing.assert_close(generate(pipe), result, rtol=1e-3, atol=1e-3)
    assert graphs == []


def test_a_block_may_be_compiled_inside(tiny_flux):
    """Its modules are one level further down then; what is compiled makes no difference to that."""
    blocks = tiny_flux.transformer.single_transformer_blocks
    with negtome.attach(tiny_flux, CONFIGS["flux"]) as attached:
        expected = generate(tiny_flux)
        blocks[0] = torch.compile(blocks[0])
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(generate(tiny_flux), expected)
    compared = {name: count.compared for name, count in attached.counts().items()}
    assert compared["single_transformer_blocks.0.attn"] == compared["single_transformer_blocks.1.attn"] > 0
    with torch.compiler.set_stance("force_eager"), negtome.attach(tiny_flux, CONFIGS["flux"]) as attached:
        assert torch.equal(generate(tiny_flux), expected)
    assert "single_transformer_blocks.0._orig_mod.attn" in attached.sites


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [compile_in_place, compile_blocks])
def test_inductor_compiles_it(tiny_flux, compiled):
    config = CONFIGS["flux"]
    torch._dynamo.reset()  # what other tests compiled counts towards its limit
    with negtome.attach(tiny_flux, config):
        expected = generate(tiny_flux)
    compiled(tiny_flux, fullgraph=True)
    generate(tiny_flux)
    with negtome.attach(tiny_flux, config):
        torch.testing.assert_close(generate(tiny_flux), expected, rtol=1e-3, atol=1e-3)


# Something else in the place of the push


def test_a_custom_push_replaces_the_result(pipe, config):
    plain, called = generate(pipe), []

    def keep(site, tokens, pushed, group_size):
        called.append((site, torch.equal(tokens, pushed)))
        assert tokens.shape == pushed.shape and len(tokens) % group_size == 0 and group_size == len(SEEDS)
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
