"""Sums of the log-probabilities of answers: which labels, in builds of any kind, and forged ones.

What `export --layout dpo` makes of them is in `test_two_caches.py`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken_caches import forge, naming
from conftest import make_tiny_lm
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import kdcache
from kdcache.cache import Cache
from kdcache.cache.columns import answer_sums
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.stream.shard_rows import ShardRows, by_document
from kdcache.targets.label_logprob import IMPOSSIBLE
from kdcache.tasks import IGNORE


@given(st.lists(st.lists(st.booleans(), max_size=7), max_size=6))
def test_an_answer_is_the_last_stretch_of_labels(rows: list[list[bool]]) -> None:
    labels = np.array([7 if there else IGNORE for row in rows for there in row], np.int32)
    values = np.arange(1.0, (labels != IGNORE).sum() + 1)
    values[::3] = -np.inf  # spoils no sum but its own
    offsets = np.cumsum([0, *map(len, rows)])
    want, used = [], 0
    for row in rows:
        own, used = values[used : used + sum(row)], used + sum(row)
        stripped = "".join("x" if there else " " for there in row).split()
        answer = len(stripped[-1]) if stripped else 0
        want.append(own[len(own) - answer :].sum())
    np.testing.assert_array_equal(answer_sums(labels, offsets, values), want)


TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory, corpus_texts: list[str]) -> Path:
    """Chats of one or two answers, some longer than a row."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    said = [text for text in corpus_texts if len(text) > 20]
    lines = []
    for i in range(0, 64, 4):
        parts = [text[: 10 + i] for text in said[i : i + (4 if i % 8 else 2)]]
        roles = ("user", "assistant") * 2
        turns = [{"role": r, "content": c} for r, c in zip(roles, parts, strict=False)]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines))
    return path


def made(teachers: tuple[Path, ...], corpus: Path, out: Path, **more: Any) -> Cache:
    (out.parent / "template").write_text(TURNS)
    options: dict[str, Any] = {"packing": "none", "max_length": 60, "workers": 0, **more}
    names, template = tuple(map(str, teachers)), str(out.parent / "template")
    build(BuildOptions(names, (str(corpus),), str(out), chat_template=template, **options))
    return Cache.open(str(out))


def sums_of(cache: Cache) -> np.ndarray:
    return np.concatenate([cache.read(i).answer_logprob for i in range(cache.spec.spans)])


@torch.no_grad()
def reference(cache: Cache, teachers: tuple[Path, ...]) -> list[float]:
    """Of each row, in float64, the mean of the teachers' probabilities; its rows one by one."""
    models = [AutoModelForCausalLM.from_pretrained(t, dtype=torch.float64).eval() for t in teachers]
    found = []
    for data in (cache.read(i) for i in range(cache.spec.spans)):
        for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True):
            labels, total = data.every_label[a:b], 0.0
            ids = torch.from_numpy(data.input_ids[a:b]).long()[None]
            p = torch.stack([model(ids).logits[0].softmax(-1) for model in models]).mean(0)
            last = int(np.flatnonzero(labels != IGNORE)[-1])
            while last >= 0 and labels[last] != IGNORE:
                total += float(p[last, int(labels[last])].log())
                last -= 1
            found.append(total)
    return found


@pytest.mark.slow
def test_sums_of_builds_are_those_of_the_answers_they_kept(
    tiny_lm: Path, tiny_tokenizer: Path, chats: Path, tmp_path: Path
) -> None:
    """Several turns, rows that were cut, an ensemble, positions without targets, other codecs."""
    both = tiny_lm, make_tiny_lm(tiny_tokenizer, tmp_path / "lm", seed=5)
    whole = made((tiny_lm,), chats, tmp_path / "whole", codec="topk:4", shard_tokens=300)
    lengths = np.concatenate([np.diff(whole.read(i).offsets) for i in range(whole.spec.spans)])
    assert (lengths == 60).any(), "rows that were cut"
    assert whole.spec.spans > 1
    assert any((np.diff(np.flatnonzero(whole.read(i).labels != IGNORE)) > 1).any() for i in (0, 1))
    caches = {
        (tiny_lm,): [whole, made((tiny_lm,), chats, tmp_path / "some", positions=0.3)],
        both: [made(both, chats, tmp_path / "both", codec="sample:5")],
    }
    kdcache.transcode(
        kdcache.TranscodeOptions(whole.url, "topk:2", out=str(tmp_path / "fewer"), workers=0)
    )
    caches[(tiny_lm,)].append(Cache.open(str(tmp_path / "fewer")))
    for teachers, some in caches.items():
        want = reference(some[0], teachers)
        assert len({round(total) for total in want}) > 4
        for cache in some:
            np.testing.assert_allclose(sums_of(cache), want, rtol=0, atol=1e-4)
            assert naming(Path(cache.url)) == ""
    parts = [whole.read(i) for i in range(whole.spec.spans)]
    picked = ShardRows(parts).take(np.array([3, 0, 9]))
    assert picked.answer_logprob is not None
    np.testing.assert_array_equal(picked.answer_logprob, sums_of(whole)[[3, 0, 9]])


@pytest.mark.slow
def test_rows_that_share_a_length_have_none(tiny_lm: Path, chats: Path, tmp_path: Path) -> None:
    for packing in ("concat", "split"):
        cache = made((tiny_lm,), chats, tmp_path / packing, packing=packing)
        assert cache.read(0).answer_logprob is None
        assert not cache.spec.answer_logprob


@pytest.mark.slow
def test_sums_that_labels_cannot_have_are_found(tiny_lm: Path, chats: Path, tmp_path: Path) -> None:
    cache = made((tiny_lm,), chats, tmp_path / "cache", codec="topk:4")

    def changed(name: str, value: float, *, impossible: bool = False) -> str:
        def change(data: Any) -> Any:
            sums, codes = data.answer_logprob.copy(), data.label_logprob.copy()
            sums[1] = value if value is not None else sums[1]
            if impossible:
                codes[data.position_offsets[2] - 1] = IMPOSSIBLE
            return dataclasses.replace(data, answer_logprob=sums, label_logprob=codes)

        return naming(Path(forge(cache, tmp_path / name, change).url))

    right = float(sums_of(cache)[1])
    assert changed("same", right) == ""
    for i, wrong in enumerate((right - 5, right + 5, 0.0, -np.inf)):
        assert "the answer in its row 1 has a log-probability of" in changed(f"wrong{i}", wrong)
    for i, wrong in enumerate((np.nan, 1.0)):
        assert "answer_logprob has a number that is not <= 0" in changed(f"bad{i}", wrong)
    assert "log-probability" in changed("finite", right, impossible=True)
    assert changed("infinite", -np.inf, impossible=True) == ""
    assert changed("nearly", -6e5, impossible=True) == ""  # no code is lower
    bare = dataclasses.replace(cache.read(0), starts=np.ones(len(cache.read(0).input_ids), bool))
    assert by_document(bare).answer_logprob is None  # other rows


@pytest.mark.slow
def test_a_begun_cache_without_them_goes_on_without(
    tiny_lm: Path, chats: Path, tmp_path: Path
) -> None:
    whole = made((tiny_lm,), chats, tmp_path / "whole", codec="topk:4", shard_tokens=300)
    older = dataclasses.replace(whole.spec, answer_logprob=False)
    files, ranks = whole.tokenizer_files(), whole.read_beside("ranks.u32")
    begun = Cache.create_or_resume(
        str(tmp_path / "begun"), older, tokenizer_files=files, ranks=ranks
    )
    data = dataclasses.replace(whole.read(0), answer_logprob=None)
    begun.commit(0, data, clipped_mass=whole.manifest.shards[0].clipped_mass)
    cache = made((tiny_lm,), chats, tmp_path / "begun", codec="topk:4", shard_tokens=300)
    assert cache.spec == older
    assert cache.read(1).answer_logprob is None
