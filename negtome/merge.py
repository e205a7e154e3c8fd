"""The arithmetic of negative token merging: match each token to a reference token, then move away from it.

Source: arXiv 2412.01339. Pure torch, independent of any model.

A token x whose nearest reference token (cosine similarity) is m, with a similarity above the threshold, becomes

    x + alpha * (x - m)

alpha > 0 pushes apart, alpha < 0 pulls together, alpha = 0 changes nothing.

The cost is about one matrix product. Cosines are compared only with others of the same token, so only one side of the
product is normalised. Its largest element, divided by the token's length, is compared with the threshold. One
interpolation with a weight of -alpha or 0 moves the tokens. Nothing waits for the device, and torch.compile makes one
graph of it.
"""

from typing import Literal, TypedDict, get_args

import torch

from negtome.validation import check_float

#: How a token finds the reference token it is pushed from; see `negative_merge`.
Matching = Literal["paper", "released"]
MATCHINGS = get_args(Matching)

#: Which images of a group an image is pushed from; see `push_groups`.
GroupReference = Literal["first", "previous", "others"]
REFERENCES = get_args(GroupReference)


class Strength(TypedDict):
    """How far a token moves and when; see `negative_merge`."""

    alpha: float
    threshold: float
    matching: Matching


#: Lower bound of lengths: a token of length zero gets similarity 0 instead of NaN, also where squares underflow.
_SHORTEST = {dtype: 10 * torch.finfo(dtype).tiny ** 0.5 for dtype in (torch.float32, torch.float64)}


#: Most elements of a similarity matrix at a time; source tokens are processed in chunks below it (at least one token
#: per batch entry). 2**24 is 64 MiB in float32, and no slower than larger chunks.
MAX_SIMILARITY_ELEMENTS = 2**24


def negative_merge(
    tokens: torch.Tensor,
    reference: torch.Tensor,
    *,
    alpha: float,
    threshold: float,
    matching: Matching = "paper",
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Push every token away from its most similar reference token (arXiv 2412.01339).

    Precision: lengths are float32 (float64 for float64). Cosines are computed in the tokens' dtype, with one side
    rounded to it after normalisation, and the one that meets the threshold is rounded to it too: to 0.05 % in float16
    and 0.4 % in bfloat16. Reference tokens closer than that to the most similar one are ties, and ties go to the
    first. alpha is rounded to the tokens' dtype, 0.9 to 0.8984 in bfloat16; the push itself is computed in float32 or
    better and rounded once. In float16 the product of a token with a unit vector must stay below 65504, and tokens
    shorter than 1e-4 are compared less precisely. The similarity of a token of length zero is 0.

    Tokens that are not finite stay so. With matching="paper" such a reference token has a similarity of 0 to all
    tokens: those that it matches come out as not finite, whatever the threshold. With "released", those whose position
    leads to it may too.

    Args:
        tokens: [B, N, C] floating point, the tokens to move.
        reference: [M, C], or [B, M, C] for one reference per batch entry; dtype and device of `tokens`.
        alpha: strength and sign of the push, finite in the tokens' dtype; at 0 the result is bit-identical to `tokens`.
        threshold: cosine similarity in [-1, 1] that a match must exceed; 1 is off, and then the result is
            bit-identical. Otherwise, tokens that do not move keep their value exactly, as long as all are finite.
        matching: "paper": the nearest reference token of every token. "released": what the authors' released code
            computes, where the maximum runs over the source tokens: token j is pushed from the reference token with
            the number of the source token that best matches reference token j. It needs M = N.
        mask: [M] bool, the reference tokens that may be matched; None for all. With matching="released" it selects
            the positions of `tokens` that may move instead, as the released code does.

    Returns:
        [B, N, C], the moved tokens; shape, dtype and device of `tokens`. The arguments are not modified.

    Raises:
        ValueError: if shapes, dtypes, devices or `matching` do not fit together, or a number is out of range.
    """
    _check(tokens, reference, matching, mask)
    largest = torch.finfo(tokens.dtype).max
    alpha, threshold = check_float("alpha", alpha, -largest, largest), check_float("threshold", threshold, -1, 1)
    strength = Strength(alpha=alpha, threshold=threshold, matching=matching)
    if reference.dim() == 2:  # as several images with one reference
        return push_from(tokens.unsqueeze(0), reference[None, None], mask=mask, **strength)[0].squeeze(0)
    return push_from(tokens.unsqueeze(1), reference.unsqueeze(1), mask=mask, **strength)[0].squeeze(1)


def push_groups(
    tokens: torch.Tensor,
    group_size: int,
    *,
    alpha: float,
    threshold: float,
    matching: Matching,
    reference: GroupReference,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Push the images of each group apart; groups never see each other.

    All references are the tokens as they came in, before any push: the images of a group move simultaneously.

    Args:
        tokens: [G * K, N, C] the tokens of G groups of K = `group_size` images, the images of a group contiguous.
        group_size: K, at least 2.
        alpha, threshold, matching: as in `negative_merge`; "released" needs reference="first".
        reference: what image k of a group is pushed from. "first": image 0, which itself stays as it is.
            "previous": the tokens of images 0 to k-1 together. "others": those of all other images together.

    Returns:
        The tokens after the push [G * K, N, C], `tokens` itself where none can move; and the similarity that met the
        threshold [G, J, N], of float32 or better, where J counts the images of a group that can move: K for "others",
        K - 1 otherwise.
    """
    images = tokens.view(-1, group_size, *tokens.shape[1:])  # [G, K, N, C]
    length = _length(_detached(images))  # [G, K, N, 1]
    if reference == "first":
        moving, targets = images[:, 1:], images[:, :1]
        lengths = length[:, 1:], length[:, :1]
        product, scale, index = _match(_detached(moving), _detached(targets), *lengths, matching)
    elif reference == "previous":
        moving, targets, scale = images[:, 1:], images, length[:, 1:]
        product, index = _match_previous(_detached(images), length)
    elif reference == "others":
        moving, targets, scale = images, images, length
        product, index = _match_others(_detached(images), length)
    else:
        raise ValueError(f"reference must be one of {REFERENCES}, got {reference!r}.")
    moved, similarity = _move(moving, targets, product, scale, index, alpha, threshold)
    if moved is moving:
        return tokens, similarity
    if reference != "others":
        moved = torch.cat([images[:, :1], moved], dim=1)
    return moved.flatten(0, 1), similarity


def push_from(
    tokens: torch.Tensor,
    reference: torch.Tensor,
    *,
    alpha: float,
    threshold: float,
    matching: Matching,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Push images away from references.

    Args:
        tokens: [H, K, N, C] the tokens of K images in each of H chunks of a batch.
        reference: [H, R, M, C] the tokens of R references in each chunk; every image is matched to all of them
            together. "released" needs R = 1 and M = N.
        alpha, threshold, matching: as in `negative_merge`.
        mask: [R * M] bool, the reference tokens that may be matched, or None for all; see `negative_merge`.

    Returns:
        The tokens after the push [H, K, N, C], `tokens` itself where none can move; and the similarity that met the
        threshold [H, K, N], of float32 or better, -inf where the mask allows no match.
    """
    source, target = _detached(tokens), _detached(reference)
    product, scale, index = _match(source, target, _length(source), _length(target), matching, mask)
    still = ~mask.unsqueeze(-1) if mask is not None and matching == "released" else None
    return _move(tokens, reference, product, scale, index, alpha, threshold, still)


def cannot_move(alpha: float, threshold: float) -> bool:
    """Tell whether a strength and a threshold leave every token as it is.

    Arithmetic cannot: 0 * inf is not 0, and rounding may lift the cosine of a copy above 1.
    """
    return alpha == 0 or threshold >= 1


def _detached(tokens: torch.Tensor) -> torch.Tensor:
    """Detach tokens for matching: a match is a choice and has no gradient."""
    return tokens.detach() if tokens.requires_grad else tokens


def _move(
    tokens: torch.Tensor,
    reference: torch.Tensor,
    product: torch.Tensor,
    length: torch.Tensor,
    index: torch.Tensor,
    alpha: float,
    threshold: float,
    still: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move tokens [H, K, N, C] away from the reference tokens [H, R, M, C] that were found for them.

    Args:
        product: similarities times a length, [H, K, N, 1].
        length: this length, of float32 or better, [H, K, N, 1] or [H, 1, N, 1].
        index: matched reference tokens, as indices among the R * M of a chunk; H * K * N in the order of the tokens.
        still: [N, 1] bool, tokens that never move; None if all may.

    Returns:
        As of `push_from`.
    """
    similarity = product / length
    if still is not None:
        similarity.masked_fill_(still, -torch.inf)
    if cannot_move(alpha, threshold):
        return tokens, similarity.squeeze(-1)
    match = _take(reference, index, tokens.shape)
    weight = (similarity > threshold).to(tokens.dtype).mul_(-alpha)
    return tokens.lerp(match, weight), similarity.squeeze(-1)  # x + weight (match - x) in one pass


def _match(
    tokens: torch.Tensor,
    reference: torch.Tensor,
    length: torch.Tensor,
    reference_length: torch.Tensor,
    matching: Matching,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Match tokens [H, K, N, C] with reference tokens [H, R, M, C], given the lengths [..., 1] of both.

    Returns:
        The product, the length in it and the index, as `_move` takes them.
    """
    if matching == "released":
        product, index = _nearest_source(_unit(tokens, length), reference.squeeze(1))
        return product.unsqueeze(-1), reference_length, index
    H, K, N, _ = tokens.shape
    target, forbidden = _unit(reference, reference_length).flatten(1, 2), None if mask is None else ~mask
    if H > 1 or tokens.stride(1) == N * tokens.stride(2):
        source = tokens.flatten(1, 2)  # a view; a copy where text stands between images and there are several halves
    else:
        source, target = tokens[0], target.expand(K, -1, -1)
    product, index = _largest_products(source, target, forbidden)
    return product.view(H, K, N, 1), length, index


def _match_previous(images: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Match the tokens of image k > 0 in [G, K, N, C] with those of images 0 to k-1: product and index for `_move`."""
    unit = _unit(images[:, :-1], length[:, :-1])
    matches = [_largest_products(images[:, k], unit[:, :k].flatten(1, 2)) for k in range(1, images.shape[1])]
    product, index = (torch.stack(parts, dim=1) for parts in zip(*matches, strict=True))
    return product.unsqueeze(-1), index


def _match_others(images: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Match the tokens of each image in [G, K, N, C] with those of all the others: product and index for `_move`."""
    K, N = images.shape[1:3]
    unit = _unit(images, length)
    others, matches = unit[:, 1:].clone(), []
    for k in range(K):
        product, index = _largest_products(images[:, k], others.flatten(1, 2))
        matches.append((product, torch.where(index >= k * N, index + N, index)))  # `others` skips image k
        if k < K - 1:
            others[:, k] = unit[:, k]  # replaces image k + 1
    product, index = (torch.stack(parts, dim=1) for parts in zip(*matches, strict=True))
    return product.unsqueeze(-1), index


def _nearest_source(unit: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find for every reference token [H, M, C] the most similar token of each image [H, K, N, C] of unit tokens.

    Returns:
        The product with it, in the tokens' dtype, and its number in N; both [H, K, M].
    """
    (H, K, N, _), M = unit.shape, reference.shape[1]
    if (chunks := _chunks(reference, K * N)) is not None:
        return _join([_nearest_source(unit, chunk) for chunk in chunks], dim=2)
    product = torch.bmm(reference, unit.flatten(1, 2).mT)  # [H, M, K * N]
    value, index = product.view(H, M * K, N).max(dim=-1)
    return value.view(H, M, K).mT, index.view(H, M, K).mT


def _largest_products(
    source: torch.Tensor, target: torch.Tensor, forbidden: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the largest product of every row of source [B, n, C] with a row of target [B, M, C].

    Args:
        forbidden: [M] bool, rows of the target that are left out; where all are, the product is -inf.

    Returns:
        The product and the number of the row, both [B, n].
    """
    if (chunks := _chunks(source, target.shape[1])) is not None:
        return _join([_largest_products(chunk, target, forbidden) for chunk in chunks], dim=1)
    product = torch.bmm(source, target.mT)  # [B, n, M]
    if forbidden is not None:
        product.masked_fill_(forbidden, -torch.inf)
    return product.max(dim=-1)


def _chunks(source: torch.Tensor, columns: int) -> tuple[torch.Tensor, ...] | None:
    """Split the rows of source [B, n, C] so that a matrix [B, n, columns] stays within `MAX_SIMILARITY_ELEMENTS`.

    Returns:
        The parts; None if there would be one.
    """
    rows = max(1, MAX_SIMILARITY_ELEMENTS // (source.shape[0] * columns))
    return torch.split(source, rows, dim=1) if rows < source.shape[1] else None


def _join(parts: list[tuple[torch.Tensor, torch.Tensor]], dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = zip(*parts, strict=True)
    return torch.cat(values, dim=dim), torch.cat(indices, dim=dim)


def _length(tokens: torch.Tensor) -> torch.Tensor:
    """Measure tokens [..., C]: their lengths [..., 1], of float32 or better, and never 0."""
    precise = torch.float64 if tokens.dtype is torch.float64 else torch.float32
    length: torch.Tensor = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=precise)
    return length.clamp_min_(_SHORTEST[precise])


def _unit(tokens: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Scale tokens [..., C] to length 1, in their own dtype. Tokens that are not finite become 0.

    A NaN would be the maximum of every product.
    """
    if tokens.dtype is length.dtype:
        unit = tokens / length
    else:  # `out` avoids a float32 copy
        unit = torch.div(tokens, length, out=tokens.new_empty(tokens.shape))
    return unit.nan_to_num_(0.0, 0.0, 0.0)


def _take(tokens: torch.Tensor, index: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Read tokens [H, R, M, C] at an index of H * K * N numbers below R * M, in the `shape` [H, K, N, C]."""
    H, C = len(tokens), tokens.shape[-1]
    if H > 1:
        return tokens.flatten(1, 2).gather(1, index.reshape(H, -1, 1).expand(-1, -1, C)).view(shape)
    return tokens.flatten(0, 2).index_select(0, index.reshape(-1)).view(shape)


def _check(tokens: torch.Tensor, reference: torch.Tensor, matching: Matching, mask: torch.Tensor | None) -> None:
    """Refuse arguments that do not fit together."""
    if matching not in MATCHINGS:
        raise ValueError(f"matching must be one of {MATCHINGS}, got {matching!r}.")
    if tokens.dim() != 3 or not tokens.is_floating_point():
        raise ValueError(
            f"tokens must be floating point [B, N, C], got {tokens.dtype} {list(tokens.shape)}; "
            "add a batch dimension with tokens[None] where it is missing."
        )
    B, N, C = tokens.shape
    M = reference.shape[-2] if reference.dim() in (2, 3) else 0
    if M == 0 or reference.shape not in ((M, C), (B, M, C)):
        raise ValueError(
            f"reference must be [M, {C}] or [{B}, M, {C}] with M >= 1 to go with tokens {list(tokens.shape)}, "
            f"got {list(reference.shape)}."
        )
    if reference.dtype != tokens.dtype or reference.device != tokens.device:
        raise ValueError(
            f"reference must have the dtype and device of tokens, {tokens.dtype} on {tokens.device}, "
            f"got {reference.dtype} on {reference.device}; convert it with reference.to(tokens)."
        )
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
