"""The command `negtome generate --policy`: decide the prompt first, and make, steer or withhold its images."""

import argparse
import sys
from pathlib import Path
from typing import Any

from negtome import generate
from negtome.guard.__main__ import EXIT, add_guard_options, find_guard
from negtome.guard.audit import Audit
from negtome.guard.policy import Policy, read_policy
from negtome.guard.verdict import Verdict, decide
from negtome.recipe import Recipe
from negtome.serve.checks import add_check_options, find_checks, look, try_checks
from negtome.serve.steering import CannotSteerError, steer
from negtome.validation import one_line

#: Options that are no part of a recipe.
OPTIONS = ("policy", "references", "audit")
#: Exit code if an image check sees a protected concept.
BLOCKED = 6


class _NoImagesError(Exception):
    """Raised if the policy leads to no image; has the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the guard's options to the parser of `negtome generate`."""
    group = parser.add_argument_group("policy")
    group.add_argument("--references", metavar="F", help="reference images, F/ASSET/*.png, for prompts to steer")
    group.add_argument("--audit", metavar="FILE", help="append the verdict, without texts")
    add_guard_options(group, "guard-", "keyword")
    add_check_options(group)


def main(options: argparse.Namespace) -> int:
    """Decide the prompt of a command line, and make its images if the policy allows or steers it.

    Returns:
        0 if there are images, `BLOCKED` if an image check sees a protected concept, else the exit code of `python -m
        negtome.guard explain`.

    Raises:
        ValueError, OSError, ImportError, RuntimeError: an option cannot be used, or the guard or an image check fails.
            No image is written then.
    """
    names = [name for name in vars(options) if name in OPTIONS or name.startswith(("guard", "check"))]
    own = argparse.Namespace(**{name: vars(options).pop(name) for name in names})
    references, audit = getattr(own, "references", None), getattr(own, "audit", None)
    if references is not None and not Path(references).is_dir():
        raise FileNotFoundError(f"expected a folder of reference images at {references}, got none")
    policy, guard = read_policy(own.policy), find_guard(own, "guard-")
    checks = find_checks(own, policy)
    excepted: list[str] = []

    def decided(recipe: Recipe) -> Recipe:
        verdict = decide(policy, guard, recipe.prompt, None if audit is None else Audit(audit))
        print(f"{verdict.action}: {one_line(verdict.reason)}", flush=True)
        for name in verdict.clauses:
            print(f"  cites  {one_line(policy.criterion(name))}")
        changed = _act(policy, verdict, recipe, references, options.compare)
        try_checks(checks)
        excepted.extend(policy.assets(verdict.clauses, "allow"))
        return changed

    def inspect_image(image: Any) -> None:
        for name, check in checks.items():
            asset = look(check, image.convert("RGB"))
            if asset is None:
                continue
            advice = "; a person must decide whether the exception covers it" if asset in excepted else ""
            print(f"no image: an image shows {one_line(asset)}{advice}", file=sys.stderr)
            if audit is not None:
                Audit(audit).record(
                    {"policy_sha256": policy.sha256, "answer": "blocked", "check": name, "asset": asset}
                )
            raise _NoImagesError(EXIT["escalate"] if asset in excepted else BLOCKED)

    try:
        generate.main(options, decided, inspect_image)
    except _NoImagesError as error:
        return error.code
    return 0


def _act(policy: Policy, verdict: Verdict, recipe: Recipe, references: str | None, compare: bool) -> Recipe:
    """Return the recipe to make; raise `_NoImagesError` if there is none."""
    if verdict.action == "allow":
        return recipe
    if verdict.action != "steer":
        raise _NoImagesError(EXIT[verdict.action])
    if compare:
        raise ValueError("the policy steers this prompt, and --compare would make it unsteered too: leave it out")
    if recipe.reference is not None:
        raise ValueError("the policy steers this prompt by --references: leave --reference and --mask out")
    try:
        fields = steer(policy, verdict.clauses, recipe.model, references)
    except CannotSteerError as error:
        print(f"no image: {error}; give --references FOLDER with FOLDER/ASSET/*.png", file=sys.stderr)
        raise _NoImagesError(EXIT["steer"]) from error
    if recipe.negative_prompt is not None:
        fields["negative_prompt"] = f"{recipe.negative_prompt}, {fields['negative_prompt']}"
    return recipe.replace(**fields)
