"""Negative Token Merging (NegToMe, arXiv 2412.01339) as nodes for ComfyUI."""

from typing import Any


async def comfy_entrypoint() -> Any:
    """Return the extension with its nodes; ComfyUI calls this when it starts."""
    from .nodes import NegToMeExtension  # imports ComfyUI

    return NegToMeExtension()
