"""What is decided by the devices that are there: pure functions and mocks of devices."""

from __future__ import annotations

import logging
import os
from typing import Any
from unittest import mock

import pytest
import torch
from fake import fake_cuda

from kdcache.loss import fused
from kdcache.targets.device import compiles, run


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
