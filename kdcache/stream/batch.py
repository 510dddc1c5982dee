"""Rows of shards to batches of tensors, by offsets and without a Python loop over numbers.

`TargetDataset` and `Collator` are for training loops with an order of their own.

Cost: each token and target is copied once into the batch.
Guarantee: positions of a batch keep the row-major order of its labels.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdcache.cache import Cache
from kdcache.cache.figures import teacher_entropy
from kdcache.cache.shard import ShardData
from kdcache.errors import UsageError
from kdcache.rows.batches import padded
from kdcache.stream.checks import check_caches, open_caches
from kdcache.stream.shard_rows import ShardRows, join, positions_of
from kdcache.targets import LabelTargets
from kdcache.targets.label_logprob import decode_logprobs
from kdcache.tasks import IGNORE, TASKS, labelled, positions

if TYPE_CHECKING:
    from kdcache.stream.text import RowsText

Batch: TypeAlias = dict[str, Any]
"""Tensors by name, and under `targets` the soft targets: see `collate`."""

ABOUT_TEACHER = ("label_logprob", "entropy")
"""Columns of positions besides their targets: batches have those that all caches have."""


def shared_columns(caches: Sequence[Cache]) -> set[str]:
    """Which of `ABOUT_TEACHER` all of some caches have."""
    return {name for name in ABOUT_TEACHER if all(name in cache.spec.kept for cache in caches)}


Tokenize: TypeAlias = Callable[[list[Any], "list[str] | None"], Mapping[str, Tensor]]


class Reading:
    """How a student reads rows of caches, and what it must share to read the same.

    Attributes:
        tokenizer: the student's own, to be saved with it; None where there is none.
        vocab_size: ids of the student's tokenizer, where its labels are these and not the caches'.
        needless: whether it reads as `CachedIds` would.
        reads_targets: whether its soft targets are made of those of the caches.
    """

    tokenizer: Any = None
    vocab_size: int | None = None
    needless = False
    reads_targets = True
    settings: Mapping[str, Any] = {}
    _text: RowsText | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What the batches of two streams must share to be the same, besides their caches."""
        return {}

    def read(
        self,
        cache: Cache,
        shard: int,
        *,
        targets: bool = True,
        kept: Collection[str] = ABOUT_TEACHER,
    ) -> ShardData:
        """A shard's rows with all columns that batches are made of, and no other.

        Args:
            targets: whether with soft targets.
            kept: of `ABOUT_TEACHER` those that all caches of a stream have.
        """
        data = cache.read(shard, targets=targets)
        left: dict[str, Any] = {name: None for name in ABOUT_TEACHER if name not in kept}
        return self.rows(cache, shard, replace(data, **left) if left else data)

    def rows(self, cache: Cache, shard: int, data: ShardData) -> ShardData:
        """The rows of a shard with all columns that its batches are made of."""
        if self._text is None:
            return data
        return replace(data, label_bytes=self._text.label_bytes(cache, data))

    def with_text(self, cache: Cache) -> Reading:
        """The same, whose batches have their chunks of text (`TextChunks`) under `text`.

        Args:
            cache: one of those it reads, which all have one tokenizer.

        Raises:
            UsageError: a tokenizer that loses bytes of a text.
        """
        from kdcache.stream.text import RowsText

        found = copy.copy(self)
        found._text = RowsText(cache)
        return found

    def collate(
        self, data: ShardData, *, temperature: float | None, count: float | None = None
    ) -> Batch:
        """A batch of tensors from some rows; see the function `collate`."""
        if temperature is None and data.hard_labels is not None:
            from kdcache.cache.unsure import every_label

            data = every_label(data)
        labels = data.labels
        if temperature is None and TASKS[data.task].per_token:
            # Without soft targets, a token without a hard label is not a position.
            labels = np.where(labelled(labels, data.task), labels, IGNORE)
        batch = self.inputs(data, labels)
        if temperature is not None:
            batch["targets"] = data.targets.at(temperature)
        if data.label_logprob is not None:
            batch["label_logprob"] = torch.from_numpy(decode_logprobs(data.label_logprob))
        if (entropy := teacher_entropy(data)) is not None:
            batch["teacher_entropy"] = torch.from_numpy(entropy)
        if data.hard_labels is not None:
            hard = padded(_widest(data.hard_labels), np.diff(data.offsets), IGNORE)
            batch["hard_labels"] = torch.from_numpy(hard)
        batch["count"] = self.count(data, temperature, count)
        if self._text is not None:
            batch["text"] = self._text(data)
        return batch

    @staticmethod
    def count(data: ShardData, temperature: float | None, count: float | None) -> Tensor:
        """What a batch's loss is divided by, float32 []."""
        if count is None:
            count = int(positions_of(data, soft=temperature is not None).sum())
        return torch.tensor(count, dtype=torch.float32)

    def inputs(self, data: ShardData, labels: np.ndarray) -> Batch:
        """What the student reads, and the labels where its logits have them."""
        raise NotImplementedError

    @staticmethod
    def left_out(parts: Sequence[ShardData]) -> np.ndarray:
        """int64 [2], of some rows: see `TargetStream.left_out`."""
        return np.zeros(2, np.int64)

    def saved_tokenizer(self, cache: Cache) -> Any:
        """The tokenizer that belongs next to the trained student, if any."""
        return self.tokenizer


class CachedIds(Reading):
    """A student that has the tokenizer of the caches reads their ids."""

    def __init__(self, pad_id: int) -> None:
        """`pad_id` fills rows up on the right."""
        self.pad_id = pad_id

    def inputs(self, data: ShardData, labels: np.ndarray) -> Batch:
        """See `Reading.inputs`."""
        lengths = np.diff(data.offsets)

        def pad(values: np.ndarray, fill: int) -> Tensor:
            return torch.from_numpy(padded(values, lengths, fill))

        if data.source is not None and data.source_offsets is not None:
            sizes = np.diff(data.source_offsets)
            ones = np.ones(len(data.source), np.int64)
            batch = {
                "input_ids": torch.from_numpy(padded(data.source, sizes, self.pad_id)),
                "attention_mask": torch.from_numpy(padded(ones, sizes, 0)),
                "decoder_input_ids": pad(data.input_ids, self.pad_id),
            }
        else:
            batch = {"input_ids": pad(data.input_ids, self.pad_id)}
            batch |= divided(len(data.input_ids), data.starts, lengths)
            if data.type_ids is not None:
                batch["token_type_ids"] = pad(data.type_ids, 0)
        own = _widest(labels)
        per_token = TASKS[data.task].per_token
        batch["labels"] = pad(own, IGNORE) if per_token else torch.from_numpy(own)
        if data.first is not None:
            marked = positions(labels, data.task)
            if not data.first[marked].all():  # else each position is the first of a word
                batch["first_tokens"] = torch.from_numpy(data.first[marked])
        return batch

    def saved_tokenizer(self, cache: Cache) -> Any:
        """See `Reading.saved_tokenizer`."""
        return cache.tokenizer()


class LabelReading(CachedIds):
    """The same of `--divergence policy-gradient`, whose targets are of the labels alone.

    No soft target is read: any codec will do, and the smallest is enough. The baseline is the mean
    of log q - log b over the batch, of teacher and writer, which is off the mean by one part in
    the batch's positions. Without importance weights there is none.
    """

    reads_targets = False

    def __init__(self, pad_id: int, clip: float) -> None:
        """See `CachedIds`; `clip` is of `LabelTargets`, 0 for no importance weights."""
        super().__init__(pad_id)
        self.clip = clip

    def collate(
        self, data: ShardData, *, temperature: float | None, count: float | None = None
    ) -> Batch:
        """See `Reading.collate`."""
        if temperature not in (None, 1):
            raise UsageError(f"a policy gradient has no temperature, but {temperature:g} is given.")
        batch = super().collate(data, temperature=None, count=count)
        if temperature is None:
            return batch
        if data.label_logprob is None:
            raise UsageError("the rows have no log-probabilities of their labels.")
        targets = LabelTargets(batch["label_logprob"])
        if self.clip:
            if data.writer_logprob is None or data.hard_labels is not None:
                raise UsageError("the rows have no log-probabilities of a writer of all labels.")
            from kdcache.loss.reference import MAX_ADVANTAGE

            writer = torch.from_numpy(decode_logprobs(data.writer_logprob))
            gaps = (targets.teacher - writer).nan_to_num().clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE)
            baseline = gaps.mean().expand(len(gaps)).contiguous()
            targets = LabelTargets(targets.teacher, writer, baseline, self.clip)
        return {**batch, "targets": targets}


class OwnTokens(Reading):
    """A classifier with a tokenizer of its own reads the texts or the words of the rows."""

    def __init__(self, tokenize: Tokenize, tokenizer: Any = None) -> None:
        """How it reads.

        Args:
            tokenize: texts, or words, to tensors; see `collate`.
        """
        self.tokenize, self.tokenizer = tokenize, tokenizer

    def inputs(self, data: ShardData, labels: np.ndarray) -> Batch:
        """See `Reading.inputs`."""
        words = data.words if data.first is not None else None
        read = data.texts if words is None else words
        if read is None:
            raise UsageError(
                "the cache holds no texts: this student must use the teacher's tokenizer."
            )
        found = self.tokenize(read, data.text_pairs if words is None else None)
        batch: Batch = {name: torch.as_tensor(values) for name, values in found.items()}
        if words is not None:
            batch["labels"] = _at_words(batch.pop("first_tokens"), data, labels)
        elif "labels" not in batch:
            batch["labels"] = torch.from_numpy(_widest(labels))
        return batch


def reading_of(pad_id: int, tokenize: Tokenize | None, reading: Reading | None) -> Reading:
    """How a student reads, by its tokenizer.

    Args:
        reading: given, nothing else counts.
    """
    if reading is None:
        return CachedIds(pad_id) if tokenize is None else OwnTokens(tokenize)
    return reading


def collate(
    data: ShardData,
    *,
    pad_id: int,
    temperature: float | None,
    count: float | None = None,
    tokenize: Tokenize | None = None,
) -> Batch:
    """A batch of tensors from some rows.

    Args:
        pad_id: id that fills `input_ids` up on the right.
        temperature: of the soft targets, or None to leave them out (training on hard labels alone).
        count: what the loss is divided by; None for this batch's own count, see below.
        tokenize: text (and second text) to the student's own tensors, such as `input_ids` and
            `attention_mask`; or words to these and `first_tokens`, bool [B, L], True at one token
            of each word. None uses the cached ids.

    Returns:
        `input_ids`, `attention_mask` int64 [B, L], of a source where there is one, next to
        `decoder_input_ids`, which are then what the labels belong to; where documents do not attend
        to each other `position_ids` in place of the mask, 0 where one begins; `token_type_ids`
        int64 [B, L] where there are any; `labels` int64 [B, L] (aligned with the logits: already
        shifted) or [B], of several labels a row [B, C], of scores float32 [B]; `count` float32 [];
        and with a temperature `targets`, `DenseTargets` or `SparseTargets` of the batch's positions
        in row-major order. Where the cache keeps it, `label_logprob` float32 [positions], the
        teacher's log-probability of each label at T = 1 (minus infinity for a label that it cannot
        predict), and `teacher_entropy`, that of its distribution at T = 1 in nats, which a batch of
        classes has where targets are right at T = 1. Where not every position is the first of its
        word, `first_tokens` bool [positions] has which are. Where the cache keeps targets of some
        positions alone, `hard_labels` int64 [B, L], the labels of the others. `count` is the number
        of positions the loss is a mean of (without targets: of hard labels); infinity gives the
        batch the weight zero.
    """
    reading = reading_of(pad_id, tokenize, None)
    return reading.collate(data, temperature=temperature, count=count)


def _at_words(first: Tensor, data: ShardData, labels: np.ndarray) -> Tensor:
    """Labels int64 [B, L] of a student's own tokens: those of the words at their first tokens."""
    assert data.first is not None, "a cache of words marks their first tokens"
    marked = positions(data.labels, data.task)
    if not np.array_equal(marked, data.first):
        raise UsageError(
            "the cache has targets at all tokens of a word, which are the teacher's: this student "
            "must use its tokenizer, or a cache that was built with --label-tokens first."
        )
    words = sum(map(len, data.words or ()))
    if int(first.sum()) != words:
        raise UsageError(
            f"the student's tokenize marks {int(first.sum())} first_tokens for {words} words. It "
            "must mark one for each."
        )
    placed = torch.full(first.shape, IGNORE, dtype=torch.int64)
    placed[first] = torch.from_numpy(labels[marked].astype(np.int64))
    return placed


def _widest(labels: np.ndarray) -> np.ndarray:
    """Labels as torch's losses take them: whole numbers as int64."""
    return labels.astype(np.int64 if labels.dtype.kind == "i" else labels.dtype)


def divided(tokens: int, starts: np.ndarray | None, lengths: np.ndarray) -> Batch:
    """What tells a model which tokens belong together, [B, L]: a mask, or positions in documents,
    which begin at `starts`, bool [tokens]."""
    if starts is not None:
        return {"position_ids": position_ids(starts, lengths)}
    return {"attention_mask": torch.from_numpy(padded(np.ones(tokens, np.int64), lengths, 0))}


def position_ids(starts: np.ndarray, lengths: np.ndarray) -> Tensor:
    """int64 [B, L]: where in its document each token is; padding counts as a document."""
    begins = padded(starts, lengths, 0).astype(np.bool_)
    rows = np.flatnonzero(lengths < begins.shape[1])
    begins[rows, lengths[rows]] = True
    at = np.arange(begins.shape[1])
    return torch.from_numpy(at - np.maximum.accumulate(np.where(begins, at, 0), 1))


class TargetDataset(Dataset[ShardData]):
    """Rows of caches by number, for a plain `DataLoader` or HF `Trainer` together with `Collator`.

    An item is one row with its targets. Shards are read when one of their rows is requested and the
    last few are kept: random access over a cache of many shards decodes them again and again, for
    which `TargetStream` is the cure.
    """

    def __init__(
        self,
        caches: Cache | str | Sequence[Cache | str],
        *,
        keep: int = 4,
        cross: Reading | None = None,
    ) -> None:
        """Open the caches.

        Args:
            keep: decoded shards held in memory (by each process).
            cross: how the student reads, such as a `CrossTokenizer` for language models with a
                tokenizer of their own; the `Collator` needs it, too.
        """
        self.cross = cross
        self.caches = open_caches(caches)
        check_caches(self.caches, (), [])
        self._shards = [
            (c, i) for c, cache in enumerate(self.caches) for i in range(cache.spec.spans)
        ]
        sizes = [self.caches[c].manifest.shards[i].rows for c, i in self._shards]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._keep = keep
        self.kept = shared_columns(self.caches)
        self._recent: OrderedDict[int, ShardRows] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> ShardData:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        slot = int(np.searchsorted(self._ends, index, side="right"))
        pool = self._recent.pop(slot, None)
        if pool is None:
            cache, shard = self._shards[slot]
            reading = reading_of(0, None, self.cross)
            pool = ShardRows([reading.read(self.caches[cache], shard, kept=self.kept)])
        self._recent[slot] = pool
        if len(self._recent) > self._keep:
            self._recent.popitem(last=False)
        row = index - (int(self._ends[slot - 1]) if slot else 0)
        return pool.take(np.array([row]))


@dataclass
class Collator:
    """Rows of a `TargetDataset` to a batch: the `collate_fn` or HF `data_collator`.

    Attributes:
        pad_id: id that fills rows up (`cache.spec.pad_id`).
        temperature: of the soft targets, or None to leave them out.
        tokenize: text to tensors, for classifiers with a tokenizer of their own.
    """

    pad_id: int
    temperature: float | None = 1.0
    tokenize: Tokenize | None = field(default=None, repr=False)
    cross: Reading | None = field(default=None, repr=False)

    def __call__(self, rows: Sequence[ShardData]) -> Batch:
        """Collate items of the dataset; see `collate` for the keys of a batch."""
        reading = reading_of(self.pad_id, self.tokenize, self.cross)
        return reading.collate(join(rows), temperature=self.temperature)
