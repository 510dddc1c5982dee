"""`kdcache predict`: texts or words in, one JSON line a record out, in the order of the input.

Records are read in windows; a window is sorted by length for the model and put back in order for
the output. Memory is that of one window, however long the input.

Guarantee: one line for every readable record, empty texts included, so that line i of the output
belongs to record i of the input. A file named by `out` appears whole or not at all.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TextIO

import torch

from kdcache.commands.predict.options import PredictOptions
from kdcache.commands.predict.tags import sentence_of, tagged
from kdcache.corpus import Corpus, ReadStats, Record, RecordError
from kdcache.errors import UsageError
from kdcache.files import full_disk, local_path, output_errors, whole_file
from kdcache.humanize import printable
from kdcache.rows.batches import batches
from kdcache.student.saved import LoadedModel, SavedModel, pick_device
from kdcache.tasks import CAUSAL_LM, SEQUENCE_CLASSIFICATION, TASKS

_WINDOW = 1024
_SPAN_BYTES = 1 << 60  # a file is one span: spans of compressed files would mix its order


@dataclass(frozen=True)
class PredictResult:
    """The outcome of a prediction run.

    Attributes:
        out: where the lines went. Default: standard output.
        records: lines written.
        skipped: records that could not be read.
        seconds: wall time, loading the model included.
        cut: words without a tag, being beyond what the model reads.
    """

    out: str | None
    records: int
    skipped: int
    seconds: float
    cut: int = 0


@dataclass(frozen=True)
class Prediction:
    """A classifier's prediction for a text.

    Attributes:
        text: unchanged from the input.
        text_pair: the second text, or None without a pair column.
        label: name of the most probable class.
        probabilities: of each class by its name; they sum to 1.
    """

    text: str
    text_pair: str | None
    label: str
    probabilities: dict[str, float]

    def to_json(self) -> str:
        """One line; a missing second text is left out."""
        values = {"text": self.text, "text_pair": self.text_pair, "label": self.label}
        kept = {name: value for name, value in values.items() if value is not None}
        text = json.dumps({**kept, "probabilities": self.probabilities}, ensure_ascii=False)
        return printable(text)  # which is an escape of JSON too


def predict(
    options: PredictOptions, *, lines: Iterable[str] | None = None, output: TextIO | None = None
) -> PredictResult:
    """Classify texts, or tag sentences.

    Args:
        options: what to do.
        lines: read instead of standard input, for `corpus` `-`.
        output: written to instead of standard output, where `out` is None.

    Raises:
        UsageError: the model is not a classifier or cannot read texts, or the input is unreadable.
    """
    begin = time.perf_counter()
    if options.out is not None:
        local_path(options.out)
    saved = SavedModel.find(options.student, trust_remote_code=options.trust_remote_code)
    if saved.task == CAUSAL_LM:
        raise UsageError(
            f"student {options.student} is a causal LM; predict is for classifiers. "
            "Generate text with transformers, and judge it with `kdcache evaluate`."
        )
    device = pick_device(options.device)
    stats = ReadStats()
    written = cut = 0
    task = saved.task or SEQUENCE_CLASSIFICATION
    with _sink(options.out, output) as sink:
        model = saved.load(task, len(saved.label_names), dtype=options.dtype, device=device)
        budget = options.batch_tokens or (4096 if device == "cpu" else 32768)
        if TASKS[task].words:
            sentences, window = _sentences(options, stats, lines)
            while part := list(islice(sentences, window)):
                for sentence in tagged(model, part, batch_tokens=budget):
                    sink.write(sentence.to_json() + "\n")
                    cut += sentence.cut
                sink.flush()
                written += len(part)
            seconds = time.perf_counter() - begin
            return PredictResult(options.out, written, stats.skipped, seconds, cut)
        texts, window = _texts(options, stats, lines)
        while some := list(islice(texts, window)):
            for prediction in predictions(model, some, batch_tokens=budget):
                sink.write(prediction.to_json() + "\n")
            sink.flush()
            written += len(some)
    return PredictResult(options.out, written, stats.skipped, time.perf_counter() - begin)


@torch.inference_mode()
def predictions(
    model: LoadedModel, texts: list[tuple[str, str | None]], *, batch_tokens: int = 4096
) -> list[Prediction]:
    """A loaded classifier's predictions for texts, or pairs of texts, in their order."""
    pairs = None if texts[0][1] is None else [pair or "" for _, pair in texts]
    rows = model.saved.encode([text for text, _ in texts], pairs)
    names = model.saved.label_names
    found: list[Prediction | None] = [None] * len(rows)
    for chosen in batches([len(row.input_ids) for row in rows], batch_tokens):
        logits = torch.cat(list(model.run([rows[i] for i in chosen])))
        for i, p in zip(chosen, logits.double().softmax(-1).tolist(), strict=True):
            best = max(range(len(p)), key=p.__getitem__)
            found[i] = Prediction(*texts[i], names[best], dict(zip(names, p, strict=True)))
    return [prediction for prediction in found if prediction is not None]


def _sentences(
    options: PredictOptions, stats: ReadStats, lines: Iterable[str] | None
) -> tuple[Iterator[tuple[str, ...]], int]:
    """The words of sentences in order, and how many sentences to take at a time."""
    if options.corpus == ("-",):
        texts, window = _texts(options, stats, lines)
        return (tuple(text.split()) for text, _ in texts), window

    def read() -> Iterator[tuple[str, ...]]:
        for record in _records(options, stats, options.words_column):
            try:
                yield sentence_of(record, options.words_column, options.text_column)
            except RecordError as problem:
                stats.reject(options.on_error, record.file, record.location, problem)

    return read(), _WINDOW


def _texts(
    options: PredictOptions, stats: ReadStats, lines: Iterable[str] | None
) -> tuple[Iterator[tuple[str, str | None]], int]:
    """The texts in order, and how many to take at a time."""
    if options.corpus == ("-",):
        source = sys.stdin if lines is None else lines
        # Someone who types wants an answer to each line.
        window = 1 if lines is None and sys.stdin.isatty() else _WINDOW
        plain = ((line.rstrip("\r\n"), None) for line in source)
        return islice(plain, options.limit), window
    return (_columns(record, options) for record in _records(options, stats)), _WINDOW


def _records(options: PredictOptions, stats: ReadStats, *columns: str) -> Iterator[Record]:
    corpus = options.open_corpus(options.corpus, span_bytes=_SPAN_BYTES)
    columns = (*columns, options.text_column, *filter(None, (options.pair_column,)))
    for span in corpus.spans:
        yield from Corpus.read(span, columns=columns, on_error=options.on_error, stats=stats)


def _columns(record: Record, options: PredictOptions) -> tuple[str, str | None]:
    found: list[str] = []
    for name, flag in (
        (options.text_column, "--text-column"),
        (options.pair_column, "--pair-column"),
    ):
        if name is None:
            continue
        if name not in record.values:
            raise record.missing([name], flag)
        value = record.values[name]
        found.append("" if value is None else str(value))
    return found[0], found[1] if len(found) == 2 else None


@contextmanager
def _sink(out: str | None, output: TextIO | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout if output is None else output
        return
    path = local_path(out)
    with full_disk(path, lambda: "The same command starts over."), ExitStack() as opened:
        with output_errors(out):
            path.parent.mkdir(parents=True, exist_ok=True)
            text = io.TextIOWrapper(opened.enter_context(whole_file(path)), encoding="utf-8")
        yield text
        text.detach()  # flushed; the file below it is closed when it is whole
