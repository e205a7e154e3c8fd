"""Tiny checkpoints and scoring networks of random weights, in the file layout of the published ones."""

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file


def lay_out_sdxl(pipe, folder: Path) -> Path:
    """Save a StableDiffusionXLPipeline as SG161222/RealVisXL_V4.0 has its files, each in float32 and in float16."""
    pipe.save_pretrained(folder)
    pipe.to(torch.float16).save_pretrained(folder, variant="fp16")
    for name in ("tokenizer", "tokenizer_2"):
        _split_tokenizer(pipe.components[name], folder / name)
    for name in ("text_encoder", "text_encoder_2"):
        _rename_dtype(folder / name / "config.json")
    # For other programs: the same weights in one file.
    shutil.copy(folder / "unet" / "diffusion_pytorch_model.safetensors", folder / "RealVisXL_V4.0.safetensors")
    (folder / "README.md").write_text("# RealVisXL V4.0\n")
    return folder


def lay_out_flux(pipe, folder: Path) -> Path:
    """Save a FluxPipeline as black-forest-labs/FLUX.1-dev has its files: bfloat16, the large parts in several files."""
    pipe.to(torch.bfloat16).save_pretrained(folder)
    _split_tokenizer(pipe.tokenizer, folder / "tokenizer")
    for name in ("transformer", "text_encoder_2"):
        component = pipe.components[name]
        size = sum(parameter.nbytes for parameter in component.parameters())
        shutil.rmtree(folder / name)
        component.save_pretrained(folder / name, max_shard_size=f"{size // 2048}KB")
        assert list((folder / name).glob("*.safetensors.index.json")), "in one file"
    for name in ("text_encoder", "text_encoder_2"):
        _rename_dtype(folder / name / "config.json")
    file = folder / "tokenizer_2" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 512}))
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "ae.safetensors")
    (folder / "LICENSE.md").write_text("FLUX.1 [dev] Non-Commercial License\n")
    return folder


def _rename_dtype(file: Path) -> None:
    """Have the file of a text encoder say what its weights are in, float16 or bfloat16, as of old."""
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"torch_dtype": settings.pop("dtype", None) or settings["torch_dtype"]}))


def _split_tokenizer(tokenizer, folder: Path) -> None:
    """Replace the one file that a CLIP tokenizer is saved in today by those that published checkpoints have."""
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(dict(sorted(tokenizer.get_vocab().items()))))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
               "unk_token": "<|endoftext|>"}  # fmt: skip
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True,
                          "add_prefix_space": False, "errors": "replace"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def lay_out_clip(folder: Path) -> Path:
    """Save OpenAI's CLIP ViT-B/32 at its full size, 300 MB, as timm/vit_base_patch32_clip_224.openai has it."""
    import open_clip

    with torch.device("meta"):
        shapes = open_clip.create_model("ViT-B-32-quickgelu", device="meta").state_dict()
    folder.mkdir(parents=True)
    weights = {name: tensor.half().contiguous() for name, tensor in _random(shapes).items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text("{}")
    return folder


def lay_out_dinov2(folder: Path) -> Path:
    """Save a tiny DINOv2 as facebook/dinov2-base has its files."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**tower, image_size=518, patch_size=14)).save_pretrained(folder)
    BitImageProcessor().save_pretrained(folder)
    return folder


def lay_out_dreamsim(folder: Path) -> tuple[Path, Path]:
    """Save DreamSim's ensemble at its full size; return the archive of its release, and the file of DINO itself."""
    from dreamsim.feature_extraction.vision_transformer import DINOHead, vit_base
    from peft import LoraConfig

    unpacked = folder / "dreamsim"
    adapter = unpacked / "ensemble_lora"
    adapter.mkdir(parents=True)
    transformer = vit_base(patch_size=16)
    torch.save(_random(transformer.state_dict()), folder / "dino_vitbase16_pretrain.pth")
    head = {f"module.head.{name}": tensor for name, tensor in DINOHead(768, 2048).state_dict().items()}
    head["module.head.last_layer.weight"] = head["module.head.last_layer.weight_v"]
    torch.save({"student": _random(head)}, unpacked / "dino_vitb16_pretrain.pth")
    transformer.pos_drop = torch.nn.LayerNorm(768)
    clip = {**transformer.state_dict(), "proj": torch.empty(768, 512)}
    for seed, name in enumerate(("clip", "open_clip"), 1):
        torch.save({"state_dict": _random(clip, seed)}, unpacked / f"{name}_vitb16_pretrain.pth.tar")
    LoraConfig(r=16, lora_alpha=8, lora_dropout=0.3, target_modules=["qkv"]).save_pretrained(adapter)
    weights = {}
    for block in (f"{network}.model.blocks.{layer}" for network in range(3) for layer in range(12)):
        name = f"base_model.model.extractor_list.{block}.attn.qkv"
        weights[f"{name}.lora_A.weight"] = torch.randn(16, 768) / 28
        weights[f"{name}.lora_B.weight"] = torch.randn(2304, 16) / 28
    save_file(weights, adapter / "adapter_model.safetensors")
    archive = shutil.make_archive(str(folder / "dreamsim_ensemble_checkpoint"), "zip", unpacked)
    return Path(archive), folder / "dino_vitbase16_pretrain.pth"


class Descriptor(torch.nn.Module):
    """As SSCD outside: images of any size to descriptors of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 5, stride=4)

    def forward(self, x):
        return torch.nn.functional.normalize(self.conv(x).relu().mean(dim=[2, 3]), dim=1)


def save_sscd(file: Path) -> Path:
    torch.jit.script(Descriptor().eval()).save(file)
    return file


def save_torchvision(name: str, file: Path, **options) -> Path:
    """Save a network of torchvision."""
    import torchvision

    with torch.device("meta"):
        network = getattr(torchvision.models, name)(**options)
    torch.save(_random(network.state_dict()), file)
    return file


def _random(shapes: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights of these shapes. Rows overlap in memory, and so do those that `torch.save` writes.

    A network of hundreds of megabytes is a file of one, and no two of its rows are equal.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in shapes.items():
        if tensor.ndim > 1:
            row = tensor[0].numel()
            values = torch.randn(row + len(tensor) - 1, generator=generator) * math.sqrt(2 / row)
            strides = tensor.new_empty(tensor.shape).stride()[1:]
            weights[name] = values.as_strided(tensor.shape, (1, *strides))
        else:
            ones = tensor.ndim == 1 and name.endswith(("weight", "running_var"))
            weights[name] = torch.full(tensor.shape, int(ones), dtype=tensor.dtype)
    return weights
