"""What is found out about a model before its first answer, and which way is then taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, byte_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.options import EvaluateOptions
from kdcache.errors import UsageError
from kdcache.rows import Row
from kdcache.tasks import CAUSAL_LM, SEQUENCE_CLASSIFICATION
from kdcache.teacher import TeacherOptions
from kdcache.teacher.model import TeacherModel
from kdcache.teacher.probe import distance, probe_rows

Change = Callable[[dict[str, Any], Tensor], Tensor]


def rows(*lengths: int) -> list[Row]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 300, n).astype(np.int32) for n in lengths]
    return [Row(one, np.roll(one, -1)) for one in ids]


@pytest.fixture
def changed(tiny_lm: Path) -> Callable[[Change], TeacherModel]:
    """A language model whose own forward does something to its logits."""

    def make(change: Change) -> TeacherModel:
        model = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
        forward = model.forward

        def other(**inputs: Any) -> Any:
            outputs = forward(**inputs)
            outputs.logits = change(inputs, outputs.logits)
            return outputs

        model.forward = other
        return TeacherModel(model, "tiny", TeacherOptions(("tiny",), "causal-lm"), 300)

    return make


@pytest.mark.parametrize(
    ("change", "direct", "batching"),
    [
        (lambda inputs, z: z, True, "padded"),
        (lambda inputs, z: z * 0.5, False, "padded"),
        # Soft-capping that the small logits of a random model hardly feel, and no name tells of.
        (lambda inputs, z: 1000 * torch.tanh(z / 1000), False, "padded"),
        (lambda inputs, z: 30 * torch.tanh(z / 30), False, "padded"),
        (
            lambda inputs, z: z + 0.01 * inputs["input_ids"].shape[1] * z.roll(1, -1),
            False,
            "equal lengths",
        ),
        (lambda inputs, z: z + 0.1 * len(z) * z.roll(1, -1), False, "one by one"),
    ],
)
@torch.inference_mode()
def test_the_fastest_right_way_is_taken(
    changed: Callable[[Change], TeacherModel], change: Change, direct: bool, batching: str
) -> None:
    one, some = changed(change), rows(40, 31, 31, 7)
    one.probe(some)
    assert (one.direct, one.batching) == (direct, batching)
    got = torch.cat([piece.logits for piece in one.slices(some)])
    want = [one.model(input_ids=torch.from_numpy(r.input_ids)[None].long()).logits[0] for r in some]
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("names", "change", "constants"),
    [
        ({"logit_scale": 0.5}, lambda z: z * 0.5, (0.5, None)),
        ({"logits_scaling": 8.0}, lambda z: z / 8, (0.125, None)),
        ({"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
         lambda z: 30 * torch.tanh(z / 30), (1.0, 30.0)),
        ({"logit_scale": 0.5, "final_logit_softcapping": 3.0},
         lambda z: 3 * torch.tanh(z / 6), (0.5, 3.0)),
        ({"logit_scale": 1.005}, lambda z: z * 1.005, (1.005, None)),
    ],
)  # fmt: skip
@torch.inference_mode()
def test_what_the_config_names_is_done_to_slices(
    changed: Callable[[Change], TeacherModel], monkeypatch: pytest.MonkeyPatch,
    names: dict[str, float], change: Callable[[Tensor], Tensor], constants: Any,
) -> None:  # fmt: skip
    one, some = changed(lambda _inputs, z: change(z)), rows(40, 31, 31, 7)
    for name, value in names.items():
        setattr(one.model.config, name, value)
    one.probe(some)
    assert (one.direct, one.batching) == (True, "padded")
    assert (one.scale, one.cap) == constants
    monkeypatch.setattr("kdcache.teacher.model.slice_positions", lambda *_: 10)
    pieces = [piece.logits for piece in one.slices(some)]
    assert len(pieces) == 11
    want = [one.model(input_ids=torch.from_numpy(r.input_ids)[None].long()).logits[0] for r in some]
    torch.testing.assert_close(torch.cat(pieces), torch.cat(want), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_what_no_way_cures_is_refused(changed: Callable[[Change], TeacherModel]) -> None:
    def later(inputs: dict[str, Any], z: Tensor) -> Tensor:
        return z + z.mean(1, keepdim=True)

    with pytest.raises(UsageError, match="tiny is not a causal language model.*later tokens"):
        changed(later).probe(rows(20, 9))
    with pytest.raises(UsageError, match="random at inference"):
        changed(lambda _inputs, z: z + torch.randn(len(z), 1, 300)).probe(rows(20, 9))


def test_broken_logits_are_left_to_the_codec(changed: Callable[[Change], TeacherModel]) -> None:
    with torch.inference_mode():
        changed(lambda _inputs, z: z * torch.nan).probe(rows(20, 9))


def test_rows_are_few_short_and_of_different_lengths() -> None:
    for lengths in ((400, 300, 5), (12, 12, 12), (2000,), (3, 9, 2, 7, 4)):
        some = probe_rows(rows(*lengths), per_token=True)
        sizes = [len(row.input_ids) for row in some]
        assert len(sizes) <= 5
        assert min(sizes) < max(sizes) <= 256
        assert sizes == [sizes[1], *sorted(sizes[1:], reverse=True)], "the longest comes twice"
        assert all(1 <= (row.labels >= 0).sum() <= 16 for row in some)


def test_distance_is_relative_and_ignores_what_is_not_finite() -> None:
    z = torch.randn(20, 50)
    assert distance([z], [z]) == 0
    assert distance([z + 0.1], [z]) == pytest.approx(
        distance([100 * (z + 0.1)], [100 * z]), rel=1e-5
    )
    broken = z.clone()
    broken[3] = torch.nan
    assert distance([z], [broken]) == 0
    assert distance([broken], [z]) == float("inf")


# -------------------------------------------------------------------- what is refused in one line


def save(model: Any, tokenizer: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def bert(**changes: Any) -> BertForSequenceClassification:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=300, num_attention_heads=2, **sizes, **changes)
    return BertForSequenceClassification(config)


def refused(teacher: Path, task: str, small_build: BuildOptions, match: str) -> None:
    from dataclasses import replace

    options = replace(small_build, teacher=(str(teacher),), task=task)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=match) as error:
        build(options)
    assert "\n" not in str(error.value)
    assert not Path(options.out).exists()
    with pytest.raises(UsageError, match=match.replace("teacher", "student")) as error:
        evaluate(EvaluateOptions(student=(str(teacher),), corpus=options.corpus, task=task))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_heads_that_are_no_distribution(
    tiny_tokenizer: Path, small_build: BuildOptions, tmp_path: Path
) -> None:
    several = bert(problem_type="multi_label_classification", num_labels=3)
    folder = save(several, tiny_tokenizer, tmp_path / "several")
    refused(folder, SEQUENCE_CLASSIFICATION, small_build, "^teacher .*for multi.label.cl")
    for number, changes in enumerate(
        ({"num_labels": 1}, {"num_labels": 2, "problem_type": "regression"})
    ):
        folder = save(bert(**changes), tiny_tokenizer, tmp_path / f"regression-{number}")
        refused(folder, SEQUENCE_CLASSIFICATION, small_build, "^teacher .*for regression")


@pytest.mark.slow
def test_encoder_decoders(tiny_tokenizer: Path, small_build: BuildOptions, tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=300, decoder_start_token_id=0, **sizes)
    folder = save(T5ForConditionalGeneration(config), tiny_tokenizer, tmp_path / "t5")
    match = "^teacher .*(t5, for which transformers has no model for|saved for seq2seq-lm)"
    refused(folder, CAUSAL_LM, small_build, match)


@pytest.mark.slow
def test_a_library_of_quantisation_that_is_missing(
    tiny_lm: Path, small_build: BuildOptions, tmp_path: Path
) -> None:
    import dataclasses
    import shutil

    folder = shutil.copytree(tiny_lm, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    options = dataclasses.replace(small_build, teacher=(str(folder),))
    with pytest.raises(UsageError, match="^teacher .*needs a library that is missing: ") as error:
        build(options)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------- the id that pads


@pytest.mark.slow
@pytest.mark.parametrize("in_config", [None, 7])
def test_a_decoder_that_classifies_reads_its_last_token(
    tmp_path: Path, corpus_texts: list[str], labelled_corpus: Path, in_config: int | None
) -> None:
    """The configuration's padding id wins; without one it is the tokenizer's."""
    import kdcache

    config = GPT2Config(
        vocab_size=300,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=128,
        pad_token_id=in_config,
        id2label=dict(enumerate(CLASSES)),
        initializer_range=0.5,
    )
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
    byte_tokenizer(corpus_texts).save_pretrained(tmp_path / "teacher")
    options = BuildOptions(
        teacher=(str(tmp_path / "teacher"),),
        corpus=(str(labelled_corpus),),
        out=str(tmp_path / "cache"),
        task=SEQUENCE_CLASSIFICATION,
        max_length=64,
        limit=20,
        workers=0,
    )
    build(options)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher").eval()
    dataset = kdcache.TargetDataset(options.out)
    assert len({len(dataset[i].input_ids) for i in range(20)}) > 5
    for data in (dataset[i] for i in range(20)):
        ids = torch.from_numpy(data.row(0).input_ids).long()[None]
        with torch.inference_mode():
            want = model(input_ids=ids).logits
        torch.testing.assert_close(data.targets.at(1.0).logits, want, rtol=1e-4, atol=1e-4)
