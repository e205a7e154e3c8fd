"""The Human Preference Score: its real loading code on random weights, laid down in the real format and place."""

import time

import numpy as np
import pytest
import torch
from PIL import Image

from eval.alignment import ClipScore
from eval.clip import HpsClip
from eval.images import ManifestRow, load_image, read_manifest, write_manifest
from eval.metric import is_current, measure
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
    """A small architecture of open_clip; -> its name, the model."""
    return "tiny-for-preference", make_open_clip("tiny-for-preference", 32).eval()


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


@pytest.fixture
def empty_caches(tmp_path, monkeypatch):
    from huggingface_hub import constants, file_download

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for module in (constants, file_download):
        if hasattr(module, "HF_HUB_CACHE"):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("given", [True, False])
def test_missing_weights_fail_at_once_and_say_what_to_do(given, empty_caches, run, tmp_path):
    metric = ClipScore(HpsClip(tmp_path / "mine" if given else None))
    facts = metric.encoder.weights()
    assert not facts.present and facts.encoder == metric.encoder.name
    for ask in (metric.prepare, lambda: metric.encoder.id, lambda: measure(metric, run)):
        begin = time.monotonic()
        with pytest.raises(FileNotFoundError, match=r"HPS_v2\.1_compressed\.pt") as error:
            ask()
        assert time.monotonic() - begin < 5
        assert str(tmp_path / "mine" if given else tmp_path) in str(error.value)
        assert ("no download" in str(error.value)) is not given
