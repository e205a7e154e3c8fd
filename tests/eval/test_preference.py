"""Aesthetic, HPS and VQA scores: their real loading code on random weights, laid down in the real format and place."""

from __future__ import annotations

import json
import math
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

from eval.images import ManifestRow, load_image, read_manifest, write_manifest
from eval.measure import is_current, measure
from eval.preference import AestheticPredictor, AestheticScore, HpsClip, HpsScore, InstructBlip, VqaScore
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
    torch.testing.assert_close(metric.judge.head.score(embeddings), expected)
    document = measure(metric, run)
    assert_means_of_groups(document, expected)
    assert document["encoder"]["name"] == "LAION aesthetic predictor v2 (CLIP ViT-L/14)"
    assert is_current(document, metric, run)


def test_aesthetic_weights_are_both_files(aesthetic, head, tmp_path):
    predictor = AestheticPredictor(weights_dir=tmp_path)
    facts = predictor.weights()
    assert [file.suffix for file in facts.files] == [".pth", ".pt"] and facts.present
    torch.save({name: tensor + 0.01 for name, tensor in head.state_dict().items()}, tmp_path / "other.pth")
    other = AestheticPredictor(tmp_path / "other.pth", tmp_path)
    assert other.id != predictor.id and predictor.clip.id in predictor.id
    aesthetic.unlink()
    facts = predictor.weights()
    assert not facts.present and facts.looked_in == (aesthetic,), "what is there is not asked for"


def test_aesthetic_refuses_other_files(aesthetic, head, tmp_path):
    for content, problem in (
        ({"layers.0.weight": torch.zeros(1024, 768)}, r"layers\.0\.bias"),
        ({name: tensor[..., :-1] for name, tensor in head.state_dict().items()}, "tensors of other shapes"),
        (head, "not a file of tensors alone"),
        ([1], "expected the weights"),
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
    metric = HpsScore(hps_file)
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


# --- VQAScore --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    """An InstructBLIP-FlanT5 as transformers saves it, tiny: model, processor, the tokenizers of T5 and of BERT."""
    from transformers import (
        BertTokenizer,
        BlipImageProcessor,
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipProcessor,
        T5Config,
        T5TokenizerFast,
    )

    folder = tmp_path_factory.mktemp("tiny-instructblip")
    characters = [chr(code) for code in range(33, 127)]
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁yes", "▁no", *characters]
    t5 = T5TokenizerFast(vocab=[(piece, -float(len(piece) < 3)) for piece in pieces], extra_ids=0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
    bert = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    size = {"height": 28, "width": 28}
    processor = InstructBlipProcessor(BlipImageProcessor(size=size), t5, bert, num_query_tokens=4)
    token = t5.convert_tokens_to_ids("<image>")
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = InstructBlipConfig(
        vision_config={**tower, "image_size": 28, "patch_size": 14},
        qformer_config={
            **tower,
            "vocab_size": len(words),
            "encoder_hidden_size": 32,
            "pad_token_id": 0,
            "max_position_embeddings": 256,
        },
        text_config=T5Config(
            vocab_size=token + 3, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, decoder_start_token_id=0
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=token,
    )
    torch.manual_seed(0)
    model = InstructBlipForConditionalGeneration(config)
    for parameter in model.parameters():  # transformers' own are so small that neither image nor text would matter
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # The published repositories were saved by older versions: the image processor in a file of its own.
    processor.image_processor.save_pretrained(folder)
    (folder / "processor_config.json").write_text('{"processor_class": "InstructBlipProcessor"}')
    return folder


def by_hand(folder, images, questions):
    """P("yes") as the authors' code is built: the image's tokens before the embedded question, into T5."""
    from transformers import AutoTokenizer, InstructBlipForConditionalGeneration

    model = InstructBlipForConditionalGeneration.from_pretrained(folder).eval()
    t5, bert = (AutoTokenizer.from_pretrained(folder / name) for name in (".", "qformer_tokenizer"))
    scores = []
    for image, question in zip(images, questions, strict=True):
        with torch.no_grad():
            small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((28, 28), Image.Resampling.BICUBIC)
            pixels = (torch.tensor(np.asarray(small)) / 255 - torch.tensor(OPENAI_MEAN)) / torch.tensor(OPENAI_STD)
            seen = model.vision_model(pixels.permute(2, 0, 1)[None]).last_hidden_state
            words = bert(question, return_tensors="pt")["input_ids"]
            queried = model.qformer(
                input_ids=words,
                attention_mask=torch.ones(1, 4 + words.shape[1]),
                query_embeds=model.query_tokens,
                encoder_hidden_states=seen,
            ).last_hidden_state[:, :4]
            asked = t5(question, return_tensors="pt")["input_ids"]
            inputs = torch.cat([model.language_projection(queried), model.language_model.shared(asked)], dim=1)
            answer = torch.tensor([[t5.convert_tokens_to_ids("▁yes")]])
            scores.append(math.exp(-model.language_model(inputs_embeds=inputs, labels=answer).loss.item()))
    return scores


def test_vqa_score_is_the_probability_of_yes(blip_folder, run):
    images, texts = loaded(run)
    questions = [f'Question: Does this figure show "{text}"? Please answer yes or no.' for text in texts]
    expected = by_hand(blip_folder, images, questions)
    metric = VqaScore(blip_folder)
    found = metric.judge.probability(images, questions, "yes")
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert min(abs(found[0] - found[1]), abs(found[3] - found[4])) > 1e-4 * found[0], "the image must matter"
    asked_otherwise = metric.judge.probability(images[:1], questions[3:4], "yes")
    assert abs(asked_otherwise[0] - found[0]) > 1e-4 * found[0], "the text must matter"
    document = measure(metric, run, batch_size=4)
    assert_means_of_groups(document, expected)
    assert document["settings"] == {"question": metric.question, "answer": "yes"}
    assert is_current(document, metric, run) and not is_current(document, VqaScore(blip_folder, answer="no"), run)


def test_an_answer_of_several_tokens_is_their_product(blip_folder, run):
    images, texts = loaded(run)
    judge = InstructBlip(blip_folder)
    whole = judge.probability(images, texts, "yes no")
    assert ((whole > 0) & (whole < judge.probability(images, texts, "yes"))).all()


def test_vqa_weights_may_come_in_parts(blip_folder, run, tmp_path):
    from transformers import InstructBlipForConditionalGeneration

    parted = tmp_path / "parted"
    shutil.copytree(blip_folder, parted)
    (parted / "model.safetensors").unlink()
    InstructBlipForConditionalGeneration.from_pretrained(blip_folder).save_pretrained(parted, max_shard_size="100KB")
    assert (parted / InstructBlip.INDEX).is_file()
    whole, judge = InstructBlip(blip_folder), InstructBlip(parted)
    images, texts = loaded(run)
    torch.testing.assert_close(judge.probability(images, texts, "yes"), whole.probability(images, texts, "yes"))
    assert whole.id.startswith(f"{blip_folder.name}-") and judge.id.startswith("parted-")
    max(parted.glob("model-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"got none at .*parted"):
        InstructBlip(parted).prepare()


def test_vqa_refuses_what_would_score_something_else(blip_folder, run, tmp_path):
    from safetensors.torch import load_file, save_file

    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(blip_folder, folder)
        change(folder)
        return InstructBlip(folder)

    def another_token(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "image_token_index": 7}))

    def without_a_weight(folder):
        state = load_file(folder / "model.safetensors")
        state.pop("language_projection.weight")
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    for judge, problem in (
        (broken("token", another_token), "another token for the image"),
        (broken("weight", without_a_weight), r"missing weights \['language_projection\.weight'\]"),
        (broken("garbage", lambda folder: (folder / "model.safetensors").write_bytes(b"<html>")), "cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=problem):
            judge.prepare()
    with pytest.raises(ValueError, match=r"at most 256 tokens.*shorten the prompt"):
        InstructBlip(blip_folder).probability(loaded(run)[0][:1], ["a " * 300], "yes")
    with pytest.raises(ValueError, match=r"one \{\} for the prompt"):
        VqaScore(blip_folder, question="Is it good?")


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_caches(tmp_path, monkeypatch):
    from huggingface_hub import constants, file_download

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for module in (constants, file_download):
        if hasattr(module, "HF_HUB_CACHE"):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize(
    ("metric", "wanted"),
    [
        (AestheticScore, r"sac\+logos\+ava1-l14-linearMSE\.pth"),
        (HpsScore, r"HPS_v2\.1_compressed\.pt"),
        (VqaScore, r"config\.json, .* and model\.safetensors"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_missing_weights_fail_at_once_and_say_what_to_do(metric, wanted, given, empty_caches, run, tmp_path):
    metric = metric(tmp_path / "mine", name="mine") if given else metric()
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
