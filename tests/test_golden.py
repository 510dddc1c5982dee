"""Caches that an earlier version wrote must be read for ever; `golden/make.py` says what they are.

A failure here means that existing caches are lost to their owners. Mend the reader, never the
files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import further

from kdcache.cache import Cache
from kdcache.cache.check import problems
from kdcache.cache.manifest import label_sums
from kdcache.commands.export import export
from kdcache.commands.inspect import inspect
from kdcache.commands.options import ExportOptions, InspectOptions, ReportOptions
from kdcache.commands.report.report import report
from kdcache.stream import TargetStream
from kdcache.targets import AnchoredTargets, DenseTargets, HiddenTargets
from kdcache.targets.label_logprob import decode_entropies, decode_logprobs

GOLDEN = Path(__file__).parent / "golden"
EXPECTED: dict[str, dict[str, Any]] = json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture(params=sorted(EXPECTED))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_golden_caches_are_whole(name: str) -> None:
    cache = Cache.open(str(GOLDEN / name))
    found = [problem.text for problem in problems(cache)]
    if name in (
        "dense",
        "words",
        "labels",
        "scores",
    ):  # their rows were made of numbers that its tokenizer of three words lacks
        assert re.search(r"input id \d+, expected less than 3", found.pop())
    assert found == []
    assert cache.digest == EXPECTED[name]["digest"]
    assert cache.spec.fingerprint == EXPECTED[name]["fingerprint"]
    assert cache.tokenizer()("w2")["input_ids"] == [2]


def test_golden_shards_have_their_domains(name: str) -> None:
    cache = Cache.open(str(GOLDEN / name))
    want = EXPECTED[name].get("domains", [None] * cache.spec.spans)
    assert [shard.domain for shard in cache.manifest.shards] == want
    assert [cache.spec.domain_of(span) for span in range(cache.spec.spans)] == want
    if name == "domains":
        figures = inspect(InspectOptions(str(GOLDEN / name))).domains
        assert [(f.name, f.done, f.rows) for f in figures] == [("web", 2, 7), ("code", 1, 3)]


def test_golden_rows_are_read(name: str) -> None:
    cache = Cache.open(str(GOLDEN / name))
    assert cache.spec.spans == len(EXPECTED[name]["shards"])
    for span, shard in enumerate(EXPECTED[name]["shards"]):
        data = cache.read(span)
        assert len(data) == len(shard["rows"])
        assert np.diff(data.position_offsets).tolist() == shard["positions"]
        for index, want in enumerate(shard["rows"]):
            row = data.row(index)
            assert row.input_ids.tolist() == want["input_ids"]
            assert [None if v != v else v for v in row.labels.tolist()] == want["labels"]
            assert (None if row.type_ids is None else row.type_ids.tolist()) == want["type_ids"]
            assert (row.text, row.text_pair) == (want["text"], want["text_pair"])
            assert (None if row.starts is None else row.starts.tolist()) == want.get("starts")
            assert (None if row.words is None else list(row.words)) == want.get("words")
            assert (None if row.first is None else row.first.tolist()) == want.get("first")
            assert (None if row.source is None else row.source.tolist()) == want.get("source")


# Of today's caches `test_every_task.py` takes each task through these commands.
READ = ("sample-1-2", "labels")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*READ, *further(*sorted(set(EXPECTED) - {*READ}))])
def test_every_command_that_reads_caches_reads_them(name: str, tmp_path: Path) -> None:
    url = str(GOLDEN / name)
    assert inspect(InspectOptions(url, row=0)).row is not None
    assert report(ReportOptions(paths=(url,), out=str(tmp_path / "page.html"))).caches == 1
    assert export(ExportOptions(url, str(tmp_path / "table"))).rows
    assert len(list(TargetStream(url, batch_size=2)))


def test_golden_targets_are_read(name: str) -> None:
    cache = Cache.open(str(GOLDEN / name))
    for span, shard in enumerate(EXPECTED[name]["shards"]):
        for temperature, wanted in shard["targets"].items():
            found = cache.read(span).targets.at(float(temperature))
            assert len(found) == len(wanted)
            if isinstance(found, DenseTargets):
                torch.testing.assert_close(found.logits, torch.tensor(wanted), rtol=0, atol=1e-6)
                continue
            if isinstance(found, HiddenTargets):
                torch.testing.assert_close(found.states, torch.tensor(wanted), rtol=0, atol=2e-6)
                layer = found.layer
                assert (layer.scale, layer.cap) == (0.5, 20.0)
                x = (found.states @ layer.weight.T + layer.bias) / 2
                want = 20 * torch.tanh(x / 20)
                torch.testing.assert_close(found.dense().logits, want, rtol=1e-5, atol=1e-5)
                continue
            vocabulary = cache.spec.vocab_size
            got = torch.zeros(len(found), vocabulary).scatter_add_(1, found.ids, found.weights)
            want = torch.zeros_like(got)
            for i, position in enumerate(wanted):
                for token, weight in position["entries"]:
                    want[i, token] = weight
            torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
            rest = torch.tensor([position["rest"] for position in wanted])
            torch.testing.assert_close(found.tail, rest, rtol=0, atol=2e-6)
            if isinstance(found, AnchoredTargets):
                for i, position in enumerate(wanted):
                    assert sorted(found.ids[i, : found.heads[i]].tolist()) == position["heads"]
                    drawn = found.inverse[i].nonzero()[:, 0]
                    pairs = torch.stack([found.ids[i, drawn], found.inverse[i, drawn]], 1)
                    want_pairs = np.array(position["inverse"]).reshape(-1, 2)
                    np.testing.assert_allclose(sorted(pairs.tolist()), want_pairs, rtol=1e-6)


def test_golden_logprobs_of_labels_are_read(name: str) -> None:
    cache = Cache.open(str(GOLDEN / name))
    for span, shard in enumerate(EXPECTED[name]["shards"]):
        codes = cache.read(span).label_logprob
        if "label_logprob" not in shard:  # older than they are
            assert codes is None
            continue
        want = [-(c**2) / 8192 if c < 65535 else -np.inf for c in shard["label_logprob"]]
        assert codes is not None
        np.testing.assert_allclose(decode_logprobs(codes), want, rtol=1e-6)
        finite = np.isfinite(want)
        nats = -np.array(want)[finite].sum()
        assert label_sums(cache.manifest.shards) == (nats, finite.sum(), 1)


def test_golden_entropies_are_read(name: str) -> None:
    cache = Cache.open(str(GOLDEN / name))
    for span, shard in enumerate(EXPECTED[name]["shards"]):
        codes = cache.read(span).entropy
        assert (codes is not None) == ("entropy" in shard), "older ones have none"
        if codes is not None:
            want = [c**2 / 4096 for c in shard["entropy"]]
            np.testing.assert_allclose(decode_entropies(codes), want, rtol=1e-6)


def test_golden_sums_of_answers_are_read(name: str) -> None:
    cache = Cache.open(str(GOLDEN / name))
    for span, shard in enumerate(EXPECTED[name]["shards"]):
        sums = cache.read(span).answer_logprob
        assert (sums is not None) == ("answer_logprob" in shard), "older ones have none"
        if sums is not None:
            want = [-np.inf if x is None else x for x in shard["answer_logprob"]]
            np.testing.assert_allclose(sums, want, atol=1e-4)
