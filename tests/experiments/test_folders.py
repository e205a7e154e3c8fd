"""Folders of anybody's images, scored without a run: what is measured, what is left out, and what is refused."""

import json
from itertools import product

import numpy as np
import pytest
from PIL import Image

from eval.features import EffNetLite0
from eval.imageset import ImageSet
from experiments.__main__ import main
from experiments.compose import expand
from experiments.evaluate import evaluate_folder
from experiments.runs.metrics import left_out_lines, measured

BY_PIXELS = ["scorer@model.scorer=pixel", "bootstrap.n_resamples=100"]


def write_folder(folder, prompts=("bird", "fish"), images=3):
    """Save one-coloured images of two prompts, numbered and without a manifest."""
    for number, prompt in enumerate(prompts):
        (folder / prompt).mkdir(parents=True)
        for index in range(images):
            Image.new("RGB", (8, 8), (40 * number, 60 * index, 9)).save(folder / prompt / f"{index}.png")
    return folder


def configured(folder, *changes):
    (cfg,) = expand([f"images={folder}", f"outputs={folder.parent / 'outputs'}", *changes])
    return cfg


def test_any_folder_of_images_is_scored(tmp_path, monkeypatch, capsys, caplog):
    """The folder is relative to where the command is called."""
    caplog.set_level("INFO", "experiments")
    folder = write_folder(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "images=mine", "metric=core", f"outputs={tmp_path / 'outputs'}", *BY_PIXELS]) == 0
    printed = capsys.readouterr().out
    table = {line.split("|")[1].strip(): line for line in printed.splitlines() if line.startswith("|")}
    document = json.loads((folder / "metrics" / "pairwise_distance-pixels-8x8.json").read_text())
    assert document["n_groups"] == 2 and "pixels-8x8" in table["pairwise_distance"]
    assert f"| {document['value']:.4g} " in table["pairwise_distance"]
    # A metric that cannot be measured says why, and keeps no other from being measured.
    assert "clip_score" not in table
    assert "Not measured: clip_score: expected an encoder with a text tower" in printed
    # The default is a mini model, whose scorer knows no photographs.
    assert "model=mini-sdxl" in printed + caplog.text and "emoji artwork alone" in printed + caplog.text


def test_controls_show_that_mirroring_counts_as_diversity_unless_it_is_averaged(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "mine"
    for prompt, index in product(("bird", "fish", "boat", "tree"), range(4)):
        (folder / prompt).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((32, 32), 0).save(folder / prompt / f"{index}.png")
    changes = ["metric=fair", "~metric.clip_score", "~metric.realism_efflite0_40", *BY_PIXELS, "controls=true"]
    table = evaluate_folder(configured(folder, *changes))[0].set_index("metric")
    mirrored = {name: float(text.split()[0]) for name, text in table["mirrored"].items()}
    assert mirrored["pairwise_distance"] != 0
    assert mirrored["pairwise_distance_aligned"] == pytest.approx(0, abs=1e-6)
    assert table[["shifted", "blurred", "noisy"]].map(lambda text: text.endswith("]")).all(axis=None)
    assert sorted(path.name for path in folder.iterdir()) == ["bird", "boat", "fish", "metrics", "tree"]


def test_the_scores_of_a_folder_go_where_they_are_sent(tmp_path):
    folder = write_folder(tmp_path / "mine")
    cfg = configured(folder, f"scores={tmp_path / 'scores'}", "metric=tune", *BY_PIXELS)
    table, refused = evaluate_folder(cfg)
    assert (table["metric"].tolist(), list(refused)) == (["pairwise_distance"], ["clip_score"])
    assert {path.name for path in folder.iterdir()} == {"bird", "fish"}
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["pairwise_distance-pixels-8x8.json"]
    # The same images have the same scores; another image is measured.
    assert evaluate_folder(cfg)[0].equals(table)
    Image.new("RGB", (8, 8), "white").save(folder / "bird" / "new.png")
    changed, _ = evaluate_folder(cfg)
    assert changed["images"].tolist() == ["7"] and changed["value"][0] != table["value"][0]


def test_prompts_that_are_cut_are_announced(tmp_path, caplog):
    folder = write_folder(tmp_path / "mine")
    (folder / "prompts.json").write_text(json.dumps({"bird": "a photo of a bird " * 60}))
    cfg = configured(folder, "metric=tune")
    for _ in range(2):  # the second time, the scores are there already
        caplog.clear()
        evaluate_folder(cfg)
        assert "clip_score by mini-clip: 1 of 2 prompts are longer than it reads" in caplog.text


def test_folders_that_cannot_be_scored_say_why(tmp_path):
    cfg = configured(tmp_path / "absent", "metric=tune", *BY_PIXELS)
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "single", images=1)
    image = write_folder(tmp_path / "damaged") / "bird" / "1.png"
    image.write_bytes(image.read_bytes()[:40])
    for name, error, message in (
        ("absent", FileNotFoundError, r"absent.*does not exist"),
        ("empty", ValueError, "one subfolder of images a prompt"),
        ("single", ValueError, "at least 2 images in every group"),
        ("damaged", ValueError, r"damaged or foreign file.*bird/1\.png"),
    ):
        cfg.images = str(tmp_path / name)
        with pytest.raises(error, match=message):
            evaluate_folder(cfg)


def released(tmp_path, *changes):
    """Score three kinds of textures, 8 of each, by the suite of the paper's own numbers."""
    rng = np.random.default_rng(0)
    for use, number in product(("generated", "real"), range(24)):
        file = tmp_path / use / ("bird", "dog", "bus")[number // 8] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(4 + number // 8, 5, 3), dtype=np.uint8)).resize((70, 60)).save(file)
    changes = ["metric=released", f"model.reference_images={tmp_path / 'real'}", *changes]
    return evaluate_folder(configured(tmp_path / "generated", *changes))


def test_the_papers_own_numbers_need_weights_and_say_which(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.weights.network_failure", lambda _: "the network is off")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="No configured metric") as error:
        released(tmp_path, "model=sdxl")
    reasons = str(error.value).splitlines()[1:]
    assert len(reasons) == 4
    for name in ("dreamsim", "entropy", "inception_score", "fid"):
        (reason,) = (line for line in reasons if line.startswith(f"Not measured: released_{name}: "))
        assert "expected the weights of" in reason and "no download" in reason


@pytest.mark.slow
def test_the_papers_own_numbers_are_their_formulas(tmp_path):
    """EfficientNet, whose weights are in models/, takes the place of the networks whose weights are not."""
    table, refused = released(
        tmp_path, "model=mini-sdxl", "scorer@scorers.dreamsim=efficientnet-lite0",
        "scorer@scorers.inception_torchvision=efficientnet-lite0", "metric.released_inception_score.splits=2",
        "scorer@scorers.inception_released=efficientnet-lite0-40", "scorers.inception_released.channels=16",
    )  # fmt: skip
    assert not refused and not table["value"].isna().any()
    documents = [json.loads(path.read_text()) for path in (tmp_path / "generated" / "metrics").iterdir()]
    values = {document["metric"]: document["value"] for document in documents}
    generated, real = (ImageSet.open(tmp_path / use) for use in ("generated", "real"))

    x = generated.embeddings(EffNetLite0()).double()
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    cosine = unit @ unit.T
    of_prompts = [np.tril(cosine[k : k + 8, k : k + 8], -1).sum() / 28 for k in (0, 8, 16)]
    assert values["released_dreamsim"] == pytest.approx(np.mean(of_prompts), rel=1e-6)

    p = EffNetLite0().logits_from_features(x.float()).double().softmax(dim=1).numpy()
    parts = [np.exp(np.mean((part * np.log(part / part.mean(0))).sum(axis=1))) for part in (p[:12], p[12:])]
    assert values["released_inception_score"] == pytest.approx(np.mean(parts), rel=1e-6)

    a, b = (images.embeddings(EffNetLite0(channels=16)).double().numpy() for images in (generated, real))
    roots = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).astype(complex)).real.sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * roots
    assert values["released_fid"] == pytest.approx(distance, rel=1e-6)

    (entropy,) = (document for document in documents if document["metric"] == "released_entropy")
    shares = [np.array([*group["counts"].values()]) / 8 for group in entropy["groups"]]
    assert len(shares) == 3 and len(entropy["settings"]["templates"]) == 80
    assert entropy["value"] == pytest.approx(np.mean([-(s * np.log(s)).sum() for s in shares]))


def test_without_real_images_metrics_that_compare_with_them_are_left_out(tmp_path):
    cfg = configured(tmp_path, "metric=full", "model=sdxl")
    absent = [name for name in cfg.metric if name not in measured(cfg)]
    assert absent == [name for name, spec in cfg.metric.items() if "reference" in spec]
    (line,) = left_out_lines([cfg, cfg])
    assert ", ".join(absent) in line and "model.reference_images=FOLDER" in line
