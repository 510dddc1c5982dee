"""What is kept of a distribution over a large vocabulary, found on the device that made it.

`sample_entries` draws a threshold sample (what that is, and why it is unbiased: `threshold.py`),
`top_entries` finds the largest and the mass of the rest. Both read the logits once, by blocks of
ids, and wait for nothing: the first position that is of no use is told by `check_finite`.
"""

from __future__ import annotations

from kdcache.targets.device.blocks import BLOCK, Blocks, largest, open_blocks, read_blocks
from kdcache.targets.device.finite import check_finite
from kdcache.targets.device.run import compiles
from kdcache.targets.device.threshold import (
    Rule,
    blocked_sample,
    reference_sample,
    sample_entries,
    split,
)
from kdcache.targets.device.topk import top_entries

__all__ = [
    "BLOCK",
    "Blocks",
    "Rule",
    "blocked_sample",
    "check_finite",
    "compiles",
    "largest",
    "open_blocks",
    "read_blocks",
    "reference_sample",
    "sample_entries",
    "split",
    "top_entries",
]
