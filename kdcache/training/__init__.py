"""`kdcache train`: a student from cached targets, on top of the HF Trainer and Ray Train."""

from __future__ import annotations

from kdcache.training.options import Schedule, TrainOptions
from kdcache.training.result import TrainProgress, TrainResult
from kdcache.training.run import train
from kdcache.training.trainer import DistillationTrainer

__all__ = [
    "DistillationTrainer",
    "Schedule",
    "TrainOptions",
    "TrainProgress",
    "TrainResult",
    "train",
]
