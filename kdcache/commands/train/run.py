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
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerState

from kdcache import __version__
from kdcache.cache.figures import teacher_cross_entropy
from kdcache.commands.run_folder import (
    RESULT_FILE,
    SCRATCH,
    TrainResult,
    cut_metrics,
    seconds_before,
)
from kdcache.commands.train.card import CARD_FILE, model_card
from kdcache.commands.train.prepare import RunPlan
from kdcache.commands.train.student import (
    check_lengths,
    labels_of,
    lengths_warning,
    make_student,
    make_trainer,
    texts_of,
    train_stream,
    trial_batch,
)
from kdcache.files import filled_folder, write_json, write_text
from kdcache.humanize import shares
from kdcache.metrics import LOSS_PARTS
from kdcache.stream import TargetStream
from kdcache.stream.batch import CachedIds, Reading
from kdcache.student import DistilledStudent
from kdcache.student.checkpoints import read_state
from kdcache.student.one_answer import little_learnt
from kdcache.student.padding import check_documents, check_pairs, check_rows
from kdcache.student.precision import Computing
from kdcache.student.tokens import unknown_share
from kdcache.student.trainer import DistillationTrainer
from kdcache.tasks import TASKS
from kdcache.teacher import quiet_transformers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A prepared run, whose student has been checked."""

    plan: RunPlan
    trainer: DistillationTrainer
    student: DistilledStudent
    stream: TargetStream
    reading: Reading
    resume: Path | None
    caching: bool | None

    @classmethod
    def prepare(cls, plan: RunPlan) -> Run:
        """Load the student and make its trainer, in this process (one of several, where
        torch.distributed is set up).
        """
        report = plan.report
        computing = Computing.choose(plan.options.precision, plan.options.gpus_per_worker)
        student, reading = make_student(plan)
        if reading.needless:
            report("the student has the teacher's tokenizer: it needs no --cross-tokenizer")
        with quiet_transformers():
            stream = train_stream(plan, reading, computing.gpu)
            if (mix := plan.mix(stream)) is not None:
                report(f"rows of an epoch: {shares(mix)}")
            if getattr(student.config, "output_router_logits", False):
                report(
                    "the student's config.json asks for the loss by which its routers are balanced "
                    "(output_router_logits); it is no part of this training's loss"
                )
            caching = getattr(student.config, "use_cache", None)
            trainer = make_trainer(plan, computing, student, stream, reading)
            trial = trial_batch(plan, reading)
            student.check_reach(trial)
            if isinstance(reading, CachedIds):
                check_lengths(plan, student)
                if plan.options.batch_size > 1 and (warning := lengths_warning(plan, student)):
                    report(warning)
            if plan.options.batch_size > 1:
                check = check_pairs if "decoder_input_ids" in trial else check_rows
                check(plan.options.student, student, trial)
            student.checks_padding = False
            if any(cache.spec.apart for cache in (*plan.caches, *plan.eval_caches)):
                check_documents(student.student, trial["input_ids"])
        computing.begin()
        return cls(plan, trainer, student, stream, reading, plan.checkpoint(), caching)

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
            eval=_evaluation(state, best or state.global_step),
            best_step=best,
            seconds=seconds,
            parameters=sum(p.numel() for p in self.student.parameters()),
            trained=sum(p.numel() for p in self.student.parameters() if p.requires_grad),
            **_teacher(plan),
            **_own_vocabulary_figures(plan, self.reading, trainer),
            epoch_rows=plan.mix(self.stream),
            pretrained=getattr(self.student.student, "pretrained", None),
        )
        if trainer.is_world_process_zero():
            result = _judged(plan, self.student, result)
        with quiet_transformers():
            _save(plan, trainer, self.reading, result)
        if trainer.is_world_process_zero():
            plan.folder.finish()
        plan.folder.clear()
        return result


def _judged(plan: RunPlan, student: DistilledStudent, result: TrainResult) -> TrainResult:
    """A result with the figures of one answer for all, and a warning where it is hardly better."""
    if plan.options.cross_tokenizer is not None:  # its labels are other tokens
        return result
    how: dict[str, Any] = {}
    if TASKS[student.task].answers == "score":
        how = {"divergence": student.divergence, "huber_delta": student.huber_delta}
    one = labels_of(plan.eval_caches or plan.caches).figures(**how)
    found: dict[str, float | None] = {**result.eval} or {"hard_loss": result.hard_loss}
    where = "on the evaluation caches" if result.eval else "in the last steps"
    warning = little_learnt(student.task, found, one, where, result.steps)
    if warning:
        logger.warning("%s", warning.removesuffix("."))
    return dataclasses.replace(result, one_answer=one, warning=warning)


def _teacher(plan: RunPlan) -> dict[str, Any]:
    """The teacher's cross-entropy on the student's labels; unknown where these are other tokens."""
    if plan.options.cross_tokenizer is not None:
        return {}
    return {
        "teacher_cross_entropy": teacher_cross_entropy(plan.caches, plan.options.weights),
        "eval_teacher_cross_entropy": teacher_cross_entropy(plan.eval_caches),
    }


def _own_vocabulary_figures(
    plan: RunPlan, reading: Reading, trainer: DistillationTrainer
) -> dict[str, Any]:
    """Size of a student's own vocabulary, what it does not know, and what it had no labels for."""
    own, held_out = reading.tokenizer, plan.eval_caches
    if own is None:
        return {}
    if reading.vocab_size is not None:
        lost, cut = trainer.left_out().tolist()
        return {"vocabulary": reading.vocab_size, "lost": lost or None, "cut": cut or None}
    return {
        "vocabulary": len(own),
        "unknown": unknown_share(own, texts_of(plan.caches)),
        "eval_unknown": unknown_share(own, texts_of(held_out)) if held_out else None,
    }


def _rows(stream: TargetStream) -> int:
    cursor = stream.cursor
    epoch = stream.steps * stream.batch_size if stream.drop_last else stream.rows
    return cursor.epoch * epoch + cursor.rows_seen


def _evaluation(state: TrainerState, step: int) -> dict[str, float]:
    """The figures of the evaluation at a step, if there was one."""
    for line in state.log_history:
        if line["step"] == step and "eval_loss" in line:
            return {
                name.removeprefix("eval_"): value
                for name, value in line.items()
                if name.startswith("eval_") and name != "eval_runtime"
            }
    return {}


def _save(
    plan: RunPlan, trainer: DistillationTrainer, reading: Reading, result: TrainResult
) -> None:
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
        tokenizer = reading.saved_tokenizer(plan.caches[0])
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        document = {
            "kdcache": __version__,
            "options": plan.options.shown(),
            "identity": plan.finished_identity,
            "result": dataclasses.asdict(result),
        }
        card = model_card(plan, result, getattr(student.config, "model_type", None))
        write_text(folder / CARD_FILE, card)
        write_json(folder / RESULT_FILE, document)
