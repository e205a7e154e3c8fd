"""What --dry-run prints is what happens afterwards: images, bytes, memory, hours; and it leaves no trace."""

import re
import weakref
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from plans import plan_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments import PROJECT
from experiments.__main__ import main
from experiments.compose import composed
from experiments.latency.operations import FusedKernels, denoiser_arguments
from experiments.latency.random_weights import build_pipeline
from experiments.runs import checkpoints, gpus, outlook

COMMAND = ["experiment=diversity", "model=sdxl"]


@pytest.fixture(autouse=True)
def empty_machine(tmp_path, monkeypatch):
    """A machine without weights, as of tests without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def full_size(kind, **changes):
    """Return the configuration of SDXL or Flux at the size of its row in the table."""
    side, call = (1024, {"guidance_scale": 5.0}) if kind == "sdxl" else (768, {})
    call |= {"height": side, "width": side, "num_inference_steps": 50} | changes
    return OmegaConf.create({"architecture": kind, "kind": "real", "dtype": "float16", "call": call})


def override_lines(text):
    """Return the overrides that a report proposes, with the number of images that each promises."""
    return re.findall(r"(?m)^  (\S+=\S+) +([\d,]+) images", text)


def test_a_dry_run_ends_with_0_and_writes_nothing_where_all_is_missing(tmp_path, capsys):
    arguments = [*COMMAND, "method=none,negtome", f"outputs={tmp_path / 'outputs'}", f"results={tmp_path / 'results'}"]
    assert main(["reproduce", *arguments, "--dry-run"]) == 0
    assert not list(tmp_path.iterdir())
    out, err = capsys.readouterr()
    assert "11,200 images" in out and "6.9 GB" in out and "SG161222/RealVisXL_V4.0" in out and not err
    assert "DreamSim" in out and "generate with the same overrides and metric=none" in out
    assert main(["generate", *arguments, "--dry-run"]) == 0
    assert "The same command with metric=none" in capsys.readouterr().out


def test_copies_of_the_baselines_images_are_counted_apart(tmp_path, capsys):
    arguments = [*COMMAND, "method=none,control_mirrored", "metric=none", f"outputs={tmp_path}"]
    assert main(["generate", *arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "2 runs, 5,600 images to generate in 1,400 groups, 5,600 edited copies" in out
    assert override_lines(out) == [("model.groups_per_category=10", "800")]


def test_bad_input_is_refused_in_a_dry_run_too(capsys):
    assert main(["reproduce", "experiment=diversity", "model=sdx", "--dry-run"]) == 2
    assert "did you mean sdxl" in capsys.readouterr().err


def test_a_proposal_makes_the_number_of_images_that_it_promises(tmp_path, capsys):
    arguments = [*COMMAND, "method=none,negtome,cads", "metric=none", f"outputs={tmp_path / 'outputs'}"]
    assert main(["generate", *arguments, "--dry-run"]) == 0
    proposals = override_lines(capsys.readouterr().out)
    assert [override.partition("=")[0] for override, _ in proposals] == ["model.groups_per_category", "method"]
    for override, number in proposals:
        assert main(["generate", *arguments, override, "--dry-run"]) == 0
        assert re.search(rf"\b{number} images to generate", capsys.readouterr().out)


def test_a_gated_model_names_where_its_licence_is_accepted_and_what_it_computes(tmp_path, capsys):
    outputs = f"outputs={tmp_path}"
    assert (
        main(["generate", "experiment=diversity", "model=flux-dev", "method=none", "metric=none", outputs, "--dry-run"])
        == 0
    )
    out = capsys.readouterr().out
    gated = out[out.index("Gated") :].splitlines()[1]
    assert "https://huggingface.co/black-forest-labs/FLUX.1-dev" in gated and "hf auth login" in gated
    assert "33.7 GB" in out and "computed" in out
    too_small = [line for line in out.splitlines() if line.startswith("  RTX 4090")]
    assert len(too_small) == 1 and "too little memory" in too_small[0]


def test_a_small_model_has_images_and_disk_and_no_time(tmp_path, capsys):
    arguments = ["experiment=diversity", "model=mini-sdxl", "method=none", f"outputs={tmp_path}"]
    assert main(["generate", *arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "800 images to generate" in out and "Download: nothing" in out
    assert "GPU" not in out and "H100" not in out
    plan = plan_of(arguments)
    assert outlook.summary(plan, outlook.pending_groups(plan, [])) == []


def test_a_real_run_logs_the_short_form_before_the_first_image_and_then_no_more(tiny_overrides, tmp_path, caplog):
    overrides = tiny_overrides("sweep", tmp_path, "method=none")
    with caplog.at_level("INFO"):
        assert main(["generate", *overrides]) == 0
        first, second, *_ = [record.getMessage() for record in caplog.records]
        assert "4 images to generate in 2 groups" in first and "Denoising takes about" in second
        caplog.clear()
        assert main(["generate", *overrides]) == 0
    assert not [record for record in caplog.records if "Denoising" in record.getMessage()]


# --- estimates --------------------------------------------------------------------------------------------------------


def test_estimated_steps_are_the_roofline_scaled_by_what_the_h100_measured():
    table = pd.read_csv(PROJECT / "results" / "roofline" / "table.csv")
    base = table[(table["part"] == "base step") & (table["images"] == 4)]
    base = base.assign(architecture=base["model"].map({"sdxl": "sdxl", "flux-dev": "flux"}))
    predicted = base.set_index(["architecture", "side", "device"])["ms"]
    rows = {(row["architecture"], row["side"], row["device"]): row for row in gpus.FACTS["steps"]}
    for (architecture, side, device), row in rows.items():
        if row["kind"] == gpus.MEASURED:
            assert row["milliseconds"] > predicted[architecture, side, device], "the roofline is a lower bound"
            continue
        (measured,) = [
            one for one in rows.values() if one["architecture"] == architecture and one["kind"] == "measured"
        ]
        ratio = measured["milliseconds"] / predicted[architecture, side, measured["device"]]
        assert row["milliseconds"] == round(ratio * predicted[architecture, side, device])
    assert {row["kind"] for row in rows.values()} == {gpus.MEASURED, gpus.ESTIMATED}
    assert {row["device"] for row in rows.values()} == {device.name for device in gpus.DEVICES}


@given(kind=st.sampled_from(["sdxl", "flux"]), images=st.integers(1, 16), scale=st.sampled_from([0.5, 1, 2]))
def test_time_and_activations_grow_with_images_and_pixels_and_only_the_tables_own_size_is_measured(kind, images, scale):
    table, model = full_size(kind), full_size(kind)
    model.call.height = int(scale * table.call.height)
    for time, reference in zip(gpus.step_times(model, images), gpus.step_times(table, 4), strict=True):
        assert time.milliseconds == pytest.approx(reference.milliseconds * scale * images / 4)
        assert time.kind == (reference.kind if scale * images == 4 else gpus.ESTIMATED)
    for name, size in gpus.activations(model, images).items():
        assert size == pytest.approx(gpus.activations(table, 4)[name] * scale * images / 4)


def test_without_guidance_sdxl_has_half_the_rows():
    without, with_guidance = full_size("sdxl", guidance_scale=0.0), full_size("sdxl")
    times = [gpus.step_times(model, 4)[0] for model in (without, with_guidance)]
    assert times[0].milliseconds == times[1].milliseconds / 2
    assert [time.kind for time in times] == [gpus.ESTIMATED, gpus.MEASURED]
    assert gpus.activations(without, 4)["unet"] == gpus.activations(with_guidance, 4)["unet"] / 2


def test_hours_are_steps_of_all_groups_and_edits_of_the_baseline_cost_none():
    plan = plan_of([*COMMAND, "method=none,control_mirrored"])
    pending = outlook.pending_groups(plan, [])
    assert outlook.count_images(pending) == 2 * 5600
    device, hours, kind = outlook.denoising_hours(pending)[0]
    assert (device, kind) == ("H100 SXM", "measured") and hours == pytest.approx(1400 * 50 * 0.151 / 3600)
    assert outlook.bytes_of_images(pending) == 2 * 5600 * 2 * 1024**2


def test_an_architecture_that_the_table_lacks_has_no_estimate(tmp_path, capsys):
    arguments = ["experiment=diversity", "model=sd15", "method=none", "metric=none", f"outputs={tmp_path}"]
    assert main(["generate", *arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "Time: not known" in out and "Memory of model=sd15: not known" in out and "H100" not in out


def test_the_gpu_of_this_machine_alone_is_in_the_short_form(monkeypatch):
    plan = plan_of([*COMMAND, "method=none"])
    pending = outlook.pending_groups(plan, [])
    assert all(device.name in outlook.summary(plan, pending)[1] for device in gpus.DEVICES)
    monkeypatch.setattr(outlook, "select_device", lambda name: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    properties = SimpleNamespace(total_memory=25_386_352_640)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    line = outlook.summary(plan, pending)[1]
    assert "RTX 4090 (steps estimated)" in line and "H100" not in line
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    assert "H100" in outlook.summary(plan, pending)[1]


@pytest.mark.parametrize(
    ("name", "gibibytes", "device"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "H100 SXM"),
        ("NVIDIA H100 80GB HBM3", 39.4, None),  # a part of one
        ("NVIDIA H100 80GB HBM3 MIG 7g.80gb", 79.2, None),
        ("NVIDIA H100 PCIe", 79.2, None),
        ("NVIDIA H100 NVL", 93.1, None),
        ("NVIDIA A100-SXM4-80GB", 79.3, "A100 SXM 80GB"),
        ("NVIDIA A100-SXM4-40GB", 39.5, None),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None),
        ("NVIDIA GeForce RTX 4090 D", 23.6, None),
    ],
)
def test_a_gpu_has_the_figures_of_its_own_name_and_memory_alone(name, gibibytes, device):
    match = gpus.find_device(name, int(gibibytes * 2**30))
    assert (match and match.name) == device


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_parameters_of_a_checkpoint_here_are_counted_by_its_headers(kind, tiny_checkpoint, pipe):
    counts = checkpoints.count_parameters(tiny_checkpoint(kind))
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert {name: count for name, count in counts.items() if count} == {
        name: len_of(module.state_dict()) for name, module in modules.items()
    }


def len_of(state):
    """Count the values of a state dict; tied weights are saved once."""
    return sum(tensor.numel() for tensor in {tensor.data_ptr(): tensor for tensor in state.values()}.values())


class Peak(TorchDispatchMode):
    """Adds up the storages that are alive, and keeps the largest sum."""

    def __init__(self):
        super().__init__()
        self.tensors, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        return output

    def hold(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.now += size if key not in self.tensors else 0
        self.tensors[key] = self.tensors.get(key, 0) + 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self.drop, key, size)

    def drop(self, key, size):
        self.tensors[key] -= 1
        if not self.tensors[key]:
            del self.tensors[key]
            self.now -= size


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "side", "rows"), [("sdxl", 1024, 8), ("flux", 768, 4)])
def test_parameters_and_activations_follow_from_the_published_shapes(kind, side, rows):
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    spec = composed(["experiment=latency"]).latency.random[kind]
    dtype = torch.float16 if kind == "sdxl" else torch.bfloat16
    channels, post_quant = (4, True) if kind == "sdxl" else (16, False)
    pipe = build_pipeline(spec, "meta", dtype)
    clip = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=channels,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            use_quant_conv=post_quant, use_post_quant_conv=post_quant,
        )  # fmt: skip
        modules = {"text_encoder": CLIPTextModel(CLIPTextConfig(**clip)), "vae": vae}
        if kind == "sdxl":
            large = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "projection_dim": 1280}
            config = CLIPTextConfig(**large, num_hidden_layers=32)
            modules |= {"unet": pipe.unet, "text_encoder_2": CLIPTextModelWithProjection(config)}
        else:
            config = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
            modules |= {"transformer": pipe.transformer, "text_encoder_2": T5EncoderModel(config)}
    assert {name: count(module) for name, module in modules.items()} == gpus.FACTS["parameters"][kind]

    denoiser = pipe.unet if kind == "sdxl" else pipe.transformer
    arguments = denoiser_arguments(pipe, spec, side, rows)
    with torch.no_grad(), FusedKernels(), Peak() as step:
        denoiser(**arguments)
    vae = vae.to(torch.float32 if kind == "sdxl" else dtype)
    latents = torch.empty(4, channels, side // 8, side // 8, dtype=vae.dtype, device="meta")
    with torch.no_grad(), FusedKernels(), Peak() as decoding:
        vae.decode(latents)
    stated = gpus.activations(full_size(kind), 4)
    assert step.peak == pytest.approx(stated["unet" if kind == "sdxl" else "transformer"], rel=0.01)
    assert decoding.peak == pytest.approx(stated["vae"], rel=0.01)
