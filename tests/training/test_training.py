"""Small-model training: tokenizers, losses, optimizers and the folding of latent statistics."""

import json

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer, T5Tokenizer

from training import clip, flux, loop, taxonomy, tokenizer, unet, vae

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


def test_clip_step_lowers_its_loss() -> None:
    model = clip.make_model(600, vision_width=32, vision_layers=1)
    pixels, ids = torch.rand(4, 3, 128, 128) * 2 - 1, torch.randint(2, 600, (4, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        a, b = clip.forward(model, pixels, ids)
        loss = clip.contrastive_loss(a, b, model.logit_scale.exp(), torch.arange(4), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_text_encoders_compute_what_the_clip_computes() -> None:
    first, second = (clip.make_model(600, 32, 1).eval() for _ in range(2))
    one, two = (m.eval() for m in clip.text_encoders(first, second))
    ids = torch.tensor([[0, 7, 8, 1] + [1] * 28])
    with torch.no_grad():
        assert torch.allclose(
            one(input_ids=ids).pooler_output, first.text_model(input_ids=ids).pooler_output, atol=1e-6
        )
        expected = second.text_projection(second.text_model(input_ids=ids).pooler_output)
        assert torch.allclose(two(input_ids=ids).text_embeds, expected, atol=1e-6)


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


def test_psnr_of_a_known_error() -> None:
    target = torch.zeros(2, 3, 8, 8)
    assert torch.allclose(vae.psnr(target + 0.2, target), torch.full((2,), 20.0), atol=1e-4)


def test_velocity_recovers_the_latent_and_the_last_step_is_pure_noise() -> None:
    alpha_bar = unet.make_scheduler().alphas_cumprod
    z, n = torch.randn(4, 16, 16, 16), torch.randn(4, 16, 16, 16)
    a = alpha_bar[torch.tensor([0, 300, 700, 999])]
    x, v = unet.noised(z, n, a)
    back = a.sqrt()[:, None, None, None] * x - (1 - a).sqrt()[:, None, None, None] * v
    assert torch.allclose(back, z, atol=1e-4)
    assert torch.allclose(x[3], n[3], atol=1e-2)


def test_unet_gets_finite_gradients_everywhere() -> None:
    model = unet.make_model()
    x, v = unet.noised(torch.randn(2, 16, 16, 16), torch.randn(2, 16, 16, 16), torch.tensor([0.5, 0.1]))
    out = model(
        x,
        torch.tensor([500, 900]),
        encoder_hidden_states=torch.randn(2, 32, 256),
        added_cond_kwargs={"text_embeds": torch.randn(2, 128), "time_ids": torch.tensor([unet.TIME_IDS] * 2).float()},
    ).sample
    (out - v).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_flux_starts_at_zero_ignores_guidance_and_learns() -> None:
    model, encoder = flux.make_model(), flux.make_text_encoder(50)
    matrices, rest = loop.split_parameters(model, encoder)
    optimizers = [loop.Muon(matrices, lr=2e-3), torch.optim.AdamW(rest, lr=2e-3)]
    z, noise = torch.randn(2, 64, 64), torch.randn(2, 64, 64)
    t = torch.tensor([0.3, 0.8])
    x = torch.lerp(z, noise, t[:, None, None])
    ids = torch.randint(3, 50, (2, 32))

    def predict(guidance: float) -> torch.Tensor:
        return model(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=encoder(input_ids=ids).last_hidden_state,
            pooled_projections=torch.ones(2, 128),
            guidance=torch.full((2,), guidance),
            img_ids=flux.image_ids("cpu"),
            txt_ids=torch.zeros(32, 3),
            return_dict=False,
        )[0]

    assert predict(1.0).abs().max() == 0
    losses = []
    for _ in range(5):
        loss = (predict(1.0) - (noise - z)).square().mean()
        for o in optimizers:
            o.zero_grad()
        loss.backward()
        for p in model.time_text_embed.guidance_embedder.parameters():
            p.grad = None
        for o in optimizers:
            o.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert torch.equal(predict(1.0), predict(5.0))


def test_packing_is_the_pipelines() -> None:
    from diffusers import FluxPipeline

    latent = torch.randn(2, 16, 16, 16)
    assert torch.equal(flux.pack(latent), FluxPipeline._pack_latents(latent, 2, 16, 16, 16))
    assert torch.equal(flux.image_ids("cpu"), FluxPipeline._prepare_latent_image_ids(2, 8, 8, "cpu", torch.float32))


def test_orthogonalise_flattens_the_spectrum() -> None:
    values = torch.linalg.svdvals(loop.orthogonalise(torch.randn(3, 24, 40)))
    assert values.min() > 0.4 and values.max() < 1.4


def test_muon_refuses_vectors_and_takes_kernels() -> None:
    with pytest.raises(ValueError, match="give it to AdamW"):
        loop.Muon([torch.nn.Parameter(torch.zeros(4))], lr=0.1)
    kernel = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    optimizer = loop.Muon([kernel], lr=0.1)
    before = kernel.detach().clone()
    kernel.square().sum().backward()
    optimizer.step()
    assert (kernel - before).square().mean().sqrt().item() == pytest.approx(0.02, rel=0.3)  # 0.2 of the learning rate
    assert ((kernel - before) * before).sum() < 0


def test_average_swaps_in_and_out() -> None:
    layer = torch.nn.Linear(2, 2)
    ema = loop.Ema([layer], 0.9)
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    ema.step(ema.live)
    live = layer.weight.detach().clone()
    with ema.swapped():
        assert torch.all(layer.weight > start) and torch.all(layer.weight <= live)
    assert torch.equal(layer.weight, live)


def test_the_average_forgets_slower_with_every_step_up_to_its_decay() -> None:
    layer = torch.nn.Linear(2, 2)
    ema = loop.Ema([layer], 0.9)
    average = layer.weight.detach().double()
    for n in range(1, 130):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(2, 2))
        ema.step(ema.live)
        average.lerp_(layer.weight.detach().double(), 1 - min(0.9, (1 + n) / (12 + n)))
    with ema.swapped():
        assert torch.allclose(layer.weight.double(), average, atol=1e-6)


def test_learning_rate_rises_stays_and_falls() -> None:
    values = [loop.trapezoid(p / 100) for p in range(101)]
    assert values[0] < 0.1 and values[1] == pytest.approx(0.5)
    assert values[2:71] == pytest.approx([1.0] * 69)
    assert values[85] == pytest.approx(0.5) and values[70:] == sorted(values[70:], reverse=True)
    assert 0 < values[-1] < 0.05


def test_an_interrupted_stage_ends_as_if_it_had_never_been(tmp_path, monkeypatch) -> None:
    """Weights, averages, both optimizers' states and the count of steps come back."""
    monkeypatch.setattr(loop, "STATE_SECONDS", 0)

    def train(folder, stop=None):
        torch.manual_seed(3)
        layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        optimizers = [
            loop.Muon([layer[0].weight], lr=0.1),
            torch.optim.AdamW([layer[0].bias, *layer[1].parameters()], lr=0.1),
        ]
        setting = loop.Setting(work=folder, deadline=0.0, steps=10, device="cpu")
        run = loop.Run("test", setting, [layer], optimizers, 0.9, lambda: None, lambda: {"seen": 0.5})
        for step in run:
            if step == stop:
                return None
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            loss = (layer(x) - x).square().mean()
            run.descend(loss)
            run.log(loss=loss)
        assert [line["seen"] for line in run.history] and run.step == 10
        weights = [p.detach().clone() for p in layer.parameters()]
        with run.ema.swapped():
            return weights + [p.detach().clone() for p in layer.parameters()]

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = train(tmp_path / "a")
    assert train(tmp_path / "b", stop=5) is None
    assert torch.load(tmp_path / "b" / "test.state.pt")["step"] == 5
    assert all(map(torch.equal, train(tmp_path / "b"), expected))


def test_run_stops_at_its_steps_and_reports_bad_losses(tmp_path, capsys) -> None:
    saved = []
    setting = loop.Setting(work=tmp_path, deadline=0.0, steps=3, device="cpu")
    layer = torch.nn.Linear(1, 1)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=1.0)]
    run = loop.Run("test", setting, [layer], optimizers, 0.9, lambda: saved.append(run.step))
    for _ in run:
        run.log(loss=layer.weight.sum())
    run.write_card(tmp_path / "test", seed=7)
    card = json.loads((tmp_path / "test" / "card.json").read_text())
    assert saved == [3] and (card["steps"], card["seed"]) == (3, 7) and "test" in capsys.readouterr().out
    run = loop.Run("test", setting, [layer], optimizers, 0.9, lambda: None)
    with pytest.raises(FloatingPointError, match="not finite"):
        for _ in run:
            run.log(loss=layer.weight.sum() * float("nan"))


def test_versions_of_an_image_are_stable_and_the_first_is_exact(tmp_path) -> None:
    rgba = np.zeros((2, 128, 128, 4), np.uint8)
    rgba[:, 32:96, 32:96] = (255, 0, 0, 255)
    np.save(tmp_path / "images.npy", rgba)
    np.savez(tmp_path / "rows.npz", image=np.array([0, 1]), caption=np.array([0, 0]))
    entry = {
        "style_set": "noto",
        "icon": "x",
        "label": "dog",
        "concept": "dog",
        "group": "g",
        "subgroup": "s",
        "gender": None,
        "tone": None,
    }
    (tmp_path / "table.json").write_text(json.dumps({"statistics": {}, "emoji": [entry, entry | {"held_out": True}]}))
    images = loop.Images(tmp_path, "cpu")
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
    even, noisy = (loop.draw_times(20_000, "cpu", kind) for kind in ("uniform", "noisy"))
    assert even.quantile(0.25).item() == pytest.approx(0.25, abs=0.02)
    # the median of a logit-normal is the logistic function of its mean
    assert noisy.median().item() == pytest.approx(1 / (1 + np.exp(-loop.TIME_MEAN)), abs=0.02)
    assert noisy.min() > 0 and noisy.max() < 1


def test_a_recipe_without_muon_gives_every_parameter_to_adamw(tmp_path) -> None:
    model = unet.make_model()
    for recipe, kinds in ((loop.Recipe(), ["Muon", "AdamW"]), (loop.Recipe(muon=False), ["AdamW"])):
        setting = loop.Setting(work=tmp_path, deadline=0.0, device="cpu", recipe=recipe)
        optimizers = loop.make_optimizers(setting, model, muon=1e-3, adam=1e-3)
        assert [type(o).__name__ for o in optimizers] == kinds
        held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters()} and len(held) == len(set(map(id, held)))
