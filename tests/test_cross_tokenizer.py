"""`train --cross-tokenizer`: batches, steps, resume, workers, files and refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import torch
from conftest import further, make_tiny_lm
from launched import launch
from make_caches import CAUSAL, make_cache
from safetensors.torch import load_file
from small_runs import StopError, metrics, stop_at
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kdcache import BuildOptions, Cache, EvaluateOptions, TrainOptions, build, evaluate, train
from kdcache.commands.demo.teacher import make_tokenizer
from kdcache.commands.run_folder import TrainProgress
from kdcache.errors import UsageError
from kdcache.loss import chunk_loss, distillation_loss
from kdcache.stream import Collator, TargetDataset, TargetStream, cross
from kdcache.stream.batch import CachedIds
from kdcache.stream.cross import CrossTokenizer, paths_of
from kdcache.stream.text import RowsText
from kdcache.student import DistilledStudent
from kdcache.targets import ChunkTargets, SparseTargets
from kdcache.targets.chunks import inside_chunks
from kdcache.targets.label_logprob import decode_logprobs
from kdcache.tasks import CAUSAL_LM, IGNORE

pytestmark = pytest.mark.slow

LLAMA = small_runs.LLAMA | {"max_position_embeddings": 256}
METHODS = ("likelihood", "hybrid")


@pytest.fixture(scope="module")
def folder(
    corpus_texts: list[str], tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Caches `topk`, `sample` and `apart` (documents do not attend to each other), tokenizers `own`
    (a BPE) and `bytes`, and the configuration of a student."""
    folder = tmp_path_factory.mktemp("cross")
    texts = [f"{text} naïve ☕ 👩‍🚀" for text in corpus_texts[:40]]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines)
    for name, more in (
        ("topk", {"codec": "topk:8"}),
        ("sample", {"codec": "sample:6"}),
        ("apart", {"codec": "topk:8", "attend": "document"}),
        ("single", {"codec": "topk:8", "packing": "split"}),
    ):
        build(
            BuildOptions(
                teacher=(str(tiny_lm),), corpus=(str(folder / "text.jsonl"),),
                out=str(folder / name), max_length=48, workers=0, **more,
            )
        )  # fmt: skip
    make_tokenizer(texts[::2], folder / "own", vocab_size=320)
    make_tokenizer(texts[:1], folder / "bytes", vocab_size=257)
    (folder / "llama.json").write_text(json.dumps(LLAMA))
    return folder


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> Callable[..., TrainOptions]:
    def make(**changes: Any) -> TrainOptions:
        values: dict[str, Any] = {
            "cache": str(folder / "topk"), "student": str(folder / "llama.json"),
            "student_tokenizer": str(folder / "own"), "cross_tokenizer": "hybrid",
            "out": str(tmp_path / "run"), "max_steps": 6,
        }  # fmt: skip
        return TrainOptions(**(small_runs.USUAL | values | changes))

    return make


Make = Callable[..., TrainOptions]


def crossing(
    folder: Path, method: Any = "hybrid", tokens: str = "own", **more: Any
) -> CrossTokenizer:
    tokenizer = AutoTokenizer.from_pretrained(folder / tokens)
    return CrossTokenizer(Cache.open(str(folder / "topk")), tokenizer, method, **more)


def student(vocab_size: int, alpha: float = 0.3) -> DistilledStudent:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=vocab_size)).double()
    return DistilledStudent(model, CAUSAL_LM, alpha=alpha, vocab_size=vocab_size)


# Batches


@pytest.mark.parametrize("tokens", ["own", "bytes"])
@pytest.mark.parametrize("name", ["topk", "apart", "single"])
def test_the_likelihood_of_a_chunk_is_the_sum_of_its_labels(
    folder: Path, tokens: str, name: str
) -> None:
    cache, over = Cache.open(str(folder / name)), crossing(folder, "likelihood", tokens)
    dataset = TargetDataset(cache, cross=over)
    rows = [dataset[i] for i in (0, 3, 1)]
    batch = Collator(pad_id=0, cross=over)(rows)
    targets = batch["targets"]
    assert isinstance(targets, ChunkTargets)
    labels = batch["labels"][batch["labels"] != IGNORE]
    assert len(targets) == len(labels) == int(batch["count"])
    assert ("position_ids" in batch) == (name == "apart")
    own = AutoTokenizer.from_pretrained(folder / tokens)
    theirs = cache.tokenizer()
    chunk, seen = 0, 0
    for row in rows:  # each chunk has one text on both sides, and its log-likelihood
        assert row.label_logprob is not None
        logprobs = decode_logprobs(row.label_logprob).astype(np.float64)
        read = row.labels[row.labels != IGNORE]
        for t0, t1, s0, s1 in row.aligned.chunks.tolist():  # type: ignore[attr-defined]
            assert (targets.begin[chunk], targets.end[chunk]) == (seen + s0, seen + s1)
            assert float(targets.likelihood[chunk]) == pytest.approx(
                logprobs[t0:t1].sum(), abs=1e-4
            )
            ours = labels[seen + s0 : seen + s1]
            assert pieces(own, ours.tolist()) == pieces(theirs, read[t0:t1].tolist())
            chunk += 1
        seen += int(row.aligned.positions.sum())  # type: ignore[attr-defined]
    assert chunk == len(targets.begin) > 40


def pieces(tokenizer: Any, ids: list[int]) -> str:
    """What byte-level tokens are in the vocabulary: their bytes as characters."""
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def test_one_tokenizer_on_both_sides_has_chunks_of_one_token_and_the_usual_targets(
    folder: Path, tiny_tokenizer: Path
) -> None:
    cache = Cache.open(str(folder / "topk"))
    over = CrossTokenizer(cache, AutoTokenizer.from_pretrained(tiny_tokenizer), "hybrid")
    alike = CrossTokenizer(cache, AutoTokenizer.from_pretrained(tiny_tokenizer), "likelihood")
    rows = [TargetDataset(cache, cross=over)[i] for i in range(4)]
    batch, likely = (Collator(pad_id=0, cross=x)(rows) for x in (over, alike))
    targets, chunks = batch["targets"], likely["targets"]
    assert (chunks.end - chunks.begin == 1).all()
    assert not len(targets.begin)  # no chunk of several tokens: the likelihood has no part
    kept = batch["labels"] != IGNORE
    labels = batch["labels"][kept][targets.positions]
    # The rows themselves, at the positions that a student of their own text is asked about.
    usual = Collator(pad_id=0)(rows)
    places = np.concatenate(
        [
            row.position_offsets[0] + start + row.aligned.chunks[:, 0]  # type: ignore[attr-defined]
            for row, start in zip(rows, np.cumsum([0, *map(positions, rows)]), strict=False)
        ]
    )
    same = usual["targets"][torch.from_numpy(places).long()]
    assert torch.equal(usual["labels"][usual["labels"] != IGNORE][places], labels)
    torch.manual_seed(0)
    z = torch.randn(int(kept.sum()), over.vocab_size, dtype=torch.float64, requires_grad=True)
    want = distillation_loss(z[targets.positions], labels, same, alpha=0.0, count=1.0)
    own_labels = batch["labels"][kept]
    got = chunk_loss(z, own_labels, targets, alpha=0.0, count=1.0)
    torch.testing.assert_close(got.total, want.total, rtol=1e-12, atol=0)
    a, b = (torch.autograd.grad(x.total, z)[0] for x in (got, want))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def positions(row: Any) -> int:
    return int(row.position_offsets[-1])


def test_within_a_teachers_token_the_entries_that_go_on_alike_are_left() -> None:
    # Ids of the teacher: 0 "the", 1 "then", 2 "they", 3 "a", 4 "th"; of the student: letters.
    words = ["the", "then", "they", "a", "th"]
    letters = {letter: i for i, letter in enumerate("thenya")}
    paths = np.full((5, 6), -1)
    for i, word in enumerate(words):
        paths[i, : len(word)] = [letters[letter] for letter in word]
    weights = torch.tensor([[0.4, 0.2, 0.1, 0.1], [0.4, 0.2, 0.1, 0.1]])
    targets = SparseTargets(
        torch.tensor([[0, 1, 3, 4], [0, 1, 3, 4]]), weights, torch.full((2,), 0.2), True, 1.0
    )
    labels = np.array([2, 0])  # "they", which is not among the entries, and "the"
    read = np.array([letters[x] for x in "theythx"[:6]] + [letters["a"]])
    spans = np.array([[0, 4], [4, 7]])
    logprobs = np.array([math.log(0.05), math.log(0.4)])
    found = list(inside_chunks(targets, labels, logprobs, spans, read, paths))
    assert [at.tolist() for at, _ in found] == [[1, 5], [2, 6], [3]]

    def at(step: int, row: int) -> dict[str, float]:
        soft = found[step][1]
        given = {"": float(soft.tail[row])}
        for i, w in zip(soft.ids[row].tolist(), soft.weights[row].tolist(), strict=True):
            if w > 0:
                given["thenya"[i]] = given.get("thenya"[i], 0) + w
        return given

    mass = 0.4 + 0.2 + 0.1 + 0.05  # of "the", "then", "th" and "they"
    assert at(0, 0) == pytest.approx({"": 0, "h": 1})
    assert at(1, 0) == pytest.approx({"": 0.1 / mass, "e": 0.65 / mass})
    assert at(2, 0) == pytest.approx({"": 0.4 / 0.65, "n": 0.2 / 0.65, "y": 0.05 / 0.65})
    # The second chunk goes on otherwise than its label would: nothing is said of what follows.
    assert at(1, 1) == pytest.approx({"": 0.1 / 0.7, "e": 0.6 / 0.7})


def test_paths_are_the_students_tokens_of_each_of_the_teachers(folder: Path) -> None:
    over = crossing(folder)
    paths = paths_of(over.aligner, 300)
    teacher, own = over.aligner.teacher, over.aligner.student
    assert paths.shape[0] == 300
    for number in range(300):
        path = paths[number][paths[number] >= 0]
        assert b"".join(own.tokens[i] for i in path) == teacher.tokens[number]
        assert paths[number, -1] == -1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["topk", "sample"])
def test_slices_and_workers_give_the_gradient_of_the_batch(
    folder: Path, method: str, name: str
) -> None:
    gradients = []
    for world, slices in ((1, 1), (1, 3), (2, 2)):
        model = student(320)
        for rank in range(world):
            stream = TargetStream(
                str(folder / name), batch_size=12, rank=rank, world_size=world, streams=1,
                accumulation=slices, cross=crossing(folder, method),
            )  # fmt: skip
            for _, batch in zip(range(slices), stream, strict=False):
                model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for other in gradients[1:]:
        for key, value in gradients[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_student_whose_logits_are_its_own_has_the_same_loss(folder: Path, method: str) -> None:
    stream = TargetStream(str(folder / "topk"), batch_size=5, cross=crossing(folder, method))
    batch = next(iter(stream))
    model = student(320)
    fused, whole = (model(**batch, return_logits=logits) for logits in (False, True))
    for field in ("loss", "hard_loss", "soft_loss"):
        torch.testing.assert_close(getattr(fused, field), getattr(whole, field))
    assert whole.logits is not None


def test_rows_that_are_not_kept_are_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches() -> list[torch.Tensor]:
        stream = TargetStream(str(folder / "topk"), batch_size=9, cross=crossing(folder))
        return [batch["input_ids"] for _ in range(2) for batch in stream]

    kept = batches()
    monkeypatch.setattr(cross, "_KEPT_BYTES", 0)
    for one, other in zip(kept, batches(), strict=True):
        assert torch.equal(one, other)


def test_a_space_of_the_tokenizers_own_is_text_of_no_bytes(tmp_path: Path) -> None:
    """A student of the teacher's tokenizer has the same text, however its rows are read."""
    tokens = Path(__file__).parent / "tiny_tokenizers" / "pieces"
    teacher = make_tiny_lm(tokens, tmp_path / "lm", vocab_size=448)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "\u4f60 and a cat"}) + "\n")
    out = str(tmp_path / "cache")
    build(
        BuildOptions(
            teacher=(str(teacher),), corpus=(str(tmp_path / "text.jsonl"),), out=out,
            codec="topk:8", packing="none", workers=0,
        )
    )  # fmt: skip
    cache = Cache.open(out)
    over = CrossTokenizer(cache, AutoTokenizer.from_pretrained(tokens), "likelihood")
    assert over.needless
    data = cache.read(0)
    text = RowsText(cache)
    whole = text(dataclasses.replace(data, label_bytes=text.label_bytes(cache, data)))
    assert whole.sizes.tolist()[:2] == [0, 1]
    found = over.text(TargetDataset(cache, cross=over)[0])
    for name in ("begin", "end", "sizes", "likelihood"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name))


@pytest.mark.parametrize("shuffle", [False, True])
def test_caches_of_several_packings_have_the_bytes_of_their_texts(
    corpus_texts: list[str], tmp_path: Path, shuffle: bool
) -> None:
    """Whatever cache comes first, and where batches have rows of several; against the texts.

    The tokenizer begins each text with a space of its own, and no token tells where that is.
    """
    shutil.copytree(Path(__file__).parent / "tiny_tokenizers" / "pieces", tmp_path / "tokens")
    state = json.loads((tmp_path / "tokens" / "tokenizer.json").read_text())
    state["post_processor"] = None
    (tmp_path / "tokens" / "tokenizer.json").write_text(json.dumps(state))
    teacher = make_tiny_lm(tmp_path / "tokens", tmp_path / "lm", vocab_size=448)
    texts = [text[:30] for text in corpus_texts[:24]]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "text.jsonl").write_text(lines)
    kinds = {
        "joined": {"packing": "concat"},
        "apart": {"packing": "concat", "attend": "document"},
        "alone": {"packing": "none"},
    }
    for name, more in kinds.items():
        values: dict[str, Any] = {"codec": "topk:8", "max_length": 64, "workers": 0, **more}
        corpus = (str(tmp_path / "text.jsonl"),)
        build(BuildOptions((str(teacher),), corpus, str(tmp_path / name), **values))
    whole = [len(text.encode()) for text in texts]
    own = AutoTokenizer.from_pretrained(teacher)
    # The first token of what is read together has no label.
    first = [len(own.tokenize(text)[0].removeprefix("\u2581").encode()) for text in texts]
    expected = 3 * sum(whole) - first[0] - 2 * sum(first)
    for names in itertools.permutations(kinds):
        caches = [Cache.open(str(tmp_path / name)) for name in names]
        reading = CachedIds(caches[0].spec.pad_id).with_text(caches[0])
        stream = TargetStream(caches, batch_size=5, shuffle=shuffle, cross=reading)
        assert sum(int(batch["text"].sizes.sum()) for batch in stream) == expected


def test_an_end_of_text_within_a_conversation_begins_no_document(
    folder: Path, tiny_lm: Path, tmp_path: Path
) -> None:
    """Where a row is one conversation. Rows of ids may be several documents."""
    turns = [("user", "Where?"), ("assistant", "Here."), ("user", "Who?"), ("assistant", "Me.")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}[ASK] {{ m.content }} [/ASK]{% else %}"
        "{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    usual: dict[str, Any] = {"teacher": (str(tiny_lm),), "codec": "topk:8", "workers": 0}
    chats, ids = str(tmp_path / "chats"), str(tmp_path / "ids")
    corpus = (str(tmp_path / "chats.jsonl"),)
    build(
        BuildOptions(corpus=corpus, out=chats, packing="none", chat_template=str(template), **usual)
    )
    data = Cache.open(chats).read(0)
    row = [*data.row(0).input_ids.tolist(), int(data.row(0).labels[-1])]
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": row}) + "\n")
    corpus = (str(tmp_path / "ids.jsonl"),)
    build(BuildOptions(corpus=corpus, out=ids, record_form="ids", tokenizer=str(tiny_lm), **usual))
    opened = AutoTokenizer.from_pretrained(Path(__file__).parent / "tiny_tokenizers" / "bytes")
    for cache, number in ((chats, 1), (ids, 2)):
        over = CrossTokenizer(Cache.open(cache), opened, "likelihood")
        batch = next(iter(TargetStream(cache, batch_size=1, shuffle=False, cross=over)))
        assert batch["input_ids"].tolist()[0].count(opened.bos_token_id) == number


# Runs


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_its_folder_has_its_own_tokenizer(
    options: Make, folder: Path, method: str
) -> None:
    common = {"eval_cache": str(folder / "sample"), "max_steps": 12, "best": "soft_loss"}
    result = train(options(cross_tokenizer=method, **common))
    loss = [line["loss"] for line in metrics(result.out) if "loss" in line]
    assert loss[-1] < loss[0] - 0.3
    soft = "soft_cross_entropy" if method == "hybrid" else "soft_loss"
    assert {"loss", "hard_loss", soft} <= result.eval.keys()
    assert result.eval_teacher_cross_entropy is None  # of other labels than the student's
    own = Tokenizer.from_file(str(folder / "own" / "tokenizer.json"))
    saved = AutoTokenizer.from_pretrained(result.out)
    assert saved.get_vocab() == own.get_vocab()
    model = AutoModelForCausalLM.from_pretrained(result.out)
    assert model.config.vocab_size == len(saved) == 320
    assert model.config.eos_token_id == saved.eos_token_id
    card = Path(result.out, "README.md").read_text()
    assert f"the rest {method} across tokenizers" in card
    assert "Models of other tokenizers compare by bits per byte" in card
    assert not train(options(cross_tokenizer=method, **common)).made


@pytest.mark.parametrize("tokens", ["own", "bytes", None])
def test_an_evaluation_has_the_figures_in_bytes_of_evaluate(
    options: Make, folder: Path, tokens: str | None
) -> None:
    """Those of all rows and of one domain, by its own tokens and by the teacher's."""
    own = {"cross_tokenizer": None, "student_tokenizer": None}
    own = own if tokens is None else {"student_tokenizer": str(folder / tokens)}
    result = train(options(**own, eval_cache=str(folder / "single"), alpha=0.9))
    found = evaluate(EvaluateOptions((result.out,), str(folder / "single")))
    teacher, student = found.models
    assert student.bits_per_byte is not None
    assert result.eval["bits_per_byte"] == pytest.approx(student.bits_per_byte, rel=1e-5)
    assert result.eval["teacher_bits_per_byte"] == pytest.approx(teacher.bits_per_byte, rel=1e-5)
    for name in ("chunk_kl", "chunk_agreement"):
        assert result.eval.get(name) == (
            None if tokens is None else pytest.approx(getattr(student, name), rel=1e-5)
        )
    card = Path(result.out, "README.md").read_text()
    assert f"| evaluation: bits_per_byte | {student.bits_per_byte:.4f} |" in card


def test_hard_labels_alone_need_no_teacher(options: Make, folder: Path, tmp_path: Path) -> None:
    result = train(options(alpha=1, cross_tokenizer="likelihood", out=str(tmp_path / "hard")))
    assert result.soft_loss is None
    assert result.loss == pytest.approx(result.hard_loss)


@pytest.mark.parametrize("method", ["hybrid", *further("likelihood")])
def test_a_stopped_run_goes_on_to_the_bit(options: Make, tmp_path: Path, method: str) -> None:
    def stop(now: TrainProgress) -> None:
        if now.step >= 5:
            raise InterruptedError

    common = {"cross_tokenizer": method, "save_steps": 3, "max_steps": 9, "alpha": "0.8:0.2"}
    whole = options(out=str(tmp_path / "whole"), **common)
    train(whole)
    halves = options(out=str(tmp_path / "halves"), **common)
    with pytest.raises(InterruptedError):
        train(halves, on_progress=stop)
    train(halves)
    assert metrics(halves.out) == metrics(whole.out)
    mine, theirs = (load_file(Path(run.out, "model.safetensors")) for run in (halves, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_run_goes_on_with_the_same_tokenizer_alone(
    options: Make, folder: Path, tmp_path: Path
) -> None:
    moving = tmp_path / "tokenizer"
    shutil.copytree(folder / "own", moving)
    run = options(student_tokenizer=str(moving), max_steps=2)
    train(run)
    shutil.rmtree(moving)
    make_tokenizer(["other text"], moving, vocab_size=270)
    with pytest.raises(UsageError, match="tokenizer_sha256"):
        train(run)


def test_a_folder_has_its_tokenizer_and_may_get_an_adapter(
    options: Make, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="peft is optional")
    base = tmp_path / "base"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=320)).save_pretrained(base)
    AutoTokenizer.from_pretrained(folder / "own").save_pretrained(base)
    result = train(options(student=str(base), student_tokenizer=None, lora="r=2", max_steps=2))
    assert Path(result.out, "adapter_config.json").is_file()
    assert len(AutoTokenizer.from_pretrained(result.out)) == 320


def test_rows_end_where_the_students_table_of_positions_does(
    options: Make, folder: Path, tmp_path: Path
) -> None:
    config = {"model_type": "gpt2", "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    (tmp_path / "gpt2.json").write_text(json.dumps(config))
    tokens = {"student": str(tmp_path / "gpt2.json"), "student_tokenizer": str(folder / "bytes")}
    result = train(options(**tokens, max_steps=2))
    assert result.cut == 70
    assert result.vocabulary == 257


@pytest.mark.parametrize("name", ["topk", "apart", *further("sample")])
def test_a_student_of_the_same_tokenizer_takes_the_usual_steps(
    options: Make, folder: Path, tiny_tokenizer: Path, tmp_path: Path, name: str
) -> None:
    common = {"cache": str(folder / name), "eval_cache": str(folder / "topk"), "max_steps": 4}
    own = {"student_tokenizer": str(tiny_tokenizer), "cross_tokenizer": "hybrid"}
    usual = {"student_tokenizer": None, "cross_tokenizer": None}
    runs = [options(**common, **how, out=str(tmp_path / str(how))) for how in (own, usual)]
    told: list[str] = []
    for run in runs:
        train(run, report=told.append)
    assert sum("needs no --cross-tokenizer" in line for line in told) == 1
    mine, theirs = (metrics(run.out) for run in runs)
    for one, other in zip(mine, theirs, strict=True):
        # No KL of chunks has the teacher's entropy taken off.
        for key in ("eval_chunk_kl", "eval_chunk_agreement", "kl"):
            one.pop(key, None)
            other.pop(key, None)
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.end_to_end
def test_two_workers_take_the_steps_of_one(options: Make, folder: Path, tmp_path: Path) -> None:
    common = {
        "batch_size": 11, "streams": 2, "eval_cache": str(folder / "topk"), "max_steps": 4,
        "gradient_accumulation": 2,
    }  # fmt: skip
    alone = options(out=str(tmp_path / "alone"), **common)
    train(alone)
    both = options(out=str(tmp_path / "both"), num_workers=2, **common)
    for end in launch(both, 2):
        assert end.error is None, end.error
    for one, other in zip(metrics(both.out), metrics(alone.out), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=2e-5)
    mine, theirs = (load_file(Path(run.out, "model.safetensors")) for run in (both, alone))
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("way", "steps"),
    [("resumed", 13), pytest.param(2, 13, marks=pytest.mark.end_to_end)],
)
def test_what_is_left_out_is_that_of_the_rows_trained_on(
    options: Make, tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Any,
    steps: int,
) -> None:  # fmt: skip
    """Not of the shards that were read ahead, that were aligned twice, or of the evaluation."""
    monkeypatch.setattr(cross, "_KEPT_BYTES", 0)
    texts = [("a\u2581b " if i % 3 == 0 else "") + f"{i} cats saw you" for i in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    cache, tokens = str(tmp_path / "cache"), Path(__file__).parent / "tiny_tokenizers" / "pieces"
    build(
        BuildOptions(
            (str(tiny_lm),), (str(tmp_path / "text.jsonl"),), cache, packing="none", codec="topk:8",
            max_length=64, shard_tokens=50, workers=0,
        )
    )  # fmt: skip
    assert Cache.open(cache).spec.spans > 3
    own = AutoTokenizer.from_pretrained(tokens)
    whole, short = (
        CrossTokenizer(Cache.open(cache), own, "likelihood", max_length=longest)
        for longest in (None, 6)
    )
    lost = cut = 0
    given: dict[str, Any] = {"batch_size": 4, "streams": 2}
    streams = (TargetStream(cache, cross=x, **given).batches(2) for x in (whole, short, None))
    for all_of_it, kept, rows in itertools.islice(zip(*streams, strict=True), steps):
        cut += int((all_of_it["labels"] != IGNORE).sum() - (kept["labels"] != IGNORE).sum())
        texts = Cache.open(cache).tokenizer().batch_decode(rows["input_ids"])
        lost += sum("\u2581" in text for text in texts)
    run = options(
        cache=cache, eval_cache=cache, student_tokenizer=str(tokens), max_length=6,
        cross_tokenizer="likelihood", max_steps=steps, eval_steps=2, num_workers=1, **given,
    )  # fmt: skip
    if way == 2:
        assert [end.error for end in launch(run, 2)] == [None, None]
    else:
        with pytest.raises(StopError):
            train(run, on_progress=stop_at(3))
        train(run)
    result = json.loads(Path(run.out, "train.json").read_text())["result"]
    assert lost > 0
    assert cut > 0
    assert (result["lost"], result["cut"]) == (lost, cut)


# Refusals


def test_what_does_not_go_together_is_refused(options: Make) -> None:
    with pytest.raises(UsageError) as error:
        options(temperature=2, divergence="jsd", tail="renormalize")
    assert "--divergence jsd, --temperature 2, --tail renormalize" in str(error.value)
    with pytest.raises(UsageError, match="Add --cross-tokenizer likelihood or hybrid"):
        options(cross_tokenizer=None)
    with pytest.raises(UsageError, match="which is for a biLSTM"):
        options(student_tokenizer="words")


def test_caches_and_students_that_do_not_suit_are_refused(
    options: Make, folder: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    make_cache(tmp_path / "old", [6], task=CAUSAL, codec="topk:4")
    with pytest.raises(UsageError, match="no log-probabilities of its labels.*Build it again"):
        train(options(cache=str(tmp_path / "old"), cross_tokenizer="likelihood"))
    make_cache(tmp_path / "dense", [6], task=CAUSAL, label_logprob=True)
    with pytest.raises(UsageError, match="transcode --codec topk:64.*--cross-tokenizer likelihood"):
        train(options(cache=str(tmp_path / "dense")))
    make_cache(tmp_path / "classes", [6])
    with pytest.raises(UsageError, match="is for causal language models"):
        train(options(cache=str(tmp_path / "classes")))
    with pytest.raises(UsageError, match="Name the folder or hub id of a tokenizer"):
        train(options(student_tokenizer=None))
    with pytest.raises(UsageError, match="no usable tokenizer at"):
        train(options(student_tokenizer=str(tmp_path / "nothing")))
    base = tmp_path / "base"
    LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=320)).save_pretrained(base)
    AutoTokenizer.from_pretrained(folder / "own").save_pretrained(base)
    with pytest.raises(UsageError, match="was trained with another tokenizer than --student-tok"):
        train(options(student=str(base), student_tokenizer=str(tiny_tokenizer)))
    for size, problem in ((300, "a vocabulary of 300, its tokenizer one of 320"), (9000, "")):
        LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=size)).save_pretrained(tmp_path / "odd")
        with pytest.raises(UsageError, match=r"no usable tokenizer at .*--student-tokenizer"):
            train(options(student=str(tmp_path / "odd"), student_tokenizer=None))
        odd = options(student=str(tmp_path / "odd"), max_steps=1, out=str(tmp_path / "odd-run"))
        if problem:
            with pytest.raises(UsageError, match=problem):
                train(odd)
        else:
            assert train(odd).vocabulary == 320
    plain = {"student": str(base), "student_tokenizer": None, "cross_tokenizer": None}
    with pytest.raises(UsageError, match="add --cross-tokenizer likelihood or hybrid"):
        train(options(**plain))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.json"))


def test_a_tokenizer_that_loses_bytes_is_refused(options: Make) -> None:
    lossy = Path(__file__).parent / "tiny_tokenizers" / "wordpiece"
    with pytest.raises(UsageError, match="WordPiece"):
        train(options(student_tokenizer=str(lossy)))
