"""Hook points: how the calls of the pipeline, its denoiser and its attention modules are changed for a while.

Each of these objects gets a subclass of its own class that differs in `__call__`; afterwards it gets its class back.
Instance-level hooks would be the usual way, and `tests/negtome/test_hooks.py` shows why none of them is enough:

- Python looks `__call__` up on the type, so a pipeline has no place for a hook on the instance. The arguments of
  its call are needed: they say how many images and prompts there are.
- torch.compile does not guard on forward hooks: one that is added to a module inside compiled code is never called.
- A module's `forward`, which `diffusers.hooks.HookRegistry` replaces, is put back by accelerate's model offloading
  after every call of the pipeline, and with it goes the hook.
- Copies and pickles of a module carry its forward hooks along, and with them what the hooks refer to.

torch.compile does guard on types. Code that was compiled before is compiled anew for the subclass, and both versions
stay in its cache, so that attaching again compiles nothing. Copies and pickles are of the original class, and so is
what is made by calling the subclass, which is equal to the original class.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from negtome.architectures import Place
from negtome.config import NegToMeConfig
from negtome.merge import Strength, cannot_move, push_from, push_groups
from negtome.sites import unwrap

#: The one attribute that a patched object carries in addition to its own.
ATTRIBUTE = "_negtome"
#: In a patched class, the one that it was made of.
_ORIGINAL = "_negtome_original"
#: A replacement of the push: see `negtome.attach`.
Push = Callable[[str, torch.Tensor, torch.Tensor, int], torch.Tensor]
#: A `__call__`.
Call = Callable[..., Any]
_Function = TypeVar("_Function", bound=Call)


class Route(NamedTuple):
    """Which images are pushed from which rows.

    Attributes:
        images: runs (start, stop) of places of the images in a half of the batch.
        rows: run of places of the R reference rows in a half of the batch, in which they follow the images.
        masks: for each feature map, by its number N of tokens: bool [R * N], or None for all tokens.
        allowed: the same as numbers of the tokens inside, so that the others need not be compared; None where the
            mask is None or empty.
    """

    images: tuple[tuple[int, int], ...]
    rows: tuple[int, int]
    masks: Mapping[int, torch.Tensor | None]
    allowed: Mapping[int, torch.Tensor | None]


class Layout(NamedTuple):
    """How a call's batch is made: `halves` times the `images` and after them the reference `rows`."""

    halves: int
    images: int
    rows: int
    routes: tuple[Route, ...]


class StepContext(NamedTuple):
    """The parts of one call of the denoiser that its sites have to know.

    Attributes:
        group_size: images in a group.
        tokens: of the generated image, where a hook point has others too.
        stream: tokens of all images of a row, generated and given.
        fewest_tokens: of a feature map that takes part.
        layout: of a batch with rows of outside references, or None.
    """

    group_size: int
    tokens: int
    stream: int
    fewest_tokens: int
    layout: Layout | None


class Site:
    """A module whose image tokens are pushed, and the similarities that were measured there.

    Counts leave as a tensor, so that counting neither waits for the device nor makes torch.compile specialise on a
    number. Compiled code reads nothing else that differs between the sites of an architecture.

    Attributes:
        context: of the call of the denoiser that is running; None while the site is at rest.
        similarity: [G, J, N] of the tokens that were compared in this call of the denoiser, with a further J for each
            further call of the module; None if there were none.
    """

    def __init__(self, name: str, place: Place, config: NegToMeConfig, push_fn: Push | None) -> None:
        self.name = name
        self.module: torch.nn.Module | None = None
        self.width: int | None = None  # of the features among the channels, where there are others
        self.place = place
        self.reference = config.reference
        self.strength = config.strength()
        self.push_fn = push_fn
        self.context: StepContext | None = None
        self.similarity: torch.Tensor | None = None

    def enter(self, module: torch.nn.Module, parent: torch.nn.Module) -> None:
        """Push the tokens that pass through a module from now on."""
        self.module = module
        self.width = None if self.place.width is None else getattr(parent, self.place.width)
        patch_call(module, self, _PUSHES[self.place.where])

    def leave(self) -> None:
        """Give the module back as it was, if there is one."""
        if self.module is not None:
            unpatch_call(self.module)
        self.module = None

    def push(self, features: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Push the image tokens among the features [rows, N, C] apart, group by group.

        Returns:
            [rows, N, C] with the strides of `features`: kernels choose their order of summation by them, so that rows
            that nothing moved would differ in their last bits further on. `features` itself where no token can move.
        """
        length = features.shape[1]
        first = length - context.stream if self.place.image == "last" else 0
        last = length if self.place.image == "all" else first + context.tokens
        image_only = (first, last) == (0, length) and self.width is None
        tokens = features if image_only else features[:, first:last, : self.width]
        if tokens.shape[1] < context.fewest_tokens:
            return features
        if context.layout is None:
            pushed, similarity = push_groups(tokens, context.group_size, reference=self.reference, **self.strength)
            if self.push_fn is not None:
                pushed = _push_by_function(self, tokens, pushed, context.group_size)
        else:
            pushed, similarity = _push_from_rows(tokens, context.layout, self.strength)
        if self.similarity is not None:  # a module that is called twice
            similarity = torch.cat([self.similarity, similarity], dim=1)
        self.similarity = similarity
        if pushed is tokens:
            return features
        if not image_only:
            if self.width is not None:
                pushed = torch.cat([pushed, features[:, first:last, self.width :]], dim=2)
            pushed = torch.cat([features[:, :first], pushed, features[:, last:]], dim=1)
        return _with_strides_of(features, pushed)


def _with_strides_of(features: torch.Tensor, pushed: torch.Tensor) -> torch.Tensor:
    """Return `pushed` laid out in memory as `features`, both [rows, N, C]."""
    if pushed.stride() == features.stride() or 0 in features.stride():  # an expanded tensor has no room for its rows
        return pushed
    return features.new_empty_strided(features.shape, features.stride()).copy_(pushed)


def not_compiled(recursive: bool = True) -> Callable[[_Function], _Function]:
    """Return `torch.compiler.disable` as a decorator that keeps a function's type."""
    return functools.partial(torch.compiler.disable, recursive=recursive)


@not_compiled()  # it may draw random numbers; and the name, which differs between sites, stays out of compiled code
def _push_by_function(site: Site, tokens: torch.Tensor, pushed: torch.Tensor, group_size: int) -> torch.Tensor:
    assert site.push_fn is not None  # or else it is not called
    return site.push_fn(site.name, tokens, pushed, group_size)


def _push_from_rows(tokens: torch.Tensor, layout: Layout, strength: Strength) -> tuple[torch.Tensor, torch.Tensor]:
    """Push the images of a batch [rows, N, C] away from its reference rows; see `push_from` for what is returned."""
    batch = tokens.unflatten(0, (layout.halves, -1))  # [halves, images + rows, N, C]
    still, similarities = cannot_move(strength["alpha"], strength["threshold"]), []
    result = batch if still else batch.clone()
    for route in layout.routes:
        reference = batch[:, slice(*route.rows)]
        mask, allowed = route.masks[tokens.shape[1]], route.allowed[tokens.shape[1]]
        if allowed is not None and strength["matching"] == "paper":
            reference, mask = reference.flatten(1, 2).index_select(1, allowed).unsqueeze(1), None
        for start, stop in route.images:
            pushed, similarity = push_from(batch[:, start:stop], reference, mask=mask, **strength)
            similarities.append(similarity)
            if not still:
                result[:, start:stop] = pushed
    return tokens if still else result.flatten(0, 1), torch.cat(similarities, 1)


def path(root: torch.nn.Module, name: str) -> list[tuple[dict[str, Any], str, torch.nn.Module]]:
    """List what must stay as it is for a module to keep its name; blocks on the way may be compiled.

    Returns:
        For every module on the way to `name`, itself last: the dict it is in, its key there, and itself. Looking these
        up again takes microseconds, walking down from the root to every site a step's fraction.

    Raises:
        KeyError: there is no such module.
    """
    steps, module = [], root
    for key in name.split("."):
        parent = module if key in module._modules else unwrap(module)
        child = parent._modules[key]
        if child is None:
            raise KeyError(key)
        steps.append((parent._modules, key, child))
        module = child
    return steps


def patch_call(owner: Any, state: Any, make_call: Callable[[Call], Call]) -> None:
    """Give `owner` the `__call__` that `make_call` makes of its class's, and `state` to go with it."""
    owner.__dict__[ATTRIBUTE] = state
    # Not owner.__class__ = ...: OptimizedModule would pass that on to the module inside it.
    cls: type = type(owner)
    object.__setattr__(owner, "__class__", _subclass(cls, make_call))


def unpatch_call(owner: Any) -> None:
    """Give an object that `patch_call` changed its class back; whatever else was changed since then remains."""
    if owner.__dict__.pop(ATTRIBUTE, None) is None:
        return
    cls = type(owner)
    if _ORIGINAL in vars(cls):
        object.__setattr__(owner, "__class__", vars(cls)[_ORIGINAL])
        return
    for derived in cls.__mro__:  # from the patched class, since then, as a parametrization of torch does
        if any(_ORIGINAL in vars(base) for base in derived.__bases__):
            derived.__bases__ = tuple(vars(base).get(_ORIGINAL, base) for base in derived.__bases__)


class _SameClass(type):
    """A class that is equal to the one it was made of.

    Libraries look for classes in tuples and dicts, such as `DiffusionPipeline.from_pipe` and torch's quantization.
    """

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is vars(cls).get(_ORIGINAL)

    def __hash__(cls) -> int:
        return type.__hash__(vars(cls).get(_ORIGINAL, cls))


@functools.cache
def _subclass(cls: type, make_call: Callable[[Call], Call]) -> type:
    """Make a subclass that differs in `__call__` only, and bears the same name: diffusers looks at names.

    There is one for all modules of a class, so that compiled code is shared between them as before.
    """

    original_new: Call = cls.__new__
    original_reduce: Call = cls.__reduce_ex__

    def __new__(kind: type, *args: Any, **kwargs: Any) -> Any:
        """Make an object of the original class, as `type(pipe)(**pipe.components)` is to do."""
        if _ORIGINAL in vars(kind):
            return cls(*args, **kwargs)
        return original_new(kind)  # a class derived from this one

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Copy and pickle the object as one of the original class that nothing is attached to."""
        reduced: Any = original_reduce(self, protocol)
        make, arguments, *rest = reduced
        if make.__name__ == "__newobj__":  # which pickle refuses for another class than the object's
            make = object.__new__
        make, *arguments = (cls if part is type(self) else part for part in (make, *arguments))
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != ATTRIBUTE}
        return (make, tuple(arguments), *rest)

    members = {
        "__new__": __new__,
        "__call__": functools.wraps(cls.__call__)(make_call(cls.__call__)),
        "__reduce_ex__": __reduce_ex__,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        _ORIGINAL: cls,
    }
    metaclass: Any = _SameClass if type(cls) is type else type(cls)
    patched: type = metaclass(cls.__name__, (cls,), members)
    return patched


def _push_output(original: Call) -> Call:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        site = self._negtome
        if site.context is None:
            return output
        if isinstance(output, tuple):
            return (site.push(output[0], site.context), *output[1:])
        return site.push(output, site.context)

    return __call__


def _push_input(original: Call) -> Call:
    def __call__(self: Any, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        site = self._negtome
        if site.context is not None:
            tokens = site.push(tokens, site.context)
        return original(self, tokens, *args, **kwargs)

    return __call__


_PUSHES = {"output": _push_output, "input": _push_input}
