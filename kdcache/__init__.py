"""kdcache: pay for the teacher once, train many students from cached soft targets.

Each command of the program is a function here of the same name, which takes an options value whose
fields are the command's options:

    import kdcache

    kdcache.build(kdcache.BuildOptions(teacher=("bert-sst2",), corpus=("train.tsv",), out="cache"))

Heavy libraries are imported on first use. `import kdcache` registers kdcache's own models with
transformers: `AutoModelForSequenceClassification.from_pretrained(RUN)` loads them.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from typing import Any

from kdcache.cli.commands import public_names

__version__ = "0.1.0"

_HOMES = {  # of public names, besides those of commands
    "kdcache.align": ("Aligner", "Alignment", "CachedRow", "TokenBytes"),
    "kdcache.cache": ("Cache",),
    "kdcache.errors": ("CorruptCacheError", "IncompleteError", "KdcacheError", "UsageError"),
    "kdcache.loss": ("distillation_loss", "fused_linear_distillation"),
    "kdcache.stream": (*("Collator", "SumOverRanks", "TargetDataset", "TargetStream"),),
    "kdcache.stream.cross": ("CrossTokenizer",),
    "kdcache.stream.lookup": ("TargetLookup",),
    "kdcache.stream.text": ("cached_rows",),
    "kdcache.student": ("DistilledStudent", "load_student"),
    "kdcache.student.trainer": ("DistillationTrainer",),
    "kdcache.targets": ("Codec", "DenseTargets", "SoftTargets", "SparseTargets"),
}
_WHERE = {name: home for home, names in _HOMES.items() for name in names} | public_names()

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


_TABLE = "transformers.models.auto.configuration_auto"


class _Registration:
    """Registers `kdcache.models` right after transformers' table of configurations is loaded."""

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            load = loader.exec_module

            def load_and_register(module: Any) -> None:
                load(module)
                importlib.import_module("kdcache.models")

            loader.exec_module = load_and_register
        return spec


if _TABLE in sys.modules:
    importlib.import_module("kdcache.models")
else:
    sys.meta_path.insert(0, _Registration())
