"""What a cache of any language model promises: the same checks for every task that makes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdcache
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.options import TranscodeOptions, VerifyOptions
from kdcache.commands.train.options import TrainOptions
from kdcache.rows import Row

Make = Callable[..., BuildOptions]
"""Makes the options of a build by the name of its folder, with changes."""


class Stop(Exception):  # noqa: N818 - not an error
    """Ends a training."""


def built(options: BuildOptions) -> kdcache.Cache:
    kdcache.build(options)
    return kdcache.Cache.open(options.out)


def rows_of(cache: kdcache.Cache) -> list[tuple[Row, Any]]:
    """Each row with the targets of its positions."""
    found = []
    for span in range(cache.spec.spans):
        data = cache.read(span)
        for i in range(len(data)):
            places = np.arange(*data.position_offsets[i : i + 2])
            found.append((data.row(i), data.targets.take(places)))
    return found


def with_telling_weights(model: Any) -> Any:
    """A model with random weights whose biases and norms show where they are left out."""
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += 0.2 * torch.randn_like(weight)
    return model


def check_codecs(options: Make) -> None:
    """Hidden states give the distribution of logits; what is transcoded from these is what a build
    with the codec makes."""
    dense = built(options("dense"))
    hidden = built(options("hidden", codec="hidden:float16"))
    for (row, want), (same, got) in zip(rows_of(dense), rows_of(hidden), strict=True):
        assert np.array_equal(row.input_ids, same.input_ids)
        p, q = want.at(1.0).logits.softmax(-1), got.at(1.0).dense().logits.softmax(-1)
        torch.testing.assert_close(p, q, rtol=0, atol=5e-3)
    for codec in ("sample:5", "anchored:5", "topk:8"):
        direct = built(options(codec.replace(":", ""), codec=codec))
        again = TranscodeOptions(dense.url, codec=codec, out=f"{direct.url}-again", workers=0)
        kdcache.transcode(again)
        copy = kdcache.Cache.open(again.out)
        for span in range(direct.spec.spans):
            a, b = direct.read(span), copy.read(span)
            assert a.label_logprob is not None
            for name in ("labels", "input_ids", "source", "source_offsets", "label_logprob"):
                assert np.array_equal(getattr(a, name), getattr(b, name)), name
            for name, column in a.targets.columns.items():
                assert np.array_equal(column, b.targets.columns[name]), (codec, name)


def check_verify(options: Make, other: Path) -> None:
    """Cached targets are found to be the teacher's, and not those of another model."""
    chosen = options(codec="sample:5")
    kdcache.build(chosen)
    good = kdcache.verify(VerifyOptions(chosen.out, teacher=chosen.teacher))
    assert good.problems == ()
    assert good.recheck is not None
    assert good.recheck.problems == ()
    bad = kdcache.verify(VerifyOptions(chosen.out, teacher=(str(other),)))
    assert bad.recheck is not None
    assert "not those of this teacher" in bad.recheck.problems[0]


def check_parts(options: Make, **in_parts: Any) -> None:
    """Parts in any order, and a build that goes on, give the bytes of a whole build."""
    whole = built(options("whole", codec="sample:5"))
    for part in ("2/3", "3/3"):
        kdcache.build(options("parts", codec="sample:5", part=part, **in_parts))
    parts = built(options("parts", codec="sample:5"))
    assert parts.spec.fingerprint == whole.spec.fingerprint
    assert parts.digest == whole.digest


def check_resume(cache: kdcache.Cache, student: Path, folder: Path) -> None:
    """A training that was stopped and goes on ends with the bytes of one that was not."""
    plan = TrainOptions(
        cache=(cache.url,), student=str(student), out=str(folder / "whole"), batch_size=4,
        max_steps=8, save_steps=3, report_to="none", precision="float32",
    )  # fmt: skip
    kdcache.train(plan)
    halves = dataclasses.replace(plan, out=str(folder / "halves"))

    def stop(now: Any) -> None:
        if now.step >= 5:
            raise Stop

    with pytest.raises(Stop):
        kdcache.train(halves, on_progress=stop)
    kdcache.train(halves)
    whole, again = (
        (folder / name / "model.safetensors").read_bytes() for name in ("whole", "halves")
    )
    assert whole == again
