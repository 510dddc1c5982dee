"""Students that read padding or later tokens are refused; the others train without a mask."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import make_caches
import pytest
import torch
from small_runs import USUAL
from test_projection import Around, PromptTuned, llama
from test_student import causal_batch, causal_model
from torch import Tensor
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    FNetConfig,
    FNetForSequenceClassification,
)

from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.student import trial_batch
from kdcache.commands.train.train import train
from kdcache.errors import UsageError
from kdcache.rows import Row
from kdcache.stream.batch import CachedIds
from kdcache.student import DistilledStudent
from kdcache.student.padding import check_rows, without_mask
from kdcache.student.stream_loader import Copies
from kdcache.student.trainer import DistillationTrainer


class LengthScaled(Around):
    """Its logits depend on the length of a row, which only the mask knows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        mask = kwargs.get("attention_mask", torch.ones_like(kwargs["input_ids"]))
        output["logits"] = output["logits"] * mask.sum(-1)[:, None, None]
        return output


class ReadsPadding(Around):
    """Its logits depend on how far the rows of a batch are padded."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        output["logits"] = output["logits"] * kwargs["input_ids"].shape[1]
        return output


class MovesByRounding(Around):
    """Its logits depend on the batch's length as far as products in 16 bits do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        moved = 0.01 * kwargs["input_ids"].shape[1] * torch.is_autocast_enabled("cpu")
        output["logits"] = output["logits"] * (1 + moved)
        return output


def rows(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 40, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": ids * mask - 100 * (1 - mask),
    }


STUDENTS: dict[str, tuple[Callable[[], Any], bool]] = {
    "llama": (llama, False),
    "its position from the mask": (
        lambda: causal_model(
            "opt", ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=512
        ),
        False,
    ),
    "a bias made of the mask": (lambda: causal_model("bloom", n_head=2), False),
    "a recurrence": (lambda: causal_model("mamba", state_size=4), False),
    "the length of the row": (lambda: LengthScaled(llama()), True),
    "fails without one": (lambda: PromptTuned(llama()), True),
}


@pytest.mark.parametrize("lengths", [(12, 7, 3), (12, 12, 12), (300, 290, 280)])
@pytest.mark.parametrize("name", STUDENTS)
def test_a_mask_is_needed_where_logits_depend_on_it(name: str, lengths: tuple[int, ...]) -> None:
    make, needed = STUDENTS[name]
    model = make()
    student = DistilledStudent(model, "causal-lm").train()
    check_rows("it", student, rows(lengths))
    assert student.needs_mask == needed
    assert model.training


def test_one_row_shows_nothing() -> None:
    student = DistilledStudent(llama(), "causal-lm")
    check_rows("it", student, rows((12,)))
    assert student.needs_mask


@pytest.mark.parametrize("lengths", [(12, 7, 3), (12, 12, 12), (300, 290, 280)])
def test_a_language_model_that_padding_disturbs_is_refused(lengths: tuple[int, ...]) -> None:
    student = DistilledStudent(ReadsPadding(llama()), "causal-lm")
    with pytest.raises(UsageError, match="other logits where its batch is padded"):
        check_rows("it", student, rows(lengths))


def test_texts_cut_to_one_length_are_tried_beside_a_shorter_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_caches.make_rows

    def even(task: str, numbers: Any, *sizes: int) -> list[Row]:
        found = (row for row in made(task, range(400), *sizes) if len(row.input_ids) == 6)
        return list(islice(found, len(numbers)))

    monkeypatch.setattr(make_caches, "make_rows", even)
    cache = make_caches.make_cache(tmp_path, [5])
    batch = trial_batch(SimpleNamespace(caches=[cache]), CachedIds(0))  # type: ignore[arg-type]
    assert batch["attention_mask"].sum(-1).tolist() == [6, 6, 3]
    ids = cache.read(0).row(4).input_ids.tolist()
    assert batch["input_ids"][-1].tolist() == [*ids[:2], ids[-1], 0, 0, 0]
    sizes = {"vocab_size": 80, "hidden_size": 16, "num_labels": 3, "initializer_range": 0.3}
    mixing = FNetConfig(
        **sizes, num_hidden_layers=1, intermediate_size=16, max_position_embeddings=16
    )
    masking = BertConfig(**sizes, num_hidden_layers=1, intermediate_size=16, num_attention_heads=2)
    task = "sequence-classification"
    check_rows("it", DistilledStudent(BertForSequenceClassification(masking), task), batch)
    with pytest.raises(UsageError, match="its batch is padded"):
        check_rows("it", DistilledStudent(FNetForSequenceClassification(mixing), task), batch)


def test_loss_and_gradients_are_the_same_without_a_mask() -> None:
    model = llama()
    batch = causal_batch()
    found = []
    for needed in (True, False):
        student = DistilledStudent(model, "causal-lm", alpha=0.3)
        student.needs_mask = needed
        given = without_mask(student, batch)
        assert ("attention_mask" in given) == needed
        loss = student(**given).loss
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_the_trainer_leaves_out_a_mask_of_right_padded_rows_alone() -> None:
    student = DistilledStudent(llama(), "causal-lm")
    trainer = mock.Mock(model=student, _copies=Copies(torch.device("cpu")))
    trainer.args.device = torch.device("cpu")
    right = torch.tensor([[1, 1, 1], [1, 0, 0]])

    def masked(mask: Tensor) -> bool:
        batch = {"input_ids": mask, "attention_mask": mask}
        return "attention_mask" in DistillationTrainer._prepare_inputs(trainer, batch)

    assert masked(right)
    student.needs_mask = False
    assert not masked(right)
    assert not masked(torch.ones(2, 3).long())
    assert masked(right.flip(1))
    assert masked(torch.tensor([[1, 0, 1]]))
    assert masked(right[:, None])


def test_a_row_that_a_student_cannot_read_is_one_line() -> None:
    """A BART classifies by the end-of-sequence token, which not every tokenizer adds."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40}
    model = BartForSequenceClassification(BartConfig(**sizes, eos_token_id=2, num_labels=2))
    batch = {**rows((5, 3)), "labels": torch.tensor([0, 1])}
    with pytest.raises(UsageError, match=r"student it cannot read a row of the cache: .*<eos>"):
        check_rows("it", DistilledStudent(model, "sequence-classification"), batch)


# Gradients

GEMMA = {
    "model_type": "gemma3n_text", "vocab_size_per_layer_input": 80, "hidden_size": 16,
    "hidden_size_per_layer_input": 8, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
    "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0],
}  # fmt: skip


@pytest.mark.slow
def test_a_student_whose_gradients_are_not_finite_is_refused(tmp_path: Path) -> None:
    make_caches.make_cache(tmp_path / "causal", [14], task=make_caches.CAUSAL, codec="topk:6")
    (tmp_path / "gemma.json").write_text(json.dumps(GEMMA))
    options = USUAL | {"cache": str(tmp_path / "causal"), "student": str(tmp_path / "gemma.json")}
    with pytest.raises(UsageError, match="cannot be trained: .* its gradient of .* is not"):
        train(TrainOptions(**options, out=str(tmp_path / "run"), max_steps=1))
    with pytest.raises(UsageError, match="diverged at step 1 .*gradient of .* is not finite"):
        train(TrainOptions(**{**options, "batch_size": 1}, out=str(tmp_path / "run"), max_steps=1))
    assert not (tmp_path / "run" / "model.safetensors").exists()


class LearnsFromPadding(Around):
    """Its logits are its model's, and their gradient that of all tokens of its batch."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        factor = 1 + 0.1 * (kwargs["input_ids"].shape[1] - 3)
        scaled = output["logits"] * factor
        output["logits"] = scaled + (output["logits"] - scaled).detach()
        return output


class RootOfPadding(Around):
    """Its gradient is not finite at padding: zero times that of a root at 0."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        left = output["logits"] * kwargs["attention_mask"][..., None]
        output["logits"] = output["logits"] + 0 * left.square().sum(-1, keepdim=True) ** 0.5
        return output


@pytest.mark.parametrize(
    ("kind", "said"),
    [(LearnsFromPadding, "moves by .* of its size"), (RootOfPadding, "is not finite. Use --batch")],
)
def test_gradients_that_padding_moves_are_refused_by_their_parameter(kind: Any, said: str) -> None:
    student = DistilledStudent(kind(llama()), "causal-lm")
    with pytest.raises(UsageError, match=rf"where its batch is padded: that of \S+ {said}"):
        check_rows("it", student, rows((12, 7, 3)))
    check_rows("it", student, rows((12, 7, 3)), trains=False)


def test_a_check_of_gradients_leaves_none_behind() -> None:
    student = DistilledStudent(llama(), "causal-lm").train()
    next(student.parameters()).requires_grad_(False)
    check_rows("it", student, rows((12, 7, 3)))
    assert all(parameter.grad is None for parameter in student.parameters())


# A loop of one's own


def classifier(kind: Any, config: Any, **sizes: int) -> DistilledStudent:
    torch.manual_seed(0)
    shared = {"vocab_size": 80, "hidden_size": 16, "num_labels": 3, "initializer_range": 0.3}
    model = kind(config(**shared, num_hidden_layers=1, intermediate_size=16, **sizes))
    return DistilledStudent(model, "sequence-classification").train()


@pytest.mark.parametrize("lengths", [(12, 7), (12, 12), (12, 12, 12, 5)])
def test_a_student_of_ones_own_loop_is_tried_at_its_first_batch(lengths: tuple[int, ...]) -> None:
    """Whether that batch is padded or not: a later one will be."""
    batch = {**rows(lengths), "labels": torch.arange(len(lengths)) % 3}
    good = classifier(BertForSequenceClassification, BertConfig, num_attention_heads=2)
    bad = classifier(FNetForSequenceClassification, FNetConfig, max_position_embeddings=16)
    loss = good(**batch).loss
    good.checks_padding = True
    with torch.random.fork_rng():
        torch.manual_seed(5)
        before = good(**batch).loss
        torch.manual_seed(5)
        assert torch.equal(good(**batch).loss, before), "the check draws no random numbers"
    assert loss.requires_grad
    assert not good.checks_padding
    assert good.needs_mask
    with pytest.raises(UsageError, match="FNetForSequenceClassification gives other logits"):
        bad(**batch)
    bad.checks_padding = False
    assert bad(**batch).loss.isfinite()


def test_a_row_alone_is_not_tried_and_later_batches_cost_nothing() -> None:
    student = DistilledStudent(ReadsPadding(llama()), "causal-lm")
    student(**rows((12,)))
    assert student.checks_padding
    with pytest.raises(UsageError, match="other logits where its batch is padded"):
        student(**rows((12, 12)))
    good = DistilledStudent(llama(), "causal-lm")
    good(**rows((12, 5)))
    with mock.patch("kdcache.student.padding.check_first", side_effect=AssertionError):
        good(**rows((12, 5)))


def test_rounding_is_no_padding() -> None:
    batch = rows((12, 7, 3))
    student = DistilledStudent(llama(), "causal-lm")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert student(**batch).loss.isfinite()
    student = DistilledStudent(llama().to(torch.bfloat16), "causal-lm")
    assert student(**batch).loss.isfinite()
    assert not student.checks_padding
    student = DistilledStudent(MovesByRounding(llama()), "causal-lm")
    forward = torch.autocast("cpu", dtype=torch.bfloat16)(student.forward)
    with mock.patch.object(student, "forward", forward):  # as accelerate wraps it
        assert student(**batch).loss.isfinite()
    assert not student.checks_padding


def test_a_compiled_student_is_tried_too() -> None:
    bad = classifier(FNetForSequenceClassification, FNetConfig, max_position_embeddings=16)
    batch = {**rows((12, 7)), "labels": torch.tensor([0, 1])}
    with pytest.raises(UsageError, match="other logits where its batch is padded"):
        torch.compile(bad, backend="eager")(**batch)
