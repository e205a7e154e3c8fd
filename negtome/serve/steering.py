"""Steering images away from the asset of a clause, by a reference image and a negative prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from negtome.guard.policy import Policy
from negtome.guard.references import read_references
from negtome.recipe import ModelDefaults


class CannotSteerError(ValueError):
    """Raised if a request must be steered and cannot; the message says why, and has no paths."""


def find_references(policy: Policy, folder: str | Path | None) -> Mapping[str, Sequence[Path]]:
    """Return the reference images of a policy by asset; see `negtome.guard.references` for the layouts."""
    if folder is None:
        return {}
    return read_references(folder, [clause.asset for clause in policy.clauses]).images


def steer(policy: Policy, cited: Sequence[str], model: str, folder: str | Path | None) -> dict[str, Any]:
    """Return the fields of a recipe that steer images of a model away from what a verdict cites.

    NegToMe pushes away from the asset's first reference image by name, at the model's own settings; the asset's names
    are the negative prompt.

    Args:
        policy: of the verdict.
        cited: its clauses and exceptions.
        model: whose settings of NegToMe are used.
        folder: of reference images.

    Raises:
        CannotSteerError: there is no reference image, or there are several assets.
    """
    assets = list(dict.fromkeys(policy.assets(cited, "steer")))
    if len(assets) != 1:
        raise CannotSteerError("images are steered away from one asset at a time")
    files = find_references(policy, folder).get(assets[0])
    if not files:
        raise CannotSteerError("there is no reference image of its asset")
    names = [name for clause in policy.clauses if clause.asset == assets[0] for name in (clause.asset, *clause.names)]
    negative = ", ".join(dict.fromkeys(names))
    return {"reference": str(files[0]), "config": ModelDefaults.of(model).reference, "negative_prompt": negative}


def unsteerable(policy: Policy, folder: str | Path | None) -> list[str]:
    """Return the assets of clauses that steer without any reference image."""
    images = find_references(policy, folder)
    assets = [clause.asset for clause in policy.clauses if clause.action == "steer"]
    return [asset for asset in dict.fromkeys(assets) if not images.get(asset)]
