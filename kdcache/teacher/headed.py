"""A classifier with one ReLU layer between a Hugging Face encoder and the classes.

It is a model of transformers, known to its Auto classes after `import kdcache`
(`kdcache.models`): `config.json` holds the encoder's configuration under `encoder`,
`model.safetensors` the weights `encoder.*`, `hidden.weight` [W, H], `hidden.bias` [W],
`classes.weight` [C, W] and `classes.bias` [C].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import SequenceClassifierOutput

from kdcache.models import HeadedConfig
from kdcache.tasks import SEQUENCE_CLASSIFICATION, TASKS

_ONE_CLASS = TASKS[SEQUENCE_CLASSIFICATION].problem


class HeadedForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """Encoder, one ReLU layer, classes.

    The layer reads the encoder's `pooler_output` if it has a pooler, else the last state of the
    first token.

    Args:
        encoder: one with its weights. Default: a new one of that configuration.
    """

    config_class = HeadedConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    # What the encoder can do is checked when it is made.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: HeadedConfig, encoder: Any = None) -> None:
        super().__init__(config)
        if encoder is None:
            encoder = AutoModel.from_config(config.encoder, trust_remote_code=False)
        self.encoder = encoder
        config.encoder = encoder.config
        self.hidden = nn.Linear(config.encoder.hidden_size, config.head_width)
        self.classes = nn.Linear(config.head_width, config.num_labels)
        self.dropout = nn.Dropout(config.head_dropout)
        self.post_init()

    def init_weights(self) -> None:
        """Keep the weights as they were made: the encoder's own, and torch's for the layers."""

    def forward(
        self,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        **inputs: Tensor,
    ) -> SequenceClassifierOutput:
        """Classify.

        Args:
            labels: int [B]; gives the output a mean cross-entropy `loss`. Of another
                `problem_type`, as transformers has it: float [B, classes], or [B] of scores.
            num_items_in_batch: what the sum is divided by where several batches make one step.

        Returns:
            `logits` float [B, classes], and `loss` with labels.
        """
        outputs = self.encoder(**inputs)
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None:
            pooled = outputs.last_hidden_state[:, 0]
        hidden = torch.relu(self.hidden(self.dropout(pooled)))
        logits = self.classes(self.dropout(hidden))
        loss = None
        if labels is not None and self.config.problem_type in (None, _ONE_CLASS):
            total = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            loss = total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        elif labels is not None:
            loss = ForSequenceClassificationLoss(labels, logits.float(), self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)


AutoModelForSequenceClassification.register(HeadedConfig, HeadedForSequenceClassification)
