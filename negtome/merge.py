"""The arithmetic of negative token merging: match each token to a reference token, then move away from it.

Source: arXiv 2412.01339. Pure torch; nothing here knows a model.

A token x whose nearest reference token (cosine similarity) is m, with a similarity above the threshold, becomes

    x + alpha * (x - m)

alpha > 0 pushes apart, alpha < 0 pulls together, alpha = 0 changes nothing.
"""

from __future__ import annotations

import torch

#: How a token finds the reference token it is pushed from; see `negative_merge`.
MATCHINGS = ("paper", "released")

#: Which images of a group an image is pushed from; see `push_groups`.
REFERENCES = ("first", "previous", "others")

#: Most elements of a similarity matrix that exist at once. Source tokens are processed in chunks below it (and never
#: fewer than one token per batch entry). 2**26 is 256 MiB in float32.
MAX_SIMILARITY_ELEMENTS = 2**26


def negative_merge(
    tokens: torch.Tensor,
    reference: torch.Tensor,
    *,
    alpha: float,
    threshold: float,
    matching: str = "paper",
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Push every token away from its most similar reference token (arXiv 2412.01339).

    Precision: tokens are normalised in float32; the matrix of similarities is computed in the tokens' dtype; the
    similarity of the match that was found is computed again in float32, and only this value meets the threshold.
    Ties go to the first reference token. In half precision, candidates closer than the dtype's rounding (0.1 % in
    float16, 0.8 % in bfloat16) are ties. The similarity of a token of length zero is 0.

    Args:
        tokens: [B, N, C] floating point, the tokens to move.
        reference: [M, C], or [B, M, C] for one reference per batch entry; dtype and device of `tokens`.
        alpha: strength and sign of the push, any finite number; at 0 the result is bit-identical to `tokens`.
        threshold: cosine similarity in [-1, 1] that a match must exceed; other tokens stay bit-identical.
        matching: "paper": the nearest reference token of every token. "released": what the authors' released code
            computes, where the maximum runs over the source tokens: token j is pushed from the reference token with
            the number of the source token that best matches reference token j. It needs M = N.
        mask: [M] bool, the reference tokens that may be matched; None for all. With matching="released" it selects
            the positions of `tokens` that may move instead, as the released code does.

    Returns:
        [B, N, C], the moved tokens; shape, dtype and device of `tokens`. The arguments are not modified.

    Raises:
        ValueError: if shapes, dtypes, devices or `matching` do not fit together.
    """
    reference = _check(tokens, reference, matching, mask)
    return _merge(tokens, reference, alpha, threshold, matching, mask)[0]


def push_groups(
    tokens: torch.Tensor, group_size: int, *, alpha: float, threshold: float, matching: str, reference: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Push the images of each group apart; groups never see each other.

    All references are the tokens as they came in, before any push: the images of a group move simultaneously.

    Args:
        tokens: [G * K, N, C] the tokens of G groups of K = `group_size` images, the images of a group contiguous.
        group_size: K, at least 2.
        alpha, threshold, matching: as in `negative_merge`; "released" needs reference="first".
        reference: what image k of a group is pushed from. "first": image 0, which itself stays as it is.
            "previous": the tokens of images 0 to k-1 together. "others": those of all other images together.

    Returns:
        The tokens after the push [G * K, N, C]; the float similarity of each match found [G, S]; and whether that
        token was above the threshold, bool [G, S]. S counts the source tokens of a group: K * N for "others",
        (K - 1) * N otherwise.
    """
    images = tokens.unflatten(0, (-1, group_size))  # [G, K, N, C]
    if reference == "first":
        pairs = [(images[:, 1:], images[:, :1])]
    elif reference == "previous":
        pairs = [(images[:, k : k + 1], images[:, :k]) for k in range(1, group_size)]
    elif reference == "others":
        pairs = [
            (images[:, k : k + 1], torch.cat([images[:, :k], images[:, k + 1 :]], dim=1)) for k in range(group_size)
        ]
    else:
        raise ValueError(f"reference must be one of {REFERENCES}, got {reference!r}.")

    moved = [] if reference == "others" else [images[:, :1]]
    similarities, pushes = [], []
    for source, target in pairs:  # [G, k, N, C], [G, k', N, C]
        result = push_from(source, target, alpha=alpha, threshold=threshold, matching=matching, mask=None)
        for found, value in zip((moved, similarities, pushes), result, strict=True):
            found.append(value)
    return torch.cat(moved, dim=1).flatten(0, 1), torch.cat(similarities, dim=1), torch.cat(pushes, dim=1)


def push_from(
    tokens: torch.Tensor,
    reference: torch.Tensor,
    *,
    alpha: float,
    threshold: float,
    matching: str,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Push images away from given ones.

    Args:
        tokens: [H, K, N, C] the tokens of K images in each of H halves of a batch.
        reference: [H, R, N, C] the tokens of R references in each half; all of them together are what an image is
            matched to. "released" needs R = 1.
        alpha, threshold, matching: as in `negative_merge`.
        mask: [R * N] bool, the reference tokens that may be matched, or None for all; see `negative_merge`.

    Returns:
        The tokens after the push [H, K, N, C]; the float similarity of each match found [H, K * N]; and whether that
        token was above the threshold, bool [H, K * N].
    """
    if matching == "released":  # its matching is between two images, so every image gets its own copy
        source, target = tokens.flatten(0, 1), reference.expand_as(tokens).flatten(0, 1)
    else:  # nearest neighbours: the images of a side are one long list of tokens
        source, target = tokens.flatten(1, 2), reference.flatten(1, 2)
    moved, similarity, pushed = _merge(source, target, alpha, threshold, matching, mask)
    return moved.view_as(tokens), similarity.view(len(tokens), -1), pushed.view(len(tokens), -1)


def _merge(
    tokens: torch.Tensor,
    reference: torch.Tensor,
    alpha: float,
    threshold: float,
    matching: str,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do the work of `negative_merge` on [B, N, C] and [B, M, C], unchecked.

    Returns:
        The moved tokens [B, N, C], the similarity [B, N] that met the threshold, and where it exceeded it, [B, N].
    """
    unit, length = _normalise(tokens)
    unit_reference, reference_length = _normalise(reference)

    if matching == "paper":
        index = _nearest_reference(unit, unit_reference, mask)  # [B, N] into M
        match = _take(reference, index)
        similarity = _cosine(tokens, match, length, _take(reference_length, index))
        allowed = None if mask is None else mask[index]
    else:
        index = _nearest_source(unit, unit_reference)  # [B, M] into N, read as an index into M all the same
        match = _take(reference, index)
        similarity = _cosine(_take(tokens, index), reference, _take(length, index), reference_length)
        allowed = mask

    pushed = similarity > threshold
    if allowed is not None:
        pushed = pushed & allowed
    if alpha != 0:  # 0 * inf is not 0, so 0 is not left to the arithmetic
        tokens = torch.where(pushed.unsqueeze(-1), torch.add(tokens, tokens - match, alpha=alpha), tokens)
    return tokens, similarity, pushed


def _nearest_reference(unit: torch.Tensor, unit_reference: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Find for every source token the most similar reference token: [B, N] indices into M."""
    indices = []
    for chunk in _chunks(unit, unit_reference):
        similarity = chunk @ unit_reference.mT  # [B, n, M]
        if mask is not None:
            similarity = similarity.masked_fill(~mask, -torch.inf)
        indices.append(similarity.argmax(dim=2))
    return indices[0] if len(indices) == 1 else torch.cat(indices, dim=1)


def _nearest_source(unit: torch.Tensor, unit_reference: torch.Tensor) -> torch.Tensor:
    """Find for every reference token the most similar source token: [B, M] indices into N."""
    best, index, start = None, None, 0
    for chunk in _chunks(unit, unit_reference):
        value, row = (chunk @ unit_reference.mT).max(dim=1)  # [B, M]
        if best is None:
            best, index = value, row
        else:
            better = value > best  # strictly, so that a tie stays with the earlier chunk
            best, index = torch.where(better, value, best), torch.where(better, row + start, index)
        start += chunk.shape[1]
    return index


def _chunks(unit: torch.Tensor, unit_reference: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split the source tokens [B, N, C] so that [B, n, M] stays within `MAX_SIMILARITY_ELEMENTS`."""
    B, M, _ = unit_reference.shape
    return unit.split(max(1, MAX_SIMILARITY_ELEMENTS // (B * M)), dim=1)


def _normalise(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale tokens to length 1, in their own dtype; return their lengths [B, N, 1] in float32 or better too."""
    precise = torch.promote_types(tokens.dtype, torch.float32)
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=precise)
    length = length.clamp_min(torch.finfo(precise).tiny)  # a token of length zero stays zero instead of NaN
    return (tokens / length).to(tokens.dtype), length


def _cosine(a: torch.Tensor, b: torch.Tensor, length_a: torch.Tensor, length_b: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of paired tokens [B, N, C], [B, N] in float32 or better, never above 1."""
    cosine = (a * (b / length_b)).sum(dim=-1) / length_a.squeeze(-1)  # dividing by a tensor of float32 promotes
    return cosine.clamp(-1, 1)  # so that a threshold of 1 is off, also for exact copies


def _take(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Read tokens [B, M, C] at index [B, N]: [B, N, C]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _check(tokens: torch.Tensor, reference: torch.Tensor, matching: str, mask: torch.Tensor | None) -> torch.Tensor:
    """Refuse arguments that do not fit together; return the reference as [B, M, C]."""
    if matching not in MATCHINGS:
        raise ValueError(f"matching must be one of {MATCHINGS}, got {matching!r}.")
    if tokens.dim() != 3 or not tokens.is_floating_point():
        raise ValueError(
            f"tokens must be floating point [B, N, C], got {tokens.dtype} {list(tokens.shape)}; "
            "add a batch dimension with tokens[None] where it is missing."
        )
    B, N, C = tokens.shape
    if reference.dim() == 2:
        reference = reference.expand(B, -1, -1)
    if reference.dim() != 3 or reference.shape[0] != B or reference.shape[2] != C or reference.shape[1] == 0:
        raise ValueError(
            f"reference must be [M, {C}] or [{B}, M, {C}] with M >= 1 to go with tokens {list(tokens.shape)}, "
            f"got {list(reference.shape)}."
        )
    if reference.dtype != tokens.dtype or reference.device != tokens.device:
        raise ValueError(
            f"reference must have the dtype and device of tokens, {tokens.dtype} on {tokens.device}, "
            f"got {reference.dtype} on {reference.device}; convert it with reference.to(tokens)."
        )
    M = reference.shape[1]
    if matching == "released" and M != N:
        raise ValueError(
            f'matching="released" indexes the reference by source positions, so it needs as many reference tokens '
            f'as tokens, {N}, got {M}; use matching="paper".'
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (M,) or mask.device != tokens.device):
        raise ValueError(
            f"mask must be bool [{M}] on {tokens.device}, one value per reference token, "
            f"got {mask.dtype} {list(mask.shape)} on {mask.device}."
        )
    return reference
