"""What only a GPU shows: make test-gpu. Real kernels, halves, and a device that nobody waits for."""

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline

import negtome
from negtome import merge
from negtome.merge import push_from, push_groups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

WAYS = [("first", "paper"), ("first", "released"), ("previous", "paper"), ("others", "paper")]
STRENGTH = {"alpha": 0.9, "threshold": 0.3}


@pytest.fixture
def nobody_waits():
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def near(shape, dtype):
    """Images that are noisy permutations of the same tokens: in each, one is clearly the nearest to any given one.

    Args:
        shape: of the result [images, tokens, channels].
    """
    generator = torch.Generator().manual_seed(0)
    images, tokens, channels = shape
    first = torch.randn(1, tokens, channels, generator=generator)
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(images)])
    noise = torch.randn(images, tokens, channels, generator=generator)
    return (first.expand(images, -1, -1).gather(1, order.unsqueeze(-1).expand(-1, -1, channels)) + 0.3 * noise).to(
        dtype
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("reference", "matching"), WAYS)
@pytest.mark.parametrize("text", [0, 77])
@pytest.mark.parametrize("rows", [4, 8])
def test_a_gpu_agrees_with_a_cpu(reference, matching, dtype, text, rows, nobody_waits):
    """Tokens behind text too."""
    tokens = near((rows, 320, 64), dtype)
    features = torch.cat([torch.ones(rows, text, 64, dtype=dtype), tokens], dim=1)
    options = STRENGTH | {"matching": matching, "reference": reference}
    expected, similarity = push_groups(tokens.double(), 4, **options)
    result, found = push_groups(features.pin_memory().cuda(non_blocking=True)[:, text:], 4, **options)
    torch.cuda.set_sync_debug_mode("default")
    tolerance = 1e-3 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(found.cpu().double(), similarity, rtol=tolerance, atol=tolerance)
    # Of several images, each with a token that is near, rounding may choose the other.
    same = ((result.cpu().double() - expected).abs() < tolerance * (1 + expected.abs())).all(dim=-1).float().mean()
    assert same > (0.999 if dtype is torch.float32 else 0.8 if reference in ("previous", "others") else 0.99)


@pytest.mark.parametrize("matching", ["paper", "released"])
def test_references_and_masks(matching, nobody_waits):
    tokens = near((5, 320, 64), torch.float32)
    mask = torch.arange(320) % 3 > 0
    options = STRENGTH | {"matching": matching}
    expected, _ = push_from(tokens[None, 1:].double(), tokens[None, :1].double(), mask=mask, **options)
    device, mask = tokens.pin_memory().cuda(non_blocking=True), mask.pin_memory().cuda(non_blocking=True)
    result, _ = push_from(device[None, 1:], device[None, :1], mask=mask, **options)
    torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu().double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("reference", "matching"), WAYS)
def test_the_matrices_stay_below_their_bound(reference, matching, monkeypatch):
    """In bfloat16, four images of 4096 tokens: beside a matrix of the bound there is room for a few copies of them."""
    tokens = torch.randn(4, 4096, 640, device="cuda", dtype=torch.bfloat16)
    bound = 2**20
    monkeypatch.setattr(merge, "MAX_SIMILARITY_ELEMENTS", bound)
    options = STRENGTH | {"matching": matching, "reference": reference}
    push_groups(tokens, 4, **options)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    push_groups(tokens, 4, **options)
    size = tokens.numel() * tokens.element_size()
    assert torch.cuda.max_memory_allocated() - before < 2.5 * size, "whole matrices are 100 MB and more"


@pytest.mark.parametrize(("kind", "pipeline"), [("sdxl", StableDiffusionXLPipeline), ("flux", FluxPipeline)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_pipeline_in_half_precision(kind, pipeline, compiled, tiny_checkpoint):
    pipe = pipeline.from_pretrained(tiny_checkpoint(kind), torch_dtype=torch.bfloat16).to("cuda")
    pipe.set_progress_bar_config(disable=True)

    torch._dynamo.reset()

    def images():
        return pipe(
            "a dog", height=32, width=32, num_inference_steps=3, num_images_per_prompt=3, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    base = images()
    with negtome.attach(pipe, negtome.NegToMeConfig(threshold=-1, min_side=8, timestep_range=(0, 1000))) as attached:
        if compiled:
            (pipe.transformer if kind == "flux" else pipe.unet).compile(fullgraph=True)
        pushed = images()
    assert attached.summary()["tokens_pushed"] == attached.summary()["tokens_compared"] > 0
    assert pushed.isfinite().all()
    if not compiled:  # which rounds otherwise. The first image's own tokens do not move, and nothing else reaches it
        assert not torch.equal(pushed[1:], base[1:])
        torch.testing.assert_close(pushed[0], base[0], rtol=0.05, atol=0.05)
        assert torch.equal(images(), base)
