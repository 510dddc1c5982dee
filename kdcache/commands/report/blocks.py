"""What a page is made of: blocks of texts and numbers, of which `page.html.jinja` makes markup."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kdcache.commands.report.charts import Chart


@dataclass(frozen=True)
class Paragraph:
    """A text, and how it looks: `lead`, `note`, `row`, or as the others."""

    kind: ClassVar = "paragraph"
    text: str
    look: str = ""


@dataclass(frozen=True)
class Heading:
    """A heading below a section's."""

    kind: ClassVar = "heading"
    text: str


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    kind: ClassVar = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Coloured:
    """A cell in the colour of a level of surprise."""

    kind: ClassVar = "coloured"
    text: str
    level: str


@dataclass(frozen=True)
class Guesses:
    """A cell of names with probabilities."""

    kind: ClassVar = "guesses"
    items: Sequence[tuple[str, str]]


Cell = str | Coloured | Guesses


@dataclass(frozen=True)
class Table:
    """A table in a box that scrolls by itself, for narrow screens.

    Attributes:
        caption: what it is.
        header: names of the columns.
        rows: their cells; the first one names its row.
        texts: the columns of texts; the others are numbers, aligned to the right.
    """

    kind: ClassVar = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    texts: Collection[int] = (0,)


@dataclass(frozen=True)
class Legend:
    """The colours of surprise with their meaning."""

    kind: ClassVar = "legend"
    levels: Sequence[str]


@dataclass(frozen=True)
class RowText:
    """A row's tokens: texts with the classes of their look, or None for what stands between."""

    kind: ClassVar = "row_text"
    pieces: Sequence[tuple[str, str | None]]


@dataclass(frozen=True)
class Details:
    """A part that opens on demand, by keyboard too."""

    kind: ClassVar = "details"
    summary: str
    blocks: Sequence[Block | None]


@dataclass(frozen=True)
class Article:
    """A row with its title."""

    kind: ClassVar = "article"
    title: str
    blocks: Sequence[Block | None]


Block = Paragraph | Heading | Facts | Table | Chart | Legend | RowText | Details | Article
Blocks = Sequence[Block | None]
