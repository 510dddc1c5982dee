"""The teacher: one or several Hugging Face models that turn rows into logits, a slice of positions
at a time.

`TeacherFiles` is what can be known without loading weights (identity, tokenizer, vocabulary or
classes); the driver of a build needs no more. `Teacher` holds the models of one worker.
"""

from __future__ import annotations

from kdcache.pretrained import quiet_transformers
from kdcache.teacher.files import TeacherFiles, auto_class
from kdcache.teacher.load import EngineOptions, TeacherOptions
from kdcache.teacher.memory import Encoding, Slice, find_batch_tokens, logits_at, peak_share
from kdcache.teacher.teacher import Teacher, aligned

__all__ = [
    "Encoding",
    "EngineOptions",
    "Slice",
    "Teacher",
    "TeacherFiles",
    "TeacherOptions",
    "aligned",
    "auto_class",
    "find_batch_tokens",
    "logits_at",
    "peak_share",
    "quiet_transformers",
]
