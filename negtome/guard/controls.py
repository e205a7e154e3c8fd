"""Guards that no policy guides: what any other is to be told apart from."""

from negtome.guard.decision import Decision
from negtome.guard.policy import Policy
from negtome.guard.verdict import Guard


class Always:
    """Does the same about every request: the end of either scale, of what is let through and of what is refused.

    Args:
        action: one of `ACTIONS`; it cites the first clause of that action, whatever was asked for.
    """

    def __init__(self, action: str) -> None:
        self.action = action
        self.name = f"always {action}"
        self.id = f"always-{action}-1"

    def reply(self, policy: Policy, prompt: str) -> str:
        if self.action == policy.default:
            return Decision(self.action).to_json()
        cited = next((clause for clause in policy.clauses if clause.action == self.action), None)
        if cited is None:
            raise ValueError(f"expected a clause whose action is {self.action} for the control to cite, got none")
        return Decision(self.action, (cited.id,), cited.line, "a control: it says so to everything").to_json()


class Stripped:
    """A guard that is shown an empty policy: what it decides by is not what is written.

    What it cites all the same is not in the policy that it is verified against, or it cites nothing.

    Args:
        guard: one that reads policies.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.name = f"{guard.name}, policy stripped"
        self.id = f"stripped-{guard.id}"

    def reply(self, policy: Policy, prompt: str) -> str:
        return self.guard.reply(Policy((), (), policy.default, policy.precedence), prompt)
