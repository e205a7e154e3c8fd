"""The floor: what a step in the window must cost at least."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.benchmark import Timer

import negtome
from experiments.methods import naive

#: The row of the floor: plain steps and, in the window, the bare matrix products and one pass over the tokens.
BOUND = "lower_bound"
#: For how long each kernel is repeated, in seconds.
REPEATED = 0.05


#: Shapes of the two factors of a batched matrix product.
Product = tuple[tuple[int, int, int], tuple[int, int, int]]


def products(pipe: Any, call: Mapping[str, Any], config: negtome.NegToMeConfig, steps: int) -> Counter[Product]:
    """Count what one step in the window compares, of a call that has `steps` of them; costs one plain call.

    Each product is of an attention's image tokens: those of all images of each half of the batch but the first, with
    those of the first one.
    """
    seen: Counter[Product] = Counter()

    def note(features: torch.Tensor, halves: int, _: negtome.NegToMeConfig) -> torch.Tensor:
        images, (tokens, channels) = len(features) // halves, features.shape[1:]
        seen[(halves, (images - 1) * tokens, channels), (halves, channels, tokens)] += 1
        return features

    with naive.attach(pipe, config, note):
        pipe(**{**call, "output_type": "latent"})
    return Counter({product: count // steps for product, count in seen.items()})


def lower_bound(found: Mapping[Product, int], device: str, dtype: torch.dtype) -> float:
    """Measure what one step of the window must cost at least, in seconds.

    That is, for every site: the bare matrix product, and one pass over memory that reads and writes the tokens that
    move, which are its first factor.
    """
    seconds = 0.0
    for shapes, count in found.items():
        left, right = (torch.randn(*shape, device=device).to(dtype) for shape in shapes)
        names = {"bmm": torch.bmm, "left": left, "right": right, "product": left @ right, "moved": left.clone()}
        for work in ("bmm(left, right, out=product)", "moved.copy_(left)"):
            timer = Timer(work, globals=names, num_threads=torch.get_num_threads())
            seconds += count * timer.blocked_autorange(min_run_time=REPEATED).median
    return seconds
