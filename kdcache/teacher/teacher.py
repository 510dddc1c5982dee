"""A teacher: one model, or an ensemble that is seen as one.

Guarantee: before its first answer each model is probed on real rows (`TeacherModel.probe`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from kdcache.rows import Row
from kdcache.rows.batches import documents_of, runs
from kdcache.targets import OutputLayer
from kdcache.tasks import TASKS
from kdcache.teacher.load import TeacherOptions, compile_layers, load_models
from kdcache.teacher.memory import Slice, gpus_of
from kdcache.teacher.model import TeacherModel

if TYPE_CHECKING:
    from kdcache.teacher.engine.model import EngineModel


class Teacher:
    """The loaded models of one worker, seen as one.

    Attributes:
        device: where the first one wants its inputs.
        engine: the one model, where an engine runs it: it is given rows ahead, and may encode.
    """

    def __init__(self, options: TeacherOptions, vocab_size: int) -> None:
        """Load the models.

        Args:
            vocab_size: width of the logits to give: output columns beyond it are cut off.
        """
        self.options = options
        self.vocab_size = vocab_size
        self.engine: EngineModel | None = None
        self.models: list[TeacherModel | EngineModel] = []
        if options.engine is not None:
            from kdcache.teacher.engine.model import EngineModel

            self.engine = EngineModel(options, vocab_size)
            self.models.append(self.engine)
        else:
            for model, name in zip(load_models(options), options.names, strict=True):
                if options.compile:
                    compile_layers(model)
                self.models.append(TeacherModel(model, name, options, vocab_size))
        self.device = self.models[0].device
        self.to_device = self.models[0].to_device
        self._probed = False

    @torch.inference_mode()
    def probe(self, rows: Sequence[Row]) -> None:
        """Compare the fast way with each model's own forward; see `TeacherModel.probe`.

        Raises:
            UsageError: a model with logits that would be wrong in any way.
        """
        self._probed = True
        rows = documents_of(rows)
        for one in self.models:
            one.probe(rows)
        self.take_clipped_mass()

    @property
    def gpus(self) -> tuple[torch.device, ...]:
        """The GPUs that hold its models."""
        return gpus_of(one.model for one in self.models if isinstance(one, TeacherModel))

    def close(self) -> None:
        """End the processes that this one started."""
        if self.engine is not None:
            self.engine.close()

    @torch.inference_mode()
    def slices(self, rows: Sequence[Row]) -> Iterator[Slice]:
        """All positions of one batch of rows, in row-major order.

        Args:
            rows: the batch; rows of similar length waste the least. Documents that do not attend
                to each other are run as rows by themselves, some at a time; a caller who divides
                and sorts them before (`documents_of`) wastes less. The first batch serves as the
                probe if there was none.

        Yields:
            Slices on the teacher's device, together one row a position.
        """
        if not self._probed:
            self.probe(rows)
        if any(row.starts is not None for row in rows):
            budget = len(rows) * max(len(row.input_ids) for row in rows)
            pieces = documents_of(rows)
            for some in runs([len(piece.input_ids) for piece in pieces], budget):
                yield from self._slices(pieces[some])
            return
        yield from self._slices(rows)

    def _slices(self, rows: Sequence[Row]) -> Iterator[Slice]:
        if len(self.models) == 1:
            yield from self.models[0].slices(rows)
            return
        answers = [(piece.logits for piece in one.slices(rows)) for one in self.models]
        for pieces in aligned(answers):
            yield Slice(self._mean(pieces))

    def logits(self, rows: Sequence[Row]) -> Iterator[Tensor]:
        """The logits of `slices`."""
        return (piece.logits for piece in self.slices(rows))

    @property
    def layer(self) -> OutputLayer | None:
        """The output layer of the one model, once it is probed and where states are asked for."""
        return self.models[0].layer

    def _mean(self, slices: tuple[Tensor, ...]) -> Tensor:
        weights = self.options.weights
        slices = tuple(z.to(slices[0].device) for z in slices)
        kind = TASKS[self.options.task]
        if self.options.ensemble == "mean-logits" or not kind.has_temperature:
            return torch.stack([w * z.float() for w, z in zip(weights, slices, strict=True)]).sum(0)
        # T times the log of the mean serves as logits: their softmax at T is that mean.
        log_of = partial(log_softmax, dim=-1) if kind.distribution else logsigmoid

        def log_mean(sign: float, t: float) -> Tensor:
            logs = [
                log_of(sign * z.float() / t) + np.log(w)
                for w, z in zip(weights, slices, strict=True)
            ]
            return torch.logsumexp(torch.stack(logs), 0)

        means = []
        for t in self.options.temperatures:
            mean = log_mean(1, t)
            if not kind.distribution:  # their sigmoid at T is that mean
                mean = mean - log_mean(-1, t)
            means.append(t * mean)
        return torch.stack(means, 1)

    def take_clipped_mass(self) -> Tensor:
        """Probability the teacher gave to ids beyond the vocabulary since the last call, summed.

        Returns:
            A float32 scalar on the teacher's device: reading it waits for all batches so far.
        """
        total = torch.zeros((), device=self.device)
        for weight, one in zip(self.options.weights, self.models, strict=True):
            total += weight * one.clipped_mass.to(self.device)
            one.clipped_mass = torch.zeros_like(one.clipped_mass)
        return total


def aligned(streams: Sequence[Iterable[Tensor]]) -> Iterator[tuple[Tensor, ...]]:
    """Streams of slices, cut so that each step gives the same positions of all of them.

    Models slice their positions by the width of their output layers; comparing them must not hold
    the logits of a whole batch.

    Args:
        streams: iterables of [n, V] slices with equal totals of n.
    """
    iterators = [iter(stream) for stream in streams]
    heads: list[Tensor | None] = [None] * len(iterators)
    while True:
        for i, iterator in enumerate(iterators):
            head = heads[i]
            while head is None or not len(head):
                head = next(iterator, None)
                if head is None:
                    break
            heads[i] = head
        left = [head for head in heads if head is not None]
        if not left:
            return
        assert len(left) == len(heads), "all models answer the same positions"
        n = min(len(head) for head in left)
        yield tuple(head[:n] for head in left)
        heads = [head[n:] for head in left]
