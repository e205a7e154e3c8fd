"""From the values of groups to a number, and how sure it is: bootstrap intervals, alone and paired between two methods.

All of it needs only what is in a result file. Every aggregate is a mean, of groups' values or of categories' entropies:
what it is a mean of is what can be resampled and paired. What is resampled and why, how well that covers and
what None means: docs/metrics.md, "How sure a number is". How:

* Whole clusters are drawn with replacement, each with all its groups. Groups are not drawn again within them, since
  their variation is in that of the clusters already (Davison and Hinkley 1997, Sec. 3.8: "strategy 1").
* Limits are percentiles of the resampled numbers about their mean, stretched for few clusters: k drawn from k vary too
  little by sqrt((k - 1) / k), and their spread is itself uncertain, for which a mean has Student's t with k - 1 degrees
  of freedom instead of the normal quantile.
* A number of a whole set of images has those of random halves of its clusters. A half drawn without replacement varies
  about the whole as the whole does about its expectation (Politis, Romano and Wolf, "Subsampling", 1999: the
  finite-population factor (1 - share) / share is 1 at one half), so that the standard deviation among halves is the
  standard error of the whole. What it is compared with is halved alike: half of the categories differ from all of
  them. The bias that a smaller set has (a Frechet distance grows as n falls) is the same in every half and drops out.
"""

import math
import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
from scipy.special import entr, ndtri, stdtrit

Cluster = Literal["prompt", "category"]

#: `aggregate` of documents whose number belongs to a whole set of images; see `eval.metric.SetMetric`.
SUBSETS = "subsets"
#: Fewer images than this have no entropy, however few the labels.
MINIMUM_IMAGES = 8
#: Clusters below which a bootstrap says nothing.
FEWEST = 4
#: What two documents must have in common for their difference to mean anything.
SAME = ("metric", "version", "settings", "aggregate", "encoder")

#: Draws [R, k] are held in blocks of at most this many (32 MB), whatever the number of resamples.
BLOCK = 4_000_000


class GroupValue(TypedDict):
    """What a metric found in one group: a `value`, or `counts` of labels.

    `group` is `prompt_id/group_seed`; `category` what the prompt asks for; `n_images` how many images were used.
    """

    group: str
    category: str
    n_images: int
    value: NotRequired[float]
    counts: NotRequired[dict[str, int]]


def entropy(counts: Sequence[int], miller_madow: bool = True) -> float:
    """Estimate a Shannon entropy from label counts [L], in nats; 0 where all images have one label.

    The plug-in estimate is biased down by about (m - 1) / 2n (m labels seen, n images). Miller and Madow's correction
    adds just that, so it may lie a little above log(number of labels).

    Raises:
        ValueError: n, the sum of counts, below `MINIMUM_IMAGES`.
    """
    seen = np.asarray(counts, dtype=np.float64)
    n = seen.sum()
    if n < MINIMUM_IMAGES:
        raise ValueError(
            f"expected at least {MINIMUM_IMAGES} images for an entropy, got {int(n)}; "
            "its bias would exceed the differences looked for: generate more images or pool more groups"
        )
    return float(entr(seen / n).sum() + miller_madow * ((seen > 0).sum() - 1) / (2 * n))


def _category_entropies(groups: Sequence[GroupValue]) -> list[GroupValue]:
    """Return for each category the entropy of its pooled label counts.

    Categories are what is resampled: labels within one say nothing of others, and an entropy of resampled groups is
    lower than that of the groups themselves, since repeated groups show fewer labels.
    """
    values: list[GroupValue] = []
    for category in sorted({group["category"] for group in groups}):
        own = [group for group in groups if group["category"] == category]
        counts = sum((Counter(group["counts"]) for group in own), Counter())
        try:
            value = entropy([counts[label] for label in sorted(counts)])
        except ValueError as error:
            raise ValueError(f"in category {category!r}: {error}") from error
        # named as groups are, so that a category is a cluster of its own however clusters are formed
        n_images = sum(group["n_images"] for group in own)
        values.append({"group": f"{category}/all", "category": category, "n_images": n_images, "value": value})
    return values


#: From groups to what the number is the mean of, by the name that is written into result files.
AGGREGATES: Mapping[str, Callable[[Sequence[GroupValue]], list[GroupValue]]] = {
    "mean": list,
    "category_entropy": _category_entropies,
}


def values_of(groups: Sequence[GroupValue], aggregate: str = "mean") -> list[GroupValue]:
    """Return what an aggregate is the mean of, each with a finite `value`, in the order of their ids.

    Raises:
        ValueError: no groups, a value that is not finite, or too few images in a category for its entropy.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"expected an aggregate among {sorted(AGGREGATES)}, got {aggregate!r}; measure again")
    if not groups:
        raise ValueError("expected at least one group, got none; measure a folder with images")
    values = AGGREGATES[aggregate](sorted(groups, key=lambda group: group["group"]))
    if bad := [entry["group"] for entry in values if not np.isfinite(entry["value"])]:
        raise ValueError(f"expected finite values, got others in {bad[:10]}; look at their images")
    return values


def mean_of(values: Sequence[GroupValue]) -> float:
    """Return the mean of `values_of` groups, every value counted once."""
    return float(np.mean([entry["value"] for entry in values]))


class Interval(NamedTuple):
    """A value with its interval; `low` and `high` are None where it cannot be estimated."""

    value: float
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """The first method's value minus the second's, with its interval, over `n` paired groups."""

    difference: float
    low: float | None
    high: float | None
    n: int


def has_value(document: Mapping[str, Any]) -> bool:
    """Tell whether there is a number at all: of images that were all withheld, or nearly, there is none."""
    return document.get("value", math.nan) is not None


def interval_of(document: Mapping[str, Any], **options: Any) -> Interval:
    """Return the interval of a metric's document, in the way that its aggregate asks for, within its `bounds`.

    Without a value, it is NaN; see `has_value`.

    Args:
        options: of `bootstrap_interval`. For numbers of whole sets only `level` matters: their halves were drawn
            when they were measured, by the clusters that the document names.
    """
    if not has_value(document):
        return Interval(math.nan, None, None)
    if document["aggregate"] == SUBSETS:
        value, low, high = _interval_from_halves(document, options.get("level", 0.95))
    else:
        value, low, high = bootstrap_interval(document["groups"], document["aggregate"], **options)
    if low is not None:
        least, most = document.get("bounds", (None, None))
        low = low if least is None else max(low, least)
        high = high if most is None else min(high, most)
    return Interval(value, low, high)


def difference_of(document_a: Mapping[str, Any], document_b: Mapping[str, Any], **options: Any) -> Difference:
    """Return by how much a method's number exceeds the baseline's, paired; `options` as of `interval_of`.

    Where groups were withheld, it is of those that both show, see `shared_groups`.

    Raises:
        ValueError: two metrics, versions, settings or encoders, or groups that only one of them has.
    """
    for key in SAME:
        if document_a.get(key) != document_b.get(key):
            raise ValueError(
                f"expected two documents of one {key}, got {reprlib.repr(document_a.get(key))} and "
                f"{reprlib.repr(document_b.get(key))}; measure both with one and the same metric"
            )
    if document_a["aggregate"] != SUBSETS:
        groups_a, groups_b = shared_groups(document_a, document_b)
        pairs = paired_differences(groups_a, groups_b, document_a["aggregate"])
        return Difference(*bootstrap_interval(pairs, **options), len(groups_a))
    drawn = [
        (document["groups_sha256"], [(subset["seed"], subset["n_images"]) for subset in document["subsets"]])
        for document in (document_a, document_b)
    ]
    if drawn[0] != drawn[1]:
        raise ValueError(
            f"expected {document_a['metric']} of the same groups and halves in both, got others; run both methods on "
            "the same prompts and seeds and measure again"
        )
    subsets = zip(document_a["subsets"], document_b["subsets"], strict=True)
    halves = [{**a, "value": a["value"] - b["value"]} for a, b in subsets]
    paired = {**document_a, "value": document_a["value"] - document_b["value"], "subsets": halves}
    return Difference(*_interval_from_halves(paired, options.get("level", 0.95)), document_a["n_groups"])


def shared_groups(
    document_a: Mapping[str, Any], document_b: Mapping[str, Any]
) -> tuple[list[GroupValue], list[GroupValue]]:
    """Return the groups of two documents that can be paired: all, unless the document of either has withheld ones.

    Then those that both have. A pool, as a category's, in which only one of them withheld a group is of other images in
    the other, and is left out; so is a category that keeps too few images for its entropy.
    """
    a, b = document_a["groups"], document_b["groups"]
    withheld = [
        {(group["group"], group["category"]) for group in document.get("withheld", ())}
        for document in (document_a, document_b)
    ]
    if not any(withheld):
        return a, b
    apart = withheld[0] ^ withheld[1]
    pools = {(f"{name}/all", category) for group, category in apart for name in (category, group.rpartition("/")[0])}
    kept = set.intersection(*({(group["group"], group["category"]) for group in side} for side in (a, b))) - pools
    if document_a["aggregate"] == "category_entropy":
        n_images: Counter[str] = Counter()
        for group in a:
            n_images[group["category"]] += group["n_images"] * ((group["group"], group["category"]) in kept)
        kept = {(group, category) for group, category in kept if n_images[category] >= MINIMUM_IMAGES}
    a, b = ([group for group in side if (group["group"], group["category"]) in kept] for side in (a, b))
    return a, b


def n_shared(document_a: Mapping[str, Any], document_b: Mapping[str, Any]) -> int:
    """Count the groups whose difference there is; 0 for a number of a whole set where the sets are not the same."""
    if not (has_value(document_a) and has_value(document_b)):
        return 0
    if document_a["aggregate"] == SUBSETS:
        return document_a["n_groups"] * (document_a["groups_sha256"] == document_b["groups_sha256"])
    return len(shared_groups(document_a, document_b)[0])


def n_units(document: Mapping[str, Any], cluster: Cluster | None = "category") -> int:
    """Count what is resampled for the interval of a document: clusters, groups, or what its number is a mean of."""
    if not has_value(document):
        return 0
    if document["aggregate"] == SUBSETS:
        return document["n_units"]
    return len(set(clusters_of(values_of(document["groups"], document["aggregate"]), cluster)))


def _interval_from_halves(document: Mapping[str, Any], level: float) -> Interval:
    _check_level(level)
    value, halves = float(document["value"]), np.array([subset["value"] for subset in document["subsets"]], dtype=float)
    if len(halves) < 2 or constant(halves):
        return Interval(value, None, None)
    drawn, whole = document["subsets"][0]["n_units"], document["n_units"]
    # 1 for an exact half; an odd number of clusters has none
    error = float(halves.std(ddof=1)) * (drawn / (whole - drawn)) ** 0.5
    # The error is uncertain twice over: the halves are few, and so are the clusters that they are halves of.
    freedom = 1 / (1 / (len(halves) - 1) + 1 / (whole - 1))
    reach = error * float(stdtrit(freedom, (1 + level) / 2))
    return Interval(value, value - reach, value + reach)


def constant(values: np.ndarray) -> bool:
    """Tell whether numbers differ by no more than rounding."""
    return float(np.ptp(values)) <= 1e-12 * float(np.abs(values).max())


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"expected a level in (0, 1), got {level}; 0.95 is usual")


def bootstrap_interval(
    groups: Sequence[GroupValue],
    aggregate: str = "mean",
    n_resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    cluster: Cluster | None = "category",
) -> Interval:
    """Estimate an aggregate of groups and its bootstrap interval.

    Args:
        groups: as in a metric's document; the order does not matter.
        aggregate: how groups become one number, as named in the document.
        n_resamples: how many resamples, >= 1.
        seed: of the resampling; equal seeds give equal intervals.
        level: coverage in (0, 1).
        cluster: what is resampled: whole categories, whole prompts, or (None) groups. Where the aggregate is a mean
            of categories, it is categories always.
    """
    _check_level(level)
    values = values_of(_unique(groups), aggregate)
    value = mean_of(values)
    sums, sizes = cluster_sums(values, cluster)
    k, draws = len(sums), drawn_clusters(len(sums), n_resamples, seed)
    if k < FEWEST:
        return Interval(value, None, None)
    estimates = np.concatenate([sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1) for drawn in draws])
    if constant(estimates):
        return Interval(value, None, None)
    return Interval(value, *limits(value, estimates, k, level))


def limits(value: float, estimates: np.ndarray, k: int, level: float = 0.95) -> tuple[float, float]:
    """Return the limits of a value by its resamples [R] of k clusters."""
    percentiles = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    stretch = (k / (k - 1)) ** 0.5 * float(stdtrit(k - 1, (1 + level) / 2)) / float(ndtri((1 + level) / 2))
    low, high = value + stretch * (percentiles - estimates.mean())
    # of few resamples, or very skewed ones, both percentiles may lie on one side of their mean
    return min(float(low), value), max(float(high), value)


def drawn_clusters(k: int, n_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Draw k of k clusters with replacement, `n_resamples` times: their indices [R, k], in blocks."""
    if n_resamples < 1:
        raise ValueError(f"expected n_resamples >= 1, got {n_resamples}; 10000 is usual")
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK // k)
    return (rng.integers(k, size=(min(block, n_resamples - start), k)) for start in range(0, n_resamples, block))


def paired_differences(
    groups_a: Sequence[GroupValue], groups_b: Sequence[GroupValue], aggregate: str = "mean"
) -> list[GroupValue]:
    """Subtract two methods' values, a - b, of whatever the aggregate is a mean of: groups, or categories, by their ids.

    Raises:
        ValueError: groups that only one of them has, or that differ in category or size; the message lists them.
    """
    a, b = ({group["group"]: group for group in _unique(groups)} for groups in (groups_a, groups_b))
    if a.keys() != b.keys():
        raise ValueError(
            f"expected the same groups in both, got {_some(a.keys() - b.keys())} only in the first and "
            f"{_some(b.keys() - a.keys())} only in the second; run both methods on the same prompts and seeds"
        )
    unequal = [
        key
        for key in a
        # one that ended without images, in a metric that counts it all the same, is as good as any
        if a[key]["category"] != b[key]["category"] or len({a[key]["n_images"], b[key]["n_images"]} - {0}) > 1
    ]
    if unequal:
        raise ValueError(
            f"expected the same category and number of images in both, got others in {_some(unequal)}; "
            "run both methods with the same settings"
        )
    sides = (values_of(list(side.values()), aggregate) for side in (a, b))
    return [{**x, "value": x["value"] - y["value"]} for x, y in zip(*sides, strict=True)]


def clusters_of(groups: Sequence[GroupValue], cluster: Cluster | None) -> list[str]:
    """Return for each group the name of what is resampled as one: itself, its prompt or category."""
    if cluster not in (None, "prompt", "category"):
        raise ValueError(f"expected cluster to be None, 'prompt' or 'category', got {cluster!r}; choose one")
    if cluster == "prompt":
        return [group["group"].rpartition("/")[0] for group in groups]
    return [group["group" if cluster is None else "category"] for group in groups]


def cluster_sums(values: Sequence[GroupValue], cluster: Cluster | None) -> tuple[np.ndarray, np.ndarray]:
    """Return of each cluster the sum of its values and how many they are, float64 [k] each."""
    _, index = np.unique(clusters_of(values, cluster), return_inverse=True)
    return np.bincount(index, [value["value"] for value in values]), np.bincount(index).astype(float)


def _unique(groups: Sequence[GroupValue]) -> Sequence[GroupValue]:
    """Return groups of which every one occurs once."""
    repeated = {group for group, times in Counter(group["group"] for group in groups).items() if times > 1}
    if repeated:
        raise ValueError(f"expected every group once, got {_some(repeated)} repeatedly")
    return groups


def _some(ids: Collection[str]) -> str:
    return f"[{', '.join(sorted(ids)[:10])}{', ...' if len(ids) > 10 else ''}] ({len(ids)})"
