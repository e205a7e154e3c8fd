"""A request decided by a policy, steered or refused, and its images checked: three stages, the later ones optional."""

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from eval.encoders import Encoder
from eval.files import content_hash
from eval.images import Withheld, load_image
from eval.resemblance import DetectionRate
from experiments.methods.assets import AssetIndex, count_shared
from experiments.methods.method import Baseline, GroupResult, Method, Setting, sample
from experiments.methods.selection import embedded
from experiments.prompts import Group
from negtome.guard import Audit, Clause, Guard, Verdict, decide, read_policy
from negtome.guard.image_check import ImageCheck
from negtome.validation import check_int

#: Stages, each in addition to the earlier ones: decide on the prompt, and refuse it where it is to be steered; push it
#: away from the concept instead of refusing it; check the images.
LAYERS = ("decide", "steer", "check")


class OutputCheck:
    """Detects images that are more similar to a protected concept than images without any concept are.

    Args:
        folder, scoring: of reference images, see `experiments.methods.assets.read_assets`.
        policy: file of the policy whose concepts are looked for. The check ignores other images in the folder, and
            concepts that every clause about them allows.
        held_out: images to calibrate the threshold on, one subfolder a kind; those of the concepts are left out.
        encoder: embeds images.
        false_positive_rate: in (0, 1): probability at most with which an image without any concept is detected.

    Raises:
        FileNotFoundError: there are no reference images, no held-out images or no policy.
        ValueError: a setting is out of range, or there are too few held-out images for it, or a concept of the policy
            has no reference image.
    """

    def __init__(
        self,
        folder: str | Path | None,
        policy: str | Path,
        held_out: str | Path | None,
        encoder: Encoder,
        false_positive_rate: float = 0.05,
        scoring: str | Path | None = None,
    ) -> None:
        self.concepts = frozenset(clause.asset for clause in read_policy(policy).protected)
        self.index = AssetIndex(folder, encoder, scoring)
        if absent := sorted(self.concepts - self.index.concepts):
            raise ValueError(
                f"expected pictures of every asset of {policy}, got no folder of {', '.join(absent[:5])}: name the "
                "policy's assets as their folders"
            )
        if held_out is None:
            raise FileNotFoundError(
                "expected held-out pictures without any asset to calibrate the output check on, got none: give "
                "method.check.held_out=FOLDER, or leave the check out by method.layers=steer"
            )
        self.encoder = encoder
        self.false_positive_rate = false_positive_rate
        self._held_out = self.index.without_concepts(held_out)

    def settings(self) -> dict[str, Any]:
        """Return what affects the detections, as JSON values."""
        return {
            **self.index.settings(self.concepts),
            "held_out_sha256": hashlib.sha256(str([*map(content_hash, self._held_out)]).encode()).hexdigest(),
            "false_positive_rate": self.false_positive_rate,
        }

    def detect(self, images: np.ndarray) -> tuple[str | None, float]:
        """Return the concept that the images of one request show, or None, and their largest cosine with any concept.

        The cosine is -1 if the policy allows every concept.

        Args:
            images: float [n, H, W, 3] in [0, 1].
        """
        pictures = self.index.nearest(embedded(self.encoder, images), self.concepts)
        if not pictures:
            return None, -1.0
        asset, score = pictures[0]
        return (asset.name if score > self.threshold else None), score

    @cached_property
    def threshold(self) -> float:
        """The cosine above which an image shows a concept."""
        negatives = self.encoder.embed_images([load_image(file) for file in self._held_out])
        return self.index.calibrate(negatives, self.false_positive_rate, self.concepts)

    def shared_with(self, evaluator: DetectionRate) -> list[str]:
        """Return what the check has in common with an evaluator, which then cannot tell where the check is wrong.

        It is empty if both are independent. See `AssetIndex.shared_with`.
        """
        count = count_shared(self._held_out, evaluator.folder("held_out"))
        return [*self.index.shared_with(evaluator), *([f"{count} held-out images"] if count else [])]


class GroupImages(NamedTuple):
    """Images [K, H, W, 3] that a method made of a group, its statistics and references, and the seconds it took."""

    images: np.ndarray
    statistics: dict[str, Any]
    references: Mapping[str, float] | None
    seconds: float


class ImageCache:
    """The last images of this process: guards and stages that need the same images generate them once.

    Args:
        limit: bytes of images that are kept; the oldest are dropped first.
    """

    def __init__(self, limit: int = 2**28) -> None:
        self.limit = limit
        self._by_pipe: WeakKeyDictionary[Any, dict[tuple, GroupImages]] = WeakKeyDictionary()

    def generate(
        self, pipe: Any, method: Method, group: Group, call: Mapping[str, Any], seeds: Sequence[int]
    ) -> GroupImages:
        """Return the read-only images that a method makes of a group from these seeds."""
        cache = self._by_pipe.setdefault(pipe, {})
        key = (group, *seeds, repr(sorted(call.items())), type(method), method.name, repr(method.settings()))
        if key not in cache:
            start = time.perf_counter()
            with method.apply(pipe, group, call) as applied:
                images = sample(pipe, group, applied.call, seeds)
            seconds = time.perf_counter() - start
            images.setflags(write=False)
            cache[key] = GroupImages(images, applied.statistics(), applied.references, seconds)
            while len(cache) > 1 and sum(entry.images.nbytes for entry in cache.values()) > self.limit:
                del cache[next(iter(cache))]
        return cache[key]


IMAGE_CACHE = ImageCache()
#: Verdicts of this process by audit file, policy, guard and prompt.
_VERDICTS: dict[tuple[str, str, str, str], Verdict] = {}


@dataclass
class Guarded(Method):
    """The stock pipeline behind a policy: allow, steer, refuse or escalate a request, and check its images.

    Refused, escalated and blocked requests end without images, and name the clauses. If the guard's reply does not
    follow from the policy, the request is escalated and counted as invalid; it is never allowed.

    An exception that allows a concept does not switch the check off. If the images resemble that concept, the request
    is escalated: a person decides whether it is the parody that the exception means.

    Attributes:
        guard: decides; see `negtome.guard.Guard`.
        policy: file of the policy.
        steering: makes the images of a request that is to be steered; the group's concept is the one to stay away from.
        check: of images; may be None without the stage "check".
        layers: the last stage, one of `LAYERS`.
        tries: how often images in which the check detects a concept are made again from other seeds before they are
            blocked.
        audit: file that records every verdict; see `negtome.guard.Audit`. The process remembers recorded verdicts, so
            that all stages use the same ones. None records nothing, and asks the guard each time. Verdicts are never
            read from a file: anybody who can write there could decide.
    """

    title: ClassVar[str] = "guarded"
    columns: ClassVar[tuple[Setting, ...]] = (Setting("guard", printed="always"), Setting("layers", printed="always"))
    version: ClassVar[int] = 2

    name: str
    guard: Guard
    policy: str
    steering: Method
    check: ImageCheck | None = None
    layers: str = LAYERS[-1]
    tries: int = 3
    audit: str | None = None

    def __post_init__(self) -> None:
        if self.layers not in LAYERS:
            raise ValueError(f"method.layers must be one of {', '.join(LAYERS)}, got {self.layers!r}")
        if self.layers == LAYERS[-1] and self.check is None:
            raise ValueError("method.layers=check needs method.check, got none: configure it, or set layers=steer")
        self.tries = check_int("method.tries", self.tries, 0)
        self._policy = read_policy(self.policy)
        if self._policy.default == "steer":
            raise ValueError(f"expected a default of {self.policy} that names no asset, got steer: allow or refuse")

    def settings(self) -> dict[str, Any]:
        settings = {
            "guard": self.guard.name,
            "guard_id": self.guard.id,
            "policy_sha256": self._policy.sha256,
            "layers": self.layers,
        }
        if self.layers != "decide":
            settings["steering"] = {"version": self.steering.version, **self.steering.settings()}
        if self.layers == "check":
            settings |= {"check": self.check.settings(), "tries": self.tries}
        return settings

    def generate(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> GroupResult:
        verdict = self.verdict(group.prompt)
        # Verdicts and images are reused; the seconds are those of the first time.
        statistics = {"action": verdict.action, "decide_seconds": verdict.seconds, "seconds": verdict.seconds}
        concepts = self._policy.assets(verdict.clauses, "steer") if verdict.action == "steer" else []
        withheld = self._withhold(verdict, concepts)
        if withheld is not None:
            return GroupResult(None, statistics, withheld=withheld)
        method = Baseline()
        if concepts:
            method, group = self.steering, dataclasses.replace(group, concept=concepts[0])
        check, excepted = self.check if self.layers == "check" else None, self._policy.assets(verdict.clauses, "allow")
        tries = 1 + self.tries if check else 1
        all_seeds = dataclasses.replace(group, size=group.size * tries).image_seeds()
        generate_seconds, check_seconds, scores = 0.0, 0.0, []
        for attempt in range(tries):
            seeds = all_seeds[attempt * group.size :][: group.size]
            result = IMAGE_CACHE.generate(pipe, method, group, call, seeds)
            start = time.perf_counter()
            concept, score = check.detect(result.images) if check else (None, None)
            check_seconds += time.perf_counter() - start
            generate_seconds += result.seconds
            scores.append(score)
            if concept is None or concept in excepted:
                break  # other seeds would only hide from a person what this prompt shows
        statistics |= {"check": scores, "draw_seconds": round(generate_seconds, 4)}
        statistics |= {"check_seconds": round(check_seconds, 4)}
        statistics["seconds"] = round(verdict.seconds + generate_seconds + check_seconds, 3)
        if concept is None:
            return GroupResult(result.images, {**statistics, **result.statistics}, result.references, seeds=seeds)
        if concept in excepted:
            exceptions = [name for name in verdict.clauses if not isinstance(self._policy[name], Clause)]
            cited = ", ".join(exceptions or verdict.clauses)
            reason = f"the images resemble {concept} above the threshold: a person decides whether {cited} allows them"
            withheld = Withheld("escalated", reason, verdict.clauses)
            return GroupResult(None, statistics, result.references, withheld)
        clauses = tuple(clause.id for clause in self._policy.clauses if clause.asset == concept)
        reason = f"every one of {tries} images resembles {concept} above the threshold"
        return GroupResult(None, statistics, result.references, Withheld("blocked", reason, clauses))

    def _withhold(self, verdict: Verdict, concepts: Sequence[str]) -> Withheld | None:
        """Return why a verdict ends a request before any image; None if it does not."""
        ends = {"refuse": "refused", "escalate": "escalated", "invalid": "escalated"}
        if verdict.action in ends:
            return Withheld(ends[verdict.action], verdict.reason, verdict.clauses)
        if concepts and self.layers == "decide":
            return Withheld("refused", verdict.reason, verdict.clauses)
        if len(concepts) > 1:
            reason = f"it is steered away from one asset at a time, and this asks for {', '.join(concepts)}"
            return Withheld("refused", reason, verdict.clauses)
        return None

    def verdict(self, prompt: str) -> Verdict:
        """Return the guard's verdict on a prompt, or the one that this process remembers.

        Raises:
            ValueError, ConnectionError, OSError: as `negtome.guard.decide`.
        """
        if self.audit is None:
            return decide(self._policy, self.guard, prompt)
        key = (self.audit, self._policy.sha256, self.guard.id, prompt)
        if key not in _VERDICTS:
            _VERDICTS[key] = decide(self._policy, self.guard, prompt, Audit(self.audit))
        return _VERDICTS[key]
