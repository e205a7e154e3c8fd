"""Negative Token Merging (NegToMe, arXiv 2412.01339) for stock diffusers pipelines.

Push the features of images that are generated together apart, so that they come out more different:

    with negtome.attach(pipe):
        images = pipe("a photo of a dog", num_images_per_prompt=4).images
"""

from typing import TYPE_CHECKING, Any

from negtome.version import __version__ as __version__

__all__ = [
    "Attachment",
    "NegToMeConfig",
    "Reference",
    "SiteCount",
    "Step",
    "StepReport",
    "attach",
    "detach",
    "negative_merge",
]

if TYPE_CHECKING:
    from negtome.attachment import Attachment, attach, detach
    from negtome.config import NegToMeConfig
    from negtome.merge import negative_merge
    from negtome.reference import Reference
    from negtome.stats import SiteCount, Step, StepReport
else:
    # Each is loaded when it is asked for: torch takes seconds, which `negtome.guard` does without.
    _MODULES = {
        "attachment": ("Attachment", "attach", "detach"),
        "config": ("NegToMeConfig",),
        "merge": ("negative_merge",),
        "reference": ("Reference",),
        "stats": ("SiteCount", "Step", "StepReport"),
    }

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        for module, names in _MODULES.items():
            if name in names:
                globals().update({one: getattr(import_module(f"negtome.{module}"), one) for one in names})
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
