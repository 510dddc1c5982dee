"""Aligns rows of a cache with their tokens by a student's tokenizer, and finds the chunks of both.

Algorithm: a row's tokens and its last label are laid on a line of *units*, one for each byte of
text and one for each special token. Stretches of text between special tokens are tokenised by the
student. The special token that opens a document becomes what the student's tokenizer puts before a
text, the end-of-text the student's, any other the special token of the same text, if there is one.
So each token of both sides covers some units:

- a student's token has a label if all its units have labels in the cached row. One across the
  border of a prompt has none, nor has one with a byte of the row's first token, for which the
  teacher gave no answer;
- a chunk ends at each boundary that both sides share, if no unit up to it is missing on a side.

Incomplete characters at the ends of a row become the student's tokens of single bytes, without
labels. The last word of a row that stops within a document has no labels either: with the text that
follows, its tokens could be others.

Cost: the student's tokenizer, in one call for all rows, and some numpy calls a row.
Guarantee: the student's tokens have the bytes of the row's, in order, none lost and none twice; a
stretch where they differ (a text that holds the tokenizer's own mark for a space) has no labels and
is counted.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kdcache.align.token_bytes import Mask, TokenBytes
from kdcache.tasks import IGNORE

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Alignment:
    """A row of a cache for a student of another tokenizer.

    A *chunk* lies between two neighbouring byte boundaries that both tokenizations share, and all
    of its tokens have labels on both sides. Positions of a row are its labels in order. The
    log-likelihood of chunk c is the sum of `label_logprob` over the teacher's positions
    `teacher_spans[c, 0]` to `teacher_spans[c, 1]` (excluded), and of the student's
    log-probabilities of its labels over its positions `student_spans[c]`. At the first position of
    a chunk both models have read the same bytes.

    Attributes:
        input_ids: int64 [S], the student's tokens of the row's text.
        labels: int64 [S], aligned with the logits (`labels[t]` follows `input_ids[t]`), `IGNORE`
            where there is none: only bytes that have a label in the cached row have one here.
        starts: bool [S], where documents begin that do not attend to each other; None where the
            cache's rows are not divided.
        teacher_spans: int64 [C, 2], of positions of the cached row.
        student_spans: int64 [C, 2], of positions of this row.
        chunk_bytes: int64 [C], bytes of text in each chunk; 0 of a special token that both have,
            such as the end-of-text.
        lost: stretches of the row without labels because the student's tokens do not have their
            bytes.
        cut: labels of the student left out because its row would be too long.
    """

    input_ids: Ints
    labels: Ints
    starts: npt.NDArray[np.bool_] | None
    teacher_spans: Ints
    student_spans: Ints
    chunk_bytes: Ints
    lost: int = 0
    cut: int = 0

    @property
    def chunks(self) -> Ints:
        """int64 [C, 4]: both spans of each chunk, the teacher's first."""
        return np.concatenate([self.teacher_spans, self.student_spans], 1)


# The last word of a text with the space around it; in scripts without spaces, 16 characters.
_LAST_WORD = re.compile(r"\s*\S{0,16}\s*\Z")
_NEAR_THE_END = 64  # characters, in which the last word is looked for


@dataclass(frozen=True)
class CachedRow:
    """A row of a cache.

    Attributes:
        input_ids: integers [L].
        labels: integers [L], aligned with the logits, `IGNORE` where there is none.
        starts: bool [L], where documents begin that do not attend to each other, or None.
        opens: whether the row's first token begins a text, and does not continue one.
        single: whether the row is of one document alone: an end-of-text within it, such as that of
            a chat's turn, begins no other.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    starts: np.ndarray | None = None
    opens: bool = False
    single: bool = False


@dataclass
class _Line:
    """A cached row as units.

    Attributes:
        ids: int64 [n], the tokens and the last label.
        asked: bool [n], which of them are labels.
        special: bool [n].
        opener: bool [n], what the teacher's tokenizer puts before a document.
        fresh: bool [n], tokens with which a document begins.
        begins: bool [n], the first token of text of each such document.
        divides: bool [n], tokens with which one begins that does not attend to those before it.
        ends: int64 [n + 1], the units before each token.
        data: bytes of all tokens.
        offsets: int64 [n + 1], the bytes before each token.
    """

    ids: Ints
    asked: Mask
    special: Mask
    opener: Mask
    fresh: Mask
    begins: Mask
    divides: Mask
    ends: Ints
    data: bytes
    offsets: Ints


@dataclass
class _Stretch:
    """Bytes of a row that are tokenised together.

    Attributes:
        at: the position of their first token in the row; None of those that continue a stretch.
        prefixed: whether the student's tokenizer puts its space before them.
        open_end: whether the row stops within this text.
    """

    at: int | None
    unit: int
    data: bytes
    text: str | None
    prefixed: bool
    open_end: bool


@dataclass
class _Own:
    """The student's tokens as they are laid down, and the units that each covers."""

    ids: list[Ints] = field(default_factory=list)
    first: list[Ints] = field(default_factory=list)
    last: list[Ints] = field(default_factory=list)
    asked: list[Mask] = field(default_factory=list)
    inserted: list[Mask] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    divide: bool = False
    size: int = 0
    lost: int = 0

    def add(
        self,
        ids: Ints,
        first: Ints,
        last: Ints,
        *,
        asked: Mask | bool = True,
        inserted: bool = False,
    ) -> None:
        """Lay tokens; each covers the units from its `first` to its `last` (excluded)."""
        if not len(ids):
            return
        if self.divide:
            self.starts.append(self.size)
            self.divide = False
        self.ids.append(ids)
        self.first.append(first)
        self.last.append(last)
        self.asked.append(np.broadcast_to(np.asarray(asked, np.bool_), len(ids)))
        self.inserted.append(np.full(len(ids), inserted, np.bool_))
        self.size += len(ids)


class Aligner:
    """Makes rows for a student of rows of a cache.

    Attributes:
        max_length: tokens of the student's longest row; None cuts nothing.
    """

    def __init__(
        self, teacher: TokenBytes, student: TokenBytes, max_length: int | None = None
    ) -> None:
        """Pair two tokenizers."""
        self.teacher, self.student, self.max_length = teacher, student, max_length
        self._likes = like_marks(teacher, student)
        self._opening = np.asarray(student.opening, np.int64)

    def align(self, rows: Sequence[CachedRow]) -> list[Alignment]:
        """Rows for the student, one of each cached row.

        Raises:
            UsageError: a row holds an id that the cache's tokenizer does not have.
        """
        lines = [_line(self.teacher, row) for row in rows]
        parts = [list(self._parts(line)) for line in lines]
        found = iter(self._tokenise([p for row in parts for p in row if isinstance(p, _Stretch)]))
        aligned = []
        for row, line, pieces in zip(rows, lines, parts, strict=True):
            own = _Own()
            for piece in pieces:
                at = piece if isinstance(piece, int) else piece.at
                if at is not None:
                    self._open(own, line, at)
                if isinstance(piece, int):
                    self._lay_mark(own, line, piece)
                else:
                    self._lay_text(own, piece, next(found))
            aligned.append(self._meet(line, own, divided=row.starts is not None))
        return aligned

    def _parts(self, line: _Line) -> Iterator[_Stretch | int]:
        """Stretches of text, and the positions of special tokens, in order."""
        n = len(line.ids)
        borders = line.special | line.begins | line.divides
        borders[1:] |= line.special[:-1]
        borders[:1] = True
        bounds = [*np.flatnonzero(borders).tolist(), n]
        everywhere = self.student.structure.prefix == "always"
        for start, stop in itertools.pairwise(bounds):
            if line.special[start]:
                yield start
                continue
            prefixed = bool(line.begins[start]) or (everywhere and start > 0)
            unit = int(line.ends[start])
            at: int | None = start
            pieces = texts_in(line.data[line.offsets[start] : line.offsets[stop]])
            # Half a character at the end is left out, and what is before it continues as well.
            last = len(pieces) - 1 - (len(pieces) > 1 and pieces[-1][1] is None)
            for i, (data, text) in enumerate(pieces):
                open_end = stop == n and i >= last
                yield _Stretch(at, unit, data, text, prefixed, open_end)
                unit, at, prefixed = unit + len(data), None, False

    def _tokenise(self, parts: Sequence[_Stretch]) -> list[Ints]:
        found: list[Ints] = [np.zeros(0, np.int64)] * len(parts)
        for prefixed in (True, False):
            texts = {
                i: part.text
                for i, part in enumerate(parts)
                if part.text is not None and part.prefixed == prefixed
            }
            tokens = self.student.tokenise(list(texts.values()), opens=prefixed)
            for i, ids in zip(texts, tokens, strict=True):
                found[i] = ids
        return found

    def _open(self, own: _Own, line: _Line, at: int) -> None:
        """What the student needs before a document."""
        own.divide = own.divide or bool(line.divides[at])
        # The mark that it begins with may be this, as in a chat template that writes one.
        written = np.array_equal(self._likes.get(int(line.ids[at]), []), self._opening)
        if line.fresh[at] and not line.opener[at] and not written:
            unit = np.full(len(self._opening), line.ends[at])
            own.add(self._opening, unit, unit, asked=False, inserted=True)

    def _lay_mark(self, own: _Own, line: _Line, at: int) -> None:
        number = int(line.ids[at])
        likes = self._likes.get(number, self._opening[:0])
        if line.opener[at]:
            likes = self._opening[: len(self._opening) * (number == self.teacher.opening[-1])]
        unit = np.full(len(likes), line.ends[at])
        last = unit.copy()
        last[-1:] += 1  # of several the last one covers the unit
        own.add(likes, unit, last)

    def _lay_text(self, own: _Own, part: _Stretch, ids: Ints) -> None:
        if part.text is None:
            if not part.open_end:
                found = self.student.byte_ids[np.frombuffer(part.data, np.uint8)]
                (known,) = np.nonzero(found >= 0)
                first = part.unit + known
                own.add(found[known], first, first + 1, asked=False)
            return
        widths = self.student.text_bytes(ids, part.data)
        asked: Mask | bool = widths is not None
        if widths is None:
            own.lost += 1
            widths = np.zeros(len(ids), np.int64)
            widths[-1:] = len(part.data)
        last = part.unit + np.cumsum(widths)
        if part.open_end:
            # A space of the tokenizer's own, which has no units, goes with what follows it.
            end = np.maximum(last, last - widths + 1)
            asked = asked & (end <= part.unit + len(settled(part.text).encode()))
        own.add(ids, last - widths, last, asked=asked)

    def _meet(self, line: _Line, own: _Own, *, divided: bool) -> Alignment:
        """Labels and chunks."""
        if not own.size:  # a row of marks that the student does not have
            own.add(np.array([self.student.filler]), np.zeros(1, np.int64), np.zeros(1, np.int64))
        ids, first, last = (np.concatenate(part) for part in (own.ids, own.first, own.last))
        asked, inserted = np.concatenate(own.asked), np.concatenate(own.inserted)
        starts = np.zeros(len(ids), np.bool_)
        starts[own.starts] = True
        units = _sums(np.repeat(line.asked, np.diff(line.ends)))
        # A token of no units, such as a space of the tokenizer's own, belongs to what follows.
        until = np.minimum(np.maximum(last, first + 1), len(units) - 1)
        asked = asked & (units[until] - units[first] == np.maximum(until - first, 1)) & ~starts
        asked[0] = False
        size = int(np.flatnonzero(asked)[-1]) + 1 if asked.any() else min(len(ids), 2)
        kept = size if self.max_length is None else min(size, self.max_length + 1)
        cut = int(asked[kept:].sum())
        ids, first, last = ids[:kept], first[:kept], last[:kept]
        asked, inserted, starts = asked[:kept], inserted[:kept], starts[:kept]
        teacher_asked = _sums(line.asked)
        # What was inserted belongs to no chunk.
        (mine,) = np.nonzero(~inserted)
        begin, end = first[mine], last[mine]
        shared = np.intersect1d(line.ends, np.concatenate([begin, end]))
        theirs = np.searchsorted(line.ends[:-1], shared)
        ours = np.searchsorted(begin, shared)
        covered, own_labels = _sums(end - begin), _sums(asked[mine])
        t0, t1, s0, s1 = theirs[:-1], theirs[1:], ours[:-1], ours[1:]
        whole = (
            (t1 > t0)
            & (s1 > s0)
            & (covered[s1] - covered[s0] == np.diff(shared))
            & (teacher_asked[t1] - teacher_asked[t0] == t1 - t0)
            & (own_labels[s1] - own_labels[s0] == s1 - s0)
        )
        text = _sums(np.repeat(~line.special, np.diff(line.ends)))
        stop = max(len(ids) - 1, 1)
        return Alignment(
            input_ids=ids[:stop],
            labels=np.where(asked, ids, IGNORE)[1 : stop + 1]
            if len(ids) > 1
            else np.full(1, IGNORE, np.int64),
            starts=starts[:stop] if divided else None,
            teacher_spans=np.stack([teacher_asked[t0], teacher_asked[t1]], 1)[whole],
            student_spans=np.stack([own_labels[s0], own_labels[s1]], 1)[whole],
            chunk_bytes=(text[shared[1:]] - text[shared[:-1]])[whole],
            lost=own.lost,
            cut=cut,
        )


def unchanged(tokens: TokenBytes, row: CachedRow) -> Alignment:
    """A row for a student of the same tokenizer: as it is, each label a chunk by itself."""
    sizes, _ = label_bytes(tokens, row)
    each = np.arange(len(sizes))
    spans = np.stack([each, each + 1], 1)
    ids, labels = row.input_ids.astype(np.int64), row.labels.astype(np.int64)
    return Alignment(ids, labels, row.starts, spans, spans, sizes)


def label_bytes(tokens: TokenBytes, row: CachedRow) -> tuple[Ints, Mask]:
    """The bytes of each label of a row.

    Returns:
        By positions, int64, the bytes of text, and bool, whether it is text: not a special token,
        nor an id that is not a token's. A space of the tokenizer's own is text of 0 bytes.
    """
    line = _line(tokens, row, strict=False)
    is_text = ~line.special[line.asked]
    return np.diff(line.ends)[line.asked] * is_text, is_text


def _line(teacher: TokenBytes, row: CachedRow, *, strict: bool = True) -> _Line:
    """Lay a row on its line of units.

    Args:
        strict: refuse ids that are not a token's; otherwise they are special tokens.
    """
    last = row.labels[-1:]
    ids = np.concatenate([row.input_ids, last[last != IGNORE]]).astype(np.int64)
    if strict:
        teacher.check(ids)
    n = len(ids)
    asked, divides, fresh = np.zeros((3, n), np.bool_)
    asked[1:] = (row.labels != IGNORE)[: n - 1]
    special = ~teacher.is_text(ids)
    opener = np.isin(ids, teacher.opening)
    after_end = np.zeros(n, np.bool_)
    after_end[1:] = ids[:-1] == teacher.eos_id
    if teacher.eos_id in teacher.opening:
        # OPT's end-of-text opens documents too: of two together the second, which text follows.
        is_end = np.append(ids, teacher.eos_id) == teacher.eos_id
        opener &= ~is_end[:-1] | ~is_end[1:]
        after_end[1:] &= ~opener[:-1]
    if row.starts is not None:
        divides[: len(row.starts)] = row.starts
        fresh[1:] = divides[1:]
    elif not row.single and not (special & ~opener & (ids != teacher.eos_id)).any():
        # Where there are other marks this is a chat; its messages may end with it too.
        fresh = after_end
    fresh[:1] = row.opens
    begins = fresh.copy()
    begins[1:] |= opener[:-1]
    begins &= ~special
    data, offsets = teacher.decode(np.where(special, teacher.filler, ids), begins)
    ends = offsets.copy()
    ends[1:] += np.cumsum(special)
    return _Line(ids, asked, special, opener, fresh, begins, divides, ends, data, offsets)


def like_marks(teacher: TokenBytes, student: TokenBytes) -> dict[int, Ints]:
    """What a student has in place of each special token of a teacher, where it has anything.

    Returns:
        int64 arrays by the teacher's id: for what opens a document all that the student's
        tokenizer puts before a text (for the last of several; the others are nothing), for the
        end-of-text the student's, for any other the special token of the same text.
    """
    likes = {
        number: np.array([student.marks[text]])
        for text, number in teacher.marks.items()
        if text in student.marks
    }
    for number in teacher.opening:
        likes.pop(number, None)
    if teacher.opening and student.opening:
        likes[teacher.opening[-1]] = np.array(student.opening)
    if teacher.eos_id is not None and student.eos_id is not None:
        likes[teacher.eos_id] = np.array([student.eos_id])
    return likes


def texts_in(data: bytes) -> list[tuple[bytes, str | None]]:
    """Bytes in parts that are text, and in between parts that are none (None for their text)."""
    parts: list[tuple[bytes, str | None]] = []
    at = 0
    while at < len(data):
        try:
            parts.append((data[at:], data[at:].decode()))
            break
        except UnicodeDecodeError as error:
            start, stop = at + error.start, at + error.end
            if error.start:
                parts.append((data[at:start], data[at:start].decode()))
            if parts and parts[-1][1] is None:
                parts[-1] = (parts[-1][0] + data[start:stop], None)
            else:
                parts.append((data[start:stop], None))
            at = stop
    return parts


def settled(text: str) -> str:
    """A text without its last word: its tokens could be others if the text went on."""
    tail = text[-_NEAR_THE_END:]
    found = _LAST_WORD.search(tail)
    return text[: len(text) - len(tail) + found.start()] if found else text


def _sums(values: np.ndarray) -> Ints:
    """int64 [n + 1], the sums of the first 0 to n values."""
    sums = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=sums[1:])
    return sums
