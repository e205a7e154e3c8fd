"""Contrastive image-text models: two give the frozen text encoders, a third one only scores."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from eval.attributes import label_embeddings, zero_shot_labels
from training import taxonomy, tokenizer
from training.loop import Run, TrainingArguments, make_optimizers
from training.rows import Images

PROJECTION = 128


def make_model(vocabulary: int, vision_width: int = 128, vision_layers: int = 4) -> CLIPModel:
    """Return a CLIP with a text tower of 128 x 4 and a vision transformer on 16 x 16 patches of 128 x 128 images."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.LENGTH,
        "projection_dim": PROJECTION,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": 4 * vision_width,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": vision_width // 32,
        "image_size": 128,
        "patch_size": 16,
        "projection_dim": PROJECTION,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


def contrastive_loss(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, image_id: torch.Tensor, text_id: torch.Tensor
) -> torch.Tensor:
    """Compute the symmetric cross-entropy; pairs in the batch that share the image or the caption are no negatives.

    Args:
        image: embeddings [N, D].
        text: embeddings [N, D].
        scale: scalar, the inverse temperature.
        image_id: int64 [N].
        text_id: int64 [N].

    Returns:
        Scalar loss.
    """
    logits = scale * F.normalize(image, dim=-1).float() @ F.normalize(text, dim=-1).float().T
    same = (image_id[:, None] == image_id) | (text_id[:, None] == text_id)
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def text_encoders(first: CLIPModel, second: CLIPModel) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Return the two text encoders of SDXL, copied from two trained CLIPs."""
    one, two = CLIPTextModel(first.config.text_config), CLIPTextModelWithProjection(second.config.text_config)
    for model, source in ((one, first), (two, second)):
        tower = getattr(model, "text_model", model)  # versions of transformers differ in the nesting
        tower.load_state_dict(getattr(source.text_model, "text_model", source.text_model).state_dict())
    two.text_projection.load_state_dict(second.text_projection.state_dict())
    return one, two


def train_text(arguments: TrainingArguments, seeds: tuple[int, int] = (1, 2)) -> None:
    """Train the two text encoders of the pipelines into `work/text_encoder` and `work/text_encoder_2`.

    Two text towers from different seeds learn against one vision tower, each through projections of its own: half the
    work of two models, since only the text towers are kept.
    """
    second = _seeded_model(arguments, seeds[1])
    first = _seeded_model(arguments, seeds[0])
    second.vision_model = first.vision_model

    def save() -> None:
        for model, name in zip(text_encoders(first, second), ("text_encoder", "text_encoder_2"), strict=True):
            model.save_pretrained(arguments.work / name)

    _train(arguments, "text", {"first": first, "second": second}, save, seeds=seeds)


def train_score(arguments: TrainingArguments, seed: int = 1000) -> None:
    """Train the evaluation CLIP into `work/score`: another seed, and no weights shared with the generators."""
    model, folder = _seeded_model(arguments, seed), arguments.work / "score" / "model"
    _train(arguments, "score", {"score": model}, lambda: model.save_pretrained(folder), seed=seed)


def _seeded_model(arguments: TrainingArguments, seed: int) -> CLIPModel:
    arguments.seed(seed)
    return make_model(torch.load(arguments.work / "tokens.pt")["clip_size"]).to(arguments.device)


def _train(
    arguments: TrainingArguments, name: str, models: dict[str, CLIPModel], save: Callable[[], None], **card: object
) -> None:
    """Train models, all against the first one's vision tower, on 1,024 random rows a step."""
    data, batch = Images(arguments.work / "data", arguments.device), arguments.batch or 1024
    ids = torch.load(arguments.work / "tokens.pt")["clip"].to(arguments.device)
    vision_model = next(iter(models.values())).vision_model
    trained = torch.nn.ModuleList(models.values())

    def compute_losses() -> dict[str, torch.Tensor]:
        image, caption, variant = data.rows.draw(batch)
        pixels, embedded = data.render(image, variant), []
        with arguments.autocast():
            vision = vision_model(pixel_values=pixels).pooler_output
            for model in models.values():
                text = model.text_model(input_ids=ids[caption].long()).pooler_output
                scale = model.logit_scale.exp().clamp(max=100)
                embedded.append((model.visual_projection(vision), model.text_projection(text), scale))
        losses = [contrastive_loss(*one, image, caption) for one in embedded]
        return {"loss": sum(losses)} | {f"loss{number}": loss for number, loss in enumerate(losses, 1)}

    optimizers = make_optimizers(arguments, trained, muon=2e-3, adam=1.2e-3)
    run = Run(name, arguments, [trained], optimizers, 0.998, save)
    run.fit(compute_losses)
    with run.averaged():
        quality = {key: evaluate(model.eval(), data, arguments) for key, model in models.items()}
    print(f"{name} quality", quality, flush=True)
    run.write_card(arguments.work / name, batch=batch, quality=quality, **card)


@torch.no_grad()
def evaluate(model: CLIPModel, data: Images, arguments: TrainingArguments) -> dict:
    """Classify the held-out images among all categories and, where they have one, among the held-out labels.

    The words of held-out labels occur in training at most within other labels, so that the share of right labels is
    low by nature; the metrics rely on the categories.
    """
    held_out = data.held_out.to(arguments.device)
    if not len(held_out):
        return {}
    bpe = CLIPTokenizer.from_pretrained(arguments.work / "tokenizer")

    def embed(prompts: list[str]) -> torch.Tensor:
        ids = tokenizer.encode(bpe, prompts).to(arguments.device)
        return F.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output), dim=-1)

    images = []
    for index in held_out.split(256):
        pixels = data.render(index, torch.zeros_like(index))
        images.append(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output))
    image = F.normalize(torch.cat(images), dim=-1)
    items = [data.emoji[i] for i in data.held_out.tolist()]
    categories = [*taxonomy.EVALUATED, *taxonomy.DEVELOPMENT]
    encoder = SimpleNamespace(embed_texts=embed)
    embedded = label_embeddings(encoder, categories, [f"{template} {{}}" for template in taxonomy.TEMPLATES])
    order = (image @ embedded.T).topk(3).indices.tolist()
    right = [
        [categories[number] in item.categories for number in nearest]
        for item, nearest in zip(items, order, strict=True)
        if item.categories
    ]
    labels = sorted({item.label for item in items})
    nearest_label = zero_shot_labels(image, embed([f"a photo of a {label.lower()}" for label in labels]))
    right_labels = sum(labels[n] == item.label for n, item in zip(nearest_label, items, strict=True))
    return {
        "held_out_images": len(items),
        "with_category": len(right),
        "categories": len(categories),
        "category_top1": sum(first for first, *_ in right) / max(1, len(right)),
        "category_top3": sum(map(any, right)) / max(1, len(right)),
        "labels": len(labels),
        "label_top1": right_labels / len(items),
    }


def write_preprocessor(folder: Path) -> None:
    """Write `preprocessor_config.json` of the evaluation CLIP."""
    size = {"height": 128, "width": 128}
    flags = {"do_resize": True, "do_center_crop": False, "do_convert_rgb": True, "do_rescale": True}
    scaling = {"rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    config = {"image_processor_type": "CLIPImageProcessor", "size": size, "resample": 3, **flags, **scaling}
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=1) + "\n")
