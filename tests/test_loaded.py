"""What a plain job loads: all else is loaded by name when it is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MOST = 140  # modules of kdcache, of `build` and `train` together
ASKED_FOR = {
    *("kdcache.align", "kdcache.stream.cross", "kdcache.stream.text"),
    *("kdcache.rows.chats", "kdcache.rows.pairs", "kdcache.rows.masked", "kdcache.rows.ids"),
    *("kdcache.rows.words", "kdcache.rows.labels"),
    *("kdcache.student.bilstm", "kdcache.student.adapter"),
    *("kdcache.teacher.adapter", "kdcache.teacher.engine", "kdcache.teacher.remote"),
    *("kdcache.storage.remote", "kdcache.storage.filesystem"),
    "kdcache.corpus.tables",
    *("kdcache.commands.build.on_ray", "kdcache.commands.train.on_ray", "ray"),
    *("kdcache.commands.evaluate", "kdcache.commands.demo", "kdcache.commands.sweep"),
}


@pytest.mark.end_to_end
def test_build_and_train_of_one_language_model_load_what_they_use(
    tiny_lm: Path, tmp_path: Path
) -> None:
    words = ["the cat sat on the mat", "and the dog lay beside it all day long"]
    lines = [json.dumps({"text": " ".join(words * (1 + i % 3))}) for i in range(20)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    out, run = str(tmp_path / "cache"), str(tmp_path / "run")
    build = ["build", "--teacher", str(tiny_lm), "--corpus", str(tmp_path / "text.jsonl")]
    build += ["--out", out, "--workers", "0", "--max-length", "32"]
    train = ["train", "--cache", out, "--student", str(tiny_lm), "--out", run]
    train += ["--max-steps", "2", "--batch-size", "4"]
    code = f"""if True:
        import json, sys
        from kdcache.cli.main import cli
        for words in ({build!r}, {train!r}):
            cli(words, standalone_mode=False)
        print(json.dumps([n for n in sys.modules if n.partition(".")[0] in ("kdcache", "ray")]))
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = set(json.loads(result.stdout.splitlines()[-1]))
    assert not loaded & ASKED_FOR
    ours = sorted(name for name in loaded if name.partition(".")[0] == "kdcache")
    assert len(ours) <= MOST, f"{len(ours)} modules: {ours}"


def test_a_reader_of_caches_loads_neither_transformers_nor_what_builds_need() -> None:
    """All kinds of targets, from opening a cache to the batches of an epoch."""
    golden = sorted(str(path.parent) for path in (HERE / "golden").glob("*/spec.json"))
    code = f"""if True:
        import sys
        import kdcache
        for url in {golden!r}:
            rows = sum(len(batch["labels"]) for batch in kdcache.TargetStream(url, batch_size=4))
            assert rows == kdcache.Cache.open(url).manifest.rows
        print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert golden
    assert "torch" in loaded
    assert not loaded & {"transformers", "tokenizers", "pyarrow", "fsspec", "huggingface_hub"}
