"""A tiny pipeline with random weights for every pipeline class of the table, made of those of `conftest.py`."""

import copy
import inspect
import sys
from types import SimpleNamespace

import diffusers
import pytest
import torch
from packaging.version import Version
from PIL import Image

from negtome import NegToMeConfig

#: The first two of four steps; at these thresholds some of the tokens of every site are pushed and others are not.
CONFIGS = {
    "sdxl": NegToMeConfig(alpha=0.9, threshold=0.85, timestep_range=(500, 1000), min_side=8),
    "flux": NegToMeConfig(alpha=0.9, threshold=0.9, timestep_range=(600, 1000)),
}

#: For a test of what does not depend on the architecture: SDXL is among the slow tests.
ONE_KIND = pytest.mark.parametrize("kind", ["flux", pytest.param("sdxl", marks=pytest.mark.slow)])


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


def _sharp(module, *endings, by=3):
    """Keep attention from averaging over everything, which makes all of its outputs alike."""
    for name, parameter in module.named_parameters():
        if name.endswith(endings):
            parameter.data *= by
    return module.eval()


def _on_t5(vae, transformer):
    """Return the parts of a pipeline with one text encoder, in the place of which Flux's T5 stands, whatever it is."""

    def parts(sdxl, flux):
        return {
            "text_encoder": flux["text_encoder_2"], "tokenizer": flux["tokenizer_2"], "scheduler": flux["scheduler"],
            "vae": vae(sdxl, flux), "transformer": transformer(),
        }  # fmt: skip

    return parts


def _sd3(sdxl, flux):
    clip = {"text_encoder": sdxl["text_encoder_2"], "tokenizer": sdxl["tokenizer"]}
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=1, out_channels=1, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return {
        **clip, **{f"{name}_2": part for name, part in clip.items()},
        "text_encoder_3": flux["text_encoder_2"], "tokenizer_3": flux["tokenizer_2"],
        "scheduler": flux["scheduler"], "vae": flux["vae"],
        "transformer": _sharp(transformer, "norm_q.weight", "norm_k.weight"),
    }  # fmt: skip


def _chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=32,
        approximator_layers=1,
    )  # fmt: skip
    return _sharp(transformer, "norm_q.weight", "norm_k.weight")


def _pixart():
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, cross_attention_dim=32,
        caption_channels=32,
    )  # fmt: skip
    return _sharp(transformer, "to_q.weight", "to_k.weight")


def _sana():
    transformer = diffusers.SanaTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=32,
    )  # fmt: skip
    return _sharp(transformer, "to_q.weight", "to_k.weight")


def _deep():
    """Return an autoencoder without a posterior, 4 pixels to an element of the latent."""
    options = {"decoder_" + name: value for name, value in _DEEP.items()}
    options |= {"encoder_" + name: value for name, value in _DEEP.items()}
    return diffusers.AutoencoderDC(latent_channels=4, scaling_factor=0.41407, **options).eval()


_DEEP = {"block_out_channels": (8, 8, 8), "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), ())}


def _auraflow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    return _sharp(transformer, "to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")


def _cogview4():
    transformer = diffusers.CogView4Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        text_embed_dim=32, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, rope_axes_dim=(8, 8),
    )  # fmt: skip
    return transformer.eval()


class _Language(torch.nn.Module):
    """What the pipelines ask of a language model: of its "layers" [B, T, 16], one looks back and forth."""

    device = torch.device("cpu")

    def __init__(self, tokens):
        super().__init__()
        self.embedding = torch.nn.Embedding(tokens, 16)

    @property
    def dtype(self):
        return self.embedding.weight.dtype

    def forward(self, input_ids, attention_mask, **options):
        tokens = self.embedding(input_ids) * attention_mask[..., None]
        sums = tokens.sum(1, keepdim=True) / attention_mask.sum(1)[:, None, None]
        return SimpleNamespace(hidden_states=(tokens, tokens + sums, tokens - sums))


def _processor(tokenizer):
    """Return what takes pictures beside texts, and says nothing of them."""

    def process(text, images=None, **options):
        found = tokenizer(text, **options)
        found["pixel_values"] = found["image_grid_thw"] = torch.zeros(0)
        return found

    return process


def _with_language(parts, vae, transformer):
    """Return the parts of a pipeline whose text goes through a language model, with a chat's template."""
    tokenizer = parts["tokenizer_2"]
    tokenizer.chat_template = (
        "{% set text = messages[-1].content %}{{ text if text is string else text[0].text }}"  # no system prompt
    )
    for name, parameter in transformer.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight")):
            parameter.data = parameter.data * 3 + (0 if parameter.any() else 2)  # as in `conftest.py`
    return {
        "scheduler": parts["scheduler"], "tokenizer": tokenizer, "text_encoder": _Language(len(tokenizer)),
        "processor": _processor(tokenizer), "vae": vae.eval(), "transformer": transformer.eval(),
    }  # fmt: skip


_SMALL = {"attention_head_dim": 16, "num_attention_heads": 2}


def _flux2(parts):
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=1,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=2, joint_attention_dim=48, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4), **_SMALL,
    )  # fmt: skip
    return _with_language(parts, vae, transformer)


def _qwen_vae():
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=2, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.3, -0.2], latents_std=[1.5, 0.8],
    )  # fmt: skip


def _qwen(parts):
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=8, out_channels=2, num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8), **_SMALL
    )
    return _with_language(parts, _qwen_vae(), transformer)


def _zimage(parts):
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=1, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 4, 8], axes_lens=[256, 64, 64],
    )  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        token.data.normal_()  # older diffusers leaves them to chance
    return _with_language(parts, parts["vae"], transformer)


def _lumina2(parts):
    transformer = diffusers.Lumina2Transformer2DModel(
        in_channels=1, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=2,
        multiple_of=16, axes_dim_rope=(4, 4, 8), axes_lens=(64, 32, 32), cap_feat_dim=16,
    )  # fmt: skip
    return _with_language(parts, parts["vae"], transformer)


def _hunyuan_image(parts):
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32), layers_per_block=1,
        spatial_compression_ratio=4, sample_size=32, scaling_factor=0.75289,
    )  # fmt: skip
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=16,
        text_embed_2_dim=32, rope_axes_dim=(8, 8), **_SMALL,
    )  # fmt: skip
    second = {name: parts[name] for name in ("text_encoder_2", "tokenizer_2")}
    guider = diffusers.AdaptiveProjectedMixGuidance()
    return _with_language(parts, vae, transformer) | second | {"guider": guider}


def _krea2(parts):
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=8, num_layers=2, num_key_value_heads=2, intermediate_size=32, timestep_embed_dim=16,
        text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 8),
        **_SMALL,
    )  # fmt: skip
    return _with_language(parts, _qwen_vae(), transformer) | {"text_encoder_select_layers": (0, 1)}


def _wan():
    transformer = diffusers.WanTransformer3DModel(
        in_channels=2, out_channels=2, num_layers=2, text_dim=32, freq_dim=16, ffn_dim=32, **_SMALL
    )
    return _sharp(transformer, "norm_q.weight", "norm_k.weight")


def _ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=32, caption_channels=32, **_SMALL
    )
    return _sharp(transformer, "norm_q.weight", "norm_k.weight")


def _scheduler(parts, name, **options):
    return getattr(diffusers, f"{name}Scheduler").from_config(parts["scheduler"].config, **options)


_STRENGTH = {"image": PICTURE, "strength": 0.5, "num_inference_steps": 4}
_INPAINT = _STRENGTH | {"mask_image": MASK}
_CFG = {"true_cfg_scale": 3.0, "negative_prompt": "a cat"}

#: Parts of a pipeline, by the name of its architecture in lower case, from those of SDXL and of Flux.
_PARTS = {
    "sdxl": lambda sdxl, flux: sdxl | {"add_watermarker": False},
    "sd1.5": lambda sdxl, flux: _sd15(sdxl),
    "flux": lambda sdxl, flux: flux,
    "sd3": _sd3,
    "chroma": _on_t5(lambda sdxl, flux: flux["vae"], _chroma),
    "pixart": _on_t5(lambda sdxl, flux: sdxl["vae"], _pixart),
    "sana": _on_t5(lambda sdxl, flux: _deep(), _sana),
    "auraflow": _on_t5(lambda sdxl, flux: sdxl["vae"], _auraflow),
    "cogview4": _on_t5(lambda sdxl, flux: sdxl["vae"], _cogview4),
    "flux2": lambda sdxl, flux: _flux2(flux),
    "qwen": lambda sdxl, flux: _qwen(flux),
    "zimage": lambda sdxl, flux: _zimage(flux),
    "lumina2": lambda sdxl, flux: _lumina2(flux),
    "hunyuanimage": lambda sdxl, flux: _hunyuan_image(flux),
    "krea2": lambda sdxl, flux: _krea2(flux),
    "wan": _on_t5(lambda sdxl, flux: None, _wan),
    "ltx": _on_t5(lambda sdxl, flux: None, _ltx),
}

_UNGUIDED = {"guidance_scale": 1.0}
_UNBINNED = {"use_resolution_binning": False, "clean_caption": False}
_SANA = _UNBINNED | {"complex_human_instruction": ["go on:"]}
_FLUX2 = {"text_encoder_out_layers": (0, 1, 2)}
#: Two frames of 4x4 tokens, by the scales that pipelines without an autoencoder assume.
_WAN = {"num_frames": 5, "height": 64, "width": 64}
_LTX = {"num_frames": 9, "height": 128, "width": 128}
_LUMINA2 = {"system_prompt": "go on:", "max_sequence_length": 40}  # and " <Prompt Start> " between
_GIVEN = {"image": Image.new("RGB", (64, 64), "red")}

#: What the pipelines put around a prompt, a token a character.
_AROUND = {
    "prompt_template_encode": "{}", "prompt_template_encode_prefix": "", "prompt_template_encode_suffix": "",
    "prompt_template_encode_start_idx": 0, "prompt_template_encode_num_suffix_tokens": 1,
}  # fmt: skip

#: Numbers that pipelines hold for those of all of their checkpoints.
_FIXED = {
    "Lumina2Pipeline": {"vae_scale_factor": 2},
    "HunyuanImagePipeline": {"tokenizer_max_length": 12, "tokenizer_2_max_length": 12},
}

_CONTROLNET = {"controlnet": lambda parts: _controlnet(parts["unet"])}
_NINE_CHANNELS = {"unet": lambda parts: _wider(parts["unet"], "conv_in", 9)}

#: By a name: the pipeline's class, which architecture's parts it has, what is put in their place (a function of them),
#: and how it is called.
CASES = {
    "SDXL": ("StableDiffusionXLPipeline", "sdxl", {}, {}),
    "SDXL unguided": ("StableDiffusionXLPipeline", "sdxl", {}, {"guidance_scale": 1.0}),
    "SDXL img2img": ("StableDiffusionXLImg2ImgPipeline", "sdxl", {}, _STRENGTH),
    "SDXL inpaint": ("StableDiffusionXLInpaintPipeline", "sdxl", {}, _INPAINT),
    "SDXL inpaint, 9 channels": ("StableDiffusionXLInpaintPipeline", "sdxl", _NINE_CHANNELS, _INPAINT),
    "SDXL ControlNet": ("StableDiffusionXLControlNetPipeline", "sdxl", _CONTROLNET, {"image": OTHER}),
    "SDXL ControlNet, guess mode": (
        "StableDiffusionXLControlNetPipeline", "sdxl", _CONTROLNET, {"image": OTHER, "guess_mode": True},
    ),
    "SDXL ControlNet img2img": (
        "StableDiffusionXLControlNetImg2ImgPipeline", "sdxl", _CONTROLNET, _STRENGTH | {"control_image": OTHER},
    ),
    "SDXL ControlNet inpaint": (
        "StableDiffusionXLControlNetInpaintPipeline", "sdxl", _CONTROLNET, _INPAINT | {"control_image": OTHER},
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
    "SD1.5 inpaint, 9 channels": ("StableDiffusionInpaintPipeline", "sd1.5", _NINE_CHANNELS, _INPAINT),
    "SD1.5 ControlNet": ("StableDiffusionControlNetPipeline", "sd1.5", _CONTROLNET, {"image": OTHER}),
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
    "SD3": ("StableDiffusion3Pipeline", "sd3", {}, {}),
    "SD3, unguided": ("StableDiffusion3Pipeline", "sd3", {}, _UNGUIDED),
    "SD3, a layer skipped": (
        "StableDiffusion3Pipeline", "sd3", {}, {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9},
    ),
    "SD3 img2img": (
        "StableDiffusion3Img2ImgPipeline", "sd3", {}, _STRENGTH | {"image": PICTURE.expand(4, -1, -1, -1)},
    ),
    "Chroma": ("ChromaPipeline", "chroma", {}, {}),
    "Chroma, unguided": ("ChromaPipeline", "chroma", {}, _UNGUIDED),
    "PixArt": (
        "PixArtSigmaPipeline", "pixart",
        {"scheduler": lambda parts: _scheduler(parts, "DPMSolverMultistep")}, _UNBINNED,
    ),
    "PixArt, unguided": (
        "PixArtSigmaPipeline", "pixart",
        {"scheduler": lambda parts: _scheduler(parts, "DDIM", clip_sample=False)}, _UNBINNED | _UNGUIDED,
    ),
    "Sana": ("SanaPipeline", "sana", {}, _SANA),
    "Sana, unguided": (
        "SanaPipeline", "sana", {"scheduler": lambda parts: _scheduler(
        parts, "DPMSolverMultistep", use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)},
        _SANA | _UNGUIDED,
    ),
    "AuraFlow": ("AuraFlowPipeline", "auraflow", {}, {}),
    "AuraFlow, unguided": ("AuraFlowPipeline", "auraflow", {}, _UNGUIDED),
    "CogView4": ("CogView4Pipeline", "cogview4", {}, {}),
    "CogView4, unguided": ("CogView4Pipeline", "cogview4", {}, _UNGUIDED),
    "FLUX.2 dev": ("Flux2Pipeline", "flux2", {}, _FLUX2),
    "FLUX.2 dev, given image": ("Flux2Pipeline", "flux2", {}, _FLUX2 | _GIVEN),
    "FLUX.2 klein": ("Flux2KleinPipeline", "flux2", {}, _FLUX2),
    "FLUX.2 klein, unguided": ("Flux2KleinPipeline", "flux2", {}, _FLUX2 | {"guidance_scale": 1.0}),
    "Qwen-Image": ("QwenImagePipeline", "qwen", {}, {"true_cfg_scale": 1.0}),
    "Qwen-Image, guided": ("QwenImagePipeline", "qwen", {}, _CFG),
    "Qwen-Image img2img": ("QwenImageImg2ImgPipeline", "qwen", {}, _STRENGTH | _CFG),
    "Qwen-Image Edit": ("QwenImageEditPipeline", "qwen", {}, _CFG | _GIVEN),
    "Qwen-Image Edit-Plus": ("QwenImageEditPlusPipeline", "qwen", {}, _GIVEN | {"true_cfg_scale": 1.0}),
    "Z-Image": ("ZImagePipeline", "zimage", {}, {}),
    "Z-Image, unguided": ("ZImagePipeline", "zimage", {}, {"guidance_scale": 0.0}),
    "Z-Image, guidance truncated": ("ZImagePipeline", "zimage", {}, {"cfg_truncation": 0.2}),
    "Z-Image img2img": ("ZImageImg2ImgPipeline", "zimage", {}, _STRENGTH),
    "Lumina 2, guidance truncated": ("Lumina2Pipeline", "lumina2", {}, _LUMINA2 | {"cfg_trunc_ratio": 0.5}),
    "Lumina 2, unguided": ("Lumina2Pipeline", "lumina2", {}, _LUMINA2 | _UNGUIDED),
    "HunyuanImage": ("HunyuanImagePipeline", "hunyuanimage", {}, {"negative_prompt": 'a "cat"'}),
    "HunyuanImage, unguided": ("HunyuanImagePipeline", "hunyuanimage", {"guider": lambda parts: None}, {}),
    "Krea 2": ("Krea2Pipeline", "krea2", {}, {}),
    "Krea 2, unguided": ("Krea2Pipeline", "krea2", {}, {"guidance_scale": 0.0}),
    "Wan": (
        "WanPipeline", "wan", {"scheduler": lambda parts: _scheduler(
        parts, "UniPCMultistep", use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)}, _WAN,
    ),
    "Wan, a time for each token, unguided": (
        "WanPipeline", "wan", {"expand_timesteps": lambda parts: True}, _WAN | _UNGUIDED,
    ),
    "LTX": ("LTXPipeline", "ltx", {}, _LTX),
    "LTX, unguided": ("LTXPipeline", "ltx", {}, _LTX | _UNGUIDED),
}  # fmt: skip


def since(*names):
    """Skip a test where the diffusers that is installed is too old to have these names."""
    absent = [name for name in names if not hasattr(diffusers, name)]
    if absent and Version(diffusers.__version__) < Version("0.42"):
        pytest.skip(f"this diffusers has no {absent[0]}")


def build(case, bases):
    """Return the pipeline of a case, and the options of its call; `bases` are those of `conftest.py`."""
    name, base, changes, options = CASES[case]
    since(name)
    torch.manual_seed(0)
    parts = _PARTS[base](*(copy.deepcopy(bases[name].components) for name in ("sdxl", "flux")))
    cls = getattr(diffusers, name)
    if "transformer" in parts and "max_sequence_length" in inspect.signature(cls.__call__).parameters:
        options = {"max_sequence_length": 12} | options
    parts |= {part: change(parts) for part, change in changes.items()}
    pipe = cls(**{part: value for part, value in parts.items() if part in inspect.signature(cls.__init__).parameters})
    fixed = {attribute: value for attribute, value in _AROUND.items() if hasattr(pipe, attribute)}
    for attribute, value in (fixed | _FIXED.get(name, {})).items():
        setattr(pipe, attribute, value)
    if "Edit" in name:  # which makes every given image a megapixel
        sys.modules[cls.__module__].calculate_dimensions = lambda area, ratio: (32, 32, None)[: 3 - ("Plus" in name)]
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"num_inference_steps": 2, "height": 32, "width": 32} | options


def denoiser(pipe):
    """Return the UNet or transformer of a pipeline, also if it is compiled."""
    module = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return getattr(module, "_orig_mod", module)


def state(pipe):
    """Return the type and the attributes of the pipeline and of every module in it, and the number of hooks."""
    modules = [m for part in pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [(type(o), sorted(o.__dict__), [len(getattr(o, h, ())) for h in hooks]) for o in (pipe, *modules)]


def generate(pipe, seeds=(0, 1, 2), prompt="a dog", generators=None, per_prompt=None, **options):
    """Return the latents of one call, with a generator for each image; 4 steps, SDXL with guidance."""
    prompts = prompt if isinstance(prompt, list) else [prompt]
    options = {"num_inference_steps": 4, "height": 32, "width": 32} | options
    if hasattr(pipe, "transformer"):
        options["max_sequence_length"] = options.get("max_sequence_length", 12)
    return pipe(
        prompt,
        num_images_per_prompt=per_prompt or len(seeds) // len(prompts),
        generator=generators or [torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **options,
    ).images


def hook_attentions(pipe, change, cross_attention=False):
    """Register torch hooks that apply `change(tokens, text)` where SDXL and Flux are pushed; return the handles.

    Args:
        pipe: of SDXL or Flux.
        change: called with features [rows, N, C], and whether text precedes the tokens of the image.
        cross_attention: whether SDXL's cross-attention is hooked too.
    """
    handles = []
    for name, module in denoiser(pipe).named_modules():
        if hasattr(pipe, "unet"):
            kinds = ("attn1", "attn2") if cross_attention else ("attn1",)
            if name.startswith("up_blocks") and name.split(".")[-1] in kinds:
                handles.append(module.register_forward_hook(lambda m, args, output: change(output, False)))
        elif name.startswith("transformer_blocks") and name.endswith("attn.to_out.0"):
            handles.append(module.register_forward_pre_hook(lambda m, args: (change(args[0], False),)))
        elif name.startswith("single_transformer_blocks") and name.endswith(".attn"):
            handles.append(module.register_forward_hook(lambda m, args, output: change(output, True)))
    return handles
