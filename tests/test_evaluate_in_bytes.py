"""Bits per byte and figures of chunks, against forwards and character offsets of transformers."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import built, make_tiny_lm
from rich.console import Console
from textbook import lm_logits, logprobs_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from kdcache.cache import Cache
from kdcache.cli.views import render_evaluation
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.evaluate.scores import EvaluateResult
from kdcache.commands.options import EvaluateOptions
from kdcache.errors import UsageError
from kdcache.metrics import ModelScores
from kdcache.targets.label_logprob import decode_logprobs
from kdcache.tasks import IGNORE

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TOKENIZERS = HERE / "tiny_tokenizers"


@pytest.fixture(scope="module")
def pieces_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer like Llama 2's."""
    folder = tmp_path_factory.mktemp("pieces-lm")
    return make_tiny_lm(TOKENIZERS / "pieces", folder, vocab_size=448, seed=3)


@pytest.fixture(scope="module")
def bytes_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a byte-level tokenizer that opens texts, as Llama 3's does."""
    folder = tmp_path_factory.mktemp("bytes-lm")
    return make_tiny_lm(TOKENIZERS / "bytes", folder, vocab_size=448, seed=4)


@pytest.fixture(scope="module")
def stories(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache of documents apart, each whole in its row."""
    folder = tmp_path_factory.mktemp("stories")
    texts = [
        "Once upon a time there was a small cat that lived in a house by the sea.",
        "A film can be good or bad, long or short, new or old.",
        "def area(x):\n    return x * 12.5  # really?\n",
        "One day a boat came in with no one in it. \u201cWho are you?\u201d said the cat.",
        "Ein M\u00e4dchen, \u4f60\u597d, and a \U0001f469.",
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    given = {"codec": "topk:8", "max_length": 120, "packing": "none"}
    return built(tiny_lm, folder / "texts.jsonl", folder / "cache", **given)


def of(result: EvaluateResult, role: str) -> ModelScores:
    return next(m for m in result.models if m.role == role)


def relabelled(model: Path, folder: Path) -> Path:
    """The same model whose ids are numbered backwards, in its tokenizer too."""
    shutil.copytree(model, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for layer in (loaded.get_input_embeddings(), loaded.get_output_embeddings()):
        layer.weight.data = layer.weight.data.flip(0)
    last = loaded.config.vocab_size - 1
    loaded.config.bos_token_id = loaded.config.eos_token_id = last
    loaded.generation_config.bos_token_id = loaded.generation_config.eos_token_id = last
    loaded.save_pretrained(folder)
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text())
    state["model"]["vocab"] = {k: last - v for k, v in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] = last - token["id"]
    file.write_text(json.dumps(state))
    return folder


def test_with_one_tokenizer_bits_are_the_nats_of_text_over_its_bytes(
    stories: str, tiny_lm: Path
) -> None:
    result = evaluate(EvaluateOptions((str(tiny_lm),), cache=stories))
    cache = Cache.open(stories)
    data = cache.read(0)
    labels = data.labels[data.labels != IGNORE]
    end = cache.tokenizer().eos_token_id
    # The text itself, but for the first token of each row, which nothing asks for.
    size = sum(
        len(cache.tokenizer().decode([i for i in row if i not in (IGNORE, end)]).encode())
        for row in (data.row(i).labels.tolist() for i in range(len(data)))
    )
    assert result.bytes == size
    assert result.chunks == 0
    assert data.label_logprob is not None
    nats = -decode_logprobs(data.label_logprob).astype(np.float64)[labels != end].sum()
    teacher, student = of(result, "teacher"), of(result, "student")
    assert teacher.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-9)
    z, _ = lm_logits(tiny_lm, stories)
    log_p = logprobs_of(z)[np.arange(len(labels)), labels][labels != end]
    assert student.bits_per_byte == pytest.approx(-log_p.sum() / math.log(2) / size, rel=1e-5)
    assert student.chunk_kl is student.chunk_agreement is None


def test_the_teacher_with_other_ids_has_the_teachers_figures(
    lm_caches: dict[str, str], tiny_lm: Path, tmp_path: Path
) -> None:
    """Another vocabulary and the same model: whatever the rows cut, the bits are the same."""
    other = relabelled(tiny_lm, tmp_path / "other")
    live = evaluate(EvaluateOptions((str(other),), cache=lm_caches["topk:8"], teacher=str(tiny_lm)))
    teacher, student = of(live, "teacher"), of(live, "student")
    assert live.bytes > 3000
    assert student.bits_per_byte == pytest.approx(teacher.bits_per_byte, rel=1e-5)
    assert student.chunk_kl == pytest.approx(0, abs=1e-6)
    assert student.chunk_agreement == 1
    assert student.cross_entropy is student.perplexity is student.kl is student.accuracy is None
    cached = evaluate(EvaluateOptions((str(other),), cache=lm_caches["topk:8"]))
    assert of(cached, "student").bits_per_byte == pytest.approx(student.bits_per_byte, rel=1e-6)
    assert of(cached, "teacher").bits_per_byte == pytest.approx(teacher.bits_per_byte, rel=0.01)


def offsets(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Characters of each token, with the spaces that belong to it."""
    return list(
        tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    )


@torch.no_grad()
def label_nats(folder: Path, ids: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    log_p = logprobs_of(model(input_ids=torch.tensor([ids])).logits[0])
    return log_p[np.arange(len(ids) - 1), ids[1:]]


def test_a_student_of_another_tokenizer_by_character_offsets(
    stories: str, tiny_lm: Path, bytes_lm: Path
) -> None:
    """Chunks and their likelihoods from what transformers itself gives, document by document."""
    texts = [
        json.loads(line)["text"]
        for line in (Path(stories).parent / "texts.jsonl").read_text().splitlines()
    ][:3]  # those whose characters no token cuts
    result = evaluate(EvaluateOptions((str(bytes_lm),), cache=stories, limit=3))
    theirs, ours = AutoTokenizer.from_pretrained(tiny_lm), AutoTokenizer.from_pretrained(bytes_lm)
    nats = np.zeros(2)
    size = count = agreed = likely = 0
    divergence = 0.0
    for text in texts:
        first, second = offsets(theirs, text), offsets(ours, text)
        a = label_nats(tiny_lm, theirs(text, add_special_tokens=False)["input_ids"])
        b = label_nats(bytes_lm, ours(text)["input_ids"])  # opened
        ends = sorted({e for _, e in first} & {e for _, e in second})
        for low, high in itertools.pairwise(ends):
            if low < first[0][1]:
                continue
            p = a[[i - 1 for i, (s, e) in enumerate(first) if low <= s and e <= high]].sum()
            q = b[[i for i, (s, e) in enumerate(second) if low <= s and e <= high]].sum()
            nats -= [p, q]
            size += high - low
            count += 1
            agreed += (p > math.log(0.5)) == (q > math.log(0.5))
            likely += p > math.log(0.5)
            other = [math.log1p(-math.exp(x)) for x in (p, q)]
            divergence += math.exp(p) * (p - q) + -math.expm1(p) * (other[0] - other[1])
    teacher, student = of(result, "teacher"), of(result, "student")
    assert (result.bytes, result.chunks) == (size, count)
    assert student.bits_per_byte == pytest.approx(nats[1] / math.log(2) / size, rel=1e-5)
    assert teacher.bits_per_byte == pytest.approx(nats[0] / math.log(2) / size, rel=0.02)
    live = evaluate(EvaluateOptions((str(bytes_lm),), cache=stories, limit=3, teacher=str(tiny_lm)))
    assert of(live, "teacher").bits_per_byte == pytest.approx(
        nats[0] / math.log(2) / size, rel=1e-5
    )
    assert of(live, "student").chunk_kl == pytest.approx(divergence / count, rel=1e-4)
    assert of(live, "student").chunk_agreement == agreed / count
    side, share = ("more", likely) if likely > count / 2 else ("less", count - likely)
    (base,) = (note for note in live.notes if note.startswith("Agreement on chunks"))
    assert f"{share / count:.1%} is what one answer for all reaches" in base
    assert f"so many of them {side} probable than not" in base


def test_students_of_several_tokenizers_are_asked_for_the_same_bytes(
    lm_caches: dict[str, str], tiny_lm: Path, pieces_lm: Path, bytes_lm: Path
) -> None:
    models = [str(pieces_lm), str(tiny_lm), str(bytes_lm)]
    options = EvaluateOptions(tuple(models), cache=lm_caches["dense"], limit=15)
    result = evaluate(options)
    assert [m.name for m in result.models[1:]] == models
    teacher, first, same, second = result.models
    assert same.bits_per_byte == pytest.approx(teacher.bits_per_byte, rel=1e-5)
    assert same.cross_entropy is not None
    assert same.chunk_kl == pytest.approx(0, abs=1e-6)
    assert min(first.chunk_kl or 0, second.chunk_kl or 0) > 0.01
    alone = evaluate(replace(options, student=(models[0],)))
    assert alone.bytes > result.bytes > 0.7 * alone.bytes
    # Neither batches nor the company of a model change what it thinks.
    small = evaluate(replace(options, batch_tokens=64))
    assert (small.bytes, small.chunks) == (result.bytes, result.chunks)
    for one, two in zip(result.models, small.models, strict=True):
        assert one.bits_per_byte == pytest.approx(two.bits_per_byte, rel=1e-5)
    console = Console(file=io.StringIO(), width=200)
    render_evaluation(result, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "bits per byte" in text
    assert "a tokenizer of its own, so figures per token are left out" in text


def test_a_corpus_is_read_by_the_first_model(
    text_corpus: Path, tiny_lm: Path, pieces_lm: Path
) -> None:
    options = EvaluateOptions(
        (str(tiny_lm), str(pieces_lm)), corpus=(str(text_corpus),), max_length=48, limit=10
    )
    result = evaluate(options)
    first, second = result.models
    assert first.cross_entropy is not None
    assert second.cross_entropy is second.chunk_kl is None
    assert min(first.bits_per_byte or 0, second.bits_per_byte or 0) > 1
    turned = evaluate(replace(options, student=options.student[::-1]))
    for model, other in zip(result.models, turned.models[::-1], strict=True):
        # Other rows, cut elsewhere, of the same text.
        assert model.bits_per_byte == pytest.approx(other.bits_per_byte, rel=0.05)


def test_documents_that_do_not_attend_to_each_other(
    tiny_lm: Path, pieces_lm: Path, text_corpus: Path, tmp_path: Path
) -> None:
    """A student of other ids has the teacher's figures where documents are apart as well."""
    given = {"attend": "document", "codec": "topk:4", "max_length": 96, "limit": 20}
    cache = built(tiny_lm, text_corpus, tmp_path / "cache", **given)
    other = relabelled(tiny_lm, tmp_path / "other")
    result = evaluate(
        EvaluateOptions((str(other), str(pieces_lm)), cache=cache, teacher=str(tiny_lm))
    )
    teacher, same, _ = result.models
    assert same.bits_per_byte == pytest.approx(teacher.bits_per_byte, rel=1e-5)
    assert same.chunk_agreement == 1


def test_a_cache_without_log_probabilities_of_labels(
    stories: str, pieces_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Cache.read
    monkeypatch.setattr(
        Cache, "read", lambda self, span: replace(read(self, span), label_logprob=None)
    )
    result = evaluate(EvaluateOptions((str(pieces_lm),), cache=stories))
    teacher, student = result.models
    assert teacher.bits_per_byte is student.chunk_kl is None
    assert student.bits_per_byte is not None
    assert any("Build the cache anew with this kdcache" in note for note in result.notes)


def test_a_tokenizer_of_rows_that_loses_bytes_has_no_bits(
    tmp_path: Path, text_corpus: Path, pieces_lm: Path, stories: str
) -> None:
    folder = make_tiny_lm(TOKENIZERS / "bytes", tmp_path / "lossy", vocab_size=448)
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps(state | {"normalizer": {"type": "Lowercase"}}))
    options = EvaluateOptions((str(folder),), corpus=(str(text_corpus),), limit=3, max_length=48)
    result = evaluate(options)
    assert result.models[0].cross_entropy is not None
    assert result.models[0].bits_per_byte is None
    assert any(f"no bits per byte: the tokenizer of student {folder}" in n for n in result.notes)
    with pytest.raises(UsageError, match="normalises text"):
        evaluate(replace(options, student=(str(folder), str(pieces_lm))))
    with pytest.raises(UsageError, match="student .*lossy normalises text"):
        evaluate(EvaluateOptions((str(folder),), cache=stories))


def test_a_student_that_reads_fewer_tokens_than_a_row_becomes(stories: str, tmp_path: Path) -> None:
    folder = make_tiny_lm(TOKENIZERS / "pieces", tmp_path / "short", vocab_size=448)
    config = GPT2Config(vocab_size=448, n_positions=20, n_embd=32, n_layer=1, n_head=4)
    gpt2 = GPT2LMHeadModel(config)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    gpt2.save_pretrained(folder)
    result = evaluate(EvaluateOptions((str(folder),), cache=stories))
    assert any("labels are beyond the tokens that a student reads" in n for n in result.notes)
    assert 0 < result.bytes < 200
