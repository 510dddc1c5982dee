"""Planning: what it does grows with the number of files, by no more than a few calls each."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_ids import write_indexed

from kdcache.commands.build.driver import SpansLeft
from kdcache.corpus import Corpus

SYSTEM = {"stat", "lstat", "open", "scandir", "listdir", "readlink"}


def counted(work: Callable[[], Any]) -> Counter[str]:
    """Calls to the system by name, and `calls`: all calls of functions."""
    counts: Counter[str] = Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            counts["calls"] += 1
        if event == "c_call" and argument.__name__ in SYSTEM:
            counts[argument.__name__] += 1

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counts


def plan(pattern: str) -> None:
    """List the files, cut them, say what they are, and hand out all spans to one worker."""
    corpus = Corpus.open([pattern], span_bytes=500)
    corpus.identity()
    left = SpansLeft(lambda span: corpus.spans[span].group)
    for span in range(len(corpus.spans)):
        left.append(span)
    group = ""
    while left:
        group = corpus.spans[left.take(group)].group


def corpus_of(folder: Path, files: int) -> str:
    """Files of a few spans each in folders of folders, some compressed."""
    for i in range(files):
        inside = folder / str(i % 5) / str(i % 3)
        inside.mkdir(parents=True, exist_ok=True)
        kind = "jsonl.gz" if i % 4 == 0 else "jsonl"
        (inside / f"{i:05}.{kind}").write_bytes(b"%d\n" % i * 300)
    return str(folder)


@pytest.mark.parametrize(
    ("pattern", "stats"), [("{}", 1), ("{}/*/*/*.jsonl*", 2), ("{}/**/*.jsonl*", 2), ("{}/*", 1)]
)
def test_a_file_costs_a_stat_or_two_and_is_opened_once(
    tmp_path: Path, pattern: str, stats: int
) -> None:
    few, many = (_planned(tmp_path, pattern, n) for n in (100, 300))
    more = {name: (many[name] - few[name]) / 200 for name in (*SYSTEM, "calls")}
    assert more["stat"] <= stats
    assert more["open"] <= 1, "to read both ends"
    assert more["lstat"] == more["scandir"] == more["listdir"] == more["readlink"] == 0
    # Nothing is done for each pair: twice as many more cost twice as much more.
    most = _planned(tmp_path, pattern, 700)
    assert (most["calls"] - many["calls"]) / 400 <= 1.05 * more["calls"]


def _planned(tmp_path: Path, pattern: str, files: int) -> Counter[str]:
    folder = corpus_of(tmp_path / str(files), files)
    return counted(lambda: plan(pattern.format(folder)))


@pytest.mark.parametrize("limit", [None, 64])
def test_spans_of_ids_hold_as_many_whatever_their_type(tmp_path: Path, limit: int | None) -> None:
    documents = [[[i % 200] * 50] for i in range(80)]
    spans = {}
    for kind in ("u1", "u2", "i4", "i8"):
        write_indexed(tmp_path / kind, documents, kind)
        corpus = Corpus.open([str(tmp_path / f"{kind}.idx")], span_bytes=4 * 400, limit=limit)
        found = [
            [record.values["input_ids"].tolist() for record in Corpus.read(span)]
            for span in corpus.spans
        ]
        assert [ids for span in found for ids in span] == [d[0] for d in documents[:limit]]
        spans[kind] = [sum(map(len, span)) for span in found]
    assert set(spans["i4"]) == {400}
    assert spans["u1"] == spans["u2"] == spans["i4"] == spans["i8"]
