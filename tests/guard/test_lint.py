"""Faults that `python -m negtome.guard check` finds in a policy and in the folder of its images."""

import copy

import numpy as np
import pytest
from PIL import Image

from negtome.guard import read_policy
from negtome.guard.__main__ import main
from negtome.guard.lint import lint
from negtome.guard.references import read_references


@pytest.fixture
def report(document, written):
    """The faults of the small policy after an edit."""

    def report(edit):
        edited = copy.deepcopy(document)
        edit(edited)
        return lint(read_policy(written(edited)))

    return report


def test_a_sound_policy_has_no_error(report):
    assert report(lambda document: None).errors == []


def clause(document, number=0):
    return document["clauses"][number]


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (lambda d: clause(d).update(names=[]), "C1 has an empty list of names"),
        (lambda d: clause(d).update(names=["\u200b\u2060"]), "of which nothing can be seen"),
        (lambda d: clause(d).update(names=["vamp\u202eire"]), "invisible characters, U\\+202E"),
        (lambda d: clause(d).update(id="C1\u200b"), "the id 'C1\\\\u200b' has invisible characters, U\\+200B"),
        (lambda d: clause(d).update(id="Allow"), "the id 'Allow' is reserved"),
        (lambda d: clause(d).update(id="C 1"), "has spaces"),
        (lambda d: clause(d).update(id="\u0421" + "2"), "the same ids in several places"),  # Cyrillic
        (lambda d: clause(d).update(asset="Goblin"), "the same assets in several places: C1 .*, C2"),
        (lambda d: clause(d).update(names=["vampire", "GOBLIN"]), "the same names in several places: C1 .*, C2"),
        (lambda d: d.update(default="steer"), "default: steer names no concept"),
        (lambda d: clause(d)["examples"].update(violates=["a goblin in a cape"]), "C2 applies by name too"),
        (lambda d: clause(d)["examples"].update(violates=["a parody of a vampire"]), "E1 applies by name too"),
    ],
)
def test_an_error_says_what_to_do(edit, error, report):
    errors = report(edit).errors
    assert len(errors) == 1
    with pytest.raises(ValueError, match=error):
        raise ValueError(errors[0])
    assert ": " in errors[0] and "\n" not in errors[0]


@pytest.mark.parametrize(
    ("edit", "advice"),
    [
        (
            lambda d: clause(d).update(exceptions=[]) or clause(d, 1).update(exceptions=["E2"]),
            "no clause lists the exce",
        ),
        (lambda d: clause(d)["examples"].update(allowed=["a vampire bat"]), "which has its own name in it"),
        (lambda d: clause(d)["examples"].update(allowed=["a goblin shark"]), "which has a name of C2 in it"),
        (lambda d: clause(d).update(description="a vampire with fangs"), "the description of C1 has its name in it"),
        (lambda d: clause(d).update(names=["vampire goblin"], examples={}), "both apply to it"),
    ],
)
def test_what_may_be_meant_so_is_advice(edit, advice, report):
    result = report(edit)
    assert result.errors == [] and any(advice in line for line in result.advice)


def test_joiners_within_a_name_are_no_fault(report):
    assert report(lambda d: clause(d).update(names=["\U0001f9db\u200d\u2640\ufe0f"])).errors == []


@pytest.fixture
def images(tmp_path):
    """Write images of the small policy's concepts, each another noise; return the folder."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    for name in ("vampire", "goblin", "police officer"):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_sound_images_have_no_fault(images, policy):
    result = lint(policy, read_references(images, [clause.asset for clause in policy.clauses]))
    assert result.errors == [] and not any("images" in line for line in result.advice)


def nothing(folder):
    for path in folder.iterdir():
        path.rename(folder / f"not {path.name}")


def other_format(folder):
    Image.open(folder / "vampire" / "0.png").save(folder / "goblin" / "copy.BMP")


@pytest.mark.parametrize(
    ("edit", "code", "line"),
    [
        (lambda f: (f / "vampire").rename(f / "gnome"), 2, "error: no image of 'vampire' in"),
        (lambda f: (f / "goblin").rename(f / "gnome"), 0, "advice: no image of 'goblin' in"),
        (lambda f: (f / "goblin").rename(f / "gnome"), 0, "advice: no clause has an asset of this name, so it is not"),
        (lambda f: (f / "vampire" / "0.png").write_bytes(b"\x89PNG no image"), 2, "cannot be read"),
        (lambda f: (f / "vampire" / "0.tiff").write_bytes(b"II"), 2, "has a format that is not read"),
        (nothing, 2, "error: no image of any asset"),
        (other_format, 2, "error: one image under several names"),
        (lambda f: (f / "vampire" / "9.png").write_bytes((f / "vampire" / "0.png").read_bytes()), 0, "more than once"),
        (lambda f: (f / "goblin" / "0.png").unlink(), 0, "advice: 5 images of 'goblin'"),
        (
            lambda f: (f / "held_out").mkdir() or (f / "goblin" / "0.png").rename(f / "held_out" / "0.png"),
            0,
            "1 held-out",
        ),
    ],
)
def test_faults_of_the_images(edit, code, line, images, document, written, capsys):
    edit(images)
    ended = main(["check", "--policy", str(written(document)), "--references", str(images)])
    captured = capsys.readouterr()
    assert ended == code and line in captured.out + captured.err
    assert bool(captured.err) == (code == 2)


def test_a_folder_that_does_not_exist_is_bad_input(document, written, tmp_path, capsys):
    assert main(["check", "--policy", str(written(document)), "--references", str(tmp_path / "none")]) == 2
    assert "expected a folder of reference images" in capsys.readouterr().err
