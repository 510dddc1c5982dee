"""What a student of another tokenizer reads in place of a cached row, and where both tokenizations
meet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Alignment:
    """A row of a cache for a student of another tokenizer.

    A *chunk* lies between two neighbouring byte boundaries that both tokenizations share, and all
    of its tokens have labels on both sides. Positions of a row are its labels in order. The
    log-likelihood of chunk c is the sum of `label_logprob` over the teacher's positions
    `teacher_spans[c, 0]` to `teacher_spans[c, 1]` (excluded), and of the student's
    log-probabilities of its labels over its positions `student_spans[c]`. At the first position of
    a chunk both models have read the same bytes.

    Attributes:
        input_ids: int64 [S], the student's tokens of the row's text.
        labels: int64 [S], aligned with the logits (`labels[t]` follows `input_ids[t]`), `IGNORE`
            where there is none: only bytes that have a label in the cached row have one here.
        starts: bool [S], where documents begin that do not attend to each other; None where the
            cache's rows are not divided.
        teacher_spans: int64 [C, 2], of positions of the cached row.
        student_spans: int64 [C, 2], of positions of this row.
        chunk_bytes: int64 [C], bytes of text in each chunk; 0 of a special token that both have,
            such as the end-of-text.
        lost: stretches of the row without labels because the student's tokens do not have their
            bytes.
        cut: labels of the student left out because its row would be too long.
    """

    input_ids: Ints
    labels: Ints
    starts: npt.NDArray[np.bool_] | None
    teacher_spans: Ints
    student_spans: Ints
    chunk_bytes: Ints
    lost: int = 0
    cut: int = 0
