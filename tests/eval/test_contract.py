"""Every metric is one of torchmetrics': on tensors, in collections, and equal to what `measure` writes for a folder."""

import copy
import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from eval.alignment import ClipScore, clip_score
from eval.change import Change, ChangedShare
from eval.clip import HFClip
from eval.diversity import CategoryPooledSimilarity, PairwiseDistance, PairwiseSimilarity, VendiScore
from eval.encoders import PixelEncoder, Pixels
from eval.fidelity import (
    Cmmd,
    Coverage,
    Density,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    Precision,
    Recall,
)
from eval.imageset import ImageSet
from eval.metric import measure
from eval.perceptual import LayerDistance
from eval.resemblance import AnyResemblance, DetectionRate, Identification, MaximumResemblance, MeanResemblance


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_collection_of_groups_has_the_numbers_of_each_metric():
    kinds = (PairwiseSimilarity, PairwiseDistance, CategoryPooledSimilarity, VendiScore)
    collection = MetricCollection([kind() for kind in kinds])
    groups, equal = features(6, 4, 8), torch.ones(1, 4, 8)
    for batch in (equal, groups[:4], groups[4]):  # numbers that are equal at first do not make the metrics equal
        collection.update(batch)
    expected = [torch.cat([kind().score(equal), kind().score(groups[:5])]).mean() for kind in kinds]
    assert [value.item() for value in collection.compute().values()] == pytest.approx([e.item() for e in expected])
    collection.reset()
    assert collection(groups)["VendiScore"].item() == pytest.approx(VendiScore().score(groups).mean().item())


def test_a_collection_of_sets_takes_parts_of_both_in_any_order():
    kinds = (FrechetDistance, KernelDistance, Cmmd, Precision, Recall, Density, Coverage)
    collection = MetricCollection([*(kind() for kind in kinds), InceptionScore()])
    made, real = features(40, 5), features(50, 5, seed=1) + 0.3
    collection.update(real[:20], real=True)
    for part in made.split(15):
        collection.update(part, real=False)
    collection.update(real[20:], real=True)
    values = {name: value.item() for name, value in collection.compute().items()}
    expected = {kind.__name__: kind().score(made.double(), real.double()) for kind in kinds}
    assert values == pytest.approx(expected | {"InceptionScore": InceptionScore().score(made)})
    assert collection["FrechetDistance"].higher_is_better is False and collection["Coverage"].higher_is_better
    metric = KernelDistance()
    metric.update(made)
    with pytest.raises(ValueError, match="expected real features for kernel_distance, got none"):
        metric.compute()


def test_images_and_texts_are_embedded_if_there_is_an_encoder(make_run, tiny_clip):
    images = ImageSet.open(make_run())
    pixels = torch.stack(images.load(range(16)))
    for encoder in (PixelEncoder(), HFClip(tiny_clip)):
        metric = PairwiseDistance(encoder)
        metric.update(pixels.unflatten(0, (4, 4)))
        assert metric.compute().item() == pytest.approx(measure(PairwiseDistance(encoder), images)["value"], abs=1e-6)
    clip, change, share = ClipScore(encoder), Change(), ChangedShare()
    clip.update(pixels, images.texts)
    assert clip.compute().item() == pytest.approx(measure(ClipScore(encoder), images)["value"], abs=1e-4)
    change.update(features(4, 8), features(4, 8))
    share.update(pixels[:2], torch.stack([pixels[0], pixels[2]]))
    assert change.compute() == 0 and share.compute() == 0.5


def test_images_come_in_any_shape_and_as_a_list(make_run):
    images = ImageSet.open(make_run(categories=("bird",), seeds=(0,))).load(range(4))
    encoder = PixelEncoder()
    expected = encoder.embed_images(images)
    lists, stacked, sets = Change(encoder), PairwiseDistance(encoder), Precision(encoder)
    lists.update([images[0][:, :8], *images], [images[0][:, :8], *images])
    stacked.update(torch.stack(images)[None, None])
    assert lists.compute() == 0 and stacked.compute() == PairwiseDistance().score(expected)
    assert torch.equal(encoder.features(images[0]), expected[0])
    for image in images:
        sets.update(image)
    sets.update(expected[None], real=True)
    assert sets.compute() == 1


def test_clip_scores_by_hand(numbered_run, scripted):
    vectors, texts = torch.tensor([[3.0, 0], [1, 1], [1, 0], [1, 0]]), torch.tensor([[2.0, 0], [1, 0], [0, 1], [-1, 0]])
    assert clip_score(vectors, texts).tolist() == pytest.approx([100, 100 / 2**0.5, 0, 0])
    for wrong in (texts[:1], torch.ones(4, 5)):
        with pytest.raises(ValueError, match=r"one text .* with one model"):
            clip_score(vectors, wrong)
    run = numbered_run(name="numbered", seeds=(0,), images=2)
    texts = {"a photo of a bird": [1, 0], "a photo of a fish": [0, 1]}
    document = measure(ClipScore(scripted([[1, 0], [0, 1], [3, 4], [0, 2]], texts)), run)
    assert [group["value"] for group in document["groups"]] == pytest.approx([50, 90])
    assert document["details"] == {"n_prompts": 2, "n_prompts_truncated": 2}


def test_metrics_with_further_inputs():
    made, references = torch.eye(3), torch.eye(3)[[0, 0, 1]]
    for metric, inputs, expected in (
        (AnyResemblance(), (), 2 / 3),
        (MaximumResemblance(), (torch.tensor([7, 7, 8]), torch.tensor([7, 8, 8])), 2 / 3),
        (MeanResemblance(), (torch.tensor([7, 8, 8]), torch.tensor([7, 8, 8])), 1 / 2),
        (Identification(), (torch.tensor([7, 7, 8]), torch.tensor([7, 8, 9])), 2 / 3),
        (DetectionRate(), (0.5,), 2 / 3),
    ):
        metric.update(made, references, *inputs)
        assert metric.compute().item() == pytest.approx(expected), metric.name


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_states_are_copied_loaded_and_merged():
    for kind, groups in ((VendiScore, features(6, 4, 8)), (InceptionScore, features(40, 8))):
        both, first, second, loaded = (kind() for _ in range(4))
        both.update(groups)
        first.update(groups[: len(groups) // 4])
        second.update(groups[len(groups) // 4 :])
        first.merge_state(second)
        first.persistent(True)
        loaded.load_state_dict(first.state_dict())
        copies = [first, loaded, copy.deepcopy(both), pickle.loads(pickle.dumps(both))]
        assert [metric.compute().item() for metric in copies] == pytest.approx([both.compute().item()] * 4)


def test_a_frechet_distance_of_several_processes_is_not_gathered_twice(monkeypatch):
    """Simulates two processes that have the same images."""
    made, real = features(20, 5), features(20, 5, seed=1)
    twice = FrechetDistance()
    twice.update(real.repeat(2, 1), real=True)
    twice.update(made.repeat(2, 1))
    expected = twice.compute().item()
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    metric = FrechetDistance(dist_sync_fn=lambda state, group: [state, state])
    metric.update(real, real=True)
    metric.update(made)
    assert metric.compute().item() == pytest.approx(expected)


def test_a_collection_never_takes_one_setting_for_another():
    """The copies have the same states, and other settings."""
    metrics = {"precision": Precision(), "inception": InceptionScore()}
    copies = {f"other {name}": copy.deepcopy(metric) for name, metric in metrics.items()}
    copies["other precision"].k, copies["other inception"].splits = 10, 4
    (made, real), collection = features(2, 40, 5), MetricCollection(metrics | copies)
    collection.update(real, real=True)
    for part in (made[:15], made[15:]):
        collection.update(part, real=False)
    values = collection.compute()
    assert values["precision"] == Precision().score(made, real) != values["other precision"]
    assert values["other precision"] == Precision(k=10).score(made, real)
    assert values["inception"] == InceptionScore().score(made) != values["other inception"]


def test_a_collection_embeds_once_per_encoder_and_never_mixes_two():
    """At first all images are black, so the features of both encoders may be equal."""

    class Counting(PixelEncoder):
        embedded = 0

        def embed_images(self, images):
            self.embedded += len(images)
            return super().embed_images(images)

    class Squared(Counting):
        def embed_images(self, images):
            return super().embed_images(images) ** 2

    images = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, other = Counting(1), Squared(1)
    other.name = "squared"
    black = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    collection = MetricCollection({"p": KernelDistance(one), "r": Cmmd(one), "o": KernelDistance(other)})
    alone = KernelDistance(Squared(1))
    for batch, real in ((black, True), (images[:20], True), (images[20:], False)):
        collection.update(batch, real=real)
        alone.update(batch, real=real)
    assert one.embedded == 2 + 2 + 40 and other.embedded == 42
    values = collection.compute()
    assert values["o"] == alone.compute() and values["o"] != values["p"]


@pytest.mark.parametrize(
    ("metric", "inputs", "error", "match"),
    [
        (PairwiseDistance(), [torch.zeros(2, 4, 3, 8, 8, dtype=torch.uint8)], TypeError, "got images or texts"),
        (ClipScore(), [features(1, 8), ["a cat"]], TypeError, "got images or texts"),
        (KernelDistance(PixelEncoder()), [features(4, 3, 8, 8)], ValueError, "uint8 images"),
        (ChangedShare(), [features(4, 3, 8, 8)] * 2, ValueError, "uint8 images"),
        (PairwiseDistance(PixelEncoder()), [torch.zeros(0, 3, 8, 8, dtype=torch.uint8)], ValueError, "at least one"),
        (PairwiseDistance(PixelEncoder()), [[]], ValueError, "at least one"),
        (PairwiseDistance(PixelEncoder()), [["a cat"]], TypeError, "text tower"),
        (PairwiseDistance(PixelEncoder()), [[1, 2]], ValueError, "got int"),
        (LayerDistance(), [torch.zeros(1, 3, 32, 32, dtype=torch.uint8)], ValueError, "at least 2 images a group"),
        (PairwiseDistance(), [torch.zeros(0, 4, 8)], ValueError, "finite numbers"),
        (Change(), [features(5, 8), features(1, 8)], ValueError, "as many"),
        (Change(), [features(2, 8), torch.zeros(2, 8)], ValueError, "not zero"),
        (ChangedShare(), [torch.zeros(n, 3, 8, 8, dtype=torch.uint8) for n in (3, 2)], ValueError, "as many"),
        (InceptionScore(), [features(20, 8) * torch.nan], ValueError, "finite"),
        (DetectionRate(), [features(5, 8), features(2, 8), float("nan")], ValueError, "finite"),
        (Identification(), [features(5, 8), features(2, 8), torch.zeros(2), torch.zeros(1)], ValueError, "an asset of"),
        (
            MaximumResemblance(),
            [features(5, 8), features(2, 8), torch.zeros(2), torch.zeros(1)],
            ValueError,
            "an asset of",
        ),
    ],
)
def test_nonsense_is_refused(metric, inputs, error, match):
    with pytest.raises(error, match=match):
        metric.update(*inputs)


def test_a_missing_encoder_or_folder_is_named(make_run):
    run, encoder = make_run(), PixelEncoder()
    for metric, argument in (
        (KernelDistance(encoder), "reference"),
        (MaximumResemblance(encoder), "references"),
        (DetectionRate(encoder, run), "held_out"),
        (ChangedShare(), "baseline"),
    ):
        for ask in (metric.prepare, lambda metric=metric: measure(metric, run)):
            with pytest.raises(TypeError, match=f"a folder as `{argument}` of {metric.name} "):
                ask()
    for ask in (VendiScore().prepare, lambda: PairwiseDistance(Pixels()), lambda: measure(PairwiseDistance(), run)):
        with pytest.raises(TypeError, match=r"expected an encoder|an encoder to measure a folder .* got None"):
            ask()
    with pytest.raises(TypeError, match="text tower"):
        measure(ClipScore(PixelEncoder()), run)
