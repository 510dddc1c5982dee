"""A classifier with one ReLU layer between a Hugging Face encoder and the classes.

No saved Hugging Face model reloads with such a layer of free width, so the folder is the encoder's
own plus one file:

    config.json, model.safetensors   the encoder, as `save_pretrained` writes it; `id2label` names
                                     the classes
    tokenizer files
    kdcache_head.safetensors         `hidden.weight` [W, H], `hidden.bias` [W],
                                     `classes.weight` [C, W], `classes.bias` [C]; metadata:
                                     `format: kdcache-head`, `version: 1`, `pooling: pooler` (the
                                     encoder's `pooler_output`) or `first` (the last state of the
                                     first token)

`load_classifier` reads both kinds of folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from kdcache.errors import UsageError

HEAD_FILE = "kdcache_head.safetensors"
_FORMAT, _VERSION = "kdcache-head", "1"


class HeadedClassifier(nn.Module):
    """Encoder, one ReLU layer, classes.

    Args:
        encoder: a Hugging Face encoder without a head; its config's `id2label` names the classes.
        width: units of the ReLU layer.
        dropout: in training, before either layer.
    """

    def __init__(self, encoder: Any, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = encoder
        self.hidden = nn.Linear(encoder.config.hidden_size, width)
        self.classes = nn.Linear(width, encoder.config.num_labels)
        self.dropout = nn.Dropout(dropout)
        self.pooling = "pooler" if getattr(encoder, "pooler", None) is not None else "first"

    @property
    def config(self) -> Any:
        """The encoder's configuration."""
        return self.encoder.config

    def forward(
        self,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        **inputs: Tensor,
    ) -> SequenceClassifierOutput:
        """Classify.

        Args:
            labels: int [B]; gives the output a mean cross-entropy `loss`.
            num_items_in_batch: what the sum is divided by where several batches make one step.
            inputs: the encoder's: `input_ids`, `attention_mask`, `token_type_ids`, ...

        Returns:
            `logits` float [B, classes], and `loss` with labels.
        """
        outputs = self.encoder(**inputs)
        pooled = (
            outputs.pooler_output if self.pooling == "pooler" else outputs.last_hidden_state[:, 0]
        )
        hidden = torch.relu(self.hidden(self.dropout(pooled)))
        logits = self.classes(self.dropout(hidden))
        loss = None
        if labels is not None:
            total = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            loss = total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the encoder and `kdcache_head.safetensors`."""
        self.encoder.save_pretrained(save_directory, **options)
        head = {
            name: value.detach().cpu().contiguous()
            for name, value in self.state_dict().items()
            if not name.startswith("encoder.")
        }
        metadata = {"format": _FORMAT, "version": _VERSION, "pooling": self.pooling}
        save_file(head, Path(save_directory, HEAD_FILE), metadata=metadata)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> HeadedClassifier:
        """Read what `save_pretrained` wrote.

        Args:
            folder: the folder.
            options: for `AutoModel.from_pretrained`, such as `dtype` or `trust_remote_code`.

        Raises:
            UsageError: the head is of another format, or does not fit the encoder.
        """
        path = Path(folder, HEAD_FILE)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if (metadata.get("format"), metadata.get("version")) != (_FORMAT, _VERSION):
            raise UsageError(
                f"{path} is {metadata.get('format')} version {metadata.get('version')}, expected "
                f"{_FORMAT} version {_VERSION}."
            )
        weights = load_file(path)
        encoder = AutoModel.from_pretrained(folder, **options)
        model = cls(encoder, len(weights["hidden.bias"]))
        model.pooling = metadata["pooling"]
        own = {name: value for name, value in model.state_dict().items() if name in weights}
        if any(own[name].shape != value.shape for name, value in weights.items() if name in own):
            raise UsageError(f"{path} does not fit config.json beside it: other sizes.")
        model.load_state_dict(weights, strict=False)
        return model.to(next(encoder.parameters()).dtype)


def load_classifier(folder: str | Path, **options: Any) -> Any:
    """A sequence classifier from a folder (or hub id), with or without a kdcache head.

    Args:
        folder: where it is.
        options: for `from_pretrained`.
    """
    if Path(folder, HEAD_FILE).is_file():
        return HeadedClassifier.from_pretrained(folder, **options)
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)
