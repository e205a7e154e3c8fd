"""The real checkpoints' path, from nothing to a table, with a stand-in of the hub and tiny or random weights on it."""

import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from checkpoints import (
    lay_out_clip,
    lay_out_dinov2,
    lay_out_dreamsim,
    lay_out_flux,
    lay_out_sdxl,
    save_sscd,
    save_torchvision,
)
from hub import NOWHERE, Hub, Repository, environment
from PIL import Image

from eval import weights as weights_of_networks
from eval.weights import FACTS, Download
from experiments import PROJECT
from experiments.__main__ import main
from experiments.compose import expand
from experiments.runs import checkpoints, outlook
from negtome import model_files
from negtome.__main__ import main as negtome

SDXL, FLUX = "SG161222/RealVisXL_V4.0", "black-forest-labs/FLUX.1-dev"
#: What is smaller here than in conf/: the prompts, the images, the steps. A text has a token a character.
SMALL = (
    "prompts.categories=[bird,dog]", "model.groups_per_category=1", "prompts.images_per_prompt=2",
    "model.call.height=64", "model.call.width=64",
)  # fmt: skip
SHORT = {"sdxl": ("model.call.num_inference_steps=4", "model.call.negative_prompt=blurry"),
         "flux-dev": ("model.call.num_inference_steps=2",)}  # fmt: skip
METHODS = "method=none,negtome"
#: Metrics that so few images or categories have no value of.
UNFIT = tuple(f"~metric.{name}" for name in (
    "attribute_entropy", "gender_entropy", "race_entropy", "age_entropy", "inception_score"))  # fmt: skip
#: Leaves out the metric that embeds each image a hundred times, and CLIP's largest network.
QUICK = ("~metric.pairwise_distance_aligned", "primary.diversity=pairwise_distance", "~metric.clip_score_l14")


@pytest.fixture(scope="session")
def published(_tiny_pipelines, tmp_path_factory):
    from copy import deepcopy

    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        SDXL: lay_out_sdxl(deepcopy(_tiny_pipelines["sdxl"]), folder / "sdxl"),
        FLUX: lay_out_flux(deepcopy(_tiny_pipelines["flux"]), folder / "flux"),
    }


@pytest.fixture
def hub(published, tmp_path):
    """A hub that has both checkpoints, as a copy that may be changed."""
    with Hub() as hub:
        for number, (name, folder) in enumerate(published.items()):
            hub.repositories[name] = Repository(shutil.copytree(folder, tmp_path / f"served-{number}"))
        yield hub


@pytest.fixture
def online(hub, tmp_path, monkeypatch):
    """Have this process take `hub` for the hub, with an empty cache."""
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in {
        "constants.HF_HUB_OFFLINE": False, "constants.ENDPOINT": hub.url, "hf_api.api.endpoint": hub.url,
        "constants.HUGGINGFACE_CO_URL_TEMPLATE": template, "constants.HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setattr(f"huggingface_hub.{name}", value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts of a download
    return hub


def configured(name, *overrides):
    return expand([f"model={name}", *overrides])[0].model


def pngs(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("images/**/*.png"))}


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("sdxl", {
            "text_encoder/model.fp16", "text_encoder_2/model.fp16", "unet/diffusion_pytorch_model.fp16",
            "vae/diffusion_pytorch_model.fp16",
        }),
        pytest.param("flux-dev", {
            "text_encoder/model", "vae/diffusion_pytorch_model",
            *(f"text_encoder_2/model-0000{number}-of-00003" for number in (1, 2, 3)),
            *(f"transformer/diffusion_pytorch_model-0000{number}-of-00003" for number in (1, 2, 3)),
        }, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_checkpoint_is_fetched_once_and_in_no_other_form_than_it_is_loaded_in(name, weights, online):
    config = configured(name)
    checkpoint = checkpoints.find_checkpoint(config)
    fetched = [file.removeprefix(f"{config.source}/") for file in online.downloads()]
    assert len(set(fetched)) == len(fetched)
    assert {file.removesuffix(".safetensors") for file in fetched if file.endswith(".safetensors")} == weights
    assert all("/" in file or file == "model_index.json" for file in fetched), "what lies beside the components"
    pipe = checkpoints.load(config, checkpoint, "cpu")
    denoiser = getattr(pipe, checkpoints.ARCHITECTURES[config.architecture].denoiser)
    assert denoiser.dtype is getattr(torch, config.dtype)
    online.requests.clear()
    assert checkpoints.find_checkpoint(config) == checkpoint and not online.requests


@pytest.mark.parametrize("status", [401, pytest.param(403, marks=pytest.mark.slow)])
def test_who_may_not_download_a_gated_checkpoint_reads_where_its_licence_is_accepted(status, online, tmp_path, capsys):
    online.repositories[FLUX].gated = status
    outputs = tmp_path / "outputs"
    overrides = ["experiment=diversity", "model=flux-dev", "method=none", "metric=none", f"outputs={outputs}"]
    assert main(["generate", *overrides]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("generate: ")]
    assert f" {online.url}/{FLUX} " in line and "hf auth login" in line and len(line) < 400
    assert not outputs.exists()


def test_a_download_that_breaks_off_is_one_error_and_the_next_call_goes_on(online):
    file = "unet/diffusion_pytorch_model.fp16.safetensors"
    online.repositories[SDXL].cuts[file] = 100
    config = configured("sdxl")
    with pytest.raises(FileNotFoundError, match=SDXL):
        checkpoints.find_checkpoint(config)
    before = set(online.downloads())
    online.repositories[SDXL].cuts[file] = 1
    online.requests.clear()
    assert checkpoints.find_checkpoint(config).fingerprint
    weights = {one for one in online.downloads() if one.endswith(".safetensors")}
    assert f"{SDXL}/{file}" in weights and not weights - {f"{SDXL}/{file}"} & before


@pytest.mark.parametrize(("pause", "timeout"), [(0.3, 600), (600, 1)])
def test_a_slow_download_arrives_and_one_that_stands_still_goes_on_where_it_stopped(
    pause, timeout, online, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", timeout)
    file = "unet/diffusion_pytorch_model.fp16.safetensors"
    repository = online.repositories[SDXL]
    repository.pauses[file] = [pause]
    folder = checkpoints.find_checkpoint(configured("sdxl")).folder
    assert (folder / file).read_bytes() == (repository.folder / file).read_bytes()
    assert not repository.pauses[file], "it stood still"
    assert (online.downloads().count(f"{SDXL}/{file}") > 1) == (pause > timeout)


@pytest.mark.parametrize("name", ["sdxl", "flux-dev"])
def test_a_dry_run_states_the_bytes_that_are_fetched_afterwards_and_fetches_none(name, online, tmp_path, capsys):
    config, repository = configured(name), online.repositories[SDXL if name == "sdxl" else FLUX]
    if name == "sdxl":  # a component without the variant, and a file that is here already
        (repository.folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    repository.gated = 403
    outputs = tmp_path / "outputs"
    arguments = ["experiment=diversity", f"model={name}", "method=none", "metric=none", f"outputs={outputs}"]
    assert main(["generate", *arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "as the server says" in out and f" {online.url}/{config.source} " in out
    assert not online.downloads() and not outputs.exists() and not (tmp_path / "cache").exists()
    download = checkpoints.download_of(config)
    remote = download.remote()
    assert remote.gated and download.absent(remote.sizes) == list(remote.sizes)
    repository.gated = 0
    folder = checkpoints.find_checkpoint(config).folder
    fetched = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert remote.sizes == fetched and outlook.gigabytes(sum(fetched.values())) in out
    assert not download.absent(remote.sizes)
    (folder / "model_index.json").unlink()
    assert download.absent(remote.sizes) == ["model_index.json"]


def test_sizes_of_other_servers_are_asked_for_and_a_server_that_does_not_answer_has_none(online, tmp_path):
    file = tmp_path / "network.pth"
    file.write_bytes(bytes(12345))
    online.files["example.org/network.pth"] = file
    url = f"{online.url}/files/example.org/network.pth"
    assert Download(url).remote().sizes == {url: 12345}
    assert Download(f"{url}.zip").remote() is None
    assert Download(f"{NOWHERE}/network.pth").remote() is None
    assert Download("nobody/nothing", ("*.json",)).remote() is None
    assert {method for method, path in online.requests if path.startswith("/files")} == {"HEAD"}


def test_of_files_of_which_one_is_enough_the_first_is_counted(online):
    patterns = ("unet/absent.bin", "unet/config.json", "vae/config.json")
    for one_of, names in ((True, ["unet/config.json"]), (False, ["unet/config.json", "vae/config.json"])):
        assert list(Download(SDXL, patterns, one_of=one_of).remote().sizes) == names


@pytest.mark.parametrize("file", ["vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"])
def test_a_file_that_the_repository_lacks_is_named(file, online):
    for name in {file, file.replace(".fp16", "")}:
        (online.repositories[SDXL].folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"missing: {re.escape(file)}"):
        checkpoints.find_checkpoint(configured("sdxl"))


def test_a_component_that_has_no_variant_is_taken_as_it_is(online):
    (online.repositories[SDXL].folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    config = configured("sdxl")
    checkpoint = checkpoints.find_checkpoint(config)
    weights = [file for file in online.downloads() if file.endswith(".safetensors")]
    assert sorted(".fp16." in file for file in weights) == [False, True, True, True]
    assert checkpoints.load(config, checkpoint, "cpu").vae.dtype is torch.float16
    online.requests.clear()
    assert checkpoints.find_checkpoint(config) == checkpoint and not online.requests


def test_the_librarys_own_command_takes_a_repository(online, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["generate", "a dog", "--model", SDXL, "--size", "64x64", "--steps", "5", "-n", "2", "--out"]
    assert negtome([*command, "first"]) == 0, capsys.readouterr().err
    online.requests.clear()
    assert negtome([*command, "second"]) == 0 and not online.downloads()
    first, second = ([Image.open(path).tobytes() for path in sorted(Path(name).glob("with-*.png"))] for name in
                     ("first", "second"))  # fmt: skip
    assert len(first) == 2 and first == second
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NOWHERE)
    model_files._fetch.cache_clear()
    assert negtome([*command, "third"]) == 0 and not online.downloads(), "a hub that does not answer is not needed"


def test_a_hub_that_does_not_answer_is_asked_once_and_named(online, tmp_path, monkeypatch, capsys):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(url)
            raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NOWHERE)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it is asked again"))
    for module in (model_files, weights_of_networks):
        monkeypatch.setattr(module, "_silent", {})
    assert negtome(["generate", "a dog", "--model", "nobody/else", "--out", str(tmp_path / "new")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nobody/else" in line and f"{NOWHERE} does not answer (" in line
    with pytest.raises(FileNotFoundError, match=f"{NOWHERE} does not answer"):
        checkpoints.find_checkpoint(configured("sdxl"))
    assert asked == [NOWHERE] * 2, "once by the library and once by the benchmark"
    later = time.monotonic() + 61
    monkeypatch.setattr("time.monotonic", lambda: later)
    assert model_files.hub_failure() and asked == [NOWHERE] * 3, "a network that was off may be on again"


# --- the experiment, in processes of their own ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Scoring networks: repositories by their names, and files by where they are downloaded from."""
    folder = tmp_path_factory.mktemp("networks")
    archive, dino = lay_out_dreamsim(folder / "dreamsim")
    repositories = {
        "timm/vit_base_patch32_clip_224.openai": lay_out_clip(folder / "clip"),
        "facebook/dinov2-base": lay_out_dinov2(folder / "dinov2"),
    }
    lpips = FACTS["lpips"]
    files = {
        FACTS["dreamsim"]["url"].format(kind="ensemble"): archive,
        FACTS["dreamsim"]["dino"]: dino,
        FACTS["sscd"]["url"]: save_sscd(folder / "sscd.pt"),
    }
    for net, name in (("alex", "alexnet"), ("vgg", "vgg16")):
        file = lpips["backbones"][net]
        files[lpips["url"].format(file=file)] = save_torchvision(name, folder / file)
    for row, options in (("inception", {"aux_logits": False, "num_classes": 1008}), ("inception_torchvision", {})):
        file = folder / FACTS[row]["files"][0]
        files[FACTS[row]["url"]] = save_torchvision("inception_v3", file, init_weights=False, **options)
    yield repositories, {url.removeprefix("https://"): file for url, file in files.items()}
    shutil.rmtree(folder)


@pytest.fixture
def scoring(hub, networks):
    """A hub that has the scoring networks, too; and what else they are downloaded from."""
    repositories, files = networks
    hub.repositories |= {name: Repository(folder) for name, folder in repositories.items()}
    hub.files |= files
    return hub


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What `git clone` gives a stranger: this checkout, in which changes that are not committed yet are a commit."""
    folder = tmp_path_factory.mktemp("clone") / "negtome"

    def git(place, *arguments):
        words = ["git", "-C", str(place), "-c", "user.name=n", "-c", "user.email=e@example.com", *arguments]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    if not (PROJECT / ".git").exists():
        pytest.skip("an unpacked archive, which cannot be cloned")
    git(PROJECT, "clone", "--quiet", "--shared", str(PROJECT), str(folder))
    changed = git(PROJECT, "diff", "HEAD", "--name-only", "-z").split("\0")
    changed += git(PROJECT, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    for name in filter(None, changed):
        (folder / name).unlink(missing_ok=True)
        if (PROJECT / name).is_file() and not (PROJECT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, folder / name)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--no-verify", "-m", "changes")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def command(scoring, clone, tmp_path):
    """Call a command of the benchmark on a machine that has nothing yet but a clone and Python's packages.

    `gpus` is the number of its fake GPUs. Each that a process takes is the name of a file in the folder `gpus`.
    """
    home, notes = tmp_path / "home", tmp_path / "gpus"
    notes.mkdir()

    def call(name, *arguments, gpus=0):
        words = [sys.executable, "-m", "experiments", name, *arguments]
        variables = environment(scoring, home, clone) | {"FAKE_GPUS": str(gpus), "NOTES": str(notes)}
        return subprocess.run(words, cwd=clone, env=variables, capture_output=True, text=True)

    yield call
    shutil.rmtree(home, ignore_errors=True)  # 300 MB


def scored(table):
    """Return the CSV's rows by method and metric; each must have a number."""
    frame = pd.read_csv(table).set_index(["method", "metric"])
    assert frame["value"].notna().all() and len(frame)
    return frame


@pytest.mark.slow
def test_sdxl_goes_from_a_clone_to_a_table_a_page_and_results_to_send(command, scoring, tmp_path):
    outputs = tmp_path / "outputs"
    arguments = ["experiment=diversity", "model=sdxl", METHODS, *SMALL, *SHORT["sdxl"], *UNFIT,
                 *QUICK, f"outputs={outputs}"]  # fmt: skip
    done = command("reproduce", *arguments, "--dry-run", gpus=8)
    assert done.returncode == 0 and "8 images to generate" in done.stdout, done.stderr
    assert "not known" not in done.stdout and "the GPU here" in done.stdout and not scoring.downloads()
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("served-")} == {"home", "gpus"}
    assert not list((tmp_path / "home").glob("*/hub*"))
    done = command("reproduce", *arguments, gpus=8)
    assert done.returncode == 0, done.stderr
    assert "Starting 8 processes side by side, on cuda:0, cuda:1" in done.stderr
    assert {path.name for path in (tmp_path / "gpus").iterdir()} == {f"cuda:{gpu}" for gpu in range(4)}, "a group each"
    assert "8 images to generate in 4 groups" in done.stderr and "Traceback" not in done.stderr
    assert "nan" not in done.stdout and scoring.url not in done.stderr, "the log has every request"
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip() and "%|" not in line]
    assert len(set(lines)) == len(lines), [line for line, number in Counter(lines).items() if number > 1]
    images = pngs(outputs / "runs")
    assert len(images) == 8 and {Image.open(path).size for path in images} == {(64, 64)}
    table = outputs / "results" / "diversity" / "table.csv"
    frame = scored(table)
    assert set(frame.index.get_level_values("method")) == {"none", "negtome"}
    distances = frame.xs("pairwise_distance", level="metric")
    assert (distances["value"] > 0).all() and distances["encoder"].str.startswith("dreamsim-ensemble-").all()
    assert (tmp_path / "home" / "torch" / "hub" / "dreamsim" / "ensemble_lora").is_dir()
    assert len(set(scoring.downloads())) == len(scoring.downloads()), "something was downloaded twice"

    before = {path: path.stat().st_mtime_ns for path in images}, table.read_bytes()
    scoring.requests.clear()
    again = command("reproduce", *arguments)  # without GPUs, as on a login node
    assert again.returncode == 0, again.stderr
    assert "NVIDIA H100 80GB HBM3 made them" in again.stderr and not scoring.requests
    assert ({path: path.stat().st_mtime_ns for path in pngs(outputs / "runs")}, table.read_bytes()) == before

    write_report(command, table, outputs, tmp_path / "page")
    assert not scoring.requests

    sent = tmp_path / "sent"
    done = command("submit", "experiment=diversity", f"outputs={outputs}", "--to", str(sent))
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(map(str, sent.glob("*.json")))
    assert len(files) == 2
    tampered = tmp_path / Path(files[0]).name
    tampered.write_text(Path(files[0]).read_text().replace("16", "17", 1))
    done = command("verify", *files, str(tampered))
    assert done.returncode == 1 and "2 of 3 results are accepted" in done.stdout, done.stdout


def write_report(command, table, outputs, page):
    """Write the page of a table, and check that it shows images."""
    done = command("report", "--results", str(table.parent), "--outputs", str(outputs), "--into", str(page))
    assert done.returncode == 0, done.stderr
    assert "<img" in (page / "index.html").read_text()


@pytest.mark.slow
def test_flux_goes_from_a_clone_to_a_table_and_a_page(command, scoring, tmp_path):
    outputs = tmp_path / "outputs"
    arguments = ["experiment=diversity", "model=flux-dev", METHODS, *SMALL, *SHORT["flux-dev"], "metric=core",
                 "primary.diversity=pairwise_distance", "primary.quality=clip_score"]  # fmt: skip
    done = command("reproduce", *arguments, f"outputs={outputs}")
    assert done.returncode == 0, done.stderr
    assert len(pngs(outputs / "runs")) == 8
    table = outputs / "results" / "diversity" / "table.csv"
    assert len(scored(table)) >= 2 * 4
    downloads = scoring.downloads()
    assert len(set(downloads)) == len(downloads)
    write_report(command, table, outputs, tmp_path / "page")


@pytest.mark.slow
def test_the_papers_table_is_made_with_images_to_compare_with(command, scoring, tmp_path):
    """Of few images: without the numbers that need thousands, and with the Inception Score in one part."""
    outputs, real = tmp_path / "outputs", tmp_path / "val2017"
    arguments = [
        "experiment=paper", "model=sdxl", "method=none,negtome", *SMALL, *SHORT["sdxl"], "prompts.images_per_prompt=5",
        "metric.released_inception_score.splits=1", "~metric.released_entropy", f"outputs={outputs}",
        f"model.reference_images={real}",
    ]  # fmt: skip
    done = command("reproduce", *arguments)
    message = done.stderr[done.stderr.index("and no image was made") :]
    assert done.returncode == 2 and f"got {real}, which does not exist" in message and "~metric.kid" in message
    assert not scoring.downloads() and not outputs.exists()
    real.mkdir()
    for number in range(6):
        Image.effect_noise((80, 60 + number), 50).save(real / f"{number:012d}.jpg")
    done = command("reproduce", *arguments, "~metric.fid", "~metric.released_fid")
    assert done.returncode == 0, done.stderr
    page = (outputs / "results" / "paper" / "comparison.md").read_text()
    assert page in done.stdout and "nan" not in page
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    rows = pd.DataFrame(lines[2:], columns=lines[0])
    ours = rows[rows["source"] == "ours"]
    assert list(ours["method"]) == ["without NegToMe", "NegToMe"]
    assert set(ours["model"]) == {"sdxl"} and set(ours["images"]) == {"10"}
    table = scored(outputs / "results" / "paper" / "table.csv")["value"]
    for heading, metric, scale in (
        ("DreamSim similarity (down)", "released_dreamsim", 1), ("CLIPScore / 100 (up)", "clip_score", 0.01),
        ("Inception Score (up)", "released_inception_score", 1), ("KID (down)", "kid", 1),
        ("precision (up)", "precision", 1),
    ):  # fmt: skip
        for method, cell in zip(("none", "negtome"), ours[heading], strict=True):
            assert float(re.split("[ ;]", cell)[0]) == pytest.approx(scale * table[method, metric], abs=1e-3)
    assert (ours["seconds (down)"].astype(float) > 0).all()
    assert {"0.812", "0.780", "0.743", "0.712"} == set(
        rows.loc[rows["source"] == "the paper", "DreamSim similarity (down)"]
    )


@pytest.mark.slow
def test_scoring_networks_that_are_not_to_be_had_end_it_before_the_first_image(command, scoring, tmp_path):
    """Of three, each of another kind: a URL, a repository of transformers' and one of open_clip's."""
    del scoring.files[FACTS["sscd"]["url"].removeprefix("https://")]
    del scoring.repositories["facebook/dinov2-base"]
    outputs = tmp_path / "outputs"
    done = command("reproduce", "experiment=diversity", "model=sdxl", *SMALL, *SHORT["sdxl"], *UNFIT,
                   f"outputs={outputs}")  # fmt: skip
    assert done.returncode == 2, done.stderr
    message = done.stderr[done.stderr.index("expected the weights of") :]
    for network in ("SSCD", "DINOv2", "ViT-L-14-336"):
        assert message.count(f"weights of {network}") + message.count(f"weights of OpenCLIP {network}") == 1
    assert "DreamSim" not in message and "Traceback" not in done.stderr
    assert not pngs(tmp_path)
