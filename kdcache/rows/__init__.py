"""Rows: records become token sequences with hard labels.

Algorithm: records are turned into documents (a text, and which parts of it have labels), batches of
documents are tokenised at once, their ids are laid end to end in flat arrays, and these are cut
into rows. Labels are aligned with the logits: `labels[t]` is the id to predict after reading the
tokens up to and including `t`.

Cost: the library `tokenizers` (`kdcache.rows.tokens`), and a constant number of numpy calls per
batch (`concat`) or per document. Memory: one batch of documents and one row.

Guarantee: rows depend on the spec, the tokenizer and the records' order alone. Under `concat`
every token of a span but the first is predicted exactly once; under `split`, and where documents
of `concat` do not attend to each other, the same holds for each document. A row ends at its last
label, so no trailing token without a label is computed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kdcache.rows.spec import Row, RowSpec
from kdcache.tasks import TASKS

if TYPE_CHECKING:  # it reads a corpus, by pyarrow, and readers of a cache import this package too
    from kdcache.rows.encoders import Encoder

__all__ = ["Row", "RowSpec", "make_encoder"]


def make_encoder(spec: RowSpec, tokenizer: Any) -> Encoder:
    """The encoder for a task and a teacher's tokenizer of Hugging Face.

    It may encode several spans one after the other and counts over all of them.

    Raises:
        UsageError: The tokenizer can't serve the spec.
    """
    module, name = _encoder(spec)
    kind: type[Encoder] = getattr(importlib.import_module(f"kdcache.rows.{module}"), name)
    return kind(spec, tokenizer)


def _encoder(spec: RowSpec) -> tuple[str, str]:
    """Module and name of an encoder: the others are not loaded."""
    task = TASKS[spec.task]
    if task.source:
        return "pairs", "PairEncoder"
    if task.words:
        return "words", "TokenClassificationEncoder"
    if not task.per_token:
        return "labels", "ClassificationEncoder"
    if not task.causal:
        return "masked", "MaskedEncoder"
    return ("ids", "IdsEncoder") if spec.record_form == "ids" else ("encoders", "TextEncoder")
