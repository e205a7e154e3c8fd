"""Change the calls of a pipeline, its denoiser and its attention modules for a while.

Each of these objects gets a subclass of its own class that differs in `__call__`; afterwards it gets its class back.
Hooks on the instance would be the usual way, but none of them is enough:

- Python looks `__call__` up on the type, so a pipeline has no place for a hook on the instance. We need the arguments
  of its call: they say how many images and prompts there are.
- torch.compile does not guard on forward hooks: it never calls one that is added to a module inside compiled code.
- Accelerate's model offloading puts a module's `forward` back after every call of the pipeline, and removes what
  `diffusers.hooks.HookRegistry` put there.
- Copies and pickles of a module carry its forward hooks along, and everything that the hooks refer to.

torch.compile does guard on types. It compiles again for the subclass and keeps both versions in its cache, so attaching
again compiles nothing. Copies and pickles have the original class.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from negtome.architectures import HookPoint
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
    """Which images are pushed away from which reference rows.

    Attributes:
        images: runs (start, stop) of the images' indices in a chunk of the batch.
        rows: run of the indices of the R reference rows in a chunk of the batch, in which they follow the images.
        masks: for each feature map, by its number N of tokens: bool [R * N], or None for all tokens.
        allowed: the same as indices of the tokens inside, so that the others need not be compared; absent where the
            mask is None or empty.
    """

    images: tuple[tuple[int, int], ...]
    rows: tuple[int, int]
    masks: Mapping[int, torch.Tensor | None]
    allowed: Mapping[int, torch.Tensor]


class Layout(NamedTuple):
    """How a call's batch is made: `cfg_chunks` times the `images` and after them the reference `rows`."""

    cfg_chunks: int
    images: int
    rows: int
    routes: tuple[Route, ...]


class StepContext(NamedTuple):
    """One call of the denoiser, as far as sites need it.

    Attributes:
        group_size: images in a group.
        tokens: tokens of the generated image.
        stream: tokens of all images of a row, generated and input.
        fewest_tokens: tokens of the smallest feature map that takes part.
        layout: of a batch with reference rows, or None.
    """

    group_size: int
    tokens: int
    stream: int
    fewest_tokens: int
    layout: Layout | None


class Site:
    """A module whose image tokens are pushed, and the similarities measured there.

    Counts leave as a tensor, so that counting neither waits for the device nor makes torch.compile specialise on a
    number. Compiled code reads nothing else that differs between the sites of an architecture.

    Attributes:
        context: of the running call of the denoiser; None while the site is inactive.
        similarity: [G, J, N] of the tokens compared in this call of the denoiser, with a further J for each further
            call of the module; None if nothing was compared.
    """

    def __init__(self, name: str, hook_point: HookPoint, config: NegToMeConfig, push_fn: Push | None) -> None:
        self.name = name
        self.module: torch.nn.Module | None = None
        self.width: int | None = None  # leading channels that hold features, if there are others
        self.hook_point = hook_point
        self.reference = config.reference
        self.strength = config.strength()
        self.push_fn = push_fn
        self.context: StepContext | None = None
        self.similarity: torch.Tensor | None = None

    def enter(self, module: torch.nn.Module, parent: torch.nn.Module) -> None:
        """Push the tokens that pass through a module from now on."""
        self.module = module
        self.width = None if self.hook_point.width is None else getattr(parent, self.hook_point.width)
        patch_call(module, self, _PUSHES[self.hook_point.tensor])

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
        first = length - context.stream if self.hook_point.image == "last" else 0
        last = length if self.hook_point.image == "all" else first + context.tokens
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
        if self.similarity is not None:  # the module is called twice
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
    batch = tokens.unflatten(0, (layout.cfg_chunks, -1))  # [cfg_chunks, images + rows, N, C]
    still, similarities = cannot_move(strength["alpha"], strength["threshold"]), []
    result = batch if still else batch.clone()
    for route in layout.routes:
        reference = batch[:, slice(*route.rows)]
        mask, allowed = route.masks[tokens.shape[1]], route.allowed.get(tokens.shape[1])
        if allowed is not None and strength["matching"] == "paper":
            reference, mask = reference.flatten(1, 2).index_select(1, allowed).unsqueeze(1), None
        for start, stop in route.images:
            pushed, similarity = push_from(batch[:, start:stop], reference, mask=mask, **strength)
            similarities.append(similarity)
            if not still:
                result[:, start:stop] = pushed
    return tokens if still else result.flatten(0, 1), torch.cat(similarities, 1)


def path(root: torch.nn.Module, name: str) -> list[tuple[dict[str, Any], str, torch.nn.Module]]:
    """List the links that lead from a module to a submodule; blocks on the way may be compiled.

    Returns:
        For every module on the way to `name`, itself last: the dict it is in, its key there, and itself. Checking these
        again takes microseconds; walking down from the root to every site would slow a step down.

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
    """Give `owner` the `__call__` that `make_call` makes from that of its class, and `state` to go with it."""
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


def patch_denoiser(original: Call) -> Call:
    """Make the `__call__` of a denoiser whose state, an Attachment or a guider, has a method `call_denoiser`."""

    @not_compiled(recursive=False)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(ATTRIBUTE)  # None if such compiled code outlives the block
        if state is None:
            return original(self, *args, **kwargs)
        return state.call_denoiser(original, self, args, kwargs)

    return __call__


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
