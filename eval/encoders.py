"""Image and text to embedding vectors, and a cache so that no image is embedded twice.

Every encoder takes uint8 RGB images [3, H, W] and owns what follows: resize, range, normalisation. Its
embeddings are float32, of length 1, on the CPU, and do not depend on what else is in the batch (but for float
rounding). Models are loaded at the first use, so that an encoder's `id` can be asked without loading
anything.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from eval.images import ManifestRow, content_hash, load_image

# Images a file of the cache: what a killed run loses at most.
IMAGES_PER_SHARD = 512
TEXTS_PER_BATCH = 256
# Part of the cache's path: raise it when load_image or the layout changes what is stored.
CACHE_VERSION = "v1"


class Encoder(ABC):
    """An image encoder, perhaps with a text tower.

    Attributes:
        name: for people, as printed in tables.
        id: identity for caches and result files: it changes when the weights do.
    """

    name: str
    id: str

    @abstractmethod
    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embed a batch of images.

        Args:
            images: N uint8 tensors [3, H, W], RGB in [0, 255]; sizes may differ.

        Returns:
            float32 [N, D], each row of length 1.
        """

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts into the images' space: float32 [N, D], each row of length 1; too long ones are cut."""
        raise TypeError(f"expected an encoder with a text tower, got {self.name}; use a CLIP model")

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Count the texts that are longer than the text tower reads and lose their end in `embed_texts`."""
        raise TypeError(f"expected an encoder with a text tower, got {self.name}; use a CLIP model")

    def prepare(self) -> None:  # noqa: B027  (an encoder without weights has nothing to do)
        """Load the weights now, so that a missing file is found before any work is done."""


class PixelEncoder(Encoder):
    """The image itself, averaged down to a few pixels: for tests and smoke runs, not a perceptual measure.

    Args:
        size: side of the averaged image in pixels, >= 1.
    """

    def __init__(self, size: int = 8) -> None:
        if size < 1:
            raise ValueError(f"expected a size of at least 1 pixel, got {size}; 8 is usual")
        self.size = size
        self.name = f"pixels {size}x{size}"
        self.id = f"pixels-{size}x{size}"

    def embed_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embed by area averaging; see `Encoder.embed_images`."""
        small = [F.adaptive_avg_pool2d(_checked(image).float() / 255, self.size).flatten() for image in images]
        # The constant gives a black image a direction, too.
        return F.normalize(torch.stack([torch.cat([pixels, torch.ones(1)]) for pixels in small]), dim=-1)


class HFClip(Encoder):
    """A CLIP model of transformers in a local folder (config.json, model.safetensors, tokenizer, image
    processor).

        Resize, crop and normalisation are those of the folder's `preprocessor_config.json`. Computed in float32.

        Args:
            folder: what `CLIPModel.save_pretrained`, the tokenizer's and the image processor's wrote.
            name: for tables; the folder's name if not given.
            device: where the model runs.
    """

    def __init__(self, folder: str | Path, name: str | None = None, device: str = "cpu") -> None:
        self.folder = Path(folder)
        self.device = torch.device(device)
        self.name = name or self.folder.name
        needed = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json")
        missing = [file for file in needed if not (self.folder / file).is_file()]
        if missing:
            raise FileNotFoundError(
                f"expected a CLIP model's folder at {self.folder}, got one without {', '.join(missing)}; "
                "put the model there or give another folder"
            )

    @cached_property
    def id(self) -> str:
        """Name and 12 digits of a SHA-256 of weights, tokenizer and preprocessing: each changes what is embedded."""
        digest = hashlib.sha256()
        for file in sorted(path for path in self.folder.iterdir() if path.suffix in (".json", ".safetensors", ".txt")):
            digest.update(f"{file.name} {content_hash(file)}\n".encode())
        return f"{self.name}-{digest.hexdigest()[:12]}"

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
        from transformers.utils import logging as hf_logging

        shown = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()  # a bar for a model that loads in a moment only hides the real ones
        try:
            model = CLIPModel.from_pretrained(self.folder, local_files_only=True)
        finally:
            if shown:
                hf_logging.enable_progress_bar()
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
            [_checked(image) for image in images], return_tensors="pt", input_data_format="channels_first"
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
    """A CLIP model of open_clip, with the resize and normalisation that belong to its weights. Computed in
    float32.

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
        self._file: Path | None = None
        self.tag: str | None = pretrained
        if Path(pretrained).suffix in (".pt", ".pth", ".bin", ".safetensors"):
            self._file, self.tag = Path(pretrained), None
            if not self._file.is_file():
                raise FileNotFoundError(
                    f"expected weights of {architecture} at {self._file}, got no file; put them there or name a tag"
                )
        elif weights_dir is not None:
            self._file = self._find_in(Path(weights_dir))
        self.name = name or f"OpenCLIP {architecture} {self.tag or Path(pretrained).stem}"

    def _find_in(self, folder: Path) -> Path:
        stem = f"{self.architecture}-{self.tag}"
        names = [f"{stem}.safetensors", f"{stem}.pt", f"{stem}.bin", *_HUB_NAMES]
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise FileNotFoundError(
            f"expected weights of {self.architecture} ({self.tag}) in {folder}, got none of "
            f"{', '.join(names)}; put one of them there{_where_from(self.architecture, self.tag)}"
        )

    @cached_property
    def id(self) -> str:
        """Architecture and tag; with a local file, also the first 12 digits of its SHA-256."""
        parts = ["open_clip", self.architecture, self.tag, self._file and content_hash(self._file)[:12]]
        return "-".join(part for part in parts if part)

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        if open_clip.get_model_config(self.architecture) is None:
            raise ValueError(
                f"expected an architecture of open_clip, got {self.architecture!r}; open_clip.list_models() has them"
            )
        facts = dict(open_clip.get_pretrained_cfg(self.architecture, self.tag) or {}) if self.tag else {}
        preprocessing = ("mean", "std", "interpolation", "resize_mode")
        model = open_clip.create_model(
            self.architecture,
            pretrained=str(self._file or _find_cached(self.architecture, self.tag, facts)),
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
        pixels = torch.stack([transform(to_pil_image(_checked(image))) for image in images])
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


_HUB_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def _find_cached(architecture: str, tag: str, facts: Mapping[str, Any]) -> Path:
    """Find the weights of a tag in the usual caches, or download them if the network answers quickly."""
    import open_clip
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if not facts:
        raise ValueError(
            f"expected a tag of weights for {architecture}, got {tag!r}; "
            f"open_clip knows {', '.join(open_clip.list_pretrained_tags_by_model(architecture)) or 'none'}"
        )
    repository, name = os.path.split(facts.get("hf_hub", ""))
    names = [name] if name else list(_HUB_NAMES)
    if repository:
        for name in names:
            found = try_to_load_from_cache(repository, name)
            if isinstance(found, str):
                return Path(found)
    else:
        found = Path("~/.cache/clip").expanduser() / os.path.basename(facts["url"])
        if found.is_file():
            return found
    reason = "the network is switched off or does not answer"
    if network_answers(None if repository else facts["url"]):
        for name in names if repository else [""]:
            try:
                return Path(hf_hub_download(repository, name) if name else open_clip.download_pretrained(dict(facts)))
            except Exception as error:  # the kind of exception depends on the HTTP library of the installed version
                reason = str(error)
    wanted = names[0] if repository else found.name
    raise FileNotFoundError(
        f"expected weights of {architecture} ({tag}), got none in the cache and no download ({reason}); "
        f"put {wanted} into a folder as {architecture}-{tag}{os.path.splitext(wanted)[1]} and give the folder as "
        f"weights_dir{_where_from(architecture, tag)}"
    )


def _where_from(architecture: str, tag: str | None) -> str:
    import open_clip

    facts = open_clip.get_pretrained_cfg(architecture, tag) if tag else None
    if not facts:
        return ""
    repository = os.path.split(facts.get("hf_hub", ""))[0]
    return f" (from https://huggingface.co/{repository})" if repository else f" (from {facts['url']})"


def network_answers(url: str | None, timeout: float = 5.0) -> bool:
    """Ask once, shortly: the download libraries themselves retry for most of a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(url or constants.ENDPOINT, timeout=timeout)
    except Exception:  # the kind of exception depends on the HTTP library of the installed version
        return False
    return True


def _checked(image: torch.Tensor) -> torch.Tensor:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"expected uint8 images [3, H, W], got {image.dtype} {list(image.shape)}; read them with load_image"
        )
    return image


def _normalised(features: Any) -> torch.Tensor:
    # transformers 5 returns an output object where transformers 4 and open_clip return the tensor
    tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
    return F.normalize(tensor.float(), dim=-1).cpu()


def _batches(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class EmbeddingCache:
    """Embeddings on disk, by content hash and encoder id: renamed and repeated images are embedded once.

    Layout: `folder/v1/<encoder id>/<shard>.safetensors`, in each shard one tensor [D] an image, named by its
    hash. Shards are written once, under a name made of their keys, by an atomic rename, so several processes
    may share a cache.

    Args:
        folder: made when first needed; can be deleted at any time.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._shard_of: dict[str, dict[str, Path]] = {}
        self._read: dict[str, set[Path]] = {}
        self._hashes: dict[tuple[str, int, int], str] = {}

    def hash_of(self, path: str | Path) -> str:
        """Return `content_hash(path)`, remembered as long as the file's size and time of change stay."""
        status = os.stat(path)
        key = (os.path.abspath(path), status.st_size, status.st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = content_hash(path)
        return self._hashes[key]

    def get(self, encoder_id: str, hashes: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the embeddings [D] that are there, by content hash; absent ones are left out."""
        index = self._index(encoder_id)
        wanted: dict[Path, list[str]] = {}
        for key in dict.fromkeys(hashes):
            if key in index:
                wanted.setdefault(index[key], []).append(key)
        found = {}
        for shard, keys in wanted.items():
            with _open_shard(shard) as file:
                found.update({key: file.get_tensor(key) for key in keys})
        return found

    def put(self, encoder_id: str, embeddings: Mapping[str, torch.Tensor]) -> None:
        """Store embeddings [D] by content hash."""
        if not embeddings:
            return
        folder = self._folder_of(encoder_id)
        folder.mkdir(parents=True, exist_ok=True)
        keys = sorted(embeddings)
        shard = folder / f"{_digest(keys)}.safetensors"
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        os.close(handle)
        try:
            save_file({key: embeddings[key].float().contiguous().clone() for key in keys}, temporary)
            os.replace(temporary, shard)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _folder_of(self, encoder_id: str) -> Path:
        return self.folder / CACHE_VERSION / quote(encoder_id, safe=" ")

    def _index(self, encoder_id: str) -> dict[str, Path]:
        index = self._shard_of.setdefault(encoder_id, {})
        seen = self._read.setdefault(encoder_id, set())
        for shard in sorted(self._folder_of(encoder_id).glob("*.safetensors")):
            if shard not in seen:
                with _open_shard(shard) as file:
                    index.update(dict.fromkeys(file.keys(), shard))
                seen.add(shard)
        return index


def _digest(keys: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:24]


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"expected embeddings in {path}, got a damaged file ({error}); delete it") from error


def embed_folder(
    rows: Sequence[ManifestRow],
    folder: str | Path,
    encoder: Encoder,
    cache: EmbeddingCache | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> torch.Tensor:
    """Embed the images of a folder, taking from the cache what is there and adding what is not.

    Args:
        rows: which images, in which order.
        folder: what their paths are relative to.
        encoder: what embeds them.
        cache: where embeddings are kept; None computes all of them.
        batch_size: images a call of the encoder, >= 1; does not change the result.
        progress: show a bar with the time left, if anything has to be computed.

    Returns:
        float32 [N, D] in the order of `rows`.

    Raises:
        ValueError: an image cannot be read or its embedding is not finite; the message names it.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}; 32 is usual")
    if not rows:
        raise ValueError("expected at least one image to embed, got none; the folder's manifest is empty")
    paths = [Path(folder) / row.path for row in rows]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"expected {len(paths)} images in {folder}, got {len(missing)} missing, the first {missing[0]}; "
            "generate the run again"
        )
    hashes = [cache.hash_of(path) if cache else content_hash(path) for path in paths]
    found = cache.get(encoder.id, hashes) if cache else {}
    todo = [(key, path) for key, path in dict(zip(hashes, paths, strict=True)).items() if key not in found]
    fresh: dict[str, torch.Tensor] = {}
    with tqdm(total=len(todo), desc=f"embed ({encoder.name})", unit="image", disable=not (progress and todo)) as bar:
        for batch in _batches(todo, batch_size):
            embeddings = encoder.embed_images([load_image(path) for _, path in batch])
            for (key, path), embedding in zip(batch, embeddings, strict=True):
                if not torch.isfinite(embedding).all():
                    raise ValueError(
                        f"expected finite embeddings from {encoder.name}, got NaN or infinity for {path}; "
                        "check the image and the weights"
                    )
                fresh[key] = embedding
            if cache and len(fresh) >= IMAGES_PER_SHARD:
                cache.put(encoder.id, fresh)
                found.update(fresh)
                fresh = {}
            bar.update(len(batch))
    if cache:
        cache.put(encoder.id, fresh)
    found.update(fresh)
    return torch.stack([found[key] for key in hashes])
