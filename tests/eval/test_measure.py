"""The documents of metrics: what they hold, and when one may be used again."""

import json

import pytest

from eval.alignment import ClipScore
from eval.attributes import AttributeEntropy
from eval.clip import HFClip
from eval.diversity import PairwiseDistance, PairwiseSimilarity, VendiScore
from eval.encoders import PixelEncoder
from eval.files import read_document
from eval.imageset import ImageSet
from eval.intervals import bootstrap_interval, mean_of, n_units, values_of
from eval.metric import is_current, measure

ALL = [
    (PairwiseSimilarity, {}),
    (PairwiseDistance, {}),
    (VendiScore, {}),
    (ClipScore, {}),
    (AttributeEntropy, {"labels": ["cat", "dog", "cow"], "templates": ["a {}"]}),
]


@pytest.mark.parametrize(("kind", "arguments"), ALL)
def test_documents_are_complete_and_reproducible(make_run, tiny_clip, kind, arguments):
    run = make_run()
    metric = kind(HFClip(tiny_clip), **arguments)
    document = measure(metric, run, path=run / "metrics" / "first.json")
    assert document == read_document(run / "metrics" / "first.json")
    assert document["metric"] == metric.name
    assert document["version"] == metric.version
    assert document["encoder"] == {"name": metric.encoder.name, "id": metric.encoder.id}
    assert document["higher_is_better"] is metric.higher_is_better
    assert document["unit"]
    assert document["description"]
    assert (document["n_groups"], document["n_images"]) == (4, 16)
    assert document["manifest_sha256"] == ImageSet.open(run).manifest_hash
    assert "torch" in document["environment"]
    assert [group["group"] for group in document["groups"]] == [
        "bird/000000",
        "bird/000001",
        "fish/000000",
        "fish/000001",
    ]
    assert all((group["n_images"], group["category"]) == (4, group["group"][:4]) for group in document["groups"])
    assert document["value"] == pytest.approx(mean_of(values_of(document["groups"], document["aggregate"])))
    value, low, high = bootstrap_interval(document["groups"], document["aggregate"], n_resamples=200, cluster=None)
    assert value == document["value"]
    assert low is None if n_units(document, None) < 4 else low <= value <= high
    least, most = document["bounds"]
    assert (least is None or least <= value) and (most is None or value <= most)

    measure(metric, run)
    assert (run / "metrics" / f"{metric.name}.json").read_bytes() == (run / "metrics" / "first.json").read_bytes()


def test_current_until_something_changes(make_run, tmp_path):
    run = make_run()
    document = measure(VendiScore(PixelEncoder()), run)
    assert is_current(document, VendiScore(PixelEncoder()), run)
    assert is_current(json.loads(json.dumps(document)), VendiScore(PixelEncoder()), ImageSet.open(run))
    assert not is_current({}, VendiScore(PixelEncoder()), run)

    assert not is_current(document, VendiScore(PixelEncoder(4)), run), "another encoder"
    assert not is_current(document, VendiScore(PixelEncoder(), q=2), run), "another setting"
    assert not is_current(document, PairwiseDistance(PixelEncoder()), run), "another metric"
    newer = VendiScore(PixelEncoder())
    newer.version = 2
    assert not is_current(document, newer, run), "another version"
    assert not is_current(document, VendiScore(PixelEncoder()), make_run("more", seeds=(0, 1, 2))), "other images"


def test_plain_folder_can_be_measured(make_run, tmp_path):
    from PIL import Image

    for name in ("a bird", "a fish"):
        (tmp_path / "plain" / name).mkdir(parents=True)
        for index, level in enumerate((0, 128, 255)):
            Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / "plain" / name / f"{index}.png")
    first = measure(PairwiseDistance(PixelEncoder()), tmp_path / "plain")
    assert first["n_groups"] == 2
    assert is_current(first, PairwiseDistance(PixelEncoder()), tmp_path / "plain"), "its own result must not disturb"


@pytest.mark.parametrize("content", ["{", "[]", '{"metric": "x"}'])
def test_read_document_refuses(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json"):
        read_document(tmp_path / "x.json")
