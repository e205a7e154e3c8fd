"""Small folders of images, a CLIP model with random weights, and encoders whose embeddings a test writes down."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from eval.images import ManifestRow, read_manifest, write_manifest


def save_noise(path, seed, size=(16, 16)):
    """Save an RGB image of noise, given by its seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture(autouse=True)
def unpublished(monkeypatch):
    """Random weights may have published names, and each test tries a download again that failed in another."""
    monkeypatch.setattr("eval.weights.published_hash", lambda *_: "")
    monkeypatch.setattr("eval.encoders._failed", {})


@pytest.fixture
def make_run(tmp_path):
    """Return a function that writes a run folder: categories x prompts x groups x images of noise."""

    def make(name="run", categories=("bird", "fish"), seeds=(0, 1), images=4, offset=0):
        folder = tmp_path / name
        rows = []
        for category, seed, index in product(categories, seeds, range(images)):
            path, prompt = f"images/{category}/{seed:06d}/{index:02d}.png", f"a photo of a {category}"
            save_noise(folder / path, offset + len(rows))
            rows.append(ManifestRow(path, category, prompt, category, seed, index, 100 * seed + index))
        write_manifest(folder, rows)
        return folder

    return make


@pytest.fixture(scope="session")
def make_open_clip(tmp_path_factory):
    """Return a function that registers an architecture with open_clip and returns a random model of it."""

    def make(name, embed_dim):
        import open_clip

        file = tmp_path_factory.mktemp("open-clip") / f"{name}.json"
        config = {
            "embed_dim": embed_dim,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        }
        file.write_text(json.dumps(config))
        open_clip.add_model_config(file)
        torch.manual_seed(0)
        return open_clip.create_model(name)

    return make


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A CLIP folder as transformers writes it: random weights, a byte-level tokenizer made here."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder = tmp_path_factory.mktemp("tiny-clip")
    characters = list(bytes_to_unicode().values())
    pieces = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24)
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = {
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 24,
        "bos_token_id": len(vocabulary) - 2,
        "eos_token_id": len(vocabulary) - 1,
        "pad_token_id": len(vocabulary) - 1,
    }
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, **text}, vision_config={**tower, "image_size": 16, "patch_size": 4}, projection_dim=16
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scripted():
    """The class of an encoder whose embeddings a test writes down."""
    from eval.encoders import Encoder

    class Scripted(Encoder):
        """Gives the image whose red corner is i the i-th vector, and texts fixed vectors."""

        name, id = "scripted", "scripted-1"

        def __init__(self, vectors, texts=None):
            self.vectors = torch.as_tensor(vectors, dtype=torch.float32)
            self.texts = texts or {}

        def embed_images(self, images):
            return torch.nn.functional.normalize(self.vectors[[int(image[0, 0, 0]) for image in images]], dim=-1)

        def embed_texts(self, texts):
            return torch.tensor([self.texts[text] for text in texts], dtype=torch.float32)

        def count_truncated(self, texts):
            return sum(len(text) > 15 for text in texts)

    return Scripted


@pytest.fixture(scope="session")
def grouped():
    """Groups of a document with values, or counts of labels if a value is a list; one prompt and category each."""

    def make(values, prompts=None, categories=None):
        prompts = [f"p{index:03d}" for index in range(len(values))] if prompts is None else prompts
        groups = []
        for index, (value, prompt, category) in enumerate(zip(values, prompts, categories or prompts, strict=True)):
            group = {"group": f"{prompt}/{index:06d}", "category": category, "n_images": 4}
            if np.ndim(value):
                counts = {f"label{label}": int(count) for label, count in enumerate(value) if count}
                groups.append(group | {"n_images": int(sum(value)), "counts": counts})
            else:
                groups.append(group | {"value": float(value)})
        return groups

    return make


@pytest.fixture
def numbered_run(make_run):
    """Return a function that writes a run whose images are numbered by their red corner, in canonical order."""

    def make(**arguments):
        run = make_run(**arguments)
        for number, row in enumerate(read_manifest(run)):
            Image.fromarray(np.full((4, 4, 3), number, dtype=np.uint8)).save(run / row.path)
        return run

    return make
