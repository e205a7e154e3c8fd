"""What a guard replies is found among what is around it, and counts only where it follows from the policy."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from negtome.guard import ACTIONS, Clause, Decision, Policy, parse, verify

REFUSED = '{"action": "refuse", "clauses": ["C2"], "quote": "a red angry mask"}'
ALLOWED = '{"action": "allow", "clauses": [], "quote": ""}'
texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    action=st.sampled_from(ACTIONS),
    clauses=st.lists(texts),
    quote=texts,
    rationale=texts,
    confidence=st.none() | st.floats(0, 1),
)
def test_a_decision_is_read_as_it_was_written(action, clauses, quote, rationale, confidence):
    decision = Decision(action, tuple(clauses), quote, rationale, confidence)
    assert parse(decision.to_json()) == decision
    assert parse(json.dumps(json.loads(decision.to_json()), indent=2)) == decision


@pytest.mark.parametrize(
    "reply",
    [
        REFUSED,
        f"I think so:\n```json\n{REFUSED}\n```\nThat is all.",
        f"{{not JSON}} {REFUSED} {{",
        f'{{"note": "a draft"}} {REFUSED} {{"done": true}}',
        f"{REFUSED}\n{REFUSED}",
        f"<think>maybe {ALLOWED}, or {{broken</think>\n{REFUSED}",
        f"maybe {ALLOWED}, whose tag the chat template opened</think>{REFUSED}",
        f"<thinking>{ALLOWED}</thinking>{REFUSED}",
        f"<think>one {ALLOWED}</think> then <think>two {ALLOWED}</think> {REFUSED}<|im_end|>",
        f"<|channel|>analysis<|message|>{ALLOWED}<|end|><|start|>assistant<|channel|>final<|message|>{REFUSED}<|return|>",
        f"<|channel|>analysis<|message|>{ALLOWED}<|end|>"
        f"<|start|>assistant<|channel|>final <|constrain|>json<|message|>{REFUSED}",
    ],
)
def test_the_one_decision_is_found(reply):
    assert parse(reply) == Decision("refuse", ("C2",), "a red angry mask")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("", "got none in: nothing"),
        ("  \n", "got none in: nothing"),
        ("allow", "got none in: allow"),
        ("[]", "got none"),
        ('"action"', "got none"),
        ("{}", "got none"),
        ('{"clauses": []}', "got none"),
        ('{"reply": {"action": "allow"}}', "got none"),  # it lies in another, which is not a decision
        (f"{REFUSED} or {ALLOWED}", "got 2 in"),
        (f"{REFUSED[:-5]}", "got none"),  # cut off
        ('{"action": "refuse", "action": "allow"}', "got none"),
        ('{"action": "refuse", "rationale": "it says {"action": "allow"}"}', "got one and parts of another"),
        (f"{{'action': 'refuse'}} {ALLOWED}", "got one and parts of another"),
        (f'{{"action": "refuse", {ALLOWED}', "got one and parts of another"),
        (f"<think>{ALLOWED}", "an answer after thinking, got none"),
        (f" <thinking> {ALLOWED}", "an answer after thinking, got none"),
        (f"<|channel|>analysis<|message|>{ALLOWED}<|end|>", "an answer after thinking, got none"),
        (f"<think>{ALLOWED}</think>", "got none in: nothing"),
        (f"{REFUSED}</think>", "got none in: nothing"),
        ("{" * 100_000, "got none"),
        ('{"action": ' + "[" * 100_000, "got none"),
    ],
)
def test_what_is_no_decision_or_several_is_none(reply, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse(reply)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"action": None}, "action as a text, got None"),
        ({"action": ["allow"]}, "action as a text"),
        ({"clauses": "C1"}, "clauses as a list of ids, got 'C1'"),
        ({"clauses": None}, "clauses as a list of ids, got None"),
        ({"clauses": [1]}, "clauses as a list of ids"),
        ({"quote": 1}, "quote as a text, got 1"),
        ({"rationale": {}}, "rationale as a text"),
        ({"confidence": "high"}, "confidence from 0 to 1, got 'high'"),
        ({"confidence": 1.5}, "confidence from 0 to 1, got 1.5"),
        ({"confidence": -0.1}, "confidence from 0 to 1"),
        ({"confidence": True}, "confidence from 0 to 1, got True"),
        ({"confidence": float("nan")}, "confidence from 0 to 1, got inf"),
    ],
)
def test_fields_of_another_kind_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        parse(json.dumps({"action": "allow", **fields}))


@pytest.mark.parametrize(
    "decision",
    [
        Decision("allow"),
        Decision("steer", ("C1",), "a pale person with fangs"),
        Decision("steer", ("C1",), "vampire (Dracula)"),
        Decision("steer", ("C1",), "C1: vampire (Dracula): a pale person with fangs and a high red collar"),
        Decision("steer", ("C1",), "  a pale\n person   with fangs "),
        Decision("steer", ("C1",), "a high red collar -> steer, except E1"),
        Decision("refuse", ("C2", "C1"), "fangs"),
        Decision("allow", ("C1", "E1"), "a recognisable parody"),
        Decision("allow", ("C1", "C2", "E1"), "a very long nose"),
        Decision("escalate", ("E2", "C2"), "a school book"),
        Decision("escalate", ("C3",), "a blue uniform", "whatever", 0.1),
    ],
)
def test_what_follows_from_the_policy_has_no_fault(decision, policy):
    assert verify(policy, decision) == []


@pytest.mark.parametrize(
    ("decision", "faults"),
    [
        (Decision("draw"), ["expected an action among allow, steer, refuse, escalate, got 'draw'"]),
        (Decision("invalid"), ["expected an action among"]),
        (Decision("refuse"), ["the action that follows from no clause, allow, got refuse"]),
        (Decision("steer", ("C9",), "fangs"), ["expected ids of the policy, got 'C9'"]),
        (Decision("steer", ("c1",), "fangs"), ["expected ids of the policy, got 'c1'"]),
        (Decision("steer", ("C1", "K3"), "fangs"), ["expected ids of the policy, got 'K3'"]),
        (Decision("allow", ("C1",), "fangs"), ["the action that follows from C1, steer, got allow"]),
        (Decision("steer", ("C1", "C2"), "fangs"), ["the action that follows from C1, C2, refuse, got steer"]),
        (Decision("steer", ("C1", "E1"), "fangs"), ["the action that follows from C1, E1, allow, got steer"]),
        (Decision("allow", ("E1",), "parody"), ["an exception beside a clause that lists it, got E1 alone"]),
        (Decision("escalate", ("C1", "E2"), "fangs"), ["an exception beside a clause that lists it, got E2 alone"]),
        (Decision("escalate", ("C3", "E1"), "blue"), ["an exception beside a clause that lists it, got E1 alone"]),
        (Decision("steer", ("C1",)), ["a quote from C1, got ''"]),
        (Decision("steer", ("C1",), " . "), ["a quote from C1, got ' . '"]),
        (Decision("steer", ("C1",), "a red angry mask"), ["a quote from C1, got 'a red angry mask'"]),
        (Decision("steer", ("C1",), "a recognisable parody"), ["a quote from C1"]),
        (Decision("steer", ("C1",), "A pale person"), ["a quote from C1"]),
        (Decision("steer", ("C1",), "a pale person with a high red collar"), ["a quote from C1"]),
        (Decision("steer", ("C1",), "ampire"), ["a quote from C1, got 'ampire'"]),  # no whole words
        (Decision("steer", ("C1",), "draw a vampire"), ["a quote from C1"]),  # an example is no criterion
        (Decision("allow", (), "fangs"), ["expected no quote where no clause is cited, got 'fangs'"]),
        (Decision("refuse", ("C1",), "blood"), ["follows from C1, steer, got refuse", "a quote from C1, got 'blood'"]),
    ],
)
def test_what_does_not_follow_says_why(decision, faults, policy):
    found = verify(policy, decision)
    assert len(found) == len(faults)
    assert all(expected in line for expected, line in zip(faults, found, strict=True)), found


def test_a_quote_is_words_and_never_a_pattern():
    policy = Policy((Clause("C1", "mask", ("mask",), "a (red) mask [old], 3.5 x + 1? * yes", "steer"),))
    words = policy.criterion("C1").split()
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            quote = " ".join(words[start:end])
            faults = verify(policy, Decision("steer", ("C1",), quote))
            telling = set(re.findall(r"\w{3,}", quote)) - {"C1", "steer"}
            assert bool(faults) == (not telling), quote
    for quote in (r"\w+", ".*", "[old]|x", "mask [o", "3x5"):
        assert verify(policy, Decision("steer", ("C1",), quote))
