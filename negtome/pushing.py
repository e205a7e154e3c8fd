"""The sites at work, and how an object's `__call__` is changed for a while.

The pipeline, its denoiser and every site get a subclass of their own class whose `__call__` does a little more;
afterwards they get their class back. Python looks `__call__` up on the type, so this works beneath and above whatever
replaces a module's `forward` (offloading), processor (fused projections) or parameters (dtype, device), and
torch.compile guards on the types of modules, so code that was compiled before is compiled anew. A torch forward hook
that is added after compilation would silently be ignored.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from negtome.architectures import Place
from negtome.config import NegToMeConfig
from negtome.merge import Strength, push_from, push_groups
from negtome.sites import unwrap

#: The one attribute that an attached object carries beside its own.
ATTRIBUTE = "_negtome"
#: What may stand in the place of the push: see `negtome.attach`.
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


class Now:
    """What the sites have to know about the call of the denoiser that is running."""

    def __init__(self) -> None:
        self.active = False
        self.group_size = 0
        self.rows = 0  # that the pipeline asked for
        self.tokens = 0  # of the generated image, where a place has others too
        self.stream = 0  # tokens of all images of a row
        self.fewest_tokens = 0  # of a feature map that takes part
        self.layout: Layout | None = None  # of a batch with rows of outside references


class Site:
    """A module whose image tokens are pushed, and what was found there.

    What is counted leaves here as a tensor, so that counting neither waits for the device nor makes torch.compile
    specialise on a number. Compiled code reads nothing else that differs between the sites of an architecture.
    """

    def __init__(self, name: str, place: Place, config: NegToMeConfig, now: Now, instead: Push | None) -> None:
        self.name = name
        self.module: torch.nn.Module | None = None
        self.width: int | None = None  # of the features among the channels, where there are others
        self.place = place
        self.reference = config.reference
        self.strength = config.strength()
        self.now = now
        self.instead = instead
        self.similarity: torch.Tensor | None = None  # [G, S] of what was compared in this call of the denoiser

    def enter(self, module: torch.nn.Module, parent: torch.nn.Module) -> None:
        """Push what passes through a module from now on."""
        self.module = module
        self.width = None if self.place.width is None else getattr(parent, self.place.width)
        retype(module, self, _PUSHES[self.place.where])

    def leave(self) -> None:
        """Give the module back as it was, if there is one."""
        if self.module is not None:
            restore(self.module)
        self.module = None

    def push(self, features: torch.Tensor) -> torch.Tensor:
        """Push the image tokens among the features [rows, N, C] apart, group by group."""
        now = self.now
        length = features.shape[1]
        first = length - now.stream if self.place.image == "last" else 0
        last = length if self.place.image == "all" else first + now.tokens
        whole = (first, last) == (0, length) and self.width is None
        tokens = features if whole else features[:, first:last, : self.width]
        if tokens.shape[1] < now.fewest_tokens:
            return features
        if now.layout is None:
            pushed, similarity = push_groups(tokens, now.group_size, reference=self.reference, **self.strength)
            tokens = pushed if self.instead is None else _push_instead(self, tokens, pushed)
        else:
            tokens, similarity = _push_from_rows(tokens, now.layout, self.strength)
        if self.similarity is not None:  # a module that is called twice
            similarity = torch.cat([self.similarity, similarity], dim=1)
        self.similarity = similarity
        if whole:
            return tokens
        if self.width is not None:
            tokens = torch.cat([tokens, features[:, first:last, self.width :]], dim=2)
        return torch.cat([features[:, :first], tokens, features[:, last:]], dim=1)


def not_compiled(recursive: bool = True) -> Callable[[_Function], _Function]:
    """Return `torch.compiler.disable` as a decorator that keeps a function's type."""
    return functools.partial(torch.compiler.disable, recursive=recursive)


@not_compiled()  # it may draw; and the name, which differs between sites, stays out of what is compiled
def _push_instead(site: Site, tokens: torch.Tensor, pushed: torch.Tensor) -> torch.Tensor:
    assert site.instead is not None  # or else it is not called
    return site.instead(site.name, tokens, pushed, site.now.group_size)


def _push_from_rows(tokens: torch.Tensor, layout: Layout, strength: Strength) -> tuple[torch.Tensor, torch.Tensor]:
    """Push the images of a batch [rows, N, C] away from its reference rows; see `push_from` for what is returned."""
    batch = tokens.unflatten(0, (layout.halves, -1))  # [halves, images + rows, N, C]
    result, similarities = batch.clone(), []
    for route in layout.routes:
        reference = batch[:, slice(*route.rows)]
        mask, allowed = route.masks[tokens.shape[1]], route.allowed[tokens.shape[1]]
        if allowed is not None and strength["matching"] == "paper":
            reference, mask = reference.flatten(1, 2).index_select(1, allowed).unsqueeze(1), None
        for start, stop in route.images:
            result[:, start:stop], similarity = push_from(batch[:, start:stop], reference, mask=mask, **strength)
            similarities.append(similarity)
    return result.flatten(0, 1), torch.cat(similarities, 1)


def path(root: torch.nn.Module, name: str) -> list[tuple[dict[str, Any], str, torch.nn.Module]]:
    """List what must stay as it is for a module to keep its name; blocks on the way may be compiled.

    Returns:
        For every module on the way to `name`, itself last: the dict it is in, its key there, and itself. Looking these
        up again takes microseconds, walking down from the root to every site a step's fraction.

    Raises:
        KeyError: there is no such module.
    """
    found, module = [], root
    for key in name.split("."):
        parent = module if key in module._modules else unwrap(module)
        child = parent._modules[key]
        if child is None:
            raise KeyError(key)
        found.append((parent._modules, key, child))
        module = child
    return found


def retype(owner: Any, state: Any, make_call: Callable[[Call], Call]) -> None:
    """Give `owner` the `__call__` that `make_call` makes of its own one, and `state` to go with it.

    Nothing here refers to `owner`, so that a copy of it can be restored too.
    """
    restore(owner)  # a copy that was made of an attached module
    owner.__dict__[ATTRIBUTE] = state
    # Not owner.__class__ = ...: OptimizedModule would pass that on to the module inside it.
    cls: type = type(owner)
    object.__setattr__(owner, "__class__", subclass(cls, make_call))


def restore(owner: Any) -> None:
    """Give what `retype` changed its class back; whatever else remains as it is."""
    if owner.__dict__.pop(ATTRIBUTE, None) is not None:
        object.__setattr__(owner, "__class__", type(owner)._negtome_original)


@functools.cache
def subclass(cls: type, make_call: Callable[[Call], Call]) -> type:
    """Make a subclass that differs in `__call__` only, and bears the same name: diffusers looks at names.

    There is one for all modules of a class, so that compiled code is shared between them as before.
    """
    call = functools.wraps(cls.__call__)(make_call(cls.__call__))
    members = {"__call__": call, "__module__": cls.__module__, "__doc__": cls.__doc__, "_negtome_original": cls}
    return type(cls.__name__, (cls,), members)


def _push_output(original: Call) -> Call:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        site = self._negtome
        if not site.now.active:
            return output
        return (site.push(output[0]), *output[1:]) if isinstance(output, tuple) else site.push(output)

    return __call__


def _push_input(original: Call) -> Call:
    def __call__(self: Any, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        site = self._negtome
        return original(self, site.push(tokens) if site.now.active else tokens, *args, **kwargs)

    return __call__


_PUSHES = {"output": _push_output, "input": _push_input}
