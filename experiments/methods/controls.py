"""Controls of NegToMe: they move the same tokens at the same hook points and steps, without a part of the method.

`RandomMatch` keeps the push without the matching; `NoiseControl` keeps the length of the push without its direction. An
effect that a control has too comes from disturbing the features, not from pushing them apart.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import negtome
from experiments.methods.method import MethodContext, generator_of
from experiments.methods.negtome import NegToMe
from experiments.prompts import Group


def changed(tokens: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """Return which tokens [B, N, C] were moved, bool [B, N, 1]."""
    return (tokens != moved).any(dim=-1, keepdim=True)


class Control(NegToMe):
    """NegToMe with its push replaced at each hook point, after NegToMe has determined which tokens move, and where to.

    Args:
        seed: of the random numbers, together with the group's id and the hook point's name.
        **config: as of `NegToMe`.

    Raises:
        ValueError: the matching or the reference is one that the controls are not defined for.
    """

    #: The control's name in the run's identity.
    control: str

    def __init__(self, name: str, seed: int = 0, **config: Any) -> None:
        super().__init__(name, **config)
        self.check_paper_matching()
        self.seed = seed

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "matching": self.control, "seed": self.seed}

    def replace(
        self, tokens: torch.Tensor, moved: torch.Tensor, group_size: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Return the control's tokens [G * K, N, C]; tokens that NegToMe does not move are unchanged.

        Args:
            tokens: [G * K, N, C] the tokens of G groups of K = `group_size` images before the push.
            moved: [G * K, N, C] the same after NegToMe's push.
            group_size: K.
            generator: of random numbers, which all groups of the batch share. Otherwise guidance would amplify the
                difference between the numbers of its two halves, which mostly match alike.
        """
        raise NotImplementedError

    @contextlib.contextmanager
    def apply(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> Iterator[MethodContext]:
        generators: dict[tuple[str, torch.device], torch.Generator] = {}

        def push(site: str, tokens: torch.Tensor, moved: torch.Tensor, group_size: int) -> torch.Tensor:
            key = site, tokens.device
            if key not in generators:
                generators[key] = generator_of(group, site, self.seed, tokens.device)
            return self.replace(tokens, moved, group_size, generators[key])

        with negtome.attach(pipe, self.config, group_size=group.size, push=push) as attached:
            yield MethodContext(dict(call), attached.summary)


class RandomMatch(Control):
    """NegToMe with a random token r of the group's first image in place of the nearest one: x + alpha * (x - r)."""

    title = "control: random match"
    control = "random"
    version = 1

    def replace(
        self, tokens: torch.Tensor, moved: torch.Tensor, group_size: int, generator: torch.Generator
    ) -> torch.Tensor:
        images = tokens.unflatten(0, (-1, group_size))  # [G, K, N, C]
        G, K, N, C = images.shape
        index = torch.randint(N, (1, K * N, 1), generator=generator, device=tokens.device)
        match = images[:, 0].gather(1, index.expand(G, -1, C)).view_as(images).flatten(0, 1)
        pushed = torch.add(tokens, tokens - match, alpha=self.config.alpha)
        return torch.where(changed(tokens, moved), pushed, tokens)


class NoiseControl(Control):
    """NegToMe's updates with their lengths, in random directions u, uniform on the sphere: x + |update| * u."""

    title = "control: noise of equal norm"
    control = "noise"
    version = 1

    def replace(
        self, tokens: torch.Tensor, moved: torch.Tensor, group_size: int, generator: torch.Generator
    ) -> torch.Tensor:
        precise = torch.promote_types(tokens.dtype, torch.float32)
        length = torch.linalg.vector_norm(moved.to(precise) - tokens.to(precise), dim=-1, keepdim=True)
        shape = (group_size, *tokens.shape[1:])
        direction = torch.randn(shape, generator=generator, device=tokens.device, dtype=precise)
        direction = torch.nn.functional.normalize(direction, dim=-1).repeat(len(tokens) // group_size, 1, 1)
        return torch.where(changed(tokens, moved), (tokens.to(precise) + length * direction).to(tokens.dtype), tokens)
