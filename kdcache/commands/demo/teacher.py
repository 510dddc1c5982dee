"""The demo's material: a corpus that every CPython carries, a tokenizer and a small teacher.

The corpus is the Python language reference of `pydoc_data.topics`. Its topics repeat each other (a
fifth of the text occurs twice), so every paragraph is kept once: otherwise the held-out documents
would hold paragraphs that were trained on.

Cost: the teacher trains with about 6 x parameters x tokens floating-point operations; small batches
make the most of few of them.
Guarantee: corpus and tokenizer are the same on every run of one Python version; each file is
written whole or not at all.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset

from kdcache.files import whole_folder, write_text
from kdcache.teacher import quiet_transformers

END = "<|end|>"
_DOCUMENT_CHARACTERS = 1500
_HELD_OUT_EVERY = 10
_BATCH_ROWS = 4
_PEAK_RATE = 3e-3
_WEIGHT_DECAY = 0.1
_WARMUP = 0.05
_EVALUATIONS = 8


@dataclass(frozen=True)
class TeacherSizes:
    """The sizes of the teacher, and the length of its training.

    Attributes:
        max_length: tokens it reads at most.
        seed: of its weights and of the order.
    """

    vocab_size: int
    max_length: int
    hidden: int
    layers: int
    heads: int
    epochs: float
    seed: int


def documents(limit: int | None = None) -> tuple[list[str], list[str]]:
    """The language reference in documents of about 1,500 characters: for training, and held out.

    Every tenth document is held out; no paragraph occurs twice in all of them.

    Args:
        limit: use only the first documents.
    """
    from pydoc_data.topics import topics

    found: list[str] = []
    seen: set[str] = set()
    for name in sorted(topics):
        paragraphs: list[str] = []
        for paragraph in topics[name].split("\n\n"):
            if not paragraph.strip() or paragraph.strip() in seen:
                continue
            seen.add(paragraph.strip())
            paragraphs.append(paragraph.strip("\n"))
            if sum(map(len, paragraphs)) >= _DOCUMENT_CHARACTERS:
                found.append("\n\n".join(paragraphs))
                paragraphs = []
        if paragraphs:
            found.append("\n\n".join(paragraphs))
    found = found[:limit]
    half = _HELD_OUT_EVERY // 2
    held_out = found[half::_HELD_OUT_EVERY]
    return [d for i, d in enumerate(found) if i % _HELD_OUT_EVERY != half], held_out


def write_jsonl(path: Path, texts: Sequence[str]) -> None:
    """Write documents as records with a `text`."""
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def read_jsonl(path: Path) -> list[str]:
    """The documents that `write_jsonl` wrote."""
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def make_tokenizer(texts: Sequence[str], folder: Path, *, vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016) and save it for transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    with whole_folder(folder) as scratch:
        fast.save_pretrained(scratch)


def make_teacher(
    train: Sequence[str],
    held_out: Sequence[str],
    tokenizer: Path,
    folder: Path,
    sizes: TeacherSizes,
    report: Callable[[int, int, float], None],
) -> None:
    """Train a Llama from random weights and save its best state with its tokenizer.

    Args:
        train: documents to learn from.
        held_out: documents to stop by.
        report: called after each evaluation with step, steps and held-out cross-entropy.
    """
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(tokenizer)
    model = _new_model(reader, sizes)
    _train(model, _ids(reader, train), _ids(reader, held_out), sizes, report)

    with whole_folder(folder) as scratch:
        with quiet_transformers():
            model.save_pretrained(scratch)
        reader.save_pretrained(scratch)


def _new_model(reader: Any, sizes: TeacherSizes) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(reader),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.max_length,
        tie_word_embeddings=True,
        bos_token_id=reader.eos_token_id,
        eos_token_id=reader.eos_token_id,
        pad_token_id=reader.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sizes.seed)
        return LlamaForCausalLM(config)


def _train(
    model: Any,
    train_ids: Tensor,
    held_out_ids: Tensor,
    sizes: TeacherSizes,
    report: Callable[[int, int, float], None],
) -> None:
    """AdamW with a cosine schedule, on windows with another start in every epoch.

    The weights of the evaluation with the least held-out cross-entropy are kept: a teacher that
    has memorised its text has nothing to add to the hard labels.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    length = sizes.max_length
    windows = max(1, (len(train_ids) - 1) // length - 1)
    every = math.ceil(windows * sizes.epochs / _BATCH_ROWS / _EVALUATIONS)
    steps = every * _EVALUATIONS

    class Report(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            report(state.global_step, steps, more["metrics"]["eval_loss"])

    with tempfile.TemporaryDirectory(prefix="kdcache-demo-") as scratch:
        trainer = Trainer(
            model,
            TrainingArguments(
                scratch,
                max_steps=steps,
                per_device_train_batch_size=1,  # datasets give whole batches
                per_device_eval_batch_size=1,
                learning_rate=_PEAK_RATE,
                weight_decay=_WEIGHT_DECAY,
                adam_beta2=0.98,
                lr_scheduler_type="cosine",
                warmup_steps=math.ceil(_WARMUP * steps),
                eval_strategy="steps",
                eval_steps=every,
                save_steps=every,
                save_total_limit=1,
                save_only_model=True,
                load_best_model_at_end=True,
                prediction_loss_only=True,
                label_names=["labels"],
                use_cpu=True,
                seed=sizes.seed,
                disable_tqdm=True,
                report_to="none",
            ),
            train_dataset=_Shifted(train_ids, length, sizes.seed),
            eval_dataset=[*map(_inputs, torch.split(_windows(held_out_ids, length), 32))],
            data_collator=itemgetter(0),
            compute_loss_func=_loss,
            callbacks=[Report()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


class _Shifted(IterableDataset[Any]):
    """Batches of windows without end: in random order, with another start in every epoch."""

    def __init__(self, ids: Tensor, length: int, seed: int) -> None:
        self._ids, self._length, self._seed = ids, length, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            shift = int(torch.randint(self._length, (1,), generator=generator))
            rows = _windows(self._ids[shift:], self._length)
            order = torch.randperm(len(rows), generator=generator)
            whole = max(len(order) // _BATCH_ROWS, 1) * _BATCH_ROWS
            yield from map(_inputs, torch.split(rows[order[:whole]], _BATCH_ROWS))


def _ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """All documents as one sequence of ids, as `--packing concat` joins them."""
    joined: list[int] = []
    for encoded in tokenizer(list(texts))["input_ids"]:
        joined += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(joined)


def _windows(ids: Tensor, length: int) -> Tensor:
    """Rows of `length` ids and the one that follows them, int64 [rows, length + 1]."""
    return ids.unfold(0, length + 1, length)


def _inputs(windows: Tensor) -> dict[str, Any]:
    return {"input_ids": windows[:, :-1], "labels": windows[:, 1:], "use_cache": False}


def _loss(outputs: Any, labels: Tensor, num_items_in_batch: object = None) -> Tensor:
    return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
