"""The nodes: they read their inputs and register `negtome.patcher` at ComfyUI's patches and wrappers."""

from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io, ui
from server import PromptServer

from negtome.merge import REFERENCES
from negtome.patcher import KEY, SETTINGS, GroupPush, PushSettings, ReferencePush, read_settings

CATEGORY = "model/negtome"
ReportType = io.Custom("NEGTOME_REPORT")


def _settings_inputs() -> list[Any]:
    """Return the inputs that both nodes share; their names are arguments of `read_settings`."""
    return [
        io.Float.Input(
            "alpha",
            default=0.9,
            min=-5,
            max=5,
            step=0.05,
            tooltip="Strength: higher is more different, and too high spoils the images. Negative values pull images "
            "together; 0 is off. For few steps of the Flux family, begin with 0.45.",
        ),
        io.Combo.Input(
            "settings",
            options=list(SETTINGS),
            default=SETTINGS[0],
            tooltip="Published: the numbers of the paper, for models of 20 steps or more. Few steps: for turbo, "
            "lightning and schnell models of at most 8 steps; acts in the first step. Custom: the values below, "
            "which the other two do not read.",
        ),
        io.Float.Input(
            "threshold",
            default=0.7,
            min=-1,
            max=1,
            step=0.01,
            tooltip="Custom settings only. A part of the image (token) moves if its most similar part elsewhere is "
            "more similar than this. Lower: more parts move. 1 is off.",
        ),
        io.Float.Input(
            "start_percent",
            default=0,
            min=0,
            max=1,
            step=0.01,
            tooltip="Custom settings only. Share of the sampling at which it begins to act; 0 is the first step.",
        ),
        io.Float.Input(
            "end_percent",
            default=0.2,
            min=0,
            max=1,
            step=0.01,
            tooltip="Custom settings only. Share of the sampling at which it ends. Later changes are of details.",
        ),
        io.Int.Input(
            "first_steps",
            default=0,
            min=0,
            max=1000,
            tooltip="Custom settings only. Act in this many steps from the first one, whatever the percents; 0 uses "
            "the percents.",
        ),
    ]


def _read_settings(model: Any, **inputs: Any) -> PushSettings:
    """Return the settings for a model; `inputs` are those of `_settings_inputs`."""
    denoiser = model.get_model_object("diffusion_model")
    return read_settings(denoiser, model.get_model_object("model_sampling").percent_to_sigma, **inputs)


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
                    default=REFERENCES[0],
                    tooltip="What an image is pushed from: the first image, all previous ones, or all others. With "
                    "first and previous, image 1 stays as it is without the node.",
                ),
                io.Int.Input(
                    "group_size", default=0, min=0, max=4096, tooltip="Images of a group; 0 is the whole batch."
                ),
                *_settings_inputs(),
            ],
            outputs=[io.Model.Output(), ReportType.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, model: Any, reference: Any, group_size: int, **settings: Any) -> io.NodeOutput:
        """Return the patched model and its report."""
        push = GroupPush(_read_settings(model, **settings), group_size=group_size, reference=reference)
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
                io.Vae.Input("vae", tooltip="The VAE of the model; it encodes the image."),
                io.Image.Input("image", tooltip="One image, or a batch of images of one size."),
                *_settings_inputs(),
                io.Mask.Input(
                    "mask", optional=True, tooltip="White: the area to keep away from; none: the whole image."
                ),
            ],
            outputs=[io.Model.Output(), ReportType.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, model: Any, vae: Any, image: Any, mask: Any = None, **settings: Any) -> io.NodeOutput:
        """Return the patched model and its report."""
        push = ReferencePush(
            _read_settings(model, **settings),
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
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, report: Any, latent: Any) -> io.NodeOutput:
        """Return the latent unchanged, and the report's text."""
        text = report.text()
        # The interface shows `ui.text` on its own Preview node only, but this on every node.
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
        return io.NodeOutput(latent, text, ui=ui.PreviewText(text))


class NegToMeExtension(ComfyExtension):
    """The list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        return [NegToMeGroup, NegToMeReference, NegToMeReport]
