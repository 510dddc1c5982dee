"""The page: sections about caches, runs and sweeps, with one style sheet and no script.

Guarantee: whatever the texts are, they stay texts (`kdcache.commands.report.html`), and a policy in
the page forbids every request and every script. It has at most `MOST_BYTES`: where more was asked
for, whole sections are left out, and say so.
"""

from __future__ import annotations

from collections.abc import Sequence

from kdcache.commands.report.gather import CachePart, Part, RunPart
from kdcache.commands.report.html import Html, element
from kdcache.commands.report.of_cache import cache_section
from kdcache.commands.report.of_runs import compare, run_section, sweep_section
from kdcache.commands.report.style import STYLE
from kdcache.humanize import size
from kdcache.version import __version__

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
