"""The configurations that a command line stands for, sweeps expanded: what Hydra's own multirun would launch."""

import contextlib
import functools
import gc
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, InstantiationException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments import PROJECT


def expand(overrides: list[str], baselines: bool = False) -> list[DictConfig]:
    """Compose every configuration of `overrides`, the experiment's own sweep included.

    Args:
        overrides: as on the command line of `experiments.generate`, for example
            `["experiment=diversity", "model=sdxl", "method.alpha=0.3,0.9"]`.
        baselines: whether the runs without a method that the others are compared with are wanted, too.

    Returns:
        One composed configuration a run, in the order of Hydra's basic sweeper (the last axis varies fastest). Where
        the sweep names `none` among other methods, or with `baselines`, the runs without one stand before the others,
        each once: settings of methods mean nothing to them.

    Raises:
        ValueError: an unknown option or key.
        HydraException: something that is no override.
    """
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"), _uncollected():
        jobs = _jobs(*overrides)
        baselines = baselines or any("method=none" in job for job in jobs)
        found, there = [], set()
        for job in jobs:
            baseline = tuple(_baseline(job))
            if baseline in there and baseline == tuple(job):
                continue
            cfg = _compose_job(job)
            is_baseline = cfg.method == no_method()
            if (baselines or is_baseline) and baseline not in there:
                there.add(baseline)
                found.append(cfg if is_baseline else _compose_job(baseline))
            if not is_baseline:
                found.append(cfg)
        return found


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector from walking all configurations while they are made: 400 take 5 seconds, or 16."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.cache
def no_method() -> DictConfig:
    """Return what conf/method/none.yaml holds, the method of all baselines."""
    return OmegaConf.load(PROJECT / "conf" / "method" / "none.yaml")


@functools.lru_cache(maxsize=16)
def _sweep(*overrides: str) -> tuple[dict[str, str], DictConfig]:
    """Return what is swept, an override a key, the experiment's own sweep first, and Hydra's own node."""
    given = [text for text in overrides if text not in ("-m", "--multirun")]  # that it is a sweep need not be said
    # The files that all runs share say what is swept; no value and no method does.
    shared = [text for text in given if "method" not in _roots(text)]
    fixed = [text for text in shared if not _parsed(text).is_sweep_override() and _names_files(text)]
    node = pickle.loads(_of_files(*_in_order(fixed))[1]).hydra
    own = [f"{key}={value}" for key, value in (node.sweeper.get("params") or {}).items()]
    return {_parsed(text).get_key_element(): text for text in [*own, *given]}, node


def _jobs(*overrides: str) -> list[list[str]]:
    """List each run's overrides, as Hydra's basic sweeper does."""
    axes, _ = _sweep(*overrides)
    (jobs,) = BasicSweeper.split_arguments(list(map(_parsed, axes.values())), max_batch_size=None)
    return [_baseline(job) if "method=none" in job else list(job) for job in jobs]


def _baseline(overrides: Iterable[str]) -> list[str]:
    """Return the overrides of the run without a method: those of methods and their settings are not for it."""
    of_methods = {"method", "knob", "guard"}
    return [*(text for text in overrides if not _roots(text) & of_methods), "method=none"]


def _roots(text: str) -> set[str]:
    """Return the first parts of what an override is about: of scorer@method.encoder=NAME, scorer and method."""
    override = _parsed(text)
    return {part.split(".")[0] for part in (override.key_or_group, override.package or "")}


def _compose_job(job: Iterable[str]) -> DictConfig:
    """Compose a run's configuration; where Hydra is initialised.

    Jobs that name the same files read and merge them once, which takes most of the time: Hydra itself applies values to
    what the files make, and nothing of the files depends on a value.
    """
    files = [text for text in job if _names_files(text)]
    cfg = _with_method(*_in_order(files))
    with _explained(job):
        values = [_parsed(text) for text in job if text not in files]
        # Hydra offers no public way to it; pyproject.toml holds to the version that has this one.
        GlobalHydra.instance().config_loader()._apply_overrides_to_config(values, cfg)
    return cfg


def _with_method(*files: str) -> DictConfig:
    """Compose what files make: a method's file alone, and into what the others make, where it is read by nothing else.

    That takes a quarter of the time of all files, once a method instead of once a method and model.
    """
    names = [text for text in files if "method" in _roots(text)]
    if len(names) == 1 and names[0].startswith("method="):
        cfg = pickle.loads(_of_files(*(text for text in files if text not in names))[0])
        where = (text for text in files if _parsed(text).key_or_group == "hydra.searchpath")
        own = pickle.loads(_of_method(names[0], *where))
        there = OmegaConf.to_container(cfg.method)
        # Else one speaks of the other.
        if own.keys() == {"method"} and there in map(OmegaConf.to_container, (no_method(), own.method)):
            cfg.method = own.method
            return cfg
    return pickle.loads(_of_files(*files)[0])


@functools.lru_cache(maxsize=64)
def _of_method(override: str, *where: str) -> bytes:
    return pickle.dumps(_composed(None, [f"+{override}", *where]))


@functools.lru_cache(maxsize=64)
def _of_files(*files: str) -> tuple[bytes, bytes]:
    """Compose what files make, without and with Hydra's node; pickled, read in a third of the time of a deep copy."""
    cfg = _composed("config", files, return_hydra_config=True)
    whole = pickle.dumps(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return pickle.dumps(cfg), whole


def _in_order(files: Iterable[str]) -> list[str]:
    """Sort what replaces a default, so that the same files are composed once; what is added stays in its order."""
    return sorted(files, key=lambda text: "" if text.startswith(("+", "~", "hydra")) else text)


def _names_files(text: str) -> bool:
    """Tell whether an override chooses files, or is for Hydra's own node, which no composed configuration has."""
    override = _parsed(text)
    groups = GlobalHydra.instance().config_loader().repository
    of_group = groups.group_exists(override.key_or_group) and not isinstance(override.value(), dict)
    return of_group or override.is_hydra_override()


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> Override:
    (override,) = OverridesParser.create().parse_overrides([text])
    return override


def _key(text: str) -> str:
    """Return what an override names, with its package: of ~scorer@method.encoder that without the sign."""
    return _parsed(text).get_key_element().lstrip("+~")


def _composed(name: str | None, overrides: Iterable[str], **options: Any) -> DictConfig:
    with _explained(overrides):
        return compose(name, list(overrides), **options)


@contextlib.contextmanager
def _explained(overrides: Iterable[str]) -> Iterator[None]:
    """Say of what is unknown in `overrides` what was probably meant."""
    try:
        yield
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
        key = unknown[1]
        others = [text for text in overrides if key not in (_parsed(text).key_or_group, _key(text))]
        if len(others) == len(list(overrides)):
            raise
        rest = _composed("config", others)
        known = list(_keys(OmegaConf.to_container(rest)))
        elsewhere = [other for other in known if other.endswith(f".{key.rpartition('.')[2]}")]
        hint = _hint(get_close_matches(key, known, 1, cutoff=0.8) or sorted(elsewhere, key=len))
        raise ValueError(f"{key}: expected a key of the configuration, got none of this name{hint}") from error


def _keys(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")


def _hint(candidates: list[str]) -> str:
    return f"; did you mean {candidates[0]}?" if candidates else ""


def first(overrides: list[str]) -> DictConfig:
    """Compose the first configuration of `expand`, and no other: what all of an experiment share."""
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        return _compose_job(_jobs(*overrides)[0])


def run_names(configs: list[DictConfig]) -> list[str]:
    """Name each run by its model and method, and by the settings in which it differs from others of the same names."""
    parts = [[OmegaConf.to_container(part, resolve=True) for part in (cfg.model.call, cfg.method)] for cfg in configs]
    settings = [dict(_leaves(without(call | method, "about"))) for call, method in parts]
    names = [f"{cfg.model.name} {cfg.method.name}" for cfg in configs]
    for name in dict.fromkeys(names):
        alike = [i for i, other in enumerate(names) if other == name]
        keys = [key for key in settings[alike[0]] if len({str(settings[i].get(key)) for i in alike}) > 1]
        for i in alike:
            names[i] = ", ".join([name, *(f"{key} {settings[i].get(key)}" for key in keys)])
    return names


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def has_launcher(overrides: list[str]) -> bool:
    """Tell whether a launcher but Hydra's basic one is configured, which sends runs to other processes or machines."""
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        return not _sweep(*overrides)[1].launcher._target_.endswith(".BasicLauncher")


def launch(task: Callable[[DictConfig], Any], overrides: list[str]) -> None:
    """Have the configured launcher call `task` with every run's configuration; the first job's error is raised here.

    The runs without a method, which all others are compared with, go first.
    """
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        axes = dict(_sweep(*overrides)[0])
    sweeps = [_baseline(axes.values())]
    if "method" in axes:
        axis = _parsed(axes["method"])
        methods = list(axis.sweep_string_iterator()) if axis.is_sweep_override() else [axis.value()]
        axes["method"] = f"method={','.join(method for method in methods if method != 'none')}"
        if methods != ["none"]:
            sweeps.append(list(axes.values()))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints the error of a job itself, and exits
    # The folder is an absolute path: a job in another process finds no configuration beside its function.
    main = hydra.main(version_base="1.3", config_path=str(PROJECT / "conf"), config_name="config")(task)
    for sweep in sweeps:
        sys.argv[1:] = ["--multirun", "hydra.sweeper.params=null", *sweep]  # all is given, the experiment's own too
        main()


def flag(cfg: DictConfig, name: str) -> bool:
    """Return a setting that is either true or false.

    Raises:
        ValueError: it is anything else, as the text "no", which Python takes for true.
    """
    if not isinstance(value := OmegaConf.select(cfg, name), bool):
        raise ValueError(f"{name} must be true or false, got {value!r}: give {name}=true or {name}=false")
    return value


def build(spec: DictConfig) -> Any:
    """Instantiate what a configuration describes, without what is said `about` it.

    Raises:
        FileNotFoundError, ValueError: those of the class itself, which say what to do, without Hydra's wrapping.
    """
    try:
        return instantiate(without(OmegaConf.to_container(spec, resolve=True), "about"))
    except InstantiationException as error:
        if isinstance(error.__cause__, (FileNotFoundError, ValueError)):
            raise error.__cause__ from None
        raise


def without(spec: Any, *keys: str) -> Any:
    """Return a configuration without some keys, at any depth."""
    if isinstance(spec, list):
        return [without(item, *keys) for item in spec]
    return {k: without(v, *keys) for k, v in spec.items() if k not in keys} if isinstance(spec, dict) else spec
