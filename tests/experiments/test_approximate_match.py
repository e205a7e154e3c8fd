"""Approximate matches against naive loops and closed forms; and on tiny pipelines."""

import math

import numpy as np
import pytest
import torch
from test_methods import CALLS, PAIR

from experiments.methods.approximate_match import ApproximateMatch, ApproximatePush, gaussian_projection, nearest
from experiments.methods.negtome import NegToMe
from negtome.merge import push_groups

K = 3
ALPHA, THRESHOLD = 0.9, 0.3
CONFIG = {"alpha": 0.9, "threshold": -1.0, "timestep_range": [0, 1000], "min_side": 4}


def features(n_tokens, channels=8, groups=2, seed=0):
    """Tokens of groups of K images, of which some have a similarity above the threshold and some do not."""
    return torch.randn(groups * K, n_tokens, channels, generator=torch.Generator().manual_seed(seed))


def exact_push(tokens):
    return push_groups(tokens, K, alpha=ALPHA, threshold=THRESHOLD, matching="paper", reference="first")[0]


def push_of(**options):
    push = ApproximatePush(ALPHA, THRESHOLD, **options)
    return push, lambda site, tokens: push(site, tokens, exact_push(tokens), K)


def naive_matches(tokens):
    """Match token by token: {(row, token): (row of the first image, matched token, cosine)}."""
    found = {}
    for row in range(len(tokens)):
        first = row - row % K
        for n, token in enumerate(tokens[row].double()):
            cosines = [float(token @ other / token.norm() / other.norm()) for other in tokens[first].double()]
            if row != first:
                found[row, n] = (first, int(np.argmax(cosines)), max(cosines))
    return found


def naive_push(tokens, matches):
    pushed = tokens.clone()
    for (row, n), (first, m, cosine) in matches.items():
        if cosine > THRESHOLD:
            pushed[row, n] = tokens[row, n] + ALPHA * (tokens[row, n] - tokens[first, m])
    return pushed


def count_equal(matches, others):
    return sum(matches[key][1] == others[key][1] for key in matches)


# --- the projection ---------------------------------------------------------------------------------------------------


def test_an_orthogonal_projection_to_all_channels_keeps_every_match():
    tokens, reference = features(20, seed=1), features(20, seed=2)
    orthogonal = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))[0]
    exact, projected = nearest(tokens, reference), nearest(tokens, reference, orthogonal)
    assert torch.equal(projected.index, exact.index)
    torch.testing.assert_close(projected.similarity, exact.similarity)
    # A projection to one channel keeps the sign of a token alone.
    assert not torch.equal(nearest(tokens, reference, orthogonal[:, :1]).index, exact.index)


@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("channels", "dim"), [(96, 64), (1280, 64), (192, 128)])
def test_the_error_of_a_projected_cosine_depends_on_the_width_of_the_projection_alone(channels, dim, cosine):
    one, other = features(1000, channels, groups=1, seed=4)[:2].double()
    one = one / one.norm(dim=-1, keepdim=True)
    other = other - (one * other).sum(dim=-1, keepdim=True) * one
    other = cosine * one + math.sqrt(1 - cosine**2) * other / other.norm(dim=-1, keepdim=True)
    projection = gaussian_projection(channels, dim, 0).double()
    projected = nearest(one.unsqueeze(1), other.unsqueeze(1), projection).similarity
    assert projected.mean() == pytest.approx(cosine, abs=0.02)
    # One matrix for all pairs: with few channels the pairs are not independent.
    assert projected.std() == pytest.approx((1 - cosine**2) / math.sqrt(dim), rel=0.25)


def test_projected_matches_are_those_of_naive_loops_and_move_the_full_features():
    tokens = features(11, channels=24)
    push, pushed = push_of(projection_dim=4, seed=5)
    matches = naive_matches(tokens @ gaussian_projection(24, 4, 5))
    torch.testing.assert_close(pushed("a", tokens), naive_push(tokens, matches))
    statistics = push.statistics()
    assert statistics["approximate_matches"] == len(matches)
    assert statistics["equal_matches"] == count_equal(matches, naive_matches(tokens)) < len(matches)
    assert statistics["tokens_pushed"] == sum(cosine > THRESHOLD for _, _, cosine in matches.values())
    # Another seed draws another projection; the same seed draws the same one again.
    assert torch.equal(push_of(projection_dim=4, seed=5)[1]("a", tokens), pushed("b", tokens))
    assert not torch.equal(push_of(projection_dim=4, seed=6)[1]("a", tokens), pushed("b", tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_projection_keeps_the_type_and_what_is_not_moved(dtype):
    tokens = features(11, channels=24).to(dtype)
    result = push_of(projection_dim=4)[1]("a", tokens)
    assert result.dtype is dtype and result.shape == tokens.shape
    still = (result == tokens).all(dim=-1)
    assert still[::K].all() and 0 < still[1::K].float().mean() < 1


# --- one match for several hook points --------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [1, 2, 3, 9])
def test_a_match_is_reused_as_by_naive_loops(reuse):
    """Seven hook points, the last three of another size, in two calls of the denoiser."""
    sizes = [6, 6, 6, 6, 9, 9, 9]
    push, pushed = push_of(reuse_sites=reuse)
    approximate = equal = moved = 0
    for call in range(2):
        for start in (0, 4):
            for number in range(start, start + sizes.count(sizes[start])):
                tokens = features(sizes[number], groups=1, seed=10 * call + number)
                exact = naive_matches(tokens)
                if (number - start) % reuse == 0:
                    matches = exact
                else:
                    approximate, equal = approximate + len(exact), equal + count_equal(matches, exact)
                moved += sum(cosine > THRESHOLD for _, _, cosine in matches.values())
                torch.testing.assert_close(pushed(f"site {number}", tokens), naive_push(tokens, matches))
    expected = {"tokens_pushed": moved, "approximate_matches": approximate, "equal_matches": equal}
    assert push.statistics() == expected
    assert (approximate == 0) == (reuse == 1) and (reuse == 1 or equal < approximate)


def test_a_match_for_one_hook_point_is_the_exact_push_bit_for_bit():
    _, pushed = push_of(reuse_sites=1)
    for number in range(3):
        tokens = features(12, seed=number)
        assert torch.equal(pushed(f"site {number}", tokens), exact_push(tokens))


def test_hook_points_with_equal_features_lose_nothing_by_one_match():
    tokens = features(12)
    push, pushed = push_of(reuse_sites=4)
    results = [pushed(f"site {number}", tokens) for number in range(4)]
    torch.testing.assert_close(torch.stack(results), exact_push(tokens).expand(4, -1, -1, -1))
    statistics = push.statistics()
    assert statistics["equal_matches"] == statistics["approximate_matches"] == 3 * 2 * (K - 1) * 12


def test_the_first_match_of_a_call_is_never_that_of_the_call_before():
    """Also where the last hook points of a call did not use the match as often as allowed."""
    _, pushed = push_of(reuse_sites=100)
    for seed in range(3):
        pushed("only", features(12, seed=seed))
        tokens = features(12, seed=seed + 50)
        assert torch.equal(pushed("only", tokens), exact_push(tokens))


@pytest.mark.parametrize("strength", [(0.0, THRESHOLD), (ALPHA, 1.0)])
def test_without_a_push_nothing_moves(strength):
    tokens = features(12)
    push = ApproximatePush(*strength, reuse_sites=2, projection_dim=2)
    for site in ("a", "b"):
        assert push(site, tokens, tokens, K) is tokens
    assert set(push.statistics().values()) == {0}


# --- the method -------------------------------------------------------------------------------------------------------


def test_on_a_pipeline_one_hook_point_per_match_gives_negtomes_images(kind, pipe):
    variants = [{}, {"reuse_sites": 2}, {"projection_dim": 2}, {"projection_dim": 2, "seed": 1}]
    expected = NegToMe("n", **CONFIG).generate(pipe, PAIR, CALLS[kind])
    exact, *others = (ApproximateMatch("m", **CONFIG, **one).generate(pipe, PAIR, CALLS[kind]) for one in variants)
    assert np.array_equal(exact.images, expected.images)
    assert exact.statistics == expected.statistics | {"approximate_matches": 0, "equal_matches": 0}
    assert len({result.images.tobytes() for result in (exact, *others)}) == 4
    for result in others:
        assert np.array_equal(result.images[0], expected.images[0]), "the first image does not move"
        assert 0 < result.statistics["equal_matches"] < result.statistics["approximate_matches"]
    compared = expected.statistics["tokens_compared"]
    reused, projected, _ = (result.statistics["approximate_matches"] for result in others)
    assert 0 < reused < compared == projected


def test_every_setting_is_part_of_the_identity():
    variants = [{}, {"reuse_sites": 2}, {"projection_dim": 64}, {"seed": 1}]
    settings = [ApproximateMatch("m", **CONFIG, **one).settings() for one in variants]
    assert len({str(one) for one in settings}) == 4
    assert settings[0].items() >= NegToMe("m", **CONFIG).settings().items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reuse_sites": 0}, r"method\.reuse_sites must be a whole number of at least 1, got 0 hook points"),
        ({"reuse_sites": 2.0}, r"method\.reuse_sites must be a whole number"),
        (
            {"projection_dim": 0},
            r"method\.projection_dim must be a whole number .* got 0 channels, or null",
        ),
        ({"projection_dim": True}, r"method\.projection_dim must be a whole number"),
        ({"seed": -1}, r"method\.seed must be a whole number"),
        ({"matching": "released"}, 'method=m needs matching="paper" and reference="first"'),
        ({"reference": "others"}, 'method=m needs matching="paper" and reference="first"'),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ApproximateMatch("m", **options)
