"""Targets as a batch carries them: moved, pinned, cut, joined, at one temperature."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from kdcache.errors import UsageError
from kdcache.targets import (
    Codec,
    DenseTargets,
    HiddenTargets,
    OutputLayer,
    SparseTargets,
    Targets,
    TargetWriter,
)


def decoded() -> list[Targets]:
    """Dense, top-k and sampled targets of three positions at T = 2."""
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    found = []
    for text in ("dense", "topk:4", "sample:6", "anchored:6"):
        codec = Codec.parse(text, (1.0, 2.0), 40)
        found.append(TargetWriter(codec).write(logits, u).at(2.0))
    layer = OutputLayer(torch.randn(40, 6, generator=torch.Generator().manual_seed(1)))
    return [*found, HiddenTargets(logits[:, :6], layer, 2.0)]


KINDS = ["dense", "topk", "sample", "anchored", "hidden"]


def tensors(targets: Targets) -> dict[str, Tensor]:
    return {name: value for name, value in vars(targets).items() if isinstance(value, Tensor)}


def same_targets(one: Targets, other: Targets) -> bool:
    alike = (type(one), one.temperature, one.exact) == (type(other), other.temperature, other.exact)
    mine, theirs = tensors(one), tensors(other)
    return alike and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("targets", decoded(), ids=KINDS)
def test_loaders_and_trainers_move_and_pin_targets(
    targets: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = {"labels": torch.zeros(3), "targets": targets}
    moved = send_to_device(batch, torch.device("meta"), non_blocking=True)["targets"]
    assert {tensor.device.type for tensor in tensors(moved).values()} == {"meta"}
    assert (moved.temperature, moved.exact) == (2.0, targets.exact)
    # Page-locked memory needs a GPU: what counts is that each tensor is asked for it.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor + 1)
    pinned = pin_memory(batch)["targets"]
    for name, tensor in tensors(pinned).items():
        assert torch.equal(tensor, tensors(targets)[name] + 1)
    (loaded,) = DataLoader([batch], batch_size=None)
    assert same_targets(loaded["targets"], targets)


@pytest.mark.parametrize("targets", decoded(), ids=KINDS)
def test_targets_are_cut_and_joined(targets: Targets) -> None:
    parts = [targets[:1], targets[1:1], targets[1:]]
    assert [len(part) for part in parts] == [1, 0, 2]
    assert same_targets(type(targets).concat(parts), targets)
    assert same_targets(targets[torch.tensor([0, 2])], targets[torch.tensor([True, False, True])])
    if isinstance(targets, SparseTargets):
        wide = dataclasses.replace(
            targets,
            ids=F.pad(targets.ids, (0, 2), value=7),
            weights=F.pad(targets.weights, (0, 2), value=0.5),
        )
        both = SparseTargets.concat([targets, wide])
        assert same_targets(both[3:], wide)
        width = targets.ids.shape[1]
        assert not both.ids[:3, width:].any()
        assert not both.weights[:3, width:].any()


def test_only_alike_targets_are_joined() -> None:
    dense, exact, sample, *_ = decoded()
    for one, other in (
        (dense, exact),
        (exact, sample),
        (dense, dataclasses.replace(dense, temperature=1.0)),
    ):
        with pytest.raises(ValueError, match="one kind and temperature"):
            type(one).concat([one, other])
    with pytest.raises(ValueError, match="one kind and temperature"):
        SparseTargets.concat([])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_no_targets_at_an_impossible_temperature(temperature: float) -> None:
    with pytest.raises(UsageError, match="above 0"):
        DenseTargets(torch.zeros(1, 3), temperature)
