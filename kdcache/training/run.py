"""`kdcache train`: one student from sealed caches.

    caches -> all checks at once -> student -> stream -> DistillationTrainer -> best checkpoint ->
    RUN/student

A run's folder holds `checkpoint-N/` (weights, optimizer, random state, cursor), `metrics.jsonl` (a
line a logged step or evaluation), `student/` (loadable by its own library) and, written last,
`train.json` (options, digests of the caches, result): a folder with `train.json` is finished, and
the same command on it does nothing; without, the same command goes on from the last whole
checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback, is_tensorboard_available

from kdcache import __version__
from kdcache.cache import Cache
from kdcache.errors import UsageError
from kdcache.loss import check_loss
from kdcache.storage import redact
from kdcache.stream import TargetStream, check_caches, open_caches
from kdcache.student import (
    BiLstmClassifier,
    DistilledStudent,
    HfTokenize,
    StudentInfo,
    load_student,
    student_tokenize,
)
from kdcache.targets import Dense, DenseTargets, Sample, SparseTargets
from kdcache.teacher import quiet_transformers
from kdcache.training.options import TrainOptions
from kdcache.training.trainer import (
    DistillationTrainer,
    check_identity,
    last_checkpoint,
    read_state,
)

logger = logging.getLogger(__name__)

RESULT_FILE = "train.json"
METRICS_FILE = "metrics.jsonl"
STUDENT_FOLDER = "student"
_CAUSAL = "causal-lm"
_WORDS_LENGTH = 512


@dataclass(frozen=True)
class TrainProgress:
    """Where a run stands.

    Attributes:
        step: steps done.
        steps: steps of the run.
        epoch: passes over the caches, with the part of the present one.
        seconds: training time so far, over all sittings of the run.
        logs: what was just logged: losses, learning rate, or metrics of an evaluation (`eval_...`).
    """

    step: int
    steps: int
    epoch: float
    seconds: float
    logs: dict[str, float]


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        out: folder of the run.
        student: folder of the student.
        steps: steps of the whole run.
        epochs: passes over the caches.
        rows: rows trained on, over all epochs.
        loss: last logged training loss, alpha and T as they were then.
        hard_loss: its cross-entropy with hard labels, a position.
        soft_loss: its T^2 KL with the teacher, a position; None on hard labels alone.
        eval: metrics of the student on the evaluation caches.
        best_step: step of the checkpoint that became the student, where there were evaluations.
        seconds: wall time of training, over all sittings.
        made: False where the run was finished before and nothing was done.
    """

    out: str
    student: str
    steps: int
    epochs: float
    rows: int
    loss: float
    hard_loss: float
    soft_loss: float | None = None
    eval: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    seconds: float = 0.0
    made: bool = True


def train(
    options: TrainOptions, *, on_progress: Callable[[TrainProgress], None] | None = None
) -> TrainResult:
    """Train a student, or go on with it, or say that it is finished.

    Args:
        options: see `TrainOptions`.
        on_progress: called for every line of `metrics.jsonl`.

    Raises:
        UsageError: options, caches and student do not fit, or the folder holds another run.
        IncompleteError: a cache's build has not finished.
    """
    plan = Plan.make(options)
    finished = plan.finished()
    if finished is not None:
        return finished
    plan.checkpoint()  # its mistakes are told before workers start
    if options.num_workers > 1:
        from kdcache.training.workers import train_on_ray

        return train_on_ray(options, on_progress)
    return Run.prepare(plan, on_progress).train()


@dataclass(frozen=True)
class Plan:
    """Options with their caches opened and checked."""

    options: TrainOptions
    caches: list[Cache]
    eval_caches: list[Cache]

    @classmethod
    def make(cls, options: TrainOptions) -> Plan:
        """Open the caches and check all that needs no student."""
        caches = open_caches(options.cache)
        eval_caches = open_caches(options.eval_cache) if options.eval_cache else []
        first, problems = caches[0], []
        codec, temperatures = first.codec(), []
        if not options.hard_only:
            schedule = options.temperatures
            if not schedule.constant and not isinstance(codec, Dense):
                problems.append(
                    f"a schedule of temperatures ({schedule}) needs a dense cache, not {codec}."
                )
            temperatures = list(dict.fromkeys((schedule.start, schedule.end)))
            kind = DenseTargets if isinstance(codec, Dense) else SparseTargets
            for temperature in temperatures:
                try:
                    check_loss(
                        kind,
                        temperature=temperature,
                        divergence=options.loss,
                        tail=options.tail,
                        exact=not isinstance(codec, Sample),
                    )
                except UsageError as error:
                    problems.append(str(error))
        if options.best == "accuracy" and first.spec.task == _CAUSAL:
            problems.append("best is accuracy, which is for classifiers. Use loss.")
        if options.best == "soft_loss" and options.hard_only:
            problems.append(
                "best is soft_loss, but alpha 1 trains and evaluates on hard labels alone."
            )
        if options.fp16 and not torch.cuda.is_available():
            problems.append("fp16 needs a GPU. Use bf16, or neither.")
        check_caches([*caches, *eval_caches], temperatures, problems)
        return cls(options, caches, eval_caches)

    @property
    def out(self) -> Path:
        """Folder of the run."""
        return Path(self.options.out).expanduser().absolute()

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        weights = self.options.cache_weight or None
        stream = TargetStream(
            self.caches,
            batch_size=self.options.batch_size,
            weights=weights,
            temperature=None,
        )
        return _steps(self.options, stream)

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must share."""
        digests = [cache.digest for cache in self.eval_caches]
        return {**self.options.decisive(), "eval_caches": digests}

    def finished(self) -> TrainResult | None:
        """The result of this very run if it was finished before.

        Raises:
            UsageError: the folder holds a finished run with other options, or something else.
        """
        path = self.out / RESULT_FILE
        if path.is_file():
            document = json.loads(path.read_text())
            length = {"epochs": self.options.epochs, "max_steps": self.options.max_steps}
            digests = [cache.digest for cache in self.caches]
            check_identity(
                document,
                json.loads(json.dumps({**self.identity, **length, "caches": digests})),
                f"the finished run in {self.out}",
            )
            here = {"out": str(self.out), "student": str(self.out / STUDENT_FOLDER), "made": False}
            return TrainResult(**{**document["result"], **here})
        ours = ("checkpoint-*", METRICS_FILE, "runs", ".ray", STUDENT_FOLDER + "*")
        if self.out.is_file():
            raise UsageError(f"{self.out} is a file. Choose another --out.")
        if self.out.is_dir():
            known = {p for pattern in ours for p in self.out.glob(pattern)}
            if set(self.out.iterdir()) - known:
                raise UsageError(
                    f"{self.out} is not empty and not a run of kdcache. Choose another --out."
                )
        return None

    def checkpoint(self) -> Path | None:
        """Where to go on from.

        Raises:
            UsageError: the checkpoint asked for is none, or resuming was ruled out.
        """
        resume = self.options.resume
        if resume not in ("auto", "never"):
            read_state(Path(resume))
            return Path(resume)
        found = last_checkpoint(self.out)
        if found is not None and resume == "never":
            raise UsageError(
                f"{self.out} has checkpoints and --resume never forbids to go on. "
                "Delete them or choose another --out."
            )
        return found


@dataclass(frozen=True)
class Run:
    """A run made ready: everything that can be wrong with its student is known."""

    plan: Plan
    trainer: DistillationTrainer
    student: DistilledStudent
    stream: TargetStream
    tokenize: Any
    resume: Path | None
    caching: bool | None

    @classmethod
    def prepare(cls, plan: Plan, on_progress: Callable[[TrainProgress], None] | None = None) -> Run:
        """Load the student and make its trainer, in this process (one of several, where
        torch.distributed is set up).
        """
        with quiet_transformers():
            student, stream, tokenize = _student_and_stream(plan)
            caching = getattr(student.config, "use_cache", None)
            trainer = _trainer(plan, student, stream, tokenize, on_progress)
        return cls(plan, trainer, student, stream, tokenize, plan.checkpoint(), caching)

    def train(self) -> TrainResult:
        """Train to the end and write the student and the result."""
        plan, trainer = self.plan, self.trainer
        if trainer.is_world_process_zero():
            _cut_metrics(plan.out / METRICS_FILE, self.resume)
        before = _seconds(plan.out / METRICS_FILE) if self.resume else 0.0
        begun = time.perf_counter()
        with quiet_transformers():
            trainer.train(str(self.resume) if self.resume else None)
        seconds = before + time.perf_counter() - begun
        if self.student.config is not None:
            # The Trainer turns it off; a saved student generates with it.
            self.student.config.use_cache = self.caching
        state = trainer.state
        logs = [line for line in state.log_history if "loss" in line]
        best = state.best_global_step if plan.eval_caches else None
        result = TrainResult(
            out=str(plan.out),
            student=str(plan.out / STUDENT_FOLDER),
            steps=state.global_step,
            epochs=round(float(state.epoch or 0.0), 6),
            rows=_rows(self.stream),
            loss=logs[-1]["loss"],
            hard_loss=logs[-1]["hard_loss"],
            soft_loss=logs[-1].get("soft_loss"),
            eval=_evaluation(state, best),
            best_step=best,
            seconds=seconds,
        )
        with quiet_transformers():
            _save(plan, trainer, self.tokenize, result)
        return result


def _rows(stream: TargetStream) -> int:
    cursor = stream.cursor
    epoch = stream.steps * stream.batch_size if stream.drop_last else stream.rows
    return cursor.epoch * epoch + cursor.rows_seen


def _student_and_stream(plan: Plan) -> tuple[DistilledStudent, TargetStream, Any]:
    options, spec = plan.options, plan.caches[0].spec
    causal = spec.task == _CAUSAL
    tokenizer = plan.caches[0].tokenizer()
    length = spec.max_length if causal else options.max_length
    info = StudentInfo(
        task=spec.task,
        # For classification the cache's own vocabulary size is that of the classes.
        vocab_size=spec.vocab_size if causal else max(tokenizer.get_vocab().values()) + 1,
        num_labels=spec.num_labels,
        label_names=spec.label_names,
        pad_id=spec.pad_id,
        bos_id=tokenizer.bos_token_id,
        eos_id=spec.eos_id,
        max_length=length or _WORDS_LENGTH,
        texts=None if causal else _texts(plan.caches),
        tokenizer=tokenizer,
        seed=options.seed,
    )
    inner = load_student(
        options.student,
        info,
        options=options.bilstm,
        embeddings=options.embeddings,
        trust_remote_code=options.trust_remote_code,
    )
    tokenize = student_tokenize(inner, options.student, info)
    alphas, temperatures = options.alphas, options.temperatures
    student = DistilledStudent(
        inner,
        spec.task,
        codec=spec.codec,
        alpha=alphas.start,
        temperature=1.0 if options.hard_only else temperatures.start,
        divergence="forward-kl" if options.hard_only else options.loss,
        tail=options.tail,
        vocab_size=spec.vocab_size,
    )
    if options.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    steps = 1  # until the stream has told its length
    stream = TargetStream(
        plan.caches,
        batch_size=options.batch_size,
        seed=options.seed,
        temperature=None
        if options.hard_only
        else temperatures.start
        if temperatures.constant
        else lambda step: temperatures.at(step, steps),
        weights=options.cache_weight or None,
        group=options.shuffle_shards,
        tokenize=tokenize,
        prefetch=options.prefetch,
        pin_memory=torch.cuda.is_available(),
    )
    steps = _steps(options, stream)
    return student, stream, tokenize


def _steps(options: TrainOptions, stream: TargetStream) -> int:
    return options.max_steps or max(1, math.ceil(options.epochs * stream.steps))


def _texts(caches: list[Cache]) -> Iterator[str]:
    for cache in caches:
        for shard in range(cache.spec.spans):
            data = cache.read(shard, targets=False)
            yield from data.texts or []
            yield from data.text_pairs or []


def _trainer(
    plan: Plan,
    student: DistilledStudent,
    stream: TargetStream,
    tokenize: Any,
    on_progress: Callable[[TrainProgress], None] | None,
) -> DistillationTrainer:
    options = plan.options
    steps = _steps(options, stream)
    evaluates = bool(plan.eval_caches)
    every = (options.eval_steps if evaluates else options.save_steps) or stream.steps
    callbacks: list[TrainerCallback] = [_Metrics(plan.out / METRICS_FILE, on_progress)]
    trackers = [name for name in options.report_to if name not in ("auto", "none", "tensorboard")]
    if {"auto", "tensorboard"} & {*options.report_to} and is_tensorboard_available():
        callbacks.append(_TensorBoard())
    if options.patience is not None:
        callbacks.append(EarlyStoppingCallback(options.patience))
    sharding: dict[str, Any] = {}
    if options.fsdp:
        sharding = {
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"},
        }
    arguments = TrainingArguments(
        output_dir=str(plan.out),
        max_steps=steps,
        per_device_train_batch_size=max(1, options.batch_size // options.num_workers),
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate or _learning_rate(options.student, student),
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup,
        lr_scheduler_type=options.lr_scheduler,
        max_grad_norm=options.max_grad_norm,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,  # a diverged run should show
        eval_strategy="steps" if evaluates else "no",
        eval_steps=every if evaluates else None,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=options.keep_checkpoints,
        load_best_model_at_end=evaluates,
        metric_for_best_model=f"eval_{options.best}" if evaluates else None,
        greater_is_better=options.best == "accuracy" if evaluates else None,
        restore_callback_states_from_checkpoint=True,
        bf16=options.bf16,
        fp16=options.fp16,
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if options.num_workers > 1 and not torch.cuda.is_available() else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        report_to=trackers or "none",
        **sharding,
    )
    constant = options.alphas.constant
    return DistillationTrainer(
        model=student,
        args=arguments,
        train_dataset=stream,
        eval_dataset=_eval_stream(plan, tokenize) if evaluates else None,
        callbacks=callbacks,
        alpha=(lambda _: options.alphas.start)
        if constant
        else lambda step: options.alphas.at(step, steps),
        identity=plan.identity,
    )


def _eval_stream(plan: Plan, tokenize: Any) -> TargetStream:
    options = plan.options
    return TargetStream(
        plan.eval_caches,
        batch_size=options.eval_batch_size or options.batch_size,
        temperature=None if options.hard_only else options.temperatures.end,
        group=1,
        shuffle=False,
        tokenize=tokenize,
        prefetch=options.prefetch,
        pin_memory=torch.cuda.is_available(),
    )


def _learning_rate(name: str, student: DistilledStudent) -> float:
    if isinstance(student.student, BiLstmClassifier):
        return 1e-3
    # Random weights take larger steps than trained ones.
    return 5e-4 if name.endswith(".json") or (":" in name and not os.path.exists(name)) else 5e-5


def _evaluation(state: TrainerState, best: int | None) -> dict[str, float]:
    for line in state.log_history:
        if line["step"] == best and "eval_loss" in line:
            return {
                name.removeprefix("eval_"): value
                for name, value in line.items()
                if name.startswith("eval_") and name != "eval_runtime"
            }
    return {}


def _seconds(metrics: Path) -> float:
    """Training time of the earlier sittings of a run, as far as they count."""
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    return float(json.loads(lines[-1])["seconds"]) if lines else 0.0


def _cut_metrics(path: Path, checkpoint: Path | None) -> None:
    """Drop the lines that the resumed run will write again."""
    if not path.is_file():
        return
    last = read_state(checkpoint)["cursor"]["step"] if checkpoint else -1
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= last]
    path.write_text("".join(line + "\n" for line in lines))


def _save(plan: Plan, trainer: DistillationTrainer, tokenize: Any, result: TrainResult) -> None:
    """Write the student, then the result: whoever finds `train.json` finds all."""
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if not trainer.is_world_process_zero():
        return
    scratch, folder = plan.out / f"{STUDENT_FOLDER}.tmp", plan.out / STUDENT_FOLDER
    for leftover in (scratch, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    student = trainer.accelerator.unwrap_model(trainer.model)
    options: dict[str, Any] = {}
    if weights is not None:
        options["state_dict"] = {k.removeprefix("student."): v for k, v in weights.items()}
    student.save_pretrained(scratch, **options)
    if tokenize is None:
        plan.caches[0].tokenizer().save_pretrained(str(scratch))
    elif isinstance(tokenize, HfTokenize):
        tokenize.tokenizer.save_pretrained(str(scratch))
    scratch.replace(folder)
    length = {"epochs": plan.options.epochs, "max_steps": plan.options.max_steps}
    digests = [cache.digest for cache in plan.caches]
    document = {
        "kdcache": __version__,
        "options": {**plan.options.to_dict(), "cache": [redact(c) for c in plan.options.cache]},
        "identity": {**plan.identity, **length, "caches": digests},
        "result": dataclasses.asdict(result),
    }
    path = plan.out / (RESULT_FILE + ".tmp")
    path.write_text(json.dumps(document, indent=1) + "\n")
    path.replace(plan.out / RESULT_FILE)


class _Metrics(TrainerCallback):  # type: ignore[misc]
    """A line of `metrics.jsonl` for everything logged, and the caller's progress."""

    def __init__(self, path: Path, on_progress: Callable[[TrainProgress], None] | None) -> None:
        self._path, self._on_progress = path, on_progress
        self._begun, self._before = time.perf_counter(), 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._begun, self._before = time.perf_counter(), _seconds(self._path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        seconds = self._before + time.perf_counter() - self._begun
        line = {"step": state.global_step, **logs, "seconds": round(seconds, 3)}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._on_progress is not None:
            progress = TrainProgress(
                state.global_step, state.max_steps, float(state.epoch or 0.0), seconds, dict(logs)
            )
            self._on_progress(progress)


class _TensorBoard(TensorBoardCallback):  # type: ignore[misc]
    """HF's own callback, without a model: a student need not have an HF config."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs.pop("model", None)
        super().on_train_begin(args, state, control, **kwargs)
