"""The interface of metrics: groups, documents, and when a document may be used again."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from eval.aggregates import aggregate_named
from eval.cache import EmbeddingCache
from eval.encoders import Encoder, HFClip, PixelEncoder
from eval.images import ManifestRow, manifest_hash, read_manifest
from eval.intervals import bootstrap_interval, difference_of, interval_of, n_units, paired_difference
from eval.metrics import (
    AttributeEntropy,
    CategoryPooledSimilarity,
    ClipScore,
    ImageSet,
    Metric,
    PairwiseDistance,
    PairwiseSimilarity,
    ReleasedMeanSimilarity,
    ReleasedVendi,
    SetMetric,
    VendiScore,
    is_current,
    measure,
    read_document,
)


class Scripted(Encoder):
    """Gives the image whose red corner is i the i-th vector, and texts fixed vectors."""

    name, id = "scripted", "scripted-1"

    def __init__(self, vectors, texts=None):
        self.vectors = torch.as_tensor(vectors, dtype=torch.float32)
        self.texts = texts or {}

    def embed_images(self, images):
        return torch.nn.functional.normalize(self.vectors[[int(image[0, 0, 0]) for image in images]], dim=-1)

    def embed_texts(self, texts):
        return torch.tensor([self.texts[text] for text in texts], dtype=torch.float32)

    def count_truncated(self, texts):
        return sum(len(text) > 15 for text in texts)


@pytest.fixture
def numbered_run(make_run):
    """Return a function that writes a run whose images are numbered by their red corner, in canonical order."""
    from PIL import Image

    def make(**arguments):
        run = make_run(**arguments)
        for number, row in enumerate(read_manifest(run)):
            Image.fromarray(np.full((4, 4, 3), number, dtype=np.uint8)).save(run / row.path)
        return run

    return make


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
    assert document["manifest_sha256"] == manifest_hash(run)
    assert "torch" in document["environment"]
    assert [group["group"] for group in document["groups"]] == [
        "bird/000000",
        "bird/000001",
        "fish/000000",
        "fish/000001",
    ]
    assert all((group["n_images"], group["category"]) == (4, group["group"][:4]) for group in document["groups"])
    assert document["value"] == pytest.approx(aggregate_named(document["aggregate"]).value(document["groups"]))
    value, low, high = bootstrap_interval(document["groups"], document["aggregate"], n_resamples=200, cluster=None)
    assert value == document["value"]
    assert low is None if n_units(document, None) < 4 else low <= value <= high
    least, most = document["bounds"]
    assert (least is None or least <= value) and (most is None or value <= most)

    measure(metric, run)
    assert (run / "metrics" / f"{metric.name}.json").read_bytes() == (run / "metrics" / "first.json").read_bytes()


def test_pairwise_values_by_hand(numbered_run):
    run = numbered_run(categories=("bird",), seeds=(0, 1), images=3)
    # first group: all equal; second: mutually orthogonal
    encoder = Scripted([[1, 0, 0]] * 3 + np.eye(3).tolist())
    assert [group["value"] for group in measure(PairwiseSimilarity(encoder), run)["groups"]] == pytest.approx([1, 0])
    assert measure(PairwiseSimilarity(encoder), run)["value"] == pytest.approx(0.5)
    assert [group["value"] for group in measure(PairwiseDistance(encoder), run)["groups"]] == pytest.approx([0, 1])
    assert [group["value"] for group in measure(VendiScore(encoder), run)["groups"]] == pytest.approx([1, 3], abs=1e-5)


def test_pairwise_metrics_take_groups_of_several_sizes(numbered_run):
    run = numbered_run(categories=("bird", "fish"), seeds=(0,), images=3)
    rows = read_manifest(run)[:5]  # 3 birds, 2 fish
    encoder = Scripted([[1, 0], [1, 0], [0, 1], [1, 0], [0, 1], [1, 1]])
    images = ImageSet(run, rows[::-1])
    groups = PairwiseSimilarity(encoder).per_group(images)
    assert [(group["n_images"], group["value"]) for group in groups] == [(3, pytest.approx(1 / 3)), (2, 0)]
    for kind in (VendiScore, ReleasedVendi):
        with pytest.raises(ValueError, match="1 groups of 2, 1 groups of 3"):
            kind(encoder).per_group(images)
    with pytest.raises(ValueError, match=r"at least 2 images.*fish/000000"):
        PairwiseDistance(encoder).per_group(ImageSet(run, rows[:4]))


def test_pooled_similarity_takes_all_pairs_of_a_category(numbered_run, make_run):
    run = numbered_run(categories=("bird", "fish"), seeds=(0, 1), images=2)
    vectors = np.random.default_rng(0).normal(size=(8, 3))
    metric = CategoryPooledSimilarity(Scripted(vectors))
    document = measure(metric, run)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    by_hand = [np.mean([unit[i] @ unit[j] for i in range(k, k + 4) for j in range(k, i)]) for k in (0, 4)]
    assert [group["value"] for group in document["groups"]] == pytest.approx(by_hand, abs=1e-6)
    assert [group["group"] for group in document["groups"]] == ["bird/all", "fish/all"]
    assert document["value"] == pytest.approx(np.mean(by_hand), abs=1e-6)
    assert (document["n_groups"], document["n_images"]) == (2, 8)
    # categories are the units, whatever is clustered
    more = measure(CategoryPooledSimilarity(PixelEncoder()), make_run("more", categories="abcde"))
    found = [interval_of(more, cluster=cluster, n_resamples=500) for cluster in (None, "prompt", "category")]
    assert len(set(found)) == 1 and found[0].low is not None
    with pytest.raises(ValueError, match=r"at least 2 images in every category.*fish"):
        metric.per_group(ImageSet(run, read_manifest(run)[:5]))


def test_where_a_category_is_one_group_pooled_is_within(make_run):
    run = make_run(seeds=(0,))
    values = [measure(kind(PixelEncoder()), run)["value"] for kind in (CategoryPooledSimilarity, PairwiseSimilarity)]
    assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize("n", [2, 4])
def test_the_released_scripts_choices_are_reproduced_from_their_formulas(numbered_run, n):
    run = numbered_run(categories=("ant", "bird", "cat"), seeds=(0, 1), images=n // 2)
    vectors = [[1, 0, 0, 0]] * n + np.eye(4)[:n].tolist() + np.random.default_rng(0).normal(size=(n, 4)).tolist()
    unit = np.array(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)
    kernels = [unit[k : k + n] @ unit[k : k + n].T for k in (0, n, 2 * n)]
    document = measure(ReleasedMeanSimilarity(Scripted(vectors)), run)
    found = [group["value"] for group in document["groups"]]
    # the images of all seeds of a prompt make one matrix
    assert [group["group"] for group in document["groups"]] == ["ant/all", "bird/all", "cat/all"]
    assert (document["n_groups"], document["n_images"]) == (3, 3 * n)
    assert found == pytest.approx([kernel.mean() for kernel in kernels], abs=1e-6)
    found = [group["value"] for group in measure(ReleasedVendi(Scripted(vectors)), run)["groups"]]
    eigenvalues = [np.linalg.eigvalsh(kernel).clip(1e-300) for kernel in kernels]
    assert found == pytest.approx([np.exp(-(m * np.log(m)).sum()) for m in eigenvalues], abs=1e-5)
    assert found[:2] == pytest.approx([n**-n, 1], abs=1e-4)


def test_vendi_order_is_a_setting(numbered_run):
    run = numbered_run(categories=("bird",), seeds=(0,), images=4)
    encoder = Scripted([[1, 0], [1, 0], [1, 0], [0, 1]])
    values = [measure(VendiScore(encoder, q), run) for q in (1, 2, math.inf)]
    assert [document["value"] for document in values] == pytest.approx([4 / 3**0.75, 1.6, 4 / 3])
    assert [document["settings"] for document in values] == [{"q": 1.0}, {"q": 2.0}, {"q": "inf"}]
    with pytest.raises(ValueError, match="q > 0"):
        VendiScore(encoder, 0)


def test_clip_score_by_hand(numbered_run):
    run = numbered_run(categories=("bird", "fish"), seeds=(0,), images=2)
    texts = {"a photo of a bird": [1, 0], "a photo of a fish": [0, 1]}
    document = measure(ClipScore(Scripted([[1, 0], [0, 1], [3, 4], [0, 2]], texts)), run)
    assert [group["value"] for group in document["groups"]] == pytest.approx([50, 90])
    assert document["details"] == {"n_prompts": 2, "n_prompts_truncated": 2}
    with pytest.raises(TypeError, match="text tower"):
        measure(ClipScore(PixelEncoder()), run)


def test_attribute_entropy_by_hand(numbered_run):
    run = numbered_run(categories=("bird", "fish", "person"), seeds=(0, 1), images=4)
    texts = {"hen": [1, 0], "owl": [0, 1], "carp": [1, 0], "tuna": [0, 1]}
    birds, fish = [[1, 0]] * 4 + [[0, 1]] * 4, [[1, 0]] * 8
    metric = AttributeEntropy(
        Scripted(birds + fish + [[1, 1]] * 8, texts), {"bird": ["hen", "owl"], "fish": ["carp", "tuna"]}, ["{}"]
    )
    document = measure(metric, run)
    assert [group["counts"] for group in document["groups"]] == [{"hen": 4}, {"owl": 4}, {"carp": 4}, {"carp": 4}]
    # birds: log 2 and Miller-Madow's 1 / 16; fish: 0
    assert document["value"] == pytest.approx((math.log(2) + 1 / 16) / 2)
    assert (document["n_groups"], document["n_images"]) == (4, 16)
    assert document["details"] == {"categories_left_out": ["person"], "categories_too_small": {}}
    with pytest.raises(ValueError, match=r"\['dragon'\].*got \['bird'"):
        measure(AttributeEntropy(metric.encoder, {"dragon": ["hen", "owl"]}, ["{}"]), run)


def test_attribute_entropy_refuses_few_images(numbered_run):
    run = numbered_run(categories=("bird",), seeds=(0,), images=4)
    texts = {"hen": [1, 0], "owl": [0, 1]}
    metric = AttributeEntropy(Scripted([[1, 0]] * 4, texts), ["hen", "owl"], ["{}"], name="species_entropy")
    assert metric.name == "species_entropy"
    with pytest.raises(ValueError, match=r"two images a label, and 8, .*species_entropy, got bird: 4 of 8 images"):
        measure(metric, run)
    assert not (run / "metrics").exists(), "a refused number must leave nothing behind"


def test_a_category_with_too_few_images_for_its_labels_is_left_out_and_listed(numbered_run):
    run = numbered_run(categories=("bird", "fish"), seeds=(0, 1), images=4)
    texts = {"hen": [1, 0], "owl": [0, 1], "carp": [1, 0], "tuna": [0, 1], "eel": [1, 1], "ray": [2, 1], "cod": [1, 2]}
    # 8 images are enough for two labels, not for five, however few of the five are seen
    labels = {"bird": ["hen", "owl"], "fish": ["carp", "tuna", "eel", "ray", "cod"]}
    document = measure(AttributeEntropy(Scripted([[1, 0]] * 16, texts), labels, ["{}"]), run)
    assert {group["category"] for group in document["groups"]} == {"bird"}
    assert document["details"] == {"categories_left_out": [], "categories_too_small": {"fish": "8 of 10 images"}}


def test_documents_of_two_methods_are_paired(make_run):
    a, b = make_run("a", seeds=range(5)), make_run("b", seeds=range(5), offset=1000)
    documents = [measure(PairwiseDistance(PixelEncoder()), run) for run in (a, b)]
    found = paired_difference(*(document["groups"] for document in documents), documents[0]["aggregate"])
    assert found.n == 10
    assert found.difference == pytest.approx(documents[0]["value"] - documents[1]["value"])


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


def test_current_depends_on_labels(numbered_run):
    run = numbered_run(categories=("bird",), seeds=(0, 1))
    encoder = Scripted([[1, 0]] * 8, {text: [1, 0] for text in ("hen", "owl", "jay", "a hen", "a owl")})
    metric = AttributeEntropy(encoder, ["hen", "owl"], ["{}"])
    document = measure(metric, run)
    assert is_current(document, metric, run)
    assert not is_current(document, AttributeEntropy(encoder, ["hen", "jay"], ["{}"]), run)
    assert not is_current(document, AttributeEntropy(encoder, ["hen", "owl"], ["a {}"]), run)


def test_image_set(make_run, tmp_path):
    run = make_run()
    images = ImageSet(run, read_manifest(run)[::-1], EmbeddingCache(tmp_path / "cache"))
    assert [row.path for row in images.rows] == sorted(row.path for row in images.rows)
    assert images.groups == {
        "bird/000000": [0, 1, 2, 3],
        "bird/000001": [4, 5, 6, 7],
        "fish/000000": [8, 9, 10, 11],
        "fish/000001": [12, 13, 14, 15],
    }
    assert images.texts == ["a photo of a bird"] * 8 + ["a photo of a fish"] * 8
    encoder = PixelEncoder()
    assert images.embeddings(encoder).shape == (16, 3 * 64 + 1)
    assert images.embeddings(encoder) is images.embeddings(PixelEncoder()), "embedded twice"


def test_texts_are_embedded_once_each(make_run):
    class Counting(Scripted):
        asked = 0

        def embed_texts(self, texts):
            self.asked += len(texts)
            return super().embed_texts(texts)

    encoder = Counting([], {"a photo of a bird": [1, 0], "a photo of a fish": [0, 1]})
    images = ImageSet.open(make_run())
    assert torch.equal(images.text_embeddings(encoder), torch.eye(2).repeat_interleave(8, dim=0))
    images.text_embeddings(encoder)
    assert encoder.asked == 2


def test_plain_folder_can_be_measured(make_run, tmp_path):
    from PIL import Image

    for name in ("a bird", "a fish"):
        (tmp_path / "plain" / name).mkdir(parents=True)
        for index, level in enumerate((0, 128, 255)):
            Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / "plain" / name / f"{index}.png")
    first = measure(PairwiseDistance(PixelEncoder()), tmp_path / "plain")
    assert first["n_groups"] == 2
    assert is_current(first, PairwiseDistance(PixelEncoder()), tmp_path / "plain"), "its own result must not disturb"


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

    def value_of(self, images, positions):
        assert positions == sorted(set(positions))
        return images.embeddings(self.encoder)[positions, 0].mean().item()


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
        def value_of(self, images, positions):
            drawn.setdefault(images.folder.name, []).append(tuple(images.rows[place].path for place in positions))
            return 0.5

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


def test_few_categories_have_a_number_and_no_halves(make_run):
    run = make_run(categories=SIX[:5], seeds=range(3), images=2)
    metric = MeanBrightness(PixelEncoder())
    document = measure(metric, run)
    assert (document["n_units"], document["subsets"]) == (5, [])
    assert interval_of(document) == (document["value"], None, None)
    metric.cluster = None
    assert len(measure(metric, run)["subsets"]) == 20


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
        def value_of(self, images, positions):
            return drawn["values"][positions].mean()

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


def test_a_set_metric_refuses_few_images_and_does_not_measure_small_halves(make_run):
    run = make_run(categories=SIX, seeds=(0,), images=2)
    metric = MeanBrightness(PixelEncoder())
    metric.minimum = 7
    document = measure(metric, run)
    assert document["subsets"] == []
    assert interval_of(document) == (document["value"], None, None)
    metric.minimum = 13
    with pytest.raises(ValueError, match="at least 13 images for brightness, got 12"):
        measure(metric, run)


def test_a_metric_without_an_encoder_names_its_own_judge(make_run):
    class Differ:
        name, id = "pixel differences", "pixel-differences-1"

    class Compares(Metric):
        name, version, higher_is_better, unit, description = "compares", 1, None, "levels", "of nothing"
        judge = Differ()

        def per_group(self, images):
            return [images.group_value(group, value=1.0) for group in images.groups]

    run = make_run()
    metric = Compares(None)
    metric.prepare()
    document = measure(metric, run)
    assert document["encoder"] == {"name": "pixel differences", "id": "pixel-differences-1"}
    assert is_current(document, metric, run)
    with pytest.raises(TypeError, match="encoder for pairwise_distance, got None"):
        _ = PairwiseDistance(None).judge
    assert PairwiseDistance(metric).judge is metric


@pytest.mark.parametrize("content", ["{", "[]", '{"metric": "x"}'])
def test_read_document_refuses(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json.*delete it"):
        read_document(tmp_path / "x.json")
