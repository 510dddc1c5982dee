"""Corpora with names in one cache: what a name is, which shard has which, and who tells it."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from make_caches import CAUSAL, make_cache
from test_stored import FakeDataset

from kdcache.cache import Cache, CacheSpec
from kdcache.cache.check import problems
from kdcache.cache.manifest import ShardEntry, label_sums
from kdcache.cli.main import cli
from kdcache.commands.build.build import build, dry_run
from kdcache.commands.build.driver import Progress
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.prepare import prepare
from kdcache.commands.export import export
from kdcache.commands.inspect import inspect
from kdcache.commands.options import (
    ExportOptions,
    InspectOptions,
    PlanOptions,
    ReportOptions,
    TranscodeOptions,
)
from kdcache.commands.plan.plan import plan
from kdcache.commands.report.report import report
from kdcache.commands.transcode import transcode
from kdcache.corpus import Corpus, named
from kdcache.domains import Named
from kdcache.errors import CorruptCacheError, UsageError
from kdcache.humanize import counted
from kdcache.options import parse_values

Lines = Callable[..., str]


@pytest.fixture
def lines(tmp_path: Path, corpus_texts: list[str]) -> Lines:
    """Writes a JSONL file of some of the texts, and gives its path."""

    def write(name: str, first: int, last: int, **more: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        records = ({"text": text, **more} for text in corpus_texts[first:last])
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


@pytest.fixture
def mixed(small_build: BuildOptions, lines: Lines) -> BuildOptions:
    """A build of three stretches of two domains."""
    corpora = (
        f"web={lines('a.jsonl', 0, 24)}",
        f"code={lines('b.jsonl', 40, 52)}",
        f"web={lines('c.jsonl', 60, 66)}",
    )
    change: dict[str, Any] = {"corpus": corpora, "shard_tokens": 600, "codec": "topk:8"}
    return dataclasses.replace(small_build, max_length=32, **change)


# Names


def test_a_name_is_what_could_be_one_and_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("lang=en/a.jsonl", "whole=x.jsonl", "run=1.idx"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
    paths = [
        "a.jsonl",
        "data/lang=en/a.jsonl",
        "s3://bucket/lang=en/a.jsonl",
        "https://host/a.jsonl?key=value",
        "hf://datasets/o/n@main/a.parquet?x=y",
        "simplecache::s3://b/a=b",
        "./web=a.jsonl",
        "/web=a.jsonl",
        "~/web=a.jsonl",
        "=a.jsonl",
        "ein name=a.jsonl",
        "whole=x.jsonl",  # a file
        "lang=en",  # a folder
        "lang=en/*.jsonl",  # a match
        "run=1",  # an index of ids beside its .bin
    ]
    for path in paths:
        assert named([path]) == [path]
    for text, name, path in (
        ("web=a.jsonl", "web", "a.jsonl"),
        ("web=lang=en/a.jsonl", "web", "lang=en/a.jsonl"),
        ("lang=de/*.jsonl", "lang", "de/*.jsonl"),  # no such match
        ("common-crawl_2024.1=s3://bucket/x?y=z", "common-crawl_2024.1", "s3://bucket/x?y=z"),
        ("1=a", "1", "a"),
    ):
        assert named([text]) == [Named(name, path)]
    pair = Named("whole", "x.jsonl")
    assert named([pair]) == [pair], "a pair is read as nothing else"
    with pytest.raises(UsageError, match="no path follows the name"):
        named(["web="])
    with pytest.raises(UsageError, match="'a/b' is not a name; expected 1 to 64 letters"):
        named([Named("a/b", "x")])
    with pytest.raises(UsageError, match=r"web=a has a name and --corpus b has none\. Name every"):
        named(["b", "web=a"])


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(1, 5)), min_size=1, max_size=8)
)
def test_each_span_has_the_domain_of_its_stretch(stretches: list[tuple[str, int]]) -> None:
    names = [name for name, count in stretches for _ in range(count)]
    spec = CacheSpec(
        **{f.name: None for f in dataclasses.fields(CacheSpec) if f.name != "domains"},
        domains=tuple({"name": name, "spans": count} for name, count in stretches),
    )
    assert [spec.domain_of(span) for span in range(len(names))] == names
    assert spec.domain_names == tuple(dict.fromkeys(names))


def test_formats_mix_and_no_span_crosses_names(
    tmp_path: Path, corpus_texts: list[str], lines: Lines
) -> None:
    texts = [text for text in corpus_texts[:90] if text.strip()]
    parquet, zipped = tmp_path / "p.parquet", tmp_path / "z.jsonl.gz"
    pq.write_table(pa.table({"text": texts[:30]}), parquet, row_group_size=5)
    with gzip.open(zipped, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts[30:60])
    folder = Path(lines("folder/x.jsonl", 60, 75)).parent
    lines("folder/y.jsonl", 75, 90)
    given_names = [f"p={parquet}", f"z={zipped}", f"l={folder}", f"p={lines('q.jsonl', 0, 3)}"]
    corpus = Corpus.open(named(given_names), span_bytes=700)
    of_spans = [span.file.domain for span in corpus.spans]
    wanted = [stretch["name"] for stretch in corpus.domains for _ in range(stretch["spans"])]
    assert of_spans == wanted
    assert [stretch["name"] for stretch in corpus.domains] == ["p", "z", "l", "p"]
    assert min(stretch["spans"] for stretch in corpus.domains[:3]) > 1
    kinds = {"p": {"parquet", "jsonl"}, "z": {"jsonl.gz"}, "l": {"jsonl"}}
    assert {f["name"]: f["domain"] for f in corpus.identity()} == {
        "p.parquet": "p", "z.jsonl.gz": "z", "folder/x.jsonl": "l", "folder/y.jsonl": "l",
        "q.jsonl": "p",
    }  # fmt: skip
    for span in corpus.spans:
        assert span.file.full_kind in kinds[str(span.file.domain)]
    plain = Corpus.open([str(folder)], span_bytes=700)
    assert not plain.domains
    assert all("domain" not in file for file in plain.identity())


def test_a_limit_is_of_each_name(lines: Lines) -> None:
    one, other, third = lines("a.jsonl", 0, 30), lines("b.jsonl", 30, 60), lines("c.jsonl", 60, 90)
    patterns = named([f"a={one}", f"b={other}", f"a={third}"])

    def counts(limit: int) -> dict[str | None, int]:
        corpus = Corpus.open(patterns, span_bytes=500, limit=limit)
        found: dict[str | None, int] = {}
        for span in corpus.spans:
            records = sum(1 for _ in Corpus.read(span))
            found[span.file.domain] = found.get(span.file.domain, 0) + records
        stretches = sum(stretch["spans"] for stretch in corpus.domains)
        assert stretches == len(corpus.spans)
        return found

    assert counts(7) == {"a": 7, "b": 7}
    assert counts(40) == {"a": 40, "b": 30}


def test_a_file_in_two_domains_and_an_empty_one_are_refused(lines: Lines, tmp_path: Path) -> None:
    one = lines("a.jsonl", 0, 5)
    with pytest.raises(UsageError, match=r"a\.jsonl is in the corpus x and in y: its rows would"):
        Corpus.open(named([f"x={one}", f"y={tmp_path}"]), span_bytes=1 << 20)
    twice = Corpus.open(named([f"x={one}", f"x={one}"]), span_bytes=1 << 20)
    assert len(twice.files) == 1
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "empty.jsonl").touch()
    empty = named([f"x={one}", f"none={tmp_path / 'none'}"])
    with pytest.raises(UsageError, match=r"none=.*none: the corpus is empty \(1 file of 0 bytes"):
        Corpus.open(empty, span_bytes=1 << 20)
    Path(tmp_path, "none", "empty.jsonl").write_text("\n\n")
    with pytest.raises(UsageError, match=r"none=.*: no records\. Name files that have some"):
        Corpus.open(empty, span_bytes=1 << 20, limit=3)
    with pytest.raises(UsageError, match=r"'lang' was read as the corpus's name; a path may begin"):
        Corpus.open(named(["lang=en/*.jsonl"]), span_bytes=1 << 20)


@pytest.mark.slow
def test_options_take_mappings(lines: Lines, tmp_path: Path) -> None:
    one, other = lines("a.jsonl", 0, 5), lines("b.jsonl", 5, 9)
    short = {"teacher": "t", "out": "c"}
    mapping: Any = {"web": [one, other], "code": "x"}
    pairs = (Named("web", one), Named("web", other), Named("code", "x"))
    assert BuildOptions(corpus=mapping, **short).corpus == pairs
    assert parse_values(BuildOptions, {"corpus": mapping}) == ({"corpus": pairs}, [])
    file = tmp_path / "build.yaml"
    file.write_text(json.dumps({**short, "corpus": {"web": "nowhere.jsonl"}}))
    done = CliRunner().invoke(cli, ["build", "--config", str(file), "--teacher", str(tmp_path)])
    assert done.exit_code == 2, done.output

    class Splits(dict[str, FakeDataset]):
        """A `DatasetDict`, which is a mapping too."""

        @property
        def column_names(self) -> dict[str, list[str]]:
            return {"train": ["text"]}

    data: Any = Splits(train=FakeDataset([{"text": "a"}]))
    with pytest.raises(UsageError, match="a dictionary of datasets"):
        build(BuildOptions(corpus=data, **{**short, "out": str(tmp_path / "c")}))
    no_names, wrong = parse_values(BuildOptions, {"teacher": {"a": "b"}})
    assert (no_names, len(wrong)) == ({}, 1)


# Builds


@pytest.mark.slow
def test_each_shard_keeps_its_name_everywhere(mixed: BuildOptions, tmp_path: Path) -> None:
    made = build(mixed)
    cache = Cache.open(mixed.out)
    corpus = prepare(mixed).corpus
    names = [span.file.domain for span in corpus.spans]
    assert [shard.domain for shard in cache.manifest.shards] == names
    assert len(names) == made.spans > 4
    assert [d.name for d in made.domains] == ["web", "code"]
    # Rows are those of builds of each domain alone.
    for domain in made.domains:
        mine = tuple(c for c in mixed.corpus if str(c).startswith(f"{domain.name}="))
        paths = tuple(str(c).partition("=")[2] for c in mine)
        alone = dataclasses.replace(mixed, corpus=paths, out=str(tmp_path / domain.name))
        assert (domain.rows, domain.positions) == (
            (result := build(alone)).rows,
            result.positions,
        )
        nats = Cache.open(alone.out).manifest.shards
        sums = label_sums(nats)
        assert sums is not None
        assert domain.teacher_cross_entropy == pytest.approx(sums[0] / sums[1], abs=0.02)
        assert domain.done == domain.spans == len(nats)
    seen = inspect(InspectOptions(mixed.out, row=0))
    assert seen.domains == made.domains
    assert seen.row is not None
    assert seen.row.domain == "web"
    assert not list(problems(cache))
    # Another codec of it, a table, a page.
    other = str(tmp_path / "topk4")
    assert transcode(TranscodeOptions(mixed.out, "topk:4", other, workers=0)).domains == tuple(
        dataclasses.replace(d, bytes=e.bytes)
        for d, e in zip(made.domains, inspect(InspectOptions(other)).domains, strict=True)
    )
    assert [shard.domain for shard in Cache.open(other).manifest.shards] == names
    export(ExportOptions(mixed.out, str(tmp_path / "table")))
    table = pq.read_table(tmp_path / "table", columns=["domain"])["domain"].to_pylist()
    rows = [shard.rows for shard in cache.manifest.shards]
    assert table == [n for n, k in zip(names, rows, strict=True) for _ in range(k)]
    page = tmp_path / "page.html"
    report(ReportOptions(paths=(mixed.out,), out=str(page)))
    assert all(text in page.read_text() for text in ("Domains", ">code<", "Row 0 of web"))
    shown = CliRunner().invoke(cli, ["inspect", mixed.out])
    code = made.domains[1]
    row = next(line for line in shown.output.splitlines() if line.startswith("code "))
    assert row.split()[1:3] == [f"{code.rows:,}", f"{code.positions:,}"]


@pytest.mark.slow
def test_plans_and_dry_runs_know_the_domains(mixed: BuildOptions, tmp_path: Path) -> None:
    told = dry_run(mixed)
    made = build(mixed)
    assert [(d.name, d.files, d.spans) for d in told.domains] == [
        ("web", 2, made.domains[0].spans),
        ("code", 1, made.domains[1].spans),
    ]
    assert sum(d.positions for d in told.domains) == told.positions
    for about, exact in zip(told.domains, made.domains, strict=True):
        assert about.positions == pytest.approx(exact.positions, rel=0.2)
    planned = plan(
        PlanOptions(
            teacher=mixed.teacher,
            corpus=mixed.corpus,
            codec=("topk:8",),
            temperatures=("1",),
            max_length=32,
            rows=2,  # fewer than there are domains and stretches
        )
    )
    assert [d.name for d in planned.domains] == ["web", "code"]
    assert min(d.positions for d in planned.domains) > 0
    words = [f"--corpus={one}" for one in mixed.corpus]
    shown = CliRunner().invoke(
        cli, ["build", "--teacher", mixed.teacher[0], *words, "--out", mixed.out, "--dry_run"]
    )
    assert shown.exit_code == 0, shown.output
    assert "about positions" in shown.output


class StopError(Exception):
    """Ends a build from its progress."""


@pytest.mark.slow
def test_a_killed_build_goes_on_with_its_domains_and_no_others(
    mixed: BuildOptions, lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.commands.build.driver._PROGRESS_EVERY", 0.0)
    calm = dataclasses.replace(mixed, out=str(tmp_path / "calm"))
    build(calm)

    def stop(progress: Progress) -> None:
        if progress.made:
            raise StopError

    with pytest.raises(StopError):
        build(mixed, on_progress=stop)
    part = inspect(InspectOptions(mixed.out))
    assert 0 < sum(d.done for d in part.domains) < sum(d.spans for d in part.domains)
    for corpora, field in (
        ((*mixed.corpus, f"new={lines('d.jsonl', 80, 90)}"), "domains.3.name: null -> .new."),
        (mixed.corpus[:2], "domains.2.name: .web. -> null"),
        ((mixed.corpus[0].replace("web=", "www="), *mixed.corpus[1:]), "domains.0.name: .web. -> "),
        (tuple(c.partition("=")[2] for c in mixed.corpus), "domains: null|domains.0.name: .web."),
    ):
        with pytest.raises(UsageError, match=f"begun with other options(?s:.*){field}"):
            build(dataclasses.replace(mixed, corpus=corpora))
    for path in Path(mixed.out, "events").glob("receipts-*"):
        path.unlink()  # the seal reads shards instead
    build(mixed)
    same = {p.name: p.read_bytes() for p in Path(calm.out, "shards").iterdir()}
    assert {p.name: p.read_bytes() for p in Path(mixed.out, "shards").iterdir()} == same
    assert (
        Path(mixed.out, "manifest.json").read_bytes()
        == Path(calm.out, "manifest.json").read_bytes()
    )


@pytest.mark.slow
def test_a_domain_without_rows_is_told(
    mixed: BuildOptions, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    corpora = (
        f"web={lines('w.jsonl', 0, 9, lang='en')}",
        f"de={lines('d.jsonl', 9, 18, lang='de')}",
    )
    made = build(dataclasses.replace(mixed, corpus=corpora, filter=("lang=en",)))
    assert [(d.name, d.rows > 0) for d in made.domains] == [("web", True), ("de", False)]
    assert "the corpus de has no usable row (0 records skipped, 9 filtered)" in caplog.text
    assert not list(problems(Cache.open(mixed.out)))


# Caches from elsewhere


def test_names_that_do_not_belong_to_a_spec_are_refused(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", [3, 2], task=CAUSAL, codec="topk:4", domains=["a", "b"])
    spec = cache.spec
    wrong: list[tuple[Sequence[Any], str]] = [
        ([{"name": "a", "spans": 1}], "names the domains of 1 spans, and has 2"),
        ([{"name": "a/b", "spans": 2}], "invalid values in spec.json: domains"),
        ([{"name": "a", "spans": 0}, {"name": "b", "spans": 2}], "invalid values"),
        ([{"name": "a"}], "invalid values"),
        ({"a": 2}, "invalid values"),
    ]
    for domains, message in wrong:
        with pytest.raises(CorruptCacheError, match=message):
            CacheSpec.from_dict({**spec.to_dict(), "domains": domains})
    manifest = cache.manifest
    for domain in ("a", None):
        entries = (manifest.shards[0], dataclasses.replace(manifest.shards[1], domain=domain))
        forged = dataclasses.replace(manifest, shards=entries)
        (tmp_path / "c" / "manifest.json").write_bytes(forged.to_json())
        with pytest.raises(CorruptCacheError, match="does not belong to spec"):
            Cache.open(str(tmp_path / "c"))
    bad = dataclasses.replace(manifest.shards[1], domain="../x")
    (tmp_path / "c" / "manifest.json").write_bytes(
        dataclasses.replace(manifest, shards=(manifest.shards[0], bad)).to_json()
    )
    with pytest.raises(CorruptCacheError, match="invalid domain"):
        Cache.open(str(tmp_path / "c"))


def test_a_shard_of_another_domain_is_found(tmp_path: Path) -> None:
    """Its own attribute is compared, by verify and by a seal that has no receipt."""
    cache = make_cache(tmp_path / "c", [3, 2], task=CAUSAL, codec="topk:4", domains=["a", "b"])
    other = dataclasses.replace(cache, spec=dataclasses.replace(cache.spec))
    object.__setattr__(other.spec, "domain_of", lambda span: "a")
    entry = other.commit(1, cache.read(1))
    assert entry.domain == "a"
    forged = dataclasses.replace(entry, domain="b")
    manifest = dataclasses.replace(cache.manifest, shards=(cache.manifest.shards[0], forged))
    (tmp_path / "c" / "manifest.json").write_bytes(manifest.to_json())
    found = [problem.text for problem in problems(Cache.open(str(tmp_path / "c")))]
    assert any("belongs to another cache" in text for text in found)
    (tmp_path / "c" / "manifest.json").unlink()
    (tmp_path / "c" / "shards" / cache.manifest.shards[1].name).unlink()
    with pytest.raises(CorruptCacheError, match="belongs to another build"):
        inspect(InspectOptions(str(tmp_path / "c")))


# Filters


@pytest.mark.slow
def test_what_a_filter_leaves_out_is_counted(
    mixed: BuildOptions, lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines("w/en.jsonl", 0, 12, lang="en")
    lines("w/de.jsonl", 12, 40, lang="de")
    code = lines("c.jsonl", 40, 60, lang="en")
    corpora = (f"web={tmp_path / 'w'}", f"code={code}")
    options = dataclasses.replace(mixed, corpus=corpora, filter=("lang=en",))
    told = dry_run(options)
    assert told.filtered == pytest.approx(28 / 60, abs=0.2)
    assert [d.filtered for d in told.domains] == [pytest.approx(28 / 40, abs=0.2), 0.0]
    made = build(options)
    assert (made.filtered, [d.filtered for d in made.domains]) == (28, [28, 0])
    seen = inspect(InspectOptions(options.out))
    assert (seen.filtered, seen.skipped) == (28, 0)
    assert not list(problems(Cache.open(options.out)))
    other = transcode(TranscodeOptions(options.out, "topk:4", str(tmp_path / "o"), workers=0))
    assert other.filtered == 28
    shown = CliRunner().invoke(cli, ["inspect", options.out]).output
    assert "filtered records" in shown
    # Where nothing is filtered nothing is said; older caches do not know.
    assert inspect(InspectOptions(str(tmp_path / "o"))).filtered == 28
    plain = build(dataclasses.replace(options, filter=(), out=str(tmp_path / "plain")))
    assert plain.filtered is None
    assert "filtered" not in Path(tmp_path, "plain", "manifest.json").read_text()
    assert "filtered" not in CliRunner().invoke(cli, ["inspect", str(tmp_path / "plain")]).output
    words = ["--teacher", mixed.teacher[0], *(f"--corpus={one}" for one in corpora)]
    words += ["--out", str(tmp_path / "new"), "--filter", "lang=en", "--dry_run"]
    dry = CliRunner().invoke(cli, ["build", *words])
    assert "leaves out about" in dry.output, dry.output
    entry = dataclasses.replace(Cache.open(options.out).manifest.shards[0], filtered=-1)
    with pytest.raises(ValueError, match="invalid number of filtered"):
        ShardEntry.from_dict(vars(entry), 0)


def test_one_thing_is_not_several() -> None:
    found = [counted(n, "shard") for n in (0, 1, 2, 2000)]
    assert found == ["0 shards", "1 shard", "2 shards", "2,000 shards"]
    assert [counted(n, "GPU") for n in (0.5, 1.0, 4.0)] == ["0.5 GPUs", "1 GPU", "4 GPUs"]
