"""Negative Token Merging (NegToMe, arXiv 2412.01339) as a script of Forge, reForge and Forge Classic.

The script patches a copy of the UNet before each sampling pass: `negtome.patcher` gets every model call by the model
function wrapper, and every attention's output by the attn1 output patch.
"""

import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import gradio as gr
from modules import scripts
from modules.ui_components import InputAccordion

from negtome import Reference
from negtome.merge import REFERENCES
from negtome.patcher import SETTINGS, GroupPush, PushSettings, ReferencePush, read_settings

BATCH, IMAGE = "each other", "reference image"
NO_CALL = (
    "NegToMe: no model call reached it, so it had no effect. Another extension replaced the model function wrapper; "
    "switch that one off."
)


class NegToMeScript(scripts.Script):
    """Push the images of a batch apart, or away from a reference image."""

    sorting_priority = 14

    def title(self) -> str:
        """Return the label of the accordion."""
        return "NegToMe"

    def show(self, is_img2img: bool) -> Any:
        """Show the script below the prompt, in txt2img and img2img."""
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """Return the inputs, in the order of the arguments of `process_before_every_sampling`."""
        with InputAccordion(False, label=self.title()) as enabled:
            with gr.Row():
                avoid = gr.Radio([BATCH, IMAGE], value=BATCH, label="Push images away from")
                alpha = gr.Slider(-5, 5, value=0.9, step=0.05, label="alpha (strength)")
            with gr.Row():
                reference = gr.Dropdown(list(REFERENCES), value="first", label="Images of the batch to push from")
                group_size = gr.Slider(0, 64, value=0, step=1, label="Group size (0: the batch is one group)")
            with gr.Row():
                image = gr.Image(type="pil", label="Reference image")
                mask = gr.Image(type="pil", label="Mask of it (white: area to keep away from)")
            with gr.Row():
                settings = gr.Dropdown(list(SETTINGS), value=SETTINGS[0], label="Settings")
                threshold = gr.Slider(-1, 1, value=0.7, step=0.01, label="threshold (custom settings)")
            with gr.Row():
                start = gr.Slider(0, 1, value=0, step=0.01, label="start_percent (custom settings)")
                end = gr.Slider(0, 1, value=0.2, step=0.01, label="end_percent (custom settings)")
                first_steps = gr.Slider(0, 100, value=0, step=1, label="first_steps (custom settings)")
        named = {"avoid": avoid, "reference": reference, "group_size": group_size, "alpha": alpha}
        named |= {"settings": settings, "threshold": threshold, "start_percent": start, "end_percent": end}
        named |= {"first_steps": first_steps}
        self.infotext_fields = [(enabled, lambda infotext: _key("alpha") in infotext)]
        self.infotext_fields += [(component, _key(name)) for name, component in named.items()]
        return [enabled, image, mask, *named.values()]

    def process_before_every_sampling(
        self,
        p: Any,
        enabled: bool,
        image: Any,
        mask: Any,
        avoid: str,
        reference: Any,
        group_size: float,
        *inputs: Any,
        **kwargs: Any,
    ) -> None:
        """Patch a copy of the UNet for the pass that follows; Forge restores the UNet before the next one."""
        if not enabled:
            return
        names = ("alpha", "settings", "threshold", "start_percent", "end_percent", "first_steps")
        chosen = dict(zip(names, inputs, strict=True))
        unet = p.sd_model.forge_objects.unet.clone()
        sampling = _noise_schedule(unet)
        try:
            settings = read_settings(unet.model.diffusion_model, sampling.percent_to_sigma, **chosen)
            if avoid == IMAGE:
                push = _reference_push(settings, p.sd_model, image, mask, kwargs["x"])
            else:
                push = GroupPush(settings, group_size=int(group_size), reference=reference)
                push.check_batch(len(kwargs["x"]))  # during the sampling, the error would end the generation
        except ValueError as error:  # Forge would print it on the console only, and go on
            problem = f"NegToMe had no effect, and the images are made without it: {error}"
            logging.getLogger(__name__).warning(problem)
            p.comment(problem)
            return
        unet.set_model_attn1_output_patch(push)
        previous = unet.model_options.get("model_function_wrapper")
        unet.set_model_unet_function_wrapper(_function_wrapper(push, sampling, previous))
        p.sd_model.forge_objects.unet = unet
        p.negtome_pushes = [*getattr(p, "negtome_pushes", []), push]
        shown = {"avoid": avoid, "reference": reference, "group_size": int(group_size), **chosen}
        p.extra_generation_params.update({_key(name): value for name, value in shown.items()})

    def postprocess_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """Report each pass of the batch in the log and below the images."""
        pushes = getattr(p, "negtome_pushes", [])
        p.negtome_pushes = []
        # Forge prepares a hires pass twice and discards the first of the two.
        reports = [push.report for push in pushes if push.report.calls]
        for report in reports:
            report.log()
            p.comment(report.text())
        if pushes and not reports:
            p.comment(NO_CALL)


def _key(name: str) -> str:
    """Return the name of an input in an image's generation parameters."""
    return f"NegToMe {name}"


def _noise_schedule(unet: Any) -> Any:
    """Return the object that knows the sigmas: `predictor` in Forge, `model_sampling` in reForge and Classic."""
    name = "predictor" if hasattr(unet.model, "predictor") else "model_sampling"
    return unet.object_patches.get(name) or getattr(unet.model, name)


def _reference_push(settings: PushSettings, sd_model: Any, image: Any, mask: Any, latents: Any) -> ReferencePush:
    """Return a push away from an image, encoded at the size of the pass's latents [images, c, h, w]."""
    if image is None:
        raise ValueError("it expected a reference image, got none; add one, or push images away from each other.")
    reference = Reference(_decoded(image), mask=_decoded(mask))
    inside = reference.mask[0]
    push = ReferencePush(
        settings,
        images=reference.images[0].movedim(0, -1)[None],
        mask=None if inside is None else inside[None],
        encode=lambda pixels: sd_model.encode_first_stage(2 * pixels.movedim(-1, 1) - 1),
        factor=8,
    )
    push.prepare((latents.shape[2], latents.shape[3]))
    return push


def _decoded(image: Any) -> Any:
    """Return a PIL image as it is, and the base64 text of Forge's API as a PIL image."""
    if not isinstance(image, str):
        return image
    from modules.api.api import decode_base64_to_image  # Forge may run without its API

    try:
        return decode_base64_to_image(image)
    except Exception as error:  # Forge raises one of its web framework
        raise ValueError("it expected the API's images in base64 (PNG, JPEG or WebP), got other text.") from error


class _ModelCall:
    """A model call inside the wrapper, with the signature that `negtome.patcher` calls.

    Args:
        apply_model: of Forge's model.
        arguments: of the wrapper: input, timestep, c (the conditioning) and cond_or_uncond.
        sampling: noise schedule of the model.
        previous: wrapper of another extension, which stays in between; None if there is none.
    """

    def __init__(
        self, apply_model: Callable[..., Any], arguments: Mapping[str, Any], sampling: Any, previous: Any
    ) -> None:
        self._apply_model, self._arguments, self._previous = apply_model, arguments, previous
        # Forge's encode_first_stage scales latents already.
        self.class_obj = SimpleNamespace(model_sampling=sampling, process_latent_in=lambda latents: latents)

    def __call__(
        self, x: Any, sigma: Any, c_concat: Any, c_crossattn: Any, control: Any, options: Any, **others: Any
    ) -> Any:
        parts = {"c_concat": c_concat, "c_crossattn": c_crossattn, "control": control, **others}
        conditioning = {name: value for name, value in parts.items() if name in self._arguments["c"]}
        conditioning["transformer_options"] = options
        if self._previous is None:
            return self._apply_model(x, sigma, **conditioning)
        arguments = {**self._arguments, "input": x, "timestep": sigma, "c": conditioning}
        return self._previous(self._apply_model, arguments)


def _function_wrapper(push: GroupPush | ReferencePush, sampling: Any, previous: Any) -> Callable[..., Any]:
    """Return a model function wrapper that passes each model call through the push."""

    def wrapper(apply_model: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        call = _ModelCall(apply_model, arguments, sampling, previous)
        return push.apply(call, arguments["input"], arguments["timestep"], **arguments["c"])

    return wrapper
