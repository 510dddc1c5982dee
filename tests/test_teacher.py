"""How a teacher is loaded: attention, compilation, weights that are spread, batches that fit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import accelerate
import numpy as np
import pytest
import torch
from conftest import make_tiny_lm
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache.cache import Cache
from kdcache.commands.build import source
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.packer import Packer, Steps
from kdcache.commands.build.source import TaughtRows, TeacherSource
from kdcache.commands.build.workers import SpanWorker
from kdcache.errors import UsageError
from kdcache.pretrained import tokenizer_files
from kdcache.rows import Row
from kdcache.targets import DenseTargets
from kdcache.teacher import (
    Teacher,
    TeacherFiles,
    TeacherOptions,
    find_batch_tokens,
    load,
    model,
    peak_share,
    teacher,
)
from kdcache.teacher.memory import gpus_of, weight_bytes

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def lm_rows(*lengths: int) -> list[Row]:
    ids = [np.arange(3, 3 + n, dtype=np.int32) for n in lengths]
    return [Row(i, i + 1) for i in ids]


def logits_of(one: Teacher, rows: list[Row]) -> torch.Tensor:
    return torch.cat([z.clone().cpu().float() for z in one.logits(rows)])


@pytest.fixture
def lm(tiny_lm: Path) -> TeacherOptions:
    return TeacherOptions((str(tiny_lm),), "causal-lm")


@pytest.fixture
def options(small_build: BuildOptions) -> BuildOptions:
    return dataclasses.replace(
        small_build,
        codec="dense",
        max_length=64,
        limit=30,
    )


class TestAttention:
    @pytest.mark.parametrize("name", ["eager", "sdpa"])
    def test_the_one_that_is_named_is_used(self, lm: TeacherOptions, name: str) -> None:
        one = Teacher(dataclasses.replace(lm, attention=name), 300)
        assert one.models[0].model.config._attn_implementation == name
        rows = lm_rows(20, 7)
        want = logits_of(Teacher(lm, 300), rows)
        torch.testing.assert_close(logits_of(one, rows), want, rtol=1e-4, atol=1e-4)

    @pytest.mark.slow
    def test_it_may_change_between_runs_of_one_build(self, options: BuildOptions) -> None:
        build(options)
        assert build(dataclasses.replace(options, attention="eager")).made == 0

    @pytest.mark.slow
    def test_what_cannot_be_is_one_line(self, options: BuildOptions, lm: TeacherOptions) -> None:
        with pytest.raises(UsageError, match=r"--attention is 'flash', expected one of auto, sdpa"):
            dataclasses.replace(options, attention="flash")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="needs a GPU and bfloat16 or float16.* cpu in float3"):
            build(dataclasses.replace(options, attention="flash_attention_2", gpus_per_worker=0))
        assert not Path(options.out).exists()

    def test_flash_attention_that_is_not_installed_is_named(self, lm: TeacherOptions) -> None:
        flash = dataclasses.replace(
            lm, device="cuda", dtype="bfloat16", attention="flash_attention_2"
        )
        with (
            mock.patch.object(load, "_from_pretrained", side_effect=ImportError("no\n package.")),
            pytest.raises(
                UsageError, match=r"with --attention flash_attention_2: no package\. Use"
            ),
        ):
            load._load(TeacherFiles.find(lm.names[0]), flash, None)

    @pytest.mark.parametrize(
        ("installed", "dtype", "works", "tried"),
        [
            (True, "bfloat16", True, ["flash_attention_2"]),
            (True, "bfloat16", False, ["flash_attention_2", None]),  # not of every model
            (True, "float32", True, [None]),
            (False, "float16", True, [None]),
        ],
    )
    def test_auto_prefers_flash_attention_where_it_can_be(
        self,
        lm: TeacherOptions,
        monkeypatch: pytest.MonkeyPatch,
        installed: bool,
        dtype: str,
        works: bool,
        tried: list[str | None],
    ) -> None:
        seen = []

        def pretend(_files: object, _options: object, settings: dict[str, str]) -> str:
            seen.append(settings.get("attn_implementation"))
            if seen[-1] and not works:
                raise ValueError("this model has no such attention")
            return "model"

        monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: installed)
        monkeypatch.setattr(load, "_from_pretrained", pretend)
        on_gpu = dataclasses.replace(lm, device="cuda", dtype=dtype)
        files = TeacherFiles.find(lm.names[0])
        assert load._with_attention(files, on_gpu, {}) == "model"
        assert seen == tried


class TestCompile:
    @pytest.mark.end_to_end
    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of PyTorch's own code
    @pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "batches",
        [
            ([64] * 4, [33, 20, 7]),
            pytest.param(
                ([64] * 4, [64] * 3, [33, 20, 7], [50], [9], [128, 128], [31] * 9),
                marks=pytest.mark.exhaustive,
            ),
        ],
        ids=["some", "many"],
    )
    def test_a_compiled_teacher_says_the_same_in_a_few_compilations(
        self, lm: TeacherOptions, monkeypatch: pytest.MonkeyPatch, batches: tuple[list[int], ...]
    ) -> None:
        monkeypatch.delenv("CXX", raising=False)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        plain, compiled = Teacher(lm, 300), Teacher(dataclasses.replace(lm, compile=True), 300)
        for lengths in batches:
            rows = lm_rows(*lengths)
            got, want = logits_of(compiled, rows), logits_of(plain, rows)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        # One for all layers and shapes; a batch of one row and odd lengths may take one more each.
        assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3

    @pytest.mark.slow
    def test_it_begins_before_the_first_span_and_is_no_part_of_the_spec(
        self, options: BuildOptions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build(options)
        shape: list[int] = []
        monkeypatch.setattr(teacher, "compile_layers", lambda _model: None)
        monkeypatch.setattr(TeacherSource, "_try_batch", lambda _, tokens: shape.append(tokens))
        (Path(options.out) / "manifest.json").unlink()
        min(Path(options.out, "shards").iterdir()).unlink()
        assert build(dataclasses.replace(options, compile=True, batch_tokens=256)).made == 1
        assert shape == [256]

    def test_without_a_compiler_it_is_refused_in_one_line(
        self, lm: TeacherOptions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(UsageError, match=r"--compile needs a C\+\+ compiler \(no-such-comp"):
            Teacher(dataclasses.replace(lm, compile=True), 300)

    def test_the_largest_stack_is_the_layers(self, lm: TeacherOptions) -> None:
        model = Teacher(lm, 300).models[0].model
        assert load._repeated_layers(model) == list(model.model.layers)
        assert load._repeated_layers(torch.nn.Linear(2, 2)) == []


class TestWeights:
    def test_their_size_is_that_of_the_files_in_the_wanted_dtype(self, tiny_lm: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(tiny_lm)
        count = sum(p.numel() for p in model.parameters())
        assert weight_bytes(tiny_lm, "float32") == 4 * count
        assert weight_bytes(tiny_lm, "bfloat16") == 2 * count

    def test_only_files_of_the_index_count_and_whole_numbers_stay(
        self, tiny_lm: Path, tmp_path: Path
    ) -> None:
        weights = load_file(tiny_lm / "model.safetensors")
        part = {"a": weights["lm_head.weight"], "packed": torch.zeros(10, dtype=torch.int8)}
        save_file(part, tmp_path / "model-00001-of-00001.safetensors")
        save_file(weights, tmp_path / "consolidated.safetensors")
        index = {"weight_map": dict.fromkeys(part, "model-00001-of-00001.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert weight_bytes(tmp_path, "float16") == 2 * part["a"].numel() + 10

    def test_a_teacher_that_does_not_fit_is_spread(
        self, lm: TeacherOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        rooms: list[object] = []
        monkeypatch.setattr(load, "_load", lambda _files, _options, room: rooms.append(room))
        size = weight_bytes(Path(lm.names[0]), "float32")
        both = dataclasses.replace(lm, names=lm.names * 2, device="cuda", weights=(0.5, 0.5))
        for free in (3 * size, 2 * size):  # there must be some room beside the two
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, free))
            monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {0: 100, "cpu": 1000})
            load.load_models(both)
        assert rooms == [None, None, {0: 40, "cpu": 450}, {0: 80, "cpu": 900}]
        assert caplog.text.count("are spread") == 1

    def test_weights_that_lie_elsewhere_between_calls_give_the_same_logits(
        self, lm: TeacherOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # What CPU offload does to a GPU, done with a disk to this CPU: the output layer is on no
        # device until it is called.
        places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
        spread = AutoModelForCausalLM.from_pretrained(
            lm.names[0],
            device_map={**places, "model.layers": "disk", "lm_head": "disk"},
            offload_folder=str(tmp_path),
        )
        assert spread.lm_head.weight.is_meta
        plain = Teacher(lm, 290)
        monkeypatch.setattr(teacher, "load_models", lambda _options: [spread.eval()])
        offloaded = Teacher(dataclasses.replace(lm, compile=True), 290)  # which it leaves alone
        assert offloaded.device == torch.device("cpu")
        rows = lm_rows(30, 12)
        assert torch.equal(logits_of(offloaded, rows), logits_of(plain, rows))
        assert offloaded.models[0].direct

        # A batch of many slices loads the layer once.
        loads: list[str] = []
        own = accelerate.hooks.set_module_tensor_to_device

        def load_tensor(module: torch.nn.Module, name: str, device: object, **more: object) -> None:
            if module is spread.lm_head and device != "meta":
                loads.append(name)
            own(module, name, device, **more)

        monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", load_tensor)
        monkeypatch.setattr(model, "slice_positions", lambda *_: 5)
        slices = list(offloaded.logits(rows))
        assert len(slices) == 9
        assert loads == ["weight"]
        assert spread.lm_head.weight.is_meta
        want = logits_of(plain, rows)
        torch.testing.assert_close(torch.cat(slices), want, rtol=1e-4, atol=1e-4)
        spread(torch.zeros(1, 3).long())  # afterwards it is loaded at each call again
        assert loads == ["weight"] * 2

    def test_where_inputs_go_to_a_model_that_is_spread(self) -> None:
        places = {"embed": "cpu", "layers.0": 1, "layers.1": 0, "head": "cpu"}
        model = mock.Mock(hf_device_map=places)
        assert load.input_device(model) == torch.device("cuda", 1)

    def test_a_teacher_that_fits_nowhere_is_refused(self, lm: TeacherOptions) -> None:
        files = TeacherFiles.find(lm.names[0])
        half = weight_bytes(files.folder, "float32") // 2
        with pytest.raises(UsageError, match="does not fit the GPUs and the memory of a worker"):
            load._load(files, dataclasses.replace(lm, device="auto"), {"cpu": half})


class TestBatchSize:
    @pytest.mark.parametrize(
        ("shares", "found", "tried"),
        [
            ({65536: 0.5}, 65536, 1),
            ({65536: 0.95, 32768: 0.48}, 32768, 2),  # it fits today and not with other holes
            ({65536: None, 32768: None, 16384: 0.8}, 16384, 3),
            ({}, 1000, 7),  # one row is never tried
        ],
    )
    def test_the_largest_that_fits(
        self, shares: dict[int, float | None], found: int, tried: int
    ) -> None:
        seen: list[int] = []

        def share(tokens: int) -> float | None:
            seen.append(tokens)
            return shares.get(tokens)

        assert find_batch_tokens(share, 65536, 1000) == found
        assert seen == [65536 >> i for i in range(tried)]

    def test_rows_longer_than_the_largest_batch_are_one_each(self) -> None:
        assert find_batch_tokens(lambda _tokens: 1 / 0, 65536, 100_000) == 100_000

    @pytest.mark.slow
    def test_a_batch_that_is_tried_is_full_of_the_longest_rows(
        self, options: BuildOptions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shapes: list[tuple[int, int]] = []
        own = Teacher.slices

        def slices(self: Teacher, rows: list[Row]) -> object:
            shapes.append((len(rows), len(rows[0].input_ids)))
            return own(self, rows)

        monkeypatch.setattr(Teacher, "slices", slices)
        monkeypatch.setattr(teacher, "compile_layers", lambda _model: None)
        build(dataclasses.replace(options, compile=True, batch_tokens=300))
        assert shapes[0] == (4, 64)

    @pytest.mark.slow
    @pytest.mark.parametrize("given", [None, 512])
    def test_only_a_size_that_was_not_given_is_looked_for(
        self, options: BuildOptions, monkeypatch: pytest.MonkeyPatch, given: int | None
    ) -> None:
        found: list[int] = []

        class OnGpu(Teacher):
            def __init__(self, *args: object) -> None:
                super().__init__(*args)  # type: ignore[arg-type]
                self.device = mock.Mock(type="cuda")

        def look(_: TeacherSource) -> int:
            found.append(1)
            raise UsageError("looked")

        monkeypatch.setattr(source, "Teacher", OnGpu)
        monkeypatch.setattr(TeacherSource, "_find_batch_tokens", look)
        monkeypatch.setattr(SpanWorker, "run", lambda *_: (_ for _ in ()).throw(UsageError("ran")))
        with pytest.raises(UsageError, match="ran" if given else "looked"):
            build(dataclasses.replace(options, batch_tokens=given))
        assert bool(found) == (given is None)

    @pytest.mark.slow
    def test_memory_that_runs_out_halves_the_batch_and_loses_no_row(
        self, options: BuildOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build(options)
        own, limit = Teacher.slices, 200
        refused = []

        def slices(self: Teacher, rows: list[Row]) -> object:
            tokens = len(rows) * max(len(row.input_ids) for row in rows)
            if tokens > limit:
                refused.append(tokens)
                raise torch.OutOfMemoryError("no")
            return own(self, rows)

        monkeypatch.setattr(Teacher, "slices", slices)
        other = dataclasses.replace(options, out=str(tmp_path / "other"), batch_tokens=1000)
        build(other)
        assert refused == [960, 448], "what fits is remembered, for the rest of the span too"
        one, two = Cache.open(options.out), Cache.open(other.out)
        assert one.spec.fingerprint == two.spec.fingerprint
        for span in range(one.spec.spans):
            a, b = one.read(span), two.read(span)
            assert np.array_equal(a.input_ids, b.input_ids)
            left, right = a.targets.at(1.0), b.targets.at(1.0)
            assert isinstance(left, DenseTargets)
            assert isinstance(right, DenseTargets)
            torch.testing.assert_close(left.logits, right.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_teacher_goes_on_while_a_span_is_packed(
    options: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first span's packing waits until the second one is with the teacher: they must overlap.
    second = threading.Event()
    spans: set[int] = set()
    answer, pack = TeacherSource.answer, Packer._pack

    def note(self: TeacherSource, rows: TaughtRows, packer: Packer, steps: Steps) -> object:
        spans.add(packer.span)
        if len(spans) == 2:
            second.set()
        return answer(self, rows, packer, steps)

    def wait(self: object, *rest: object) -> object:
        assert second.wait(60), "the second span never had its turn"
        return pack(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(TeacherSource, "answer", note)
    monkeypatch.setattr(Packer, "_pack", wait)
    assert build(dataclasses.replace(options, shard_tokens=600)).spans > 1


@pytest.mark.gpu
@needs_gpu
class TestOnGpu:
    def test_the_share_of_memory_that_something_takes(self) -> None:
        free = torch.cuda.mem_get_info()[0]

        def take(share: float) -> Callable[[], torch.Tensor]:
            return lambda: torch.empty(int(share * free), dtype=torch.uint8, device="cuda")

        (gpu,) = gpus_of([torch.nn.Linear(1, 1, device="cuda")])
        assert peak_share(take(0.25), [gpu]) == pytest.approx(0.25, abs=0.02)
        assert peak_share(take(1.5), [gpu]) is None
        assert torch.cuda.memory_allocated() < 0.01 * free, "nothing of it is left"

    @pytest.mark.slow
    def test_a_batch_size_is_found_and_used(self, options: BuildOptions) -> None:
        sizes: list[int] = []
        own = TeacherSource._find_batch_tokens
        with mock.patch.object(
            TeacherSource, "_find_batch_tokens", lambda w: sizes.append(own(w)) or sizes[-1]
        ):
            result = build(dataclasses.replace(options, codec="sample:8"))
        assert result.positions > 0
        assert sizes == [65536], "a tiny model fits any card with the largest"

    def test_a_teacher_spread_over_gpu_and_host_says_the_same(
        self, lm: TeacherOptions, tiny_tokenizer: Path, tmp_path: Path
    ) -> None:
        folder = make_tiny_lm(tiny_tokenizer, tmp_path / "lm", seed=3)
        lm = dataclasses.replace(lm, names=(str(folder),))
        size = weight_bytes(folder, "float32")
        room: dict[int | str, int] = {0: size, "cpu": 1 << 30}
        with (
            mock.patch.object(torch.cuda, "mem_get_info", return_value=(size, size)),
            mock.patch("accelerate.utils.get_max_memory", return_value=room),
        ):
            spread = Teacher(dataclasses.replace(lm, device="cuda"), 290)
        assert "cpu" in map(str, spread.models[0].model.hf_device_map.values())
        rows = lm_rows(30, 12)
        want = logits_of(Teacher(lm, 290), rows)
        torch.testing.assert_close(logits_of(spread, rows), want, rtol=1e-3, atol=1e-3)

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_a_compiled_teacher_says_the_same(self, lm: TeacherOptions) -> None:
        rows = lm_rows(64, 64, 20)
        plain = logits_of(Teacher(dataclasses.replace(lm, device="cuda"), 300), rows)
        fast = Teacher(dataclasses.replace(lm, device="cuda", compile=True), 300)
        torch.testing.assert_close(logits_of(fast, rows), plain, rtol=1e-3, atol=1e-3)


# The tokenizer's files


def test_a_tokenizers_files_do_not_tell_how_it_was_loaded(
    tiny_tokenizer: Path, tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the digest of a cache, which two builds of one spec must share."""
    plain = tokenizer_files(TeacherFiles.find(str(tiny_lm)).tokenizer)
    assert json.loads(plain["tokenizer_config.json"])["eos_token"] == "<|end|>"
    shutil.copytree(tiny_lm, tmp_path / "elsewhere" / "teacher")
    copy = tmp_path / "elsewhere" / "teacher"
    (tmp_path / "link").symlink_to(copy)
    hub = tmp_path / "models--a--b" / "snapshots" / "0123"
    hub.mkdir(parents=True)
    for path in copy.iterdir():
        (hub / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    names = (str(copy), f"{copy}/", "link", "elsewhere/teacher", "./elsewhere/../link", str(hub))
    found = {}
    for offline in (True, False):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        for name in names:
            for trust in (True, False):
                files = TeacherFiles.find(name, trust_remote_code=trust)
                found[offline, name, trust] = tokenizer_files(files.tokenizer)
    called = TeacherFiles.find(str(copy)).tokenizer
    called(["some words", "word"], padding=True, truncation=True, max_length=5)
    found["called"] = tokenizer_files(called)
    # A folder that was saved by somebody who loaded it in a way of their own.
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config |= {"local_files_only": True, "is_local": False, "_commit_hash": "ab", "cache_dir": "/x"}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    found["saved"] = tokenizer_files(TeacherFiles.find(str(copy)).tokenizer)
    assert [how for how, files in found.items() if files != plain] == []
    for name, content in plain.items():
        (tmp_path / name).write_bytes(content)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("some words").input_ids == called("some words").input_ids


@pytest.mark.exhaustive  # what places and environments change is the tokenizer's files: above
@pytest.mark.end_to_end
def test_two_places_and_environments_build_the_same_cache(
    tiny_lm: Path, text_corpus: Path, small_build: BuildOptions, tmp_path: Path
) -> None:
    build(dataclasses.replace(small_build, limit=9))
    place = tmp_path / "other"
    (place / "deeper").mkdir(parents=True)
    (place / "t").symlink_to(tiny_lm)
    shutil.copy2(text_corpus, place / "text.jsonl")
    words = ["-m", "kdcache", "build", "--teacher", "../t", "--corpus", "../text.jsonl"]
    done = subprocess.run(
        [sys.executable, *words, "--limit", "9", "--workers", "0", "--out", "cache"],
        cwd=place / "deeper",
        env=os.environ | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(place / "hf")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    other = Cache.open(str(place / "deeper" / "cache"))
    assert other.digest == Cache.open(small_build.out).digest
