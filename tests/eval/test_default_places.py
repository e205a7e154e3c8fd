"""Every network is loaded from where its publishers' code puts it, in $TORCH_HOME and in the cache of the hub.

The files have random weights, and the names, layout and loading code of the published ones. DreamSim's three networks
are narrow, so that they are made in a moment.
"""

import functools
import shutil

import pytest
import torch
from safetensors.torch import save_file

from eval.clip import OpenClip
from eval.features import DinoV2, DreamSim, Inception, Sscd, TorchvisionInception
from eval.perceptual import BACKBONES, Lpips
from eval.weights import FACTS

ARCHITECTURE = "tiny-for-default-places"


@pytest.fixture
def homes(tmp_path, monkeypatch):
    """Empty folders of torch.hub and of the hub's cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def dreamsim(homes, monkeypatch):
    """The unpacked ensemble, and DINO beside it, in DreamSim's default folder, which is returned."""
    from dreamsim.config import dreamsim_args
    from dreamsim.feature_extraction.vision_transformer import VisionTransformer
    from dreamsim.model import PerceptualModel
    from peft import LoraConfig, get_peft_model

    def narrow(patch_size):
        layer_norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
        return VisionTransformer(
            patch_size=patch_size, embed_dim=24, depth=12, num_heads=2, mlp_ratio=1, qkv_bias=True,
            norm_layer=layer_norm,
        )  # fmt: skip

    for module in ("vision_transformer", "load_clip_as_dino", "load_open_clip_as_dino"):
        monkeypatch.setattr(f"dreamsim.feature_extraction.{module}.vit_base", narrow)
    folder = homes / "torch" / "hub" / "dreamsim"
    (folder / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    dino = narrow(16)
    torch.save(dino.state_dict(), folder / "checkpoints" / "dino_vitbase16_pretrain.pth")
    head = {f"module.head.mlp.{layer}.{kind}": torch.ones(1) for layer in (0, 2, 4) for kind in ("weight", "bias")}
    torch.save(
        {"student": {**head, "module.head.last_layer.weight": torch.ones(1)}}, folder / "dino_vitb16_pretrain.pth"
    )
    for name in ("clip_vitb16_pretrain.pth.tar", "open_clip_vitb16_pretrain.pth.tar"):
        backbone = narrow(16)
        backbone.pos_drop = torch.nn.LayerNorm(24)
        torch.save({"state_dict": {**backbone.state_dict(), "proj": torch.randn(24, 16)}}, folder / name)
    with monkeypatch.context() as patch:
        patch.setattr(torch.hub, "load", lambda *_: dino)
        patch.setattr(torch.hub, "set_dir", lambda _: None)
        settings = dreamsim_args["model_config"]["ensemble"]
        model = PerceptualModel(**settings, device="cpu", load_dir=str(folder))
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=0.5, lora_dropout=0.3, target_modules=["qkv"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # made of zeros, which would do nothing
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(folder / "ensemble_lora")
    return folder


def in_checkpoints(homes, name, state):
    file = homes / "torch" / "hub" / "checkpoints" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)


def in_cache(homes, repository):
    """Return a new snapshot's folder of a repository in the hub's cache."""
    folder = homes / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123456789abcdef")
    (folder / "snapshots" / "0123456789abcdef").mkdir(parents=True)
    return folder / "snapshots" / "0123456789abcdef"


class Descriptor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 5, stride=4)

    def forward(self, x):
        return self.conv(x).relu().mean(dim=[2, 3])


@pytest.fixture
def published(homes, dreamsim, make_open_clip, monkeypatch):
    """All files in their places; returns functions that make the encoders, DreamSim's first."""
    import open_clip
    from torchvision.models import inception_v3, squeezenet1_1
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    in_checkpoints(homes, BACKBONES["squeeze"], squeezenet1_1(weights=None).state_dict())
    network = inception_v3(weights=None, init_weights=False)
    in_checkpoints(homes, FACTS["inception_torchvision"]["files"][0], network.state_dict())
    network = inception_v3(weights=None, init_weights=False, aux_logits=False, num_classes=1008)
    in_checkpoints(homes, FACTS["inception"]["files"][0], network.state_dict())
    torch.jit.script(Descriptor().eval()).save(homes / "torch" / "hub" / "checkpoints" / FACTS["sscd"]["files"][0])
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Dinov2Config(**tower, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(in_cache(homes, "facebook/dinov2-base"))
    tag = {"openai": {"hf_hub": "timm/tiny/", "quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, ARCHITECTURE, tag)
    state = make_open_clip(ARCHITECTURE, 16).state_dict()
    save_file(state, in_cache(homes, "timm/tiny") / "open_clip_model.safetensors")
    clip = functools.partial(OpenClip, ARCHITECTURE)
    return [DreamSim, clip, DinoV2, Sscd, Inception, TorchvisionInception, functools.partial(Lpips, "squeeze")]


def test_all_are_loaded_from_there_one_after_the_other_and_again(published, homes):
    image, other = (torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2))
    state = torch.hub.get_dir(), torch.hub.load, torch.hub.set_dir
    rounds = []
    for _ in range(2):
        encoders = [make() for make in published]
        assert [encoder.name for encoder in encoders if not encoder.weights().present] == []
        for encoder in encoders:
            encoder.prepare()
            assert (torch.hub.get_dir(), torch.hub.load, torch.hub.set_dir) == state, encoder.name
        *embedding, pairs = encoders
        features = [encoder.embed_images([image, other]) for encoder in embedding]
        rounds.append([*features, pairs.pairwise([image, other])])
    for first, again in zip(*rounds, strict=True):
        assert first.isfinite().all() and torch.equal(first, again)
    dreamsim = rounds[0][0]
    assert dreamsim.shape == (2, 24 + 16 + 16) and (dreamsim[0] - dreamsim[1]).abs().max() > 1e-4
    # The place is no part of what is embedded.
    moved = shutil.copytree(homes / "torch" / "hub" / "dreamsim", homes / "moved")
    assert torch.equal(DreamSim(weights_dir=moved).embed_images([image, other]), dreamsim)


def test_torch_hub_follows_its_variable_after_dreamsim_and_after_a_damaged_one(dreamsim, homes, monkeypatch):
    """The folder that is set for a process would outlive the variable."""
    DreamSim().prepare()
    (dreamsim / "clip_vitb16_pretrain.pth.tar").write_bytes(b"damaged")
    load = torch.hub.load
    with pytest.raises(ValueError, match=r"DreamSim ensemble.*cannot be loaded"):
        DreamSim().prepare()
    assert torch.hub.load is load
    monkeypatch.setenv("TORCH_HOME", str(homes / "elsewhere"))
    assert torch.hub.get_dir() == str(homes / "elsewhere" / "hub")
    assert DreamSim().weights().looked_in == (homes / "elsewhere" / "hub" / "dreamsim",)


def test_a_home_in_a_path_is_the_users(homes, monkeypatch):
    monkeypatch.setenv("HOME", str(homes))
    for encoder in (DreamSim(weights_dir="~/w"), OpenClip(weights_dir="~/w"), Sscd("~/w/a.pt"), DinoV2("~/w")):
        assert all(str(path).startswith(str(homes / "w")) for path in encoder.weights().looked_in), encoder.name
