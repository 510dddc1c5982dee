"""`kdcache finetune`: fine-tunes a Hugging Face encoder as the teacher of a classifier.

    records -> class names -> token rows -> HF Trainer -> best epoch -> folder for `build`

All of the encoder is trained, or only its last parameter tensors and the new head (Tang et al. 2019
froze all but the last four of BERT and put a ReLU layer of 192 before the classes: `train_last=4,
head_width=192`).

Cost: one pass over the records for the class names, then all rows are kept as token ids in memory.
Guarantee: the folder appears whole; the same command on it again does nothing.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kdcache.commands.train.options import Scheduler
from kdcache.commands.train.result import TrainProgress
from kdcache.corpus import Corpus, Record
from kdcache.errors import UsageError
from kdcache.loss.metrics import accuracy, confusion_matrix, f1
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.student.load import find_files
from kdcache.tasks import IGNORE, SEQUENCE_CLASSIFICATION
from kdcache.teacher import TeacherFiles, quiet_transformers
from kdcache.teacher.headed import HeadedClassifier

RESULT_FILE = "finetune.json"
_SPAN_BYTES = 1 << 26
_MOST_CLASSES = 10_000


@dataclass(frozen=True)
class FinetuneOptions:
    """What a fine-tuning is asked for; fields bear the names of the command's options.

    Attributes:
        model: folder or hub id of the encoder.
        corpus: files, folders, globs or URLs with texts and labels.
        out: folder of the teacher.
        eval_corpus: files to evaluate on after each epoch; the best epoch becomes the teacher.
        text_column: column of the text.
        pair_column: column of a second text.
        label_column: column of the class, as a number or a name.
        columns: names of the columns of files without a header.
        label_names: the classes in order; default: as found in the corpus, numbers in their order,
            names in alphabetical order.
        limit: use only the first records of the corpus.
        max_length: tokens of a row.
        epochs: passes over the corpus.
        batch_size: rows of a step.
        learning_rate: peak. Default: 5e-5, or 1e-3 where only a part is trained.
        weight_decay: of AdamW.
        warmup: steps of the learning rate's rise, or a share of the run if below 1.
        lr_scheduler: shape of the learning rate.
        train_last: train only so many of the encoder's parameter tensors, the last ones, and the
            head.
        head_width: units of a ReLU layer before the classes. Default: the architecture's own head.
        head_dropout: dropout before the layers of that head.
        seed: of the order, the head's weights and dropout.
        logging_steps: steps between reports of progress.
        bf16: compute in bfloat16.
        fp16: compute in float16 with a scaled loss.
        trust_remote_code: let code that ships with the model run.
    """

    model: str
    corpus: tuple[str, ...]
    out: str
    eval_corpus: tuple[str, ...] = ()
    text_column: str = "text"
    pair_column: str | None = None
    label_column: str = "label"
    columns: tuple[str, ...] | None = None
    label_names: tuple[str, ...] | None = None
    limit: int | None = None
    max_length: int = 128
    epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.1
    lr_scheduler: Scheduler = "linear"
    train_last: int | None = None
    head_width: int | None = None
    head_dropout: float = 0.1
    seed: int = 0
    logging_steps: int = 10
    bf16: bool = False
    fp16: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("corpus", "eval_corpus", "columns", "label_names"):
            value = getattr(self, name)
            if value is not None:
                value = (value,) if isinstance(value, str) else tuple(value)
                object.__setattr__(self, name, value or None if name == "columns" else value)
        least = {
            "max_length": 2, "batch_size": 1, "train_last": 0, "head_width": 1, "seed": 0,
            "logging_steps": 1, "warmup": 0, "weight_decay": 0,
        }  # fmt: skip
        wrong = [
            f"{name} is {getattr(self, name)}, expected at least {low}."
            for name, low in least.items()
            if getattr(self, name) is not None and not getattr(self, name) >= low
        ]
        if not self.epochs > 0:
            wrong.append(f"epochs is {self.epochs}, expected more than 0.")
        if not 0 <= self.head_dropout < 1:
            wrong.append(f"head_dropout is {self.head_dropout}, expected 0 to below 1.")
        if not self.corpus:
            wrong.append("no corpus was given. Name at least one with --corpus.")
        if self.bf16 and self.fp16:
            wrong.append("bf16 and fp16 exclude each other. Choose one.")
        if wrong:
            raise UsageError("\n".join(wrong))


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning came to.

    Attributes:
        out: folder of the teacher.
        label_names: its classes, in the order of the logits.
        rows: labelled rows trained on.
        unlabelled: rows left out because they had no label.
        trained: parameters that were trained.
        parameters: parameters in all.
        steps: steps of the run.
        loss: mean training loss.
        accuracy: on the evaluation corpus, 0 to 1; None without one.
        f1: on the evaluation corpus: of class 1 where there are two, else the mean over classes.
        seconds: wall time of training.
        made: False where the folder was finished before and nothing was done.
    """

    out: str
    label_names: tuple[str, ...]
    rows: int
    unlabelled: int
    trained: int
    parameters: int
    steps: int
    loss: float
    accuracy: float | None = None
    f1: float | None = None
    seconds: float = 0.0
    made: bool = True


def finetune(
    options: FinetuneOptions, *, on_progress: Callable[[TrainProgress], None] | None = None
) -> FinetuneResult:
    """Fine-tune an encoder on labelled texts.

    Args:
        options: see `FinetuneOptions`.
        on_progress: called every `logging_steps` steps and after each evaluation.

    Raises:
        UsageError: options, corpus and model do not fit, or the folder holds something else.
    """
    out = Path(options.out).expanduser().absolute()
    finished = _finished(options, out)
    if finished is not None:
        return finished
    with quiet_transformers():
        set_seed(options.seed)
        files = find_files(options.model, "model", trust_remote_code=options.trust_remote_code)
        tokenizer = files.tokenizer
        names = options.label_names or _label_names(options)
        rows, unlabelled = _rows(options, options.corpus, names, tokenizer)
        tests, _ = _rows(options, options.eval_corpus, names, tokenizer)
        model = _model(options, files, names)
        _freeze(model, options.train_last)
        scratch = out.with_name(out.name + ".tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        trainer = _trainer(options, model, tokenizer, rows, tests, scratch, on_progress)
        begun = time.perf_counter()
        outcome = trainer.train()
        seconds = time.perf_counter() - begun
        scores = _best(trainer.state)
        shutil.rmtree(scratch, ignore_errors=True)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(str(scratch))
    weights = list(model.parameters())
    result = FinetuneResult(
        out=str(out),
        label_names=names,
        rows=len(rows),
        unlabelled=unlabelled,
        trained=sum(p.numel() for p in weights if p.requires_grad),
        parameters=sum(p.numel() for p in weights),
        steps=outcome.global_step,
        loss=outcome.training_loss,
        accuracy=scores.get("eval_accuracy"),
        f1=scores.get("eval_f1"),
        seconds=seconds,
    )
    document = {"options": _plain(options), "result": dataclasses.asdict(result)}
    (scratch / RESULT_FILE).write_text(json.dumps(document, indent=1) + "\n")
    if out.is_dir():
        out.rmdir()  # known to be empty
    scratch.replace(out)
    return result


def _plain(options: FinetuneOptions) -> dict[str, Any]:
    return dict(json.loads(json.dumps(dataclasses.asdict(options))))


def _finished(options: FinetuneOptions, out: Path) -> FinetuneResult | None:
    path = out / RESULT_FILE
    if path.is_file():
        document = json.loads(path.read_text())
        now, then = _plain(options), document["options"]
        changed = [
            f"{name}: {then.get(name)} -> {value}"
            for name, value in now.items()
            if then.get(name) != value and name not in ("out", "logging_steps")
        ]
        if changed:
            raise UsageError(
                f"{out} was made with other options:\n  "
                + "\n  ".join(changed)
                + "\nUse the same options, or another --out."
            )
        result = {**document["result"], "out": str(out), "made": False}
        result["label_names"] = tuple(result["label_names"])
        return FinetuneResult(**result)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} exists and was not made by kdcache finetune. Choose another --out."
        )
    return None


# Data


def _records(
    options: FinetuneOptions, patterns: Sequence[str], columns: Sequence[str] | None = None
) -> Iterator[Record]:
    limit = options.limit if patterns is options.corpus else None
    corpus = Corpus.open(patterns, span_bytes=_SPAN_BYTES, limit=limit, columns=options.columns)
    for span in corpus.spans:
        yield from Corpus.read(span, columns=columns)


def _label_names(options: FinetuneOptions) -> tuple[str, ...]:
    """The classes that the corpus names: numbers count up to the largest, names are sorted."""
    column = options.label_column
    found: set[str] = set()
    for record in _records(options, options.corpus, [column]):
        if column not in record.values:
            raise record.missing([column], "--label-column")
        value = record.values[column]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        text = "" if value is None or value != value else str(value).strip()
        if text and text != str(IGNORE):
            found.add(text)
        if len(found) > _MOST_CLASSES:
            raise UsageError(
                f"column {column} has more than {_MOST_CLASSES} different values: it is no label. "
                "Name the right one with --label-column."
            )
    names = tuple(sorted(found))
    if all(name.isascii() and name.isdigit() for name in found):
        names = tuple(map(str, range(max(map(int, found), default=-1) + 1)))
    if len(names) > _MOST_CLASSES or len(names) < 2:
        raise UsageError(
            f"column {column} of the corpus names {len(names)} classes, expected 2 to "
            f"{_MOST_CLASSES}. Name the right one with --label-column, or give --label-names."
        )
    return names


def _rows(
    options: FinetuneOptions, patterns: Sequence[str], names: tuple[str, ...], tokenizer: Any
) -> tuple[list[Row], int]:
    """Labelled rows, and how many had no label."""
    if not patterns:
        return [], 0
    spec = RowSpec(
        task=SEQUENCE_CLASSIFICATION,
        text_column=options.text_column,
        pair_column=options.pair_column,
        label_column=options.label_column,
        label_names=names,
        max_length=options.max_length,
    )
    rows = list(make_encoder(spec, tokenizer).encode(_records(options, patterns)))
    labelled = [row for row in rows if row.labels[0] != IGNORE]
    if not labelled:
        raise UsageError(
            f"no row of {' '.join(patterns)} has a label in column {options.label_column}. "
            "Name the right one with --label-column."
        )
    return labelled, len(rows) - len(labelled)


@dataclass(frozen=True)
class _Pad:
    """Rows to a batch, padded on the right."""

    pad_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        width = max(len(row.input_ids) for row in rows)
        ids = np.full((len(rows), width), self.pad_id, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for i, row in enumerate(rows):
            length = len(row.input_ids)
            ids[i, :length], mask[i, :length] = row.input_ids, 1
            if row.type_ids is not None:
                types[i, :length] = row.type_ids
        batch = {"input_ids": ids, "attention_mask": mask}
        if rows[0].type_ids is not None:
            batch["token_type_ids"] = types
        batch["labels"] = np.array([int(row.labels[0]) for row in rows], np.int64)
        return {name: torch.from_numpy(value) for name, value in batch.items()}


# Model


def _model(options: FinetuneOptions, files: TeacherFiles, names: tuple[str, ...]) -> Any:
    trust = options.trust_remote_code
    classes = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }
    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=trust, **classes)
        kind = AutoModelForSequenceClassification if options.head_width is None else AutoModel
        model = kind.from_pretrained(
            files.folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust,
            # A head of other classes is made anew.
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(
            f"model {options.model} cannot be loaded as an encoder (safetensors weights "
            f"only): {first}"
        ) from error
    if options.head_width is None:
        return model
    return HeadedClassifier(model, options.head_width, options.head_dropout)


def _freeze(model: Any, last: int | None) -> None:
    """Leave only the encoder's last tensors, and the head, to be trained."""
    if last is None:
        return
    encoder = model.encoder if isinstance(model, HeadedClassifier) else model.base_model
    tensors = list(encoder.parameters())
    if last > len(tensors):
        raise UsageError(f"train_last is {last}, but the encoder has {len(tensors)} tensors.")
    for tensor in tensors[: len(tensors) - last]:
        tensor.requires_grad_(False)


# Training


def _trainer(
    options: FinetuneOptions,
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    tests: list[Row],
    scratch: Path,
    on_progress: Callable[[TrainProgress], None] | None,
) -> Trainer:
    rate = options.learning_rate or (5e-5 if options.train_last is None else 1e-3)
    arguments = TrainingArguments(
        output_dir=str(scratch),
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
        save_strategy="epoch" if tests else "no",
        save_total_limit=2,
        save_only_model=True,
        load_best_model_at_end=bool(tests),
        metric_for_best_model="eval_accuracy" if tests else None,
        greater_is_better=True if tests else None,
        bf16=options.bf16,
        fp16=options.fp16,
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        log_level="error",
        report_to="none",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=tests or None,
        data_collator=_Pad(tokenizer.pad_token_id or 0),
        compute_metrics=_scores,
        callbacks=[_Progress(on_progress)],
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    return trainer


def _scores(outputs: Any) -> dict[str, float]:
    logits = (
        outputs.predictions[0] if isinstance(outputs.predictions, tuple) else outputs.predictions
    )
    table = confusion_matrix(outputs.label_ids, logits.argmax(-1), logits.shape[-1])
    return {"accuracy": accuracy(table), "f1": f1(table)}


def _best(state: TrainerState) -> dict[str, float]:
    evaluations = [line for line in state.log_history if "eval_accuracy" in line]
    return max(evaluations, key=lambda line: line["eval_accuracy"], default={})


class _Progress(TrainerCallback):  # type: ignore[misc]
    def __init__(self, on_progress: Callable[[TrainProgress], None] | None) -> None:
        self._on_progress, self._begun = on_progress, time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Tell the caller."""
        if self._on_progress is not None and logs and "train_runtime" not in logs:
            seconds = time.perf_counter() - self._begun
            epoch = float(state.epoch or 0.0)
            self._on_progress(
                TrainProgress(state.global_step, state.max_steps, epoch, seconds, dict(logs))
            )
