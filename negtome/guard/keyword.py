"""The plainest guard: a clause applies where one of its names stands in the prompt as a word."""

import re
import unicodedata

from negtome.guard.decision import Decision
from negtome.guard.policy import Clause, Policy, PolicyException


class Keyword:
    """Looks for the names of clauses and exceptions, upper or lower case, in any of Unicode's compatible forms.

    It knows no other spelling, no description, and no sense in which a word may be meant.
    """

    name = "keyword"
    id = "keyword-1"

    def reply(self, policy: Policy, prompt: str) -> Decision:
        text = _plain(prompt)
        clauses = [clause for clause in policy.clauses if _named(clause, text)]
        listed = {name for clause in clauses for name in clause.exceptions}
        exceptions = [part for part in policy.exceptions if part.id in listed and _named(part, text)]
        parts: list[Clause | PolicyException] = [*clauses, *exceptions]
        cited = tuple(part.id for part in parts)
        action = policy.action_of(cited)
        quote = (exceptions or clauses)[0].line if cited else ""
        found = ", ".join(clause.asset for clause in clauses)
        return Decision(action, cited, quote, f"names {found}" if found else "names none of the assets")


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _named(part: Clause | PolicyException, text: str) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(_plain(name))}(?!\w)", text) for name in part.names)
