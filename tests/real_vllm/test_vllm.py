"""Teachers in the real vLLM, on a CPU: `make test-vllm`, in an environment of its own.

The stand-in of `tests/test_engine.py` shows what kdcache does with answers; here are the answers:
of a small Llama in one process and in two, and of SmolLM2, each beside transformers on the same
rows; and what is left when a process of a build is killed.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import further
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import kdcache
from kdcache.cache import Cache
from kdcache.cache.generated import GeneratedCorpus
from kdcache.rows import Row
from kdcache.targets import (
    Codec,
    Hidden,
    SoftTargets,
    SparseTargets,
    Targets,
    TargetWriter,
)
from kdcache.targets.device import label_logprobs
from kdcache.targets.label_logprob import decode_logprobs
from kdcache.tasks import CAUSAL_LM
from kdcache.teacher import EngineOptions, Teacher, TeacherOptions
from kdcache.teacher.engine import engine_version
from kdcache.teacher.engine.inside import KNOWN
from kdcache.teacher.engine.process import Engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is missing: make test-vllm"
    ),
]
LENGTH = 64
SMOLLM2 = os.environ.get("KDCACHE_SMOLLM2", "")
# Without a vote of its own vLLM takes a share of the whole memory.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(scope="session")
def llama(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with heads of 64, and an output layer of 20 columns more than the tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.15,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_tokenizer).save_pretrained(folder)
    return folder


def rows_of(texts: Sequence[str], folder: Path) -> list[Row]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text, length in zip(texts, (1, 2, 17, *[LENGTH] * 9), strict=False):
        ids = np.array(tokenizer(text).input_ids[: length + 1], np.int32)
        rows.append(Row(ids[:-1], ids[1:]))
    return rows


@pytest.fixture(scope="module")
def both(
    request: pytest.FixtureRequest, llama: Path, corpus_texts: list[str]
) -> Iterator[tuple[Teacher, Teacher, list[Row]]]:
    """The teacher in vLLM, the same in transformers, and rows."""
    name, tensor_parallel, vocab_size = request.param
    folder = llama if name == "llama" else Path(SMOLLM2)
    base: dict[str, Any] = {"names": (str(folder),), "task": CAUSAL_LM, "states": True}
    # Rows longer than a step of the engine come in chunks.
    args = {"max_num_batched_tokens": LENGTH - 24, "max_num_seqs": 8}
    engine = EngineOptions(LENGTH, tensor_parallel=tensor_parallel, args=args)
    rows = rows_of(corpus_texts, folder)
    with closing(Teacher(TeacherOptions(**base, engine=engine), vocab_size)) as one:
        other = Teacher(TeacherOptions(**base), vocab_size)
        one.probe(rows)
        other.probe(rows)
        yield one, other, rows


ENGINES = [
    pytest.param(("llama", 1, 300), 0.99, id="llama"),
    pytest.param(("llama", 2, 300), 0.99, id="llama-two-processes"),
    pytest.param(  # of many ids on one line, rounding moves more: docs/log.md
        ("smollm2", 1, 49152),
        0.6,
        id="smollm2",
        marks=pytest.mark.skipif(not SMOLLM2, reason="no KDCACHE_SMOLLM2 (a folder)"),
    ),
]


@torch.inference_mode()
@pytest.mark.parametrize(("both", "least"), ENGINES, indirect=["both"])
def test_each_codec_keeps_what_transformers_gives(
    both: tuple[Teacher, Teacher, list[Row]], least: float
) -> None:
    """`least`: share of positions whose sample has the same ids."""
    one, other, rows = both
    mine, theirs = list(one.slices(rows)), list(other.slices(rows))
    states, want = (torch.cat([s.states for s in found]).float() for found in (mine, theirs))
    assert ((states - want).norm(dim=-1) <= 1e-3 * want.norm(dim=-1)).all()
    logits, own = both_logits = [torch.cat([s.logits for s in x]) for x in (mine, theirs)]
    assert float((logits - own).abs().max()) < 1e-3
    torch.testing.assert_close(one.layer.weight, other.layer.weight, rtol=0, atol=0)
    noise = torch.rand(len(own), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clipped = [float(teacher.take_clipped_mass()) for teacher in both[:2]]
    assert clipped[0] == pytest.approx(clipped[1], rel=1e-3, abs=1e-6)

    def written(text: str) -> list[SoftTargets]:
        codec = Codec.parse(text, (1.0,) if text == "dense" else (1.0, 2.0), one.vocab_size)
        if isinstance(codec, Hidden):
            codec = codec.with_layer(one.layer)
            return [TargetWriter(codec).write(found) for found in (states, want)]
        return [TargetWriter(codec).write(found, noise) for found in both_logits]

    for text, t in itertools.product(("sample:20", "anchored:10"), (1.0, 2.0)):
        a, b = (given_by(found.at(t), one.vocab_size) > 0 for found in written(text))
        assert float((a == b).all(-1).float().mean()) >= least
        assert float((a & b).sum() / b.sum()) >= 0.95
    for t in (1.0, 2.0):
        a, b = (given_by(found.at(t), one.vocab_size) for found in written("topk:16"))
        assert float((a - b).abs().max()) < 1e-3
    a, b = (found.at(1.0).logits for found in written("dense"))
    assert float((a - b).abs().max()) < 1e-3
    a, b = (found.at(1.0).states.float() for found in written("hidden:float16"))
    assert ((a - b).norm(dim=-1) <= 1e-3 * b.norm(dim=-1)).all()
    labels = torch.from_numpy(np.concatenate([row.labels for row in rows])).long()
    a, b = (label_logprobs(found, labels) for found in both_logits)
    assert float((a - b).abs().max()) < 1e-3


def given_by(targets: Targets, vocab_size: int) -> torch.Tensor:
    """What targets give each id, [n, V]."""
    assert isinstance(targets, SparseTargets)
    return torch.zeros(len(targets), vocab_size).scatter_add_(1, targets.ids, targets.weights)


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "kdcache", name, *arguments]


@pytest.mark.timeout(1500)  # six engines are started, one after the other
def test_killed_processes_of_a_build_cost_no_row(
    llama: Path, corpus_texts: list[str], tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus_texts))
    shared = ["--corpus", str(corpus), "--max-length", str(LENGTH), "--shard-tokens", "300"]
    shared += ["--teacher", str(llama), "--codec", "topk:8"]
    shared += ["--worker", "hang-seconds=200"]
    make = command("build", *shared, "--engine", "vllm", "--workers", "1")
    make += ["--out", str(tmp_path / "cache"), "--batch-tokens", "256"]
    first = subprocess.Popen(make)
    seen: set[psutil.Process] = set()

    def events(kind: str) -> int:
        path = tmp_path / "cache" / "events.jsonl"
        return path.read_text().count(f'"event": "{kind}"') if path.exists() else 0

    def until(what: Callable[[], bool]) -> None:
        while not what():
            with pytest.raises(subprocess.TimeoutExpired):
                first.wait(0.1)

    def kill(name: str) -> None:
        """Kill a process once its build has made a shard with it."""
        ready, spans = events("worker ready"), events("span")
        until(lambda: events("worker ready") > ready and events("span") > spans)
        of = psutil.Process(first.pid).children(recursive=True)
        seen.update(process for process in of if "VLLM" in process.name())
        victims = [process for process in of if name in " ".join(process.cmdline())]
        victims[0].kill()

    for name in ("VLLM::EngineCore", "ray::RayWorker"):
        kill(name)
    done = events("span")
    until(lambda: events("span") > done)
    seen.update(
        process
        for process in psutil.Process(first.pid).children(recursive=True)
        if "VLLM" in process.name()
    )
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not psutil.wait_procs(seen, timeout=120)[1], "engines end with their workers"
    done = len(Cache.resume(str(tmp_path / "cache")).committed())
    assert 0 < done < Cache.resume(str(tmp_path / "cache")).spec.spans, "something was left to do"
    subprocess.run(make, check=True)
    cache = Cache.open(str(tmp_path / "cache"))
    again = command("build", *shared, "--workers", "0", "--out", str(tmp_path / "other"))
    subprocess.run(again, check=True)
    other = Cache.open(str(tmp_path / "other"))
    assert cache.manifest.rows == other.manifest.rows
    assert cache.manifest.positions == other.manifest.positions
    for span in range(cache.spec.spans):
        np.testing.assert_array_equal(cache.read(span).input_ids, other.read(span).input_ids)
    check = command("verify", cache.url, "--teacher", str(llama), "--sample", "8")
    subprocess.run([*check, "--engine", "transformers"], check=True)
    subprocess.run(check, check=True)


def test_it_writes_by_each_requests_seed(
    llama: Path, corpus_texts: list[str], tmp_path: Path
) -> None:
    """Answers do not depend on what else is asked, and their log-probabilities are the model's;
    ids that pad the output layer are never drawn, and a text ends an answer."""
    corpus = tmp_path / "prompts.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus_texts[:6]))

    def write(name: str, **more: Any) -> list[dict[str, Any]]:
        options = kdcache.GenerateOptions(
            model=str(llama),
            corpus=(str(corpus),),
            out=str(tmp_path / name),
            engine="vllm",
            prompt_tokens=6,
            max_new_tokens=12,
            max_length=LENGTH,
            workers=0,
            **more,
        )
        kdcache.generate(options)
        return GeneratedCorpus.open(options.out).read(0)

    rows = write("two", samples=2)
    assert len(rows) == 12
    alone = write("one", samples=1, limit=3)
    same = [a["input_ids"] == b["input_ids"] for a, b in zip(alone, rows[::2], strict=False)]
    assert sum(same) >= 2  # rounding may move a draw
    assert len({tuple(row["input_ids"]) for row in rows}) > 6
    model = LlamaForCausalLM.from_pretrained(llama)
    for row in rows:
        ids, begin = torch.tensor(row["input_ids"])[None], row["completion_mask"].index(1)
        assert int(ids.max()) < 300
        with torch.inference_mode():
            logprobs = model(ids).logits[0, begin - 1 : -1].log_softmax(-1)
        want = logprobs.gather(-1, ids[0, begin:, None])[:, 0]
        np.testing.assert_allclose(row["logprobs"], want, atol=0.05)
        assert row["finish_reason"] == ("stop" if row["input_ids"][-1] == 0 else "length")
    stops = (re.search("[ -~]{2}", row["completion"][2:]) for row in rows)
    stop = next(found[0] for found in stops if found)
    ended = write("ended", samples=2, stop=(stop,))
    assert any(row["finish_reason"] == "stop" for row in ended)
    assert not any(stop in row["completion"] for row in ended)


@pytest.fixture(scope="module")
def built(
    llama: Path, corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Cache, float]]:
    """Builds with a codec and arguments of the engine: the cache and the mass that was clipped."""
    folder = tmp_path_factory.mktemp("built")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus_texts[:60]))

    @functools.cache
    def build(codec: str, *args: str) -> tuple[Cache, float]:
        options = kdcache.BuildOptions(
            teacher=(str(llama),), corpus=(str(corpus),), out=tempfile.mkdtemp(dir=folder),
            engine="vllm", engine_arg=args, codec=codec, temperatures=(1.0, 2.0),
            max_length=LENGTH, shard_tokens=900, batch_tokens=512, workers=0,
        )  # fmt: skip
        found = kdcache.build(options)
        return Cache.open(options.out), found.clipped_mass

    return build


@pytest.mark.parametrize(
    ("codec", "tensor_parallel"),
    [
        *itertools.product(("sample:20", "anchored:10", "topk:16", "hidden:int8"), (1,)),
        ("anchored:10", 2),
        *further(("sample:20", 2), ("topk:16", 2), ("hidden:int8", 2)),
    ],
)
def test_what_it_encodes_is_what_is_encoded_of_its_states(
    built: Callable[..., tuple[Cache, float]], codec: str, tensor_parallel: int
) -> None:
    """In other batches and chunks, with padded columns, on one worker and on two."""
    chunks = "max_num_batched_tokens=40", f"tensor_parallel_size={tensor_parallel}"
    mine, clipped = built(codec, *chunks)
    theirs, other = built(codec, "encode_inside=false")
    assert mine.manifest.positions == theirs.manifest.positions
    assert clipped == pytest.approx(other, rel=1e-3)
    same = []
    for span in range(mine.spec.spans):
        a, b = mine.read(span), theirs.read(span)
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        one, other = (decode_logprobs(shard.label_logprob) for shard in (a, b))
        assert float(np.abs(one - other).max()) < 0.1, "neighbouring codes"
        assert float(np.abs(one - other).mean()) < 1e-3
        for t in (1.0, 2.0) if codec != "topk:16" else (1.0,):
            x, y = a.targets.at(t), b.targets.at(t)
            if isinstance(x, SparseTargets):
                x, y = (given_by(found, 300) for found in (x, y))
                same.append((x - y).abs().amax(-1) < 1e-3)
            else:  # levels: rounding moves a number to its neighbour
                apart = (x.states.int() - y.states.int()).abs()
                assert int(apart.max()) <= 1
                same.append((apart == 0).flatten())
    assert float(torch.cat(same).float().mean()) > 0.99


def test_states_leave_in_the_models_own_type(llama: Path, corpus_texts: list[str]) -> None:
    """Of 16 bits half the bytes, and the same numbers. In bfloat16 vLLM's CPU build ends by an
    illegal instruction on processors that lack it, so this is float16."""
    rows = rows_of(corpus_texts, llama)[:4]

    def states(**args: Any) -> list[torch.Tensor]:
        how = EngineOptions(LENGTH, args=args)
        options = TeacherOptions((str(llama),), CAUSAL_LM, dtype="float16", engine=how)
        with closing(Engine(llama, options)) as engine:
            return [engine.ask(row.input_ids.tolist()).result() for row in rows]

    for one, other in zip(states(), states(hf_overrides={"head_dtype": "float32"}), strict=True):
        assert (one.dtype, other.dtype) == (torch.float16, torch.float32)
        torch.testing.assert_close(one, other.half(), rtol=0, atol=0)


def test_the_seams_that_the_encoder_uses() -> None:
    """A version of vLLM without them fails here, before it is added to `KNOWN`."""
    from vllm import PoolingParams, envs
    from vllm.distributed import get_pp_group, get_tp_group
    from vllm.model_executor.layers.pooler import DispatchPooler
    from vllm.model_executor.layers.pooler.tokwise import TokenPooler
    from vllm.model_executor.layers.pooler.tokwise.heads import TokenPoolerHead

    assert engine_version().startswith(KNOWN)
    assert callable(get_pp_group)
    assert callable(get_tp_group)
    assert "VLLM_RAY_PER_WORKER_GPUS" in envs.environment_variables, "by it kdcache has room"
    assert "extra_kwargs" in PoolingParams.__struct_fields__
    assert "self.poolers_by_task" in inspect.getsource(DispatchPooler.__init__)
    assert "self.head(pooled_data, pooling_metadata)" in inspect.getsource(TokenPooler.forward)
    chunk = inspect.signature(TokenPoolerHead.forward_chunk)
    assert list(chunk.parameters) == ["self", "pooled_data", "pooling_param"]
    for runner in ("gpu_model_runner", "gpu.pool.pooling_runner"):
        source = inspect.getsource(importlib.import_module(f"vllm.v1.worker.{runner}"))
        assert re.search(r"model\.pooler\(\s*(hidden_states=)?hidden_states", source)
