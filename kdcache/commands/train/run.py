"""One training run: a student from sealed caches.

    caches -> all checks at once -> student -> stream -> DistillationTrainer -> best checkpoint ->
    RUN

A run's folder holds `checkpoint-N/` (weights, optimizer, random state, cursor), `metrics.jsonl` (a
line a logged step or evaluation), the student's own files (`config.json`, `model.safetensors`, its
tokenizer; of an adapter `adapter_config.json` and `adapter_model.safetensors`), so that its own
library loads it from this folder, and, written last, `train.json`
(options, digests of the caches, result). A folder with `train.json` is finished, and the same
command on it does nothing; without it the same command continues from the last complete
checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from transformers import (
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import is_tensorboard_available

from kdcache.cache import Cache
from kdcache.cache.figures import teacher_cross_entropy
from kdcache.cache.shard import ShardData
from kdcache.commands.train.card import CARD_FILE, model_card
from kdcache.commands.train.cross import cross_tokenizer, own_tokenizer
from kdcache.commands.train.log import (
    MetricsCallback,
    OwnWandb,
    PlainTensorBoard,
    SlowSteps,
    cut_metrics,
    seconds_before,
)
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.prepare import RESULT_FILE, SCRATCH, RunPlan, steps_of
from kdcache.commands.train.result import LOSS_PARTS, TrainProgress, TrainResult
from kdcache.commands.train.stop import Patience, StopOnSignal
from kdcache.commands.train.store import StoreCallback
from kdcache.errors import UsageError
from kdcache.files import filled_folder, write_json, write_text
from kdcache.humanize import shares
from kdcache.stream import Collator, CrossTokenizer, TargetDataset, TargetStream
from kdcache.stream.aligned import undivided
from kdcache.stream.text import RowsText, TextChunks
from kdcache.student import (
    BiLstm,
    DistilledStudent,
    HfTokenize,
    StudentInfo,
    WordTokenize,
    load_student,
    student_tokenize,
)
from kdcache.student.adapter import is_adapted
from kdcache.student.checkpoints import read_state
from kdcache.student.documents import check_documents
from kdcache.student.earlier import begin_from
from kdcache.student.figures import FIGURES
from kdcache.student.padding import check_rows
from kdcache.student.pairs import check_pairs
from kdcache.student.precision import Computing, use_one_gpu
from kdcache.student.reach import reach_of
from kdcache.student.trainer import DistillationTrainer, soft_name
from kdcache.student.words import unknown_share
from kdcache.targets import SoftTargets
from kdcache.tasks import CAUSAL_LM, TASKS
from kdcache.teacher import quiet_transformers
from kdcache.version import __version__

_WORDS_LENGTH = 512


@dataclass(frozen=True)
class Run:
    """A prepared run, whose student has been checked."""

    plan: RunPlan
    trainer: DistillationTrainer
    student: DistilledStudent
    stream: TargetStream
    tokenize: Any
    resume: Path | None
    caching: bool | None

    @classmethod
    def prepare(
        cls,
        plan: RunPlan,
        on_progress: Callable[[TrainProgress], None] | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> Run:
        """Load the student and make its trainer, in this process (one of several, where
        torch.distributed is set up). For the callbacks see `train`.
        """
        computing = Computing.choose(plan.options.precision, plan.options.gpus_per_worker)
        student, tokenize = make_student(plan)
        if isinstance(tokenize, CrossTokenizer) and tokenize.needless:
            report("the student has the teacher's tokenizer: it needs no --cross-tokenizer")
        with quiet_transformers():
            stream = _stream(plan, tokenize, computing.gpu)
            if (mix := plan.mix(stream)) is not None:
                report(f"rows of an epoch: {shares(mix)}")
            caching = getattr(student.config, "use_cache", None)
            trainer = _trainer(plan, computing, student, stream, tokenize, on_progress, report)
            trial = _trial_batch(plan, tokenize)
            student.check_reach(trial)
            if plan.options.batch_size > 1:
                check = check_pairs if "decoder_input_ids" in trial else check_rows
                check(plan.options.student, student, trial)
            if any(cache.spec.apart for cache in (*plan.caches, *plan.eval_caches)):
                check_documents(student.student, trial["input_ids"])
        computing.begin()
        return cls(plan, trainer, student, stream, tokenize, plan.checkpoint(), caching)

    def train(self) -> TrainResult:
        """Train to the end and write the student and the result."""
        plan, trainer = self.plan, self.trainer
        if trainer.is_world_process_zero():
            cut_metrics(plan.out, read_state(self.resume)["cursor"]["step"] if self.resume else -1)
        before = seconds_before(plan.out) if self.resume else 0.0
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
            task=plan.caches[0].spec.task,
            out=plan.shown,
            steps=state.global_step,
            epochs=round(float(state.epoch or 0.0), 6),
            rows=_rows(self.stream),
            loss=logs[-1]["loss"],
            **{name: logs[-1].get(name) for name in LOSS_PARTS},
            eval=_evaluation(state, best),
            best_step=best,
            seconds=seconds,
            parameters=sum(p.numel() for p in self.student.parameters()),
            trained=sum(p.numel() for p in self.student.parameters() if p.requires_grad),
            **_teacher(plan),
            **_unread(self.tokenize),
            epoch_rows=plan.mix(self.stream),
            **_vocabulary(plan, self.tokenize),
            pretrained=getattr(self.student.student, "pretrained", None),
        )
        with quiet_transformers():
            _save(plan, trainer, self.tokenize, result)
        if plan.store is not None:
            if trainer.is_world_process_zero():
                plan.store.finish(last=RESULT_FILE)
            trainer.accelerator.wait_for_everyone()
            plan.store.clear()
        return result


def _teacher(plan: RunPlan) -> dict[str, Any]:
    """The teacher's cross-entropy on the student's labels; unknown where these are other tokens."""
    if plan.options.cross_tokenizer is not None:
        return {}
    return {
        "teacher_cross_entropy": teacher_cross_entropy(plan.caches, plan.options.weights),
        "eval_teacher_cross_entropy": teacher_cross_entropy(plan.eval_caches),
    }


def _unread(tokenize: Any) -> dict[str, Any]:
    """What of the rows a student of another tokenizer had no labels for, where there is any."""
    if not isinstance(tokenize, CrossTokenizer):
        return {}
    left_out = {"lost": tokenize.lost or None, "cut": tokenize.cut or None}
    return {"vocabulary": tokenize.vocab_size, **left_out}


def _vocabulary(plan: RunPlan, tokenize: Any) -> dict[str, Any]:
    """Size of a student's own vocabulary, and what it does not know."""
    if not isinstance(tokenize, HfTokenize | WordTokenize):
        return {}
    own = tokenize.tokenizer
    return {
        "vocabulary": len(own),
        "unknown": unknown_share(own, _texts(plan.caches)),
        "eval_unknown": unknown_share(own, _texts(plan.eval_caches)) if plan.eval_caches else None,
    }


def _rows(stream: TargetStream) -> int:
    cursor = stream.cursor
    epoch = stream.steps * stream.batch_size if stream.drop_last else stream.rows
    return cursor.epoch * epoch + cursor.rows_seen


# Student and data


def make_student(plan: RunPlan) -> tuple[DistilledStudent, Any]:
    """The student of a run with its loss, and how it reads what the caches hold.

    Returns:
        The student, and None if it takes the cached ids; what turns texts into tensors for a
        classifier with its own tokenizer, and a `CrossTokenizer` for such a language model.

    Raises:
        UsageError: there is no such student, or it does not fit the caches.
    """
    options, spec = plan.options, plan.caches[0].spec
    task = TASKS[spec.task]
    tokenizer = plan.caches[0].tokenizer()
    length = options.max_length if task.texts else spec.max_length
    info = StudentInfo(
        task=spec.task,
        # For classification the cache's own vocabulary size is that of the classes.
        vocab_size=spec.vocab_size if task.over_ids else max(tokenizer.get_vocab().values()) + 1,
        num_labels=spec.num_labels,
        label_names=spec.label_names,
        pad_id=spec.pad_id,
        bos_id=tokenizer.bos_token_id,
        eos_id=spec.eos_id,
        max_length=length or _WORDS_LENGTH,
        texts=_texts(plan.caches) if task.rereads else None,
        tokenizer=tokenizer,
        seed=options.seed,
        decoder_start=spec.rows.get("decoder_start"),
    )
    own = own_tokenizer(options) if options.cross_tokenizer is not None else None
    cross = None
    if own is not None:
        cross = cross_tokenizer(options, plan.caches[0], own)
        info = replace(
            info,
            vocab_size=cross.vocab_size,
            pad_id=cross.pad_id,
            bos_id=own.bos_token_id,
            eos_id=own.eos_token_id,
            tokenizer=own,
            across=True,
        )
    with quiet_transformers():
        inner = load_student(
            options.student,
            info,
            options=options.bilstm,
            embeddings=options.embeddings,
            lora=options.adapter,
            trust_remote_code=options.trust_remote_code,
        )
        tokenize = cross or student_tokenize(
            inner, options.student, info, trust_remote_code=options.trust_remote_code
        )
        reach = reach_of(inner)
        if cross is not None and cross.aligner.max_length is None:
            cross.aligner.max_length = reach
        if options.init_from is not None:
            begin_from(
                inner,
                tokenize,
                options.init_from,
                info,
                lora=options.adapter,
                trust_remote_code=options.trust_remote_code,
            )
    if tokenize is not None and any(c.spec.rows.get("label_tokens") == "all" for c in plan.caches):
        raise UsageError(
            f"student {options.student} reads the words by itself, and the cache has targets at "
            "all of the teacher's tokens. Build with --label-tokens first, or name a student with "
            "the teacher's tokenizer."
        )
    if task.words and options.max_length is not None:
        raise UsageError(
            f"--max-length is {options.max_length}, and a student of words reads each word of a "
            "row, since each has a target. Leave it out, or build with a smaller --max-length."
        )
    if task.texts and reach is not None and (options.max_length or 0) > reach:
        raise UsageError(
            f"--max-length is {options.max_length}, but student {options.student} reads at most "
            f"{reach} tokens. Give at most that."
        )
    if options.fsdp and not getattr(inner, "_no_split_modules", None):
        raise UsageError(
            f"--fsdp shards the layers of a Hugging Face student, which {options.student} is not. "
            "Train it without --fsdp."
        )
    student = DistilledStudent(
        inner,
        spec.task,
        alpha=options.alphas.start,
        # Hard labels alone have no divergence, but the loss of a score is one.
        divergence=None if options.hard_only and task.answers != "score" else options.divergence,
        tail=options.tail,
        vocab_size=info.vocab_size if cross is not None else spec.vocab_size,
        anchor=options.theta,
        huber_delta=options.huber_delta,
    )
    if options.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    return student, tokenize


_NOT_INPUTS = ("count", "label_logprob", "first_tokens")


def _trial_batch(plan: RunPlan, tokenize: Any) -> dict[str, torch.Tensor]:
    """Three of the first rows: the longest, the shortest, and one between."""
    cross = tokenize if isinstance(tokenize, CrossTokenizer) else None
    dataset = TargetDataset(plan.caches[:1], cross=cross)
    rows = [dataset[i] for i in range(min(64, len(dataset)))]
    rows.sort(key=lambda row: -len(row.input_ids))
    chosen = [rows[i] for i in sorted({0, len(rows) // 2, len(rows) - 1})]
    pad_id = plan.caches[0].spec.pad_id
    # Documents are tried by themselves, see `check_documents`.
    chosen = [undivided(row) for row in chosen]
    tokenize = None if cross is not None else tokenize
    collator = Collator(pad_id=pad_id, temperature=None, tokenize=tokenize, cross=cross)
    batch = collator(chosen)
    return {k: value for k, value in batch.items() if k not in _NOT_INPUTS}


def _texts(caches: list[Cache]) -> Iterator[str]:
    for cache in caches:
        for shard in range(cache.spec.spans):
            data = cache.read(shard, targets=False)
            yield from data.texts or []
            yield from data.text_pairs or []
            for words in data.words or []:
                yield from words


def _stream(plan: RunPlan, tokenize: Any, gpu: bool) -> TargetStream:
    options, temperatures = plan.options, plan.options.temperatures
    steps = 1  # until the stream's length is known
    stream = TargetStream(
        plan.caches,
        batch_size=options.batch_size,
        seed=options.seed,
        temperature=None
        if options.hard_only
        else temperatures.start
        if temperatures.constant
        else lambda step: temperatures.at(step, steps),
        weights=options.weights,
        streams=plan.streams,
        group=options.shuffle_shards,
        **_reading(tokenize),
        prefetch=options.prefetch,
        pin_memory=gpu,
    )
    steps = steps_of(options, stream)
    return stream


def _reading(tokenize: Any) -> dict[str, Any]:
    """Arguments of a stream for what `make_student` gave."""
    return {"cross" if isinstance(tokenize, CrossTokenizer) else "tokenize": tokenize}


def _eval_stream(plan: RunPlan, tokenize: Any, gpu: bool) -> TargetStream:
    options = plan.options
    return TargetStream(
        plan.eval_caches,
        batch_size=options.eval_batch_size or options.batch_size,
        temperature=None if options.hard_only else options.temperatures.end,
        streams=plan.streams,
        group=1,
        shuffle=False,
        **_reading(tokenize),
        text=_text(plan.eval_caches, tokenize),
        prefetch=options.prefetch,
        pin_memory=gpu,
    )


def _text(caches: list[Cache], tokenize: Any) -> Callable[[ShardData], TextChunks] | None:
    """What makes the figures in bytes; None for other tasks, and of tokens that lose bytes."""
    if caches[0].spec.task != CAUSAL_LM:
        return None
    if isinstance(tokenize, CrossTokenizer):
        return tokenize.text
    try:
        return RowsText(caches)
    except UsageError:
        return None


# Trainer


def _trainer(
    plan: RunPlan,
    computing: Computing,
    student: DistilledStudent,
    stream: TargetStream,
    tokenize: Any,
    on_progress: Callable[[TrainProgress], None] | None,
    report: Callable[[str], None],
) -> DistillationTrainer:
    options = plan.options
    steps = steps_of(options, stream)
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    evaluates = bool(plan.eval_caches)
    every = (options.eval_steps if evaluates else options.save_steps) or stream.steps
    callbacks: list[TrainerCallback] = [
        StopOnSignal(),
        MetricsCallback(plan.out, on_progress),
        SlowSteps(report),
    ]
    asked = {*options.report_to}
    trackers = sorted(asked - {"auto", "none", "tensorboard", "wandb"})
    if asked & {"auto", "tensorboard"} and is_tensorboard_available():
        callbacks.append(PlainTensorBoard())
    if "wandb" in asked:
        callbacks.append(OwnWandb())
    if plan.store is not None:
        callbacks.append(StoreCallback(plan.store))
    if options.patience is not None:
        callbacks.append(Patience(options.patience))
    arguments = TrainingArguments(
        output_dir=str(plan.out),
        run_name=plan.out.name,
        max_steps=steps,
        per_device_train_batch_size=max(1, options.batch_size // world),
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate or _learning_rate(options, student),
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
        metric_for_best_model=f"eval_{_best_metric(plan)}" if evaluates else None,
        greater_is_better=options.best in ("f1", *FIGURES.values()) if evaluates else None,
        seed=options.seed,
        ddp_backend="gloo" if world > 1 and not computing.gpu else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        report_to=trackers or "none",
        **computing.arguments(),
        **(_sharding(student.student) if options.fsdp else {}),
    )
    use_one_gpu(arguments, "--num-workers {gpus} trains on all of them.")
    constant = options.alphas.constant
    trainer = DistillationTrainer(
        model=student,
        args=arguments,
        train_dataset=stream,
        eval_dataset=_eval_stream(plan, tokenize, computing.gpu) if evaluates else None,
        callbacks=callbacks,
        alpha=(lambda _: options.alphas.start)
        if constant
        else lambda step: options.alphas.at(step, steps),
        identity=plan.identity,
    )
    if plan.store is not None:
        trainer.bring_checkpoint = plan.store.bring_checkpoint
    return trainer


def _sharding(student: nn.Module) -> dict[str, Any]:
    """Arguments for FSDP: a unit for each layer of a Hugging Face student, and the root, which
    keeps the output projection and so lets the loss be fused (see `DistilledStudent`)."""
    named = set(getattr(student, "_no_split_modules", None) or ())
    layers = named & {type(module).__name__ for module in student.modules()}
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "state_dict_type": "FULL_STATE_DICT",
            "transformer_layer_cls_to_wrap": sorted(layers),
        },
    }


def _best_metric(plan: RunPlan) -> str:
    """The name of the soft loss depends on the targets."""
    codec = plan.eval_caches[0].codec()
    if plan.options.cross_tokenizer == "likelihood":
        return plan.options.best
    soft = soft_name(SoftTargets.empty(codec).at(codec.temperatures[0]))
    return soft if plan.options.best == "soft_loss" else plan.options.best


def _learning_rate(options: TrainOptions, student: DistilledStudent) -> float:
    if isinstance(student.student, BiLstm):
        return 1e-3
    if is_adapted(student.student):
        return 2e-4
    name = options.student
    if options.init_from is not None:
        return 5e-5
    # Random weights take larger steps than trained ones.
    return 5e-4 if name.endswith(".json") or (":" in name and not os.path.exists(name)) else 5e-5


# Result


def _evaluation(state: TrainerState, best: int | None) -> dict[str, float]:
    for line in state.log_history:
        if line["step"] == best and "eval_loss" in line:
            return {
                name.removeprefix("eval_"): value
                for name, value in line.items()
                if name.startswith("eval_") and name != "eval_runtime"
            }
    return {}


def _save(plan: RunPlan, trainer: DistillationTrainer, tokenize: Any, result: TrainResult) -> None:
    """Write the student, then the result: a folder with `train.json` is complete."""
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if not trainer.is_world_process_zero():
        return
    student = trainer.accelerator.unwrap_model(trainer.model)
    options: dict[str, Any] = {}
    if weights is not None:
        # Tied weights were gathered once for each of their names; they are stored under the first.
        every = dict(student.named_parameters(remove_duplicate=False))
        tied = every.keys() - dict(student.named_parameters()).keys()
        options["state_dict"] = {
            k.removeprefix("student."): v for k, v in weights.items() if k not in tied
        }
    with filled_folder(plan.out, SCRATCH, last=RESULT_FILE) as folder:
        student.save_pretrained(folder, **options)
        if tokenize is None:
            plan.caches[0].tokenizer().save_pretrained(str(folder))
        elif isinstance(tokenize, HfTokenize | WordTokenize | CrossTokenizer):
            tokenize.tokenizer.save_pretrained(str(folder))
        document = {
            "kdcache": __version__,
            "options": plan.options.shown(),
            "identity": plan.finished_identity,
            "result": dataclasses.asdict(result),
        }
        card = model_card(plan, result, getattr(student.config, "model_type", None))
        write_text(folder / CARD_FILE, card)
        write_json(folder / RESULT_FILE, document)
