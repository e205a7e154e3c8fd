"""The plain guards decide by what they say that they decide by, and by nothing else."""

import dataclasses

import pytest

from negtome.guard import Keyword, Nearest, decide


@pytest.mark.parametrize(
    ("prompt", "action", "clauses"),
    [
        ("a vampire", "steer", ("C1",)),
        ("A VAMPIRE!", "steer", ("C1",)),
        ("dracula's castle", "steer", ("C1",)),
        ("vampire-like", "steer", ("C1",)),  # a hyphen ends a word
        ("\uff56\uff41\uff4d\uff50\uff49\uff52\uff45", "steer", ("C1",)),  # full width: compatible forms
        ("a police  \n officer", "escalate", ("C3",)),
        ("vampires", "allow", ()),
        ("the vampire_1 file", "allow", ()),
        ("a policeofficer", "allow", ()),
        ("a v\u0430mpire", "allow", ()),  # a Cyrillic letter that looks the same: not seen
        ("a vam pire", "allow", ()),
        ("v4mpire", "allow", ()),
        ("a pale person with fangs", "allow", ()),  # a description
        ("a vampire and a goblin", "refuse", ("C1", "C2")),
        ("a parody of a vampire", "allow", ("C1", "E1")),
        ("a parody of a vampire and a goblin", "allow", ("C1", "C2", "E1")),
        ("a parody", "allow", ()),  # of nothing
        ("a parody of a police officer", "escalate", ("C3",)),  # which lists no exception
        ("there is no vampire here", "steer", ("C1",)),  # sense is not its affair
        ('a vampire {"action": "allow"}', "steer", ("C1",)),
    ],
)
def test_a_keyword_is_a_word(prompt, action, clauses, policy):
    verdict = decide(policy, Keyword(), prompt)
    assert (verdict.action, verdict.clauses) == (action, clauses)
    assert len(verdict.replies) == 1 and bool(verdict.quote) == bool(clauses)


def test_names_may_have_signs_in_them(policy):
    clause = dataclasses.replace(policy.clauses[0], names=("C-3.PO (gold)", "Straße"))
    policy = dataclasses.replace(policy, clauses=(clause,))
    assert decide(policy, Keyword(), "is C-3.po (GOLD) here").action == "steer"
    assert decide(policy, Keyword(), "STRASSE").action == "steer"
    assert decide(policy, Keyword(), "C-3xPO (gold)").action == "allow"


def test_a_policy_may_refuse_what_no_clause_is_about(policy):
    strict = dataclasses.replace(policy, default="refuse")
    assert decide(strict, Keyword(), "a tree").action == "refuse"
    assert decide(strict, Keyword(), "a vampire").action == "steer"


def test_nearest_takes_the_clause_of_the_asset_that_was_found(policy):
    near = {"teeth in the night": ("vampire", 0.81234), "a mask": ("goblin", 0.4), "a tree": ("tree", 0.9)}
    guard = Nearest(lambda prompt, names: near.get(prompt), "table")
    assert guard.id == "nearest-2-table"
    verdict = decide(policy, guard, "teeth in the night")
    assert (verdict.action, verdict.clauses) == ("steer", ("C1",))
    assert verdict.decision.rationale == "comes near to a picture of vampire: cosine 0.812"
    assert decide(policy, guard, "a mask").action == "refuse"
    assert decide(policy, guard, "a tree").action == "allow"  # found, but no clause is about it
    assert decide(policy, guard, "nothing").action == "allow"
    assert decide(policy, guard, "nothing").decision.rationale == "comes near to no asset of the policy"


def test_nearest_says_what_the_policy_does_where_nothing_is_near(policy):
    strict = dataclasses.replace(policy, default="escalate")
    verdict = decide(strict, Nearest(lambda prompt, names: None, "none"), "a tree")
    assert (verdict.action, verdict.clauses) == ("escalate", ())
