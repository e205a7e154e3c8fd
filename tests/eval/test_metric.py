"""What a metric is: its halves, its scorer, and when it loads it."""

import numpy as np
import pytest
import torch

from eval.diversity import PairwiseDistance
from eval.encoders import PixelEncoder, Scorer
from eval.files import read_document
from eval.images import ManifestRow
from eval.imageset import ImageSet
from eval.intervals import difference_of, interval_of
from eval.metric import Metric, SetMetric, is_current, measure


def test_prepare_loads_the_encoder(make_run):
    class Recording(PixelEncoder):
        prepared = False

        def prepare(self):
            self.prepared = True

    encoder = Recording()
    PairwiseDistance(encoder).prepare()
    assert encoder.prepared


class MeanBrightness(SetMetric):
    """The mean of the first coordinate: a mean over images, whose standard error is known."""

    name, version, higher_is_better, unit, description = "brightness", 1, None, "0 to 1", "mean of a coordinate"

    def score(self, features):
        return features[:, 0].mean().item()


SIX = ("bird", "cat", "dog", "fish", "horse", "insect")


def test_a_set_metric_measures_the_whole_and_halves_of_the_categories(make_run):
    a = make_run("a", SIX, seeds=range(2), images=2)
    b = make_run("b", SIX, seeds=range(2), images=2, offset=500)
    documents = [measure(MeanBrightness(PixelEncoder()), run) for run in (a, b)]
    document = documents[0]
    assert document == read_document(a / "metrics" / "brightness.json")
    assert (document["n_units"], document["n_groups"], document["n_images"], document["groups"]) == (6, 12, 24, [])
    design = {"subset_cluster": "category", "subset_count": 20, "subset_share": 0.5}
    assert document["aggregate"] == "subsets" and design.items() <= document.items()
    embeddings = ImageSet.open(a).embeddings(PixelEncoder())
    assert document["value"] == pytest.approx(embeddings[:, 0].mean().item())
    assert [subset["seed"] for subset in document["subsets"]] == list(range(20))
    assert {(subset["n_units"], subset["n_images"]) for subset in document["subsets"]} == {(3, 12)}
    assert len({subset["value"] for subset in document["subsets"]}) > 5
    assert is_current(document, MeanBrightness(PixelEncoder()), a)
    found = difference_of(*documents)
    assert found.difference == pytest.approx(documents[0]["value"] - documents[1]["value"])
    assert found.low < found.difference < found.high and found.n == 12


@pytest.mark.parametrize(
    ("change", "value"), [("cluster", "prompt"), ("SUBSETS", 10), ("SHARE", 0.4), ("bounds", (0, 1))]
)
def test_how_the_halves_are_drawn_is_part_of_what_a_document_is(make_run, change, value):
    run = make_run(categories=SIX, seeds=(0,), images=2)
    metric = MeanBrightness(PixelEncoder())
    document = measure(metric, run)
    setattr(metric, change, value)
    assert not is_current(document, metric, run)
    assert is_current(measure(metric, run), metric, run)


@pytest.mark.parametrize("cluster", ["category", "prompt", None])
def test_the_halves_hold_whole_clusters_and_are_the_same_for_every_method(make_run, cluster):
    drawn = {}

    class Recording(MeanBrightness):
        def inputs(self, images, positions):
            assert positions == sorted(set(positions))
            drawn.setdefault(images.folder.name, []).append(tuple(images.rows[place].path for place in positions))
            return super().inputs(images, positions)

    for name, offset in (("a", 0), ("b", 500)):
        metric = Recording(PixelEncoder())
        metric.cluster = cluster
        document = measure(metric, make_run(name, SIX, seeds=range(2), images=3, offset=offset))
    assert document["n_units"] == (12 if cluster is None else 6)
    assert drawn["a"] == drawn["b"] and len(drawn["a"]) == 21
    split = 0
    for paths in drawn["a"][1:]:
        groups = {path.rsplit("/", 1)[0] for path in paths}
        assert len(groups) == 6 and len(paths) == 18
        split += len({group.rsplit("/", 1)[0] for group in groups}) > 3
    assert (split > 0) == (cluster is None), "a category was torn apart"


def test_the_halves_cover_where_images_of_a_category_are_alike():
    """Halves of single groups take the images of one category for so many witnesses."""
    rng = np.random.default_rng(0)
    rows = [
        ManifestRow(f"{category:02d}/{seed}.png", f"{category:02d}", "p", f"{category:02d}", seed, 0, seed)
        for category in range(12)
        for seed in range(4)
    ]
    drawn = {}

    class Drawn(MeanBrightness):
        def inputs(self, images, positions):
            return (drawn["values"][positions, None],)

    hits = dict.fromkeys(("category", None), 0)
    for cluster in hits:
        metric = Drawn(PixelEncoder())
        metric.cluster = cluster
        for _ in range(150):
            drawn["values"] = np.repeat(rng.normal(size=12), 4) + 0.3 * rng.normal(size=48)
            document = {"aggregate": "subsets", **metric.results(ImageSet(".", rows))}
            _, low, high = interval_of(document)
            hits[cluster] += low <= 0 <= high
    # binomial error of 150 trials: 1.8 points
    assert hits["category"] / 150 >= 0.9 and hits[None] / 150 < 0.8


def test_halves_of_few_categories_or_images_are_not_measured(make_run):
    few, run = make_run("few", SIX[:5], seeds=range(3), images=2), make_run(categories=SIX, seeds=(0,), images=2)
    metric = MeanBrightness(PixelEncoder())
    for images, metric.minimum, n_clusters in ((few, 2, 5), (run, 7, 6)):
        document = measure(metric, images)
        assert (document["n_units"], document["subsets"]) == (n_clusters, [])
        assert interval_of(document) == (document["value"], None, None)
    metric.minimum = 13
    with pytest.raises(ValueError, match="at least 13 images for brightness, got 12"):
        measure(metric, run)
    metric.minimum, metric.cluster = 2, None
    assert len(measure(metric, few)["subsets"]) == 20


def test_a_metric_without_an_encoder_names_its_own_scorer(make_run):
    class Differ(Scorer):
        name, id = "pixel differences", "pixel-differences-1"

    class Compares(Metric):
        name, version, higher_is_better, unit, description = "compares", 1, None, "levels", "of nothing"
        encoder = Differ()

        def inputs(self, images, positions):
            return (len(positions),)

        def score(self, count):
            return torch.ones(count)

    run = make_run()
    metric = Compares(None)
    metric.prepare()
    document = measure(metric, run)
    assert document["encoder"] == {"name": "pixel differences", "id": "pixel-differences-1"}
    assert is_current(document, metric, run)
    for ask in (lambda: measure(PairwiseDistance(None), run), lambda: PairwiseDistance().encoder.id):
        with pytest.raises(TypeError, match=r"an encoder to measure a folder .* got None"):
            ask()
