"""`kdcache report`, from its options to the page.

The page: sections about caches, runs and sweeps, with one style sheet and no script. Sections are
blocks of texts and numbers (`sections`, `charts`); `page.html.jinja` alone makes markup of them.

Guarantee: whatever the texts are, they stay texts: the template escapes each, and control
characters are written as `\\u0007`, so that the page is well-formed XML too. A policy in the page
forbids every request and every script. It has at most `MOST_BYTES`: where more was asked for, whole
sections are left out, and say so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import DictLoader, Environment
from markupsafe import Markup

from kdcache import __version__
from kdcache.commands.options import ReportOptions
from kdcache.commands.report import charts
from kdcache.commands.report.charts import Blocks, Paragraph
from kdcache.commands.report.gather import CachePart, Part, RunPart, SweepPart, gather
from kdcache.commands.report.sections import cache_section, compare, run_section, sweep_section
from kdcache.files import local_path, output_errors, try_output, write_text
from kdcache.humanize import printable, size
from kdcache.storage import redact

MOST_BYTES = 2_000_000
_ROOM = 100_000  # of it for headings, contents and style
_NAME = 80
_NOT_XML = re.compile("[\ud800-\udfff\ufffe\uffff]")


def xml_text(value: Any) -> Any:
    """What the template writes of a value: a text that XML can hold; markup as it is."""
    if isinstance(value, Markup):
        return value
    shown = _NOT_XML.sub(lambda found: f"\\u{ord(found.group()):04x}", printable(str(value)))
    return shown.replace("\r", "\n")


@cache
def environment() -> Environment:
    """Jinja with the page's template: texts are escaped, and numbers of charts are known."""
    template = _data("page.html.jinja")
    made = Environment(
        loader=DictLoader({"page": template}),
        autoescape=True,
        finalize=xml_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sizes = ("WIDTH", "HEIGHT", "LEFT", "RIGHT", "TOP", "BOTTOM")
    made.globals.update({name: getattr(charts, name) for name in sizes})
    return made


def _data(name: str) -> str:
    return resources.files("kdcache.commands.report").joinpath(name).read_text("utf-8")


def markup(blocks: Blocks) -> Markup:
    """Blocks as HTML; None is left out."""
    return Markup(environment().get_template("page").module.blocks(blocks))  # type: ignore[attr-defined]


def render_page(parts: Sequence[Part]) -> str:
    """One HTML document about all parts."""
    runs = [part for part in parts if isinstance(part, RunPart)]
    sections: list[tuple[str, Blocks]] = []
    if len(runs) > 1 or (runs and runs[0].finished):
        sections.append(("Students beside their teachers", compare(runs)))
    for part in parts:
        if isinstance(part, CachePart):
            sections.append((f"Cache {_short(part.facts.cache)}", cache_section(part)))
        elif isinstance(part, RunPart):
            sections.append((f"Run {_short(part.path)}", run_section(part)))
        else:
            sections.append((f"Sweep {_short(part.path)}", sweep_section(part)))
    left = MOST_BYTES - _ROOM
    shown = []
    for title, blocks in sections:
        body = markup(blocks)
        if (cost := len(body.encode())) > left:
            why = f"Left out, to keep the page below {size(MOST_BYTES)}: it has {size(cost)}. "
            body = markup([Paragraph(f"{why}Make a report of it alone, or with fewer --rows.")])
        left -= len(body.encode())
        shown.append((title, body))
    title = f"{shown[0][0]} - kdcache report" if len(shown) == 1 else "kdcache report"
    page = environment().get_template("page").module.page  # type: ignore[attr-defined]
    return str(page(title, Markup(_data("page.css")), shown, __version__))


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"


@dataclass(frozen=True)
class ReportResult:
    """The outcome of `report`."""

    out: str
    bytes: int
    caches: int
    runs: int
    sweeps: int


def report(
    options: ReportOptions, *, report: Callable[[str], None] = lambda line: None
) -> ReportResult:
    """Write one self-contained page about caches, runs and sweeps.

    Raises:
        UsageError: a path holds nothing that a report knows.
        CorruptCacheError: a cache is damaged.
    """
    out = local_path(options.out)
    try_output(options.out)
    parts: list[Part] = []
    for path in options.paths:
        report(f"reading {redact(path)}")
        parts.append(gather(path, options))
    page = render_page(parts)
    with output_errors(out):
        write_text(out, page)
    count = {kind: sum(isinstance(part, kind) for part in parts) for kind in _KINDS}
    return ReportResult(str(out), len(page.encode()), *count.values())


_KINDS: tuple[type, ...] = (CachePart, RunPart, SweepPart)
