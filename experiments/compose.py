"""Configurations, composed from the files of conf/ and the overrides of a command line by Hydra's public API."""

import copy
import functools
import itertools
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from experiments import PROJECT, project_path

CONF = PROJECT / "conf"


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
    return [cfg for cfg, _ in compose_runs(overrides, baselines)]


def first(overrides: Sequence[str]) -> DictConfig:
    """Compose the first configuration of `expand` alone, which takes less time; errors are those of `expand`.

    The settings of the experiment, such as `primary` and `results`, are the same in all runs.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return _compose_run(_jobs(overrides)[0])


def compose_runs(overrides: Sequence[str], baselines: bool) -> list[tuple[DictConfig, int | None]]:
    """Return what `expand` does, each with the place of its baseline in the list; None without one."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        jobs = _jobs(overrides)
        baselines = baselines or any("method=none" in job for job in jobs)
        runs: list[tuple[DictConfig, int | None]] = []
        places: dict[tuple[str, ...], int] = {}
        for job in jobs:
            baseline = _baseline(job)
            if baseline == job and job in places:
                continue
            cfg = _compose_run(job)
            is_baseline = cfg.method.name == "none"
            if (baselines or is_baseline) and baseline not in places:
                places[baseline] = len(runs)
                runs.append((cfg if is_baseline else _compose_run(baseline), len(runs)))
            if not is_baseline:
                runs.append((cfg, places.get(baseline)))
    return runs


def check_overrides(arguments: Sequence[str]) -> list[str]:
    """Return the overrides of a command line; -m is optional, since an experiment's own sweep counts anyway.

    The former name of hyperparameter=, knob=, is replaced with a warning.

    Raises:
        ValueError: an argument begins with a dash, has no value, or chooses one of Hydra's own launchers.
    """
    overrides = [text for text in arguments if text not in ("-m", "--multirun")]
    for position, text in enumerate(overrides):
        if text.startswith("-"):
            following = "".join(overrides[position + 1 : position + 2])
            bare = text.lstrip("-")
            meant = bare if "=" in bare or "=" in following or not following else f"{bare}={following}"
            raise ValueError(f"expected settings such as model=sdxl, got {text}: use {meant}, without dashes")
        if "=" not in text and not text.startswith("~"):
            raise ValueError(f"expected settings such as model=sdxl, got {text}: use experiment={text} or {text}=VALUE")
        if text.lstrip("+").startswith(("hydra/launcher=", "hydra.launcher.")):
            raise ValueError(
                f"expected a launcher of conf/launcher, got {text}: processes divide the runs without one (workers=N), "
                "and launcher=slurm submits jobs"
            )
        if text.startswith("knob="):
            warnings.warn("knob= is called hyperparameter= now", DeprecationWarning, stacklevel=2)
            overrides[position] = text.replace("knob", "hyperparameter", 1)
    return overrides


def _jobs(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """List the overrides of each run: those of the sweep, then those of the experiment's further sweeps.

    A further sweep replaces some choices of the sweep. Where the command line sets one of these too, only the values of
    both count; without such a value, the further sweep is left out.
    """
    overrides = check_overrides(overrides)
    # The experiment, and Hydra's own settings, say what is swept.
    by_text = {text: parsed(text) for text in overrides}
    naming = [text for text, one in by_text.items() if one.key_or_group == "experiment" or one.is_hydra_override()]
    cfg = _compose_part("config", (*naming, "~method"))
    if cfg is None:
        cfg = _compose_all(tuple(naming))
    swept, overridden = _choices(cfg.hydra.sweeper.get("params") or {}), _choices(overrides)
    jobs = _product({**swept, **overridden})
    for sweep in cfg.further_sweeps or ():
        further = _choices(sweep)
        common = {key: _common(overridden[key], further[key]) for key in further if key in overridden}
        if all(common.values()):
            jobs += _product({**swept, **further, **overridden, **common})
    return list({tuple(sorted(job)): job for job in jobs}.values())  # two sweeps may have the same run


def _choices(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the overrides of single values that each override stands for, by their keys; a later one replaces others.

    `method.alpha=0.3,0.9` stands for `method.alpha=0.3` and `method.alpha=0.9`.

    Args:
        overrides: as texts, or the values of a sweep by their keys.
    """
    choices = {}
    texts = [f"{key}={value}" for key, value in overrides.items()] if isinstance(overrides, Mapping) else overrides
    for text in texts:
        override = parsed(text)
        key = override.get_key_element()
        is_sweep = override.is_sweep_override()
        choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()] if is_sweep else [text]
    return choices


def _common(choices: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return those of `choices` whose values `others` have too."""
    values = [parsed(text).value() for text in others]
    return [text for text in choices if parsed(text).value() in values]


def _product(choices: Mapping[str, list[str]]) -> list[tuple[str, ...]]:
    """List the product of all choices, as Hydra's basic sweeper does."""
    return [_baseline(job) if "method=none" in job else job for job in itertools.product(*choices.values())]


def _baseline(job: Iterable[str]) -> tuple[str, ...]:
    """Return the overrides of the run without a method: those of methods and their settings are not for it."""
    of_methods = {"method", "hyperparameter", "chosen", "guard"}
    return (*(text for text in job if not _roots(text) & of_methods), "method=none")


def _roots(text: str) -> set[str]:
    """Return the first parts of what an override is about: of scorer@method.encoder=NAME, scorer and method."""
    override = parsed(text)
    return {part.split(".")[0] for part in (override.key_or_group, override.package or "")}


@functools.lru_cache(maxsize=4096)
def parsed(text: str) -> Override:
    """Parse an override; raise HydraException if it is none."""
    (override,) = OverridesParser.create().parse_overrides([text])
    return override


def _compose_run(job: Sequence[str]) -> DictConfig:
    """Return the configuration of one run, given its overrides.

    Runs that name the same files share one composition, into which each puts its own values.
    """
    values = [text for text in job if _is_value(parsed(text))]
    cfg = _compose_files(tuple(text for text in job if text not in values))
    for override in map(parsed, values):
        try:
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
        except (ConfigAttributeError, ConfigKeyError) as error:
            raise _unknown_key(override.key_or_group, _keys(OmegaConf.to_container(cfg))) from error
    _set_hyperparameter(cfg, overridden={parsed(text).key_or_group for text in values})
    if cfg.policy is not None or cfg.references is not None:
        from experiments.safety.own_policy import configure  # only where it is needed

        configure(cfg)
    return cfg


def _set_hyperparameter(cfg: DictConfig, overridden: Collection[str]) -> None:
    """Set the hyperparameter by which a method is compared to the value that `hyperparameter` or `chosen` selects.

    Args:
        cfg: a run's configuration, in which the value is set.
        overridden: keys that the command line sets, which stay.

    Raises:
        ValueError: there is no such value.
        FileNotFoundError: no value was chosen for the method.
    """
    method, model = cfg.method.name, cfg.model
    if method == "none" or (cfg.hyperparameter is None and cfg.chosen is None):
        return
    hyperparameter = OmegaConf.select(cfg, "method.metadata.hyperparameter")
    if hyperparameter is None:
        override = f"chosen={cfg.chosen}" if cfg.hyperparameter is None else f"hyperparameter={cfg.hyperparameter}"
        raise ValueError(f"{override} has no effect on method={method}, which has no hyperparameter: leave it out")
    key = f"method.{hyperparameter.setting}"
    if key in overridden:
        return
    if cfg.hyperparameter is None:
        OmegaConf.update(cfg, key, _chosen_value(cfg, hyperparameter.setting))
        return
    # A published checkpoint without values of its own has those of the small model of its architecture.
    by_model = OmegaConf.to_container(hyperparameter)["values"]
    values = by_model.get(model.name) or by_model.get(f"mini-{model.architecture}")
    if not values:
        raise ValueError(f"expected metadata.hyperparameter.values for model={model.name} in method={method}, got none")
    if not isinstance(cfg.hyperparameter, int) or not 0 <= cfg.hyperparameter < len(values):
        raise ValueError(f"hyperparameter must be null or from 0 to {len(values) - 1}, got {cfg.hyperparameter!r}")
    OmegaConf.update(cfg, key, values[cfg.hyperparameter])


def _chosen_value(cfg: DictConfig, setting: str) -> Any:
    """Return what the first file of `chosen` that exists has for a run's model and method."""
    files = [cfg.chosen] if isinstance(cfg.chosen, str) else list(cfg.chosen)
    file = next((path for path in map(project_path, files) if path.exists()), project_path(files[0]))
    values = OmegaConf.to_container(OmegaConf.load(file)) if file.exists() else {}
    try:
        return values[cfg.model.name][cfg.method.name]
    except KeyError:
        target = "few-steps-peers" if cfg.name == "few_steps_peers" else "peers"
        raise FileNotFoundError(
            f"expected a value of {setting} for {cfg.method.name} on {cfg.model.name} in {file}, got none: make it "
            f"with make {target}, or give chosen=null for the method's own setting"
        ) from None


def _compose_files(overrides: tuple[str, ...]) -> DictConfig:
    """Compose the files that overrides name.

    Runs of several methods share one composition of all other files, which takes much longer than a method's own files.
    """
    others = tuple(text for text in overrides if "method" not in _roots(text))
    of_method = [parsed(text) for text in overrides if text not in others]
    method = rest = None
    if len(of_method) == 1 and _names_method(of_method[0]):
        settings_of_hydra = tuple(text for text in others if parsed(text).is_hydra_override())
        method = _compose_part(f"method/{of_method[0].value()}", settings_of_hydra)
        rest = _compose_part("config", (*others, "~method"))
    # A method's file may have other settings too, and other files may have settings of methods.
    is_apart = method is not None and set(method) == {"hydra", "method"}
    if not is_apart or rest is None or not OmegaConf.is_missing(rest, "method"):
        method, rest = None, _compose_all(overrides)
    cfg = copy.deepcopy(rest)
    with open_dict(cfg):
        del cfg.hydra
    if method is not None:
        cfg.method = method.method
    return cfg


@functools.lru_cache(maxsize=256)
def _compose_all(overrides: tuple[str, ...]) -> DictConfig:
    """Compose in one go, with Hydra's settings; nobody may change the result."""
    return _composed(overrides, return_hydra_config=True)


@functools.lru_cache(maxsize=512)
def _compose_part(name: str, overrides: tuple[str, ...]) -> DictConfig | None:
    """Compose one file and those that it refers to, with Hydra's settings; nobody may change the result.

    None if this fails: a defaults list may refer to files that are left out; and a mistake is explained elsewhere.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*missing `_self_`")  # it is of no consequence for a method's file alone
            return compose(name, list(overrides), return_hydra_config=True)
    except HydraException:
        return None


def _names_method(override: Override) -> bool:
    """Tell whether an override is method=NAME."""
    is_choice = override.type is OverrideType.CHANGE and override.package is None
    return is_choice and override.key_or_group == "method" and isinstance(override.value(), str)


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
    existing = [*(path.name for path in CONF.iterdir() if path.is_dir()), *keys]
    elsewhere = [other for other in existing if other.endswith(f".{key.rpartition('.')[2]}")]
    hint = _hint(get_close_matches(key, existing, 1, cutoff=0.8) or sorted(elsewhere, key=len))
    return ValueError(f"{key}: expected a key of the configuration, got none of this name{hint}")


def _hint(candidates: Sequence[str]) -> str:
    return f"; did you mean {candidates[0]}?" if candidates else ""


def _keys(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")
