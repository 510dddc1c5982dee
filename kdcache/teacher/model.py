"""One model of a teacher: batches of rows in, logits of the requested positions out.

The fast way pads the rows of a batch on the right and projects only the requested positions. It is
right for most architectures. `TeacherModel.probe` checks it on a few real rows, and chooses a
slower way if its logits differ from those of the model's own forward on each row alone.

Cost: one forward of the base model a batch; the vocabulary is projected in slices of positions,
only where a position is requested, so `[positions, vocabulary]` never exists whole. Without the
direct projection the model's own forward makes the logits of all positions of a batch.
Guarantee: ids outside the tokenizer's vocabulary (padded output layers) are cut off before the
softmax.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import UsageError, reason_of
from kdcache.rows import Row
from kdcache.rows.batches import pad_rows, padded
from kdcache.targets import OutputLayer
from kdcache.targets.device import outside_mass
from kdcache.targets.output_layer import finish_
from kdcache.tasks import IGNORE, TASKS, positions
from kdcache.teacher.load import TeacherOptions, input_device, kept_loaded
from kdcache.teacher.memory import Slice, slice_positions
from kdcache.teacher.probe import (
    TOLERANCES,
    check_bidirectional,
    check_causal,
    check_source,
    check_steady,
    distance,
    find_layer,
    probe_rows,
    prove_layer,
)
from kdcache.teacher.projection import Projection, call, layer_input
from kdcache.teacher.quirks import decoder_start, length_class, with_start

logger = logging.getLogger(__name__)

Batching = Literal["padded", "equal lengths", "one by one"]


class TeacherModel:
    """A loaded model and the way its logits are computed.

    Attributes:
        direct: whether logits are the output layer applied to the decoder's states, times
            `scale` and soft-capped at `cap`, or plus `offset`, if there is one.
        batching: which rows share a batch: `padded` ones, those of `equal lengths`, or none.
        start: of a sequence-to-sequence model, what its decoder reads first; None of others.
        length_class: what tells rows apart that must not share a padded batch; None if all may.
        layer: what makes its logits of its states, once it is probed; None unless asked for.
    """

    def __init__(self, model: Any, name: str, options: TeacherOptions, vocab_size: int) -> None:
        """Wrap a model.

        Args:
            model: in evaluation mode.
            vocab_size: width of the logits to give: output columns beyond it are cut off.
        """
        self.model, self.name, self.task_name = model, name, options.task
        self.task, self.states = TASKS[options.task], options.states
        self.length_class = length_class(model)
        self.vocab_size = vocab_size
        self.device = input_device(model)
        self.direct = False
        self.scale: float = 1.0
        self.cap: float | None = None
        self.offset: Tensor | None = None
        self._thin = False
        self.layer: OutputLayer | None = None
        self.batching: Batching = "padded"
        self.clipped_mass = torch.zeros((), device=self.device)
        quantised = getattr(model.config, "quantization_config", None) is not None
        self._tolerance = TOLERANCES["bfloat16" if quantised else options.dtype]
        pad_id = getattr(model.config.get_text_config(), "pad_token_id", None)
        self.pad_id = 0 if pad_id is None else int(pad_id)
        self.start = decoder_start(model, f"model {name}") if self.task.source else None

    def slices(self, rows: Sequence[Row]) -> Iterator[Slice]:
        """All positions of a batch, a slice at a time, row by row."""
        if self.batching == "padded":
            for some in self._batches(rows):
                yield from self._slices(some)
        elif self.batching == "equal lengths":
            for _, alike in groupby(rows, lambda row: row.sizes):
                yield from self._slices(list(alike))
        else:
            for row in rows:
                yield from self._slices([row])

    def _batches(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """The rows in order, cut where a padded batch would change what a row has alone: a probe's
        rows are too short to show it.
        """
        if self.length_class is None:
            yield rows
            return
        classify = self.length_class
        for _, alike in groupby(rows, lambda row: [classify(size) for size in row.sizes]):
            yield list(alike)

    def probe(self, rows: Sequence[Row]) -> None:
        """Find the fastest way that gives what the model's own forward gives on a row alone.

        Raises:
            UsageError: there is none, or earlier logits of a language model depend on later tokens.
        """
        sample = probe_rows(rows, per_token=self.task.per_token)
        try:
            want = [self._own(row) for row in sample]
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, IndexError, AssertionError) as error:
            raise UsageError(
                f"model {self.name} cannot read a row of the corpus: {reason_of(error)}."
            ) from error
        check_steady(self.name, want, self._tolerance)
        if self.task.causal:
            check_causal(self.name, self._own, sample[0], want[0], self._tolerance)
        elif self.task.over_ids:
            check_bidirectional(self.name, self._own, sample[0])
        if self.task.source:
            check_source(self.name, self._own, sample[0], want[0])
        constants = self._constants(sample[0]) if self.task.over_ids else None
        self.scale, self.cap, self.offset = constants or (1.0, None, None)
        ways = [False] if constants is None else [True, False]
        found: dict[tuple[str, bool], float] = {}
        for self.batching in get_args(Batching):
            for self.direct in ways:
                found[self.batching, self.direct] = self._distance(sample, want)
                if found[self.batching, self.direct] <= self._tolerance:
                    self._report(found)
                    if self.states:
                        self._find_layer(sample)
                    return
        raise AssertionError("rows one by one, by the model's own forward, are what is wanted")

    def _constants(self, row: Row) -> tuple[float, float | None, Tensor | None] | None:
        """Scale, cap and offset of what the output layer gives; None where logits are made in
        another way.
        """
        projection = Projection(self.model, self._inputs(row), product=False)
        if projection.scale is None:
            return None
        self._thin = projection.thin
        return projection.scale, projection.cap, projection.offset

    def _inputs(self, row: Row) -> dict[str, Tensor]:
        """What the model is given of a row."""
        return {name: values for name, values in self._batch([row]).items() if name != "wanted"}

    def _find_layer(self, sample: Sequence[Row]) -> None:
        """Find the output layer, and prove it on the logits of real rows."""
        self.layer = find_layer(self.model, self.name, self._inputs(sample[0]), self.vocab_size)
        prove_layer(self.layer, self.name, self.slices(sample), self._tolerance)

    def _report(self, found: dict[tuple[str, bool], float]) -> None:
        if len(found) > 1:
            reason = f"otherwise logits differ by {next(iter(found.values())):.2g} of their spread"
            logger.warning(
                "%s: batches are %s, with %s; %s",
                self.name,
                self.batching,
                "direct projection" if self.direct else "the model's own forward",
                reason,
            )

    def _distance(self, sample: Sequence[Row], want: Sequence[Tensor]) -> float:
        """How far the logits of a batch, computed in the present way, are from those wanted."""
        try:
            got = torch.cat([piece.logits.float().cpu() for piece in self.slices(sample)])
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:  # some take no batch of several rows
            logger.debug("%s: %s", self.name, error)
            return float("inf")
        return distance(torch.split(got, [len(part) for part in want]), want)

    def _own(self, row: Row) -> Tensor:
        """Logits of a row's positions by the model's own forward on it alone, on the CPU."""
        pieces = self._forward(self._batch([row]))
        return torch.cat([piece.logits.float().cpu() for piece in pieces])

    def _batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Right-padded tensors on the device; `wanted` are flat positions of labels of tokens."""
        # Decoders that classify look for the last id that is not padding.
        batch = pad_rows(rows, self.pad_id)
        if self.task.per_token:
            lengths = np.array([len(row.labels) for row in rows])
            wanted = padded(np.concatenate([row.labels for row in rows]), lengths, IGNORE)
            # Indexing by a mask would make the host wait for the device to count it.
            batch["wanted"] = np.flatnonzero(positions(wanted, self.task_name))
            # Causal attention never looks at padding on the right: no mask is needed, and without
            # one the fastest attention kernels apply.
            if self.task.causal and not self.task.source:
                del batch["attention_mask"]
            if self.task.source:
                decoder, labels = (
                    torch.from_numpy(ids) for ids in (batch["decoder_input_ids"], wanted)
                )
                batch["decoder_input_ids"] = with_start(decoder, labels, self.start).numpy()
        return {name: self.to_device(torch.from_numpy(a)) for name, a in batch.items()}

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy to where inputs go, without waiting for what the device has still to do."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _slices(self, rows: Sequence[Row]) -> Iterator[Slice]:
        batch = self._batch(rows)
        if not self.direct:
            yield from self._forward(batch)
            return
        wanted = batch.pop("wanted")
        head = self.model.get_output_embeddings()
        hidden = layer_input(self.model, head, batch, thin=self._thin)
        # The layers of a model that is spread move what they are given to their own devices; the
        # last one may live on another than the first.
        hidden = hidden.flatten(0, 1).index_select(0, wanted.to(hidden.device))
        step = slice_positions(hidden.device.type, len(head.weight), hidden.element_size())
        with kept_loaded(head):
            for start in range(0, len(hidden), step):
                states = hidden[start : start + step]
                logits = finish_(head(states), self.scale, self.cap)
                if self.offset is not None:
                    logits += self.offset.to(logits)
                logits = self._cut(logits)
                yield Slice(logits, states if self.states else None)

    def _forward(self, batch: dict[str, Tensor]) -> Iterator[Slice]:
        """The model's own forward."""
        if not self.task.per_token:
            yield Slice(call(self.model, batch).logits[:, : self.vocab_size])
            return
        wanted = batch.pop("wanted")
        with self._seen_states() as seen:
            logits = call(self.model, batch).logits

        def picked(values: Tensor) -> Tensor:
            return values.flatten(0, 1).index_select(0, wanted.to(values.device))

        yield Slice(self._cut(picked(logits)), picked(seen[0]) if seen else None)

    @contextmanager
    def _seen_states(self) -> Iterator[list[Tensor]]:
        """What the output layer reads meanwhile, once it is known; nothing unless asked for."""
        seen: list[Tensor] = []
        if self.layer is None:
            yield seen
            return
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            yield seen
        finally:
            hook.remove()

    def _cut(self, logits: Tensor) -> Tensor:
        if logits.shape[-1] <= self.vocab_size:
            return logits
        mass = outside_mass(logits, self.vocab_size).sum()
        self.clipped_mass += mass.to(self.clipped_mass.device)
        return logits[:, : self.vocab_size]
