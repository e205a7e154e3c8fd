"""Forge's script with stand-ins for Forge's modules, written from its documented hooks: what a user's run does.

`Forge` samples as Forge does: before each pass it restores the UNet and calls the script. Each model call goes through
the model function wrapper, if there is one, and the attention outputs through the patches.
"""

import base64
import contextlib
import copy
import importlib.util
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from negtome.merge import negative_merge

SCRIPT = Path(__file__).parents[2] / "integrations/forge/scripts/negtome_forge.py"
SIGMAS = [14.5, 10.0, 4.0, 1.0]


class Component(contextlib.nullcontext):
    def __init__(self, *args, value=None, **options):
        super().__init__(self)
        self.value = value


class Accordion(Component):
    def __init__(self, value, label):
        super().__init__(value=value)


def from_base64(text):
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


def to_base64(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def script(monkeypatch):
    gradio = SimpleNamespace(Row=Component, Radio=Component, Slider=Component, Dropdown=Component, Image=Component)
    scripts = SimpleNamespace(Script=object, AlwaysVisible=object())
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setitem(sys.modules, "modules", SimpleNamespace(scripts=scripts))
    monkeypatch.setitem(sys.modules, "modules.ui_components", SimpleNamespace(InputAccordion=Accordion))
    monkeypatch.setitem(sys.modules, "modules.api", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "modules.api.api", SimpleNamespace(decode_base64_to_image=from_base64))
    spec = importlib.util.spec_from_file_location("negtome_forge.py", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NegToMeScript()


class Unet:
    """Stand-in for Forge's UnetPatcher; a copy has a deep copy of the options."""

    def __init__(self, model, options=None):
        self.model, self.object_patches = model, {}
        self.model_options = options or {"transformer_options": {}}

    def clone(self):
        return Unet(self.model, copy.deepcopy(self.model_options))

    def set_model_attn1_output_patch(self, patch):
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches["attn1_output_patch"] = [*patches.get("attn1_output_patch", []), patch]

    def set_model_unet_function_wrapper(self, wrapper):
        self.model_options["model_function_wrapper"] = wrapper


class Model:
    """An SDXL-like model whose output is the features after one attention of its output blocks, [rows, C, h, w].

    Attributes:
        inputs: features before the patches, by call.
    """

    def __init__(self):
        attention, down = SimpleNamespace(transformer_blocks=[]), type("Downsample", (), {})()
        self.diffusion_model = SimpleNamespace(input_blocks=[[down], [attention]], output_blocks=[[attention]])
        self.predictor = SimpleNamespace(
            percent_to_sigma=lambda percent: 14.6 * (1 - percent),
            noise_scaling=lambda sigma, noise, latent, _: latent + sigma * noise,
        )
        self.inputs = []

    def apply_model(self, x, t, c_crossattn, control=None, transformer_options=None):
        assert len(c_crossattn) == len(x) == len(t)
        small = torch.nn.functional.avg_pool2d(x, 2)
        tokens = small.flatten(2).mT + 1.0 + c_crossattn[:, :1]  # similar between rows
        self.inputs.append(tokens)
        options = {**transformer_options, "block": ("output", 0), "block_index": 0}
        for patch in options.pop("patches", {}).get("attn1_output_patch", []):
            tokens = patch(tokens, options)
        return tokens.mT.unflatten(2, small.shape[2:])


class Forge:
    """A run of Forge with a batch of images, and a script that is called where Forge calls it."""

    def __init__(self, script, images=2, **inputs):
        self.script, self.images, self.model = script, images, Model()
        components = script.ui(is_img2img=False)
        keys = {component: key for component, key in script.infotext_fields if isinstance(key, str)}
        names = ["enabled", "image", "mask", *(keys[one].removeprefix("NegToMe ") for one in components[3:])]
        values = {name: one.value for name, one in zip(names, components, strict=True)}
        self.arguments = list({**values, "enabled": True, **inputs}.values())
        assert len(self.arguments) == len(components)  # the inputs of a test have names that exist
        self.comments = []
        self.original = Unet(self.model)
        self.p = SimpleNamespace(
            sd_model=SimpleNamespace(
                forge_objects=SimpleNamespace(unet=self.original), encode_first_stage=self.encode_first_stage
            ),
            extra_generation_params={},
            comment=self.comments.append,
        )

    def encode_first_stage(self, pixels):
        assert -1 <= pixels.min() < 0 < pixels.max() <= 1
        return torch.nn.functional.avg_pool2d(pixels, 8).repeat(1, 2, 1, 1)[:, :4]

    def prepare(self, noise):
        """Restore the UNet and call the script, as before each pass."""
        self.p.sd_model.forge_objects.unet = self.original
        self.script.process_before_every_sampling(self.p, *self.arguments, x=noise, noise=noise)

    def sample(self, side=64, sigmas=SIGMAS):
        """Run a pass with both conditions in one batch: features before and after the patches, for each sigma."""
        noise = torch.randn(self.images, 4, side, side, generator=torch.Generator().manual_seed(0))
        self.prepare(noise)
        options = self.p.sd_model.forge_objects.unet.model_options
        steps = []
        for sigma in sigmas:
            conditioning = {
                "c_crossattn": torch.arange(2.0).repeat_interleave(self.images)[:, None, None].expand(-1, 3, 4),
                "transformer_options": {**options["transformer_options"], "cond_or_uncond": [1, 0]},
            }
            x, t = torch.cat([noise, noise]), torch.full((2 * self.images,), sigma)
            arguments = {"input": x, "timestep": t, "c": conditioning, "cond_or_uncond": [1, 0]}
            if "model_function_wrapper" in options:
                output = options["model_function_wrapper"](self.model.apply_model, arguments)
            else:
                output = self.model.apply_model(x, t, **conditioning)
            steps.append((self.model.inputs[-1], output.flatten(2).mT))
        return steps

    def finish(self):
        self.script.postprocess_batch(self.p, *self.arguments, batch_number=0, images=None)


def pushed_from_first(before, images, **strength):
    after = before.clone()
    for row in range(len(before)):
        first = before[row // images * images]
        if row % images:
            after[row] = negative_merge(before[row : row + 1], first, **strength)[0]
    return after


def test_the_default_inputs_push_the_batch_apart_in_the_published_timesteps(script):
    forge = Forge(script, images=3)
    steps = forge.sample()
    before, after = steps[0]
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, pushed_from_first(before, 3, alpha=0.9, threshold=0.7))
    assert all(torch.equal(after, before) for before, after in steps[1:])  # sigma 10 is below timestep 800
    forge.finish()
    (comment,) = forge.comments
    assert comment.startswith("NegToMe: 1 hook points fired in 1 of 4 model calls;") and "Problem" not in comment
    assert forge.p.extra_generation_params["NegToMe alpha"] == 0.9
    assert "patches" not in forge.original.model_options["transformer_options"]


def test_a_script_that_is_switched_off_leaves_the_model_alone(script):
    forge = Forge(script, enabled=False)
    assert all(torch.equal(after, before) for before, after in forge.sample())
    forge.finish()
    assert forge.p.sd_model.forge_objects.unet is forge.original
    assert (forge.comments, forge.p.extra_generation_params) == ([], {})


def test_few_steps_push_in_the_first_step(script):
    forge = Forge(script, settings="few steps")
    (before, after), *others = forge.sample(sigmas=[3.0, 2.0, 1.0])
    torch.testing.assert_close(after, pushed_from_first(before, 2, alpha=0.9, threshold=0.5))
    assert not torch.equal(after, before)
    assert all(torch.equal(after, before) for before, after in others)


def test_other_extensions_keep_their_patch_and_wrapper(script):
    forge = Forge(script)
    calls = []

    def wrapper(apply_model, arguments):
        calls.append(float(arguments["timestep"][0]))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"]) + 5

    forge.original.set_model_unet_function_wrapper(wrapper)
    forge.original.set_model_attn1_output_patch(lambda tokens, options: 2 * tokens)
    (before, after), *_ = forge.sample()
    torch.testing.assert_close(after, pushed_from_first(2 * before, 2, alpha=0.9, threshold=0.7) + 5)
    assert calls == SIGMAS


def test_an_extension_that_copies_the_unet_afterwards_keeps_the_push(script):
    forge = Forge(script)
    prepare = forge.prepare

    def prepare_and_copy(noise):
        prepare(noise)
        forge.p.sd_model.forge_objects.unet = forge.p.sd_model.forge_objects.unet.clone()

    forge.prepare = prepare_and_copy
    (before, after), *_ = forge.sample()
    assert not torch.equal(after, before)
    forge.finish()
    assert "Problem" not in forge.comments[0]


def test_a_hires_pass_of_another_size_has_its_own_report(script):
    forge = Forge(script, settings="few steps")
    forge.sample(side=64)
    forge.prepare(torch.zeros(2, 4, 96, 80))  # Forge calls the script twice before a hires pass
    (before, after), *_ = forge.sample(side=96, sigmas=[5.0, 1.0])
    torch.testing.assert_close(after, pushed_from_first(before, 2, alpha=0.9, threshold=0.5))
    forge.finish()
    calls = [comment.partition("fired in ")[2].partition(";")[0] for comment in forge.comments]
    assert calls == ["1 of 4 model calls", "1 of 2 model calls"]
    forge.finish()
    assert len(forge.comments) == 2


@pytest.mark.parametrize("passed", [lambda image: image, to_base64], ids=["page", "api"])
def test_a_reference_image_is_pushed_from_within_its_mask_and_leaves_no_rows(script, passed):
    image, mask = Image.linear_gradient("L").resize((512, 512)).convert("RGB"), Image.new("L", (512, 512), 0)
    mask.paste(255, (0, 0, 512, 256))
    forge = Forge(script, avoid="reference image", image=passed(image), mask=passed(mask))
    (before, after), *others = forge.sample()
    assert [len(rows) for rows, _ in others] == [4, 4, 4] and (len(before), len(after)) == (6, 4)
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[:16] = True
    for chunk in range(2):
        images, reference = before[3 * chunk : 3 * chunk + 2], before[3 * chunk + 2]
        expected = negative_merge(images, reference, alpha=0.9, threshold=0.7, mask=inside.flatten())
        assert not torch.equal(expected, images)
        torch.testing.assert_close(after[2 * chunk : 2 * chunk + 2], expected)


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        ({"avoid": "reference image"}, "reference image"),
        ({"avoid": "reference image", "image": str(SCRIPT)}, "base64"),  # a file of the server is not read
        ({"settings": "custom settings", "start_percent": 0.5}, "start_percent"),
    ],
)
def test_inputs_that_do_not_fit_are_named_below_the_images(script, inputs, problem):
    forge = Forge(script, **inputs)
    forge.sample()
    forge.finish()
    (comment,) = forge.comments
    assert "no effect" in comment and problem in comment


def test_a_batch_that_does_not_split_into_groups_is_made_without_the_push(script, caplog):
    forge = Forge(script, images=4, group_size=3)
    assert all(torch.equal(after, before) for before, after in forge.sample())
    forge.finish()
    assert forge.p.sd_model.forge_objects.unet is forge.original
    (comment,) = forge.comments
    assert "made without it" in comment and "groups of 3 images, got 4" in comment
    assert comment in caplog.text


def test_a_wrapper_that_another_extension_replaced_is_named_below_the_images(script):
    forge = Forge(script)
    forge.prepare(torch.zeros(2, 4, 64, 64))
    forge.finish()
    assert "replaced the model function wrapper" in forge.comments[0]
