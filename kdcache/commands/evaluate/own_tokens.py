"""Students of an evaluation that read its text by a tokenizer of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcache.align import Aligner, TokenBytes
from kdcache.commands.evaluate.rows import EvaluationRows
from kdcache.commands.evaluate.scores import ModelScores
from kdcache.errors import UsageError
from kdcache.student.saved import LoadedModel, SavedModel
from kdcache.tasks import CAUSAL_LM, TASKS


def other_tokenizers(saved: Sequence[SavedModel], rows: EvaluationRows) -> list[bool]:
    """Which models have another vocabulary than the rows.

    Args:
        saved: the models.
        rows: that they are to read.

    Raises:
        UsageError: a model has that is a teacher, or of a task where no text is read anew.
    """
    other = [False] * len(saved)
    if TASKS[rows.task].rereads:
        return other  # each reads the texts by itself
    ours: Any = None
    for i, model in enumerate(saved):
        if model.tokenizer is None or model.tokenizer_sha256 == rows.tokenizer_sha256:
            continue
        ours = rows.tokenizer() if ours is None else ours
        theirs = model.tokenizer
        # Added tokens and templates may differ: only the meaning of each id of text counts.
        added = {*ours.get_added_vocab(), *theirs.get_added_vocab()}
        unlike = ours.get_vocab().items() ^ theirs.get_vocab().items()
        differ = len({token for token, _ in unlike} - added)
        other[i] = differ > 0
        if other[i] and (model.role == "teacher" or rows.task != CAUSAL_LM):
            raise UsageError(
                f"{model.who} has another vocabulary than {rows.source}: {differ:,} "
                "tokens have other ids or none. Evaluate on a cache built for this vocabulary."
            )
    return other


def with_aligners(
    reader: TokenBytes, models: Sequence[LoadedModel]
) -> list[tuple[LoadedModel, Aligner]]:
    """Students beside what makes their rows.

    Raises:
        UsageError: a student's tokenizer loses bytes.
    """
    return [
        (model, Aligner(reader, TokenBytes(saved.tokenizer, f"student {saved.name}"), saved.reach))
        for model in models
        for saved in (model.saved,)
    ]


def by_its_own_tokens(model: LoadedModel) -> ModelScores:
    """The figures of a student with a tokenizer of its own: none by positions of the rows."""
    return ModelScores(model.saved.name, "student", model.saved.parameters)
