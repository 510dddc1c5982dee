"""The whole way with real Ray, real processes and the program itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_split_files import gz_corpus

from kdcache import (
    BuildOptions,
    build,
)
from kdcache.commands.build.prepare import prepare
from kdcache.errors import UsageError

pytestmark = pytest.mark.end_to_end


def test_what_a_worker_says_of_its_teacher_ends_the_build(
    ray: None, small_build: BuildOptions, tiny_lm: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_lm, teacher)
    weights = load_file(teacher / "model.safetensors")
    renamed = {name.replace("layers.1.", "others.1."): weights[name] for name in weights}
    save_file(renamed, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=rf"^teacher {teacher} has no weights for .*layers\.1"):
        build(dataclasses.replace(small_build, teacher=(str(teacher),), workers=1))


def test_workers_on_ray_keep_to_a_file(
    ray: None, small_build: BuildOptions, corpus_texts: list[str], tmp_path: Path
) -> None:
    """A worker reads a file once for each time that it comes to it, as `test_split_files` shows."""
    corpus, _ = gz_corpus(tmp_path / "corpus", corpus_texts[:240], 4)
    options = dataclasses.replace(
        small_build, corpus=(corpus,), out=str(tmp_path / "a"), shard_tokens=300, workers=2
    )
    result = build(options)
    files = [span.file.url for span in prepare(options).corpus.spans]
    events = map(json.loads, (tmp_path / "a" / "events.jsonl").read_text().splitlines())
    made = Counter((e["worker"], files[e["span"]]) for e in events if e["event"] == "span")
    assert sum(made.values()) == result.spans > 16
    begun = len({worker for worker, _ in made})
    assert len(made) <= 4 + begun - 1, "each file by one worker, and the last one by both"
