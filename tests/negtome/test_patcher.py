"""The pushes of `negtome.patcher` on the `extra_options` of each model family, compared with the library's push.

`Executor` stands for ComfyUI: it calls a small model whose attention outputs pass through the patches.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from negtome.merge import negative_merge
from negtome.patcher import GroupPush, PushSettings, ReferencePush, Schedule, read_settings

STRENGTH = {"alpha": 0.9, "threshold": 0.2, "matching": "paper"}
ALWAYS = Schedule(low=0.0)
TEXT = 5  # tokens
WIDTH = 12


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Executor:
    """A model call as ComfyUI makes it: attention outputs of one family, patched in the order of `patches`.

    Attributes:
        class_obj: what the adapter reads of ComfyUI's BaseModel.
        seen: arguments of the last call.
        before, after: the attention outputs of the last call by hook point.
    """

    def __init__(self, family, *patches, dtype=torch.float32, scale=1.0):
        self.family, self.patches, self.dtype, self.scale = family, patches, dtype, scale
        sampling = SimpleNamespace(
            noise_scaling=lambda sigma, noise, latent, _: latent + sigma.view(-1, 1, 1, 1) * noise
        )
        self.class_obj = SimpleNamespace(model_sampling=sampling, process_latent_in=lambda latent: 2 * latent)

    def calls(self, x, options):
        """List (hook point, tokens, extra options) of each attention."""
        height, width = x.shape[-2:]
        if self.family == "flux":
            tokens = self.features(x, height // 2, width // 2)
            both = torch.cat([randn(1, TEXT, WIDTH, seed=8).to(tokens).expand(len(x), -1, -1), tokens], dim=1)
            image = {"img_slice": [TEXT, both.shape[1]]}
            return [
                (kind, both, {**options, "block_type": kind, "block_index": 0, **image})
                for kind in ("double", "single")
            ]
        blocks = {"sdxl": [("input", 4, 2), ("middle", 0, 4), ("output", 2, 4), ("output", 5, 2)]}
        blocks["sd15"] = [("input", 1, 1), ("output", 5, 2), ("output", 11, 1)]
        return [
            ((name, number), self.features(x, height // down, width // down), {**options, "block": (name, number)})
            for name, number, down in blocks[self.family]
        ]

    def features(self, x, height, width):
        """Make tokens [rows, N, C] that depend on each row of x, and are similar between rows."""
        pooled = torch.nn.functional.adaptive_avg_pool2d(x, (height, width)).flatten(2).mT.float()
        mixed = pooled @ randn(x.shape[1], WIDTH, seed=9) + 0.5
        return (self.scale * mixed).to(self.dtype)

    def __call__(self, x, sigma, c_concat, c_crossattn, control, options, **named):
        self.seen = {"x": x, "sigma": sigma, "c_crossattn": c_crossattn, "control": control, **named}
        self.before, self.after = {}, {}
        for name, tokens, extra in self.calls(x, options):
            self.before[name] = tokens
            for patch in self.patches:
                tokens = patch(tokens, extra)
            self.after[name] = tokens
        return x.clone()


def call(push, executor, x, conditions=(1, 0), sigma=5.0, **named):
    """Run a model call through the push's wrapper."""
    options = {"cond_or_uncond": list(conditions), "sample_sigmas": torch.tensor([14.6, 5.0, 2.0, 0.0])}
    return push.apply(
        executor,
        x,
        torch.full((len(x),), sigma),
        None,
        named.pop("context", None),
        named.pop("control", None),
        options,
        **named,
    )


def settings_for(family, strength=STRENGTH, schedule=ALWAYS):
    return PushSettings(strength, schedule, attention_level={"sdxl": 1, "sd15": 0, "flux": None}[family])


def group(family, group_size=0, **settings):
    return GroupPush(settings_for(family, **settings), group_size=group_size)


def expected(tokens, chunks, images, columns=slice(None)):
    """Push images 2, 3, ... of each chunk from its first, one by one."""
    result = tokens.clone()
    for chunk in range(chunks):
        first = chunk * images
        for row in range(first + 1, first + images):
            one = negative_merge(tokens[row : row + 1, columns], tokens[first, columns], **STRENGTH)
            result[row, columns] = one[0]
    return result


ACTIVE = {"sdxl": {("output", 5)}, "sd15": {("output", 11)}, "flux": {"double", "single"}}


@pytest.mark.parametrize("family", ACTIVE)
@pytest.mark.parametrize("conditions", [(0,), (1,), (1, 0), (0, 0, 1)])
def test_each_family_is_pushed_as_the_library_does(family, conditions):
    push = group(family)
    executor = Executor(family, push)
    output = call(push, executor, x := randn(3 * len(conditions), 4, 32, 32), conditions)
    assert torch.equal(output, x)
    columns = slice(TEXT, None) if family == "flux" else slice(None)
    for name, before in executor.before.items():
        after = executor.after[name]
        if name not in ACTIVE[family]:
            assert after is before
            continue
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, expected(before, len(conditions), 3, columns), atol=1e-5, rtol=1e-5)
        assert torch.equal(after[0], before[0])  # the first image, and below the text
        assert columns.start is None or torch.equal(after[:, :TEXT], before[:, :TEXT])
    assert push.report.hook_points == len(ACTIVE[family])
    assert 0 < push.report.moved <= push.report.compared


def test_tokens_of_an_image_to_edit_stay():
    push = group("flux")
    executor = Executor("flux", push)
    original = executor.calls

    def with_image_to_edit(x, options):
        for name, tokens, extra in original(x, options):
            longer = torch.cat([tokens, tokens[:, TEXT:]], dim=1)
            yield name, longer, {**extra, "img_slice": [TEXT, longer.shape[1]]}

    executor.calls = with_image_to_edit
    call(push, executor, randn(2, 4, 16, 16), [0])
    for name, before in executor.before.items():
        columns = slice(TEXT, TEXT + 64)
        assert not torch.equal(executor.after[name], before)
        torch.testing.assert_close(executor.after[name], expected(before, 1, 2, columns), atol=1e-5, rtol=1e-5)


def test_conditions_apart_equal_conditions_together():
    push = group("sdxl")
    x = randn(4, 4, 32, 32)
    call(push, together := Executor("sdxl", push), x)
    moved = push.report.moved
    push.report.start()
    for chunk, condition in ((x[:2], 1), (x[2:], 0)):
        call(push, apart := Executor("sdxl", push), chunk, [condition])
        rows = slice(0, 2) if condition == 1 else slice(2, 4)
        torch.testing.assert_close(apart.after["output", 5], together.after["output", 5][rows])
    assert push.report.moved == moved
    assert push.report.calls == 2


def test_groups_never_see_each_other():
    push = group("sdxl", group_size=2)
    x = randn(4, 4, 32, 32)
    call(push, four := Executor("sdxl", push), x, [0])
    call(push, two := Executor("sdxl", push), x[2:], [0])
    torch.testing.assert_close(four.after["output", 5][2:], two.after["output", 5])
    with pytest.raises(ValueError, match="groups of 2 images, got 3"):
        call(push, four, x[:3], [0])


def test_a_second_pass_of_another_size_starts_a_new_report():
    push = group("sdxl")
    executor = Executor("sdxl", push)
    for side in (32, 48):
        push.sample(lambda noise: call(push, executor, noise, [0]), randn(2, 4, side, side))
        after, before = executor.after["output", 5], executor.before["output", 5]
        torch.testing.assert_close(after, expected(before, 1, 2), atol=1e-5, rtol=1e-5)
        assert push.report.compared == (side // 2) ** 2


def test_float16_with_large_activations_stays_finite_and_exact():
    push = group("flux")
    executor = Executor("flux", push, dtype=torch.float16, scale=12000.0)
    call(push, executor, randn(2, 4, 16, 16), [0])
    before, after = executor.before["double"], executor.after["double"]
    assert before.isfinite().all() and before.abs().max() > 20000
    assert after.dtype == torch.float16 and after.isfinite().all()
    exact = expected(before.float(), 1, 2, slice(TEXT, None)).clamp(-65504, 65504).half()
    torch.testing.assert_close(after, exact, rtol=1e-3, atol=1.0)


def test_patches_of_other_nodes_stay_in_their_order():
    push = group("sdxl")
    double, add = (lambda n, _: 2 * n), (lambda n, _: n + 1)
    call(push, executor := Executor("sdxl", double, push, add), randn(2, 4, 32, 32), [0])
    before = executor.before["output", 5]
    torch.testing.assert_close(executor.after["output", 5], expected(2 * before, 1, 2) + 1, atol=1e-5, rtol=1e-5)


SIGMAS = (14.6, 8.5, 5.0, 2.0)  # of a pass with steps at 14.6, 5 and 2: 8.5 is a second call within the first step


@pytest.mark.parametrize(
    ("schedule", "active"),
    [
        (Schedule(low=5.0), [14.6, 8.5, 5.0]),
        (Schedule(low=1.0, high=6.0), [5.0, 2.0]),
        (Schedule(step_range=(0, 0)), [14.6, 8.5]),
        (Schedule(step_range=(1, 1)), [5.0]),
    ],
)
def test_only_calls_in_the_timestep_range_or_step_range_are_pushed(schedule, active):
    push = group("sdxl", schedule=schedule)
    executor = Executor("sdxl", push)
    for sigma in SIGMAS:
        call(push, executor, randn(2, 4, 32, 32), [0], sigma=sigma)
        assert torch.equal(executor.after["output", 5], executor.before["output", 5]) == (sigma not in active)
    assert push.report.active_calls == len(active) < push.report.calls == 4


def test_without_the_schedule_of_the_pass_each_lower_sigma_is_a_step():
    push = group("sdxl", schedule=Schedule(step_range=(0, 1)))
    for _ in range(2):  # a further pass begins with its first step
        active = []

        def run(noise, active=active):
            for sigma in (9.0, 9.0, 4.0, 4.0, 1.0):  # both conditions apart, and one at the last
                before = push.report.active_calls
                options = {"cond_or_uncond": [0]}
                push.apply(Executor("sdxl", push), noise, torch.full((2,), sigma), transformer_options=options)
                active.append(push.report.active_calls > before)

        push.sample(run, randn(2, 4, 32, 32))
        assert active == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("change", "x", "problem"),
    [
        ({}, (1, 4, 32, 32), "batch size"),
        ({"schedule": Schedule(low=math.inf)}, (2, 4, 32, 32), "timestep range"),
        ({"strength": {**STRENGTH, "threshold": 1.0}}, (2, 4, 32, 32), "similar enough"),
        ({"strength": {**STRENGTH, "alpha": 0.0}}, (2, 4, 32, 32), "similar enough"),
        ({}, (2, 4, 1, 32, 32), "videos"),
        ({}, (2, 16, 1, 32, 32), "Qwen-Image"),
        ({"group_size": 1}, (2, 4, 32, 32), "group size is 1"),
    ],
)
def test_a_pass_without_effect_warns_and_says_why(change, x, problem, caplog):
    push = group("sdxl", **change)
    executor = Executor("sdxl", push) if len(x) == 4 else lambda x, *_: x
    push.sample(lambda noise: call(push, executor, noise, [0]), randn(*x))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert problem in push.report.problem and push.report.problem in push.report.text()


def test_a_model_without_hook_points_and_tokens_merged_by_others_are_reported():
    push = group("sdxl")
    call(push, lambda x, *_: x, randn(2, 4, 32, 32), [0])
    assert "no attention output" in push.report.problem
    push.report.start()
    call(push, Executor("sdxl", lambda n, _: n[:, ::3], push), randn(2, 4, 32, 32), [0])
    assert "merges or splits tokens" in push.report.problem


def reference(family, images, mask=None, **settings):
    def encode(pixels):  # [R, H, W, 3] -> [R, 4, H / 8, W / 8]
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([small, small[:, :1]], dim=1)

    return ReferencePush(settings_for(family, **settings), images=images, mask=mask, encode=encode, factor=8)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize("masked", [False, True])
def test_reference_rows_are_added_pushed_from_and_dropped(family, masked):
    images = torch.rand((2, 256, 256, 3), generator=torch.Generator().manual_seed(1))
    mask = None
    if masked:
        mask = torch.zeros(1, 256, 256, dtype=torch.bool)
        mask[:, :, :128] = True
    push = reference(family, images, mask)
    executor = Executor(family, push)
    x, context = randn(6, 4, 32, 32), randn(6, 7, 3)
    control = {"output": [randn(6, 2), None]}
    output = push.sample(lambda noise: call(push, executor, x, context=context, control=control, y=x[:, 0]), x[:3])
    assert torch.equal(output, x)
    order = [0, 1, 2, 0, 0, 3, 4, 5, 3, 3]  # the first image of a chunk lends its conditioning
    assert torch.equal(executor.seen["c_crossattn"], context[order])
    assert torch.equal(executor.seen["control"]["output"][0], control["output"][0][order])
    assert executor.seen["sigma"].shape == (10,) and executor.seen["y"].shape[0] == 10
    rows = executor.seen["x"].unflatten(0, (2, 5))
    assert torch.equal(rows[0, 3:], rows[1, 3:]) and not torch.equal(rows[0, 3], rows[0, 4])

    name, columns, side = (("output", 5), slice(None), 16) if family == "sdxl" else ("double", slice(TEXT, None), 16)
    before, after = executor.before[name][:, columns], executor.after[name][:, columns]
    inside = torch.ones(side, side, dtype=torch.bool)
    inside[:, side // 2 :] = not masked
    for chunk in (0, 5):
        targets = before[chunk + 3 : chunk + 5].flatten(0, 1)
        one = negative_merge(before[chunk : chunk + 3], targets, mask=inside.flatten().repeat(2), **STRENGTH)
        torch.testing.assert_close(after[chunk : chunk + 3], one, atol=1e-5, rtol=1e-5)
        assert torch.equal(after[chunk + 3 : chunk + 5], before[chunk + 3 : chunk + 5])


def test_reference_rows_are_in_what_forge_tells_other_extensions():
    push = reference("sdxl", torch.rand(2, 256, 256, 3))
    executor = Executor("sdxl", push)
    push.prepare((32, 32))
    options = {"cond_or_uncond": [1, 0], "cond_mark": torch.tensor([1.0, 1, 1, 0, 0, 0]), "uncond_indices": [0, 1, 2]}
    before, seen = {**options, "cond_indices": [3, 4, 5]}, {}

    def run(x, sigma, c_concat, c_crossattn, control, options):
        seen.update(options)
        return executor(x, sigma, c_concat, c_crossattn, control, options)

    run.class_obj = executor.class_obj
    push.apply(run, randn(6, 4, 32, 32), torch.full((6,), 5.0), transformer_options=before)
    assert seen["cond_mark"].tolist() == [1] * 5 + [0] * 5
    assert (seen["uncond_indices"], seen["cond_indices"]) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    assert before["cond_indices"] == [3, 4, 5] and len(before["cond_mark"]) == 6


def test_a_reference_follows_each_size_and_adds_no_rows_out_of_range():
    push = reference("sdxl", torch.rand(1, 300, 200, 3), schedule=Schedule(low=4.0))
    executor = Executor("sdxl", push)
    for height, width in ((32, 32), (96, 80)):
        push.sample(lambda noise: call(push, executor, noise, [0]), x := randn(2, 4, height, width))
        assert executor.seen["x"].shape == (3, 4, height, width)
        assert push.report.moved > 0
        call(push, executor, x, [0], sigma=2.0)
        assert executor.seen["x"] is x


def test_a_reference_that_is_pure_noise_is_reported(caplog):
    seen = []
    for sigmas, image in (([1.0], 0), ([1.0], 1), ([1.0, 0.75], 0)):
        push = reference("flux", torch.full((1, 256, 256, 3), float(image)))
        executor = Executor("flux", push)
        executor.class_obj.model_sampling.noise_scaling = lambda sigma, noise, latent, _: noise.lerp(latent, 1 - sigma)

        def run(noise, push=push, executor=executor, sigmas=sigmas):
            for sigma in sigmas:
                call(push, executor, noise, [0], sigma=sigma)
                seen.append(executor.after["double"][:2])

        push.sample(run, randn(2, 4, 32, 32, seed=3))
    assert torch.equal(seen[0], seen[1])  # whatever the image is
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "pure noise" in caplog.messages[0] and push.report.moved > 0


@pytest.mark.parametrize(
    ("sigmas", "schedule", "active"),
    [
        ([14.6, 5.0, 5.0, 2.0, 2.0], [14.6, 5.0, 2.0, 0.0], {0: 1, 1: 3}),  # Heun
        ([14.6, 8.5, 5.0, 3.2, 2.0], [14.6, 5.0, 2.0, 0.0], {0: 2, 1: 4}),  # DPM2
        ([14.6, 5.0, 5.0, 2.0, 2.0], None, {0: 1, 1: 3}),  # Forge does not tell the schedule
        ([14.6, 8.5, 5.0, 3.2, 2.0], None, {0: 1, 1: 2}),
    ],
)
def test_steps_of_samplers_that_call_the_model_twice_a_step(sigmas, schedule, active):
    for last, calls in active.items():
        push = group("sdxl", schedule=Schedule(step_range=(0, last)))
        options = {"cond_or_uncond": [0]}
        if schedule is not None:
            options["sample_sigmas"] = torch.tensor(schedule)
        for sigma in sigmas:
            push.apply(
                Executor("sdxl", push), randn(2, 4, 32, 32), torch.full((2,), sigma), transformer_options=options
            )
        assert push.report.active_calls == calls


def test_a_group_leaves_the_rows_of_a_reference_out():
    outer, inner = reference("sdxl", torch.rand(1, 256, 256, 3), strength={**STRENGTH, "alpha": 0.0}), group("sdxl")
    executor = Executor("sdxl", outer, inner)
    outer.class_obj = executor.class_obj

    def run(*arguments, **named):
        return inner.apply(executor, *arguments, **named)

    run.class_obj = executor.class_obj
    outer.sample(lambda noise: call(outer, run, noise, [0]), randn(2, 4, 32, 32))
    before, after = executor.before["output", 5], executor.after["output", 5]
    torch.testing.assert_close(after[:2], expected(before[:2], 1, 2), atol=1e-5, rtol=1e-5)
    assert torch.equal(after[2], before[2])


def test_a_wrong_mask_is_refused():
    images = torch.rand(1, 32, 32, 3)
    with pytest.raises(ValueError, match="its image's size"):
        reference("sdxl", images, torch.ones(1, 16, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="empty mask"):
        reference("sdxl", images, torch.zeros(1, 32, 32, dtype=torch.bool))


def unet(*levels):
    """Make stand-ins for a UNet's input blocks; each level is the list of its layers' kinds."""
    layers = {"plain": SimpleNamespace(), "attention": SimpleNamespace(transformer_blocks=[])}
    layers["down"] = type("Downsample", (), {})()
    return SimpleNamespace(input_blocks=[[layers[name] for name in level] for level in levels], output_blocks=[])


SDXL = unet(["plain"], ["plain"], ["down"], ["plain", "attention"], ["down"], ["plain", "attention"])
SD15 = unet(["plain"], ["plain", "attention"], ["down"])
INPUTS = {"alpha": 1.5, "threshold": 0.6, "start_percent": 0.1, "end_percent": 0.4, "first_steps": 0}


def read(denoiser, **changes):
    return read_settings(denoiser, lambda percent: 10 * (1 - percent), **{**INPUTS, **changes})


def test_settings_fit_the_model():
    sdxl, sd15 = read(SDXL, settings="published settings"), read(SD15, settings="published settings")
    assert sdxl.strength == {"alpha": 1.5, "threshold": 0.7, "matching": "paper"} == sd15.strength
    assert (sdxl.attention_level, sd15.attention_level) == (1, 0)
    assert sdxl.schedule.low == pytest.approx(8.0) and sdxl.schedule.high == math.inf  # timesteps 800 to 1000
    flux = read(SimpleNamespace(patch_size=2), settings="published settings")
    assert (flux.strength["threshold"], flux.schedule.low, flux.attention_level) == (0.65, 0.9, None)
    assert read(SimpleNamespace(patch_size=[1, 4, 4]), settings="few steps").patch_size == 4


def test_settings_for_few_steps_are_those_of_the_library():
    for denoiser, threshold in ((SDXL, 0.5), (SimpleNamespace(), 0.8)):
        few = read(denoiser, settings="few steps")
        assert few.strength == {"alpha": 1.5, "threshold": threshold, "matching": "paper"}
        assert few.schedule == Schedule(step_range=(0, 0))


def test_custom_settings_read_the_percents_or_the_first_steps():
    custom = read(SDXL, settings="custom settings")
    assert custom.strength["threshold"] == 0.6
    assert (custom.schedule.low, custom.schedule.high) == pytest.approx((6.0, 9.0))
    assert read(SDXL, settings="custom settings", start_percent=0).schedule.high == math.inf
    assert read(SDXL, settings="custom settings", first_steps=2).schedule == Schedule(step_range=(0, 1))
    with pytest.raises(ValueError, match="start_percent must be at most"):
        read(SDXL, settings="custom settings", start_percent=0.5)
    with pytest.raises(ValueError, match="threshold"):
        read(SDXL, settings="custom settings", threshold=2.0)


def test_a_copy_of_the_model_keeps_the_push_that_its_wrappers_and_report_belong_to():
    push = group("sdxl")
    options = copy.deepcopy({"patches": {"attn1_output_patch": [push]}, "wrapper": push.apply})
    executor = Executor("sdxl", *options["patches"]["attn1_output_patch"])
    options["wrapper"](executor, randn(2, 4, 32, 32), torch.ones(2), transformer_options={"cond_or_uncond": [0]})
    assert push.report.moved > 0
