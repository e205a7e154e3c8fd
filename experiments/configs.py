"""Parts of composed configurations, and the objects that are built from them."""

from collections.abc import Callable, Iterator
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments import select_device

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


def build(spec: DictConfig | dict[Any, Any]) -> Any:
    """Instantiate a configuration on this machine's device, without its `METADATA`.

    Args:
        spec: the configuration; a dictionary has no interpolations.

    Raises:
        FileNotFoundError, ValueError: those of the class itself, without Hydra's wrapping; or there is no such device.
    """
    values = OmegaConf.to_container(spec, resolve=True) if isinstance(spec, DictConfig) else spec
    settings = without(values, *METADATA)
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


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dictionaries, each with its key, as `call.height`."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
