"""The built-in small classifiers: a bidirectional LSTM over words (Tang et al. 2019, section 3.1).

Embeddings, one LSTM layer in each direction, the last states of both directions side by side, a
ReLU layer, the classes. A tagger has the states of each word there (Huang et al. 2015, without the
CRF). Cost on a CPU: about 1 ms for 1,000 tokens at the default sizes; 1.2 M
parameters besides the embeddings.

They are models of transformers, known to its Auto classes after `import kdcache`
(`kdcache.models`): saved as `config.json` and `model.safetensors`, with their tokenizer next to
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from kdcache.errors import UsageError
from kdcache.models import BiLstmConfig
from kdcache.student.tokens import StudentInfo, label_config, read_embeddings, word_tokenizer
from kdcache.tasks import TASKS

_WORD_OPTIONS = ("tokenizer", "min_count", "max_words", "lower")


class BiLstm(PreTrainedModel):  # type: ignore[misc]
    """What the classifiers share: embeddings, LSTM and the layers on its states.

    Attributes:
        tokenizer: its own words, to be saved with it; None where it reads the teacher's ids.
        pretrained: how many of them began with a vector of a file; None without one.
    """

    config_class = BiLstmConfig

    def __init__(self, config: BiLstmConfig) -> None:
        super().__init__(config)
        self.tokenizer: Any = None
        self.pretrained: int | None = None
        self.embedding = nn.Embedding(
            config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id
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
            self.embedding.weight[config.pad_token_id].zero_()
        self.post_init()
        self.train()

    def init_weights(self) -> None:
        """Keep the weights as they were made: torch's own initialisation is the right one."""

    def train(self, mode: bool = True) -> BiLstm:
        """As every module; frozen word vectors stay so, though loading makes parameters anew."""
        self.embedding.weight.requires_grad_(not self.config.freeze_embeddings)
        super().train(mode)
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        """The word vectors."""
        return self.embedding

    def _states(
        self, input_ids: Tensor, attention_mask: Tensor | None, padding: float
    ) -> tuple[Tensor, Tensor]:
        """States of each token [B, L, 2 H], `padding` behind a row, and the last ones [B, 2 H]."""
        pad_id = self.config.pad_token_id
        if not input_ids.shape[1]:
            input_ids = input_ids.new_full((len(input_ids), 1), pad_id, dtype=torch.int64)
            attention_mask = None
        mask = input_ids != pad_id if attention_mask is None else attention_mask
        lengths = mask.sum(-1).clamp_min(1).cpu()
        words = self.dropout(self.embedding(input_ids))
        packed = pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
        states, (last, _) = self.lstm(packed)
        each, _ = pad_packed_sequence(
            states, batch_first=True, padding_value=padding, total_length=input_ids.shape[1]
        )
        return each, torch.cat([last[-2], last[-1]], -1)

    def _classify(self, states: Tensor) -> Tensor:
        dense = torch.relu(self.dense(self.dropout(states)))
        return self.classes(self.dropout(dense))  # type: ignore[no-any-return]

    def load_embeddings(self, found: Tensor, vectors: Tensor) -> None:
        """Take over pretrained word vectors.

        Args:
            found: bool [vocab_size], which words have one.
            vectors: [vocab_size, embedding_size].
        """
        with torch.no_grad():
            self.embedding.weight[found] = vectors[found].to(self.embedding.weight)
        self.pretrained = int(found.sum())

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the model, and its words if it has its own."""
        super().save_pretrained(save_directory, **options)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(save_directory))


class BiLstmForSequenceClassification(BiLstm):
    """Sequence classifier over words or over a teacher's tokens."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Classify.

        Args:
            input_ids: int [B, L], right-padded; a text without tokens counts as one of padding.
            attention_mask: [B, L], 1 at tokens. Default: where the id is not padding.

        Returns:
            ``logits`` float [B, classes].
        """
        each, last = self._states(input_ids, attention_mask, -torch.inf)
        pooled = each.amax(1) if self.config.pooling == "max" else last
        return SequenceClassifierOutput(logits=self._classify(pooled))


class BiLstmForTokenClassification(BiLstm):
    """Tagger of words or of a teacher's tokens."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> TokenClassifierOutput:
        """Classify each token of what `BiLstmForSequenceClassification` takes; ``logits`` float
        [B, L, classes].
        """
        each, _ = self._states(input_ids, attention_mask, 0.0)
        return TokenClassifierOutput(logits=self._classify(each))


AutoModelForSequenceClassification.register(BiLstmConfig, BiLstmForSequenceClassification)
AutoModelForTokenClassification.register(BiLstmConfig, BiLstmForTokenClassification)


def make_bilstm(
    options: Mapping[str, Any], embeddings: str | Path | None, info: StudentInfo
) -> BiLstm:
    """A new one, with its words; options and embeddings are those of `load_student`.

    Raises:
        UsageError: an unknown option, or what it needs is not there.
    """
    name = TASKS[info.task].auto.replace("AutoModel", "BiLstm")
    kind: type[BiLstm] | None = globals().get(name)
    if kind is None:
        raise UsageError(
            f"bilstm is a classifier; for {info.task} give a Hugging Face folder or a CONFIG.json."
        )
    apart = TASKS[info.task].words
    common = {*PreTrainedConfig().to_dict(), "num_labels"}  # in every config.json: not options
    own = BiLstmConfig().to_dict().keys() - common
    unknown = sorted(options.keys() - common - own - set(_WORD_OPTIONS))
    if unknown:
        known = ", ".join(sorted({*own, *_WORD_OPTIONS}))
        raise UsageError(f"bilstm has no option {', '.join(unknown)}; it knows {known}.")
    sizes = {k: v for k, v in options.items() if k in own and v is not None}
    source = options.get("tokenizer") or "words"
    words = None
    if source == "words":
        if info.texts is None:
            raise UsageError(
                "bilstm builds its vocabulary from texts, and the cache has none. Use the "
                "teacher's tokens (--student-tokenizer teacher)."
            )
        words = word_tokenizer(
            info.texts,
            min_count=options.get("min_count") or 1,
            max_words=options.get("max_words"),
            # The case of a word says something of its tag, such as that it is a name.
            lower=not apart if options.get("lower") is None else bool(options["lower"]),
            apart=apart,
            max_length=None if apart else info.max_length,
        )
    elif source != "teacher":
        raise UsageError(f"bilstm: tokenizer {source!r}; choose words or teacher.")
    vectors = None
    if embeddings is not None:
        if words is None:
            raise UsageError(
                "embeddings are for words, and the teacher's tokens are not words. Leave out "
                "--student-tokenizer teacher, or --embeddings."
            )
        ids = words.get_vocab()
        vectors = read_embeddings(
            embeddings, sorted(ids, key=ids.__getitem__), sizes.get("embedding_size")
        )
        sizes["embedding_size"] = vectors[1].shape[1]
    sizes |= {
        **label_config(info),
        "vocab_size": info.vocab_size if words is None else len(words),
        "pad_token_id": info.pad_id if words is None else 0,
    }
    student = kind(BiLstmConfig(**sizes))
    student.tokenizer = words
    if vectors is not None:
        student.load_embeddings(*vectors)
    return student
