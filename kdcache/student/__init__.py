"""Students: the biLSTM, any Hugging Face model, any module; a wrapper whose forward is the loss."""

from __future__ import annotations

from kdcache.models import BiLstmConfig
from kdcache.student.load import load_student
from kdcache.student.tokens import (
    HfTokenize,
    StudentInfo,
    WordTokenize,
    read_embeddings,
    student_tokenize,
    word_tokenizer,
)
from kdcache.student.wrapper import DistillationOutput, DistilledStudent

__all__ = [
    "BiLstmConfig",
    "DistillationOutput",
    "DistilledStudent",
    "HfTokenize",
    "StudentInfo",
    "WordTokenize",
    "load_student",
    "read_embeddings",
    "student_tokenize",
    "word_tokenizer",
]
