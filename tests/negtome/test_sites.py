"""The table of sites, against the diffusers that is installed."""

import copy

import pytest
import tiny
import torch

import negtome
from negtome import NegToMeConfig
from negtome.architectures import ARCHITECTURES
from negtome.sites import feature_maps, fewest_tokens, find_architecture, find_sites, largest_map

SDXL, FLUX = (next(a for a in ARCHITECTURES if a.name == name) for name in ("SDXL", "Flux"))


@pytest.fixture(scope="module")
def real_unet():
    """SDXL's UNet at full size, without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def configured_sites(denoiser, architecture, config):
    return find_sites(denoiser, architecture, config.sites, config.cross_attention)


def test_sdxl_has_the_72_attentions_of_the_release(real_unet):
    released = configured_sites(real_unet, SDXL, NegToMeConfig.preset("sdxl", "released"))
    assert len(released) == 72
    assert all(name.startswith("up_blocks.") and place.tensor == "output" for name, _, place in released)
    paper = configured_sites(real_unet, SDXL, NegToMeConfig.preset("sdxl", "paper"))
    assert [name for name, _, _ in paper] == [name for name, _, _ in released if name.endswith("attn1")]


def test_flux_has_the_19_and_38_blocks_of_the_release():
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    sites = configured_sites(transformer, FLUX, NegToMeConfig.preset("flux"))
    assert [name for name, _, _ in sites] == [f"transformer_blocks.{i}.attn.to_out.0" for i in range(19)] + [
        f"single_transformer_blocks.{i}.attn" for i in range(38)
    ]
    assert [(place.tensor, place.image) for _, _, place in sites] == [("input", "first")] * 19 + [
        ("output", "last")
    ] * 38
    assert all(module is transformer.get_submodule(name) for name, module, _ in sites)


@pytest.mark.parametrize(
    ("name", "attentions", "options"),
    [
        # SD3.5 medium: 13 of its blocks have two.
        ("SD3", 24 + 13, {"num_layers": 24, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}),
        ("Flux2", 5 + 20, {"num_layers": 5, "num_single_layers": 20}),  # klein 4B
        ("ZImage", 2 + 30, {}),
        *(
            pytest.param(name, attentions, {}, marks=pytest.mark.slow)
            for name, attentions in {
                "Chroma": 19 + 38, "PixArt": 28, "Sana": 20, "AuraFlow": 4 + 32, "CogView4": 30, "Flux2": 8 + 48,
                "Qwen": 60, "Lumina2": 2 + 26, "HunyuanImage": 20 + 40, "Krea2": 28, "Wan": 40, "LTX": 28,
            }.items()
        ),
    ],
)  # fmt: skip
def test_every_attention_of_the_image_to_itself_is_a_site(name, attentions, options):
    import diffusers

    architecture = next(a for a in ARCHITECTURES if a.name == name)
    tiny.since(architecture.denoiser_class)
    with torch.device("meta"):
        denoiser = getattr(diffusers, architecture.denoiser_class)(**options)
    assert len(configured_sites(denoiser, architecture, NegToMeConfig())) == attentions


def test_sites_are_chosen_by_block(tiny_sdxl, tiny_flux):
    def names(pipe, architecture, **options):
        denoiser = getattr(pipe, architecture.denoiser)
        return [name for name, _, _ in configured_sites(denoiser, architecture, NegToMeConfig(**options))]

    assert names(tiny_sdxl, SDXL, sites=["mid_block"]) == ["mid_block.attentions.0.transformer_blocks.0.attn1"]
    assert len(names(tiny_sdxl, SDXL, sites=["up_blocks.1", "mid_block"], cross_attention=True)) == 6
    assert names(tiny_flux, FLUX, sites=["single_transformer_blocks.1"]) == ["single_transformer_blocks.1.attn"]
    assert names(tiny_flux, FLUX, sites=["transformer_blocks"]) == [
        f"transformer_blocks.{i}.attn.to_out.0" for i in range(2)
    ]
    with pytest.raises(ValueError, match=r"no site under 'up_block' of the UNet2D.*did you mean 'up_blocks'"):
        names(tiny_sdxl, SDXL, sites=["up_blocks", "up_block"])
    with pytest.raises(ValueError, match=r"no site under 'single_transformer_blocks\.7'"):
        names(tiny_flux, FLUX, sites=["single_transformer_blocks.7"])


def test_the_sites_of_an_attachment_may_be_chosen_one_by_one(tiny_sdxl, tiny_flux):
    for pipe in (tiny_sdxl, tiny_flux):
        attached = negtome.attach(pipe, NegToMeConfig())
        attached.remove()
        one = negtome.attach(pipe, NegToMeConfig(sites=attached.sites[1:]))
        one.remove()
        assert one.sites == attached.sites[1:]


def test_other_pipelines_are_refused_by_name(tiny_sdxl):
    from diffusers import StableDiffusionXLInstructPix2PixPipeline

    assert find_architecture(tiny_sdxl) is SDXL
    components = {n: p for n, p in tiny_sdxl.components.items() if n not in ("feature_extractor", "image_encoder")}
    other = StableDiffusionXLInstructPix2PixPipeline(**components)
    with pytest.raises(TypeError, match="Pass the pipeline, not its denoiser, got a UNet2DConditionModel"):
        negtome.attach(tiny_sdxl.unet)
    for pipe, name in ((other, "StableDiffusionXLInstructPix2PixPipeline"), (object(), "object")):
        with pytest.raises(TypeError, match=f"to a {name}; .*SDXL.*Flux.*docs/pipelines.md"):
            find_architecture(pipe)
    with pytest.raises(TypeError, match="loaded pipeline, got the name 'models/mini-sdxl'"):
        find_architecture("models/mini-sdxl")
    other = copy.copy(tiny_sdxl)
    other.unet = tiny_sdxl.vae
    with pytest.raises(TypeError, match=r"UNet2DConditionModel as the unet .*got a AutoencoderKL"):
        find_architecture(other)


def test_the_largest_map_of_modules_is_where_they_are_in_the_unet(real_unet):
    for names, size in (
        (["mid_block.attentions.0.transformer_blocks.0.attn1"], (32, 32)),
        (["mid_block.attentions.0.transformer_blocks.0.attn1", "up_blocks.1.attentions.0"], (64, 64)),
        (["up_blocks.0.attentions.0", "up_blocks.1.attentions.0"], (64, 64)),
        (["down_blocks.1.attentions.0", "down_blocks.2.attentions.0"], (64, 64)),
        (["down_blocks.2.attentions.0"], (32, 32)),
    ):
        assert largest_map(real_unet, names, (128, 128)) == size
    assert largest_map(real_unet, ["mid_block.attentions.0"], (1, 1)) == (1, 1)


def test_feature_maps_halve_rounding_up():
    assert feature_maps((128, 128))[:3] == [(128, 128), (64, 64), (32, 32)]
    assert feature_maps((5, 12)) == [(5, 12), (3, 6), (2, 3), (1, 2), (1, 1)]
    # 1024x1024: 32x32 is the smallest that takes part in the release; 1344x768: 42x24 does not.
    assert fewest_tokens((128, 128), 32) == 32 * 32
    assert fewest_tokens((96, 168), 32) == 48 * 84
