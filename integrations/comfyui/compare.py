"""Compare the nodes in a real ComfyUI with `negtome.attach`, on mini-sdxl and a CPU.

    python integrations/comfyui/compare.py PATH/TO/ComfyUI

Run it with a Python that has ComfyUI's packages, `negtome` and diffusers. ComfyUI's checkpoint loader does not take the
small model, so this script puts the weights into ComfyUI's UNet. Both programs start from the same latents. Each line
prints the largest difference from `attach`, and the largest change by NegToMe.
"""

import asyncio
import importlib.util
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS, GUIDANCE, SIDE, IMAGES, PROMPT = 4, 5.0, 128, 4, "a photo of a dog"
SETTINGS = {
    "alpha": 0.9,
    "settings": "published settings",
    "threshold": 0.7,
    "start_percent": 0.0,
    "end_percent": 0.2,
    "first_steps": 0,
}


class Multiple(float):
    """A factor of channels that need not be an integer, as ComfyUI's UNet multiplies."""

    def __mul__(self, channels: float) -> int:
        return round(float(self) * channels)

    __rmul__ = __mul__


def patcher_of(pipe: Any) -> Any:
    """Return ComfyUI's patcher of its own SDXL model, with the weights of a diffusers UNet."""
    import comfy.latent_formats as formats
    import comfy.supported_models_base as supported
    import comfy.utils
    import torch
    from comfy import model_base
    from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep
    from comfy.model_patcher import ModelPatcher

    unet, settings = pipe.unet, pipe.unet.config
    channels, layers = settings.block_out_channels, settings.layers_per_block
    depth = settings.transformer_layers_per_block
    depths = [depth] * len(channels) if isinstance(depth, int) else list(depth)
    levels = [
        count if "CrossAttn" in kind else 0 for count, kind in zip(depths, settings.down_block_types, strict=True)
    ]
    shape = {
        "image_size": 32,
        "in_channels": settings.in_channels,
        "out_channels": settings.out_channels,
        "model_channels": channels[0],
        "num_res_blocks": [layers] * len(channels),
        "channel_mult": [Multiple(width / channels[0]) for width in channels],
        "transformer_depth": [level for level in levels for _ in range(layers)],
        "transformer_depth_output": [level for level in levels for _ in range(layers + 1)],
        "transformer_depth_middle": depths[-1],
        "use_linear_in_transformer": settings.use_linear_projection,
        "context_dim": settings.cross_attention_dim,
        "use_spatial_transformer": True,
        "legacy": False,
        "num_head_channels": channels[0] // settings.attention_head_dim[0],
        "num_classes": "sequential",
        "adm_in_channels": settings.projection_class_embeddings_input_dim,
    }
    names, weights = comfy.utils.unet_to_diffusers(dict(shape)), unet.state_dict()
    config = supported.BASE.__new__(supported.BASE)
    config.unet_config = {**shape, "dtype": torch.float32}
    config.sampling_settings, config.optimizations = {}, {"fp8": False}
    config.manual_cast_dtype = config.custom_operations = config.scaled_fp8 = None
    config.latent_format = formats.SDXL()
    config.latent_format.latent_channels = settings.in_channels
    config.latent_format.scale_factor = pipe.vae.config.scaling_factor
    kind = "V_PREDICTION" if pipe.scheduler.config.prediction_type == "v_prediction" else "EPS"
    model = model_base.SDXL(config, model_base.ModelType[kind])
    model.embedder = Timestep(settings.addition_time_embed_dim)
    for module in model.diffusion_model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = settings.norm_num_groups
    model.diffusion_model.load_state_dict({names[name]: tensor.clone() for name, tensor in weights.items()})
    signal = pipe.scheduler.alphas_cumprod
    model.model_sampling.set_sigmas(((1 - signal) / signal) ** 0.5)
    cpu = torch.device("cpu")
    return ModelPatcher(model, load_device=cpu, offload_device=cpu)


def load_nodes() -> dict[str, Any]:
    """Import this folder as ComfyUI does: the node classes by their id."""
    spec = importlib.util.spec_from_file_location(
        "nodes_of_negtome", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    return {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}


def main(folder: str) -> None:
    """Compare both programs; see the module."""
    if not (Path(folder) / "comfy").is_dir():
        raise SystemExit(f"expected the folder of ComfyUI, which has a folder comfy, got {folder}.")
    sys.argv[1:] = ["--cpu"]  # ComfyUI reads its options from here
    sys.path.insert(0, folder)
    import comfy.options

    comfy.options.enable_args_parsing()
    importlib.import_module("utils")  # before ComfyUI puts a folder that has a module of this name first
    nodes = load_nodes()
    import comfy.sample
    import comfy.samplers
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image

    import negtome

    torch.set_grad_enabled(False)
    pipe = DiffusionPipeline.from_pretrained(HERE.parents[1] / "models/mini-sdxl")
    pipe.set_progress_bar_config(disable=True)
    model = patcher_of(pipe)
    channels = pipe.unet.config.in_channels
    latents = torch.randn(IMAGES, channels, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(0))
    texts = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=True)

    def in_diffusers(**attach: Any) -> torch.Tensor:
        call = {
            "prompt": PROMPT,
            "num_images_per_prompt": IMAGES,
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "height": SIDE,
            "width": SIDE,
            "latents": latents.clone(),
            "output_type": "latent",
        }
        if not attach:
            return pipe(**call).images
        with negtome.attach(pipe, **attach):
            return pipe(**call).images

    def in_comfyui(patched: Any) -> torch.Tensor:
        pipe.scheduler.set_timesteps(STEPS)
        positive, negative = (
            [[text, {"pooled_output": pooled, "width": SIDE, "height": SIDE}]]
            for text, pooled in ((texts[0], texts[2]), (texts[1], texts[3]))
        )
        return comfy.sample.sample_custom(
            patched,
            latents.clone(),
            GUIDANCE,
            comfy.samplers.sampler_object("euler"),
            pipe.scheduler.sigmas.clone(),
            positive,
            negative,
            torch.zeros_like(latents),
            disable_pbar=True,
            seed=0,
        )

    class Vae:  # what the node reads of ComfyUI's VAE
        @staticmethod
        def encode(pixels: torch.Tensor) -> torch.Tensor:
            return pipe.vae.encode(2 * pixels.movedim(-1, 1) - 1).latent_dist.mode()

        @staticmethod
        def spacial_compression_encode() -> int:
            return 8

    without = in_diffusers()
    print(f"without NegToMe: difference {float((in_comfyui(model) - without).abs().max()):.1e}", flush=True)
    image = Image.open(HERE.parents[1] / "models/mini-protected/guidance/panda/noto-panda.png").convert("RGB")
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, image.width // 2, image.height))
    pixels, area = (torch.from_numpy(np.array(item)).float()[None] / 255 for item in (image, mask))
    groups = {
        f"group, {reference}": (
            nodes["NegToMeGroup"].execute(model, reference=reference, group_size=0, **SETTINGS),
            {"config": negtome.NegToMeConfig.preset("sdxl", alpha=0.9, reference=reference)},
        )
        for reference in ("first", "others")
    }
    away = {
        "config": negtome.NegToMeConfig.preset("sdxl", alpha=0.9),
        "references": negtome.Reference(image, mask=mask),
    }
    node = nodes["NegToMeReference"].execute(model, Vae, pixels, area, **SETTINGS)
    for name, (output, attach) in {**groups, "reference image, mask": (node, away)}.items():
        patched, report = output.result
        latent, expected = in_comfyui(patched), in_diffusers(**attach)
        difference, change = ((latent - other).abs().max() for other in (expected, without))
        print(f"{name}: difference {float(difference):.1e}, change by NegToMe {float(change):.1f}")
        print(f"    {report.text()}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
