"""Students: made, loaded, checked and saved; and their losses against the model's own logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from make_caches import word_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdcache.errors import UsageError
from kdcache.loss import distillation_loss
from kdcache.student import (
    DistilledStudent,
    StudentInfo,
    load_student,
    student_tokenize,
)
from kdcache.targets import DenseTargets, SparseTargets

V = 40
LM = StudentInfo("causal-lm", vocab_size=V, pad_id=0, bos_id=1, eos_id=2, seed=3)
TEXTS = ["A fine film, isn't it?", "A dull film.", "Fine!"]
CLASSES = StudentInfo(
    "sequence-classification", vocab_size=V, num_labels=2, label_names=("bad", "good"), texts=TEXTS
)

SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


def causal_model(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **{**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Random weights make logits near 0, where a soft cap does nothing: give them some size.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def causal_batch(codec: str = "sample:3", t: float = 2.0, vocab: int = V) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    labels = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], 1)
    mask[1, 5:], ids[1, 5:], labels[1, 4:] = 0, 0, -100
    labels[2, :3] = -100
    n = int((labels != -100).sum())
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
    }
    teacher = torch.randn(n, vocab, generator=generator)
    if codec == "dense":
        return {**batch, "targets": DenseTargets(teacher, t)}
    weights, top = (teacher / t).softmax(-1).topk(3, -1)
    exact = codec.startswith("topk")
    rest = 1 - weights.sum(-1) if exact else torch.zeros(n)
    return {**batch, "targets": SparseTargets(top, weights, rest, exact, t)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_is_found_even_while_logits_are_small(dtype: torch.dtype) -> None:
    model = causal_model("gemma2", final_logit_softcapping=30.0, head_dim=8).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e-2)
    student = DistilledStudent(model, "causal-lm")
    assert student(**causal_batch()).loss.requires_grad
    assert student._projection is not None
    assert (student._projection.scale, student._projection.cap) == (1.0, 30.0)


def test_the_head_check_draws_no_random_numbers_and_restores_modes() -> None:
    model = causal_model("gpt2", n_embd=16, n_layer=1, n_head=2).train()
    model.transformer.h[0].eval()
    student = DistilledStudent(model, "causal-lm")
    state = torch.get_rng_state()
    student._project(causal_batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.transformer.h[0].training


def test_gradient_checkpointing_and_autocast() -> None:
    model = causal_model("llama").train()
    student = DistilledStudent(model, "causal-lm")
    plain = student(**causal_batch())
    plain.loss.backward()
    want = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    student.gradient_checkpointing_enable()
    again = student(**causal_batch())
    again.loss.backward()
    torch.testing.assert_close(again.loss, plain.loss)
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, want)
    student.gradient_checkpointing_disable()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = student(**causal_batch())
    low.loss.backward()
    torch.testing.assert_close(low.loss, plain.loss, rtol=0.05, atol=0.05)


def test_count_alpha_and_hard_labels_alone() -> None:
    model = causal_model("llama").eval()
    student = DistilledStudent(model, "causal-lm", alpha=0.3)
    batch = causal_batch()
    n = int((batch["labels"] != -100).sum())
    full = student(**batch)
    torch.testing.assert_close(student(**batch, count=torch.tensor(2.0 * n)).loss, full.loss / 2)
    torch.testing.assert_close(student(**batch, num_items_in_batch=2 * n).loss, full.loss / 2)
    torch.testing.assert_close(full.loss, 0.3 * full.hard_loss + 0.7 * full.soft_loss)
    student.alpha = 0.9
    torch.testing.assert_close(student(**batch).loss, 0.9 * full.hard_loss + 0.1 * full.soft_loss)
    scheduled = student(**batch, alpha=torch.tensor([0.6])).loss
    torch.testing.assert_close(scheduled, 0.6 * full.hard_loss + 0.4 * full.soft_loss)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    hard = student(**inputs)
    torch.testing.assert_close(hard.loss, full.hard_loss)
    assert hard.soft_loss is None
    assert hard.logits is None
    assert student(**batch, return_logits=True).logits.shape == (3, 7, V)


class Tiny(nn.Module):
    """A user's own language model: a tensor in, a tensor out."""

    def __init__(self, info: StudentInfo) -> None:
        super().__init__()
        self.embedding = nn.Embedding(info.vocab_size, 8)
        self.out = nn.Linear(8, info.num_labels or info.vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.embedding(input_ids)
        return self.out(states if self.out.out_features == V else states.mean(1))  # type: ignore[no-any-return]


def test_module_function_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from test_student import Tiny as make\n\ndef wrong(info):\n    return 3\n"
    (tmp_path / "my_students.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model = load_student("my_students:make", LM)
    batch = causal_batch()
    student = DistilledStudent(model, "causal-lm")
    loss = student(**batch).loss
    logits = model(batch["input_ids"])
    places = batch["labels"] != -100
    torch.testing.assert_close(
        loss,
        distillation_loss(
            logits[places], batch["labels"][places], batch["targets"], alpha=0.5
        ).total,
    )
    student.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        load_student(str(tmp_path / "saved"), LM, trust_remote_code=True)(batch["input_ids"]),
        logits,
    )
    with pytest.raises(UsageError, match=r"returned int; it must return a torch\.nn\.Module"):
        load_student("my_students:wrong", LM)
    with pytest.raises(UsageError, match="has no absent"):
        load_student("my_students:absent", LM)
    with pytest.raises(UsageError, match="Run in the folder of"):
        load_student("no_such_module_here:make", LM)
    with pytest.raises(UsageError, match="no gradient checkpointing"):
        student.gradient_checkpointing_enable()


def test_config_file_seed_and_hf_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(
        json.dumps({"model_type": "llama", **{k: v for k, v in SIZES.items() if k != "vocab_size"}})
    )
    state = torch.get_rng_state()
    model: Any = load_student(str(path), LM)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.config.vocab_size, model.config.pad_token_id, model.config.eos_token_id) == (
        V,
        0,
        2,
    )
    same, other = (
        load_student(str(path), LM),
        load_student(str(path), StudentInfo("causal-lm", V, seed=4)),
    )
    weights = [dict(m.named_parameters())["lm_head.weight"] for m in (model, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    DistilledStudent(model, "causal-lm").save_pretrained(tmp_path / "run")
    again: Any = load_student(str(tmp_path / "run"), LM)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    with pytest.raises(
        UsageError, match=r"vocabulary of 40, the cache's is 512.*teacher's vocabulary"
    ):
        load_student(str(tmp_path / "run"), StudentInfo("causal-lm", 512))
    large = {"model_type": "llama", **SIZES, "vocab_size": 5000}
    (tmp_path / "large.json").write_text(json.dumps(large))
    with pytest.raises(UsageError, match="vocabulary of 5000, the cache's is 40"):
        load_student(str(tmp_path / "large.json"), LM)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.json", None, "no such file"),
        ("bad.json", "{", "not JSON"),
        ("plain.json", "{}", '"model_type"'),
        ("odd.json", '{"model_type": "no-such-thing"}', "not a causal-lm architecture"),
        ("absent", None, "student .*absent is neither a folder here"),
        ("bare/config.json", json.dumps({"model_type": "llama", **SIZES}), "student .* no weights"),
        ("bilstm", None, "bilstm is a classifier"),
    ],
)
def test_students_that_are_none(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    bare = path.parent if "/" in name else path  # a folder of that file alone
    with pytest.raises(UsageError, match=message):
        load_student("bilstm" if name == "bilstm" else str(bare), LM)


@pytest.mark.parametrize("lost", ["classifier.weight", "bert.encoder.layer.0.output.dense.bias"])
@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "BertModel"])
def test_lost_weights_are_not_made_up(tmp_path: Path, lost: str, architecture: str) -> None:
    """A plain encoder gets a new head; whatever else is missing would be random in silence."""
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(lost)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "architectures": [architecture]}))
    if lost == "classifier.weight" and architecture == "BertModel":
        load_student(str(tmp_path), CLASSES)
        return
    with pytest.raises(UsageError, match=f"no weights for {lost}"):
        load_student(str(tmp_path), CLASSES)
    causal_model("llama").save_pretrained(tmp_path)  # a language model without its head
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"no weights for lm_head\.weight"):
        load_student(str(tmp_path), LM)


def test_another_tokenizer_is_found_though_sizes_agree(tmp_path: Path) -> None:
    def tokenizer(words: str) -> Any:
        model = transformers.PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(words))
        model.pad_token = model.unk_token = "?"
        return model

    def word_tokenizer(words: str) -> Any:
        import tokenizers

        vocabulary = {w: i for i, w in enumerate(["?", *words])}
        return tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))

    model = causal_model("llama")
    model.save_pretrained(tmp_path)
    tokenizer("abc").save_pretrained(tmp_path)
    load_student(str(tmp_path), StudentInfo("causal-lm", V, tokenizer=tokenizer("abc")))
    with pytest.raises(UsageError, match="2 ids mean different tokens"):
        load_student(str(tmp_path), StudentInfo("causal-lm", V, tokenizer=tokenizer("acb")))


# --- classification ---


def test_a_tokenizer_that_cannot_pad_is_refused_in_a_line(tmp_path: Path) -> None:
    for name, content in word_tokenizer().items():
        (tmp_path / name).write_bytes(content)
    own = transformers.AutoTokenizer.from_pretrained(tmp_path)
    own.pad_token = None
    own.save_pretrained(tmp_path)
    info = StudentInfo("sequence-classification", 64, 2)
    with pytest.raises(UsageError, match="has no padding token, which batches of texts need"):
        student_tokenize(nn.Linear(1, 1), str(tmp_path), info)


@pytest.mark.parametrize(
    ("divergence", "t"), [("forward-kl", 2.0), ("mse", 1.0), ("jsd", 4.0), ("reverse-kl", 2.0)]
)
def test_classification_loss(divergence: str, t: float) -> None:
    model = load_student("bilstm", CLASSES)
    tokenize = student_tokenize(model, "bilstm", CLASSES)
    assert tokenize is not None
    inputs = dict(tokenize(TEXTS, None))
    labels, teacher = torch.tensor([1, -100, 0]), torch.randn(3, 2)
    student = DistilledStudent(
        model,
        "sequence-classification",
        alpha=0.2,
        divergence=divergence,
    )
    out = student(
        **inputs,
        labels=labels,
        targets=DenseTargets(teacher, t),
        token_type_ids=labels,
    )
    want = distillation_loss(
        model(**inputs).logits,
        labels,
        DenseTargets(teacher, t),
        alpha=0.2,
        divergence=divergence,
    )
    torch.testing.assert_close(out.loss, want.total)
    torch.testing.assert_close(out.logits, model(**inputs).logits)
    hard = student(**inputs, labels=labels)
    torch.testing.assert_close(hard.loss, want.hard * 3 / 2)  # the mean over rows that have a label
    assert not student.accepts_loss_kwargs


def test_real_classifier_as_student(minilm_sst2: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_sst2)
    info = StudentInfo(
        "sequence-classification", len(tokenizer), 2, ("negative", "positive"), tokenizer=tokenizer
    )
    model: Any = load_student(str(minilm_sst2), info)
    assert next(model.parameters()).dtype == torch.float32
    assert student_tokenize(model, str(minilm_sst2), info) is None
    with pytest.raises(UsageError, match="has 2 classes, the cache has 3"):
        load_student(str(minilm_sst2), StudentInfo("sequence-classification", len(tokenizer), 3))
    out = DistilledStudent(model, info.task)(
        **tokenizer(TEXTS, padding=True, return_tensors="pt"),
        labels=torch.tensor([1, 0, 1]),
        targets=DenseTargets(torch.zeros(3, 2), 1.0),
    )
    assert out.logits.shape == (3, 2)
    stranger: Any = transformers.AutoTokenizer.from_pretrained(minilm_sst2)
    stranger.add_tokens(["zyzzyva"])
    own = student_tokenize(
        model,
        str(minilm_sst2),
        StudentInfo(info.task, len(stranger), 2, tokenizer=stranger, max_length=5),
    )
    assert own is not None
    assert own(TEXTS, TEXTS)["input_ids"].shape == (3, 5)


def test_plain_encoder_gets_a_seeded_head(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    first, second = (load_student(str(tmp_path), CLASSES) for _ in range(2))
    heads = [dict(m.named_parameters())["classifier.weight"] for m in (first, second)]
    assert heads[0].shape == (2, 16)
    assert torch.equal(*heads)
    assert first.config.id2label == {0: "bad", 1: "good"}  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="embeds 40 ids, the cache's tokenizer has 41"):
        load_student(str(tmp_path), StudentInfo("sequence-classification", V + 1, 2))


def test_a_new_student_of_scores_begins_at_their_mean(tmp_path: Path) -> None:
    """As a biLSTM, from a configuration and on a bare encoder; what was trained keeps its head."""
    size = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**size, intermediate_size=16)
    torch.manual_seed(0)
    bare, small, trained = (str(tmp_path / name) for name in ("bare", "small.json", "trained"))
    transformers.BertModel(config).save_pretrained(bare)
    Path(small).write_text(json.dumps({"model_type": "bert", "intermediate_size": 16, **size}))
    info = StudentInfo("regression", vocab_size=V, num_labels=1, texts=TEXTS, mean=37.5)
    ids = torch.randint(1, 4, (4, 6))  # the words of TEXTS are few
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("bilstm", bare, small):
        model: Any = load_student(name, info)
        with torch.no_grad():
            assert model.eval()(**inputs).logits == pytest.approx(37.5, abs=2)
            unknown = load_student(name, replace(info, mean=None, texts=TEXTS)).eval()
            assert unknown(**inputs).logits == pytest.approx(0, abs=2)
    model.save_pretrained(trained)
    kept: Any = load_student(trained, replace(info, mean=-5.0))
    assert kept.classifier.bias.item() == 37.5


def test_classes_in_another_order_are_refused(student_classifier: Path) -> None:
    """Its head would begin with good and bad exchanged; other names are taken over."""
    task, size = "sequence-classification", 300
    with pytest.raises(UsageError, match="bad, neutral, good in this order, the cache good, neu"):
        load_student(
            str(student_classifier), StudentInfo(task, size, 3, ("good", "neutral", "bad"))
        )
    names = ("one", "two", "three")
    model: Any = load_student(str(student_classifier), StudentInfo(task, size, 3, names))
    assert tuple(model.config.id2label.values()) == names


def test_classifier_from_config(tmp_path: Path) -> None:
    raw = {
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    path = tmp_path / "bert.json"
    path.write_text(json.dumps(raw))
    model: Any = load_student(str(path), CLASSES)
    assert (model.config.num_labels, model.config.vocab_size) == (2, V)
    path.write_text(json.dumps({**raw, "num_labels": 3}))
    with pytest.raises(UsageError, match="3 classes, the cache has 2"):
        load_student(str(path), CLASSES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "no labels"),
        (
            {"targets": DenseTargets(torch.zeros(2, V), 1.0)},
            "2 soft targets for 13 positions",
        ),
        ({"alpha": torch.ones(12)}, "one number"),
    ],
)
def test_wrong_batches(change: dict[str, Any], message: str) -> None:
    student = DistilledStudent(causal_model("llama"), "causal-lm")
    batch = {k: v for k, v in {**causal_batch(), **change}.items() if v is not None}
    with pytest.raises(UsageError, match=message):
        student(**batch)


@pytest.mark.parametrize("divergence", ["reverse-kl", "jsd", "mse"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "bilstm"])
def test_a_sample_reaches_no_divergence_that_it_does_not_fit(kind: str, divergence: str) -> None:
    """Fused, with the model's own logits, and as a classifier."""
    batch = causal_batch("sample:3", t=1.0)
    if kind == "bilstm":
        student = DistilledStudent(
            load_student("bilstm", CLASSES), "sequence-classification", divergence=divergence
        )
        batch |= {"labels": torch.zeros(3, dtype=torch.int64), "targets": batch["targets"][:3]}
    else:
        sizes = {"head_dim": 8, "query_pre_attn_scalar": 8} if kind == "gemma2" else {}
        student = DistilledStudent(causal_model(kind, **sizes), "causal-lm", divergence=divergence)
    with pytest.raises(UsageError, match="biased on sampled targets|compares all logits"):
        student(**batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "forward-kl, reverse-kl, jsd, mse"),
        ({"tail": "drop"}, "bucket, renormalize"),
        ({"alpha": 1.5}, "from 0 to 1"),
        ({"task": "translation"}, "expected one of causal-lm, masked-lm, seq2seq-lm"),
    ],
)
def test_wrong_wrappers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DistilledStudent(nn.Identity(), **{"task": "causal-lm", **options})
