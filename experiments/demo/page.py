"""The page: what stands where, and what calls what. The one module that imports gradio."""

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before gradio is imported, which reads them then: nothing of this page goes anywhere.
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}

import gradio as gr
from PIL import Image

from experiments.demo import models, view
from experiments.demo.asked import MODES, MOST_IMAGES, SEEDS, Asked, keep, kept
from experiments.demo.jobs import Jobs
from experiments.demo.session import Session
from experiments.runs import catalogue

FOLDER = Path(__file__).parent
#: The fields of what is asked for that have a control of their own, in the order of the page.
FIELDS = (
    "mode", "prompt", "model", "images", "seed", "steps", "alpha", "threshold", "low", "high", "matching", "blur",
    "methods",
)  # fmt: skip
#: Whose settings are those of the model and mode, until somebody moves them.
SETTINGS = ("alpha", "threshold", "low", "high")
#: Of what is painted over a picture.
BRUSH = "#D55E00"
#: What is raised of a name that is no model's, on this machine.
NO_MODEL = (ValueError, OSError, RuntimeError)
#: Seconds between two looks for pictures of visitors that gradio keeps, and after which it drops them.
KEPT_FOR = 3600
WELCOME = "<p class='nt-hint'>Generate shows the same seeds in two rows, the baseline and NegToMe.</p>"


class Page:
    """One page and its session.

    Args:
        model: that is chosen at first.
        session: that makes the images.
    """

    def __init__(self, model: str, session: Session) -> None:
        self.session, self.jobs = session, Jobs(session)
        steps = models.find(model).steps  # which says it where there is no such model
        settings = dict(zip(SETTINGS, self._usual("diversity", model), strict=True))
        self.first = Asked(model=model, steps=steps, **settings)
        self.controls: dict[str, Any] = {}
        about = {"title": "negtome", "analytics_enabled": False, "fill_width": True}
        with gr.Blocks(**about, delete_cache=(KEPT_FOR, KEPT_FOR)) as self.blocks:
            gr.HTML(
                "<header><h1>negtome</h1><p>The same prompts and seeds without Negative Token Merging and with it. "
                "Everything happens on this machine.</p></header>"
            )
            with gr.Row(elem_id="nt-page"):
                with gr.Column(scale=2, min_width=300, elem_id="nt-left"):
                    self._task_controls()
                    self._strength_controls()
                    self._image_controls()
                with gr.Column(scale=5, min_width=300, elem_id="nt-right"):
                    self.progress = gr.HTML(WELCOME, elem_id="nt-progress")
                    self.results = gr.HTML("", elem_id="nt-results", js_on_load=(FOLDER / "page.js").read_text())
            # The address of these settings, and the run that is shown: a reload of the page keeps both.
            self.link, self.job = (gr.Textbox("", visible="hidden", label=name) for name in ("Link", "Run"))
            self._wire()

    def _task_controls(self) -> None:
        """What to do, the prompt, and what a mode has of its own."""
        add, first = self.controls, self.first
        add["mode"] = gr.Radio(
            [(mode.title, name) for name, mode in MODES.items()],
            value=first.mode,
            label="What to do",
            elem_id="nt-mode",
        )
        self.what = gr.Markdown(MODES[first.mode].what, elem_id="nt-what")
        add["prompt"] = gr.Textbox(
            first.prompt, label="Prompt", info="What all images show.", lines=2, elem_id="nt-prompt"
        )
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", elem_id="nt-go")
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="nt-stop")
        self.editor = gr.ImageEditor(
            type="pil", image_mode="RGBA", format="png", label="Reference image", transforms=(),
            sources=("upload", "clipboard"), layers=False,
            brush=gr.Brush(default_size=20, colors=[BRUSH], color_mode="fixed"),
            canvas_size=(512, 512), buttons=[], visible=False, elem_id="nt-picture",
            placeholder="Drop an image here, or paste one",
        )  # fmt: skip
        self.seen = gr.HTML("", visible=False, elem_id="nt-seen")
        add["methods"] = gr.CheckboxGroup(
            [(entry.title, name) for name, entry in catalogue.entries().items()],
            label="Methods",
            info="Each with the hyperparameter chosen for this model, else its default.",
            visible=False,
            elem_id="nt-methods",
        )
        add["blur"] = gr.Slider(
            0.01, 0.2, first.blur, step=0.01, label="Blur", info="Of the copy, as a share of an image's side.",
            visible=False, elem_id="nt-blur",
        )  # fmt: skip

    def _strength_controls(self) -> None:
        """How tokens are pushed."""
        add, first = self.controls, self.first
        with gr.Group(elem_id="nt-strength") as self.strength:
            add["alpha"] = gr.Slider(
                -2, 4, first.alpha, step=0.05, label="Alpha", info="How far tokens are pushed; below 0 pulls."
            )
            add["threshold"] = gr.Slider(
                -1,
                1,
                first.threshold,
                step=0.01,
                label="Threshold",
                info="Only tokens more alike than this move.",
            )
            add["high"] = gr.Slider(
                0,
                1000,
                first.high,
                step=10,
                label="Timestep range from",
                info="Timestep of the first push; 1000 is noise.",
            )
            add["low"] = gr.Slider(
                0, 1000, first.low, step=10, label="Timestep range to", info="Timestep of the last push."
            )
            add["matching"] = gr.Radio(
                ["paper", "released"], value=first.matching, label="Matching",
                info="To the nearest token, as in the paper, or as in the released code.",
            )  # fmt: skip

    def _image_controls(self) -> None:
        """Which images are made: by what model, how many, from which seeds."""
        add, first = self.controls, self.first
        with gr.Group():
            add["model"] = gr.Dropdown(
                list(models.names()), value=first.model, label="Model", allow_custom_value=True, filterable=True,
                info="A name (mini-: small, they draw emoji), a folder, or a cached repository.", elem_id="nt-model",
            )  # fmt: skip
            self.here = gr.Markdown("", visible=False, elem_id="nt-here")
            add["images"] = gr.Slider(1, MOST_IMAGES, first.images, step=1, label="Images", info="Made together.")
            add["steps"] = gr.Number(
                first.steps, label="Steps", info="Of denoising; at first the model's own.", precision=0, minimum=1,
                maximum=200, elem_id="nt-steps",
            )  # fmt: skip
            add["seed"] = gr.Number(
                first.seed, label="Seed", info="Of the first image; the others' follow it.", precision=0,
                minimum=0, maximum=SEEDS - 1, elem_id="nt-seed",
            )  # fmt: skip
            self.lock = gr.Checkbox(True, label="Keep this seed", info="Otherwise every run draws a new one.")
        self.dice = gr.Button("Draw a new seed", size="sm", elem_id="nt-dice")

    def _wire(self) -> None:
        """What calls what."""
        inputs = [*(self.controls[name] for name in FIELDS), self.editor]
        state = [self.lock, *inputs]
        into_address = {"fn": None, "inputs": [self.link, self.job], "js": _ADDRESS, "api_visibility": "private"}
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        shown = [self.what, self.editor, self.seen, self.strength, self.controls["blur"], self.controls["methods"]]
        chosen = [self.controls["mode"], self.controls["model"]]
        settings = [self.controls[name] for name in SETTINGS]
        restored = self.blocks.load(self._restore, None, [self.job, *state], **quiet)
        show = {
            "fn": self._show,
            "inputs": [*chosen, self.controls["methods"]],
            "outputs": [*shown, self.here],
            **quiet,
        }
        restored.then(**show)
        shown_run = [self.progress, self.results, self.go, self.stop]
        follow = {"fn": self._follow, "inputs": self.job, "outputs": shown_run, "concurrency_limit": None, **quiet}
        restored.then(**follow)
        for control in chosen:
            moved = control.input(**show).then(self._usual, chosen, settings, **quiet)
        moved.then(self._steps, chosen[1], self.controls["steps"], **quiet)
        editor = self.editor
        drawn = [editor.change, editor.upload, editor.input]  # change alone is told of a new image before it is there
        gr.on(
            drawn,
            self._look,
            [editor, self.controls["model"]],
            self.seen,
            trigger_mode="always_last",
            **quiet,
        )
        self.dice.click(lambda: random.randrange(SEEDS), None, self.controls["seed"], **quiet)
        self.go.click(None, None, None, js=_TO_RESULTS, api_visibility="private")
        started = gr.on(
            [self.go.click, self.controls["prompt"].submit],
            self._start,
            state,
            [self.job, self.link, self.controls["seed"]],
            **quiet,
        )
        started.success(**into_address)
        started.success(**follow)
        link = {"fn": self._link, "inputs": state, "outputs": self.link, **quiet}
        restored.then(**link).then(**into_address)
        changed = [one.change for one in (self.lock, *self.controls.values())]
        gr.on([*changed, *drawn], **link, trigger_mode="always_last").then(**into_address)
        self.stop.click(self._stop, self.job, None, queue=False, **quiet)

    def _restore(self, request: gr.Request) -> list[Any]:
        """Set all controls, and the run to follow, by the page's address, if it says anything."""
        query = dict(request.query_params)
        job, lock = query.get("job", ""), query.get("lock") != "0"
        job = job if self.jobs.get(job) else ""
        if not query.keys() & set(FIELDS):
            return [job, lock, *[gr.skip()] * (len(FIELDS) + 1)]
        asked, picture = Asked.from_query(query, own=self.first.model), gr.skip()
        if query.get("model", asked.model) != asked.model:
            gr.Warning(f"A link may name no folder as model: {asked.model} is chosen instead.")
        usual = dict(zip(SETTINGS, self._usual(asked.mode, asked.model), strict=True))
        values = {name: getattr(asked, name) for name in FIELDS} | {"methods": list(asked.methods)}
        usual["steps"] = self._steps(asked.model)
        values |= {name: value for name, value in usual.items() if name not in query}
        if asked.picture:
            background = Image.open(kept(asked.picture)).convert("RGBA")
            layers = [_painted(Image.open(kept(asked.mask)))] if asked.mask else []
            composite = background if not layers else Image.alpha_composite(background, layers[0])
            picture = {"background": background, "layers": layers, "composite": composite}
        return [job, lock, *values.values(), picture]

    def _show(self, mode: str, name: str, methods: list[str]) -> list[Any]:
        """Show the controls of a mode, and say whether a model is here."""
        controls = MODES[mode].controls
        titles, here = {}, ""
        try:
            model = models.find(name)
            titles = model.methods()
            if not models.is_here(name):
                here = f"Its weights are not on this machine: {models.USUAL} would make the images."
        except NO_MODEL as error:
            here = str(error)
        chosen = [name for name in methods or self.first.methods if name in titles]
        return [
            gr.Markdown(MODES[mode].what),
            gr.ImageEditor(visible="picture" in controls),
            gr.HTML(visible="picture" in controls),
            gr.Group(visible="alpha" in controls),
            gr.Slider(visible="blur" in controls),
            gr.CheckboxGroup(
                [(title, method) for method, title in titles.items()], value=chosen, visible="methods" in controls
            ),
            gr.Markdown(here, visible=bool(here)),
        ]

    def _usual(self, mode: str, name: str) -> list[Any]:
        """Return the settings that a model is used best with, as far as that is known."""
        try:
            model = models.find(name)
        except NO_MODEL:  # `_show` says why
            return [gr.skip()] * len(SETTINGS)
        config = model.group if mode == "diversity" else model.given
        alpha = MODES[mode].alpha
        return [config.alpha if alpha is None else alpha, config.threshold, *config.timestep_range]

    def _steps(self, name: str) -> Any:
        """Return how many steps a model is configured with."""
        try:
            return models.find(name).steps
        except NO_MODEL:
            return gr.skip()

    def _asked(self, *values: Any) -> Asked:
        """Return what is asked for, and keep its picture."""
        *values, drawn = values
        fields = dict(zip(FIELDS, values, strict=True))
        for name in ("images", "seed", "steps"):
            fields[name] = int(fields[name] or 0)
        fields["methods"] = tuple(fields["methods"] or ())
        fields["model"] = str(fields["model"] or models.USUAL).strip()
        picture, mask = _given(drawn)
        if picture is not None and "picture" in MODES[fields["mode"]].controls:
            fields |= {"picture": keep(picture), "mask": "" if mask is None else keep(mask)}
        return Asked(**fields)

    def _look(self, drawn: Any, model: str) -> str:
        """Return the given picture as the tokens see it."""
        picture, mask = _given(drawn)
        if picture is None:
            return ""
        seen = self.session.grid(model)
        return view.mask_seen(picture, mask, *seen) if seen else "Shown as the tokens see it once the model is loaded."

    def _link(self, lock: bool, *values: Any) -> str:
        """Return the page's address with all of its settings."""
        return self._asked(*values).link() + ("" if lock else "&lock=0")

    def _start(self, lock: bool, *values: Any) -> list[Any]:
        """Start what is asked for; return its job, the page's address and the seed."""
        asked = self._asked(*values)
        try:
            asked.check()
        except ValueError as error:
            raise gr.Error(str(error), duration=8, print_exception=False) from error
        if not lock:
            asked = replace(asked, seed=random.randrange(SEEDS))
        return [self.jobs.start(asked), asked.link() + ("" if lock else "&lock=0"), asked.seed]

    def _follow(self, name: str) -> Iterator[list[Any]]:
        """Show a job until it ends; nothing where there is none of this id."""
        if (job := self.jobs.get(name)) is None:
            yield [gr.skip()] * 4  # else gradio empties what is shown
            return
        rows, buttons = -1, [gr.Button(interactive=False), gr.Button(interactive=True)]
        for state in job.follow():
            ended = state.kind in ("done", "stopped", "failed")
            if ended:
                buttons = [gr.Button(interactive=True), gr.Button(interactive=False)]
            fresh = ended or len(state.rows) != rows
            rows = len(state.rows)
            model = models.find(state.asked.model) if state.kind == "done" else None
            shown = view.results(state, model) if fresh else gr.skip()
            yield [view.progress(state), shown, *buttons]

    def _stop(self, name: str) -> None:
        if (job := self.jobs.get(name)) is not None:
            job.stop.set()


def _given(drawn: Any) -> tuple[Image.Image | None, Image.Image | None]:
    """Return an image editor's picture, RGB, and its mask, L, white where something is painted; None where none is."""
    if not drawn or drawn["background"] is None:
        return None, None
    picture = drawn["background"].convert("RGBA")
    mask = Image.new("L", picture.size)
    for layer in drawn["layers"]:
        mask.paste(255, mask=layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0))
    on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return on_white, mask if mask.getbbox() else None


def _painted(mask: Image.Image) -> Image.Image:
    """Return a mask as the editor's brush would have painted it."""
    layer = Image.new("RGBA", mask.size)
    layer.paste(BRUSH, mask=mask.convert("L"))
    return layer


def launched(page: Page, port: int | None = None) -> str:
    """Serve a page in threads of this process, to this machine alone, and return its address."""
    system = ("system-ui", "sans-serif")  # the usual ones are files of their own
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=system, font_mono=("ui-monospace", "monospace")
    ).set(  # darker than usual, to be read by everybody
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        block_label_text_color="*neutral_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )
    _, address, _ = page.blocks.queue(default_concurrency_limit=None).launch(
        server_name="127.0.0.1", server_port=port, share=False, prevent_thread_lock=True, quiet=True, footer_links=[],
        run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, theme=theme,
        css=(FOLDER / "page.css").read_text(), favicon_path=None,
    )  # fmt: skip
    return address


def serve(model: str, port: int | None) -> None:
    """Serve a page until Ctrl-C."""
    page = Page(model, Session())
    print(f"negtome is at {launched(page, port)} (Ctrl-C ends it)", flush=True)
    page.blocks.block_thread()


#: On a narrow screen the images stand above all controls.
_TO_RESULTS = "() => { if (innerWidth < 900) document.getElementById('nt-right').scrollIntoView(); }"
#: A reload of the page finds its settings and its run in the address.
_ADDRESS = "(link, job) => { if (link) history.replaceState(null, '', link + (job ? `&job=${job}` : '')); }"
