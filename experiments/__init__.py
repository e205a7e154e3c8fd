"""The stages of the benchmark: generate, evaluate, tabulate, plot.

No other package imports Hydra, pandas or matplotlib.
"""

import logging
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

#: The checkout: relative paths of the configuration are relative to it, whatever the working directory.
PROJECT = Path(__file__).resolve().parent.parent


def project_path(path: str | Path) -> Path:
    """Return `path` made absolute, relative ones taken from the checkout."""
    return PROJECT / Path(path).expanduser()


# `${project:models/mini-clip}` in conf/: a file of the checkout.
OmegaConf.register_new_resolver("project", lambda path: str(project_path(path)), replace=True)

# `${first_file:A,B}` in conf/: the first of these files that exists, else the first.
OmegaConf.register_new_resolver(
    "first_file", lambda *paths: next((path for path in paths if Path(path).is_file()), paths[0]), replace=True
)


def select_device(name: str) -> str:
    """Return the torch device of `device=NAME`: auto is CUDA if available, otherwise the CPU.

    Raises:
        ValueError: the device is not available.
    """
    import torch  # not with the package: a command's help must not wait for it

    has_device = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [kind for kind in has_device if has_device[kind]]
    if name == "auto":
        return "cuda" if has_device["cuda"] else "cpu"
    if str(name).split(":")[0] not in available:
        raise ValueError(f"device={name} is not available here: expected auto or one of {available}")
    return name


def start_log() -> None:
    """Print the log of this project, and only the warnings of other packages, which log every request and font."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger().setLevel(logging.WARNING)
    for package in ("experiments", "eval"):
        logging.getLogger(package).setLevel(logging.INFO)


def synchronize(device: str) -> None:
    """Wait until a torch device has finished its work; a CPU always has."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()


#: Settings that choose the same thing: one that an override sets takes the place of the other one's `${strength:}`.
_ALTERNATIVES = {"timestep_range": "step_range", "step_range": "timestep_range"}


def _strength(setting: str, times: float | None = None, *, _parent_: Any, _root_: Any) -> Any:
    other = _ALTERNATIVES.get(setting)
    if other is not None and not OmegaConf.is_interpolation(_parent_, other) and _parent_.get(other) is not None:
        return None  # an override, and no interpolation, gives the other one a value
    metadata = OmegaConf.to_container(_parent_.metadata, resolve=True)
    older = metadata.get("older_settings", {}) if _root_.older_protocol else {}
    by_model = {**metadata["settings_by_model"], **older}
    by_steps = metadata.get("settings_by_steps", {}).get(_root_.model.name, {})
    steps = str(OmegaConf.select(_root_, "model.call.num_inference_steps"))
    settings = by_steps.get(steps) or by_model.get(_root_.model.name) or {}
    value = settings.get(setting)
    if times is None:
        return value
    if value is None:
        from negtome import NegToMeConfig

        value = getattr(NegToMeConfig, setting)
    return times * value


# `${strength:alpha}` in conf/method/: the value in `metadata.settings_by_steps` for the model and its number of steps;
# if there is none for that number, the value in `metadata.settings_by_model`, or null. `${strength:alpha,2}` is twice
# the value, or twice the library's default.
OmegaConf.register_new_resolver("strength", _strength, replace=True)


def _blocks(*, _parent_: Any, _root_: Any) -> list[str] | None:
    metadata = OmegaConf.to_container(_parent_.metadata)
    choices = {"release": None, **metadata["choices"].get(_root_.model.architecture, {})}
    if metadata["blocks"] not in choices:
        raise ValueError(
            f"method.metadata.blocks must be one of {sorted(choices)} for model={_root_.model.name}, "
            f"got {metadata['blocks']!r}"
        )
    return choices[metadata["blocks"]]


# `${blocks:}` in conf/method/: the choice of `metadata.choices` that `metadata.blocks` names; "release" is the
# library's own.
OmegaConf.register_new_resolver("blocks", _blocks, replace=True)


def _peers(model: str, scope: str = "published") -> str:
    if scope not in ("published", "all"):
        raise ValueError(f"expected ${{peers:MODEL}} or ${{peers:MODEL,all}}, got {scope!r} in the place of all")
    specs = {file.stem: OmegaConf.load(file) for file in sorted((PROJECT / "conf" / "method").glob("*.yaml"))}
    values, pending = f"metadata.hyperparameter.values.{model}", "metadata.hyperparameter.pending"
    swept = {name: spec for name, spec in specs.items() if OmegaConf.select(spec, values)}
    return ",".join(name for name, spec in swept.items() if scope == "all" or not OmegaConf.select(spec, pending))


# `${peers:mini-sdxl}` in conf/experiment/: the methods that have a hyperparameter for a model, as choices of a sweep.
# Methods marked `pending` are left out, since the published tables of `make peers` do not have them yet;
# `${peers:mini-sdxl,all}` has them too.
OmegaConf.register_new_resolver("peers", _peers, replace=True)
