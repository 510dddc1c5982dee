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

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.rows import Row
from kdcache.targets import OutputLayer
from kdcache.targets.device import label_logprobs
from kdcache.tasks import CAUSAL_LM
from kdcache.teacher.encoding import Encoding
from kdcache.teacher.engine.head import check_normed, read_head
from kdcache.teacher.engine.inside import Key, Layout, request
from kdcache.teacher.engine.process import Engine
from kdcache.teacher.files import TeacherFiles
from kdcache.teacher.memory import Slice
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
        self._layout: Layout | None = None
        self._which = (files.folder, options.dtype, options.trust_remote_code)
        self._engine = Engine(
            files.folder,
            options.engine,
            dtype=options.dtype,
            gpu=self.device.type == "cuda",
            trust_remote_code=options.trust_remote_code,
        )

    def encode_inside(self, url: str, encoding: Encoding, row: Row) -> bool:
        """Have the engine encode, if it can; see `Teacher.encode_inside`."""
        self._layout = self._engine.encode(url, *self._which)
        if self._layout is None:
            return False
        labels = row.labels[row.positions(CAUSAL_LM)].astype(np.int64)
        self.expect([row], [(np.full(len(labels), 0.5), labels)])
        inside, done = self.encoded([row]), 0
        for piece in self.slices([row]) if "label_logprob" in encoding.kept else ():
            here = slice(done, done + len(piece.logits))
            own = label_logprobs(piece.logits, torch.from_numpy(labels[here])).cpu()
            if not torch.allclose(
                inside["label_logprob"][here], own, rtol=self._tolerance, atol=self._tolerance
            ):
                raise UsageError(
                    f"teacher {self.name}: what the engine encodes is not of its states: it gives "
                    "other log-probabilities of labels. Use --engine-arg encode_inside=false."
                )
            done = here.stop
        return True

    def expect(self, rows: Sequence[Row], keys: Sequence[Key] | None = None) -> None:
        """Have the engine begin with rows that are requested later.

        Args:
            rows: what is asked.
            keys: noise and labels of the positions of each, for `encoded`; None for `slices`.
        """
        for i, row in enumerate(rows):
            if id(row) not in self._asked:
                encoded = None
                if keys is not None:
                    positions = row.positions(CAUSAL_LM)
                    encoded = len(positions), request(positions, *keys[i])
                self._asked[id(row)] = self._engine.ask(row.input_ids.tolist(), encoded)

    def wait(self, rows: Sequence[Row]) -> None:
        """Wait until what the engine makes of expected rows is there."""
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
        parts = [
            states[torch.from_numpy(row.positions(CAUSAL_LM))]
            for row, states in zip(rows, self._answers(rows), strict=True)
        ]
        hidden = self.to_device(torch.cat(parts).to(self._dtype))
        for piece, outside in self._head.slices(hidden, self.vocab_size, keep=self.states):
            self.clipped_mass += outside.sum()
            yield piece

    def encoded(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """What the engine encoded of all positions of a batch that was expected with keys.

        Returns:
            What `Encoding` gives, row by row, on the CPU, and "clipped" float32 [n], probability
            outside the vocabulary.
        """
        assert self._layout is not None, "the engine encodes"
        return self._layout.split(torch.cat(self._answers(rows)))

    def _answers(self, rows: Sequence[Row]) -> list[Tensor]:
        asked = [self._asked[id(row)] for row in rows]
        for row in rows:
            self._asked.pop(id(row), None)
        return [future.result() for future in asked]

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy to where logits are made, without waiting for what the device has still to do."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def probe(self, rows: Sequence[Row]) -> None:
        """Compare what the engine gives on a row alone, again, changed at its end, and in a batch.

        Raises:
            UsageError: its states are not a function of the tokens before, or not the last ones.
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
