"""The cases that are measured, and the variants of a pipeline's call that are compared in each."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments import select_device
from experiments.configs import build, first, flag
from negtome import NegToMeConfig

#: The variant that all others are compared with.
PLAIN = "none"
#: The method as it is by default: what the profile and, unless they say otherwise, the targets are of.
METHOD = "first"
#: The row of the floor: plain steps and, in the window, the bare matrix products and one pass over the tokens.
BOUND = "lower_bound"
Window = tuple[float, float]


@dataclass(frozen=True)
class Variant:
    """One of the things that are compared; its settings are explained in conf/experiment/latency.yaml."""

    name: str
    via: str
    config: Mapping[str, Any] = field(default_factory=dict)
    picture: bool = False
    outside: bool = False

    def __post_init__(self) -> None:
        if self.via not in ("plain", "negtome", "naive"):
            raise ValueError(f"via must be plain, negtome or naive, got {self.via!r} in variant {self.name}.")


@dataclass(frozen=True)
class Case:
    """One configuration that is measured with several variants, the first of which is the plain pipeline.

    Its rows belong to a part: to the "table", or to a curve, over "batch" or "resolution". Those for `curve_windows`
    belong to the part "window", and what a step of the table's method is made of to "profile".
    """

    part: str
    model: DictConfig
    strengths: NegToMeConfig  # the model's own in conf/method/negtome.yaml
    side: int  # of the images in pixels
    batch: int  # images in a call, all of one prompt
    variants: tuple[Variant, ...]
    rounds: int  # everything is measured twice in each
    steps: tuple[int, int] | None  # in and out of the window in a measured call; None: the model's own number
    windows: tuple[Window, ...]  # (low, high) in training timesteps that whole calls are stated for
    curve_windows: tuple[Window, ...] = ()
    curve_variants: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.variants or self.variants[0].via != "plain" or self.variants[0].name != PLAIN:
            raise ValueError(f"latency.variants must begin with {PLAIN}: {{via: plain}}, got {self.variants[:1]}.")
        if self.rounds < 1 or (self.steps is not None and min(self.steps) < 1):
            raise ValueError(
                f"rounds and the steps inside and outside the window must be at least 1, got {self.rounds} and "
                f"{self.steps}."
            )

    @property
    def label(self) -> str:
        return f"{self.model.name} {self.side}x{self.side} batch {self.batch}"


@functools.cache  # a suite composes the same few over and over, a third of a second each
def composed(*overrides: str) -> DictConfig:
    """Compose what a command line asks for.

    Raises:
        ValueError: it is another experiment.
    """
    cfg = first(["method=negtome", *overrides])
    if "latency" not in cfg:
        raise ValueError("expected experiment=latency among the overrides, got none.")
    return cfg


def configured_cases(overrides: Sequence[str]) -> Iterator[Case]:
    """Yield the cases that a command line asks for, the table's first.

    Raises:
        ValueError: there is no such suite or case, or a model is asked for.
    """
    if any(text.startswith("model=") for text in overrides):
        raise ValueError("expected no model=, which the suite chooses; choose among its cases with latency.only=[NAME]")
    cfg = composed(*overrides)
    settings, suite = cfg.latency, cfg.latency.suite
    if suite == "auto":
        suite = "full" if select_device(cfg.device).startswith("cuda") else "mini"
    if suite not in ("mini", "full"):
        raise ValueError(f"latency.suite must be auto, mini or full, got {suite!r}.")
    asked = [kind for kind in ("cases", "curves") if flag(cfg, f"latency.{kind}")]
    names = {*settings[suite].cases, *settings[suite].curves}
    if settings.only is not None and not (OmegaConf.is_list(settings.only) and set(settings.only) <= names):
        raise ValueError(f"latency.only must name cases of the suite {suite}, {sorted(names)}, got {settings.only}.")
    specs = OmegaConf.to_container(settings.variants, resolve=True)
    variants = tuple(Variant(name, **spec) for name, spec in specs.items())
    drawn = tuple(settings.curve_variants)
    few = tuple(variant for variant in variants if variant.name in drawn)
    lows = settings.curve_windows if "curves" in asked else ()
    for kind in asked:
        for name, spec in settings[suite][kind].items():
            if settings.only is not None and name not in settings.only:
                continue
            own = composed(*overrides, f"model={spec.model}")
            strengths = build(own.method).config.published_for(own.model.architecture)
            common = {
                "model": own.model,
                "strengths": strengths,
                "variants": variants if kind == "cases" else few,
                "rounds": spec.rounds,
                "steps": None if spec.steps is None else (spec.steps.inside, spec.steps.outside),
                "windows": tuple(tuple(window) for window in spec.get("windows") or [strengths.timestep_range]),
            }
            if kind == "cases":
                curve = {"curve_windows": tuple((float(low), 1000.0) for low in lows), "curve_variants": drawn}
                yield Case("table", side=spec.side, batch=spec.batch, **common, **curve)
            else:
                yield from (Case("batch", side=spec.side, batch=batch, **common) for batch in spec.batches)
                yield from (Case("resolution", side=side, batch=spec.batch, **common) for side in spec.sides)
