"""Every metric is one of torchmetrics': on tensors, in collections, and equal to what the suite says of a folder."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from eval.alignment import ClipScore
from eval.attributes import AttributeEntropy
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
    cubic_kernel,
    kernel_mean,
)
from eval.images import load_image
from eval.imageset import ImageSet
from eval.metric import measure
from eval.perceptual import LayerDistance
from eval.resemblance import AnyResemblance, DetectionRate, Identification, MaximumResemblance, MeanResemblance

OF_SETS = (FrechetDistance, KernelDistance, Cmmd, Precision, Recall, Density, Coverage)


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_collection_of_groups_has_what_each_metric_says_of_each_group():
    kinds = (PairwiseSimilarity, PairwiseDistance, CategoryPooledSimilarity, VendiScore)
    collection = MetricCollection([kind() for kind in kinds])
    groups = features(6, 4, 8)
    # What is equal at first, as of equal images, is not taken for one metric later.
    equal = torch.ones(1, 4, 8)
    for batch in (equal, groups[:4], groups[4]):
        collection.update(batch)
    expected = [torch.cat([kind().score(equal), kind().score(groups[:5])]).mean() for kind in kinds]
    assert [value.item() for value in collection.compute().values()] == pytest.approx([e.item() for e in expected])
    collection.reset()
    assert collection(groups)["VendiScore"].item() == pytest.approx(VendiScore().score(groups).mean().item())


def test_a_collection_of_sets_takes_parts_of_both_in_any_order():
    collection = MetricCollection([kind() for kind in OF_SETS])
    made, real = features(40, 5), features(50, 5, seed=1) + 0.3
    collection.update(real[:20], real=True)
    for part in made.split(15):
        collection.update(part, real=False)
    collection.update(real[20:], real=True)
    found = {name: value.item() for name, value in collection.compute().items()}
    pair = made.double(), real.double()
    assert found == pytest.approx({kind.__name__: kind().score(*pair) for kind in OF_SETS})
    assert collection["FrechetDistance"].higher_is_better is False and collection["Coverage"].higher_is_better


def test_images_and_texts_are_embedded_where_there_is_an_encoder(make_run, tiny_clip):
    run = make_run()
    images = ImageSet.open(run)
    pixels = torch.stack([load_image(run / row.path) for row in images.rows])
    for encoder in (PixelEncoder(), HFClip(tiny_clip)):
        metric = PairwiseDistance(encoder)
        metric.update(pixels.unflatten(0, (4, 4)))
        assert metric.compute().item() == pytest.approx(measure(PairwiseDistance(encoder), images)["value"], abs=1e-6)
    clip = ClipScore(encoder)
    clip.update(pixels, images.texts)
    assert clip.compute().item() == pytest.approx(measure(ClipScore(encoder), images)["value"], abs=1e-4)
    distance = LayerDistance()
    distance.update(pixels[:4])
    assert distance.compute().item() == pytest.approx(measure(LayerDistance(), images)["groups"][0]["value"], abs=1e-6)
    change, share = Change(), ChangedShare()
    change.update(features(4, 8), features(4, 8))
    share.update(pixels[:2], torch.stack([pixels[0], pixels[2]]))
    assert change.compute() == 0 and share.compute() == 0.5


def test_an_images_clip_score_is_that_of_torchmetrics(make_run, tiny_clip):
    """Whose class clamps the mean of images, where this has the mean of clamped ones."""
    from torchmetrics.functional.multimodal import clip_score
    from transformers import CLIPModel, CLIPProcessor

    images = ImageSet.open(make_run(images=1))
    pixels = images.load(range(4))
    texts = ["a cat", "a dog", "a", "b"]
    ours = ClipScore(HFClip(tiny_clip)).score(*map(HFClip(tiny_clip).features, (torch.stack(pixels), texts)))

    class Tensors(CLIPModel):
        """Of transformers 5 too, which returns what torchmetrics 1.9 does not know."""

        def get_image_features(self, *given, **named):
            found = super().get_image_features(*given, **named)
            return getattr(found, "pooler_output", found)

        def get_text_features(self, *given, **named):
            found = super().get_text_features(*given, **named)
            return getattr(found, "pooler_output", found)

    model = Tensors.from_pretrained(tiny_clip), CLIPProcessor.from_pretrained(tiny_clip)
    theirs = [clip_score(image, text, lambda: model).item() for image, text in zip(pixels, texts, strict=True)]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-4) and max(theirs) > 0


def test_what_else_they_take():
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
    entropy = AttributeEntropy()
    for part in torch.eye(2).repeat(8, 1).split(5):
        entropy.update(part, torch.eye(2))
    assert entropy.compute().item() == pytest.approx(torch.log(torch.tensor(2.0)).item() + 1 / 32)
    score = InceptionScore()
    score.update(torch.eye(5).repeat(4, 1) * 1000)
    assert score.compute().item() == pytest.approx(5)


def test_they_are_copied_pickled_and_moved_as_all_metrics_are():
    metric = VendiScore()
    metric.update(features(2, 4, 8))
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone().to("cpu")):
        assert other.compute() == metric.compute()
        other.update(features(2, 4, 8, seed=1))
        assert other.compute() != metric.compute()


def test_a_frechet_distance_of_several_processes_is_not_gathered_twice(monkeypatch):
    """Two processes, each of which finds the other to have what it has itself."""
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


def test_a_kernel_is_averaged_where_the_features_are():
    """A device of shapes alone lets all but the last step pass, which makes a number."""
    with pytest.raises(RuntimeError, match="item"):
        kernel_mean(cubic_kernel, torch.ones(5, 3, dtype=torch.float64, device="meta"))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_states_are_loaded_and_merged_as_all_metrics_are():
    for kind, groups in ((VendiScore, features(6, 4, 8)), (InceptionScore, features(40, 8))):
        both, first, second, loaded = (kind() for _ in range(4))
        both.update(groups)
        first.update(groups[: len(groups) // 4])
        second.update(groups[len(groups) // 4 :])
        first.merge_state(second)
        first.persistent(True)
        loaded.load_state_dict(first.state_dict())
        assert first.compute().item() == loaded.compute().item() == pytest.approx(both.compute().item())


def test_a_collection_never_takes_one_setting_for_another():
    """Copies have the same history, and other settings since."""
    metrics = {"vendi": VendiScore(), "precision": Precision(), "inception": InceptionScore()}
    copies = {f"other {name}": copy.deepcopy(metric) for name, metric in metrics.items()}
    copies["other vendi"].q, copies["other precision"].k, copies["other inception"].splits = 3.0, 10, 4
    groups, (made, real) = features(6, 4, 8), features(2, 40, 5)
    for names, updates in (
        (("vendi",), ((torch.ones(1, 4, 8),), (groups,))),
        (("precision", "inception"), ((real, True), (made[:15], False), (made[15:], False))),
    ):
        collection = MetricCollection({n: m for n, m in (metrics | copies).items() if n.endswith(names)})
        for update in updates:
            collection.update(*update)
        for name, found in collection.compute().items():
            alone = copy.deepcopy((metrics | copies)[name])
            alone.reset()
            for update in updates:
                alone.update(*update)
            assert found == alone.compute(), name
            assert found != collection.compute()[name.removeprefix("other ")] or not name.startswith("other ")


class Counting(PixelEncoder):
    def __init__(self, size):
        super().__init__(size)
        self.embedded = 0

    def embed_images(self, images):
        self.embedded += len(images)
        return super().embed_images(images)


def test_a_collection_embeds_once_what_is_of_one_encoder_and_never_mixes_two():
    """Of images of one colour, at first, features of another encoder may be the same."""
    images = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    class Squared(Counting):
        def embed_images(self, images):
            return super().embed_images(images) ** 2

    one, other = Counting(1), Squared(1)
    other.name = "squared"
    black = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    collection = MetricCollection({"p": KernelDistance(one), "r": Cmmd(one), "o": KernelDistance(other)})
    for given, real in ((black, True), (images[:20], True), (images[20:], False)):
        collection.update(given, real=real)
    assert one.embedded == 2 + 2 + 40 and other.embedded == 42
    alone = KernelDistance(other)
    for given, real in ((black, True), (images[:20], True), (images[20:], False)):
        alone.update(given, real=real)
    found = collection.compute()
    assert found["o"] == alone.compute() and found["o"] != found["p"]


def test_real_images_are_none_that_were_made():
    made, real = features(2, 40, 5)
    collection = MetricCollection([KernelDistance(), InceptionScore()])
    collection.update(real, real=True)
    collection.update(made)
    alone = InceptionScore()
    alone.update(made)
    assert collection.compute()["InceptionScore"] == alone.compute()
    metric = KernelDistance()
    metric.update(made)
    with pytest.raises(ValueError, match="expected real features for kernel_distance, got none"):
        metric.compute()


def test_images_come_in_any_shape_and_as_a_list(make_run):
    images = ImageSet.open(make_run(categories=("bird",), seeds=(0,))).load(range(4))
    expected = PixelEncoder().embed_images(images)
    lists, stacked, single, sets = Change(PixelEncoder()), PairwiseDistance(PixelEncoder()), PixelEncoder(), Precision()
    lists.update([images[0][:, :8], *images], [images[0][:, :8], *images])
    stacked.update(torch.stack(images)[None, None])
    assert lists.compute() == 0 and stacked.compute() == PairwiseDistance().score(expected)
    assert torch.equal(single.features(images[0]), expected[0])
    sets.encoder = single
    for image in images:
        sets.update(image)
    sets.update(expected[None], real=True)
    assert sets.compute() == 1


@pytest.mark.parametrize(
    ("metric", "inputs", "error", "match"),
    [
        (PairwiseDistance(), [torch.zeros(2, 4, 3, 8, 8, dtype=torch.uint8)], TypeError, "got images or texts"),
        (ClipScore(), [features(1, 8), ["a cat"]], TypeError, "got images or texts"),
        (PairwiseDistance(PixelEncoder()), [features(4, 3, 8, 8)], ValueError, "uint8 images"),
        (KernelDistance(PixelEncoder()), [features(4, 3, 8, 8)], ValueError, "uint8 images"),
        (ChangedShare(), [features(4, 3, 8, 8)] * 2, ValueError, "uint8 images"),
        (PairwiseDistance(PixelEncoder()), [torch.zeros(0, 3, 8, 8, dtype=torch.uint8)], ValueError, "at least one"),
        (PairwiseDistance(PixelEncoder()), [[]], ValueError, "at least one"),
        (PairwiseDistance(PixelEncoder()), [["a cat"]], TypeError, "text tower"),
        (PairwiseDistance(PixelEncoder()), [[1, 2]], ValueError, "got int"),
        (LayerDistance(), [torch.zeros(1, 3, 32, 32, dtype=torch.uint8)], ValueError, "at least 2 images a group"),
        (PairwiseDistance(), [torch.zeros(0, 4, 8)], ValueError, "finite numbers"),
        (Change(), [features(5, 8), features(1, 8)], ValueError, "as many"),
        (Change(), [features(5, 8), features(8)], ValueError, "as many"),
        (Change(), [features(2, 8), torch.zeros(2, 8)], ValueError, "not zero"),
        (Change(), [features(2, 8), features(2, 8) * torch.nan], ValueError, "finite"),
        (ChangedShare(), [torch.zeros(n, 3, 8, 8, dtype=torch.uint8) for n in (3, 2)], ValueError, "as many"),
        (AttributeEntropy(), [features(9, 8) * torch.nan, features(2, 8)], ValueError, "finite"),
        (InceptionScore(), [features(20, 8) * torch.nan], ValueError, "finite"),
        (DetectionRate(), [features(5, 8), features(2, 8), float("nan")], ValueError, "finite"),
        *(
            (kind(), [features(5, 8), features(2, 8), *map(torch.tensor, (assets, wanted))], ValueError, "an asset of")
            for kind in (Identification, MaximumResemblance, MeanResemblance)
            for assets, wanted in (([0, 1], [0]), ([0], [0] * 5), ([0, 1], 0))
        ),
    ],
)
def test_what_would_be_nonsense_is_refused(metric, inputs, error, match):
    with pytest.raises(error, match=match):
        metric.update(*inputs)


@pytest.mark.parametrize("kind", [PairwiseDistance, KernelDistance, InceptionScore])
def test_what_embeds_nothing_is_no_encoder(kind):
    with pytest.raises(TypeError, match="expected an encoder"):
        kind(Pixels())


def test_a_folder_that_is_lacking_is_named(make_run):
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
    with pytest.raises(TypeError, match="expected an encoder"):
        VendiScore().prepare()
