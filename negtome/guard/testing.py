"""Test whether a guard follows the policy, by the policy's own examples and by edits of its clauses.

A guard first decides the examples under the policy as it is. Under edits the policy is shown without examples, so that
a decision has to come from the clauses:

- flip: a clause gets another action; its examples must get that action, all others stay;
- delete: a clause is removed; its examples must get the default;
- rename: a clause gets another id; its examples must be decided as before, and cite that id;
- reorder: a clause moves to the front, or to the end; every decision stays;
- strip: all clauses are removed; every request must get the default.

The policy's `examples`, which test exceptions and several clauses, are decided too, and under two more edits:

- except: no clause lists the exceptions that the example cites; its clauses' own action must follow;
- precede: the action of the example comes last in the precedence; the next one must follow.

A decision changed if it was right before the edit and is right after it. It stayed if it cites the same clauses, as far
as they still exist, with the action that now follows from them. A guard that knows one policy by heart passes the
examples and no edit; one that allows everything passes all that must stay.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

from negtome.guard.audit import Audit
from negtome.guard.policy import Clause, Example, Policy
from negtome.guard.verdict import Guard, Verdict, decide

Must = Literal["be right", "change", "stay"]
#: An action, and ids of the clauses that have to be cited for it.
Answer = tuple[str, tuple[str, ...]]
#: Edits of a clause, of all clauses, and of exceptions and precedence.
EDITS = ("flip", "delete", "rename", "reorder", "strip", "except", "precede")
#: Number of other clauses whose first example is decided under every edit of a clause.
OTHERS = 2


@dataclass(frozen=True)
class Question:
    """A prompt under a policy, and what must come of it.

    Attributes:
        kind: "example", or one of `EDITS`.
        clause: id, before the edit, of the edited clause; of "example" and "strip", of the prompt's own clause; of the
            policy's `examples`, of the first cited one, "" for none.
        must: "be right" for an example; "change" or "stay" compared with the decision before the edit.
        expected: None where the decision must stay.
    """

    kind: str
    clause: str
    policy: Policy
    prompt: str
    must: Must
    expected: Answer | None = None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a question: answers as texts, `before` "" for an example, `reason` the first fault if invalid."""

    kind: str
    clause: str
    prompt: str
    must: Must
    expected: str
    got: str
    before: str
    right: bool
    invalid: bool
    reason: str


@dataclass(frozen=True)
class Tally:
    """Numbers of right and invalid decisions among the n of a kind."""

    kind: str
    must: Must
    right: int
    invalid: int
    n: int


def plan_examples(policy: Policy) -> list[Question]:
    """Return the policy's examples as questions."""
    return [
        Question("example", clause, policy, prompt, "be right", answer)
        for prompt, (clause, answer) in _answers(policy).items()
    ]


def _answers(policy: Policy) -> dict[str, tuple[str, Answer]]:
    """Return for the prompt of every example the id of its clause, and the right answer."""
    answers: dict[str, tuple[str, Answer]] = {}
    for clause in policy.clauses:
        answers |= {prompt: (clause.id, (clause.action, (clause.id,))) for prompt in clause.violates}
        answers |= {prompt: (clause.id, (policy.default, ())) for prompt in clause.allowed}
    for example in policy.examples:
        answers[example.request] = (_first_cited(example), (example.action, example.clauses))
    return answers


def plan_edits(policy: Policy, edits: int | None = None, seed: int = 0) -> list[Question]:
    """Return the questions under edits of a policy.

    Args:
        policy: has the examples.
        edits: number of clauses with examples that are edited, drawn with the seed; None for all.
        seed: of that draw, and of the other clauses whose examples are decided with each.

    Raises:
        ValueError: there are fewer clauses with examples.
    """
    editable = [clause for clause in policy.clauses if clause.violates]
    if edits is not None and not 0 <= edits <= len(editable):
        raise ValueError(f"expected to edit 0 to {len(editable)} clauses, which have examples, got {edits}")
    rng = random.Random(seed)
    edited = editable if edits is None else sorted(rng.sample(editable, edits), key=policy.clauses.index)
    shown = without_examples(policy)
    questions = []
    for clause in edited:
        rest = [other for other in editable if other.id != clause.id]
        others = [other.violates[0] for other in rng.sample(rest, min(OTHERS, len(rest)))]
        questions += _edits_of_clause(shown, clause, [*clause.allowed, *others])
    stripped = replace(shown, clauses=(), exceptions=())
    for clause in edited:
        questions += _changing("strip", clause.id, stripped, clause.violates, (policy.default, ()))
        questions += _staying("strip", clause.id, stripped, clause.allowed)
    ids = {clause.id for clause in edited}
    for example in policy.examples:
        if edits is None or ids & set(example.clauses):
            questions += _edits_of_example(shown, example)
    return questions


def count_requests(policy: Policy, edits: int | None = None, seed: int = 0) -> int:
    """Return the number of requests of `run_examples` and `run_edits`; each may be repeated once."""
    questions = plan_edits(policy, edits, seed)
    return len(_answers(policy)) + len(questions) + len({question.prompt for question in questions})


def run_examples(policy: Policy, guard: Guard, audit: Audit | None = None) -> list[Outcome]:
    """Have a guard decide the policy's own examples; errors are those of `decide`."""
    outcomes = []
    for question in plan_examples(policy):
        verdict = decide(question.policy, guard, question.prompt, audit)
        assert question.expected is not None
        right = _is_answer(verdict, question.expected)
        outcomes.append(_outcome(question, verdict, question.expected, "", right))
    return outcomes


def run_edits(
    policy: Policy, guard: Guard, edits: int | None = None, seed: int = 0, audit: Audit | None = None
) -> list[Outcome]:
    """Have a guard decide the questions of `plan_edits`, once before the edits and under each.

    A ValueError of a guard, such as one that reads no other policy, is an invalid decision; other errors are raised.
    """
    shown, answers, before, outcomes = without_examples(policy), _answers(policy), {}, []
    for question in plan_edits(policy, edits, seed):
        if question.prompt not in before:
            before[question.prompt] = _decide(shown, guard, question.prompt, audit)
        old, new = before[question.prompt], _decide(question.policy, guard, question.prompt, audit)
        if question.expected is not None:
            expected = question.expected
            right = _is_answer(old, answers[question.prompt][1]) and _is_answer(new, expected)
        elif old.action == "invalid":
            expected, right = ("as before, which was invalid", ()), False
        else:
            expected = _answer_after_edit(shown, question, old)
            right = _in_words(new.action, new.clauses) == _in_words(*expected)
        outcomes.append(_outcome(question, new, expected, _in_words(old.action, old.clauses), right))
    return outcomes


def tally(outcomes: Sequence[Outcome]) -> list[Tally]:
    """Count outcomes by kind and by what must come of them, in the order of examples and `EDITS`."""
    counts = []
    for kind in ("example", *EDITS):
        musts: tuple[Must, ...] = ("be right", "change", "stay")
        for must in musts:
            some = [one for one in outcomes if (one.kind, one.must) == (kind, must)]
            if some:
                right, invalid = sum(one.right for one in some), sum(one.invalid for one in some)
                counts.append(Tally(kind, must, right, invalid, len(some)))
    return counts


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the counts as a Markdown table: a row for the examples, and one for each kind of edit."""
    headings = {"be right": "right", "change": "changed as they must", "stay": "stayed as they must"}
    counts = tally(outcomes)
    rows = [["", *headings.values(), "invalid"]]
    for kind in dict.fromkeys(one.kind for one in counts):
        of_kind = [one for one in counts if one.kind == kind]
        cells: dict[str, str] = {one.must: f"{one.right}/{one.n}" for one in of_kind}
        invalid = f"{sum(one.invalid for one in of_kind)}/{sum(one.n for one in of_kind)}"
        rows.append([kind, *(cells.get(must, "-") for must in headings), invalid])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows
    )


def without_examples(policy: Policy) -> Policy:
    """Return a policy without its examples."""
    bare = tuple(replace(clause, violates=(), allowed=()) for clause in policy.clauses)
    return replace(policy, clauses=bare, examples=())


def _edits_of_clause(shown: Policy, edited: Clause, bystanders: Sequence[str]) -> list[Question]:
    place = next(index for index, clause in enumerate(shown.clauses) if clause.id == edited.id)
    clause, rest = shown.clauses[place], shown.clauses[:place] + shown.clauses[place + 1 :]
    action = next(action for action in shown.precedence if action not in (clause.action, shown.default))
    new_id = next(name for name in map("X{}".format, count(1)) if name not in shown)
    flipped, renamed = replace(clause, action=action), replace(clause, id=new_id)
    changes: dict[str, tuple[tuple[Clause, ...], Answer]] = {
        "flip": ((*rest[:place], flipped, *rest[place:]), (action, (clause.id,))),
        "delete": (rest, (shown.default, ())),
        "rename": ((*rest[:place], renamed, *rest[place:]), (clause.action, (new_id,))),
    }
    questions = []
    for kind, (clauses, expected) in changes.items():
        policy = replace(shown, clauses=clauses)
        questions += _changing(kind, clause.id, policy, edited.violates, expected)
        questions += _staying(kind, clause.id, policy, bystanders)
    moved = replace(shown, clauses=(clause, *rest) if place else (*rest, clause))
    return questions + _staying("reorder", clause.id, moved, [*edited.violates, *bystanders])


def _edits_of_example(shown: Policy, example: Example) -> list[Question]:
    """Return the questions without the exceptions, and with another precedence, where these change the action."""
    cited = tuple(name for name in example.clauses if isinstance(shown[name], Clause))
    bare = tuple(
        replace(clause, exceptions=tuple(name for name in clause.exceptions if name not in example.clauses))
        for clause in shown.clauses
    )
    others = [action for action in shown.precedence if action != example.action]
    changes = {
        "except": (replace(shown, clauses=bare), cited),
        "precede": (replace(shown, precedence=(*others, example.action)), example.clauses),
    }
    questions = []
    for kind, (policy, clauses) in changes.items():
        if (action := policy.action_of(clauses)) != example.action:
            questions += _changing(kind, _first_cited(example), policy, [example.request], (action, clauses))
    return questions


def _first_cited(example: Example) -> str:
    return example.clauses[0] if example.clauses else ""


def _changing(kind: str, clause: str, policy: Policy, prompts: Sequence[str], expected: Answer) -> list[Question]:
    return [Question(kind, clause, policy, prompt, "change", expected) for prompt in prompts]


def _staying(kind: str, clause: str, policy: Policy, prompts: Sequence[str]) -> list[Question]:
    return [Question(kind, clause, policy, prompt, "stay") for prompt in prompts]


def _answer_after_edit(shown: Policy, question: Question, before: Verdict) -> Answer:
    """Return the answer under an edited policy that cites what was cited before, as far as it still exists."""
    edited, new_ids = question.policy, {}
    if question.kind == "rename":
        new_ids = {old.id: new.id for old, new in zip(shown.clauses, edited.clauses, strict=True)}
    existing = [name for name in (new_ids.get(name, name) for name in before.clauses) if name in edited]
    unlisted = edited.unlisted(existing)
    cited = tuple(name for name in existing if name not in unlisted)
    return edited.action_of(cited), cited


def _decide(policy: Policy, guard: Guard, prompt: str, audit: Audit | None) -> Verdict:
    try:
        return decide(policy, guard, prompt, audit)
    except ValueError as error:
        return Verdict("invalid", None, (str(error),), (), 0.0)


def _is_answer(verdict: Verdict, answer: Answer) -> bool:
    action, clauses = answer
    return verdict.action == action and set(clauses) <= set(verdict.clauses)


def _in_words(action: str, clauses: Sequence[str]) -> str:
    return " ".join([action, *sorted(clauses)])


def _outcome(question: Question, verdict: Verdict, expected: Answer, before: str, right: bool) -> Outcome:
    got, reason = _in_words(verdict.action, verdict.clauses), verdict.faults[0] if verdict.faults else verdict.reason
    answers = (_in_words(*expected), got, before)
    invalid = verdict.action == "invalid"
    return Outcome(question.kind, question.clause, question.prompt, question.must, *answers, right, invalid, reason)
