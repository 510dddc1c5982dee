"""Building in this process: resuming, refusing, wrong input, and the driver's way with bad
spans.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from broken_caches import files
from conftest import further, make_tiny_lm
from transformers import AutoModelForCausalLM

from kdcache.cache import Cache
from kdcache.cache.check import problems
from kdcache.cache.manifest import ShardEntry
from kdcache.cli.display import BuildDisplay
from kdcache.commands.build import make
from kdcache.commands.build.build import build
from kdcache.commands.build.driver import Driver, Progress
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.prepare import _span_bytes, prepare
from kdcache.commands.build.workers import Fault, Outcome, SpanReport, WorkerFigures, Workers
from kdcache.commands.interrupt import interruptible
from kdcache.corpus import InputFile, Span
from kdcache.errors import IncompleteError, KdcacheError, UsageError
from kdcache.rows import RowSpec
from kdcache.rows.batches import batches
from kdcache.targets import Codec, DenseTargets, SparseTargets
from kdcache.teacher import TeacherFiles

pytestmark = pytest.mark.slow


@pytest.fixture
def options(small_build: BuildOptions) -> BuildOptions:
    return dataclasses.replace(
        small_build,
        codec="dense",
        max_length=64,
        shard_tokens=800,
        batch_tokens=512,
        limit=60,
    )


def test_the_folder_may_move_and_other_batches_give_close_targets(
    options: BuildOptions, text_corpus: Path, tmp_path: Path
) -> None:
    build(options)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(text_corpus, moved)
    again = dataclasses.replace(options, corpus=(str(moved / text_corpus.name),))
    assert build(again).made == 0, "the corpus is known by its content, not its folder"
    other = dataclasses.replace(options, out=str(tmp_path / "other"), batch_tokens=100)
    build(other)
    one, two = (Cache.open(o.out).read(1).targets.at(1.0) for o in (options, other))
    assert isinstance(one, DenseTargets)
    assert isinstance(two, DenseTargets)
    torch.testing.assert_close(one.logits, two.logits, rtol=1e-4, atol=1e-4)


def test_a_changed_option_is_refused_with_the_fields_that_differ(
    options: BuildOptions, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    build(options)
    before = files(Path(options.out))
    with pytest.raises(UsageError, match="rows.max_length: 64 -> 32"):
        build(dataclasses.replace(options, max_length=32))
    with pytest.raises(UsageError, match='codec: "dense" -> "topk:4"'):
        build(dataclasses.replace(options, codec="topk:4"))
    other = make_tiny_lm(tiny_tokenizer, tmp_path / "other-teacher", seed=1)
    with pytest.raises(UsageError, match="teachers.0.sha256"):
        build(dataclasses.replace(options, teacher=(str(other),)))
    assert files(Path(options.out)) == before


def test_a_changed_corpus_is_refused(
    options: BuildOptions, text_corpus: Path, tmp_path: Path
) -> None:
    copy = tmp_path / text_corpus.name
    shutil.copy(text_corpus, copy)
    options = dataclasses.replace(options, corpus=(str(copy),))
    build(options)
    text = copy.read_text()
    copy.write_text(text.replace("e", "a", 1))
    with pytest.raises(UsageError, match=r"corpus\.0\.tag"):
        build(options)


@pytest.mark.parametrize(
    ("codec", "vocabulary", "width"),
    [
        ("topk:4", 2, 64),
        ("sample:4", 2, 64),
        ("sample:4", 70_000, 70_032),
        *further(("topk:4", 300_000, 300_032), ("sample:4", 300_000, 300_032)),
    ],
)
def test_vocabularies_of_any_size(vocabulary: int, width: int, codec: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained(folder)
    teacher = make_tiny_lm(folder, tmp_path / "teacher", vocab_size=width)
    corpus = tmp_path / "text.txt"
    corpus.write_text(" ".join(f"w{vocabulary - 1 - i % 2}" for i in range(40)))
    out = str(tmp_path / "cache")
    result = build(
        BuildOptions((str(teacher),), (str(corpus),), out, codec=codec, max_length=40, workers=0)
    )
    cache = Cache.open(out)
    assert cache.spec.vocab_size == vocabulary
    assert list(problems(cache)) == []
    data = cache.read(0)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        logits = model(torch.from_numpy(data.row(0).input_ids)[None].long()).logits[0]
    outside = logits.softmax(-1)[:, vocabulary:].sum(-1).mean()
    assert result.clipped_mass == pytest.approx(float(outside), rel=1e-3)
    assert (result.clipped_mass > 0.5) == (vocabulary == 2)
    p = logits[:, :vocabulary].softmax(-1)
    targets = data.targets.at(1.0)
    assert isinstance(targets, SparseTargets)
    assert min(vocabulary, 2**16) <= int(targets.ids.max()) + 1 <= vocabulary
    if targets.exact:
        best = p.topk(min(4, vocabulary), -1).values
        torch.testing.assert_close(targets.weights, best, rtol=2.5e-2, atol=6e-3)
        torch.testing.assert_close(p.gather(1, targets.ids), best, rtol=5e-3, atol=1e-3)
    total = targets.weights.sum(-1) + targets.tail
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


@pytest.mark.parametrize("total", [1, 10**6, 10**9, 10**12, 10**15])
def test_spans_are_many_enough_to_share_and_few_enough_to_list(
    options: BuildOptions, total: int
) -> None:
    options = dataclasses.replace(options, shard_tokens=None)
    rows = RowSpec(task=options.task)
    for codec in ("sample:20", "topk:64"):
        size = _span_bytes(options, Codec.parse(codec, (1.0,), 50_000), rows, 0.0, total)
        decoded = size / 4 * Codec.parse(codec, (1.0,), 50_000).bytes_per_position
        assert decoded <= 1 << 28, "a reader holds a shard in memory"
        assert total / size <= 100_000 or decoded > 0.9 * (1 << 28)
        assert size <= max(1 << 22, total / 100_000)


@pytest.mark.parametrize("total", [1 << 20, 1 << 30, 1 << 36, 1 << 40])
def test_spans_of_a_slow_teacher_are_smaller(options: BuildOptions, total: int) -> None:
    options = dataclasses.replace(options, shard_tokens=None)
    codec, rows = Codec.parse("sample:20", (1.0,), 50_000), RowSpec(task=options.task)
    usual, before = _span_bytes(options, codec, rows, 0.0, total), 1 << 62
    for seconds in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1.0):
        size = _span_bytes(options, codec, rows, seconds, total)
        # Two minutes of the teacher, unless that made too small or too many of them.
        assert size / 4 * seconds <= 121 or size in (1 << 16, total // 400_000, usual)
        assert total / size <= 400_010 or size == usual
        assert size <= min(usual, before)
        before = size
    assert before < usual or usual == 1 << 16


def test_spans_follow_from_the_weights_of_the_teacher(
    options: BuildOptions, tmp_path: Path
) -> None:
    """And only from them, so that every run of a build has the same ones."""
    options = dataclasses.replace(options, shard_tokens=None)
    line = json.dumps({"text": "some words " * 200})
    (tmp_path / "big.jsonl").write_text(f"{line}\n" * 15_000)
    options = dataclasses.replace(options, corpus=(str(tmp_path / "big.jsonl"),), codec="dense")
    light = prepare(options)
    with mock.patch.object(TeacherFiles, "weight_bytes", 10**10):
        heavy = prepare(options)
        again = prepare(dataclasses.replace(options, batch_tokens=64, workers=None))
        half = prepare(dataclasses.replace(options, dtype="bfloat16"))
    assert light.spec.spans == half.spec.spans < heavy.spec.spans == again.spec.spans


def test_limit_uses_the_first_records_only(options: BuildOptions) -> None:
    assert build(dataclasses.replace(options, packing="none", limit=17)).rows == 17


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"corpus": ("/nowhere/*.jsonl",)}, "nowhere"),
        ({"corpus": ("empty.jsonl",)}, "empty"),
        ({"text_column": "body"}, "'body'.*'text'|body.*text"),
        ({"task": "sequence-classification", "corpus": ("labels.tsv",)}, "awful"),
        ({"teacher": ("bare",)}, r"no weights.*pytorch_model\.bin is not loaded"),
        ({"teacher": ("no/such-model",)}, "neither a folder"),
        ({"teacher": ("nan",)}, r"NaN or infinite logits for span \d, row"),
        ({"out": "taken"}, "not a kdcache cache"),
        ({"task": "translation"}, "--task"),
        ({"temperatures": (0.0,)}, "--temperatures"),
        ({"teacher_weight": (1.0, 2.0)}, "--teacher-weight"),
        ({"limit": 0}, "--limit"),
        ({"codec": "topk:none"}, "codec"),
    ],
)
def test_wrong_input_is_refused(
    change: dict[str, Any],
    match: str,
    options: BuildOptions,
    tiny_lm: Path,
    tiny_classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("labels.tsv").write_text("text\tlabel\nfine\tgood\nodd\tawful\n")
    shutil.copytree(tiny_lm, "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    Path("bare", "pytorch_model.bin").write_bytes(b"pickle")
    Path("taken").mkdir()
    Path("taken", "thesis.tex").touch()
    shutil.copytree(tiny_lm, "nan")
    if change.get("teacher") == ("nan",):
        model = AutoModelForCausalLM.from_pretrained(tiny_lm)
        with torch.no_grad():
            model.lm_head.weight[3] = float("nan")
        model.save_pretrained("nan")
    if change.get("task") == "sequence-classification":
        change = {**change, "teacher": (str(tiny_classifier),)}
    with pytest.raises(UsageError, match=match):
        build(dataclasses.replace(options, **change))
    # Nothing that a later run would trust.
    assert not list(tmp_path.glob("*/manifest.json"))
    assert not list(tmp_path.glob("*/shards/*"))
    assert [path.name for path in Path("taken").iterdir()] == ["thesis.tex"]


def test_teachers_that_do_not_belong_together_are_refused(
    options: BuildOptions, tiny_lm: Path, stories260k: Path
) -> None:
    with pytest.raises(UsageError, match="different tokenizers"):
        build(dataclasses.replace(options, teacher=(str(tiny_lm), str(stories260k))))


def test_what_is_left_out_is_counted_in_the_manifest_and_told(
    options: BuildOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, packed = tmp_path / "some.jsonl", tmp_path / "some.jsonl.gz"
    good = [json.dumps({"text": f"line {i}, which is a good one"}).encode() for i in range(300)]
    bad = [b'{"text": "not closed', b'{"text": "\xff"}', b'{"text": 7}', b'{"text": " "}']
    path.write_bytes(b"\n".join([*good[:200], *bad, *good[200:]]))
    cut = gzip.compress(b"\n".join(good))
    packed.write_bytes(cut[: len(cut) // 2])
    options = dataclasses.replace(
        options, corpus=(str(path), str(packed)), packing="none", max_length=4, shard_tokens=1000,
        limit=None,
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"some\.jsonl: line 201: not valid JSON"):
        build(options)
    result = build(dataclasses.replace(options, on_error="skip", out=str(tmp_path / "skipped")))
    manifest = Cache.open(str(tmp_path / "skipped")).manifest
    # Two broken lines, a number for a text, an empty document, and a stream that ends too early.
    assert result.skipped == manifest.skipped == len(bad) + 1
    assert sum(shard.skipped > 0 for shard in manifest.shards) > 1
    assert result.truncated == result.rows > 300
    lines = Path(tmp_path, "skipped", "events.jsonl").read_text().splitlines()
    spans = [e for e in map(json.loads, lines) if e["event"] == "span"]
    assert sum(e.get("skipped", 0) for e in spans) == result.skipped
    assert sum(e.get("truncated", 0) for e in spans) == result.truncated
    told = " ".join(reason for e in spans for reason in e.get("reasons", ()))
    for words in (
        "not valid JSON",
        "not valid UTF-8",
        "holds a number",
        "the gz stream is cut short",
    ):
        assert words in told
        assert words in caplog.text


def test_an_unfinished_cache_cannot_be_opened(options: BuildOptions) -> None:
    build(options)
    (Path(options.out) / "manifest.json").unlink()
    with pytest.raises(IncompleteError, match=r"of \d+ shards"):
        Cache.open(options.out)
    with pytest.raises(UsageError, match=r"no spec\.json"):
        Cache.open(str(Path(options.out).parent))


class FailingWorkers(Workers):
    """Does spans at once, but fails those it was told to, and notes who ran beside whom."""

    def __init__(self, bad: dict[int, int], fault: Fault) -> None:
        self.bad, self.fault = dict(bad), fault
        self.waiting: list[tuple[Span, bool]] = []
        self.log: list[tuple[int, bool]] = []
        self.stopped = False

    def has_room(self, *, alone: bool = False) -> bool:
        return len(self.waiting) < (1 if alone else 2)

    def submit(self, span: Span, *, alone: bool = False) -> None:
        self.waiting.append((span, alone))
        self.log.append((span.index, alone))

    def collect(self, seconds: float) -> list[Outcome]:
        outcomes = []
        for span, alone in self.waiting:
            if self.bad.get(span.index, 0) > 0:
                self.bad[span.index] -= 1
                error = RuntimeError("boom")
                outcomes.append(Outcome(span, error=error, fault=self.fault, alone=alone))
            else:
                entry = ShardEntry(span.index, "x", 1, 1, 1, 1, "0" * 64)
                outcomes.append(Outcome(span, SpanReport(entry, 1.0, 0.5)))
        self.waiting = []
        return outcomes

    def stop(self) -> None:
        self.stopped = True

    def figures(self) -> list[WorkerFigures]:
        return [WorkerFigures("w")]


def drive(workers: FailingWorkers, count: int = 6) -> tuple[Driver, list[Progress]]:
    """A driver whose listing shows what it made."""
    seen: list[Progress] = []
    spans: Sequence[Span] = [Span(i, InputFile("f", 1, "jsonl"), 0, 1) for i in range(count)]
    driver = Driver(spans, seen.append)
    driver.run(lambda: [i for i in range(count) if i not in driver.made], lambda: workers)
    return driver, seen


@pytest.mark.parametrize(
    ("fault", "times", "ways"),
    [
        ("span", 2, [False, True, True]),  # every failure counts: a third would be the last
        ("worker", 3, [False, True, True, True]),  # the first was beside another span
        ("node", 7, [False] * 8),  # a preempted machine says nothing about its spans
    ],
)
def test_a_span_is_tried_again_in_the_way_that_its_failure_asks_for(
    fault: Fault, times: int, ways: list[bool]
) -> None:
    workers = FailingWorkers({2: times}, fault)
    driver, seen = drive(workers)
    assert sorted(driver.made) == list(range(6))
    assert [alone for span, alone in workers.log if span == 2] == ways
    assert workers.stopped
    assert driver.redone == times
    assert (seen[-1].done, seen[-1].failed) == (6, 0)


@pytest.mark.parametrize(("fault", "tries"), [("span", 3), ("worker", 4)])
def test_a_span_that_always_fails_is_set_aside_and_the_rest_completes(
    fault: Fault, tries: int, caplog: pytest.LogCaptureFixture
) -> None:
    workers = FailingWorkers({1: 99, 4: 99}, fault)
    with pytest.raises(
        KdcacheError,
        match=r"2 of 6 spans failed 3 times(.|\n)*span 1 \(f: the lines that start in bytes 0-1\)"
        r"(.|\n)*span 4",
    ) as caught:
        drive(workers)
    # A worker that dies may live another time; the same exception thrice is the span's own.
    assert isinstance(caught.value, IncompleteError) == (fault == "worker")
    assert len([1 for span, _ in workers.log if span == 1]) == tries
    assert len({span for span, _ in workers.log}) == 6
    assert workers.stopped
    assert ("boom" in caplog.text) == (fault == "span")


def test_a_build_in_which_everything_fails_ends_early() -> None:
    workers = FailingWorkers(dict.fromkeys(range(50), 99), "span")
    with pytest.raises(IncompleteError, match="20 spans failed and none succeeded.*boom"):
        drive(workers, count=50)
    assert len(workers.log) < 25
    # One that succeeded shows that it is the spans.
    workers = FailingWorkers(dict.fromkeys(range(1, 50), 99), "span")
    with pytest.raises(KdcacheError, match="49 of 50 spans failed 3 times(.|\n)*and 29 more"):
        drive(workers, count=50)


def test_a_shard_that_the_listing_lost_is_made_again() -> None:
    workers = FailingWorkers({}, "span")
    driver = Driver([Span(i, InputFile("f", 1, "jsonl"), 0, 1) for i in range(4)])
    looks: list[list[int]] = [[0, 1, 2, 3], [2], []]
    driver.run(lambda: looks.pop(0), lambda: workers)
    assert [span for span, _ in workers.log] == [0, 1, 2, 3, 2]
    assert (sorted(driver.made), driver.positions, driver.redone) == ([0, 1, 2, 3], 4, 1)
    always = [[0, 1], [1], [1], [1]]
    with pytest.raises(IncompleteError, match="span 1 .* not in the listing"):
        Driver([Span(i, InputFile("f", 1, "jsonl"), 0, 1) for i in range(2)]).run(
            lambda: always.pop(0), lambda: FailingWorkers({}, "span")
        )


def test_wrong_input_stops_everything_at_once() -> None:
    class Refusing(FailingWorkers):
        def collect(self, seconds: float) -> list[Outcome]:
            return [Outcome(self.waiting[0][0], error=UsageError("bad line 7"))]

    workers = Refusing({}, "span")
    with pytest.raises(UsageError, match="bad line 7"):
        drive(workers)
    assert workers.stopped
    assert len(workers.log) == 2


def test_an_interrupt_says_how_to_go_on() -> None:
    class Interrupted(FailingWorkers):
        def collect(self, seconds: float) -> list[Outcome]:
            raise KeyboardInterrupt

    workers = Interrupted({}, "span")
    with pytest.raises(IncompleteError, match="0 of 6 shards are committed. Run the same command"):
        drive(workers)
    assert workers.stopped


class SlowWorkers(FailingWorkers):
    """Sends a signal to this process with its first spans and is done with them `late` waits
    after."""

    def __init__(self, late: int, signals: int = 1) -> None:
        super().__init__({}, "span")
        self.late, self.signals = late, signals

    def collect(self, seconds: float) -> list[Outcome]:
        for _ in range(self.signals):
            os.kill(os.getpid(), signal.SIGTERM)
        self.signals = 0
        self.late -= 1
        return [] if self.late >= 0 else super().collect(seconds)


@pytest.mark.parametrize(
    ("workers", "grace", "made"),
    [
        (SlowWorkers(late=5), 1e9, 2),  # what is in flight is finished, nothing new begun
        (SlowWorkers(late=5), 0.0, 0),  # unless it takes longer than the grace period
        (SlowWorkers(late=5, signals=2), 1e9, 0),  # or the user insists
    ],
)
def test_a_signal_lets_spans_in_flight_finish_for_a_while(
    workers: SlowWorkers, grace: float, made: int
) -> None:
    driver = Driver([Span(i, InputFile("f", 1, "jsonl"), 0, 1) for i in range(6)], grace=grace)
    with (
        interruptible() as interrupt,
        pytest.raises(IncompleteError, match=f"{made} of 6 shards are committed. Run the same"),
    ):
        driver.run(lambda: range(6), lambda: workers, interrupt)
    assert len(driver.made) == made
    assert len(workers.log) == 2
    assert workers.stopped


def test_a_signal_that_a_library_swallowed_while_planning_is_not_lost(
    small_build: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[build.__module__]

    def prepare(options: BuildOptions) -> object:
        with contextlib.suppress(KeyboardInterrupt):  # it cannot leave a library's callback
            signal.raise_signal(signal.SIGTERM)
        return planned(options)

    planned = module.prepare
    with monkeypatch.context() as patched:
        patched.setattr(module, "prepare", prepare)
        with pytest.raises(IncompleteError, match="interrupted: 0 of 1 shards are committed"):
            build(small_build)
    assert build(small_build).made == 1


def test_events_tell_what_happened(options: BuildOptions) -> None:
    seen: list[Progress] = []
    first = build(options, on_progress=seen.append)
    path = Path(options.out, "events.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = [e["event"] for e in lines]
    assert (kinds[0], kinds[-2:]) == ("start", ["progress", "sealed"])
    assert set(kinds) == {"start", "span", "progress", "sealed"}
    spans = [e for e in lines if e["event"] == "span"]
    assert sorted(e["span"] for e in spans) == list(range(first.spans))
    assert sum(e["positions"] for e in spans) == first.positions
    assert [e["time"] for e in lines] == sorted(e["time"] for e in lines)
    assert len({e["run"] for e in lines}) == 1
    told = lines[-2]
    assert told["done"] == told["made"] == first.spans
    assert told["positions_per_second"] > 0
    assert 0 < told["teacher_busy"] <= 1
    assert told["bytes_per_position"] == pytest.approx(first.bytes_per_position, abs=0.01)
    assert seen[-1].positions == first.positions
    # A finished cache has nothing to tell, and its bytes do not depend on what was told.
    build(options)
    assert len(path.read_text().splitlines()) == len(lines)
    assert list(problems(Cache.open(options.out))) == []
    min(Path(options.out, "shards").iterdir()).unlink()
    (Path(options.out) / "manifest.json").unlink()
    build(options)
    more = [json.loads(line) for line in path.read_text().splitlines()][len(lines) :]
    assert [e["event"] for e in more] == ["start", "span", "progress", "sealed"]
    assert {e["run"] for e in more}.isdisjoint(e["run"] for e in lines)


def test_events_of_an_object_store_are_written_at_the_end_of_a_run(options: BuildOptions) -> None:
    import fsspec

    options = dataclasses.replace(options, out="memory://events-test/cache", limit=20)
    build(options)
    names = fsspec.filesystem("memory").ls("/events-test/cache/events", detail=False)
    (name,) = [name for name in names if name.endswith(".jsonl")]
    lines = [json.loads(x) for x in fsspec.filesystem("memory").cat(name).splitlines()]
    assert (lines[0]["event"], lines[-1]["event"]) == ("start", "sealed")


def test_a_log_that_cannot_be_written_does_not_stop_a_build(
    options: BuildOptions, caplog: pytest.LogCaptureFixture
) -> None:
    def block(progress: Progress) -> None:
        path = Path(options.out, "events.jsonl")
        if path.is_file():
            path.unlink()
            path.mkdir()

    assert build(options, on_progress=block).made > 3
    assert caplog.text.count("the events of this run are not recorded") == 1


def test_a_terminal_shows_the_build_live_and_a_file_gets_lines(
    options: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "100")
        out = f"{options.out}-{stream.isatty()}"
        with BuildDisplay() as display:
            result = build(dataclasses.replace(options, out=out), on_progress=display)
        monkeypatch.undo()
        text = stream.getvalue()
        assert f"{result.spans}/{result.spans}" in text
        assert re.search(
            r"1 worker  [\d,]+ positions/s  teacher busy \d+%  [\d.]+ B/position", text
        )
        assert ("\x1b[" in text and "━" in text) == stream.isatty()


def test_batches_hold_every_row_once_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 200).tolist()
    made = list(batches(lengths, 100))
    assert sorted(i for batch in made for i in batch) == list(range(200))
    for batch in made:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= 100
    assert list(batches([], 100)) == []
    assert list(batches([500, 3], 100)) == [[0], [1]]


# A build that committed nothing


@pytest.mark.parametrize(
    ("given", "left", "seconds", "here"),
    [
        ({}, 1, 900.0, True),  # one shard, however long
        ({}, 4, 10.0, True),
        ({}, 4, 30.0, False),
        ({"workers": 0}, 4, 30.0, True),
        ({"workers": 1}, 1, 1.0, False),  # a number is obeyed as given
        ({"max_workers": 2}, 1, 1.0, False),
        ({"address": "auto"}, 1, 1.0, False),
        ({"gpus_per_worker": 2}, 1, 1.0, False),
    ],
)
def test_ray_is_left_out_where_little_is_left(
    given: dict[str, Any], left: int, seconds: float, here: bool
) -> None:
    said: list[str] = []
    plan = SimpleNamespace(
        source=None, span_seconds=seconds, gpus=0.0, across=False, opening="opening"
    )
    cache = SimpleNamespace(storage=SimpleNamespace(url="cache"))
    with (
        mock.patch.object(make, "LocalWorkers", return_value=True),
        mock.patch("kdcache.commands.build.on_ray.RayWorkers", return_value=False),
        mock.patch.dict("os.environ", {"RAY_ADDRESS": ""}),
    ):
        options = make.WorkerOptions(**given)
        found = make.start_workers(options, plan, cache, left, print, said.append)  # type: ignore[arg-type]
    assert found is here
    assert len(said) == 1
    assert said[0].startswith("starting workers on Ray") is not here


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UsageError("no room"), SystemExit(9)])
def test_a_build_that_committed_nothing_does_not_block_its_folder(
    small_build: BuildOptions, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """However it ended; a kill leaves the same files, and the kernel drops its lock."""

    def fail(*_: object) -> None:
        raise error

    wrong = dataclasses.replace(small_build, max_length=16, limit=30)
    with monkeypatch.context() as patched:
        patched.setattr(make, "start_workers", fail)
        with pytest.raises((UsageError, IncompleteError, SystemExit)):
            build(wrong)
    assert Path(small_build.out, "spec.json").is_file()
    right = dataclasses.replace(small_build, codec="topk:4", limit=20)
    assert build(right).made
    cache = Cache.open(right.out)
    assert cache.spec.codec == "topk:4"
    assert not list(problems(cache))


def test_a_folder_in_use_is_not_taken_over(
    small_build: BuildOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither from a build that is at work and has committed nothing yet, nor with shards in it."""
    first = dataclasses.replace(small_build, limit=20)
    other = dataclasses.replace(first, codec="topk:4")
    tried: list[str] = []

    def second(*_: object) -> None:
        with pytest.raises(UsageError, match="was begun with other options") as told:
            build(other)
        tried.append(str(told.value))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(make, "start_workers", second)
        with pytest.raises(IncompleteError, match="interrupted"):
            build(first)
    assert "if no build is running on it, delete its spec.json" in tried[0]
    assert build(first).made
    Path(first.out, "manifest.json").unlink()
    with pytest.raises(UsageError, match="was begun with other options") as told:
        build(other)
    assert "delete" not in str(told.value)
    assert build(first).made == 0
