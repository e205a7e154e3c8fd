"""Encoders without a text tower: perceptual and copy-detection embeddings, and the networks of FID-like numbers.

Weights are searched where the publishers' own code puts them, or at the path in the arguments.
"""

import importlib.util
import io
import json
import shutil
import sysconfig
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.fusion import fuse_conv_bn_eval

from eval.encoders import ImageNetwork, checked, quiet_transformers
from eval.weights import FACTS, Download, WeightsFacts


class Standardised(ImageNetwork):
    """A network whose images are resized with antialiasing, scaled to [0, 1] and standardised.

    Attributes:
        RESIZE: shortest side in pixels, interpolation, and side of the centre crop (None for no crop).
        MEAN, STD: of red, green and blue; those of ImageNet by default.
    """

    RESIZE: ClassVar[tuple[int, str, int | None]]
    MEAN: ClassVar = (0.485, 0.456, 0.406)
    STD: ClassVar = (0.229, 0.224, 0.225)

    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.MEAN, self.STD))
        return (_resized(image, *self.RESIZE).float() / 255 - mean) / std

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._network(pixels)


class DreamSim(ImageNetwork):
    """DreamSim (Fu et al. 2023): embeddings whose cosine distance was trained on human judgements of similarity.

    As in the package, images are squashed to 224 x 224 (bicubic), and 1 - cosine is the distance. All files are read as
    tensors only; the package would run code from a copy of facebookresearch/dino in the weights' folder.

    Args:
        dreamsim_type: "ensemble" (the published metric) or one of the cheaper single networks.
        weights_dir: folder with the unpacked checkpoint; `dreamsim` in torch.hub's folder by default.
    """

    ROW = "dreamsim"
    PLACE = "weights_dir"
    TYPES: ClassVar = FACTS[ROW]["types"]
    DINO = "checkpoints/dino_vitbase16_pretrain.pth"

    def __init__(
        self, dreamsim_type: str = "ensemble", weights_dir: str | Path | None = None, device: str = "cpu"
    ) -> None:
        if dreamsim_type not in self.TYPES:
            raise ValueError(f"expected a dreamsim_type among {sorted(self.TYPES)}, got {dreamsim_type!r}")
        super().__init__(f"DreamSim {dreamsim_type}", f"dreamsim-{dreamsim_type}", device, weights_dir)
        self.dreamsim_type = dreamsim_type

    def weights(self) -> WeightsFacts:
        folder, (*names, adapter) = self._folder, self.TYPES[self.dreamsim_type]
        suffix = "bin" if (folder / adapter / "adapter_model.bin").is_file() else "safetensors"
        names += [f"{adapter}/adapter_config.json", f"{adapter}/adapter_model.{suffix}"]
        dino = names[0].startswith("dino")
        names += [self.DINO] if dino else []
        missing = [name for name in names if not (folder / name).is_file()]
        return WeightsFacts.of(
            self.ROW,
            self.name,
            [] if missing else [folder / name for name in names],
            [folder],
            wanted=", ".join(missing or names),
            kind=self.dreamsim_type,
            folder=folder,
            besides=f"; besides, put {FACTS[self.ROW]['dino']} into its folder checkpoints" if dino else "",
        )

    @property
    def _folder(self) -> Path:
        return self.path or Path(torch.hub.get_dir()) / "dreamsim"

    def downloads(self, facts: WeightsFacts) -> list[Download]:
        wanted = facts.source.split(", ")
        dino = [Download(FACTS[self.ROW]["dino"])] if self.DINO in wanted else []
        return dino if wanted == [self.DINO] else [*dino, *super().downloads(facts)]

    def _fetch(self, facts: WeightsFacts) -> None:
        folder, archive = self._folder, self._folder / "pretrained.zip"
        for download in self.downloads(facts):
            if download.source != facts.url:
                facts.download(download.source, folder / self.DINO)
                continue
            facts.download(download.source, archive)
            try:
                shutil.unpack_archive(archive, folder)
            except (OSError, shutil.ReadError) as error:
                raise facts.missing(str(error)) from error
            finally:
                archive.unlink()

    def _load(self, facts: WeightsFacts) -> Any:
        from dreamsim import dreamsim

        for file in facts.files:
            # peft would import the module that this key names
            if file.name == "adapter_config.json" and json.loads(file.read_text()).get("megatron_config"):
                raise ValueError(f"{file} asks for other software than DreamSim's")
        (folder,) = facts.looked_in
        load, set_dir = torch.hub.load, torch.hub.set_dir
        try:
            torch.hub.load = lambda *_: self._dino(folder)  # the package's call would run code from the folder
            # The package would change torch.hub's folder for the whole process, and so for all other networks.
            torch.hub.set_dir = lambda d: None
            with redirect_stdout(io.StringIO()), warnings.catch_warnings():
                # The package wraps its network in peft twice, which causes a warning.
                warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
                warnings.filterwarnings("ignore", message=".*weight_norm` is deprecated", category=FutureWarning)
                return dreamsim(device=str(self.device), cache_dir=str(folder), dreamsim_type=self.dreamsim_type)
        finally:
            torch.hub.load, torch.hub.set_dir = load, set_dir

    def _dino(self, folder: Path) -> torch.nn.Module:
        """Return DINO's ViT-B/16, built by the code in DreamSim's package."""
        from dreamsim.feature_extraction.vision_transformer import vit_base

        network = vit_base(patch_size=16)
        network.load_state_dict(torch.load(folder / self.DINO, map_location="cpu", weights_only=True))
        return network

    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        from torchvision.transforms.functional import to_pil_image

        return self._network[1](to_pil_image(image))[0]

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._network[0].embed(pixels)


class DinoV2(Standardised):
    """DINOv2 (Oquab et al. 2023) of transformers: the class token after the last layer norm.

    Args:
        model: a Hugging Face repository, or a folder with config.json and model.safetensors. Images are always prepared
            as for the published models.
        revision: revision of the repository.
    """

    ROW = "dinov2"
    PLACE = "model"
    RESIZE = 256, "bicubic", 224

    def __init__(
        self, model: str | Path = "facebook/dinov2-base", revision: str | None = None, device: str = "cpu"
    ) -> None:
        model, slug = str(model), Path(model).name
        # a repository is OWNER/NAME; everything else is a path
        is_path = Path(model).is_dir() or model.startswith((".", "/", "~")) or model.count("/") != 1
        path = model if is_path else None
        super().__init__(f"DINOv2 ({slug})", slug, device, path, model=model, revision=revision)

    def _load(self, facts: WeightsFacts) -> Any:
        from transformers import AutoModel

        with quiet_transformers():
            model = AutoModel.from_pretrained(facts.files[0].parent, local_files_only=True)
        return model.float().eval().requires_grad_(False).to(self.device)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._network(pixel_values=pixels).last_hidden_state[:, 0]


class Sscd(Standardised):
    """SSCD (Pizzi et al. 2022), a descriptor for copy detection, on images prepared as its authors recommend.

    With `sscd_disc_mixup`, a cosine above 0.75 indicated a copy with a precision of 90 % on the authors' data.

    Args:
        file: a TorchScript file of the authors; `sscd_disc_mixup` in torch.hub's folder by default.
    """

    ROW = "sscd"
    PLACE = "file"
    RESIZE = 288, "bilinear", None

    def __init__(self, file: str | Path | None = None, device: str = "cpu") -> None:
        slug = Path(file or FACTS[self.ROW]["files"][0]).name.split(".")[0]
        super().__init__(f"SSCD ({slug})", slug, device, file)

    def _load(self, facts: WeightsFacts) -> Any:
        return torch.jit.load(facts.files[0], map_location=self.device).eval()


class Inception(ImageNetwork):
    """The Inception-v3 of FID, KID and Inception Score: TensorFlow's weights of 2015 in torch-fidelity's port.

    Features are the 2048 pooled activations, raw. The resize changes every number, so it is part of name and id:

    - `antialiased`: shortest side to 299, bilinear, antialiased, centre crop. Equals torchmetrics (1.8 and later) on
      square images.
    - `tensorflow`: squashed to 299 x 299 by TensorFlow 1's bilinear interpolation, not antialiased. Used by the
      original FID, by torch-fidelity and for most published numbers.
    - `clean`: squashed to 299 x 299, bicubic, antialiased, in floating point, as in clean-fid.
    - `released`: only the longer side (of a square, the height) resized to 256, centre crop of 256 x 256, then
      `tensorflow`. Used by the paper's evaluation script, which pins torchmetrics 1.4.0.post0.

    Args:
        weights: path of the weights; by default one of the two names that torch-fidelity, torchmetrics and pytorch-fid
            use in torch.hub's folder of checkpoints.
        resize: one of the above.
    """

    ROW = "inception"
    PLACE = "weights"
    dimension = 2048
    RESIZES: ClassVar = FACTS[ROW]["resizes"]
    normalised = False

    def __init__(self, weights: str | Path | None = None, resize: str = "antialiased", device: str = "cpu") -> None:
        if resize not in self.RESIZES:
            raise ValueError(f"expected a resize among {sorted(self.RESIZES)}, got {resize!r}")
        name = f"Inception-v3 of FID, resize {resize}"
        super().__init__(name, f"inception-{resize}", device, weights, resize=self.RESIZES[resize])
        self.resize = resize

    def _load(self, facts: WeightsFacts) -> Any:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity unpickles any object, so refuse a file that holds more than tensors first
        torch.load(facts.files[0], map_location="cpu", weights_only=True)
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(facts.files[0])).to(self.device)

    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        if self.resize == "released":  # rounds down to 8 bits, as the script does
            height, width = image.shape[1:]
            size = [height, 256] if height < width else [256, width]
            image = (_resized(image / 255, size, "bilinear", 256) * 255).byte()
        if self.resize in ("tensorflow", "released"):
            from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

            resize = interpolate_bilinear_2d_like_tensorflow1x
            pixels = resize(image[None].float(), size=(299, 299), align_corners=False)[0]
        elif self.resize == "clean":
            channels = [
                Image.fromarray(channel).resize((299, 299), Image.Resampling.BICUBIC)
                for channel in image.float().numpy()
            ]
            pixels = torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 255)
        else:
            pixels = _resized(image.float(), 299, "bilinear", 299)
        return (pixels - 128) / 128

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        # The network's `forward` resizes 8-bit images; its children are the layers in order, then the classifier.
        for layer in list(self._network.children())[:-1]:
            pixels = layer(pixels)
        return pixels.flatten(1)

    @torch.inference_mode()
    def logits_from_features(self, features: torch.Tensor) -> torch.Tensor:
        # the Inception Score uses 1008 classes without the bias
        return (features.to(self.device) @ self._network.fc.weight.T).cpu()


class TorchvisionInception(ImageNetwork):
    """torchvision's Inception-v3, trained on ImageNet: the network of the paper's Inception Score, not that of FID.

    Features are the 1000 logits. As in the paper's script, Pillow squashes images to 299 x 299; values are in [-1, 1].

    Args:
        weights: path of the weights; torchvision's file in torch.hub's folder of checkpoints by default.
    """

    ROW = "inception_torchvision"
    PLACE = "weights"
    dimension = 1000
    normalised = False

    def __init__(self, weights: str | Path | None = None, device: str = "cpu") -> None:
        super().__init__("Inception-v3 (ImageNet, torchvision)", "inception-torchvision", device, weights)

    def _load(self, facts: WeightsFacts) -> Any:
        from torchvision.models import inception_v3

        network = inception_v3(weights=None, init_weights=False)
        network.load_state_dict(torch.load(facts.files[0], map_location="cpu", weights_only=True))
        return network.eval().requires_grad_(False).to(self.device)

    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((299, 299), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 127.5 - 1

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._network(pixels)

    def logits_from_features(self, features: torch.Tensor) -> torch.Tensor:
        return features


class EffNetLite0(Standardised):
    """EfficientNet-lite0, trained on ImageNet, from a PyPI package. No published number uses it.

    Features are the 1280 pooled activations, raw. A single pass computes them and the features of all stages.

    Args:
        channels: channels of an earlier stage, among `STAGES`, whose averaged activations are used instead. With fewer
            features, fewer images suffice for a covariance; an earlier stage sees textures and parts, not objects.
    """

    ROW = "efficientnet"
    RESIZE = 224, "bicubic", 224
    # the values of TensorFlow's EfficientNet-lite
    MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
    # channels of each stage and the number of its last block
    STAGES: ClassVar = {16: 0, 24: 2, 40: 4, 80: 7, 112: 10, 192: 14, 320: 15}
    normalised = False

    def __init__(self, channels: int | None = None, device: str = "cpu") -> None:
        if channels is not None and channels not in self.STAGES:
            raise ValueError(f"expected the channels of a stage, {list(self.STAGES)}, or None, got {channels}")
        stage, suffix = ("", "") if channels is None else (f", stage of {channels} channels", f"-{channels}")
        super().__init__(f"EfficientNet-lite0 (ImageNet){stage}", f"efficientnet-lite0{suffix}", device)
        self.channels = channels
        width = 1280 if channels is None else channels
        start = sum(c for c in self.STAGES if c < width)
        self.columns = slice(start, start + width)
        self.dimension = width

    @cached_property
    def cache_id(self) -> str:
        return f"efficientnet-lite0-stages-{self.obtain().fingerprint}"

    def outputs(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the averaged activations of every stage, and the last 1280: float32 [N, 2064]."""
        return super().embed_images(images)

    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.outputs(images)[:, self.columns]

    def weights(self) -> WeightsFacts:
        file = Path(FACTS[self.ROW]["files"][0])
        spec = importlib.util.find_spec(file.parts[0])
        site = Path(spec.origin).parents[1] if spec and spec.origin else Path(sysconfig.get_path("purelib"))
        path = site / file
        return WeightsFacts.of(self.ROW, self.name, [path] if path.is_file() else [], [path], found=path.name)

    def _load(self, facts: WeightsFacts) -> Any:
        from efficientnet_lite_pytorch import EfficientNet

        model = EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(torch.load(facts.files[0], map_location="cpu", weights_only=True))
        model.eval().requires_grad_(False)
        # Folded normalisations and channels_last take two thirds of the time on a CPU and give the same function.
        for part in (model, *model._blocks):
            for (name, conv), (norm_name, norm) in pairwise([*part.named_children()]):
                if isinstance(norm, torch.nn.BatchNorm2d):
                    setattr(part, name, fuse_conv_bn_eval(conv, norm))
                    setattr(part, norm_name, torch.nn.Identity())
        return model.to(self.device, memory_format=torch.channels_last)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        stages, network = self._stages(pixels), self._network
        last = network._swish(network._bn1(network._conv_head(stages[-1])))
        return torch.cat([x.mean(dim=(2, 3)) for x in (*stages, last)], dim=1)

    def _stages(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Return the activations of each stage, [N, channels, h, w]."""
        x = self._network._swish(self._network._bn0(self._network._conv_stem(pixels)))
        outputs = [x := block(x) for block in self._network._blocks]
        return [outputs[block] for block in self.STAGES.values()]

    @torch.inference_mode()
    def layers(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the activations of every stage, raw float32 [N, channels, h, w], for uint8 images [3, H, W]."""
        pixels = torch.stack([self._preprocess(checked(image)) for image in images])
        return [x.cpu() for x in self._stages(pixels.to(self.device))]

    @torch.inference_mode()
    def logits_from_features(self, features: torch.Tensor) -> torch.Tensor:
        if self.channels is not None:
            raise TypeError(f"expected the last stage's features for a classifier, got {self.name}; leave channels out")
        return self._network._fc(features.to(self.device)).cpu()


def _resized(image: torch.Tensor, size: int | list[int], mode: str, crop: int | None) -> torch.Tensor:
    """Resize an image [3, H, W] with antialiasing to a shortest side or to (height, width), and crop its centre."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import center_crop, resize

    image = resize(image, size, interpolation=InterpolationMode(mode), antialias=True)
    return image if crop is None else center_crop(image, [crop, crop])
