"""Of each task a teacher, two students and a corpus, and the slow way to a model's answers.

A new task is one entry of `EXAMPLES`: `test_every_task` then holds every command to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer, BartConfig, BertConfig, LlamaConfig, T5Config

import kdcache
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.train.options import TrainOptions
from kdcache.errors import UsageError
from kdcache.loss import distillation_loss, label_loss, score_loss
from kdcache.rows import Row
from kdcache.tasks import IGNORE, TASKS, UNLABELLED, Task

TOKENIZERS = Path(__file__).parent / "tiny_tokenizers"
NAMES = ("blue", "green", "red")
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
ROWS = 36
LOSSES = {
    "ids": distillation_loss,
    "classes": distillation_loss,
    "labels": label_loss,
    "score": score_loss,
}
"""The reference of each family of answers, which `test_loss` and `test_labels` hold to formulas."""

_SMALL: dict[str, Any] = {
    "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 66, "initializer_range": 0.3,
}  # fmt: skip
_PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_START = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def bert(size: int, **more: Any) -> Any:
    return BertConfig(vocab_size=259, hidden_size=size, **{**_SMALL, **_PLAIN, **more})


def _head(problem: str | None, names: tuple[str, ...]) -> Callable[..., Any]:
    """A configuration of BERT with a head for these classes, by the size of its states."""
    named = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    return lambda size: bert(size, problem_type=problem, **named)


def _llama(size: int) -> Any:
    return LlamaConfig(vocab_size=448, hidden_size=size, **_SMALL)


def _pairs(size: int) -> Any:
    """T5; a smaller one is BART, whose decoder reads another token first."""
    if size == 32:
        given = {"d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
        start = {"decoder_start_token_id": 0, "initializer_factor": 3.0}
        return T5Config(d_model=size, **_START, **given, **start)
    sides = ("layers", 1), ("attention_heads", 2), ("ffn_dim", 32)
    given = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in sides}
    start = {
        "decoder_start_token_id": 3,
        "init_std": 0.3,
        "dropout": 0.0,
        "forced_eos_token_id": None,
    }
    return BartConfig(d_model=size, max_position_embeddings=98, **_START, **given, **start)


@dataclass(frozen=True)
class Example:
    """What is particular to a task.

    Attributes:
        config: of a model, by the size of its states.
        record: what a text, and a generator of random numbers, become in the corpus.
        figures: figures of `finetune`, and their names in `evaluate`; none where it refuses.
        best: the figure by which `train --best` keeps an evaluation.
        student: the configuration that a user would write for a student with random weights.
        tokenizer: folder below `tiny_tokenizers`.
        build: further options of rows.
    """

    config: Callable[[int], Any]
    record: Callable[[list[str], np.random.Generator], Mapping[str, Any]]
    student: Mapping[str, Any]
    best: str = "loss"
    figures: Mapping[str, str] = field(default_factory=dict)
    tokenizer: str = "wordpiece"
    build: Mapping[str, Any] = field(default_factory=dict)


def _text(words: list[str], _: Any) -> dict[str, Any]:
    return {"text": " ".join(words)}


def _tagged(words: list[str], draw: np.random.Generator) -> dict[str, Any]:
    tags = [str(tag) if draw.random() < 0.9 else None for tag in draw.choice(TAGS, len(words))]
    return {"tokens": words, "tags": None if draw.random() < 0.2 else tags}


def _classed(words: list[str], draw: np.random.Generator) -> dict[str, Any]:
    label = None if draw.random() < 0.2 else str(draw.choice(NAMES))
    return {"text": " ".join(words), "label": label}


def _labelled(words: list[str], draw: np.random.Generator) -> dict[str, Any]:
    labels = [name for name in NAMES if draw.random() < 0.4]
    return {"text": " ".join(words), "labels": None if draw.random() < 0.2 else labels}


def _scored(words: list[str], draw: np.random.Generator) -> dict[str, Any]:
    score = None if draw.random() < 0.2 else round(float(draw.normal(1, 2)), 3)
    return {"text": " ".join(words), "score": score}


def _turned(words: list[str], draw: np.random.Generator) -> dict[str, Any]:
    target = words[::-1][: int(draw.integers(1, 6))]
    return {"source": " ".join(words), "target": " ".join(target)}


_BERT = {"model_type": "bert", "hidden_size": 16, **_SMALL}
_TEXTS = {"packing": "none"}
EXAMPLES: dict[Task, Example] = {
    "causal-lm": Example(
        _llama, _text, {"model_type": "llama", "hidden_size": 16, **_SMALL}, tokenizer="bytes",
        build=_TEXTS,
    ),
    "masked-lm": Example(
        bert, _text, _BERT, build={**_TEXTS, "mask_seed": 3, "mask_share": 0.3}
    ),
    "seq2seq-lm": Example(
        _pairs, _turned, {"model_type": "bart", "d_model": 16, "encoder_layers": 1,
                          "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
                          "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                          "max_position_embeddings": 98},
        figures={"cross_entropy": "cross_entropy", "accuracy": "accuracy"},
    ),
    "sequence-classification": Example(
        _head("single_label_classification", NAMES), _classed, _BERT, "accuracy",
        {"accuracy": "accuracy", "f1": "f1"},
    ),
    "token-classification": Example(
        _head(None, TAGS), _tagged, _BERT, "f1", {"accuracy": "accuracy", "f1": "entity_f1"}
    ),
    "multi-label-classification": Example(
        _head("multi_label_classification", NAMES), _labelled, _BERT, "micro_f1",
        {"micro_f1": "micro_f1", "average_precision": "micro_average_precision"},
    ),
    "regression": Example(
        _head("regression", ("LABEL_0",)), _scored, _BERT, "pearson",
        {"mse": "mse", "pearson": "pearson", "spearman": "spearman"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Desk:
    """Models and a corpus of one task, and caches that its tests share.

    Attributes:
        task: one of `TASKS`.
        folder: with `teacher`, `other`, `student` and `corpus.jsonl`.
    """

    task: Task
    folder: Path

    @property
    def kind(self) -> Any:
        return TASKS[self.task]

    @property
    def example(self) -> Example:
        return EXAMPLES[self.task]

    def __truediv__(self, name: str) -> str:
        return str(self.folder / name)

    @property
    def temperature(self) -> float:
        return 2.0 if self.kind.has_temperature else 1.0

    def options(self, out: str | Path, **more: Any) -> BuildOptions:
        """A build of short rows in four shards."""
        size = Path(self / "corpus.jsonl").stat().st_size
        given = {
            "teacher": (self / "teacher",), "corpus": (self / "corpus.jsonl",), "codec": "dense",
            "max_length": 48, "workers": 0, "shard_tokens": size // 16 + 1,
            **self.example.build, **more,
        }  # fmt: skip
        return BuildOptions(out=str(out), task=self.task, **given)

    def cache(self, **more: Any) -> kdcache.Cache:
        """A cache that is only read; tests that ask for the same one share it."""
        name = "-".join(f"{k}={v}" for k, v in more.items()).replace("/", "") or "cache"
        return built(self.options(self / name, **more))

    def try_build(self, out: Path, **more: Any) -> None:
        """A build of a teacher, or a corpus, of one folder or file."""
        named = {k: (str(more.pop(k)),) for k in ("teacher", "corpus") if k in more}
        kdcache.build(self.options(out, **named, **more))

    def try_training(self, student: Any, out: Path, **more: Any) -> None:
        """One step on the cache."""
        given = {"max_steps": 1, "report_to": "none", **more}
        kdcache.train(
            TrainOptions(cache=(self.cache().url,), student=str(student), out=str(out), **given)
        )

    def load(self, folder: str | Path) -> Any:
        return getattr(transformers, self.kind.auto).from_pretrained(folder).eval()

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Path(self / "corpus.jsonl").read_text().splitlines()]

    def own(self, model: Any, row: Row) -> torch.Tensor:
        """Logits [n, width] of a row's positions by the model's own forward on it alone."""
        if row.source is not None:
            source, labels = (torch.from_numpy(x).long()[None] for x in (row.source, row.labels))
            return model(input_ids=source, labels=labels).logits[0]
        logits = model(input_ids=torch.from_numpy(row.input_ids).long()[None]).logits
        if not self.kind.per_token:
            return logits
        return logits[0][torch.from_numpy(row.labels != IGNORE)]

    def answers(self, folder: str | Path, rows: list[Row]) -> torch.Tensor:
        """Logits of all positions of these rows, in float64."""
        model = self.load(folder)
        with torch.no_grad():
            return torch.cat([self.own(model, row) for row in rows]).double()

    def labels(self, rows: list[Row]) -> torch.Tensor:
        """Labels of all positions."""
        parts = [r.labels[r.labels != IGNORE] if self.kind.per_token else r.labels for r in rows]
        return torch.from_numpy(np.concatenate(parts))


def known(labels: torch.Tensor) -> torch.Tensor:
    """Which hard labels of classes there are."""
    return (labels != IGNORE) & (labels != UNLABELLED)


def built(options: BuildOptions) -> kdcache.Cache:
    kdcache.build(options)
    return kdcache.Cache.open(options.out)


def rows_of(cache: kdcache.Cache) -> list[Row]:
    spans = map(cache.read, range(cache.spec.spans))
    return [data.row(i) for data in spans for i in range(len(data))]


def targets_of(cache: kdcache.Cache, temperature: float = 1.0) -> torch.Tensor:
    """Logits of all positions of a cache of codec `dense` or `hidden`."""
    found: list[Any] = [cache.read(s).targets.at(temperature) for s in range(cache.spec.spans)]
    return torch.cat(
        [part.dense().logits if hasattr(part, "dense") else part.logits for part in found]
    )


def check_refused(cases: Iterable[tuple[Callable[[], Any], str]]) -> None:
    """Each call ends with one line of these words."""
    for call, message in cases:
        with pytest.raises(UsageError) as error:
            call()
        assert message in str(error.value), str(error.value)
        assert "\n" not in str(error.value), str(error.value)


def with_telling_weights(model: Any) -> Any:
    """A model with random weights whose biases and norms show where they are left out."""
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += 0.2 * torch.randn_like(weight)
    return model


def save(folder: Path, config: Any, auto: Any, tokenizer: str | Path, seed: int = 0) -> Path:
    """Save random weights beside a tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = with_telling_weights(auto.from_config(config))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias += torch.randn_like(model.final_logits_bias)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZERS / tokenizer).save_pretrained(folder)
    return folder


def make_desk(task: Task, texts: list[str], folder: Path) -> Desk:
    """Models with random weights, and a corpus of rows of 3 to 12 words."""
    example, auto = EXAMPLES[task], getattr(transformers, TASKS[task].auto)
    for name, size, seed in (("teacher", 32, 0), ("other", 32, 5), ("student", 16, 7)):
        save(folder / name, example.config(size), auto, example.tokenizer, seed)
    draw = np.random.default_rng(3)
    short = (word for text in texts for word in text.split() if word.isalpha() and len(word) < 6)
    with (folder / "corpus.jsonl").open("w") as out:
        for _ in range(ROWS):
            words = [next(short) for _ in range(int(draw.integers(3, 10)))]
            out.write(json.dumps(example.record(words, draw)) + "\n")
    (folder / "student.json").write_text(json.dumps(example.student))
    return Desk(task, folder)
