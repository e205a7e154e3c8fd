"""The cases that are measured, and the variants of a pipeline's call that are compared in each."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments import select_device
from experiments.compose import first
from experiments.configs import build, flag
from negtome import NegToMeConfig

#: The baseline, the method with its default settings, and the lower bound: steps of the baseline plus, in the timestep
#: range, the bare matrix products and one pass over the tokens.
PLAIN, METHOD, BOUND = "none", "first", "lower_bound"
Window = tuple[float, float]


@dataclass(frozen=True)
class Variant:
    """One way to call the pipeline; conf/experiment/latency.yaml explains the settings."""

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
    """One configuration that is measured with several variants, the first of which is the baseline.

    Its rows belong to a part: the "table", or a curve over "batch" or "resolution". Rows for `curve_windows` belong to
    the part "window", and the operations of a step to "profile".
    """

    part: str
    model: DictConfig
    strengths: NegToMeConfig  # the model's in conf/method/negtome.yaml
    side: int  # pixels of an image
    batch: int  # images in a call, all of one prompt
    variants: tuple[Variant, ...]
    rounds: int  # each measures every variant twice
    steps: tuple[int, int] | None  # inside and outside the range in a measured call; None: the model's number
    windows: tuple[Window, ...]  # (low, high) timestep ranges that whole calls are stated for
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
    """Compose a command line.

    Raises:
        ValueError: it names another experiment.
    """
    cfg = first(["method=negtome", *overrides])
    if "latency" not in cfg:
        raise ValueError("expected experiment=latency among the overrides, got none.")
    return cfg


def configured_cases(overrides: Sequence[str]) -> Iterator[Case]:
    """Yield the cases of a command line, the table's first.

    Raises:
        ValueError: the suite or a case is unknown, or a model is named.
    """
    if any(text.startswith("model=") for text in overrides):
        raise ValueError("expected no model=, which the suite chooses; choose among its cases with latency.only=[NAME]")
    cfg = composed(*overrides)
    settings, suite = cfg.latency, cfg.latency.suite
    if suite == "auto":
        suite = "full" if select_device(cfg.device).startswith("cuda") else "mini"
    if suite not in ("mini", "full"):
        raise ValueError(f"latency.suite must be auto, mini or full, got {suite!r}.")
    kinds = [kind for kind in ("cases", "curves") if flag(cfg, f"latency.{kind}")]
    names = {*settings[suite].cases, *settings[suite].curves}
    if settings.only is not None and not (OmegaConf.is_list(settings.only) and set(settings.only) <= names):
        raise ValueError(f"latency.only must name cases of the suite {suite}, {sorted(names)}, got {settings.only}.")
    specs = OmegaConf.to_container(settings.variants, resolve=True)
    variants = tuple(Variant(name, **spec) for name, spec in specs.items())
    of_curves = tuple(variant for variant in variants if variant.name in settings.curve_variants)
    windows = [(float(low), 1000.0) for low in settings.curve_windows] if "curves" in kinds else []
    window_curve = {"curve_windows": tuple(windows), "curve_variants": tuple(settings.curve_variants)}
    for kind in kinds:
        for name, spec in settings[suite][kind].items():
            if settings.only is not None and name not in settings.only:
                continue
            common = _common(composed(*overrides, f"model={spec.model}"), spec)
            if kind == "cases":
                yield Case("table", side=spec.side, batch=spec.batch, variants=variants, **common, **window_curve)
                continue
            for batch in spec.batches:
                yield Case("batch", side=spec.side, batch=batch, variants=of_curves, **common)
            for side in spec.sides:
                yield Case("resolution", side=side, batch=spec.batch, variants=of_curves, **common)


def _common(cfg: DictConfig, spec: DictConfig) -> dict[str, Any]:
    """Return the fields that all cases of a model's entry share."""
    strengths = build(cfg.method).config.published_for(cfg.model.architecture)
    return {
        "model": cfg.model,
        "strengths": strengths,
        "rounds": spec.rounds,
        "steps": None if spec.steps is None else (spec.steps.inside, spec.steps.outside),
        "windows": tuple(tuple(window) for window in spec.get("windows") or [strengths.window()]),
    }
