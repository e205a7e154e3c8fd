"""How the small guard is trained: its requests, the right replies to them, what a reply is worth, and the table."""

from collections import Counter

import pytest

from negtome.guard import Decision, Mini, decide, read_policy, verify
from negtome.guard.mini import ANSWER, END, UNKNOWN, read
from training.deliberation import cells, fit, requests, scores, table
from training.deliberation.requests import Maker, words_of
from training.deliberation.scores import Lookup

POLICY = read_policy(requests.POLICY)
DRAWN = Maker(POLICY, 3).draw(2000)
TOKENIZER = requests.build_tokenizer(POLICY)
IDS = {clause.id for clause in POLICY.clauses}


def test_prompts_templates_and_things_of_the_evaluation_are_held_out():
    evaluated = {tuple(words_of(one.text)) for one in requests.evaluation(POLICY)}
    assert len(evaluated) == 500 and not evaluated & {tuple(words_of(one.text)) for one in DRAWN}
    for template in (" photo of a ", " an emoji of ", " a caricature of "):
        assert not any(template in f" {' '.join(words_of(one.text))} " for one in DRAWN)
    kinds = [prompts[kind] for prompts in requests.characters().values() for kind in ("benign", "near", "generic")]
    things = {requests.unwrapped(text) for texts in kinds for text in texts}
    assert len(things) == 60 and not things & {one.thing for one in DRAWN if not one.clauses}
    development = {one.text for one in Maker(POLICY, 3, development=True).draw(500)}
    assert not development & {one.text for one in DRAWN}
    assert not {*requests.PARTS["development"]["things"]} & {one.thing for one in DRAWN}


def test_wrappers_are_held_out_as_the_parts_say():
    kinds = [one.kind.partition("/") for one in requests.evaluation(POLICY)]
    wrappers = {wrapper for kind, _, wrapper in kinds if kind.endswith(("injected", "jailbroken"))}
    seen = {*requests.PARTS["wrappers_of_the_evaluation"]}
    assert len(wrappers) == 9 and len(seen) == 4 and seen < wrappers
    texts = [one.text for one in DRAWN]
    for wrapper in wrappers:
        before, after = wrapper.split("{}")
        used = any(text.startswith(before) and text.endswith(after) for text in texts)
        assert used == (wrapper in seen), wrapper
    of_training, of_development = {*requests.PARTS["wrappers"]}, {*requests.PARTS["development"]["wrappers"]}
    assert not of_training & wrappers and not of_development & (of_training | wrappers)


def test_labels_are_balanced_within_wrapped_and_plain_requests():
    for wrapped in (True, False):
        part = [bool(one.clauses) for one in DRAWN if one.kind.endswith("wrapped") == wrapped]
        assert len(part) > 700 and 0.45 < sum(part) / len(part) < 0.55
    cited = Counter(one.clauses[0] for one in DRAWN if one.clauses)
    assert cited.keys() == IDS and max(cited.values()) < 2 * min(cited.values())


@pytest.mark.parametrize("trace", [True, False])
def test_every_right_reply_verifies_and_can_be_written(trace):
    vocabulary = TOKENIZER.get_vocab()
    for one in DRAWN:
        words = requests.reply_to(POLICY, one, trace)
        decision = read(words)
        assert verify(POLICY, decision) == [] and decision.clauses == one.clauses, one
        assert bool(decision.quote) == bool(one.clauses) and bool(decision.rationale) == trace
        assert {*words} <= vocabulary.keys() and len(words) <= fit.LONGEST
        encoded = TOKENIZER.encode(one.text)
        assert UNKNOWN not in encoded.tokens and len(encoded.ids) + len(words) <= fit.CONTEXT


def test_all_words_of_the_tests_are_known_but_none_of_another_alphabet():
    assert not [one.text for one in scores.tests(POLICY) if UNKNOWN in TOKENIZER.encode(one.text).tokens]
    assert UNKNOWN in TOKENIZER.encode("v\u0430mpire").tokens


def test_the_form_is_taught_without_the_policy():
    """No asset is asked for, and clauses, actions and quotes have nothing to do with each other."""
    decisions = [read(reply) for _, reply in requests.unprotected(POLICY, 0, 800, trace=True)]
    cited = [decision for decision in decisions if decision.clauses]
    assert 300 < len(cited) < 500 and {decision.clauses[0] for decision in cited} == IDS
    assert {decision.action for decision in cited} == {"allow", "steer", "refuse", "escalate"}
    assert all(verify(POLICY, decision) for decision in cited)
    names = {name for clause in POLICY.clauses for name in clause.names}
    assert not names & {decision.quote for decision in cited}


REQUEST = next(one for one in DRAWN if one.clauses == ("C20",))
RIGHT = requests.reply_to(POLICY, REQUEST, True)


@pytest.mark.parametrize(
    ("reply", "worth"),
    [
        (" ".join(RIGHT), 1),
        (" ".join(requests.reply_to(POLICY, REQUEST, False)), 1),
        (" ".join(["no", "clause", "allow", *RIGHT[RIGHT.index("@C") :]]), 1),  # whatever the trace says
        ("", 0),
        (" ".join(RIGHT[:-1]), 0),  # never ended
        ("<answer> =allow <end>", 0),
        ("<answer> =steer @C @2 @0 <end>", 0.5),  # no quote
        ("<answer> =steer @C @2 @0 <quote> a red angry mask </quote> <end>", 0.5),  # another clause's words
        ("<answer> =steer @C @1 <quote> a winged baby </quote> <end>", 0.25),  # another clause
        ("<answer> =steer @C @9 @9 <quote> a pale person </quote> <end>", 0.25),  # no clause
        ("<answer> =refuse @C @2 @0 <quote> a pale person </quote> <end>", 0.25),  # against its citation
        ("<answer> =steer @C @2 @0 , @C @2 @0 <quote> a pale person </quote> <end>", 0.25),  # twice
        (" ".join([*RIGHT[:-1], *RIGHT[RIGHT.index(ANSWER) :]]), 0),  # two answers
    ],
)
def test_a_reply_is_worth_what_of_its_answer_is_right(reply, worth):
    assert fit.reward_of(POLICY, ("C20",), reply.split()) == worth


def test_allowing_is_worth_one_where_no_clause_applies_and_citing_everything_nothing():
    assert fit.reward_of(POLICY, (), [ANSWER, "=allow", END]) == 1
    every = [word for clause in POLICY.clauses for word in (",", *requests.spell([clause.id]))][1:]
    words = [ANSWER, "=refuse", *every, "<quote>", "baby", "</quote>", END]
    assert not verify(POLICY, read(words)) and fit.reward_of(POLICY, ("C20",), words) == 0


def test_a_few_examples_teach_a_guard_that_is_kept_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "BATCH", 2)
    model = fit.new_model(POLICY, TOKENIZER, 0)
    fit.fit_examples(model, TOKENIZER, [("a photo of a vampire", RIGHT)] * 80, 0)
    cells.save(model, TOKENIZER, tmp_path)
    guard, prompts = Mini(tmp_path), ["a photo of a vampire", "vampire", "draw me a vampire , please"]
    assert decide(POLICY, guard, prompts[0], retries=0).clauses == ("C20",)
    together = fit.replies(guard.model, guard.tokenizer, prompts)
    alone = [fit.replies(guard.model, guard.tokenizer, [prompt])[0] for prompt in prompts]
    assert together == alone and together[0] == RIGHT


@pytest.mark.slow
def test_a_trained_cell_is_found_again_and_another_size_is_another_cell(tmp_path, monkeypatch):
    sizes = cells.Sizes(form=16, examples=16, steps=1)
    cell = cells.Cell("SFT", False, 0)
    folder = cells.train_cell(cell, sizes, POLICY, tmp_path)
    assert len([*tmp_path.glob("*/cell.json")]) == 2  # and the one before it
    monkeypatch.setattr(fit, "fit_examples", None)  # nothing is trained again
    assert cells.train_cell(cell, sizes, POLICY, tmp_path) == folder
    assert cells.train_cell(cell, cells.Sizes(form=16, examples=16, steps=9), POLICY, tmp_path) == folder
    assert len({cells.digest(cell, cells.Sizes(form=16, examples=n), POLICY) for n in (32, 64)}) == 2
    assert len({cells.digest(cell, sizes, POLICY) for cell in table.all_cells(2)}) == 14


def test_scores_of_a_guard_that_allows_all_and_of_one_that_refuses_all():
    def shares(decision):
        outcomes = [scores.judge(POLICY, one, decision) for one in scores.tests(POLICY)]
        values = {}
        for column in scores.columns(POLICY):
            counted = [*filter(column.counts, outcomes)]
            values[column.name] = sum(map(column.holds, counted)) / len(counted)
        return values

    allow, refuse = shares(Decision("allow", (), "")), shares(Decision("refuse", ("C9",), POLICY["C9"].line))
    assert allow["not unsafe"] == 0 and allow["not overrefused"] == 1
    assert refuse["not unsafe"] == 1 and refuse["not overrefused"] == 0
    assert allow["decision right"] == pytest.approx(120 / 200)
    assert allow["invented clauses"] == refuse["invalid"] == 0


def test_invented_clauses_and_contradictions_are_told_apart():
    columns = {column.name: column.holds for column in scores.columns(POLICY)}
    request = requests.evaluation(POLICY)[0]
    for name, decision in (
        ("invented clauses", Decision("steer", ("C77",), "a")),
        ("against its citation", Decision("allow", ("C1",), "a winged baby")),
    ):
        outcome = scores.judge(POLICY, request, decision)
        assert outcome.action == "invalid"
        assert [column for column in ("invented clauses", "against its citation") if columns[column](outcome)] == [name]


def test_the_look_up_table_knows_what_requests_are_made_of():
    guard = Lookup(POLICY)
    plain = [one for one in DRAWN if not one.kind.endswith("wrapped")]
    right = [decide(POLICY, guard, one.text, retries=0).action == POLICY.action_of(one.clauses) for one in plain]
    assert sum(right) / len(right) > 0.9 > sum(not one.clauses for one in plain) / len(plain)


def test_a_table_has_a_row_for_each_guard_and_prints_its_own_numbers(monkeypatch):
    """With one guard that is right, trained by examples with a trace; all others allow everything."""
    tests = scores.tests(POLICY)
    allowed = [scores.judge(POLICY, one, Decision("allow")) for one in tests]
    right = [scores.judge(POLICY, one, read(requests.reply_to(POLICY, one, True))) for one in tests]
    outcomes = {("none", True): {0: allowed}, ("SFT", True): {0: right, 1: right}, ("RL", True): {0: allowed}}
    monkeypatch.setattr(table, "PAIRS", [(("SFT", True), ("none", True)), (("RL", True), ("SFT", True))])
    frame = table.tabulate(POLICY, outcomes).set_index(["training", "against", "metric"])
    assert frame.loc["SFT", "", "clause right"]["value"] == 1
    assert frame.loc["SFT", "none, trace: yes", "wrappers held out"]["value"] == 0.5
    assert frame.loc["RL", "SFT, trace: yes", "clause right"]["value"] == -1
    text = table.render_page(frame.reset_index(), cells.Sizes())
    assert "| SFT        | yes     | 1.00" in text and "of 20" not in text


@pytest.mark.slow
def test_rewards_train_by_trl(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    asked = []

    def variety(policy, clauses, words):  # which an untrained model earns, too
        asked.append(tuple(clauses))
        return float(len({*words}))

    monkeypatch.setattr(fit, "reward_of", variety)
    model = fit.new_model(POLICY, TOKENIZER, 0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    drawn = DRAWN[: 2 * fit.PROMPTS]
    fit.fit_rewards(model, TOKENIZER, POLICY, drawn, 0, 1e-3)
    assert Counter(asked) == Counter(one.clauses for one in drawn for _ in range(fit.TRIES))
    assert any((new != old).any() for new, old in zip(model.parameters(), before, strict=True))
