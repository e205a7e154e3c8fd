"""Documents of metrics: their content, when they are up to date, and halves of sets of images."""

import json

import numpy as np
import pytest
from PIL import Image

from eval.diversity import PairwiseDistance, VendiScore
from eval.encoders import PixelEncoder
from eval.files import read_document
from eval.images import ManifestRow
from eval.imageset import ImageSet
from eval.intervals import bootstrap_interval, difference_of, interval_of
from eval.metric import SetMetric, is_current, measure

ENCODER = PixelEncoder()
SIX = ("bird", "cat", "dog", "fish", "horse", "insect")


def test_documents_are_complete_and_reproducible(make_run):
    run, metric = make_run(), VendiScore(ENCODER)
    document = measure(metric, run, path=run / "metrics" / "first.json")
    assert document == read_document(run / "metrics" / "first.json")
    facts = {"metric": metric.name, "version": metric.version, "higher_is_better": True, "unit": metric.unit}
    assert facts.items() <= document.items() and document["encoder"] == {"name": ENCODER.name, "id": ENCODER.id}
    assert document["description"].endswith(".") and "torch" in document["environment"]
    assert (document["n_groups"], document["n_images"]) == (4, 16)
    assert document["manifest_sha256"] == ImageSet.open(run).manifest_hash
    names = [group["group"] for group in document["groups"]]
    assert names == ["bird/000000", "bird/000001", "fish/000000", "fish/000001"]
    assert all((group["n_images"], group["category"]) == (4, group["group"][:4]) for group in document["groups"])
    value, low, high = bootstrap_interval(document["groups"], n_resamples=200, cluster=None)
    assert document["bounds"] == [1, None] and low <= value == document["value"] <= high
    measure(metric, run)
    assert (run / "metrics" / "vendi_score.json").read_bytes() == (run / "metrics" / "first.json").read_bytes()


def test_a_document_is_current_until_something_changes(make_run):
    run = make_run()
    document = measure(VendiScore(ENCODER), run)
    assert is_current(document, VendiScore(ENCODER), run)
    assert is_current(json.loads(json.dumps(document)), VendiScore(ENCODER), ImageSet.open(run))
    newer = VendiScore(ENCODER)
    newer.version = 2
    for other in (VendiScore(PixelEncoder(4)), VendiScore(ENCODER, q=2), PairwiseDistance(ENCODER), newer):
        assert not is_current(document, other, run)
    assert not is_current(document, VendiScore(ENCODER), make_run("more", seeds=(0, 1, 2))), "other images"
    assert not is_current({}, VendiScore(ENCODER), run)


def test_a_folder_without_a_manifest_can_be_measured(tmp_path):
    for name in ("a bird", "a fish"):
        (tmp_path / name).mkdir(parents=True)
        for index, level in enumerate((0, 128, 255)):
            Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / name / f"{index}.png")
    document = measure(PairwiseDistance(ENCODER), tmp_path)
    assert document["n_groups"] == 2 and is_current(document, PairwiseDistance(ENCODER), tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"metric": "x"}'])
def test_a_damaged_document_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json"):
        read_document(tmp_path / "x.json")


# --- halves of sets --------------------------------------------------------------------------------------------------


class MeanBrightness(SetMetric):
    """The mean of the first coordinate, whose standard error is known."""

    name, version, higher_is_better, unit = "brightness", 1, None, "0 to 1"

    def score(self, features):
        return features[:, 0].mean().item()


def test_a_set_metric_measures_the_set_and_halves_of_the_categories(make_run):
    a, b = (make_run(name, SIX, images=2, offset=offset) for name, offset in (("a", 0), ("b", 500)))
    document, other = (measure(MeanBrightness(ENCODER), run) for run in (a, b))
    assert document == read_document(a / "metrics" / "brightness.json")
    assert (document["n_units"], document["n_groups"], document["n_images"], document["groups"]) == (6, 12, 24, [])
    design = {"subset_cluster": "category", "subset_count": 20, "subset_share": 0.5}
    assert document["aggregate"] == "subsets" and design.items() <= document.items()
    embeddings = ImageSet.open(a).embeddings(ENCODER)
    assert document["value"] == pytest.approx(embeddings[:, 0].mean().item())
    assert [subset["seed"] for subset in document["subsets"]] == list(range(20))
    assert {(subset["n_units"], subset["n_images"]) for subset in document["subsets"]} == {(3, 12)}
    assert len({subset["value"] for subset in document["subsets"]}) > 5
    difference = difference_of(document, other)
    assert difference.difference == pytest.approx(document["value"] - other["value"])
    assert difference.low < difference.difference < difference.high and difference.n == 12
    for change, value in (("cluster", "prompt"), ("SUBSETS", 10), ("SHARE", 0.4), ("bounds", (0, 1))):
        metric = MeanBrightness(ENCODER)
        assert is_current(document, metric, a)
        setattr(metric, change, value)
        assert not is_current(document, metric, a), change


@pytest.mark.parametrize("cluster", ["category", None])
def test_halves_hold_whole_clusters_and_are_the_same_for_every_method(make_run, cluster):
    draws = {}

    class Recording(MeanBrightness):
        def inputs(self, images, positions):
            assert positions == sorted(set(positions))
            draws.setdefault(images.folder.name, []).append(tuple(images.rows[index].path for index in positions))
            return super().inputs(images, positions)

    for name, offset in (("a", 0), ("b", 500)):
        metric = Recording(ENCODER)
        metric.cluster = cluster
        document = measure(metric, make_run(name, SIX, images=3, offset=offset))
    assert document["n_units"] == (12 if cluster is None else 6)
    assert draws["a"] == draws["b"] and len(draws["a"]) == 21
    n_split = 0
    for paths in draws["a"][1:]:
        groups = {path.rsplit("/", 1)[0] for path in paths}
        assert len(groups) == 6 and len(paths) == 18
        n_split += len({group.rsplit("/", 1)[0] for group in groups}) > 3
    assert (n_split > 0) == (cluster is None), "a category was split"


def test_halves_of_categories_cover_where_images_of_a_category_are_alike():
    """Halves of single groups do not: they count the images of a category as independent."""
    rng = np.random.default_rng(0)
    rows = [
        ManifestRow(f"{category:02d}/{seed}.png", f"{category:02d}", "p", f"{category:02d}", seed, 0, seed)
        for category in range(12)
        for seed in range(4)
    ]
    values = np.zeros(48)

    class Drawn(MeanBrightness):
        def inputs(self, images, positions):
            return (values[positions, None],)

    hits = dict.fromkeys(("category", None), 0)
    for cluster in hits:
        metric = Drawn(ENCODER)
        metric.cluster = cluster
        for _ in range(60):
            values = np.repeat(rng.normal(size=12), 4) + 0.3 * rng.normal(size=48)
            _, low, high = interval_of({"aggregate": "subsets", **metric.results(ImageSet(".", rows))})
            hits[cluster] += low <= 0 <= high
    # binomial error of 60 trials: 2.8 points
    assert hits["category"] / 60 >= 0.87 and hits[None] / 60 < 0.8


def test_halves_of_few_categories_or_images_are_not_measured(make_run):
    few, run = make_run("few", SIX[:5], seeds=range(3), images=2), make_run(categories=SIX, seeds=(0,), images=2)
    metric = MeanBrightness(ENCODER)
    for images, metric.minimum, n_clusters in ((few, 2, 5), (run, 7, 6)):
        document = measure(metric, images)
        assert (document["n_units"], document["subsets"]) == (n_clusters, [])
        assert interval_of(document) == (document["value"], None, None)
    metric.minimum = 13
    with pytest.raises(ValueError, match="at least 13 images for brightness, got 12"):
        measure(metric, run)
    metric.minimum, metric.cluster = 2, None
    assert len(measure(metric, few)["subsets"]) == 20
