"""The CLIP encoders on real loading code with random weights."""

import hashlib
import re
import shutil
from dataclasses import replace

import pytest
import torch

from eval.clip import HFClip, OpenClip
from eval.encoders import PixelEncoder


def noise(n, size=(16, 16), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for _ in range(n)]


@pytest.fixture(scope="module")
def tiny_open_clip(make_open_clip, tmp_path_factory):
    """An architecture of open_clip, and random weights for it; -> (architecture, weights file)."""
    file = tmp_path_factory.mktemp("open-clip-weights") / "weights.pt"
    torch.save(make_open_clip("tiny-for-tests", 16).state_dict(), file)
    return "tiny-for-tests", file


@pytest.fixture(scope="module", params=["pixels", "hf", "open_clip"])
def encoder(request, tiny_clip):
    if request.param == "pixels":
        return PixelEncoder()
    if request.param == "hf":
        return HFClip(tiny_clip)
    architecture, weights = request.getfixturevalue("tiny_open_clip")
    return OpenClip(architecture, str(weights))


@pytest.fixture(scope="module", params=["hf", "open_clip"])
def clip(request, tiny_clip):
    if request.param == "hf":
        return HFClip(tiny_clip)
    architecture, weights = request.getfixturevalue("tiny_open_clip")
    return OpenClip(architecture, str(weights))


def test_images_do_not_depend_on_their_batch(encoder):
    images = [*noise(3), *noise(2, (20, 12), seed=1)]
    together = encoder.embed_images(images)
    assert together.dtype == torch.float32
    assert len(together) == 5
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(5))
    assert (together[0] - together[1]).abs().max() > 1e-4, "different images must differ"
    alone = torch.cat([encoder.embed_images([image]) for image in images])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_black_image_has_an_embedding(encoder):
    assert torch.isfinite(encoder.embed_images([torch.zeros(3, 16, 16, dtype=torch.uint8)])).all()


@pytest.mark.parametrize(
    "wrong", [torch.rand(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8)]
)
def test_only_uint8_rgb_is_accepted(encoder, wrong):
    with pytest.raises(ValueError, match=r"uint8 images \[3, H, W\]"):
        encoder.embed_images([wrong])


def test_texts_do_not_depend_on_their_batch(clip):
    texts = ["a bird", "a much longer text", "x" * 200]
    together = clip.embed_texts(texts)
    assert together.shape == (3, 16)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(torch.cat([clip.embed_texts([text]) for text in texts]), together, atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-4, "different texts must differ"


def test_long_texts_are_cut_and_counted(clip):
    short, long = "a bird", "b c d e f g h i j k l m n o p q r s t u v w x y z"
    assert clip.count_truncated([short, long, short]) == 1
    # what is cut off has no effect; what is kept has
    torch.testing.assert_close(clip.embed_texts([long]), clip.embed_texts([long + " and more"]), atol=1e-6, rtol=0)
    assert (clip.embed_texts([long]) - clip.embed_texts([long.replace("f", "z")])).abs().max() > 1e-5


def test_text_of_exactly_the_length_is_not_cut(clip):
    length = {"HFClip": 24, "OpenClip": 16}[type(clip).__name__] - 2
    assert clip.count_truncated([" ".join("a" * length)]) == 0
    assert clip.count_truncated([" ".join("a" * (length + 1))]) == 1


def test_hf_clip_is_the_model_in_the_folder(tiny_clip):
    """Its embeddings are those of transformers' own model on the processor's pixels."""
    from transformers import CLIPImageProcessor, CLIPModel

    image = noise(1, (16, 16))[0]
    pixels = CLIPImageProcessor.from_pretrained(tiny_clip)(image, return_tensors="pt")["pixel_values"]
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    with torch.no_grad():
        pooled = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    expected = pooled[0] / pooled[0].norm()
    torch.testing.assert_close(HFClip(tiny_clip).embed_images([image])[0], expected, atol=1e-5, rtol=0)


def test_hf_clip_loads_half_precision_weights_as_float32(tiny_clip, tmp_path):
    from transformers import CLIPModel

    shutil.copytree(tiny_clip, tmp_path / "half")
    CLIPModel.from_pretrained(tiny_clip).half().save_pretrained(tmp_path / "half")
    images = noise(2)
    half = HFClip(tmp_path / "half")
    assert half.embed_images(images).dtype == torch.float32
    torch.testing.assert_close(half.embed_images(images), HFClip(tiny_clip).embed_images(images), atol=0.02, rtol=0)
    assert half.id != HFClip(tiny_clip, name="half").id, "other weights, other id"


def test_hf_clip_id_and_name(tiny_clip, tmp_path):
    encoder = HFClip(tiny_clip, name="mini-clip")
    assert encoder.name == "mini-clip" and re.fullmatch("mini-clip-[0-9a-f]{12}-[0-9a-f]{4}", encoder.id)
    assert HFClip(tiny_clip).name == tiny_clip.name
    moved = tmp_path / "moved"
    shutil.copytree(tiny_clip, moved)
    assert HFClip(moved, name="mini-clip").id == encoder.id, "the content counts, not the place"
    preprocessing = moved / "preprocessor_config.json"
    preprocessing.write_text(preprocessing.read_text().replace("image_std", "image_std_"))
    assert HFClip(moved, name="mini-clip").id != encoder.id, "other preprocessing, other embeddings"


def test_hf_clip_names_what_is_missing(tiny_clip, tmp_path):
    nowhere = HFClip(tmp_path / "nowhere")
    assert not nowhere.weights().present and nowhere.weights().sha256 is None
    for ask in (nowhere.prepare, lambda: nowhere.id, lambda: nowhere.embed_texts(["a"])):
        with pytest.raises(FileNotFoundError, match=r"config\.json, model\.safetensors.*nowhere"):
            ask()
    shutil.copytree(tiny_clip, tmp_path / "part")
    (tmp_path / "part" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"\(model\.safetensors\), got none at .*part"):
        HFClip(tmp_path / "part").prepare()


def test_hf_clip_states_its_weights(tiny_clip):
    encoder = HFClip(tiny_clip)
    facts = encoder.weights()
    assert facts.present and tiny_clip / "model.safetensors" in facts.files
    assert encoder.id == f"{tiny_clip.name}-{facts.fingerprint}"
    assert facts.fingerprint.startswith(f"{facts.sha256[:12]}-")


def test_an_encoder_that_prepares_images_in_another_way_is_another(tiny_clip, tiny_open_clip):
    """The same weights and another resize or range: no cached embedding may be taken for one of now."""
    for make in (lambda: HFClip(tiny_clip), lambda: OpenClip(tiny_open_clip[0], str(tiny_open_clip[1]))):
        encoder, facts = make(), make().weights()
        for change in ({"resize": "squashed"}, {"input_range": "[0, 255]"}):
            other, changed = make(), replace(facts, **change)
            other.weights = lambda changed=changed: changed
            assert other.id != encoder.id and other.id.rsplit("-", 1)[0] == encoder.id.rsplit("-", 1)[0]
        moved = replace(facts, licence="another", how_to_get="elsewhere")
        assert moved.fingerprint == facts.fingerprint, "what does not change a number"


def test_open_clip_weights_file(tiny_open_clip, tmp_path):
    architecture, weights = tiny_open_clip
    named = tmp_path / f"{architecture}-mytag.pt"
    shutil.copy(weights, named)
    from_folder, from_file = OpenClip(architecture, "mytag", weights_dir=tmp_path), OpenClip(architecture, str(weights))
    from_folder.prepare()
    images = noise(2)
    torch.testing.assert_close(from_folder.embed_images(images), from_file.embed_images(images), atol=1e-6, rtol=0)
    assert from_folder.name == f"OpenCLIP {architecture} mytag"
    digest = from_file.weights().fingerprint
    assert from_file.id == f"open_clip-{architecture}-{digest}"
    assert from_folder.id == f"open_clip-{architecture}-mytag-{digest}"
    assert digest.startswith(hashlib.sha256(weights.read_bytes()).hexdigest()[:12])


def test_open_clip_tag_decides_activation_and_preprocessing(monkeypatch, tmp_path):
    """Weights of the tag `openai` need QuickGELU, which open_clip's plain ViT-B-32 does not have."""
    import open_clip

    weights = tmp_path / "ViT-B-32-openai.pt"
    weights.write_bytes(b"")
    seen = {}

    class Stop(Exception):
        pass

    def create_model(architecture, **arguments):
        seen.update(arguments, architecture=architecture)
        raise Stop

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(Stop):
        OpenClip("ViT-B-32", "openai", weights_dir=tmp_path).prepare()
    assert seen["pretrained"] == str(weights)
    assert seen["force_quick_gelu"] is True
    assert seen["force_preprocess_cfg"]["mean"] == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_open_clip_names_an_unknown_architecture(tmp_path):
    (tmp_path / "nothing-openai.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="architecture of open_clip"):
        OpenClip("nothing", "openai", weights_dir=tmp_path).prepare()


@pytest.mark.parametrize("offline", [True, False])
def test_open_clip_without_weights_says_what_to_do(monkeypatch, tmp_path, offline):
    """Switched off, or with a network that does not answer: no minute of retries."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)

    def download(*_, **__):
        raise AssertionError("a download was tried although nothing answers")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    published = OpenClip("ViT-B-32", "openai")
    with pytest.raises(
        FileNotFoundError, match=r"ViT-B-32 openai \(open_clip_model\.safetensors.*no download.*https.*weights_dir"
    ):
        published.prepare()
    assert not published.weights().present
    in_folder = OpenClip("ViT-B-32", "openai", weights_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="ViT-B-32 openai"):
        _ = published.id  # no identity without the weights that it is of
    for ask in (in_folder.prepare, lambda: in_folder.id):
        with pytest.raises(FileNotFoundError, match=r"ViT-B-32-openai\.safetensors; .*https"):
            ask()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        OpenClip("ViT-B-32", str(tmp_path / "nowhere.pt")).prepare()
    with pytest.raises(ValueError, match="openai"):
        OpenClip("ViT-B-32", "no-such-tag").prepare()


def test_open_clip_downloads_what_the_hub_has(monkeypatch):
    """The safetensors file first, the older name if there is none, and an error if there is neither."""
    asked, cached = [], []

    def download(repo_id, allow_patterns):
        asked.extend(allow_patterns)
        cached.extend(f"/cache/{name}" for name in allow_patterns if name in available)

    class Stop(Exception):
        pass

    def create_model(_, pretrained, **__):
        raise Stop(pretrained)

    monkeypatch.setattr("eval.weights.network_answers", lambda _: True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: next(iter(cached), None))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("open_clip.create_model", create_model)
    available = ["open_clip_pytorch_model.bin"]
    with pytest.raises(Stop, match=r"/cache/open_clip_pytorch_model\.bin"):
        OpenClip("ViT-B-32", "openai").prepare()
    assert asked == ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    available = []
    cached.clear()
    with pytest.raises(FileNotFoundError, match=r"open_clip_pytorch_model\.bin of timm/.*a file is lacking"):
        OpenClip("ViT-B-32", "openai").prepare()


def test_open_clip_states_its_weights(tiny_open_clip, tmp_path, monkeypatch):
    architecture, weights = tiny_open_clip
    facts = OpenClip(architecture, str(weights)).weights()
    assert facts.files == (weights,) and "32x32" in facts.resize
    cached = tmp_path / "open_clip_model.safetensors"
    cached.write_bytes(b"weights")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(cached))
    facts = OpenClip("ViT-B-32", "openai").weights()
    assert facts.files == (cached,) and facts.licence == "MIT" and "224x224" in facts.resize
    before = OpenClip("ViT-B-32", "openai").id
    assert before == f"open_clip-ViT-B-32-openai-{facts.fingerprint}"
    cached.write_bytes(b"other weights under the same tag")
    assert OpenClip("ViT-B-32", "openai").id != before
    assert PixelEncoder().weights().present and PixelEncoder().weights().sha256 is None


def test_only_classifiers_have_logits(encoder):
    assert encoder.normalised
    with pytest.raises(TypeError, match="classifier"):
        encoder.logits_from_features(torch.zeros(1, 3))
