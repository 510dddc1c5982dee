"""Options of the rows of a sequence-to-sequence model: the group that the commands share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kdcache.commands.rows import RowOptions, longest
from kdcache.options import option
from kdcache.tasks import TASKS

if TYPE_CHECKING:
    from kdcache.rows import RowSpec

_SOURCE_LENGTH = 1024  # tokens


@dataclass(frozen=True, kw_only=True)
class PairRowOptions(RowOptions):
    """How records become rows, and where the source and the target of one are."""

    heading = "Corpus"

    source_column: str = option(
        "source",
        help="seq2seq: column of the text that the encoder reads; `translation.en` is the field "
        "`en` of the column `translation`.",
        metavar="NAME",
    )
    target_column: str = option(
        "target", help="seq2seq: column of the text that the decoder writes.", metavar="NAME"
    )
    max_source_length: int | None = option(
        None,
        help="seq2seq: tokens of the longest source; `max_length` is of the target. Default: 1024, "
        "or what the model reads if that is less.",
        metavar="TOKENS",
        at_least=1,
    )
    source_lang: str | None = option(
        None,
        help="seq2seq: language of the sources, for tokenizers that mark it, such as `en_XX`.",
        metavar="CODE",
    )
    target_lang: str | None = option(
        None, help="seq2seq: language of the targets, likewise.", metavar="CODE"
    )

    def row_spec(
        self, task: str, label_names: tuple[str, ...] | None, *, max_length: int
    ) -> RowSpec:
        """See `RowOptions.row_spec`."""
        return replace(
            super().row_spec(task, label_names, max_length=max_length),
            source_column=self.source_column,
            target_column=self.target_column,
            source_lang=self.source_lang,
            target_lang=self.target_lang,
        )

    def source_length(self, reach: Sequence[tuple[str, int | None]]) -> int:
        """Tokens of the longest source.

        Args:
            reach: each model, and the most tokens that its encoder reads; None for no bound.

        Raises:
            UsageError: a model reads less than the option says.
        """
        return longest("--max-source-length", self.max_source_length, reach, _SOURCE_LENGTH)

    def of_pairs(self, spec: RowSpec, models: Sequence[Any], role: str) -> RowSpec:
        """A spec with what rows of a source and a target have besides; others as they are.

        Args:
            spec: of the rows.
            models: `TeacherFiles`; the rows have the start of the first one's decoder.
            role: of these, for messages.
        """
        if not TASKS[spec.task].source:
            return spec
        length = self.source_length([(f"{role} {m.name}", m.source_reach) for m in models])
        return replace(
            spec,
            max_source_length=length,
            decoder_start=models[0].decoder_start,
        )
