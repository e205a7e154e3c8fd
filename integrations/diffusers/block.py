"""A block of Modular Diffusers that makes a pipeline's guider push the images of a call apart."""

from typing import Any, ClassVar

from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam, PipelineState

from negtome.guider import NegToMeGuidance

#: Settings of the guider, each an input of the block under this name with the prefix "negtome_".
SETTINGS = {
    "alpha": "strength of the push; 0 turns it off",
    "threshold": "cosine similarity that a token must exceed to be pushed",
    "timestep_range": "(low, high) in training timesteps, 1000 = pure noise",
    "step_range": "(first, last) step from 0, or shares of the call's steps, instead of timestep_range",
    "matching": 'how tokens are matched: "paper" or "released"',
    "reference": 'images to be pushed from: "first", "previous" or "others"',
    "sites": "names of the denoiser's blocks that take part",
    "cross_attention": "whether the outputs of cross-attention are pushed too (UNets only)",
    "min_side": "shortest side, in tokens, of the feature maps that take part (UNets only)",
    "group_size": "images in a group",
}


class NegToMeBlock(ModularPipelineBlocks):
    """Replace the pipeline's ClassifierFreeGuidance by a NegToMeGuidance with the same guidance."""

    _requirements: ClassVar[dict[str, str]] = {"negtome": ">=0.1.0", "diffusers": ">=0.42.0"}

    @property
    def description(self) -> str:
        """Return what a pipeline shows of the block."""
        return "Negative Token Merging: pushes the images of a call apart, so that they come out more different."

    @property
    def inputs(self) -> list[InputParam]:
        """Return the settings; None is the guider's default."""
        return [InputParam(f"negtome_{name}", description=text) for name, text in SETTINGS.items()]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """Return no outputs: the block changes a component."""
        return []

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Put the guider into the pipeline, which keeps it after the call."""
        block_state = self.get_block_state(state)
        settings = {name: getattr(block_state, f"negtome_{name}") for name in SETTINGS}
        chosen = {name: value for name, value in settings.items() if value is not None}
        components.update_components(guider=NegToMeGuidance.for_pipeline(components, **chosen))
        return components, state
