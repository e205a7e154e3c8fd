"""Aesthetic and HPS scores: their real loading code on random weights, laid down in the real format and place."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image

from eval.alignment import ClipScore
from eval.clip import HpsClip
from eval.images import ManifestRow, load_image, read_manifest, write_manifest
from eval.measure import is_current, measure
from eval.preference import AestheticPredictor, AestheticScore
from eval.weights import FACTS

PROMPTS = {"bird": "a photo of a bird", "fish": "a {red} fish"}
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture
def run(tmp_path):
    """Two groups of three images, of two sizes."""
    folder, rows = tmp_path / "run", []
    for category, prompt in PROMPTS.items():
        for index in range(3):
            path = folder / category / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng(len(rows))
            picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            picture.resize((48, 40 if index else 48), Image.Resampling.BILINEAR).save(path)
            rows.append(ManifestRow(f"{category}/{index}.png", category, prompt, category, 0, index, index))
    write_manifest(folder, rows)
    return folder


def loaded(run):
    rows = read_manifest(run)
    return [load_image(run / row.path) for row in rows], [row.prompt for row in rows]


def assert_means_of_groups(document, scores):
    """The document's groups are the means of three scores each, and its value the mean of those."""
    means = torch.as_tensor(scores).double().reshape(2, 3).mean(dim=1).tolist()
    assert [group["group"] for group in document["groups"]] == ["bird/000000", "fish/000000"]
    assert [group["value"] for group in document["groups"]] == pytest.approx(means, rel=1e-4)
    assert document["value"] == pytest.approx(sum(means) / 2, rel=1e-4)
    assert abs(means[0] - means[1]) > 1e-4 * abs(means[0]), "different images must differ"


@pytest.fixture(scope="module")
def tiny_clip(make_open_clip):
    """An architecture of open_clip, small but for the 768 dimensions of its embedding; -> its name, the model."""
    return "tiny-for-preference", make_open_clip("tiny-for-preference", 768).eval()


# --- LAION's aesthetic predictor -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head():
    """The published file's network, as its training script has it."""
    torch.manual_seed(1)
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    layers = [linear(768, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64), dropout(0.1)]
    return torch.nn.ModuleDict({"layers": torch.nn.Sequential(*layers, linear(64, 16), linear(16, 1))}).eval()


@pytest.fixture
def aesthetic(tiny_clip, head, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(AestheticPredictor, "ARCHITECTURE", tiny_clip[0])
    file = tmp_path / "torch" / "hub" / "checkpoints" / FACTS["aesthetic"]["files"][0]
    file.parent.mkdir(parents=True)
    torch.save(head.state_dict(), file)
    torch.save(tiny_clip[1].state_dict(), tmp_path / f"{tiny_clip[0]}-openai.pt")
    return file


def test_aesthetic_is_the_published_network_on_the_embedding_of_length_1(aesthetic, head, run, tmp_path):
    metric = AestheticScore(weights_dir=tmp_path)
    assert list(head.state_dict()) == [f"layers.{n}.{part}" for n in (0, 2, 4, 6, 7) for part in ("weight", "bias")]
    embeddings = metric.judge.clip.embed_images(loaded(run)[0])
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(6))
    with torch.no_grad():
        expected = head["layers"](embeddings)[:, 0]
    torch.testing.assert_close(metric.judge.score(embeddings), expected)
    document = measure(metric, run)
    assert_means_of_groups(document, expected)
    assert document["encoder"]["name"] == "LAION aesthetic predictor v2 (CLIP ViT-L/14)"
    assert is_current(document, metric, run)


def test_aesthetic_is_identified_by_both_files(aesthetic, head, tmp_path):
    predictor = AestheticPredictor(weights_dir=tmp_path)
    torch.save({name: tensor + 0.01 for name, tensor in head.state_dict().items()}, tmp_path / "other.pth")
    other = AestheticPredictor(tmp_path / "other.pth", tmp_path)
    assert other.id != predictor.id and predictor.clip.id in predictor.id
    next(tmp_path.glob("*-openai.pt")).unlink()
    with pytest.raises(FileNotFoundError, match=r"openai\.safetensors"):
        AestheticPredictor(weights_dir=tmp_path).prepare()


def test_aesthetic_refuses_other_files(aesthetic, head, tmp_path):
    for content, problem in (
        ({"layers.0.weight": torch.zeros(1024, 768)}, "cannot be loaded"),
        ({name: tensor[..., :-1] for name, tensor in head.state_dict().items()}, "cannot be loaded"),
        (head, "not a file of tensors alone"),
        ([1], "cannot be loaded"),
    ):
        torch.save(content, aesthetic)
        with pytest.raises(ValueError, match=rf"{problem}.*put the file of https://github\.com"):
            AestheticPredictor(weights_dir=tmp_path).prepare()


# --- Human Preference Score ------------------------------------------------------------------------------------------


@pytest.fixture
def hps_file(tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(HpsClip, "ARCHITECTURE", tiny_clip[0])
    file = tmp_path / "weights" / FACTS["hps"]["files"][0]
    file.parent.mkdir()
    halves = {name: tensor.half() for name, tensor in tiny_clip[1].state_dict().items()}
    torch.save({"state_dict": halves}, file)
    return file


def test_hps_is_100_cosines_of_padded_images(hps_file, tiny_clip, run):
    import open_clip

    images, texts = loaded(run)
    name, model = tiny_clip
    halved = open_clip.create_model(name).eval()
    halved.load_state_dict({key: tensor.half().float() for key, tensor in model.state_dict().items()})
    pixels = []
    for image in images:
        canvas = Image.new("RGB", (32, 32))
        small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32, round(32 * image.shape[1] / 48)), 3)
        canvas.paste(small, (0, (32 - small.height) // 2))
        pixels.append((np.asarray(canvas, dtype=np.float32) / 255 - OPENAI_MEAN) / OPENAI_STD)
    with torch.no_grad():
        x = halved.encode_image(torch.tensor(np.stack(pixels), dtype=torch.float32).permute(0, 3, 1, 2))
        y = halved.encode_text(open_clip.get_tokenizer(name)(texts))
    cosines = torch.nn.functional.cosine_similarity(x.double(), y.double())
    metric = ClipScore(HpsClip(hps_file), "hps_v2_1")
    document = measure(metric, run)
    assert (cosines > 0).any()
    assert_means_of_groups(document, 100 * cosines.clamp(min=0))
    assert document["details"] == {"n_prompts": 2, "n_prompts_truncated": 0}
    assert document["metric"] == "hps_v2_1" and is_current(document, metric, run)


def test_hps_names_its_file(hps_file, tmp_path):
    encoder = HpsClip(hps_file)
    facts = encoder.weights()
    assert facts.files == (hps_file,) and encoder.id == f"hps-v2.1-{facts.fingerprint}"
    assert "padded" in facts.resize and facts.licence == "Apache-2.0"


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_caches(tmp_path, monkeypatch):
    from huggingface_hub import constants, file_download

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for module in (constants, file_download):
        if hasattr(module, "HF_HUB_CACHE"):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (AestheticScore, r"sac\+logos\+ava1-l14-linearMSE\.pth"),
        (lambda *file: ClipScore(HpsClip(*file)), r"HPS_v2\.1_compressed\.pt"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_missing_weights_fail_at_once_and_say_what_to_do(make, wanted, given, empty_caches, run, tmp_path):
    metric = make(tmp_path / "mine") if given else make()
    facts = metric.judge.weights()
    assert not facts.present and facts.encoder == metric.judge.name
    assert facts.resize and facts.input_range and facts.licence
    for ask in (metric.prepare, lambda: metric.judge.id, lambda: measure(metric, run)):
        begin = time.monotonic()
        with pytest.raises(FileNotFoundError, match=wanted) as error:
            ask()
        assert time.monotonic() - begin < 5
        assert str(tmp_path / "mine" if given else tmp_path) in str(error.value)
        assert ("no download" in str(error.value)) is not given
