"""What else is done to a pipeline while NegToMe is attached, and that nothing stays behind.

Little of it depends on the architecture: Flux is in the default run, SDXL is among the slow tests.
"""

import copy
import inspect
import pickle
import threading

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from packaging.version import Version
from tiny import CONFIGS, denoiser, generate, state

import negtome


@pytest.fixture(params=["flux", pytest.param("sdxl", marks=pytest.mark.slow)])
def kind(request):
    return request.param


@pytest.fixture
def config(kind):
    return CONFIGS[kind]


def component(pipe):
    """Return the name of the pipeline's denoiser."""
    return "unet" if hasattr(pipe, "unet") else "transformer"


def test_the_pipeline_is_restored(pipe, config):
    base, before = generate(pipe), state(pipe)
    with negtome.attach(pipe, config) as attached:
        assert isinstance(pipe, before[0][0])
        assert type(pipe).__name__ == before[0][0].__name__  # diffusers and save_pretrained go by it
        assert state(pipe) != before
        generate(pipe)
    assert state(pipe) == before
    assert torch.equal(generate(pipe), base)
    assert not any(isinstance(value, torch.nn.Module) for value in vars(attached).values()), "weights are kept alive"
    assert pipe not in vars(attached).values()
    attached.remove()  # does nothing the second time
    assert state(pipe) == before
    attached = negtome.attach(pipe, config)
    assert not torch.equal(generate(pipe), base)
    attached.remove()
    assert state(pipe) == before


def test_a_handle_is_entered_once(pipe, config):
    """The second time it would do nothing, and so would the outer of two blocks after the inner one."""
    base = generate(pipe)
    with negtome.attach(pipe, config) as attached:
        generate(pipe)
        with pytest.raises(RuntimeError, match="was entered before; attach again"), attached:
            pass
        assert not torch.equal(generate(pipe), base)  # still attached
    with pytest.raises(RuntimeError, match="was entered before"), attached:
        generate(pipe)
    attached = negtome.attach(pipe, config)
    attached.remove()
    with pytest.raises(RuntimeError, match="was removed before; attach again"), attached:
        generate(pipe)


def test_a_lost_handle_is_detached(pipe, config):
    base, before = generate(pipe), state(pipe)
    sibling = type(pipe)(**pipe.components)
    for attached_to in (pipe, sibling):  # or by a pipeline that shares the denoiser
        negtome.attach(pipe, config)
        negtome.detach(attached_to)
        assert state(pipe) == before
    assert torch.equal(generate(pipe), base)
    with pytest.raises(RuntimeError, match="not attached to this"):
        negtome.detach(pipe)
    with pytest.raises(TypeError, match="supported are"):
        negtome.detach(object())


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_made_inside_is_a_stock_pipeline(pipe, config, make):
    before = state(pipe)
    with negtome.attach(pipe, config):
        clone = make(pipe)  # before a call, which adds hooks that cannot be pickled
        pushed = generate(pipe)
        assert type(clone) is before[0][0]
        if denoiser(clone) is not denoiser(pipe):
            assert state(clone) == before
            stock = generate(clone)
            assert not torch.equal(stock, pushed)
        assert torch.equal(generate(pipe), pushed)
    assert torch.equal(generate(clone), generate(pipe))


def test_a_pipeline_made_of_an_attached_one_is_not_attached(pipe, config):
    base, name = generate(pipe), component(pipe)
    original = copy.deepcopy(denoiser(pipe))
    with negtome.attach(pipe, config):
        pushed = generate(pipe)
        other = type(pipe)(**pipe.components | {name: original})
        shallow = copy.copy(pipe)
        assert torch.equal(generate(other), base)
        with pytest.warns(RuntimeWarning, match="something else calls its .* runs unchanged"):
            for shared in (type(pipe)(**pipe.components), shallow):
                assert torch.equal(generate(shared), base)
        assert torch.equal(generate(pipe), pushed)
    assert torch.equal(generate(shallow), base)


def test_copies_of_modules_in_the_place_of_their_originals_are_pushed_once(pipe, config):
    with negtome.attach(pipe, config) as attached:
        expected = generate(pipe)
        for name in attached.sites:
            parent, _, last = name.rpartition(".")
            setattr(denoiser(pipe).get_submodule(parent), last, copy.deepcopy(denoiser(pipe).get_submodule(name)))
        assert torch.equal(generate(pipe), expected)
    assert not any(hasattr(module, "_negtome") for module in denoiser(pipe).modules())


def load_adapter(pipe):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_out.0"]
    denoiser(pipe).add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def test_a_handle_outlives_adapters(pipe, config):
    """LoRA puts modules in the place of others: the sites follow, so that it is as if attached afterwards."""
    before = state(pipe)
    handle = negtome.attach(pipe, config)
    plain = generate(pipe)
    load_adapter(pipe)
    adapted = generate(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), plain)
    load_adapter(pipe)
    assert torch.equal(generate(pipe), adapted)
    handle.remove()
    assert not any(hasattr(module, "_negtome") for module in denoiser(pipe).modules())
    with negtome.attach(pipe, config):
        assert torch.equal(generate(pipe), adapted)
    assert not torch.equal(generate(pipe), adapted) and not torch.equal(adapted, plain)
    pipe.unload_lora_weights()
    assert [kind for kind, *_ in state(pipe)] == [kind for kind, *_ in before]


def test_an_exception_in_the_block_arrives_and_everything_is_restored(pipe, config):
    base, before = generate(pipe), state(pipe)

    def fail(p, index, timestep, tensors):
        if index == 1:
            raise KeyError("mine")
        return tensors

    with pytest.raises(KeyError, match="mine"), negtome.attach(pipe, config):
        generate(pipe, callback_on_step_end=fail)
    assert state(pipe) == before
    assert torch.equal(generate(pipe), base)
    # A call that failed inside a block does not spoil the next one, and leaves the sites at rest.
    with negtome.attach(pipe, config) as attached:
        site = denoiser(pipe).get_submodule(attached.sites[0])
        tokens = 1 + 0.1 * torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(0))
        with pytest.raises(KeyError):
            generate(pipe, callback_on_step_end=fail)
        assert torch.equal(site(tokens), site.forward(tokens))
        result = generate(pipe)
    with negtome.attach(pipe, config):
        assert torch.equal(generate(pipe), result)


def test_a_refused_attachment_leaves_the_pipeline_as_it_was(pipe, config):
    generate(pipe)  # diffusers keeps attributes of the last call
    before = state(pipe)
    with pytest.raises(ValueError, match="no site under 'nowhere'"):
        negtome.attach(pipe, config.replace(sites=["nowhere"]))
    assert state(pipe) == before
    with negtome.attach(pipe, config):
        inside = state(pipe)
        with pytest.raises(RuntimeError, match=r"attached to this .* already"):
            negtome.attach(pipe, config)
        assert state(pipe) == inside
        sibling = before[0][0](**pipe.components)
        with pytest.raises(RuntimeError, match=r"attached to this .* already"):
            negtome.attach(sibling, config)
        generate(pipe)
    assert state(pipe) == before


def test_a_block_without_a_call_is_an_error(pipe, config):
    before = state(pipe)
    with pytest.raises(RuntimeError, match="was not called in the block"), negtome.attach(pipe, config):
        pass
    assert state(pipe) == before


def test_an_error_that_the_user_handles_inside_is_not_followed_by_another(pipe, config):
    before = state(pipe)
    with negtome.attach(pipe, config), pytest.raises(ValueError, match="needs at least 2"):
        generate(pipe, (0,))
    assert [kind for kind, *_ in state(pipe)] == [kind for kind, *_ in before]


def test_a_call_that_is_interrupted_before_the_timestep_range_returns_its_images(pipe, config, kind):
    low, high = (200, 300) if kind == "sdxl" else (200, 260)

    def interrupt(p, index, timestep, tensors):
        p._interrupt = index == 0
        return tensors

    base = generate(pipe, callback_on_step_end=interrupt)
    with (
        pytest.warns(RuntimeWarning, match="interrupted before a step that takes part"),
        negtome.attach(pipe, config.replace(timestep_range=(low, high))) as attached,
    ):
        assert torch.equal(generate(pipe, callback_on_step_end=interrupt), base)
    assert len(attached.steps) == 1 and not attached.steps[0].active


def test_a_finished_attachment_is_pickled_with_its_counts(pipe, config):
    attached = negtome.attach(pipe, config, push=lambda site, tokens, pushed, group_size: pushed)
    with attached:
        generate(pipe)
        with pytest.raises(TypeError, match="after its `with` block"):
            pickle.dumps(attached)
    again = pickle.loads(pickle.dumps(attached))
    assert again.summary()["sites"] == len(attached.sites) > 0
    assert again.summary() == attached.summary() and again.counts() == attached.counts()
    assert (again.sites, again.steps, again.config) == (attached.sites, attached.steps, attached.config)


def test_a_running_call_is_not_detached(pipe, config):
    with negtome.attach(pipe, config):
        expected = generate(pipe)
    refusals = []

    def detach():
        with pytest.raises(RuntimeError, match=r"cannot be detached .* during a call"):
            negtome.detach(pipe)
        refusals.append(1)

    def meanwhile(p, index, timestep, tensors):
        detach()
        thread = threading.Thread(target=detach)
        thread.start()
        thread.join()
        return tensors

    with negtome.attach(pipe, config):
        assert torch.equal(generate(pipe, callback_on_step_end=meanwhile), expected)
    assert len(refusals) == 8


def test_options_are_keywords_and_given_is_deprecated(pipe, config):
    with pytest.raises(TypeError):
        negtome.attach(pipe, config, 2)
    reference = negtome.Reference(torch.rand(3, 32, 32))
    with pytest.warns(DeprecationWarning, match="references=") as caught:
        old = negtome.attach(pipe, config, given=reference)
    assert caught[0].filename == __file__
    result = generate(pipe)
    old.remove()
    with negtome.attach(pipe, config, references=reference):
        assert torch.equal(generate(pipe), result)
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="passed twice"):
        negtome.attach(pipe, config, given=reference, references=reference)


def test_a_site_that_is_gone_is_noticed(pipe, config):
    with negtome.attach(pipe, config) as attached, pytest.raises(RuntimeError, match="is gone from the"):
        generate(pipe)
        block = denoiser(pipe).get_submodule(attached.sites[0].rpartition(".attn")[0])
        block.__class__ = torch.nn.Identity
        block._modules.clear()
        generate(pipe)


def test_a_replaced_denoiser_is_noticed(pipe, config):
    name = component(pipe)
    other = copy.deepcopy(getattr(pipe, name))
    with pytest.raises(RuntimeError, match=f"`pipe.{name}` was replaced"), negtome.attach(pipe, config):
        setattr(pipe, name, other)
        generate(pipe)


def test_a_second_pass_is_made_of_the_attached_pipeline_inside(pipe, config):
    name = type(pipe).__name__.replace("Pipeline", "Img2ImgPipeline")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def make_and_call():
        second = getattr(diffusers, name).from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))
        return generate(second, (0,), image=images[:1], strength=0.5)

    base, expected = generate(pipe), make_and_call()
    with pytest.warns(RuntimeWarning, match="runs unchanged"), negtome.attach(pipe, config):
        pushed = generate(pipe)
        assert torch.equal(make_and_call(), expected)
        assert torch.equal(generate(pipe), pushed)
    assert torch.equal(generate(pipe), base)


# Other pipelines that share the denoiser


def by_name(pipe, meanwhile):
    return {"callback_on_step_end": meanwhile}


def by_position(pipe, meanwhile):
    return {"by_position": meanwhile}


def in_thread(pipe, meanwhile):
    def run(p, index, timestep, tensors):
        thread = threading.Thread(target=meanwhile, args=(p, index, timestep, tensors))
        thread.start()
        thread.join()
        return tensors

    return {"callback_on_step_end": run}


def by_class(pipe, meanwhile):
    class Meanwhile(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, *args):
            return meanwhile(*args)

    return {"callback_on_step_end": Meanwhile()}


def several(pipe, meanwhile):
    return {"callback_on_step_end": MultiPipelineCallbacks([by_class(pipe, meanwhile)["callback_on_step_end"]])}


def deprecated(pipe, meanwhile):
    return {"callback": lambda index, timestep, latents: meanwhile(pipe, index, timestep, {}), "callback_steps": 1}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sdxl", deprecated),
        *(("flux", options) for options in (by_name, in_thread, by_class)),
        *(pytest.param("flux", options, marks=pytest.mark.slow) for options in (by_position, several)),
    ],
)
def test_another_pipeline_that_is_called_during_or_after_the_call_runs_unchanged(pipe, config, options):
    """None of its tokens is pushed and none of its steps is counted. Between the steps the modules are inactive."""
    other = type(pipe)(**pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)})
    base = generate(other, num_inference_steps=2)
    with negtome.attach(pipe, config) as attached:
        expected = generate(pipe)
        counts = attached.counts(), attached.steps[:]
    results = []

    def meanwhile(p, index, timestep, tensors):
        results.append(generate(other, num_inference_steps=2))
        site = denoiser(pipe).get_submodule(attached.sites[0])
        tokens = 1 + 0.1 * torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(site(tokens), site.forward(tokens))
        return tensors

    with pytest.warns(RuntimeWarning, match="that call runs unchanged"), negtome.attach(pipe, config) as attached:
        callback = options(pipe, meanwhile)
        if "by_position" in callback:
            parameters = list(inspect.signature(type(pipe).__call__).parameters.values())[1:]
            values = {one.name: one.default for one in parameters if one.kind is not one.VAR_KEYWORD}
            values |= {
                "prompt": "a dog", "num_images_per_prompt": 3, "num_inference_steps": 4, "height": 32, "width": 32,
                "generator": [torch.Generator().manual_seed(seed) for seed in (0, 1, 2)], "output_type": "latent",
                "callback_on_step_end": meanwhile, "max_sequence_length": 12,
            }  # fmt: skip
            result = pipe(*values.values()).images
        else:
            result = generate(pipe, **callback)
        results.append(generate(other, num_inference_steps=2))
    assert len(results) == 5 and all(torch.equal(result, base) for result in results)
    assert torch.equal(result, expected)
    assert (attached.counts(), attached.steps) == counts


def test_another_pipeline_with_the_module_inside_a_compiled_denoiser_is_left_alone(tiny_sdxl):
    other = type(tiny_sdxl)(**tiny_sdxl.components | {"scheduler": copy.deepcopy(tiny_sdxl.scheduler)})
    expected, results = generate(other), []

    def meanwhile(p, index, timestep, tensors):
        results.append(generate(other))
        return tensors

    compile_and_replace(tiny_sdxl)
    # What is compiled makes no difference to who calls whom.
    with torch.compiler.set_stance("force_eager"), negtome.attach(tiny_sdxl, CONFIGS["sdxl"]) as attached:
        generate(tiny_sdxl, callback_on_step_end=meanwhile)
    assert len(attached.steps) == len(results) == 4 and all(torch.equal(result, expected) for result in results)


def test_nested_calls_of_the_attached_pipeline_are_refused(pipe, config):
    def again(p, index, timestep, tensors):
        generate(p)

    with pytest.raises(RuntimeError, match=r"one call of its \w+ at a time"), negtome.attach(pipe, config):
        generate(pipe, callback_on_step_end=again)


def split_tokens(module):
    from diffusers import ContextParallelConfig, ParallelConfig

    # What enable_parallelism notes down: it needs two processes with a device each.
    module._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))


def split_weights(module):
    from torch import distributed
    from torch.distributed.tensor import distribute_module

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        distribute_module(next(m.to_q for m in module.modules() if hasattr(m, "to_q")), mesh)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("split", [split_tokens, split_weights])
def test_a_denoiser_split_over_processes_is_refused_before_and_inside_the_block(tiny_flux, split):
    with pytest.raises(RuntimeError, match="split over processes"), negtome.attach(tiny_flux, CONFIGS["flux"]):
        split(tiny_flux.transformer)
        generate(tiny_flux)
    before = state(tiny_flux)
    with pytest.raises(RuntimeError, match=r"split over processes.*load it whole in each process"):
        negtome.attach(tiny_flux, CONFIGS["flux"])
    assert state(tiny_flux) == before


# Beside what else may be done to a pipeline


def offload_pipeline(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_denoiser(pipe):
    import accelerate

    accelerate.cpu_offload(denoiser(pipe), execution_device=torch.device("cpu"))


def offload_groups(pipe):
    if Version(diffusers.__version__) < Version("0.42") and not torch.accelerator.is_available():
        pytest.skip("this diffusers offloads groups where there is an accelerator only")
    denoiser(pipe).enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )


def fuse_projections(pipe):
    if hasattr(pipe, "unet"):
        pipe.fuse_qkv_projections(vae=False)
    else:
        pipe.transformer.fuse_qkv_projections()


@pytest.mark.parametrize("change", [offload_pipeline, offload_denoiser, offload_groups, fuse_projections])
@pytest.mark.parametrize("inside", [pytest.param(False, marks=pytest.mark.slow), True], ids=["before", "inside"])
def test_offloading_and_fused_projections_keep_working(pipe, config, change, inside):
    with negtome.attach(pipe, config) as plain:
        expected = generate(pipe)
    if not inside:
        change(pipe)
    with negtome.attach(pipe, config) as attached:
        if inside:
            change(pipe)
        torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)
    assert attached.summary()["tokens_compared"] == plain.summary()["tokens_compared"]
    assert not any(hasattr(module, "_negtome") for module in denoiser(pipe).modules())


def test_a_pipeline_may_change_its_dtype_and_be_saved_inside(pipe, config, tmp_path):
    with negtome.attach(pipe, config) as attached:
        pipe.save_pretrained(tmp_path)
        pipe.to(torch.bfloat16)
        assert generate(pipe).dtype is torch.bfloat16
    assert attached.summary()["tokens_compared"] > 0
    again = type(pipe).from_pretrained(tmp_path)
    assert type(denoiser(again)) is type(denoiser(pipe))


def compile_in_place(pipe, **options):
    denoiser(pipe).compile(**options)


def compile_and_replace(pipe, **options):
    setattr(pipe, component(pipe), torch.compile(denoiser(pipe), **options))


def compile_blocks(pipe, **options):
    denoiser(pipe).compile_repeated_blocks(**options)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["compile then attach", "attach then compile"])
@pytest.mark.parametrize("compiled", [compile_in_place, compile_and_replace, compile_blocks])
@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_compiled_denoisers_are_pushed_too(pipe, config, compiled, inside):
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    base = generate(pipe)
    with negtome.attach(pipe, config) as eager:
        expected = generate(pipe)
    torch._dynamo.reset()
    if not inside:
        compiled(pipe, backend=backend, fullgraph=True)
        torch.testing.assert_close(generate(pipe), base, rtol=1e-3, atol=1e-3)
    with negtome.attach(pipe, config) as attached:
        if inside:
            compiled(pipe, backend=backend, fullgraph=True)
        result = generate(pipe)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    for count, eager_count in zip(attached.counts().values(), eager.counts().values(), strict=True):
        assert count.compared == eager_count.compared
        assert abs(count.pushed - eager_count.pushed) <= 3  # rounding, at the threshold
    torch.testing.assert_close(generate(pipe), base, rtol=1e-3, atol=1e-3)
    # Attaching again finds everything compiled, at the latest the second time.
    assert graphs
    for _ in range(2):
        graphs.clear()
        with negtome.attach(pipe, config):
            torch.testing.assert_close(generate(pipe), result, rtol=1e-3, atol=1e-3)
    assert graphs == []


def test_a_block_may_be_compiled_inside(tiny_flux):
    """Its modules are one level further down then; what is compiled makes no difference to that."""
    blocks = tiny_flux.transformer.single_transformer_blocks
    with negtome.attach(tiny_flux, CONFIGS["flux"]) as attached:
        expected = generate(tiny_flux)
        blocks[0] = torch.compile(blocks[0])
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(generate(tiny_flux), expected)
    compared = {name: count.compared for name, count in attached.counts().items()}
    assert compared["single_transformer_blocks.0.attn"] == compared["single_transformer_blocks.1.attn"] > 0
    with torch.compiler.set_stance("force_eager"), negtome.attach(tiny_flux, CONFIGS["flux"]) as attached:
        assert torch.equal(generate(tiny_flux), expected)
    assert "single_transformer_blocks.0._orig_mod.attn" in attached.sites


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [compile_in_place, compile_blocks])
def test_inductor_compiles_it(tiny_flux, compiled):
    config = CONFIGS["flux"]
    torch._dynamo.reset()  # what other tests compiled counts towards its limit
    with negtome.attach(tiny_flux, config):
        expected = generate(tiny_flux)
    compiled(tiny_flux, fullgraph=True)
    generate(tiny_flux)
    with negtome.attach(tiny_flux, config):
        torch.testing.assert_close(generate(tiny_flux), expected, rtol=1e-3, atol=1e-3)
