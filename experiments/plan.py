"""The plan of an experiment: its runs, composed once and handed on as a file.

A plan is written to `<outputs>/<experiment>/plan.json`, and `plan=FILE` on the command line of a stage reads it back.
"""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from eval.files import canonical_json, read_json, write_text
from experiments import compose, project_path
from experiments.configs import METADATA, leaves, without
from experiments.runs.identity import config_digest
from experiments.runs.locks import locked
from experiments.tables.paths import TABLE, result_file

#: In an experiment's folder of outputs.
PLAN = "plan.json"
#: Settings that change no run, which a command line may add to a plan's.
OF_STAGES = ("results", "style", "width", "workers")
#: Settings that a plan's file begins with.
OF_EXPERIMENT = ("name", "description", "primary", "bootstrap")
#: What helps where a plan is damaged or missing.
CURE = "move it away and run python -m experiments generate with the experiment's overrides"


@dataclass(eq=False)
class RunSpec:
    """One run of a plan.

    Attributes:
        cfg: its settings.
        settings: digest of the settings that images depend on; see `experiments.runs.identity.config_digest`.
        id: name of its folder in `<outputs>/runs`; None until `experiments.generate` has completed it.
        baseline: the run without a method that it is compared with; a baseline's is itself.
    """

    cfg: DictConfig = field(repr=False)
    settings: str
    id: str | None = None
    baseline: "RunSpec" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.baseline = self

    @property
    def label(self) -> str:
        """Names of model and method, for messages."""
        return f"{self.cfg.model.name} {self.cfg.method.name}"


@dataclass(eq=False)
class Plan:
    """The runs of an experiment; each baseline stands before the runs that are compared with it.

    Attributes:
        runs: in the order of the sweep.
        launcher: settings of the jobs on other machines that make the runs; None if this process does.
        is_read: whether the plan is from a file. It then replaces no other plan: the user may have written a newer one.
    """

    runs: list[RunSpec]
    launcher: DictConfig | None = None
    is_read: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", str(self.cfg.name)):  # it names a folder of outputs, and files of results
            raise ValueError(f"expected a name without slashes and spaces, got {self.cfg.name!r}: give name=NAME")

    @property
    def cfg(self) -> DictConfig:
        """The first run's settings: those of the experiment are the same in all runs."""
        return self.runs[0].cfg

    @property
    def specs(self) -> list[RunSpec]:
        """The runs and their baselines, each once and after its baseline."""
        return list(dict.fromkeys(spec for run in self.runs for spec in (run.baseline, run)))

    @property
    def name(self) -> str:
        return self.cfg.name

    @property
    def results(self) -> Path:
        """Folder of the results of all experiments."""
        return project_path(self.cfg.results)

    def result_file(self, name: str = TABLE) -> Path:
        """Return the path of a file of results, by default of the table: `<results>/<experiment>/<name>`."""
        return result_file(self.results, self.name, name)

    @property
    def file(self) -> Path:
        """Where `experiments.generate` writes the plan."""
        return plan_file(self.cfg)

    def names(self) -> list[str]:
        """Name each run by its model and method, and by the settings in which it differs from others of these."""
        return run_names([spec.cfg for spec in self.runs])

    @classmethod
    def of(cls, arguments: Sequence[str]) -> "Plan":
        """Return the plan of a command line: of overrides, or `plan=FILE` and settings of tables and figures.

        Raises:
            FileNotFoundError, ValueError, HydraException: see `make` and `read`; or an override would change the runs
                of the file.
        """
        files = [text.removeprefix("plan=") for text in arguments if text.startswith("plan=")]
        if not files:
            return cls.make(arguments)
        plan, of_launcher = cls.read(Path(files[-1]).expanduser()), []
        plan.add_ids(complete_runs(plan.file))  # the file may be a copy that was made for jobs
        others = compose.check_overrides([text for text in arguments if not text.startswith("plan=")])
        for override in map(compose.parsed, others):
            if override.key_or_group.split(".")[0] == "launcher":
                of_launcher.append(override.input_line)
            elif override.key_or_group not in OF_STAGES:
                raise ValueError(
                    f"expected {', '.join(OF_STAGES)} or a launcher beside plan=, whose runs are composed, got "
                    f"{override.input_line}: give the other settings without plan="
                )
            for spec in plan.runs if override.key_or_group in OF_STAGES else ():
                OmegaConf.update(spec.cfg, override.key_or_group, override.value())
        if of_launcher:
            plan.launcher = compose.first(of_launcher).launcher or None
        return plan

    @classmethod
    def make(cls, overrides: Sequence[str]) -> "Plan":
        """Compose the runs of `overrides` and their baselines; those that are complete have their ids.

        Raises:
            ValueError, HydraException: see `compose.expand`; or an earlier plan of the experiment is damaged.
        """
        composed = compose.compose_runs(overrides, baselines=True)
        ids = complete_runs(plan_file(composed[0][0]))
        specs = []
        for cfg, _ in composed:
            settings = config_digest(cfg)
            specs.append(RunSpec(cfg, settings, ids.get(settings)))
        for spec, (_, baseline) in zip(specs, composed, strict=True):
            assert baseline is not None  # all have one
            spec.baseline = specs[baseline]
        return cls(specs, specs[0].cfg.launcher or None)

    @classmethod
    def read(cls, file: Path) -> "Plan":
        """Read a plan that was written.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no plan.
        """
        data = _read(file)
        try:
            specs = []
            for run in data["runs"]:
                config = run["config"]
                parts = {key: data["parts"][key][label] for key, label in config.items() if isinstance(label, str)}
                cfg = OmegaConf.create({**data["experiment"], **data["shared"], **config, **parts})
                OmegaConf.set_struct(cfg, True)  # as Hydra does: an unknown key is an error
                specs.append(RunSpec(cfg, run["settings"], run["id"]))
            for spec, run in zip(specs, data["runs"], strict=True):
                spec.baseline = specs[run["baseline"]]
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"expected a plan in {file}, got other JSON ({error!r}): {CURE}") from error
        return cls(specs, is_read=True)

    def write(self, file: Path | None = None) -> Path:
        """Write the plan, in the place of an earlier one whose complete runs stay known; return the file.

        Args:
            file: where to; None: `self.file`, unless the plan `is_read` and the file exists.
        """
        if file is None and self.is_read and self.file.exists():
            return self.file
        file = self.file if file is None else file
        with locked(file.with_name(f".{file.name}.lock")):
            ids = complete_runs(file)
            self.add_ids(ids)  # another command may have completed a run since this plan was made
            data = self.as_json()
            planned = {entry["settings"] for entry in data["runs"]}
            data["earlier"] = {settings: run for settings, run in ids.items() if settings not in planned}
            write_text(file, json.dumps(data, indent=1) + "\n")
        return file

    def add_ids(self, ids: Mapping[str, str]) -> None:
        """Give the runs that have no id yet theirs, by the digests of their settings; see `complete_runs`."""
        for spec in self.specs:
            spec.id = spec.id or ids.get(spec.settings)

    def complete(self, spec: RunSpec, run: str) -> None:
        """Note in the file that a run of the plan is complete, and which one it is."""
        spec.id = run
        if not self.file.exists():
            self.write()
        with locked(self.file.with_name(f".{self.file.name}.lock")):
            data = _read(self.file)
            before = json.dumps(data)
            planned = [entry for entry in data["runs"] if entry["settings"] == spec.settings]
            for entry in planned:
                entry["id"] = run
            if not planned:  # another command wrote its plan meanwhile
                data["earlier"][spec.settings] = run
            if json.dumps(data) != before:
                write_text(self.file, json.dumps(data, indent=1) + "\n")

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON: what all runs share is in it once, and so is what several share."""
        specs = self.specs
        # Without the launcher: a job that reads the plan works itself.
        configs = [OmegaConf.to_container(spec.cfg, resolve=True) | {"launcher": {}} for spec in specs]
        texts = [{key: canonical_json(value, compact=True) for key, value in config.items()} for config in configs]
        is_shared = {key: all(text.get(key) == texts[0][key] for text in texts) for key in texts[0]}
        shared = {key: configs[0][key] for key in configs[0] if is_shared[key]}
        experiment = {key: shared.pop(key) for key in OF_EXPERIMENT if key in shared}
        parts: dict[str, dict[str, Any]] = {}
        labels: dict[tuple[str, str], str] = {}
        runs = []
        for spec, name, config, text in zip(
            specs, run_names([spec.cfg for spec in specs]), configs, texts, strict=True
        ):
            distinct = {key: value for key, value in config.items() if not is_shared.get(key)}
            for key, value in distinct.items():
                if key == "method" or not isinstance(value, dict | str):
                    continue  # stands with the run
                place = parts.setdefault(key, {})
                label = labels.setdefault((key, text[key]), f"{config['model']['name']} {len(place) + 1}")
                place[label], distinct[key] = value, label
            entry = {"name": name, "id": spec.id, "baseline": specs.index(spec.baseline), "settings": spec.settings}
            runs.append(entry | {"config": distinct})
        return {"experiment": experiment, "runs": runs, "shared": shared, "parts": parts}


def plan_file(cfg: DictConfig) -> Path:
    """Return where the plan of an experiment is written, `<outputs>/<experiment>/plan.json`."""
    return project_path(cfg.outputs) / cfg.name / PLAN


def experiments_of(outputs: Path) -> dict[str, list[str]]:
    """Return, by the id of each complete run, the names of the experiments that have it; damaged plans name none."""
    names: dict[str, list[str]] = {}
    for file in sorted(outputs.glob(f"*/{PLAN}")):
        with contextlib.suppress(ValueError):
            for run in dict.fromkeys(complete_runs(file).values()):
                names.setdefault(run, []).append(file.parent.name)
    return names


def complete_runs(file: Path) -> dict[str, str]:
    """Return the ids of an experiment's complete runs, by the digests of their settings."""
    if not file.exists():
        return {}
    data = _read(file)
    try:
        ids = data["earlier"] | {run["settings"]: run["id"] for run in data["runs"] if run["id"] is not None}
        if not all(re.fullmatch("[0-9a-f]{12}", run) for run in ids.values()):
            raise ValueError("an id that is none")
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"expected a plan in {file}, got other JSON ({error!r}): {CURE}") from error
    return ids


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"expected a plan in {file}, got no file: run python -m experiments generate with the experiment's "
            "overrides"
        )
    data = read_json(file)
    if not isinstance(data, dict) or set(data) != {"experiment", "runs", "shared", "parts", "earlier"}:
        raise ValueError(f"expected a plan in {file}, got other JSON: {CURE}")
    return data


def run_names(configs: list[DictConfig]) -> list[str]:
    """Name each run by its model and method, and by the settings in which it differs from others of the same names."""
    parts = [[OmegaConf.to_container(part, resolve=True) for part in (cfg.model.call, cfg.method)] for cfg in configs]
    settings = [dict(leaves(without(call | method, *METADATA))) for call, method in parts]
    names = [f"{cfg.model.name} {cfg.method.name}" for cfg in configs]
    for name in dict.fromkeys(names):
        alike = [i for i, other in enumerate(names) if other == name]
        keys = [key for key in settings[alike[0]] if len({str(settings[i].get(key)) for i in alike}) > 1]
        for i in alike:
            names[i] = ", ".join([name, *(f"{key} {settings[i].get(key)}" for key in keys)])
    return names
