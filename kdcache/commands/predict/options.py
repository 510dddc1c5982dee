"""The options of `predict`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from kdcache.commands.groups import InferenceOptions, RecordOptions, form_problems
from kdcache.options import again, option
from kdcache.row_groups import SourceGroup
from kdcache.tasks import SEQUENCE_CLASSIFICATION, Task


@dataclass(frozen=True)
class PredictOptions(SourceGroup, RecordOptions, InferenceOptions):
    """What `kdcache predict` takes: fields have the names of its options."""

    first = (
        *("student", "corpus", "out", "task", "columns", "threshold", "max_length", "beams"),
        *("batch_tokens", "device"),
    )

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
    max_length: int = option(
        128, help="seq2seq: tokens of the longest target that is written.", at_least=1
    )
    beams: int = option(1, help="seq2seq: beams of the search; 1 is greedy.", at_least=1)
    _: KW_ONLY
    max_source_length: int | None = again(
        SourceGroup,
        "max_source_length",
        None,
        help="tokens of the longest source. Default: what the model reads.",
    )

    def conflicts(self) -> list[str]:
        """See `Options.conflicts`."""
        problems = form_problems(self.record_form, self.task or SEQUENCE_CLASSIFICATION)
        if "-" in self.corpus and len(self.corpus) > 1:
            problems.append("--corpus - reads standard input and cannot be combined with files.")
        if "-" in self.corpus and self.pair_column is not None:
            problems.append("--corpus - reads one text per line and has no pair (--columns).")
        return problems
