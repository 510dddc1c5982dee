"""Parquet out and in: what is exported is the targets; of what others wrote nothing is made up."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import built
from make_caches import CAUSAL, make_cache
from transformers import AutoTokenizer

import kdcache
from kdcache.cache import Cache
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.import_.layouts import Compression
from kdcache.commands.import_.options import ImportOptions
from kdcache.commands.options import ExportOptions, VerifyOptions
from kdcache.commands.share import data_card
from kdcache.corpus import RecordError
from kdcache.errors import UsageError
from kdcache.rows import Row
from kdcache.targets import SoftTargets
from kdcache.targets.decoded import SparseTargets, with_logits
from kdcache.targets.label_logprob import decode_logprobs
from kdcache.tasks import IGNORE

pytestmark = pytest.mark.slow

TOKENIZER = Path(__file__).resolve().parent / "tiny_tokenizers" / "bytes"


def export(cache: str, out: Path, **options: Any) -> pd.DataFrame:
    kdcache.export(ExportOptions(cache, str(out), **options))
    return pd.read_parquet(out)


def take_in(folder: Path, out: Path, **options: Any) -> Cache:
    values = {"corpus": (str(folder),), "tokenizer": str(TOKENIZER), "workers": 0, **options}
    kdcache.import_(ImportOptions(out=str(out), **values))
    return Cache.open(str(out))


def decoded(cache: Cache, temperature: float = 1.0) -> list[dict[int, float]]:
    """The targets of all positions: weights by id."""
    found = []
    for span in range(cache.spec.spans):
        targets = cache.read(span).targets
        if len(targets):
            sparse = targets.at(temperature)
            assert isinstance(sparse, SparseTargets)
            for ids, weights in zip(sparse.ids.tolist(), sparse.weights.tolist(), strict=True):
                one: dict[int, float] = {}
                for i, w in zip(ids, weights, strict=True):
                    one[i] = one.get(i, 0.0) + w
                found.append({i: w for i, w in one.items() if w})
    return found


def rows_of(cache: Cache) -> list[Row]:
    return [
        data.row(i) for data in map(cache.read, range(cache.spec.spans)) for i in range(len(data))
    ]


# -- export --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "temperature"), [("topk:8", 2.0), ("sample:20", 1.0)])
def test_a_row_holds_ids_labels_and_the_targets_of_each_token(
    lm_caches: dict[str, str], tmp_path: Path, codec: str, temperature: float
) -> None:
    cache = Cache.open(lm_caches[codec])
    table = export(cache.url, tmp_path, temperature=temperature)
    shards, rows = [cache.read(i) for i in range(cache.spec.spans)], rows_of(cache)
    expected = decoded(cache, temperature)
    logprobs = np.concatenate([decode_logprobs(data.label_logprob) for data in shards])
    place = 0
    assert len(table) == len(rows)
    for row, (_, got) in zip(rows, table.iterrows(), strict=True):
        assert got["input_ids"].tolist() == row.input_ids.tolist()
        assert got["labels"].tolist() == row.labels.tolist()
        for t, label in enumerate(row.labels):
            ids, probs = got["target_ids"][t], got["target_probs"][t]
            if label == IGNORE:
                assert not len(ids)
                assert math.isnan(got["target_tail"][t])
                continue
            assert dict(zip(ids.tolist(), probs, strict=True)) == pytest.approx(expected[place])
            assert (np.diff(probs) <= 0).all()
            if codec == "topk:8":
                assert probs.sum() + got["target_tail"][t] == pytest.approx(1, abs=1e-5)
            assert got["teacher_logprob"][t] == logprobs[place]
            place += 1
    assert place == len(expected)


def test_all_ids_or_the_best_of_them_and_the_rest_as_tail(
    lm_caches: dict[str, str], tmp_path: Path
) -> None:
    cache = Cache.open(lm_caches["dense"])
    data = cache.read(0)
    dense = with_logits(data.targets.at(2.0))
    probs = (dense.logits.double() / 2).softmax(-1).numpy()  # type: ignore[union-attr]
    table = export(cache.url, tmp_path / "top", temperature=2.0, top=5)
    everything = export(cache.url, tmp_path / "all", temperature=2.0)
    best = np.sort(probs)[:, ::-1]

    def of_labels(rows: Any, column: str) -> Any:
        """A column's values at the positions that have a label."""
        return np.stack(
            [
                np.asarray(row[column][i])
                for _, row in rows.iterrows()
                for i in np.flatnonzero(np.asarray(row["labels"]) != IGNORE)
            ]
        )

    for rows, column, want in (
        (table, "target_probs", best[:, :5]),
        (table, "target_tail", best[:, 5:].sum(-1)),
        (everything, "target_probs", best),
    ):
        found = of_labels(rows, column)[: len(probs)]
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)


def test_a_classifier_has_one_target_a_row(class_cache: str, tmp_path: Path) -> None:
    data = Cache.open(class_cache).read(0)
    table = export(class_cache, tmp_path, temperature=3.0)
    dense = with_logits(data.targets.at(3.0))
    probs = (dense.logits.double() / 3).softmax(-1).numpy()  # type: ignore[union-attr]
    assert table["text"].tolist() == data.texts
    assert table["label"].fillna(IGNORE).astype(int).tolist() == data.labels.tolist()
    for expected, ids, got in zip(probs, table["target_ids"], table["target_probs"], strict=True):
        assert dict(zip(ids.tolist(), got, strict=True)) == pytest.approx(
            dict(enumerate(expected)), abs=1e-6
        )


def test_an_export_goes_on_and_refuses_another_one(
    lm_caches: dict[str, str], tmp_path: Path
) -> None:
    options = ExportOptions(lm_caches["topk:8"], str(tmp_path / "out"))
    first = kdcache.export(options)
    files = sorted((tmp_path / "out").glob("*.parquet"))
    before = [path.read_bytes() for path in files]
    files[-1].unlink()
    again = kdcache.export(options)
    assert (first.made, again.made, again.files) == (len(files), 1, len(files))
    assert [path.read_bytes() for path in files] == before
    with pytest.raises(UsageError, match="another cache or of other options"):
        kdcache.export(replace(options, temperature=2.0))
    with pytest.raises(UsageError, match="temperature 3 is not declared"):
        kdcache.export(replace(options, temperature=3.0, out=str(tmp_path / "t3")))
    with pytest.raises(UsageError, match="would be biased"):
        kdcache.export(ExportOptions(lm_caches["sample:20"], str(tmp_path / "s"), top=3))
    with pytest.raises(UsageError, match=r"sample:20 targets .* export a topk cache"):
        export(lm_caches["sample:20"], tmp_path / "draws", layout="axolotl")
    with pytest.raises(UsageError, match="is a cache. Name another folder"):
        kdcache.export(replace(options, out=options.cache[0]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.parquet").write_bytes(b"")
    with pytest.raises(UsageError, match="holds other Parquet files"):
        kdcache.export(replace(options, out=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("codec", "top"), [("dense", 5), ("dense", None), ("topk:200", None), ("sample:150", None)]
)
def test_memory_is_bounded_by_what_the_codec_decodes(
    codec: str, top: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by what is kept of it, and not by a guess: `hidden` with --top 64 decodes all ids."""
    make_cache(tmp_path / "cache", [9], task=CAUSAL, codec=codec, vocab=400)
    cache, most, blocks = str(tmp_path / "cache"), 2000, []
    whole = export(cache, tmp_path / "whole", top=top)
    at = SoftTargets.at

    def noted(targets: SoftTargets, temperature: float) -> Any:
        found = at(targets, temperature)
        tensor = found.weights if isinstance(found, SparseTargets) else found.logits
        blocks.append(tensor.numel())
        return found

    monkeypatch.setattr(SoftTargets, "at", noted)
    monkeypatch.setattr("kdcache.commands.export._ENTRIES", most)
    parts = export(cache, tmp_path / "parts", top=top)
    assert max(blocks) <= most < sum(blocks)
    pd.testing.assert_frame_equal(parts, whole)


# -- round trip ----------------------------------------------------------------------------------


def test_what_was_exported_is_imported_again(
    lm_caches: dict[str, str], tiny_lm: Path, tmp_path: Path
) -> None:
    cache = Cache.open(lm_caches["topk:8"])
    export(cache.url, tmp_path / "out")
    again = take_in(tmp_path / "out", tmp_path / "cache", tokenizer=str(tiny_lm))
    assert (again.spec.codec, again.spec.temperatures) == ("topk:8", (1.0,))
    assert again.manifest.positions == cache.manifest.positions
    old, new = (
        [(row.input_ids.tolist(), row.labels.tolist()) for row in rows_of(one)]
        for one in (cache, again)
    )
    assert old == new
    for mine, theirs in zip(decoded(again), decoded(cache), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    nats = [sum(s.label_nats or 0 for s in one.manifest.shards) for one in (cache, again)]
    assert nats[0] > 0
    assert nats[0] == pytest.approx(nats[1], rel=1e-3)
    about = again.notes["imported"]["about"]
    assert (about["cache"], about["codec"]) == (cache.digest, "topk:8")
    assert again.notes["teachers"] == cache.notes["teachers"]
    with pytest.raises(UsageError, match="temperature 2 is not declared"):
        again.codec().check_temperature(2.0)


@pytest.mark.end_to_end
def test_documents_that_share_a_row_stay_apart(
    small_build: BuildOptions, tiny_lm: Path, tmp_path: Path
) -> None:
    """Out with their segments; in again, and built again from the exported ids, the same."""
    options = replace(
        small_build, codec="topk:4", attend="document", max_length=48, limit=12, packing="concat"
    )
    kdcache.build(options)
    cache = Cache.open(options.out)
    table = export(cache.url, tmp_path / "out")
    assert max(segments.max() - segments.min() for segments in table["segment_ids"]) > 0
    shared: dict[str, Any] = {"tokenizer": str(tiny_lm), "attend": "document"}
    with pytest.raises(UsageError, match="--attend document"):
        take_in(tmp_path / "out", tmp_path / "row", **{**shared, "attend": "row"})
    again = take_in(tmp_path / "out", tmp_path / "again", **shared)
    built = replace(
        options, corpus=(str(tmp_path / "out"),), out=str(tmp_path / "ids"), limit=None,
        packing="whole", record_form="ids", labels="next", **shared,
    )  # fmt: skip
    kdcache.build(built)
    rows = map(rows_of, (cache, again, Cache.open(built.out)))
    for first, second, third in zip(*rows, strict=True):
        for name in ("input_ids", "labels", "starts"):
            values = [getattr(row, name).tolist() for row in (first, second, third)]
            assert values[0] == values[1] == values[2]
    for one in (again, Cache.open(built.out)):
        for mine, theirs in zip(decoded(one), decoded(cache), strict=True):
            assert mine == pytest.approx(theirs, abs=1e-3)


def test_axolotl_reads_what_is_written_for_it(
    tiny_lm: Path, text_corpus: Path, tmp_path: Path
) -> None:
    """Its layout is the one that import reads: the same rows, the same targets without a tail."""
    given = {"codec": "topk:8", "max_length": 32, "limit": 40, "attend": "document"}
    cache = Cache.open(built(tiny_lm, text_corpus, tmp_path / "cache", **given))
    export(cache.url, tmp_path / "out", layout="axolotl")
    for file in (tmp_path / "out").glob("*.parquet"):
        for row in pq.read_table(file).to_pylist():
            assert len({len(row[name]) for name in row}) == 1
            assert row["target_token_ids"][0] == []
            for at in range(1, len(row["labels"])):
                learnt = row["labels"][at] != IGNORE
                assert len(row["target_token_ids"][at]) == 8 * learnt
                assert row["target_mask"][at] == [1] * 8 * learnt
                assert not learnt or row["labels"][at] == row["input_ids"][at]
    again = take_in(
        tmp_path / "out", tmp_path / "again", layout="axolotl", tokenizer=str(tiny_lm),
        max_length=64, attend="document",
    )  # fmt: skip
    for first, second in zip(rows_of(cache), rows_of(again), strict=True):
        assert first.input_ids.tolist() == second.input_ids.tolist()
        assert first.labels.tolist() == second.labels.tolist()
    for mine, other in zip(decoded(cache), decoded(again), strict=True):
        whole = sum(mine.values())
        assert other == pytest.approx({i: p / whole for i, p in mine.items()}, abs=2e-3)


@pytest.mark.parametrize("layout", ["kdcache", "axolotl"])
def test_what_was_imported_is_certified_against_the_teacher(
    lm_caches: dict[str, str], tiny_lm: Path, tmp_path: Path, layout: Any
) -> None:
    """Exact but for rounding with its tail; without it an infinite KL, of what was left out."""
    export(lm_caches["dense"], tmp_path / "out", layout=layout, temperature=1.0, top=9)
    cache = take_in(tmp_path / "out", tmp_path / "cache", tokenizer=str(tiny_lm), layout=layout)
    result = kdcache.verify(VerifyOptions(cache.url, teacher=(str(tiny_lm),), sample=20))
    assert result.recheck is not None
    (found,) = result.recheck.fidelity
    card = data_card(cache, "hf://datasets/me/it", [])
    assert "Not measured." in card
    said = json.dumps(dataclasses.asdict(result), default=str)
    (tmp_path / "verified.json").write_text(said)
    assert found.line in data_card(cache, "hf://datasets/me/it", [str(tmp_path / "verified.json")])
    if layout == "kdcache":
        assert not result.problems
        assert found.kl == pytest.approx(0, abs=1e-4)
        return
    dense = Cache.open(lm_caches["dense"]).read(0).targets.at(1.0)
    best = with_logits(dense).logits.softmax(-1).topk(9).values.sum(-1)  # type: ignore[union-attr]
    assert found.kl is None
    assert found.lost == pytest.approx(1 - float(best.mean()), rel=0.1)
    assert "what they were imported from is biased" in result.problems[0]


def test_what_cannot_become_topk_at_one_is_refused(
    lm_caches: dict[str, str], class_cache: str, tmp_path: Path
) -> None:
    export(lm_caches["topk:8"], tmp_path / "t2", temperature=2.0)
    export(lm_caches["sample:20"], tmp_path / "draws")
    export(class_cache, tmp_path / "classes")
    for name, message in (
        ("t2", "at T = 2"),
        ("draws", r"holds draws \(sample:20\)"),
        ("classes", "holds the targets of a sequence classifier; .* of a causal language model"),
    ):
        with pytest.raises(UsageError, match=message):
            take_in(tmp_path / name, tmp_path / "cache")


@pytest.mark.parametrize(
    ("task", "noun"),
    [
        ("masked-lm", "a masked language model"),
        ("telepathy", "'telepathy'"),
    ],
)
def test_an_export_of_another_task_is_refused_as_what_it_is(
    task: Any, noun: str, tmp_path: Path
) -> None:
    table = pa.table({"input_ids": [[1, 2]]})
    about = {"kdcache": json.dumps({"task": task, "temperature": 1.0})}
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=f"holds the targets of {noun}; an import is of a causal"):
        take_in(tmp_path, tmp_path / "cache")


def test_each_file_of_an_export_is_looked_at_and_not_the_first_alone(
    lm_caches: dict[str, str], tiny_lm: Path, tmp_path: Path
) -> None:
    export(lm_caches["topk:8"], tmp_path / "a")
    for name, codec, options, message in (
        ("hotter", "topk:8", {"temperature": 2.0}, "b/part.*at T = 2"),
        ("drawn", "sample:20", {}, r"b/part.*holds draws \(sample:20\)"),
    ):
        export(lm_caches[codec], tmp_path / name / "b", **options)
        corpus = (str(tmp_path / "a"), str(tmp_path / name / "b"))
        with pytest.raises(UsageError, match=message):
            take_in(tmp_path, tmp_path / "cache", corpus=corpus, tokenizer=str(tiny_lm))
    with pytest.raises(UsageError, match="a cache of another tokenizer than"):
        take_in(tmp_path / "a", tmp_path / "cache")


# -- what others write ---------------------------------------------------------------------------

IDS = [5, 6, 7, 8]
TOP = [[9, 3, 6], [7, 1, 2], [8, 4, 0]]  # of what follows 5, 6 and 7
LOGPROBS = [[-0.5, -1.5, -3.0], [-0.25, -2.0, -2.5], [-0.75, -1.0, -4.0]]


def expected(k: int = 3) -> list[dict[int, float]]:
    return [
        {i: math.exp(x) for i, x in zip(ids[:k], values[:k], strict=True)}
        for ids, values in zip(TOP, LOGPROBS, strict=True)
    ]


def nested(rows: list[Any], kind: Any) -> Any:
    return pa.array(rows, pa.list_(pa.list_(kind)))


def write(folder: Path, columns: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "data_0.parquet")
    return folder


def check(cache: Cache, k: int = 3) -> None:
    (row,) = rows_of(cache)
    assert [*row.input_ids.tolist(), int(row.labels[-1])] == IDS
    assert (cache.spec.codec, cache.spec.temperatures) == (f"topk:{k}", (1.0,))
    found = decoded(cache)
    assert len(found) == len(TOP)
    for got, wanted in zip(found, expected(k), strict=True):
        assert got == pytest.approx(wanted, abs=2e-3)
    tail = cache.read(0).targets.at(1.0).tail.tolist()  # type: ignore[union-attr]
    assert tail == pytest.approx([1 - sum(one.values()) for one in expected(k)], abs=2e-3)


class TestLayouts:
    def test_plain_columns_stand_where_the_option_says(self, tmp_path: Path) -> None:
        columns = {
            "tokens": pa.array([IDS], pa.list_(pa.int32())),
            "top_ids": nested([TOP], pa.int32()),
            "top_logprobs": nested([LOGPROBS], pa.float32()),
        }
        names = ("input_ids=tokens", "target_ids=top_ids", "target_logprobs=top_logprobs")
        options: dict[str, Any] = {"layout": "plain", "columns": names}
        folder = write(tmp_path / "next", columns)
        check(take_in(folder, tmp_path / "a", targets="next", **options))
        check(take_in(folder, tmp_path / "k2", targets="next", top=2, **options), 2)
        columns |= {
            "top_ids": nested([[[0, 1, 2], *TOP]], pa.int32()),
            "top_logprobs": nested([[[0.0, -9.0, -9.0], *LOGPROBS]], pa.float32()),
        }
        folder = write(tmp_path / "token", columns)
        check(take_in(folder, tmp_path / "b", targets="token", **options))
        with pytest.raises(UsageError, match="--targets is missing"):
            take_in(folder, tmp_path / "c", **options)


def test_the_probabilities_of_all_ids_are_one_or_refused(tmp_path: Path) -> None:
    """No id is left that a tail could stand for."""
    size = len(AutoTokenizer.from_pretrained(TOKENIZER))
    for name, mass in (("rounded", 0.99), ("part", 0.3)):
        probs = [[mass / size] * size] * 3
        columns = {
            "input_ids": pa.array([IDS], pa.list_(pa.int32())),
            "target_ids": nested([[list(range(size))] * 3], pa.int32()),
            "target_probs": nested([probs], pa.float64()),
        }
        write(tmp_path / name, columns)
    options: dict[str, Any] = {"layout": "plain", "targets": "next", "labels": "none"}
    for top in (None, 5):
        cache = take_in(tmp_path / "rounded", tmp_path / f"{top}", top=top, **options)
        for weights in decoded(cache):
            assert list(weights.values()) == pytest.approx([1 / size] * (top or size), rel=1e-3)
    with pytest.raises(UsageError, match=f"of all {size} ids sum to 0.3, expected 1"):
        take_in(tmp_path / "part", tmp_path / "cache", **options)


class TestCompression:
    def test_terms_deltas_and_odd_bits(self) -> None:
        config = {"d": 300, "k": 5, "exact_k": 1, "exact_dtype": "float16", "term_dtype": "float64"}
        config |= {"polynomial_terms": [1, "sqrt"], "residual_bins": [
            {"scale_dtype": "bfloat16", "element_bits": 1, "num_elements": 2}]}  # fmt: skip
        row = np.float16(-0.5).tobytes() + np.array([-1.0, -0.5]).tobytes()
        row += struct.pack("<f", 0.25)[2:] + bytes([0b10_000000])
        data = np.frombuffer(row, np.uint8)[None]
        steps = [-0.5, 0.25, -1.5 - 0.25, -2 - 0.5 * 2**0.5, -3 - 0.5 * 3**0.5]
        plain = Compression.parse({**config, "delta_encoding": False}, "x").logprobs(data)
        assert plain[0] == pytest.approx(steps)
        summed = Compression.parse(config, "x").logprobs(data)
        assert summed[0] == pytest.approx(np.cumsum(steps))
        with pytest.raises(RecordError, match="20 bytes a position, too few"):
            Compression.parse(config, "x").logprobs(data[:, :-1])
        with pytest.raises(RecordError, match="22 bytes a position, 21 expected"):
            Compression.parse(config, "x").logprobs(np.pad(data, ((0, 0), (0, 1))))

    @pytest.mark.parametrize(
        "change",
        [{"k": 400}, {"exact_k": 9}, {"d": 1}, {"d": None}, {"exact_dtype": "int8"}, {"k": 1 << 40},
         {"polynomial_terms": ["sin"]}, {"residual_bins": [{"element_bits": 8}]},
         {"residual_bins": [{"scale_dtype": "float32", "element_bits": 99, "num_elements": 1}]}],
    )  # fmt: skip
    def test_wrong_configurations_are_named(self, change: dict[str, Any]) -> None:
        good = {"d": 300, "k": 5, "exact_k": 5, "residual_bins": []}
        Compression.parse(good, "x")
        with pytest.raises(UsageError, match="c.yaml is not a compression configuration"):
            Compression.parse({**good, **change}, "c.yaml")


class TestWrongRows:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"target_logprobs": [[0.0, -0.1, -0.2], *LOGPROBS[1:]]}, "sum to 2.724.*--excess"),
            ({"target_logprobs": [[math.nan, -1, -2], *LOGPROBS[1:]]}, "is not a number"),
            ({"target_logprobs": [[-math.inf] * 3, *LOGPROBS[1:]]}, "no probability on any"),
            ({"target_logprobs": LOGPROBS[1:]}, "have different lengths"),
            ({"target_ids": [[9, 3, 9], *TOP[1:]]}, "names an id twice"),
            ({"target_ids": [[9, 3, -1], *TOP[1:]]}, "names -1, which is not an id"),
            ({"target_ids": [[9, 3, 1 << 20], *TOP[1:]]}, "names 1048576, which is not an id"),
            (
                {"target_ids": [*TOP[:2], [8, 4]], "target_logprobs": [*LOGPROBS[:2], [-1, -2]]},
                "a position has 2 ids, fewer than the 3",
            ),
            (
                {"target_ids": TOP[:2], "target_logprobs": LOGPROBS[:2]},
                "its targets have 2 items for 4 input_ids",
            ),
            ({"input_ids": [5, 6, 1 << 20, 8]}, "input_ids holds 1048576"),
        ],
    )
    def test_they_are_named_or_skipped(
        self, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        good = {"input_ids": IDS, "target_ids": TOP, "target_logprobs": LOGPROBS}
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in (good, {**good, **change})))
        options: dict[str, Any] = {"layout": "plain", "targets": "next"}
        with pytest.raises(UsageError, match=f"line 2: .*{message}"):
            take_in(path, tmp_path / "fails", **options)
        if "fewer" not in message:  # what is wrong behind the best is wrong, too
            with pytest.raises(UsageError, match=f"line 2: .*{message}"):
                take_in(path, tmp_path / "top", top=2, **options)
        cache = take_in(path, tmp_path / "cache", on_error="skip", **options)
        check(cache)
        assert cache.manifest.skipped == 1

    def test_what_fills_lists_up_is_no_target(self, tmp_path: Path) -> None:
        filled: dict[str, Any] = {
            "input_ids": IDS,
            "target_ids": [[-1, *ids, -1] for ids in TOP],
            "target_logprobs": [[-math.inf, *values, -math.inf] for values in LOGPROBS],
        }
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(filled))
        options: dict[str, Any] = {"layout": "plain", "targets": "next"}
        check(take_in(path, tmp_path / "cache", top=3, **options))
        check(take_in(path, tmp_path / "two", top=2, **options), 2)
        with pytest.raises(UsageError, match="names -1, which is not an id"):
            take_in(path, tmp_path / "five", **options)

    def test_excess_is_clipped_by_an_explicit_word(self, tmp_path: Path) -> None:
        high = [[0.0, -1.0, -2.0], *LOGPROBS[1:]]
        path = tmp_path / "rows.jsonl"
        row = {"input_ids": IDS, "target_ids": TOP, "target_logprobs": high}
        path.write_text(json.dumps(row))
        options: dict[str, Any] = {"layout": "plain", "targets": "next"}
        cache = take_in(path, tmp_path / "cache", excess="clip", **options)
        total = sum(map(math.exp, high[0]))
        got = decoded(cache)[0]
        assert got == pytest.approx(
            {i: math.exp(x) / total for i, x in zip(TOP[0], high[0], strict=True)}, abs=2e-3
        )
        assert cache.spec.reading["excess"] == "clip"
