"""Fine-tuning a teacher: it learns, reloads as what it is, trains only what it should."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import further
from make_caches import word_tokenizer
from safetensors.torch import load_file, save_file
from sklearn.utils.class_weight import compute_class_weight
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
)

from kdcache.cache import Cache
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.finetune.finetune import FinetuneResult, finetune
from kdcache.commands.finetune.finetune import _first as first_tensors
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.finetune.trainer import _weighted_loss as weighted_loss
from kdcache.commands.finetune.trainer import class_weights
from kdcache.commands.run_folder import TrainProgress
from kdcache.errors import IncompleteError, UsageError
from kdcache.rows import Row
from kdcache.tasks import IGNORE
from kdcache.teacher import TeacherFiles
from kdcache.teacher.adapter import quiet_peft
from kdcache.teacher.headed import HeadedForSequenceClassification

pytestmark = pytest.mark.slow

Make = Callable[..., FinetuneOptions]
finetune_module = sys.modules[finetune.__module__]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT, a tiny DistilBERT (which has no pooler), and labelled texts."""
    folder = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    size = {"vocab_size": 64, "max_position_embeddings": 32}
    bert = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **size
    )
    distil = DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, **size)
    for name, model in (("bert", BertModel(bert)), ("distil", DistilBertModel(distil))):
        model.save_pretrained(folder / name)
        for file, content in word_tokenizer().items():
            (folder / name / file).write_bytes(content)
    for name, rows, seed in (("train", 160, 1), ("test", 60, 2)):
        rng = np.random.default_rng(seed)
        lines = []
        for i in range(rows):
            words = rng.integers(10, 64, 6)
            label = int(rng.integers(2))
            words[rng.integers(6)] = 4 + label  # one word decides
            shown = "" if name == "train" and i % 16 == 3 else ("bad", "good")[label]
            lines.append({"text": " ".join(f"w{w}" for w in words), "label": shown})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> Make:
    def make(**changes: Any) -> FinetuneOptions:
        values: dict[str, Any] = {
            "model": str(folder / "bert"),
            "corpus": str(folder / "train.jsonl"),
            "out": str(tmp_path / "teacher"),
            "epochs": 1,
            "batch_size": 10,
            "max_length": 16,
            "learning_rate": 1e-2,
        }
        return FinetuneOptions(**(values | changes))

    return make


def test_a_whole_encoder_learns_and_reloads(options: Make, folder: Path) -> None:
    seen: list[TrainProgress] = []
    chosen = options(eval_corpus=str(folder / "test.jsonl"), epochs=8)
    result = finetune(chosen, on_progress=seen.append)
    assert result.accuracy is not None
    assert result.accuracy > 0.9
    assert result.f1 is not None
    assert result.label_names == ("bad", "good")
    assert (result.rows, result.unlabelled) == (150, 10)
    assert result.trained == result.parameters
    assert seen[-1].step == result.steps == 120
    evaluated = [p.logs["eval_accuracy"] for p in seen if "eval_accuracy" in p.logs]
    assert result.accuracy == max(evaluated)

    # The saved folder is what was measured, for HF alone.
    model = AutoModelForSequenceClassification.from_pretrained(result.out).eval()
    assert model.config.id2label == {0: "bad", 1: "good"}
    tokenizer = AutoTokenizer.from_pretrained(result.out)
    lines = [json.loads(x) for x in (folder / "test.jsonl").read_text().splitlines()]
    with torch.no_grad():
        logits = model(
            **tokenizer([x["text"] for x in lines], padding=True, return_tensors="pt")
        ).logits
    right = [
        ("bad", "good")[int(p)] == x["label"] for p, x in zip(logits.argmax(-1), lines, strict=True)
    ]
    assert np.mean(right) == pytest.approx(result.accuracy)
    assert sorted(p.name for p in Path(result.out).glob("*.safetensors")) == ["model.safetensors"]
    assert not list(Path(result.out).glob("checkpoint*"))

    again = finetune(chosen)
    assert not again.made
    assert again.accuracy == result.accuracy
    with pytest.raises(UsageError, match="epochs: 8"):
        finetune(options(eval_corpus=str(folder / "test.jsonl"), epochs=9))


@pytest.mark.parametrize(("model", "pooling"), [("bert", "pooler"), ("distil", "first")])
def test_a_head_of_its_own_width_reloads(
    options: Make, folder: Path, model: str, pooling: str
) -> None:
    result = finetune(options(model=str(folder / model), head_width=24))
    loaded = AutoModelForSequenceClassification.from_pretrained(result.out).eval()
    assert isinstance(loaded, HeadedForSequenceClassification)
    assert loaded.config.id2label == {0: "bad", 1: "good"}
    assert loaded.encoder.config._attn_implementation == "sdpa"
    sizes = {k: tuple(v.shape) for k, v in loaded.state_dict().items() if k[:8] != "encoder."}
    assert sizes == {
        "hidden.weight": (24, 16), "hidden.bias": (24,),
        "classes.weight": (2, 24), "classes.bias": (2,),
    }  # fmt: skip
    batch = AutoTokenizer.from_pretrained(result.out)(
        ["w4 w9 w12", "w5 w20 w3"], return_tensors="pt"
    )
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    kind = BertModel if model == "bert" else DistilBertModel
    encoder = kind(kind.config_class.from_pretrained(folder / model)).eval()
    weights = load_file(Path(result.out, "model.safetensors"))
    encoder.load_state_dict({k[8:]: v for k, v in weights.items() if k[:8] == "encoder."})
    with torch.no_grad():
        states = encoder(**inputs)
        pooled = states.pooler_output if pooling == "pooler" else states.last_hidden_state[:, 0]
        hidden = torch.relu(pooled @ weights["hidden.weight"].T + weights["hidden.bias"])
        want = hidden @ weights["classes.weight"].T + weights["classes.bias"]
        torch.testing.assert_close(loaded(**inputs).logits, want)
        loss = loaded(**inputs, labels=torch.tensor([0, 1])).loss
        torch.testing.assert_close(
            loss, torch.nn.functional.cross_entropy(want, torch.tensor([0, 1]))
        )

    # Equal models have equal files: nothing in them says where the encoder came from.
    assert str(folder) not in Path(result.out, "config.json").read_text()


@pytest.mark.parametrize("head_width", [None, 8])
def test_only_the_last_tensors_are_trained(
    options: Make, folder: Path, head_width: int | None
) -> None:
    result = finetune(options(train_last=4, head_width=head_width))
    before = BertModel.from_pretrained(folder / "bert").state_dict()
    encoder = AutoModelForSequenceClassification.from_pretrained(result.out).base_model
    changed = [n for n, p in encoder.named_parameters() if not torch.equal(p, before[n])]
    assert changed == [n for n, _ in encoder.named_parameters()][-4:]
    head = result.parameters - sum(p.numel() for p in encoder.parameters())
    assert result.trained == head + sum(p.numel() for p in list(encoder.parameters())[-4:])


@pytest.mark.parametrize(
    ("model", "count"), [("bert", 0), ("bert", 1), *further(("bert", 2), ("distil", 1))]
)
def test_frozen_layers_stay_as_they_are(
    options: Make, folder: Path, model: str, count: int
) -> None:
    result = finetune(options(model=str(folder / model), freeze=count, max_length=4))
    kind = BertModel if model == "bert" else DistilBertModel
    before = kind.from_pretrained(folder / model)
    after = AutoModelForSequenceClassification.from_pretrained(result.out).base_model
    same = {
        name: torch.equal(tensor, after.state_dict()[name])
        for name, tensor in before.state_dict().items()
        if not name.startswith("pooler")
    }
    layer = re.compile(r"layer\.(\d+)\.")
    for name, unchanged in same.items():
        found = layer.search(name)
        frozen = int(found[1]) < count if found else name.startswith("embeddings")
        # Without dropout a bias of keys has no gradient: softmax does not see it.
        assert unchanged == frozen or "k_lin.bias" in name or "key.bias" in name, name
    assert result.trained < result.parameters
    assert result.truncated == 160  # of six words, and two marks, with room for four


def test_layers_that_are_not_there_cannot_be_frozen(options: Make) -> None:
    with pytest.raises(UsageError, match="freeze is 3, but the encoder has 2 layers"):
        finetune(options(freeze=3))
    with pytest.raises(UsageError, match="give one of them"):
        options(freeze=1, train_last=1)
    shared = AlbertModel(AlbertConfig(vocab_size=9, embedding_size=4, hidden_size=4,
                                      num_attention_heads=1, intermediate_size=4))  # fmt: skip
    with pytest.raises(UsageError, match="layers of a albert were not found. Use --train-last"):
        first_tensors(shared, list(shared.parameters()), 1)


def test_patience_ends_the_epochs(
    options: Make, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = str(folder / "test.jsonl")
    chosen = options(eval_corpus=tests, epochs=9, patience=2, learning_rate=1e-12)
    result = finetune(chosen)
    assert result.steps == 3 * 15  # the first one is the best, and two are no better
    lines = [json.loads(x) for x in Path(result.out, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [15, 30, 45]
    assert all("step" in line for line in lines)
    # One that is killed after its last step takes no further one.
    again = dataclasses.replace(chosen, out=str(tmp_path / "again"))
    with monkeypatch.context() as patched:
        patched.setattr(finetune_module, "whole_folder", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(IncompleteError, match="continues from step 45"):
            finetune(again)
    assert same(finetune(again), result)
    more = [json.loads(x) for x in Path(again.out, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in more] == [line["step"] for line in lines]
    with pytest.raises(UsageError, match="--patience waits for a better epoch on --eval-corpus"):
        options(patience=2)


def test_balanced_classes_count_the_same(options: Make) -> None:
    counts = (12, 3, 0, 1)
    classes = np.repeat(np.arange(4), counts)
    rows = [Row(np.zeros(1, np.int32), np.array([c])) for c in classes]
    weights = class_weights(rows, 4)
    want = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=classes)
    assert weights.tolist() == pytest.approx([want[0], want[1], 0, want[2]])
    # Whatever the batches: in those of one row too, where a mean by weight has no weights left.
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.from_numpy(classes)
    each = -logits.double().log_softmax(-1)[torch.arange(16), labels]
    reference = torch.stack([each[labels == c].mean() for c in (0, 1, 3)]).mean()
    for size in (16, 4, 1):
        losses = [
            weighted_loss(weights)({"logits": z}, y)
            for z, y in zip(logits.split(size), labels.split(size), strict=True)
        ]
        assert float(torch.stack(losses).mean()) == pytest.approx(float(reference))
    words = torch.tensor([[0, IGNORE, 1], [IGNORE, IGNORE, 3]])
    loss = weighted_loss(weights)({"logits": logits[:6].reshape(2, 3, 4)}, words)
    nats = -logits.double().log_softmax(-1)[[0, 2, 5], [0, 1, 3]]
    assert float(loss) == pytest.approx(float((weights[[0, 1, 3]] * nats).sum() / 3))
    nothing = weighted_loss(weights)({"logits": logits[:2]}, torch.full((2,), IGNORE))
    assert float(nothing) == 0
    equal, balanced = (
        finetune(options(class_weights=kind, out=str(Path(options().out) / kind)))
        for kind in ("equal", "balanced")
    )
    assert equal.loss != balanced.loss


def test_classes_are_found_in_tables(options: Make, tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("".join(f"w{10 + i} w{3 + i % 3}\t{(0, 2, 1)[i % 3]}\n" for i in range(12)))
    result = finetune(options(corpus=str(path), columns=("text", "label")))
    assert result.label_names == ("0", "1", "2")
    named = finetune(
        options(
            corpus=str(path), columns=("text", "label"), label_names=("a", "b", "c"),
            out=str(tmp_path / "named"),
        )
    )  # fmt: skip
    assert named.label_names == ("a", "b", "c")


def test_wrong_input_is_told_and_nothing_is_written(
    options: Make, folder: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "w3", "label": "x"}\n' * 4)
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "w3", "label": "ugly"}\n')
    for changes, word in (
        ({"label_column": "klass"}, "klass"),
        ({"corpus": str(one)}, "1 classes"),
        ({"eval_corpus": str(other)}, "ugly"),
        ({"train_last": 999}, "999"),
        ({"model": str(tmp_path)}, "model"),
        ({"text_column": "body"}, "body"),
    ):
        with pytest.raises(UsageError, match=word):
            finetune(options(**changes))
    assert not (tmp_path / "teacher").exists()
    with pytest.raises(UsageError) as error:
        options(epochs=0, batch_size=0, head_width=0, corpus=(), precision="fp8")
    for word in ("--epochs", "--batch-size", "--head-width", "--corpus", "--precision"):
        assert word in str(error.value)


# Stopped


def saved(teacher: str) -> dict[str, torch.Tensor]:
    (weights,) = Path(teacher).glob("*.safetensors")
    return load_file(weights)


def same(one: FinetuneResult, other: FinetuneResult) -> bool:
    mine, theirs = saved(one.out), saved(other.out)
    facts = [
        dataclasses.replace(result, out="", seconds=0.0, loss=round(result.loss, 9))
        for result in (one, other)
    ]
    return facts[0] == facts[1] and all(mine[k].equal(theirs[k]) for k in theirs)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    """Three epochs of fifteen steps that were left alone."""
    return finetune(three_epochs(folder, tmp_path_factory.mktemp("whole")))


def three_epochs(folder: Path, place: Path) -> FinetuneOptions:
    return FinetuneOptions(
        model=str(folder / "bert"), corpus=(str(folder / "train.jsonl"),),
        eval_corpus=(str(folder / "test.jsonl"),), out=str(place / "teacher"), epochs=3,
        batch_size=10, max_length=16, learning_rate=1e-2, logging_steps=4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sign", "lost"),
    [
        (signal.SIGINT, False),
        (signal.SIGTERM, True),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.exhaustive),
    ],
)
def test_an_interrupted_one_continues_from_its_checkpoint(
    folder: Path, tmp_path: Path, whole: FinetuneResult, sign: signal.Signals, lost: bool
) -> None:
    chosen = three_epochs(folder, tmp_path)

    def strike(now: TrainProgress) -> None:
        if now.step == 36:
            try:
                signal.raise_signal(sign)
            except KeyboardInterrupt:
                if not lost:
                    raise

    with pytest.raises(IncompleteError) as told:
        finetune(chosen, on_progress=strike)
    run = tmp_path / "teacher.tmp"
    thirty = run / "checkpoint-30"
    assert str(told.value) == f"interrupted. The same command continues from step 30 ({thirty})."
    assert not (tmp_path / "teacher").exists()
    with pytest.raises(UsageError, match=r"was made with other caches or options:\n  options: .*8"):
        finetune(dataclasses.replace(chosen, batch_size=8))
    seen: list[int] = []
    result = finetune(chosen, on_progress=lambda now: seen.append(now.step))
    assert min(seen) > 30
    assert same(result, whole)
    assert result.seconds > 0
    assert not run.exists()
    assert not finetune(chosen).made


def test_a_finished_one_is_not_that_of_another_corpus_or_model_under_the_same_names(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "bert", tmp_path / "bert")
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    corpus = tmp_path / "train.jsonl"
    corpus.write_text("".join(lines[:8]))
    chosen = FinetuneOptions(
        model=str(tmp_path / "bert"), corpus=(str(corpus),), out=str(tmp_path / "teacher"), epochs=1
    )
    assert [finetune(chosen).made for _ in range(2)] == [True, False]
    corpus.write_text("".join(lines[1:9]))
    with pytest.raises(UsageError, match="other options:\n  the files of corpus have changed\n"):
        finetune(chosen)
    corpus.unlink()
    assert not finetune(chosen).made
    weights = tmp_path / "bert" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(UsageError, match="other options:\n  the files of model have changed\n"):
        finetune(chosen)


def test_one_that_is_stopped_at_the_end_or_the_beginning(
    folder: Path, tmp_path: Path, whole: FinetuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = three_epochs(folder, tmp_path)
    with pytest.raises(IncompleteError, match="no checkpoint yet: the same command starts over"):
        finetune(chosen, on_progress=lambda _: signal.raise_signal(signal.SIGTERM))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("kdcache.files.sync_tree", full)
        with pytest.raises(IncompleteError, match="no space left on .*teacher.tmp. Free some. The"):
            finetune(chosen)
    with monkeypatch.context() as patched:
        patched.setattr(finetune_module, "write_json", full)
        with pytest.raises(IncompleteError, match="continues from step 45"):
            finetune(chosen)
    assert same(finetune(chosen), whole)


@pytest.mark.parametrize("model", ["bert", *further("distil")])
def test_an_adapter_is_a_teacher_of_its_own_files(
    options: Make, folder: Path, tmp_path: Path, model: str
) -> None:
    peft = pytest.importorskip("peft", reason="peft is optional")
    base = (folder / model / "model.safetensors").read_bytes()
    chosen = options(
        model=str(folder / model), eval_corpus=str(folder / "test.jsonl"), epochs=8, lora="r=4"
    )
    result = finetune(chosen)
    assert result.accuracy is not None
    assert result.accuracy > 0.9
    assert 0 < result.trained < result.parameters / 2
    assert (folder / model / "model.safetensors").read_bytes() == base
    names = {path.name for path in Path(result.out).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "kdcache_adapter.json"} < names
    assert "model.safetensors" not in names
    lora = [name for name in saved(result.out) if "lora_" in name]
    layers = {"bert": 2 * 6 + 1, "distil": 6}[model]  # attention 4, MLP 2; the pooler is the body's
    assert len(lora) == 2 * layers

    # What PEFT alone loads, and what `build` runs, is what was measured.
    texts = [json.loads(x) for x in (folder / "test.jsonl").read_text().splitlines()]
    rows = AutoTokenizer.from_pretrained(result.out)([x["text"] for x in texts], padding=True)
    inputs = {k: torch.tensor(rows[k]) for k in ("input_ids", "attention_mask")}
    with quiet_peft():
        alone = peft.AutoPeftModelForSequenceClassification.from_pretrained(result.out)
    with torch.no_grad():
        logits = alone.eval()(**inputs).logits
    right = [
        ("bad", "good")[int(p)] == x["label"] for p, x in zip(logits.argmax(-1), texts, strict=True)
    ]
    assert np.mean(right) == pytest.approx(result.accuracy)
    build(
        BuildOptions(
            teacher=(result.out,), corpus=(str(folder / "test.jsonl"),), workers=0,
            out=str(tmp_path / "cache"), task="sequence-classification", max_length=16,
        )
    )  # fmt: skip
    cache = Cache.open(str(tmp_path / "cache"))
    assert cache.spec.label_names == ("bad", "good")
    spans = range(len(cache.manifest.shards))
    cached = np.concatenate([cache.read(s).targets.columns["logits"] for s in spans])
    np.testing.assert_allclose(cached, logits, atol=2e-3)

    assert not finetune(dataclasses.replace(chosen, lora="r=4,alpha=8")).made  # the same
    with pytest.raises(UsageError, match="lora: r=4,alpha=8,targets=all-linear -> r=2"):
        finetune(dataclasses.replace(chosen, lora="r=2"))


def test_an_interrupted_adapter_continues_from_its_checkpoint_on_its_base_alone(
    folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="peft is optional")
    base = Path(shutil.copytree(folder / "bert", tmp_path / "base")) / "model.safetensors"
    whole, chosen = (
        dataclasses.replace(
            three_epochs(folder, tmp_path / name), model=str(base.parent),
            lora="r=2,dropout=0.1", patience=3,
        )
        for name in ("whole", "broken")
    )  # fmt: skip

    def strike(now: TrainProgress) -> None:
        if now.step == 36:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(IncompleteError, match="continues from step 30"):
        finetune(chosen, on_progress=strike)
    content = base.read_bytes()
    save_file({k: v + 1 for k, v in load_file(base).items()}, base, {"format": "pt"})
    with pytest.raises(UsageError, match="was made with other caches or options:\n  base: "):
        finetune(chosen)
    base.write_bytes(content)
    assert same(finetune(chosen), finetune(whole))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora": "16"}, "--lora is '16', expected such as r=16"),
        ({"lora": "r=2", "freeze": 1}, "--lora freezes all of the encoder"),
        ({"lora": "r=2", "train_last": 1}, "--lora freezes all of the encoder"),
        ({"lora": "r=2", "head_width": 8}, "leave out --lora or --head-width"),
        ({"lora": "r=2,targets=q_proj"}, "model .*bert has no linear layer q_proj to adapt; its"),
        ({"task": "token-classification", "head_width": 8}, "is for classifiers of whole texts"),
    ],
)
def test_parts_that_cannot_be_trained_are_refused(
    options: Make, changes: dict[str, Any], told: str
) -> None:
    pytest.importorskip("peft", reason="peft is optional")
    with pytest.raises(UsageError, match=told):
        finetune(options(**changes))


# The length at which a teacher was tuned


@pytest.mark.parametrize("result", [None, {"max_length": 12}, {"max_length": None}, ["x"], 7])
def test_a_folder_says_at_which_length_its_teacher_was_tuned(
    options: Make, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, result: Any
) -> None:
    """Also one whose file is anything."""
    out = Path(shutil.copytree(folder / "bert", tmp_path / "teacher"))
    document = {"options": {"max_length": 9}, "result": result}
    (out / "finetune.json").write_text(json.dumps(document))
    tuned = TeacherFiles.find(str(out)).tuned
    known = result if isinstance(result, dict) else {}
    assert tuned == {name: n for name, n in known.items() if n is not None}
    (out / "finetune.json").write_text(json.dumps({"result": {"max_length": "9"}}))
    assert TeacherFiles.find(str(out)).tuned == {}
    assert TeacherFiles.find(str(folder / "bert")).tuned == {}


def test_a_build_takes_that_length_or_says_the_difference(
    options: Make, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = finetune(options(max_length=None))  # the model reads 32 tokens
    assert finetune(options(out=str(tmp_path / "short"), max_length=6)).max_length == 6
    assert made.max_length == 32
    build_options = BuildOptions(
        teacher=str(tmp_path / "short"), task="sequence-classification",
        corpus=str(folder / "test.jsonl"), out=str(tmp_path / "cache"), workers=0, limit=4,
    )  # fmt: skip
    build(build_options)
    assert Cache.open(build_options.out).spec.max_length == 6
    assert "was fine-tuned at" not in caplog.text
    build(dataclasses.replace(build_options, max_length=16, out=str(tmp_path / "long")))
    assert Cache.open(str(tmp_path / "long")).spec.max_length == 16
    assert "was fine-tuned at --max-length 6, and answers at 16 here" in caplog.text
