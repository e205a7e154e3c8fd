"""CLIP models, which embed images and texts into one space, in float32."""

import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from eval.encoders import ImageNetwork, quiet_transformers
from eval.weights import FACTS, Download, WeightsFacts, hub_cache, in_hub_cache, missing_vocabulary

TEXTS_PER_BATCH = 256
# Names of the weights in open_clip's repositories, the preferred one first.
HUB_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


class Clip(ImageNetwork):
    """A CLIP model: an image encoder with a text tower."""

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        texts = list(texts)
        batches = [texts[start : start + TEXTS_PER_BATCH] for start in range(0, len(texts), TEXTS_PER_BATCH)]
        return torch.cat([F.normalize(self._text_features(batch).float(), dim=-1).cpu() for batch in batches])

    @abstractmethod
    def _text_features(self, texts: list[str]) -> torch.Tensor:
        """Return [N, D] for N texts."""

    @abstractmethod
    def count_truncated(self, texts: Sequence[str]) -> int:
        """Count the texts that `embed_texts` truncates."""


class HFClip(Clip):
    """A CLIP model of transformers in a local folder (config.json, model.safetensors, tokenizer, image processor).

    Resize, crop and normalisation are those of the folder's `preprocessor_config.json`.

    Args:
        folder: folder into which model, tokenizer and image processor were written by `save_pretrained`.
        name: name in tables and the beginning of the id; the folder's name by default.
    """

    ROW = "hf_clip"
    PLACE = "folder"
    path: Path

    def __init__(self, folder: str | Path, name: str | None = None, device: str = "cpu") -> None:
        name = name or Path(folder).name
        super().__init__(name, name, device, folder)

    def weights(self) -> WeightsFacts:
        needed = FACTS[self.ROW]["files"]
        missing = [file for file in needed if not (self.path / file).is_file()] + missing_vocabulary(self.path)
        files = [] if missing else [p for p in self.path.iterdir() if p.suffix in (".json", ".safetensors", ".txt")]
        wanted = ", ".join(missing or needed)
        return WeightsFacts.of(self.ROW, self.name, sorted(files), [self.path], wanted=wanted, folder=self.path)

    def _load(self, facts: WeightsFacts) -> tuple[Any, Any, Any]:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        with quiet_transformers():
            model = CLIPModel.from_pretrained(self.path, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        processor = CLIPImageProcessor.from_pretrained(self.path, local_files_only=True)
        return model.float().eval().to(self.device), tokenizer, processor

    @property
    def max_tokens(self) -> int:
        """The number of tokens that the text tower reads, including the start and end tokens."""
        model, tokenizer, _ = self._network
        return min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)

    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        return self._network[2](image, return_tensors="pt", input_data_format="channels_first")["pixel_values"][0]

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return _tensor(self._network[0].get_image_features(pixel_values=pixels))

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        model, tokenizer, _ = self._network
        # Padding to a fixed length makes an embedding independent of the other texts.
        tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        features = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return _tensor(features)

    def count_truncated(self, texts: Sequence[str]) -> int:
        tokenizer = self._network[1]
        return sum(len(tokenizer(text, verbose=False)["input_ids"]) > self.max_tokens for text in texts)


class OpenClip(Clip):
    """A CLIP model of open_clip, with the resize and normalisation that belong to its weights.

    Args:
        architecture: open_clip's name of the model, such as "ViT-B-32".
        pretrained: open_clip's tag of the weights, such as "openai", or the path of a weights file.
        weights_dir: folder with `<architecture>-<pretrained>.safetensors` (or .pt, .bin) or with a downloaded
            `open_clip_model.safetensors` or `open_clip_pytorch_model.bin`; the Hugging Face cache by default.
    """

    ROW = "open_clip"
    PLACE = "weights_dir"

    def __init__(
        self,
        architecture: str = "ViT-B-32",
        pretrained: str = "openai",
        weights_dir: str | Path | None = None,
        device: str = "cpu",
    ) -> None:
        self.architecture = architecture
        self.tag: str | None = pretrained
        # Paths of which one must exist; without such paths the weights come from the hub.
        self._paths: list[Path] = []
        if Path(pretrained).suffix in (".pt", ".pth", ".bin", ".safetensors"):
            self.tag, self._paths = None, [Path(pretrained).expanduser()]
        elif weights_dir is not None:
            names = [f"{architecture}-{pretrained}{suffix}" for suffix in (".safetensors", ".pt", ".bin")]
            self._paths = [Path(weights_dir).expanduser() / file for file in (*names, *HUB_NAMES)]
        slug = "-".join(part for part in ("open_clip", architecture, self.tag) if part)
        super().__init__(f"OpenCLIP {architecture} {self.tag or Path(pretrained).stem}", slug, device)

    def weights(self) -> WeightsFacts:
        """Describe the weights; raise ValueError if open_clip does not know the architecture or the tag."""
        published, repository, names = self._published()
        files = [path for path in self._paths if path.is_file()]
        files = files if self._paths else in_hub_cache(repository, names)
        return WeightsFacts.of(
            self.ROW,
            self.name,
            files[:1],
            self._paths or [hub_cache(repository)],
            bool(self._paths),
            wanted=" or ".join(names) + (f" of {repository}" if repository else ""),
            size=self._config["vision_cfg"]["image_size"],
            mean=published.get("mean") or "the architecture",
            licence="MIT" if self.tag == "openai" else "as the repository says",
            get=f"get {names[0]} from https://huggingface.co/{repository}, " if repository else "",
            name=f"{self.architecture}-{self.tag}{Path(names[0]).suffix}" if self.tag else names[0],
        )

    @cached_property
    def _config(self) -> dict[str, Any]:
        import open_clip

        config = open_clip.get_model_config(self.architecture)
        if config is None:
            raise ValueError(
                f"expected an architecture of open_clip, got {self.architecture!r}; open_clip.list_models() has them"
            )
        return config

    def _published(self) -> tuple[dict[str, Any], str, list[str]]:
        """Return open_clip's configuration of the tag, its repository ("" for none), and the names of its file."""
        import open_clip

        _ = self._config
        facts = dict(open_clip.get_pretrained_cfg(self.architecture, self.tag) or {}) if self.tag else {}
        repository, name = os.path.split(facts.get("hf_hub", ""))
        if not repository and not self._paths:
            raise ValueError(
                f"expected a tag of weights for {self.architecture}, got {self.tag!r}; open_clip knows "
                f"{', '.join(open_clip.list_pretrained_tags_by_model(self.architecture)) or 'none'}"
            )
        if name:
            return facts, repository, [name]
        return facts, repository, list(HUB_NAMES) if repository else [self._paths[0].name]

    def downloads(self, facts: WeightsFacts) -> list[Download]:
        if self._paths:
            return []
        _, repository, names = self._published()
        return [Download(repository, tuple(names), one_of=True)]

    def _fetch(self, facts: WeightsFacts) -> None:
        _, repository, names = self._published()
        for name in names:
            hub = None if self._paths else {"repo_id": repository, "allow_patterns": [name]}
            replace(facts, hub=hub, url=None).fetch()
            if self.weights().present:
                return

    def _load(self, facts: WeightsFacts) -> tuple[Any, Any, Any]:
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        published = self._published()[0]
        preprocessing = ("mean", "std", "interpolation", "resize_mode")
        model = open_clip.create_model(
            self.architecture,
            pretrained=str(facts.files[0]),
            # open_clip only warns if the weights need QuickGELU and the architecture lacks it.
            force_quick_gelu=bool(published.get("quick_gelu", False)),
            force_preprocess_cfg={key: published[key] for key in preprocessing if key in published},
        )
        transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
        return model.float().eval().to(self.device), open_clip.get_tokenizer(self.architecture), transform

    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        from torchvision.transforms.functional import to_pil_image

        return self._network[2](to_pil_image(image))

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._network[0].encode_image(pixels)

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        model, tokenizer, _ = self._network
        return model.encode_text(tokenizer(texts).to(self.device))

    def count_truncated(self, texts: Sequence[str]) -> int:
        model, tokenizer, _ = self._network
        # Some architectures use a tokenizer of transformers, which adds the two special tokens itself.
        inner = getattr(tokenizer, "tokenizer", None)
        lengths = (len(inner(text)["input_ids"]) if inner else len(tokenizer.encode(text)) + 2 for text in texts)
        return sum(length > model.context_length for length in lengths)


class HpsClip(OpenClip):
    """The CLIP model (ViT-H/14) of Human Preference Score v2.1 (Wu et al. 2023), which is the CLIPScore of this model.

    Images are padded, not cropped, as in the authors' package; that package computes in mixed precision.

    Args:
        file: path of the checkpoint; the Hugging Face cache by default.
    """

    ROW = "hps"
    PLACE = "file"
    ARCHITECTURE = "ViT-H-14"

    def __init__(self, file: str | Path | None = None, device: str = "cpu") -> None:
        super().__init__(self.ARCHITECTURE, device=device)
        self.name, self.slug = "HPS v2.1 (CLIP ViT-H/14)", "hps-v2.1"
        self._paths = [] if file is None else [Path(file).expanduser()]

    def _published(self) -> tuple[dict[str, Any], str, list[str]]:
        return {"resize_mode": "longest"}, FACTS[self.ROW]["repository"], FACTS[self.ROW]["files"]


def _tensor(features: Any) -> torch.Tensor:
    # transformers 5 returns an output object where transformers 4 returns the tensor
    return features if isinstance(features, torch.Tensor) else features.pooler_output
