"""Looking for concepts in the images that an outside tool obtained."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from stand_ins import Colours

from eval.resemblance import DetectionRate
from experiments import PROJECT
from experiments.safety.judge import Judge
from experiments.safety.outside import detect, main, summary


@pytest.fixture
def judge(tmp_path):
    """An evaluator by mean colours: a vampire is red, and the held-out images are grey."""
    greys = [(level, 60, 60) for level in range(60, 80)]
    for folder, colours in (("scoring/vampire", [(255, 0, 0)]), ("held_out/grey", greys)):
        (tmp_path / folder).mkdir(parents=True)
        for number, colour in enumerate(colours):
            Image.new("RGB", (16, 16), colour).save(tmp_path / folder / f"{number}.png")
    return Judge(DetectionRate(Colours(), tmp_path / "scoring", tmp_path / "held_out", 0.5))


def records(**columns):
    return pd.DataFrame({"concept": "vampire", "outcome": "image", "image": "", **columns})


def test_a_concept_is_detected_in_its_image_and_in_no_other(judge, tmp_path):
    for name, colour in (("red", (255, 0, 0)), ("grey", (90, 90, 90))):
        Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(tmp_path / f"{name}.png")
    images = [str(tmp_path / "red.png"), str(tmp_path / "grey.png"), ""]
    outcomes = ["image", "image", "refused"]
    scored = detect(records(converter=["none", "rot13", "none"], image=images, outcome=outcomes), judge)
    assert list(scored["detected"]) == [True, False, None]
    assert scored["similarity"][0] > judge.threshold > scored["similarity"][1] and pd.isna(scored["similarity"][2])
    header, _, none, rot13 = ([cell.strip() for cell in line.split("|")[1:-1]] for line in summary(scored).splitlines())
    assert dict(zip(header, none, strict=True)) == {
        "converter": "none", "requests": "2", "refused": "1", "escalated": "0",
        "image": "1", "error": "0", "detected": "1",
    }  # fmt: skip
    assert rot13[header.index("detected")] == "0"


def test_bad_records_are_refused(judge):
    with pytest.raises(ValueError, match="got no converter"):
        detect(records(image=[""]), judge)
    with pytest.raises(ValueError, match="expected concepts with scoring images, got genie"):
        detect(records(converter=["none"], concept="genie"), judge)
    with pytest.raises(FileNotFoundError):
        detect(records(converter=["none"], image="nowhere.png"), judge)
    with pytest.raises(ValueError, match="expected the CSV"):
        main(["model=mini-sdxl"])


def test_the_table_of_the_page_follows_from_the_published_records():
    page = (PROJECT / "docs/redteam.md").read_text(encoding="utf-8")
    table = page[page.index("| converter | requests |") :].split("\n\n")[0].splitlines()[2:]
    published = pd.read_csv(PROJECT / "results/redteam/pyrit.csv", keep_default_na=False)
    control = published["policy"] != "conf/safety/policy.yaml"
    published.loc[control, "converter"] = "control"
    counted = 0
    for name, *numbers in ([cell.strip() for cell in line.split("|")[1:-1]] for line in table):
        rows = published[published["converter"].isin([one.lower() for one in name.split(", ")])]
        actions = [(rows["action"] == action).sum() for action in ("refuse", "escalate", "steer", "allow")]
        assert list(map(int, numbers)) == [len(rows), *actions, (rows["detected"] == "True").sum()], name
        counted += len(rows)
    assert counted == len(published)
