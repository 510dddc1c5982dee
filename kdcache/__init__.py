"""kdcache: pay for the teacher once, train many students from cached soft targets.

Each command of the program is a function here of the same name, which takes an options value whose
fields are the command's options:

    import kdcache

    kdcache.build(kdcache.BuildOptions(teacher=("bert-sst2",), corpus=("train.tsv",), out="cache"))

Nothing heavy is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.builder import BuildOptions, BuildResult, build
    from kdcache.cache import Cache
    from kdcache.cache.mending import GcResult, RepairResult
    from kdcache.demonstration import DemoOptions, DemoResult, demo
    from kdcache.errors import CorruptCacheError, IncompleteError, KdcacheError, UsageError
    from kdcache.finetuning import FinetuneOptions, FinetuneResult, finetune
    from kdcache.loss import distillation_loss, fused_linear_distillation
    from kdcache.report import (
        EvaluateOptions,
        EvaluateResult,
        InspectOptions,
        InspectResult,
        PredictOptions,
        PredictResult,
        evaluate,
        inspect,
        predict,
    )
    from kdcache.report.plan import PlanOptions, PlanResult, plan
    from kdcache.stream import Collator, TargetDataset, TargetStream
    from kdcache.student import DistilledStudent
    from kdcache.sweeping import SweepOptions, SweepResult, sweep
    from kdcache.targets import Codec, DenseTargets, SoftTargets, SparseTargets
    from kdcache.training import DistillationTrainer, TrainOptions, TrainResult, train
    from kdcache.upkeep import (
        GcOptions,
        RepairOptions,
        VerifyOptions,
        VerifyResult,
        gc,
        repair,
        verify,
    )

__version__ = "0.1.0"

_HOMES = {
    "kdcache.builder": ("BuildOptions", "BuildResult", "build"),
    "kdcache.cache": ("Cache",),
    "kdcache.cache.mending": ("GcResult", "RepairResult"),
    "kdcache.demonstration": ("DemoOptions", "DemoResult", "demo"),
    "kdcache.errors": ("CorruptCacheError", "IncompleteError", "KdcacheError", "UsageError"),
    "kdcache.finetuning": ("FinetuneOptions", "FinetuneResult", "finetune"),
    "kdcache.loss": ("distillation_loss", "fused_linear_distillation"),
    "kdcache.report": (
        "EvaluateOptions",
        "EvaluateResult",
        "InspectOptions",
        "InspectResult",
        "PredictOptions",
        "PredictResult",
        "evaluate",
        "inspect",
        "predict",
    ),
    "kdcache.report.plan": ("PlanOptions", "PlanResult", "plan"),
    "kdcache.stream": ("Collator", "TargetDataset", "TargetStream"),
    "kdcache.student": ("DistilledStudent",),
    "kdcache.sweeping": ("SweepOptions", "SweepResult", "sweep"),
    "kdcache.targets": ("Codec", "DenseTargets", "SoftTargets", "SparseTargets"),
    "kdcache.training": ("DistillationTrainer", "TrainOptions", "TrainResult", "train"),
    "kdcache.upkeep": (
        "GcOptions",
        "RepairOptions",
        "VerifyOptions",
        "VerifyResult",
        "gc",
        "repair",
        "verify",
    ),
}
_WHERE = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
