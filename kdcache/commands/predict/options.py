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
        help="folder of a run or of a classifier, or hub id.",
        metavar="RUN_OR_DIR",
    )
    corpus: tuple[str, ...] = option(
        help="files, folders, globs or URLs; `-` alone reads plain lines from standard input.",
        metavar="PATH_OR_URL_OR_GLOB|-",
    )
    out: str | None = option(
        None, help="file for the JSON lines. Default: standard output.", metavar="FILE"
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

    def conflicts(self) -> list[str]:
        """See `Options.conflicts`."""
        problems = form_problems(self.record_form, self.task or SEQUENCE_CLASSIFICATION)
        if "-" in self.corpus and len(self.corpus) > 1:
            problems.append("--corpus - reads standard input and cannot be combined with files.")
        if "-" in self.corpus and self.pair_column is not None:
            problems.append("--corpus - reads one text per line and has no --pair-column.")
        return problems
