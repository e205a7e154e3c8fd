"""LPIPS through its real loading code, on networks with random weights laid down as torchvision's files are."""

import hashlib
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from eval.features import EffNetLite0
from eval.images import ManifestRow, load_image, read_manifest, write_manifest
from eval.imageset import ImageSet
from eval.metric import is_current, measure
from eval.perceptual import BACKBONES, EffNetLayers, LayerDistance, Lpips, LpipsDistance

NETS = {"alex": "alexnet", "squeeze": "squeezenet1_1", "vgg": "vgg16"}


def lay_down(folder, net):
    """Write a network's weights file: every key and shape of the real one, the classifier's tensors all zeros.

    Zeros are saved as one number, which keeps alexnet's file at 10 of its 233 MB.
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
    return folder / BACKBONES[net]


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory):
    home = tmp_path_factory.mktemp("torch-home")
    for net in ("alex", "squeeze"):
        lay_down(home / "hub" / "checkpoints", net)
    return home


@pytest.fixture
def weights(torch_home, monkeypatch):
    """The folder of the weights, and torch.hub looking for them there."""
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


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_agrees_with_both_libraries(net, weights):
    import lpips
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

    images = noise()
    found = Lpips(net).pairwise(images)
    pixels = torch.stack(images).float() / 127.5 - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net=net, verbose=False)
    i, j = torch.triu_indices(4, 4, 1)
    torch.testing.assert_close(found, theirs(pixels[i], pixels[j]).flatten().double(), atol=1e-6, rtol=0)
    other = learned_perceptual_image_patch_similarity(pixels[i], pixels[j], net_type=net)
    assert found.mean().item() == pytest.approx(other.item(), abs=1e-6)
    assert found.min() > 0.01  # not all of it is zero


@pytest.mark.slow
def test_vgg_loads_too(tmp_path):
    lay_down(tmp_path, "vgg")
    images = noise(2, (32, 32))
    found = Lpips("vgg", weights_dir=tmp_path).pairwise(images)
    assert found.item() > 0.01 and found.dtype == torch.float64


def test_identical_images_are_at_distance_zero(weights):
    a, b = noise(2)
    ab, aa, ba = Lpips("squeeze").pairwise([a, b, a.clone()])
    assert aa == 0 and ab == ba > 0


def test_neither_order_nor_batch_size_matters(weights, monkeypatch):
    scorer, images = Lpips("squeeze"), noise(5)
    found = scorer.pairwise(images)
    for size in (1, 2):
        monkeypatch.setattr("eval.perceptual.BATCH", size)
        torch.testing.assert_close(scorer.pairwise(images), found, atol=1e-6, rtol=0)
    backwards = [9, 8, 6, 3, 7, 5, 2, 4, 1, 0]  # the pair (4, 3) first, (1, 0) last
    torch.testing.assert_close(scorer.pairwise(images[::-1]), found[backwards], atol=1e-6, rtol=0)


def test_weights_are_found_and_identified(weights, tmp_path):
    file = weights / BACKBONES["squeeze"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    scorer = Lpips("squeeze")
    facts = scorer.weights()
    assert scorer.id == f"lpips-squeeze-v0.1-{facts.fingerprint}" and digest[:12] in scorer.id
    assert facts.present and facts.sha256 == digest and facts.files == (file,)
    # weights_dir comes before torch.hub's folder, and other weights are another scorer
    state = torch.load(file)
    torch.save({name: tensor + 0.01 for name, tensor in state.items()}, tmp_path / file.name)
    other = Lpips("squeeze", weights_dir=tmp_path)
    assert other.id != scorer.id
    assert other.pairwise(noise(2)) != scorer.pairwise(noise(2))


@pytest.mark.parametrize("given", [True, False])
def test_missing_weights_fail_at_once_and_say_what_to_do(given, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    metric = LpipsDistance("vgg", weights_dir=tmp_path / "mine" if given else None)
    folder = tmp_path / "mine" if given else tmp_path / "torch" / "hub" / "checkpoints"
    assert not metric.encoder.weights().present
    for ask in (metric.prepare, lambda: metric.encoder.id):
        start = time.monotonic()
        with pytest.raises(FileNotFoundError) as error:
            ask()
        assert time.monotonic() - start < 5
        message = str(error.value)
        assert str(folder) in message and "https://download.pytorch.org/models/vgg16-397923af.pth" in message
        assert ("no download" in message) is not given


def test_wrong_weights_are_refused(weights, tmp_path):
    file = tmp_path / BACKBONES["squeeze"]
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"not a file of tensors alone\); put .*from https"):
        Lpips("squeeze", weights_dir=tmp_path).prepare()
    state = torch.load(weights / BACKBONES["squeeze"])
    del state["features.12.expand3x3.bias"]
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"cannot be loaded .*features\.12\.expand3x3\.bias"):
        Lpips("squeeze", weights_dir=tmp_path).prepare()
    with pytest.raises(ValueError, match="alex"):
        Lpips("resnet")


def test_what_pairs_may_be(weights):
    scorer = Lpips("squeeze")
    with pytest.raises(ValueError, match="of one size"):
        scorer.pairwise([*noise(1), *noise(1, (64, 40))])
    with pytest.raises(ValueError, match="uint8"):
        scorer.pairwise([image.float() for image in noise(2)])
    with pytest.raises(ValueError, match="at least 32 pixels"):
        scorer.pairwise(noise(2, (31, 40)))
    assert scorer.pairwise(noise(2, (32, 32))) > 0


# --- the metric ------------------------------------------------------------------------------------------------------


def test_the_metric_is_the_mean_over_pairs(weights, tmp_path):
    run = tmp_path / "run"
    save(run / "bird", [(40, 40)] * 4)
    save(run / "fish", [(33, 50)] * 2)
    metric = LpipsDistance("squeeze")
    document = measure(metric, run)
    for group, folder in zip(document["groups"], ("bird", "fish"), strict=True):
        distances = metric.encoder.pairwise([load_image(path) for path in sorted((run / folder).iterdir())])
        assert group["value"] == pytest.approx(distances.mean().item(), rel=1e-6)
        assert group["category"] == folder and group["n_images"] * (group["n_images"] - 1) / 2 == len(distances)
    assert document["value"] == pytest.approx(np.mean([group["value"] for group in document["groups"]]))
    assert document["encoder"] == {"name": "LPIPS (squeeze)", "id": metric.encoder.id}
    assert document["settings"] == {"size": 256}
    assert is_current(document, metric, run)
    assert not is_current(document, LpipsDistance("alex"), run)
    assert not is_current(document, LpipsDistance("squeeze", size=64), run)


def test_large_images_are_made_smaller_and_small_ones_left(weights, tmp_path):
    run = tmp_path / "run"
    save(run / "large", [(80, 120)] * 2)
    save(run / "small", [(40, 60)] * 2)
    metric = LpipsDistance("squeeze", size=40)
    shapes = {row.category: tuple(metric._smaller(load_image(run / row.path)).shape) for row in read_manifest(run)}
    assert shapes == {"large": (3, 40, 60), "small": (3, 40, 60)}
    changed = [
        a["value"] != b["value"]
        for a, b in zip(
            measure(metric, run)["groups"], measure(LpipsDistance("squeeze", None), run)["groups"], strict=True
        )
    ]
    assert changed == [True, False]
    with pytest.raises(ValueError, match="at least 32"):
        LpipsDistance(size=16)


def test_mixed_sizes_modes_and_single_images(weights, tmp_path):
    metric = LpipsDistance("squeeze", size=40)
    # one size after the resize: fine; grey and transparent images are read as they are everywhere
    save(tmp_path / "run" / "bird", [(80, 80), (40, 40)])
    save(tmp_path / "run" / "fish", [(50, 50)] * 3, mode="LA")
    assert all(group["value"] > 0 for group in measure(metric, tmp_path / "run")["groups"])
    save(tmp_path / "mixed" / "bird", [(40, 40), (40, 50)])
    with pytest.raises(ValueError, match=r"in group bird/000000: expected uint8 images .* of one size"):
        measure(metric, tmp_path / "mixed")
    save(tmp_path / "single" / "bird", [(40, 40)])
    with pytest.raises(ValueError, match="at least 2 images in every group for lpips"):
        measure(metric, tmp_path / "single")


def test_groups_do_not_mix_and_order_does_not_matter(weights, tmp_path):
    run = tmp_path / "run"
    save(run, [(32, 32)] * 6)
    rows = [ManifestRow(f"{i}.png", "bird", "a bird", "bird", i // 3, i % 3, i) for i in range(6)]
    write_manifest(run, rows)
    metric = LpipsDistance("squeeze")
    values = metric.per_group(ImageSet(run, rows))
    again = metric.per_group(ImageSet(run, rows[::-1]))
    assert [value["group"] for value in values] == [value["group"] for value in again] == ["bird/000000", "bird/000001"]
    assert [value["value"] for value in values] == pytest.approx([value["value"] for value in again], abs=1e-6)
    first = metric.per_group(ImageSet(run, rows[:3]))
    assert first[0]["value"] == pytest.approx(values[0]["value"])


# --- layers of EfficientNet-lite0 ------------------------------------------------------------------------------------


def test_layer_distance_by_hand():
    images = noise(3, (60, 60))
    found = EffNetLayers().pairwise(images)
    layers = EffNetLite0().layers(images)
    assert [layer.shape[1] for layer in layers] == list(EffNetLite0.STAGES)
    i, j = torch.triu_indices(3, 3, 1)
    # of unit vectors the squared distance is 2 - 2 cos
    cosines = [torch.cosine_similarity(x[i], x[j], dim=1).mean(dim=(1, 2)) for x in map(torch.Tensor.double, layers)]
    torch.testing.assert_close(found, 2 - 2 * sum(cosines) / 7, atol=1e-6, rtol=0)
    assert found.min() > 0.05 and found.max() < 4


def test_layer_distance_is_a_distance_of_what_is_seen(monkeypatch):
    scorer = EffNetLayers()
    a, b = noise(2, (64, 64))
    slightly = (a.int() + 4).clamp(0, 255).byte()
    found = ab, aa, brighter, *_ = scorer.pairwise([a, b, a.clone(), slightly])
    assert aa == 0
    assert 0 < brighter < 0.5 * ab, "a little brighter is less different than another picture"
    monkeypatch.setattr("eval.perceptual.BATCH", 3)
    again = scorer.pairwise([slightly, a.clone(), b, a])
    torch.testing.assert_close(again, found[[5, 4, 2, 3, 1, 0]], atol=1e-5, rtol=0)
    assert scorer.pairwise([a, noise(1, (90, 64))[0]]) > 0  # sizes may differ: all become 224 x 224


def test_layer_distance_is_never_called_lpips(tmp_path):
    save(tmp_path / "run" / "bird", [(40, 40)] * 3)
    metric = LayerDistance()
    document = measure(metric, tmp_path / "run")
    distances = metric.encoder.pairwise([load_image(path) for path in sorted((tmp_path / "run" / "bird").iterdir())])
    assert document["value"] == pytest.approx(distances.mean().item(), rel=1e-6)
    assert document["encoder"]["id"] == f"layers7-{EffNetLite0().id}"
    assert "lpips" not in str(document).lower() and is_current(document, metric, tmp_path / "run")
    save(tmp_path / "single" / "bird", [(40, 40)])
    with pytest.raises(ValueError, match="at least 2 images in every group for layer_distance_efflite0"):
        measure(metric, tmp_path / "single")
