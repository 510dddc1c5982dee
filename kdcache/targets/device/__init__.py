"""What is kept of a distribution over a large vocabulary, computed on the device that made it.

`sample_entries` draws a threshold sample (explained and proved unbiased in `threshold.py`),
`top_entries` finds the largest and the mass of the tail. Both read the logits once, by blocks of
ids, and never synchronise with the host; the first non-finite position is returned.
"""

from __future__ import annotations

from kdcache.targets.device.run import (
    compiles,
    label_logprobs,
    of_positions,
    outside_mass,
    top_entries,
)
from kdcache.targets.device.threshold import Rule, sample_entries

__all__ = [
    "Rule",
    "compiles",
    "label_logprobs",
    "of_positions",
    "outside_mass",
    "sample_entries",
    "top_entries",
]
