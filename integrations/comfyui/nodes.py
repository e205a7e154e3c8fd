"""The nodes: they read their inputs and register the adapter at ComfyUI's patches and wrappers."""

import math
from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io, ui

from negtome.merge import REFERENCES, Strength

from .adapter import KEY, GroupPush, ReferencePush, Schedule, attention_level

CATEGORY = "model/negtome"
PUBLISHED, CUSTOM, FIRST_STEP = "published settings", "custom settings", "custom settings, first step only"
ReportType = io.Custom("NEGTOME_REPORT")


def _strength_inputs() -> list[Any]:
    """Return the inputs that both nodes share, after those that are their own."""
    return [
        io.Float.Input(
            "alpha",
            default=0.9,
            min=-5,
            max=5,
            step=0.05,
            tooltip="Strength of the push. Negative values pull images together; 0 is off.",
        ),
        io.Combo.Input(
            "settings",
            options=[PUBLISHED, CUSTOM, FIRST_STEP],
            tooltip="Published: threshold 0.7 and timesteps 800 to 1000 for SDXL and SD1.5, 0.65 and 900 to 1000 for "
            "the Flux family. Only the custom settings read the three values below.",
        ),
        io.Float.Input(
            "threshold",
            default=0.7,
            min=-1,
            max=1,
            step=0.01,
            tooltip="Cosine similarity that a match must exceed before a token moves. 1 is off.",
        ),
        io.Float.Input("start_percent", default=0, min=0, max=1, step=0.01, tooltip="Where the timestep range begins."),
        io.Float.Input("end_percent", default=0.2, min=0, max=1, step=0.01, tooltip="Where the timestep range ends."),
    ]


def _base_arguments(
    model: Any, alpha: float, settings: str, threshold: float, start_percent: float, end_percent: float
) -> dict[str, Any]:
    """Return the arguments that both pushes share."""
    denoiser = model.get_model_object("diffusion_model")
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    is_unet = hasattr(denoiser, "output_blocks")
    if settings == PUBLISHED:
        threshold = 0.7 if is_unet else 0.65
        schedule = Schedule(low=to_sigma(0.2) if is_unet else 0.9)  # a flow's sigma is its timestep / 1000
    elif start_percent > end_percent:
        raise ValueError(f"start_percent must be at most end_percent, got {start_percent} and {end_percent}.")
    else:
        high = math.inf if start_percent <= 0 else float(to_sigma(start_percent))
        schedule = Schedule(float(to_sigma(end_percent)), high, first_step=settings == FIRST_STEP)
    return {
        "strength": Strength(alpha=alpha, threshold=threshold, matching="paper"),
        "schedule": schedule,
        "attention_level": attention_level(denoiser) if is_unet else None,
        "patch_size": getattr(denoiser, "patch_size", 2),
    }


def _patched(model: Any, push: GroupPush | ReferencePush) -> Any:
    """Return a copy of the model that the push acts in; other patches at the same place stay."""
    model = model.clone()
    model.set_model_attn1_output_patch(push)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, push.sample)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, push.apply)
    return model


class NegToMeGroup(io.ComfyNode):
    """Push the images of a batch apart."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the inputs and outputs."""
        return io.Schema(
            node_id="NegToMeGroup",
            display_name="NegToMe (group)",
            category=CATEGORY,
            description="Makes the images of a batch more different from each other. Needs a batch of 2 or more.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "reference",
                    options=list(REFERENCES),
                    tooltip="What an image is pushed from: the first image, all previous ones, or all others.",
                ),
                io.Int.Input(
                    "group_size", default=0, min=0, max=4096, tooltip="Images of a group; 0 is the whole batch."
                ),
                *_strength_inputs(),
            ],
            outputs=[io.Model.Output(), ReportType.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, model: Any, reference: Any, group_size: int, **strength: Any) -> io.NodeOutput:
        """Return the patched model and its report."""
        push = GroupPush(**_base_arguments(model, **strength), group_size=group_size, reference=reference)
        return io.NodeOutput(_patched(model, push), push.report)


class NegToMeReference(io.ComfyNode):
    """Push the images of a batch away from reference images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the inputs and outputs."""
        return io.Schema(
            node_id="NegToMeReference",
            display_name="NegToMe (reference image)",
            category=CATEGORY,
            description="Keeps images away from reference images, or from the masked area of them.",
            inputs=[
                io.Model.Input("model"),
                io.Vae.Input("vae"),
                io.Image.Input("image", tooltip="One image, or a batch of images of one size."),
                *_strength_inputs(),
                io.Mask.Input("mask", optional=True, tooltip="Area to keep away from; none is the whole image."),
            ],
            outputs=[io.Model.Output(), ReportType.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, model: Any, vae: Any, image: Any, mask: Any = None, **strength: Any) -> io.NodeOutput:
        """Return the patched model and its report."""
        push = ReferencePush(
            **_base_arguments(model, **strength),
            images=image[..., :3].float().cpu(),
            mask=None if mask is None else mask.cpu() > 0.5,
            encode=vae.encode,
            factor=vae.spacial_compression_encode(),
        )
        return io.NodeOutput(_patched(model, push), push.report)


class NegToMeReport(io.ComfyNode):
    """Say what NegToMe did in the sampling pass that made a latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the inputs and outputs."""
        return io.Schema(
            node_id="NegToMeReport",
            display_name="NegToMe (report)",
            category=CATEGORY,
            description="Connect the sampler's latent: the report is of the sampling pass before this node.",
            inputs=[ReportType.Input("report"), io.Latent.Input("latent")],
            outputs=[io.Latent.Output(), io.String.Output(display_name="text")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, report: Any, latent: Any) -> io.NodeOutput:
        """Return the latent unchanged, and the report's text."""
        text = report.text()
        return io.NodeOutput(latent, text, ui=ui.PreviewText(text))


class NegToMeExtension(ComfyExtension):
    """The list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        return [NegToMeGroup, NegToMeReference, NegToMeReport]
