"""A teacher in vLLM: its processes, and the output layer that it leaves to kdcache."""

from __future__ import annotations

from kdcache.teacher.engine.process import TeacherDied, encodes, engine_version

__all__ = ["TeacherDied", "encodes", "engine_version"]
