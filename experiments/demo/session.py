"""What happens when somebody asks for images: a pipeline is loaded once, runs are queued, shown step by step, stopped.

Nothing here knows the page. `Session.run` yields a `State` whenever there is something new to show, the last of which
is "done", "stopped" or "failed".
"""

import logging
import queue
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

import negtome
from eval.alignment import clip_score
from eval.diversity import mean_pairwise_similarity
from eval.images import blurred
from eval.resemblance import similarities
from experiments import project_path
from experiments.configs import build
from experiments.demo import models
from experiments.demo.asked import MODES, Asked, kept, split
from experiments.demo.watch import Pushed, Steps, Stopped, Watch, pictures, stoppable, token_grid
from experiments.prompts import ConsecutiveGroup
from experiments.runs import catalogue
from negtome.generate import generate
from negtome.recipe import Recipe

log = logging.getLogger(__name__)

#: Baselines that are kept, the last ones.
KEPT = 16
#: Share of the baseline's CLIPScore below which images are said to show something else. It was chosen on the emoji
#: artwork of models/mini-reference, scored by mini-clip (tests/experiments/test_demo.py). Relative to four images of
#: the prompt's category, 99.9 % of other four score more, and 95 % of the other categories less. The rest are pairs
#: such as dog and animal, where both prompts are right.
STILL_SHOWN = 0.6


@dataclass(frozen=True)
class Row:
    """The images of a prompt by one method.

    Attributes:
        name: of the method, as in conf/method.
        title: for people.
        setup: its hyperparameter, for people; "" where the recipe has all settings.
        images: in the order of their seeds; empty where `refused`.
        seeds: of the images, where the method chose other ones than the recipe's.
        seconds: that the pipeline took, without the previews.
        kept: whether the images are those of an earlier run.
        distance: 1 - mean cosine similarity over the pairs of images; None of a single one, or without a scorer.
        clip: mean CLIPScore; None without a scorer.
        similarity: mean cosine similarity to the reference image, in [-1, 1]; None without one, or without a scorer.
        pushed: where and when tokens were pushed; None where that was not watched.
        tokens: how many were pushed; None of a method that pushes none.
        warning: why the images are probably not what the prompt asks for; "" where they may well be.
        refused: why there are no images.
    """

    name: str
    title: str
    setup: str = ""
    images: tuple[Image.Image, ...] = ()
    seeds: tuple[int, ...] = ()
    seconds: float = 0.0
    kept: bool = False
    distance: float | None = None
    clip: float | None = None
    similarity: float | None = None
    pushed: Pushed | None = None
    tokens: int | None = None
    warning: str = ""
    refused: str = ""


@dataclass(frozen=True)
class State:
    """Where a run is.

    Attributes:
        kind: "failed" is of what cannot be made, and of machines; `text` says what is so and `advice` what to do.
        asked: with the model that is used, which is another one than was asked for where weights are missing.
        recipe: what decides the images, once it is known.
        rows: the finished ones; the first is the baseline.
        title: of the row that is being made.
        step, steps: of its current call of the pipeline.
        preview: what it predicts by now.
        notes: what has to be known of the result: missing weights, warnings of the library.
        scorer: by what it is measured, or what is missing for that.
        seconds: by the clock, since the run was asked for: with waiting, loading, previews and measuring.
    """

    kind: Literal["queued", "loading", "working", "done", "stopped", "failed"]
    text: str
    asked: Asked
    advice: str = ""
    recipe: Recipe | None = None
    rows: tuple[Row, ...] = ()
    title: str = ""
    step: int = 0
    steps: int = 0
    preview: tuple[Image.Image, ...] = ()
    notes: tuple[str, ...] = ()
    scorer: str = ""
    seconds: float = 0.0


class Session:
    """One pipeline, and the runs that share it.

    Args:
        preview_share: of a run's time that its previews may take, in [0, 1].
        clock: returns seconds.
    """

    def __init__(self, preview_share: float = 0.1, clock: Callable[[], float] = time.perf_counter) -> None:
        self.preview_share, self.clock = preview_share, clock
        self.preview_costs: dict[Any, float] = {}
        self.turn = threading.Lock()  # held by the run that is going on
        self.loaded: tuple[models.Model, Any, models.Memory] | None = None
        self.measured: tuple[str, Measure] | None = None
        self.baselines: OrderedDict[Recipe, Row] = OrderedDict()

    def run(self, asked: Asked, stop: threading.Event) -> Iterator[State]:
        """Make what is asked for; set `stop`, and it ends before the next step. A generator closed does the same."""
        states: queue.SimpleQueue[State | None] = queue.SimpleQueue()
        threading.Thread(target=_Run(self, asked, stop, states.put).all, daemon=True).start()
        try:
            while (state := states.get()) is not None:
                yield state
        finally:
            stop.set()

    def measure(self, model: models.Model) -> "Measure":
        """Return what measures a model's images; the last one is kept, for it holds a network."""
        if self.measured is None or self.measured[0] != model.name:
            self.measured = (model.name, Measure(model))
        return self.measured[1]

    def grid(self, name: str) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Return the size of a model's images in pixels and in tokens.

        None while that is not known without waiting, or without dropping another model that somebody has loaded.
        """
        loaded = self.loaded  # once: a run of another thread may drop it at any time
        if loaded is None and name in models.names() and name.startswith("mini-") and self.turn.acquire(blocking=False):
            try:
                loaded = self.loaded or self.load(name)
            finally:
                self.turn.release()
        if loaded is None or loaded[0].name != name:
            return None
        model, pipe, _ = loaded
        size = tuple(model.call.get(side) or _default_side(pipe) for side in ("height", "width"))
        return size, token_grid(pipe, model.given, size)

    def load(self, name: str) -> tuple[models.Model, Any, models.Memory]:
        """Return a model with its pipeline; the last one is kept. Where `turn` is held."""
        if self.loaded is None or self.loaded[0].name != name:
            self.loaded = None  # before there are two of them
            model = models.find(name)
            self.loaded = (model, *models.load(model))
        return self.loaded


class _Run:
    """One run, in a thread of its own: what is yielded goes through `emit`, and None ends it."""

    def __init__(
        self, session: Session, asked: Asked, stop: threading.Event, emit: Callable[[State | None], None]
    ) -> None:
        self.session, self.asked, self.stop, self._emit = session, asked, stop, emit
        self.state = State("loading", "", asked)
        self.began = session.clock()
        self.steps = Steps(self._step, session.preview_share, session.clock, session.preview_costs)

    def say(self, kind: str, text: str, **changes: Any) -> None:
        usual = {"advice": "", "preview": (), "title": "", "step": 0, "steps": 0}
        seconds = self.session.clock() - self.began
        self.state = replace(self.state, kind=kind, text=text, seconds=seconds, **{**usual, **changes})
        self._emit(self.state)

    def note(self, text: str) -> None:
        self.state = replace(self.state, notes=(*self.state.notes, text))

    def all(self) -> None:
        """Wait for the turn and make everything; whatever happens is said."""
        turn = self.session.turn
        try:
            self.asked.check()
            if not turn.acquire(blocking=False):
                self.say("queued", "Queued: another run is going on, and yours starts when it has ended.")
                while not turn.acquire(timeout=0.1):
                    if self.stop.is_set():
                        raise Stopped
            try:
                self._make()
            finally:
                turn.release()
        except Stopped:
            at = f" after step {self.state.step} of {self.state.steps}" if self.state.steps else ""
            below = "What is finished stays below; " if self.state.rows else ""
            self.say("stopped", f"Stopped{at}.", advice=f"{below}Generate starts anew.", preview=self.state.preview)
        except Exception as error:  # whoever looks at the page has no other place to see it
            if is_out_of_memory(error):
                self.say("failed", "Out of memory.", advice=self._smaller())
            else:
                expected = isinstance(error, (ValueError, RuntimeError, OSError, TypeError))
                if not expected:
                    log.exception("a run of the demo failed")
                self.say("failed", str(error) if expected else f"{type(error).__name__}: {error}")
        finally:
            self._emit(None)

    def _make(self) -> None:
        model, pipe, memory = self._load()
        recipe = self.asked.recipe(model)
        measure = self.session.measure(model)
        self.state = replace(self.state, recipe=recipe, scorer=measure.words)
        size = None if recipe.height is None else (recipe.height, recipe.width)
        reference = _reference(self.asked) if "picture" in MODES[self.asked.mode].controls else None
        with stoppable(pipe, self.stop), self.steps.of(pipe, size, previews=not memory.offload):
            self._add(measure.similar(self._baseline(pipe, recipe.without(), measure), reference))
            for row in self._others(model, pipe, recipe):
                row = measure.similar(measure(row, recipe.prompt), reference)
                self._add(replace(row, warning=fallen(row, self.state.rows[0], recipe.prompt)))
        self.say("done", f"Done: {recipe.images} images a row.")

    def _others(self, model: models.Model, pipe: Any, recipe: Recipe) -> Iterator[Row]:
        """Make the rows after the baseline, each when it is asked for."""
        if self.asked.mode == "compare":
            yield from (self._method(model, pipe, name, recipe) for name in self.asked.methods)
        else:
            yield self._pushed(pipe, recipe)

    def _load(self) -> tuple[models.Model, Any, models.Memory]:
        name = self.asked.model
        if self.session.loaded is None or self.session.loaded[0].name != name:
            self.say("loading", f"Loading {name}.", advice="It stays loaded: the next run starts at once.")
        try:
            return self.session.load(name)
        except FileNotFoundError as error:
            if name == models.USUAL:
                raise
            self.note(f"{error}\nThese images are by {models.USUAL}, the embedded model, instead.")
            self.asked = replace(self.asked, model=models.USUAL)
            self.state = replace(self.state, asked=self.asked)
            return self._load()

    def _step(self, number: int, steps: int, preview: torch.Tensor | None) -> None:
        shown = self.state.preview if preview is None else pictures(preview)[: self.asked.images]
        title = self.state.title
        self.say("working", f"{title}: step {number} of {steps}.", title=title, step=number, steps=steps, preview=shown)

    def _start(self, title: str) -> None:
        self.say("working", f"{title}: starting.", title=title)

    def _add(self, row: Row) -> None:
        self.state = replace(self.state, rows=(*self.state.rows, row))

    def _baseline(self, pipe: Any, recipe: Recipe, measure: "Measure") -> Row:
        """Return the baseline, which is made once for all that depends on the same."""
        kept = self.session.baselines
        if recipe in kept:
            kept.move_to_end(recipe)
            return replace(kept[recipe], kept=True)
        self._start("Baseline")
        made, seconds = self._timed(lambda: generate(pipe, recipe))
        row = Row("none", "Baseline", images=tuple(made.images), seconds=seconds)
        row = kept[recipe] = measure(row, recipe.prompt)
        if len(kept) > KEPT:
            kept.popitem(last=False)
        return row

    def _pushed(self, pipe: Any, recipe: Recipe) -> Row:
        self._start("NegToMe")
        recipe = recipe.replace(**{name: _absolute(getattr(recipe, name)) for name in ("reference", "mask")})
        watch = Watch()
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", "NegToMe")
            images, seconds = self._timed(lambda: self._attached(pipe, recipe, watch))
        for warning in caught:
            if str(warning.message).startswith("NegToMe"):
                self.note(str(warning.message))
            else:
                log.warning("%s", warning.message)
        pushed = watch.pushed()
        tokens = sum(step.pushed for step in pushed.steps)
        return Row("negtome", "NegToMe", images=images, seconds=seconds, pushed=pushed, tokens=tokens)

    def _attached(self, pipe: Any, recipe: Recipe, watch: Watch) -> tuple[Image.Image, ...]:
        if self.asked.mode != "quality":
            return tuple(generate(pipe, recipe, watch.on_step).images)
        copies = [negtome.Reference(blurred(image, self.asked.blur)) for image in self.state.rows[0].images]
        with negtome.attach(pipe, recipe.config, references=copies, on_step=watch.on_step):
            return tuple(generate(pipe, recipe.without()).images)

    def _method(self, model: models.Model, pipe: Any, name: str, recipe: Recipe) -> Row:
        title = catalogue.entries()[name].title
        self._start(title)
        _, category = split(recipe.prompt)
        group = ConsecutiveGroup.of(recipe.prompt, category, recipe.seed, recipe.images)
        call = recipe.arguments()
        del call["prompt"], call["num_images_per_prompt"]
        try:
            setup, method = model.setup(name).text, model.method(name)
            drawn, seconds = self._timed(lambda: method.generate(pipe, group, call))
        except (ValueError, FileNotFoundError, RuntimeError) as error:  # one that the model cannot have hides no other
            if is_out_of_memory(error):
                raise
            return Row(name, title, refused=str(error))
        images = pictures(drawn.images)
        if all(map(_same, images, self.state.rows[0].images)):
            changed = f"It changes none of {recipe.images} images of this prompt: they are the baseline's. "
            return Row(name, title, setup, refused=f"{changed}Choose more images or leave the method out.")
        tokens = drawn.statistics.get("tokens_pushed")
        return Row(name, title, setup, images, tuple(drawn.seeds or ()), seconds, tokens=tokens)

    def _timed(self, make: Callable[[], Any]) -> tuple[Any, float]:
        clock = self.session.clock
        before, start = self.steps.spent, clock()
        made = make()
        return made, clock() - start - (self.steps.spent - before)

    def _smaller(self) -> str:
        torch.cuda.empty_cache()
        fewer = (
            f"fewer images at a time ({self.asked.images // 2} instead of {self.asked.images}), "
            if self.asked.images > 1
            else ""
        )
        return f"Try {fewer}a smaller model, or close what else uses the memory; {models.USUAL} fits everywhere."


class Measure:
    """Measures rows by a model's scorer; where its weights are missing, nothing is measured and `words` say so."""

    def __init__(self, model: models.Model) -> None:
        encoder = build(model.cfg.scorer)
        facts = encoder.weights()
        self._encoder = encoder if facts.present else None
        of_own = "this project's own small CLIP of emoji, which says nothing of other images"
        what = f"{facts.encoder}, {of_own}" if model.cfg.kind == "mini" else facts.encoder
        self.words = f"Measured by {what}. One group of images has no interval: it is one example, not a measurement."
        if self._encoder is None:
            self.words = f"Not measured: the weights of {facts.encoder} are not on this machine. {facts.how_to_get}"

    def __call__(self, row: Row, prompt: str) -> Row:
        """Return a row with its mean pairwise distance and its CLIPScore."""
        if self._encoder is None or not row.images:
            return row
        features, text = self._features(row.images), self._encoder.embed_texts([prompt])
        clip = float(clip_score(features, text.expand(len(features), -1)).mean())
        distance = 1 - float(mean_pairwise_similarity(features)) if len(features) > 1 else None
        return replace(row, distance=distance, clip=clip)

    def similar(self, row: Row, reference: Image.Image | None) -> Row:
        """Return a row with its mean cosine similarity to a reference image, if there is one."""
        if self._encoder is None or not row.images or reference is None:
            return row
        to = similarities(self._features(row.images), self._features([reference]))
        return replace(row, similarity=float(to.mean()))

    def _features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]
        return self._encoder.embed_images(pixels)


def fallen(row: Row, baseline: Row, prompt: str) -> str:
    """Return a warning where the CLIPScore fell so far that the images show something else; else ""."""
    if row.clip is None or not baseline.clip or row.clip >= STILL_SHOWN * baseline.clip:
        return ""
    advice = "Bring alpha nearer to 0, raise the threshold or narrow the timestep range. " if row.pushed else ""
    return (
        f"CLIPScore fell from {baseline.clip:.1f} to {row.clip:.1f}: these images probably no longer show “{prompt}”. "
        f"{advice}(You are warned below {100 * STILL_SHOWN:.0f} % of the baseline's score. In emoji artwork, an image "
        "paired with another category's prompt scores less than that in 95 % of the pairs.)"
    )


def _reference(asked: Asked) -> Image.Image:
    """Return the reference image, white where its mask leaves it out."""
    with Image.open(kept(asked.picture)) as picture:
        image = picture.convert("RGB")
    if asked.mask:
        with Image.open(kept(asked.mask)) as mask:
            inside = mask.convert("L").point(lambda value: 255 if value > 127 else 0)
        image = Image.composite(image, Image.new("RGB", image.size, "white"), inside)
    return image


def _same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


def _default_side(pipe: Any) -> int:
    return pipe.default_sample_size * pipe.vae_scale_factor


def _absolute(file: str | None) -> str | None:
    return None if file is None else str(project_path(file))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether something failed for want of memory, of a GPU's or the machine's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
