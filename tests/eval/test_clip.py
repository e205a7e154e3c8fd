"""The CLIP encoders: real loading code on random weights."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.clip import HFClip, HpsClip, OpenClip
from eval.encoders import PixelEncoder
from eval.files import content_hash
from eval.weights import FACTS

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ARCHITECTURE = "tiny-for-tests"


def noise(n, size=(16, 16), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for _ in range(n)]


@pytest.fixture(scope="module")
def tiny_open_clip(make_open_clip):
    """A random model of an architecture that open_clip knows by the name `ARCHITECTURE`."""
    return make_open_clip(ARCHITECTURE, 16).eval()


@pytest.fixture(scope="module")
def weights_file(tiny_open_clip, tmp_path_factory):
    file = tmp_path_factory.mktemp("open-clip-weights") / "weights.pt"
    torch.save(tiny_open_clip.state_dict(), file)
    return str(file)


@pytest.fixture(scope="module", params=["hf", "open_clip"])
def clip(request, tiny_clip, weights_file):
    return HFClip(tiny_clip) if request.param == "hf" else OpenClip(ARCHITECTURE, weights_file)


def test_pixels_are_averages():
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    image[:, :, 2:] = 255
    expected = torch.tensor([0, 1, 0, 1] * 3 + [1.0])
    torch.testing.assert_close(PixelEncoder(2).embed_images([image])[0], expected / expected.norm())
    assert PixelEncoder().weights().present and PixelEncoder().weights().sha256 is None
    with pytest.raises(TypeError, match="text tower"):
        PixelEncoder().embed_texts(["a"])
    with pytest.raises(ValueError, match="at least 1 pixel"):
        PixelEncoder(0)


def test_images_and_texts_do_not_depend_on_their_batch(clip):
    images = [*noise(2), *noise(1, (20, 12), seed=1), torch.zeros(3, 16, 16, dtype=torch.uint8)]
    texts = ["a bird", "a much longer text", "x" * 200]
    for embed, inputs in ((clip.embed_images, images), (clip.embed_texts, texts)):
        together = embed(inputs)
        assert together.dtype == torch.float32 and together.shape == (len(inputs), 16) and clip.normalised
        torch.testing.assert_close(together.norm(dim=-1), torch.ones(len(inputs)))
        assert (together[0] - together[1]).abs().max() > 1e-4, "different inputs must differ"
        torch.testing.assert_close(torch.cat([embed([one]) for one in inputs]), together, atol=1e-5, rtol=0)
    for wrong in (torch.rand(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"uint8 images \[3, H, W\]"):
            clip.embed_images([wrong])
    with pytest.raises(TypeError, match="classifier"):
        clip.logits_from_features(torch.zeros(1, 3))


def test_long_texts_are_truncated_and_counted(clip):
    short, long = "a bird", "b c d e f g h i j k l m n o p q r s t u v w x y z"
    assert clip.count_truncated([short, long, short]) == 1
    # the truncated part has no effect; the rest has
    torch.testing.assert_close(clip.embed_texts([long]), clip.embed_texts([long + " and more"]), atol=1e-6, rtol=0)
    assert (clip.embed_texts([long]) - clip.embed_texts([long.replace("f", "z")])).abs().max() > 1e-5
    length = {"HFClip": 24, "OpenClip": 16}[type(clip).__name__] - 2
    assert [clip.count_truncated([" ".join("a" * n)]) for n in (length, length + 1)] == [0, 1]


def test_hf_clip_is_the_model_in_the_folder_in_float32(tiny_clip, tmp_path):
    from transformers import CLIPImageProcessor, CLIPModel

    (image,) = noise(1)
    pixels = CLIPImageProcessor.from_pretrained(tiny_clip)(image, return_tensors="pt")["pixel_values"]
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    with torch.no_grad():
        pooled = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0]
    (embedding,) = HFClip(tiny_clip).embed_images([image])
    torch.testing.assert_close(embedding, pooled / pooled.norm(), atol=1e-5, rtol=0)
    shutil.copytree(tiny_clip, tmp_path / "half")
    model.half().save_pretrained(tmp_path / "half")
    half = HFClip(tmp_path / "half")
    assert half.embed_images([image]).dtype == torch.float32
    torch.testing.assert_close(half.embed_images([image])[0], embedding, atol=0.02, rtol=0)
    assert half.id != HFClip(tiny_clip, name="half").id, "other weights, another id"


def test_hf_clips_id_is_of_the_folders_content(tiny_clip, tmp_path):
    encoder = HFClip(tiny_clip, name="mini-clip")
    facts = encoder.weights()
    assert facts.present and tiny_clip / "model.safetensors" in facts.files and HFClip(tiny_clip).name == tiny_clip.name
    assert encoder.name == "mini-clip" and re.fullmatch("mini-clip-[0-9a-f]{12}-[0-9a-f]{4}", encoder.id)
    assert encoder.id == f"mini-clip-{facts.fingerprint}" and facts.fingerprint.startswith(f"{facts.sha256[:12]}-")
    moved = shutil.copytree(tiny_clip, tmp_path / "moved")
    assert HFClip(moved, name="mini-clip").id == encoder.id
    preprocessing = moved / "preprocessor_config.json"
    preprocessing.write_text(preprocessing.read_text().replace("image_std", "image_std_"))
    assert HFClip(moved, name="mini-clip").id != encoder.id, "other preprocessing, other embeddings"
    (moved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"\(model\.safetensors\), got none at .*moved"):
        HFClip(moved).prepare()
    with pytest.raises(FileNotFoundError, match=r"config\.json, model\.safetensors.*nowhere"):
        HFClip(tmp_path / "nowhere").embed_texts(["a"])


def test_an_encoder_that_prepares_images_differently_has_another_id(tiny_clip, weights_file):
    """The weights are the same; no cached embedding may be reused."""
    for make in (lambda: HFClip(tiny_clip), lambda: OpenClip(ARCHITECTURE, weights_file)):
        encoder, facts = make(), make().weights()
        for change in ({"resize": "squashed"}, {"input_range": "[0, 255]"}):
            other, changed = make(), replace(facts, **change)
            other.weights = lambda changed=changed: changed
            assert other.id != encoder.id and other.id.rsplit("-", 1)[0] == encoder.id.rsplit("-", 1)[0]
        assert replace(facts, licence="another", how_to_get="elsewhere").fingerprint == facts.fingerprint


def test_open_clips_weights_come_from_a_file_a_folder_or_the_cache(weights_file, tmp_path, monkeypatch):
    shutil.copy(weights_file, tmp_path / f"{ARCHITECTURE}-mytag.pt")
    from_folder, from_file = OpenClip(ARCHITECTURE, "mytag", tmp_path), OpenClip(ARCHITECTURE, weights_file)
    from_folder.prepare()
    torch.testing.assert_close(from_folder.embed_images(noise(2)), from_file.embed_images(noise(2)), atol=1e-6, rtol=0)
    facts = from_file.weights()
    assert facts.files == (Path(weights_file),) and "32x32" in facts.resize
    assert from_folder.name == f"OpenCLIP {ARCHITECTURE} mytag"
    assert from_file.id == f"open_clip-{ARCHITECTURE}-{facts.fingerprint}"
    assert from_folder.id == f"open_clip-{ARCHITECTURE}-mytag-{facts.fingerprint}"
    assert facts.fingerprint.startswith(content_hash(weights_file)[:12])
    cached = tmp_path / "open_clip_model.safetensors"
    cached.write_bytes(b"weights")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(cached))
    published = OpenClip("ViT-B-32", "openai")
    facts = published.weights()
    assert facts.files == (cached,) and facts.licence == "MIT" and "224x224" in facts.resize
    assert published.id == f"open_clip-ViT-B-32-openai-{facts.fingerprint}"
    cached.write_bytes(b"other weights with the same tag")
    assert OpenClip("ViT-B-32", "openai").id != published.id


def test_open_clips_tag_decides_activation_and_preprocessing(monkeypatch, tmp_path):
    """Weights with the tag `openai` need QuickGELU, which open_clip's own ViT-B-32 does not have."""
    (tmp_path / "ViT-B-32-openai.pt").write_bytes(b"")
    arguments = {}

    def create_model(architecture, **options):
        arguments.update(options)
        raise StopIteration

    monkeypatch.setattr("open_clip.create_model", create_model)
    with pytest.raises(StopIteration):
        OpenClip("ViT-B-32", "openai", weights_dir=tmp_path).prepare()
    assert arguments["pretrained"] == str(tmp_path / "ViT-B-32-openai.pt") and arguments["force_quick_gelu"] is True
    assert arguments["force_preprocess_cfg"]["mean"] == pytest.approx(OPENAI_MEAN)
    with pytest.raises(ValueError, match="architecture of open_clip"):
        OpenClip("nothing", "openai", weights_dir=tmp_path).prepare()
    with pytest.raises(ValueError, match="openai"):
        OpenClip("ViT-B-32", "no-such-tag").prepare()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        OpenClip("ViT-B-32", str(tmp_path / "nowhere.pt")).prepare()


def test_open_clip_downloads_what_the_hub_has(monkeypatch):
    """It tries the safetensors file first, then the older name, and raises an error if there is neither."""
    requested, cached = [], []

    def download(repo_id, allow_patterns):
        requested.extend(allow_patterns)
        cached.extend(f"/cache/{name}" for name in allow_patterns if name in available)

    def create_model(_, pretrained, **__):
        raise StopIteration(pretrained)

    monkeypatch.setattr("eval.weights.network_failure", lambda _: None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: next(iter(cached), None))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("open_clip.create_model", create_model)
    available = ["open_clip_pytorch_model.bin"]
    with pytest.raises(StopIteration, match=r"/cache/open_clip_pytorch_model\.bin"):
        OpenClip("ViT-B-32", "openai").prepare()
    assert requested == ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    available = []
    cached.clear()
    with pytest.raises(FileNotFoundError, match=r"open_clip_pytorch_model\.bin of timm/.*a file is lacking"):
        OpenClip("ViT-B-32", "openai").prepare()


def test_hps_embeds_padded_images_and_halves_weights(tiny_open_clip, tmp_path, monkeypatch):
    import open_clip

    monkeypatch.setattr(HpsClip, "ARCHITECTURE", ARCHITECTURE)
    file = tmp_path / FACTS["hps"]["files"][0]
    halved = {name: tensor.half() for name, tensor in tiny_open_clip.state_dict().items()}
    torch.save({"state_dict": halved}, file)
    model = open_clip.create_model(ARCHITECTURE).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in halved.items()})
    images, pixels, texts = noise(2, (36, 48)), [], ["a photo of a bird", "a {red} fish"]
    for image in images:
        canvas = Image.new("RGB", (32, 32))
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        canvas.paste(picture.resize((32, 24), Image.Resampling.BICUBIC), (0, 4))
        pixels.append((np.asarray(canvas, dtype=np.float32) / 255 - OPENAI_MEAN) / OPENAI_STD)
    with torch.no_grad():
        x = model.encode_image(torch.tensor(np.stack(pixels), dtype=torch.float32).permute(0, 3, 1, 2))
        y = model.encode_text(open_clip.get_tokenizer(ARCHITECTURE)(texts))
    encoder = HpsClip(file)
    for embeddings, expected in ((encoder.embed_images(images), x), (encoder.embed_texts(texts), y)):
        torch.testing.assert_close(embeddings, torch.nn.functional.normalize(expected, dim=1), atol=1e-5, rtol=0)
    facts = encoder.weights()
    assert facts.files == (file,) and encoder.id == f"hps-v2.1-{facts.fingerprint}" and "padded" in facts.resize
