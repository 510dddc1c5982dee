"""Students: the biLSTM, any Hugging Face model, any module; a wrapper whose forward is the loss."""

from __future__ import annotations

from kdcache.student.bilstm import BiLstmClassifier, BiLstmConfig
from kdcache.student.load import HfTokenize, StudentInfo, load_student, student_tokenize
from kdcache.student.words import Vocabulary, read_embeddings
from kdcache.student.wrapper import DistillationOutput, DistilledStudent

__all__ = [
    "BiLstmClassifier",
    "BiLstmConfig",
    "DistillationOutput",
    "DistilledStudent",
    "HfTokenize",
    "StudentInfo",
    "Vocabulary",
    "load_student",
    "read_embeddings",
    "student_tokenize",
]
