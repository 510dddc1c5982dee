"""axolotl: a plugin that trains on a cache's targets.

    plugins:
      - kdcache.integrations.axolotl.KdcachePlugin
    kdcache: {cache: caches/rows, alpha: 0.1}

`kdcache` has the settings of `Distillation`; without it the plugin changes nothing.
`kdcache build` reads what `axolotl preprocess` leaves in `dataset_prepared_path`.
"""

from __future__ import annotations

from typing import Any

from kdcache.errors import require
from kdcache.integrations.trainer import CachedTrainer, Distillation

require({"axolotl": "kdcache.integrations.axolotl"})

from axolotl.integrations.base import BasePlugin  # noqa: E402 else its own error would come first
from pydantic import BaseModel  # noqa: E402


class KdcacheArgs(BaseModel):
    """What the plugin adds to axolotl's configuration.

    Attributes:
        kdcache: the settings of `Distillation`.
    """

    kdcache: dict[str, Any] | None = None


class KdcachePlugin(BasePlugin):  # type: ignore[misc]
    """Gives axolotl a trainer whose loss is that of `CachedTrainer`; see there."""

    def get_input_args(self) -> str:
        """Where the configuration's further fields are."""
        return f"{__name__}.{KdcacheArgs.__name__}"

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """axolotl's own trainer of language models on the targets that the configuration names.

        Raises:
            UsageError: settings that can't be.
        """
        if not cfg.kdcache:
            return None
        from axolotl.core.trainers import AxolotlTrainer

        settings = Distillation.of(dict(cfg.kdcache), "kdcache of the configuration of axolotl")
        return type("KdcacheTrainer", (CachedTrainer, AxolotlTrainer), {"distillation": settings})
