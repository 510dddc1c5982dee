"""`generate`: what is written, read again by `build`, resumed, killed, and on other workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import make_tiny_lm
from kill_points import killed_at
from transformers import AutoTokenizer

import kdcache
from kdcache.cache import Cache
from kdcache.cache.generated import GeneratedCorpus
from kdcache.cli.main import cli
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.generate.generate import GenerateResult, generate, generate_dry
from kdcache.commands.generate.look import GeneratedView, _loops
from kdcache.commands.generate.options import GenerateOptions
from kdcache.errors import IncompleteError, UsageError
from kdcache.targets.label_logprob import decode_logprobs
from kdcache.teacher.writer import Writer

pytestmark = pytest.mark.end_to_end

SAMPLES, NEW = 2, 12


@pytest.fixture(scope="module")
def written(
    tiny_lm: Path, text_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GenerateOptions, GenerateResult]:
    """A generation of several shards, and its outcome. To be read only."""
    options = GenerateOptions(
        model=str(tiny_lm),
        corpus=(str(text_corpus),),
        out=str(tmp_path_factory.mktemp("written") / "text"),
        samples=SAMPLES,
        max_new_tokens=NEW,
        prompt_tokens=9,
        limit=40,
        shard_tokens=700,
        workers=0,
    )
    return options, generate(options)


@pytest.fixture
def whole(written: tuple[GenerateOptions, GenerateResult]) -> GenerateOptions:
    """Options of what is written."""
    return written[0]


@pytest.fixture
def options(whole: GenerateOptions, tmp_path: Path) -> GenerateOptions:
    """The same generation elsewhere: `dataclasses.replace` what a test is about."""
    return replace(whole, out=str(tmp_path / "text"))


def rows_of(out: str) -> list[dict[str, Any]]:
    corpus = GeneratedCorpus.open(out)
    return [row for span in range(corpus.spec.spans) for row in corpus.read(span)]


def shards(out: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(out, "shards").iterdir())}


def test_a_corpus_has_each_sample_of_each_prompt_once_and_build_reads_it(
    written: tuple[GenerateOptions, GenerateResult], tiny_lm: Path, tmp_path: Path
) -> None:
    """Prompts have no label, ids are kept, and a build finds the log-probabilities again."""
    options, result = written
    assert result.spans > 2
    assert (result.prompts, result.answers) == (40, 40 * SAMPLES)
    rows = rows_of(options.out)
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    lines = Path(options.corpus[0]).read_text().splitlines()[:40]
    asked = [tokenizer(json.loads(line)["text"])["input_ids"][:9] for line in lines]
    for i, row in enumerate(rows):
        mask = np.array(row["completion_mask"])
        assert row["sample"] == i % SAMPLES
        assert np.array(row["input_ids"])[mask == 0].tolist() == asked[i // SAMPLES]
        assert row["prompt"] == tokenizer.decode(asked[i // SAMPLES])
        assert 1 <= mask.sum() == len(row["logprobs"]) <= NEW
        assert row["finish_reason"] == ("stop" if row["input_ids"][-1] == 0 else "length")
    assert result.tokens == sum(len(row["logprobs"]) for row in rows)
    nats = -sum(sum(row["logprobs"]) for row in rows)
    assert result.nats == pytest.approx(nats / result.tokens, rel=1e-6)
    for path in Path(options.out, "shards").iterdir():
        facts = json.loads(pq.read_schema(path).metadata[b"kdcache"])
        assert facts["sampling"]["samples"] == SAMPLES
        assert facts["fingerprint"] == GeneratedCorpus.open(options.out).spec.fingerprint

    built = build(
        BuildOptions(
            teacher=(str(tiny_lm),), corpus=(options.out,), out=str(tmp_path / "c"), workers=0
        )
    )
    assert (built.rows, built.positions) == (len(rows), result.tokens)
    cache = Cache.open(built.cache)
    found = [
        data.row(i) for data in map(cache.read, range(cache.spec.spans)) for i in range(len(data))
    ]
    for row, mine in zip(rows, found, strict=True):
        ids, mask = np.array(row["input_ids"]), np.array(row["completion_mask"]).astype(bool)
        assert mine.input_ids.tolist() == ids[:-1].tolist()
        assert mine.labels.tolist() == np.where(mask[1:], ids[1:], -100).tolist()
    kept = [cache.read(span).label_logprob for span in range(cache.spec.spans)]
    logprobs = np.concatenate([decode_logprobs(codes) for codes in kept if codes is not None])
    want = np.concatenate([row["logprobs"] for row in rows])
    np.testing.assert_allclose(logprobs, want, rtol=0.01, atol=0.05)


FORMS: dict[str, Callable[[str], dict[str, Any]]] = {
    "text": lambda text: {"text": text},
    "prompt": lambda text: {"prompt": text},
    "prompt with its answer": lambda text: {"prompt": text, "completion": "no part of it"},
}


@pytest.mark.parametrize("form", list(FORMS))
def test_prompts_come_in_every_form(
    form: str, options: GenerateOptions, corpus_texts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    texts = [text[:20] for text in corpus_texts[:5]]
    path.write_text("".join(json.dumps(FORMS[form](text)) + "\n" for text in texts))
    generate(replace(options, corpus=(str(path),), prompt_tokens=None, samples=1))
    assert [row["prompt"] for row in rows_of(options.out)] == texts


def test_chats_are_rendered_up_to_the_answer_that_is_due(
    options: GenerateOptions, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% if tools %}[{{ tools[0].name }}]{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ask = {"role": "user", "content": "why"}
    chats = [
        {"messages": [ask]},
        {"messages": [ask, {"role": "assistant", "content": "because"}]},
        {"messages": [ask], "tools": [{"name": "look"}]},
        {"messages": []},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    result = generate(
        replace(
            options,
            corpus=(str(path),),
            prompt_tokens=None,
            samples=1,
            chat_template=str(template),
        )
    )
    want = ["<user>why<assistant>"] * 2 + ["[look]<user>why<assistant>"]
    assert [row["prompt"] for row in rows_of(options.out)] == want
    assert result.skipped == 1


def test_prompts_of_ids_are_those_before_what_is_learnt(
    options: GenerateOptions, tiny_lm: Path, tmp_path: Path
) -> None:
    path = tmp_path / "ids.jsonl"
    records = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {"input_ids": [9, 10, 11], "labels": [-100, 10, 11]},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    ids = replace(options, corpus=(str(path),), record_form="ids", labels="token", samples=1)
    generate(replace(ids, tokenizer=str(tiny_lm)))
    found = [row["input_ids"][: row["completion_mask"].index(1)] for row in rows_of(options.out)]
    assert found == [[5, 6], [9]]
    # What was written is a corpus of prompts, too: those that were asked.
    again = replace(options, corpus=(options.out,), out=f"{options.out}-again", samples=1, seed=5)
    generate(again)
    rows = rows_of(again.out)
    assert [row["input_ids"][: row["completion_mask"].index(1)] for row in rows] == found
    assert [row["logprobs"] for row in rows] != [row["logprobs"] for row in rows_of(options.out)]


def test_prompts_that_leave_no_room_are_refused_or_skipped(options: GenerateOptions) -> None:
    long = replace(options, prompt_tokens=None, max_length=40)
    with pytest.raises(UsageError, match="leaves no room for an answer: at most 28 do"):
        generate(long)
    result = generate(replace(long, on_error="skip"))
    assert 0 < result.skipped < 40
    assert result.prompts == 40 - result.skipped


def test_a_generation_resumes_and_asks_no_prompt_again(
    options: GenerateOptions, whole: GenerateOptions
) -> None:
    asked: list[int] = []
    write = Writer.write

    def counted(self: Writer, span: int, prompts: Any, done: Any) -> Any:
        asked.extend([span] * len(prompts))
        return write(self, span, prompts, done)

    def stop(progress: kdcache.Progress) -> None:
        if progress.made:
            raise KeyboardInterrupt

    with mock.patch.object(Writer, "write", counted):
        with pytest.raises(IncompleteError):
            generate(options, on_progress=stop)  # type: ignore[arg-type]
        there = shards(options.out)
        assert len(there) > 0
        with pytest.raises(IncompleteError, match="same `kdcache generate` command"):
            build(BuildOptions(teacher=(options.model,), corpus=(options.out,), out="c"))
        before = {span: asked.count(span) for span in set(asked)}
        result = generate(options)
        assert result.made == result.spans - len(there)
    for name in there:
        assert asked.count(int(name[:5])) == before[int(name[:5])]
    assert shards(options.out) == shards(whole.out)
    assert generate(options).made == 0
    with pytest.raises(UsageError, match="sampling.temperature: 1.0 -> 0.5"):
        generate(replace(options, temperature=0.5))


@pytest.mark.parametrize("points", [2, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_a_killed_generation_ends_as_if_never_killed(
    options: GenerateOptions, tmp_path: Path, points: int
) -> None:
    def into(folder: Path) -> GenerateOptions:
        return replace(options, out=str(folder), limit=20)

    steps = killed_at(None, tmp_path / "whole", generate, into(tmp_path / "whole"))
    want = shards(str(tmp_path / "whole"))
    for step in np.linspace(2, steps - 1, points).astype(int).tolist():
        folder = tmp_path / str(step)
        killed_at(step, folder, generate, into(folder))
        there = {p.name: p.stat().st_mtime_ns for p in folder.glob("shards/*.parquet")}
        result = generate(into(folder))
        assert result.made == len(want) - len(there)  # none is made twice, and none is lost
        assert shards(str(folder)) == want
        after = {p.name: p.stat().st_mtime_ns for p in folder.glob("shards/*.parquet")}
        assert there.items() <= after.items()


def test_parts_write_the_same(options: GenerateOptions, whole: GenerateOptions) -> None:
    assert generate(replace(options, part="1/2")).missing > 0
    assert generate(replace(options, part="2/2")).missing == 0
    assert shards(options.out) == shards(whole.out)


@pytest.mark.exhaustive  # the workers are those of every plan of shards: see `test_faults`
def test_ray_writes_the_same(options: GenerateOptions, whole: GenerateOptions, ray: None) -> None:
    assert generate(replace(options, workers=2, cpus_per_worker=1)).answers == 80
    assert shards(options.out) == shards(whole.out)


def test_a_store_holds_the_same_and_is_read(whole: GenerateOptions, tmp_path: Path) -> None:
    options = whole
    url = f"memory://{tmp_path.name}/text"
    generate(replace(options, out=url))
    assert [row["input_ids"] for row in rows_of(url)] == [
        row["input_ids"] for row in rows_of(options.out)
    ]
    caches = [str(tmp_path / name) for name in ("a", "b")]
    for corpus, out in zip((options.out, url), caches, strict=True):
        build(BuildOptions(teacher=(options.model,), corpus=(corpus,), out=out, workers=0))
    assert Cache.open(caches[0]).digest == Cache.open(caches[1]).digest
    fsspec.filesystem("memory").store.clear()


def test_a_cache_beside_it_is_the_one_that_build_makes(
    options: GenerateOptions, tmp_path: Path
) -> None:
    both = replace(options, cache=str(tmp_path / "beside"), codec="topk:8")
    result = generate(both)
    assert result.cache is not None
    assert result.cache.positions == result.tokens
    alone = str(tmp_path / "alone")
    build(
        BuildOptions(
            teacher=(options.model,), corpus=(options.out,), out=alone, codec="topk:8", workers=0
        )
    )
    assert Cache.open(alone).digest == Cache.open(result.cache.cache).digest


def test_what_is_not_a_generated_corpus_is_told_apart(
    options: GenerateOptions, small_build: BuildOptions, text_corpus: Path
) -> None:
    generate(replace(options, limit=5))
    with pytest.raises(UsageError, match="is a corpus that kdcache generate wrote, not a cache"):
        Cache.open(options.out)
    build(replace(small_build, limit=5))
    with pytest.raises(UsageError, match="is a cache, not a corpus"):
        GeneratedCorpus.open(small_build.out)
    with pytest.raises(UsageError, match="and the others are not"):
        build(replace(small_build, corpus=(options.out, str(text_corpus)), out="c"))
    other = Path(options.out, "shards", "00000-0123456789abcdef.parquet")
    other.write_bytes(next(Path(options.out, "shards").iterdir()).read_bytes())
    with pytest.raises(UsageError, match="not in its manifest"):
        build(replace(small_build, corpus=(options.out,), out="c"))


def test_changed_prompts_are_refused(options: GenerateOptions, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    text = "".join(json.dumps({"text": f"{i} {'long ' * 500}"}) + "\n" for i in range(80))
    path.write_text(text)
    mine = replace(options, corpus=(str(path),), limit=None, max_new_tokens=2, shard_tokens=8000)
    generate(replace(mine, part="1/2"))
    # Behind what a file is known by, in two neighbouring shards.
    path.write_text(text.replace('"35 long', '"zq long').replace('"48 long', '"zq long'))
    with pytest.raises(UsageError, match="was changed since this generation began"):
        for part in ("1/2", "2/2"):
            generate(replace(mine, part=part))


def test_the_command_line(options: GenerateOptions) -> None:
    words = ["generate", "--model", options.model, "--corpus", options.corpus[0]]
    words += ["--out", options.out, "--limit", "6", "--max-new-tokens", "5", "--workers", "0"]
    words += ["--prompt-tokens", "4"]
    dry = CliRunner().invoke(cli, [*words, "--dry-run"], catch_exceptions=False)
    assert "nothing" in dry.output
    assert not Path(options.out).exists()
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "6 answers to 6 prompts" in done.output
    assert f"--corpus {options.out}" in done.output
    assert "is complete: 6 answers" in CliRunner().invoke(cli, words).output
    assert generate_dry(replace(options, dry_run=True)).state == "another generation"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"max_new_tokens": 128}, "Leave room for prompts"),
        ({"codec": "topk:4"}, "--codec is of a cache"),
        ({"cache": "c", "part": "1/2"}, "needs all of it"),
        ({"stop": ("",)}, "an empty text"),
        ({"dry_run": True}, "dry_run is for kdcache.generate_dry"),
    ],
)
def test_options_that_cannot_be(
    options: GenerateOptions, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        generate(replace(options, **changes))


def test_it_is_inspected_reported_verified_and_repaired(
    options: GenerateOptions, tmp_path: Path
) -> None:
    result = generate(options)
    rows = rows_of(options.out)
    seen = kdcache.inspect(kdcache.InspectOptions(options.out, row=3))
    assert isinstance(seen, GeneratedView)
    assert (seen.rows, seen.positions, seen.stopped) == (80, result.tokens, result.stopped)
    assert seen.teacher_cross_entropy == pytest.approx(result.nats)
    assert [sample.completion for sample in seen.samples] == [
        rows[sample.row]["completion"] for sample in seen.samples
    ]
    assert seen.row is not None
    assert seen.row.text == rows[3]["prompt"]
    assert [p.label_logprob for p in seen.row.positions] == rows[3]["logprobs"]
    printed = CliRunner().invoke(cli, ["inspect", options.out, "--row", "3"]).output
    for words in ("ended by length", "repeated answers", "Samples", "drawn"):
        assert words in printed
    page = tmp_path / "page.html"
    kdcache.report(kdcache.ReportOptions((options.out,), out=str(page)))
    assert "answers that loop" in page.read_text()

    whole = kdcache.verify(kdcache.VerifyOptions(options.out, teacher=(options.model,)))
    assert whole.problems == ()
    assert whole.compared is not None
    other = tmp_path / "other"
    make_tiny_lm(Path(options.model), other, seed=7)
    with pytest.raises(UsageError, match="is not the model that wrote"):
        kdcache.verify(kdcache.VerifyOptions(options.out, teacher=(str(other),)))
    damaged = next(Path(options.out, "shards").iterdir())
    before = shards(options.out)
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"x" * 9)
    (problem,) = kdcache.verify(kdcache.VerifyOptions(options.out)).problems
    assert damaged.name in problem
    kdcache.repair(kdcache.RepairOptions(options.out))
    assert not damaged.exists()
    assert generate(options).made == 1
    assert shards(options.out) == before
    assert kdcache.gc(kdcache.GcOptions(options.out)).removed == ()


def test_answers_that_repeat_and_loop_are_counted() -> None:
    assert _loops([9, 1, 2, 1, 2, 1, 2, 1, 2])
    assert _loops([5, 5, 5, 5])
    assert not _loops([5, 5, 5])
    assert not _loops([1, 2, 1, 2, 1, 2, 1, 3])
