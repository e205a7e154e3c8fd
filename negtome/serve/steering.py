"""Steering images away from the asset of a clause, by a reference image and a negative prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from negtome.guard.policy import Policy
from negtome.recipe import ModelDefaults

#: Endings of reference images.
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


class CannotSteerError(ValueError):
    """Raised if a request must be steered and cannot; the message says why, and has no paths."""


def find_references(folder: str | Path | None, asset: str) -> list[Path]:
    """Return the reference images of an asset, FOLDER/ASSET/*.png (or jpg, webp), by name."""
    if folder is None:
        return []
    subfolder = Path(folder) / asset
    files = subfolder.iterdir() if subfolder.is_dir() else []
    return sorted(file for file in files if file.suffix.lower() in ENDINGS and not file.name.startswith("."))


def steer(policy: Policy, cited: Sequence[str], model: str, folder: str | Path | None) -> dict[str, Any]:
    """Return the fields of a recipe that steer images of a model away from what a verdict cites.

    NegToMe pushes away from the asset's first reference image by name, at the model's own settings; the asset's names
    are the negative prompt.

    Args:
        policy: of the verdict.
        cited: its clauses and exceptions.
        model: whose settings of NegToMe are used.
        folder: with FOLDER/ASSET/*.png.

    Raises:
        CannotSteerError: there is no reference image, or there are several assets.
    """
    assets = list(dict.fromkeys(policy.assets(cited, "steer")))
    if len(assets) != 1:
        raise CannotSteerError("images are steered away from one asset at a time")
    files = find_references(folder, assets[0])
    if not files:
        raise CannotSteerError("there is no reference image of its asset")
    names = [name for clause in policy.clauses if clause.asset == assets[0] for name in (clause.asset, *clause.names)]
    negative = ", ".join(dict.fromkeys(names))
    return {"reference": str(files[0]), "config": ModelDefaults.of(model).reference, "negative_prompt": negative}


def unsteerable(policy: Policy, folder: str | Path | None) -> list[str]:
    """Return the assets of clauses that steer without any reference image."""
    assets = [clause.asset for clause in policy.clauses if clause.action == "steer"]
    return [asset for asset in dict.fromkeys(assets) if not find_references(folder, asset)]
