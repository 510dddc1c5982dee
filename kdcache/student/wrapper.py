"""A student whose forward pass returns the distillation loss.

The loss belongs inside `forward`: DDP and FSDP synchronise what happens there, gradient
checkpointing and autocast apply to it, and any training loop can drive it.

Causal language models run their decoder, pick the hidden states of the positions and pass them with
the output projection to `fused_linear_distillation`: whole logits never exist. That is right only
if the model's logits are its projection of these states and nothing else. The first forward pass
checks this on the model's own forward: see `DistilledStudent`. All other models use their own
logits and the reference loss.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from kdcache.errors import UsageError
from kdcache.loss import (
    LossParts,
    check_loss,
    check_names,
    distillation_loss,
    fused_linear_distillation,
    sliced_linear_distillation,
)
from kdcache.targets import SparseTargets, Targets
from kdcache.tasks import CAUSAL_LM, IGNORE, TASKS, positions
from kdcache.teacher.trust import FACTORY_TYPE


@dataclass
class DistillationOutput(ModelOutput):  # type: ignore[misc]
    """What a `DistilledStudent` returns.

    Attributes:
        loss: scalar to differentiate.
        logits: [B, classes] for classification; [B, L, V] for language models if requested with
            them, else None.
        hard_loss: cross-entropy with the labels, not weighted by alpha; detached.
        soft_loss: T^2 times the divergence, not weighted; detached; None where the batch has no
            targets.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hard_loss: Tensor | None = None
    soft_loss: Tensor | None = None


class DistilledStudent(nn.Module):
    """A student and its loss.

    Heads of language models: at the first forward pass the decoder's output is replaced by large
    random states, and the model's logits are compared with its projection of them. Equal: fused
    loss. Equal up to a constant that the model's config names (Cohere, Granite, Falcon-H1): fused
    loss on scaled states. Anything else (Gemma's soft-capping): the model's own logits. States are
    large because soft-capping leaves small logits alone; the comparison costs one forward pass over
    8 tokens, and uses no global random numbers.

    Under DDP, and under FSDP as long as the projection is whole in the root's forward (it belongs
    to the root unit, which is what wrapping by decoder layer does), the loss is fused. Where the
    projection is sharded by itself, the model's own forward makes the logits.

    Args:
        student: what `load_student` returns.
        task: CAUSAL_LM or "sequence-classification".
        alpha: weight of the hard loss; may be set between steps, and a batch's own `alpha` wins.
        divergence: see `kdcache.loss.distillation_loss`; what a batch's targets do not fit is
            refused.
        tail: for top-k targets, "bucket" or "renormalize".
        vocab_size: ids of the cache's vocabulary; later columns of the student are padding.

    Raises:
        UsageError: an unknown task, divergence or tail, or alpha is not from 0 to 1.
    """

    def __init__(
        self,
        student: nn.Module,
        task: str,
        *,
        alpha: float = 0.5,
        divergence: str = "forward-kl",
        tail: str = "bucket",
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        if task not in TASKS:
            raise UsageError(f"task {task!r} is unknown; it is {' or '.join(TASKS)}.")
        if not 0 <= alpha <= 1:
            raise UsageError(f"alpha is {alpha:g}; the weight of the hard loss is from 0 to 1.")
        check_names(divergence, tail)
        self.student = student
        self.task = task
        self.alpha: float | Tensor = alpha
        self.divergence = divergence
        self.tail = tail
        self.vocab_size = vocab_size
        self._head_scale: float | None = None  # None: not known yet; nan: not a plain head
        self._body = 0  # which of `_bodies` the head's input comes from

    @property
    def config(self) -> Any:
        """The student's config if it is one of Hugging Face's, which trainers read and change."""
        config = getattr(self.student, "config", None)
        return config if isinstance(config, PreTrainedConfig) else None

    @property
    def accepts_loss_kwargs(self) -> bool:
        """For the HF Trainer: whether its count of labels is this loss's count.

        True for language models, where every position has a label. A classifier's loss also counts
        rows without one.
        """
        return self.task == CAUSAL_LM

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
        save = getattr(self.student, "save_pretrained", None)
        if save is not None:
            save(save_directory, **options)
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        made_by = getattr(self.student, "kdcache_factory", {})
        (folder / "config.json").write_text(
            json.dumps({"model_type": FACTORY_TYPE, **made_by}, indent=2) + "\n"
        )
        save_model(self.student, str(folder / "model.safetensors"))

    def forward(
        self,
        labels: Tensor | None = None,
        targets: Targets | None = None,
        *,
        alpha: float | Tensor | None = None,
        count: float | Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        return_logits: bool = False,
        **inputs: Any,
    ) -> DistillationOutput:
        """The loss of a batch.

        Args:
            labels: int [B, L] aligned with the logits, -100 where there is no position (language
                models); or [B], -100 at rows without a label.
            targets: those of all P positions in row-major order, or None to train on hard labels
                alone.
            alpha: weight of the hard loss, one number. Default: the student's own.
            count: divisor of the loss. Default: P.
            num_items_in_batch: that of a whole step of several batches, which is stronger.
            return_logits: for language models: return all logits too, which takes their memory.
            inputs: the student's, such as `input_ids` and `attention_mask`; those that its forward
                does not name are left out.

        Returns:
            DistillationOutput.

        Raises:
            UsageError: no labels, targets of other positions, a divergence that the targets do not
                fit, a student of another width.
        """
        if labels is None:
            raise UsageError("the batch has no labels; give -100 for rows without one.")
        alpha = self.alpha if alpha is None else alpha
        count = count if num_items_in_batch is None else num_items_in_batch
        if isinstance(alpha, Tensor) and alpha.numel() != 1:
            raise UsageError(f"alpha has shape {tuple(alpha.shape)}; it must be one number.")
        causal = self.task == CAUSAL_LM
        flat = labels.reshape(-1)
        # Before the student's own work: reading the number of positions waits for the device, and
        # now it is idle.
        places = positions(flat, self.task).nonzero().squeeze(-1) if causal else None
        n = len(flat) if places is None else len(places)
        soft = targets is not None
        if targets is None:
            # Hard labels alone are targets without entries and without weight.
            nothing = torch.zeros((n, 0), device=flat.device)
            targets = SparseTargets(nothing.long(), nothing, nothing.sum(-1), False, 1.0)
            alpha = 1.0
            count = (flat != IGNORE).sum().clamp_min(1) if count is None else count
        divergence = self.divergence if soft else "forward-kl"
        check_loss(targets, divergence=divergence, tail=self.tail)
        if len(targets) != n:
            raise UsageError(
                f"the batch has {len(targets)} soft targets for {n} positions: targets and labels "
                "are not of the same rows."
            )
        targets = targets.to(flat.device)
        options: dict[str, Any] = {
            "alpha": alpha,
            "divergence": divergence,
            "tail": self.tail,
            "vocab_size": self.vocab_size if causal else None,
            "count": count,
        }
        logits = None
        head = self._head() if places is not None and not return_logits else None
        if places is None:
            logits = _logits(self._call(self.student, inputs))
            parts = distillation_loss(logits, flat, targets, **options)
        elif head is None:
            logits = _logits(self._call(self.student, inputs))
            parts = distillation_loss(_pick(logits, places), flat[places], targets, **options)
        else:
            hidden = _states(self._call(self._bodies()[self._body], inputs))
            parts = self._fused(_pick(hidden, places), head, flat[places], targets, options)
        keep = logits if not causal or return_logits else None
        return DistillationOutput(parts.total, keep, parts.hard, parts.soft if soft else None)

    def _fused(
        self,
        hidden: Tensor,
        head: nn.Linear,
        labels: Tensor,
        targets: Targets,
        options: Mapping[str, Any],
    ) -> LossParts:
        function = (
            fused_linear_distillation
            if options["divergence"] == "forward-kl"
            else sliced_linear_distillation
        )
        if self._head_scale is not None and self._head_scale != 1:
            hidden = hidden * self._head_scale
        return function(hidden, head.weight, head.bias, labels, targets, **options)

    def _call(self, module: Any, inputs: Mapping[str, Any]) -> Any:
        """Run a module with the inputs that it names."""
        names = inspect.signature(module.forward).parameters
        given = {k: v for k, v in inputs.items() if k in names}
        pad_id = getattr(_text_config(self.config), "pad_token_id", None)
        mask, ids = inputs.get("attention_mask"), given.get("input_ids")
        if self.task != CAUSAL_LM and pad_id is not None and mask is not None and ids is not None:
            # Decoders that classify look for the last id that is not their own padding.
            given["input_ids"] = torch.where(mask.bool(), ids, pad_id)
        if self.task == CAUSAL_LM and "use_cache" in names:
            given["use_cache"] = False
        return module(**given)

    def _head(self) -> nn.Linear | None:
        """The output projection, if the logits are its product with the last hidden states."""
        getter = getattr(self.student, "get_output_embeddings", None)
        head = None if getter is None else getter()
        bodies = self._bodies()
        if type(head) is not nn.Linear or not bodies:
            return None
        whole = (head.out_features, head.in_features)
        if tuple(head.weight.shape) != whole or hasattr(head.weight, "device_mesh"):
            return None
        if self._head_scale is None:
            for self._body, body in enumerate(bodies):
                self._head_scale = self._measure_head(body, head)
                if not math.isnan(self._head_scale):
                    break
        return None if self._head_scale is None or math.isnan(self._head_scale) else head

    def _bodies(self) -> list[nn.Module]:
        """The modules whose output may be the head's input (OPT passes its own base model by)."""
        getter = getattr(self.student, "get_decoder", lambda: None)
        found = (getattr(self.student, "base_model", None), getter())
        return [
            m for m in dict.fromkeys(found) if isinstance(m, nn.Module) and m is not self.student
        ]

    @torch.no_grad()
    def _measure_head(self, body: nn.Module, head: nn.Linear) -> float:
        """The constant by which the model multiplies its projected last states; nan if none."""
        weight = head.weight
        states = torch.randn((1, 8, head.in_features), generator=torch.Generator().manual_seed(0))
        states = states.to(weight)
        size = F.linear(states, weight).float().square().mean().sqrt()
        states = states * (40 / size.clamp_min(1e-3)).to(weight)

        def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, ModelOutput) and "last_hidden_state" in output:
                output["last_hidden_state"] = states
                return output
            return (states, *output[1:]) if isinstance(output, tuple) else output

        # Dropout would draw random numbers, and a resumed run would draw them once more.
        modes = [(module, module.training) for module in self.student.modules()]
        self.student.eval()
        hook = body.register_forward_hook(replace)
        try:
            ids = torch.zeros((1, 8), dtype=torch.int64, device=weight.device)
            own = _logits(
                self._call(self.student, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            )
        finally:
            hook.remove()
            for module, mode in modes:
                module.training = mode
        own, plain = own.double(), head(states).double()
        if own.shape != plain.shape:
            return float("nan")
        scale = float((own * plain).sum() / plain.square().sum())
        if not (own - scale * plain).square().mean() <= (0.02 * scale) ** 2 * plain.square().mean():
            return float("nan")
        if abs(scale - 1) < 5e-3:
            return 1.0
        for name, value in vars(_text_config(self.config)).items():
            if ("logit" in name or "lm_head" in name) and isinstance(value, (int, float)) and value:
                for known in (float(value), 1 / value):
                    if abs(scale - known) < 5e-3 * abs(known):
                        return known
        # A constant without a name may be a parameter that learns.
        return float("nan")


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _logits(output: Any) -> Tensor:
    """The logits in the output of a student's forward."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple):
        found = output[0]
    if not isinstance(found, Tensor):
        raise UsageError(
            f"the student's forward returned {type(output).__name__} without logits; return a "
            "tensor or an output with `logits`."
        )
    return found


def _states(output: Any) -> Tensor:
    hidden = output["last_hidden_state"] if isinstance(output, Mapping) else output[0]
    assert isinstance(hidden, Tensor)
    return hidden


def _pick(values: Tensor, places: Tensor) -> Tensor:
    """Rows [P, ...] of values [B, L, ...] at flat indices; a view if all are requested."""
    flat = values.flatten(0, 1)
    return flat if len(places) == len(flat) else flat.index_select(0, places)
