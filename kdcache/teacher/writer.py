"""A language model writes answers, with transformers: continuous batches over a cache of keys.

Rows are padded on the left and have their own positions. Rows that have ended leave the batch, and
the next prompts, the shortest first, take their places: they are read by themselves, once for all
their answers, and their keys and values are put next to those of the others. Layers with a window
keep all keys; the mask has the window.

The first answers are a probe: the log-probabilities of what was drawn are compared with those of
the model's own forward over the whole text, without cache or padding. Where they differ (models
with states of their own, or without positions), all text so far is read again for each token, with
padding on the right, which every causal model allows.

The noise of a token is a number of (seed, span, prompt, sample, position), by the generator of
`position_uniform`, so that batches and workers do not matter. The drawn token is where that number
falls in the cumulative distribution.

Cost: one forward a token of the batch; one sort of the vocabulary a token with `top_p`, else two
passes over it. Guarantee: an answer is a function of (seed, span, prompt,
sample) and the model, up to the rounding that other rows of a batch may change.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kdcache.errors import UsageError
from kdcache.rows.batches import padded
from kdcache.rows.spec import Answer, Sampling, text_of
from kdcache.targets import Stream, position_uniform
from kdcache.teacher.load import TeacherOptions, compile_layers, input_device, load_models
from kdcache.teacher.probe import TOLERANCES

logger = logging.getLogger(__name__)

Ids = npt.NDArray[np.int32]
_LEAVE = 8  # a batch is filled up when one in so many of its rows is free
_GROW = 2  # and one that has its share of what waits, when it could have so many times its rows
_PROBED = 4  # answers with log-probabilities that are compared
_PROBE_TOKENS = 24  # of each of them
_LOOK_BACK = 16  # tokens in which a text that ends an answer is looked for, besides its own length


class Ask(NamedTuple):
    """An answer that is wanted: which sample of which prompt of the span."""

    prompt: int
    sample: int


class _Work(NamedTuple):
    """Prompts of a span, and tokens of an answer, at most."""

    span: int
    prompts: Sequence[Ids]
    longest: int


class Writes(Protocol):
    """What writes answers: a model in transformers or in an engine."""

    device: torch.device
    takes_turns: bool

    def write(self, span: int, prompts: Sequence[Ids], done: Callable[[int], None]) -> list[Answer]:
        """The answers of a span's prompts, `samples` of each, prompt by prompt.

        Args:
            done: called with the tokens of each answer, and with 0 while none ends.
        """

    def close(self) -> None:
        """End the processes that it started."""


@dataclass
class _Batch:
    """The rows at work: what they are, the cache, and what each cell of it holds."""

    asks: list[Ask]
    written: list[list[int]]
    logprobs: list[list[float]]
    cache: Any
    mask: Tensor  # [rows, tokens of the cache], 1 where there is a token
    next: Tensor  # int64 [rows], drawn and not yet read
    reasons: list[str] = field(default_factory=list)  # empty while a row is at work

    def __len__(self) -> int:
        return len(self.asks)


class Writer:
    """A model that transformers runs, which writes."""

    takes_turns = True

    def __init__(
        self,
        options: TeacherOptions,
        how: Sampling,
        *,
        vocab_size: int,
        ends: Sequence[int],
        tokenizer: Any,
        batch_tokens: int,
    ) -> None:
        """Load the model.

        Args:
            tokenizer: makes text of ids, for `how.stop`.
            batch_tokens: tokens of prompts and answers in a batch, at most.
        """
        (self.model,) = load_models(options)
        if options.compile:
            compile_layers(self.model)
        self.how, self.batch_tokens = how, batch_tokens
        self.device = input_device(self.model)
        self._name, self._tolerance = options.names[0], TOLERANCES[options.dtype]
        self._vocab_size, self._ends, self._tokenizer = vocab_size, set(ends), tokenizer
        takes = inspect.signature(self.model.forward).parameters
        self._last_alone = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._positions = "position_ids" in takes
        # Its name before transformers 5.24, and since.
        self._cache = "cache" if "cache" in takes else "past_key_values"
        self._cached, self._probed = True, False
        self._rows = self._share = 0  # of the batch that was begun last: now, and at first

    def close(self) -> None:
        """See `Writes.close`."""

    @torch.inference_mode()
    def write(self, span: int, prompts: Sequence[Ids], done: Callable[[int], None]) -> list[Answer]:
        """See `Writes.write`."""
        if prompts and not self._probed:
            self._probe(_Work(span, prompts, min(_PROBE_TOKENS, self.how.max_new_tokens)))
        asks = [Ask(i, k) for i in range(len(prompts)) for k in range(self.how.samples)]
        return self._write(_Work(span, prompts, self.how.max_new_tokens), asks, done)

    def _write(
        self, work: _Work, asks: Sequence[Ask], done: Callable[[int], None] = lambda _: None
    ) -> list[Answer]:
        """The answers that are asked for."""
        answers: dict[Ask, Answer] = {}
        order = sorted(asks, key=lambda ask: (len(work.prompts[ask.prompt]), ask))
        waiting = deque(order)
        batch: _Batch | None = None
        while waiting or batch is not None:
            try:
                batch = self._filled(work, waiting, batch)
                done(0)
                self._step(work, batch)
            except torch.OutOfMemoryError:
                self._shrink(len(work.prompts[order[-1].prompt]) + work.longest)
                waiting = deque(ask for ask in order if ask not in answers)
                batch = None
                continue
            batch = self._taken(batch, answers, done, not waiting)
        return [answers[ask] for ask in asks]

    # Batches

    def _rows_that_fit(self, work: _Work, batch: _Batch | None, ask: Ask) -> int:
        """Rows that a batch has room for, with that prompt among them."""
        width = len(work.prompts[ask.prompt])
        if batch is not None:
            width = max(width, batch.mask.shape[1])
        return max(1, self.batch_tokens // (width + work.longest))

    def _filled(self, work: _Work, waiting: deque[Ask], batch: _Batch | None) -> _Batch:
        """A batch with as many of those who wait as it has room for, read up to their prompts."""
        rows = 0 if batch is None else len(batch)
        taken: list[Ask] = []
        most = len(waiting)
        if batch is None and waiting:  # even batches: two rows alone take as long as ten
            fitting = self._rows_that_fit(work, None, waiting[-1])
            self._share = most = -(-most // -(-most // fitting))
        while len(taken) < most:
            fitting = self._rows_that_fit(work, batch, waiting[0])
            free = fitting - rows - len(taken)
            worth = _LEAVE if rows < self._share else _GROW
            if free <= 0 or (not taken and batch is not None and free * worth < fitting):
                break
            taken.append(waiting.popleft())
        if not taken:
            assert batch is not None, "an empty one has room for a row"
            return batch
        self._rows = rows + len(taken)
        try:
            new = self._begun(work, taken)
        except torch.OutOfMemoryError:
            waiting.extendleft(reversed(taken))
            raise
        return new if batch is None else _joined(batch, new)

    def _begun(self, work: _Work, asks: list[Ask]) -> _Batch:
        """A batch with its prompts read and its first tokens drawn."""
        unique, prompts = list(dict.fromkeys(ask.prompt for ask in asks)), work.prompts
        which = torch.tensor([unique.index(ask.prompt) for ask in asks], device=self.device)
        cache, mask = None, torch.zeros(len(asks), 0, device=self.device)
        if self._cached:
            sizes = np.array([len(prompts[i]) for i in unique])
            there = np.arange(sizes.max()) >= (sizes.max() - sizes)[:, None]
            ids = np.zeros(there.shape, np.int64)
            ids[there] = np.concatenate([prompts[i] for i in unique])
            read, mask = (torch.from_numpy(a).to(self.device) for a in (ids, 1 * there))
            cache = DynamicCache()
            logits = self._forward(read, mask, cache)[which]
            if len(unique) < len(asks):
                cache, mask = _picked(cache, which), mask[which]
        else:
            logits = self._reread([list(prompts[i]) for i in unique])[which]
        batch = _Batch(
            asks,
            [list(prompts[ask.prompt]) if cache is None else [] for ask in asks],
            [[] for _ in asks],
            cache,
            mask,
            torch.zeros(len(asks), dtype=torch.int64, device=self.device),
            [""] * len(asks),
        )
        self._draw(work, batch, logits)
        return batch

    def _step(self, work: _Work, batch: _Batch) -> None:
        """Read the last token of each row, and draw the next one."""
        if all(batch.reasons):
            return
        if batch.cache is None:
            logits = self._reread(batch.written)
        else:
            ones = torch.ones_like(batch.mask[:, :1])
            batch.mask = torch.cat([batch.mask, ones], 1)
            logits = self._forward(batch.next[:, None], batch.mask, batch.cache)
        self._draw(work, batch, logits)

    def _ended(self, batch: _Batch, row: int, longest: int) -> str:
        """Why a row has ended; empty if it has not."""
        ids, count = batch.written[row], len(batch.logprobs[row])
        if ids[-1] in self._ends:
            return "stop"
        for text in self.how.stop:
            own = np.array(ids[-count:])
            if text in self._tokenizer.decode(own[-len(text) - _LOOK_BACK :]):
                whole = text_of(self._tokenizer, own, ())
                if whole != text_of(self._tokenizer, own, self.how.stop):
                    return "stop"
        return "length" if count >= longest else ""

    def _draw(self, work: _Work, batch: _Batch, logits: Tensor) -> None:
        """Draw the next token of each row, and note which have ended."""
        positions = [len(logprobs) for logprobs in batch.logprobs]
        which, samples = np.array(batch.asks).T
        numbers = noise(self.how.seed, work.span, which, samples, positions)
        uniform = torch.from_numpy(numbers).to(self.device)
        batch.next, logprobs = draw(logits, uniform, self.how)
        for row, (token, logprob) in enumerate(
            zip(batch.next.tolist(), logprobs.tolist(), strict=True)
        ):
            if batch.reasons[row]:
                continue
            if logprob != logprob:
                raise UsageError(
                    f"model {self._name} gives NaN or infinite logits for span {work.span}, prompt "
                    f"{batch.asks[row].prompt}. Try --dtype float32, or check the model."
                )
            batch.written[row].append(token)
            batch.logprobs[row].append(logprob)
            batch.reasons[row] = self._ended(batch, row, work.longest)

    def _taken(
        self, batch: _Batch, answers: dict[Ask, Answer], done: Callable[[int], None], last: bool
    ) -> _Batch | None:
        """The batch without rows that have ended, where enough have; their answers are kept."""
        for row, ask in enumerate(batch.asks):
            if batch.reasons[row] and ask not in answers:
                n = len(batch.logprobs[row])
                answers[ask] = Answer(
                    np.array(batch.written[row][-n:], np.int32),
                    np.array(batch.logprobs[row], np.float32),
                    "stop" if batch.reasons[row] == "stop" else "length",
                )
                done(n)
        left = [row for row, reason in enumerate(batch.reasons) if not reason]
        if not left:
            return None
        least = max(1, len(batch) // (2 if last else _LEAVE))
        return _kept(batch, left) if len(batch) - len(left) >= least else batch

    def _shrink(self, width: int) -> None:
        """Remember half the size of a batch that did not fit, whose rows may get so wide."""
        if self._rows <= 1:
            raise UsageError(
                f"one answer of {width} tokens does not fit the device together with the model. "
                "Use a smaller --max-new-tokens, or more GPUs (--worker gpus=…)."
            )
        torch.cuda.empty_cache()
        self.batch_tokens = min(self.batch_tokens, self._rows * width) // 2
        logger.warning("out of device memory: batches have %d tokens now", self.batch_tokens)

    # The model

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Logits [rows, V] after the last of some tokens, which the cache takes up."""
        more = {}
        if self._positions:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            more["position_ids"] = positions[:, -ids.shape[1] :]
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            **{self._cache: cache},
            **more,
            **self._last_alone,
        )
        logits: Tensor = out.logits[:, -1, : self._vocab_size]
        return logits

    def _reread(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Logits [rows, V] after each text, read whole."""
        sizes = np.array([len(text) for text in texts])
        ids = torch.from_numpy(padded(np.concatenate(texts, dtype=np.int64), sizes, 0))
        logits = self.model(input_ids=ids.to(self.device), use_cache=False).logits
        last = torch.from_numpy(sizes - 1).to(self.device)
        picked: Tensor = logits[torch.arange(len(texts), device=self.device), last]
        return picked[:, : self._vocab_size]

    def _probe(self, work: _Work) -> None:
        """Compare the log-probabilities of a few answers with the model's own forward over each.

        Raises:
            UsageError: they differ without a cache, too.
        """
        self._probed = True
        chosen = np.unique(np.linspace(0, len(work.prompts) - 1, _PROBED).astype(int)).tolist()
        asks = [Ask(i, 0) for i in chosen]
        for self._cached in (True, False):
            try:
                answers = self._write(work, asks)
            except torch.OutOfMemoryError:
                raise
            except (ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
                if not self._cached:
                    raise
                logger.debug("%s: %s", self._name, error)
                continue
            moved = max(
                self._moved(work.prompts[ask.prompt], answer)
                for ask, answer in zip(asks, answers, strict=True)
            )
            if moved <= self._tolerance:
                break
            logger.debug("%s: log-probabilities moved by %g", self._name, moved)
        else:
            raise UsageError(
                f"model {self._name} gives other logits for a text that it writes than for the "
                "same text read at once. It cannot be used to generate."
            )
        if not self._cached:
            logger.warning(
                "model %s does not continue padded rows from a cache of keys and values: all text "
                "is read again for each token, which is slow",
                self._name,
            )

    def _moved(self, prompt: Ids, answer: Answer) -> float:
        """The largest difference of an answer's log-probabilities, as a share of the spread."""
        ids = torch.from_numpy(np.concatenate([prompt, answer.ids]).astype(np.int64))
        logits = self.model(input_ids=ids[None].to(self.device), use_cache=False).logits[0]
        logits = logits[len(prompt) - 1 : -1, : self._vocab_size].float().cpu()
        drawn = torch.from_numpy(answer.ids.astype(np.int64))[:, None]
        want = logits.log_softmax(-1).gather(-1, drawn)[:, 0]
        spread = float(logits.std(-1).max())
        gap = (want - torch.from_numpy(answer.logprobs)).abs().max()
        return float(gap) / max(spread, 1e-9)


def _rebuilt(cache: Any, change: Callable[[int, Tensor], Tensor]) -> Any:
    """A cache with changed keys and values of each layer."""
    new = DynamicCache()
    for i, layer in enumerate(cache.layers):
        new.update(change(2 * i, layer.keys), change(2 * i + 1, layer.values), i)
    return new


def _picked(cache: Any, rows: Tensor) -> Any:
    return _rebuilt(cache, lambda _, states: states.index_select(0, rows.to(states.device)))


def _joined(one: _Batch, other: _Batch) -> _Batch:
    """One batch of two; the shorter cache is padded on the left."""
    cache, mask = None, torch.cat([one.mask[:, :0], other.mask[:, :0]])
    if one.cache is not None:
        width = max(one.mask.shape[1], other.mask.shape[1])

        def wide(states: Tensor) -> Tensor:
            return nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))

        theirs = [s for layer in other.cache.layers for s in (layer.keys, layer.values)]
        cache = _rebuilt(one.cache, lambda i, mine: torch.cat([wide(mine), wide(theirs[i])]))
        masks = (part.mask for part in (one, other))
        mask = torch.cat([nn.functional.pad(m, (width - m.shape[1], 0)) for m in masks])
    return _Batch(
        one.asks + other.asks,
        one.written + other.written,
        one.logprobs + other.logprobs,
        cache,
        mask,
        torch.cat([one.next, other.next]),
        one.reasons + other.reasons,
    )


def _kept(batch: _Batch, rows: list[int]) -> _Batch:
    """Some rows of a batch, without the padding that all of them have on the left."""
    index = torch.tensor(rows, device=batch.next.device)
    cache, mask = None, batch.mask[index]
    if batch.cache is not None:
        first_column = int(mask.any(0).int().argmax())
        mask = mask[:, first_column:]
        cache = _rebuilt(
            batch.cache,
            lambda _, states: states[:, :, first_column:].index_select(0, index.to(states.device)),
        )
    return _Batch(
        [batch.asks[row] for row in rows],
        [batch.written[row] for row in rows],
        [batch.logprobs[row] for row in rows],
        cache,
        mask,
        batch.next[index],
        [""] * len(rows),
    )


def noise(
    seed: int, span: int, prompt: npt.ArrayLike, sample: npt.ArrayLike, position: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Uniform numbers of tokens [n]: `position` of answer `sample` to `prompt` of a span."""
    prompts, samples, positions = np.broadcast_arrays(prompt, sample, position)
    out = np.empty(samples.shape)
    for one in np.unique(samples):
        mine = samples == one
        stream = Stream.ANSWERS + int(one)
        out[mine] = position_uniform(seed, span, prompts[mine], positions[mine], stream=stream)
    return out


def draw(logits: Tensor, uniform: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """One token of each row.

    Args:
        logits: [n, V].
        uniform: float64 [n], in [0, 1).
        how: temperature and truncation; `min_p` counts before `top_k`, and that before `top_p`.

    Returns:
        int64 [n], the tokens, and float32 [n], their log-probabilities at temperature 1 over the
        whole vocabulary.
    """
    logits = logits.float()
    if how.temperature == 0:
        ids = logits.argmax(-1)
    else:
        chances = truncated(logits, how)
        total = chances.cumsum_(-1)
        at = (uniform * total[:, -1])[:, None]
        ids = torch.searchsorted(total, at, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
    logprobs = logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)
    return ids, logprobs


def truncated(logits: Tensor, how: Sampling) -> Tensor:
    """The weights from which tokens are drawn, float64 [n, V], not scaled to 1."""
    z = logits / how.temperature
    weights = (z - z.amax(-1, keepdim=True)).exp_().double()  # float32 takes a third of the time
    if how.min_p > 0:  # the largest weight is 1
        weights = weights.masked_fill(weights < how.min_p, 0.0)
    if 0 < how.top_k < weights.shape[-1]:
        least = weights.topk(how.top_k, dim=-1).values[:, -1:]
        weights = weights.masked_fill(weights < least, 0.0)
    if how.top_p < 1:
        ordered, order = weights.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered[before >= how.top_p * ordered.sum(-1, keepdim=True)] = 0.0
        weights = torch.zeros_like(weights).scatter_(-1, order, ordered)
    return weights
