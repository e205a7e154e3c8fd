"""CLIP models: encoders of images and texts into one space. They and `eval.features` are all networks that embed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from eval.encoders import Encoder, checked, quiet_transformers
from eval.weights import NO_NETWORK, WeightsFacts, first_file, hub_cache, missing_vocabulary, network_answers

TEXTS_PER_BATCH = 256
_HUB_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


class HFClip(Encoder):
    """A CLIP model of transformers in a local folder (config.json, model.safetensors, tokenizer, image processor).

    Resize, crop and normalisation are those of the folder's `preprocessor_config.json`. Computed in float32.

    Args:
        folder: what `CLIPModel.save_pretrained`, the tokenizer's and the image processor's wrote.
        name: for tables; the folder's name if not given.
        device: where the model runs.
    """

    NEEDED = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json")

    def __init__(self, folder: str | Path, name: str | None = None, device: str = "cpu") -> None:
        self.folder = Path(folder)
        self.device = torch.device(device)
        self.name = name or self.folder.name

    @cached_property
    def id(self) -> str:
        """Name and fingerprint of weights, tokenizer and preprocessing: each changes what is embedded."""
        return f"{self.name}-{self._found().fingerprint}"

    def weights(self) -> WeightsFacts:
        """See `Encoder.weights`."""
        missing = self._missing()
        kept = () if missing else (p for p in self.folder.iterdir() if p.suffix in (".json", ".safetensors", ".txt"))
        return WeightsFacts(
            encoder=self.name,
            source=", ".join(missing or self.NEEDED),
            files=tuple(sorted(kept)),
            looked_in=(self.folder,),
            resize="as the folder's preprocessor_config.json says",
            input_range="as the folder's preprocessor_config.json says",
            licence="as the folder's README.md says",
            how_to_get=f"put a CLIP model as transformers saves it into {self.folder} or give another folder",
        )

    def _missing(self) -> list[str]:
        return [file for file in self.NEEDED if not (self.folder / file).is_file()] + missing_vocabulary(self.folder)

    def _found(self) -> WeightsFacts:
        facts = self.weights()
        if not facts.present:
            raise facts.missing()
        return facts

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        self._found()
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        try:
            with quiet_transformers():
                model = CLIPModel.from_pretrained(self.folder, local_files_only=True)
        except SafetensorError as error:
            raise ValueError(
                f"expected the weights of {self.name}, got a damaged file ({error}): fetch {self.folder} again"
            ) from error
        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        processor = CLIPImageProcessor.from_pretrained(self.folder, local_files_only=True)
        return model.float().eval().to(self.device), tokenizer, processor

    def prepare(self) -> None:
        """Load the model; see `Encoder.prepare`."""
        _ = self._parts

    @property
    def max_tokens(self) -> int:
        """How many tokens the text tower reads, those of start and end included."""
        model, tokenizer, _ = self._parts
        return min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embed images; see `Encoder.embed_images`."""
        model, _, processor = self._parts
        inputs = processor(
            [checked(image) for image in images], return_tensors="pt", input_data_format="channels_first"
        )
        return _normalised(model.get_image_features(pixel_values=inputs["pixel_values"].to(self.device)))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts; see `Encoder.embed_texts`."""
        model, tokenizer, _ = self._parts
        parts = []
        for batch in _batches(list(texts), TEXTS_PER_BATCH):
            # Padding to one fixed length keeps a text's embedding independent of its neighbours.
            tokens = tokenizer(
                batch, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
            )
            features = model.get_text_features(
                input_ids=tokens["input_ids"].to(self.device),
                attention_mask=tokens["attention_mask"].to(self.device),
            )
            parts.append(_normalised(features))
        return torch.cat(parts)

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Count texts that are cut; see `Encoder.count_truncated`."""
        tokenizer = self._parts[1]
        return sum(len(tokenizer(text, verbose=False)["input_ids"]) > self.max_tokens for text in texts)


class OpenClip(Encoder):
    """A CLIP model of open_clip, with the resize and normalisation that belong to its weights. Computed in float32.

    Weights are looked for, in this order: the file `pretrained` itself, if it is a path; `weights_dir`; the
    usual caches; the network. Without network it fails within seconds and says which file to put where.

    Args:
        architecture: open_clip's name of the model, e.g. "ViT-B-32".
        pretrained: open_clip's tag of the weights, e.g. "openai", or the path of a weights file.
        weights_dir: a folder with `<architecture>-<pretrained>.safetensors` (or .pt, .bin) or, as downloaded,
            `open_clip_model.safetensors` or `open_clip_pytorch_model.bin`.
        name: for tables.
        device: where the model runs.
    """

    def __init__(
        self,
        architecture: str = "ViT-B-32",
        pretrained: str = "openai",
        weights_dir: str | Path | None = None,
        name: str | None = None,
        device: str = "cpu",
    ) -> None:
        self.architecture = architecture
        self.device = torch.device(device)
        given = Path(pretrained).suffix in (".pt", ".pth", ".bin", ".safetensors")
        self.tag = None if given else pretrained
        # Where a file has to be, for want of which nothing is downloaded.
        self._places: list[Path] | None = None
        if given:
            self._places = [Path(pretrained)]
        elif weights_dir is not None:
            names = [f"{architecture}-{pretrained}{suffix}" for suffix in (".safetensors", ".pt", ".bin")]
            self._places = [Path(weights_dir) / file for file in (*names, *_HUB_NAMES)]
        self.name = name or f"OpenCLIP {architecture} {self.tag or Path(pretrained).stem}"

    @cached_property
    def id(self) -> str:
        """Architecture, tag and fingerprint of the weights, which are fetched if they are missing."""
        facts = replace(self.weights(), files=(self._obtain(),))
        return "-".join(part for part in ("open_clip", self.architecture, self.tag, facts.fingerprint) if part)

    def weights(self) -> WeightsFacts:
        """See `Encoder.weights`; weights that only open_clip's cache or the hub's has count as present.

        Raises:
            ValueError: open_clip knows no such architecture, or no such tag of it.
        """
        published, repository, names = self._published()
        if self._places:
            places, found = self._places, first_file(self._places)
        elif repository:
            places, found = [hub_cache(repository)], _in_cache(repository, names)
        else:
            places = [Path("~/.cache/clip").expanduser() / names[0]]
            found = first_file(places)
        size = self._config["vision_cfg"]["image_size"]
        source = f"https://huggingface.co/{repository}" if repository else published.get("url")
        wanted = f"{self.architecture}-{self.tag}{os.path.splitext(names[0])[1]}" if self.tag else self._places[0].name
        return WeightsFacts(
            encoder=self.name,
            source=" or ".join(names) + (f" of {repository}" if repository else ""),
            files=(found,) if found else (),
            looked_in=tuple(places),
            resize=f"shortest side to {size}, bicubic, antialiased, centre crop {size}x{size}",
            input_range=f"[0, 1], less the mean, over the deviation of {published.get('mean') or 'the architecture'}",
            licence="MIT" if self.tag == "openai" else "as the repository says",
            how_to_get=(f"get {names[0]} from {source}, " if source else "")
            + (
                f"put it there as {wanted}"
                if self._places
                else f"put it into a folder as {wanted} and give the folder as weights_dir"
            ),
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
        """Return open_clip's facts of the tag, its repository if there is one, and the names of its file."""
        import open_clip

        _ = self._config
        facts = dict(open_clip.get_pretrained_cfg(self.architecture, self.tag) or {}) if self.tag else {}
        if not facts and not self._places:
            raise ValueError(
                f"expected a tag of weights for {self.architecture}, got {self.tag!r}; open_clip knows "
                f"{', '.join(open_clip.list_pretrained_tags_by_model(self.architecture)) or 'none'}"
            )
        repository, name = os.path.split(facts.get("hf_hub", ""))
        if repository:
            return facts, repository, [name] if name else list(_HUB_NAMES)
        return facts, "", [os.path.basename(facts["url"])] if facts else [self._places[0].name]

    def _obtain(self) -> Path:
        """Find the weights, or download them if the network answers quickly."""
        import open_clip
        from huggingface_hub import hf_hub_download

        facts = self.weights()
        if facts.files:
            return facts.files[0]
        if self._places:
            raise facts.missing()
        published, repository, names = self._published()
        reason = NO_NETWORK
        if network_answers(None if repository else published["url"]):
            for name in names:
                try:
                    return Path(
                        hf_hub_download(repository, name) if repository else open_clip.download_pretrained(published)
                    )
                except Exception as error:  # the kind of exception depends on the installed version's HTTP library
                    reason = str(error)
        raise facts.missing(reason)

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        facts = self._published()[0]
        preprocessing = ("mean", "std", "interpolation", "resize_mode")
        model = open_clip.create_model(
            self.architecture,
            pretrained=str(self._obtain()),
            # open_clip only warns when weights need QuickGELU and the architecture lacks it: wrong numbers.
            force_quick_gelu=bool(facts.get("quick_gelu", False)),
            force_preprocess_cfg={key: facts[key] for key in preprocessing if key in facts},
        )
        transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
        return model.float().eval().to(self.device), open_clip.get_tokenizer(self.architecture), transform

    def prepare(self) -> None:
        """Load the model; see `Encoder.prepare`."""
        _ = self._parts

    @torch.inference_mode()
    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embed images; see `Encoder.embed_images`."""
        from torchvision.transforms.functional import to_pil_image

        model, _, transform = self._parts
        pixels = torch.stack([transform(to_pil_image(checked(image))) for image in images])
        return _normalised(model.encode_image(pixels.to(self.device)))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts; see `Encoder.embed_texts`."""
        model, tokenizer, _ = self._parts
        batches = _batches(list(texts), TEXTS_PER_BATCH)
        return torch.cat([_normalised(model.encode_text(tokenizer(batch).to(self.device))) for batch in batches])

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Count texts that are cut; see `Encoder.count_truncated`."""
        model, tokenizer, _ = self._parts
        # Some architectures bring a tokenizer of transformers, which adds the two special tokens by itself.
        inner = getattr(tokenizer, "tokenizer", None)
        lengths = (len(inner(text)["input_ids"]) if inner else len(tokenizer.encode(text)) + 2 for text in texts)
        return sum(length > model.context_length for length in lengths)


def _in_cache(repository: str, names: Sequence[str]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, name) for name in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _normalised(features: Any) -> torch.Tensor:
    # transformers 5 returns an output object where transformers 4 and open_clip return the tensor
    tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
    return F.normalize(tensor.float(), dim=-1).cpu()


def _batches(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
