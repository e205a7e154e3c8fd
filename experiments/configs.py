"""The configurations that a command line stands for, sweeps expanded: what Hydra's own multirun would launch."""

from __future__ import annotations

import contextlib
import copy
import os
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
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments import PROJECT


def expand(overrides: list[str]) -> list[DictConfig]:
    """Compose every configuration of `overrides`, the experiment's own sweep included.

    Args:
        overrides: as on the command line of `experiments.generate`, for example
            `["experiment=diversity", "model=sdxl", "method.alpha=0.3,0.9"]`.

    Returns:
        One composed configuration a run, in the order of Hydra's basic sweeper (the last axis varies fastest). Where
        the sweep names `none` among other methods, the runs without one stand before the others, each once: settings of
        methods mean nothing to them.

    Raises:
        ValueError: an unknown group, option or key, or something that is no override.
    """
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        axes, baseline = _split(_axes(overrides))
        configs = list(_all_composed(_jobs(axes)))
    return with_baselines(configs) if baseline else configs


def with_baselines(configs: list[DictConfig]) -> list[DictConfig]:
    """Put the run without a method that is otherwise as configured before those that are compared with it, once."""
    none = OmegaConf.load(PROJECT / "conf" / "method" / "none.yaml")
    there = {_but_for_method(cfg) for cfg in configs if cfg.method == none}
    found = []
    for cfg in configs:
        if cfg.method != none and (asked := _but_for_method(cfg)) not in there:
            there.add(asked)
            baseline = copy.deepcopy(cfg)
            baseline.method = none
            found.append(baseline)
        found.append(cfg)
    return found


def _but_for_method(cfg: DictConfig) -> str:
    return repr({key: value for key, value in OmegaConf.to_container(cfg).items() if key != "method"})


def _axes(overrides: list[str]) -> list[str]:
    """Return the axes of the experiment's own sweep and the overrides, which go before; where Hydra is initialised."""
    params = _composed(_fixed(overrides), return_hydra_config=True).hydra.sweeper.get("params") or {}
    if [text for text in overrides if text.startswith("method=")][-1:] == ["method=none"]:  # which has no settings
        params = {key: value for key, value in params.items() if not key.startswith("method.")}
    return [f"{key}={value}" for key, value in params.items()] + list(overrides)


def _fixed(overrides: list[str]) -> list[str]:
    """Return what all runs share; not the settings of methods, which mean nothing where those are swept."""
    parsed = [(text, override) for text, override in _parsed(overrides) if not override.is_sweep_override()]
    return [text for text, override in parsed if not override.key_or_group.startswith("method.")]


def _split(axes: list[str]) -> tuple[list[str], bool]:
    """Take `none` out of a sweep over methods; tell whether it was in it, and so is asked for beside the others."""
    kept, baseline = [], False
    for text, override in _parsed(axes):
        if override.key_or_group == "method":
            methods = list(override.sweep_string_iterator()) if override.is_sweep_override() else []
            baseline = "none" in methods and len(methods) > 1
            if baseline:
                text = f"method={','.join(method for method in methods if method != 'none')}"
        kept.append(text)
    return kept, baseline


def _all_composed(jobs: Iterable[list[str]]) -> Iterator[DictConfig]:
    """Compose each job; those that name the same files once, since reading and merging them takes nearly all the time.

    Hydra itself applies values to what the files make, and nothing of the files depends on a value.
    """
    loader, bases = GlobalHydra.instance().config_loader(), {}
    for job in jobs:
        files, values = [], []
        for text, override in _parsed(job):
            names = loader.repository.group_exists(override.key_or_group) and not isinstance(override.value(), dict)
            # What is for Hydra's own node, which a composed configuration no longer has, is its affair.
            if names or override.is_hydra_override():
                files.append(text)
            else:
                values.append(override)
        if (key := tuple(files)) not in bases:
            bases[key] = _composed(files)
        cfg = copy.deepcopy(bases[key])
        with _explained(job):
            loader._apply_overrides_to_config(values, cfg)
        yield _with_names(cfg)


def _jobs(axes: list[str]) -> Iterator[list[str]]:
    """List each run's overrides, of several values for a key those of the last; where Hydra is initialised."""
    (batch,) = BasicSweeper.split_arguments([override for _, override in _parsed(axes)], max_batch_size=None)
    yield from (list(job) for job in batch)


def _parsed(overrides: list[str]) -> list[tuple[str, Override]]:
    parse = OverridesParser.create().parse_override
    found = []
    for text in _without_flags(overrides):
        try:
            found.append((text, parse(text)))
        except HydraException as error:
            reason = str(error).partition("\nSee ")[0]
            raise ValueError(
                f"{text}: expected KEY=VALUE or GROUP=NAME, lists as [a,b] in quotes ({reason})"
            ) from error
    return found


def _composed(overrides: list[str], **options: Any) -> DictConfig:
    with _explained(overrides):
        return compose("config", overrides, **options)


@contextlib.contextmanager
def _explained(overrides: list[str]) -> Iterator[None]:
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
        rest = [text for text, override in _parsed(overrides) if override.key_or_group != key]
        hint = _similar(key, _composed(rest))
        raise ValueError(f"{key}: expected a key of the configuration, got none of this name{hint}") from error


def _similar(key: str, cfg: DictConfig) -> str:
    """Say which key was probably meant by an unknown one: one spelled alike, or of the same name elsewhere."""
    known = list(_keys(OmegaConf.to_container(cfg)))
    elsewhere = [other for other in known if other.endswith(f".{key.rpartition('.')[2]}")]
    return _hint(get_close_matches(key, known, 1, cutoff=0.8) or sorted(elsewhere, key=len))


def _keys(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")


def _with_names(cfg: DictConfig) -> DictConfig:
    """Return a configuration if what names folders and devices is text; null and numbers are nobody's names."""
    for key in ("name", "outputs", "results", "device", "model.name", "model.source", "method.name"):
        if not isinstance(value := OmegaConf.select(cfg, key), str):
            raise ValueError(f"expected a text for {key}, got {value!r}: give {key}=NAME")
    return cfg


def _hint(candidates: list[str]) -> str:
    return f"; did you mean {candidates[0]}?" if candidates else ""


def first(overrides: list[str]) -> DictConfig:
    """Compose the first configuration of `expand`, and no other: what all of an experiment share."""
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        return _with_names(_composed(next(_jobs(_split(_axes(overrides))[0]))))


def _without_flags(overrides: Iterable[str]) -> list[str]:
    """Return the overrides of a command line; that they are a sweep need not be said."""
    return [text for text in overrides if text not in ("-m", "--multirun")]


def run_names(configs: list[DictConfig]) -> list[str]:
    """Name each run by its model and method, and by the settings in which it differs from others of the same names."""
    settings = []
    for cfg in configs:
        parts = [OmegaConf.to_container(part, resolve=True) for part in (cfg.model.call, cfg.method)]
        settings.append({key: value for part in parts for key, value in part.items()})
    names = [f"{cfg.model.name} {cfg.method.name}" for cfg in configs]
    for name in dict.fromkeys(names):
        alike = [i for i, other in enumerate(names) if other == name]
        keys = [key for key in settings[alike[0]] if len({str(settings[i].get(key)) for i in alike}) > 1]
        for i in alike:
            names[i] = ", ".join([name, *(f"{key} {settings[i].get(key)}" for key in keys)])
    return names


def has_launcher(overrides: list[str]) -> bool:
    """Tell whether a launcher but Hydra's basic one is configured, which sends runs to other processes or machines."""
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        axes, _ = _split(_axes(overrides))
        target = _composed(_fixed(axes), return_hydra_config=True).hydra.launcher._target_
    return not target.endswith(".BasicLauncher")


def launch(task: Callable[[DictConfig], Any], overrides: list[str]) -> None:
    """Have the configured launcher call `task` with every run's configuration; the first job's error is raised here.

    The runs without a method, which all others are compared with, go first.
    """
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        axes = {override.get_key_element(): text for text, override in _parsed(_split(_axes(overrides))[0])}
    sweeps = [list(axes.values())]
    if axes.get("method", "method=none") != "method=none":
        others = [text for key, text in axes.items() if key.lstrip("+~").partition(".")[0] != "method"]
        sweeps.insert(0, [*others, "method=none"])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints the error of a job itself, and exits
    for sweep in sweeps:
        # All axes are given, the experiment's among them.
        sys.argv[1:] = ["--multirun", "hydra.sweeper.params=null", *sweep]
        _main(task)


def _main(task: Callable[[DictConfig], Any]) -> None:
    # An absolute path: a job in another process finds no configuration beside its function.
    hydra.main(version_base="1.3", config_path=str(PROJECT / "conf"), config_name="config")(task)()


def flag(cfg: DictConfig, name: str) -> bool:
    """Return a setting that is either true or false.

    Raises:
        ValueError: it is anything else, as the text "no", which Python takes for true.
    """
    if not isinstance(value := OmegaConf.select(cfg, name), bool):
        raise ValueError(f"{name} must be true or false, got {value!r}: give {name}=true or {name}=false")
    return value


#: Keys of conf/method/ that say something of a method and are no arguments of its class.
ABOUT = ("title", "colour", "strengths", "blocks", "choices")


def build(spec: DictConfig) -> Any:
    """Instantiate what a configuration describes; `ABOUT` is left out.

    Raises:
        FileNotFoundError, ValueError: those of the class itself, which say what to do, without Hydra's wrapping.
    """
    try:
        return instantiate(_arguments(OmegaConf.to_container(spec, resolve=True)))
    except InstantiationException as error:
        if isinstance(error.__cause__, (FileNotFoundError, ValueError)):
            raise error.__cause__ from None
        raise


def _arguments(spec: Any) -> Any:
    if isinstance(spec, list):
        return [_arguments(item) for item in spec]
    if not isinstance(spec, dict):
        return spec
    return {key: _arguments(value) for key, value in spec.items() if "_target_" not in spec or key not in ABOUT}
