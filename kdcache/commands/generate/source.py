"""The source of a generation: the prompts of a corpus, and the model that answers them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.cache import ShardEntry
from kdcache.cache.generated import GeneratedCorpus
from kdcache.commands.build.packer import Steps
from kdcache.commands.build.source import Source, SpanRead, Turn, counted_records
from kdcache.corpus import Corpus, ReadStats, Span
from kdcache.rows import RowSpec
from kdcache.rows.prompts import PromptEncoder
from kdcache.teacher import TeacherOptions
from kdcache.teacher.writer import Writer, Writes


@dataclass(frozen=True)
class WriterSourceOptions:
    """Prompts, and the model that answers them.

    Attributes:
        rows: how records become prompts.
        model: which one to load, and how.
        batch_tokens: tokens of prompts and answers in a batch, at most.
    """

    rows: RowSpec
    model: TeacherOptions
    batch_tokens: int

    def open(self, url: str) -> WriterSource:
        """Load the model."""
        return WriterSource(self, GeneratedCorpus.resume(url))


@dataclass(kw_only=True)
class Prompts(SpanRead):
    """The prompts of a span."""

    ids: Sequence[npt.NDArray[np.int32]]


class WriterSource(Source[Span, Prompts]):
    """A loaded model that answers the prompts of a corpus."""

    def __init__(self, options: WriterSourceOptions, corpus: GeneratedCorpus) -> None:
        self.options, self.corpus, spec = options, corpus, corpus.spec
        self.tokenizer: Any = corpus.tokenizer()
        self.batch_tokens = options.batch_tokens
        shared = {
            "vocab_size": spec.vocab_size,
            "ends": spec.ends,
            "tokenizer": self.tokenizer,
        }
        self.writer: Writes
        if options.model.engine is not None:
            from kdcache.teacher.engine.writer import EngineWriter

            self.writer = EngineWriter(options.model, spec.drawn, **shared)
        else:
            self.writer = Writer(
                options.model, spec.drawn, **shared, batch_tokens=options.batch_tokens
            )
        self.device, self.takes_turns = self.writer.device.type, self.writer.takes_turns

    def read(self, work: Span, steps: Steps) -> Prompts:
        """See `Source.read`."""
        return read_prompts(self.corpus, self.options.rows, self.tokenizer, work, steps)

    def make(self, work: Span, read: Prompts, steps: Steps, turn: Turn) -> ShardEntry:
        """See `Source.make`."""

        def done(tokens: int) -> None:
            if tokens:
                steps.batch(tokens)
            steps()

        with turn():
            steps.begin(len(read.ids) * self.corpus.spec.drawn.samples)
            answers = self.writer.write(work.index, read.ids, done)
        steps()
        return self.corpus.commit(
            work.index,
            read.ids,
            answers,
            self.tokenizer,
            skipped=read.skipped,
            filtered=read.filtered,
        )

    def close(self) -> None:
        """See `Source.close`."""
        self.writer.close()


def read_prompts(
    corpus: GeneratedCorpus, rows: RowSpec, tokenizer: Any, span: Span, steps: Steps
) -> Prompts:
    """The prompts of a span.

    Args:
        corpus: that is being made of them.
        rows: how records become prompts.
        tokenizer: the model's.
        span: which one.
        steps: counts the records.
    """
    spec, stats = corpus.spec, ReadStats()
    longest = max(1, spec.max_length - spec.drawn.max_new_tokens)
    encoder = PromptEncoder(rows, tokenizer, longest, spec.prompt_tokens)
    records = Corpus.read(
        span, columns=rows.columns, on_error=rows.on_error, stats=stats, progress=steps
    )
    ids = [row.input_ids for row in encoder.encode(counted_records(records, steps))]
    return Prompts(
        ids=ids,
        skipped=stats.skipped + encoder.skipped + encoder.empty,
        filtered=stats.filtered if span.reading.filters else None,
        reasons=(*stats.reasons, *encoder.stats.reasons),
    )
