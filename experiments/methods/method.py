"""What a method is: it makes the images of a group with a stock pipeline, and leaves that as it was."""

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
    """A method at work on one group.

    Attributes:
        call: keyword arguments of the pipeline's call: those of the model, as far as the method did not change them.
        statistics: returns what the run's log should keep of the finished call, as JSON values.
        references: the assets the method was given for this group, file -> score by which it was found; None where the
            method takes none.
    """

    call: dict[str, Any]
    statistics: Callable[[], dict[str, Any]] = dict
    references: Mapping[str, float] | None = None


@dataclass(frozen=True)
class GroupResult:
    """What a method made of one group: images, or none and why.

    Attributes:
        images: float [K, H, W, 3] in [0, 1], in the order of the group's images; None or [0, H, W, 3] where they are
            withheld.
        statistics: what the run's log should keep, as JSON values.
        references: as of `MethodContext`.
        withheld: why there are no images.
        seeds: of the images' noises, where they are not those of the group's own.
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
        group: what is asked for.
        call: further keyword arguments.
        seeds: of the images' noises, one each; None: the group's own, those of all methods.

    Returns:
        The images, float [len(seeds), H, W, 3] in [0, 1].
    """
    # Each image its own generator, on the CPU: the same noises for every method and on every device.
    generators = [torch.Generator().manual_seed(seed) for seed in (group.image_seeds() if seeds is None else seeds)]
    usual = {"prompt": group.prompt, "num_images_per_prompt": len(generators), "generator": generators}
    return pipe(**{**usual, **call, "output_type": "np"}).images


def generator_of(group: Group, name: str, seed: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator of draws beside the images' own noises, the same for a group in every run and batch."""
    digest = hashlib.sha256(f"{seed}/{group.id}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Method:
    """What an experiment asks of a method: `generate`. As it stands here, it is the stock pipeline.

    Most methods change a pipeline or its arguments for one call, and write `apply` alone. One that calls the pipeline
    several times, or chooses among candidates, writes `generate`.

    Attributes:
        name: in tables and configurations.
        title: in figures, where its file in conf/method/ does not say another one.
        columns: the settings that tell runs of the method apart in tables, in the order of the columns.
        version: raised whenever the same settings would make other pixels, whatever was edited; runs of another version
            are neither gone on with nor put into a table (tests/experiments/test_golden.py tells).
    """

    title: str
    columns: tuple[Setting, ...] = ()
    version: int

    def __init__(self, name: str = "none") -> None:
        self.name = name

    def settings(self) -> dict[str, Any]:
        """Return every setting of the method that affects pixels, as JSON values: part of the run's identity.

        Of a method that is a dataclass, its fields.
        """
        fields = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        return {field.name: getattr(self, field.name) for field in fields if field.name != "name"}

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        """Change what `pipe` generates for `group` until the block ends.

        The block calls `pipe(group.prompt, ..., **applied.call)` once, or with several prompts, each of which has
        `group.size` images and is then a group of its own; with prompts in `applied.call` these alone, one an image.

        Args:
            pipe: a stock pipeline.
            group: the images to be generated together.
            call: further keyword arguments that the pipeline is to be called with.
        """
        yield MethodContext(dict(call))

    def generate(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> GroupResult:
        """Make the images of a group, by one call of the pipeline to which the method is applied.

        Args:
            pipe: a stock pipeline; it is afterwards as before.
            group: the images to be generated together.
            call: keyword arguments of the model's calls, without the number of images, generators and kind of output.
        """
        with self.apply(pipe, group, call) as applied:
            images = sample(pipe, group, applied.call)
        return GroupResult(images, applied.statistics(), applied.references)


class Baseline(Method):
    """The stock pipeline: changes nothing."""

    title = "without NegToMe"
    version = 0  # what all runs share has a version of its own, `experiments.runs.identity.GENERATION_VERSION`
