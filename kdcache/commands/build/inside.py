"""What a build adds to the workers of its teacher's engine: see `kdcache.teacher.engine.inside`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from kdcache.cache import Cache
from kdcache.teacher import TeacherFiles
from kdcache.teacher.encoding import Encoding
from kdcache.teacher.engine.head import read_head
from kdcache.teacher.engine.inside import Encoder, Layout, Parts


class EncodingWorker:
    """What joins vLLM's worker: it can be told to encode."""

    @torch.inference_mode()
    def kdcache_encode(
        self, url: str, folder: str, dtype: str, trust_remote_code: bool
    ) -> Parts | str | None:
        """Begin to encode what requests name.

        Args:
            url: of the cache that is being made.
            folder: the model's.
            dtype: that it computes in.
            trust_remote_code: whether code that ships with the model may run.

        Returns:
            The layout of the answers, or why there are none; None of a worker without last layer.
        """
        worker: Any = self
        groups = import_module("vllm.distributed")
        if not groups.get_pp_group().is_last_rank:
            return None
        pooling = import_module("vllm.model_executor.layers.pooler.tokwise")
        pooler = getattr(worker.model_runner.model, "pooler", None)
        pooler = getattr(pooler, "poolers_by_task", {}).get("token_embed")
        if not isinstance(pooler, pooling.TokenPooler):
            return f"the model has a {type(pooler).__name__} of its own"
        files = TeacherFiles.find(folder, trust_remote_code=trust_remote_code)
        head, cache = read_head(files, dtype), Cache.resume(url)
        encoder = Encoder(
            pooler.head,
            head,
            Encoding(cache.codec(), cache.spec.kept),
            groups.get_tp_group(),
        )
        # A position of zeros: it compiles where that is done, and shows the layout.
        zeros = torch.zeros(1, head.layer.width, device=worker.device, dtype=getattr(torch, dtype))
        layout = Layout.of(encoder.encode(zeros, zeros[:, 0].double(), zeros[:, 0].long())[0])
        pooler.head = encoder
        return layout.parts


JOINS = f"{EncodingWorker.__module__}.{EncodingWorker.__name__}"
"""What vLLM imports."""
