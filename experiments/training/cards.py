"""Model cards: what each small model is, what it was made from, and how it was really trained."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.training import data, taxonomy

LIMITS = """## Limits

Emoji artwork at 128 x 128 is all these models know. They exist so that the experiments of this project run anywhere in
minutes; nothing they show about diversity or bias carries over to large models by itself. Generic captions ("a photo
of a person") were drawn with a deliberate preference for some emoji, artwork sets, skin tones and genders (see
`experiments/training/taxonomy.py` and `SETS`, `TONE_SKEW` in `experiments/training/data.py`), in imitation of the mode
preference of large models. The words "photo", "good", "high contrast" and "high quality" carry no meaning for them.
Fine detail is soft, and rare emoji come out as mixtures of common ones.
"""


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


ATTRIBUTION = (
    "The artwork of twitter (Twemoji) and emojione is licensed CC-BY 4.0; the credits above are the attribution."
)


def sources_table(sets: dict[str, dict]) -> list[str]:
    """Lines of a table of the artwork sets, from `data.statistics(...)["sets"]`."""
    lines = ["| set | package | images | licence | credit |", "|---|---|---|---|---|"]
    for s in sets.values():
        lines.append(
            f"| {s['style']} | {s['package']} {s['version']} | {s['images']} | {s['licence']} | {s['credit']} |"
        )
    return lines


def data_section(statistics: dict) -> str:
    """Sources with licences and credits, counts and the split."""
    lines = [
        "## Data",
        "",
        *sources_table(statistics["sets"]),
        "",
        f"Names and tags: {statistics['names']} (MIT). {statistics['images']} images of {statistics['concepts']} "
        f"concepts were rasterised for this training; symbols, flags, clocks, families and couples are left out. "
        f"{statistics['held_out_images']} images are held out: whole concepts, across all sets, "
        "skin tones and genders. "
        f"{statistics['captions']} different captions: the evaluation's seven templates with category words, and "
        "captions with style, label, skin tone and tags.",
        "",
        ATTRIBUTION,
        "",
    ]
    return "\n".join(lines)


def stage_line(name: str, card: dict) -> str:
    """One line about a stage: steps, batch, seconds, device, last losses."""
    if "steps" not in card:
        return f"- {name}: taken over from the earlier models, not trained further."
    losses = {k: v for k, v in card["last"].items() if k not in ("step", "progress", "it_s")}
    shown = ", ".join(f"{k} {v:g}" for k, v in losses.items())
    batch = f" of {card['batch']}" if "batch" in card else ""
    return f"- {name}: {card['steps']:,} steps{batch} in {card['seconds']:,.0f} s on {card['device']}; last {shown}."


def write_cards(work: Path, models: Path, notes: str = "") -> None:
    """Write a README.md into each of the three folders.

    Args:
        work: work folder of the training, for the statistics and the stages' records.
        models: folder of the model folders.
        notes: paragraph about the history and quality of these very weights (`experiments/training/NOTES.md`).
    """
    _, statistics = data.load_table(work / "data")
    # The scoring CLIP may come from a work folder of its own, whose table then lies beside it.
    own = work / "score" / "table.json"
    scored = json.loads(own.read_text())["statistics"] if own.exists() else statistics
    cards = {n: _read(work / n / "card.json") for n in ("text", "vae", "decoder", "unet", "score", "flux")}
    first = cards["flux"].get("first", {}) or _read(work / "flux" / "first.json").get("first", {})
    second = cards["flux"].get("distil", {})
    for part, size in ((first, "batch"), (second, "distil_batch")):
        if part and size in cards["flux"]:
            part.setdefault("batch", cards["flux"][size])
    vae_lines = [stage_line("autoencoder", cards["vae"])]
    if cards["decoder"]:
        vae_lines.append(stage_line("decoder alone, on fixed latents", cards["decoder"]))
    quality = cards["decoder"].get("quality") or cards["vae"].get("quality") or {}
    if quality:
        vae_lines.append(f"- autoencoder, PSNR in dB: {quality}.")
    text = stage_line("two CLIP text encoders, contrastive", cards["text"])
    licence = (
        "## Licence\n\nThe weights are published under the project's MIT licence; the artwork that they were "
        "trained on keeps its own licences, listed above.\n"
    )
    source = "Made by `python -m experiments.training.train` and `python -m experiments.training.export`.\n"

    (models / "mini-sdxl" / "README.md").write_text(
        "\n".join(
            [
                "# mini-sdxl",
                "",
                "A complete `StableDiffusionXLPipeline` of 12 million parameters for 128 x 128 emoji artwork.",
                "",
                '    pipe = StableDiffusionXLPipeline.from_pretrained("models/mini-sdxl")',
                '    pipe("a photo of a bird", num_inference_steps=20, guidance_scale=5.0)',
                "",
                "AutoencoderKL (f = 8, 16 channels, statistics folded into the quant convolutions), "
                "UNet2DConditionModel (96 and "
                "160 channels, self- and cross-attention at 16 x 16 and 8 x 8), two frozen CLIP text "
                "encoders (width 128, four "
                "layers, 32 tokens). v-prediction with zero terminal SNR, Euler scheduler with trailing spacing.",
                "",
                data_section(statistics),
                "## Training",
                "",
                *vae_lines,
                text,
                stage_line("UNet", cards["unet"]),
                "",
                source,
                notes,
                LIMITS,
                licence,
            ]
        )
    )
    (models / "mini-flux" / "README.md").write_text(
        "\n".join(
            [
                "# mini-flux",
                "",
                "A complete `FluxPipeline` of 13 million parameters for 128 x 128 emoji artwork. The "
                "autoencoder, the CLIP text "
                "encoder and its tokenizer are links into `../mini-sdxl`.",
                "",
                '    pipe = FluxPipeline.from_pretrained("models/mini-flux")',
                '    pipe("a photo of a bird", height=128, width=128, num_inference_steps=20, guidance_scale=3.5,',
                "         max_sequence_length=32)",
                "",
                "FluxTransformer2DModel (three double and six single blocks, six heads of 32, 64 image "
                "tokens) with a T5 encoder "
                "(width 128, four layers) trained together. Guidance is distilled into the guidance "
                "embedding, as in FLUX.1-dev: "
                "no negative prompt, one call a step. Scales of 1 to 6 were distilled.",
                "",
                data_section(statistics),
                "## Training",
                "",
                *vae_lines,
                text,
                stage_line("flow matching with T5", first),
                stage_line("distillation of guidance", second),
                "",
                source,
                notes,
                LIMITS,
                licence,
            ]
        )
    )
    quality = cards["score"].get("quality", {})
    (models / "mini-clip" / "README.md").write_text(
        "\n".join(
            [
                "# mini-clip",
                "",
                "A small CLIP (`CLIPModel`, vision 128 x 4 on patches of 16, text 128 x 4) that measures "
                "what the small pipelines "
                "draw. It has its own seed and shares no weights with the text encoders of the pipelines.",
                "",
                data_section(scored),
                "## Training",
                "",
                stage_line("contrastive", cards["score"]),
                "",
                f"Quality on held-out images: {json.dumps(quality)}. `category_top1` is the share of "
                "held-out images whose nearest "
                f"of {len(taxonomy.EVALUATED) + len(taxonomy.DEVELOPMENT)} categories is one of theirs.\n",
                source,
                notes,
                LIMITS,
                licence,
            ]
        )
    )
