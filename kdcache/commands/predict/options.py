"""The options of `predict`."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.commands.groups import InferenceOptions, RecordOptions, form_problems
from kdcache.options import option
from kdcache.tasks import SEQUENCE_CLASSIFICATION, Task


@dataclass(frozen=True)
class PredictOptions(RecordOptions, InferenceOptions):
    """What `kdcache predict` takes: fields have the names of its options."""

    student: str = option(
        help="folder of a run, of a classifier or of a sequence-to-sequence model, or hub id.",
        metavar="RUN_OR_DIR",
    )
    corpus: tuple[str, ...] = option(
        help="files, folders, globs or URLs; `-` alone reads plain lines from standard input.",
        metavar="PATH_OR_URL_OR_GLOB|-",
    )
    out: str | None = option(
        None,
        help="file for the JSON lines. Default: standard output.",
        metavar="FILE",
        output=True,
    )

    task: Task | None = option(
        None, help="the task of the model. Default: what its configuration says."
    )
    threshold: float = option(
        0.5,
        help="of several labels a text: probability from which a class is one of them.",
        above=0,
        below=1,
    )

    source_column: str = option(
        "source", help="seq2seq: column of the text that the encoder reads.", metavar="NAME"
    )
    max_length: int = option(
        128, help="seq2seq: tokens of the longest target that is written.", at_least=1
    )
    max_source_length: int | None = option(
        None,
        help="seq2seq: tokens of the longest source. Default: what the model reads.",
        metavar="TOKENS",
        at_least=1,
    )
    beams: int = option(1, help="seq2seq: beams of the search; 1 is greedy.", at_least=1)
    source_lang: str | None = option(
        None,
        help="seq2seq: language of the sources, for tokenizers that mark it, such as `en_XX`.",
        metavar="CODE",
    )
    target_lang: str | None = option(
        None, help="seq2seq: language of the targets, likewise.", metavar="CODE"
    )

    def conflicts(self) -> list[str]:
        """See `Options.conflicts`."""
        problems = form_problems(self.record_form, self.task or SEQUENCE_CLASSIFICATION)
        if "-" in self.corpus and len(self.corpus) > 1:
            problems.append("--corpus - reads standard input and cannot be combined with files.")
        if "-" in self.corpus and self.pair_column is not None:
            problems.append("--corpus - reads one text per line and has no --pair-column.")
        return problems
