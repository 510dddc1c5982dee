"""The labelled rows of a fine-tuning, the classes that they name, and their batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.corpus import Corpus, Record
from kdcache.errors import UsageError
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.rows.batches import pad_rows, padded
from kdcache.rows.labels import filled_column, names_in
from kdcache.rows.spec import DEFAULT_LABEL_COLUMN
from kdcache.student.initial_weights import files_sha256
from kdcache.tasks import IGNORE, TASKS, labelled
from kdcache.teacher import TeacherFiles

_SPAN_BYTES = 1 << 26
_MOST_CLASSES = 10_000
_LENGTH = 128  # tokens of a row


def _records(
    options: FinetuneOptions, patterns: Sequence[str], columns: Sequence[str] | None = None
) -> Iterator[Record]:
    reading = options if patterns is options.corpus else replace(options, limit=None)
    for span in reading.open_corpus(patterns, span_bytes=_SPAN_BYTES).spans:
        yield from Corpus.read(span, columns=columns, on_error=options.on_error)


def files_of(options: FinetuneOptions) -> dict[str, Any]:
    """What model and corpora are by their bytes; None for those that are not there (any more)."""
    found: dict[str, Any] = {"model": files_sha256(options.model)}
    for name in ("corpus", "eval_corpus"):
        patterns = getattr(options, name)
        try:
            opened = options.open_corpus(patterns, span_bytes=_SPAN_BYTES) if patterns else None
            found[name] = None if opened is None else opened.identity()
        except (UsageError, OSError):
            found[name] = None
    return found


def label_names_of(options: FinetuneOptions) -> tuple[str, ...]:
    """The classes that the corpus names: numbers count up to the largest, names are sorted.

    None of a score. Of several labels a text they are those of its lists, or the columns of labels.
    """
    column, task = options.label_column or "none", TASKS[options.task]
    if not task.named:
        return ()
    columns = tuple(name.strip() for name in column.split(","))
    if len(columns) > 1:
        return columns
    found: set[str] = set()
    if column == DEFAULT_LABEL_COLUMN:
        columns = task.label_columns
    record = None
    for record in _records(options, options.corpus, columns):
        there = filled_column(record, columns)
        if there is None:
            raise record.missing(list(columns), "--label-column")
        column, values = there, record.values[there]
        if task.answers == "labels":
            values = _listed(record, values)
        elif not task.words:
            values = [values]
        elif not isinstance(values, (list, np.ndarray)):
            values = []  # nothing, or what the rows refuse
        for value in values:
            if isinstance(value, (float, np.floating)) and float(value).is_integer():
                value = int(value)
            text = "" if value is None or value != value else str(value).strip()
            if text and text != str(IGNORE):
                found.add(text)
        if len(found) > _MOST_CLASSES:
            raise UsageError(
                f"column {column} has more than {_MOST_CLASSES} different values: it is not a "
                "label. Name the right one with --label-column."
            )
    names = tuple(sorted(found))
    if record is None:
        raise UsageError(f"{' '.join(options.corpus)} has no rows. Name files that have some.")
    if all(name.isascii() and name.isdigit() for name in found):
        names = tuple(map(str, range(max(map(int, found), default=-1) + 1)))
    if len(names) > _MOST_CLASSES or len(names) < 2:
        raise UsageError(
            f"column {column} of the corpus names {len(names)} classes, expected 2 to "
            f"{_MOST_CLASSES}. Name the right one with --label-column, or give --label-names."
        )
    return names


def _listed(record: Record, value: Any) -> set[str]:
    """Names of classes in a value of the column of several labels a text."""
    if value is None or value == "":
        return set()
    if isinstance(value, str):
        return set(names_in(record, value))
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if any(not isinstance(one, str) for one in values):
        raise UsageError(
            f"{record.where}: labels are {values!r}, which do not name the classes. Name them in "
            "their order with --label-names."
        )
    return {one.strip() for one in values}


def spec_of(options: FinetuneOptions, names: tuple[str, ...], model: TeacherFiles) -> RowSpec:
    """What decides the rows of a model."""
    length = options.row_length([(model.who, model.reach(options.task))], _LENGTH)
    spec = options.row_spec(options.task, names, max_length=length)
    return options.of_pairs(spec, [model], "model")


def labelled_rows(
    options: FinetuneOptions, patterns: Sequence[str], names: tuple[str, ...], model: TeacherFiles
) -> tuple[list[Row], int, int]:
    """Labelled rows, how many had no label, and how many texts of both were cut."""
    if not patterns:
        return [], 0, 0
    spec = spec_of(options, names, model)
    encoder = make_encoder(spec, model.tokenizer)
    rows = list(encoder.encode(_records(options, patterns)))
    if not rows and TASKS[options.task].source:
        raise UsageError(f"{' '.join(patterns)} has no record with a source and a target.")
    there = [row for row in rows if labelled(row.labels, options.task).any()]
    if not there:
        column = " or ".join(spec.label_columns)
        raise UsageError(
            f"no row of {' '.join(patterns)} has a label in column {column}. "
            "Name the right one with --label-column."
        )
    return there, len(rows) - len(there), encoder.truncated


def class_weights(rows: Sequence[Row], classes: int) -> Tensor:
    """Weights of the classes under which each counts the same and the mean over rows is 1.

    Args:
        rows: labelled ones.
        classes: how many there are.

    Returns:
        labels / (classes found * labels of the class), float32 [classes]; 0 for one without any.
    """
    labels = np.concatenate([row.labels for row in rows])
    counts = np.bincount(labels[labels >= 0], minlength=classes)
    found = np.count_nonzero(counts)
    weights = np.divide(counts.sum(), found * counts, where=counts > 0, out=np.zeros(classes))
    return torch.from_numpy(weights).float()


@dataclass(frozen=True)
class PadRows:
    """Rows to a batch, padded on the right."""

    pad_id: int
    per_token: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The rows as padded tensors, with `labels` as `kdcache.rows.labels` has them: int64
        [rows] of a class, float32 [rows] of a score, int64 [rows, classes] of several labels; of
        words and of targets [rows, longest].
        """
        batch: dict[str, Any] = pad_rows(rows, self.pad_id)
        labels = np.concatenate([row.labels for row in rows])
        batch["labels"] = labels.astype(np.int64) if labels.dtype.kind == "i" else labels
        if self.per_token:
            lengths = np.array([len(row.labels) for row in rows])
            batch["labels"] = padded(np.where(labels >= 0, labels, IGNORE), lengths, IGNORE)
        return {name: torch.from_numpy(value) for name, value in batch.items()}
