"""HTML as values: whatever is not `Html` is a text, and is escaped.

Guarantee: a page is well-formed XML too, whatever the texts are. Control characters are written as
`\\u0007`, so that what came from a corpus is seen and does nothing.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable, Sequence

from kdcache.humanize import printable

_NOT_XML = re.compile("[\ud800-\udfff\ufffe\uffff]")
_VOID = {"meta", "br", "hr"}


class Html(str):
    """Markup: every text in it is escaped."""

    __slots__ = ()


def text(value: str) -> Html:
    """A text from anywhere, as markup."""
    shown = _NOT_XML.sub(lambda found: f"\\u{ord(found.group()):04x}", printable(value))
    return Html(html.escape(shown.replace("\r", "\n"), quote=True))


def element(tag: str, *children: str | None, **attributes: str | float | None) -> Html:
    """An element.

    Args:
        tag: its name.
        children: texts, which are escaped, and markup; None is left out.
        attributes: `class_` for `class`, `aria_label` for `aria-label`; None is left out.
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Html(f"<{tag}{given}/>")
    return Html(f"<{tag}{given}>{join(children)}</{tag}>")


def join(parts: Iterable[str | None]) -> Html:
    """Texts and markup, one after the other."""
    given = (part for part in parts if part is not None)
    return Html("".join(part if isinstance(part, Html) else text(part) for part in given))


def table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    texts: Collection[int] = (0,),
) -> Html:
    """A table in a box that scrolls by itself, for narrow screens.

    Args:
        caption: what it is.
        header: names of the columns.
        rows: their cells; the first one names its row.
        texts: the columns of texts; the others are numbers, aligned to the right.
    """
    kinds = ["text" if i in texts else "number" for i in range(len(header))]
    head = [
        element("th", name, scope="col", class_=kind)
        for name, kind in zip(header, kinds, strict=True)
    ]
    body = [
        element(
            "tr",
            element("th", cells[0], scope="row", class_="text"),
            *(
                element("td", cell, class_=kind)
                for cell, kind in zip(cells[1:], kinds[1:], strict=True)
            ),
        )
        for cells in rows
    ]
    whole = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *head)),
        element("tbody", *body),
    )
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def facts(pairs: Iterable[tuple[str, str]]) -> Html:
    """Names and values."""
    return element(
        "dl",
        *(element("div", element("dt", name), element("dd", value)) for name, value in pairs),
    )


def details(summary: str, *children: str | None) -> Html:
    """A part that opens on demand, by keyboard too."""
    return element("details", element("summary", summary), *children)
