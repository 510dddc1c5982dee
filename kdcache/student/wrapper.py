"""A student with a forward pass that returns the distillation loss.

The loss belongs inside `forward`: DDP and FSDP synchronise what happens there, gradient
checkpointing and autocast apply to it, and any training loop can drive it.

Causal language models run their own forward up to the output layer; the states of the labelled
positions go with the layer's weight to `fused_linear_distillation`, so whole logits never exist.
That is right only if the model's logits are the product of the two, perhaps scaled and capped, and
nothing else, which the first forward pass measures (`kdcache.teacher.projection`). All other models
are right as well, with their own logits and the reference loss.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from kdcache.errors import UsageError
from kdcache.loss import (
    INDEPENDENT,
    Anchor,
    LossParts,
    check_loss,
    check_names,
    chunk_loss,
    distillation_loss,
    fused_linear_distillation,
    label_logprobs,
    linear_logprobs,
    sliced_linear_distillation,
)
from kdcache.student.padding import check_documents, check_first, in_one_row, pick, step_count
from kdcache.targets import DenseTargets, LabelTargets, SparseTargets, Targets
from kdcache.targets.chunks import ChunkTargets
from kdcache.targets.decoded import check_number, no_targets
from kdcache.tasks import TASKS, check_task, labelled, positions
from kdcache.teacher.projection import Projection, call, logits_of, text_config
from kdcache.teacher.quirks import check_reach, decoder_start, reach, with_start
from kdcache.teacher.trust import FACTORY_KEY, FACTORY_TYPE

if TYPE_CHECKING:
    from kdcache.student.positions import PositionRule


@dataclass
class DistillationOutput(ModelOutput):  # type: ignore[misc]
    """What a `DistilledStudent` returns.

    Attributes:
        loss: scalar to differentiate.
        logits: [B, classes] or, of tokens, [B, L, classes] for classification; [B, L, V] for
            language models if requested with them, else None.
        hard_loss: cross-entropy with the labels, summed and divided by the loss's count; not
            weighted by alpha; detached.
        soft_loss: T^2 times the divergence (for sampled targets: times the cross-entropy with the
            teacher), likewise; None if the batch has no targets.
        kl: `soft_loss` of sampled targets at T = 1 less the teacher's entropy, where that is known.
        logprobs: float64 [P], log-probabilities of a language model's labels if requested;
            detached.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hard_loss: Tensor | None = None
    soft_loss: Tensor | None = None
    kl: Tensor | None = None
    logprobs: Tensor | None = None


class DistilledStudent(nn.Module):
    """A student and its loss.

    A language model runs its own forward, and the loss is fused with its output layer where that
    makes its logits, soft-capped or not: see `kdcache.teacher.projection`. Where it does not (an
    adapter on the layer, a compiled model), the loss takes the model's own logits.

    Under DDP, and under FSDP as long as the projection is whole in the root's forward (it belongs
    to the root unit, which is what wrapping by decoder layer does), the loss is fused. Where the
    projection is sharded by itself, the model's own forward makes the logits.

    Attributes:
        start: of a Hugging Face sequence-to-sequence model, what its decoder reads first; None
            reads the rows as they are.
        needs_mask: whether a language model's logits of right-padded rows depend on the attention
            mask; True until `kdcache.student.padding.check_rows` has tried it without.
        checks_padding: whether the next batch of several rows is first tried with padding, and a
            student refused whose logits change; False once that was done.

    Args:
        student: what `load_student` returns.
        task: one of `kdcache.tasks.TASKS`.
        alpha: weight of the hard loss; may be set between steps, and a batch's own `alpha` wins.
        divergence: see `kdcache.loss.distillation_loss`, `label_loss` and `score_loss`; what a
            batch's targets do not fit is refused. Default: the first that the task knows.
        tail: for top-k targets, "bucket" or "renormalize".
        vocab_size: ids of the cache's vocabulary; later columns of the student are padding.
        anchor: theta of anchored targets, 0 to 1; None estimates it from past steps. The loop must
            call `student.anchor.update()` once a step, as `DistillationTrainer` does.
        huber_delta: of divergence "huber", in units of the score.
        positions: of a language model in training: which positions it learns from, and with which
            weights, see `kdcache.student.positions`. Default: all of them. A batch's `hard_labels`
            are never left out.

    Raises:
        UsageError: an unknown task, divergence or tail, alpha or theta is not from 0 to 1, or a
            rule of positions without meaning.
    """

    def __init__(
        self,
        student: nn.Module,
        task: str,
        *,
        alpha: float = 0.5,
        divergence: str | None = None,
        tail: str = "bucket",
        vocab_size: int | None = None,
        anchor: float | None = None,
        huber_delta: float = 1.0,
        positions: PositionRule | None = None,
    ) -> None:
        super().__init__()
        check_task(task)
        if not 0 <= alpha <= 1:
            raise UsageError(f"alpha is {alpha:g}; the weight of the hard loss is from 0 to 1.")
        divergence = divergence or TASKS[task].divergences[0]
        check_names(divergence, tail)
        if positions is not None:
            from kdcache.student.positions import check_rule

            check_rule(positions, task, divergence)
        self.positions = positions
        self.huber_delta = huber_delta
        self.anchor = Anchor(anchor)
        self.student = student
        self.task = task
        self.alpha: float | Tensor = alpha
        self.divergence = divergence
        self.tail = tail
        self.vocab_size = vocab_size
        self.needs_mask = self.checks_padding = True
        self.reach = reach(student)
        self.source_reach = reach(student, "encoder") if TASKS[task].source else None
        self._projection: Projection | None = None
        self._checked: list[nn.Module] = []  # a list: a module here would be another child
        self.start: int | None = None
        whole = getattr(student, "get_base_model", lambda: student)()  # of an adapter
        if TASKS[task].source and isinstance(whole, PreTrainedModel):
            self.start = decoder_start(whole, f"student {type(whole).__name__}")

    @property
    def config(self) -> Any:
        """The student's config if it is one of Hugging Face's, which trainers read and change."""
        config = getattr(self.student, "config", None)
        return config if isinstance(config, PreTrainedConfig) else None

    @property
    def accepts_loss_kwargs(self) -> bool:
        """For the HF Trainer: whether its count of labels is this loss's count.

        True where labels belong to tokens: every position has one. The loss of a task whose labels
        belong to rows counts those without one, too.
        """
        return TASKS[self.task].per_token

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Pass on to a Hugging Face student, under the name that its version has.

        Raises:
            UsageError: the student cannot.
        """
        student: Any = self.student
        if hasattr(student, "activation_checkpointing_enable"):
            student.activation_checkpointing_enable(activation_checkpointing_kwargs, **options)
        elif hasattr(student, "gradient_checkpointing_enable"):
            student.gradient_checkpointing_enable(activation_checkpointing_kwargs)
        else:
            raise UsageError(
                f"{type(student).__name__} has no gradient checkpointing. Train without it."
            )

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """The same under its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Undo `gradient_checkpointing_enable`."""
        student: Any = self.student
        if hasattr(student, "activation_checkpointing_disable"):
            student.activation_checkpointing_disable()
        else:
            student.gradient_checkpointing_disable()

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the inner student in its own format: `load_student(folder, info)` reads it.

        Args:
            save_directory: folder; made if need be.
            options: for a student's own `save_pretrained`, such as `state_dict` under FSDP.
        """
        folder = Path(save_directory)
        save = getattr(self.student, "save_pretrained", None)
        made_by = getattr(self.student, "kdcache_factory", {})
        if save is not None:
            if getattr(self.student, "kdcache_changed", False):
                options = {"max_shard_size": "100TB", **options}  # `load_student` reads one file
            save(save_directory, **options)
            if getattr(self.student, "kdcache_changed", False):
                config = json.loads((folder / "config.json").read_text()) | {FACTORY_KEY: made_by}
                config.pop("quantization_config", None)  # what is saved are floats
                (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            adapter = getattr(self.student, "kdcache_adapter", None)
            if adapter is not None:
                from kdcache.teacher.adapter import complete_adapter

                complete_adapter(folder, adapter)
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(
            json.dumps({"model_type": FACTORY_TYPE, **made_by}, indent=2) + "\n"
        )
        save_model(self.student, str(folder / "model.safetensors"))

    def check_reach(self, inputs: Mapping[str, Any]) -> None:
        """Refuse rows beyond the student's table of positions.

        Raises:
            UsageError: a row is longer than it reads.
        """
        ids, decoder = inputs.get("input_ids"), inputs.get("decoder_input_ids")
        if ids is not None and "position_ids" not in inputs:
            sources = 0 if decoder is None else ids.shape[-1]
            self.check_lengths((ids if decoder is None else decoder).shape[-1], sources)

    def check_lengths(self, tokens: int, sources: int = 0) -> None:
        """The same of the longest row and the longest source."""
        check_reach("the student", (tokens, self.reach), (sources, self.source_reach))

    def forward(
        self,
        labels: Tensor | None = None,
        targets: Targets | ChunkTargets | LabelTargets | None = None,
        *,
        alpha: float | Tensor | None = None,
        count: float | Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        return_logits: bool = False,
        return_logprobs: bool = False,
        label_positions: Tensor | None = None,
        hard_labels: Tensor | None = None,
        label_logprob: Tensor | None = None,
        teacher_entropy: Tensor | None = None,
        first_tokens: Tensor | None = None,
        **inputs: Any,
    ) -> DistillationOutput:
        """The loss of a batch.

        Args:
            labels: int [B, L] aligned with the logits, -100 where there is no position, and -101 at
                one without a hard label; or [B], -100 at rows without a label; of several labels a
                row [B, C]; of scores float [B], NaN at rows without one.
            targets: those of all P positions in row-major order, or None to train on hard labels
                alone. `ChunkTargets` are for language models with a tokenizer of their own,
                `LabelTargets` for a policy gradient.
            alpha: weight of the hard loss, one number. Default: the student's own.
            count: divisor of the loss. Default: P.
            num_items_in_batch: that of a whole step of several batches, which is stronger.
            return_logits: for language models: return all logits too, which takes their memory.
            return_logprobs: for language models: return the log-probabilities of the labels too.
            label_positions: int64 [P], where `labels.reshape(-1)` has positions, from a caller who
                knows (see `host_positions`); finding them here makes the host wait for the device.
            hard_labels: of language models, int [B, L]: labels at further positions, which have no
                target and train on the hard loss alone. The count must include them.
            label_logprob: float [P], of the teacher: for a rule of positions.
            teacher_entropy: float [P] at T = 1: for one, too; of sampled targets at T = 1 it gives
                the KL.
            first_tokens: the loss does not need them.
            inputs: the student's, such as `input_ids` and `attention_mask`; those that its forward
                does not name are left out.

        Raises:
            UsageError: no labels, targets of other positions, a divergence that the targets do not
                fit, a student of another width, or one that reads padding.
        """
        if labels is None:
            raise UsageError("the batch has no labels; give -100 for rows without one.")
        self.check_reach(inputs)
        raw = inputs
        alpha = self.alpha if alpha is None else alpha
        count = step_count(count, num_items_in_batch, hard_labels)
        if isinstance(alpha, Tensor) and alpha.numel() != 1:
            raise UsageError(f"alpha has shape {tuple(alpha.shape)}; it must be one number.")
        kind = TASKS[self.task]
        per_token, over_ids = kind.per_token, kind.over_ids
        flat = labels.reshape(-1) if per_token else labels
        shape = labels.shape
        if kind.source and "decoder_input_ids" in inputs:
            decoder = with_start(inputs["decoder_input_ids"], labels, self.start)
            inputs = {**inputs, "decoder_input_ids": decoder}
        masked = inputs.get("attention_mask") is not None  # who gives a mask keeps documents apart
        if per_token and "position_ids" in inputs and not masked:
            inputs, labels = self._apart(inputs, labels)
        # Before the student's own work: reading the number of positions waits for the device, and
        # now it is idle.
        at = label_positions
        if per_token and at is None:
            at = positions(flat, self.task).nonzero().squeeze(-1)
        n = len(flat) if at is None else len(at)
        soft = targets is not None
        if kind.answers in INDEPENDENT:
            return self._independent(labels, targets, inputs, alpha, count)
        if targets is None:
            targets, alpha = no_targets(n, flat.device), 1.0
            count = labelled(flat, self.task).sum().clamp_min(1) if count is None else count
        divergence = self.divergence if soft else "forward-kl"
        rule = self.positions if self.training else None
        if isinstance(targets, ChunkTargets):
            divergence = "forward-kl"
            if rule is not None:
                raise UsageError("positions cannot be chosen where chunks join several of them.")
        else:
            check_loss(targets, divergence=divergence, tail=self.tail, answers=kind.answers)
        check_number(targets, n)
        self._check_padding(labels, raw)
        targets = targets.to(flat.device)
        width = self.vocab_size if over_ids else None
        options: dict[str, Any] = {
            "alpha": alpha,
            "divergence": divergence,
            "tail": self.tail,
            "vocab_size": width,
            "count": count,
        }
        anchor = self.anchor if self.training else None
        plain: Callable[..., LossParts] = functools.partial(distillation_loss, anchor=anchor)
        if isinstance(targets, ChunkTargets):
            options = {name: options[name] for name in ("alpha", "vocab_size", "count")}
            plain = chunk_loss
        logits = logprobs = kl = None
        projection = self._project(inputs) if over_ids and not return_logits else None
        layer = None if projection is None else projection.layer
        if at is None:
            logits = logits_of(call(self.student, self._padded_its_way(inputs)))
            parts = plain(logits, flat, targets, **options)
        else:
            if projection is None or layer is None:
                loss = plain
                values = logits = self._of_tokens(logits_of(call(self.student, inputs)), labels)
                if return_logprobs:
                    logprobs = label_logprobs(pick(logits, at)[:, :width], flat[at])
            else:
                loss = self._fused(projection, layer, divergence, anchor)
                values = self._of_tokens(projection.states(layer, inputs), labels)
                if return_logprobs:
                    given = pick(values, at), layer.weight[:width], projection.bias(layer)
                    logprobs = linear_logprobs(*given, flat[at], cap=projection.cap)
            chosen: dict[str, Any] = {}
            if rule is not None:
                from kdcache.student.positions import choose, student_entropies

                assert not isinstance(targets, ChunkTargets), "refused above"
                own = functools.partial(student_entropies, values, at, width, projection, layer)
                some = choose(rule, n, teacher_entropy, label_logprob, own)
                at, targets = at[some.at], targets[some.at]
                count = (n if count is None else count) * some.part
                chosen = {"count": count, "position_weights": some.weights}
                if teacher_entropy is not None:
                    teacher_entropy = some.weighed(teacher_entropy)
            parts = loss(pick(values, at), flat[at], targets, **options | chosen)
            if hard_labels is not None:
                others = hard_labels.reshape(-1)
                at = positions(others, self.task).nonzero().squeeze(-1)
                options |= {"alpha": 1.0, "divergence": "forward-kl"}
                bare = no_targets(len(at), others.device)
                alone = loss(pick(values, at), others[at], bare, **options)
                parts = LossParts(parts.total + alone.total, parts.hard + alone.hard, parts.soft)
        keep = logits if not over_ids or return_logits else None
        if keep is not None and per_token:
            keep = keep.reshape(*shape, -1)
        soft_part = parts.soft if soft else None
        sampled = isinstance(targets, SparseTargets) and not targets.exact
        if soft and sampled and targets.temperature == 1 and teacher_entropy is not None:
            kl = parts.soft - teacher_entropy.to(parts.soft).sum() / (n if count is None else count)
        return DistillationOutput(parts.total, keep, parts.hard, soft_part, kl, logprobs)

    @staticmethod
    def _fused(
        projection: Projection, layer: nn.Linear, divergence: str, anchor: Anchor | None
    ) -> Callable[..., LossParts]:
        """The loss of an output layer's input."""
        linear: Any = sliced_linear_distillation
        if divergence == "forward-kl":
            linear = functools.partial(fused_linear_distillation, anchor=anchor)

        def loss(states: Tensor, labels: Tensor, *targets: Any, **options: Any) -> LossParts:
            made_by = layer.weight, projection.bias(layer)
            found: LossParts = linear(
                states, *made_by, labels, *targets, cap=projection.cap, **options
            )
            return found

        return loss

    def _independent(
        self,
        labels: Tensor,
        targets: Targets | ChunkTargets | LabelTargets | None,
        inputs: Mapping[str, Any],
        alpha: float | Tensor,
        count: float | Tensor | None,
    ) -> DistillationOutput:
        """The loss of answers that are not a distribution; see `forward`."""
        if targets is not None:
            if isinstance(targets, ChunkTargets):
                raise UsageError(f"targets of chunks are for language models, not for {self.task}.")
            check_loss(
                targets,
                divergence=self.divergence,
                tail=self.tail,
                answers=TASKS[self.task].answers,
            )
            assert isinstance(targets, DenseTargets), "the loss is defined on no others"
            check_number(targets, len(labels))
            targets = targets.to(labels.device)
        elif count is None:
            count = labelled(labels, self.task).sum().clamp_min(1)
        self._check_padding(labels, inputs)
        logits = logits_of(call(self.student, self._padded_its_way(inputs)))
        given: Any = {"alpha": alpha, "divergence": self.divergence, "count": count}
        loss = INDEPENDENT[TASKS[self.task].answers].loss
        parts = loss(logits, labels, targets, huber_delta=self.huber_delta, **given)
        return DistillationOutput(
            parts.total, logits, parts.hard, None if targets is None else parts.soft
        )

    def _padded_its_way(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Decoders that classify look for the last id that is not their own padding."""
        pad_id = getattr(text_config(self.config), "pad_token_id", None)
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        if pad_id is None or mask is None or ids is None:
            return inputs
        return {**inputs, "input_ids": torch.where(mask.bool(), ids, pad_id)}

    def _check_padding(self, labels: Tensor, inputs: Mapping[str, Any]) -> None:
        """Try the first batch of several rows with padding."""
        if self.checks_padding and len(labels) > 1 and inputs.get("attention_mask") is not None:
            self.checks_padding, eager = False, cast(Any, torch.compiler.disable)
            eager(check_first)(self, labels, inputs)

    def _apart(self, inputs: Mapping[str, Any], labels: Tensor) -> tuple[dict[str, Any], Tensor]:
        """Inputs and labels of documents that do not attend to each other, as the student keeps
        them apart.
        """
        if self.student not in self._checked:
            check_documents(self.student, inputs["input_ids"])
            self._checked = [self.student]
        given = in_one_row(self.student, inputs)
        return given, labels.reshape(given["position_ids"].shape)

    def _of_tokens(self, values: Tensor, labels: Tensor) -> Tensor:
        """Values [B, L', ...] of the labels' tokens: prompt tuning puts L' - L tokens before them,
        and a Perceiver answers at all its positions, whatever it reads.
        """
        tokens = labels.shape[1]
        extra = values.shape[1] - tokens
        if extra < 0:
            raise UsageError(
                f"the student gives logits of {values.shape[1]} tokens a row, the labels are for "
                f"{tokens}. Its forward must return those of all tokens."
            )
        prompted = not type(self.student).__module__.startswith("transformers.")
        return values[:, extra:] if prompted else values[:, :tokens]

    def _project(self, inputs: Mapping[str, Any]) -> Projection:
        """What the student's logits are made of, measured at its first batch."""
        if self._projection is None or self._projection.student is not self.student:
            self._projection = Projection(self.student, inputs)
        return self._projection
