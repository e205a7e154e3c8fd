"""Model cards: what each small model is, of what it was made, and how it was really trained; texts in cards/*.md.j2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.training import data, taxonomy

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_suffix("")),
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
)
STAGES = ("text", "vae", "decoder", "unet", "score", "flux", "distil")


def render(name: str, **facts: Any) -> str:
    """Return the card `cards/<name>.md.j2` with the facts that it asks for."""
    return _TEMPLATES.get_template(f"{name}.md.j2").render(facts)


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
        (models / name / "README.md").write_text(render(name, **facts))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
