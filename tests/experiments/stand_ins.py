"""Stand-ins for networks, folders and methods: an encoder of colours, a retriever, random weights, refusals."""

from fnmatch import fnmatch
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from eval.encoders import Encoder
from eval.images import Withheld
from experiments.methods.method import GroupResult, Method

#: The colours that `Colours` knows by name.
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0)}


class Colours(Encoder):
    """Embeds an image as its mean colour, and a text as the colours that it names, or as grey."""

    name, id = "colours", "colours-1"

    def embed_images(self, images):
        return torch.nn.functional.normalize(
            torch.stack([image.float().mean(dim=(1, 2)) for image in images]) + 1, dim=1
        )

    def embed_texts(self, texts):
        named = [[COLOURS[word] for word in text.split() if word in COLOURS] or [(128, 128, 128)] for text in texts]
        return torch.nn.functional.normalize(
            torch.stack([torch.tensor(colours).float().mean(0) for colours in named]) + 1
        )


class Finds:
    """A retriever that finds one concept for every prompt; without a name, none."""

    def __init__(self, name):
        self.name = name

    def find(self, pipe, group, call):
        return [(SimpleNamespace(name=self.name, label=f"{self.name}/1.png"), 0.5)] if self.name else []

    def settings(self):
        return {"finds": self.name}


def save_ip_adapter(folder, unet, plus=False):
    """Lay down an IP-Adapter of a UNet's shape as h94/IP-Adapter is; return the arguments of `load_ip_adapter`."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    cross, width = unet.config.cross_attention_dim, 64
    if plus:
        shapes = {"latents": (1, 4, width), "proj_in.weight": (width, width), "proj_in.bias": (width,),
                  "proj_out.weight": (cross, width), "proj_out.bias": (cross,), "norm_out.weight": (cross,),
                  "norm_out.bias": (cross,)}  # fmt: skip
        for layer in range(4):
            for name in ("0.norm1", "0.norm2", "1.0"):
                shapes |= {f"layers.{layer}.{name}.{part}": (width,) for part in ("weight", "bias")}
            for name, rows, columns in (
                ("0.to_q", 1, 1),
                ("0.to_kv", 2, 1),
                ("0.to_out", 1, 1),
                ("1.1", 4, 1),
                ("1.3", 1, 4),
            ):
                shapes[f"layers.{layer}.{name}.weight"] = (rows * width, columns * width)
    else:
        shapes = {
            "proj.weight": (4 * cross, 16),
            "proj.bias": (4 * cross,),
            "norm.weight": (cross,),
            "norm.bias": (cross,),
        }
    state = {f"image_proj.{name}": random(*shape) for name, shape in shapes.items()}
    crossings = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(crossings):
        inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        state |= {f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight": random(inner, cross) for part in "kv"}
    (folder / "sdxl_models").mkdir(parents=True)
    save_file(state, folder / "sdxl_models" / "ip-adapter.safetensors")
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(hidden_size=width, intermediate_size=32, projection_dim=16, num_hidden_layers=1,
                         num_attention_heads=2, image_size=32, patch_size=16)
    )  # fmt: skip
    for parameter in encoder.parameters():
        parameter.data = random(*parameter.shape)
    encoder.save_pretrained(folder / "models" / "image_encoder")
    return {"pretrained_model_name_or_path_or_dict": str(folder), "subfolder": "sdxl_models",
            "weight_name": "ip-adapter.safetensors", "image_encoder_folder": "models/image_encoder"}  # fmt: skip


class Withholding(Method):
    """The stock pipeline; groups whose ids fit a pattern end without images."""

    title, version = "withholding", 1

    def __init__(self, name, withhold):
        self.name, self.withhold = name, dict(withhold)

    def settings(self):
        return {"withhold": self.withhold}

    def generate(self, pipe, group, call):
        status = next((status for pattern, status in self.withhold.items() if fnmatch(group.id, pattern)), None)
        if status is None:
            return super().generate(pipe, group, call)
        return GroupResult(
            None, {"asked": 1}, withheld=Withheld(status, f"<{group.category}> is protected", ("C1", "C3"))
        )
