"""What is decided by the devices that are there: pure functions and mocks of devices."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import make_tiny_lm
from fake import fake_cuda

from kdcache.cache import Cache
from kdcache.commands.build import worker
from kdcache.commands.build.build import BuildOptions, build
from kdcache.loss import fused
from kdcache.rows import Row
from kdcache.targets import Codec
from kdcache.targets.device import compiles, run
from kdcache.teacher import Teacher, peak_share
from kdcache.teacher.memory import gpus_of


def test_the_suite_hides_gpus() -> None:
    # Otherwise `make test` would be another suite on a machine with a GPU.
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


class TestCompileSwitch:
    @pytest.fixture(autouse=True)
    def _untried(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.delenv("KDCACHE_COMPILE", raising=False)
        run._compiler_works.cache_clear()
        yield
        run._compiler_works.cache_clear()

    @pytest.mark.parametrize(
        "error",
        [
            ImportError("No module named 'triton'"),
            RuntimeError("Failed to find C compiler. Please specify via CC"),
            RuntimeError("fatal error: Python.h: No such file\ncompilation terminated"),
        ],
    )
    def test_a_compiler_that_fails_is_reported_once(
        self, error: Exception, caplog: pytest.LogCaptureFixture
    ) -> None:
        broken = mock.Mock(side_effect=error)
        with (
            fake_cuda(),
            mock.patch.object(torch, "compile", return_value=broken),
            caplog.at_level(logging.WARNING),
        ):
            assert [compiles(), compiles()] == [False, False]
        assert broken.call_count == 1
        (message,) = [record.getMessage() for record in caplog.records]
        assert str(error).splitlines()[0] in message
        assert "KDCACHE_COMPILE=0" in message

    def test_one_that_works_is_tried_once(self) -> None:
        works = mock.Mock()
        with fake_cuda(), mock.patch.object(torch, "compile", return_value=works):
            assert [compiles(), compiles()] == [True, True]
        assert works.call_count == 1

    def test_zero_turns_it_off_untried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KDCACHE_COMPILE", "0")
        with mock.patch.object(torch, "compile") as tried:
            assert not compiles()
        tried.assert_not_called()

    @pytest.mark.parametrize("works", [True, False])
    def test_the_loss_obeys_it(self, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Compiled, a pass takes its whole slice; else blocks that outlast their launches."""
        n, vocabulary = 2048, 131_072
        sizes: list[int] = []

        def note(z: torch.Tensor, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            sizes.append(len(z))
            return torch.zeros(2, device="cuda"), torch.zeros_like(x)

        monkeypatch.setattr(fused, "compiles", lambda: works)
        monkeypatch.setattr(fused, "_sparse_pass", note)
        monkeypatch.setattr(fused, "_compiled", lambda function: function if works else None)
        with fake_cuda():
            targets = fused.SparseTargets(
                ids=torch.zeros(n, 4, dtype=torch.int64, device="cuda"),
                weights=torch.zeros(n, 4, device="cuda"),
                rest=torch.zeros(n, device="cuda"),
                exact=False,
                temperature=1.0,
            )
            scalar = torch.zeros((), device="cuda")
            fused._logits_to_gradient_(
                torch.zeros(n, vocabulary, dtype=torch.bfloat16, device="cuda"),
                torch.zeros(n, dtype=torch.int64, device="cuda"),
                targets,
                torch.ones(n, device="cuda"),
                fused._Options(scalar, scalar, True, False),
            )
        assert sizes == ([n] if works else [512] * 4)


class TestPacking:
    def test_copies_are_waited_for_on_the_device_that_makes_them(self) -> None:
        """A teacher spread over GPUs takes its inputs on the first and encodes on the last."""
        streams = {torch.device("cuda", i): mock.Mock(name=f"stream {i}") for i in range(2)}
        event = mock.Mock()
        codec = Codec.parse("topk:4", (1.0,), 500)
        with (
            fake_cuda(2),
            mock.patch.object(torch.cuda, "Event", return_value=event) as made,
            mock.patch.object(torch.cuda, "current_stream", streams.__getitem__),
            mock.patch.object(worker._Packer, "_pack", lambda *arguments: arguments),
            worker._Packer(codec, 0, None) as packer,
        ):
            encoded = codec.encode(torch.zeros(3, 500, device="cuda:1"))
            clipped = torch.zeros((), device="cuda:1")
            _, host, copied, *_ = packer.put(encoded, clipped, mock.Mock(), 0).result()
        assert {tensor.device.type for tensor in host.values()} == {"cpu"}
        made.assert_called_once_with(blocking=True)  # else the thread would burn a core
        event.record.assert_called_once_with(streams[torch.device("cuda", 1)])
        assert copied == [event]

    @pytest.mark.parametrize(
        ("device", "cores", "threads"), [("cpu", 64, 1), ("cuda", 2, 1), ("cuda", 8, 2)]
    )
    def test_a_second_thread_packs_where_a_core_is_free(
        self, device: str, cores: int, threads: int
    ) -> None:
        assert worker.packing_threads(device, cores) == threads

    def test_a_batch_that_is_asked_again_counts_its_clipped_mass_once(
        self, small_build: BuildOptions, tiny_tokenizer: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        lm = make_tiny_lm(tiny_tokenizer, tmp_path / "padded", vocab_size=384)
        options = dataclasses.replace(small_build, teacher=(str(lm),), batch_tokens=400)
        build(options)
        own, failed = Teacher.logits, []

        def logits(self: Teacher, rows: list[Row]) -> Iterator[torch.Tensor]:
            yield from own(self, rows)
            if not failed:
                failed.append(len(rows))
                raise torch.OutOfMemoryError("after the mass was counted")

        monkeypatch.setattr(Teacher, "logits", logits)
        again = dataclasses.replace(options, out=str(tmp_path / "again"))
        build(again)
        assert failed
        one, two = (
            [shard.clipped_mass for shard in Cache.open(o.out).manifest.shards]
            for o in (options, again)
        )
        assert one[0] > 0
        assert two == pytest.approx(one, rel=1e-5)


def test_memory_is_measured_on_the_teachers_own_gpus() -> None:
    """Asking another GPU would make a context on it, and see other processes' memory."""
    with fake_cuda(4):
        layers = [torch.nn.Linear(2, 2, device=f"cuda:{i}") for i in (2, 1)]
        assert gpus_of(layers) == (torch.device("cuda", 1), torch.device("cuda", 2))
        spread = torch.nn.Linear(2, 2, device="meta")
        spread.hf_device_map = {"model.layers.0": 3, "model.layers.1": "cpu"}
        assert gpus_of([spread]) == (torch.device("cuda", 3),)
    asked: list[object] = []

    def note(answer: object) -> Any:
        return lambda *device: asked.extend(device) or answer

    with mock.patch.multiple(
        torch.cuda,
        synchronize=note(None),
        empty_cache=note(None),
        reset_peak_memory_stats=note(None),
        memory_allocated=note(10),
        max_memory_allocated=note(60),
        mem_get_info=note((100, 200)),
        device_count=note(4),
    ):
        assert peak_share(lambda: None, [torch.device("cuda", 2)]) == 0.5
    assert set(asked) == {torch.device("cuda", 2)}
