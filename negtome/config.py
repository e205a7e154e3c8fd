"""The settings of NegToMe: a frozen dataclass that refuses bad values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from negtome.merge import MATCHINGS, REFERENCES, GroupReference, Matching, Strength
from negtome.validation import check_float, check_int, to_python_scalar


@dataclass(frozen=True)
class NegToMeConfig:
    """How strongly, when, where and from what the images of a group are pushed apart.

    The defaults are the paper's method. None becomes the number of the authors' release for the architecture that the
    settings are attached to. `preset` returns the published settings.
    Sources: [P] arXiv 2412.01339; [R] the authors' released pipelines (github.com/1jsingh/negtome, 2024-12-06);
    [S] their evaluation scripts in the same repository.

    Attributes:
        alpha: strength of the push in x + alpha * (x - match), any finite number. Positive pushes apart, negative
            pulls together, 0 leaves every image bit-identical. 0.9 in [R] and [S]; 1.9 for Flux in [S].
        threshold: cosine similarity in [-1, 1] that the match must exceed for a token to move; tau in [P]. 1 is
            off. None: 0.7 for SDXL and 0.65 for Flux [R]; 0.7 for others, unpublished.
        timestep_range: (low, high) in training timesteps, 0 to 1000 with 1000 = pure noise, both ends inclusive
            (to 0.001, for the rounding of 1000 * sigma). None: SDXL (800, 1000), which is 10 of 50 steps, and Flux
            (900, 1000), which is 6 of 25 steps at 768x768 [R]; (900, 1000) for others, unpublished. [S]: SDXL
            (600, 1000), 20 of 50 steps. It stays None where step_range is set. A range that ends in
            (0, 1] is refused: it looks like shares of the steps.
        step_range: which steps of a call take part, in place of timestep_range; setting both is an error. Two whole
            numbers, 0 to 999, are the first and the last step, both inclusive and counted from 0: (0, 0) is the first
            step alone. If one is a fraction, both are shares of the call's steps, 0 to 1: step i of n takes part if
            low <= i / n < high, so (0, 0.25) is the first quarter, rounded up. The count begins with the first step
            that is run, also in a call that starts from an image. A second-order scheduler (Heun) calls the denoiser
            twice in a step, and both calls take part.
        matching: "paper": the nearest reference token of every token [P]. "released": the axis of the released
            code [R], which is another method; see `negtome.negative_merge`. Only with reference="first".
        reference: which images of its group an image is pushed from, if `attach` gets no references. "first": the
            first one, which does not move [R]. "previous": all earlier ones together. "others": all others together,
            at a cost that grows with the square of the group's size. Features are compared as they are before the push.
        sites: names of denoiser modules: blocks, such as "up_blocks" or "up_blocks.1", whose attentions take part, or
            single attentions, as in `Attachment.sites`. None: the blocks of the release, "up_blocks" for SDXL and
            SD1.5, and every block of Flux [R] and other transformers.
        cross_attention: whether the outputs of cross-attention are pushed too, as for SDXL in [R]. [P] speaks of an
            attention's image tokens, which we read as self-attention. UNets only (SDXL, SD1.5).
        min_side: shortest side, in tokens, of the feature maps that take part. None: 32, as in [R], or the side of the
            largest feature map if that is smaller. UNets only: transformers have a single resolution.
    """

    alpha: float = 0.9
    threshold: float | None = None
    timestep_range: tuple[float, float] | None = None
    matching: Matching = "paper"
    reference: GroupReference = "first"
    sites: tuple[str, ...] | None = None
    cross_attention: bool = False
    min_side: int | None = None
    step_range: tuple[int, int] | tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Convert sequences to tuples and refuse values out of range."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, to_python_scalar(getattr(self, field.name)))
        object.__setattr__(self, "alpha", check_float("alpha", self.alpha, -math.inf, math.inf))
        if self.threshold is not None:
            object.__setattr__(self, "threshold", check_float("threshold", self.threshold, -1, 1))
        if self.timestep_range is not None:
            object.__setattr__(self, "timestep_range", _check_timestep_range(self.timestep_range))
        if self.step_range is not None:
            object.__setattr__(self, "step_range", _check_step_range(self.step_range))
            if self.timestep_range is not None:
                raise ValueError(
                    f"step_range and timestep_range both choose the steps, got {self.step_range} and "
                    f"{self.timestep_range}; leave one of them out, or set it to None."
                )

        if self.matching not in MATCHINGS:
            raise ValueError(f"matching must be one of {MATCHINGS}, got {self.matching!r}.")
        if self.reference not in REFERENCES:
            raise ValueError(f"reference must be one of {REFERENCES}, got {self.reference!r}.")
        if self.matching == "released" and self.reference != "first":
            raise ValueError(
                'matching="released" is defined between two images only, so it needs reference="first", '
                f'got reference={self.reference!r}; use matching="paper".'
            )

        if self.sites is not None:
            object.__setattr__(self, "sites", _check_sites(self.sites))

        if not isinstance(self.cross_attention, bool):
            raise ValueError(f"cross_attention must be true or false, got {self.cross_attention!r}.")
        if self.min_side is not None:
            check_int("min_side", self.min_side, 1, advice=" tokens, or None.")

    @classmethod
    def preset(
        cls,
        architecture: Literal["sdxl", "flux"],
        variant: Literal["paper", "released", "evaluation"] = "paper",
        **changes: Any,
    ) -> NegToMeConfig:
        """Make the settings published for an architecture.

        | architecture | variant      | alpha | threshold | timesteps | matching | cross-attention | source |
        |--------------|--------------|-------|-----------|-----------|----------|-----------------|--------|
        | "sdxl"       | "paper"      | 0.9   | 0.7       | 800-1000  | paper    | no              | [P, R] |
        | "sdxl"       | "released"   | 0.9   | 0.7       | 800-1000  | released | yes             | [R]    |
        | "sdxl"       | "evaluation" | 0.9   | 0.7       | 600-1000  | released | yes             | [S]    |
        | "flux"       | "paper"      | 0.9   | 0.65      | 900-1000  | paper    |                 | [P, R] |
        | "flux"       | "released"   | 0.9   | 0.65      | 900-1000  | released |                 | [R]    |
        | "flux"       | "evaluation" | 1.9   | 0.65      | 900-1000  | released |                 | [S]    |
        | all others   | no published setting; NegToMeConfig() stands for 0.7 and 900-1000 there                 |
        "paper" is the method as the paper describes it, with the numbers of the release. "released" differs from the
        release in calls without guidance (SDXL with guidance_scale <= 1): the release still splits the batch in two and
        pushes each part by itself, while here all images of the call stay one group.

        Args:
            architecture: "sdxl" or "flux".
            variant: "paper", "released" (the class defaults of the released code) or "evaluation" (the settings of
                the authors' evaluation scripts).
            changes: fields that differ from the preset.

        Raises:
            ValueError: for an unknown architecture or variant.
        """
        try:
            fields = _PRESETS[architecture, variant]
        except KeyError:
            presets = ", ".join(f"{a}/{v}" for a, v in _PRESETS)
            raise ValueError(f"there is no preset {architecture}/{variant}; the presets are {presets}.") from None
        return cls(**fields).replace(**changes)

    @classmethod
    def few_step(cls, denoiser: Literal["unet", "transformer"], **changes: Any) -> NegToMeConfig:
        """Make settings for checkpoints that need at most 8 steps: turbo, lightning, schnell, LCM.

        Only the first step takes part: step_range is (0, 0). alpha and the threshold are 0.9 and 0.5 for a UNet, 0.45
        and 0.8 for a transformer. Nobody has published settings for such checkpoints. These come from mini-sdxl and
        mini-flux with 4 and 2 steps (results/few_steps_sweep/), so they are a guess for others.

        Args:
            denoiser: "unet" (SDXL, Stable Diffusion 1 and 2) or "transformer" (Flux and all others).
            changes: fields that differ; a timestep_range takes the place of the step_range.

        Raises:
            ValueError: for another denoiser, or a field is out of range.
        """
        if denoiser not in _FEW_STEPS:
            raise ValueError(f'denoiser must be "unet" or "transformer", got {denoiser!r}.')
        return cls(**_FEW_STEPS[denoiser]).replace(**changes)

    def replace(self, **changes: Any) -> NegToMeConfig:
        """Return a copy with some fields changed, validated again.

        A new step_range takes the place of the timestep_range, and the reverse.
        """
        for name, other in (("step_range", "timestep_range"), ("timestep_range", "step_range")):
            if changes.get(name) is not None:
                changes.setdefault(other, None)
        return dataclasses.replace(self, **changes)

    def published_for(self, architecture: str) -> NegToMeConfig:
        """Return a copy in which the numbers published for an architecture, or the defaults, replace None.

        With a step_range, timestep_range stays None.
        """
        published = _PRESETS.get((architecture, "paper"), _UNPUBLISHED)
        names = ("threshold", "timestep_range") if self.step_range is None else ("threshold",)
        return self.replace(**{name: published[name] for name in names if getattr(self, name) is None})

    def strength(self) -> Strength:
        """Return the settings of the arithmetic.

        Raises:
            ValueError: the threshold is None.
        """
        if self.threshold is None:
            raise ValueError("expected a threshold, got None; published_for puts a number there.")
        return Strength(alpha=self.alpha, threshold=self.threshold, matching=self.matching)

    def window(self) -> tuple[float, float]:
        """Return `timestep_range`.

        Raises:
            ValueError: it is None.
        """
        if self.step_range is not None:
            raise ValueError(f"expected a timestep_range, got step_range={self.step_range}; pass a timestep_range.")
        if self.timestep_range is None:
            raise ValueError("expected a timestep_range, got None; published_for puts one there.")
        return self.timestep_range

    def side_within(self, largest: tuple[int, int]) -> int:
        """Return `min_side` for a denoiser whose largest feature map has this (height, width), in tokens."""
        return min(RELEASED_SIDE, *largest) if self.min_side is None else self.min_side

    def is_active(self, timestep: float, index: int | None = None, steps: int | None = None) -> bool:
        """Tell whether a step of a call takes part.

        Args:
            timestep: training timestep of the step, 0 to 1000; a timestep_range needs it.
            index: number of the step in the call, from 0; a step_range needs it.
            steps: number of steps of the call; shares of a step_range need it.

        Raises:
            ValueError: no range is set, or a number that it needs is None.
        """
        if self.step_range is None:
            low, high = self.window()
            return low - 1e-3 <= timestep <= high + 1e-3
        first, last = self.step_range
        if index is None:
            raise ValueError(f"step_range={self.step_range} needs the index of a step, got None.")
        if isinstance(first, int):
            return first <= index <= last
        if steps is None:
            raise ValueError(
                f"step_range={self.step_range} holds shares of the call's steps, but this scheduler does not say how "
                "many there are; pass the first and the last step, such as (0, 0)."
            )
        return first <= index / steps < last

    def active_steps(self, timesteps: Sequence[float], order: int = 1) -> list[bool]:
        """Tell which entries of a schedule take part, a step having `order` entries; errors are those of `is_active`.

        Args:
            timesteps: training timesteps of a call, in the order in which they are run.
            order: of the scheduler: 2 for Heun, whose steps but the last have two entries.
        """
        steps = math.ceil(len(timesteps) / order)
        return [self.is_active(timestep, i // order, steps) for i, timestep in enumerate(timesteps)]


def _check_sites(value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"sites must be a list of module names or None, got {value!r}.")
    sites = tuple(value)
    if not sites or not all(isinstance(name, str) and name for name in sites):
        raise ValueError(f"sites must be module names, at least one, or None for the default, got {sites}.")
    return sites


def _two_ends(name: str, words: str, value: object) -> tuple[Any, Any]:
    """Return the two items of a range as Python numbers; `words` name them in the error."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable) or len(ends := tuple(value)) != 2:
        raise ValueError(f"{name} must be two numbers ({words}), got {value!r}.")
    return to_python_scalar(ends[0]), to_python_scalar(ends[1])


def _check_step_range(value: object) -> tuple[int, int] | tuple[float, float]:
    ends = _two_ends("step_range", "first, last", value)
    if all(isinstance(end, int) for end in ends):
        first, last = (check_int("each step of step_range", end, 0, _LAST_STEP) for end in ends)
        if first > last:
            raise ValueError(f"step_range must be (first, last) with first <= last, got ({first}, {last}).")
        return first, last
    low, high = (check_float("each share of step_range", end, 0, 1) for end in ends)
    if low >= high:
        raise ValueError(f"step_range must be shares (low, high) with low < high, got ({low}, {high}).")
    if (low, high) == (0, 1):  # equal to the steps (0, 1) in Python, and written like them by some JSON libraries
        raise ValueError(
            "step_range=(0.0, 1.0) is easily taken for (0, 1), the first two steps; for every step, pass "
            "timestep_range=(0, 1000)."
        )
    return low, high


def _check_timestep_range(value: object) -> tuple[float, float]:
    ends = _two_ends("timestep_range", "low, high", value)
    low, high = (check_float("each end of timestep_range", end, 0, 1000) for end in ends)
    if low > high:
        raise ValueError(
            f"timestep_range must be (low, high) with low <= high, got ({low:g}, {high:g}); 1000 is pure noise, so the "
            f"steps from {low:g} down to {high:g} are ({high:g}, {low:g})."
        )
    if 0 < high <= 1:
        raise ValueError(
            f"timestep_range must be in training timesteps, 0 to 1000, got ({low:g}, {high:g}); for shares of steps, "
            "from the first one of a call on, use step_range."
        )
    return low, high


#: Largest index of a step: schedules have at most 1000.
_LAST_STEP = 999
#: Shortest side of the feature maps that take part in the authors' release for SDXL.
RELEASED_SIDE = 32
_SDXL: dict[str, Any] = {"alpha": 0.9, "threshold": 0.7, "timestep_range": (800, 1000)}
_FLUX: dict[str, Any] = {"alpha": 0.9, "threshold": 0.65, "timestep_range": (900, 1000)}
_UNPUBLISHED = {"threshold": 0.7, "timestep_range": (900, 1000)}
_PRESETS = {
    ("sdxl", "paper"): _SDXL,
    ("sdxl", "released"): _SDXL | {"matching": "released", "cross_attention": True},
    ("sdxl", "evaluation"): _SDXL | {"matching": "released", "cross_attention": True, "timestep_range": (600, 1000)},
    ("flux", "paper"): _FLUX,
    ("flux", "released"): _FLUX | {"matching": "released"},
    ("flux", "evaluation"): _FLUX | {"matching": "released", "alpha": 1.9},
}
_FEW_STEPS: dict[str, dict[str, Any]] = {
    "unet": {"alpha": 0.9, "threshold": 0.5, "step_range": (0, 0)},
    "transformer": {"alpha": 0.45, "threshold": 0.8, "step_range": (0, 0)},
}
