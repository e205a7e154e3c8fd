"""Decide requests by a written policy before anything is drawn: allow, steer away, refuse, or ask a person.

    from negtome.guard import Keyword, decide, read_policy

    verdict = decide(read_policy("policy.yaml"), Keyword(), "a photo of a vampire")
    print(verdict.action, verdict.clauses, verdict.quote)

A guard is an object with a name, an id and `reply(policy, prompt)`, which returns a `Decision`, or the `Reply` of a
language model. Replies are parsed strictly, decisions are verified. `import negtome` does not load this package.
"""

from typing import TYPE_CHECKING, Any

from negtome.guard.audit import Audit
from negtome.guard.chat import Endpoint, Local
from negtome.guard.decision import Decision, Reply, UnusableReplyError, new_nonce, parse, read_reply, verify
from negtome.guard.keyword import Keyword
from negtome.guard.nearest import Nearest
from negtome.guard.policy import ACTIONS, SEVERITIES, Clause, Example, Policy, PolicyException, read_policy
from negtome.guard.verdict import Guard, GuardError, RemoteGuard, Verdict, decide

if TYPE_CHECKING:
    from negtome.guard.mini import Mini

__all__ = [
    "ACTIONS",
    "SEVERITIES",
    "Audit",
    "Clause",
    "Decision",
    "Endpoint",
    "Example",
    "Guard",
    "GuardError",
    "Keyword",
    "Local",
    "Mini",
    "Nearest",
    "Policy",
    "PolicyException",
    "RemoteGuard",
    "Reply",
    "UnusableReplyError",
    "Verdict",
    "decide",
    "new_nonce",
    "parse",
    "read_policy",
    "read_reply",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load `Mini` on first use: it is the only name that needs torch."""
    if name != "Mini":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from negtome.guard.mini import Mini

    return Mini
