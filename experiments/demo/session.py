"""Run requests: load a pipeline once, queue runs, show every step, and stop.

`Session.start` starts a run, and `Job.follow` yields its `State` whenever there is something new to show; the last is
"done", "stopped" or "failed". A run continues while a page is reloaded: the page knows its id.
"""

import logging
import secrets
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
from experiments.demo.request import GenerationRequest, picture_file, split_prompt
from experiments.demo.watch import Pushed, Steps, Stopped, Watch, pictures, stoppable, token_grid
from experiments.prompts import ConsecutiveGroup
from experiments.runs import catalogue
from negtome.generate import generate
from negtome.recipe import Recipe

log = logging.getLogger(__name__)

#: Number of baselines that are kept, and of runs that a page can follow.
MAX_BASELINES, MAX_JOBS = 16, 8
#: Seconds that a run continues while no page follows it: longer than a page takes to reload.
PATIENCE = 30.0
#: A visitor is warned of images with less than this share of the baseline's CLIPScore. We chose it on the emoji artwork
#: of models/mini-reference, scored by mini-clip (tests/experiments/test_demo.py): compared with four images of the
#: prompt's category, 99.9 % of other four images score more, and 95 % of the other categories less. The other 5 % are
#: pairs such as dog and animal, where both prompts are right.
MIN_CLIP_SHARE = 0.6


@dataclass(frozen=True)
class Row:
    """The images of a prompt by one method.

    Attributes:
        name: of the method, as in conf/method.
        title: of the method, for people.
        setup: its hyperparameter; "" if the recipe has all settings.
        images: by seed; empty if `refused`.
        seeds: of the images, if the method chose other seeds than the recipe's.
        seconds: that the pipeline took, without the previews.
        kept: whether the images are those of an earlier run.
        distance: 1 - mean pairwise cosine similarity; None for a single image, or without an evaluation encoder.
        clip: mean CLIPScore; None without an evaluation encoder.
        similarity: mean cosine similarity to the reference image; None without one, or without an evaluation encoder.
        pushed: where and when tokens were pushed; None if that was not observed.
        tokens: number of pushed tokens; None for a method that pushes none.
        warning: why the images probably do not show the prompt, or "".
        refused: why there are no images, or "".
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
    """The state of a run.

    Attributes:
        kind: "failed" also for a request that cannot be run.
        text: one sentence on the state.
        request: with the model that is used, which differs from the visitor's if weights are missing.
        advice: what the visitor can do, or "".
        recipe: of the images; None at first.
        rows: the finished rows; the first is the baseline.
        title: of the row in progress.
        step, steps: of its current call of the pipeline.
        preview: the images that the last step predicts.
        notes: missing weights and warnings of the library.
        encoder: what measures the images, or why nothing does.
        seconds: wall-clock time since the request.
    """

    kind: Literal["queued", "loading", "working", "done", "stopped", "failed"]
    text: str
    request: GenerationRequest
    advice: str = ""
    recipe: Recipe | None = None
    rows: tuple[Row, ...] = ()
    title: str = ""
    step: int = 0
    steps: int = 0
    preview: tuple[Image.Image, ...] = ()
    notes: tuple[str, ...] = ()
    encoder: str = ""
    seconds: float = 0.0


class Session:
    """One pipeline, and the runs that share it.

    Args:
        preview_share: share of a run's time that its previews may take, in [0, 1].
        clock: returns seconds.
    """

    def __init__(self, preview_share: float = 0.1, clock: Callable[[], float] = time.perf_counter) -> None:
        self.preview_share, self.clock = preview_share, clock
        self.preview_costs: dict[Any, float] = {}
        self.turn = threading.Lock()  # held by the run in progress
        self.loaded: tuple[models.Model, Any, models.MemoryPlan] | None = None
        self.measured: tuple[str, Measure] | None = None
        self.baselines: OrderedDict[Recipe, Row] = OrderedDict()
        self.jobs: OrderedDict[str, Job] = OrderedDict()

    def start(self, request: GenerationRequest) -> str:
        """Start a job and return its id, by which `jobs` has it; earlier ones are forgotten."""
        name = secrets.token_hex(8)
        self.jobs[name] = Job(self, request)
        while len(self.jobs) > MAX_JOBS:
            self.jobs.popitem(last=False)
        return name

    def measure(self, model: models.Model) -> "Measure":
        """Return the measurement of a model's images; the last one is kept, since it holds a network."""
        if self.measured is None or self.measured[0] != model.name:
            self.measured = (model.name, Measure(model))
        return self.measured[1]

    def grid(self, name: str) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Return height and width of a model's images in pixels and in tokens.

        Returns None if that takes waiting, or would drop another model that is loaded.
        """
        loaded = self.loaded  # read once: a run in another thread may drop it at any time
        is_embedded = name in models.names() and name.startswith("mini-")
        if loaded is None and is_embedded and self.turn.acquire(blocking=False):
            try:
                loaded = self.loaded or self.load(name)
            finally:
                self.turn.release()
        if loaded is None or loaded[0].name != name:
            return None
        model, pipe, _ = loaded
        default = pipe.default_sample_size * pipe.vae_scale_factor
        size = tuple(model.call.get(side) or default for side in ("height", "width"))
        return size, token_grid(pipe, model.reference_config, size)

    def load(self, name: str) -> tuple[models.Model, Any, models.MemoryPlan]:
        """Return a model with its pipeline, which stays loaded; the caller holds `turn`."""
        if self.loaded is None or self.loaded[0].name != name:
            self.loaded = None  # so that two models are never in memory
            model = models.find(name)
            self.loaded = (model, *models.load(model))
        return self.loaded


class Job:
    """One run in a thread of its own, which ends when `stop` is set or `patience` seconds after its last page left."""

    def __init__(self, session: Session, request: GenerationRequest, patience: float = PATIENCE) -> None:
        self.session, self.request, self.patience = session, request, patience
        self.stop = threading.Event()
        self.state = State("loading", "", request)
        self.started = session.clock()
        self.steps = Steps(self._step, session.preview_share, session.clock, session.preview_costs)
        self._count, self._followers, self._has_ended = 0, 0, False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def follow(self) -> Iterator[State]:
        """Yield the current state and later ones to the last; states that come too fast are skipped."""
        with self._changed:
            self._followers += 1
        seen = 0
        try:
            while True:
                with self._changed:
                    while self._count == seen:
                        if self._has_ended:
                            return
                        self._changed.wait()
                    seen, state = self._count, self.state
                yield state
        finally:
            with self._changed:
                self._followers -= 1
            timer = threading.Timer(self.patience, self._stop_if_alone)
            timer.daemon = True
            timer.start()

    def _stop_if_alone(self) -> None:
        with self._changed:
            if not self._followers:
                self.stop.set()

    def update(self, kind: str, text: str, **changes: Any) -> None:
        """Show a new state; what belongs to one step is reset unless it is in `changes`."""
        per_step = {"advice": "", "preview": (), "title": "", "step": 0, "steps": 0}
        seconds = self.session.clock() - self.started
        with self._changed:
            self.state = replace(self.state, kind=kind, text=text, seconds=seconds, **{**per_step, **changes})
            self._count += 1
            self._changed.notify_all()

    def note(self, text: str) -> None:
        """Add a note to the next states."""
        self.state = replace(self.state, notes=(*self.state.notes, text))

    def _run(self) -> None:
        """Wait for the turn and run the request; every error ends in a state."""
        turn = self.session.turn
        try:
            self.request.check()
            if not turn.acquire(blocking=False):
                self.update("queued", "Queued: another run is in progress, and yours starts after it.")
                while not turn.acquire(timeout=0.1):
                    if self.stop.is_set():
                        raise Stopped
            try:
                self._make_rows()
            finally:
                turn.release()
        except Stopped:
            position = f" after step {self.state.step} of {self.state.steps}" if self.state.steps else ""
            rows = "The finished rows stay below. " if self.state.rows else ""
            advice = f"{rows}Generate starts a new run."
            self.update("stopped", f"Stopped{position}.", advice=advice, preview=self.state.preview)
        except Exception as error:  # a visitor sees errors only on the page
            self._fail(error)
        finally:
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        if is_out_of_memory(error):
            torch.cuda.empty_cache()
            images = self.request.images
            fewer = f"fewer images at a time ({images // 2} instead of {images}), " if images > 1 else ""
            advice = f"Try {fewer}a smaller model, or close other programs; {models.DEFAULT_MODEL} fits everywhere."
            self.update("failed", "Out of memory.", advice=advice)
        elif isinstance(error, (ValueError, RuntimeError, OSError, TypeError)):
            self.update("failed", str(error))
        else:
            log.exception("a run of the demo failed")
            self.update("failed", f"{type(error).__name__}: {error}")

    def _make_rows(self) -> None:
        model, pipe, memory = self._load()
        recipe = self.request.recipe(model)
        measure = self.session.measure(model)
        self.state = replace(self.state, recipe=recipe, encoder=measure.text)
        size = None if recipe.height is None else (recipe.height, recipe.width)
        reference = _reference_image(self.request) if self.request.uses("picture") else None
        with stoppable(pipe, self.stop), self.steps.of(pipe, size, previews=not memory.offload):
            baseline = measure.add_similarity(self._baseline(pipe, recipe.without(), measure), reference)
            self.state = replace(self.state, rows=(baseline,))
            for row in self._method_rows(model, pipe, recipe):
                row = measure.add_similarity(measure.add_scores(row, recipe.prompt), reference)
                row = replace(row, warning=clip_warning(row, baseline, recipe.prompt))
                self.state = replace(self.state, rows=(*self.state.rows, row))
        self.update("done", f"Done: {recipe.images} images a row.")

    def _method_rows(self, model: models.Model, pipe: Any, recipe: Recipe) -> Iterator[Row]:
        if self.request.mode == "compare":
            yield from (self._method(model, pipe, name, recipe) for name in self.request.methods)
        else:
            yield self._negtome(pipe, recipe)

    def _load(self) -> tuple[models.Model, Any, models.MemoryPlan]:
        name = self.request.model
        if self.session.loaded is None or self.session.loaded[0].name != name:
            self.update("loading", f"Loading {name}.", advice="It stays loaded: the next run starts at once.")
        try:
            return self.session.load(name)
        except FileNotFoundError as error:
            if name == models.DEFAULT_MODEL:
                raise
            self.note(f"{error}\nThese images are by {models.DEFAULT_MODEL}, the embedded model, instead.")
            self.request = replace(self.request, model=models.DEFAULT_MODEL)
            self.state = replace(self.state, request=self.request)
            return self._load()

    def _step(self, number: int, steps: int, preview: torch.Tensor | None) -> None:
        images = self.state.preview if preview is None else pictures(preview)[: self.request.images]
        title = self.state.title
        text = f"{title}: step {number} of {steps}."
        self.update("working", text, title=title, step=number, steps=steps, preview=images)

    def _start(self, title: str) -> None:
        self.update("working", f"{title}: starting.", title=title)

    def _baseline(self, pipe: Any, recipe: Recipe, measure: "Measure") -> Row:
        """Return the baseline, from an earlier run if its recipe is the same."""
        baselines = self.session.baselines
        if recipe in baselines:
            baselines.move_to_end(recipe)
            return replace(baselines[recipe], kept=True)
        self._start("Baseline")
        result, seconds = self._timed(lambda: generate(pipe, recipe))
        row = Row("none", "Baseline", images=tuple(result.images), seconds=seconds)
        row = baselines[recipe] = measure.add_scores(row, recipe.prompt)
        if len(baselines) > MAX_BASELINES:
            baselines.popitem(last=False)
        return row

    def _negtome(self, pipe: Any, recipe: Recipe) -> Row:
        self._start("NegToMe")
        files = {name: getattr(recipe, name) for name in ("reference", "mask")}
        recipe = recipe.replace(**{name: file and str(project_path(file)) for name, file in files.items()})
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
        tokens = sum(step.tokens_pushed for step in pushed.steps)
        return Row("negtome", "NegToMe", images=images, seconds=seconds, pushed=pushed, tokens=tokens)

    def _attached(self, pipe: Any, recipe: Recipe, watch: Watch) -> tuple[Image.Image, ...]:
        if self.request.mode != "quality":
            return tuple(generate(pipe, recipe, watch.on_step).images)
        copies = [negtome.Reference(blurred(image, self.request.blur)) for image in self.state.rows[0].images]
        with negtome.attach(pipe, recipe.config, references=copies, on_step=watch.on_step):
            return tuple(generate(pipe, recipe.without()).images)

    def _method(self, model: models.Model, pipe: Any, name: str, recipe: Recipe) -> Row:
        title = catalogue.entries()[name].title
        self._start(title)
        _, category = split_prompt(recipe.prompt)
        group = ConsecutiveGroup.of(recipe.prompt, category, recipe.seed, recipe.images)
        call = recipe.arguments()
        del call["prompt"], call["num_images_per_prompt"]
        try:
            setup, method = model.setup(name).text, model.method(name)
            result, seconds = self._timed(lambda: method.generate(pipe, group, call))
        except (ValueError, FileNotFoundError, RuntimeError) as error:  # a method that fails hides no other method
            if is_out_of_memory(error):
                raise
            return Row(name, title, refused=str(error))
        images = pictures(result.images)
        if all(map(_is_same, images, self.state.rows[0].images)):
            unchanged = f"It changes none of {recipe.images} images of this prompt: they are the baseline's. "
            return Row(name, title, setup, refused=f"{unchanged}Choose more images or leave the method out.")
        tokens = result.statistics.get("tokens_pushed")
        return Row(name, title, setup, images, tuple(result.seeds or ()), seconds, tokens=tokens)

    def _timed(self, function: Callable[[], Any]) -> tuple[Any, float]:
        """Return a function's result and its seconds without those of the previews."""
        clock = self.session.clock
        previews, start = self.steps.spent, clock()
        result = function()
        return result, clock() - start - (self.steps.spent - previews)


class Measure:
    """Measures rows with a model's evaluation encoder; without its weights it measures nothing and `text` says so."""

    def __init__(self, model: models.Model) -> None:
        encoder = build(model.cfg.scorer)
        facts = encoder.weights()
        self._encoder = encoder if facts.present else None
        emoji = ", this project's small CLIP of emoji, whose scores of other images mean nothing"
        name = f"{facts.encoder}{emoji if model.cfg.kind == 'mini' else ''}"
        self.text = f"Measured by {name}. This is one example, not a measurement: one group has no interval."
        if self._encoder is None:
            self.text = f"Not measured: the weights of {facts.encoder} are not on this machine. {facts.how_to_get}"

    def add_scores(self, row: Row, prompt: str) -> Row:
        """Return a row with its mean pairwise distance and its CLIPScore."""
        if self._encoder is None or not row.images:
            return row
        features, text = self._features(row.images), self._encoder.embed_texts([prompt])
        clip = float(clip_score(features, text.expand(len(features), -1)).mean())
        distance = 1 - float(mean_pairwise_similarity(features)) if len(features) > 1 else None
        return replace(row, distance=distance, clip=clip)

    def add_similarity(self, row: Row, reference: Image.Image | None) -> Row:
        """Return a row with its mean cosine similarity to a reference image, if there is one."""
        if self._encoder is None or not row.images or reference is None:
            return row
        similarity = similarities(self._features(row.images), self._features([reference]))
        return replace(row, similarity=float(similarity.mean()))

    def _features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]
        return self._encoder.embed_images(pixels)


def clip_warning(row: Row, baseline: Row, prompt: str) -> str:
    """Return a warning if the CLIPScore fell so far that the images show something else, or ""."""
    if row.clip is None or not baseline.clip or row.clip >= MIN_CLIP_SHARE * baseline.clip:
        return ""
    advice = "Bring alpha nearer to 0, raise the threshold or narrow the timestep range. " if row.pushed else ""
    return (
        f"CLIPScore fell from {baseline.clip:.1f} to {row.clip:.1f}: these images probably no longer show “{prompt}”. "
        f"{advice}(You are warned below {100 * MIN_CLIP_SHARE:.0f} % of the baseline's score. In emoji artwork, an "
        "image paired with another category's prompt scores less than that in 95 % of the pairs.)"
    )


def _reference_image(request: GenerationRequest) -> Image.Image:
    """Return the reference image, white outside of its mask."""
    with Image.open(picture_file(request.picture)) as picture:
        image = picture.convert("RGB")
    if request.mask:
        with Image.open(picture_file(request.mask)) as mask:
            inside = mask.convert("L").point(lambda value: 255 if value > 127 else 0)
        image = Image.composite(image, Image.new("RGB", image.size, "white"), inside)
    return image


def _is_same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error comes from a lack of memory, on a GPU or in the machine."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
