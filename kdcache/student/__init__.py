"""Students: the biLSTM, any Hugging Face model, any module; a wrapper whose forward is the loss."""

from __future__ import annotations

from kdcache.models import BiLstmConfig
from kdcache.student.bilstm import BiLstmForSequenceClassification
from kdcache.student.info import StudentInfo
from kdcache.student.load import HfTokenize, load_student, student_tokenize
from kdcache.student.words import read_embeddings, word_tokenizer
from kdcache.student.wrapper import DistillationOutput, DistilledStudent

__all__ = [
    "BiLstmConfig",
    "BiLstmForSequenceClassification",
    "DistillationOutput",
    "DistilledStudent",
    "HfTokenize",
    "StudentInfo",
    "load_student",
    "read_embeddings",
    "student_tokenize",
    "word_tokenizer",
]
