"""`kdcache train`: a student from cached targets, on top of the HF Trainer and Ray Train."""

from __future__ import annotations

from kdcache.commands.train.options import Schedule, TrainOptions
from kdcache.commands.train.result import TrainProgress, TrainResult
from kdcache.commands.train.run import train

__all__ = [
    "Schedule",
    "TrainOptions",
    "TrainProgress",
    "TrainResult",
    "train",
]
