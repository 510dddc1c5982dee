"""Adapters: trained, kept and resumed as such; merged as students and as teachers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import further
from make_caches import CAUSAL, make_cache
from safetensors.torch import load_file, save_file
from small_runs import BERT, LLAMA, StopError, same, stop_at, weights
from test_projection import compare
from test_student import causal_batch, causal_model
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
)

import kdcache
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.prepare import RunPlan
from kdcache.commands.train.run import Run
from kdcache.commands.train.student import make_student
from kdcache.commands.train.train import train
from kdcache.errors import UsageError
from kdcache.lora import Lora
from kdcache.student import DistilledStudent, StudentInfo, load_student
from kdcache.student.adapter import trained_weights, with_lora
from kdcache.student.saved import SavedModel
from kdcache.teacher import TeacherFiles

pytest.importorskip("peft", reason="peft is optional")

pytestmark = pytest.mark.slow

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
LORA = "r=2,alpha=8"


def save(model: Any, folder: Path, cache: Any) -> str:
    """A model's folder, with the tokenizer of a cache."""
    model.save_pretrained(folder)
    cache.tokenizer().save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches `classes` (45 rows) and `causal` (24), and models with random weights: the encoder
    `bert` and the language model `llama`."""
    folder = tmp_path_factory.mktemp("lora")
    classes = make_cache(folder / "classes", [20, 14, 11])
    causal = make_cache(folder / "causal", [14, 10], task=CAUSAL, codec="topk:6")
    torch.manual_seed(0)
    for name, cache, values, auto in (
        ("bert", classes, BERT, AutoModel),
        (
            "llama",
            causal,
            LLAMA | {"bos_token_id": None, "eos_token_id": None},
            AutoModelForCausalLM,
        ),
    ):
        config = kdcache_config(values)
        save(auto.from_config(config), folder / name, cache)
    return folder


def kdcache_config(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**{"vocab_size": 64, "pad_token_id": 0, **values})


Make = Callable[..., TrainOptions]


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> Make:
    def make(kind: str = "llama", **changes: Any) -> TrainOptions:
        values: dict[str, Any] = {
            "cache": str(folder / ("causal" if kind == "llama" else "classes")),
            "student": str(folder / kind), "out": str(tmp_path / "run"), "lora": LORA,
            "batch_size": 8, "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1,
            "alpha": 0.3, "report_to": "none",
        }  # fmt: skip
        return TrainOptions(**(values | changes))

    return make


def test_the_option() -> None:
    assert Lora.parse("r=16") == Lora(16, 32.0)
    full = Lora.parse("targets=q_proj+v_proj, r=4, alpha=8, dropout=0.1")
    assert full == Lora(4, 8.0, 0.1, ("q_proj", "v_proj"))
    for one in (full, Lora(16, 1.5)):
        assert Lora.parse(str(one)) == one
    for wrong in (
        *("", "r", "r=", "r=x", "alpha=3", "r=1,r=2", "r=0", "r=2,alpha=0", "r=2,alpha=inf"),
        *("r=2,dropout=1", "r=2,rank=3", "r=2,targets=a+", "r=2,targets=a+all-linear", "r=1.5"),
    ):
        with pytest.raises(UsageError, match="--lora is"):
            TrainOptions(cache="c", student="s", out="o", lora=wrong)
    with pytest.raises(UsageError, match="--fsdp"):
        TrainOptions(cache="c", student="s", out="o", lora="r=1", fsdp=True, num_workers=2)


# Loss and gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fused_loss_and_gradients_equal_the_plain_way(
    tmp_path: Path, kind: str, checkpointing: bool
) -> None:
    torch.manual_seed(0)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    causal_model(kind, **(no_dropout if kind == "gpt2" else {})).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    info = StudentInfo(task=CAUSAL, vocab_size=base.config.vocab_size)
    files = TeacherFiles.find(str(tmp_path))
    model = with_lora(base, Lora(2, 8.0), str(tmp_path), files, info).double()
    student = DistilledStudent(model, CAUSAL, alpha=0.3)
    own = trained_weights(student)
    assert all("lora_" in name for name in own)
    for weight in own.values():  # B begins as zeros, of which the gradient of A is nothing
        torch.nn.init.normal_(weight, std=0.3)
    if checkpointing:
        student.gradient_checkpointing_enable()
    compare(student.train(), causal_batch())
    assert student._projection is not None
    assert student._projection.layer is not None
    student(**causal_batch()).loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in own.values())
    assert not any(p.grad is not None for p in student.parameters() if not p.requires_grad)


# A run


def batch_of(cache: Path) -> dict[str, Tensor]:
    from kdcache.stream import Collator, TargetDataset

    rows = TargetDataset([kdcache.Cache.open(str(cache))])
    batch = Collator(pad_id=0, temperature=None)([rows[i] for i in range(4)])
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("kind", ["llama", *further("bert")])
def test_a_run_is_an_adapter_and_goes_on_to_the_bit(
    options: Make, folder: Path, tmp_path: Path, kind: str
) -> None:
    cache = folder / ("causal" if kind == "llama" else "classes")
    common = {"eval_cache": str(cache), "eval_steps": 2, "gradient_accumulation": 2}
    whole, halves = (options(kind, out=str(tmp_path / n), **common) for n in ("whole", "halves"))
    result = train(whole)
    with pytest.raises(StopError):
        train(halves, on_progress=stop_at(3))
    train(halves)
    assert same(halves.out, whole.out)
    numbers = sum(t.numel() for t in weights(whole.out).values())
    assert result.trained == numbers < result.parameters
    assert not (tmp_path / "whole" / "config.json").exists()
    held = [load_file(path) for path in tmp_path.glob("whole/checkpoint-*/model.safetensors")]
    assert [sum(t.numel() for t in one.values()) for one in held] == [numbers] * 2
    assert train(whole).made is False  # it is known as finished

    # The library's own way, and ours, which merges.
    auto = AutoModelForCausalLM if kind == "llama" else AutoModelForSequenceClassification
    more = {} if kind == "llama" else {"num_labels": 3}
    inputs = batch_of(cache)
    with torch.no_grad():
        peft_way = auto.from_pretrained(whole.out, **more).eval()(**inputs).logits
        state = torch.random.get_rng_state()
        student: Any = kdcache.load_student(whole.out)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert type(student) is auto._model_mapping[type(student.config)]
        torch.testing.assert_close(student(**inputs).logits, peft_way)
    saved = SavedModel.find(whole.out)
    assert saved.parameters == sum(p.numel() for p in student.parameters())
    if kind == "bert":
        assert saved.label_names == ("c0", "c1", "c2")
        assert student.config.id2label == {0: "c0", 1: "c1", 2: "c2"}
    base = load_student(str(folder / kind), info_of(folder, kind))
    changed = sum(
        not torch.equal(a, b) for a, b in zip(base.parameters(), student.parameters(), strict=True)
    )
    assert changed >= 7


def info_of(folder: Path, kind: str) -> StudentInfo:
    if kind == "llama":
        return StudentInfo(task=CAUSAL, vocab_size=64)
    return StudentInfo(task="sequence-classification", vocab_size=64, num_labels=3)


@pytest.mark.parametrize("config", [
    RobertaConfig(**SIZES | {"max_position_embeddings": 40}, type_vocab_size=2),
    DistilBertConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2, hidden_dim=16, pad_token_id=0),
    GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, pad_token_id=0,
               bos_token_id=0, eos_token_id=0),
], ids=lambda c: str(c.model_type))  # fmt: skip
def test_whatever_the_head_is_called_all_of_it_is_kept(
    options: Make, folder: Path, tmp_path: Path, config: Any
) -> None:
    """Heads of several layers, of other names, and poolers that the encoder's files lack."""
    cache = kdcache.Cache.open(str(folder / "classes"))
    student = save(AutoModel.from_config(config), tmp_path / "base", cache)
    chosen = options("classes", student=student, max_steps=2, seed=3)
    seen: dict[str, Tensor] = {}
    run = Run.prepare(RunPlan.make(chosen))
    run.train()
    inputs = batch_of(folder / "classes")
    run.student.eval()
    with torch.no_grad():
        seen["trained"] = run.student.student(**inputs).logits
        loaded: Any = kdcache.load_student(chosen.out)
        torch.testing.assert_close(loaded(**inputs).logits, seen["trained"])


# Adapters that were trained


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `llama` and `bert` of the models of `folder`."""
    out = tmp_path_factory.mktemp("adapters")
    for kind, cache in (("llama", "causal"), ("bert", "classes")):
        train(
            TrainOptions(
                cache=str(folder / cache), student=str(folder / kind), out=str(out / kind),
                lora=LORA, max_steps=3, batch_size=8, learning_rate=0.1, report_to="none",
            )
        )  # fmt: skip
    return out


def test_students_and_teachers_may_be_adapters(
    folder: Path, adapters: Path, tmp_path: Path
) -> None:
    """Evaluated, predicted with, built with and trained on like the model that they make."""
    for kind, cache in (("llama", "causal"), ("bert", "classes")):
        merged: Any = kdcache.load_student(str(adapters / kind))
        whole = save(merged, tmp_path / kind, kdcache.Cache.open(str(folder / cache)))
        names = (whole, str(adapters / kind))
        scores = kdcache.evaluate(
            kdcache.EvaluateOptions(student=names, cache=str(folder / cache))
        ).models[-2:]
        a, b = ({**vars(one), "name": ""} for one in scores)
        assert a == b
    corpus = tmp_path / "texts.tsv"
    corpus.write_text("text\n" + "".join(f"w{i} w{3 * i} w{i + 9}\n" for i in range(2, 20)))
    lines, caches = [], []
    for student in (tmp_path / "bert", adapters / "bert"):
        out = tmp_path / f"{len(lines)}.jsonl"
        kdcache.predict(
            kdcache.PredictOptions(student=str(student), corpus=(str(corpus),), out=str(out))
        )
        lines.append([json.loads(line) for line in out.read_text().splitlines()])
    assert lines[0] == lines[1]
    assert lines[0][0]["probabilities"].keys() == {"c0", "c1", "c2"}
    for name, teacher in (("merged", tmp_path / "bert"), ("adapter", adapters / "bert")):
        kdcache.build(
            kdcache.BuildOptions(
                teacher=(str(teacher),), corpus=(str(corpus),), out=str(tmp_path / name),
                task="sequence-classification", label_column="none", workers=0,
            )
        )  # fmt: skip
        caches.append(kdcache.Cache.open(str(tmp_path / name)))
    a, b = (cache.read(0).targets.columns for cache in caches)
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)
    # What it is depends on the base and on the adapter.
    teachers = [cache.spec.teachers[0]["sha256"] for cache in caches]
    own = TeacherFiles.find(str(adapters / "bert"))
    assert teachers[1] == own.sha256 != teachers[0]
    assert own.base is not None
    assert own.base.sha256 == TeacherFiles.find(str(folder / "bert")).sha256


def adapter(adapters: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the language model's adapter with other lines in its configuration."""
    shutil.copytree(adapters / "llama", folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_a_moved_or_changed_base_is_refused(folder: Path, adapters: Path, tmp_path: Path) -> None:
    def refused(name: Path, match: str) -> None:
        for find in (
            lambda: kdcache.load_student(str(name)),
            lambda: TeacherFiles.find(str(name)).sha256,
        ):
            with pytest.raises(UsageError, match=match) as told:
                find()
            assert "\n" not in str(told.value)

    gone = adapter(adapters, tmp_path / "gone", base_model_name_or_path=str(tmp_path / "moved"))
    refused(gone, "gone is an adapter, and its base .*moved cannot be used: .*neither a folder")
    shutil.copytree(folder / "llama", tmp_path / "moved")
    kdcache.load_student(str(gone))  # it is back
    path = tmp_path / "moved" / "model.safetensors"
    weights = load_file(path)
    save_file({n: t + 1 for n, t in weights.items()}, path, metadata={"format": "pt"})
    refused(gone, "gone was trained on other weights than .*moved has now")
    (gone / "kdcache_adapter.json").unlink()
    kdcache.load_student(str(gone))  # an adapter of another program does not know
    refused_base = adapter(adapters, tmp_path / "none", base_model_name_or_path=None)
    refused(refused_base, "names no base")
    twice = adapter(adapters, tmp_path / "twice", base_model_name_or_path=str(tmp_path / "twice"))
    refused(twice, "its base .*twice cannot be used: it is an adapter, too")


def test_adapters_that_do_not_fit_are_refused(folder: Path, adapters: Path, tmp_path: Path) -> None:
    def refused(name: Path, match: str) -> None:
        with pytest.raises(UsageError, match=match) as told:
            kdcache.load_student(str(name))
        assert "\n" not in str(told.value)

    pickled = adapter(adapters, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(pickled, "without weights: .*adapter_model.bin is not loaded")
    half = adapter(adapters, tmp_path / "half")
    weights = load_file(half / "adapter_model.safetensors")
    for name, match in (("lora_A", "does not fit"), ("lora_B", "does not fit")):
        kept = {n: t for n, t in weights.items() if name not in n or "layers.0.mlp" not in n}
        assert len(kept) < len(weights)
        save_file(kept, half / "adapter_model.safetensors")
        refused(half, match)
    save_file(
        {n: torch.cat([t, t]) for n, t in weights.items()}, half / "adapter_model.safetensors"
    )
    refused(half, "does not fit its base")
    (half / "adapter_model.safetensors").write_bytes(b"x" * 100)
    refused(half, "adapter_model.safetensors cannot be read")
    facts = adapter(adapters, tmp_path / "facts")
    for wrong in ('{"label_names": 3}', '{"pad_id": "x"}'):
        (facts / "kdcache_adapter.json").write_text(wrong)
        refused(facts, "^student .*facts: invalid values in kdcache_adapter.json")
    refused(adapter(adapters, tmp_path / "r", r=8), "^student .*does not fit its base")
    refused(adapter(adapters, tmp_path / "e", base_model_name_or_path=""), "names no base")
    refused(adapter(adapters, tmp_path / "m", megatron_config={"a": 1}), "for Megatron")
    refused(adapter(adapters, tmp_path / "k", peft_type="NO_SUCH"), "does not fit its base")
    drawn = adapter(adapters, tmp_path / "drawn", init_lora_weights="pissa_niter_4")
    refused(drawn, "pissa_niter_4.* random")
    exact = adapter(adapters, tmp_path / "exact", init_lora_weights="pissa")
    kdcache.load_student(str(exact))  # takes the same from its base each time
    config = json.loads((adapters / "llama" / "adapter_config.json").read_text())
    prompt = adapter(adapters, tmp_path / "prompt")
    kept = {k: config[k] for k in ("base_model_name_or_path", "task_type")}
    (prompt / "adapter_config.json").write_text(
        json.dumps({**kept, "peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2})
    )
    refused(prompt, "PROMPT_TUNING, which adds tokens")


def test_students_that_cannot_be_adapted_are_refused(
    options: Make, folder: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama.json").write_text(json.dumps(LLAMA))
    for student, match in (
        (str(tmp_path / "llama.json"), "--lora adapts Hugging Face models with their weights"),
        ("module:function", "--lora adapts Hugging Face models with their weights"),
        (str(adapters / "llama"), "is an adapter of .*llama, and --lora would add another"),
    ):
        with pytest.raises(UsageError, match=match):
            train(options(student=student))
    with pytest.raises(
        UsageError, match="no linear layer w_proj to adapt; its layers are down_proj"
    ):
        train(options(lora="r=2,targets=q_proj+w_proj"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="--lora needs the extra `lora`, which is missing"):
        train(options())
    with pytest.raises(UsageError, match="an adapter, needs the extra `lora`, which is missing"):
        kdcache.load_student(str(adapters / "llama"))


def test_a_changed_base_ends_a_run_that_would_go_on(
    options: Make, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "llama", tmp_path / "base")
    chosen = options(student=str(tmp_path / "base"), save_steps=2)
    with pytest.raises(StopError):
        train(chosen, on_progress=stop_at(3))
    path = tmp_path / "base" / "model.safetensors"
    changed = {name: t + 1 for name, t in load_file(path).items()}
    save_file(changed, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="base_sha256"):
        train(chosen)


# Starting from an earlier student


def test_a_student_begins_with_the_weights_of_an_earlier_one(
    options: Make, folder: Path, adapters: Path, tmp_path: Path
) -> None:
    def prepared(**changes: Any) -> Any:
        return make_student(RunPlan.make(options(**changes)))[0].student

    def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    llama, merged = str(adapters / "llama"), kdcache.load_student(str(adapters / "llama"))
    adapted = prepared(init_from=llama)
    assert adapted.peft_config["default"].r == 2
    held = load_file(adapters / "llama" / "adapter_model.safetensors")
    from peft import get_peft_model_state_dict

    assert same(get_peft_model_state_dict(adapted, save_embedding_layers=False), held)
    assert len(trained_weights(adapted)) == len(held)
    assert same(prepared(init_from=llama, lora=None).state_dict(), merged.state_dict())
    config = tmp_path / "llama.json"
    config.write_text((folder / "llama" / "config.json").read_text())
    fresh = prepared(student=str(config), lora=None, init_from=llama)
    assert same(fresh.state_dict(), merged.state_dict())
    wider = tmp_path / "wider.json"
    wider.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 24}))
    other = tmp_path / "other"
    shutil.copytree(folder / "llama", other)
    weights = {n: 2 * t for n, t in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    for changes, match in (
        (
            {"student": str(wider), "lora": None},
            "has another shape than the student: size mismatch",
        ),
        ({"lora": "r=2,alpha=4"}, "is an adapter of r=2, alpha=8, the new one is r=2,alpha=4"),
        ({"lora": "r=2,alpha=8,targets=q_proj"}, "does not fit its base"),
        ({"init_from": str(folder / "llama")}, "is a whole model, and --lora trains an adapter"),
        ({"init_from": str(tmp_path / "no")}, "run .*no is neither a folder"),
        ({"student": str(other)}, "was trained on other weights"),
    ):
        with pytest.raises(UsageError, match=match) as told:
            prepared(**{"init_from": llama, **changes})
        assert "\n" not in str(told.value)


def test_words_of_an_earlier_student_must_be_the_same(folder: Path, tmp_path: Path) -> None:
    common = {"student": "bilstm", "hidden_size": 4, "embedding_size": 4, "max_steps": 1,
              "report_to": "none", "cache": str(folder / "classes")}  # fmt: skip
    train(TrainOptions(out=str(tmp_path / "one"), **common))
    begun = TrainOptions(
        out=str(tmp_path / "two"), init_from=str(tmp_path / "one"), learning_rate=1e-9, **common
    )
    train(begun)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name])
    assert f"{tmp_path / 'one'} (SHA-256 " in (tmp_path / "two" / "README.md").read_text()
    save_file({n: t + 1 for n, t in one.items()}, tmp_path / "one" / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(UsageError, match="init_sha256"):
        train(begun)
    with pytest.raises(UsageError, match="reads other tokens than the student"):
        train(TrainOptions(out=str(tmp_path / "three"), init_from=str(tmp_path / "one"),
                           min_count=5, **common))  # fmt: skip


@pytest.mark.filterwarnings("default")  # PEFT has advice of its own
@pytest.mark.parametrize("changed", ["embed_tokens", "lm_head", "embed_tokens lm_head", ""])
def test_an_adapter_of_one_of_two_tied_layers_leaves_the_other_alone(
    changed: str, tmp_path: Path
) -> None:
    import peft

    config = LlamaConfig(**SIZES, tie_word_embeddings=True, initializer_range=0.3)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    targets, kept = ["q_proj", *changed.split()], None if changed else ["embed_tokens"]
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig("CAUSAL_LM", r=2, target_modules=targets, modules_to_save=kept),
    ).eval()
    for name, weight in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            weight.data += 0.2 * torch.randn_like(weight)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        want = adapted(input_ids=ids).logits
        merged = load_student(str(tmp_path / "adapter"), StudentInfo("causal-lm", 64)).eval()
        torch.testing.assert_close(merged(input_ids=ids).logits, want, rtol=0, atol=1e-4)
        merged.save_pretrained(tmp_path / "whole")  # type: ignore[operator]
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
        torch.testing.assert_close(whole(input_ids=ids).logits, want, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("given", [{"target_modules": ["shared"]}, {"target_modules": ["lm_head"]},
                                   {"modules_to_save": ["lm_head"]}])  # fmt: skip
def test_an_adapter_of_a_tied_layer_of_a_sequence_to_sequence_model_is_refused(
    given: dict[str, list[str]], tmp_path: Path
) -> None:
    import peft
    from transformers import AutoModelForSeq2SeqLM, T5Config

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    config = T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(base)
    for changed, refused in ((given, True), ({"target_modules": ["q"]}, False)):
        lora = peft.LoraConfig("SEQ_2_SEQ_LM", r=2, **({"target_modules": ["q"]} | changed))
        whole = AutoModelForSeq2SeqLM.from_pretrained(base)
        peft.get_peft_model(whole, lora).save_pretrained(adapter)
        if refused:
            with pytest.raises(UsageError, match="whose weight other layers share"):
                load_student(str(adapter), StudentInfo("seq2seq-lm", 64))
        else:
            load_student(str(adapter), StudentInfo("seq2seq-lm", 64))
