"""Every metric is one of torchmetrics': on tensors, in collections, and equal to what `measure` writes for a folder."""

import copy
import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from eval.alignment import ClipScore, clip_score
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
    clip, distance, change, share = ClipScore(encoder), LayerDistance(), Change(), ChangedShare()
    clip.update(pixels, images.texts)
    assert clip.compute().item() == pytest.approx(measure(ClipScore(encoder), images)["value"], abs=1e-4)
    distance.update(pixels[:4])
    assert distance.compute().item() == pytest.approx(measure(LayerDistance(), images)["groups"][0]["value"], abs=1e-6)
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


def test_clip_scores_by_hand_and_by_torchmetrics(make_run, numbered_run, scripted, tiny_clip):
    """Torchmetrics clamps the mean of a group; a single image shows no difference."""
    from torchmetrics.functional.multimodal import clip_score as theirs
    from transformers import CLIPModel, CLIPProcessor

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

    class Tensors(CLIPModel):
        """Returns tensors in transformers 5 too, as torchmetrics 1.9 expects."""

        def get_image_features(self, *arguments, **options):
            output = super().get_image_features(*arguments, **options)
            return getattr(output, "pooler_output", output)

        def get_text_features(self, *arguments, **options):
            output = super().get_text_features(*arguments, **options)
            return getattr(output, "pooler_output", output)

    pixels, texts = ImageSet.open(make_run(images=1)).load(range(4)), ["a cat", "a dog", "a", "b"]
    model = Tensors.from_pretrained(tiny_clip), CLIPProcessor.from_pretrained(tiny_clip)
    expected = [theirs(image, text, lambda: model).item() for image, text in zip(pixels, texts, strict=True)]
    scores = ClipScore(HFClip(tiny_clip)).score(*map(HFClip(tiny_clip).features, (torch.stack(pixels), texts)))
    assert scores.tolist() == pytest.approx(expected, abs=1e-4) and max(expected) > 0


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
    entropy = AttributeEntropy()
    for part in torch.eye(2).repeat(8, 1).split(5):
        entropy.update(part, torch.eye(2))
    assert entropy.compute().item() == pytest.approx(torch.log(torch.tensor(2.0)).item() + 1 / 32)


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


def test_a_kernel_is_averaged_on_the_device_of_the_features():
    """On the meta device only the last step, which makes a number, fails."""
    with pytest.raises(RuntimeError, match="item"):
        kernel_mean(cubic_kernel, torch.ones(5, 3, dtype=torch.float64, device="meta"))


def test_a_collection_never_takes_one_setting_for_another():
    """The copies have the same states, and other settings."""
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
        values = collection.compute()
        for name, value in values.items():
            alone = copy.deepcopy((metrics | copies)[name])
            alone.reset()
            for update in updates:
                alone.update(*update)
            assert value == alone.compute(), name
            assert value != values[name.removeprefix("other ")] or not name.startswith("other ")


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
