"""`kdcache report`, from its options to the page.

The page: sections about caches, runs and sweeps, with one style sheet and no script.

Guarantee: whatever the texts are, they stay texts (`kdcache.commands.report.html`), and a policy in
the page forbids every request and every script. It has at most `MOST_BYTES`: where more was asked
for, whole sections are left out, and say so.

The style sheet of the page: light and dark by the reader's system, and narrow screens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kdcache.commands.options import ReportOptions
from kdcache.commands.report.gather import CachePart, Part, RunPart, SweepPart, gather
from kdcache.commands.report.html import Html, element
from kdcache.commands.report.sections import cache_section, compare, run_section, sweep_section
from kdcache.files import local_path, output_errors, try_place, write_text
from kdcache.humanize import size
from kdcache.storage import redact
from kdcache.version import __version__

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#57606a;--line:#d0d7de;--box:#f6f8fa;
--link:#0550ae;--c0:#0550ae;--c1:#b35900;--c2:#116329;--c3:#a0111f;--c4:#6639ba;--c5:#57606a;
--s0:#e6f4ea;--s1:#f0f3c4;--s2:#fde7a7;--s3:#ffd0a3;--s4:#ffb3a6;--s5:#ff9a9a}
@media(prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#e6edf3;--dim:#9aa4af;--line:#3d444d;
--box:#161b22;--link:#79b8ff;--c0:#79b8ff;--c1:#ffb86b;--c2:#7ee787;--c3:#ff9a94;--c4:#d2b4ff;
--c5:#b1bac4;--s0:#12301c;--s1:#35380f;--s2:#4d3a05;--s3:#5c320b;--s4:#6b221c;--s5:#85141f}}
*{box-sizing:border-box}
html{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;background:var(--bg);
color:var(--fg)}
body{max-width:70rem;margin:0 auto;padding:1rem;overflow-wrap:anywhere}
h1{font-size:1.6rem;margin:.2em 0}h2{font-size:1.3rem;margin:2.2em 0 .4em;padding-top:.5em;
border-top:1px solid var(--line)}h3{font-size:1.1rem;margin:1.6em 0 .3em}h4{margin:1.2em 0 .3em}
a{color:var(--link)}:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-99rem}.skip:focus{position:static}
nav ul{padding-left:1.2rem;margin:.3em 0}.lead{font-size:1.1rem}.note,footer{color:var(--dim);
font-size:.9rem}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:.5rem 1.2rem;
margin:1em 0}dt{color:var(--dim);font-size:.85rem}dd{margin:0;unicode-bidi:isolate}
.scroll{overflow-x:auto;margin:1em 0;scrollbar-width:thin}
table{border-collapse:collapse;font-size:.92rem;min-width:min(18rem,100%);
font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.3em 0}
th,td{padding:.3em .7em;border-bottom:1px solid var(--line);vertical-align:top;text-align:left;
unicode-bidi:isolate;overflow-wrap:normal;white-space:pre-wrap}thead th{color:var(--dim);
white-space:nowrap}tbody th{font-weight:400}.number{text-align:right}
td.text,th.text{overflow-wrap:anywhere;min-width:4.5rem}
details{margin:.8em 0}summary{cursor:pointer;color:var(--link);padding:.2em 0}
.row{background:var(--box);border:1px solid var(--line);border-radius:6px;padding:.8em;
white-space:pre-wrap;line-height:1.9;unicode-bidi:isolate}
.t{unicode-bidi:isolate;border-radius:3px;padding:.12em 0}.gap{color:var(--dim)}
.s0{background:var(--s0)}.s1{background:var(--s1)}.s2{background:var(--s2)}
.s3{background:var(--s3)}.s4{background:var(--s4)}.s5{background:var(--s5)}
.keys .t{padding:.12em .4em}.keys,.guesses{list-style:none;padding:0;margin:.3em 0;display:flex;
flex-wrap:wrap;gap:.2em 1.1em}.guesses{margin:0;gap:0 .9em}.guesses b{font-weight:400;
color:var(--dim)}.key{width:28px;height:12px;vertical-align:middle}
figure{margin:1.2em 0;max-width:44rem}figcaption{font-weight:600}
.chart{width:100%;height:auto;display:block}.chart text{fill:var(--dim);font:13px system-ui,
sans-serif}.grid{stroke:var(--line)}.bar{fill:var(--c0)}.curve{fill:none;stroke-width:2}
.chart circle{stroke-dasharray:none}
.c0{stroke:var(--c0)}.c1{stroke:var(--c1);stroke-dasharray:7 3}
.c2{stroke:var(--c2);stroke-dasharray:2 3}.c3{stroke:var(--c3);stroke-dasharray:9 3 2 3}
.c4{stroke:var(--c4);stroke-dasharray:12 4}.c5{stroke:var(--c5);stroke-dasharray:4 4}
@media(max-width:34rem){dl{grid-template-columns:1fr 1fr}.chart text{font-size:16px}}
@media print{details{display:block}.scroll{overflow:visible}}
"""


MOST_BYTES = 2_000_000
_ROOM = 100_000  # of it for headings, contents and style
_NAME = 80


def render_page(parts: Sequence[Part]) -> str:
    """One HTML document about all parts."""
    runs = [part for part in parts if isinstance(part, RunPart)]
    sections: list[tuple[str, Html]] = []
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
    for i, (title, body) in enumerate(sections):
        cost = len(body.encode())
        if cost > left:
            body = element(
                "p",
                f"Left out, to keep the page below {size(MOST_BYTES)}: it has "
                f"{size(cost)}. Make a report of it alone, or with fewer --rows.",
            )
            cost = len(body.encode())
        left -= cost
        name = f"part-{i}"
        heading = element("h2", title, id=name)
        shown.append(element("section", heading, body, aria_labelledby=name))
    return "<!DOCTYPE html>\n" + _document([title for title, _ in sections], shown)


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"


def _document(titles: Sequence[str], sections: Sequence[Html]) -> Html:
    title = f"{titles[0]} - kdcache report" if len(titles) == 1 else "kdcache report"
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    links = [
        element("li", element("a", title, href=f"#part-{i}")) for i, title in enumerate(titles)
    ]
    contents = element("nav", element("ul", *links), aria_label="Contents")
    return element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("meta", name="referrer", content="no-referrer"),
            element("title", title),
            element("style", Html(STYLE)),
        ),
        element(
            "body",
            element("a", "Skip to the content", href="#content", class_="skip"),
            element("header", element("h1", "kdcache report"), contents),
            element("main", *sections, id="content"),
            element("footer", element("p", f"Made by kdcache {__version__}.")),
        ),
        lang="en",
    )


@dataclass(frozen=True)
class ReportResult:
    """The outcome of `report`.

    Attributes:
        out: the page.
        bytes: of it.
        caches: that it shows.
        runs: that it shows.
        sweeps: that it shows.
    """

    out: str
    bytes: int
    caches: int
    runs: int
    sweeps: int


def report(
    options: ReportOptions, *, report: Callable[[str], None] = lambda line: None
) -> ReportResult:
    """Write one self-contained page about caches, runs and sweeps.

    Args:
        options: see `ReportOptions`.
        report: takes a line about what is read.

    Raises:
        UsageError: a path holds nothing that a report knows.
        CorruptCacheError: a cache is damaged.
    """
    out = local_path(options.out)
    try_place(options.out)
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
