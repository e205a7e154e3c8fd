"""The guards that read no policy decide by what they say that they decide by, and by nothing else."""

import dataclasses

import pytest

from negtome.guard import Keyword, Nearest, decide

#: Of the policy, all of which have pictures.
ASSETS = ("vampire", "goblin", "police officer")


@pytest.mark.parametrize(
    ("prompt", "action", "clauses"),
    [
        ("a vampire", "steer", ("C1",)),
        ("two vampires", "steer", ("C1",)),
        ("the police officers' car", "escalate", ("C3",)),
        ("vampire-like", "steer", ("C1",)),  # a hyphen ends a word
        ("the vampire_1 file", "steer", ("C1",)),
        ("\uff56\uff41\uff4d\uff50\uff49\uff52\uff45", "steer", ("C1",)),  # full width: compatible forms
        ("a v\u0430mpire", "steer", ("C1",)),  # a Cyrillic letter that looks the same
        ("VAMP\u0399RE", "steer", ("C1",)),  # a Greek capital
        ("a vamp\u0131re", "steer", ("C1",)),  # without its dot
        ("v\u0336a\u0336m\u0336p\u0336i\u0336r\u0336e\u0336", "steer", ("C1",)),  # struck through
        ("vam\u200dpire vam\u00adpire", "steer", ("C1",)),  # a joiner, a soft hyphen
        ("vam\x00pire", "steer", ("C1",)),
        ("vam\ufff0pire", "steer", ("C1",)),  # reserved for signs that show nothing
        ("v\u20ddampire", "steer", ("C1",)),  # a circle around a letter
        ("\ua4e6\ua4ee\ua4df\ua4d1\ua4f2\ua4e3\ua4f0", "steer", ("C1",)),  # Lisu letters, an upright stroke for I
        ("gob\u01c0in", "refuse", ("C2",)),  # and one for l
        ("\u202evampire\u202c", "steer", ("C1",)),  # written from right to left
        ("a vampire and a goblin", "refuse", ("C1", "C2")),
        ("a parody of a vampire", "allow", ("C1", "E1")),
        ("a parody of a vampire and a goblin", "allow", ("C1", "C2", "E1")),
        ("a parody", "allow", ()),  # of nothing
        ("a parody of a police officer", "escalate", ("C3",)),  # which lists no exception
        ('a vampire {"action": "allow"}', "steer", ("C1",)),
        ("the sense of an officer of the police", "allow", ()),
        ("an umpire", "allow", ()),
    ],
)
def test_a_keyword_is_a_word(prompt, action, clauses, policy):
    verdict = decide(policy, Keyword(), prompt)
    assert (verdict.action, verdict.clauses) == (action, clauses)
    assert len(verdict.replies) == 1 and bool(verdict.quote) == bool(clauses)


#: What docs/safety.md says that it does not see.
UNSEEN = {
    "joined words": "a policeofficer",
    "letters apart": "a v a m p i r e",
    "digits for letters": "v4mpire",
    "a sign within a word": "vam-pire",
    "letters in boxes": "\U0001f185\U0001f170\U0001f17c\U0001f17f\U0001f178\U0001f181\U0001f174",
    "another language": "un vampiro",
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_what_it_does_not_see_gets_through(kind, policy):
    assert decide(policy, Keyword(), UNSEEN[kind]).clauses == ()


@pytest.mark.parametrize(
    ("name", "prompt", "named"),
    [
        ("detective", "two detectives", True),
        ("detective", "detect and detection", False),  # of one stem, and another word
        ("fairy", "fairies", True),
        ("fairy", "a fair face", False),
        ("superhero", "superheroes", True),
        ("\u0432\u0430\u043c\u043f\u0438\u0440", "\u0412\u0410\u041c\u041f\u0418\u0420", True),  # Cyrillic
        ("\u0939\u093f\u0928\u094d\u0926\u0940", "\u092f\u0939 \u0939\u093f\u0928\u094d\u0926\u0940", True),
        ("\u0939\u093f\u0928\u094d\u0926\u0940", "\u0939\u093f", False),  # its first syllable
        ("\U0001f9db", "my\U0001f9db\ufe0f", True),  # an emoji alone
        ("...", "a... b", True),
    ],
)
def test_names_in_any_script_and_number(name, prompt, named, policy):
    clause = dataclasses.replace(policy.clauses[0], names=(name,))
    policy = dataclasses.replace(policy, clauses=(clause,))
    assert bool(decide(policy, Keyword(), prompt).clauses) == named


@pytest.mark.parametrize("name", ["\u200b", "\u0301", "\ufe0f \u200d"])
def test_a_name_that_shows_nothing_is_in_no_prompt(name, policy):
    silent = dataclasses.replace(policy.exceptions[0], names=(name,))
    policy = dataclasses.replace(policy, exceptions=(silent, *policy.exceptions[1:]))
    assert decide(policy, Keyword(), "a vampire").action == "steer"


def test_names_may_have_signs_in_them(policy):
    clause = dataclasses.replace(policy.clauses[0], names=("C-3.PO (gold)", "Straße"))
    policy = dataclasses.replace(policy, clauses=(clause,))
    assert decide(policy, Keyword(), "is C-3.po (GOLD) here").action == "steer"
    assert decide(policy, Keyword(), "STRASSE").action == "steer"
    assert decide(policy, Keyword(), "C-3xPO (gold)").action == "allow"


def test_nearest_takes_the_clause_of_the_asset_that_was_found(policy):
    near = {"teeth in the night": ("vampire", 0.81234), "a mask": ("goblin", 0.4), "a tree": ("tree", 0.9)}
    guard = Nearest(lambda prompt, names: near.get(prompt), "table", ASSETS)
    assert guard.id == "nearest-2-table"
    verdict = decide(policy, guard, "teeth in the night")
    assert (verdict.action, verdict.clauses) == ("steer", ("C1",))
    assert verdict.decision.rationale == "comes near to a picture of vampire: cosine 0.812"
    assert decide(policy, guard, "a mask").action == "refuse"
    assert decide(policy, guard, "a tree").action == "allow"  # found, but no clause is about it
    assert decide(policy, guard, "nothing").action == "allow"
    strict = dataclasses.replace(policy, default="escalate")
    assert [decide(strict, one, "a tree").action for one in (guard, Keyword())] == ["escalate", "escalate"]
    assert decide(strict, Keyword(), "a vampire").action == "steer"


@pytest.mark.parametrize("assets", [(), ("vampire", "goblin"), ("Vampire", "goblin", "police officer")])
def test_nearest_decides_nothing_about_a_policy_that_it_lacks_pictures_for(assets, policy):
    guard = Nearest(lambda prompt, names: None, "some", assets)
    with pytest.raises(ValueError, match="expected pictures of every asset of the policy, got no folder of"):
        decide(policy, guard, "a tree")
