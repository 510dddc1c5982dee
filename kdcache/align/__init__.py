"""Rows of a cache for students of other tokenizers: bytes of tokens, and chunks that both share.

A cache holds ids of the teacher's tokenizer and the teacher's log-probability of each label. The
ids give the text back byte by byte (`TokenBytes`), a student tokenises the same bytes, and where
boundaries of both tokenizations meet (`Aligner`, `Alignment`) the likelihood of what lies between
is a sum on both sides.
"""

from __future__ import annotations

from kdcache.align.aligner import Aligner, Alignment, CachedRow, label_bytes, like_marks, unchanged
from kdcache.align.token_bytes import TokenBytes

__all__ = [
    "Aligner",
    "Alignment",
    "CachedRow",
    "TokenBytes",
    "label_bytes",
    "like_marks",
    "unchanged",
]
