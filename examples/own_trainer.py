"""A cache in your own training script: with the HF Trainer's arguments, and with a bare loop.

python examples/own_trainer.py --cache runs/python-api/cache

`DistilledStudent` wraps any model so that its `forward` returns the distillation loss; a
`TargetStream` gives it batches that hold the targets. The rest is the Trainer's: optimizers,
schedulers, callbacks and precision.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import TrainingArguments

from kdcache import (
    Cache,
    Collator,
    DistillationTrainer,
    DistilledStudent,
    TargetDataset,
    TargetStream,
)
from kdcache.student import StudentInfo, load_student

CONFIG = Path(__file__).parent / "config" / "student-llama.json"


def make_student(cache: Cache, name: str) -> DistilledStudent:
    spec = cache.spec
    info = StudentInfo(
        task=spec.task,
        vocab_size=spec.vocab_size,
        num_labels=spec.num_labels,
        label_names=spec.label_names,
        pad_id=spec.pad_id,
        eos_id=spec.eos_id,
        max_length=spec.max_length,
    )
    return DistilledStudent(
        load_student(name, info),
        spec.task,
        alpha=0.1,
        vocab_size=spec.vocab_size,
    )


def with_a_stream(cache: Cache, name: str, temperature: float, out: Path) -> None:
    """The Trainer on a stream: exact resuming, equal global batches on any number of workers."""
    trainer = DistillationTrainer(
        model=make_student(cache, name),
        args=TrainingArguments(
            str(out / "stream"), num_train_epochs=1, logging_steps=5, report_to="none"
        ),
        # The batch size of a step, over all workers; the Trainer's own has no part.
        train_dataset=TargetStream(cache, batch_size=8, temperature=temperature),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"stream: {trainer.state.global_step} steps, last loss {losses[-1]:.4f}")


def with_a_dataset(cache: Cache, name: str, temperature: float, out: Path) -> None:
    """The Trainer on a map-style dataset and a collator: as any other fine-tuning script."""
    trainer = DistillationTrainer(
        model=make_student(cache, name),
        args=TrainingArguments(
            str(out / "dataset"),
            num_train_epochs=1,
            per_device_train_batch_size=8,
            logging_steps=5,
            report_to="none",
            remove_unused_columns=False,  # the rows are not dictionaries yet
            label_names=["labels"],
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=TargetDataset(cache),
        data_collator=Collator(pad_id=cache.spec.pad_id, temperature=temperature),
    )
    trainer.train()
    print(f"dataset: {trainer.state.global_step} steps")


def with_a_loop(cache: Cache, name: str, temperature: float) -> None:
    """No Trainer at all."""
    student = make_student(cache, name)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4)
    loss = torch.zeros(())
    for batch in TargetStream(cache, batch_size=8, temperature=temperature):
        loss = student(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loop: last loss {loss.item():.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", default="runs/python-api/cache")
    parser.add_argument("--student", default=str(CONFIG))
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("runs/own-trainer"))
    options = parser.parse_args()
    opened = Cache.open(options.cache)
    with_a_stream(opened, options.student, options.temperature, options.out)
    with_a_dataset(opened, options.student, options.temperature, options.out)
    with_a_loop(opened, options.student, options.temperature)
