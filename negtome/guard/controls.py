"""Guards that no policy guides, with which other guards are compared."""

from negtome.guard.decision import Decision, Reply
from negtome.guard.policy import Policy
from negtome.guard.verdict import Guard, is_remote


class Always:
    """Takes the same action on every request.

    Args:
        action: one of `ACTIONS`; the guard cites the first clause with that action.
    """

    PREFIX = "always "

    def __init__(self, action: str) -> None:
        self.action = action
        self.name = f"{self.PREFIX}{action}"
        self.id = f"always-{action}-1"

    def reply(self, policy: Policy, prompt: str) -> Decision:
        if self.action == policy.default:
            return Decision(self.action)
        cited = next((clause for clause in policy.clauses if clause.action == self.action), None)
        if cited is None:
            raise ValueError(f"expected a clause whose action is {self.action} for the control to cite, got none")
        return Decision(self.action, (cited.id,), cited.line, "a control: it says so to everything")


class Stripped:
    """Shows an empty policy to a guard, whose citations are then verified against the real policy.

    Args:
        guard: one that reads policies.
    """

    SUFFIX = ", policy stripped"

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.name = f"{guard.name}{self.SUFFIX}"
        self.id = f"stripped-{guard.id}"
        if is_remote(guard):
            remote, self.timeout = guard, guard.timeout
            self.reply_before = lambda policy, prompt, deadline: remote.reply_before(_empty(policy), prompt, deadline)

    def reply(self, policy: Policy, prompt: str) -> Decision | Reply:
        return self.guard.reply(_empty(policy), prompt)


def _empty(policy: Policy) -> Policy:
    return Policy((), (), policy.default, policy.precedence)
