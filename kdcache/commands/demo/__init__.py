"""`kdcache demo`: the main job on what every Python carries, in a few minutes on two cores."""

from __future__ import annotations

from kdcache.commands.demo.demo import DemoOptions, demo
from kdcache.commands.demo.result import DemoResult, StudentScores, render_demo

__all__ = ["DemoOptions", "DemoResult", "StudentScores", "demo", "render_demo"]
