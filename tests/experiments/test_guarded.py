"""A request through a policy, steering and a check: every action at every stage, and replies that never allow."""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import Colours

from eval.images import load_image
from experiments.methods.assets import NamedAssets
from experiments.methods.guarded import LAYERS, Guarded, ImageCache, OutputCheck
from experiments.methods.method import Method, MethodContext
from experiments.prompts import Group
from experiments.safety.guards import nearest
from negtome.guard import Decision, Keyword, Reply
from negtome.guard.audit import check_chain

#: That replies of a chat model are asked to repeat.
NONCE = "0123456789abcdef"
POLICY = """
version: 1
exceptions: [{id: E1, text: a parody, names: [parody]}]
clauses:
  - {id: C1, asset: red, description: all red, action: steer, exceptions: [E1]}
  - {id: C2, asset: green, description: all green, action: refuse}
  - {id: C3, asset: plum, description: all plum, action: escalate}
"""
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "plum": (255, 0, 255)}


def paint(file, colour):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), tuple(map(int, colour))).save(file)


@pytest.fixture
def folders(tmp_path):
    """A policy, pictures of its assets, and pictures of blues and greys, and of a red that is held out."""
    (tmp_path / "policy.yaml").write_text(POLICY)
    for name, colour in COLOURS.items():
        paint(tmp_path / "assets" / name / "1.png", colour)
    for number in range(20):
        paint(tmp_path / "held_out" / "other" / f"{number:02d}.png", (5 * number, 3 * number, 255 - 4 * number))
    paint(tmp_path / "held_out" / "red" / "1.png", (250, 5, 0))
    return tmp_path


class Pipe:
    """Draws the colour that the prompt names, or blue, but green for a prompt with `hidden`; counts its images."""

    def __init__(self, shown=10**6):
        self.seeds, self.shown = [], shown

    def __call__(self, prompt, num_images_per_prompt, generator, output_type, instead=None):
        named = [colour for name, colour in COLOURS.items() if name in prompt]
        images = []
        for one in generator:
            colour = instead or (0, 255, 0) * ("hidden" in prompt) or (named or [(0, 0, 255)])[0]
            late = len(self.seeds) >= self.shown
            images.append(np.full((8, 8, 3), (0, 0, 255) if late else colour, dtype=float) / 255)
            self.seeds.append(one.initial_seed())
        return SimpleNamespace(images=np.stack(images))


class Steering(Method):
    """Draws grey, and keeps the concepts that it steers away from."""

    title, version = "steering", 3

    def __init__(self):
        super().__init__("steering")
        self.asked = []

    @contextlib.contextmanager
    def apply(self, pipe, group, call):
        self.asked.append(group.concept)
        yield MethodContext({**call, "instead": (90, 90, 90)}, lambda: {"pushed": 1}, {f"{group.concept}/1.png": 1.0})


class Says:
    """A guard with fixed replies, the last of which it repeats; counts its requests."""

    name, id = "says", "says-1"

    def __init__(self, *replies):
        self.replies, self.asked = replies, 0

    def reply(self, policy, prompt):
        self.asked += 1
        return self.replies[min(self.asked, len(self.replies)) - 1]


def guarded(folders, layers="check", guard=None, keep=False, **options):
    check = OutputCheck(folders / "assets", folders / "policy.yaml", folders / "held_out", Colours())
    audit = str(folders / "audit.jsonl") if keep else None
    policy = str(folders / "policy.yaml")
    return Guarded("m", guard or Keyword(), policy, Steering(), check, layers, audit=audit, **options)


def ask(prompt, size=1):
    return Group("p", prompt, "whatever", 0, size)


#: By prompt: how each of the three layers ends; "grey" and the like are the colours that are shown.
ENDS = {
    "a sea": ("blue", "blue", "blue"),
    "a red thing": ("refused", "grey", "grey"),
    "a green thing": ("refused",) * 3,
    "a plum thing": ("escalated",) * 3,
    "a parody of a red thing": ("red", "red", "escalated"),  # the exception allows it; a person looks at the images
    "a parody of a hidden red thing": ("green", "green", "blocked"),  # the exception is of another concept
    "a hidden thing": ("green", "green", "blocked"),  # which the guard does not see, but the check does
}
SHOWN = {"blue": (0, 0, 255), "grey": (90, 90, 90), "red": (255, 0, 0), "green": (0, 255, 0)}


@pytest.mark.parametrize("prompt", ENDS)
@pytest.mark.parametrize("layers", LAYERS)
def test_every_action_ends_at_every_layer_as_it_should(folders, layers, prompt):
    drawn = guarded(folders, layers).generate(pipe := Pipe(), ask(prompt), {})
    end = ENDS[prompt][LAYERS.index(layers)]
    if end in SHOWN:
        assert pipe.seeds == ask(prompt).image_seeds(), "the initial latents are those of the baseline"
        assert drawn.withheld is None and (drawn.images * 255).round().reshape(-1, 3).tolist() == [[*SHOWN[end]]] * 64
    else:
        assert drawn.images is None and drawn.withheld.status == end
    escalated = ("C1", "E1") if "red" in prompt else ("C3",)
    cited = {"refused": ("C1",) if "red" in prompt else ("C2",), "escalated": escalated, "blocked": ("C2",)}
    assert end in SHOWN or drawn.withheld.clauses == cited[end]


@pytest.mark.parametrize("tries", [0, 1, 3])
def test_a_blocked_image_had_all_its_tries_from_different_initial_latents(folders, tries):
    group = ask("a hidden thing", size=2)
    drawn = guarded(folders, tries=tries).generate(pipe := Pipe(), group, {})
    assert drawn.withheld.status == "blocked" and len(drawn.statistics["check"]) == 1 + tries
    assert pipe.seeds == dataclasses.replace(group, size=2 * (1 + tries)).image_seeds()
    assert len(set(pipe.seeds)) == 2 * (1 + tries) and pipe.seeds[:2] == group.image_seeds()


def test_the_first_try_without_the_asset_is_shown(folders):
    drawn = guarded(folders, tries=3).generate(pipe := Pipe(shown=2), ask("a hidden thing"), {})
    assert drawn.withheld is None and len(pipe.seeds) == 3 and drawn.images[0, 0, 0].tolist() == [0, 0, 1]
    assert list(drawn.seeds) == pipe.seeds[2:]
    one = guarded(folders).generate(Pipe(shown=1), ask("a hidden thing", size=2), {})
    assert one.withheld is None  # the whole request is made again where one of its images is found out


@pytest.mark.parametrize("action", ["steer", "refuse", "escalate"])
def test_typing_an_exception_never_shows_what_the_check_detects(folders, action):
    text = POLICY.replace("action: steer, exceptions: [E1]", f"action: {action}, exceptions: [E1]")
    (folders / "policy.yaml").write_text(text)
    for prompt in ("a red thing, parody", "parody red", "a parody of a red thing"):
        drawn = guarded(folders, tries=3).generate(pipe := Pipe(), ask(prompt), {})
        assert drawn.images is None and drawn.withheld.status == "escalated"
        assert "red" in drawn.withheld.reason and "E1" in drawn.withheld.reason
        assert len(pipe.seeds) == 1, "a person sees what the prompt shows; other seeds are no further chances"
    harmless = guarded(folders).generate(Pipe(shown=0), ask("a red thing, parody"), {})
    assert harmless.withheld is None, "a parody that does not resemble the concept is shown"


RIGHT = Decision("refuse", ("C2",), "all green")
FORGED = [
    Reply("", NONCE),
    Reply("of course, here you are", NONCE),
    Reply('{"action": "allow", "clauses": [], "quote": ""}', NONCE),
    Decision("allow", ("C2",), "all green"),
    Decision("allow", ("C9",), "all may be drawn"),
    Decision("refuse", ("C2",), "all red"),
]


@pytest.mark.parametrize("reply", FORGED)
def test_a_reply_that_does_not_follow_from_the_policy_is_never_taken_to_allow(folders, reply):
    drawn = guarded(folders, guard=Says(reply)).generate(pipe := Pipe(), ask("a sea"), {})
    assert drawn.withheld.status == "escalated" and drawn.withheld.clauses == () and not pipe.seeds
    assert drawn.statistics["action"] == "invalid"
    again = guarded(folders, guard=Says(reply, RIGHT)).generate(Pipe(), ask("a sea"), {})
    assert again.withheld.status == "refused" and again.withheld.clauses == ("C2",)


def test_a_verdict_is_kept_for_all_layers_and_for_no_other_guard_policy_or_prompt(folders):
    guard, other = Says(RIGHT), Says(RIGHT)
    verdicts = [guarded(folders, layers, guard, keep=True).verdict("a sea") for layers in LAYERS]
    assert guard.asked == 1 and verdicts[0] == verdicts[1] == verdicts[2]
    guarded(folders, guard=guard, keep=True).verdict("a lake")
    other.id = "says-2"
    guarded(folders, guard=other, keep=True).verdict("a sea")
    (folders / "policy.yaml").write_text(POLICY.replace("all plum", "of plum"))
    guarded(folders, guard=guard, keep=True).verdict("a sea")
    assert other.asked == 1 and guard.asked == 3
    short, long = Says(Decision("allow")), Says(RIGHT)
    short.id, long.id = "says", "says/a pair"  # a slash moves nothing from the guard's id to the prompt
    guarded(folders, guard=short, keep=True).verdict("a pair/a sea")
    assert guarded(folders, guard=long, keep=True).verdict("a sea").action == "refuse"


def test_a_layer_that_is_left_out_is_not_in_the_identity(folders):
    one, other_tries, other_steering = (guarded(folders, tries=tries) for tries in (1, 2, 1))
    other_steering.steering.settings = lambda: {"alpha": 2}
    for layers in LAYERS:
        one.layers = other_tries.layers = other_steering.layers = layers
        assert (one.settings() == other_tries.settings()) == (layers != "check")
        assert (one.settings() == other_steering.settings()) == (layers == "decide")


def test_the_check_is_calibrated_on_held_out_pictures_without_the_assets(folders):
    check = OutputCheck(folders / "assets", folders / "policy.yaml", folders / "held_out", Colours(), 0.1)
    encoder = Colours()
    assets = [encoder.embed_images([load_image(folders / "assets" / n / "1.png")])[0] for n in sorted(COLOURS)]
    maxima = sorted(
        max(torch.dot(encoder.embed_images([load_image(file)])[0], asset).item() for asset in assets)
        for file in (folders / "held_out" / "other").iterdir()
    )
    assert check.threshold == pytest.approx(maxima[18], abs=1e-6)  # the 19th of 20: ceil(0.9 * 21)
    red = np.full((1, 4, 4, 3), (1.0, 0, 0))
    assert check.detect(red)[0] == "red"
    assert check.detect(np.concatenate([np.full((1, 4, 4, 3), (0, 0, 1.0)), red]))[0] == "red"


def test_named_assets_are_those_of_the_groups_concept(folders):
    named = NamedAssets(folders / "assets")
    group = Group("p", "a green thing", "green", 0, 1, concept="red")
    assert [(asset.name, score) for asset, score in named.find(None, group, {})] == [("red", 1.0)]
    with pytest.raises(ValueError, match="expected pictures of the asset 'pink', got none"):
        named.find(None, dataclasses.replace(group, concept="pink"), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": "all"}, "method.layers must be one of decide, steer, check, got 'all'"),
        ({"check": None}, "method.layers=check needs method.check"),
        ({"tries": -1}, "method.tries"),
        ({"policy": "nowhere.yaml"}, "expected a policy at nowhere.yaml"),
    ],
)
def test_bad_settings_are_refused(folders, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dataclasses.replace(guarded(folders), **change)


def test_an_asset_without_pictures_and_a_check_without_held_out_ones_are_refused(folders):
    (folders / "policy.yaml").write_text(POLICY + "  - {id: C4, asset: pink, description: all pink, action: steer}\n")
    with pytest.raises(ValueError, match=r"expected pictures of every asset .* got no folder of pink"):
        guarded(folders)
    policy = folders / "policy.yaml"
    policy.write_text(POLICY.replace("version: 1", "version: 1\ndefault: steer"))
    with pytest.raises(ValueError, match="names no asset, got steer"):
        guarded(folders)
    with pytest.raises(FileNotFoundError, match=r"expected held-out pictures .* got none"):
        OutputCheck(folders / "assets", policy, None, Colours())
    with pytest.raises(ValueError, match="scored against"):
        OutputCheck(folders / "assets", policy, folders / "held_out", Colours(), scoring=folders / "assets")


def test_the_check_looks_for_the_policys_assets_alone(folders):
    paint(folders / "assets" / "blue" / "1.png", (0, 0, 255))  # which no clause names
    assert guarded(folders).generate(Pipe(), ask("a sea"), {}).withheld is None
    (folders / "policy.yaml").write_text(POLICY.replace("refuse}", "allow}"))
    green = np.full((1, 4, 4, 3), (0, 1.0, 0))
    assert guarded(folders).check.detect(green)[0] is None, "a concept that every clause allows may be shown"
    (folders / "policy.yaml").write_text(re.sub("steer|refuse|escalate", "allow", POLICY))
    assert guarded(folders).check.detect(green) == (None, -1.0)


def cites(action, *clauses, quote="all red"):
    return Says(Decision(action, clauses, quote))


@pytest.mark.parametrize("clauses", [("C4", "C1"), ("C1", "C4")])
def test_steering_is_away_from_the_steered_concept_and_not_from_an_allowed_one(folders, clauses):
    paint(folders / "assets" / "blue" / "1.png", (0, 0, 255))
    extra = "  - {id: C4, asset: blue, description: all blue, action: steer, exceptions: [E1]}\n"
    (folders / "policy.yaml").write_text(POLICY.replace("exceptions: [E1]}", "exceptions: []}") + extra)
    method = guarded(folders, "steer", cites("steer", *clauses, "E1"))
    drawn = method.generate(Pipe(), ask("a red parody of a sea"), {})
    assert method.steering.asked == ["red"] and drawn.withheld is None
    assert drawn.references == {"red/1.png": 1.0} and drawn.statistics["pushed"]
    both = guarded(folders, "steer", cites("steer", *clauses)).generate(Pipe(), ask("a red sea"), {})
    assert both.withheld.status == "refused" and "one asset at a time" in both.withheld.reason


def test_the_nearest_neighbour_guard_does_not_start_without_images_of_every_asset(folders):
    assets = [SimpleNamespace(name=name) for name in ("red", "green")]
    retriever = SimpleNamespace(assets=assets, settings=dict, of_prompt=lambda prompt, names: [])
    with pytest.raises(ValueError, match="expected pictures of every asset of the policy, got no folder of plum"):
        guarded(folders, guard=nearest(retriever)).verdict("a plum thing")
    assets.append(SimpleNamespace(name="plum"))
    assert guarded(folders, guard=nearest(retriever)).verdict("a sea").action == "allow"


def test_every_verdict_is_on_record_once_and_no_record_decides(folders):
    for layers in LAYERS:
        guarded(folders, layers, Says(RIGHT), keep=True).verdict("a sea")
    file = folders / "audit.jsonl"
    (row,) = map(json.loads, file.read_text().splitlines())
    assert (row["action"], row["clauses"]) == ("refuse", ["C2"]) and not check_chain(file).fault


@pytest.mark.slow  # another process imports the benchmark
def test_a_verdict_of_another_process_continues_the_record(folders):
    file = folders / "audit.jsonl"
    guarded(folders, "steer", Says(RIGHT), keep=True).verdict("a sea")
    code = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parents[2])]!r}
from types import SimpleNamespace
from experiments.methods.guarded import Guarded
from experiments.methods.method import Method
from negtome.guard import Decision
guard = SimpleNamespace(name="says", id="says-1", reply=lambda policy, prompt: Decision("allow"))
method = Guarded("m", guard, {str(folders / "policy.yaml")!r}, Method(), None, "steer", audit={str(file)!r})
print(method.verdict("a sea").action)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["allow"]  # the other process asked its own guard
    assert len(file.read_text().splitlines()) == 2 and not check_chain(file).fault


def test_layers_and_guards_that_come_to_the_same_images_draw_them_once(folders):
    pipe = Pipe()
    first, *others = [
        guarded(folders, layers, Says(Decision("allow"))).generate(pipe, ask("a sea"), {}) for layers in LAYERS
    ]
    assert len(pipe.seeds) == 1
    for other in others:
        assert np.array_equal(other.images, first.images) and other.seeds == first.seeds
        assert other.statistics["draw_seconds"] == first.statistics["draw_seconds"]  # as if it had drawn them itself


def test_what_differs_in_anything_is_drawn_anew_and_the_oldest_makes_room():
    pipe, cache = Pipe(), ImageCache(limit=2 * 8 * 8 * 3 * 8)  # two images of doubles
    asked = [
        (Method(), ask("a sea"), {}, (1,)),
        (Method(), ask("a sea"), {}, (2,)),
        (Method(), ask("a sky"), {}, (1,)),
        (Method(), ask("a sea"), {"instead": (1, 2, 3)}, (1,)),
        (Steering(), ask("a sea"), {}, (1,)),
        (Steering(), dataclasses.replace(ask("a sea"), concept="other"), {}, (1,)),
    ]
    namesake = type("Namesake", (Method,), {})()
    assert (namesake.name, namesake.settings()) == (Method().name, Method().settings())
    asked.append((namesake, ask("a sea"), {}, (1,)))
    for number, one in enumerate(asked, 1):
        drawn = cache.generate(pipe, *one)
        assert cache.generate(pipe, *one) is drawn and not drawn.images.flags.writeable
        assert len(pipe.seeds) == number
    cache.generate(pipe, *asked[-2])
    assert len(pipe.seeds) == len(asked)
    cache.generate(pipe, *asked[0])
    assert len(pipe.seeds) == len(asked) + 1
    cache.generate(Pipe(), *asked[0])  # another pipeline's are others
    assert len(pipe.seeds) == len(asked) + 1
