"""The options of `train`, which check themselves, and schedules."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kdcache.errors import UsageError
from kdcache.loss import DIVERGENCES, TAILS, Divergence, Tail
from kdcache.storage import redact

Best = Literal["loss", "hard_loss", "soft_loss", "accuracy"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"]
_OPERATIONAL = (
    "out",
    "resume",
    "epochs",
    "max_steps",
    "eval_steps",
    "save_steps",
    "logging_steps",
    "patience",
    "keep_checkpoints",
    "num_workers",
    "gpus_per_worker",
    "address",
    "gradient_accumulation",
    "prefetch",
    "eval_batch_size",
    "report_to",
    "gradient_checkpointing",
)


@dataclass(frozen=True)
class Schedule:
    """A number that may change linearly over a run.

    Attributes:
        start: value at the first step.
        end: value at the last step.
    """

    start: float
    end: float

    @classmethod
    def parse(cls, value: float | str | Schedule, name: str) -> Schedule:
        """Read `0.5` or `0.9:0.1`.

        Raises:
            UsageError: not one or two numbers.
        """
        if isinstance(value, Schedule):
            return value
        first, _, last = str(value).partition(":")
        try:
            start = float(first)
            end = float(last) if last else start
        except ValueError as error:
            raise UsageError(
                f"{name} is {value!r}, expected a number, or two as start:end of a linear schedule."
            ) from error
        return cls(start, end)

    def at(self, step: int, steps: int) -> float:
        """Value at step `step` (from 0) of a run of `steps`."""
        share = min(1.0, step / max(1, steps - 1))
        return self.start + (self.end - self.start) * share

    @property
    def constant(self) -> bool:
        """Whether it never changes."""
        return self.start == self.end

    def __str__(self) -> str:
        return f"{self.start:g}" if self.constant else f"{self.start:g}:{self.end:g}"


@dataclass(frozen=True)
class TrainOptions:
    """What a training run is asked for; fields bear the names of the command's options.

    Attributes:
        cache: folder or URL of each cache; several are mixed row by row.
        student: HF folder or hub id, a `config.json` (random weights), `bilstm`, or
            `module:function`.
        out: folder of the run: checkpoints, logs, and at last the student.
        cache_weight: how often an epoch uses the rows of each cache; default 1 each.
        alpha: weight of the hard loss, 0 to 1, or `start:end`; 1 trains on hard labels alone.
        temperature: of the soft loss, or `start:end` (dense caches).
        divergence: `forward-kl`, `reverse-kl`, `jsd` or `mse`.
        tail: for top-k caches, `bucket` or `renormalize`.
        epochs: passes over the caches.
        max_steps: steps of the run, instead of `epochs`.
        batch_size: rows of one step, over all workers and accumulated slices.
        gradient_accumulation: slices into which each worker cuts its part of a batch: less memory,
            the same step.
        learning_rate: peak. Default: 1e-3 for the biLSTM, 5e-4 for random weights, else 5e-5.
        weight_decay: of AdamW.
        warmup: steps of the learning rate's rise, or a share of the run if below 1.
        lr_scheduler: `linear`, `cosine`, `constant`, `constant_with_warmup` or `polynomial`.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        eval_cache: caches to evaluate on, whose codec may be another; the best checkpoint becomes
            the student.
        eval_steps: steps between evaluations. Default: an epoch.
        eval_batch_size: rows of an evaluation batch. Default: `batch_size`.
        best: what tells the best checkpoint: `loss`, `hard_loss`, `soft_loss` or `accuracy`.
        patience: stop after so many evaluations without a better one.
        save_steps: steps between checkpoints. Default: an epoch. With `eval_cache`, checkpoints are
            taken at evaluations.
        keep_checkpoints: checkpoints kept, 2 or more; the best one is always among them.
        logging_steps: steps between lines of `metrics.jsonl`.
        report_to: HF trackers such as `tensorboard` or `wandb`; `auto` is tensorboard if installed.
        resume: `auto` goes on from the last checkpoint in `out`, `never` refuses one, or a
            checkpoint's folder.
        num_workers: processes that train together, through Ray Train.
        gpus_per_worker: default: one where there are any.
        address: Ray address. Default: a Ray of this process.
        fsdp: shard weights and optimizer over the workers, for Hugging Face students that need it.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        bf16: compute in bfloat16.
        fp16: compute in float16 with a scaled loss.
        seed: of the order, of random weights and of dropout.
        shuffle_shards: shards whose rows are shuffled together. Default: as many as make 32 MiB of
            stored bytes, but 3 at least.
        prefetch: batches decoded ahead.
        student_tokenizer: what a biLSTM reads: `words` of a vocabulary of its own, or the
            `teacher`'s tokens. None: words.
        max_length: most tokens of a row, where the student has words or a tokenizer of its own.
        embeddings: GloVe or word2vec text file (`.gz` too) for the biLSTM.
        freeze_embeddings: leave the biLSTM's word vectors as they were loaded.
        embedding_size: width of the biLSTM's word vectors. None, here and below: its own default.
        hidden_size: width of its LSTM, each way.
        layers: its LSTM layers.
        dense_size: width of its ReLU layer.
        dropout: its dropout.
        pooling: `last` or `max` over its states.
        min_count: words rarer than this are unknown to the biLSTM.
        max_words: size of its vocabulary at most.
        trust_remote_code: let code that ships with a student run.
    """

    cache: tuple[str, ...]
    student: str
    out: str
    cache_weight: tuple[float, ...] = ()
    alpha: float | str = 0.5
    temperature: float | str = 1.0
    divergence: Divergence = "forward-kl"
    tail: Tail = "bucket"
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 32
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.0
    lr_scheduler: Scheduler = "linear"
    max_grad_norm: float = 1.0
    eval_cache: tuple[str, ...] = ()
    eval_steps: int | None = None
    eval_batch_size: int | None = None
    best: Best = "loss"
    patience: int | None = None
    save_steps: int | None = None
    keep_checkpoints: int = 2
    logging_steps: int = 10
    report_to: tuple[str, ...] = ("auto",)
    resume: str = "auto"
    num_workers: int = 1
    gpus_per_worker: float | None = None
    address: str | None = None
    fsdp: bool = False
    gradient_checkpointing: bool = False
    bf16: bool = False
    fp16: bool = False
    seed: int = 0
    shuffle_shards: int | None = None
    prefetch: int = 4
    student_tokenizer: Literal["words", "teacher"] | None = None
    max_length: int | None = None
    embeddings: str | None = None
    freeze_embeddings: bool = False
    embedding_size: int | None = None
    hidden_size: int | None = None
    layers: int | None = None
    dense_size: int | None = None
    dropout: float | None = None
    pooling: Literal["last", "max"] | None = None
    min_count: int | None = None
    max_words: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("cache", "cache_weight", "eval_cache", "report_to"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        wrong = [*self._wrong_numbers(), *self._wrong_words()]
        if wrong:
            raise UsageError("\n".join(wrong))

    def _wrong_numbers(self) -> list[str]:
        least = {
            "max_steps": 1, "batch_size": 1, "gradient_accumulation": 1, "eval_steps": 1,
            "eval_batch_size": 1, "patience": 1, "save_steps": 1, "keep_checkpoints": 2,
            "logging_steps": 1, "num_workers": 1, "seed": 0, "shuffle_shards": 1, "prefetch": 1,
            "max_length": 1, "weight_decay": 0, "warmup": 0, "max_grad_norm": 0,
        }  # fmt: skip
        wrong = [
            f"{name} is {getattr(self, name)}, expected at least {low}."
            for name, low in least.items()
            if getattr(self, name) is not None and not getattr(self, name) >= low
        ]
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            wrong.append(f"epochs is {self.epochs}, expected more than 0.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            wrong.append(f"learning_rate is {self.learning_rate}, expected more than 0.")
        for name, low, high in (("alpha", 0.0, 1.0), ("temperature", 0.0, math.inf)):
            try:
                schedule = Schedule.parse(getattr(self, name), name)
            except UsageError as error:
                wrong.append(str(error))
                continue
            for value in (schedule.start, schedule.end):
                inside = low <= value <= high if name == "alpha" else low < value < high
                if not inside:
                    span = "0 to 1" if name == "alpha" else "more than 0"
                    wrong.append(f"{name} is {schedule}, expected {span}.")
                    break
        return wrong

    def _wrong_words(self) -> list[str]:
        choices = {
            "divergence": DIVERGENCES,
            "tail": TAILS,
            "best": get_args(Best),
            "lr_scheduler": get_args(Scheduler),
        }
        wrong = [
            f"{name} is {getattr(self, name)!r}, expected one of {', '.join(names)}."
            for name, names in choices.items()
            if getattr(self, name) not in names
        ]
        if not self.cache:
            wrong.append("no cache was given. Name at least one with --cache.")
        if self.cache_weight and len(self.cache_weight) != len(self.cache):
            wrong.append(f"{len(self.cache_weight)} cache weights for {len(self.cache)} caches.")
        if self.bf16 and self.fp16:
            wrong.append("bf16 and fp16 exclude each other. Choose one.")
        if not self.eval_cache and (self.patience is not None or self.eval_steps is not None):
            wrong.append("patience and eval_steps need an --eval-cache to evaluate on.")
        if self.eval_cache and self.save_steps is not None:
            wrong.append(
                "with --eval-cache checkpoints are taken at evaluations: use --eval-steps."
            )
        if self.fsdp and self.num_workers == 1:
            wrong.append("fsdp shards over workers: use it with --num-workers 2 or more.")
        return wrong

    @property
    def alphas(self) -> Schedule:
        """The schedule of alpha."""
        return Schedule.parse(self.alpha, "alpha")

    @property
    def temperatures(self) -> Schedule:
        """The schedule of the temperature."""
        return Schedule.parse(self.temperature, "temperature")

    @property
    def hard_only(self) -> bool:
        """Whether the soft targets are not wanted at all."""
        return self.alphas == Schedule(1.0, 1.0)

    @property
    def bilstm(self) -> dict[str, Any]:
        """Options of the built-in student that were given."""
        values = {
            "tokenizer": self.student_tokenizer,
            "freeze_embeddings": self.freeze_embeddings or None,
            "embedding_size": self.embedding_size,
            "hidden_size": self.hidden_size,
            "layers": self.layers,
            "dense_size": self.dense_size,
            "dropout": self.dropout,
            "pooling": self.pooling,
            "min_count": self.min_count,
            "max_words": self.max_words,
        }
        return {name: value for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def shown(self) -> dict[str, Any]:
        """As `to_dict`, for people: without the credentials that URLs may hold."""
        values = self.to_dict()
        for name in ("cache", "eval_cache"):
            values[name] = [redact(url) for url in values[name]]
        return values

    def decisive(self) -> dict[str, Any]:
        """The options that a run may not change half-way; caches count by their digest instead."""
        values = self.to_dict()
        values["alpha"], values["temperature"] = str(self.alphas), str(self.temperatures)
        return {
            name: value
            for name, value in values.items()
            if name not in _OPERATIONAL and name not in ("cache", "eval_cache")
        }
