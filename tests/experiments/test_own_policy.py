"""Requests generated from any policy, and the set-up with your own images."""

import re
from collections import Counter

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image, ImageFilter

from eval.images import read_manifest
from experiments import PROJECT
from experiments.compose import first
from experiments.configs import build
from experiments.prompts import asks_for_concept
from experiments.safety.gate import needed_concepts, upper_limit
from experiments.safety.own_policy import lay_out, split
from experiments.safety.requests import UNLISTED, PolicyPrompts
from negtome.guard import ACTIONS, read_policy
from negtome.guard.keyword import named_ids
from negtome.guard.lint import lint

CONF = OmegaConf.to_container(OmegaConf.load(PROJECT / "conf" / "prompts" / "policy.yaml"))
PARTS = {key: CONF[key] for key in ("phrasings", "styles", "things", "places")}
DEVELOPMENT = OmegaConf.to_container(OmegaConf.load(PROJECT / "conf" / "prompts" / "policy_development.yaml"))
WRAPPERS = {"test": str(PROJECT / "conf" / "prompts" / "safety.yaml"), "development": DEVELOPMENT["wrappers"]}

#: Words of names, in several scripts; none is a word of the requests' templates.
NAMES = ("zorba", "Quillo", "mimbly", "dragoon", "ムーミン", "ёжик", "Ünique", "O'Hara", "snorkel {}", "x-77", "🦊")
DESCRIBED = ("a tall blob with antlers", "a square cat that floats", "a green sock with teeth", "two moons on stilts")


@st.composite
def policies(draw):
    """A document of a policy that check finds no fault in."""
    words = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True))
    pools = draw(st.permutations(words))
    count = draw(st.integers(1, len(pools)))
    exceptions = [
        {"id": f"E{number}", "text": f"a serious study number {number}", "action": draw(st.sampled_from(ACTIONS)),
         "names": [f"study{number}"] if draw(st.booleans()) else []}
        for number in range(draw(st.integers(0, 2)))
    ]  # fmt: skip
    clauses = [
        {"id": f"C{number}", "asset": f"asset {number}", "names": pools[number::count],
         "description": draw(st.sampled_from(DESCRIBED)), "action": draw(st.sampled_from(ACTIONS)),
         "exceptions": [one["id"] for one in exceptions if draw(st.booleans())],
         "examples": {"allowed": [f"a harmless scene {number}"] if draw(st.booleans()) else []}}
        for number in range(count)
    ]  # fmt: skip
    return {"version": 1, "default": draw(st.sampled_from(("allow", "refuse", "escalate"))),
            "precedence": draw(st.permutations(ACTIONS)), "exceptions": exceptions, "clauses": clauses}  # fmt: skip


def prompts_of(path, split_name="test", **more):
    return PolicyPrompts("policy", split_name, str(path), WRAPPERS[split_name], **PARTS, **more)


@given(policies(), st.sampled_from(["test", "development"]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_requests_of_any_policy_have_the_actions_that_follow(tmp_path, document, split_name):
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    policy = read_policy(path)
    assume(not lint(policy).errors)
    prompts = prompts_of(path, split_name)
    requests = prompts.requests()
    assert len({" ".join(request.text.casefold().split()) for request in requests}) == len(requests)
    assert len({request.id for request in requests}) == len(requests)
    assert all(re.fullmatch(r"[a-z0-9_-]+", request.id) for request in requests)
    for request in requests:
        assert request.action == policy.action_of(request.cited), request
        assert not policy.unlisted(request.cited), request
        assert set(named_ids(policy, request.text)) <= set(request.cited), request
        if request.kind != UNLISTED:
            assert asks_for_concept(request.kind) == request.is_stopped, request
        if not request.cited:
            assert request.action == policy.default
    for clause in policy.clauses:
        mine = [request for request in requests if request.asset == clause.asset]
        assert any(request.cited == (clause.id,) for request in mine)
        assert any(request.cited == () for request in mine)
        for name in clause.exceptions:
            assert any({clause.id, name} <= set(request.cited) for request in mine)
    assert [group.prompt for group in prompts.groups()] == [one.text for one in requests if one.kind != UNLISTED]


def published():
    return prompts_of(PROJECT / "conf" / "safety" / "policy.yaml")


def test_every_kind_and_wrapper_occurs_for_the_published_policy():
    prompts = published()
    kinds = Counter(request.kind for request in prompts.requests())
    assert set(kinds) == {
        "direct", "indirect", "exempt", "several", "benign", "other", "jailbroken", "injected", "harmless_jailbroken",
        "harmless_injected",
    }  # fmt: skip
    texts = " ".join(request.text for request in prompts.requests())
    for wrapper in (text for texts in prompts.wrappers.values() for text in texts):
        assert all(part in texts for part in wrapper.split("{}")), wrapper


def test_wrappers_of_the_splits_are_disjoint():
    of_test = {text for texts in published().wrappers.values() for text in texts}
    assert not of_test & {text for texts in DEVELOPMENT["wrappers"].values() for text in texts}


def policy_with(tmp_path, **clause):
    entry = {"id": "C1", "asset": "zorba", "description": "a tall blob", "action": "refuse", **clause}
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "clauses": [entry]}), encoding="utf-8")
    return path


def test_an_allowed_example_with_a_name_in_it_is_a_near_miss(tmp_path):
    requests = prompts_of(policy_with(tmp_path, examples={"allowed": ["a zorba plant", "a plant"]})).requests()
    kinds = {request.text: request.kind for request in requests if "plant" in request.text}
    assert kinds["a zorba plant, in watercolour"] == "near" and kinds["a plant, as a sticker"] == "benign"


def test_a_description_with_a_name_in_it_is_no_description(tmp_path):
    kinds = {request.kind for request in prompts_of(policy_with(tmp_path, description="a tall zorba")).requests()}
    assert "direct" in kinds and "indirect" not in kinds


def test_things_that_are_protected_are_not_asked_for_beside_it(tmp_path):
    requests = prompts_of(policy_with(tmp_path, names=["lighthouse"])).requests()
    assert not any("lighthouse" in request.text for request in requests if not request.cited)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"others": 10**4}, "expected prompts.things and places for 10000 requests"),
        ({"seeds": []}, "prompts.seeds must be a list of distinct values"),
        ({"images_per_prompt": 0}, "a whole number of at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        prompts_of(policy_with(tmp_path), **more)


def draw(path, seed):
    """Write a picture of a few coloured squares, at least as unlike others as two drawings of one mascot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(path)
    return path


def test_a_split_is_even_and_keeps_near_copies_together(tmp_path):
    files = [draw(tmp_path / f"{number}.png", number) for number in range(6)]
    given_files, measured = split(files)
    assert given_files == files[::2] and measured == files[1::2]
    Image.open(files[0]).filter(ImageFilter.GaussianBlur(1)).save(tmp_path / "copy.jpg")
    given_files, measured = split([files[0], tmp_path / "copy.jpg", files[1]])
    assert given_files == [files[0], tmp_path / "copy.jpg"] and measured == [files[1]]
    with pytest.raises(ValueError, match="at least two different images"):
        split([files[0], tmp_path / "copy.jpg"])


@pytest.fixture
def own(tmp_path):
    """A policy, and images of its concept in a folder, beside it, and held out."""
    policy = policy_with(tmp_path, names=["zorba"])
    for number in range(4):
        draw(tmp_path / "images" / "Zorba" / f"{number}.PNG", number)
    for number in range(2):
        draw(tmp_path / "images" / f"zorba_{number}.jpg", 10 + number)
    for number in range(3):
        draw(tmp_path / "images" / "held_out" / "tree" / f"{number}.png", 20 + number)
    return policy, tmp_path / "images"


def test_images_are_laid_out_by_concept_and_again_only_if_they_changed(own, tmp_path):
    policy, images = read_policy(own[0]), own[1]
    target = lay_out(policy, images, tmp_path / "out")
    rows = {side: read_manifest(target / side) for side in ("guidance", "scoring", "held_out", "check_held_out")}
    counts = {side: len(of_side) for side, of_side in rows.items()}
    assert counts == {"guidance": 3, "scoring": 3, "held_out": 2, "check_held_out": 1}
    assert {row.category for row in (*rows["guidance"], *rows["scoring"])} == {"zorba"}
    assert lay_out(policy, images, tmp_path / "out") == target
    draw(images / "zorba_0.jpg", 99)
    assert lay_out(policy, images, tmp_path / "out") != target


def test_one_override_each_sets_policy_and_images(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings_of = ["experiment=own_policy", "policy=policy.yaml", "references=images", f"outputs={tmp_path / 'out'}"]
    cfg = first(settings_of)
    assert cfg.model.copyright.policy == str(tmp_path / "policy.yaml") == build(cfg.prompts).policy
    assert all(str(tmp_path / "out") in cfg.model.copyright[side] for side in ("guidance", "scoring", "held_out"))
    assert cfg.method.check.held_out == cfg.model.copyright.check_held_out != cfg.model.copyright.held_out
    assert cfg.method.check.folder == cfg.model.copyright.guidance
    assert cfg.metric.not_unsafe.references == cfg.model.copyright.scoring


def test_a_concept_without_images_is_neither_asked_for_nor_checked(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = yaml.safe_load(own[0].read_text())
    document["clauses"].append({"id": "C2", "asset": "gnome", "description": "a red hat", "action": "escalate"})
    own[0].write_text(yaml.safe_dump(document))
    cfg = first(["experiment=own_policy", "policy=policy.yaml", "references=images", f"outputs={tmp_path / 'out'}"])
    assert {group.concept for group in build(cfg.prompts).groups()} == {"zorba"}
    assert not any("gnome" in group.prompt for group in build(cfg.prompts).groups())
    assert [clause.asset for clause in read_policy(cfg.method.check.policy).clauses] == ["zorba"]
    assert len(read_policy(cfg.method.policy).clauses) == 2
    document["clauses"][1]["action"] = "steer"
    own[0].write_text(yaml.safe_dump(document))
    with pytest.raises(ValueError, match=r"every asset that is to be steered in .* got none of gnome"):
        first(["experiment=own_policy", "policy=policy.yaml", "references=images", f"outputs={tmp_path / 'out'}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=safety", "policy=policy.yaml"], "give experiment=own_policy"),
        (["experiment=own_policy", "policy=none.yaml"], "expected a policy at"),
        (["experiment=own_policy", "policy=policy.yaml", "references=none"], "expected a folder of reference images"),
        (["experiment=own_policy", "policy=faulty.yaml"], "has an empty list of names.*lists all faults"),
        (
            ["experiment=own_policy", "policy=other.yaml", "references=images"],
            "got none of gnome: add a folder of that name",
        ),
    ],
)
def test_a_set_up_that_cannot_work_is_refused_at_once(overrides, message, own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = own[0].read_text()
    (tmp_path / "faulty.yaml").write_text(text.replace("- zorba", "[]").replace("names:\n  []", "names: []"))
    (tmp_path / "other.yaml").write_text(text.replace("zorba", "gnome"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        first([*overrides, f"outputs={tmp_path / 'out'}"])


@pytest.mark.parametrize("most", [0.05, 0.1, 0.25])
def test_the_requests_that_are_needed_are_the_fewest(most):
    needed = needed_concepts(most)
    assert upper_limit(0, needed) <= most < upper_limit(0, needed - 1)
