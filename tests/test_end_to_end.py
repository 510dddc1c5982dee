"""The whole way with real Ray, real processes and the program itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from broken_caches import files
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from kdcache import (
    BuildOptions,
    Cache,
    Collator,
    DistilledStudent,
    EvaluateOptions,
    TargetDataset,
    TrainOptions,
    build,
    evaluate,
    train,
)
from kdcache.cli.main import cli
from kdcache.errors import UsageError
from kdcache.targets import DenseTargets

pytestmark = pytest.mark.end_to_end


def run(*words: str) -> Result:
    """A command in this process; its output is shown where the test fails."""
    result = CliRunner().invoke(cli, list(words), catch_exceptions=False)
    print(result.output)
    return result


def options_of(tiny_lm: Path, text_corpus: Path, out: Path) -> BuildOptions:
    return BuildOptions(
        teacher=(str(tiny_lm),),
        corpus=(str(text_corpus),),
        out=str(out),
        codec="dense",
        max_length=32,
        shard_tokens=1500,
        workers=2,
    )


def test_two_workers_make_the_same_cache_as_none(
    ray: None, tiny_lm: Path, text_corpus: Path, tmp_path: Path
) -> None:
    options = options_of(tiny_lm, text_corpus, tmp_path / "ray")
    # Who makes which span, and whether the second worker is up in time for any, is left to chance;
    # `test_faults` holds builds until several work.
    result = build(options)
    assert result.made == result.spans > 5
    alone = options_of(tiny_lm, text_corpus, tmp_path / "alone")
    build(BuildOptions(**{**vars(alone), "workers": 0}))
    assert files(tmp_path / "ray") == files(tmp_path / "alone")


def test_what_a_worker_says_of_its_teacher_ends_the_build(
    ray: None, tiny_lm: Path, text_corpus: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_lm, teacher)
    weights = load_file(teacher / "model.safetensors")
    renamed = {name.replace("layers.1.", "others.1."): weights[name] for name in weights}
    save_file(renamed, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=rf"^teacher {teacher} has no weights for .*layers\.1"):
        build(options_of(teacher, text_corpus, tmp_path / "cache"))


def test_three_students_of_one_cache(
    ray: None, tiny_lm: Path, text_corpus: Path, tmp_path: Path
) -> None:
    build(options_of(tiny_lm, text_corpus, tmp_path / "cache"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    other = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 300,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 64,
    }
    students = {"hard": (config, "1"), "distilled": (config, "0.1"), "other": (other, "0.1")}
    for name, (values, alpha) in students.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(values))
        result = run(
            "train", "--cache", str(tmp_path / "cache"), "--student", str(path),
            "--out", str(tmp_path / name), "--alpha", alpha, "--temperature", "2",
            "--max-steps", "60", "--batch-size", "16", "--learning-rate", "1e-2", "--json",
        )  # fmt: skip
        assert result.exit_code == 0
    scores = evaluate(
        EvaluateOptions(
            student=tuple(str(tmp_path / name) for name in students),
            cache=str(tmp_path / "cache"),
        )
    )
    teacher, hard, distilled, gpt2 = scores.models
    assert distilled.kl < hard.kl
    assert gpt2.kl < hard.kl
    assert teacher.kl in (None, 0.0)


def test_a_student_learns_the_same_from_the_cache_as_beside_the_teacher(
    tiny_lm: Path, text_corpus: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    options = options_of(tiny_lm, text_corpus, tmp_path / "cache")
    build(BuildOptions(**{**vars(options), "workers": 0}))
    cache = Cache.open(options.out)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    losses = {}
    for source in ("cache", "teacher"):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2,
        )  # fmt: skip
        student = DistilledStudent(
            LlamaForCausalLM(config), "causal-lm", alpha=0.5, vocab_size=300
        )  # fmt: skip
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        dataset = TargetDataset([cache])
        collate = Collator(cache.spec.pad_id, temperature=2.0)
        losses[source] = []
        for step in range(8):
            batch = collate([dataset[step * 8 + i] for i in range(8)])
            if source == "teacher":
                with torch.no_grad():
                    logits = teacher(batch["input_ids"], batch["attention_mask"]).logits
                batch["targets"] = DenseTargets(logits[batch["labels"] != -100], 2.0)
            loss = student(**batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[source].append(loss.item())
    assert losses["cache"] == pytest.approx(losses["teacher"], abs=1e-5)
    assert losses["cache"][-1] < losses["cache"][0]


def test_the_original_method_command_by_command(
    tiny_classifier: Path, labelled_corpus: Path, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    built = run(
        "build", "--teacher", str(tiny_classifier), "--task", "sequence-classification",
        "--corpus", str(labelled_corpus), "--max-length", "48", "--workers", "0", "--out", cache,
    )  # fmt: skip
    assert built.exit_code == 0
    assert "200 positions" in built.output
    for divergence in ("forward-kl", "mse"):
        trained = run(
            "train", "--cache", cache, "--student", "bilstm", "--hidden-size", "16",
            "--embedding-size", "16", "--dense-size", "8", "--out", str(tmp_path / divergence),
            "--divergence", divergence, "--epochs", "2", "--eval-cache", cache,
        )  # fmt: skip
        assert trained.exit_code == 0
    scores = run(
        "evaluate", "--student", str(tmp_path / "mse"), "--student", str(tmp_path / "forward-kl"),
        "--cache", cache, "--json",
    )  # fmt: skip
    assert len(json.loads(scores.output)["models"]) == 3
    out = tmp_path / "labels.jsonl"
    predicted = run(
        "predict", "--student", str(tmp_path / "mse"), "--corpus", str(labelled_corpus),
        "--out", str(out),
    )  # fmt: skip
    assert predicted.exit_code == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 200
    assert set(lines[0]["probabilities"]) == {"bad", "neutral", "good"}
    assert run("inspect", cache, "--row", "3").exit_code == 0
    assert "all good" in run("verify", cache).output


def test_the_same_training_command_does_nothing_twice(
    tiny_classifier: Path, labelled_corpus: Path, tmp_path: Path
) -> None:
    build(
        BuildOptions(
            teacher=(str(tiny_classifier),),
            corpus=(str(labelled_corpus),),
            out=str(tmp_path / "cache"),
            task="sequence-classification",
            max_length=32,
            workers=0,
        )
    )
    options = TrainOptions(
        cache=(str(tmp_path / "cache"),), student="bilstm", out=str(tmp_path / "run"),
        hidden_size=8, embedding_size=8, dense_size=8,
    )  # fmt: skip
    first = train(options)
    assert first.made
    again = train(options)
    assert not again.made
    assert again.loss == first.loss
