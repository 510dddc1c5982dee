"""`kdcache demo`: the main job on what every Python carries, in a few minutes on two cores."""

from __future__ import annotations

from kdcache.demonstration.result import DemoResult, StudentScores, render_demo
from kdcache.demonstration.run import DemoOptions, demo

__all__ = ["DemoOptions", "DemoResult", "StudentScores", "demo", "render_demo"]
