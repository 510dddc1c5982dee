"""Rows: records become token sequences with hard labels.

Algorithm: records are turned into documents (a text, and which parts of it have labels), batches of
documents are tokenised at once, their ids are laid end to end in flat arrays, and these are cut
into rows. Labels are aligned with the logits: `labels[t]` is the id to predict after reading the
tokens up to and including `t`.

Cost: that of the library `tokenizers` (`kdcache.rows.tokens`), and a constant number of numpy
calls per batch (`concat`) or per document, never Python work per token of plain text. Memory: one
batch of documents and one row.

Guarantee: rows depend on the spec, the tokenizer and the records' order alone. Under `concat`
every token of a span but the first is predicted exactly once; under `split`, and where documents
of `concat` do not attend to each other, the same holds for each document. A row ends at its last
label, so no trailing token without a label is computed.
"""

from __future__ import annotations

from kdcache.rows.encoder import Encoder
from kdcache.rows.encoders import ClassificationEncoder, TextEncoder, make_encoder
from kdcache.rows.masked import MaskedEncoder
from kdcache.rows.pairs import PairEncoder
from kdcache.rows.spec import Row, RowSpec
from kdcache.rows.words import TokenClassificationEncoder, WordReader

__all__ = [
    "ClassificationEncoder",
    "Encoder",
    "MaskedEncoder",
    "PairEncoder",
    "Row",
    "RowSpec",
    "TextEncoder",
    "TokenClassificationEncoder",
    "WordReader",
    "make_encoder",
]
