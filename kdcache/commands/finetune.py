"""`kdcache finetune`: fine-tunes a Hugging Face encoder as the teacher of a classifier.

    records -> class names -> token rows -> HF Trainer -> best epoch -> folder for `build`

All of the encoder is trained, or only its last parameter tensors and the new head (Tang et al. 2019
froze all but the last four of BERT and put a ReLU layer of 192 before the classes: `train_last=4,
head_width=192`).

Cost: one pass over the records for the class names, then all rows are kept as token ids in memory.
Guarantee: the folder appears whole; the same command on it again does nothing. Until then
`TEACHER.tmp` keeps a checkpoint of each epoch, from which the same command continues, to the bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kdcache.commands.groups import LearningOptions, RowOptions, form_problems
from kdcache.commands.interrupt import interruptible
from kdcache.commands.train.result import TrainProgress
from kdcache.commands.train.stop import StopOnSignal
from kdcache.corpus import Corpus, Record
from kdcache.errors import IncompleteError, UsageError
from kdcache.files import alone, full_disk, local_path, sync_folder, whole_folder, write_json
from kdcache.loss.metrics import accuracy, confusion_matrix, f1
from kdcache.models import HeadedConfig
from kdcache.options import option
from kdcache.rows import Row, make_encoder
from kdcache.rows.batches import pad_rows
from kdcache.student.checkpoints import (
    CheckpointingTrainer,
    check_identity,
    continues,
    last_checkpoint,
    read_state,
)
from kdcache.student.load import find_files
from kdcache.student.precision import Computing, use_one_gpu
from kdcache.tasks import IGNORE, SEQUENCE_CLASSIFICATION
from kdcache.teacher import TeacherFiles, quiet_transformers
from kdcache.teacher.headed import HeadedForSequenceClassification
from kdcache.teacher.load import set_pad_id

RESULT_FILE = "finetune.json"
_SPAN_BYTES = 1 << 26
_MOST_CLASSES = 10_000
_MAY_CHANGE = ("out", "logging_steps")


@dataclass(frozen=True)
class FinetuneOptions(RowOptions, LearningOptions):
    """What a fine-tuning takes: fields have the names of the command's options."""

    model: str = option(help="folder or hub id of the encoder.", metavar="DIR_OR_HUB_ID")
    corpus: tuple[str, ...] = option(
        help="files, folders, globs or URLs with texts and labels.", metavar="PATH_OR_URL_OR_GLOB"
    )
    out: str = option(help="folder of the teacher.", metavar="TEACHER")
    eval_corpus: tuple[str, ...] = option(
        (),
        help="files to evaluate on after each epoch; the best epoch becomes the teacher.",
        metavar="PATH_OR_URL_OR_GLOB",
    )
    _: KW_ONLY
    label_column: str = option(
        "label", help="column of the class, as a number or a name.", metavar="NAME"
    )
    label_names: tuple[str, ...] | None = option(
        None,
        help="the classes in order. Default: as found in the corpus, numbers in their order, names "
        "in alphabetical order.",
        metavar="NAME",
        comma=True,
    )
    max_length: int = option(128, help="tokens of a row.", metavar="TOKENS", at_least=2)
    epochs: float = option(3.0, help="passes over the corpus.", above=0)
    learning_rate: float | None = option(
        None, help="peak. Default: 5e-5, or 1e-3 where only a part is trained.", above=0
    )
    warmup: float = option(
        0.1,
        help="warm-up steps of the learning rate; below 1 a share of the run.",
        at_least=0,
    )
    train_last: int | None = option(
        None,
        help="train only the head and this many of the encoder's last parameter tensors.",
        at_least=0,
    )
    head_width: int | None = option(
        None,
        help="units of a ReLU layer before the classes. Default: the architecture's own head.",
        at_least=1,
    )
    head_dropout: float = option(
        0.1, help="dropout before the layers of that head.", at_least=0, below=1
    )

    def conflicts(self) -> list[str]:
        """See `Options.conflicts`."""
        return form_problems(self.record_form, SEQUENCE_CLASSIFICATION)


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a fine-tuning.

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
        IncompleteError: interrupted, or no space left; the same command continues.
    """
    out = local_path(options.out)
    run = out.with_name(out.name + ".tmp")
    with interruptible():
        try:
            finished = _finished(options, out)
            if finished is not None:
                return finished
            with alone(run, "fine-tuning"), full_disk(run, lambda: continues(run)):
                return _finished(options, out) or _finetune(options, out, run, on_progress)
        except KeyboardInterrupt:
            raise IncompleteError(f"interrupted. {continues(run)}") from None


def _finetune(
    options: FinetuneOptions,
    out: Path,
    run: Path,
    on_progress: Callable[[TrainProgress], None] | None,
) -> FinetuneResult:
    with quiet_transformers():
        set_seed(options.seed)
        files = find_files(options.model, "model", trust_remote_code=options.trust_remote_code)
        tokenizer = files.tokenizer
        names = options.label_names or _label_names(options)
        rows, unlabelled = _rows(options, options.corpus, names, tokenizer)
        tests, _ = _rows(options, options.eval_corpus, names, tokenizer)
        model = _model(options, files, names)
        _freeze(model, options.train_last)
        trainer = _trainer(options, model, tokenizer, rows, tests, run, on_progress)
        trainer.identity = {
            "options": {k: v for k, v in _plain(options).items() if k not in _MAY_CHANGE},
            "rows": _digest(rows),
            "tests": _digest(tests),
        }
        resume = last_checkpoint(run)
        if resume is not None:
            state = read_state(resume)
            trainer.before = state["seconds"]
            check_identity(state, trainer.identity, f"{resume} (delete {run} to start over)")
        outcome = trainer.train(str(resume) if resume else None)
        scores = _best(trainer.state)
        weights = list(model.parameters())
        result = FinetuneResult(
            out=str(out),
            label_names=names,
            rows=len(rows),
            unlabelled=unlabelled,
            trained=sum(p.numel() for p in weights if p.requires_grad),
            parameters=sum(p.numel() for p in weights),
            steps=outcome.global_step,
            loss=_mean_loss(trainer.state),
            accuracy=scores.get("eval_accuracy"),
            f1=scores.get("eval_f1"),
            seconds=trainer.seconds,
        )
        with whole_folder(run / "teacher") as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(str(folder))
            document = {"options": _plain(options), "result": dataclasses.asdict(result)}
            write_json(folder / RESULT_FILE, document)
    if out.is_dir():
        out.rmdir()  # known to be empty
    (run / "teacher").replace(out)
    sync_folder(out.parent)
    shutil.rmtree(run)
    return result


def _digest(rows: Sequence[Row]) -> str:
    """SHA-256 of what the model is trained on: ids and labels."""
    digest = hashlib.sha256()
    for row in rows:
        for values in (row.input_ids, row.labels, row.type_ids):
            digest.update(b"" if values is None else np.ascontiguousarray(values).tobytes())
            digest.update(b"|")
    return digest.hexdigest()


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
            if then.get(name) != value and name not in _MAY_CHANGE
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
    reading = options if patterns is options.corpus else replace(options, limit=None)
    for span in reading.open_corpus(patterns, span_bytes=_SPAN_BYTES).spans:
        yield from Corpus.read(span, columns=columns, on_error=options.on_error)


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
                f"column {column} has more than {_MOST_CLASSES} different values: it is not a "
                "label. Name the right one with --label-column."
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
    spec = options.row_spec(SEQUENCE_CLASSIFICATION, names)
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
        batch = pad_rows(rows, self.pad_id)
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
        set_pad_id(config, files)
        kind = AutoModelForSequenceClassification if options.head_width is None else AutoModel
        model = kind.from_pretrained(
            files.folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust,
            # A head of other classes is replaced by a new one.
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
    head = HeadedConfig(
        encoder=config.to_dict(),
        head_width=options.head_width,
        head_dropout=options.head_dropout,
        **classes,
    )
    return HeadedForSequenceClassification(head, model)


def _freeze(model: Any, last: int | None) -> None:
    """Leave only the encoder's last tensors, and the head, to be trained."""
    if last is None:
        return
    tensors = list(model.base_model.parameters())
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
    run: Path,
    on_progress: Callable[[TrainProgress], None] | None,
) -> _Trainer:
    rate = options.learning_rate or (5e-5 if options.train_last is None else 1e-3)
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
        metric_for_best_model="eval_accuracy" if tests else None,
        greater_is_better=True if tests else None,
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
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=tests or None,
        data_collator=_Pad(tokenizer.pad_token_id or 0),
        compute_metrics=_scores,
        callbacks=[StopOnSignal(), _Progress(on_progress)],
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    return trainer


class _Trainer(CheckpointingTrainer):
    """Checkpoints note what they were trained on, and for how long."""

    identity: Mapping[str, Any]
    before = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall time of training, over all sittings."""
        return self.before + time.perf_counter() - self._begun

    def checkpoint_facts(self) -> dict[str, Any]:
        return {"identity": dict(self.identity), "seconds": self.seconds}


def _scores(outputs: Any) -> dict[str, float]:
    logits = (
        outputs.predictions[0] if isinstance(outputs.predictions, tuple) else outputs.predictions
    )
    table = confusion_matrix(outputs.label_ids, logits.argmax(-1), logits.shape[-1])
    return {"accuracy": accuracy(table), "f1": f1(table)}


def _best(state: TrainerState) -> dict[str, float]:
    evaluations = [line for line in state.log_history if "eval_accuracy" in line]
    return max(evaluations, key=lambda line: line["eval_accuracy"], default={})


def _mean_loss(state: TrainerState) -> float:
    """Mean over all steps, from the lines that were logged: each is a mean since the last."""
    total, last = 0.0, 0
    for line in state.log_history:
        if "loss" in line:
            total += line["loss"] * (line["step"] - last)
            last = line["step"]
    return total / max(1, last)


class _Progress(TrainerCallback):  # type: ignore[misc]
    def __init__(self, on_progress: Callable[[TrainProgress], None] | None) -> None:
        self._on_progress, self._begun = on_progress, time.perf_counter()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Log before each checkpoint, so that no line spans a resume."""
        control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Report to the caller."""
        if self._on_progress is not None and logs and "train_runtime" not in logs:
            seconds = time.perf_counter() - self._begun
            epoch = float(state.epoch or 0.0)
            self._on_progress(
                TrainProgress(state.global_step, state.max_steps, epoch, seconds, dict(logs))
            )
