"""A teacher in an engine, with a stand-in for vLLM at its public API: what it is given, what is
made of its answers, and which it is not believed. `tests/real_vllm` has the real one.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from broken_caches import forge
from conftest import further, make_tiny_lm
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo import CAUSAL

from kdcache.cache import Cache
from kdcache.commands.build import prepare
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.options import PlanOptions, VerifyOptions
from kdcache.commands.plan.plan import plan
from kdcache.commands.verify import verify
from kdcache.errors import IncompleteError, KdcacheError, UsageError
from kdcache.targets import Codec, DenseTargets
from kdcache.teacher import TeacherFiles
from kdcache.teacher.engine import inside, process
from kdcache.teacher.engine.head import read_head
from kdcache.teacher.memory import Encoding
from kdcache.teacher.probe import find_layer

pytestmark = pytest.mark.slow

FAKE = Path(__file__).parent / "fake_vllm"
STATES = "encode_inside=false"  # the stand-in has no worker to join
SPECIES = {str(one): one for one in CAUSAL}


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FAKE))
    module = importlib.import_module("vllm")
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture
def options(small_build: BuildOptions, vllm: ModuleType) -> BuildOptions:
    return dataclasses.replace(
        small_build, engine="vllm", engine_arg=(STATES,), max_length=64, shard_tokens=1500,
        batch_tokens=256, limit=60,
    )  # fmt: skip


def test_without_vllm_the_extra_is_named_before_anything_starts(small_build: BuildOptions) -> None:
    with pytest.raises(UsageError, match="^--engine needs the extra `vllm`, which is missing"):
        dataclasses.replace(small_build, engine="vllm")


@pytest.mark.parametrize("codec", ["dense", *further("sample:20", "topk:7")])
def test_a_cache_of_an_engine_is_one_of_transformers(
    options: BuildOptions, vllm: ModuleType, tmp_path: Path, codec: str, tiny_tokenizer: Path
) -> None:
    # 20 columns of padding, whose mass is counted.
    padded = make_tiny_lm(tiny_tokenizer, tmp_path / "padded", vocab_size=320)
    options = dataclasses.replace(
        options, codec=codec, teacher=(str(padded),), temperatures=(1.0, 2.0)
    )
    if codec.startswith("topk"):
        options = dataclasses.replace(options, temperatures=(1.0,))
    mine = build(options)
    theirs = build(
        dataclasses.replace(options, engine=None, engine_arg=(), out=str(tmp_path / "other"))
    )
    assert mine.positions == theirs.positions
    assert mine.clipped_mass == pytest.approx(theirs.clipped_mass, rel=1e-3)
    one, other = Cache.open(options.out), Cache.open(str(tmp_path / "other"))
    for span in range(one.spec.spans):
        a, b = one.read(span), other.read(span)
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        for t in options.temperatures:
            x, y = a.targets.at(t), b.targets.at(t)
            if isinstance(x, DenseTargets):
                torch.testing.assert_close(x.logits, y.logits, atol=1e-4, rtol=1e-4)
            else:
                same = (x.ids == y.ids).all(-1) if x.ids.shape == y.ids.shape else torch.zeros(1)
                assert same.float().mean() > 0.99
    assert len(vllm.SHUT) == 1  # closed with the build


def test_the_engine_is_given_rows_ahead_and_no_more(
    options: BuildOptions, vllm: ModuleType
) -> None:
    build(options)
    (engine,) = vllm.SHUT
    rows = options.batch_tokens // options.max_length
    assert rows < engine.most_waiting <= 2 * 3 * rows  # spans in flight, batches of each


def test_what_the_engine_is_told(options: BuildOptions, vllm: ModuleType) -> None:
    args = (STATES, "max_num_seqs=4", "kv-cache-dtype=fp8", "enforce_eager=false")
    build(dataclasses.replace(options, tensor_parallel=2, quantization="int8", engine_arg=args))
    (told,) = vllm.MADE
    assert (told.tensor_parallel_size, told.pipeline_parallel_size) == (2, 1)
    assert (told.quantization, told.kv_cache_dtype, told.max_num_seqs) == ("int8", "fp8", 4)
    assert not told.enable_prefix_caching
    assert told.max_model_len == options.max_length
    assert told.dtype == "float32"
    assert told.enforce_eager is False
    assert told.distributed_executor_backend == "mp"
    (teacher,) = Cache.open(options.out).spec.teachers
    assert teacher["engine"] == {
        "name": "vllm",
        "version": "0.1",
        "quantization": "int8",
        "args": {"kv_cache_dtype": "fp8"},  # what only decides speed may change
    }


def test_a_build_goes_on_with_the_same_engine_only(
    options: BuildOptions, vllm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(options)
    again = dataclasses.replace(options, engine_arg=(STATES, "max_num_seqs=2"), pipeline_parallel=2)
    assert build(again).made == 0
    for other in (
        dataclasses.replace(options, engine=None, engine_arg=()),
        dataclasses.replace(options, quantization="fp8"),
        dataclasses.replace(options, engine_arg=(STATES, "kv_cache_dtype=fp8")),
    ):
        with pytest.raises(UsageError, match="engine"):
            build(other)
    monkeypatch.setattr("kdcache.teacher.engine.engine_version", lambda: "0.2")
    with pytest.raises(UsageError, match=r"version.*0\.1.*0\.2"):
        build(options)
    with pytest.raises(UsageError, match=r"worker has vLLM 0\.1, the build was planned with 0\.2"):
        build(dataclasses.replace(options, out=f"{options.out}-2"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("refuses", r"vLLM 0\.1 refuses .*: head size 8 is not supported\.$"),
        ("not normed", "not those after the final norm"),
        ("not causal", "is not a causal language model"),
        ("random", "is random at inference"),
        ("nan", r"NaN or infinite logits for span \d+, row \d+, position \d+"),
    ],
)
def test_answers_that_are_not_believed(
    options: BuildOptions,
    vllm: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    message: str,
) -> None:
    monkeypatch.setattr(vllm, "FAULT", fault)
    with pytest.raises(UsageError, match=message):
        build(options)


@pytest.mark.parametrize("fault", ["short", "other ids"])
def test_answers_to_something_else_are_faults(
    options: BuildOptions, vllm: ModuleType, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(vllm, "FAULT", fault)
    with pytest.raises(KdcacheError, match="vLLM answered a row of") as raised:
        build(options)
    assert raised.value.exit_code == 1, "the same each time"
    assert not Cache.resume(options.out).committed()


@pytest.mark.parametrize(
    ("fault", "message"),
    [("no start", "did not start"), ("dies", "the teacher's engine ended")],
)
def test_an_engine_that_ends_leaves_a_build_to_resume(
    options: BuildOptions,
    vllm: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    message: str,
) -> None:
    monkeypatch.setattr(vllm, "FAULT", fault)
    with pytest.raises(IncompleteError, match=message):
        build(options)
    monkeypatch.setattr(vllm, "FAULT", "")
    assert build(options).spans == Cache.open(options.out).spec.spans


def test_plan_and_verify_take_an_engine(
    options: BuildOptions, vllm: ModuleType, tmp_path: Path
) -> None:
    shared = {"teacher": options.teacher, "corpus": options.corpus, "max_length": 64}
    result = plan(
        PlanOptions(**shared, engine="vllm", engine_arg=(STATES,), codec=("topk:4",), rows=8)
    )
    assert result.positions > 0
    args = (STATES, "kv_cache_dtype=fp8")
    build(dataclasses.replace(options, engine_arg=args, quantization="int8"))
    vllm.MADE.clear()
    for engine, engines in ((None, 1), ("vllm", 1), ("transformers", 0)):
        asked = VerifyOptions(cache=options.out, teacher=options.teacher, engine=engine, sample=4)
        assert verify(asked).problems == ()
        assert len(vllm.MADE) == engines, "by default that of the build, with its settings"
        if engines:
            told = vllm.MADE.pop()
            assert (told.quantization, told.kv_cache_dtype) == ("int8", "fp8")


CODE = {
    "worker_cls": "evil.Worker",
    "kv_transfer_config": {"kv_connector_module_path": "evil"},
    "kv_cache_dtype": "../evil",
    "quantization": ["evil"],
    "seed": {"evil": 1},
}


def test_no_argument_of_a_cache_reaches_an_engine_unless_it_is_given_again(
    options: BuildOptions, vllm: ModuleType, tmp_path: Path
) -> None:
    build(options)
    vllm.MADE.clear()
    cache = Cache.open(options.out)
    for name, value in CODE.items():
        engine = {**(cache.spec.engine or {}), "args": {"seed": 3}}
        (engine if name == "quantization" else engine["args"])[name] = value
        teachers = ({**cache.spec.teachers[0], "engine": engine},)
        forge(cache, tmp_path / name, lambda data: data, teachers=teachers)
        asked = VerifyOptions(cache=str(tmp_path / name), teacher=options.teacher, sample=4)
        text = value if isinstance(value, str) else json.dumps(value)
        with pytest.raises(UsageError, match="may name code that runs") as refused:
            verify(asked)
        assert shlex.quote(f"{name}={text}") in str(refused.value)
        assert vllm.MADE == []
    # The stand-in knows one.
    asked = VerifyOptions(cache=str(tmp_path / "kv_cache_dtype"), teacher=options.teacher, sample=4)
    verify(dataclasses.replace(asked, engine_arg=("kv_cache_dtype=auto", "seed=3")))
    assert [told.kv_cache_dtype for told in vllm.MADE] == ["auto"]


def test_no_secret_of_an_engine_is_written(
    options: BuildOptions, vllm: ModuleType, tmp_path: Path
) -> None:
    """And the same build goes on with another token, or with none."""
    given = ("hf_token=feedbeef", 'hf_overrides={"api_key": "feedbeef", "a": 1}')
    address = "tokenizer=https://me:feedbeef@host/a?Signature=feedbeef"
    options = dataclasses.replace(options, engine_arg=(STATES, *given, address))
    assert build(options).made > 0
    (told,) = vllm.MADE
    assert (told.hf_token, told.hf_overrides["api_key"]) == ("feedbeef", "feedbeef")
    spec = Cache.open(options.out).spec
    assert spec.engine is not None
    assert spec.engine["args"] == {"hf_overrides": {"a": 1}, "tokenizer": "https://host/a"}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in written if b"feedbeef" in path.read_bytes()] == []
    for others in (("hf_token=other", *given[1:]), given[1:]):
        again = dataclasses.replace(options, engine_arg=(STATES, *others, address))
        assert build(again).made == 0
    # A cache of an earlier version holds one in clear: it is read, goes on, and shows none.
    old = dataclasses.replace(
        spec, teachers=({**spec.teachers[0], "engine": {"args": {"hf_token": "feedbeef"}}},)
    )
    none = dataclasses.replace(spec, teachers=({**spec.teachers[0], "engine": {"args": {}}},))
    assert old.fingerprint != none.fingerprint
    assert old.differences(none) == []
    assert not any("feedbeef" in line for line in old.differences(spec))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": None, "tensor_parallel": 2}, "--engine vllm alone takes --engine-arg"),
        ({"engine_arg": ("eager",)}, "--engine-arg is 'eager', expected KEY=VALUE"),
        ({"engine_arg": ("max-model-len=9",)}, "kdcache decides. Use --max-length"),
        ({"engine_arg": ("enable_prefix_caching=true",)}, "kdcache decides"),
        ({"teacher": ("a", "b")}, "not with several --teacher"),
        ({"task": "sequence-classification"}, "not with --task sequence-classification"),
        ({"compile": True}, "not with --compile"),
        ({"attention": "sdpa"}, "not with --attention sdpa"),
    ],
)
def test_options_that_do_not_go_together(
    options: BuildOptions, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        dataclasses.replace(options, **change)


@pytest.mark.parametrize(("asked", "gpus"), [(None, 8.0), (8, 8.0), (0, 0.0), (1, None)])
def test_gpus_of_a_worker_follow_from_the_engine(
    options: BuildOptions, asked: float | None, gpus: float | None
) -> None:
    wanted = dataclasses.replace(
        options,
        workers=None,
        address="ray://nowhere:1",
        tensor_parallel=4,
        pipeline_parallel=2,
        gpus_per_worker=asked,
    )
    if gpus is None:
        with pytest.raises(UsageError, match="--worker gpus is 1, the engine needs 8 GPUs"):
            prepare.gpus_of_engine(wanted)
    else:
        assert prepare.gpus_of_engine(wanted) == gpus


# The output layer, from the files


def saved(name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SPECIES[name].config()).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "llama-tied", "llama-padded", "phi", "gpt2", "opt-projection", "gpt_oss"),
        *("gemma2", "cohere-scaled", "granite-scaled", "qwen3_moe", "deepseek_v3"),
    ],
)
def test_the_output_layer_in_the_files_is_that_of_the_model(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    ids = np.arange(1, 9, dtype=np.int32)
    want = find_layer(model, name, {"input_ids": torch.from_numpy(ids).long()[None]}, 10**6)
    head = read_head(TeacherFiles.find(str(tmp_path)), "float32")
    torch.testing.assert_close(head.layer.weight, want.weight, rtol=0, atol=0)
    assert (head.layer.scale, head.layer.cap) == (want.scale, want.cap)
    assert (head.layer.bias is None) == (want.bias is None)
    if want.bias is not None:
        torch.testing.assert_close(head.layer.bias, want.bias, rtol=0, atol=0)
    with torch.inference_mode():
        ids_of = torch.arange(1, 30)[None]
        output = model.get_decoder()(ids_of, use_cache=False, output_hidden_states=True)
    last = output.last_hidden_state[0]
    assert head.unlike_normed(last) < 0.01
    if name not in ("gpt2", "opt-projection"):  # positions are added before their norm
        assert head.norm is not None
        assert head.unlike_normed(3 * last) > 0.3
        assert head.unlike_normed(output.hidden_states[0][0]) > 0.05


def test_a_quantised_output_layer_is_refused(tiny_lm: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_lm / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tiny_lm / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(tmp_path)
    files = TeacherFiles.find(str(tmp_path))
    assert read_head(files, "float32").layer.vocab_size == 300  # layers alone are quantised
    for change, message in (
        ({"lm_head.weight_scale": torch.ones(1)}, "stored as lm_head.weight_scale"),
        ({"lm_head.weight": None, "lm_head.qweight": torch.ones(1)}, "no weights for lm_head"),
    ):
        kept = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UsageError, match=message):
            read_head(files, "float32")


# The guard

_PARENT = """
import runpy, subprocess, sys
guard = runpy.run_path(sys.argv[2])["Guard"]()
sleep = [sys.executable, "-c", "import subprocess, sys; print(1, flush=True); "
         "subprocess.run([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)"]
engine = subprocess.Popen(sleep, stdout=subprocess.PIPE)
engine.stdout.readline()
if sys.argv[1] == "up":
    guard.started()
print(engine.pid, flush=True)
input()
"""


@pytest.mark.parametrize("when", ["starting", *further("up")])
def test_no_process_of_an_engine_outlives_a_killed_worker(when: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, when, process.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    engine = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    engine.wait(60)  # its parent is gone: nobody else reaps it
    parent.stdout.close()
    assert parent.stdin is not None
    parent.stdin.close()


def test_a_guard_leaves_other_processes_alone() -> None:
    before = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watching = process.Guard()
    during = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watching.started()
    after = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watching.close()
    assert during.wait(60) == -9
    during.communicate()
    for other in (before, after):
        assert other.poll() is None
        other.communicate(b"\n")
        assert other.returncode == 0


@pytest.mark.parametrize(
    ("version", "args", "inside"),
    [
        ("0.32.0", {}, True),
        ("0.32.1+cpu", {}, True),
        ("0.33.0", {"encode_inside": False}, False),
        ("0.33.0", {"worker_extension_cls": "of.another"}, False),
    ],
)
def test_the_codec_runs_inside_engines_that_are_known(
    version: str, args: dict[str, Any], inside: bool
) -> None:
    assert process.encodes(args, version) == inside


def test_another_engine_is_refused_before_anything_starts(
    options: BuildOptions, vllm: ModuleType
) -> None:
    with pytest.raises(UsageError, match=r"0\.32\.\*, and this is 0\.1\. .*encode_inside=false"):
        build(dataclasses.replace(options, engine_arg=()))
    assert vllm.MADE == []


@torch.inference_mode()
@pytest.mark.parametrize("codec", ["sample:5", "topk:3", "dense"])
def test_a_worker_encodes_its_share_of_the_positions_that_requests_name(
    tiny_lm: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """Beside requests for states and rows that are not read to their end; of three workers."""
    head = read_head(TeacherFiles.find(str(tiny_lm)), "float32")
    vocab_size = head.layer.vocab_size - 3  # with columns that are cut off
    encoding = Encoding(Codec.parse(codec, (1.0,), vocab_size), kept={"label_logprob", "entropy"})
    random = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, head.layer.width, generator=random) for n in (5, 4, 7)]
    wanted = [np.array([0, 2, 3]), np.array([], int), np.array([1, 4, 5, 6])]
    keys = [(np.random.default_rng(len(w)).random(len(w)), np.arange(len(w))) for w in wanted]
    said = [inside.request(w, *key) for w, key in zip(wanted, keys, strict=True)]
    before = SimpleNamespace(forward_chunk=lambda states, params: states)
    pooled = [None, rows[0], rows[1], rows[2], rows[2]]
    params = [SimpleNamespace(extra_kwargs=x) for x in (said[0], *said, None)]
    joined: list[torch.Tensor] = []

    def gather(into: list[torch.Tensor], mine: torch.Tensor, group: Any) -> None:
        joined.append(mine)
        for there, here in zip(into, joined, strict=False):
            there.copy_(here)

    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    for rank in range(3):  # the last one has what all have sent
        group = SimpleNamespace(world_size=3, rank_in_group=rank, device_group=None)
        encoder = inside.Encoder(before, head, encoding, group)
        encoder = inside.Encoder(encoder, head, encoding, group)  # a build that asks again
        answers = encoder.forward(pooled, SimpleNamespace(pooling_params=params))
    assert answers[0] is None
    assert answers[4] is rows[2]
    pairs = zip(rows, wanted, keys, strict=True)
    for answer, (states, positions, (u, labels)) in zip(answers[1:4], pairs, strict=True):
        assert len(answer) == len(positions)
        here = states[torch.from_numpy(positions)]
        labels, u = torch.from_numpy(labels), torch.from_numpy(u)
        (piece, outside), *more = head.slices(here, vocab_size)
        assert not more, "one slice"
        expected = {**encoding(piece, u, labels), "clipped": outside}
        found = inside.Layout.of(expected).split(answer)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=name)
