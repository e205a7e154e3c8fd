"""The roofline: operations by hand, whole steps against closed forms, and the published table. No GPU, no weights."""

import functools
import math
from itertools import pairwise

import pandas as pd
import pytest
import torch
from test_random_weights import TINY
from torch.utils.flop_counter import FlopCounterMode

import negtome
from experiments import PROJECT
from experiments.latency import roofline
from experiments.latency.measure import products
from experiments.latency.operations import FusedKernels, Operation, Push, Recorder, denoiser_arguments, record_step
from experiments.latency.random_weights import build_pipeline, embeddings
from experiments.latency.roofline import DEVICES, least_ms, render, variants
from experiments.tables.columns import read_csv

TABLE = PROJECT / "results" / "roofline" / "table.csv"
CONFIG = negtome.NegToMeConfig(threshold=0.7, min_side=4, timestep_range=(0, 1000))
SIDE = 128


@pytest.fixture(scope="module", params=["sdxl", "flux"])
def tiny(request):
    """A tiny pipeline on the meta device in float16, and its specification."""
    spec = TINY[request.param]
    return build_pipeline(spec, "meta", torch.float16), spec


@pytest.fixture(scope="module")
def record(tiny):
    """Record a step of the tiny pipeline, without or with NegToMe, once for each number of images."""
    return functools.cache(lambda config, images: record_step(*tiny, config, SIDE, images))


def flux_flops(width, blocks, single_blocks, tokens, text, channels, text_width, pooled_width):
    """Count a Flux transformer's FLOPs for one image: two for each weight and token that it meets, and attention."""
    both = tokens + text
    weights = blocks * (2 * 6 + single_blocks / blocks * 3) * width**2  # modulation, once an image
    weights += width * (2 * (256 + width) + pooled_width + width)  # time, guidance, pooled text
    weights += 2 * width**2  # the last modulation
    weights += (blocks + single_blocks) * 12 * width**2 * both
    weights += 2 * channels * width * tokens + text_width * width * text
    return 2 * weights + (blocks + single_blocks) * 4 * both**2 * width


# --- operations by hand -----------------------------------------------------------------------------------------------


def test_operations_are_counted_as_by_hand():
    """Only products have FLOPs, each 16-bit input and output has two bytes an element, and views move nothing."""
    left, right = torch.empty(2, 3, 5, dtype=torch.float16, device="meta"), torch.empty(2, 5, 7, device="meta").half()
    with Recorder() as recorder:
        product = torch.bmm(left, right)  # 2 * 3 * 7 results of 5 terms
        product.view(6, 7).mT.unsqueeze(0)
        product.max(dim=-1)  # 6 values of 2 bytes, 6 indices of 8
        left.expand(2, 3, 5).add_(left[:1].expand(2, 3, 5))  # the expanded image is in memory once
        left.copy_(left.clone())
        torch.empty(9, device="meta").new_empty(9)
        torch.div(left, 2, out=left.new_empty(2, 3, 5))
    assert recorder.operations == [
        Operation("bmm", 2 * 42 * 5, 2 * (30 + 70 + 42)),
        Operation("max", 0, 2 * 42 + 6 * 2 + 6 * 8),
        Operation("add_", 0, 2 * (30 + 15 + 30)),
        Operation("clone", 0, 2 * 60),
        Operation("copy_", 0, 2 * 60),
        Operation("div", 0, 2 * 60),
    ]


def test_attention_and_rms_norm_are_one_operation_each():
    tokens = torch.empty(2, 4, 64, 16, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(16, dtype=torch.bfloat16, device="meta")
    with FusedKernels(), Recorder() as recorder:
        torch.nn.functional.scaled_dot_product_attention(tokens, key=tokens, value=tokens, dropout_p=0.0)
        torch.nn.functional.rms_norm(tokens, (16,), weight, eps=1e-6)
    attention, norm = recorder.operations
    assert attention.flops == 4 * (2 * 4) * 64 * 64 * 16 and norm.flops == 0
    values = 2 * tokens.numel()
    assert 4 * values <= attention.bytes < 4.5 * values and 2 * values <= norm.bytes < 3 * values


def test_an_operation_takes_as_long_as_the_slower_of_arithmetic_and_memory():
    device = roofline.Device("", "", memory=1.0, teraflops=2.0, terabytes=0.5, source="")
    operations = [Operation("a", 8 * 10**9, 10**9), Operation("b", 10**9, 4 * 10**9)]
    assert least_ms(operations, device) == pytest.approx(4 + 8)
    assert least_ms([], device) == 0


def test_variants_add_up_their_hook_points():
    """Five hook points of two shapes: with one match for two, the first, third and fourth of them match."""

    def work(number):
        return (Operation("bmm", number, 0),)

    pushes = [
        Push(shape, 8, work(10**number), (Operation("gather", 0, 3),), work(7), (), (work(5), work(6)))
        for number, shape in enumerate([64, 64, 64, 16, 16])
    ]
    parts = {
        part: (sum(one.flops for one in work), sum(one.bytes for one in work))
        for part, work in variants(pushes).items()
    }
    assert parts == {
        "product": (11111, 0), "gather": (0, 15), "NegToMe": (11111, 15), "lower bound": (35, 0),
        "one match for 2 hook points": (1101, 15), "one match for 4 hook points": (1001, 15),
        "matched in 128 channels": (25, 15), "matched in 64 channels": (30, 15),
    }  # fmt: skip


# --- steps of tiny models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_flops_of_a_step_are_those_of_torchs_counter(tiny, record, images):
    pipe, spec = tiny
    chunks = 2 if hasattr(pipe, "unet") else 1
    denoiser, arguments = (
        getattr(pipe, "unet", None) or pipe.transformer,
        denoiser_arguments(pipe, spec, SIDE, chunks * images),
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(**arguments)
    baseline, attached = record(None, images), record(CONFIG, images)
    assert sum(one.flops for one in baseline.denoiser) == counter.get_total_flops() > 0 == len(baseline.pushes)
    rows = 2 if images == 1 else 1  # a reference image is a further row
    assert sum(one.flops for one in attached.denoiser) == rows * counter.get_total_flops()
    assert images == 1 or attached.denoiser == baseline.denoiser
    assert not any("_negtome" in vars(module) for module in denoiser.modules()), "nothing stays attached"


@pytest.mark.parametrize("images", [1, 3])
def test_the_product_of_a_hook_point_is_2nnd_for_each_image_that_moves(tiny, record, images):
    pipe, pushes = tiny[0], record(CONFIG, images).pushes
    moving = max(1, images - 1) * (2 if hasattr(pipe, "unet") else 1)
    assert len(pushes) == 3 if not hasattr(pipe, "unet") else len(pushes) > 3
    for push in pushes:
        expected = moving * 2 * push.tokens**2 * push.channels
        assert sum(one.flops for one in push.matching) == sum(one.flops for one in push.lower_bound) == expected
        assert not any(one.flops for one in push.moving)
        assert [one.name for one in push.lower_bound] == ["bmm", "clone"]
        released = sum(one.flops for one in push.naive)  # which compares the first image with itself, too
        assert released == (0 if images == 1 else expected * images / (images - 1))
        tokens = (1 + moving if not hasattr(pipe, "unet") else moving + 2) * push.tokens
        for width, operations in zip((128, 64), push.projected, strict=True):
            products = 2 * tokens * push.channels * width + moving * 2 * push.tokens**2 * width
            assert sum(one.flops for one in operations) == products


def test_hook_points_and_their_products_are_those_of_a_call(tiny, record):
    """The lower bound of the latency suite counts its products in a call of a pipeline on the CPU."""
    spec = tiny[1]
    pipe = build_pipeline(spec, "cpu", torch.float32)
    call = {"height": SIDE, "width": SIDE, "num_inference_steps": 1, **embeddings(pipe, spec, 3)}
    counts = products(pipe, call, CONFIG, 1)
    flops = [2 * math.prod(left) * right[2] for left, right in counts.elements()]
    pushes = record(CONFIG, 3).pushes
    assert sorted(flops) == sorted(push.lower_bound[0].flops for push in pushes)


def test_both_16_bit_types_cost_the_same_at_the_hook_points(tiny, record):
    """Outside of them, Flux clamps its features in float16."""
    step, spec = record(CONFIG, 3), tiny[1]
    other = record_step(build_pipeline(spec, "meta", torch.bfloat16), spec, CONFIG, SIDE, 3)
    assert step.pushes == other.pushes
    assert [one for one in step.denoiser if one.flops] == [one for one in other.denoiser if one.flops]
    assert {one.name for one in step.denoiser} - {one.name for one in other.denoiser} <= {"clamp"}


def test_a_tiny_flux_is_counted_by_its_closed_form():
    pipe = build_pipeline(TINY.flux, "meta", torch.bfloat16)
    flops = sum(one.flops for one in record_step(pipe, TINY.flux, None, SIDE, 4).denoiser)
    assert flops == 4 * flux_flops(32, 1, 2, (SIDE // 16) ** 2, 512, 16, 32, 32)


# --- the published table ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    return read_csv(TABLE)


def select(frame, **values):
    for column, value in values.items():
        frame = frame[frame[column] == value]
    return frame


def test_the_page_is_what_the_csv_renders_to(published):
    assert TABLE.with_suffix(".md").read_text() == render(published)


@pytest.mark.parametrize("side", [768, 1024])
def test_published_flops_of_flux_are_the_closed_form(published, side):
    """FLUX.1-dev: 19 and 38 blocks, 24 heads of 128 channels, 512 text tokens."""
    tokens = (side // 16) ** 2
    for images in (1, 4):
        rows = select(published, model="flux-dev", side=side, images=images)
        base = images * flux_flops(3072, 19, 38, tokens, 512, 64, 4096, 768) / 1e9
        assert select(rows, part="base step")["gflop"].to_numpy() == pytest.approx(base, rel=1e-5)
        product = 57 * max(1, images - 1) * 2 * tokens**2 * 3072 / 1e9
        assert select(rows, part="product")["gflop"].to_numpy() == pytest.approx(product, rel=1e-5)


def test_published_products_of_sdxl_are_the_closed_form(published):
    """up_blocks: 3 times 10 layers at 32 x 32 with 1280 channels, 3 times 2 at 64 x 64 with 640; both halves of CFG."""
    for images in (1, 4):
        rows = select(published, model="sdxl", images=images)
        layers = 30 * 1024**2 * 1280 + 6 * 4096**2 * 640
        product = 2 * max(1, images - 1) * 2 * layers / 1e9
        assert select(rows, part="product")["gflop"].to_numpy() == pytest.approx(product, rel=1e-5)


def test_published_parts_add_up_and_approximations_cost_less(published):
    cases = published.groupby(["model", "side", "images", "device"])
    assert len(cases) == 3 * 2 * len(DEVICES)
    for _, rows in cases:
        parts = rows[rows["tokens"].isna()].set_index("part")["ms"]
        total = parts["NegToMe"]
        assert parts[["product", "arg max", "gather", "push", "join", "other passes"]].sum() == pytest.approx(
            total, rel=1e-4
        )
        assert rows.loc[rows["part"] == "hook points", "ms"].sum() == pytest.approx(total, rel=1e-4)
        assert parts["lower bound"] < total < parts.get("naive, released matching", math.inf)
        for more, fewer in pairwise(("NegToMe", "one match for 2 hook points", "one match for 4 hook points")):
            assert parts[fewer] < parts[more]
        assert parts["matched in 64 channels"] < parts["matched in 128 channels"] < total


@pytest.mark.slow
def test_the_published_table_is_what_the_command_writes(published, tmp_path, capsys):
    roofline.main([f"results={tmp_path}", "latency.only=[sdxl-1024]"])
    again = read_csv(tmp_path / "roofline" / "table.csv")
    pd.testing.assert_frame_equal(again, select(published, model="sdxl"), check_dtype=False)
    assert "sdxl" in capsys.readouterr().out
