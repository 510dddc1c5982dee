"""Options of the rows of a masked language model: the group that `build`, `plan` and `evaluate`
share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kdcache.choices import MaskUnit
from kdcache.commands.pairs import PairRowOptions
from kdcache.options import option

if TYPE_CHECKING:
    from kdcache.rows import RowSpec


@dataclass(frozen=True, kw_only=True)
class MaskedRowOptions(PairRowOptions):
    """How records become rows, and which tokens of a masked language model's are masked."""

    heading = "Corpus"

    mask_share: float | None = option(
        None,
        help="masked LM: share of the tokens of a row that it has to guess. Default: 0.15.",
        metavar="SHARE",
        above=0,
        below=1,
    )
    mask_unit: MaskUnit = option(
        "token", help="masked LM: choose each `token` by itself, or all those of a `word`."
    )
    mask_seed: int = option(
        0, help="masked LM: seed of the choice, which is by span, row and place."
    )

    def row_spec(
        self, task: str, label_names: tuple[str, ...] | None, *, max_length: int
    ) -> RowSpec:
        """See `RowOptions.row_spec`."""
        spec = super().row_spec(task, label_names, max_length=max_length)
        share = spec.mask_share if self.mask_share is None else self.mask_share
        return replace(spec, mask_share=share, mask_unit=self.mask_unit, mask_seed=self.mask_seed)
