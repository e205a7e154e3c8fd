"""A guard that compares: a clause applies where the prompt comes near to a picture of its asset."""

from collections.abc import Callable, Collection

from negtome.guard.decision import Decision
from negtome.guard.policy import Policy


class Nearest:
    """Takes the asset that a prompt comes nearest to, whatever its words, if it is near enough.

    It knows no exceptions.

    Args:
        find: of a prompt and the names of assets, returns the nearest of these and how near the prompt comes to it, or
            None where none is near enough.
        id: of what finds: encoder, threshold and pictures.
    """

    name = "nearest"

    def __init__(self, find: Callable[[str, Collection[str]], tuple[str, float] | None], id: str) -> None:  # noqa: A002  (the protocol's)
        self.find = find
        self.id = f"nearest-2-{id}"

    def reply(self, policy: Policy, prompt: str) -> str:
        found = self.find(prompt, [clause.asset for clause in policy.clauses])
        asset, cosine = found or (None, 0.0)
        clause = next((clause for clause in policy.clauses if clause.asset == asset), None)
        if clause is None:
            return Decision(policy.default, (), "", "comes near to no asset of the policy").to_json()
        rationale = f"comes near to a picture of {clause.asset}: cosine {cosine:.3f}"
        return Decision(clause.action, (clause.id,), clause.line, rationale).to_json()
