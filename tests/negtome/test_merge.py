"""The arithmetic, against hand-worked numbers, a transcription in loops, and facts about permutations."""

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from negtome import merge, negative_merge
from negtome.merge import push_from, push_groups

#: Reference and matching, as far as they go together.
WAYS = [("first", "paper"), ("first", "released"), ("previous", "paper"), ("others", "paper")]
PERMUTATION = [3, 0, 5, 1, 2, 4]
INVERSE = [1, 3, 4, 0, 5, 2]


def by_hand(tokens, reference, alpha, threshold, matching="paper", mask=None):
    """Transcribe the algorithm in loops: [N, C] and [M, C] in float64; no vectorised line, nothing shared."""
    N, M, C = len(tokens), len(reference), tokens.shape[1]
    x, y = tokens.double().tolist(), reference.double().tolist()

    def cosine(a, b):
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        lengths = (sum(p * p for p in a) * sum(q * q for q in b)) ** 0.5
        return dot / lengths if lengths else 0.0

    result = [list(row) for row in x]
    for n in range(N):
        if matching == "paper":
            candidates = [m for m in range(M) if mask is None or mask[m]]
            if not candidates:
                continue
            match = max(candidates, key=lambda m: cosine(x[n], y[m]))
            similarity = cosine(x[n], y[match])
        else:  # the source token most like reference token n, its number read as a reference token's
            match = max(range(N), key=lambda i: cosine(x[i], y[n]))
            similarity = cosine(x[match], y[n])
            if mask is not None and not mask[n]:
                continue
        if similarity > threshold:
            for c in range(C):
                result[n][c] = x[n][c] + alpha * (x[n][c] - y[match][c])
    return torch.tensor(result, dtype=torch.float64)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_three_tokens_by_hand():
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]])
    reference = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    # Token 0 matches reference 0 (similarity 1): [1, 0] + 0.5 ([1, 0] - [2, 0]) = [0.5, 0].
    # Token 1 matches reference 1 (similarity 1): [0, 2] + 0.5 ([0, 2] - [0, 1]) = [0, 2.5].
    # Token 2 has similarities 3/5 and 4/5, so reference 1: [3, 4] + 0.5 ([3, 4] - [0, 1]) = [4.5, 5.5].
    pushed = negative_merge(tokens, reference, alpha=0.5, threshold=0.7)
    torch.testing.assert_close(pushed, torch.tensor([[[0.5, 0.0], [0.0, 2.5], [4.5, 5.5]]]))
    # 4/5 does not exceed 0.85: token 2 stays, bit for bit.
    kept = negative_merge(tokens, reference, alpha=0.5, threshold=0.85)
    torch.testing.assert_close(kept[:, :2], pushed[:, :2])
    assert torch.equal(kept[:, 2], tokens[:, 2])
    # A negative alpha pulls towards the match: [3, 4] - 0.5 [3, 3] = [1.5, 2.5].
    pulled = negative_merge(tokens, reference, alpha=-0.5, threshold=0.7)
    torch.testing.assert_close(pulled[0, 2], torch.tensor([1.5, 2.5]))


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "n": st.integers(1, 9),
        "m": st.integers(1, 9),
        "channels": st.integers(2, 6),
        "alpha": st.floats(-2, 3),
        "threshold": st.floats(-1, 1),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
    }
)


@pytest.mark.parametrize("matching", ["paper", "released"])
@pytest.mark.parametrize("masked", [False, True])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=shapes)
def test_it_is_the_algorithm(case, matching, masked):
    m = case["n"] if matching == "released" else case["m"]
    tokens = random(2, case["n"], case["channels"], seed=case["seed"], dtype=case["dtype"])
    reference = random(2, m, case["channels"], seed=case["seed"] + 1, dtype=case["dtype"])
    mask = random(m, seed=case["seed"] + 2) > 0 if masked else None
    options = {"alpha": case["alpha"], "threshold": case["threshold"], "matching": matching, "mask": mask}
    copies = tokens.clone(), reference.clone()
    result = negative_merge(tokens, reference, **options)
    shared = negative_merge(tokens, reference[0], **options)
    assert result.dtype == tokens.dtype
    assert torch.equal(tokens, copies[0]) and torch.equal(reference, copies[1])
    for row in range(2):
        for moved, other in ((result, reference[row]), (shared, reference[0])):
            expected = by_hand(tokens[row], other, **options)
            torch.testing.assert_close(moved[row].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("matching", ["paper", "released"])
def test_half_precision_differs_by_rounding_only(dtype, matching):
    tokens, reference = random(2, 24, 64, dtype=dtype), random(2, 24, 64, seed=1, dtype=dtype)
    options = {"alpha": 0.9, "threshold": 0.2, "matching": matching}
    result = negative_merge(tokens, reference, **options)
    assert result.dtype is dtype
    precise = negative_merge(tokens.float(), reference.float(), **options)
    moved = (precise != tokens.float()).any(dim=-1)
    assert 0 < moved.sum() < moved.numel()
    torch.testing.assert_close(result.float(), precise, rtol=4 * torch.finfo(dtype).eps, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_released_code_uses_the_inverse_of_a_known_permutation(dtype):
    reference = random(6, 8, dtype=dtype)
    tokens = reference[PERMUTATION].unsqueeze(0)  # so the nearest reference token of token n is PERMUTATION[n]
    options = {"alpha": 1.0, "threshold": 0.5}
    # The paper: every token finds its copy, and moves away from it by nothing.
    assert torch.equal(negative_merge(tokens, reference, **options), tokens)
    # The release: reference token j is best matched by token INVERSE[j], and that number indexes the reference.
    released = negative_merge(tokens, reference, matching="released", **options)
    torch.testing.assert_close(released[0], 2 * tokens[0] - reference[INVERSE])
    assert (released != tokens).any(dim=-1).all()


@pytest.mark.parametrize("matching", ["paper", "released"])
def test_chunks_change_nothing_and_keep_every_matrix_below_the_bound(matching, monkeypatch):
    tokens, reference = random(3, 30, 16), random(3, 30, 16, seed=1)
    reference[:, 7] = reference[:, 3]  # ties: the first one, in whichever chunk
    tokens[:, 20] = tokens[:, 2]
    mask = torch.arange(30) % 5 > 0
    options = {"alpha": 0.9, "threshold": 0.3, "matching": matching, "mask": mask}
    whole = negative_merge(tokens, reference, **options)

    class Largest(TorchDispatchMode):
        elements, products = 0, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if function.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm):
                self.elements, self.products = max(self.elements, output.numel()), self.products + 1
            return output

    for bound in (3 * 30, 3 * 30 * 7, 3 * 30 * 29, 3 * 30 * 30):
        monkeypatch.setattr(merge, "MAX_SIMILARITY_ELEMENTS", bound)
        with Largest() as largest:
            assert torch.equal(negative_merge(tokens, reference, **options), whole)
        assert largest.elements <= bound
        assert largest.products == -(-30 // (bound // 90))


def test_a_masked_reference_token_is_never_matched():
    tokens, reference = random(2, 12, 8), random(12, 8, seed=1)
    mask = torch.arange(12) % 3 == 0
    options = {"alpha": 0.9, "threshold": 0.0}
    masked = negative_merge(tokens, reference, mask=mask, **options)
    torch.testing.assert_close(masked, negative_merge(tokens, reference[mask], **options))
    assert not torch.allclose(masked, negative_merge(tokens, reference, **options))
    nothing = torch.zeros(12, dtype=torch.bool)
    assert torch.equal(negative_merge(tokens, reference, alpha=0.9, threshold=-1, mask=nothing), tokens)


def test_a_mask_under_released_matching_selects_outputs():
    tokens, reference = random(2, 12, 8), random(12, 8, seed=1)
    mask = torch.arange(12) % 3 == 0
    options = {"alpha": 0.9, "threshold": -1.0, "matching": "released"}
    free, masked = (negative_merge(tokens, reference, mask=m, **options) for m in (None, mask))
    assert torch.equal(masked[:, mask], free[:, mask])
    assert torch.equal(masked[:, ~mask], tokens[:, ~mask])
    reference[1] = torch.inf  # which the mask leaves out
    _, similarity = push_from(tokens[:, None], reference.expand(2, 1, -1, -1), mask=mask, **options)
    assert torch.equal(similarity.isneginf(), ~mask.expand(2, 1, -1))


@pytest.mark.parametrize("matching", ["paper", "released"])
def test_alpha_zero_and_threshold_one_are_bit_identical(matching):
    tokens = random(2, 9, 8)
    tokens[0, 0, 0], tokens[0, 1, 1] = torch.inf, -0.0
    reference = tokens.flip(1).clone()
    for options in ({"alpha": 0.0, "threshold": -1}, {"alpha": 0.9, "threshold": 1}):
        result = negative_merge(tokens, reference, matching=matching, **options)
        assert torch.equal(result.view(torch.int32), tokens.view(torch.int32))


@pytest.mark.parametrize("matching", ["paper", "released"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tokens_of_length_zero_have_similarity_zero(matching, dtype):
    tokens, reference = random(1, 6, 8, dtype=dtype), random(1, 6, 8, seed=1, dtype=dtype)
    tokens[:, 2] = reference[:, 4] = 0
    options = {"alpha": 0.9, "threshold": -0.5, "matching": matching}
    result = negative_merge(tokens, reference, **options)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        result[0].double(), by_hand(tokens[0], reference[0], **options), rtol=tolerance, atol=tolerance
    )
    assert not torch.equal(result[0, 2], tokens[0, 2])  # 0 is above -0.5, and not above 0
    kept = negative_merge(torch.zeros_like(tokens), reference, alpha=0.9, threshold=0, matching=matching)
    assert torch.equal(kept, torch.zeros_like(tokens))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(4, 8)}, r"tokens must be floating point \[B, N, C\], got torch.float32 \[4, 8\]"),
        ({"tokens": torch.zeros(1, 4, 8, dtype=torch.int64)}, "got torch.int64"),
        ({"reference": torch.zeros(4, 7)}, r"reference must be \[M, 8\] or \[1, M, 8\]"),
        ({"reference": torch.zeros(2, 4, 8)}, r"got \[2, 4, 8\]"),
        ({"reference": torch.zeros(0, 8)}, "M >= 1"),
        ({"reference": torch.zeros(4, 8, dtype=torch.float64)}, r"reference.to\(tokens\)"),
        ({"alpha": math.nan}, "alpha must be a finite number, got nan"),
        ({"alpha": "0.9"}, "alpha must be a finite number, got '0.9'"),
        ({"alpha": 1e5, "tokens": torch.zeros(1, 4, 8).half(), "reference": torch.zeros(4, 8).half()}, "65504, got"),
        ({"threshold": 5}, "threshold must be between -1 and 1, got 5"),
        ({"threshold": torch.tensor(-1.5)}, "between -1 and 1, got -1.5"),
        ({"matching": "nearest"}, r"matching must be one of \('paper', 'released'\), got 'nearest'"),
        ({"matching": "released", "reference": torch.zeros(5, 8)}, "as many reference tokens as tokens, 4, got 5"),
        ({"mask": torch.ones(4)}, r"mask must be bool \[4\]"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, r"got torch.bool \[5\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    arguments = {"tokens": torch.zeros(1, 4, 8), "reference": torch.zeros(4, 8), "alpha": 0.9, "threshold": 0.7}
    with pytest.raises(ValueError, match=message):
        negative_merge(**{**arguments, **change})
    with pytest.raises(ValueError, match="reference must be one of"):
        push_groups(random(2, 3, 4), 2, alpha=0.9, threshold=0.3, matching="paper", reference="last")


@pytest.mark.parametrize(("reference", "matching"), WAYS)
def test_groups_are_the_algorithm_image_by_image(reference, matching):
    G, K, N = 2, 3, 10
    tokens = random(G * K, N, 16)
    result, similarity = push_groups(tokens, K, alpha=0.9, threshold=0.3, matching=matching, reference=reference)
    sources = K if reference == "others" else K - 1
    assert similarity.shape == (G, sources, N)
    for g in range(G):
        group = tokens[g * K : (g + 1) * K]
        moved = 0
        for k in range(K):
            others = {"first": [0], "previous": range(k), "others": [i for i in range(K) if i != k]}[reference]
            expected = group[k].double()
            if k > 0 or reference == "others":
                expected = by_hand(group[k], torch.cat([group[i] for i in others]), 0.9, 0.3, matching)
            torch.testing.assert_close(result[g * K + k].double(), expected, rtol=1e-5, atol=1e-5)
            moved += (expected != group[k].double()).any(dim=-1).sum()
        assert 0 < moved < sources * N
        if matching == "paper":  # the released index may hit a token's own copy
            assert (similarity[g] > 0.3).sum() == moved


batches = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "groups": st.integers(1, 3),
        "size": st.integers(2, 4),
        "n": st.integers(1, 9),
        "text": st.integers(0, 3),
        "channels": st.integers(4, 16),
        "alpha": st.sampled_from([-0.9, -0.5, -0.3, 0.3, 0.5, 0.9, 1.8]),
        "threshold": st.floats(-0.5, 0.8),
        "bound": st.integers(1, 200),
        "dtype": st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
        "way": st.sampled_from(WAYS),
    }
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=batches)
def test_behind_text_and_in_chunks_groups_are_pushed_alike(case):
    """Whatever the shape, the strides (text in front), the dtype and the bound on the matrices, to the last bit."""
    reference, matching = case["way"]
    options = {key: case[key] for key in ("alpha", "threshold")} | {"reference": reference, "matching": matching}
    rows, text = case["groups"] * case["size"], case["text"]
    features = random(rows, text + case["n"], case["channels"], seed=case["seed"], dtype=case["dtype"])
    expected, similarity = push_groups(features[:, text:].clone(), case["size"], **options)
    given = features.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "MAX_SIMILARITY_ELEMENTS", case["bound"])
        result, chunked = push_groups(given[:, text:], case["size"], **options)
    # The order of a product's sums may depend on its shape: where two reference tokens are that near, either may win.
    close = {"rtol": 8 * torch.finfo(case["dtype"]).eps, "atol": 8 * torch.finfo(case["dtype"]).eps}
    torch.testing.assert_close(chunked, similarity.to(chunked), **close)
    differs = (result != expected).any(dim=-1).float().mean()
    assert differs == 0 if case["dtype"] is torch.float32 else differs < 0.2
    assert torch.equal(given, features), "it wrote to what it was given"


@pytest.mark.parametrize(("reference", "matching"), WAYS)
def test_groups_are_differentiable_in_all_their_images(reference, matching):
    """The match is a choice and has no gradient, but both the token and what it is pushed from have theirs."""
    tokens = random(6, 4, 5, dtype=torch.float64).requires_grad_()
    options = {"alpha": 0.9, "threshold": 0.1, "matching": matching, "reference": reference}
    assert torch.autograd.gradcheck(lambda x: push_groups(x, 3, **options)[0], tokens)
    assert not push_groups(tokens, 3, **options)[1].requires_grad
    tokens, other = (random(2, 5, 4, seed=s, dtype=torch.float64).requires_grad_() for s in (0, 1))
    options = {"alpha": 0.9, "threshold": 0.1, "matching": matching}
    assert torch.autograd.gradcheck(lambda x, y: negative_merge(x, y, **options), (tokens, other))


@pytest.mark.slow
@pytest.mark.parametrize(("reference", "matching"), WAYS)
def test_it_is_one_graph(reference, matching):
    options = {"alpha": 0.9, "threshold": 0.1, "matching": matching, "reference": reference}
    tokens = random(8, 6, 5)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(lambda x: push_groups(x, 4, **options), fullgraph=True, backend="eager")
        result, similarity = compiled(tokens.clone())
        expected = push_groups(tokens.clone(), 4, **options)
    assert torch.equal(result, expected[0]) and torch.equal(similarity, expected[1])


@pytest.mark.parametrize(("reference", "matching"), WAYS)
def test_under_autocast_products_are_less_precise_and_tokens_keep_their_dtype(reference, matching):
    tokens = random(4, 12, 32)
    options = {"alpha": 0.9, "threshold": -1.0, "matching": matching, "reference": reference}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, _ = push_groups(tokens.clone(), 4, **options)
    expected, _ = push_groups(tokens.clone(), 4, **options)
    assert result.dtype is torch.float32
    assert ((result - expected).abs().amax(dim=-1) < 1e-5).float().mean() > 0.8, "another match, where two are as near"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("reference", "matching"), WAYS)
def test_no_value_is_read_back_from_the_device(reference, matching, dtype):
    """On the device that has shapes and no values, whatever waits for a value fails; and nothing is made elsewhere."""
    features = torch.empty(8, 3 + 256, 16, dtype=dtype, device="meta")
    for rows in (4, 8):
        options = {"alpha": 0.9, "threshold": 0.1, "matching": matching, "reference": reference}
        result, similarity = push_groups(features[:rows, 3:], 4, **options)
        sources = 4 if reference == "others" else 3
        assert (result.shape, result.dtype, result.device.type) == ((rows, 256, 16), dtype, "meta")
        assert (similarity.shape, similarity.dtype) == ((rows // 4, sources, 256), torch.float32)
        assert similarity.device.type == "meta"


@pytest.mark.parametrize("bound", [1000, merge.MAX_SIMILARITY_ELEMENTS])
def test_tensors_are_made_where_the_tokens_are(bound, monkeypatch):
    """Not on the default device of whoever calls."""
    monkeypatch.setattr(merge, "MAX_SIMILARITY_ELEMENTS", bound)
    tokens = random(4, 256, 8)
    options = {"alpha": 0.9, "threshold": 0.1, "matching": "paper", "reference": "first"}
    with torch.device("meta"):
        result, _ = push_groups(tokens.clone(), 2, **options)
    assert torch.equal(result, push_groups(tokens.clone(), 2, **options)[0])


@pytest.mark.parametrize("matching", ["paper", "released"])
def test_of_many_chunks_one_matrix_is_there_at_a_time(matching, monkeypatch):
    tokens, reference, made = random(1, 3, 64, 8), random(1, 1, 64, 8, seed=1), []
    bmm = torch.bmm

    def noting(*factors):
        assert all(product() is None for product in made)
        result = bmm(*factors)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(torch, "bmm", noting)
    monkeypatch.setattr(merge, "MAX_SIMILARITY_ELEMENTS", 3 * 64 * 10)
    push_from(tokens, reference, alpha=0.9, threshold=0.1, matching=matching, mask=None)
    assert len(made) > 5


def test_chunks_with_separate_references_are_pushed_one_by_one():
    tokens, reference = random(2, 3, 10, 8), random(2, 2, 7, 8, seed=1)
    mask = torch.arange(14) % 4 > 0
    options = {"alpha": 0.9, "threshold": 0.1, "matching": "paper", "mask": mask}
    result, similarity = push_from(tokens.clone(), reference, **options)
    assert similarity.shape == (2, 3, 10)
    for half in range(2):
        for image in range(3):
            expected = by_hand(tokens[half, image], reference[half].flatten(0, 1), 0.9, 0.1, mask=mask)
            torch.testing.assert_close(result[half, image].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("reference", ["first", "previous", "others"])
def test_a_token_that_is_not_finite_harms_no_other(bad, reference):
    """As if it were not there: nothing is matched to it, and it does not move."""
    tokens = random(6, 5, 8)
    tokens[0, 2, 3] = bad
    options = {"alpha": 0.9, "threshold": 0.1, "matching": "paper", "reference": reference}
    result, similarity = push_groups(tokens.clone(), 3, **options)
    sound = torch.ones(6, 5, dtype=torch.bool)
    sound[0, 2] = False
    assert torch.equal(result.isfinite().all(dim=-1), sound)
    other = tokens.clone()
    other[0, 2] = 0  # similar to nothing
    expected, _ = push_groups(other, 3, **options)
    assert torch.equal(result[sound], expected[sound])
    assert (similarity[1] > 0.1).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_reference_token_that_is_not_finite_is_the_match_of_those_unlike_all_others(bad):
    reference = torch.tensor([[1.0, 0.1], [bad, 1.0], [1.0, -0.1]])
    tokens = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.1, 1.0], [0.0, bad]]])
    for threshold in (-1.0, 0.0, 0.5):
        result = negative_merge(tokens, reference, alpha=0.5, threshold=threshold)
        sound = negative_merge(tokens[:, [0, 2]], reference[[0, 2]], alpha=0.5, threshold=threshold)
        assert torch.equal(result[:, [0, 2]], sound)
        assert not result[0, 1].isfinite().all() and not result[0, 3].isfinite().all()


def test_tokens_too_short_to_be_squared_have_similarity_zero():
    tokens, reference = random(1, 4, 8), random(3, 8, seed=1)
    reference[1] = 1e-25 * tokens[0, 0]
    assert torch.equal(
        negative_merge(tokens, reference, alpha=0.9, threshold=0.01),
        negative_merge(tokens, reference * torch.tensor([1.0, 0.0, 1.0])[:, None], alpha=0.9, threshold=0.01),
    )
