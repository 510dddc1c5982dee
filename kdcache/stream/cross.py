"""Rows of caches for a student that reads their text by another tokenizer.

A shard's rows are tokenised anew and aligned (`kdcache.align`) where the shard is read, in the
thread that reads ahead, and kept as long as they fit into a bounded memory: later epochs find them
there. A batch then has the student's own ids and labels, and as its targets the teacher's
likelihood of the text between boundaries that both sides share (`kdcache.targets.chunks`).

Cost: see `kdcache.align.aligner`; a batch costs some numpy calls.
Guarantee: all that is made of a row depends on the row and on the two tokenizers alone.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from kdcache.align import Aligner, TokenBytes, like_marks, unchanged
from kdcache.cache import Cache
from kdcache.cache.columns import offsets_of
from kdcache.cache.shard import ShardData
from kdcache.errors import UsageError
from kdcache.pretrained import tokenizer_sha256
from kdcache.rows.batches import padded
from kdcache.stream.batch import Batch, Reading, divided
from kdcache.stream.checks import check_every_position
from kdcache.stream.shard_rows import AlignedRows, AlignedShard
from kdcache.stream.text import TextChunks, cached_rows
from kdcache.targets import SparseTargets
from kdcache.targets.chunks import ChunkTargets, Groups, inside_chunks
from kdcache.targets.label_logprob import IMPOSSIBLE, SCALE, decode_logprobs
from kdcache.tasks import CAUSAL_LM, IGNORE, CrossMethod

_KEPT_BYTES = 1 << 28


class CrossTokenizer(Reading):
    """A language model with a tokenizer of its own reads the text of the rows.

    Attributes:
        method: what a batch's targets are of; see `kdcache.loss.chunks`.
        tau: likelihoods are compared as ``p ** (1 / tau)``.
    """

    vocab_size: int

    def __init__(
        self,
        cache: Cache,
        tokenizer: Any,
        method: CrossMethod,
        *,
        tau: float = 10.0,
        max_length: int | None = None,
    ) -> None:
        """Pair two tokenizers.

        Args:
            cache: it has the teacher's tokenizer; all caches of a stream have the same.
            tokenizer: the student's, a Hugging Face one.
            method: `likelihood` or `hybrid`.
            tau: above 0.
            max_length: longest row of the student, in tokens. Default: any.

        Raises:
            UsageError: a tokenizer that loses bytes of a text.
        """
        self.tokenizer, self.method, self.tau = tokenizer, method, tau
        self.reads_targets = method == "hybrid"
        self.settings = {"cross_tokenizer": method, "likelihood_tau": tau}
        student = TokenBytes(tokenizer, "the student's tokenizer")
        teacher = TokenBytes(cache.tokenizer(), "the cache's tokenizer")
        self.aligner = Aligner(teacher, student, max_length)
        self.vocab_size = len(student)
        self._teacher_ids = cache.spec.vocab_size
        self.needless = tokenizer_sha256(cache.tokenizer()) == tokenizer_sha256(tokenizer)
        ends = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = next(number for number in ends if number is not None)
        self.groups = None
        if method == "hybrid" and self.needless:
            self.groups = Groups.single(cache.spec.vocab_size, len(student))
        elif method == "hybrid":
            self.groups = groups_of(self.aligner, cache.spec.vocab_size)
        self._kept: OrderedDict[tuple[str, int], AlignedRows] = OrderedDict()
        self._lock, self._counts_text = threading.Lock(), False

    @property
    def identity(self) -> dict[str, Any]:
        """See `Reading.identity`."""
        return {
            "method": self.method,
            "tau": self.tau,
            "max_length": self.aligner.max_length,
            "tokenizer": tokenizer_sha256(self.tokenizer),
        }

    def rows(self, cache: Cache, shard: int, data: ShardData) -> AlignedShard:
        """The rows of a shard next to the same as the student reads them.

        Raises:
            UsageError: some labels have no soft target, so that chunks would lack a part.
        """
        if data.hard_labels is not None:
            raise UsageError(check_every_position([cache], "a student of another tokenizer")[0])
        return AlignedShard.of(data, self._own(cache, shard, data))

    def _own(self, cache: Cache, shard: int, data: ShardData) -> AlignedRows:
        key = (cache.digest, shard)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        cached = cached_rows(cache, data)
        reach = self.aligner.max_length or cache.spec.max_length
        if self.needless and all(len(row.input_ids) <= reach for row in cached):
            rows = [unchanged(self.aligner.teacher, row) for row in cached]
        else:
            rows = self.aligner.align(cached)
        made = AlignedRows(**AlignedRows.of_rows(rows, CAUSAL_LM))
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > 1 and sum(k.bytes for k in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
        return made

    def with_text(self, cache: Cache) -> CrossTokenizer:
        """See `Reading.with_text`."""
        found = copy.copy(self)
        found._counts_text = True
        return found

    def collate(
        self, data: ShardData, *, temperature: float | None, count: float | None = None
    ) -> Batch:
        """A batch of the student's tensors; see `kdcache.stream.batch.collate`."""
        own = _aligned(data)
        lengths = np.diff(own.offsets)
        batch: Batch = {
            "input_ids": torch.from_numpy(padded(own.input_ids, lengths, self.pad_id)),
            **divided(len(own.input_ids), own.starts, lengths),
            "labels": torch.from_numpy(padded(own.labels, lengths, IGNORE)),
        }
        if temperature is not None:
            batch["targets"] = self.targets(data)
        batch["count"] = self.count(data, temperature, count)
        if self._counts_text:
            batch["text"] = self.text(data)
        return batch

    @staticmethod
    def left_out(parts: Sequence[ShardData]) -> np.ndarray:
        """See `Reading.left_out`."""
        rows = [_aligned(part) for part in parts]
        return np.array([sum(int(getattr(r, n).sum()) for r in rows) for n in ("lost", "cut")])

    def targets(self, data: ShardData) -> ChunkTargets:
        """The teacher's answers about the chunks of some rows.

        Chunks with a label that the teacher gives no probability are left out.
        """
        own, codes = _aligned(data), data.label_logprob
        assert codes is not None, "refused before: no label_logprob"
        spans = _spans(data, own)
        likelihood = _likelihood(codes, spans)
        kept = np.isfinite(likelihood) & (spans[:, 3] > spans[:, 2])
        spans, likelihood = spans[kept], likelihood[kept]
        size = int(own.positions.sum())
        if self.groups is None:
            return ChunkTargets(size, spans[:, 2], spans[:, 3], _floats(likelihood), tau=self.tau)
        found = data.targets.take(spans[:, 0]).at(1.0)
        assert isinstance(found, SparseTargets), "refused before: another codec"
        positions, soft = [spans[:, 2]], [self.groups.of_targets(found)]
        if found.exact:
            first = spans[:, 0]
            labels = data.labels[data.labels != IGNORE].astype(np.int64)[first]
            read = own.labels[own.labels != IGNORE].astype(np.int64)
            given = labels, decode_logprobs(codes[first]), spans[:, 2:], read, self._paths
            for inside, targets in inside_chunks(found, *given):
                positions.append(inside)
                soft.append(self.groups.of_student(targets))
        order = np.argsort(np.concatenate(positions))
        several = (spans[:, 1] - spans[:, 0] > 1) | (spans[:, 3] - spans[:, 2] > 1)
        return ChunkTargets(
            size,
            spans[several, 2],
            spans[several, 3],
            _floats(likelihood[several]),
            tau=self.tau,
            positions=np.concatenate(positions)[order],
            soft=SparseTargets.concat(soft)[torch.from_numpy(order)],
            groups=self.groups,
        )

    def text(self, data: ShardData) -> TextChunks:
        """The chunks of text of some rows, special tokens left out."""
        own = _aligned(data)
        spans = _spans(data, own)
        labels = data.labels[data.labels != IGNORE].astype(np.int64)
        # A space of the tokenizer's own is text of 0 bytes, a special token none.
        is_text = (own.chunk_bytes > 0) | self.aligner.teacher.is_text(labels[spans[:, 0]])
        spans = spans[is_text]
        codes = data.label_logprob
        known = None if codes is None else _likelihood(codes, spans)
        return TextChunks(
            spans[:, 2], spans[:, 3], own.chunk_bytes[is_text].astype(np.int64), known
        )

    @cached_property
    def _paths(self) -> np.ndarray:
        return paths_of(self.aligner, self._teacher_ids)


def _aligned(data: ShardData) -> AlignedRows:
    """Rows as the student reads them."""
    own = data.aligned if isinstance(data, AlignedShard) else None
    assert own is not None, "a stream with another tokenizer aligns all its rows"
    return own


def _spans(data: ShardData, own: AlignedRows) -> np.ndarray:
    """int64 [C, 4]: the chunks of all rows, as positions of all rows of each side."""
    counts = np.diff(own.chunk_offsets)
    theirs = np.repeat(data.position_offsets[:-1], counts)
    ours = np.repeat(np.cumsum(own.positions) - own.positions, counts)
    spans = own.chunks.astype(np.int64)
    spans[:, :2] += theirs[:, None]
    spans[:, 2:] += ours[:, None]
    return spans


def _likelihood(codes: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """float64 [C]: the teacher's log-likelihood of each chunk, minus infinity if impossible."""
    impossible = codes == IMPOSSIBLE
    squares = np.where(impossible, 0, codes.astype(np.int64) ** 2)
    sums, lost = (
        (lambda total: total[spans[:, 1]] - total[spans[:, 0]])(offsets_of(values))
        for values in (squares, impossible)
    )
    return np.where(lost > 0, -np.inf, -(sums / SCALE))


def paths_of(aligner: Aligner, vocab_size: int) -> np.ndarray:
    """int32 [V, n]: the student's tokens of each of the teacher's ids; then -1, at least once.

    A token that is not a whole character is the student's tokens of its single bytes.
    """
    teacher, student = aligner.teacher, aligner.student
    texts = {}
    for number, token in enumerate(teacher.tokens):
        try:
            texts[number] = token.decode()
        except UnicodeDecodeError:
            continue
    tokens = dict(zip(texts, student.tokenise(list(texts.values()), opens=False), strict=True))
    for number in range(len(teacher)):
        if number not in tokens:
            data = np.frombuffer(teacher.tokens[number], np.uint8)
            tokens[number] = student.byte_ids[data]
    paths = np.full((vocab_size, 1 + max(map(len, tokens.values()), default=0)), -1, np.int32)
    for number, path in tokens.items():
        if number < vocab_size:
            paths[number, : len(path)] = path
    return paths


def groups_of(aligner: Aligner, vocab_size: int) -> Groups:
    """Groups of the ids of two tokenizers; special tokens are with their like."""
    teacher, student = aligner.teacher, aligner.student
    likes = like_marks(teacher, student).items()
    pairs = {mark: int(like[0]) for mark, like in likes if len(like) == 1}
    beyond = [b""] * (vocab_size - len(teacher))
    return Groups.of([*teacher.tokens, *beyond], student.tokens, pairs)


def _floats(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))
