"""A language model in an engine: rows in, logits of the requested positions out; or it writes.

The engine gives the last hidden state of every token; the output layer, read from the model's
files, makes logits of them here, a slice at a time. Rows that are announced (`expect`) are in the
engine while others are projected and encoded, so it is never empty while rows are left.

Cost: the engine, and one product with the output layer a position that is requested; host memory
for the states of the rows that were announced.
Guarantee: see `probe`; against another implementation of the model, `kdcache verify --engine
transformers` compares.

When it writes, each answer is a request of its own, with a seed of (seed, span, prompt, sample).
All requests of a span are in the engine at once, and those of both spans of a worker, so it is
never short of work. vLLM draws by the request's seed; its logits, and so now and then a token, move
with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.rows import Row
from kdcache.rows.spec import Answer, Sampling
from kdcache.targets import OutputLayer
from kdcache.targets.device import label_logprobs
from kdcache.tasks import CAUSAL_LM
from kdcache.teacher.engine.head import check_normed, read_head
from kdcache.teacher.engine.inside import Key, Layout, request
from kdcache.teacher.engine.process import Engine
from kdcache.teacher.files import TeacherFiles
from kdcache.teacher.load import TeacherOptions
from kdcache.teacher.memory import Encoding, Slice
from kdcache.teacher.probe import TOLERANCES, check_causal, check_steady, distance, probe_rows
from kdcache.teacher.writer import noise


def _found(options: TeacherOptions) -> TeacherFiles:
    """The files of the one model, as it was planned with."""
    (name,) = options.names
    files = TeacherFiles.find(name, trust_remote_code=options.trust_remote_code, role=options.role)
    files.check_whole("--engine vllm")
    for sha256 in options.identities:
        files.check_same(sha256)
    return files


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
            vocab_size: width of the logits to give: output columns beyond it are cut off.
        """
        files = _found(options)
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
        own = getattr(files.config, "quantization_config", None)
        quantised = own or (options.engine and options.engine.quantization)
        self._tolerance = TOLERANCES["bfloat16" if quantised else options.dtype]
        self._asked: dict[int, Future[Tensor]] = {}
        self._layout: Layout | None = None
        self._which = (files.folder, options.dtype, options.trust_remote_code)
        self._engine = Engine(files.folder, options)

    @torch.inference_mode()
    def encode_inside(self, url: str, encoding: Encoding, row: Row) -> bool:
        """Have the engine encode for the cache that is made at `url`, if it can; see `encoded`.

        Args:
            encoding: what is kept there, and is compared with what the engine encodes.

        Raises:
            UsageError: the engine encodes something else than its states.
        """
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


_WAIT = 1.0  # seconds between two looks at whether the worker is stopped


class EngineWriter:
    """A model that vLLM runs, which writes."""

    takes_turns = False

    def __init__(
        self,
        options: TeacherOptions,
        how: Sampling,
        *,
        vocab_size: int,
        ends: Sequence[int],
        tokenizer: Any,
    ) -> None:
        """Start the engine; see `Writer` for the arguments."""
        files = _found(options)
        self.device = torch.device("cpu" if options.device == "cpu" else "cuda")
        self._engine = Engine(files.folder, options, writes=True)
        self._how = how
        self._asked = {
            "temperature": how.temperature,
            "top_p": how.top_p,
            "top_k": how.top_k,
            "min_p": how.min_p,
            "max_tokens": how.max_new_tokens,
            "stop": list(how.stop),
            "stop_token_ids": list(ends),
            "logprobs": 0,  # of the token that is drawn
            "detokenize": bool(how.stop),
        }
        # Ids that pad the output layer are never drawn.
        if vocab_size < int(files.config.get_text_config().vocab_size):
            self._asked["allowed_token_ids"] = list(range(vocab_size))

    def close(self) -> None:
        """See `Writes.close`."""
        self._engine.close()

    def write(
        self, span: int, prompts: Sequence[npt.NDArray[np.int32]], done: Callable[[int], None]
    ) -> list[Answer]:
        """See `Writes.write`."""
        asked = [
            self._engine.continue_(prompt.tolist(), **self._asked, seed=self._seed(span, i, k))
            for i, prompt in enumerate(prompts)
            for k in range(self._how.samples)
        ]
        left: set[Future[Any]] = set(asked)
        try:
            while left:
                ended, left = wait(left, _WAIT, FIRST_COMPLETED)
                for one in ended:
                    done(len(one.result().outputs[0].token_ids))
                done(0)
            return [_answer(one.result().outputs[0]) for one in asked]
        finally:
            for one in left:
                one.cancel()

    def _seed(self, span: int, prompt: int, sample: int) -> int:
        return int(noise(self._how.seed, span, prompt, sample, 0) * 2.0**53)


def _answer(found: Any) -> Answer:
    ids = np.array(found.token_ids, np.int32)
    logprobs = [each[int(i)].logprob for i, each in zip(ids, found.logprobs, strict=True)]
    stopped = found.finish_reason == "stop"
    return Answer(ids, np.array(logprobs, np.float32), "stop" if stopped else "length")
