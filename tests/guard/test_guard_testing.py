"""What is counted of a guard under edits is what it does: of guards that obey, know by heart, allow all, or guess."""

import dataclasses
import random

import pytest

from negtome.guard import Decision, Keyword, read_policy
from negtome.guard.testing import (
    EDITS,
    count_requests,
    plan_edits,
    plan_examples,
    run_edits,
    run_examples,
    tally,
    without_examples,
)

#: C1 has two examples and C2, C3 one each; of each there is one near to it. Two others are asked with every edit.
OF_CLAUSES = EDITS[:5]
CHANGE = 2 + 1 + 1
STAY = 3 * (1 + 2)


class Stub:
    """A guard that replies by a function of policy and prompt."""

    def __init__(self, name, reply):
        self.name = self.id = name
        self.reply = reply


def by_heart(policy):
    """Decides by one policy, whichever it is shown."""
    return Stub("by heart", lambda shown, prompt: Keyword().reply(policy, prompt))


def strict(policy):
    """Refuses to read another policy than its own."""

    def reply(shown, prompt):
        if shown != policy:
            raise ValueError("expected my policy, got another")
        return Keyword().reply(policy, prompt)

    return Stub("strict", reply)


ALLOWS_ALL = Stub("allows all", lambda policy, prompt: Decision("allow"))


class Guesses:
    """Cites a clause of the policy, or none, by lot; remembers what it was asked, and said."""

    name = id = "guesses"

    def __init__(self):
        self.random, self.said = random.Random(0), []

    def reply(self, policy, prompt):
        cited = self.random.choice([(), *((clause.id,) for clause in policy.clauses)])
        quote = policy.criterion(cited[0]) if cited else ""
        self.said.append((policy, prompt, policy.action_of(cited), cited))
        return Decision(policy.action_of(cited), cited, quote)


def counts(outcomes):
    return {(row.kind, row.must): (row.right, row.invalid, row.n) for row in tally(outcomes)}


def test_a_guard_that_obeys_passes_everything(policy):
    outcomes = run_examples(policy, Keyword()) + run_edits(policy, Keyword())
    assert all(outcome.right and not outcome.invalid for outcome in outcomes)
    assert counts(outcomes) == {
        ("example", "be right"): (7, 0, 7),
        ("flip", "change"): (CHANGE, 0, CHANGE),
        ("flip", "stay"): (STAY, 0, STAY),
        ("delete", "change"): (CHANGE, 0, CHANGE),
        ("delete", "stay"): (STAY, 0, STAY),
        ("rename", "change"): (CHANGE, 0, CHANGE),
        ("rename", "stay"): (STAY, 0, STAY),
        ("reorder", "stay"): (CHANGE + STAY, 0, CHANGE + STAY),
        ("strip", "change"): (CHANGE, 0, CHANGE),
        ("strip", "stay"): (3, 0, 3),
    }


def test_a_guard_that_knows_one_policy_by_heart_passes_its_examples_alone(policy):
    guard = by_heart(policy)
    found = counts(run_examples(policy, guard) + run_edits(policy, guard))
    assert found["example", "be right"] == (7, 0, 7)
    # It cites a clause that says otherwise, is gone, or is called otherwise: nothing of that follows from the policy.
    for kind in ("flip", "delete", "rename", "strip"):
        assert found[kind, "change"] == (0, CHANGE, CHANGE)
    for kind in ("flip", "delete", "rename"):
        assert found[kind, "stay"] == (STAY, 0, STAY)
    assert found["reorder", "stay"] == (CHANGE + STAY, 0, CHANGE + STAY)
    assert found["strip", "stay"] == (3, 0, 3)


def test_a_guard_that_allows_everything_passes_what_must_stay(policy):
    found = counts(run_examples(policy, ALLOWS_ALL) + run_edits(policy, ALLOWS_ALL))
    assert found["example", "be right"] == (3, 0, 7)
    # deleting comes to the default, which it says anyway: that is no change
    assert all(found[kind, "change"] == (0, 0, CHANGE) for kind in ("flip", "delete", "rename", "strip"))
    assert all(right == n for (_, must), (right, _, n) in found.items() if must == "stay")


def test_a_guard_that_refuses_other_policies_is_invalid_under_edits(policy):
    assert all(outcome.right for outcome in run_examples(policy, strict(policy)))
    assert tally([]) == []
    outcomes = run_edits(policy, strict(policy))
    assert all(outcome.invalid and not outcome.right for outcome in outcomes)
    assert {outcome.reason for outcome in outcomes} == {"expected my policy, got another"}
    assert {outcome.expected for outcome in outcomes if outcome.must == "stay"} == {"as before, which was invalid"}
    with pytest.raises(ValueError, match="expected my policy"):
        run_examples(policy, strict(without_examples(policy)))


def test_the_counts_of_a_guard_that_guesses_are_those_of_what_it_said(policy):
    guard = Guesses()
    outcomes = run_edits(policy, guard)
    said = {(asked, prompt): (action, cited) for asked, prompt, action, cited in guard.said}
    plain = without_examples(policy)
    right = {prompt: clause for clause in policy.clauses for prompt in clause.violates}
    changed = {kind: [0, 0, 0] for kind in OF_CLAUSES}
    stayed = {kind: [0, 0, 0] for kind in OF_CLAUSES}
    for question in plan_edits(policy):
        before, after = said[plain, question.prompt], said[question.policy, question.prompt]
        if question.must == "stay":
            edited = before[1] == (question.clause,) or (question.kind == "strip" and before[1])
            now = {"flip": after[1] == before[1], "rename": after[1] == ("X1",)}.get(question.kind, after[1] == ())
            stayed[question.kind][0] += now if edited and question.kind != "reorder" else before == after
            stayed[question.kind][2] += 1
        else:
            clause = right[question.prompt]
            was = before == (clause.action, (clause.id,))
            new = after[0] == "allow" if question.kind in ("delete", "strip") else after == question.expected
            changed[question.kind][0] += was and new
            changed[question.kind][2] += 1
    found = counts(outcomes)
    assert {kind: [*found[kind, "stay"]] for kind in OF_CLAUSES} == stayed
    assert {kind: [*found[kind, "change"]] for kind in OF_CLAUSES if kind != "reorder"} == {
        kind: count for kind, count in changed.items() if kind != "reorder"
    }
    total = sum(count[0] for count in (*changed.values(), *stayed.values()))
    assert 0 < total < len(outcomes)  # it is right at times


def test_who_cited_the_edited_clause_wrongly_goes_with_it(policy):
    eager = Stub(
        "eager", lambda policy, prompt: Keyword().reply(policy, prompt.replace("a bat", "a parody of a vampire"))
    )
    found = [one for one in run_edits(policy, eager) if one.prompt == "a bat in a cave"]
    assert {one.kind: (one.before, one.expected) for one in found if one.clause == "C1"} == {
        "flip": ("allow C1 E1", "allow C1 E1"),
        "delete": ("allow C1 E1", "allow"),
        "rename": ("allow C1 E1", "allow E1 X1"),
        "reorder": ("allow C1 E1", "allow C1 E1"),
        "strip": ("allow C1 E1", "allow"),
    }
    assert all(one.right for one in found)


def test_edits_are_of_one_clause_and_what_is_asked_is_not_shown(policy):
    ids = [clause.id for clause in policy.clauses]
    for question in plan_edits(policy):
        edited, shown = question.policy, question.policy.render()
        assert question.prompt not in shown and "## Examples" not in shown
        others = [clause for clause in without_examples(policy).clauses if clause.id != question.clause]
        now = {clause.id: clause for clause in edited.clauses}
        if question.kind == "strip":
            assert edited.clauses == edited.exceptions == ()
            continue
        assert [now[clause.id] for clause in others] == others and edited.exceptions == policy.exceptions
        new = set(now) - {clause.id for clause in others}
        if question.kind == "flip":
            assert new == {question.clause} and list(now) == ids
            assert now[question.clause].action not in (policy[question.clause].action, policy.default)
        elif question.kind == "delete":
            assert new == set()
        elif question.kind == "rename":
            assert new == {"X1"} and list(now).index("X1") == ids.index(question.clause)
        else:
            assert new == {question.clause} and list(now) != ids


def test_a_clause_without_examples_is_not_edited(policy):
    bare = dataclasses.replace(policy.clauses[0], violates=(), allowed=())
    policy = dataclasses.replace(policy, clauses=(bare, *policy.clauses[1:]))
    for questions in (plan_edits(policy), plan_examples(policy)):
        assert {question.clause for question in questions} == {"C2", "C3"}


def test_a_new_name_is_nobody_elses(policy):
    taken = dataclasses.replace(policy.clauses[0], id="X1", exceptions=())
    policy = dataclasses.replace(policy, clauses=(taken, *policy.clauses[1:]))
    named = {clause.id for question in plan_edits(policy) for clause in question.policy.clauses}
    assert named == {"X1", "X2", "C2", "C3"}


def test_clauses_are_drawn_with_a_seed_and_the_calls_are_told_beforehand(policy, told):
    drawn = {tuple(dict.fromkeys(q.clause for q in plan_edits(policy, 1, seed))) for seed in range(20)}
    assert drawn == {("C1",), ("C2",), ("C3",)}
    assert plan_edits(policy, 2, 5) == plan_edits(policy, 2, 5)
    assert plan_edits(policy, 0) == []
    for edits in (0, 1, 2, None):
        guard = told(Decision("allow"))
        run_examples(policy, guard)
        run_edits(policy, guard, edits, seed=1)
        assert len(guard.asked) == count_requests(policy, edits, seed=1)
    for wrong in (4, -1):
        with pytest.raises(ValueError, match=f"expected to edit 0 to 3 clauses, which have examples, got {wrong}"):
            plan_edits(policy, wrong)


def test_a_guard_that_obeys_passes_with_one_clause_and_with_another_default(policy):
    for changed in (
        dataclasses.replace(policy, clauses=policy.clauses[:1]),
        dataclasses.replace(policy, default="refuse"),
    ):
        outcomes = run_examples(changed, Keyword()) + run_edits(changed, Keyword())
        assert outcomes and all(outcome.right for outcome in outcomes)


def test_an_examples_action_without_its_clause_is_wrong(policy, told):
    cites_another = Decision("steer", ("C1",), "fangs")
    policy = dataclasses.replace(
        policy, clauses=(policy.clauses[0], dataclasses.replace(policy.clauses[1], action="steer"))
    )
    outcomes = run_examples(policy, told(cites_another))
    assert [outcome.right for outcome in outcomes] == [True, True, False, False, False]
    assert (outcomes[3].expected, outcomes[3].got) == ("steer C2", "steer C1")


@pytest.fixture
def longer(document, written):
    """The policy with examples of an exception and of several clauses."""
    document["examples"] = [
        {"request": "a parody of a vampire", "action": "allow", "clauses": ["C1", "E1"]},
        {"request": "a vampire beside a goblin", "action": "refuse", "clauses": ["C1", "C2"]},
        {"request": "a tree", "action": "allow", "clauses": []},
    ]
    return read_policy(written(document))


def ignore_exceptions(policy, prompt):
    bare = tuple(dataclasses.replace(clause, exceptions=()) for clause in policy.clauses)
    return Keyword().reply(dataclasses.replace(policy, exceptions=(), clauses=bare, examples=()), prompt)


def ignore_precedence(policy, prompt):
    """Cite the first clause alone."""
    first, *others = Keyword().reply(policy, prompt).clauses or (None,)
    cited = () if first is None else (first, *(name for name in others if name.startswith("E")))
    return Decision(policy.action_of(cited), cited, policy.criterion(first) if cited else "")


def test_exceptions_and_precedence_are_tested(longer):
    guard = Keyword()
    outcomes = run_examples(longer, guard) + run_edits(longer, guard)
    assert all(one.right and not one.invalid for one in outcomes)
    found = counts(outcomes)
    assert found["example", "be right"] == (10, 0, 10)
    assert found["except", "change"] == found["precede", "change"] == (1, 0, 1)
    assert len(outcomes) == len(plan_examples(longer)) + len(plan_edits(longer))


@pytest.mark.parametrize(
    ("reply", "wrong"),
    [
        (ignore_exceptions, {("example", "a parody of a vampire"), ("except", "a parody of a vampire")}),
        (ignore_precedence, {("example", "a vampire beside a goblin"), ("precede", "a vampire beside a goblin")}),
    ],
)
def test_who_ignores_exceptions_or_precedence_fails_with_examples_of_them_alone(reply, wrong, longer):
    policy, guard = dataclasses.replace(longer, examples=()), Stub("ignores", reply)
    assert all(one.right for one in run_examples(policy, guard) + run_edits(policy, guard))
    outcomes = run_examples(longer, guard) + run_edits(longer, guard)
    assert {(one.kind, one.prompt) for one in outcomes if not one.right} == wrong


def test_who_knows_precedence_by_heart_fails_under_its_edit(longer):
    def reply(policy, prompt):
        edited = dataclasses.replace(policy, exceptions=longer.exceptions, precedence=longer.precedence)
        return Keyword().reply(edited, prompt)

    guard = Stub("knows", reply)
    assert all(one.right for one in run_examples(longer, guard))
    assert {one.kind for one in run_edits(longer, guard) if not one.right} == {"precede"}


def test_examples_of_clauses_that_are_not_drawn_are_not_edited(longer):
    kinds = {seed: {q.kind for q in plan_edits(longer, 1, seed)} for seed in range(20)}
    drawn = {seed: plan_edits(longer, 1, seed)[0].clause for seed in kinds}
    assert {drawn[seed]: "except" in kinds[seed] for seed in kinds} == {"C1": True, "C2": False, "C3": False}
    assert plan_edits(longer, 0) == []
