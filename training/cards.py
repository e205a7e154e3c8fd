"""Model cards: what each small model is, of what it was made, and how it was really trained; texts in cards/*.md.j2."""

import json
from pathlib import Path
from typing import Any

from experiments.tables.templates import render
from training import data, taxonomy

STAGES = ("text", "vae", "decoder", "unet", "score", "flux", "distil")


def write_cards(work: Path, models: Path, notes: str = "") -> None:
    """Write a README.md into each of the three folders.

    Args:
        work: work folder of the training, for the statistics and the stages' records.
        models: folder of the model folders.
        notes: paragraph about the history and quality of these very weights (`training/NOTES.md`).
    """
    _, statistics = data.load_table(work / "data")
    # The scoring CLIP may come from a work folder of its own, whose table then lies beside it.
    own = work / "score" / "table.json"
    cards = {stage: _read(work / stage / "card.json") for stage in STAGES}
    facts = {
        "statistics": statistics,
        "scored": _read(own)["statistics"] if own.exists() else statistics,
        "cards": cards,
        "quality": cards["decoder"].get("quality") or cards["vae"].get("quality"),
        "categories": len(taxonomy.EVALUATED) + len(taxonomy.DEVELOPMENT),
        "notes": notes,
    }
    cards["score"].setdefault("quality", {})
    for name in ("mini-sdxl", "mini-flux", "mini-clip"):
        (models / name / "README.md").write_text(render(f"training/cards/{name}.md.j2", **facts))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
