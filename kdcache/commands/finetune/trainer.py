"""The labelled rows of a fine-tuning, the classes that they name, and the loop over them: the
Trainer of transformers, with whole checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from kdcache.commands.evaluate.tally import make_tally
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.run_folder import TrainProgress
from kdcache.commands.train.callbacks import Patience, ReportProgress, SlowSteps, StopOnSignal
from kdcache.corpus import Corpus, Record
from kdcache.errors import UsageError
from kdcache.loss import INDEPENDENT
from kdcache.metrics import METRICS
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.rows.batches import pad_rows, padded
from kdcache.rows.labels import filled_column, names_in
from kdcache.rows.spec import DEFAULT_LABEL_COLUMN
from kdcache.student.checkpoints import CheckpointingTrainer, files_sha256
from kdcache.student.precision import Computing, use_one_gpu
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
    """Weights of classes under which each counts the same and the mean over labelled rows is 1.

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


def make_trainer(
    options: FinetuneOptions,
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    tests: list[Row],
    run: Path,
    on_progress: Callable[[TrainProgress], None] | None,
    report: Callable[[str], None] = lambda line: None,
) -> FinetuneTrainer:
    """The trainer of a fine-tuning, which evaluates on `tests`, if any, after each epoch."""
    usual = 2e-4 if options.lora else 5e-5 if options.train_last is None else 1e-3
    kind = TASKS[options.task]
    rate = options.learning_rate or usual
    computing = Computing.choose(options.precision)
    arguments = TrainingArguments(
        output_dir=str(run),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=rate,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup,
        lr_scheduler_type=options.lr_scheduler,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="epoch" if tests else "no",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=bool(tests),
        metric_for_best_model=f"eval_{_best(options)}" if tests else None,
        greater_is_better=METRICS[_best(options)].higher if tests else None,
        seed=options.seed,
        **computing.arguments(),
        dataloader_pin_memory=computing.gpu,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        log_level="error",
        report_to="none",
    )
    computing.begin()
    use_one_gpu(arguments, "CUDA_VISIBLE_DEVICES chooses another one.")
    callbacks = [StopOnSignal(), _EpochProgress(on_progress), SlowSteps(report)]
    if options.patience is not None:
        callbacks.append(Patience(options.patience))
    return FinetuneTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=tests or None,
        data_collator=PadRows(tokenizer.pad_token_id or 0, kind.per_token),
        compute_metrics=_scorer(options, tests, model),
        callbacks=callbacks,
        compute_loss_func=_loss_of(options, rows, model),
        preprocess_logits_for_metrics=_of_each_token if kind.source else None,
    )


class _EpochProgress(ReportProgress):
    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Log before each checkpoint, so that no line spans a resume."""
        control.should_log = True


class FinetuneTrainer(CheckpointingTrainer):
    """Checkpoints note what they were trained on, and for how long."""

    identity: dict[str, Any]
    before = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall time of training, over all sittings."""
        return self.before + time.perf_counter() - self._begun

    def checkpoint_facts(self) -> dict[str, Any]:
        """See `CheckpointingTrainer.checkpoint_facts`."""
        return {"identity": dict(self.identity), "seconds": self.seconds}


def _weighted_loss(weights: Tensor) -> Callable[..., Tensor]:
    """The mean of the weighted cross-entropies of a batch's labels, as the Trainer calls it.

    Divided by the labels and not by their weights, which would be 1 again in a batch of one class.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"].float()
        flat = logits.reshape(-1, logits.shape[-1])
        total = torch.nn.functional.cross_entropy(
            flat, labels.reshape(-1), weights.to(logits.device), reduction="sum"
        )
        return total / (labels >= 0).sum().clamp_min(1)

    return loss


def _loss_of(options: FinetuneOptions, rows: list[Row], model: Any) -> Callable[..., Tensor] | None:
    """The loss as the Trainer calls it; None for the model's own."""
    own = INDEPENDENT.get(TASKS[options.task].answers)
    if own is None and options.class_weights == "equal":
        return None
    if own is None:
        return _weighted_loss(class_weights(rows, model.config.num_labels))
    of_rows = own.loss

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return of_rows(outputs["logits"], labels, None, alpha=1.0).total

    return loss


def _logits(outputs: Any) -> Any:
    found = outputs.predictions
    return found[0] if isinstance(found, tuple) else found


def _of_each_token(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The best id of each token and the nats of its label: whole logits are not kept."""
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    nats = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction="none"
    )
    return logits.argmax(-1), nats.reshape(labels.shape)


# What the Trainer evaluates and logs, by what a task's answers are over; the first selects the best
# epoch, of words their F1.
_FIGURES: dict[str, tuple[str, ...]] = {
    "ids": ("cross_entropy", "accuracy"),
    "classes": ("accuracy", "f1"),
    "labels": ("average_precision", "micro_f1"),
    "score": ("mse", "pearson", "spearman"),
}
_ITS_OWN_NAMES = {"entity_f1": "f1", "micro_average_precision": "average_precision"}


def _scorer(
    options: FinetuneOptions, tests: Sequence[Row], model: Any
) -> Callable[[Any], dict[str, float]]:
    """What makes figures of the answers to the rows of the evaluation, as the Trainer calls it."""
    kind, config = TASKS[options.task], model.config
    names = [str(name) for _, name in sorted(config.id2label.items())]

    def scores(outputs: Any) -> dict[str, float]:
        labels, tally = outputs.label_ids, make_tally(options.task, len(names), names)
        if kind.source:
            best, nats = outputs.predictions
            tally.hard = float(nats[labels >= 0].astype(float).sum())
            tally.add_predictions(labels.reshape(-1), best.reshape(-1), None)
        elif kind.answers in INDEPENDENT:
            tally.add(torch.from_numpy(_logits(outputs)), labels, None)
        else:
            best, flat = _logits(outputs).argmax(-1).reshape(-1), labels.reshape(-1)
            tally.add_predictions(flat, best, None)
            if kind.words:
                tally.add_entities(flat, best, np.full(*labels.shape), _firsts(labels, tests))
        found = tally.figures()
        found |= {ours: found[name] for name, ours in _ITS_OWN_NAMES.items() if name in found}
        return {name: found[name] for name in _FIGURES[kind.answers]}

    return scores


def _firsts(labels: np.ndarray, tests: Sequence[Row]) -> np.ndarray:
    """bool [rows * L]: which tokens of padded rows begin a word."""
    found = np.zeros(labels.shape, np.bool_)
    for row, into in zip(tests, found, strict=True):
        assert row.first is not None, "rows of words mark their first tokens"
        into[: len(row.first)] = row.first
    return found.reshape(-1)


def _best(options: FinetuneOptions) -> str:
    """The figure that selects the best epoch."""
    kind = TASKS[options.task]
    return "f1" if kind.words else _FIGURES[kind.answers][0]


def best_scores(state: TrainerState, options: FinetuneOptions) -> dict[str, float]:
    """Figures of the best evaluation by their names; empty without any."""
    name = f"eval_{_best(options)}"
    at, lines = state.best_global_step, state.log_history
    best: dict[str, float] = next((x for x in lines if name in x and x["step"] == at), {})
    # A correlation of constant scores is not a number.
    names = METRICS.keys() - {"loss"}
    return {n: best[f"eval_{n}"] for n in names if not isnan(best.get(f"eval_{n}", nan))}


def mean_loss(state: TrainerState) -> float:
    """Mean over all steps, from the lines that were logged: each is a mean since the last."""
    total, last = 0.0, 0
    for line in state.log_history:
        if "loss" in line:
            total += line["loss"] * (line["step"] - last)
            last = line["step"]
    return total / max(1, last)
