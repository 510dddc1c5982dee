"""The rows that an evaluation reads: those of a cache, or those of a corpus.

Both say what the models are compared on (task, classes, ids) and give their rows a shard, or some
hundred of a corpus, at a time. Each file of a corpus is read once, in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.commands.inspect import default_temperature
from kdcache.commands.options import EvaluateOptions
from kdcache.commands.row_options import set_chat_template
from kdcache.corpus import Corpus, named
from kdcache.errors import UsageError
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.stream.checks import check_every_position
from kdcache.stream.text import RowKind
from kdcache.student.saved import SavedModel, word_reader
from kdcache.tasks import TASKS

_WINDOW = 1024  # rows of a corpus that are sorted by length at a time
_SPAN_BYTES = 1 << 60  # a file is one span: each is read once, in order


@dataclass
class Window:
    """Rows of one domain that are read at a time, and the shard with their targets if that is."""

    rows: list[Row]
    domain: str | None
    data: ShardData | None = None


class EvaluationRows:
    """What models are compared on.

    Attributes:
        cache: that has the rows; None for those of a corpus.
        source: its name, for messages.
        reader: the model with the tokenizer that made the rows, for messages.
        task: of the models.
        label_names: the classes, or None.
        vocab_size: width of the logits that are compared.
        tokenizer_sha256: identity of the tokenizer of the rows.
        max_length: tokens of the longest row.
        temperature: of the soft targets.
        cut: texts of the corpus that were cut so far.
    """

    def __init__(self, options: EvaluateOptions, saved: Sequence[SavedModel]) -> None:
        """Find out what is asked.

        Args:
            saved: the models, the teacher first if there is one.

        Raises:
            UsageError: a model is of another task, or none has a tokenizer for the corpus.
            IncompleteError: the cache is not finished.
        """
        self.options = options
        self.saved = [model.files for model in saved]
        self.cache = None if options.cache is None else Cache.open(options.cache)
        self.temperature = options.temperature or 1.0
        self.cut = 0
        if self.cache is not None:
            self._set_cache(self.cache, saved)
        else:
            self._set_corpus(saved)

    def _set_cache(self, cache: Cache, saved: Sequence[SavedModel]) -> None:
        spec = cache.spec
        if self.options.task not in (None, spec.task):
            raise UsageError(
                f"--task is {self.options.task}, but {cache.url} is a cache for {spec.task}. "
                "Leave --task out."
            )
        if wrong := check_every_position([cache], "an evaluation"):
            raise UsageError(wrong[0])
        self.task, self.vocab_size, self.label_names = spec.task, spec.vocab_size, spec.label_names
        self.tokenizer_sha256: str | None = spec.tokenizer
        self.max_length = spec.max_length
        self.source = self.reader = cache.url
        for model in saved:
            model.check_task(self.task)
        if self.options.temperature is None:
            self.temperature = default_temperature(cache)
        if self.options.teacher is None:
            cache.codec().check_temperature(self.temperature)

    def _set_corpus(self, saved: Sequence[SavedModel]) -> None:
        options, first = self.options, saved[0]
        task = options.task or first.task
        if task is None:
            raise UsageError(
                f"{first.who} does not say which task it was saved for. Name it with --task."
            )
        self.task, self.label_names = task, None
        for model in saved:
            model.check_task(task)
        if TASKS[task].named:
            self.label_names = first.label_names
        self.vocab_size = first.vocab_size(task)
        self.max_length = options.row_length((model.who, model.reach) for model in saved)
        self.source = ", ".join(map(str, options.corpus))
        self.reader = first.who
        self.encoder_tokenizer = first.tokenizer
        if self.encoder_tokenizer is not None:
            set_chat_template(options.chat_template, self.encoder_tokenizer)
        self.tokenizer_sha256 = first.tokenizer_sha256
        if first.tokenizer is None and TASKS[task].rereads and first.is_factory:
            self.encoder_tokenizer = word_reader()
        readers = [model for model in saved if model.role == "teacher"] or saved
        without = [m for m in readers if m.tokenizer is None and not m.is_factory]
        if without or self.encoder_tokenizer is None:
            lacking = (without or [first])[0]
            raise UsageError(
                f"{lacking.who} has no tokenizer to read the corpus with. Copy its "
                "tokenizer's files into its folder, or evaluate on a --cache."
            )

    def tokenizer(self) -> Any:
        """The tokenizer of the rows."""
        return self.encoder_tokenizer if self.cache is None else self.cache.tokenizer()

    @property
    def spec(self) -> RowSpec:
        """How records of the corpus become rows."""
        spec = self.options.row_spec(self.task, self.label_names, max_length=self.max_length)
        return self.options.of_pairs(spec, self.saved, "model")

    @property
    def kind(self) -> RowKind:
        """What the rows hold."""
        if self.cache is not None:
            return RowKind.of_cache(self.cache)
        return RowKind.of(self.spec.packing, self.spec.record_form)

    @property
    def dense(self) -> bool:
        """Whether the cache keeps all logits."""
        return self.cache is not None and self.cache.codec().keeps_logits

    @property
    def logits_known(self) -> bool:
        """Whether the cache tells the teacher's probabilities at T = 1."""
        if self.cache is None or not self.dense:
            return False
        return self.cache.codec().any_temperature or math.isclose(self.temperature, 1.0)

    @property
    def entropies_known(self) -> bool:
        """Whether the cache has the entropy of its soft targets, which it keeps at T = 1."""
        at_one = math.isclose(self.temperature, 1.0)
        return self.cache is not None and self.cache.spec.entropy and at_one

    @cached_property
    def _corpus(self) -> Corpus:
        self.options.check_tokenizer(self.encoder_tokenizer)
        return self.options.open_corpus(named(self.options.corpus), span_bytes=_SPAN_BYTES)

    def domains(self) -> list[str | None]:
        """The names of the corpora, None of one without a name; also of those without rows."""
        if self.cache is not None:
            return list(self.cache.spec.domain_names or (None,))
        return list(dict.fromkeys(span.file.domain for span in self._corpus.spans))

    def windows(self, *, targets: bool) -> Iterator[Window]:
        """All rows, some at a time."""
        return self._encoded() if self.cache is None else self._cached(self.cache, targets)

    def _cached(self, cache: Cache, targets: bool) -> Iterator[Window]:
        left = dict.fromkeys(self.domains(), self.options.limit or cache.manifest.rows)
        for entry in cache.manifest.shards:
            domain = entry.domain
            if entry.rows and left[domain] > 0:
                data = cache.read(entry.span)
                rows = [data.row(i) for i in range(min(left[domain], len(data)))]
                left[domain] -= len(rows)
                yield Window(rows, domain, data if targets else None)

    def _encoded(self) -> Iterator[Window]:
        spec, corpus = self.spec, self._corpus
        encoder = make_encoder(spec, self.encoder_tokenizer)
        for span in corpus.spans:
            records = Corpus.read(span, columns=spec.columns, on_error=spec.on_error)
            rows = encoder.encode(records, span=span.index)
            while window := list(islice(rows, _WINDOW)):
                yield Window(window, span.file.domain)
        self.cut = encoder.truncated
