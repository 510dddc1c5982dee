"""`kdcache predict`: texts or words in, one JSON line a record out, in the order of the input.

Records are read in windows; a window is sorted by length for the model and put back in order for
the output. Memory is that of one window, however long the input.

Guarantee: one line for every readable record, empty texts included, so that line i of the output
belongs to record i of the input. A file named by `out` appears whole or not at all.

Tags of sentences: words in, one JSON line a sentence out.
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from kdcache.commands.options import PredictOptions
from kdcache.commands.predict.targets import Writer
from kdcache.corpus import Corpus, ReadStats, Record, RecordError
from kdcache.errors import UsageError
from kdcache.files import full_disk, local_path, output_errors, try_output, whole_file
from kdcache.humanize import printable
from kdcache.rows.batches import batches
from kdcache.rows.pairs import text_of
from kdcache.rows.tokens import checked_text
from kdcache.rows.words import WordReader, tagged_row, words_of
from kdcache.student.saved import LoadedModel, SavedModel, pick_device
from kdcache.tasks import SEQUENCE_CLASSIFICATION, TASKS, UNLABELLED


@dataclass(frozen=True)
class TaggedSentence:
    """A tagger's prediction for a sentence.

    Attributes:
        tokens: its words, unchanged from the input.
        tags: the most probable class of each; None of words beyond what the model reads.
        probabilities: of these, None likewise.
    """

    tokens: tuple[str, ...]
    tags: tuple[str | None, ...]
    probabilities: tuple[float | None, ...]

    def to_json(self) -> str:
        """One line."""
        values = {"tokens": self.tokens, "tags": self.tags, "probabilities": self.probabilities}
        return printable(json.dumps(values, ensure_ascii=False))

    @property
    def cut(self) -> int:
        """How many words have no tag."""
        return self.tags.count(None)


def sentence_of(record: Record, words_column: str, text_column: str) -> tuple[str, ...]:
    """The words of a record: a list of them, or a text that is divided at blanks.

    Raises:
        UsageError: it has neither column.
        RecordError: the column holds something else.
    """
    if words_column not in record.values and text_column in record.values:
        return tuple(checked_text(record.values[text_column], text_column).split())
    return tuple(words_of(record, words_column))


@torch.inference_mode()
def tagged(
    model: LoadedModel, sentences: Sequence[Sequence[str]], *, batch_tokens: int = 4096
) -> list[TaggedSentence]:
    """A loaded tagger's predictions for sentences, in their order.

    Raises:
        UsageError: the model has no tokenizer, or cannot read a word.
    """
    saved = model.saved
    if saved.tokenizer is None:
        raise UsageError(
            f"{saved.who} has no tokenizer to read words with. Copy its tokenizer's "
            "files into its folder."
        )
    names = saved.label_names
    bounds = [n for n in (saved.reach, saved.tokenizer.model_max_length) if n is not None]
    filled = [i for i, words in enumerate(sentences) if words]
    read = WordReader(saved.tokenizer).read([sentences[i] for i in filled], min([1 << 20, *bounds]))
    rows = []
    for i, one in zip(filled, read, strict=True):
        if isinstance(one, str):
            raise UsageError(f"{saved.who} cannot read {sentences[i][:20]}: {one}.")
        labels = np.full(len(sentences[i]), UNLABELLED, np.int32)
        rows.append(tagged_row(sentences[i], labels, one))
    found = [TaggedSentence(tuple(words), (), ()) for words in sentences]
    for chosen in batches([len(row.input_ids) for row in rows], batch_tokens):
        some = [rows[i] for i in chosen]
        p, best = torch.cat(list(model.run(some))).double().softmax(-1).max(-1)
        done = 0
        for i, row in zip(chosen, some, strict=True):
            words = tuple(sentences[filled[i]])
            kept = len(row.words or ())
            own = slice(done, done + kept)
            rest = (None,) * (len(words) - kept)
            tags = (*(names[tag] for tag in best[own].tolist()), *rest)
            found[filled[i]] = TaggedSentence(words, tags, (*p[own].tolist(), *rest))
            done += kept
    return found


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
        cut: words without a tag, being beyond what the model reads; of sources, how many were cut.
        unfinished: targets that were not at their end at the longest.
    """

    out: str | None
    records: int
    skipped: int
    seconds: float
    cut: int = 0
    unfinished: int = 0


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for a text; what another task gives is None.

    Attributes:
        text: unchanged from the input.
        text_pair: the second text, or None without a pair column.
        label: name of the most probable class.
        labels: of several labels a text, the names of those with the threshold's probability or
            more, in the order of the classes.
        probabilities: of each class by its name; where a text has one class they sum to 1.
        score: of a regression model.
    """

    text: str
    text_pair: str | None
    label: str | None = None
    labels: tuple[str, ...] | None = None
    probabilities: dict[str, float] | None = None
    score: float | None = None

    def to_json(self) -> str:
        """One line; what is None is left out."""
        values = dataclasses.asdict(self)
        kept = {name: value for name, value in values.items() if value is not None}
        text = json.dumps(kept, ensure_ascii=False)
        return printable(text)  # which is an escape of JSON too


def predict(
    options: PredictOptions, *, lines: Iterable[str] | None = None, output: TextIO | None = None
) -> PredictResult:
    """Classify texts, score them, tag sentences, or write targets.

    Args:
        options: what to do.
        lines: read instead of standard input, for `corpus` `-`.
        output: written to instead of standard output, where `out` is None.

    Raises:
        UsageError: the model is not a classifier or cannot read texts, or the input is unreadable.
    """
    started = time.perf_counter()
    if options.out is not None:
        if local_path(options.out).is_dir():
            raise UsageError(f"--out is {options.out}, a folder. Name a file.")
        try_output(options.out)
    saved = SavedModel.find(options.student, trust_remote_code=options.trust_remote_code)
    task = options.task or saved.task or SEQUENCE_CLASSIFICATION
    if TASKS[task].over_ids and not TASKS[task].source:
        raise UsageError(
            f"student {options.student} is a {TASKS[task].noun}; predict is for classifiers, "
            "scorers and sequence-to-sequence models. Use transformers, and judge it with `kdcache "
            "evaluate`."
        )
    device = pick_device(options.device)
    stats = ReadStats()
    written = cut = 0
    if TASKS[task].source:
        with _sink(options.out, output) as sink:
            return _written(options, saved, task, device, stats, lines, sink, started)
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
            seconds = time.perf_counter() - started
            return PredictResult(options.out, written, stats.skipped, seconds, cut)
        texts, window = _texts(options, stats, lines)
        while some := list(islice(texts, window)):
            for prediction in predictions(
                model, some, batch_tokens=budget, task=task, threshold=options.threshold
            ):
                sink.write(prediction.to_json() + "\n")
            sink.flush()
            written += len(some)
    return PredictResult(options.out, written, stats.skipped, time.perf_counter() - started)


def _written(
    options: PredictOptions,
    saved: SavedModel,
    task: str,
    device: str,
    stats: ReadStats,
    lines: Iterable[str] | None,
    sink: TextIO,
    started: float,
) -> PredictResult:
    """Write the targets of sources to a sink."""
    writer = Writer(
        saved,
        task=task,
        dtype=options.dtype,
        device=device,
        max_length=options.max_length,
        max_source_length=options.max_source_length,
        beams=options.beams,
        source_lang=options.source_lang,
        target_lang=options.target_lang,
    )
    budget = options.batch_tokens or (8192 if device == "cpu" else 65536)
    sources, window = _sources(options, stats, lines)
    written = unfinished = 0
    while part := list(islice(sources, window)):
        for target in writer.write(part, batch_tokens=budget):
            sink.write(target.to_json() + "\n")
            unfinished += not target.finished
        sink.flush()
        written += len(part)
    seconds = time.perf_counter() - started
    return PredictResult(options.out, written, stats.skipped, seconds, writer.cut, unfinished)


def _sources(
    options: PredictOptions, stats: ReadStats, lines: Iterable[str] | None
) -> tuple[Iterator[str], int]:
    """The sources in order, and how many to take at a time."""
    if options.corpus == ("-",):
        texts, window = _texts(options, stats, lines)
        return (text for text, _ in texts), window
    column = options.source_column

    def read() -> Iterator[str]:
        columns = (column, column.partition(".")[0])
        for record in _records(options, stats, *columns):
            try:
                yield text_of(record, column, "source", columns)
            except RecordError as problem:
                stats.reject(options.on_error, record.file, record.location, problem)

    return read(), _WINDOW


@torch.inference_mode()
def predictions(
    model: LoadedModel,
    texts: list[tuple[str, str | None]],
    *,
    batch_tokens: int = 4096,
    task: str = SEQUENCE_CLASSIFICATION,
    threshold: float = 0.5,
) -> list[Prediction]:
    """A loaded model's predictions for texts, or pairs of texts, in their order.

    Args:
        model: of a task of whole texts.
        texts: with their second texts, or None.
        batch_tokens: tokens of a batch, padding included.
        task: of the model.
        threshold: of several labels a text, the probability from which a class is one of them.
    """
    pairs = None if texts[0][1] is None else [pair or "" for _, pair in texts]
    rows = model.saved.encode([text for text, _ in texts], pairs)
    names = model.saved.label_names
    found: list[Prediction | None] = [None] * len(rows)
    read, fields = _READ[TASKS[task].answers]
    for chosen in batches([len(row.input_ids) for row in rows], batch_tokens):
        logits = torch.cat(list(model.run([rows[i] for i in chosen])))
        for i, values in zip(chosen, read(logits.double()).tolist(), strict=True):
            found[i] = Prediction(*texts[i], **fields(names, values, threshold))
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


def _one_class(names: Sequence[str], values: Sequence[float], threshold: float) -> dict[str, Any]:
    best = max(range(len(values)), key=values.__getitem__)
    return {"label": names[best], "probabilities": dict(zip(names, values, strict=True))}


def _labels(names: Sequence[str], values: Sequence[float], threshold: float) -> dict[str, Any]:
    probabilities = dict(zip(names, values, strict=True))
    chosen = tuple(name for name, p in probabilities.items() if p >= threshold)
    return {"labels": chosen, "probabilities": probabilities}


# From logits to values of each row, and from names, values and threshold to a prediction's fields.
_READ: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., dict[str, Any]]]] = {
    "classes": (partial(torch.softmax, dim=-1), _one_class),
    "labels": (torch.sigmoid, _labels),
    "score": (lambda logits: logits, lambda names, values, threshold: {"score": values[0]}),
}


def _texts(
    options: PredictOptions, stats: ReadStats, lines: Iterable[str] | None
) -> tuple[Iterator[tuple[str, str | None]], int]:
    """The texts in order, and how many to take at a time."""
    if options.corpus == ("-",):
        source = _typed() if lines is None else lines
        # Someone who types wants an answer to each line.
        window = 1 if lines is None and sys.stdin.isatty() else _WINDOW
        return _lines(islice(source, options.limit), options, stats), window

    def read() -> Iterator[tuple[str, str | None]]:
        for record in _records(options, stats):
            try:
                yield _columns(record, options)
            except RecordError as problem:
                stats.reject(options.on_error, record.file, record.location, problem)

    return read(), _WINDOW


def _typed() -> Iterator[str]:
    """Lines of standard input."""
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        byte = f"{error.object[error.start]:#04x}"
        raise UsageError(
            f"standard input is not text in {error.encoding} (byte {byte}). Convert it to UTF-8."
        ) from None


def _lines(
    source: Iterable[str], options: PredictOptions, stats: ReadStats
) -> Iterator[tuple[str, None]]:
    for number, line in enumerate(source, 1):
        try:
            yield checked_text(line.rstrip("\r\n"), "text"), None
        except RecordError as problem:
            stats.reject(options.on_error, "standard input", f"line {number}", problem)


def _records(options: PredictOptions, stats: ReadStats, *columns: str) -> Iterator[Record]:
    corpus = options.open_corpus(options.corpus, span_bytes=_SPAN_BYTES)
    columns = (*columns, options.text_column, *filter(None, (options.pair_column,)))
    for span in corpus.spans:
        yield from Corpus.read(span, columns=columns, on_error=options.on_error, stats=stats)


def _columns(record: Record, options: PredictOptions) -> tuple[str, str | None]:
    found: list[str] = []
    for kind, name in (("text", options.text_column), ("pair", options.pair_column)):
        if name is None:
            continue
        if name not in record.values:
            raise record.missing([name], f"--columns {kind}=THEIRS")
        found.append(checked_text(record.values[name], name))
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
