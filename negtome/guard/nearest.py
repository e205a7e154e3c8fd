"""A guard that compares prompts with images: a clause applies if the prompt comes near an image of its concept."""

from collections.abc import Callable, Collection

from negtome.guard.decision import Decision
from negtome.guard.policy import Policy


class Nearest:
    """Takes the protected concept that a prompt comes nearest to, if it is near enough; it knows no exceptions.

    Args:
        find: for a prompt and names of concepts, returns the nearest one and its cosine; None if none is near enough.
        id: identifies `find`: encoder, threshold and images.
        assets: names of the concepts that have images.
    """

    name = "nearest"

    def __init__(
        self,
        find: Callable[[str, Collection[str]], tuple[str, float] | None],
        id: str,  # noqa: A002  (the protocol's)
        assets: Collection[str],
    ) -> None:
        self.find, self.assets = find, frozenset(assets)
        self.id = f"nearest-2-{id}"

    def check(self, policy: Policy) -> None:
        """Raise ValueError unless every concept of a policy has images."""
        if absent := sorted({clause.asset for clause in policy.clauses} - self.assets):
            raise ValueError(
                f"expected pictures of every asset of the policy, got no folder of {', '.join(absent[:5])}: name the "
                "policy's assets as their folders"
            )

    def reply(self, policy: Policy, prompt: str) -> Decision:
        """Return its decision; ValueError as `check`."""
        self.check(policy)
        asset, cosine = self.find(prompt, [clause.asset for clause in policy.clauses]) or (None, 0.0)
        clause = next((clause for clause in policy.clauses if clause.asset == asset), None)
        if clause is None:
            return Decision(policy.default, (), "", "comes near to no asset of the policy")
        rationale = f"comes near to a picture of {clause.asset}: cosine {cosine:.3f}"
        return Decision(clause.action, (clause.id,), clause.line, rationale)
