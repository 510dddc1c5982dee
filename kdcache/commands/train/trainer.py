"""The streams of a training run, and its trainer with all settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import distributed, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import is_tensorboard_available

from kdcache.commands.train.callbacks import (
    MetricsCallback,
    OwnWandb,
    Patience,
    PlainTensorBoard,
    SlowSteps,
    StopOnSignal,
)
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.prepare import RunPlan, steps_of
from kdcache.commands.train.result import TrainProgress
from kdcache.errors import UsageError
from kdcache.lora import is_adapted
from kdcache.metrics import METRICS
from kdcache.models import BILSTM
from kdcache.stream import TargetStream
from kdcache.stream.batch import Reading
from kdcache.student import DistilledStudent
from kdcache.student.figures import soft_name
from kdcache.student.precision import Computing, use_one_gpu
from kdcache.student.trainer import DistillationTrainer
from kdcache.targets import SoftTargets
from kdcache.tasks import CAUSAL_LM


def make_trainer(
    plan: RunPlan,
    computing: Computing,
    student: DistilledStudent,
    stream: TargetStream,
    reading: Reading,
    on_progress: Callable[[TrainProgress], None] | None,
    report: Callable[[str], None],
) -> DistillationTrainer:
    """The trainer of a run.

    Args:
        plan: the run.
        computing: precision and devices.
        student: with its loss.
        stream: what it is trained on.
        reading: how it reads what the caches hold.
        on_progress: called at each logged step.
        report: called with what a user should know.
    """
    options = plan.options
    steps = steps_of(options, stream)
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    evaluates = bool(plan.eval_caches)
    every = options.save_steps or stream.steps
    callbacks: list[TrainerCallback] = [
        StopOnSignal(),
        MetricsCallback(plan.out, on_progress),
        SlowSteps(report),
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
