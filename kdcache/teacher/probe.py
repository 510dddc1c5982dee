"""Probes a teacher: rows to try, comparison of logits, and a proof of its output layer.

`Projection` measures what the model's own forward does to its layer's output: the layer returns
random numbers from 0.01 to 500, so a soft-cap, a scale or a bias that real rows would hardly show
is found. A model that does anything else is refused. Then the layer is applied to the states of
real rows and compared with the logits that the teacher gives.

Cost: some ten forwards of at most 5 rows of 256 tokens; for the layer four over 8 tokens, and one
of the rows.
Guarantee: `OutputLayer.logits(states)` are the teacher's own logits, up to the rounding of its
dtype. A fault that moves logits by less than the tolerance of their dtype, or that only rows unlike
those tried show, is not found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.rows import Row
from kdcache.targets import OutputLayer
from kdcache.tasks import IGNORE
from kdcache.teacher.load import kept_loaded
from kdcache.teacher.projection import Projection

TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.1}
"""Share of the logits' spread that rounding may move them by: kernels for other shapes moved those
of a 6-layer encoder by 0.008 in bfloat16, and layers add up."""

_TOKENS = 256
_POSITIONS = 16


def probe_rows(rows: Sequence[Row], *, per_token: bool) -> list[Row]:
    """A few short rows of different lengths: the longest, the shortest, one between, one twice.

    Args:
        rows: to choose from; longer ones are cut.
        per_token: whether labels belong to tokens; some of these are kept.
    """
    order = sorted(rows, key=lambda row: -sum(row.sizes))
    chosen = [_cut(order[i], _TOKENS) for i in {0, len(order) // 2, len(order) - 1}]
    if any(len(set(part)) == 1 for part in zip(*(row.sizes for row in chosen), strict=True)):
        chosen.append(_cut(chosen[0], *(max(1, size // 2) for size in chosen[0].sizes[::-1])))
    chosen.sort(key=lambda row: -sum(row.sizes))
    return [_sparse(row) if per_token else row for row in (chosen[0], *chosen)]


def _cut(row: Row, tokens: int, of_source: int | None = None) -> Row:
    """A row without what lies before its last token, if it is longer than wanted; a source too."""
    if row.source is not None:
        kept = min(of_source or tokens, len(row.source))
        row = replace(row, source=np.concatenate([row.source[: kept - 1], row.source[-1:]]))
    if len(row.input_ids) <= tokens:
        return row

    # Some classifiers look for the token that ends a text.
    def cut(values: Any) -> Any:
        return np.concatenate([values[: tokens - 1], values[-1:]])

    types = None if row.type_ids is None else cut(row.type_ids)
    labels = cut(row.labels) if len(row.labels) == len(row.input_ids) else row.labels
    return replace(row, input_ids=cut(row.input_ids), labels=labels, type_ids=types)


def _sparse(row: Row) -> Row:
    """A row that asks for at most `_POSITIONS` of its tokens, spread over it."""
    at = np.unique(np.linspace(0, len(row.input_ids) - 1, _POSITIONS).astype(int))
    labels = np.full(len(row.input_ids), IGNORE, np.int32)
    labels[at] = 0
    return replace(row, labels=labels)


def with_other_end(row: Row) -> Row:
    """A row with other tokens in its second half, from its own: any id might be special."""
    ids = row.input_ids.copy()
    half = len(ids) // 2
    ids[half:] = row.input_ids[: len(ids) - half][::-1]
    return replace(row, input_ids=ids)


def distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """How far logits are from those wanted, as a share of their spread.

    Args:
        got: logits [n, V] of each row.
        want: the same of the model's own forward; where these are not finite nothing is compared.

    Returns:
        The largest root mean square over the vocabulary of a position's differences.
    """
    spread, worst = 1e-12, 0.0
    for row in want:
        usable = row[row.isfinite().all(-1)]
        if len(usable):
            spread = max(spread, spread_of(usable) ** 2)
    for mine, own in zip(got, want, strict=True):
        usable = own.isfinite().all(-1)
        error = (mine - own)[usable].square().mean(-1)
        if len(error):
            worst = max(worst, float(error.nan_to_num(torch.inf).max()))
    return math.sqrt(worst / spread)


def spread_of(logits: Tensor) -> float:
    """Root mean square of logits [n, V] about the mean of their position, which a softmax does not
    see; of single outputs about 0.
    """
    mean = logits.mean(-1, keepdim=True) if logits.shape[-1] > 1 else 0.0
    return float((logits - mean).square().mean().sqrt())


def check_steady(name: str, want: Sequence[Tensor], tolerance: float) -> None:
    """Refuse a model whose logits of the first row differ from those of the second, the same row.

    Raises:
        UsageError: it draws random numbers.
    """
    moved = distance(want[:1], want[1:2])
    if moved > tolerance:
        raise UsageError(
            f"model {name} is random at inference: run twice on the same row, its logits differ "
            f"by {moved:.2g} of their spread. Name another model."
        )


def check_causal(
    name: str, own: Callable[[Row], Tensor], row: Row, want: Tensor, tolerance: float
) -> None:
    """Other tokens at the end of a row must leave its earlier logits alone.

    Raises:
        UsageError: they do not.
    """
    changed = with_other_end(row)
    early = int((row.labels[: len(row.labels) // 2] != IGNORE).sum())
    moved = distance([own(changed)[:early]], [want[:early]])
    if moved > tolerance:
        raise UsageError(
            f"model {name} is not a causal language model: its logits at a position depend on "
            f"later tokens (changing those moves them by {moved:.2g} of their spread), so its "
            "targets would have seen the answer. Name a causal one; a masked language model is "
            "asked with --task masked-lm."
        )


def check_bidirectional(name: str, own: Callable[[Row], Tensor], row: Row) -> None:
    """Other tokens behind a position must move its logits.

    Raises:
        UsageError: they do not: the model reads in one direction.
    """
    changed = with_other_end(row)
    half = len(row.input_ids) // 2
    if not half or np.array_equal(changed.input_ids, row.input_ids):
        return
    labels = np.full(len(row.input_ids), IGNORE, np.int32)
    labels[half - 1] = 0
    one, other = (own(replace(which, labels=labels)) for which in (row, changed))
    if torch.equal(one, other):
        raise UsageError(
            f"model {name} is not a masked language model: its logits at a position do not depend "
            "on later tokens. Name another, or use --task causal-lm."
        )


def check_source(name: str, own: Callable[[Row], Tensor], row: Row, want: Tensor) -> None:
    """Another source must move the logits.

    Raises:
        UsageError: it does not: the model does not read it.
    """
    assert row.source is not None, "rows of such tasks have one"
    other = row.source.copy()
    other[: len(other) // 2 + 1] = row.input_ids[-1]
    if np.array_equal(other, row.source):
        return
    if torch.equal(own(replace(row, source=other)), want):
        raise UsageError(
            f"model {name} gives the same logits for another source: it does not read it. Name "
            "another model."
        )


_INSTEAD = "Use --codec sample:N, topk:K or dense for this teacher."


def find_layer(model: Any, name: str, inputs: Mapping[str, Tensor], vocab_size: int) -> OutputLayer:
    """The output layer of a language model, on the CPU.

    Args:
        model: in evaluation mode.
        inputs: of a real row, of which some tokens are used.
        vocab_size: V; the layer's further rows are padding and left out.

    Raises:
        UsageError: the model's logits are not an output layer's product with its states, scaled
            and soft-capped by what its configuration names.
    """
    projection = Projection(model, inputs)
    linear = projection.layer
    if linear is None or projection.scale is None:
        raise UsageError(
            f"model {name} does more to its logits than a plain output layer, a scale and a "
            f"soft-cap that its configuration names, so they cannot be made of its hidden states. "
            f"{_INSTEAD}"
        )
    with kept_loaded(linear):
        weight, bias = (_kept(values, vocab_size) for values in (linear.weight, linear.bias))
    assert weight is not None, "a linear layer has a weight"
    if projection.offset is not None:
        offset = (projection.offset / projection.scale).to(weight)[:vocab_size].cpu()
        bias = offset if bias is None else bias + offset
    return OutputLayer(weight, bias, projection.scale, projection.cap)


def prove_layer(
    layer: OutputLayer, name: str, slices: Iterable[tuple[Tensor, Tensor | None]], tolerance: float
) -> None:
    """Compare a layer's logits with a model's own on real rows.

    Args:
        slices: logits and states of the model.
        tolerance: share of the logits' spread that rounding may move them by.

    Raises:
        UsageError: they differ.
    """
    layer = replace(layer)  # copies in other dtypes go with it
    for logits, states in slices:
        assert states is not None, "a model that is asked for states gives them"
        own = logits.float().cpu()
        moved = distance([layer.logits(states.float().cpu())], [own])
        if moved > tolerance:
            raise UsageError(
                f"model {name}: its output layer applied to its hidden states gives other logits "
                f"than the model (they differ by {moved:.2g} of their spread). {_INSTEAD}"
            )


def _kept(values: Tensor | None, vocab_size: int) -> Tensor | None:
    if values is None:
        return None
    return values.detach()[:vocab_size].to("cpu").contiguous()
