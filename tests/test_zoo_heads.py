"""Heads of several labels and of scores, on architectures of the zoo: a cache holds, and a student
learns from, what the model's own forward gives for each row alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from zoo import PAD, Species, forms, make

import kdcache
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.options import PredictOptions
from kdcache.loss import label_loss, score_loss
from kdcache.targets import DenseTargets

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.filterwarnings("default"),  # architectures have warnings of their own
]
NAMES = ("red", "green", "blue")
SPECIES = [*map(make, ("distilbert", "roberta", "deberta-v2", "bart", "gpt2")), make("llama")]


@pytest.fixture(scope="module")
def desk(corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and a few texts of different lengths with labels and scores."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("heads")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        corpus_texts, vocab_size=300, special_tokens=["<|end|>", "<pad>"], show_progress=False
    )
    bpe._tokenizer.post_processor = TemplateProcessing(  # encoder-decoders read the end of a text
        single="$A <|end|>", special_tokens=[("<|end|>", bpe.token_to_id("<|end|>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<pad>"
    )
    assert tokenizer.pad_token_id == PAD
    tokenizer.save_pretrained(folder / "tokenizer")
    texts = [text[:n] for text, n in zip(corpus_texts, (5, 90, 33, 14, 60, 8), strict=False)]
    for name, labels in (
        ("multi-label-classification", ([], ["red"], None, ["blue", "red"], ["green"], ["red"])),
        ("regression", (0.5, -1, None, 3.25, 2, 0)),
    ):
        column = "score" if name == "regression" else "labels"
        lines = [{"text": t, column: y} for t, y in zip(texts, labels, strict=True)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


@pytest.mark.parametrize("task", ["multi-label-classification", "regression"])
@pytest.mark.parametrize("species", forms(SPECIES, "heads"))
def test_a_head_gives_its_own_numbers(
    species: Species, task: str, desk: Path, tmp_path: Path
) -> None:
    many = task != "regression"
    names = NAMES if many else ("LABEL_0",)
    tokenizer: Any = AutoTokenizer.from_pretrained(desk / "tokenizer")
    folder = species.save(
        tmp_path / "model",
        AutoModelForSequenceClassification,
        tokenizer,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type="multi_label_classification" if many else "regression",
    )
    corpus, out = str(desk / f"{task}.jsonl"), str(tmp_path / "cache")
    kdcache.build(BuildOptions((str(folder),), (corpus,), out, task=task, max_length=64, workers=0))  # type: ignore[arg-type]
    dataset = kdcache.TargetDataset([out])
    rows = [dataset[i] for i in range(len(dataset))]
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def own(ids: Any) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=torch.from_numpy(ids).long()[None]).logits
        return found

    alone = torch.cat([own(row.input_ids) for row in rows])
    cached = torch.cat([row.targets.at(1.0).logits for row in rows])
    scale = max(1.0, float(alone.detach().abs().max()))
    torch.testing.assert_close(cached / scale, alone.detach() / scale, rtol=0, atol=2e-4)

    # A student like the teacher has no soft loss: the targets are moved.
    batch = kdcache.Collator(pad_id=PAD, temperature=1.0)(rows)
    batch["targets"] = DenseTargets(batch["targets"].logits * 0.5 - 0.2, 1.0)
    student = kdcache.DistilledStudent(model, task, alpha=0.3).eval()
    got = student(**batch)
    got.loss.backward()
    mine = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    model.zero_grad()
    loss = label_loss if many else score_loss
    want = loss(alone, batch["labels"], batch["targets"], alpha=0.3).total
    want.backward()
    torch.testing.assert_close(got.loss, want, rtol=1e-4, atol=1e-5)
    largest = max(float(grad.abs().max()) for grad in mine.values())
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(mine[name], weight.grad, rtol=0, atol=2e-4 * largest)

    kdcache.predict(PredictOptions(str(folder), (corpus,), str(tmp_path / "out.jsonl")))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for line, z in zip(lines, alone.detach(), strict=True):
        found = [line["probabilities"][n] for n in NAMES] if many else [line["score"]]
        want_p = z.sigmoid() if many else z
        torch.testing.assert_close(torch.tensor(found), want_p, rtol=2e-4, atol=2e-4)
