"""Apply NegToMe through the model patcher that ComfyUI, Forge and reForge share.

These programs have models of their own instead of diffusers pipelines, but show each attention's output to functions
that a user registers. `GroupPush` and `ReferencePush` are such functions. The packages in integrations/ register them.
This package imports torch and negtome only.
"""

from negtome.patcher.pushes import KEY, GroupPush, ReferencePush
from negtome.patcher.report import Report
from negtome.patcher.settings import SETTINGS, PushSettings, Schedule, read_settings

__all__ = ["KEY", "SETTINGS", "GroupPush", "PushSettings", "ReferencePush", "Report", "Schedule", "read_settings"]
