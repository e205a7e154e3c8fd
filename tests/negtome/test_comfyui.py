"""The nodes with stand-ins for ComfyUI's modules: what they register on a model, and the example workflows."""

import asyncio
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

WORKFLOWS = sorted((Path(__file__).parents[2] / "integrations/comfyui/example_workflows").glob("*.json"))
SETTINGS = {"alpha": 0.9, "threshold": 0.7, "start_percent": 0.0, "end_percent": 0.2, "first_steps": 0}


def kind_of_value(kind):
    return SimpleNamespace(
        Input=lambda name, **options: SimpleNamespace(name=name, kind=kind, **options),
        Output=lambda **options: SimpleNamespace(kind=kind, **options),
    )


@pytest.fixture
def shown():
    """What the interface shows: (id of a node, text)."""
    return []


@pytest.fixture
def nodes(monkeypatch, shown):
    """Import the folder of nodes as ComfyUI does, and return its node classes by their id."""
    kinds = ("Model", "Vae", "Image", "Mask", "Latent", "String", "Float", "Int", "Combo")
    io = SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {"hidden": SimpleNamespace(unique_id="7")}),
        Hidden=SimpleNamespace(unique_id="UNIQUE_ID"),
        Schema=SimpleNamespace,
        NodeOutput=lambda *args, ui=None: SimpleNamespace(args=args, ui=ui),
        Custom=kind_of_value,
        **{name: kind_of_value(name.upper()) for name in kinds},
    )
    latest = SimpleNamespace(ComfyExtension=object, io=io, ui=SimpleNamespace(PreviewText=str))
    wrappers = SimpleNamespace(OUTER_SAMPLE="outer_sample", APPLY_MODEL="apply_model")
    monkeypatch.setitem(sys.modules, "comfy", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", SimpleNamespace(WrappersMP=wrappers))
    monkeypatch.setitem(sys.modules, "comfy_api", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    server = SimpleNamespace(send_progress_text=lambda text, node_id: shown.append((node_id, text)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    monkeypatch.delitem(sys.modules, "integrations.comfyui.nodes", raising=False)
    extension = asyncio.run(importlib.import_module("integrations.comfyui").comfy_entrypoint())
    classes = asyncio.run(extension.get_node_list())
    yield {node.define_schema().node_id: node for node in classes}
    sys.modules.pop("integrations.comfyui.nodes")


class Model:
    """Stand-in for ComfyUI's ModelPatcher, with the methods that the nodes call."""

    def __init__(self, denoiser, patches=(), wrappers=()):
        self.denoiser, self.patches, self.wrappers = denoiser, list(patches), list(wrappers)

    def clone(self):
        return Model(self.denoiser, self.patches, self.wrappers)

    def get_model_object(self, name):
        sampling = SimpleNamespace(percent_to_sigma=lambda percent: 10 * (1 - percent))
        return {"diffusion_model": self.denoiser, "model_sampling": sampling}[name]

    def set_model_attn1_output_patch(self, patch):
        self.patches.append(patch)

    def add_wrapper_with_key(self, place, key, wrapper):
        self.wrappers.append((place, wrapper))


UNET = SimpleNamespace(input_blocks=[[SimpleNamespace(transformer_blocks=[])]], output_blocks=[])


def test_a_group_acts_in_a_copy_of_the_model_and_other_patches_stay(nodes, shown):
    model = Model(UNET, patches=["another node's"])
    execute = nodes["NegToMeGroup"].execute
    patched, report = execute(model, "first", 0, settings="published settings", **SETTINGS).args
    assert (model.patches, model.wrappers) == (["another node's"], [])
    _, push = patched.patches
    assert patched.patches[0] == "another node's"
    wrappers = dict(patched.wrappers)

    tokens = torch.randn(2, 1024, 8, generator=torch.Generator().manual_seed(0)).abs()  # similar to each other

    def call_model(x, sigma, c_concat, c_crossattn, control, options):
        return push(tokens, {**options, "block": ("output", 3)})

    def sample(noise):
        options = {"cond_or_uncond": [0]}
        return wrappers["apply_model"](call_model, noise, torch.full((2,), 9.0), transformer_options=options)

    pushed = wrappers["outer_sample"](sample, torch.randn(2, 4, 32, 32))
    assert torch.equal(pushed[0], tokens[0]) and not torch.equal(pushed[1], tokens[1])
    latent = {"samples": pushed}
    output = nodes["NegToMeReport"].execute(report, latent)
    assert output.args == (latent, output.ui) and "1 hook points fired in 1 of 1 model calls" in output.ui
    assert shown == [("7", output.ui)]


def test_a_reference_image_is_encoded_at_the_size_of_the_pass(nodes):
    sizes = []

    def encode(pixels):
        sizes.append(tuple(pixels.shape))
        return torch.zeros(1, 4, 32, 32)

    vae = SimpleNamespace(encode=encode, spacial_compression_encode=lambda: 8)
    execute = nodes["NegToMeReference"].execute
    image, mask = torch.rand(1, 100, 80, 4), torch.ones(1, 100, 80)
    patched, report = execute(Model(UNET), vae, image, mask, settings="few steps", **SETTINGS).args
    dict(patched.wrappers)["outer_sample"](lambda noise: noise, torch.randn(2, 4, 32, 32))
    assert sizes == [(1, 256, 256, 3)] and report.calls == 0


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflows_fit_the_nodes(path, nodes):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    by_number = {node["id"]: node for node in workflow["nodes"]}
    for number, source, output, target, slot, kind in workflow["links"]:
        outgoing, incoming = by_number[source]["outputs"][output], by_number[target]["inputs"][slot]
        assert outgoing["type"] == incoming["type"] == kind
        assert number in outgoing["links"] and incoming["link"] == number
    ours = [node for node in workflow["nodes"] if node["type"] in nodes]
    assert len(ours) == 2
    for node in ours:
        inputs = nodes[node["type"]].define_schema().inputs
        widgets = [one for one in inputs if one.kind in ("FLOAT", "INT", "COMBO")]
        defaults = [one.options[0] if one.kind == "COMBO" else one.default for one in widgets]
        assert node["widgets_values"] == defaults
        sockets = [one for one in inputs if one not in widgets]
        assert sorted(one["name"] for one in node["inputs"]) == sorted(one.name for one in sockets)
