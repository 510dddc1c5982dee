"""Exports of two caches: preference pairs with reference sums, documents by their difference."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from broken_caches import forge
from click.testing import CliRunner
from conftest import make_tiny_lm
from make_caches import CAUSAL, make_cache
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdcache
from kdcache.cache import Cache
from kdcache.cli.main import cli
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.options import ExportOptions
from kdcache.errors import UsageError
from kdcache.stream.shard_rows import by_document
from kdcache.targets.label_logprob import IMPOSSIBLE, decode_logprobs
from kdcache.tasks import IGNORE

pytestmark = pytest.mark.slow


def export(caches: tuple[Any, Any], out: Path, layout: str, **options: Any) -> pd.DataFrame:
    kdcache.export(ExportOptions(tuple(map(str, caches)), str(out), layout=layout, **options))
    return pd.read_parquet(out)


def make(teacher: Path, corpus: Path, out: Path, **options: Any) -> Path:
    values = {"max_length": 64, "packing": "none", "workers": 0, "codec": "topk:2", **options}
    values |= {"tokenizer": str(teacher)} if "record_form" in values else {}
    build(BuildOptions(teacher=(str(teacher),), corpus=(str(corpus),), out=str(out), **values))
    return out


@torch.no_grad()
def log_probability(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Of an answer after a prompt, in float64."""
    ids = torch.tensor([*prompt, *answer])
    logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].double()
    return float(logits.log_softmax(-1)[range(len(answer)), ids[len(prompt) :]].sum())


def without_sums(cache: Path, folder: Path) -> Path:
    """The cache as an earlier version made it."""

    def change(data: Any) -> Any:
        return dataclasses.replace(data, answer_logprob=None)

    forge(Cache.open(str(cache)), folder, change, answer_logprob=False)
    return folder


@pytest.fixture(scope="module")
def pairs(tiny_lm: Path, corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of 40 pairs, `SIDE-CODEC`, and the file that they are of."""
    folder = tmp_path_factory.mktemp("pairs")
    text = " ".join(corpus_texts)
    parts = [text[at : at + 200] for at in range(0, 8000, 200)]
    records = [
        {"prompt": f"{part[:40]}\n", "chosen": part[40:100], "rejected": part[100 : 130 + i]}
        for i, part in enumerate(parts)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    for side in ("chosen", "rejected"):
        for codec in ("dense", "topk:2"):
            more = {"shard_tokens": 600} if side == "rejected" else {}
            columns = (f"completion={side}",)
            out = folder / f"{side}-{codec}"
            make(tiny_lm, folder / "pairs.jsonl", out, codec=codec, columns=columns, **more)
    return folder


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("codec", ["dense", "topk:2"])
def test_reference_sums_are_of_the_answers_alone(
    codec: str, older: bool, pairs: Path, tiny_lm: Path, tmp_path: Path
) -> None:
    """Exact where caches keep them; of older ones where they have all logits."""
    caches = tuple(pairs / f"{side}-{codec}" for side in ("chosen", "rejected"))
    if older:
        caches = tuple(without_sums(path, tmp_path / path.name) for path in caches)
    assert Cache.open(str(caches[1])).spec.spans > Cache.open(str(caches[0])).spec.spans
    table = export(caches, tmp_path / "out", "dpo")
    model = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    records = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
    errors = []
    for record, (_, row) in zip(records, table.iterrows(), strict=True):
        prompt = row["prompt_ids"].tolist()
        assert tokenizer.decode(prompt) == record["prompt"]
        for side in ("chosen", "rejected"):
            answer = row[f"{side}_ids"].tolist()
            whole = tokenizer(record["prompt"] + record[side])["input_ids"] + [0]
            assert prompt + answer == whole[: 64 + 1][: len(prompt + answer)]
            errors.append(row[f"ref_{side}_logps"] - log_probability(model, prompt, answer))
    if codec == "dense" or not older:
        assert np.abs(errors).max() < 1e-4  # of sums of up to 60 labels
    else:  # rounded at random, by 0.02 nats a label
        assert 1e-3 < np.std(errors) < 0.5
        assert abs(np.mean(errors)) < 4 * np.std(errors) / len(errors) ** 0.5


def test_of_several_answers_the_last_one_counts(tiny_lm: Path, tmp_path: Path) -> None:
    """Earlier turns are learnt, too, but belong to the prompt."""
    caches = []
    for side, last in (("chosen", [7, 8, 9]), ("rejected", [10, 11])):
        ids = [1, 2, 3, 4, 5, 6, *last, 12]
        mask = [0, 0, 1, 1, 0, 0, *[1] * len(last), 0]
        (tmp_path / f"{side}.jsonl").write_text(json.dumps({"input_ids": ids, "loss_mask": mask}))
        more = {"record_form": "ids", "labels": "token", "packing": "whole", "codec": "dense"}
        caches.append(make(tiny_lm, tmp_path / f"{side}.jsonl", tmp_path / side, **more))
    (row,) = export((caches[0], caches[1]), tmp_path / "out", "dpo").to_dict("records")
    assert row["prompt_ids"].tolist() == [1, 2, 3, 4, 5, 6]
    assert (row["chosen_ids"].tolist(), row["rejected_ids"].tolist()) == ([7, 8, 9], [10, 11])
    model = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float64).eval()
    right = log_probability(model, [1, 2, 3, 4, 5, 6], [10, 11])
    assert row["ref_rejected_logps"] == pytest.approx(right, abs=1e-4)


def test_a_label_without_probability_spoils_no_sum_but_its_own(tmp_path: Path) -> None:
    """In an earlier turn it does not count; in an answer the pair is refused, by its row."""
    cache = make_cache(
        tmp_path / "c", [3, 5], task=CAUSAL, label_logprob=True, codec="topk:2", first=20
    )
    places = [np.flatnonzero(cache.read(1).row(i).labels != IGNORE) for i in range(5)]
    turns = next(i for i, place in enumerate(places) if (np.diff(place) > 1).any())

    def without(name: str, row: int, label: int) -> str:
        """The first label of a row of the second shard has none; or the last one, with 1."""

        def change(data: Any) -> Any:
            codes = data.label_logprob.copy()
            if len(data) == 5:
                codes[data.position_offsets[row + label] - label] = IMPOSSIBLE
            return dataclasses.replace(data, label_logprob=codes)

        return forge(cache, tmp_path / name, change).url

    right = export((cache.url, cache.url), tmp_path / "right", "dpo")
    earlier = without("earlier", turns, 0)
    found = export((earlier, cache.url), tmp_path / "found", "dpo")
    assert np.isfinite(right["ref_chosen_logps"]).all()
    assert found["ref_chosen_logps"].tolist() == right["ref_chosen_logps"].tolist()
    with pytest.raises(UsageError, match=f"the answer in row {3 + turns} no probability"):
        export((cache.url, without("own", turns, 1)), tmp_path / "own-out", "dpo")


def test_rows_that_are_no_pairs_are_refused(
    pairs: Path, lm_caches: dict[str, str], class_cache: str, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    chosen, out = pairs / "chosen-dense", tmp_path / "out"
    other = make_tiny_lm(tiny_tokenizer, tmp_path / "lm", seed=5)
    lines = (pairs / "pairs.jsonl").read_text().splitlines()
    for name, some in (("moved", [*lines[1:], lines[0]]), ("fewer", lines[1:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some))
    corpus, columns = pairs / "pairs.jsonl", ("completion=rejected",)
    cases = {
        "different teachers": make(other, corpus, tmp_path / "other", columns=columns),
        "40 and 39 rows": make(other, tmp_path / "fewer.jsonl", tmp_path / "39", columns=columns),
        "takes causal-lm caches": class_cache,
    }
    for message, second in cases.items():
        with pytest.raises(UsageError, match=message):
            export((chosen, second), out, "dpo")
    moved = make(other, tmp_path / "moved.jsonl", tmp_path / "moved", columns=columns)
    with pytest.raises(UsageError, match="different prompts in row 0"):
        export((tmp_path / "other", moved), out, "dpo")
    with pytest.raises(UsageError, match="rows that are not one record each"):
        export((lm_caches["topk:8"], lm_caches["dense"]), out, "dpo")
    with pytest.raises(UsageError, match="different ids or labels"):
        export((tmp_path / "other", moved), out, "documents")
    assert not list(out.glob("*.parquet"))
    export((chosen, pairs / "rejected-dense"), out, "dpo")  # what was refused left nothing behind
    for wrong, message in (
        ({"layout": "dpo"}, "takes two caches, not 1"),
        ({"cache": ("a", "b")}, "takes one cache, not 2"),
        ({"select": 0.5}, "needs --layout documents"),
        ({"cache": ("a", "b"), "layout": "documents", "top": 3}, "leave --temperature and --top"),
    ):
        with pytest.raises(UsageError, match=message):
            ExportOptions(**{"cache": ("a",), "out": "o", **wrong})


@pytest.fixture(scope="module")
def teachers(
    tiny_lm: Path,
    tiny_tokenizer: Path,
    text_corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """Caches of two teachers on the same 60 documents, in shards of other sizes; packed, too."""
    folder = tmp_path_factory.mktemp("teachers")
    other = make_tiny_lm(tiny_tokenizer, folder / "lm", seed=5)
    packed = {"packing": "concat", "attend": "document", "max_length": 48, "shard_tokens": 900}
    for name, more, others in (
        ("", {}, {"shard_tokens": 900}),
        ("-packed", packed, packed),  # rows end where shards do
    ):
        make(tiny_lm, text_corpus, folder / f"one{name}", limit=60, **more)
        make(other, text_corpus, folder / f"other{name}", limit=60, **others)
    return folder / "one", folder / "other"


def documents(cache: Path) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Row, ids, labels and log-probabilities of each document."""
    opened, found, first = Cache.open(str(cache)), [], 0
    for span in range(opened.spec.spans):
        rows = opened.read(span)
        data = by_document(rows)
        for i in range(len(data)):
            a, b = data.offsets[i : i + 2]
            p, q = data.position_offsets[i : i + 2]
            row = first + int((rows.offsets <= a).sum()) - 1
            logps = decode_logprobs(data.label_logprob[p:q]).astype(np.float64)
            found.append((row, data.input_ids[a:b], data.labels[a:b], logps))
        first += len(rows)
    return found


@pytest.mark.parametrize("packed", ["", "-packed"])
def test_documents_are_chosen_by_the_difference_of_two_teachers(
    packed: str, teachers: tuple[Path, Path], tmp_path: Path
) -> None:
    one, other = (path.with_name(path.name + packed) for path in teachers)
    known = [
        (row, ids, labels, logps, theirs, logps.mean() - theirs.mean())
        for (row, ids, labels, logps), (_, _, _, theirs) in zip(
            documents(one), documents(other), strict=True
        )
        if len(logps)
    ]
    differences = np.array([document[-1] for document in known])
    every = export((one, other), tmp_path / "all", "documents")
    assert len(every) == len(known)
    for (row, ids, labels, logps, theirs, d), (_, got) in zip(known, every.iterrows(), strict=True):
        assert (got["row"], got["input_ids"].tolist()) == (row, ids.tolist())
        assert got["labels"].tolist() == labels.tolist()
        means = [got["logprob"], got["other_logprob"], got["difference"]]
        assert means == pytest.approx([logps.mean(), theirs.mean(), d], abs=1e-5)
    options = ExportOptions(
        (str(one), str(other)), str(tmp_path / "some"), layout="documents", select=0.2
    )
    result = kdcache.export(options)
    chosen = pd.read_parquet(tmp_path / "some")
    count = int(0.2 * len(known) + 0.5)
    assert len(chosen) == result.rows == count
    want = np.sort(np.argsort(-differences, kind="stable")[:count])
    assert chosen["difference"].tolist() == pytest.approx(differences[want].tolist(), abs=1e-5)
    found = result.differences
    assert found is not None
    assert (found.documents, found.mean) == (len(known), pytest.approx(differences.mean()))
    assert [v for _, v in found.quantiles][::3] == pytest.approx(
        np.sort(differences)[[0, round(0.5 * (len(known) - 1)), -1]].tolist()
    )
    assert [e.difference for e in found.highest] == pytest.approx(
        np.sort(differences)[::-1][:5].tolist()
    )
    assert [e.difference for e in found.lowest] == pytest.approx(np.sort(differences)[:5].tolist())
    best = int(differences.argmax())
    assert found.highest[0].text == every["text"][best]
    assert found.highest[0].row == known[best][0]


def test_chosen_documents_are_a_corpus(
    teachers: tuple[Path, Path], tiny_lm: Path, tmp_path: Path
) -> None:
    args = ["export", *map(str, teachers), "--layout", "documents", "--select", "0.1", "--out"]
    result = CliRunner().invoke(cli, [*args, str(tmp_path / "some")])
    assert result.exit_code == 0, result.output
    assert "mean difference" in result.output
    assert "--record-form ids" in result.output
    chosen = pd.read_parquet(tmp_path / "some")
    more = {"record_form": "ids", "labels": "next", "packing": "whole"}
    again = documents(make(tiny_lm, tmp_path / "some", tmp_path / "cache", **more))
    assert [ids.tolist() for _, ids, _, _ in again] == [i.tolist() for i in chosen["input_ids"]]
    means = [logps.mean() for _, _, _, logps in again]
    assert means == pytest.approx(chosen["logprob"].tolist(), abs=0.02)  # rounded anew


def test_equal_documents_are_chosen_in_order(tmp_path: Path) -> None:
    """One teacher twice: all differences are 0. Files that are missing are made as they were."""
    cache = make_cache(
        tmp_path / "c", [3, 0, 9, 4], task=CAUSAL, label_logprob=True, codec="topk:2"
    )
    options = ExportOptions(
        (cache.url, cache.url), str(tmp_path / "out"), layout="documents", select=0.4
    )
    assert kdcache.export(options).rows == 6
    files = sorted((tmp_path / "out").glob("*.parquet"))
    before = [path.read_bytes() for path in files]
    assert pd.read_parquet(tmp_path / "out")["row"].tolist() == [0, 1, 2, 3, 4, 5]
    files[2].unlink()
    assert kdcache.export(options).made == 1
    assert [path.read_bytes() for path in files] == before


def test_memory_is_that_of_a_shard(tmp_path: Path) -> None:
    peaks = []
    for shards in (3, 24):
        caches = [
            make_cache(
                tmp_path / f"{name}{shards}", rows, task=CAUSAL, label_logprob=True, codec="topk:2"
            ).url
            for name, rows in (("a", [100] * shards), ("b", [150] * (shards * 2 // 3)))
        ]
        options = ExportOptions(
            tuple(caches), str(tmp_path / f"out{shards}"), layout="documents", select=0.5
        )
        tracemalloc.start()
        kdcache.export(options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
