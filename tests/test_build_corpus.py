"""What a build makes of its corpus: text files, changes while it runs and between runs, labels."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import further

from kdcache.cache import Cache
from kdcache.commands.build.build import build
from kdcache.commands.build.driver import Progress
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.prepare import prepare
from kdcache.errors import IncompleteError, UsageError
from kdcache.tasks import IGNORE

pytestmark = pytest.mark.slow


def labels(cache: str) -> list[int]:
    """The labels of all rows, in order: for text that is joined, its tokens but the first ones."""
    opened = Cache.open(cache)
    shards = [opened.read(span) for span in range(opened.spec.spans)]
    return [int(x) for shard in shards for x in shard.labels if x != IGNORE]


def test_a_folder_of_text_files_is_the_same_documents_as_jsonl(
    small_build: BuildOptions,
    corpus_texts: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    books = ["\n".join(corpus_texts[i : i + 6]) for i in range(0, 30, 6)]
    found: dict[str, list[list[int]]] = {}
    for kind in ("txt", "jsonl"):
        (tmp_path / kind).mkdir()
        for i, book in enumerate(books):
            text = book + "\n" if kind == "txt" else json.dumps({"text": book}) + "\n"
            (tmp_path / kind / f"{i}.{kind}").write_text(text)
        for packing in ("concat", "none"):
            options = dataclasses.replace(
                small_build,
                corpus=(str(tmp_path / kind),),
                out=str(tmp_path / f"{kind}-{packing}"),
                packing=packing,
                max_length=64,
            )
            build(options)
            found.setdefault(packing, []).append(labels(options.out))
    for packing, (text, lines) in found.items():
        assert text == lines, packing
    assert sum(label == 0 for label in found["concat"][0]) == len(books), "one EOS a document"
    assert "text files: each file is one document (--read documents)" in caplog.text
    # Cut into spans, a document loses the first label of each piece and still ends once.
    options = dataclasses.replace(
        small_build,
        corpus=(str(tmp_path / "txt"),),
        out=str(tmp_path / "pieces"),
        shard_tokens=256,
    )
    spans = build(options).spans
    assert spans > len(books)
    pieces = labels(options.out)
    assert sum(label == 0 for label in pieces) == len(books)
    assert len(pieces) >= len(found["concat"][0]) - spans
    with pytest.raises(UsageError, match=r'reading.documents: "file" -> "line"'):
        build(dataclasses.replace(options, documents="line"))


def _files(folder: Path, texts: list[str]) -> tuple[Path, Path]:
    first, second = folder / "a.jsonl", folder / "b.jsonl"
    # Longer than its ends: of the middle nothing is in its tag.
    for path, most in ((first, 1 << 12), (second, 200_000)):
        lines = (json.dumps({"text": text}) + "\n" for text in itertools.cycle(texts))
        while not path.exists() or path.stat().st_size < most:
            with path.open("a") as file:
                file.write(next(lines))
        os.utime(path, ns=(10**18, 10**18))
    assert second.stat().st_size > 3 * (64 << 10)
    return first, second


def _edit_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = slice(70_000, len(data) - 70_000)
    data[middle] = data[middle].replace(b"a", b"o")
    path.write_bytes(data)


def _swap_words(path: Path) -> None:
    """Other text of as many tokens."""
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(data[:half] + re.sub(rb" (\w+) (\w+) ", rb" \2 \1 ", data[half:], count=1))


def _blank(path: Path) -> None:
    path.write_bytes(b" " * path.stat().st_size)


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"\n", 0, len(data) // 2) + 1])


def test_many_small_files_are_warned_of(
    small_build: BuildOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(100):
        (tmp_path / f"{i}.txt").write_text("A few words.")
    prepare(dataclasses.replace(small_build, corpus=(str(tmp_path),), limit=99))
    assert "shard of its own" not in caplog.text
    prepare(dataclasses.replace(small_build, corpus=(str(tmp_path),)))
    assert "100 files of 12 B on average, each of which becomes a shard of its own" in caplog.text


def test_copies_of_a_file_and_links_to_it_are_named(
    small_build: BuildOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [json.dumps({"text": f"Number {i} of some words."}) + "\n" for i in range(9)]
    for i, text in enumerate(texts[:5]):
        (tmp_path / f"{i}.jsonl").write_text(text)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "nothing.jsonl").touch()
    twice = (str(tmp_path), f"{tmp_path}/*.jsonl", f"{tmp_path}/0.jsonl")
    one = prepare(dataclasses.replace(small_build, corpus=twice, limit=None))
    assert len(one.corpus.files) == 7, "a file that several patterns name counts once"
    assert "copies" not in caplog.text
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "3.jsonl")
    (tmp_path / "b.jsonl").write_text(texts[4])
    prepare(dataclasses.replace(small_build, corpus=twice, limit=None))
    assert "2 files of the corpus are copies of others" in caplog.text
    assert "a.jsonl is 3.jsonl; b.jsonl is 4.jsonl. Leave them out" in caplog.text
    caplog.clear()
    for i in range(5):
        (tmp_path / f"c{i}.jsonl").write_text(texts[0])
    prepare(dataclasses.replace(small_build, corpus=twice, limit=None))
    assert "7 files" in caplog.text
    assert caplog.text.count(".jsonl is ") == 3
    assert "; …" in caplog.text


@pytest.mark.parametrize(
    ("change", "last"),
    [(_edit_middle, True), (_blank, False), *further((_edit_middle, False), (_cut, False))],
)
def test_a_file_that_changes_while_it_is_built_is_never_sealed(
    small_build: BuildOptions,
    corpus_texts: list[str],
    tmp_path: Path,
    change: Callable[[Path], object],
    last: bool,
) -> None:
    (tmp_path / "corpus").mkdir()
    _, second = _files(tmp_path / "corpus", corpus_texts)
    options = dataclasses.replace(
        small_build,
        corpus=(str(tmp_path / "corpus"),),
        codec="topk:4",
        shard_tokens=1 << 13,
        max_length=128,
    )
    before = second.read_bytes()

    changes: list[Callable[[Path], object]] = [change]

    def on_progress(progress: Progress) -> None:
        if changes and progress.made and (progress.done == progress.spans or not last):
            changes.pop()(second)

    with pytest.raises(UsageError, match=r"b\.jsonl: the file was changed after it was planned"):
        build(options, on_progress=on_progress)
    with pytest.raises(IncompleteError, match="has not finished"):
        Cache.open(options.out)
    made = Cache.resume(options.out).committed()
    assert 0 in made, "the shard of the other file stays"
    # The same command: by its identity, or by the rows of the shards that were made.
    again = r"b\.jsonl: the file was changed since this build began|begun with other options"
    if change is not _edit_middle or len(made) > 2:
        with pytest.raises(UsageError, match=again):
            build(options)
    if last:
        second.write_bytes(before)
        assert build(options).rows > 0


def test_a_corpus_that_was_copied_is_compared_and_goes_on(
    small_build: BuildOptions,
    corpus_texts: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The frequencies of ids may show an edit too; here the rows must.
    monkeypatch.setattr("kdcache.commands.build.prepare.count_ranks", lambda *_: b"")
    (tmp_path / "corpus").mkdir()
    _, second = _files(tmp_path / "corpus", corpus_texts)
    options = dataclasses.replace(
        small_build,
        corpus=(str(tmp_path / "corpus"),),
        codec="topk:4",
        shard_tokens=1 << 13,
        max_length=128,
    )
    build(options)
    whole = Cache.open(options.out)
    digest, names = whole.digest, [shard.name for shard in whole.manifest.shards]
    # As an interrupted build leaves it.
    Path(options.out, "manifest.json").unlink()
    Path(options.out, "shards", names[-1]).unlink()
    second.touch()
    with caplog.at_level(logging.WARNING):
        build(options)
    assert f"comparing {len(names) - 2} shards" in caplog.text
    assert Cache.open(options.out).digest == digest
    Path(options.out, "manifest.json").unlink()
    _swap_words(second)
    with pytest.raises(UsageError, match=r"b\.jsonl: the file was changed since this build began"):
        build(options)


def test_the_output_may_lie_in_the_corpus(
    small_build: BuildOptions, text_corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(text_corpus.read_text().splitlines(keepends=True)[:20]))
    for pattern in (str(folder), f"{folder}/**"):
        options = dataclasses.replace(
            small_build, corpus=(pattern,), out=str(folder / "out" / str(len(pattern)))
        )
        assert build(options).made
        assert not build(options).made


def test_labels_that_are_ignored(
    small_build: BuildOptions, tiny_classifier: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "foreign.csv"
    corpus.write_text("text;label\n" + "".join(f"a film, number {i};B{i}\n" for i in range(9)))
    options = dataclasses.replace(
        small_build,
        teacher=(str(tiny_classifier),),
        task="sequence-classification",
        corpus=(str(corpus),),
        delimiter=";",
        max_length=64,
    )
    with pytest.raises(
        UsageError, match="label is 'B0', which is not one of the teacher's classes"
    ):
        build(options)
    options = dataclasses.replace(options, label_column="none", out=str(tmp_path / "ignored"))
    assert build(options).rows == 9
    assert np.all(Cache.open(options.out).read(0).labels == IGNORE)


@pytest.mark.parametrize("packing", ["none", "split", "concat"])
def test_a_completion_that_is_cut_away_whole_is_counted(
    small_build: BuildOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture, packing: str
) -> None:
    corpus = tmp_path / "pairs.jsonl"
    pairs = [("short", " answer"), ("a long prompt " * 40, " lost answer"), ("another", " one")]
    corpus.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    options = dataclasses.replace(
        small_build, corpus=(str(corpus),), packing=packing, max_length=64
    )
    result = build(options)
    cut = packing == "none"
    assert result.skipped == result.truncated == int(cut)
    assert ("pairs.jsonl: byte" in caplog.text) == cut
    assert ("its first 64 tokens (--max-length) contain no label" in caplog.text) == cut
