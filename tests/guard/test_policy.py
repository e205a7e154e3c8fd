"""A policy says what it was written to say, and what is none is refused in one line that names the place."""

import dataclasses
import itertools
import random

import pytest

from experiments import PROJECT
from negtome.guard import ACTIONS, Clause, Example, Policy, PolicyException, read_policy


def test_what_is_left_out_has_its_default(policy):
    assert (policy.default, policy.precedence) == ("allow", ("refuse", "escalate", "steer", "allow"))
    assert policy["C2"].names == ("goblin",) and policy["C3"].exceptions == ()
    assert policy["E1"].action == "allow" and policy["E2"].names == ()
    assert "C1" in policy and "E2" in policy and "C4" not in policy
    with pytest.raises(KeyError):
        policy["C4"]


def test_the_digest_is_of_what_it_says_and_not_of_how_it_is_written(document, written, policy):
    assert len(policy.sha256) == 64
    file = written(document)
    file.write_text("# a comment\n\n" + file.read_text())
    assert read_policy(file).sha256 == policy.sha256
    document["clauses"][0]["action"] = "refuse"
    assert read_policy(written(document)).sha256 != policy.sha256


def test_a_severity_is_in_the_digest_unless_it_is_the_default(document, written, policy):
    assert policy["C1"].severity == "medium"
    document["clauses"][0]["severity"] = "medium"
    assert read_policy(written(document)).sha256 == policy.sha256
    document["clauses"][0]["severity"] = "high"
    changed = read_policy(written(document))
    assert changed["C1"].severity == "high" and changed.sha256 != policy.sha256
    assert changed.render() == policy.render(), "a severity changes no decision"


def test_the_severity_of_a_concept_is_the_highest_of_its_clauses(policy):
    clauses = [dataclasses.replace(policy["C1"], id=f"C{n}", severity=level, violates=(), allowed=())
               for n, level in enumerate(("low", "high", "medium"))]  # fmt: skip
    several = dataclasses.replace(policy, clauses=tuple(clauses), examples=())
    assert several.severity_of(policy["C1"].asset) == "high"
    with pytest.raises(KeyError):
        several.severity_of("nobody")


PARODY = {"request": "a parody of a vampire", "action": "allow", "clauses": ["C1", "E1"]}


def test_examples_may_have_an_action_and_ids_of_their_own(document, written, policy):
    both = {"request": "a vampire and a goblin", "action": "refuse", "clauses": ["C1", "C2"]}
    document["examples"] = [PARODY, both, {"request": "a tree", "action": "allow", "clauses": []}]
    longer = read_policy(written(document))
    assert longer.examples[0] == Example("a parody of a vampire", "allow", ("C1", "E1"))
    assert longer.sha256 != policy.sha256
    shown = longer.render()
    assert '"a parody of a vampire" -> allow ["C1", "E1"]' in shown and '"a tree" -> allow []' in shown


def test_the_published_policy_has_the_digest_of_the_published_tables():
    published = read_policy(PROJECT / "conf" / "safety" / "policy.yaml")
    assert len(published.clauses) == 20 and all(clause.violates and clause.allowed for clause in published.clauses)
    assert published.sha256 in (PROJECT / "results" / "policy_sensitivity" / "table.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("version"), "got no version"),
        (lambda d: d["clauses"][0].update(severity="worst"), "a severity among low, medium, high for C1, got 'worst'"),
        (lambda d: d["clauses"][0].update(severity=3), "severity of C1 as a text"),
        (lambda d: d.update(version=2), "expected version: 1, got 2"),
        (lambda d: d.update(version=True), "expected version: 1, got True"),
        (lambda d: d.update(extra=1), "got extra too"),
        (lambda d: d.pop("clauses"), "got no clauses"),
        (lambda d: d.update(clauses=[]), "at least one clause, got none"),
        (lambda d: d.update(clauses=["C1"]), "a clause as a mapping of names to values, got 'C1'"),
        (lambda d: d.update(default="forbid"), "for default, got 'forbid'"),
        (lambda d: d.update(precedence=["refuse"]), "precedence of all of"),
        (lambda d: d.update(precedence=[*ACTIONS[:3], "steer"]), "precedence to differ"),
        (lambda d: d["clauses"][1].update(id="C1"), "every id once in a policy, got C1"),
        (lambda d: d["exceptions"][0].update(id="C1"), "every id once in a policy, got C1"),
        (lambda d: d["clauses"][0].update(id=1), "id of a clause as a text of one line, got 1"),
        (lambda d: d["clauses"][0].update(action="block"), "for C1, got 'block'"),
        (lambda d: d["clauses"][0].update(exceptions=["E9"]), r"exceptions of the policy in C1, got \['E9'\]"),
        (lambda d: d["clauses"][0].update(exceptions=["E1", "E1"]), "exceptions of C1 to differ"),
        (lambda d: d["clauses"][0].pop("description"), "got no description"),
        (lambda d: d["clauses"][0].update(descripton="x"), "got descripton too"),
        (lambda d: d["clauses"][0].update(description="two\nlines"), "description of C1 as a text of one line"),
        (lambda d: d["clauses"][0].update(names="vampire"), "names of C1 as a list"),
        (lambda d: d["clauses"][0].update(names=["ok", False]), "names of C1 as a text of one line, got False"),
        (lambda d: d["clauses"][0]["examples"].update(steered=[]), "got steered too"),
        (
            lambda d: d["clauses"][0]["examples"].update(allowed=["draw a vampire"]),
            "C1 has examples that both violate it and are allowed: .'draw a vampire'",
        ),
        (
            lambda d: d["clauses"][1]["examples"].update(allowed=["draw a vampire"]),
            "every example once, got .'draw a vampire'. repeatedly",
        ),
        (lambda d: d.update(examples={}), "examples as a list"),
        (lambda d: d.update(examples=[{"request": "a"}]), "got no action, clauses"),
        (lambda d: d.update(examples=[PARODY | {"clauses": ["C1", "C1"]}]), "clauses of .* to differ"),
        (lambda d: d.update(examples=[PARODY | {"clauses": ["C1", "E9"]}]), r"ids of the policy in .*\['E9'\]"),
        (lambda d: d.update(examples=[PARODY | {"clauses": ["E1"]}]), r"beside a clause that lists it .*\['E1'\]"),
        (
            lambda d: d.update(examples=[PARODY | {"action": "steer"}]),
            "from its clauses, allow, .* 'steer'",
        ),
        (lambda d: d.update(examples=[PARODY, PARODY]), "every example once"),
        (lambda d: d.update(examples=[PARODY | {"request": "draw a vampire"}]), "every example once"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_no_policy_says_where(change, message, document, written):
    change(document)
    file = written(document)
    with pytest.raises(ValueError, match=message) as raised:
        read_policy(file)
    assert str(raised.value).startswith(f"{file}: ") and "\n" not in str(raised.value)


#: Lists of lists, each nine times: half a million texts in a few lines.
REPEATED = "a: &a x\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefg"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the policy as a mapping of names to values, got None"),
        ("[" * 2000, "expected YAML in .*, got maximum recursion depth"),
        ("[" * 2000 + "]" * 2000, "expected YAML in"),
        (REPEATED, "got no clauses, version: {"),
        (
            f"version: 1\nclauses:\n- {{{REPEATED.replace(chr(10), ', ')}}}\n",
            "got no action, asset, description, id: {",
        ),
        (f"version: 1{'0' * 4000}\nclauses: []\n", "expected version: 1, got 1000"),
        (
            'version: 1\nclauses:\n- {id: "\\ud800", asset: a, description: b, action: refuse}\n',
            r"id of a clause as a text of one line, got '\\ud800'",
        ),
        ("allow everything", "got 'allow everything'"),
        ("version: 1\nclauses: !!python/object/apply:os.getcwd []\n", "expected YAML in"),
        ("version: 1\nversion: 1\nclauses: []\n", "'version' twice in one mapping"),
        (
            "version: 1\nclauses:\n- {id: C1, asset: a, description: b, action: refuse, action: allow}\n",
            "'action' twice in one mapping",
        ),
        (
            "version: 1\nclauses:\n- {id: C1, asset: no, description: b, action: allow}\n",
            "asset of C1 .*got False: put it",
        ),
        (
            "version: 1\nclauses:\n- {id: on, asset: a, description: b, action: allow}\n",
            "id of a clause .*got True: put",
        ),
        ("version: 1\nclauses:\n- {id: C1, asset: a, description: 2026-01-01, action: allow}\n", "description of C1"),
    ],
)
def test_what_yaml_reads_otherwise_than_it_looks_is_refused(text, message, written):
    with pytest.raises(ValueError, match=message) as raised:
        read_policy(written(text))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_a_policy_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a policy at .*none\.yaml, got no file"):
        read_policy(tmp_path / "none.yaml")
    with pytest.raises(FileNotFoundError):
        read_policy(tmp_path)
    (tmp_path / "latin").write_bytes(b"version: 1 # caf\xe9\n")
    with pytest.raises(ValueError, match="expected YAML in"):
        read_policy(tmp_path / "latin")


def followed(policy, cited):
    """The rule, clause by clause: the strictest of what each comes to, where its own exceptions speak before it."""
    comes_to = []
    for clause in policy.clauses:
        if clause.id in cited:
            spoken = [e.action for e in policy.exceptions if e.id in cited and e.id in clause.exceptions]
            comes_to += spoken or [clause.action]
    return next((action for action in policy.precedence if action in comes_to), policy.default)


def test_the_action_follows_from_whatever_is_cited_in_whatever_order(policy):
    ids = ["C1", "C2", "C3", "E1", "E2"]
    rng = random.Random(0)
    for precedence in itertools.permutations(ACTIONS):
        ordered = dataclasses.replace(policy, precedence=precedence, default=rng.choice(ACTIONS))
        for size in range(len(ids) + 1):
            for cited in itertools.combinations(ids, size):
                shuffled = rng.sample(cited, size)
                assert ordered.action_of(shuffled) == followed(ordered, cited), (precedence, shuffled)


def test_cases_of_it_by_hand(policy):
    assert policy.action_of([]) == "allow"
    assert policy.action_of(["C1"]) == "steer" and policy.action_of(["C1", "E1"]) == "allow"
    assert policy.action_of(["C1", "C2"]) == "refuse"
    assert policy.action_of(["C1", "C2", "E1"]) == "allow"  # it is listed by both
    assert policy.action_of(["C1", "C2", "E2"]) == "escalate"  # by C2 alone, and C1 still says steer
    assert policy.action_of(["C2", "E1", "E2"]) == "escalate"
    assert policy.action_of(["C3", "E1"]) == "escalate"  # C3 lists none
    turned = dataclasses.replace(policy, clauses=policy.clauses[::-1])
    for cited in (["C1", "C2"], ["C2", "C3"], ["C1", "C3", "E1"]):
        assert turned.action_of(cited) == policy.action_of(cited)


def test_a_model_is_shown_everything_in_sections_the_nonce_last(policy):
    text = policy.render("0123")
    assert text.endswith("## Nonce\n0123\n")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Instruction",
        "## Definitions",
        "## Criteria",
        "## Examples",
        "## Nonce",
    ]
    for name in ("C1", "C2", "C3", "E1", "E2"):
        assert f"\n{policy.criterion(name)}\n" in text
    assert policy.criterion("C1") == (
        "C1: vampire (Dracula): a pale person with fangs and a high red collar -> steer, except E1"
    )
    assert policy.criterion("E1") == "E1 (parody): a recognisable parody -> allow"
    assert '"draw a vampire" -> steer ["C1"]' in text and '"a bat in a cave" -> allow []' in text
    assert "the first of: refuse, escalate, steer, allow. Where none applies: allow." in text


def test_a_policy_without_clauses_or_examples_has_no_empty_section():
    assert "##" not in Policy(()).render().split("## Definitions")[1].split("## Nonce")[0]
    shown = Policy((Clause("C1", "a", ("a",), "b", "allow"),), (PolicyException("E1", "c"),)).render()
    assert "## Criteria\nC1: a: b -> allow\nE1: c -> allow\n" in shown and "## Examples" not in shown
