"""`--lora`: how large an adapter is and which layers it adapts; how adapters are known.

It imports nothing heavy, since options check themselves with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kdcache.errors import UsageError
from kdcache.tasks import (
    CAUSAL_LM,
    MULTI_LABEL_CLASSIFICATION,
    REGRESSION,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)

ADAPTER_CONFIG = "adapter_config.json"
PEFT_TASKS = {
    CAUSAL_LM: "CAUSAL_LM",
    SEQUENCE_CLASSIFICATION: "SEQ_CLS",
    MULTI_LABEL_CLASSIFICATION: "SEQ_CLS",
    REGRESSION: "SEQ_CLS",
    TOKEN_CLASSIFICATION: "TOKEN_CLS",
    SEQ2SEQ_LM: "SEQ_2_SEQ_LM",
}
ALL_LINEAR = "all-linear"
_KEYS = ("r", "alpha", "dropout", "targets")


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter (Hu et al. 2021): a layer's weight W becomes W + (alpha / r) B A.

    Attributes:
        r: rank of A and B.
        alpha: scale of their product, which is divided by r.
        dropout: of the input of A while training.
        targets: names of the linear layers that are adapted, such as `q_proj`, or `all-linear`:
            all but the output layer and a classifier's head.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = (ALL_LINEAR,)

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Read `r=16,alpha=32,targets=q_proj+v_proj`; only r is required.

        Raises:
            UsageError: an unknown key, a value that cannot be.
        """
        form = f"expected such as r=16,alpha=32,dropout=0.05,targets={ALL_LINEAR}."
        values: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = (word.strip() for word in part.partition("="))
            if not (equals and value) or key not in _KEYS or key in values:
                raise UsageError(f"--lora is {text!r}, {form}")
            values[key] = value
        try:
            r = int(values["r"])
            alpha = float(values.get("alpha", 2 * r))
            dropout = float(values.get("dropout", 0))
        except (KeyError, ValueError) as error:
            raise UsageError(f"--lora is {text!r}, {form}") from error
        targets = tuple(t.strip() for t in values.get("targets", ALL_LINEAR).split("+"))
        if r < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1 or not all(targets):
            raise UsageError(
                f"--lora is {text!r}, expected r of at least 1, alpha above 0, dropout from 0 to "
                "below 1, and names of layers."
            )
        if len(targets) > 1 and ALL_LINEAR in targets:
            raise UsageError(f"--lora is {text!r}: {ALL_LINEAR} names all layers. Use it alone.")
        return cls(r, alpha, dropout, tuple(dict.fromkeys(targets)))

    def __str__(self) -> str:
        dropout = f"dropout={self.dropout:g}," if self.dropout else ""
        return f"r={self.r},alpha={self.alpha:g},{dropout}targets={'+'.join(self.targets)}"


def is_adapted(model: Any) -> bool:
    """Whether a model is one of PEFT, of which a part is trained."""
    return getattr(model, "peft_config", None) is not None
