"""Bootstrap intervals of a number and of the paired difference between two methods, from the documents of metrics.

Every aggregate is a mean, of groups' values or of categories' entropies, whose terms are resampled and paired. For the
reasons and the simulated coverage see docs/metrics.md, "How sure a number is". The method:

* Clusters are drawn with replacement, each with all its groups. Groups are not drawn again within a cluster, because
  the variation between clusters includes theirs (Davison and Hinkley 1997, Sec. 3.8, "strategy 1").
* Limits are percentiles of the resampled numbers about their mean. They are stretched by sqrt(k / (k - 1)), because k
  clusters drawn from k vary too little, and by Student's t over the normal quantile, because k is small.
* A number of a set of images is measured again on random halves of its clusters. The standard deviation of the halves
  is the standard error of the set (Politis, Romano and Wolf, "Subsampling", 1999: the finite-population factor
  (1 - share) / share is 1 for halves). The bias of a smaller set is the same in every half and cancels.
"""

import math
import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, cast

import numpy as np
from scipy.special import entr, ndtri, stdtrit

Cluster = Literal["prompt", "category"]

#: `aggregate` of documents whose number belongs to a set of images; see `eval.metric.SetMetric`.
SUBSETS = "subsets"
#: smallest number of images for an entropy
MINIMUM_IMAGES = 8
#: smallest number of clusters for a bootstrap
FEWEST = 4
#: keys that two documents must have in common to be compared
SAME = ("metric", "version", "settings", "aggregate", "encoder")

#: largest number of draws that are in memory at once (32 MB)
BLOCK = 4_000_000


class GroupValue(TypedDict):
    """A metric's `value`, or its `counts` of labels, for the group `prompt_id/group_seed` of a category."""

    group: str
    category: str
    n_images: int
    value: NotRequired[float]
    counts: NotRequired[dict[str, int]]


def entropy(counts: Sequence[int], miller_madow: bool = True) -> float:
    """Estimate the Shannon entropy of label counts [L], in nats.

    The plug-in estimate is biased down by about (m - 1) / 2n for n images and m different labels. The correction of
    Miller and Madow adds this, so the estimate can exceed log(number of labels) slightly.

    Raises:
        ValueError: there are fewer than `MINIMUM_IMAGES` images.
    """
    seen = np.asarray(counts, dtype=np.float64)
    n = seen.sum()
    if n < MINIMUM_IMAGES:
        raise ValueError(
            f"expected at least {MINIMUM_IMAGES} images for an entropy, got {int(n)}; "
            "its bias would exceed the differences looked for: generate more images or pool more groups"
        )
    correction = ((seen > 0).sum() - 1) / (2 * n) if miller_madow else 0.0
    return float(entr(seen / n).sum() + correction)


def _category_entropies(groups: Sequence[GroupValue]) -> list[GroupValue]:
    """Return the entropy of the pooled label counts of each category.

    Categories are resampled, because an entropy of resampled groups is too low: repeated groups show fewer labels.
    """
    values: list[GroupValue] = []
    for category in sorted({group["category"] for group in groups}):
        members = [group for group in groups if group["category"] == category]
        counts = sum((Counter(group["counts"]) for group in members), Counter())
        try:
            value = entropy([counts[label] for label in sorted(counts)])
        except ValueError as error:
            raise ValueError(f"in category {category!r}: {error}") from error
        # the name has the form of a group's name, so that a category is always a single cluster
        n_images = sum(group["n_images"] for group in members)
        values.append({"group": f"{category}/all", "category": category, "n_images": n_images, "value": value})
    return values


#: functions from groups to the values whose mean is the number, by their name in documents
AGGREGATES: Mapping[str, Callable[[Sequence[GroupValue]], list[GroupValue]]] = {
    "mean": list,
    "category_entropy": _category_entropies,
}


def values_of(groups: Sequence[GroupValue], aggregate: str = "mean") -> list[GroupValue]:
    """Return the values whose mean is the aggregate, in the order of their ids.

    Raises:
        ValueError: there are no groups, a value is not finite, or a category has too few images for its entropy.
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
    """Return the mean of `values_of` groups."""
    return float(np.mean([entry["value"] for entry in values]))


class Interval(NamedTuple):
    """A value with its interval; `low` and `high` are None if it cannot be estimated."""

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
    """Return whether a document has a number; it has none if too many images were withheld."""
    return document.get("value", math.nan) is not None


def interval_of(document: Mapping[str, Any], **options: Any) -> Interval:
    """Estimate the interval of a document's number, within its `bounds`; without a number, the value is NaN.

    Args:
        document: a metric's document.
        options: see `bootstrap_interval`. For numbers of sets only `level` has an effect, because their halves were
            drawn when they were measured.
    """
    if not has_value(document):
        return Interval(math.nan, None, None)
    if document["aggregate"] == SUBSETS:
        value, low, high = _interval_from_halves(document, options.get("level", 0.95))
    else:
        value, low, high = bootstrap_interval(document["groups"], document["aggregate"], **options)
    minimum, maximum = document.get("bounds", (None, None))
    if low is None and (minimum, maximum) == (0, 1) and value in (0, 1) and document["aggregate"] == "mean":
        k = n_units(document, options.get("cluster", "category"))
        low, high = _extreme_limits(value, k, options.get("level", 0.95)) if k >= FEWEST else (None, None)
    if low is not None:
        low = low if minimum is None else max(low, minimum)
        high = high if maximum is None else min(high, maximum)
    return Interval(value, low, high)


def _extreme_limits(value: float, k: int, level: float) -> tuple[float, float]:
    """Return the exact confidence limits of a mean whose k clusters are all 0 or all 1 (Clopper and Pearson, 1934).

    If numbers from 0 to 1 have the mean m, each is 0 with a probability of at most 1 - m. So k independent ones are all
    0 with a probability of at most (1 - m)^k, as if each were a success or a failure.
    """
    reach = 1 - ((1 - level) / 2) ** (1 / k)
    return (0.0, reach) if value == 0 else (1 - reach, 1.0)


def difference_of(document_a: Mapping[str, Any], document_b: Mapping[str, Any], **options: Any) -> Difference:
    """Estimate the paired difference of two documents' numbers, a - b, over their `shared_groups`.

    Args:
        document_a, document_b: documents of the method and of the baseline.
        options: see `interval_of`.

    Raises:
        ValueError: the documents differ in metric, version, settings, encoder or groups.
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
    draws = [
        (document["groups_sha256"], [(subset["seed"], subset["n_images"]) for subset in document["subsets"]])
        for document in (document_a, document_b)
    ]
    if draws[0] != draws[1]:
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
    """Return the groups of two documents that can be paired.

    These are all groups if none was withheld, else the groups that both documents have. A pool of images, such as a
    category, is left out if only one document withheld a group of it, because the other pools other images. A category
    is left out if too few of its images remain for an entropy.
    """

    def keys(groups: Iterable[Mapping[str, Any]]) -> set[tuple[str, str]]:
        return {(group["group"], group["category"]) for group in groups}

    a, b = document_a["groups"], document_b["groups"]
    withheld_a, withheld_b = (keys(document.get("withheld", ())) for document in (document_a, document_b))
    if not withheld_a and not withheld_b:
        return a, b
    shared = keys(a) & keys(b)
    for group, category in withheld_a ^ withheld_b:
        prompt_id = group.rpartition("/")[0]
        shared -= {(f"{category}/all", category), (f"{prompt_id}/all", category)}
    if document_a["aggregate"] == "category_entropy":
        n_images: Counter[str] = Counter()
        for group in a:
            if (group["group"], group["category"]) in shared:
                n_images[group["category"]] += group["n_images"]
        shared = {(group, category) for group, category in shared if n_images[category] >= MINIMUM_IMAGES}
    a, b = ([group for group in side if (group["group"], group["category"]) in shared] for side in (a, b))
    return a, b


def n_shared(document_a: Mapping[str, Any], document_b: Mapping[str, Any]) -> int:
    """Count the groups that can be paired; 0 for numbers of sets with different groups."""
    if not (has_value(document_a) and has_value(document_b)):
        return 0
    if document_a["aggregate"] == SUBSETS:
        return document_a["n_groups"] if document_a["groups_sha256"] == document_b["groups_sha256"] else 0
    return len(shared_groups(document_a, document_b)[0])


def n_units(document: Mapping[str, Any], cluster: Cluster | None = "category") -> int:
    """Count the clusters that are resampled for the interval of a document."""
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
    k_half, k = document["subsets"][0]["n_units"], document["n_units"]
    # the factor is 1 for an even number of clusters
    error = float(halves.std(ddof=1)) * (k_half / (k - k_half)) ** 0.5
    # the error is uncertain because there are few halves, and because there are few clusters
    degrees_of_freedom = 1 / (1 / (len(halves) - 1) + 1 / (k - 1))
    half_width = error * float(stdtrit(degrees_of_freedom, (1 + level) / 2))
    return Interval(value, value - half_width, value + half_width)


def constant(values: np.ndarray) -> bool:
    """Return whether numbers differ by no more than rounding."""
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
        groups: the groups of a metric's document, in any order.
        aggregate: a key of `AGGREGATES`.
        n_resamples: number of resamples, >= 1.
        seed: seed of the resampling; equal seeds give equal intervals.
        level: coverage in (0, 1).
        cluster: what is resampled: categories, prompts, or groups (None). A mean over categories always resamples
            categories.
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
    """Return the confidence limits of a value from its resamples [R] of k clusters."""
    percentiles = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    stretch = (k / (k - 1)) ** 0.5 * float(stdtrit(k - 1, (1 + level) / 2)) / float(ndtri((1 + level) / 2))
    low, high = value + stretch * (percentiles - estimates.mean())
    # with few or very skewed resamples, both percentiles may lie on one side of their mean
    return min(float(low), value), max(float(high), value)


def drawn_clusters(k: int, n_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Draw k of k clusters with replacement, `n_resamples` times, and yield blocks of their indices [R, k]."""
    if n_resamples < 1:
        raise ValueError(f"expected n_resamples >= 1, got {n_resamples}; 10000 is usual")
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK // k)
    return (rng.integers(k, size=(min(block, n_resamples - start), k)) for start in range(0, n_resamples, block))


def paired_differences(
    groups_a: Sequence[GroupValue], groups_b: Sequence[GroupValue], aggregate: str = "mean"
) -> list[GroupValue]:
    """Subtract the values of two methods' groups, or of their categories for an entropy, a - b.

    Raises:
        ValueError: the methods have different groups, or groups of different categories or sizes.
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
        # a metric of requests has a value for a group without images
        if a[key]["category"] != b[key]["category"] or len({a[key]["n_images"], b[key]["n_images"]} - {0}) > 1
    ]
    if unequal:
        raise ValueError(
            f"expected the same category and number of images in both, got others in {_some(unequal)}; "
            "run both methods with the same settings"
        )
    sides = (values_of(list(side.values()), aggregate) for side in (a, b))
    pairs = zip(*sides, strict=True)
    return [cast(GroupValue, {**x, "value": x["value"] - y["value"]}) for x, y in pairs]


def clusters_of(groups: Sequence[GroupValue], cluster: Cluster | None) -> list[str]:
    """Return the name of each group's cluster: the group itself, its prompt or its category."""
    if cluster not in (None, "prompt", "category"):
        raise ValueError(f"expected cluster to be None, 'prompt' or 'category', got {cluster!r}; choose one")
    if cluster == "prompt":
        return [group["group"].rpartition("/")[0] for group in groups]
    return [group["group" if cluster is None else "category"] for group in groups]


def cluster_sums(values: Sequence[GroupValue], cluster: Cluster | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of the values and the number of values of each cluster, float64 [k] each."""
    _, index = np.unique(clusters_of(values, cluster), return_inverse=True)
    return np.bincount(index, [value["value"] for value in values]), np.bincount(index).astype(float)


def _unique(groups: Sequence[GroupValue]) -> Sequence[GroupValue]:
    """Return the groups; raise ValueError if one occurs twice."""
    repeated = {group for group, times in Counter(group["group"] for group in groups).items() if times > 1}
    if repeated:
        raise ValueError(f"expected every group once, got {_some(repeated)} repeatedly")
    return groups


def _some(ids: Collection[str]) -> str:
    return f"[{', '.join(sorted(ids)[:10])}{', ...' if len(ids) > 10 else ''}] ({len(ids)})"
