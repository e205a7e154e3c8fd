"""Say what happened in a sampling pass, so that a user sees whether the method acted."""

import logging
from collections import Counter
from typing import Any

import torch


class Report:
    """Counts of the last sampling pass: hook points that fired, and tokens that moved.

    Counts stay on the device until `text` reads them, so that counting does not wait for it.

    Attributes:
        calls: model calls of the pass.
        active_calls: those in which tokens were compared.
        noise_calls: those of them whose reference images were pure noise.
        compared: tokens compared, over all hook points, model calls, conditions and images.
        skipped: reasons why a call or an attention took no part, with their numbers.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forget the pass before."""
        self.calls = self.active_calls = self.noise_calls = self.compared = 0
        self.skipped: Counter[str] = Counter()
        self._moved: dict[tuple[Any, ...], torch.Tensor] = {}

    def add(self, hook_point: tuple[Any, ...], moved: torch.Tensor) -> None:
        """Count the tokens of one hook point in one model call; `moved` is bool, one element a token."""
        self.compared += moved.numel()
        count = moved.sum()
        self._moved[hook_point] = self._moved[hook_point] + count if hook_point in self._moved else count

    @property
    def hook_points(self) -> int:
        """Hook points that compared tokens."""
        return len(self._moved)

    @property
    def moved(self) -> int:
        """Tokens moved, over all hook points, model calls, conditions and images."""
        return sum(int(count) for count in self._moved.values())

    @property
    def problem(self) -> str | None:
        """Why the pass had no effect, or not the desired one, and what to do; None if it had, or if none has run."""
        if self.moved and self.noise_calls == self.active_calls:
            return (
                "the reference image was pure noise, as it is in the first step of the Flux family. Choose the custom "
                "settings with first_steps of 2."
            )
        if self.calls == 0 or self.moved:
            return None
        if self.skipped and not self._moved:
            return self.skipped.most_common(1)[0][0]
        if self.active_calls == 0:
            return "no model call was in the timestep range. Widen the range, or choose the settings for few steps."
        if not self._moved:
            return (
                "the model showed no attention output to the patch. Z-Image, Qwen-Image and SD3 have no hook point, "
                "the Flux family needs a ComfyUI of February 2026 or later, and Forge shows SDXL and SD1.5 only."
            )
        return "no token was similar enough. Lower the threshold, and check that alpha is not 0."

    def text(self) -> str:
        """Return the report in one or two lines."""
        if self.calls == 0:
            return "NegToMe: no sampling pass has run with this model."
        moved = self.moved
        share = 100 * moved / max(1, self.compared)
        line = (
            f"NegToMe: {self.hook_points} hook points fired in {self.active_calls} of {self.calls} model calls; "
            f"{moved:,} of {self.compared:,} tokens moved ({share:.1f} %)."
        )
        return line if self.problem is None else f"{line}\nProblem: {self.problem}"

    def log(self) -> None:
        """Write the report to the log, as a warning if there is a problem."""
        level = logging.INFO if self.problem is None else logging.WARNING
        logging.getLogger(__name__).log(level, self.text())
