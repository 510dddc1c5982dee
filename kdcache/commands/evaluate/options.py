"""The options of `evaluate`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from kdcache.commands.groups import InferenceOptions, PlotOptions, form_problems
from kdcache.commands.row_options import MaskedRowOptions
from kdcache.domains import Named
from kdcache.options import option
from kdcache.tasks import Task


@dataclass(frozen=True)
class EvaluateOptions(MaskedRowOptions, InferenceOptions, PlotOptions):
    """What `kdcache evaluate` takes: fields have the names of its options."""

    first = (
        *("student", "cache", "corpus", "teacher", "task", "temperature", "limit", "threshold"),
        *("batch_tokens", "plot"),
    )

    student: tuple[str, ...] = option(
        help="folders of models or of runs, or hub ids.",
        metavar="RUN_OR_DIR",
    )
    cache: str | None = option(
        None, help="a sealed cache whose rows and targets are used (optional).", metavar="CACHE"
    )
    corpus: tuple[str | Named, ...] = option(
        (),
        help="files, folders, globs or URLs whose rows are used if there is no cache; those of a "
        "name have figures of their own.",
        metavar="[NAME=]PATH_OR_URL_OR_GLOB",
        named=True,
    )
    teacher: str | None = option(
        None,
        help="folder or hub id of a teacher that runs live; with a cache it replaces the cached "
        "targets.",
        metavar="DIR_OR_HUB_ID",
    )
    task: Task | None = option(
        None, help="the task of the models. Default: the cache's or the first student's."
    )
    _: KW_ONLY
    limit: int | None = option(
        None,
        help="use only the first records of a corpus, or the first rows of a cache; of each of its "
        "domains, where they have names.",
        metavar="ROWS",
        at_least=1,
    )
    temperature: float | None = option(
        None,
        help="of KL. Default: 1 where the cache declares it, else the first declared.",
        above=0,
    )

    def conflicts(self) -> list[str]:
        """See `Options.conflicts`."""
        problems = form_problems(self.record_form, self.task) + self.ids_problems()
        problems += self.plot_problems()
        if bool(self.cache) == bool(self.corpus):
            problems.append("name either --cache or --corpus: what to evaluate on.")
        return problems
