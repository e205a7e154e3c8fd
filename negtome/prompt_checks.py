"""Checks of the prompts that the images of one call of the denoiser have."""

import torch

from negtome.architectures import Architecture
from negtome.calls import DenoiserCall, PipelineCall

#: Two embeddings of one text differ by rounding; of different texts, some element differs by more than this share of
#: itself and of a usual element.
ROUNDING = 0.05


def check_one_prompt(
    pipeline_call: PipelineCall, call: DenoiserCall, group_size: int, architecture: Architecture
) -> None:
    """Refuse a batch in which the images of a group have several prompts.

    Raises:
        ValueError: they do.
    """
    several = group_size == call.images and pipeline_call.has_several_texts()
    # A callback, or a pipeline of the user's, may have put other embeddings in the place of the texts'.
    if several or not all(_rows_agree(rows, group_size) for rows in call.prompts.values() if len(rows) == call.rows):
        raise ValueError(
            "NegToMe expected the images of a group to share their prompt, got several prompts; pass "
            f"{architecture.per_prompt}=2 or more, or group_size to attach, so that only images of a prompt are pushed "
            "apart."
        )


def _rows_agree(embedding: torch.Tensor, group_size: int) -> bool:
    """Tell whether the rows of an embedding [rows, ...] are of one text in every group of neighbours.

    Rows of one text are copies, or were computed side by side and differ by rounding. Each element is compared at the
    scale of a usual one: some language models have activations a million times as large as the others, at which the
    difference between two texts would not show.
    """
    groups = embedding.detach().unflatten(0, (-1, group_size))
    if torch.equal(groups, groups[:, :1].expand_as(groups)):
        return True
    groups = groups.float()
    size = groups.abs()
    nonzero = size[size > 0]  # padding is zero
    usual = nonzero.median() if nonzero.numel() else 0
    return not ((groups - groups[:, :1]).abs() > ROUNDING * (size[:, :1] + usual)).any()


def check_one_length(call: DenoiserCall, mask: torch.Tensor, architecture: Architecture) -> None:
    """Refuse prompts of several lengths where their masks [rows, T] are mixed up, or images begin behind them.

    Raises:
        ValueError: the lengths differ.
    """
    halves = mask.unflatten(0, (call.halves, -1))
    if (halves == halves[:, :1]).all():
        return
    each = architecture.per_prompt
    if architecture.trimmed is not None:
        reason = "the image's tokens follow its text at once here; give each prompt a call of its own."
    else:
        reason = (
            f"with {each} > 1, diffusers gives images the text masks of other prompts here (its PR #14147 describes "
            f"how); give each prompt a call of its own, or repeat it in the list of prompts, with {each}=1."
        )
    raise ValueError(f"NegToMe expected prompts of one length, got several: {reason}")
