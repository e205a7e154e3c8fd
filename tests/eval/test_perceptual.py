"""LPIPS by its real loading code, on networks with random weights in torchvision's format, and the layer distance."""

import hashlib
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from eval.features import EffNetLite0
from eval.images import ManifestRow, load_image, write_manifest
from eval.imageset import ImageSet
from eval.metric import is_current, measure
from eval.perceptual import BACKBONES, EffNetLayers, LayerDistance, Lpips, LpipsDistance

NETS = {"alex": "alexnet", "squeeze": "squeezenet1_1", "vgg": "vgg16"}


def lay_down(folder, net):
    """Write a network's weights with every key and shape of the published file.

    The classifier's tensors are zeros, which are saved as one number: alexnet's file has 10 MB instead of 233.
    """
    import torchvision

    with torch.device("meta"):
        state = getattr(torchvision.models, NETS[net])(weights=None).state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in state.items():
        if name.startswith("features."):
            scale = (2 / max(tensor[0].numel(), 1)) ** 0.5
            weights[name] = torch.randn(tensor.shape, generator=generator) * scale
        else:
            weights[name] = torch.zeros(1).expand(tensor.shape)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / BACKBONES[net])


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory):
    home = tmp_path_factory.mktemp("torch-home")
    for net in ("alex", "squeeze"):
        lay_down(home / "hub" / "checkpoints", net)
    return home


@pytest.fixture
def weights(torch_home, monkeypatch):
    """The folder of the weights, where torch.hub searches them."""
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    return torch_home / "hub" / "checkpoints"


def noise(k=4, size=(48, 40), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for _ in range(k)]


def save(folder, sizes, mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    for index, (height, width) in enumerate(sizes):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{index}.png")


@pytest.mark.parametrize("net", ["alex", "squeeze", pytest.param("vgg", marks=pytest.mark.slow)])
def test_agrees_with_both_libraries(net, weights):
    import lpips
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

    if net == "vgg":
        lay_down(weights, net)
    images = noise()
    distances = Lpips(net).pairwise(images)
    pixels = torch.stack(images).float() / 127.5 - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net=net, verbose=False)
    i, j = torch.triu_indices(4, 4, 1)
    torch.testing.assert_close(distances, theirs(pixels[i], pixels[j]).flatten().double(), atol=1e-6, rtol=0)
    other = learned_perceptual_image_patch_similarity(pixels[i], pixels[j], net_type=net)
    assert distances.mean().item() == pytest.approx(other.item(), abs=1e-6)
    assert distances.min() > 0.01


def test_pairs_whatever_the_order_and_the_batch(weights, monkeypatch):
    scorer, images = Lpips("squeeze"), noise(5)
    distances = scorer.pairwise(images)
    first_second, first_first, second_first = scorer.pairwise([*images[:2], images[0].clone()])
    assert first_first == 0 and first_second == second_first > 0
    for size in (1, 2):
        monkeypatch.setattr("eval.perceptual.BATCH", size)
        torch.testing.assert_close(scorer.pairwise(images), distances, atol=1e-6, rtol=0)
    backwards = [9, 8, 6, 3, 7, 5, 2, 4, 1, 0]  # the pair (4, 3) first, (1, 0) last
    torch.testing.assert_close(scorer.pairwise(images[::-1]), distances[backwards], atol=1e-6, rtol=0)
    for wrong, message in (
        ([*noise(1), *noise(1, (64, 40))], "of one size"),
        ([image.float() for image in images], "uint8"),
        (noise(2, (31, 40)), "at least 32 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer.pairwise(wrong)
    assert scorer.pairwise(noise(2, (32, 32))) > 0


def test_weights_are_identified_and_wrong_ones_are_refused(weights, tmp_path):
    file = weights / BACKBONES["squeeze"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    scorer = Lpips("squeeze")
    facts = scorer.weights()
    assert scorer.id == f"lpips-squeeze-v0.1-{facts.fingerprint}" and digest[:12] in scorer.id
    assert facts.present and facts.sha256 == digest and facts.files == (file,)
    # weights_dir comes before torch.hub's folder
    state = torch.load(file)
    torch.save({name: tensor + 0.01 for name, tensor in state.items()}, tmp_path / file.name)
    other = Lpips("squeeze", weights_dir=tmp_path)
    assert other.id != scorer.id and other.pairwise(noise(2)) != scorer.pairwise(noise(2))
    (tmp_path / file.name).write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"not a file of tensors alone\); put .*from https"):
        Lpips("squeeze", weights_dir=tmp_path).prepare()
    del state["features.12.expand3x3.bias"]
    torch.save(state, tmp_path / file.name)
    with pytest.raises(ValueError, match=r"cannot be loaded .*features\.12\.expand3x3\.bias"):
        Lpips("squeeze", weights_dir=tmp_path).prepare()
    with pytest.raises(ValueError, match="alex"):
        Lpips("resnet")


def test_the_metric_is_the_mean_over_pairs(weights, tmp_path):
    run = tmp_path / "run"
    save(run / "bird", [(40, 40)] * 4)
    save(run / "fish", [(33, 50)] * 2)
    metric = LpipsDistance("squeeze")
    document = measure(metric, run)
    for group, folder in zip(document["groups"], ("bird", "fish"), strict=True):
        distances = metric.encoder.pairwise([load_image(path) for path in sorted((run / folder).iterdir())])
        assert group["value"] == pytest.approx(distances.mean().item(), rel=1e-6) and group["category"] == folder
    assert document["value"] == pytest.approx(np.mean([group["value"] for group in document["groups"]]))
    assert document["encoder"] == {"name": "LPIPS (squeeze)", "id": metric.encoder.id}
    assert document["settings"] == {"size": 256} and is_current(document, metric, run)
    assert not is_current(document, LpipsDistance("alex"), run)
    assert not is_current(document, LpipsDistance("squeeze", size=64), run)


def test_large_images_are_resized_and_groups_have_one_size(weights, tmp_path):
    run = tmp_path / "run"
    save(run / "large", [(80, 120)] * 2)
    save(run / "small", [(40, 60)] * 2)
    metric = LpipsDistance("squeeze", size=40)
    resized, kept = (measure(each, run)["groups"] for each in (metric, LpipsDistance("squeeze", None)))
    assert [a["value"] != b["value"] for a, b in zip(resized, kept, strict=True)] == [True, False]
    # one size after the resize; grey and transparent images are read as elsewhere
    save(run / "bird", [(80, 80), (40, 40)])
    save(run / "fish", [(50, 50)] * 3, mode="LA")
    assert all(group["value"] > 0 for group in measure(metric, run)["groups"])
    save(tmp_path / "mixed" / "bird", [(40, 40), (40, 50)])
    with pytest.raises(ValueError, match=r"in group bird/000000: expected uint8 images .* of one size"):
        measure(metric, tmp_path / "mixed")
    save(tmp_path / "single" / "bird", [(40, 40)])
    for each, name in ((metric, "lpips"), (LayerDistance(), "layer_distance_efflite0")):
        with pytest.raises(ValueError, match=f"at least 2 images in every group for {name}"):
            measure(each, tmp_path / "single")
    with pytest.raises(ValueError, match="at least 32"):
        LpipsDistance(size=16)


def test_groups_do_not_mix_and_order_does_not_matter(weights, tmp_path):
    save(tmp_path, [(32, 32)] * 6)
    rows = [ManifestRow(f"{i}.png", "bird", "a bird", "bird", i // 3, i % 3, i) for i in range(6)]
    write_manifest(tmp_path, rows)
    metric = LpipsDistance("squeeze")
    values, again, first = (metric.per_group(ImageSet(tmp_path, part)) for part in (rows, rows[::-1], rows[:3]))
    assert [value["group"] for value in values] == [value["group"] for value in again] == ["bird/000000", "bird/000001"]
    assert [value["value"] for value in values] == pytest.approx([value["value"] for value in again], abs=1e-6)
    assert first[0]["value"] == pytest.approx(values[0]["value"])


def test_the_layer_distance_by_hand(monkeypatch):
    images = noise(3, (60, 60))
    distances = EffNetLayers().pairwise(images)
    layers = EffNetLite0().layers(images)
    assert [layer.shape[1] for layer in layers] == list(EffNetLite0.STAGES)
    i, j = torch.triu_indices(3, 3, 1)
    # the squared distance of unit vectors is 2 - 2 cos
    cosines = [torch.cosine_similarity(x[i], x[j], dim=1).mean(dim=(1, 2)) for x in map(torch.Tensor.double, layers)]
    torch.testing.assert_close(distances, 2 - 2 * sum(cosines) / 7, atol=1e-6, rtol=0)
    assert distances.min() > 0.05 and distances.max() < 4
    a, b = noise(2, (64, 64))
    brighter = (a.int() + 4).clamp(0, 255).byte()
    distances = EffNetLayers().pairwise([a, b, a.clone(), brighter])
    assert distances[1] == 0 and 0 < distances[2] < 0.5 * distances[0], "a little brighter is less different"
    monkeypatch.setattr("eval.perceptual.BATCH", 3)
    again = EffNetLayers().pairwise([brighter, a.clone(), b, a])
    torch.testing.assert_close(again, distances[[5, 4, 2, 3, 1, 0]], atol=1e-5, rtol=0)
    assert EffNetLayers().pairwise([a, noise(1, (90, 64))[0]]) > 0  # of any sizes: all become 224 x 224


def test_the_layer_distance_is_never_called_lpips(tmp_path):
    save(tmp_path / "run" / "bird", [(40, 40)] * 3)
    metric = LayerDistance()
    document = measure(metric, tmp_path / "run")
    distances = metric.encoder.pairwise([load_image(path) for path in sorted((tmp_path / "run" / "bird").iterdir())])
    assert document["value"] == pytest.approx(distances.mean().item(), rel=1e-6)
    assert document["encoder"]["id"] == f"layers7-{EffNetLite0().id}"
    assert "lpips" not in str(document).lower() and is_current(document, metric, tmp_path / "run")
