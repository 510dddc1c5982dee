"""Training on some positions: which are chosen, that the loss is theirs alone, and whole runs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from make_caches import CAUSAL, make_cache
from small_runs import LLAMA, USUAL, metrics
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdcache.cache import Cache
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.errors import UsageError
from kdcache.loss import distillation_loss
from kdcache.loss.passes import linear_entropies, logit_entropies
from kdcache.stream import TargetStream
from kdcache.student import DistilledStudent
from kdcache.student.positions import PositionFigures, Share, choose
from kdcache.tasks import IGNORE

FIGURES = ("teacher-entropy", "student-entropy", "surprise")


def entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.double().softmax(-1)).sum(-1)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_entropies_of_slices_are_those_of_the_softmax(cap: float | None, bias: bool) -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(23, 8).double() * 4, torch.randn(500, 8).double()
    offset = torch.randn(510).double() if bias else None
    logits = states @ weight.T + (0 if offset is None else offset[:500])
    want = entropy(logits if cap is None else cap * (logits / cap).tanh())
    for rows in (None, 5, 100):
        found = linear_entropies(states, weight, offset, cap=cap, rows=rows)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert linear_entropies(states[:0], weight, None).shape == (0,)


def test_entropies_of_logits_of_any_kind() -> None:
    torch.manual_seed(1)
    logits = 5 * torch.randn(6, 3000)
    logits[1, 1:] = -math.inf  # sure
    logits[2, ::2] = -math.inf  # masked ids
    logits[3] = 1e30
    before = logits.clone()
    torch.testing.assert_close(logit_entropies(logits).double(), entropy(logits), rtol=1e-5, atol=0)
    assert torch.equal(logits, before)
    half = logits[[0, 4, 5]].bfloat16()
    found = logit_entropies(half)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), entropy(half), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("share", "values", "want"),
    [
        (0.2, [1, 5, 3, 3, 0], [1]),
        (0.4, [3, 1, 3, 3, 0], [0, 2]),  # of equal ones the earlier
        (0.5, [0, 0, 0], [0, 1]),  # 1.5 is rounded up
        (0.29, [0] * 50, list(range(15))),  # 14.5, which is less in binary
        (0.01, [1, math.inf], [1]),  # at least one
        (1.0, [2, 1], [0, 1]),
        (0.3, [], []),
    ],
)
def test_a_share_takes_the_largest(share: float, values: list[float], want: list[int]) -> None:
    figures = PositionFigures(
        len(values), torch.tensor(values).float(), None, lambda: torch.ones(0)
    )
    assert Share("teacher-entropy", share).indices(figures).tolist() == want


def student_of(folder: Path, seed: int = 3) -> Any:
    """A student in float64 whose answers are not its teacher's."""
    torch.manual_seed(seed)
    student: Any = AutoModelForCausalLM.from_pretrained(folder).double()
    for weight in student.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return student


def in_float64(batch: dict[str, Any]) -> dict[str, Any]:
    targets = batch.get("targets")
    if targets is None:
        return batch
    wide = {k: v.double() for k, v in targets._tensors().items() if v.is_floating_point()}
    return {**batch, "targets": dataclasses.replace(targets, **wide)}


def batch_of(cache: str, temperature: float | None, **how: Any) -> dict[str, Any]:
    stream = TargetStream(cache, batch_size=6, shuffle=False, temperature=temperature, **how)
    return in_float64(next(iter(stream)))


def plainly(
    student: Any, batch: dict[str, Any], weigh: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> tuple[Any, list[Tensor]]:
    """Loss and gradients by whole logits, with the weights that a function gives of three figures;
    positions of weight 0 are taken out before the loss.
    """
    at = (batch["labels"].reshape(-1) != IGNORE).nonzero()[:, 0]
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    logits = student(**inputs).logits.flatten(0, 1)[at][:, :300]
    labels = batch["labels"].reshape(-1)[at]
    given = batch["teacher_entropy"].double(), entropy(logits.detach())
    weights = weigh(*given, -batch["label_logprob"].double())
    keep = weights > 0
    parts = distillation_loss(
        logits[keep],
        labels[keep],
        batch["targets"][keep],
        alpha=0.3,
        position_weights=weights[keep],
        vocab_size=300,
    )
    return parts, list(torch.autograd.grad(parts.total, list(student.parameters())))


def largest(which: int, share: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Weights of 1 for the largest of a figure, in plain Python."""

    def weigh(*figures: Tensor) -> Tensor:
        values = figures[which].tolist()
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        chosen = order[: max(1, math.floor(share * len(values) + 0.5))]
        return torch.tensor([float(i in chosen) for i in range(len(values))]).double()

    return weigh


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("codec", ["dense", "topk:8", "sample:20"])
@pytest.mark.parametrize("own", [False, True], ids=["fused", "logits"])
def test_loss_and_gradients_are_those_of_the_chosen(
    codec: str, figure: str, own: bool, lm_caches: dict[str, str], tiny_lm: Path
) -> None:
    """The fused loss, and that of a student's own logits, against whole logits in float64."""
    student = student_of(tiny_lm)
    batch = batch_of(lm_caches[codec], 2.0)
    want, gradients = plainly(student, batch, largest(FIGURES.index(figure), 0.2))
    rule: Any = Share(figure, 0.2)
    model = DistilledStudent(student, "causal-lm", alpha=0.3, vocab_size=300, positions=rule)
    del batch["count"]
    spoilt = dict(batch)
    if figure == "surprise":  # what is not chosen is not even read
        keep = choose(rule, len(batch["targets"]), None, batch["label_logprob"], list).at
        tensors = batch["targets"]._tensors().items()
        nan = {k: torch.full_like(v, math.nan) for k, v in tensors if v.is_floating_point()}
        for name, value in batch["targets"]._tensors().items():
            if name in nan:
                nan[name][keep] = value[keep]
        spoilt["targets"] = dataclasses.replace(batch["targets"], **nan)
    found = model.train()(**spoilt, return_logits=own)
    made = torch.autograd.grad(found.loss, list(student.parameters()))
    torch.testing.assert_close(found.loss, want.total, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.hard_loss, want.hard, rtol=1e-9, atol=1e-9)
    for one, other in zip(made, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    # A count is of all positions, so that half of them are half of the step.
    n = len(batch["targets"])
    part = model(**batch, count=2.0 * n)
    torch.testing.assert_close(part.loss, found.loss / 2)
    # Evaluation is on all of them.
    whole = DistilledStudent(student, "causal-lm", alpha=0.3, vocab_size=300).eval()
    assert torch.equal(model.eval()(**batch).loss, whole(**batch).loss)


def test_a_function_weighs_positions(lm_caches: dict[str, str], tiny_lm: Path) -> None:
    """Any of the three figures; the KL of a sample is that of what was weighed."""
    student = student_of(tiny_lm)
    batch = batch_of(lm_caches["sample:20"], 1.0)

    def weigh(teacher: Tensor, own: Tensor, surprise: Tensor) -> Tensor:
        return (own - teacher).clamp_min(0) + (surprise > 4)

    def rule(figures: PositionFigures) -> Tensor:
        return weigh(figures.teacher_entropy, figures.student_entropy, figures.surprise)

    want, gradients = plainly(student, batch, weigh)
    del batch["count"]
    model = DistilledStudent(student, "causal-lm", alpha=0.3, vocab_size=300, positions=rule)
    found = model.train()(**batch)
    torch.testing.assert_close(found.loss, want.total, rtol=1e-6, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(found.loss, list(student.parameters())), gradients, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    seen: list[Tensor] = []
    model.positions = lambda figures: seen.append(rule(figures)) or seen[-1]
    found = model(**batch)
    mean = (seen[0] * batch["teacher_entropy"]).sum() / seen[0].sum()
    torch.testing.assert_close(found.kl, (found.soft_loss - mean).to(found.kl))
    model.positions = lambda figures: torch.zeros(figures.number)
    assert model(**batch).loss.item() == 0
    for wrong in (lambda f: torch.ones(f.number - 1), lambda f: -torch.ones(f.number)):
        model.positions = wrong
        with pytest.raises(UsageError, match="weight of 0 or more for each"):
            model(**batch)


def test_hard_labels_alone_and_masked_rows(tmp_path: Path, tiny_lm: Path) -> None:
    """Rows some of whose tokens have no label, as those of chats, and no soft target at all."""
    cache = make_cache(tmp_path / "c", [8], task=CAUSAL, label_logprob=True)
    student = student_of(tiny_lm)
    batch = batch_of(cache.url, None)
    labels = batch["labels"].reshape(-1)
    assert (labels == IGNORE).any()
    at = (labels != IGNORE).nonzero()[:, 0]
    keep = largest(0, 0.5)(-batch["label_logprob"]) > 0
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    want = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1)[at[keep]][:, :64], labels[at[keep]]
    )
    rule = Share("surprise", 0.5)
    model = DistilledStudent(student, "causal-lm", vocab_size=64, positions=rule).train()
    torch.testing.assert_close(model(**batch).loss, want, rtol=1e-9, atol=1e-9)
    del batch["label_logprob"]
    with pytest.raises(UsageError, match="reads label_logprob, and the batch has none"):
        model(**batch)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("positions")
    make_cache(folder / "lm", [14, 10], task=CAUSAL, codec="anchored:4", label_logprob=True)
    make_cache(folder / "classes", [8])
    (folder / "llama.json").write_text(json.dumps(LLAMA))
    return folder


def options_of(home: Path, out: Path, **changes: Any) -> TrainOptions:
    given = {"cache": str(home / "lm"), "student": str(home / "llama.json"), "out": str(out)}
    return TrainOptions(**(USUAL | given | {"epochs": 2} | changes))


class StopError(Exception):
    """An interruption."""


@pytest.mark.slow
def test_a_run_that_was_stopped_takes_the_same_steps(home: Path, tmp_path: Path) -> None:
    """With an anchor's theta, accumulated slices and the positions of each."""
    more: Any = {"positions": "student-entropy:0.30", "gradient_accumulation": 2, "save_steps": 2}

    def stop(now: Any) -> None:
        if now.step == 3:
            raise StopError

    train(options_of(home, tmp_path / "whole", **more))
    with pytest.raises(StopError):
        train(options_of(home, tmp_path / "halves", **more), on_progress=stop)
    with pytest.raises(UsageError, match="positions: "):
        train(options_of(home, tmp_path / "halves", **more | {"positions": "surprise:0.3"}))
    train(options_of(home, tmp_path / "halves", **more | {"positions": "student-entropy:0.3"}))
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    train(options_of(home, tmp_path / "all", gradient_accumulation=2, save_steps=2))
    assert metrics(tmp_path / "all") != metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "entropy:0.2"}, "--positions is entropy:0.2, expected teacher-entropy"),
        ({"positions": "surprise:0"}, "a share above 0, at most 1"),
        ({"positions": "surprise"}, "a share above 0, at most 1"),
        ({"positions": "teacher-entropy:0.2"}, "needs the column entropy, and .* has none"),
        ({"positions": "surprise:0.2", "cache": "classes"}, "tokens of a language model"),
        (
            {"positions": "surprise:0.2", "divergence": "policy-gradient", "alpha": 0},
            "a policy gradient over labels",
        ),
        (
            {"positions": "surprise:0.2", "cross_tokenizer": "likelihood"},
            "it is without --positions surprise:0.2",
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_a_line(
    home: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "cache" in changes:
        changes = {**changes, "cache": str(home / changes["cache"])}
    with pytest.raises(UsageError, match=message):
        train(options_of(home, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_classifier_has_no_positions_to_choose(class_cache: str) -> None:
    assert not Cache.open(class_cache).spec.entropy
    with pytest.raises(UsageError, match="tokens of a language model"):
        DistilledStudent(
            torch.nn.Linear(1, 1), "sequence-classification", positions=Share("surprise", 0.5)
        )
    with pytest.raises(UsageError, match="expected teacher-entropy"):
        Share("entropy", 0.5)
