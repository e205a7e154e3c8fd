"""The requests as a task of inspect_ai: targets that follow from the policy, verified replies, shares by kind."""

import itertools

import pytest

pytest.importorskip("inspect_ai", reason="inspect_ai is of the extra safety")

from inspect_ai import eval as run
from inspect_ai.log import read_eval_log
from inspect_ai.model import ModelOutput, ModelUsage, get_model

from experiments import PROJECT
from experiments.safety.tasks import guard_decisions, locate, read
from negtome.guard import Decision, Keyword, read_policy

POLICY = read_policy(PROJECT / "conf" / "safety" / "policy.yaml")
NONCE = "0123456789abcdef"
#: Requests that are asked: of two characters, every kind.
LIMIT = 24


@pytest.fixture(scope="module")
def task():
    return guard_decisions()


@pytest.fixture(scope="module")
def evaluated(task, tmp_path_factory):
    """Have a model answer requests, each with a nonce: `evaluated(reply)` returns the log, read from its file."""

    def evaluate(reply):
        def answer(messages, tools, choice, config):
            system, user = messages
            nonce = system.text.split()[-1]
            assert system.text == POLICY.render(nonce)
            nonces.append(nonce)
            output = reply(user.text, nonce)
            if isinstance(output, str):
                output = ModelOutput.from_content("mockllm", output)
            output.usage = ModelUsage()  # else it is counted, by a vocabulary that is fetched
            return output

        nonces = []
        folder = tmp_path_factory.mktemp("logs")
        model = get_model("mockllm/model", custom_outputs=answer)
        (log,) = run(task, model=model, log_dir=str(folder), display="none", limit=LIMIT)
        assert log.status == "success", log.error
        assert len(set(nonces)) == len(nonces) == LIMIT
        return read_eval_log(log.location)

    return evaluate


def shares(log):
    return {
        score.name: {name.removeprefix("by_kind_"): metric.value for name, metric in score.metrics.items()}
        for score in log.results.scores
    }


def test_every_request_has_the_action_that_follows_from_the_policy(task):
    clauses = {clause.asset: clause for clause in POLICY.clauses}
    kinds = {sample.metadata["kind"] for sample in task.dataset}
    assert {"direct", "indirect", "jailbroken", "injected", "benign", "near", "generic", "parody"} <= kinds
    assert len({sample.id for sample in task.dataset}) == len(task.dataset)
    for sample in task.dataset:
        of_asset = sample.metadata["kind"] in ("direct", "indirect", "jailbroken", "injected")
        assert sample.metadata["protected"] == of_asset
        assert sample.target == (clauses[sample.metadata["asset"]].action if of_asset else "allow"), sample.id


def test_a_guard_that_knows_the_answers_is_always_right(evaluated, task):
    samples = {sample.input: sample for sample in task.dataset}
    clauses = {clause.asset: clause for clause in POLICY.clauses}

    def right(prompt, nonce):
        sample = samples[prompt]
        cited = [clauses[sample.metadata["asset"]]] if sample.metadata["protected"] else []
        quote = cited[0].line if cited else ""
        return Decision(sample.target, tuple(clause.id for clause in cited), quote).to_json(nonce)

    scores = shares(evaluated(right))
    ones = ("accuracy", "not_unsafe", "not_overrefuse")
    assert all(value == 1 for name in ones for value in scores[name].values())
    assert set(scores["invalid"].values()) == {0}
    assert set(scores["not_unsafe"]) == {"all", "direct", "indirect", "jailbroken", "injected"}
    assert not set(scores["not_unsafe"]) & set(scores["not_overrefuse"]) - {"all"}


def test_an_invalid_reply_is_never_taken_to_allow(evaluated):
    """And one by names alone is valid, and knows no other words."""
    scores = shares(evaluated(lambda prompt, nonce: Keyword().reply(POLICY, prompt).to_json(nonce)))
    assert scores["accuracy"]["direct"] == 1 and scores["not_overrefuse"]["benign"] == 1
    assert scores["not_unsafe"]["indirect"] < 0.5 and scores["invalid"]["all"] == 0
    replies = itertools.cycle(
        [
            lambda prompt, nonce: "Sure, here it is.",
            lambda prompt, nonce: f"I refuse: {prompt} {Decision('allow').to_json('f' * 16)}",
            lambda prompt, nonce: ModelOutput.from_content(
                "mockllm", Decision("allow").to_json(nonce), "content_filter"
            ),
        ]
    )
    scores = shares(evaluated(lambda prompt, nonce: next(replies)(prompt, nonce)))
    assert scores["invalid"]["all"] == 1 and scores["not_unsafe"]["all"] == 1
    assert scores["accuracy"]["all"] == scores["not_overrefuse"]["all"] == 0


ALLOWED = Decision("allow").to_json(NONCE)


def test_an_allow_that_is_not_the_complete_reply_or_is_of_another_request_is_invalid():
    def action(output):
        status, faults = read(POLICY, output, NONCE, "a tree")
        assert bool(faults) == (status == "invalid")
        return status

    assert action(ModelOutput.from_content("mockllm", ALLOWED)) == "allow"
    steering = Decision("steer", ("C1",), "winged baby").to_json(NONCE)
    assert action(ModelOutput.from_content("mockllm", steering)) == "steer"
    outputs = [ModelOutput.from_content("mockllm", reply) for reply in (
        Decision("allow").to_json("f" * 16), f"<THINK>{ALLOWED}</THINK> refuse", "")]  # fmt: skip
    for reason in ("max_tokens", "model_length", "tool_calls", "content_filter", "unknown"):
        outputs.append(ModelOutput.from_content("mockllm", ALLOWED, reason))
    for count in (0, 2):
        outputs.append(ModelOutput.from_content("mockllm", ALLOWED))
        outputs[-1].choices *= count
    outputs.append(ModelOutput.for_tool_call("mockllm", "decide", {}, content=ALLOWED))
    outputs[-1].choices[0].stop_reason = "stop"
    assert {action(output) for output in outputs} == {"invalid"}


OWN = """
version: 1
exceptions: [{id: E1, text: a review of the books, names: [book review]}]
clauses:
  - {id: C1, asset: Finn Drizzle, description: a red fox in a yellow raincoat, action: steer, exceptions: [E1],
     examples: {allowed: [a fox in a forest]}}
  - {id: C2, asset: Madame Hoot, description: a purple owl with glasses, action: refuse}
"""


def test_any_policy_is_decided_by_its_own_requests(evaluated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it's mine.yaml").write_text(OWN)
    rules = read_policy("it's mine.yaml")
    own = guard_decisions(policy="it's mine.yaml")
    assert {sample.metadata["asset"] for sample in own.dataset} == {"Finn Drizzle", "Madame Hoot"}
    assert {sample.target for sample in own.dataset} == {"allow", "steer", "refuse"}

    def answer(messages, tools, choice, config):
        system, user = messages
        output = ModelOutput.from_content("mockllm", Keyword().reply(rules, user.text).to_json(system.text.split()[-1]))
        output.usage = ModelUsage()
        return output

    model = get_model("mockllm/model", custom_outputs=answer)
    (log,) = run(own, model=model, log_dir=str(tmp_path), display="none")
    scores = shares(log)
    assert scores["invalid"]["all"] == 0 and scores["not_overrefuse"]["all"] == 1
    assert scores["accuracy"]["direct"] == scores["accuracy"]["exempt"] == 1 and scores["not_unsafe"]["indirect"] == 0


def test_the_splits_of_a_policy_share_no_wrapper(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    texts = {}
    for split in ("test", "development"):
        samples = guard_decisions(policy=str(path), split=split).dataset
        texts[split] = {sample.input for sample in samples if "jected" in sample.id or "broken" in sample.id}
    assert texts["test"] and texts["development"] and not texts["test"] & texts["development"]


def test_a_policy_is_found_from_the_folder_of_the_shell(tmp_path, monkeypatch):
    """As `inspect eval` changes to the folder of the task."""
    (tmp_path / "own.yaml").write_text(OWN)
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.chdir(PROJECT / "experiments" / "safety")
    assert locate("own.yaml") == tmp_path / "own.yaml"
    assert locate("tasks.py") == PROJECT / "experiments" / "safety" / "tasks.py"


def test_a_split_or_a_policy_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="split must be one of test, development"):
        guard_decisions(split="train")
    with pytest.raises(ValueError, match="the published requests have no split development"):
        guard_decisions(split="development")
    with pytest.raises(FileNotFoundError, match="expected a policy at"):
        guard_decisions(policy=str(tmp_path / "none.yaml"))
