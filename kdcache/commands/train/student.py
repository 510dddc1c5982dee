"""The student of a training run (what it is made of, how it reads, the rows it is tried on), its
streams, and its trainer with all settings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import is_tensorboard_available

from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.commands.train.callbacks import (
    MetricsCallback,
    OwnWandb,
    Patience,
    PlainTensorBoard,
    SlowSteps,
    StopOnSignal,
)
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.prepare import RunPlan, own_tokenizer, steps_of
from kdcache.errors import UsageError
from kdcache.lora import is_adapted
from kdcache.metrics import METRICS
from kdcache.models import BILSTM
from kdcache.stream import TargetDataset, TargetStream, join
from kdcache.stream.batch import CachedIds, LabelReading, OwnTokens, Reading
from kdcache.stream.shard_rows import undivided
from kdcache.student import DistilledStudent, StudentInfo, load_student, student_tokenize
from kdcache.student.figures import soft_name
from kdcache.student.load import begin_from
from kdcache.student.one_answer import OneAnswer
from kdcache.student.precision import Computing, use_one_gpu
from kdcache.student.tokens import HfTokenize, WordTokenize
from kdcache.student.trainer import DistillationTrainer
from kdcache.targets import SoftTargets
from kdcache.tasks import CAUSAL_LM, TASKS
from kdcache.teacher import quiet_transformers
from kdcache.teacher.quirks import length_class, reach

_WORDS_LENGTH = 512
_NO_BOUND = 1 << 62


def make_student(plan: RunPlan) -> tuple[DistilledStudent, Reading]:
    """The student of a run with its loss, and how it reads what the caches hold.

    Returns:
        The student, and its reading: of the cached ids, of its own tokens of texts or words, or of
        text across tokenizers.

    Raises:
        UsageError: there is no such student, or it does not fit the caches.
    """
    options, spec = plan.options, plan.caches[0].spec
    task = TASKS[spec.task]
    tokenizer = plan.caches[0].tokenizer()
    caches = (*plan.caches, *plan.eval_caches)
    length = options.max_length if task.texts else max(c.spec.max_length for c in caches)
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
        texts=texts_of(plan.caches) if task.rereads else None,
        tokenizer=tokenizer,
        seed=options.seed,
        decoder_start=spec.rows.get("decoder_start"),
        mean=labels_of(plan.caches).mean if task.answers == "score" else None,
    )
    cross = None
    if options.cross_tokenizer is not None:
        from kdcache.stream.cross import CrossTokenizer

        own = own_tokenizer(options)
        cross = CrossTokenizer(
            plan.caches[0],
            own,
            options.cross_tokenizer,
            tau=options.likelihood_temperature,
            max_length=options.max_length,
        )
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
            options=options.bilstm_settings,
            embeddings=options.embeddings,
            lora=options.adapter,
            trust_remote_code=options.trust_remote_code,
        )
        tokenize = student_tokenize(
            inner, options.student, info, trust_remote_code=options.trust_remote_code
        )
        most = reach(inner)
        if cross is not None and cross.aligner.max_length is None:
            cross.aligner.max_length = most
        if options.init_from is not None:
            begin_from(
                inner,
                tokenize,
                options.init_from,
                info,
                lora=options.adapter,
                trust_remote_code=options.trust_remote_code,
            )
    reading: Reading = cross or CachedIds(spec.pad_id)
    if options.divergence == "policy-gradient" and not options.hard_only:
        reading = LabelReading(spec.pad_id, options.importance_clip)
    if tokenize is not None:
        own = tokenize.tokenizer if isinstance(tokenize, HfTokenize | WordTokenize) else None
        reading = OwnTokens(tokenize, own)
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
    if task.texts and most is not None and (options.max_length or 0) > most:
        raise UsageError(
            f"--max-length is {options.max_length}, but student {options.student} reads at most "
            f"{most} tokens. Give at most that."
        )
    if options.fsdp and not getattr(inner, "_no_split_modules", None):
        raise UsageError(
            f"--fsdp shards the layers of a Hugging Face student, which {options.student} is not. "
            "Train it without --fsdp."
        )
    rule = None
    if options.chosen is not None:
        from kdcache.student.positions import Share

        rule = Share(*options.chosen)
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
        positions=rule,
    )
    if options.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    return student, reading


_SHORT = 20  # characters
_NOT_INPUTS = ("count", "label_logprob", "teacher_entropy", "first_tokens")


def trial_batch(plan: RunPlan, reading: Reading) -> dict[str, torch.Tensor]:
    """Three of the first rows: the longest, the shortest, and one between."""
    dataset = TargetDataset(plan.caches[:1], cross=reading)
    rows = [dataset[i] for i in range(min(64, len(dataset)))]
    rows.sort(key=lambda row: -len(row.input_ids))
    chosen = [rows[i] for i in sorted({0, len(rows) // 2, len(rows) - 1})]
    # Documents are tried by themselves, see `check_documents`.
    chosen = [undivided(row) for row in chosen]
    batch = reading.collate(join(chosen), temperature=None)
    mask = batch.get("attention_mask")
    if mask is not None and chosen[-1].texts is not None and bool(mask.all()) and len(chosen) > 1:
        # Rows that are all cut to one length have no padding, and others may have some.
        batch = reading.collate(join([*chosen[:-1], _beginning(chosen[-1])]), temperature=None)
    return {k: value for k, value in batch.items() if k not in _NOT_INPUTS}


def check_lengths(plan: RunPlan, student: DistilledStudent) -> None:
    """Refuse rows of any cache beyond what a student of their tokens reads.

    Shards are read only where their cache may have such rows.

    Raises:
        UsageError: there is one.
    """
    reach, source_reach = student.reach or _NO_BOUND, student.source_reach or _NO_BOUND
    for cache in (*plan.caches, *plan.eval_caches):
        bound = cache.spec.rows.get("max_source_length") or _NO_BOUND
        of_sources = TASKS[cache.spec.task].source and bound > source_reach
        if cache.spec.apart or (cache.spec.max_length <= reach and not of_sources):
            continue  # where documents are apart, positions begin anew in each
        for shard, entry in enumerate(cache.manifest.shards):
            if entry.rows:
                data = cache.read(shard, targets=False)
                sources = [0] if data.source_offsets is None else np.diff(data.source_offsets)
                student.check_lengths(int(np.diff(data.offsets).max()), int(max(sources)))


def lengths_warning(plan: RunPlan, student: DistilledStudent) -> str | None:
    """What to say of a student that reads short rows otherwise next to longer ones; None of others.

    Args:
        plan: of the run; the first shard of each cache is looked at.
        student: that reads the cached ids, before its first forward.
    """
    classify = length_class(student.student)
    if classify is None or all(classify(c.spec.max_length) == classify(1) for c in plan.caches):
        return None
    found: set[tuple[int, ...]] = set()
    for cache in plan.caches:
        entries = cache.manifest.shards
        shard = next((i for i, entry in enumerate(entries) if entry.rows), None)
        if shard is not None:
            data = cache.read(shard, targets=False)
            found |= {classify(int(n)) for n in np.diff(data.offsets)}
    if len(found) < 2:
        return None
    return (
        f"student {plan.options.student} reads a row otherwise in a batch with longer ones "
        "(longrope, dynamic positions or BigBird), as in any trainer; --batch-size 1 reads each "
        "alone"
    )


def _beginning(row: ShardData) -> ShardData:
    """The beginning of a row of text, and its last token: some classifiers look for it."""
    half = max(1, len(row.input_ids) // 2)

    def cut(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values[: half - 1], values[-1:]])

    def short(texts: list[str] | None) -> list[str] | None:
        return None if texts is None else [text[:_SHORT] for text in texts]

    return replace(
        row,
        offsets=np.array([0, half]),
        input_ids=cut(row.input_ids),
        type_ids=None if row.type_ids is None else cut(row.type_ids),
        texts=short(row.texts),
        text_pairs=short(row.text_pairs),
    )


_COUNTED = 1 << 20  # labels


def labels_of(caches: Sequence[Cache]) -> OneAnswer:
    """The hard labels of caches, counted: of the first shards, if they have a million."""
    spec = caches[0].spec
    found = OneAnswer(spec.task, spec.vocab_size, spec.label_names)
    for cache in caches:
        for shard in range(cache.spec.spans):
            if found.count < _COUNTED:
                found.add(cache.read(shard, targets=False).every_label)
    return found


def texts_of(caches: list[Cache]) -> Iterator[str]:
    """The texts of caches of texts, or the words of those of words."""
    for cache in caches:
        for shard in range(cache.spec.spans):
            data = cache.read(shard, targets=False)
            yield from data.texts or []
            yield from data.text_pairs or []
            for words in data.words or []:
                yield from words


# The streams of a run, and its trainer


def make_trainer(
    plan: RunPlan,
    computing: Computing,
    student: DistilledStudent,
    stream: TargetStream,
    reading: Reading,
) -> DistillationTrainer:
    """The trainer of a run, with all settings."""
    options = plan.options
    steps = steps_of(options, stream)
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    evaluates = bool(plan.eval_caches)
    every = options.save_steps or stream.steps
    callbacks: list[TrainerCallback] = [
        StopOnSignal(),
        MetricsCallback(plan.out, plan.on_progress),
        SlowSteps(plan.report),
        *plan.folder.callbacks(),
    ]
    asked = {*options.report_to}
    trackers = sorted(asked - {"auto", "none", "tensorboard", "wandb"})
    if asked & {"auto", "tensorboard"} and is_tensorboard_available():
        callbacks.append(PlainTensorBoard())
    if "wandb" in asked:
        callbacks.append(OwnWandb())
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
        greater_is_better=METRICS[options.best].higher if evaluates else None,
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
        eval_dataset=_eval_stream(plan, reading, computing.gpu) if evaluates else None,
        callbacks=callbacks,
        alpha=(lambda _: options.alphas.start)
        if constant
        else lambda step: options.alphas.at(step, steps),
        identity=plan.identity,
    )
    trainer.bring_checkpoint = plan.folder.bring_checkpoint
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
    if getattr(student.config, "model_type", None) == BILSTM:
        return 1e-3
    if is_adapted(student.student):
        return 2e-4
    name = options.student
    if options.init_from is not None:
        return 5e-5
    # Random weights take larger steps than trained ones.
    return 5e-4 if name.endswith(".json") or (":" in name and not os.path.exists(name)) else 5e-5


def train_stream(plan: RunPlan, reading: Reading, gpu: bool) -> TargetStream:
    """The rows that a run trains on."""
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
        cross=reading,
        prefetch=options.prefetch,
        pin_memory=gpu,
    )
    steps = steps_of(options, stream)
    return stream


def _eval_stream(plan: RunPlan, reading: Reading, gpu: bool) -> TargetStream:
    options = plan.options
    if plan.eval_caches[0].spec.task == CAUSAL_LM:
        with suppress(UsageError):  # of tokens that lose bytes, there are no figures in bytes
            reading = reading.with_text(plan.eval_caches[0])
    return TargetStream(
        plan.eval_caches,
        batch_size=options.eval_batch_size or options.batch_size,
        temperature=None if options.hard_only else options.temperatures.end,
        streams=plan.streams,
        group=1,
        shuffle=False,
        cross=reading,
        prefetch=options.prefetch,
        pin_memory=gpu,
    )
