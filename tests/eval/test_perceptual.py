"""LPIPS by its real loading code, on networks with random weights in torchvision's format, and the layer distance."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from eval.features import EffNetLite0
from eval.files import content_hash
from eval.images import load_image
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
    lay_down(home / "hub" / "checkpoints", "squeeze")
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


@pytest.mark.parametrize("net", ["squeeze", *(pytest.param(net, marks=pytest.mark.slow) for net in ("alex", "vgg"))])
def test_agrees_with_both_libraries(net, weights):
    import lpips
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

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
    monkeypatch.setattr("eval.perceptual.BATCH", 2)
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
    file, scorer = weights / BACKBONES["squeeze"], Lpips("squeeze")
    assert scorer.weights().files == (file,) and content_hash(file)[:12] in scorer.id
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


def test_the_metric_is_the_mean_over_pairs_of_images_that_are_not_too_large(weights, tmp_path):
    run = tmp_path / "run"
    for name, sizes in {"bird": [(40, 40)] * 3, "fish": [(33, 50)] * 2, "large": [(80, 120)] * 2}.items():
        save(run / name, sizes)
    metric, smaller = LpipsDistance("squeeze"), LpipsDistance("squeeze", size=40)
    document, resized = measure(metric, run), smaller.results(ImageSet.open(run))
    expected = []
    for name in ("bird", "fish", "large"):
        images = [load_image(path) for path in sorted((run / name).iterdir())]
        expected.append(metric.encoder.pairwise(images).mean().item())
    assert [group["value"] for group in document["groups"]] == pytest.approx(expected, rel=1e-6)
    assert document["value"] == pytest.approx(np.mean(expected))
    changed = [a["value"] != b["value"] for a, b in zip(document["groups"], resized["groups"], strict=True)]
    assert changed == [False, False, True]
    assert document["settings"] == {"size": 256} and is_current(document, metric, run)
    assert not is_current(document, smaller, run)
    # one size after the resize; grey and transparent images are read as elsewhere
    save(tmp_path / "mixed" / "bird", [(80, 80), (40, 40)], mode="LA")
    assert measure(smaller, tmp_path / "mixed")["value"] > 0
    with pytest.raises(ValueError, match=r"in group bird/000000: expected uint8 images .* of one size"):
        measure(metric, tmp_path / "mixed")
    save(tmp_path / "single" / "bird", [(40, 40)])
    for each in (metric, LayerDistance()):
        with pytest.raises(ValueError, match=f"at least 2 images in every group for {each.name}"):
            measure(each, tmp_path / "single")
    with pytest.raises(ValueError, match="at least 32"):
        LpipsDistance(size=16)


def test_the_layer_distance_by_hand_and_never_called_lpips(monkeypatch, tmp_path):
    images = noise(3, (60, 60))
    distances = EffNetLayers().pairwise(images)
    layers = EffNetLite0().layers(images)
    i, j = torch.triu_indices(3, 3, 1)
    # the squared distance of unit vectors is 2 - 2 cos
    cosines = [torch.cosine_similarity(x[i], x[j], dim=1).mean(dim=(1, 2)) for x in map(torch.Tensor.double, layers)]
    torch.testing.assert_close(distances, 2 - 2 * sum(cosines) / 7, atol=1e-6, rtol=0)
    assert distances.min() > 0.05 and distances.max() < 4
    a, b = images[:2]
    brighter = (a.int() + 4).clamp(0, 255).byte()
    monkeypatch.setattr("eval.perceptual.BATCH", 3)
    mixed = EffNetLayers().pairwise([a, b, a.clone(), brighter, noise(1, (90, 64))[0]])  # all become 224 x 224
    assert mixed[0].item() == pytest.approx(distances[0].item(), abs=1e-5) and mixed[1] == 0 < mixed[3]
    assert mixed[2] < 0.5 * mixed[0], "a little brighter is less different"
    save(tmp_path / "run" / "bird", [(40, 40)] * 2)
    document = measure(LayerDistance(), tmp_path / "run")
    assert document["encoder"]["id"] == f"layers7-{EffNetLite0().id}" and "lpips" not in str(document).lower()
