"""The layout and the events of the page. The only module that imports gradio."""

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Gradio reads these when it is imported: the page sends nothing anywhere.
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}

import gradio as gr
from PIL import Image

from experiments.demo import models, view
from experiments.demo.request import MAX_IMAGES, MODES, SEEDS, GenerationRequest, picture_file, save_picture
from experiments.demo.session import Session
from experiments.runs import catalogue
from negtome import NegToMeConfig

FOLDER = Path(__file__).parent
#: Fields of a request with a control of their own, in the order of the page.
FIELDS = (
    "mode", "prompt", "model", "images", "seed", "steps", "alpha", "threshold", "low", "high", "step_range",
    "matching", "blur", "methods",
)  # fmt: skip
#: Fields whose defaults depend on the model and the mode.
SETTINGS = ("alpha", "threshold", "low", "high", "step_range")
#: Colour of the brush that paints a mask.
BRUSH = "#D55E00"
#: Raised by `models.find` for a name that is no model on this machine.
NO_MODEL = (ValueError, OSError, RuntimeError)
#: Seconds after which gradio deletes uploaded images, and between two looks for them.
KEEP_SECONDS = 3600
WELCOME = "<p class='nt-hint'>Generate makes two rows from the same seeds: the baseline and NegToMe.</p>"
#: On a narrow screen the results stand above the controls.
_SCROLL_TO_RESULTS = "() => { if (innerWidth < 900) document.getElementById('nt-right').scrollIntoView(); }"
#: The address keeps the settings and the run when the page is reloaded.
_SET_ADDRESS = "(link, job) => { if (link) history.replaceState(null, '', link + (job ? `&job=${job}` : '')); }"


class Page:
    """A page that serves the runs of a session.

    Args:
        model: selected at first.
        session: runs the requests.
    """

    def __init__(self, model: str, session: Session) -> None:
        self.session = session
        steps = models.find(model).steps  # raises if there is no such model
        settings = dict(zip(SETTINGS, self._default_settings("diversity", model), strict=True))
        self.initial = GenerationRequest(model=model, steps=steps, **settings)
        self.controls: dict[str, Any] = {}
        options = {"title": "negtome", "analytics_enabled": False, "fill_width": True}
        with gr.Blocks(**options, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as self.blocks:
            gr.HTML(
                "<header><h1>negtome</h1><p>The same prompt and seeds without and with Negative Token Merging. "
                "All images are made on this machine.</p></header>"
            )
            with gr.Row(elem_id="nt-page"):
                with gr.Column(scale=2, min_width=300, elem_id="nt-left"):
                    self._add_task_controls()
                    self._add_strength_controls()
                    self._add_image_controls()
                with gr.Column(scale=5, min_width=300, elem_id="nt-right"):
                    self.progress = gr.HTML(WELCOME, elem_id="nt-progress")
                    self.results = gr.HTML("", elem_id="nt-results", js_on_load=(FOLDER / "page.js").read_text())
            self.link, self.job = (gr.Textbox("", visible="hidden", label=name) for name in ("Link", "Run"))
            self._connect_events()

    def _add(self, control: Any, field: str, label: str, info: str | None = None, **options: Any) -> None:
        """Add a control of a field of the request, with its initial value."""
        value = getattr(self.initial, field)
        value = list(value) if isinstance(value, tuple) else value
        self.controls[field] = control(value=value, label=label, info=info, elem_id=f"nt-{field}", **options)

    def _add_task_controls(self) -> None:
        titles = [(mode.title, name) for name, mode in MODES.items()]
        self._add(gr.Radio, "mode", "What to do", choices=titles)
        self.description = gr.Markdown(MODES[self.initial.mode].description, elem_id="nt-description")
        self._add(gr.Textbox, "prompt", "Prompt", "What all images show.", lines=2)
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
        titles = [(entry.title, name) for name, entry in catalogue.entries().items()]
        info = "Each with the hyperparameter chosen for this model, else its default."
        self._add(gr.CheckboxGroup, "methods", "Methods", info, choices=titles, visible=False)
        info = "Radius, as a share of the image's side. Higher: a more blurred copy."
        self._add(gr.Slider, "blur", "Blur", info, minimum=0.01, maximum=0.2, step=0.01, visible=False)

    def _add_strength_controls(self) -> None:
        with gr.Group(elem_id="nt-strength") as self.strength:
            info = "Higher: tokens are pushed further. Below 0: they are pulled."
            self._add(gr.Slider, "alpha", "Alpha", info, minimum=-2, maximum=4, step=0.05)
            info = "Only tokens more similar than this are pushed. Higher: fewer tokens."
            self._add(gr.Slider, "threshold", "Threshold", info, minimum=-1, maximum=1, step=0.01)
            info = "Pushes start at this timestep; 1000 is pure noise. Higher: an earlier start."
            self._add(gr.Slider, "high", "Timestep range from", info, minimum=0, maximum=1000, step=10)
            info = "Pushes end at this timestep; 0 is the final image. Higher: an earlier end."
            self._add(gr.Slider, "low", "Timestep range to", info, minimum=0, maximum=1000, step=10)
            info = "In place of the timestep range: 0:0 is the first step, 0:0.25 the first quarter. Empty: not used."
            self._add(gr.Textbox, "step_range", "Step range", info, max_lines=1)
            info = "paper: to the most similar token. released: as in the authors' code."
            self._add(gr.Radio, "matching", "Matching", info, choices=["paper", "released"])

    def _add_image_controls(self) -> None:
        with gr.Group():
            info = "A name (mini-: small models that draw emoji), a folder, or a cached repository."
            names = list(models.names())
            self._add(gr.Dropdown, "model", "Model", info, choices=names, allow_custom_value=True, filterable=True)
            self.model_note = gr.Markdown("", visible=False, elem_id="nt-model-note")
            info = "Generated together. More: more memory and time."
            self._add(gr.Slider, "images", "Images", info, minimum=1, maximum=MAX_IMAGES, step=1)
            info = "Denoising steps. More: finer images and more time."
            self._add(gr.Number, "steps", "Steps", info, precision=0, minimum=1, maximum=200)
            info = "Of the first image; the next images have the next seeds."
            self._add(gr.Number, "seed", "Seed", info, precision=0, minimum=0, maximum=SEEDS - 1)
            self.lock = gr.Checkbox(True, label="Keep this seed", info="If off, every run draws a new one.")
        self.dice = gr.Button("Draw a new seed", size="sm", elem_id="nt-dice")

    def _connect_events(self) -> None:
        inputs = [*(self.controls[name] for name in FIELDS), self.editor]
        state = [self.lock, *inputs]
        model, methods = self.controls["model"], self.controls["methods"]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        address = {"fn": None, "inputs": [self.link, self.job], "js": _SET_ADDRESS, "api_visibility": "private"}
        mode_and_model = [self.controls["mode"], model]
        shown = [self.description, self.editor, self.seen, self.strength, self.controls["blur"], methods]
        show = {
            "fn": self._show,
            "inputs": [*mode_and_model, methods],
            "outputs": [*shown, self.model_note],
            **quiet,
        }
        run = [self.progress, self.results, self.go, self.stop]
        follow = {"fn": self._follow, "inputs": self.job, "outputs": run, "concurrency_limit": None, **quiet}
        link = {"fn": self._link, "inputs": state, "outputs": self.link, **quiet}

        restored = self.blocks.load(self._restore, None, [self.job, *state], **quiet)
        restored.then(**show)
        restored.then(**follow)
        restored.then(**link).then(**address)

        settings = [self.controls[name] for name in SETTINGS]
        for control in mode_and_model:
            changed = control.input(**show).then(self._default_settings, mode_and_model, settings, **quiet)
        changed.then(self._default_steps, model, self.controls["steps"], **quiet)

        editor = self.editor
        edited = [editor.change, editor.upload, editor.input]  # change alone comes before a new image is there
        gr.on(edited, self._show_mask, [editor, model], self.seen, trigger_mode="always_last", **quiet)
        controls = [control.change for control in (self.lock, *self.controls.values())]
        gr.on([*controls, *edited], **link, trigger_mode="always_last").then(**address)

        self.dice.click(lambda: random.randrange(SEEDS), None, self.controls["seed"], **quiet)
        self.go.click(None, None, None, js=_SCROLL_TO_RESULTS, api_visibility="private")
        submit = [self.go.click, self.controls["prompt"].submit]
        started = gr.on(submit, self._start, state, [self.job, self.link, self.controls["seed"]], **quiet)
        started.success(**address)
        started.success(**follow)
        self.stop.click(self._stop, self.job, None, queue=False, **quiet)

    def _restore(self, request: gr.Request) -> list[Any]:
        """Set the job, the lock, all controls and the editor from the page's address."""
        query = dict(request.query_params)
        job, lock = query.get("job", ""), query.get("lock") != "0"
        job = job if self.session.jobs.get(job) else ""
        if not query.keys() & set(FIELDS):
            return [job, lock, *[gr.skip()] * (len(FIELDS) + 1)]
        linked = GenerationRequest.from_query(query, self.initial.model)
        if query.get("model", linked.model) != linked.model:
            gr.Warning(f"A link may not name a folder as model: {linked.model} is chosen instead.")
        defaults = dict(zip(SETTINGS, self._default_settings(linked.mode, linked.model), strict=True))
        defaults["steps"] = self._default_steps(linked.model)
        values = {name: getattr(linked, name) for name in FIELDS} | {"methods": list(linked.methods)}
        values |= {name: value for name, value in defaults.items() if name not in query}
        return [job, lock, *values.values(), _editor_value(linked)]

    def _show(self, mode: str, name: str, methods: list[str]) -> list[Any]:
        """Show the controls of a mode, and a note if the model is not on this machine."""
        controls, titles, note = MODES[mode].controls, {}, ""
        try:
            titles = models.find(name).methods()
            if not models.has_weights(name):
                note = f"Its weights are not on this machine: {models.DEFAULT_MODEL} would make the images."
        except NO_MODEL as error:
            note = str(error)
        choices = [(title, method) for method, title in titles.items()]
        ticked = [method for method in methods or self.initial.methods if method in titles]
        return [
            gr.Markdown(MODES[mode].description),
            gr.ImageEditor(visible="picture" in controls),
            gr.HTML(visible="picture" in controls),
            gr.Group(visible="alpha" in controls),
            gr.Slider(visible="blur" in controls),
            gr.CheckboxGroup(choices, value=ticked, visible="methods" in controls),
            gr.Markdown(note, visible=bool(note)),
        ]

    def _default_settings(self, mode: str, name: str) -> list[Any]:
        """Return the values of `SETTINGS` that are configured for a model and a mode."""
        try:
            model = models.find(name)
        except NO_MODEL:  # `_show` says why
            return [gr.skip()] * len(SETTINGS)
        config = model.group_config if mode == "diversity" else model.reference_config
        alpha = MODES[mode].alpha
        steps = "" if config.step_range is None else ":".join(map(str, config.step_range))
        low, high = config.timestep_range or NegToMeConfig().published_for(model.cfg.architecture).window()
        return [config.alpha if alpha is None else alpha, config.threshold, low, high, steps]

    def _default_steps(self, name: str) -> Any:
        try:
            return models.find(name).steps
        except NO_MODEL:
            return gr.skip()

    def _request(self, *values: Any) -> GenerationRequest:
        """Return the request that the controls and the editor describe, and save its reference image."""
        *values, drawing = values
        fields = dict(zip(FIELDS, values, strict=True))
        for name in ("images", "seed", "steps"):
            fields[name] = int(fields[name] or 0)
        fields["methods"] = tuple(fields["methods"] or ())
        fields["model"] = str(fields["model"] or models.DEFAULT_MODEL).strip()
        picture, mask = _picture_and_mask(drawing)
        if picture is not None and "picture" in MODES[fields["mode"]].controls:
            fields |= {"picture": save_picture(picture), "mask": "" if mask is None else save_picture(mask)}
        return GenerationRequest(**fields)

    def _show_mask(self, drawing: Any, model: str) -> str:
        """Return the reference image as the tokens see it."""
        picture, mask = _picture_and_mask(drawing)
        if picture is None:
            return ""
        grid = self.session.grid(model)
        return view.mask_seen(picture, mask, *grid) if grid else "Shown as the tokens see it once the model is loaded."

    def _link(self, lock: bool, *values: Any) -> str:
        """Return the page's address with all of its settings."""
        return _locked_link(self._request(*values), lock)

    def _start(self, lock: bool, *values: Any) -> list[Any]:
        """Start a run; return its job, the page's address and the seed."""
        request = self._request(*values)
        try:
            request.check()
        except ValueError as error:
            raise gr.Error(str(error), duration=8, print_exception=False) from error
        if not lock:
            request = replace(request, seed=random.randrange(SEEDS))
        return [self.session.start(request), _locked_link(request, lock), request.seed]

    def _follow(self, name: str) -> Iterator[list[Any]]:
        """Yield the progress, the results and the buttons of a job until it ends."""
        if (job := self.session.jobs.get(name)) is None:
            yield [gr.skip()] * 4  # without a value gradio would empty the page
            return
        n_rows = -1
        for state in job.follow():
            has_ended = state.kind in ("done", "stopped", "failed")
            results = gr.skip()
            if has_ended or len(state.rows) != n_rows:
                model = models.find(state.request.model) if state.kind == "done" else None
                results, n_rows = view.results(state, model), len(state.rows)
            yield [
                view.progress(state),
                results,
                gr.Button(interactive=has_ended),
                gr.Button(interactive=not has_ended),
            ]

    def _stop(self, name: str) -> None:
        if (job := self.session.jobs.get(name)) is not None:
            job.stop.set()


def _locked_link(request: GenerationRequest, lock: bool) -> str:
    return request.link() + ("" if lock else "&lock=0")


def _picture_and_mask(drawing: Any) -> tuple[Image.Image | None, Image.Image | None]:
    """Return the editor's image, RGB, and its mask, L and white where something is painted, or None."""
    if not drawing or drawing["background"] is None:
        return None, None
    picture = drawing["background"].convert("RGBA")
    mask = Image.new("L", picture.size)
    for layer in drawing["layers"]:
        mask.paste(255, mask=layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0))
    on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return on_white, mask if mask.getbbox() else None


def _editor_value(request: GenerationRequest) -> Any:
    """Return the editor's value for a saved reference image, with its mask as the brush would have painted it."""
    if not request.picture:
        return gr.skip()
    background = composite = Image.open(picture_file(request.picture)).convert("RGBA")
    layers = []
    if request.mask:
        mask = Image.open(picture_file(request.mask)).convert("L")
        layers = [Image.new("RGBA", mask.size)]
        layers[0].paste(BRUSH, mask=mask)
        composite = Image.alpha_composite(background, layers[0])
    return {"background": background, "layers": layers, "composite": composite}


def launch(page: Page, port: int | None = None) -> str:
    """Serve a page to this machine in threads of this process, and return its address."""
    system = ("system-ui", "sans-serif")  # gradio's own fonts would be fetched
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=system, font_mono=("ui-monospace", "monospace")
    ).set(  # darker than the defaults, for a contrast of at least 4.5
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
    print(f"negtome is at {launch(page, port)} (Ctrl-C ends it)", flush=True)
    page.blocks.block_thread()
