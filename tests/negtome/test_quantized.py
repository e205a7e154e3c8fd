"""Denoisers with quantised, cast or offloaded weights. torchao and gguf are optional: pip install torchao gguf."""

import copy

import diffusers
import pytest
import torch
from packaging.version import Version
from tiny import CONFIGS, ONE_KIND, denoiser, generate, state

import negtome
from negtome import Reference

CPU = torch.device("cpu")


@pytest.fixture
def config(kind):
    return CONFIGS[kind]


def int8_weights(pipe):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(denoiser(pipe), torchao.Int8WeightOnlyConfig())


def int8_activations(pipe, granularity="PerRow"):
    """Quantise weights, and in every call the activations: a scale for each token, or one for the batch."""
    torchao = pytest.importorskip("torchao.quantization")
    settings = torchao.Int8DynamicActivationInt8WeightConfig(granularity=getattr(torchao, granularity)())
    torchao.quantize_(denoiser(pipe), settings)


def layerwise_casting(pipe):
    denoiser(pipe).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def offload_options():
    if Version(diffusers.__version__) < Version("0.42") and not torch.accelerator.is_available():
        pytest.skip("this diffusers offloads groups where there is an accelerator only")
    return {"onload_device": CPU, "offload_device": CPU}


def offload_blocks(pipe):
    diffusers.hooks.apply_group_offloading(
        denoiser(pipe), **offload_options(), offload_type="block_level", num_blocks_per_group=1
    )


def offload_pipeline(pipe):
    pipe.enable_group_offload(**offload_options(), offload_type="leaf_level")


def load_gguf(pipe, folder):
    """Replace Flux's transformer by what diffusers reads from a GGUF file with its weights in blocks of 8 bits.

    The tensors have diffusers' names: its conversion of the original names assumes a width of 3072 channels.
    """
    gguf = pytest.importorskip("gguf")
    pipe.transformer.save_config(folder)
    writer = gguf.GGUFWriter(str(folder / "flux.gguf"), "flux")
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in pipe.transformer.state_dict().items():
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:  # the size of a block
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pipe.transformer = diffusers.FluxTransformer2DModel.from_single_file(
        str(folder / "flux.gguf"), config=str(folder), torch_dtype=torch.float32,
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip


def images_without_and_with(pipe, config, **options):
    """Return the latents of a call without NegToMe and with it, after a check that it acts and leaves nothing."""
    base, before = generate(pipe), state(pipe)
    with negtome.attach(pipe, config, **options) as attached:
        pushed = generate(pipe)
    assert 0 < attached.summary()["tokens_pushed"] < attached.summary()["tokens_compared"]
    assert state(pipe) == before
    assert torch.equal(generate(pipe), base)
    assert not any(torch.equal(*pair) for pair in zip(pushed[1:], base[1:], strict=True))
    return base, pushed


@ONE_KIND
@pytest.mark.parametrize(
    ("change", "exact"),
    [
        (int8_weights, False),
        (int8_activations, False),
        (layerwise_casting, False),
        (offload_blocks, True),
        (offload_pipeline, True),
    ],
)
def test_attach_acts_and_the_first_image_stays(pipe, config, change, exact):
    """Changing the denoiser inside the block does the same as changing it before."""
    stock, other = generate(pipe), copy.deepcopy(pipe)
    change(pipe)
    base, pushed = images_without_and_with(pipe, config)
    assert torch.equal(base, stock) is exact, "only rounded weights change the images without NegToMe"
    assert torch.equal(pushed[0], base[0])
    with negtome.attach(other, config):
        change(other)
        assert torch.equal(generate(other), pushed)
    assert torch.equal(generate(other), base)


def test_a_transformer_from_a_gguf_file(tiny_flux, tmp_path):
    stock = generate(tiny_flux)
    load_gguf(tiny_flux, tmp_path)
    base, pushed = images_without_and_with(tiny_flux, CONFIGS["flux"])
    assert not torch.equal(base, stock)
    torch.testing.assert_close(base, stock, rtol=0, atol=0.05)
    assert torch.equal(pushed[0], base[0])


@ONE_KIND
def test_a_scale_for_the_batch_lets_images_influence_each_other(pipe, config):
    """The first image then depends on the others in the batch, with or without NegToMe."""
    assert torch.equal(generate(pipe, seeds=(0, 7, 8))[0], generate(pipe)[0])
    int8_activations(pipe, "PerTensor")
    base, pushed = images_without_and_with(pipe, config)
    assert not torch.equal(pushed[0], base[0])
    assert not torch.equal(generate(pipe, seeds=(0, 7, 8))[0], base[0])


@ONE_KIND
@pytest.mark.parametrize("change", [int8_weights, layerwise_casting, offload_pipeline])
def test_an_image_without_a_reference_stays(pipe, config, change):
    """Offloading covers the autoencoder that encodes the references, too."""
    change(pipe)
    reference = Reference(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(7)))
    base, pushed = images_without_and_with(pipe, config, references=[None, reference, reference])
    torch.testing.assert_close(pushed[0], base[0], rtol=1e-4, atol=1e-5)  # a larger batch rounds differently
