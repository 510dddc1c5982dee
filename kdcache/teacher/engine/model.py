"""A language model in an engine: rows in, logits of the requested positions out.

The engine gives the last hidden state of every token; the output layer, read from the model's
files, makes logits of them here, a slice at a time. Rows that are announced (`expect`) are in the
engine while others are projected and encoded, so it is never empty while rows are left.

Cost: the engine, and one product with the output layer a position that is requested; host memory
for the states of the rows that were announced.
Guarantee: see `probe`; against another implementation of the model, `kdcache verify --engine
transformers` compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.rows import Row
from kdcache.targets import OutputLayer
from kdcache.targets.device import outside_mass
from kdcache.targets.output_layer import finish_
from kdcache.tasks import CAUSAL_LM
from kdcache.teacher.engine.head import check_normed, read_head
from kdcache.teacher.engine.process import Engine
from kdcache.teacher.files import TeacherFiles
from kdcache.teacher.memory import Slice, slice_positions
from kdcache.teacher.options import TeacherOptions
from kdcache.teacher.probe import TOLERANCES, check_causal, check_steady, distance, probe_rows


class EngineModel:
    """A model that vLLM runs.

    Attributes:
        device: where its logits are made.
        clipped_mass: float32 scalar, probability outside the vocabulary so far, summed.
        layer: what makes its logits of its states; None unless asked for.
    """

    def __init__(self, options: TeacherOptions, vocab_size: int) -> None:
        """Start the engine.

        Args:
            options: which model, and how.
            vocab_size: width of the logits to give: output columns beyond it are cut off.
        """
        assert options.engine is not None, "an engine was asked for"
        (name,) = options.names
        files = TeacherFiles.find(name, trust_remote_code=options.trust_remote_code)
        files.check_whole("--engine vllm")
        for sha256 in options.identities:
            files.check_same(sha256)
        self.name = files.name
        self._head = read_head(files, options.dtype)
        self.layer: OutputLayer | None = None
        if options.states:
            whole = self._head.layer
            bias = None if whole.bias is None else whole.bias[:vocab_size]
            self.layer = replace(whole, weight=whole.weight[:vocab_size], bias=bias)
        self.vocab_size, self.states = vocab_size, options.states
        self.device = torch.device("cpu" if options.device == "cpu" else "cuda")
        self.clipped_mass = torch.zeros((), device=self.device)
        self._dtype: torch.dtype = getattr(torch, options.dtype)
        quantised = (
            getattr(files.config, "quantization_config", None) or options.engine.quantization
        )
        self._tolerance = TOLERANCES["bfloat16" if quantised else options.dtype]
        self._asked: dict[int, Future[Tensor]] = {}
        self._engine = Engine(
            files.folder,
            options.engine,
            dtype=options.dtype,
            gpu=self.device.type == "cuda",
            trust_remote_code=options.trust_remote_code,
        )

    def expect(self, rows: Sequence[Row]) -> None:
        """Have the engine begin with rows that are requested later."""
        for row in rows:
            if id(row) not in self._asked:
                self._asked[id(row)] = self._engine.ask(row.input_ids.tolist())

    def wait(self, rows: Sequence[Row]) -> None:
        """Wait until the states of expected rows are there."""
        self.expect(rows)
        wait([self._asked[id(row)] for row in rows])

    def forget(self, rows: Sequence[Row]) -> None:
        """Give up expected rows."""
        for row in rows:
            asked = self._asked.pop(id(row), None)
            if asked is not None:
                asked.cancel()

    def slices(self, rows: Sequence[Row]) -> Iterator[Slice]:
        """All positions of a batch, a slice at a time, row by row."""
        self.expect(rows)
        asked = [self._asked[id(row)] for row in rows]
        for row in rows:
            self._asked.pop(id(row), None)
        parts = [
            future.result()[torch.from_numpy(row.positions(CAUSAL_LM))]
            for row, future in zip(rows, asked, strict=True)
        ]
        hidden = self.to_device(torch.cat(parts).to(self._dtype))
        weight, bias = self._head.layer.on(self.device, self._dtype)
        step = slice_positions(self.device.type, len(weight), hidden.element_size())
        for start in range(0, len(hidden), step):
            states = hidden[start : start + step]
            logits = torch.nn.functional.linear(states, weight, bias)
            finish_(logits, self._head.layer.scale, self._head.layer.cap)
            yield Slice(self._cut(logits), states if self.states else None)

    def _cut(self, logits: Tensor) -> Tensor:
        if logits.shape[-1] <= self.vocab_size:
            return logits
        self.clipped_mass += outside_mass(logits, self.vocab_size).sum()
        return logits[:, : self.vocab_size]

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy to where logits are made, without waiting for what the device has still to do."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def probe(self, rows: Sequence[Row]) -> None:
        """Compare what the engine gives on a row alone, again, changed at its end, and in a batch.

        Raises:
            UsageError: its states are no function of the tokens before, or not the last ones.
        """
        sample = probe_rows(rows, per_token=True)
        want = [self._alone(row) for row in sample]
        check_steady(self.name, want, self._tolerance)
        check_causal(self.name, self._alone, sample[0], want[0], self._tolerance)
        for row in sample:
            check_normed(self._head, self.name, self._engine.ask(row.input_ids.tolist()).result())
        together = torch.cat([piece.logits.float().cpu() for piece in self.slices(sample)])
        moved = distance(torch.split(together, [len(part) for part in want]), want)
        if moved > self._tolerance:
            raise UsageError(
                f"teacher {self.name}: the engine gives other logits for rows that it computes "
                f"together than for each alone (they differ by {moved:.2g} of their spread)."
            )

    def _alone(self, row: Row) -> Tensor:
        return torch.cat([piece.logits.float().cpu() for piece in self.slices([row])])

    def close(self) -> None:
        """End the engine's processes."""
        self._engine.close()
