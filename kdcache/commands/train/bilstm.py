"""The options of `train` for the built-in biLSTM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kdcache.options import Options, option

WORDS = ("words", "teacher")
"""What a biLSTM may read."""


@dataclass(frozen=True, kw_only=True)
class BiLstmOptions(Options):
    """The built-in biLSTM, and students that read texts themselves."""

    heading = "biLSTM"

    student_tokenizer: str | None = option(
        None,
        help=(
            "what a biLSTM reads: `words` of a vocabulary of its own, or the `teacher`'s tokens "
            "(default: words). With `cross_tokenizer`, the student's tokenizer (default: the one "
            "in its folder)."
        ),
        metavar="words|teacher|DIR_OR_HUB_ID",
        decides="student",
    )
    max_length: int | None = option(
        None,
        help="maximum tokens of a row, if the student has words or its own tokenizer.",
        at_least=1,
        decides="student",
    )
    embeddings: str | None = option(
        None,
        help="GloVe or word2vec text file (`.gz` too) for the biLSTM.",
        metavar="FILE",
        decides="student",
    )
    freeze_embeddings: bool = option(
        False, help="leave the biLSTM's word vectors as they were loaded.", decides="student"
    )
    embedding_size: int | None = option(
        None,
        help="width of the biLSTM's word vectors. Default: that of `embeddings`, else 300.",
        decides="student",
    )
    hidden_size: int | None = option(
        None, help="width of the LSTM in each direction. Default: 256.", decides="student"
    )
    layers: int | None = option(None, help="LSTM layers. Default: 1.", decides="student")
    dense_size: int | None = option(
        None, help="width of the ReLU layer. Default: 128.", decides="student"
    )
    dropout: float | None = option(
        None,
        help="probability of dropping an output of the biLSTM's layers in training. Default: 0.",
        decides="student",
    )
    pooling: Literal["last", "max"] | None = option(
        None,
        help="what represents a text: the last states of both directions, or the maximum over its "
        "words. Default: last.",
        decides="student",
    )
    min_count: int | None = option(
        None,
        help="words that occur less often are unknown to the biLSTM. Default: 1.",
        decides="student",
    )
    max_words: int | None = option(
        None,
        help="words of the biLSTM's vocabulary at most, special ones included. Default: no bound.",
        decides="student",
    )

    @property
    def bilstm(self) -> dict[str, Any]:
        """Options of the built-in student that were given."""
        values = {
            "tokenizer": self.student_tokenizer if self.student_tokenizer in WORDS else None,
            "freeze_embeddings": self.freeze_embeddings or None,
            "embedding_size": self.embedding_size,
            "hidden_size": self.hidden_size,
            "layers": self.layers,
            "dense_size": self.dense_size,
            "dropout": self.dropout,
            "pooling": self.pooling,
            "min_count": self.min_count,
            "max_words": self.max_words,
        }
        return {name: value for name, value in values.items() if value is not None}
