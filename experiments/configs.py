"""Parts of composed configurations: objects are built from them, and runs are named by them."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments import project_path, select_device

#: Keys of a method's configuration that describe it and are no settings of its class; the second is of earlier plans.
METADATA = ("metadata", "about")


def flag(cfg: DictConfig, name: str) -> bool:
    """Return a setting that is either true or false.

    Raises:
        ValueError: it is anything else, as the text "no", which Python takes for true.
    """
    if not isinstance(value := OmegaConf.select(cfg, name), bool):
        raise ValueError(f"{name} must be true or false, got {value!r}: give {name}=true or {name}=false")
    return value


def build(spec: DictConfig) -> Any:
    """Instantiate a configuration on this machine's device, without its `METADATA`.

    Raises:
        FileNotFoundError, ValueError: those of the class itself, without Hydra's wrapping; or there is no such device.
    """
    settings = without(OmegaConf.to_container(spec, resolve=True), *METADATA)
    try:
        return instantiate(with_device(settings, select_device))
    except InstantiationException as error:
        if isinstance(error.__cause__, (FileNotFoundError, ValueError)):
            raise error.__cause__ from None
        raise


def with_device(spec: Any, device: Callable[[str], str]) -> Any:
    """Return a configuration with `device(name)` in the place of the name of each device, at any depth.

    A configuration says `auto` until an object is built: it may be built on another machine than it was composed on.
    """
    if isinstance(spec, list):
        return [with_device(item, device) for item in spec]
    if not isinstance(spec, dict):
        return spec
    return {key: device(value) if key == "device" else with_device(value, device) for key, value in spec.items()}


def without(spec: Any, *keys: str) -> Any:
    """Return a configuration without some keys, at any depth."""
    if isinstance(spec, list):
        return [without(item, *keys) for item in spec]
    return {k: without(v, *keys) for k, v in spec.items() if k not in keys} if isinstance(spec, dict) else spec


def set_hyperparameter(cfg: DictConfig, overridden: Collection[str]) -> None:
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
        raise FileNotFoundError(
            f"expected a value of {setting} for {cfg.method.name} on {cfg.model.name} in {file}, got none: make it "
            "with make peers, or give chosen=null for the method's own setting"
        ) from None


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


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dictionaries, each with its key, as `call.height`."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
