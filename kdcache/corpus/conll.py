"""CoNLL files: a line a word, with its tags in further columns, and an empty line after a sentence.

The shared tasks of CoNLL made the form (Tjong Kim Sang and De Meulder 2003); columns are separated
by tabs where a line has one, else by blanks. Lines that begin with `-DOCSTART-` say where a
document begins and are left out. CoNLL-U is that of Universal Dependencies, with ten columns and
comments.

Cost and cuts are those of paragraphs: a sentence belongs to the span in which its first line
starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kdcache.corpus.formats import Raw
from kdcache.corpus.records import FileColumns, RecordError, shorten
from kdcache.corpus.text import TextParagraphs, decoded

_DOCUMENT = b"-DOCSTART-"
_CONLLU = ("id", "tokens", "lemma", "tags", "xpos", "feats", "head", "deprel", "deps", "misc")


class Conll(TextParagraphs):
    """Sentences: `tokens` are the first column and `tags` the last, or as `Reading.columns` says.

    A file of one column holds words without tags.
    """

    def _open(self, columns: Sequence[str] | None) -> None:
        super()._open(columns)
        self._names: tuple[str, ...] | None = self._span.reading.columns
        self.source = FileColumns(self._names or ("tokens", "tags"))

    def _rows(self) -> Iterator[Raw]:
        for location, payload in super()._rows():
            if isinstance(payload, bytes):
                payload = b"\n".join(line for line in payload.splitlines() if self._is_word(line))
                if not payload:
                    continue
            yield location, payload

    def _is_word(self, line: bytes) -> bool:
        """Whether a line is one of a sentence."""
        return not line.startswith(_DOCUMENT)

    def _values(self, payload: bytes) -> dict[str, Any]:
        rows: list[list[str]] = [_fields(line) for line in decoded(payload).split("\n")]
        width = len(rows[0])
        for row in rows:
            if len(row) != width:
                raise RecordError(
                    f"the line {shorten(' '.join(row))!r} has {len(row)} columns, the first of its "
                    f"sentence has {width}"
                )
        columns = [[row[i] for row in rows] for i in range(width)]
        names = self._names
        if names is None:
            return {"tokens": columns[0], **({"tags": columns[-1]} if width > 1 else {})}
        if width != len(names):
            raise RecordError(
                f"{width} columns where --columns names {len(names)} ({shorten(', '.join(names))})"
            )
        return dict(zip(names, columns, strict=True))


class ConllU(Conll):
    """Sentences of Universal Dependencies: `tokens` are the forms, `tags` the universal parts of
    speech; the other columns have their names (`xpos`, `deprel`, ...). Comments, and lines of
    several words or of none (`1-2`, `1.1`), are left out.
    """

    def _open(self, columns: Sequence[str] | None) -> None:
        super()._open(columns)
        self._names = _CONLLU
        self.source = FileColumns(_CONLLU)

    def _is_word(self, line: bytes) -> bool:
        return not line.startswith(b"#") and line.split(b"\t", 1)[0].isdigit()


def _fields(line: str) -> list[str]:
    if "\t" in line:
        return [field.strip(" ") for field in line.split("\t")]
    return [field for field in line.split(" ") if field]
