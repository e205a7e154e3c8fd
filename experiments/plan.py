"""The plan of an experiment: its runs, composed once by Hydra's public API and handed on as a file.

No other module composes configurations. A plan is written to `<outputs>/<experiment>/plan.json`, and `plan=FILE` on the
command line of a stage reads it back.
"""

import contextlib
import copy
import functools
import itertools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from eval.files import canonical_json, read_json, write_text
from experiments import PROJECT, project_path
from experiments.configs import run_names, set_hyperparameter
from experiments.runs.identity import config_digest, short_digest
from experiments.runs.locks import locked
from experiments.tables.paths import TABLE, result_file

CONF = PROJECT / "conf"
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
        launcher: Hydra's overrides of the launcher that sends runs to other processes or machines; () for none.
    """

    runs: list[RunSpec]
    launcher: tuple[str, ...] = ()

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
        overrides = check_overrides(arguments)
        (file,) = [text.removeprefix("plan=") for text in overrides if text.startswith("plan=")][-1:] or [None]
        if file is None:
            return cls.make(overrides)
        plan, naming = cls.read(Path(file).expanduser()), []
        for override in (_parsed(text) for text in overrides if not text.startswith("plan=")):
            if _names_sweep(override) and override.key_or_group != "experiment":
                naming.append(override.input_line)
            elif override.key_or_group not in OF_STAGES:
                raise ValueError(
                    f"expected {', '.join(OF_STAGES)} or a launcher beside plan=, whose runs are composed, got "
                    f"{override.input_line}: give the other settings without plan="
                )
            for spec in plan.runs if override.key_or_group in OF_STAGES else ():
                OmegaConf.update(spec.cfg, override.key_or_group, override.value())
        if naming:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                plan.launcher = tuple(_jobs(naming)[1])
        return plan

    @classmethod
    def make(cls, overrides: Sequence[str]) -> "Plan":
        """Compose the runs of `overrides` and their baselines; those that are complete have their ids.

        Raises:
            ValueError, HydraException: see `expand`; or an earlier plan of the experiment is damaged.
        """
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed, launcher = _compose_runs(overrides, baselines=True)
        ids = complete_runs(plan_file(composed[0][0]))
        specs, baselines = [], {}
        for cfg, job, baseline in composed:
            spec = RunSpec(cfg, settings := config_digest(cfg), ids.get(settings))
            if job == baseline:
                baselines[job] = spec
            else:
                spec.baseline = baselines[baseline]
            specs.append(spec)
        return cls(specs, tuple(launcher))

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
        return cls(specs)

    def write(self, file: Path | None = None) -> Path:
        """Write the plan, in the place of an earlier one whose complete runs stay known; return the file.

        Args:
            file: where to; None: `self.file`.
        """
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
        configs = [OmegaConf.to_container(spec.cfg, resolve=True) for spec in specs]
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


def expand(overrides: Sequence[str], baselines: bool = False) -> list[DictConfig]:
    """Compose every configuration of `overrides`, the experiment's own sweep included.

    Args:
        overrides: as on the command line of `experiments.generate`, for example
            `["experiment=diversity", "model=sdxl", "method.alpha=0.3,0.9"]`.
        baselines: whether to add the runs without a method that the others are compared with.

    Returns:
        One configuration a run, in the order of Hydra's basic sweeper (the last axis varies fastest). Where
        the sweep names `none` among other methods, or with `baselines`, each baseline stands once, before the runs that
        are compared with it.

    Raises:
        ValueError: an unknown option or key, or a hyperparameter that the method does not have.
        HydraException: an argument is no override.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return [cfg for cfg, *_ in _compose_runs(overrides, baselines)[0]]


def first(overrides: Sequence[str]) -> DictConfig:
    """Compose the first configuration of `expand` alone, which takes less time; errors are those of `expand`.

    The settings of the experiment, such as `primary` and `results`, are the same in all runs.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return _compose_run(_jobs(overrides)[0][0])


def _compose_runs(
    overrides: Sequence[str], baselines: bool
) -> tuple[list[tuple[DictConfig, tuple[str, ...], tuple[str, ...]]], list[str]]:
    """Return of every run its configuration, its overrides and its baseline's; and the launcher's overrides."""
    jobs, launcher = _jobs(overrides)
    baselines = baselines or any("method=none" in job for job in jobs)
    runs, seen = [], set()
    for job in jobs:
        baseline = _baseline(job)
        if baseline == job and job in seen:
            continue
        cfg = _compose_run(job)
        is_baseline = cfg.method.name == "none"
        if (baselines or is_baseline) and baseline not in seen:
            seen.add(baseline)
            runs.append((cfg if is_baseline else _compose_run(baseline), baseline, baseline))
        if not is_baseline:
            runs.append((cfg, job, baseline))
    return runs, launcher


def check_overrides(arguments: Sequence[str]) -> list[str]:
    """Return the overrides of a command line; -m is optional, since an experiment's own sweep counts anyway.

    The former name of hyperparameter=, knob=, is replaced with a warning.

    Raises:
        ValueError: an argument begins with a dash.
    """
    overrides = [text for text in arguments if text not in ("-m", "--multirun")]
    for position, text in enumerate(overrides):
        if text.startswith("-"):
            following = "".join(overrides[position + 1 : position + 2])
            bare = text.lstrip("-")
            meant = bare if "=" in bare or "=" in following or not following else f"{bare}={following}"
            raise ValueError(f"expected settings such as model=sdxl, got {text}: use {meant}, without dashes")
        if text.startswith("knob="):
            warnings.warn("knob= is called hyperparameter= now", DeprecationWarning, stacklevel=2)
            overrides[position] = text.replace("knob", "hyperparameter", 1)
    return overrides


def _jobs(overrides: Sequence[str]) -> tuple[list[tuple[str, ...]], list[str]]:
    """List the overrides of each run, the product of all choices as in Hydra's basic sweeper; and the launcher's."""
    overrides = check_overrides(overrides)
    # An experiment says what is swept, a launcher how; no value and no other group does.
    naming = [text for text in overrides if _names_sweep(_parsed(text))]
    hydra_node = _hydra_node(tuple(naming))
    swept = [f"{key}={value}" for key, value in (hydra_node.sweeper.get("params") or {}).items()]
    choices = []
    for text in {_parsed(text).get_key_element(): text for text in [*swept, *overrides]}.values():
        override = _parsed(text)
        if override.is_sweep_override():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([text])
    jobs = [_baseline(job) if "method=none" in job else job for job in itertools.product(*choices)]
    return jobs, [] if hydra_node.launcher._target_.endswith(".BasicLauncher") else naming


def _names_sweep(override: Override) -> bool:
    return override.key_or_group in ("experiment", "launcher") or override.is_hydra_override()


def _baseline(job: Iterable[str]) -> tuple[str, ...]:
    """Return the overrides of the run without a method: those of methods and their settings are not for it."""
    of_methods = {"method", "hyperparameter", "chosen", "guard"}
    return (*(text for text in job if not _roots(text) & of_methods), "method=none")


def _roots(text: str) -> set[str]:
    """Return the first parts of what an override is about: of scorer@method.encoder=NAME, scorer and method."""
    override = _parsed(text)
    return {part.split(".")[0] for part in (override.key_or_group, override.package or "")}


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> Override:
    (override,) = OverridesParser.create().parse_overrides([text])
    return override


def _compose_run(job: Sequence[str]) -> DictConfig:
    """Return the configuration of one run, given its overrides.

    Runs that name the same files share one composition, into which each puts its own values.
    """
    values = [text for text in job if _is_value(_parsed(text))]
    cfg = copy.deepcopy(_compose_files(tuple(text for text in job if text not in values)))
    for override in map(_parsed, values):
        try:
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
        except (ConfigAttributeError, ConfigKeyError) as error:
            raise _unknown_key(override.key_or_group, _keys(OmegaConf.to_container(cfg))) from error
    set_hyperparameter(cfg, overridden={_parsed(text).key_or_group for text in values})
    return cfg


@functools.lru_cache(maxsize=256)
def _compose_files(overrides: tuple[str, ...]) -> DictConfig:
    """Compose the files that overrides name; nobody may change the result."""
    return _composed(overrides)


@functools.lru_cache(maxsize=256)
def _hydra_node(overrides: tuple[str, ...]) -> DictConfig:
    """Compose Hydra's own settings, of the sweep and the launcher; nobody may change the result."""
    return _composed(overrides, return_hydra_config=True).hydra


def _is_value(override: Override) -> bool:
    """Tell whether an override replaces a value that is in the files, and so may be applied after them, as Hydra does.

    All others name files: a group of files is a folder.
    """
    if override.type is not OverrideType.CHANGE or override.package is not None or override.is_hydra_override():
        return False
    return not (CONF / override.key_or_group).is_dir()


def composed(overrides: Sequence[str], folder: Path = CONF) -> DictConfig:
    """Compose one configuration as it is, without a sweep, from a folder that is like conf/.

    Raises:
        ValueError: an unknown option or key.
    """
    with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
        return _composed(overrides)


def _composed(overrides: Iterable[str], **options: Any) -> DictConfig:
    """Compose what overrides stand for; say of an unknown one what was probably meant."""
    try:
        return compose("config", list(overrides), **options)
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        if not (group and error.options):
            raise
        hint = _hint(get_close_matches(name, error.options, 1))
        raise ValueError(f"{group}={name}: expected one of {', '.join(error.options)}{hint}") from error
    except ConfigCompositionException as error:
        unknown = re.search("Could not override '(.+?)'", str(error))
        if not unknown:
            raise
        raise _unknown_key(unknown[1], OmegaConf.load(CONF / "config.yaml")) from error


def _unknown_key(key: str, keys: Iterable[str]) -> ValueError:
    """Return the error of a key that is neither among `keys` nor a group of files."""
    known = [*(path.name for path in CONF.iterdir() if path.is_dir()), *keys]
    elsewhere = [other for other in known if other.endswith(f".{key.rpartition('.')[2]}")]
    hint = _hint(get_close_matches(key, known, 1, cutoff=0.8) or sorted(elsewhere, key=len))
    return ValueError(f"{key}: expected a key of the configuration, got none of this name{hint}")


def _hint(candidates: Sequence[str]) -> str:
    return f"; did you mean {candidates[0]}?" if candidates else ""


def _keys(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")


def launch(task: Callable[[DictConfig], Any], plan: Plan) -> None:
    """Have the plan's launcher run a job for each run; the first job's error is raised here.

    Args:
        task: a job, called with a configuration for `launched_run`.
        plan: written to a file of its own, which no later command replaces while jobs wait.
    """
    content = plan.as_json()
    file = plan.write(plan.file.with_name(f"launched-{short_digest(content)}.json"))
    numbers = ",".join(map(str, range(len(content["runs"]))))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints the error of a job itself, and exits
    # The folder is an absolute path: a job in another process finds no configuration beside its function.
    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)
    own = [f"outputs='{plan.cfg.outputs}'", f"plan='{file}'", f"run={numbers}"]
    sys.argv[1:] = ["--multirun", "hydra.sweeper.params=null", *plan.launcher, *own]
    main()
    plan.add_ids(complete_runs(plan.file))  # which the jobs wrote


def launched_run(cfg: DictConfig) -> tuple[Plan, RunSpec]:
    """Return the plan and the run of a job that `launch` started."""
    plan = Plan.read(Path(cfg.plan))
    return plan, plan.runs[cfg.run]
