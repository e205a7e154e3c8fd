"""A tiny pipeline with random weights for every pipeline class of the table, made of those of `conftest.py`."""

import copy
import inspect

import diffusers
import torch


def _picture(seed):
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


PICTURE, OTHER = _picture(0), _picture(1)
MASK = torch.zeros(1, 1, 32, 32)
MASK[..., 8:] = 1


def _filled(module):
    """Give zero convolutions something to say."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return module.eval()


def _wider(denoiser, name, channels):
    """Let a denoiser take more channels, random ones."""
    denoiser, old = copy.deepcopy(denoiser), getattr(denoiser, name)
    new = (
        torch.nn.Linear(channels, old.out_features)
        if isinstance(old, torch.nn.Linear)
        else torch.nn.Conv2d(channels, old.out_channels, old.kernel_size, padding=old.padding)
    )
    setattr(denoiser, name, new)
    denoiser.register_to_config(in_channels=channels)
    return denoiser


def _controlnet(unet, cls=diffusers.ControlNetModel, **options):
    names = (
        *("in_channels", "down_block_types", "block_out_channels", "layers_per_block", "cross_attention_dim"),
        *("transformer_layers_per_block", "attention_head_dim", "use_linear_projection", "addition_embed_type"),
        *("addition_time_embed_dim", "projection_class_embeddings_input_dim", "norm_num_groups"),
    )
    config = {name: unet.config[name] for name in names}
    return _filled(cls(**config, conditioning_embedding_out_channels=(8, 16), **options))


def _union(unet):
    channels = {f"num_{name}": unet.config.block_out_channels[0] for name in ("trans_channel", "proj_channel")}
    return _controlnet(unet, diffusers.ControlNetUnionModel, num_trans_head=2, **channels)


def _flux_controlnet(transformer):
    names = (
        *("patch_size", "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim"),
        *("pooled_projection_dim", "guidance_embeds", "axes_dims_rope"),
    )
    config = {name: transformer.config[name] for name in names}
    return _filled(diffusers.FluxControlNetModel(**config, num_layers=1, num_single_layers=1))


def _adapter():
    channels = [16, 32, 32, 32]
    adapter = diffusers.T2IAdapter(
        channels=channels, num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    )
    return adapter.eval()


def _sd15(sdxl):
    """Return the parts of a StableDiffusionPipeline, made of those of SDXL's."""
    unset = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    config = {**sdxl["unet"].config, **dict.fromkeys(unset), "cross_attention_dim": 32}
    unet, weights = diffusers.UNet2DConditionModel.from_config(config).eval(), sdxl["unet"].state_dict()
    fitting = {n: weights[n] for n, own in unet.state_dict().items() if n in weights and weights[n].shape == own.shape}
    unet.load_state_dict(fitting, strict=False)
    absent = dict.fromkeys(("safety_checker", "feature_extractor"))
    return {**sdxl, **absent, "requires_safety_checker": False, "unet": unet}


def _scheduler(parts, name, **options):
    return getattr(diffusers, f"{name}Scheduler").from_config(parts["scheduler"].config, **options)


_STRENGTH = {"image": PICTURE, "strength": 0.5, "num_inference_steps": 4}
_INPAINT = _STRENGTH | {"mask_image": MASK}
_CFG = {"true_cfg_scale": 3.0, "negative_prompt": "a cat"}

#: By a name: the pipeline's class, which architecture's parts it has, what is put in their place (a function of them),
#: and how it is called.
CASES = {
    "SDXL": ("StableDiffusionXLPipeline", "sdxl", {}, {}),
    "SDXL unguided": ("StableDiffusionXLPipeline", "sdxl", {}, {"guidance_scale": 1.0}),
    "SDXL img2img": ("StableDiffusionXLImg2ImgPipeline", "sdxl", {}, _STRENGTH),
    "SDXL inpaint": ("StableDiffusionXLInpaintPipeline", "sdxl", {}, _INPAINT),
    "SDXL inpaint, 9 channels": (
        "StableDiffusionXLInpaintPipeline", "sdxl", {"unet": lambda parts: _wider(parts["unet"], "conv_in", 9)},
        _INPAINT,
    ),
    "SDXL ControlNet": (
        "StableDiffusionXLControlNetPipeline", "sdxl", {"controlnet": lambda parts: _controlnet(parts["unet"])},
        {"image": OTHER},
    ),
    "SDXL ControlNet, guess mode": (
        "StableDiffusionXLControlNetPipeline", "sdxl", {"controlnet": lambda parts: _controlnet(parts["unet"])},
        {"image": OTHER, "guess_mode": True},
    ),
    "SDXL ControlNet img2img": (
        "StableDiffusionXLControlNetImg2ImgPipeline", "sdxl", {"controlnet": lambda parts: _controlnet(parts["unet"])},
        _STRENGTH | {"control_image": OTHER},
    ),
    "SDXL ControlNet inpaint": (
        "StableDiffusionXLControlNetInpaintPipeline", "sdxl", {"controlnet": lambda parts: _controlnet(parts["unet"])},
        _INPAINT | {"control_image": OTHER},
    ),
    "SDXL ControlNet union": (
        "StableDiffusionXLControlNetUnionPipeline", "sdxl", {"controlnet": lambda parts: _union(parts["unet"])},
        {"control_image": [OTHER], "control_mode": [1]},
    ),
    "SDXL PAG": ("StableDiffusionXLPAGPipeline", "sdxl", {}, {"pag_scale": 2.0}),
    "SDXL PAG, unguided": ("StableDiffusionXLPAGPipeline", "sdxl", {}, {"pag_scale": 2.0, "guidance_scale": 1.0}),
    "SDXL PAG, off": ("StableDiffusionXLPAGPipeline", "sdxl", {}, {"pag_scale": 0.0}),
    "SDXL T2I-Adapter": (
        "StableDiffusionXLAdapterPipeline", "sdxl", {"adapter": lambda parts: _adapter()}, {"image": OTHER},
    ),
    "SD1.5": (
        "StableDiffusionPipeline", "sd1.5",
        {"scheduler": lambda parts: _scheduler(parts, "DDIM", clip_sample=False)}, {},
    ),
    "SD1.5, unguided": (
        "StableDiffusionPipeline", "sd1.5",
        {"scheduler": lambda parts: _scheduler(parts, "PNDM", skip_prk_steps=True)}, {"guidance_scale": 1.0},
    ),
    "SD1.5 img2img": ("StableDiffusionImg2ImgPipeline", "sd1.5", {}, _STRENGTH),
    "SD1.5 inpaint": ("StableDiffusionInpaintPipeline", "sd1.5", {}, _INPAINT),
    "SD1.5 inpaint, 9 channels": (
        "StableDiffusionInpaintPipeline", "sd1.5", {"unet": lambda parts: _wider(parts["unet"], "conv_in", 9)},
        _INPAINT,
    ),
    "SD1.5 ControlNet": (
        "StableDiffusionControlNetPipeline", "sd1.5", {"controlnet": lambda parts: _controlnet(parts["unet"])},
        {"image": OTHER},
    ),
    "Flux": ("FluxPipeline", "flux", {}, {}),
    "Flux, true guidance": ("FluxPipeline", "flux", {}, _CFG),
    "Flux img2img": ("FluxImg2ImgPipeline", "flux", {}, _STRENGTH | _CFG),
    "Flux inpaint": ("FluxInpaintPipeline", "flux", {}, _INPAINT | _CFG),
    "Flux Fill": (
        "FluxFillPipeline", "flux", {"transformer": lambda parts: _wider(parts["transformer"], "x_embedder", 24)},
        {"image": PICTURE, "mask_image": MASK},
    ),
    "Flux Control": (
        "FluxControlPipeline", "flux", {"transformer": lambda parts: _wider(parts["transformer"], "x_embedder", 8)},
        {"control_image": OTHER},
    ),
    "Flux ControlNet": (
        "FluxControlNetPipeline", "flux", {"controlnet": lambda parts: _flux_controlnet(parts["transformer"])},
        _CFG | {"control_image": OTHER},
    ),
    "Flux Kontext": (
        "FluxKontextPipeline", "flux", {}, {"image": OTHER, "max_area": 32 * 32, "_auto_resize": False},
    ),
    "Flux Kontext, true guidance": (
        "FluxKontextPipeline", "flux", {}, _CFG | {"image": OTHER, "max_area": 32 * 32, "_auto_resize": False},
    ),
}  # fmt: skip


def build(case, bases):
    """Return the pipeline of a case, and the options of its call; `bases` are those of `conftest.py`."""
    name, base, changes, options = CASES[case]
    torch.manual_seed(0)
    parts = copy.deepcopy(bases["sdxl" if base == "sd1.5" else base].components) | {"add_watermarker": False}
    if base == "sd1.5":
        parts = _sd15(parts)
    if base == "flux":
        options = options | {"max_sequence_length": 12}
    parts |= {part: change(parts) for part, change in changes.items()}
    cls = getattr(diffusers, name)
    pipe = cls(**{part: value for part, value in parts.items() if part in inspect.signature(cls.__init__).parameters})
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"num_inference_steps": 2, "height": 32, "width": 32} | options
