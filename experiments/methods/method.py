"""The interface of methods, which generate the images of a group and leave the stock pipeline unchanged."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eval.images import Withheld
from experiments.methods.setting import Setting
from experiments.prompts import Group


@dataclass
class MethodContext:
    """A method that is applied to one group.

    Attributes:
        call: keyword arguments of the pipeline's call: the model's, with the method's changes.
        statistics: returns numbers of the finished call for the run's log, as JSON values.
        references: reference images that the method used for this group, label -> score of the retriever; None for a
            method without references.
    """

    call: dict[str, Any]
    statistics: Callable[[], dict[str, Any]] = dict
    references: Mapping[str, float] | None = None


@dataclass(frozen=True)
class GroupResult:
    """The images of one group, or the reason why there are none.

    Attributes:
        images: float [K, H, W, 3] in [0, 1], in the order of the group's images; None or [0, H, W, 3] if withheld.
        statistics: numbers for the run's log, as JSON values.
        references: as of `MethodContext`.
        withheld: why there are no images.
        seeds: of the images' initial latents, if they are not the group's own.
    """

    images: np.ndarray | None
    statistics: dict[str, Any]
    references: Mapping[str, float] | None = None
    withheld: Withheld | None = None
    seeds: Sequence[int] | None = None

    def __post_init__(self) -> None:
        count = 0 if self.images is None else len(self.images)
        if (count == 0) != (self.withheld is not None):
            raise ValueError(f"expected images of a group, or why they are withheld, got {count} and {self.withheld}")


def sample(pipe: Any, group: Group, call: Mapping[str, Any], seeds: Sequence[int] | None = None) -> np.ndarray:
    """Call a pipeline once.

    Args:
        pipe: a stock pipeline.
        group: the prompt, and the seeds by default.
        call: further keyword arguments.
        seeds: one for each image's initial latents; None: the group's, which all methods share.

    Returns:
        The images, float [len(seeds), H, W, 3] in [0, 1].
    """
    # One generator per image, on the CPU: the same initial latents for every method and on every device.
    generators = [torch.Generator().manual_seed(seed) for seed in (group.image_seeds() if seeds is None else seeds)]
    defaults = {"prompt": group.prompt, "num_images_per_prompt": len(generators), "generator": generators}
    return pipe(**{**defaults, **call, "output_type": "np"}).images


def generator_of(group: Group, name: str, seed: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator for a method's own random numbers, the same for a group in every run and batch."""
    digest = hashlib.sha256(f"{seed}/{group.id}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Method:
    """A way to generate the images of a group; this base class calls the stock pipeline.

    Most methods change the pipeline or its arguments for one call, and override `apply` only. A method that calls the
    pipeline several times, or chooses among candidates, overrides `generate`.

    Attributes:
        name: in tables and configurations.
        title: in figures, unless its file in conf/method/ has another one.
        columns: the settings that distinguish runs of the method in tables, in the order of the columns.
        version: raise it whenever the same settings would produce other pixels. Runs of another version are neither
            continued nor tabulated; tests/experiments/test_golden.py detects such changes.
    """

    title: str
    columns: tuple[Setting, ...] = ()
    version: int

    def __init__(self, name: str = "none") -> None:
        self.name = name

    def settings(self) -> dict[str, Any]:
        """Return every setting that affects pixels, as JSON values, for the run's identity; a dataclass's fields."""
        fields = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        return {field.name: getattr(self, field.name) for field in fields if field.name != "name"}

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        """Change the images that `pipe` generates for `group`, until the block ends.

        The block calls `pipe(group.prompt, ..., **context.call)` once, or with several prompts, each of which has
        `group.size` images and is a group of its own. If `context.call` has prompts, they replace the block's, one for
        each image.

        Args:
            pipe: a stock pipeline.
            group: the images to be generated together.
            call: further keyword arguments of the call.
        """
        yield MethodContext(dict(call))

    def generate(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> GroupResult:
        """Generate the images of a group, by one call of the pipeline to which the method is applied.

        Args:
            pipe: a stock pipeline, which is unchanged afterwards.
            group: the images to be generated together.
            call: keyword arguments of the model's calls, without the number of images, generators and type of output.
        """
        with self.apply(pipe, group, call) as context:
            images = sample(pipe, group, context.call)
        return GroupResult(images, context.statistics(), context.references)


class Baseline(Method):
    """The stock pipeline, unchanged."""

    title = "without NegToMe"
    version = 0  # the code that all runs share has its own version, `experiments.runs.identity.GENERATION_VERSION`
