"""Documents that share a row and do not attend to each other: each is what it is alone, for teacher
and student, in evaluation and in a shard.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo import CAUSAL, Species, forms

import kdcache
from kdcache.cache.shard import ShardData, column_bytes, read_shard, write_shard
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.options import EvaluateOptions, PlanOptions, TranscodeOptions, VerifyOptions
from kdcache.commands.plan.plan import plan
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.commands.transcode import transcode
from kdcache.commands.verify import verify
from kdcache.corpus import Record
from kdcache.errors import CorruptCacheError, UsageError
from kdcache.loss import distillation_loss
from kdcache.rows import Row, RowSpec, make_encoder
from kdcache.rows.batches import documents_of, runs
from kdcache.stream.batch import collate
from kdcache.student.padding import in_one_row
from kdcache.student.wrapper import DistilledStudent
from kdcache.targets import Codec, DenseTargets, SoftTargets
from kdcache.tasks import CAUSAL_LM, IGNORE

WORDS = st.text("abc xyz.\né", max_size=60)
TOKENIZERS = Path(__file__).resolve().parent / "tiny_tokenizers"
FAKE = Path(__file__).parent / "fake_vllm"


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def llama(request: pytest.FixtureRequest) -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZERS / request.param)


def encode(tokenizer: Any, texts: list[str], length: int, **options: Any) -> list[Row]:
    spec = RowSpec(CAUSAL_LM, max_length=length, **options)
    records = [Record({"text": text}, "data.jsonl", f"line {i}") for i, text in enumerate(texts)]
    return list(make_encoder(spec, tokenizer).encode(records))


# ------------------------------------------------------------------------------------------- rows


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(WORDS, max_size=12), length=st.integers(2, 40))
def test_each_token_of_a_document_but_the_first_is_predicted_once(
    llama: Any, texts: list[str], length: int
) -> None:
    rows = encode(llama, texts, length, attend="document")
    whole = [[*llama(text)["input_ids"], llama.eos_token_id] for text in texts if text.strip()]
    learnt = [label for row in rows for label in row.labels.tolist() if label != IGNORE]
    assert learnt == [token for tokens in whole for token in tokens[1:]]
    for row in rows:
        assert row.starts is not None
        assert row.starts[0]
        assert row.labels[-1] != IGNORE
        # A document's last token predicts nothing of the next one.
        assert (row.labels[:-1][row.starts[1:]] == IGNORE).all()
        parts = row.documents()
        assert np.array_equal(np.concatenate([p.input_ids for p in parts]), row.input_ids)
        assert np.array_equal(np.concatenate([p.labels for p in parts]), row.labels)
        assert all(part.starts is None for part in parts)
    # Documents begin where they do in a row that is not divided.
    begins = {0, *np.cumsum([len(tokens) for tokens in whole]).tolist()}
    for number, row in enumerate(rows):
        if all(len(r.input_ids) == length for r in rows[:number]):
            (found,) = np.nonzero(row.starts)
            assert {number * length + i for i in found.tolist()[1:]} <= begins


def test_the_pieces_of_one_document_are_one_document(llama: Any) -> None:
    """A text file longer than a span comes in pieces; nothing attends across spans anyway."""
    spec = RowSpec(CAUSAL_LM, max_length=64, attend="document")
    pieces = [
        Record({"text": "abc"}, "a.txt", "0", opens=True, closes=False),
        Record({"text": "xyz"}, "a.txt", "3", opens=False, closes=True),
        Record({"text": "new"}, "b.txt", "0"),
    ]
    (row,) = make_encoder(spec, llama).encode(pieces)
    assert row.starts is not None
    assert row.starts.sum() == 2


def test_what_shares_no_row_is_not_divided(tmp_path: Path) -> None:
    for options in ({"packing": "none"}, {"packing": "split"}):
        with pytest.raises(UsageError, match="attend is 'document', which is for packing 'concat'"):
            RowSpec(CAUSAL_LM, attend="document", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="attend is 'document'"):
        RowSpec("sequence-classification", attend="document")
    with pytest.raises(UsageError, match="attend is 'both', expected one of row, document"):
        RowSpec(CAUSAL_LM, attend="both")  # type: ignore[arg-type]


def test_specs_of_rows_that_are_not_divided_stay_what_they_were() -> None:
    assert "attend" not in RowSpec(CAUSAL_LM).to_dict()
    assert RowSpec(CAUSAL_LM, attend="document").to_dict()["attend"] == "document"


@given(lengths=st.lists(st.integers(1, 30), max_size=20), budget=st.integers(1, 90))
def test_runs_keep_the_order_and_the_budget(lengths: list[int], budget: int) -> None:
    found = [lengths[some] for some in runs(lengths, budget)]
    assert [n for some in found for n in some] == lengths
    assert all(len(some) == 1 or len(some) * max(some) <= budget for some in found)


# ------------------------------------------------------------------------------------------ shards


def divided(lengths: list[list[int]], vocabulary: int = 40) -> ShardData:
    """Rows of random documents of these lengths, with dense targets."""
    rng = np.random.default_rng(0)
    rows = []
    for sizes in lengths:
        ids = rng.integers(2, vocabulary, sum(sizes) + 1).astype(np.int32)
        starts = np.zeros(sum(sizes), np.bool_)
        starts[np.cumsum([0, *sizes[:-1]])] = True
        labels = ids[1:].copy()
        labels[:-1][starts[1:]] = IGNORE
        rows.append(Row(ids[:-1], labels, starts=starts))
    n = sum(int((row.labels != IGNORE).sum()) for row in rows)
    codec = Codec.parse("dense", (1.0,), vocabulary)
    logits = (3 * rng.standard_normal((n, vocabulary))).astype(np.float32)
    return ShardData.from_rows(CAUSAL_LM, rows, SoftTargets(codec, {"logits": logits}, None))


def test_a_shard_keeps_them_in_few_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sizes = [[1, 3], *(rng.integers(5, 40, 40).tolist() for _ in range(40))]
    data = divided(sizes)
    write_shard(tmp_path / "shard.h5", data, attributes={})
    again = read_shard(tmp_path / "shard.h5", data.targets.codec, kept={"starts"})
    assert again.starts is not None
    assert data.starts is not None
    assert np.array_equal(again.starts, data.starts)
    assert again.row(0).starts.tolist() == [True, True, False, False]  # type: ignore[union-attr]
    stored = column_bytes(tmp_path / "shard.h5")
    # Documents of 22 tokens, far shorter than most: their entropy is 0.034 B a token.
    assert stored["rows/starts"] / len(data.input_ids) < 0.1
    with pytest.raises(CorruptCacheError, match="rows has the columns"):
        read_shard(tmp_path / "shard.h5", data.targets.codec)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda flags: np.where(np.arange(len(flags)) == 0, 0, flags), "first token of each row"),
        (lambda flags: flags * 2, "first token of each row"),
        (lambda flags: np.where(np.arange(len(flags)) == 1, 1, flags), "a label of the next one"),
        (lambda flags: flags[:-1], "shape"),
    ],
)
def test_a_shard_whose_documents_cannot_be_is_refused(
    tmp_path: Path, spoil: Any, message: str
) -> None:
    data = divided([[3, 4], [5]])
    path = tmp_path / "shard.h5"
    write_shard(path, data, attributes={})
    with h5py.File(path, "r+") as file:
        flags = spoil(file["rows/starts"][...]).astype(np.uint8)
        del file["rows/starts"]
        file["rows"].create_dataset(
            "starts", data=flags, chunks=flags.shape, shuffle=True, compression=4, fletcher32=True
        )
    with pytest.raises(CorruptCacheError, match=message):
        read_shard(path, data.targets.codec, kept={"starts"})


def test_a_batch_has_positions_that_begin_again_and_no_mask() -> None:
    batch = collate(divided([[3, 2], [1, 1]]), pad_id=0, temperature=1.0)
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 1, 2]]


# ---------------------------------------------------------------------------------------- students


def alone(model: Any, data: ShardData | list[Row]) -> Tensor:
    """Logits of all positions by the model's own forward on each document alone."""
    rows = [data.row(i) for i in range(len(data))] if isinstance(data, ShardData) else data
    parts = []
    for one in documents_of(rows):
        ids = torch.from_numpy(one.input_ids).long()[None]
        at = torch.from_numpy(one.labels != IGNORE)
        # RWKV can be differentiated only so.
        parts.append(model(input_ids=ids, use_cache=False).logits[0, at])
    return torch.cat(parts)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.filterwarnings("default")  # architectures have warnings of their own
@pytest.mark.parametrize("species", forms(CAUSAL, CAUSAL_LM))
def test_a_student_keeps_documents_apart_or_is_refused(species: Species) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(species.config()).eval()
    data = divided([[13, 1, 20], [9, 12]], vocabulary=300)
    batch = collate(data, pad_id=1, temperature=None)
    at = batch["labels"] != IGNORE
    want = alone(model, data)
    student = DistilledStudent(model, CAUSAL_LM, vocab_size=300).eval()
    refusal = ""
    try:
        found = student(return_logits=True, **batch).logits
    except UsageError as error:
        refusal = str(error)
    if "takes no position_ids" in refusal:
        return
    if refusal:
        assert "read each other" in refusal
        assert "\n" not in refusal
        assert "--packing split" in refusal
        found = model(batch["input_ids"], position_ids=batch["position_ids"]).logits
    moved = (found[at] - want).square().mean(-1).max().sqrt()
    moved = moved / (want - want.mean(-1, keepdim=True)).square().mean().sqrt()
    if refusal:
        assert moved > 1e-3
    else:  # a recurrence in depth over wide weights rounds more
        assert moved < (1e-4 if str(species) == "hrm_text" else 1e-5)


def test_most_architectures_keep_them_apart() -> None:
    """The refusals above are exceptions, and those that most people train are none of them."""
    data = divided([[13, 1, 20], [9, 12]], vocabulary=300)
    batch = collate(data, pad_id=1, temperature=None)
    for name in ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gpt2", "mistral", "smollm3"):
        species = next(one for one in CAUSAL if str(one) == name)
        model = AutoModelForCausalLM.from_config(species.config())
        DistilledStudent(model, CAUSAL_LM, vocab_size=300)(**batch)


def test_gradients_are_those_of_each_document_alone(tiny_lm: Path) -> None:
    data = divided([[13, 1, 20], [9, 12]], vocabulary=300)
    batch = collate(data, pad_id=1, temperature=1.0)
    model = AutoModelForCausalLM.from_pretrained(tiny_lm).double()
    whole = DistilledStudent(model, CAUSAL_LM, alpha=0.3, vocab_size=300)
    whole(**batch).loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    labels = batch["labels"][batch["labels"] != IGNORE]
    targets = DenseTargets(batch["targets"].logits.double(), 1.0)
    distillation_loss(alone(model, data), labels, targets, alpha=0.3).total.backward()
    for mine, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-5, atol=1e-7)


class OfOneRow(nn.Module):
    """A model whose attention keeps documents apart in batches of one row alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = SimpleNamespace(_attn_implementation="flash_attention_2")

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Any:
        assert len(input_ids) == 1, "FlashAttention would mix documents"
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)


def test_flash_attention_reads_the_rows_of_a_batch_end_to_end(tiny_lm: Path) -> None:
    data = divided([[13, 1, 20], [9, 12]], vocabulary=300)
    batch = collate(data, pad_id=1, temperature=1.0)
    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    student = DistilledStudent(OfOneRow(model), CAUSAL_LM, vocab_size=300)
    found = student(return_logits=True, **batch)
    assert found.logits.shape == (2, 34, 300)
    picked = found.logits[batch["labels"] != IGNORE]
    torch.testing.assert_close(picked, alone(model, data), rtol=1e-4, atol=1e-5)
    plain = DistilledStudent(model, CAUSAL_LM, vocab_size=300)(**batch)
    assert found.loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)
    assert in_one_row(model, batch)["input_ids"].shape == (2, 34), "SDPA takes a batch"


# ---------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def documents(
    tiny_lm: Path, text_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> BuildOptions:
    """A finished build of rows with several documents each."""
    options = BuildOptions(
        teacher=(str(tiny_lm),),
        corpus=(str(text_corpus),),
        out=str(tmp_path_factory.mktemp("attend") / "cache"),
        attend="document",
        codec="dense",
        max_length=96,
        limit=60,
        shard_tokens=1500,
        batch_tokens=256,
        workers=0,
    )
    build(options)
    return options


def shards_of(url: str) -> Iterator[ShardData]:
    cache = kdcache.Cache.open(url)
    assert cache.spec.spans > 2
    yield from map(cache.read, range(cache.spec.spans))


@pytest.mark.slow
def test_a_teacher_answers_each_document_alone(
    documents: BuildOptions, tiny_lm: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    several = 0
    for data in shards_of(documents.out):
        assert data.starts is not None
        several += int(data.starts.sum()) > len(data)
        with torch.inference_mode():
            want = alone(model, data)
        torch.testing.assert_close(data.targets.at(1.0).logits, want, rtol=1e-5, atol=1e-5)
    assert several > 2
    verify(VerifyOptions(cache=documents.out, teacher=documents.teacher, sample=12))
    # Noise belongs to a position of a row: the batches do not decide it.
    other = dataclasses.replace(
        documents, out=str(tmp_path / "a"), codec="sample:5", batch_tokens=64
    )
    again = dataclasses.replace(other, out=str(tmp_path / "b"), batch_tokens=4096)
    for one in (other, again):
        build(one)
    for mine, theirs in zip(shards_of(other.out), shards_of(again.out), strict=True):
        same = [
            np.array_equal(column, theirs.targets.columns[name])
            for name, column in mine.targets.columns.items()
        ]
        assert all(same)


@pytest.mark.slow
def test_two_teachers_do_too(documents: BuildOptions, tiny_lm: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "cache")
    build(
        dataclasses.replace(
            documents, teacher=documents.teacher * 2, ensemble="mean-logits", out=out
        )
    )
    for mine, theirs in zip(shards_of(out), shards_of(documents.out), strict=True):
        torch.testing.assert_close(
            mine.targets.at(1.0).logits, theirs.targets.at(1.0).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.slow
def test_an_engine_is_given_documents(
    documents: BuildOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FAKE))
    importlib.import_module("vllm")
    out = str(tmp_path / "cache")
    try:
        states = ("encode_inside=false",)  # the stand-in has no worker to join
        build(dataclasses.replace(documents, engine="vllm", engine_arg=states, out=out))
        verify(VerifyOptions(cache=out, teacher=documents.teacher, sample=8))
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            del sys.modules[name]
    for mine, theirs in zip(shards_of(out), shards_of(documents.out), strict=True):
        torch.testing.assert_close(
            mine.targets.at(1.0).logits, theirs.targets.at(1.0).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
def test_other_rows_are_another_cache(documents: BuildOptions) -> None:
    with pytest.raises(UsageError, match=r'rows.attend: "document" -> null'):
        build(dataclasses.replace(documents, attend="row"))


@pytest.mark.slow
def test_transcoding_keeps_them(documents: BuildOptions, tmp_path: Path) -> None:
    out = str(tmp_path / "topk")
    transcode(TranscodeOptions(cache=documents.out, codec="topk:8", out=out, workers=0))
    for mine, theirs in zip(shards_of(out), shards_of(documents.out), strict=True):
        assert mine.starts is not None
        assert np.array_equal(mine.starts, theirs.starts)


@pytest.mark.slow
def test_plan_measures_them(documents: BuildOptions) -> None:
    figures = plan(
        PlanOptions(
            teacher=documents.teacher,
            corpus=documents.corpus,
            codec=("sample:5",),
            attend="document",
            max_length=96,
            rows=8,
        )
    )
    assert figures.caches[0].row_bytes_per_position < 4


@torch.inference_mode()
def measured(model: Any, rows: list[Row]) -> tuple[float, int]:
    """Mean cross-entropy of documents alone, and their labels."""
    labels = torch.from_numpy(np.concatenate([row.labels[row.labels != IGNORE] for row in rows]))
    return float(nn.functional.cross_entropy(alone(model, rows), labels.long())), len(labels)


@pytest.mark.slow
def test_a_student_trains_and_is_measured_on_them(
    documents: BuildOptions, tiny_lm: Path, tmp_path: Path
) -> None:
    """Cross-entropies are those of the documents alone, in training and from cache or corpus."""
    run = str(tmp_path / "run")
    options = TrainOptions(
        cache=(documents.out,), student=str(tiny_lm), out=run, alpha=0.5, max_steps=1,
        batch_size=100_000, learning_rate=1e-9, precision="float32",
    )  # fmt: skip
    result = train(options)
    model = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    sums = [
        measured(model, [data.row(i) for i in range(len(data))])
        for data in shards_of(documents.out)
    ]
    mean = sum(mean * count for mean, count in sums) / sum(count for _, count in sums)
    want = pytest.approx(mean, rel=1e-5)
    assert result.hard_loss == want
    assert result.soft_loss == pytest.approx(0, abs=1e-6)
    cached = evaluate(EvaluateOptions(student=(run,), cache=documents.out))
    assert cached.rows == sum(len(data) for data in shards_of(documents.out))
    assert [found.cross_entropy for found in cached.models] == [want, want]
    assert cached.models[1].kl == pytest.approx(0, abs=1e-6)
    # A corpus is cut into other spans, and so into other rows.
    read = evaluate(
        EvaluateOptions(
            student=(run,), teacher=str(tiny_lm), corpus=documents.corpus, attend="document",
            task=CAUSAL_LM, max_length=96, limit=60,
        )
    )  # fmt: skip
    lines = Path(documents.corpus[0]).read_text().splitlines()[:60]
    texts = [json.loads(line)["text"] for line in lines]
    rows = encode(AutoTokenizer.from_pretrained(tiny_lm), texts, 96, attend="document")
    (want, _), found = measured(model, rows), [model.cross_entropy for model in read.models]
    assert found == [pytest.approx(want, rel=1e-5)] * 2


@pytest.mark.slow
def test_a_student_that_mixes_them_is_refused_before_it_trains(
    documents: BuildOptions, tmp_path: Path
) -> None:
    for model_type, message in (("mpt", "takes no position_ids"), ("jamba", "read each other")):
        species = next(one for one in CAUSAL if str(one) == model_type)
        student = tmp_path / f"{model_type}.json"
        student.write_text(json.dumps(species.config().to_dict()))
        with pytest.raises(UsageError, match=message):
            train(
                TrainOptions(
                    cache=(documents.out,),
                    student=str(student),
                    out=str(tmp_path / model_type),
                    batch_size=1,
                )
            )


@pytest.mark.slow
def test_rows_that_are_not_divided_are_one_document_beside_others(
    documents: BuildOptions, tmp_path: Path
) -> None:
    whole = dataclasses.replace(documents, attend="row", out=str(tmp_path / "whole"))
    build(whole)
    stream = kdcache.TargetStream([documents.out, whole.out], batch_size=64)
    seen = set()
    for batch in stream:
        assert "position_ids" in batch
        for ids, at in zip(batch["input_ids"], batch["position_ids"], strict=True):
            seen.add(int((at[: int((ids != 0).sum())] == 0).sum()) > 1)
    assert seen == {True, False}
