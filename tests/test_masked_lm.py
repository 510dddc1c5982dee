"""What only masked language models have: rows that the teacher reads whole, and logits at masked
places alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from task_examples import Desk, built, check_refused, make_desk, rows_of, targets_of
from task_examples import save as save_model
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    ModernBertConfig,
    RobertaConfig,
)

import kdcache
from kdcache.commands.build.prepare import _SHARD_BYTES, _span_bytes
from kdcache.commands.options import EvaluateOptions, InspectOptions, PredictOptions
from kdcache.loss import distillation_loss
from kdcache.rows import RowSpec
from kdcache.targets import Codec, DenseTargets
from kdcache.tasks import IGNORE
from kdcache.teacher import TeacherOptions
from kdcache.teacher.model import TeacherModel

pytestmark = pytest.mark.slow

WORDPIECE = Path(__file__).parent / "tiny_tokenizers" / "wordpiece"
SIZES: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 66, "initializer_range": 0.3,
    "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def desk(corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return make_desk("masked-lm", corpus_texts, tmp_path_factory.mktemp("masked"))


def save(folder: Path, config: Any, auto: Any = AutoModelForMaskedLM) -> Path:
    return save_model(folder, config, auto, "wordpiece")


@pytest.mark.parametrize("share", [0.1, 0.2, None])
def test_a_shard_fills_its_memory_with_the_positions_that_it_has(
    desk: Desk, share: float | None
) -> None:
    """Those of masked tokens, or of a causal model all."""
    codec = Codec.parse("dense", (1.0,), 30_000)
    rows = RowSpec(task="causal-lm" if share is None else "masked-lm", mask_share=share)
    build = dataclasses.replace(desk.options("c"), task=rows.task, shard_tokens=None)
    size = _span_bytes(build, codec, rows, 0.0, 1 << 30)
    positions = size / 4 * (share or 1.0)
    assert positions * codec.bytes_per_position == pytest.approx(_SHARD_BYTES, rel=0.01)


@pytest.mark.parametrize("packing", ["concat", "split"])
def test_the_teacher_reads_the_masked_row_whole(desk: Desk, packing: str) -> None:
    cache = desk.cache(packing=packing, mask_seed=0)  # that of the build
    assert cache.spec.spans > 1
    rows = rows_of(cache)
    assert all((row.labels != IGNORE).any() for row in rows)
    want = desk.answers(desk / "teacher", rows)
    torch.testing.assert_close(targets_of(cache).double(), want, rtol=1e-5, atol=1e-4)
    nats = functional.cross_entropy(want, desk.labels(rows).long())
    found = kdcache.inspect(InspectOptions(cache.url))
    assert found.teacher_cross_entropy == pytest.approx(float(nats), rel=5e-3)
    # The numbers that chose a position do not round its entropy, which would then be too large.
    entropies = torch.special.entr(want.softmax(-1)).sum(-1)
    step = float(entropies.sqrt().mean()) / 32
    assert found.teacher_entropy is not None
    off = found.teacher_entropy - float(entropies.mean())
    assert abs(off) < 4 * step / 2 / len(entropies) ** 0.5


def columns_made(model: Any) -> list[int]:
    """Numbers that the output layer returns from now on, a call."""
    made: list[int] = []
    layer = model.get_output_embeddings()
    layer.register_forward_hook(lambda _module, _inputs, out: made.append(out.numel()))
    return made


HEADS = {
    "bert": BertConfig(**SIZES),
    "untied": BertConfig(**SIZES, tie_word_embeddings=False),
    "padded": BertConfig(**{**SIZES, "vocab_size": 264}),
    "roberta": RobertaConfig(**{**SIZES, "pad_token_id": 0}),
    "distilbert": DistilBertConfig(
        vocab_size=259, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=66,
        initializer_range=0.3,
    ),
    "modernbert": ModernBertConfig(
        **SIZES, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_logits_are_made_at_the_masked_places_alone(desk: Desk, tmp_path: Path, head: str) -> None:
    """Of teacher and student the output layer never answers for a whole batch."""
    folder = save(tmp_path / "model", HEADS[head])
    cache = built(desk.options(tmp_path / "cache", teacher=(str(folder),)))
    rows = rows_of(cache)[:8]
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    one = TeacherModel(model, "t", TeacherOptions(("t",), "masked-lm"), 259)
    with torch.inference_mode():
        one.probe(rows)
        assert one.direct
        made = columns_made(one.model)
        got = torch.cat([piece.logits for piece in one.slices(rows)])
        assert made == [8 * max(len(row.input_ids) for row in rows), 259 * len(got)] or (
            head == "padded" and made[1] == 264 * len(got)
        )
        want = torch.cat([desk.own(one.model, row) for row in rows])[:, :259]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    distilled = kdcache.DistilledStudent(model, "masked-lm", vocab_size=259).eval()
    dataset = kdcache.TargetDataset([cache])
    batch = kdcache.Collator(pad_id=0, temperature=1.0)([dataset[i] for i in range(8)])
    distilled(**batch)  # measures what the logits are made of
    made = columns_made(model)
    loss = distilled(**batch).loss.detach()
    assert made == [batch["labels"].numel()], "one column stands for the logits of all places"
    reference = distillation_loss(
        want, desk.labels(rows).long(), DenseTargets(want, 1.0), alpha=0.5
    )
    assert float(loss) == pytest.approx(float(reference.total), rel=1e-4, abs=1e-5)


def test_wrong_models_are_refused_in_one_line(desk: Desk, tmp_path: Path) -> None:
    gpt2 = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    causal = save(tmp_path / "gpt2", gpt2, AutoModelForCausalLM)
    decoder = save(tmp_path / "decoder", BertConfig(**SIZES, is_decoder=True))
    maskless = save(tmp_path / "maskless", BertConfig(**SIZES))
    tokenizer = AutoTokenizer.from_pretrained(WORDPIECE)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(maskless)
    specials = tmp_path / "specials.jsonl"
    specials.write_text('{"text": "[SEP] [MASK]"}\n{"text": ""}\n')
    cache, student, build_options = desk.cache(), desk / "student", desk.options("h")
    encoder = AutoConfig.from_pretrained(student).to_dict()
    llama = tmp_path / "llama.json"
    llama.write_text(json.dumps({"model_type": "llama", "hidden_size": 32}))
    reads = tmp_path / "reads.json"
    reads.write_text(json.dumps({**encoder, "is_decoder": True}))

    def train(name: Any, **more: Any) -> None:
        desk.try_training(name, tmp_path / "run", **more)

    def build(name: str, **more: Any) -> None:
        desk.try_build(tmp_path / name, **more)

    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: build("a", teacher=causal), "no model for masked-lm"),
        (lambda: build("b", teacher=decoder), "is not a masked language model"),
        (lambda: build("c", teacher=maskless), "the tokenizer has no mask token"),
        (lambda: build("d", corpus=specials), "the corpus has no usable row (2 records skipped)"),
        (lambda: build("e", record_form="messages"), "masked language model reads texts"),
        (lambda: build("f", max_length=100), "reads at most 66 tokens"),
        (lambda: build("g", engine="vllm"), "not with --task masked-lm"),
        (
            lambda: kdcache.build(dataclasses.replace(build_options, task="causal-lm")),
            "is not a causal language model",
        ),
        (lambda: train(llama), "not a masked-lm architecture"),
        (lambda: train(reads), "is not a masked language model"),
        (lambda: train("bilstm"), "bilstm is a classifier; for masked-lm give"),
        (
            lambda: train(student, cross_tokenizer="likelihood"),
            "--cross-tokenizer is for causal language models. The masks",
        ),
        (lambda: train(student, lora="r=4"), "--lora is for causal-lm, "),
        (
            lambda: kdcache.predict(
                PredictOptions(student=str(student), corpus=(desk / "corpus.jsonl",))
            ),
            "is a masked language model; predict is for classifiers",
        ),
        (
            lambda: kdcache.evaluate(EvaluateOptions(student=(str(causal),), cache=cache.url)),
            "was saved for causal-lm, but masked-lm is asked for",
        ),
    ]
    check_refused(cases)
