"""`kdcache predict`: texts or words in, one JSON line a record out, in the order of the input.

Records are read in windows; a window is sorted by length for the model and put back in order for
the output. Memory is that of one window, however long the input.

Guarantee: one line for every readable record, empty texts included, so that line i of the output
belongs to record i of the input. A file named by `out` appears whole or not at all.

A line of a sequence-to-sequence model has a `source` and a `target`, so the output of a teacher is
a corpus of its own: of targets that the teacher would write itself (sequence-level distillation,
Kim and Rush 2016). A target is what the model's own `generate` writes of its source alone, up to
rounding: the model is probed first, and one whose logits move with the padding of a batch is given
sources of one length, or one by one. The search is greedy or of beams, as the options have it, and
never samples; all else that the model's `generation_config.json` states of a target's tokens holds.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor

from kdcache.commands.options import PredictOptions
from kdcache.corpus import Corpus, ReadStats, Record, RecordError
from kdcache.errors import UsageError, reason_of
from kdcache.files import full_disk, local_path, output_errors, try_output, whole_file
from kdcache.humanize import printable
from kdcache.rows.batches import batches, pad_rows
from kdcache.rows.pairs import pair_row, set_languages, target_ids, text_of
from kdcache.rows.spec import LAST_LABEL, Row
from kdcache.rows.tokens import checked_text, frame, tokens_of
from kdcache.rows.words import WordReader, tagged_row, words_of
from kdcache.student.saved import LoadedModel, SavedModel, pick_device
from kdcache.tasks import SEQUENCE_CLASSIFICATION, TASKS, UNLABELLED
from kdcache.teacher.load import load_models
from kdcache.teacher.model import TeacherModel

_WINDOW = 1024
_SPAN_BYTES = 1 << 60  # a file is one span: spans of compressed files would mix its order


@dataclass(frozen=True)
class PredictResult:
    """The outcome of a prediction run.

    Attributes:
        out: where the lines went; None for standard output.
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


class Answer(NamedTuple):
    """What becomes a line of the output.

    Attributes:
        values: of the line.
        cut: words of the input that the model does not read; of a source, whether it was cut.
        finished: whether the model ended it.
    """

    values: Mapping[str, Any]
    cut: int = 0
    finished: bool = True


def predict(
    options: PredictOptions, *, lines: Iterable[str] | None = None, output: TextIO | None = None
) -> PredictResult:
    """Classify texts, score them, tag sentences, or write targets.

    Args:
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
    stats, written, cut, unfinished = ReadStats(), 0, 0, 0
    with _sink(options.out, output) as sink:
        answer = _answerer(options, saved, task)
        inputs, window = _inputs(options, stats, lines, task)
        while some := list(islice(inputs, window)):
            for one in answer(some):
                sink.write(f"{printable(json.dumps(one.values, ensure_ascii=False))}\n")
                cut += one.cut
                unfinished += not one.finished
            sink.flush()
            written += len(some)
    seconds = time.perf_counter() - started
    return PredictResult(options.out, written, stats.skipped, seconds, cut, unfinished)


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


# Inputs


def _inputs(
    options: PredictOptions, stats: ReadStats, lines: Iterable[str] | None, task: str
) -> tuple[Iterator[Any], int]:
    """What the model is asked, in order, and how many to take at a time: texts with their second
    texts or None, of taggers words, of sequence-to-sequence models sources.
    """
    if options.corpus == ("-",):
        source = _typed() if lines is None else lines
        # Someone who types wants an answer to each line.
        window = 1 if lines is None and sys.stdin.isatty() else _WINDOW
        return _lines(islice(source, options.limit), options, stats, task), window
    return _records(options, stats, task), _WINDOW


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
    source: Iterable[str], options: PredictOptions, stats: ReadStats, task: str
) -> Iterator[Any]:
    kind = TASKS[task]
    for number, line in enumerate(source, 1):
        try:
            text = checked_text(line.rstrip("\r\n"), "text")
        except RecordError as problem:
            stats.reject(options.on_error, "standard input", f"line {number}", problem)
            continue
        yield text if kind.source else tuple(text.split()) if kind.words else (text, None)


def _records(options: PredictOptions, stats: ReadStats, task: str) -> Iterator[Any]:
    kind, columns = TASKS[task], [options.text_column, *filter(None, (options.pair_column,))]
    if kind.source:
        columns = [options.source_column, options.source_column.partition(".")[0], *columns]
    if kind.words:
        columns = [options.words_column, *columns]
    read = _source if kind.source else _sentence if kind.words else _texts
    corpus = options.open_corpus(options.corpus, span_bytes=_SPAN_BYTES)
    for span in corpus.spans:
        for record in Corpus.read(span, columns=columns, on_error=options.on_error, stats=stats):
            try:
                yield read(record, options)
            except RecordError as problem:
                stats.reject(options.on_error, record.file, record.location, problem)


def _source(record: Record, options: PredictOptions) -> str:
    column = options.source_column
    return text_of(record, column, "source", (column, column.partition(".")[0]))


def _sentence(record: Record, options: PredictOptions) -> tuple[str, ...]:
    """The words of a record: a list of them, or a text that is divided at blanks."""
    text = options.text_column
    if options.words_column not in record.values and text in record.values:
        return tuple(checked_text(record.values[text], text).split())
    return tuple(words_of(record, options.words_column))


def _texts(record: Record, options: PredictOptions) -> tuple[str, str | None]:
    found: list[str] = []
    for kind, name in (("text", options.text_column), ("pair", options.pair_column)):
        if name is None:
            continue
        if name not in record.values:
            raise record.missing([name], f"--columns {kind}=THEIRS")
        found.append(checked_text(record.values[name], name))
    return found[0], found[1] if len(found) == 2 else None


# Answers


def _answerer(
    options: PredictOptions, saved: SavedModel, task: str
) -> Callable[[list[Any]], Sequence[Answer]]:
    """The loaded model: inputs to answers, in their order."""
    device = pick_device(options.device)
    most = options.budget(device)
    if TASKS[task].source:
        most = options.batch_tokens or 2 * most
        return partial(Writer(options, saved, task, device).write, batch_tokens=most)
    model = saved.load(task, len(saved.label_names), dtype=options.dtype, device=device)
    if TASKS[task].words:
        return partial(_tagged, model, most)
    return partial(_predicted, model, most, task, options.threshold)


@torch.inference_mode()
def _tagged(
    model: LoadedModel, batch_tokens: int, sentences: Sequence[Sequence[str]]
) -> list[Answer]:
    """The most probable tag of each word; None of words beyond what the model reads.

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
    found = [Answer({"tokens": (), "tags": (), "probabilities": ()}) for _ in sentences]
    for chosen in batches([len(row.input_ids) for row in rows], batch_tokens):
        some = [rows[i] for i in chosen]
        p, best = torch.cat(list(model.run(some))).double().softmax(-1).max(-1)
        done = 0
        for i, row in zip(chosen, some, strict=True):
            words, kept = sentences[filled[i]], len(row.words or ())
            own = slice(done, done + kept)
            cut = len(words) - kept
            values = {
                "tokens": words,
                "tags": [*(names[tag] for tag in best[own].tolist()), *[None] * cut],
                "probabilities": [*p[own].tolist(), *[None] * cut],
            }
            found[filled[i]] = Answer(values, cut)
            done += kept
    return found


@torch.inference_mode()
def _predicted(
    model: LoadedModel,
    batch_tokens: int,
    task: str,
    threshold: float,
    texts: Sequence[tuple[str, str | None]],
) -> list[Answer]:
    """The class, the classes from a threshold on, or the score of each text."""
    pairs = None if texts[0][1] is None else [pair or "" for _, pair in texts]
    rows = model.saved.encode([text for text, _ in texts], pairs)
    names = model.saved.label_names
    found = [Answer({})] * len(rows)
    read, fields = _READ[TASKS[task].answers]
    for chosen in batches([len(row.input_ids) for row in rows], batch_tokens):
        logits = torch.cat(list(model.run([rows[i] for i in chosen])))
        for i, values in zip(chosen, read(logits.double()).tolist(), strict=True):
            text, pair = texts[i]
            asked = {"text": text} if pair is None else {"text": text, "text_pair": pair}
            found[i] = Answer({**asked, **fields(names, values, threshold)})
    return found


def _one_class(names: Sequence[str], values: Sequence[float], threshold: float) -> dict[str, Any]:
    best = max(range(len(values)), key=values.__getitem__)
    return {"label": names[best], "probabilities": dict(zip(names, values, strict=True))}


def _labels(names: Sequence[str], values: Sequence[float], threshold: float) -> dict[str, Any]:
    probabilities = dict(zip(names, values, strict=True))
    chosen = tuple(name for name, p in probabilities.items() if p >= threshold)
    return {"labels": chosen, "probabilities": probabilities}


# From logits to values of each row, and from names, values and threshold to those of its line.
_READ: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., dict[str, Any]]]] = {
    "classes": (partial(torch.softmax, dim=-1), _one_class),
    "labels": (torch.sigmoid, _labels),
    "score": (lambda logits: logits, lambda names, values, threshold: {"score": values[0]}),
}


# Targets of sources

# Of a model's `generation_config.json`: what would give several targets a source or none as ids,
# need code or a tokenizer that `generate` does not have here, or end a target by the clock.
_SEARCH = (
    *("num_return_sequences", "return_dict_in_generate", "num_beam_groups", "diversity_penalty"),
    *("penalty_alpha", "force_words_ids", "constraints", "dola_layers", "low_memory"),
    *("assistant_early_exit", "prompt_lookup_num_tokens", "guidance_scale", "token_healing"),
    *("cache_implementation", "cache_config", "max_time", "use_cache"),
)


class Writer:
    """A loaded sequence-to-sequence model that writes targets."""

    def __init__(self, options: PredictOptions, saved: SavedModel, task: str, device: str) -> None:
        """Load the model.

        Raises:
            UsageError: it is of another task, has no tokenizer, or knows no such language.
        """
        saved.check_task(task)
        if saved.is_factory or saved.tokenizer is None:
            raise UsageError(
                f"{saved.who} has no tokenizer, or no way to write texts. Copy its "
                "tokenizer's files into its folder, or name a model of transformers."
            )
        self.saved, self.tokenizer, self.task = saved, saved.tokenizer, task
        set_languages(self.tokenizer, options.source_lang, options.target_lang)
        loading = saved.loading(task, dtype=options.dtype, device=device)
        (self.model,) = load_models(loading)
        says = self.model.generation_config
        plain = type(says)()
        for setting in filter(says.to_dict().__contains__, _SEARCH):
            setattr(says, setting, getattr(plain, setting, None))
        self._probe = TeacherModel(self.model, saved.who, loading, saved.vocab_size(task))
        self._probed = False
        bounds = (options.max_source_length, saved.files.source_reach, 1 << 20)
        self._source_length = min(bound for bound in bounds if bound is not None)
        reach = saved.files.reach(task) or 1 << 30
        self._how: dict[str, Any] = {
            "max_new_tokens": min(options.max_length, reach - 1),
            "num_beams": options.beams,
            "do_sample": False,
            **self._first(options.target_lang),
        }

    def _first(self, language: str | None) -> dict[str, int]:
        """How a target begins, where the language decides it."""
        start = self._probe.start
        if start == LAST_LABEL:
            return {"decoder_start_token_id": int(target_ids(self.tokenizer, ["a"])[0][-1])}
        found = {"decoder_start_token_id": int(start or 0)}
        before, _ = frame(self.tokenizer, target=True)
        return {**found, "forced_bos_token_id": before[0]} if language and before else found

    def write(self, sources: Sequence[str], *, batch_tokens: int = 4096) -> list[Answer]:
        """Targets of sources, without special tokens, in their order; empty of an empty source.

        Args:
            batch_tokens: tokens of a batch, sources and the longest targets.
        """
        filled = [i for i, text in enumerate(sources) if text.strip()]
        found = [Answer({"source": text, "target": ""}) for text in sources]
        if not filled:
            return found
        rows, cut = self._rows([sources[i] for i in filled])
        if not self._probed:
            self._probe.probe(rows[:64])
            self._probed = True
        longest = int(self._how["max_new_tokens"]) * int(self._how["num_beams"])
        for chosen in batches([(len(_source_of(row)), longest) for row in rows], batch_tokens):
            for some in self._batches(chosen, rows):
                written = self._run([rows[j] for j in some])
                for i, (target, finished) in zip(some, written, strict=True):
                    values = {"source": sources[filled[i]], "target": target}
                    found[filled[i]] = Answer(values, cut[i], finished)
        return found

    def _rows(self, texts: Sequence[str]) -> tuple[list[Row], list[bool]]:
        """Rows of sources, and which of these were cut."""
        how: dict[str, Any] = {"truncation": True, "max_length": self._source_length}
        encoded = list(tokens_of(self.tokenizer, texts, add_special_tokens=True, **how))
        # Labels for the probe alone, of which any will do.
        rows = [
            pair_row(ids, np.array(ids[:8], np.int32), self._probe.start or 0, 8)
            for ids, _, _ in encoded
        ]
        return rows, [bool(cut) for *_, cut in encoded]

    def _batches(self, chosen: Sequence[int], rows: Sequence[Row]) -> Iterator[list[int]]:
        """Which rows of a batch are run at once."""
        classify, padded = self._probe.length_class, self._probe.batching == "padded"
        equal = self._probe.batching == "equal lengths"

        def alike(i: int) -> Any:
            length = len(_source_of(rows[i]))
            if padded:
                return None if classify is None else classify(length)
            return length if equal else i

        for _, some in groupby(chosen, alike):
            yield list(some)

    @torch.inference_mode()
    def _run(self, rows: Sequence[Row]) -> Iterator[tuple[str, bool]]:
        batch = pad_rows(rows, self._probe.pad_id)
        given = {
            name: self._probe.to_device(torch.from_numpy(batch[name]))
            for name in ("input_ids", "attention_mask")
        }
        try:
            written = self.model.generate(**given, **self._how, tokenizer=self.tokenizer)
        except ValueError as error:
            raise UsageError(
                f"{self.saved.who} cannot write targets as its "
                f"generation_config.json says: {reason_of(error)}."
            ) from error
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        for ids in written.tolist():
            text = self.tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            yield str(text).strip(), bool(ends & set(ids[1:]))


def _source_of(row: Row) -> np.ndarray:
    assert row.source is not None, "it was made with one"
    return row.source
