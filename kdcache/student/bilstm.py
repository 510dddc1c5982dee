"""The built-in small classifier: a bidirectional LSTM over words (Tang et al. 2019, section 3.1).

Embeddings, one LSTM layer in each direction, the last states of both directions side by side, a
ReLU layer, the classes. Cost on a CPU: about 1 ms for 1,000 tokens at the default sizes; 1.2 M
parameters besides the embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers.utils import ModelOutput

from kdcache.errors import UsageError
from kdcache.student.words import Vocabulary

MODEL_TYPE = "kdcache-bilstm"
POOLINGS = ("last", "max")


@dataclass(frozen=True)
class BiLstmConfig:
    """Sizes and options of a `BiLstmClassifier`; saved as config.json.

    Attributes:
        vocab_size: rows of the embedding.
        num_labels: classes.
        label_names: their names, in order.
        embedding_size: width of a word's vector.
        hidden_size: width of the LSTM, in each direction.
        layers: LSTM layers.
        dense_size: width of the ReLU layer.
        dropout: probability of dropping an embedding's or a layer's output in training.
        pooling: "last": final states of both directions (the original); "max": maximum over the
            words.
        pad_id: id of padding, where a batch has no attention mask.
        freeze_embeddings: keep the word vectors as they were loaded.
    """

    vocab_size: int
    num_labels: int
    label_names: tuple[str, ...] | None = None
    embedding_size: int = 300
    hidden_size: int = 256
    layers: int = 1
    dense_size: int = 128
    dropout: float = 0.0
    pooling: str = "last"
    pad_id: int = 0
    freeze_embeddings: bool = False

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "num_labels",
            "embedding_size",
            "hidden_size",
            "layers",
            "dense_size",
        )
        wrong = [f"{name} {getattr(self, name)}" for name in sizes if getattr(self, name) < 1]
        if wrong:
            raise UsageError(f"bilstm: {', '.join(wrong)}; every size must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"bilstm: dropout {self.dropout}; it must be at least 0 and below 1.")
        if self.pooling not in POOLINGS:
            raise UsageError(
                f"bilstm: pooling {self.pooling!r}; choose one of {', '.join(POOLINGS)}."
            )
        if self.label_names is not None:
            object.__setattr__(self, "label_names", tuple(self.label_names))
            if len(self.label_names) != self.num_labels:
                raise UsageError(
                    f"bilstm: {len(self.label_names)} label names for {self.num_labels} classes."
                )

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes, as HF configs have them."""
        return dict(enumerate(self.label_names or map(str, range(self.num_labels))))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; HF callbacks log it."""
        return {"model_type": MODEL_TYPE, **asdict(self)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> BiLstmConfig:
        """Read `to_dict`'s form.

        Raises:
            UsageError: an unknown key, or a value out of range.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(value) - known - {"model_type"})
        if unknown:
            raise UsageError(
                f"bilstm has no option {', '.join(unknown)}; it knows {', '.join(sorted(known))}."
            )
        return cls(**{k: v for k, v in value.items() if k in known})


class BiLstmClassifier(nn.Module):
    """Sequence classifier over words or over a teacher's tokens.

    Args:
        config: sizes.
        vocabulary: its own words; None where it reads the teacher's token ids.
    """

    def __init__(self, config: BiLstmConfig, vocabulary: Vocabulary | None = None) -> None:
        super().__init__()
        if vocabulary is not None and len(vocabulary) != config.vocab_size:
            raise UsageError(
                f"bilstm: vocab_size {config.vocab_size}, but the vocabulary has "
                f"{len(vocabulary)} words."
            )
        self.config = config
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(
            config.vocab_size, config.embedding_size, padding_idx=config.pad_id
        )
        self.lstm = nn.LSTM(
            config.embedding_size,
            config.hidden_size,
            config.layers,
            batch_first=True,
            bidirectional=True,
            dropout=config.dropout if config.layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.dense = nn.Linear(2 * config.hidden_size, config.dense_size)
        self.classes = nn.Linear(config.dense_size, config.num_labels)
        # Word vectors of a few tenths, like pretrained ones; unit variance would saturate the LSTM.
        nn.init.normal_(self.embedding.weight, std=0.1)
        with torch.no_grad():
            self.embedding.weight[config.pad_id].zero_()
        self.embedding.weight.requires_grad_(not config.freeze_embeddings)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ModelOutput:
        """Classify.

        Args:
            input_ids: int [B, L], right-padded.
            attention_mask: [B, L], 1 at tokens. Default: where the id is not padding.

        Returns:
            ModelOutput with ``logits`` float [B, classes].
        """
        mask = input_ids != self.config.pad_id if attention_mask is None else attention_mask
        lengths = mask.sum(-1).clamp_min(1).cpu()
        words = self.dropout(self.embedding(input_ids))
        packed = pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
        states, (last, _) = self.lstm(packed)
        if self.config.pooling == "max":
            padded, _ = pad_packed_sequence(states, batch_first=True, padding_value=-torch.inf)
            pooled = padded.amax(1)
        else:
            pooled = torch.cat([last[-2], last[-1]], -1)
        dense = torch.relu(self.dense(self.dropout(pooled)))
        return ModelOutput(logits=self.classes(self.dropout(dense)))

    def load_embeddings(self, found: Tensor, vectors: Tensor) -> None:
        """Take over pretrained word vectors.

        Args:
            found: bool [vocab_size], which words have one.
            vectors: [vocab_size, embedding_size].
        """
        with torch.no_grad():
            self.embedding.weight[found] = vectors[found].to(self.embedding.weight)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write config.json, model.safetensors and, if it has one, vocab.json."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()},
            folder / "model.safetensors",
        )
        if self.vocabulary is not None:
            self.vocabulary.save(folder / "vocab.json")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> BiLstmClassifier:
        """Read what `save_pretrained` wrote.

        Raises:
            UsageError: a file is missing or does not fit the others.
        """
        folder = Path(folder)
        missing = [
            name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()
        ]
        if missing:
            raise UsageError(f"{folder} is not a saved bilstm: {' and '.join(missing)} not found.")
        config = BiLstmConfig.from_dict(json.loads((folder / "config.json").read_text()))
        vocabulary = (
            Vocabulary.load(folder / "vocab.json") if (folder / "vocab.json").is_file() else None
        )
        model = cls(config, vocabulary)
        try:
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except RuntimeError as error:
            raise UsageError(f"{folder}: weights do not fit config.json ({error}).") from error
        return model
