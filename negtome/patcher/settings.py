"""Turn the inputs that a user sees into the settings of a push, for the model that it acts in."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from negtome.config import NegToMeConfig
from negtome.merge import Strength

PUBLISHED, FEW_STEPS, CUSTOM = "published settings", "few steps", "custom settings"
#: What a user chooses between; see `read_settings`.
SETTINGS = (PUBLISHED, FEW_STEPS, CUSTOM)


@dataclass(frozen=True)
class Schedule:
    """When the method acts.

    Attributes:
        low, high: bounds of sigma, both inclusive, in the model's unit.
        step_range: first and last step of each sampling pass, counted from 0; then sigma is not looked at.
    """

    low: float = 0.0
    high: float = math.inf
    step_range: tuple[int, int] | None = None


@dataclass(frozen=True)
class PushSettings:
    """Settings of a push: of the method, and of the model that it acts in.

    Attributes:
        strength: alpha, threshold and matching, as in `negtome.negative_merge`.
        schedule: when to act.
        attention_level: how often a UNet halves the latent before its first attention; None for the Flux family.
        patch_size: side of a transformer's token in the latent; not used for a UNet.
    """

    strength: Strength
    schedule: Schedule = Schedule()
    attention_level: int | None = None
    patch_size: int = 2


def read_settings(
    denoiser: Any,
    percent_to_sigma: Callable[[float], Any],
    *,
    alpha: float,
    settings: str,
    threshold: float,
    start_percent: float,
    end_percent: float,
    first_steps: int,
) -> PushSettings:
    """Make the settings of a push.

    Args:
        denoiser: the UNet or transformer.
        percent_to_sigma: of the model's noise schedule: share of the timesteps, 0 for pure noise, -> sigma.
        alpha: strength of the push.
        settings: one of `SETTINGS`. "published settings" and "few steps" take threshold and steps from
            `NegToMeConfig.preset` and `NegToMeConfig.few_step`. Only "custom settings" reads the arguments below.
        threshold: cosine similarity in [-1, 1] that a match must exceed.
        start_percent, end_percent: ends of the timestep range, in [0, 1].
        first_steps: act in this many steps from the first one, whatever the percents; 0 to use the percents.

    Raises:
        ValueError: `settings` is unknown, or a number is out of range.
    """
    is_unet = hasattr(denoiser, "output_blocks")
    if settings == PUBLISHED:
        config = NegToMeConfig.preset("sdxl" if is_unet else "flux", alpha=alpha)
        noise = config.window()[0] / 1000  # a flow's sigma is its timestep / 1000
        schedule = Schedule(low=float(percent_to_sigma(1 - noise)) if is_unet else noise)
    elif settings == FEW_STEPS:
        config = NegToMeConfig.few_step("unet" if is_unet else "transformer", alpha=alpha)
        schedule = Schedule(step_range=cast(tuple[int, int], config.step_range))
    elif settings == CUSTOM:
        config = NegToMeConfig(alpha=alpha, threshold=threshold)
        schedule = _custom_schedule(percent_to_sigma, start_percent, end_percent, first_steps)
    else:
        raise ValueError(f"settings must be one of {SETTINGS}, got {settings!r}.")
    return PushSettings(config.strength(), schedule, attention_level(denoiser) if is_unet else None, _patch(denoiser))


def _custom_schedule(
    percent_to_sigma: Callable[[float], Any], start_percent: float, end_percent: float, first_steps: int
) -> Schedule:
    if first_steps > 0:
        return Schedule(step_range=(0, first_steps - 1))
    if start_percent > end_percent:
        raise ValueError(f"start_percent must be at most end_percent, got {start_percent} and {end_percent}.")
    high = math.inf if start_percent <= 0 else float(percent_to_sigma(start_percent))
    return Schedule(float(percent_to_sigma(end_percent)), high)


def attention_level(unet: Any) -> int:
    """Count how often a UNet halves the latent before its first attention: 1 for SDXL, 0 for SD1.5."""
    level = 0
    for block in unet.input_blocks:
        for layer in block:
            if hasattr(layer, "transformer_blocks"):
                return level
            level += type(layer).__name__ == "Downsample"
    return level


def _patch(denoiser: Any) -> int:
    """Return the side of a transformer's token; some transformers list (frames, height, width)."""
    side = getattr(denoiser, "patch_size", 2)
    return int(side[-1]) if isinstance(side, (list, tuple)) else int(side)
