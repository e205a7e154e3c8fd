"""ShieldGemma 2 as a check of images: tiny random weights, which show the plumbing and nothing about its judgement."""

import argparse
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ImageProcessor,
    PreTrainedTokenizerFast,
    ShieldGemma2Config,
    ShieldGemma2ForImageClassification,
    ShieldGemma2Processor,
)

from negtome.guard.image_check import ShieldGemma2Check
from negtome.serve.checks import add_check_options, find_checks, try_checks

TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<boi>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
IMAGES = torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    words = ["<pad>", "<eos>", "<boi>", "<eoi>", "<img>", "~", *map(chr, range(32, 127)), "\n"]
    letters = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "~"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<img>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", extra_special_tokens=special
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 1024}
    config = ShieldGemma2Config(
        text_config={**sizes, **text, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1},
        vision_config={**sizes, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4, boi_token_index=2, eoi_token_index=3, image_token_index=4,
        yes_token_index=words.index("Y"), no_token_index=words.index("N"),
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shieldgemma")
    model = ShieldGemma2ForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # else all probabilities are 0.5
    model.save_pretrained(folder)
    image_processor = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    ShieldGemma2Processor(image_processor, tokenizer, TEMPLATE, image_seq_length=4).save_pretrained(folder)
    return folder


def test_the_concept_with_the_largest_probability_of_yes_is_detected(folder, policy):
    check = ShieldGemma2Check(policy, folder, threshold=0.001, batch_size=2, device="cpu")
    processor, model = check._loaded
    naive = []
    for image in IMAGES:
        pixels = (255 * image).round().byte().permute(2, 0, 1)
        row = []
        for clause in policy.clauses:
            text = f"No {clause.asset}: The image shall not contain content that depicts {clause.asset} "
            inputs = processor(
                images=[pixels], policies=["it"], custom_policies={"it": f"{text}({clause.description})."},
                return_tensors="pt",
            )  # fmt: skip
            with torch.inference_mode():
                yes, no = model.model(**inputs).logits[0, -1, [model.yes_token_index, model.no_token_index]].tolist()
            row.append(1 / (1 + torch.tensor(no - yes).exp().item()))
        naive.append(row)
    naive = torch.tensor(naive)
    assert torch.allclose(torch.tensor(check.probabilities(IMAGES)), naive, atol=1e-4)
    assert naive.std() > 1e-4
    concept, score = check.detect(IMAGES)
    assert concept == policy.clauses[int(naive.amax(dim=0).argmax())].asset
    assert score == pytest.approx(naive.max().item(), abs=1e-4)
    assert ShieldGemma2Check(policy, folder, threshold=0.999, device="cpu").detect(IMAGES)[0] is None


def test_a_model_that_returns_no_number_is_an_error(folder, policy):
    check = ShieldGemma2Check(policy, folder, device="cpu")
    with torch.no_grad():
        check._loaded[1].get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="expected a probability"):
        check.detect(IMAGES)


def test_its_id_changes_with_threshold_policy_and_files(folder, policy, tmp_path):
    ids = {ShieldGemma2Check(policy, folder, threshold).id for threshold in (0.5, 0.6)}
    copy = tmp_path / folder.name
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert ShieldGemma2Check(policy, copy).id in ids
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"yes_token_index": 7}))
    assert ShieldGemma2Check(policy, copy).id not in ids


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"threshold": 1.0}, {"batch_size": 0}])
def test_settings_out_of_range_and_folders_without_a_model_are_refused(folder, policy, options, tmp_path):
    with pytest.raises(ValueError, match="must be"):
        ShieldGemma2Check(policy, folder, **options)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ShieldGemma2Check(policy, tmp_path)


def test_the_command_line_takes_a_folder_and_a_threshold(folder, policy, capsys):
    parser = argparse.ArgumentParser()
    add_check_options(parser)
    options = ["--check", "shieldgemma2", "--check-folder", str(folder), "--check-threshold"]
    for threshold, seen in (("0.001", True), ("0.999", False)):
        try_checks(find_checks(parser.parse_args([*options, threshold]), policy))
        assert ("in a grey image" in capsys.readouterr().out) == seen
