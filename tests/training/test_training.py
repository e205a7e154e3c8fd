"""Training of the small models: tokenizers, losses, optimizers, checkpoints, and the stages from published weights."""

import functools
import importlib
import inspect
import json
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer, T5Tokenizer

from experiments import PROJECT
from training import clip, data, flux, loop, rows, taxonomy, tokenizer, train, unet, vae
from training.__main__ import FUNCTIONS, build_parser, main
from training.sources import Emoji

CAPTIONS = [f"{t} {c}" for t in taxonomy.TEMPLATES for c in (*taxonomy.EVALUATED, *taxonomy.DEVELOPMENT)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_tokenizers_round_trip_and_survive_saving(tmp_path) -> None:
    tokenizer.build(CAPTIONS, tmp_path)
    bpe = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    words = T5Tokenizer.from_pretrained(tmp_path / "tokenizer_2")
    saved = torch.load(tmp_path / "tokens.pt")
    assert torch.equal(saved["clip"].long(), tokenizer.encode(bpe, [*CAPTIONS, ""]))
    assert torch.equal(saved["t5"].long(), tokenizer.encode(words, [*CAPTIONS, ""]))
    for text in ("a photo of the dragon", "a high contrast photo of a zebra"):  # zebra is no word of the captions
        assert bpe.decode(bpe(text).input_ids, skip_special_tokens=True).strip() == text
        assert words.decode(words(text).input_ids, skip_special_tokens=True).strip() == text
    assert bpe("bird").input_ids[0] == 0 and bpe("bird").input_ids[-1] == 1
    assert words.convert_ids_to_tokens(words("a bird").input_ids) == ["▁a", "▁bird", "</s>"]


def test_contrastive_loss_prefers_matches_and_ignores_twins() -> None:
    x = torch.nn.functional.normalize(torch.randn(6, 16), dim=-1)
    ids = torch.arange(6)
    scale = torch.tensor(10.0)
    right = clip.contrastive_loss(x, x, scale, ids, ids)
    assert right < clip.contrastive_loss(x, x.roll(1, 0), scale, ids, ids)
    # Two equal rows tell nothing apart; only when they are known to share their words, that is no fault.
    twins, other = x[:1].repeat(2, 1), torch.tensor([0, 0])
    assert clip.contrastive_loss(twins, twins, scale, ids[:2], ids[:2]) == pytest.approx(np.log(2), abs=1e-4)
    assert clip.contrastive_loss(twins, twins, scale, ids[:2], other) == pytest.approx(0, abs=1e-6)


def test_text_encoders_compute_what_the_clip_computes() -> None:
    first, second = (clip.make_model(600, 32, 1).eval() for _ in range(2))
    one, two = (model.eval() for model in clip.text_encoders(first, second))
    ids = torch.tensor([[0, 7, 8, 1] + [1] * 28])
    with torch.no_grad():
        pooled, other = (model.text_model(input_ids=ids).pooler_output for model in (first, second))
        torch.testing.assert_close(one(input_ids=ids).pooler_output, pooled)
        torch.testing.assert_close(two(input_ids=ids).text_embeds, second.text_projection(other))


def test_folded_autoencoder_gives_unit_latents_and_the_same_pictures() -> None:
    model = vae.make_model().eval()
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = model.encode(x).latent_dist
        picture = model.decode(before.mean).sample
        mean, std = before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3))
        vae.fold_statistics(model, mean, std)
        after = model.encode(x).latent_dist
        assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(16), atol=1e-4)
        assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(16), atol=1e-3)
        assert torch.allclose(after.std, before.std / std[:, None, None], rtol=1e-3)
        assert torch.allclose(model.decode(after.mean).sample, picture, atol=1e-4)


def test_unet_gets_finite_gradients_everywhere() -> None:
    model, x = unet.make_model(), torch.randn(2, 16, 16, 16)
    predicted = unet.predict(model, x, torch.tensor([500, 900]), torch.randn(2, 32, 256), torch.randn(2, 128))
    (predicted - x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_flux_starts_as_the_zero_function_of_any_guidance() -> None:
    model, encoder = flux.make_model(), flux.make_text_encoder(50)
    for parameter in model.proj_out.parameters():
        torch.nn.init.normal_(parameter)
    states = encoder(input_ids=torch.randint(3, 50, (2, 32))).last_hidden_state

    def predict(guidance: float) -> torch.Tensor:
        t = torch.tensor([0.3, 0.8])
        return flux.predict(model, torch.ones(2, 64, 64), t, states, torch.ones(2, 128), torch.full((2,), guidance))

    assert torch.equal(predict(1.0), predict(5.0)) and predict(1.0).abs().max() > 0
    torch.nn.init.zeros_(model.proj_out.weight), torch.nn.init.zeros_(model.proj_out.bias)
    assert flux.make_model().proj_out.weight.abs().max() == predict(1.0).abs().max() == 0


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((24, 40), {}), ((40, 24), {}), ((8, 4, 3, 3), {}), ((8, 4, 3, 3), {"memory_format": torch.channels_last})],
)
def test_muon_takes_the_nearest_orthogonal_step(shape, layout) -> None:
    """Against the polar factor by singular values: the direction, and a root mean square of 0.2 of the rate."""
    kernel = torch.nn.Parameter(torch.randn(shape).to(**layout))
    optimizer, before = loop.Muon([kernel], lr=0.1), kernel.detach().clone()
    gradient = torch.randn(shape)
    (kernel * gradient).sum().backward()
    optimizer.step()
    step, (u, _, v) = (before - kernel.detach()).flatten(1), torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    assert torch.nn.functional.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.95
    assert step.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.3)
    optimizer.zero_grad()
    assert kernel.grad is None


def run_of(folder, layer, optimizers, steps=None, save=lambda: None, measure=dict):
    arguments = loop.TrainingArguments(work=folder, steps=steps, device="cpu")
    return loop.Run("test", arguments, [layer], optimizers, 0.9, save, measure)


def test_the_average_forgets_slower_with_every_step_up_to_its_decay(tmp_path) -> None:
    layer = torch.nn.Linear(2, 2)
    run, average = run_of(tmp_path, layer, []), layer.weight.detach().double()
    for n in range(1, 100):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(2, 2))
        run.ema.step(run.parameters)
        average.lerp_(layer.weight.detach().double(), 1 - min(0.9, (1 + n) / (12 + n)))
    live = layer.weight.detach().clone()
    with run.averaged():
        assert torch.allclose(layer.weight.double(), average, atol=1e-6)
    assert torch.equal(layer.weight, live)


def test_learning_rate_rises_stays_and_falls() -> None:
    values = [loop.trapezoid(p / 100) for p in range(101)]
    assert values[0] < 0.1 and values[1] == pytest.approx(0.5)
    assert values[2:71] == pytest.approx([1.0] * 69)
    assert values[85] == pytest.approx(0.5) and values[70:] == sorted(values[70:], reverse=True)
    assert 0 < values[-1] < 0.05


def test_an_interrupted_stage_ends_as_if_it_had_never_been(tmp_path, monkeypatch) -> None:
    """Weights, averages, both optimizers' states and the number of steps come back."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)

    def fit(folder, stop=None):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(3)
        layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        adamw = torch.optim.AdamW([layer[0].bias, *layer[1].parameters()], lr=0.1)
        optimizers = [loop.Muon([layer[0].weight], lr=0.1), adamw]
        run = run_of(folder, layer, optimizers, steps=10, measure=lambda: {"seen": 0.5})

        def compute_losses():
            if run.step == stop:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(run.step))
            return {"loss": (layer(x) - x).square().mean()}

        run.fit(compute_losses)
        assert [line["seen"] for line in run.history] and run.step == 10
        with run.averaged():
            averages = [parameter.detach().clone() for parameter in run.parameters]
        return [*run.parameters, *averages]

    expected = fit(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", stop=5)
    assert torch.load(tmp_path / "b" / "test.state.pt")["step"] == 5
    for _ in range(2):  # a stage that has ended trains no further
        assert all(map(torch.equal, fit(tmp_path / "b"), expected))


def test_hours_of_training_do_not_count_interruptions(tmp_path, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(loop.time, "time", lambda: clock[0])

    def fit(hours, stop=None):
        layer = torch.nn.Linear(1, 1)
        run = run_of(tmp_path, layer, [torch.optim.SGD(layer.parameters(), lr=0.1)])
        run.arguments = loop.TrainingArguments(work=tmp_path, hours=hours, device="cpu")

        def compute_losses():
            clock[0] += 100
            if run.step == stop:
                raise KeyboardInterrupt
            return {"loss": layer.weight.square().sum()}

        run.fit(compute_losses)
        return run

    with pytest.raises(KeyboardInterrupt):
        fit(1, stop=20)
    clock[0] += 1e6
    assert fit(1).step == 18 + 18, "the checkpoint after 1800 s, and the 1800 s that are left"
    assert fit(2).step == 72, "more hours train further"


def test_a_run_stops_at_its_steps_and_keeps_nothing_of_losses_that_are_not_finite(tmp_path) -> None:
    saved, layer = [], torch.nn.Linear(1, 1)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=1.0)]
    run = run_of(tmp_path, layer, optimizers, 3, lambda: saved.append(run.step))
    run.fit(lambda: {"loss": layer.weight.sum()})
    run.write_card(tmp_path / "test", seed=7)
    card = json.loads((tmp_path / "test" / "card.json").read_text())
    assert saved == [3] and (card["steps"], card["seed"]) == (3, 7)
    (tmp_path / "bad").mkdir()
    with pytest.raises(FloatingPointError, match="not finite"):
        run_of(tmp_path / "bad", layer, optimizers, 3).fit(lambda: {"loss": layer.weight.sum() * float("nan")})
    assert not [*tmp_path.glob("bad/*")]


def test_versions_of_an_image_are_stable_and_the_first_is_exact(tmp_path) -> None:
    rgba = np.zeros((2, 128, 128, 4), np.uint8)
    rgba[:, 32:96, 32:96] = (255, 0, 0, 255)
    np.save(tmp_path / "images.npy", rgba)
    np.savez(tmp_path / "rows.npz", image=np.array([0, 1]), caption=np.array([0, 0]))
    entry = dict.fromkeys(("icon", "label", "concept", "group", "subgroup", "gender", "tone")) | {"style_set": "noto"}
    (tmp_path / "table.json").write_text(json.dumps({"statistics": {}, "emoji": [entry, entry | {"held_out": True}]}))
    images = rows.Images(tmp_path, "cpu")
    assert images.held_out.tolist() == [1]
    zero = torch.zeros(2, dtype=torch.long)
    plain = images.render(torch.arange(2), zero)
    assert plain.shape == (2, 3, 128, 128)
    assert torch.allclose(plain[0, :, 64, 64], torch.tensor([1.0, -1.0, -1.0]), atol=1e-5)
    assert torch.allclose(plain[0, :, 5, 5], torch.ones(3), atol=1e-5)
    for _ in range(2):  # shifted as a whole, the same way whenever it is asked for
        moved, (dx, dy) = images.render(torch.arange(2), zero + 1), images.shift[0, 1].tolist()
        assert max(abs(dx), abs(dy)) <= 5
        assert torch.equal(moved[0], plain[0].roll((dy, dx), (1, 2)))


def test_times_are_drawn_as_the_recipe_says() -> None:
    even, noisy = (rows.draw_times(20_000, "cpu", kind) for kind in ("uniform", "noisy"))
    assert even.quantile(0.25).item() == pytest.approx(0.25, abs=0.02)
    # the median of a logit-normal is the logistic function of its mean
    assert noisy.median().item() == pytest.approx(1 / (1 + np.exp(-rows.TIME_MEAN)), abs=0.02)
    assert noisy.min() > 0 and noisy.max() < 1


def test_without_muon_every_parameter_is_given_to_adamw(tmp_path) -> None:
    model = unet.make_model()
    parameters = sorted(parameter.data_ptr() for parameter in model.parameters())
    for muon, names in ((True, {"Muon", "AdamW"}), (False, {"AdamW"})):
        arguments = loop.TrainingArguments(work=tmp_path, device="cpu", muon=muon)
        optimizers = loop.make_optimizers(arguments, model, muon=1e-3, adam=1e-3)
        assert {type(optimizer).__name__ for optimizer in optimizers} == names
        groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
        assert sorted(parameter.data_ptr() for group in groups for parameter in group) == parameters


def test_commands_have_the_options_of_their_functions() -> None:
    """Those of the Makefile, and the two that it does not have."""
    lines = [*re.findall(r"-m training (.+)", (PROJECT / "Makefile").read_text()), "ablation --out DIR", "samples"]
    commands = [vars(build_parser().parse_args(line.replace("$(ARGS)", "").split())) for line in lines]
    assert {options["command"] for options in commands} == FUNCTIONS.keys()
    for options in commands:
        module, _, name = FUNCTIONS[options.pop("command")].rpartition(".")
        inspect.signature(getattr(importlib.import_module(f"training.{module}"), name)).bind(**options)


def test_a_stage_without_a_time_and_an_unknown_one_are_refused(tmp_path, capsys) -> None:
    for options, message in ((["--stage=unet"], "needs --hours or --steps"), (["--stage=net"], "must be one of text,")):
        assert main(["train", f"--out={tmp_path}", *options]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_published_weights_are_trained_further(tmp_path, monkeypatch) -> None:
    """The stages that go on from models/, one step each, and the quality of the parts that are taken over."""
    emoji = [
        Emoji("noto", name, name, name, "animals-nature", "animal-mammal", None, None, [], {"dog": 1.0})
        for name in ("dog", "wolf")
    ]
    monkeypatch.setattr(data, "list_images", lambda npm: (emoji, ["", ""]))
    monkeypatch.setattr(data, "rasterise_all", lambda documents, _: np.full((2, 128, 128, 4), 99, np.uint8))
    monkeypatch.setattr(data, "hold_out", lambda emoji, **_: [False, True])
    monkeypatch.setattr(data, "describe", functools.partial(data.describe, n_rows=30))
    command = ["train", f"--from={PROJECT / 'models'}", f"--out={tmp_path}", "--device=cpu", "--steps=1", "--batch=2"]
    for stage in ("unet", "flux", "distil"):
        assert main([*command, f"--stage={stage}"]) == 0
    for folders in (("unet/start", "unet/model"), ("flux/start/transformer", "flux/model")):
        before, after = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in folders)
        changes = [(after[name].float() - before[name].float()).abs().max() for name in before]
        assert 0 < max(changes) < 0.05
    arguments, images = loop.TrainingArguments(work=tmp_path, device="cpu"), rows.Images(tmp_path / "data", "cpu")
    quality = clip.evaluate(CLIPModel.from_pretrained(tmp_path / "score" / "model").float().eval(), images, arguments)
    assert (quality["held_out_images"], quality["with_category"], quality["label_top1"]) == (1, 1, 1)
    quality = vae.evaluate(AutoencoderKL.from_pretrained(tmp_path / "vae" / "model").eval(), images, arguments)
    assert quality["psnr_held_out"] == quality["psnr_train"] > 20
    with pytest.raises(ValueError, match="name the folder of the three models"):
        train.take_over(tmp_path, loop.TrainingArguments(work=tmp_path / "other"), tmp_path)
