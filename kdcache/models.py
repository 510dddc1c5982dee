"""Registers the configurations of kdcache's own models with transformers.

    import kdcache
    model = AutoModelForSequenceClassification.from_pretrained(RUN)

`kdcache/__init__.py` imports this module as soon as transformers' table of configurations is
loaded. A configuration imports its model when it is made, so that `import kdcache` and `AutoConfig`
stay fast: nothing here needs torch.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from kdcache.errors import UsageError

BILSTM = "kdcache-bilstm"
HEADED = "kdcache-headed"
POOLINGS = ("last", "max")


class BiLstmConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes and options of a `BiLstmForSequenceClassification`; `id2label` names the classes.

    Args:
        embedding_size: width of a word's vector.
        hidden_size: width of the LSTM, in each direction.
        dense_size: width of the ReLU layer.
        pooling: "last": final states of both directions (the original); "max": maximum over the
            words.
        pad_token_id: id of padding, where a batch has no attention mask.
        freeze_embeddings: keep the word vectors as they were loaded.

    Raises:
        UsageError: a value out of range.
    """

    model_type: ClassVar[str] = BILSTM

    def __init__(
        self,
        vocab_size: int = 30_000,
        embedding_size: int = 300,
        hidden_size: int = 256,
        layers: int = 1,
        dense_size: int = 128,
        dropout: float = 0.0,
        pooling: str = "last",
        pad_token_id: int = 0,
        freeze_embeddings: bool = False,
        **options: Any,
    ) -> None:
        sizes = {
            "vocab_size": vocab_size,
            "embedding_size": embedding_size,
            "hidden_size": hidden_size,
            "layers": layers,
            "dense_size": dense_size,
        }
        wrong = [f"{name} {size}" for name, size in sizes.items() if size < 1]
        if wrong:
            raise UsageError(f"bilstm: {', '.join(wrong)}; every size must be at least 1.")
        if not 0 <= dropout < 1:
            raise UsageError(f"bilstm: dropout {dropout}; it must be at least 0 and below 1.")
        if pooling not in POOLINGS:
            raise UsageError(f"bilstm: pooling {pooling!r}; choose one of {', '.join(POOLINGS)}.")
        super().__init__(**options)
        for name, size in sizes.items():
            setattr(self, name, size)
        self.dropout = dropout
        self.pooling = pooling
        self.pad_token_id = pad_token_id
        self.freeze_embeddings = freeze_embeddings
        importlib.import_module("kdcache.student.bilstm")


class HeadedConfig(PreTrainedConfig):  # type: ignore[misc]
    """An encoder's configuration and the sizes of the layers on it; `id2label` names the classes.

    Args:
        encoder: configuration of the encoder, or its `to_dict`.
        head_width: units of the ReLU layer.
        head_dropout: in training, before either layer.
    """

    model_type: ClassVar[str] = HEADED
    sub_configs: ClassVar[dict[str, Any]] = {"encoder": AutoConfig}

    def __init__(
        self,
        encoder: Any = None,
        head_width: int = 192,
        head_dropout: float = 0.1,
        **options: Any,
    ) -> None:
        if isinstance(encoder, dict):
            encoder = AutoConfig.for_model(**encoder)
        self.encoder = encoder
        self.head_width = head_width
        self.head_dropout = head_dropout
        super().__init__(**options)
        importlib.import_module("kdcache.teacher.headed")

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without where the encoder came from: equal models have equal files."""
        found = dict(super().to_dict())
        for key in ("_name_or_path", "transformers_version"):
            (found.get("encoder") or {}).pop(key, None)
        return found


for _config in (BiLstmConfig, HeadedConfig):
    AutoConfig.register(_config.model_type, _config)
