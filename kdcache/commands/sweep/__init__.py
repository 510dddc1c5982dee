"""`kdcache sweep`: many students of the same caches, side by side."""

from __future__ import annotations

from kdcache.commands.sweep.results import RunScore, SettingScore, SweepResult, render_sweep
from kdcache.commands.sweep.sweep import SweepOptions, SweepProgress, sweep

__all__ = [
    "RunScore",
    "SettingScore",
    "SweepOptions",
    "SweepProgress",
    "SweepResult",
    "render_sweep",
    "sweep",
]
