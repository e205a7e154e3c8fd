"""A patched call acts in compiled code too, and copies, pickles and derived classes have the original one."""

import copy
import pickle

import pytest
import torch

from negtome.hooks import patch_call, unpatch_call


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.site = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.site(x) + 1


@pytest.fixture
def compiled():
    """Return a block that was compiled and called, its input, and its output."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    block, x = Block(), torch.randn(2, 4)
    block.compile(backend="eager", fullgraph=True)
    return block, x, block(x)


def add(original):
    def __call__(self, *args, **kwargs):
        return original(self, *args, **kwargs) + 100

    return __call__


@pytest.mark.parametrize("patched", ["site", "block"])
def test_a_patched_call_acts_after_compilation_and_leaves_no_trace(compiled, patched):
    block, x, before = compiled
    owner = block.site if patched == "site" else block
    kind, attributes, copied = type(owner), set(vars(owner)), set(vars(copy.deepcopy(owner)))
    for _ in range(2):
        patch_call(owner, "state", add)
        assert torch.allclose(block(x), before + 100)
        for clone in (copy.copy(owner), copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
            assert type(clone) is kind and set(vars(clone)) == copied
        unpatch_call(owner)
        assert type(owner) is kind and set(vars(owner)) == attributes
        assert torch.equal(block(x), before)


def test_a_patched_outer_module_of_compiled_code_is_copied_too():
    torch._dynamo.reset()
    outer, x = torch.compile(Block(), backend="eager"), torch.randn(2, 4)
    before, kind = outer(x), type(outer)
    patch_call(outer, "state", add)
    assert torch.allclose(outer(x), before + 100)
    clone = copy.deepcopy(outer)
    assert type(clone) is kind and torch.equal(clone(x), before)


def test_an_object_made_of_a_patched_class_is_of_the_original_one(compiled):
    block, x, _ = compiled
    kind = type(block)
    patch_call(block, "state", add)
    other, linear = type(block)(), block.site
    patch_call(linear, "state", add)
    again = type(linear)(4, 4)
    assert type(other) is kind and type(again) is torch.nn.Linear
    patch_call(other, "state", add)
    other.load_state_dict(block.state_dict())
    assert torch.allclose(other(x) + 100, block(x))


def test_a_class_derived_from_a_patched_one_keeps_its_additions():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 4)
    site, reference = block.site, copy.deepcopy(block)
    patch_call(site, "state", add)
    for linear in (site, reference.site):
        torch.nn.utils.parametrizations.weight_norm(linear)
        linear.parametrizations.weight.original0.data *= 2
    assert torch.allclose(block(x), reference(x) + 100)
    assert torch.equal(copy.deepcopy(site).weight, site.weight)
    unpatch_call(site)
    assert torch.equal(block(x), reference(x))
    assert type(site).__mro__[1:] == type(reference.site).__mro__[1:]
    torch.nn.utils.parametrize.remove_parametrizations(site, "weight")
    assert type(site) is torch.nn.Linear and torch.allclose(block(x), reference(x))


def test_a_patched_class_passes_for_the_original_one():
    """As in `type(component) in expected`, by which pipelines are made of others, and in torch's tables of classes."""
    site, other = torch.nn.Linear(4, 4), torch.nn.Conv2d(1, 1, 1)
    patch_call(site, "state", add)
    patch_call(other, "state", add)
    assert type(site) in (torch.nn.Conv2d, torch.nn.Linear) and {torch.nn.Linear: 1}[type(site)]
    assert type(site) not in (type(other), torch.nn.Module) and type(site) not in {torch.nn.Conv2d: 1}
