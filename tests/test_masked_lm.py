"""Masked language models through every command: a student of a cache learns what one beside its
teacher would, and the draw of the masks is part of the cache.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from promises import (
    Make,
    built,
    check_beside,
    check_codecs,
    check_evaluation,
    check_parts,
    check_refused,
    check_resume,
    check_run,
    check_shown,
    check_verify,
    labels_of,
    rows_of,
    with_telling_weights,
)
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
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.prepare import _SHARD_BYTES, _span_bytes
from kdcache.commands.options import EvaluateOptions, InspectOptions, PredictOptions
from kdcache.commands.train.options import TrainOptions
from kdcache.errors import UsageError
from kdcache.loss import distillation_loss
from kdcache.rows import Row, RowSpec
from kdcache.targets import Codec, DenseTargets
from kdcache.tasks import IGNORE
from kdcache.teacher.model import TeacherModel

pytestmark = pytest.mark.slow

WORDPIECE = Path(__file__).parent / "tiny_tokenizers" / "wordpiece"
SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def save(folder: Path, config: Any, auto: Any = AutoModelForMaskedLM, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = with_telling_weights(auto.from_config(config))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(WORDPIECE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("teacher"), BertConfig(**SIZES))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = BertConfig(**{**SIZES, "hidden_size": 16, "num_hidden_layers": 1})
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return save(tmp_path_factory.mktemp("student"), config, seed=7)


@pytest.fixture
def options(teacher: Path, text_corpus: Path, tmp_path: Path) -> Make:
    """A build of short rows in four shards."""

    def make(name: str = "cache", **more: Any) -> BuildOptions:
        given = {"codec": "dense", "max_length": 48, "workers": 0, "limit": 40, **more}
        return BuildOptions(
            teacher=(str(given.pop("teacher", teacher)),),
            corpus=(str(given.pop("corpus", text_corpus)),),
            out=str(tmp_path / name),
            task="masked-lm",
            shard_tokens=1024,
            **given,
        )

    return make


def own(model: Any, row: Row) -> torch.Tensor:
    """Logits of the masked places by the model's own forward on a row alone."""
    ids = torch.from_numpy(row.input_ids).long()[None]
    return model(input_ids=ids).logits[0][torch.from_numpy(row.labels != IGNORE)]


@pytest.mark.parametrize("share", [0.1, 0.2, None])
def test_a_shard_fills_its_memory_with_the_positions_that_it_has(
    options: Make, share: float | None
) -> None:
    """Those of masked tokens, or of a causal model all."""
    codec = Codec.parse("dense", (1.0,), 30_000)
    rows = RowSpec(task="causal-lm" if share is None else "masked-lm", mask_share=share)
    build = dataclasses.replace(options(), task=rows.task, shard_tokens=None)
    size = _span_bytes(build, codec, rows, 0.0, 1 << 30)
    positions = size / 4 * (share or 1.0)
    assert positions * codec.bytes_per_position == pytest.approx(_SHARD_BYTES, rel=0.01)


@pytest.mark.parametrize("packing", ["concat", "none", "split"])
def test_the_teacher_reads_the_masked_row_whole(options: Make, teacher: Path, packing: str) -> None:
    cache = built(options(packing=packing))
    assert cache.spec.spans > 1
    model = AutoModelForMaskedLM.from_pretrained(teacher).eval()
    nats = 0.0
    for row, targets in rows_of(cache):
        assert (row.labels != IGNORE).any()
        with torch.inference_mode():
            want = own(model, row)
        torch.testing.assert_close(targets.at(1.0).logits, want, rtol=1e-5, atol=1e-4)
        logprobs = want.log_softmax(-1).gather(-1, labels_of([row])[:, None])
        nats -= float(logprobs.sum())
    kept = kdcache.inspect(InspectOptions(cache.url)).teacher_cross_entropy
    assert kept == pytest.approx(nats / cache.manifest.positions, rel=2e-3)


def test_a_student_learns_what_it_would_beside_its_teacher(
    options: Make, teacher: Path, student: Path
) -> None:
    check_beside(built(options(packing="none")), teacher, student, own)


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
def test_logits_are_made_at_the_masked_places_alone(
    options: Make, tmp_path: Path, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of teacher and student the output layer never answers for a whole batch."""
    folder = save(tmp_path / "model", HEADS[head])
    cache = built(options(packing="none", teacher=folder))
    rows = [row for row, _ in rows_of(cache)][:8]
    one = TeacherModel(
        AutoModelForMaskedLM.from_pretrained(folder).eval(), "t", task="masked-lm", vocab_size=259
    )
    with torch.inference_mode():
        one.probe(rows)
        assert one.direct
        made = columns_made(one.model)
        got = torch.cat([piece.logits for piece in one.slices(rows)])
        assert made == [8 * max(len(row.input_ids) for row in rows), 259 * len(got)] or (
            head == "padded" and made[1] == 264 * len(got)
        )
        want = torch.cat([own(one.model, row) for row in rows])[:, :259]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    distilled = kdcache.DistilledStudent(model, "masked-lm", vocab_size=259).eval()
    dataset = kdcache.TargetDataset([cache])
    batch = kdcache.Collator(pad_id=0, temperature=1.0)([dataset[i] for i in range(8)])
    distilled(**batch)  # measures what the logits are made of
    made = columns_made(model)
    loss = distilled(**batch).loss.detach()
    assert made == [batch["labels"].numel()], "one column stands for the logits of all places"
    reference = distillation_loss(want, labels_of(rows), DenseTargets(want, 1.0), alpha=0.5)
    assert float(loss) == pytest.approx(float(reference.total), rel=1e-4, abs=1e-5)


def test_hidden_states_and_every_other_codec_give_the_same_distribution(options: Make) -> None:
    check_codecs(options)


def test_parts_in_any_order_and_a_resumed_build_give_the_same_bytes(options: Make) -> None:
    check_parts(options, batch_tokens=100)
    with pytest.raises(UsageError, match=r"rows\.mask_seed: null -> 1"):
        kdcache.build(options("whole", codec="sample:5", mask_seed=1))


@pytest.mark.exhaustive
@pytest.mark.end_to_end
def test_two_workers_make_the_bytes_of_one(options: Make, ray: None) -> None:
    one = built(options("one", codec="sample:5", mask_unit="word"))
    two = built(options("two", codec="sample:5", mask_unit="word", workers=2))
    assert one.digest == two.digest


def test_cached_targets_are_found_to_be_the_teachers(options: Make, student: Path) -> None:
    check_verify(options, student)


def test_a_training_resumes_to_the_bit(options: Make, student: Path, tmp_path: Path) -> None:
    check_resume(built(options(codec="sample:5")), student, tmp_path)


def test_evaluation_has_the_figures_of_the_masked_places(
    options: Make, teacher: Path, student: Path, text_corpus: Path
) -> None:
    masks = {"mask_seed": 3, "mask_share": 0.3}
    # A corpus is one span here and four in the cache, so its masks are others.
    check_evaluation(
        built(options(**masks)), (teacher, student), text_corpus, own, off=0.3, limit=40,
        max_length=48, **masks,
    )  # fmt: skip


def test_rows_are_shown_exported_and_planned(
    options: Make, teacher: Path, text_corpus: Path, tmp_path: Path
) -> None:
    cache = built(options(codec="topk:4"))
    view, first, page = check_shown(cache, teacher, text_corpus, tmp_path)
    assert "pseudo-perplexity" in page
    (row, _), *_ = rows_of(cache)
    places = np.flatnonzero(row.labels != IGNORE)
    tokens = cache.tokenizer().convert_ids_to_tokens(row.input_ids.tolist())
    assert "[MASK]" in tokens
    assert [(p.place, p.token) for p in view.positions] == [(n, tokens[n]) for n in places.tolist()]
    assert np.flatnonzero([bool(p) for p in first["target_probs"]]).tolist() == places.tolist()


def test_a_run_is_a_model_of_transformers(options: Make, tmp_path: Path) -> None:
    sizes = {**SIZES, "hidden_size": 16, "num_hidden_layers": 1}
    config = {"model_type": "bert", **sizes}
    saved = check_run(options(codec="sample:5"), config, tmp_path, "fill-mask")
    assert type(saved).__name__ == "BertForMaskedLM"


def test_wrong_models_are_refused_in_one_line(
    options: Make, teacher: Path, student: Path, text_corpus: Path, tmp_path: Path
) -> None:
    gpt2 = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    causal = save(tmp_path / "gpt2", gpt2, AutoModelForCausalLM)
    decoder = save(tmp_path / "decoder", BertConfig(**SIZES, is_decoder=True))
    maskless = save(tmp_path / "maskless", BertConfig(**SIZES))
    tokenizer = AutoTokenizer.from_pretrained(WORDPIECE)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(maskless)
    specials = tmp_path / "specials.jsonl"
    specials.write_text('{"text": "[SEP] [MASK]"}\n{"text": ""}\n')
    cache = built(options())
    encoder = AutoConfig.from_pretrained(student).to_dict()
    llama = tmp_path / "llama.json"
    llama.write_text(json.dumps({"model_type": "llama", "hidden_size": 32}))
    reads = tmp_path / "reads.json"
    reads.write_text(json.dumps({**encoder, "is_decoder": True}))

    def train(name: Any, **more: Any) -> None:
        kdcache.train(
            TrainOptions(
                cache=(cache.url,), student=str(name), out=str(tmp_path / "run"), max_steps=1,
                report_to="none", **more,
            )
        )  # fmt: skip

    def build(name: str, **more: Any) -> None:
        kdcache.build(options(name, **more))

    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: build("a", teacher=causal), "no model for masked-lm"),
        (lambda: build("b", teacher=decoder), "is not a masked language model"),
        (lambda: build("c", teacher=maskless), "the tokenizer has no mask token"),
        (lambda: build("d", corpus=specials), "the corpus has no usable row (2 records skipped)"),
        (lambda: build("e", record_form="messages"), "masked language model reads texts"),
        (lambda: build("f", max_length=100), "reads at most 66 tokens"),
        (lambda: build("g", engine="vllm"), "not with --task masked-lm"),
        (
            lambda: kdcache.build(dataclasses.replace(options("h"), task="causal-lm")),
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
                PredictOptions(student=str(student), corpus=(str(text_corpus),))
            ),
            "is a masked language model; predict is for classifiers",
        ),
        (
            lambda: kdcache.evaluate(EvaluateOptions(student=(str(causal),), cache=cache.url)),
            "was saved for causal-lm, but masked-lm is asked for",
        ),
    ]
    check_refused(cases)
