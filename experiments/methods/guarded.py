"""A request decided by a policy, steered or refused, and its image checked: three layers, the later ones optional."""

import dataclasses
import hashlib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from eval.encoders import Encoder
from eval.files import canonical_json, check_seal, content_hash, read_json, sealed, write_json
from eval.images import Withheld, load_image, read_manifest
from eval.resemblance import calibrate_threshold, similarities
from experiments.methods.assets import assets_hash, check_disjoint, read_assets
from experiments.methods.method import GroupResult, Method, Setting, sample
from experiments.methods.selection import embedded
from experiments.prompts import Group
from negtome.guard import Clause, Decision, Guard, Verdict, decide, read_policy, verify
from negtome.validation import check_int

#: What is done, the later beside the earlier: the prompt is decided on, and refused where it is to be steered; it is
#: pushed away from the asset instead; what was drawn is checked.
LAYERS = ("decide", "steer", "check")


class OutputCheck:
    """Tells images that resemble a protected asset more than images without any do.

    Args:
        folder: pictures of the assets, see `experiments.methods.assets.read_assets`; not those that are scored against.
        policy: file of the policy whose assets are looked for; other pictures in the folder are left alone.
        held_out: pictures to calibrate the threshold on, one subfolder a kind; the assets' own are left out.
        encoder: of images.
        false_positive_rate: in (0, 1): how often an image without any asset is taken for one at most
            (`eval.resemblance.calibrate_threshold`).
        scoring: the pictures that resemblance is measured to, none of which may be in `folder`; None: unchecked.

    Raises:
        FileNotFoundError: there are no pictures, or none held out, or no policy.
        ValueError: a setting is out of range, or there are too few held-out pictures for it, or an asset of the policy
            has no pictures.
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
        names = {clause.asset for clause in read_policy(policy).clauses}
        pictured = read_assets(folder)
        if absent := sorted(names - {asset.name for asset in pictured}):
            raise ValueError(
                f"expected pictures of every asset of {policy}, got no folder of {', '.join(absent[:5])}: name the "
                "policy's assets as their folders"
            )
        self.assets = [asset for asset in pictured if asset.name in names]
        if held_out is None:
            raise FileNotFoundError(
                "expected held-out pictures without any asset to calibrate the output check on, got none: give "
                "model.copyright.held_out=FOLDER, or leave the check out by method.layers=steer"
            )
        if scoring is not None:
            check_disjoint(self.assets, scoring)
        self.encoder = encoder
        self.false_positive_rate = false_positive_rate
        shown = {asset.name for asset in pictured}
        self._held_out = [Path(held_out) / row.path for row in read_manifest(held_out) if row.category not in shown]

    def settings(self) -> dict[str, Any]:
        """Return what affects its findings, as JSON values."""
        return {
            "assets_sha256": assets_hash(self.assets),
            "encoder": self.encoder.id,
            "held_out_sha256": hashlib.sha256(str([*map(content_hash, self._held_out)]).encode()).hexdigest(),
            "false_positive_rate": self.false_positive_rate,
        }

    def found(self, images: np.ndarray, exempt: Collection[str] = ()) -> tuple[str | None, float]:
        """Return the asset that images, float [n, H, W, 3] in [0, 1], show, or None, and their largest cosine with any.

        Args:
            images: of one request.
            exempt: names of assets that may be shown.
        """
        if not (places := [place for place, asset in enumerate(self.assets) if asset.name not in exempt]):
            return None, -1.0
        nearest = similarities(embedded(self.encoder, images), self._index[places]).amax(dim=0)
        score, place = nearest.max().item(), places[int(nearest.argmax())]
        return (self.assets[place].name if score > self.threshold else None), score

    @cached_property
    def threshold(self) -> float:
        """The cosine above which an image shows an asset."""
        pictures = self.encoder.embed_images([load_image(file) for file in self._held_out])
        return calibrate_threshold(similarities(pictures, self._index).amax(dim=1), self.false_positive_rate)

    @cached_property
    def _index(self) -> torch.Tensor:
        return self.encoder.embed_images([asset.image for asset in self.assets])


class Drawing(NamedTuple):
    """Images [K, H, W, 3] as a method made them, what it tells of them, and the seconds that they took."""

    images: np.ndarray
    statistics: dict[str, Any]
    references: Mapping[str, float] | None
    seconds: float


class Drawings:
    """What this process drew last, so that guards and layers that come to the same images do not draw them again.

    Args:
        limit: bytes of images that are kept; the oldest make room.
    """

    def __init__(self, limit: int = 2**28) -> None:
        self.limit = limit
        self._kept: WeakKeyDictionary[Any, dict[tuple, Drawing]] = WeakKeyDictionary()

    def draw(self, pipe: Any, method: Method, group: Group, call: Mapping[str, Any], seeds: Sequence[int]) -> Drawing:
        """Return the images that a pipeline to which a method is applied makes of a group from these seeds."""
        kept = self._kept.setdefault(pipe, {})
        key = (group, *seeds, repr(sorted(call.items())), type(method), method.name, repr(method.settings()))
        if key not in kept:
            start = time.perf_counter()
            with method.apply(pipe, group, call) as applied:
                images = sample(pipe, group, applied.call, seeds)
            seconds = time.perf_counter() - start
            images.setflags(write=False)  # all who come to them have these very ones
            kept[key] = Drawing(images, applied.statistics(), applied.references, seconds)
            while len(kept) > 1 and sum(one.images.nbytes for one in kept.values()) > self.limit:
                del kept[next(iter(kept))]
        return kept[key]


DRAWINGS = Drawings()


@dataclass
class Guarded(Method):
    """The stock pipeline behind a policy: allow, steer, refuse or escalate, and a check of what came out.

    Refused, escalated and blocked requests end without images and with the clauses that it is for. A guard whose reply
    does not follow from the policy is never taken to allow: the request is escalated, and counted apart.

    Attributes:
        guard: decides; see `negtome.guard.Guard`.
        policy: file of the policy.
        steering: makes the images of a request that is to be steered, of a group whose category is the asset's name.
        check: of images; None with layers that have none.
        layers: the last of `LAYERS` that there is.
        tries: how often images that the check finds an asset in are made again, from other noises, before they are
            blocked.
        decisions: folder in which verdicts are kept, so that all layers, and runs taken up again, have the same; None
            asks each time. Whoever may write there can decide: a kept decision is verified again, and no more.
    """

    title: ClassVar[str] = "guarded"
    columns: ClassVar[tuple[Setting, ...]] = (Setting("guard", printed="always"), Setting("layers", printed="always"))
    version: ClassVar[int] = 1

    name: str
    guard: Guard
    policy: str
    steering: Method
    check: OutputCheck | None = None
    layers: str = LAYERS[-1]
    tries: int = 3
    decisions: str | None = None

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
        found = {
            "guard": self.guard.name,
            "guard_id": self.guard.id,
            "policy_sha256": self._policy.sha256,
            "layers": self.layers,
        }
        if self.layers != "decide":
            found["steering"] = {"version": self.steering.version, **self.steering.settings()}
        if self.layers == "check":
            found |= {"check": self.check.settings(), "tries": self.tries}
        return found

    def generate(self, pipe: Any, group: Group, call: Mapping[str, Any]) -> GroupResult:
        verdict = self.verdict(group.prompt)
        # The seconds are those that each part took when it was done; verdicts and images are kept.
        told: dict[str, Any] = {"action": verdict.action, "decide_seconds": verdict.seconds, "seconds": verdict.seconds}
        ended = {"refuse": "refused", "escalate": "escalated", "invalid": "escalated"}.get(verdict.action)
        assets = self._cited(verdict, "steer") if verdict.action == "steer" else []
        if ended or (assets and self.layers == "decide"):
            return GroupResult(None, told, withheld=Withheld(ended or "refused", verdict.reason, verdict.clauses))
        if len(assets) > 1:
            reason = f"it is steered away from one asset at a time, and this asks for {', '.join(assets)}"
            return GroupResult(None, told, withheld=Withheld("refused", reason, verdict.clauses))
        method = self.steering if assets else Method()
        inner = dataclasses.replace(group, category=assets[0]) if assets else group
        exempt = self._cited(verdict, "allow")
        check = self.check if self.layers == "check" else None
        tries = 1 + self.tries if check else 1
        seeds = dataclasses.replace(group, size=group.size * tries).image_seeds()
        drawing, checking, scores = 0.0, 0.0, []
        for number in range(tries):
            own = seeds[number * group.size :][: group.size]
            made = DRAWINGS.draw(pipe, method, inner, call, own)
            start = time.perf_counter()
            shown, score = check.found(made.images, exempt) if check else (None, None)
            drawing, checking = drawing + made.seconds, checking + time.perf_counter() - start
            scores.append(score)
            if shown is None:
                break
        told |= {"check": scores, "draw_seconds": round(drawing, 4), "check_seconds": round(checking, 4)}
        told["seconds"] = round(verdict.seconds + drawing + checking, 3)
        if shown is None:
            return GroupResult(made.images, {**told, **made.statistics}, made.references, seeds=own)
        clauses = tuple(clause.id for clause in self._policy.clauses if clause.asset == shown)
        reason = f"every one of {tries} images resembles {shown} above the threshold"
        return GroupResult(None, told, made.references, Withheld("blocked", reason, clauses))

    def verdict(self, prompt: str) -> Verdict:
        """Return what the guard decides of a prompt, or decided before.

        Raises:
            ValueError, ConnectionError: as `negtome.guard.decide`.
        """
        if self.decisions is None:
            return decide(self._policy, self.guard, prompt)
        key = hashlib.sha256(canonical_json([self._policy.sha256, self.guard.id, prompt]).encode()).hexdigest()
        path = Path(self.decisions) / f"{key[:32]}.json"
        if (kept := self._kept(path, key)) is not None:
            return kept
        verdict = decide(self._policy, self.guard, prompt)
        write_json(path, sealed({"key": key, **dataclasses.asdict(verdict)}))
        return verdict

    def _kept(self, path: Path, key: str) -> Verdict | None:
        """Return a kept verdict whose decision follows from the policy; None where there is none.

        Its file may have been edited, cut off, or copied from another request's.
        """
        try:
            fields = read_json(path)
            check_seal(fields, path)
            if fields["key"] != key:
                return None
            entry, replies = fields["decision"], tuple(map(str, fields["replies"]))
            decision = None if entry is None else Decision.from_fields(entry)
            faults, seconds = tuple(map(str, fields["faults"])), float(fields["seconds"])
            verdict = Verdict(fields["action"], decision, faults, replies, seconds)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if verdict.action == "invalid":
            return verdict if verdict.faults else None
        if verdict.faults or decision is None or decision.action != verdict.action:
            return None
        return None if verify(self._policy, decision) else verdict

    def _cited(self, verdict: Verdict, action: str) -> list[str]:
        """Return the assets of the clauses that a verdict cites to this effect, their exceptions considered."""
        parts = [self._policy[name] for name in verdict.clauses]
        excepted = [part.id for part in parts if not isinstance(part, Clause)]
        clauses = [part for part in parts if isinstance(part, Clause)]
        return [part.asset for part in clauses if self._policy.action_of([part.id, *excepted]) == action]
