"""A guard that needs no training, beside which the trained ones have to be seen: a table."""

from negtome.guard.decision import Decision
from negtome.guard.policy import Policy
from training.deliberation.requests import PARTS, Maker, words_of


class Lookup:
    """Knows in a table what the training's requests were made of: names, tags and descriptions of each asset.

    A name counts unless a noun comes after it; a description by one of its kinds and two of its marks.
    """

    name = id = "lookup"

    def __init__(self, policy: Policy) -> None:
        maker = Maker(policy, 0)
        self.nouns = {*maker.fillers}
        self.names = {
            clause.id: [words_of(text) for text in (*clause.names, *maker.tags[clause.asset])]
            for clause in policy.clauses
        }
        self.parodies = {"parody", "caricature"}

    def reply(self, policy: Policy, prompt: str) -> Decision:
        words = words_of(prompt)
        cited = [
            clause.id for clause in policy.clauses if self._named(words, clause.id) or _described(words, clause.asset)
        ]
        if cited and self.parodies & {*words}:
            cited.append(policy.exceptions[0].id)
        return Decision(policy.action_of(cited), tuple(cited), policy[cited[-1]].line if cited else "")

    def _named(self, words: list[str], name: str) -> bool:
        for sought in self.names[name]:
            for start in range(len(words) - len(sought) + 1):
                after = words[start + len(sought) : start + len(sought) + 1]
                if words[start : start + len(sought)] == sought and not {*after} & self.nouns:
                    return True
        return False


def _described(words: list[str], asset: str) -> bool:
    text = f" {' '.join(words)} "
    parts = PARTS["descriptions"][asset]
    marks = sum(any(f" {mark} " in text for mark in mark_) for mark_ in parts["marks"])
    return marks >= 2 and any(f" {kind} " in text for kind in parts["kinds"])
