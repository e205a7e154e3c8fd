"""Every pipeline of the table, tiny and with random weights: what holds for all of them."""

import inspect

import pytest
import tiny
import torch

import negtome
from negtome import NegToMeConfig, Reference
from negtome.architectures import ARCHITECTURES
from negtome.sites import find_architecture

#: Everything, everywhere, all the time.
CONFIG = NegToMeConfig(threshold=-1, timestep_range=(0, 1000), min_side=4)


@pytest.fixture(scope="module", params=tiny.CASES)
def case(request, _tiny_pipelines):
    """A tiny pipeline and the options of its call, shared: every test leaves it as it was."""
    pipe, options = tiny.build(request.param, _tiny_pipelines)
    generate(pipe, options)  # diffusers keeps attributes of the last call
    return pipe, options


def generate(pipe, options, seeds=(0, 1, 2), prompt="a dog"):
    """Return the latents of one call, one generator an image."""
    return pipe(
        prompt=prompt,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **options,
    ).images


def state(pipe):
    modules = [m for part in pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]
    return [(type(owner), sorted(owner.__dict__)) for owner in (pipe, *modules)]


def calls(pipe, options, monkeypatch, change=None, **others):
    """Return the arguments of every call of the denoiser in one call of the pipeline, as it gets them in the end.

    Args:
        change: changes the latents in place before.
    """
    architecture, found = find_architecture(pipe), []
    denoiser = getattr(pipe, architecture.denoiser)
    original = type(denoiser).forward
    names = tuple(inspect.signature(original).parameters)[1:]

    def forward(self, *args, **kwargs):
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if change is not None:
            change(arguments[architecture.sample])
        for name in filter(None, architecture.prompts):
            first, _, rest = name.partition(".")
            arguments[name] = arguments[first][rest] if rest else arguments[first]
        found.append(arguments)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(denoiser, "forward", forward.__get__(denoiser))
        generate(pipe, options, **others)
    return found


def test_every_pipeline_of_the_table_is_tested():
    assert {name for name, *_ in tiny.CASES.values()} == {name for a in ARCHITECTURES for name in a.pipelines}


def test_images_of_a_group_move_and_no_others(case):
    pipe, options = case
    before, base = state(pipe), generate(pipe, options)
    with negtome.attach(pipe, CONFIG) as attached:
        result = generate(pipe, options)
    assert result.isfinite().all() and torch.equal(result[0], base[0])
    assert all((result[k] - base[k]).abs().max() > 1e-3 for k in (1, 2))
    summary = attached.summary()
    assert summary["tokens_pushed"] == summary["tokens_compared"] > 0
    assert summary["timesteps"] == pipe.scheduler.timesteps.tolist()[-2:], "every step once, as the scheduler has it"
    with negtome.attach(pipe, CONFIG.replace(alpha=0)):
        assert torch.equal(generate(pipe, options), base)
    assert state(pipe) == before
    assert torch.equal(generate(pipe, options), base)
    with negtome.attach(pipe, CONFIG, group_size=2):
        together, *others = (generate(pipe, options, seeds) for seeds in ((0, 1, 2, 3), (0, 1, 8, 9), (8, 9, 2, 3)))
    assert torch.equal(together[:2], others[0][:2]) and torch.equal(together[2:], others[1][2:])
    assert not torch.equal(together[3], others[0][3])
    assert torch.equal(together[0], base[0]) and not torch.equal(together[2], result[2])


def test_the_tokens_of_the_image_are_pushed_and_no_others(case, monkeypatch):
    """Where every token attends to itself alone, what changes in the latents changes its own token only."""
    pipe, options = case
    if find_architecture(pipe).levels:
        pytest.skip("convolutions mix them; and there is nothing else in its self-attention")
    shape = generate(pipe, options).shape
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda query, key, value, **_: value)

    def pushed(token=None):
        def change(sample):
            if token is not None:
                sample[:, token, 0] += 1

        tokens = []
        with negtome.attach(pipe, CONFIG, push=lambda site, old, new, size: tokens.append((site, old)) or old) as found:
            seen = calls(pipe, options, monkeypatch, change)
        return tokens[: len(found.sites)], seen[0][find_architecture(pipe).sample].shape[1]

    (plain, total), length = pushed(), shape[1]
    for token in (0, 13, length - 1, *range(length, total, 30)):
        for (_, old), (site, new) in zip(plain, pushed(token)[0], strict=True):
            assert new.shape[1] == length, site
            changed = (new != old).any(dim=2).any(dim=0).nonzero().flatten().tolist()
            assert changed == ([token] if token < length else []), site


def test_a_reference_rides_along(case, monkeypatch):
    """Its row is its image, noised as the others are, under its own prompt; no other row changes."""
    pipe, options = case
    architecture, image = find_architecture(pipe), tiny.OTHER[0].flip(2)
    generator = torch.Generator().manual_seed(3)
    latents = pipe.vae.encode(2 * image[None] - 1).latent_dist.mean
    latents = (latents - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    before, base = state(pipe), generate(pipe, options)
    plain, mouse = (calls(pipe, options, monkeypatch, prompt=prompt) for prompt in ("a dog", "a mouse"))
    given = [Reference(image, seed=3, prompt="a mouse"), None, None]
    with negtome.attach(pipe, CONFIG.replace(alpha=0), given=given):
        still = calls(pipe, options, monkeypatch)
        torch.testing.assert_close(generate(pipe, options), base, rtol=1e-3, atol=1e-3)
    assert len(still) == len(plain) == len(mouse)
    for number, (found, stock, own) in enumerate(zip(still, plain, mouse, strict=True)):
        halves = len(stock[architecture.sample]) // 3
        half, stock_half = (x[architecture.sample].unflatten(0, (halves, -1)) for x in (found, stock))
        assert half.shape[1] == 4
        if not number:
            assert torch.equal(half[:, :3], stock_half)
        time = torch.as_tensor(stock[architecture.time]).flatten()[0]
        if architecture.pack is None:
            share = pipe.scheduler.alphas_cumprod[int(time)]
            row = share.sqrt() * latents + (1 - share).sqrt() * noise
        else:
            row = (1 - time) * latents + time * noise
            row = pipe._pack_latents(row, *row.shape)
        leading = tuple(slice(size) for size in row.shape[1:])
        for one in half:
            torch.testing.assert_close(one[3][leading], row[0], rtol=1e-3, atol=1e-3)
            lent = torch.ones_like(one[3], dtype=torch.bool)
            lent[leading] = False
            assert torch.equal(one[3][lent], one[0][lent])
        for name in filter(None, architecture.prompts):
            text, dog, cat = (x[name].unflatten(0, (halves, -1)) for x in (found, stock, own))
            assert torch.equal(text[:, :3], dog)
            torch.testing.assert_close(text[:, 3], cat[:, 0], rtol=1e-4, atol=1e-4)
    with negtome.attach(pipe, CONFIG, given=given):
        result = generate(pipe, options)
    assert (result[0] - base[0]).abs().max() > 1e-3
    torch.testing.assert_close(result[1:], base[1:], rtol=1e-3, atol=1e-3)
    assert state(pipe) == before
