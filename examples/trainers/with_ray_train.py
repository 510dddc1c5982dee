"""Ray Train over a cache: two workers, from the last checkpoint after the loss of one."""

import os
import tempfile

import ray.train
import torch
from ray.train.torch import TorchTrainer
from transformers import AutoModelForCausalLM

import kdcache


def work(config):
    """Train on one worker, from the last checkpoint if there is one."""
    context = ray.train.get_context()
    cache = kdcache.Cache.open(config["cache"])
    student = kdcache.DistilledStudent(
        AutoModelForCausalLM.from_pretrained(config["student"]),
        cache.spec.task,
        alpha=0.1,
        vocab_size=cache.spec.vocab_size,
    )
    stream = kdcache.TargetStream(
        cache,
        batch_size=8,
        temperature=2.0,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    checkpoint = ray.train.get_checkpoint()  # after the loss of a worker
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            saved = torch.load(f"{folder}/state.pt", weights_only=True)
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        stream.load_state_dict(saved["stream"])
    model = ray.train.torch.prepare_model(student)
    for batch in stream.batches(epochs=3):
        loss = model(**batch).loss  # batches of a GPU's worker: see `send_to_device` above
        (loss * stream.world_size).backward()  # DDP averages over workers
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        if stream.world_size > 1:
            torch.distributed.all_reduce(total)
        step = stream.cursor.step
        if step % 3:
            continue
        with tempfile.TemporaryDirectory() as folder:
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "stream": stream.state_dict()}, f"{folder}/state.pt")
            kept = ray.train.Checkpoint.from_directory(folder) if stream.rank == 0 else None
            ray.train.report({"step": step, "loss": total.item()}, checkpoint=kept)
        if step == config["last_step"]:
            break


trainer = TorchTrainer(
    work,
    train_loop_config={
        "cache": os.path.abspath("caches/lm"),
        "student": os.path.abspath("HuggingFaceTB/SmolLM2-135M"),
        "last_step": 3,
    },
    scaling_config=ray.train.ScalingConfig(num_workers=2),
    run_config=ray.train.RunConfig(name="ray-train", storage_path=os.path.abspath("runs")),
)
last = trainer.fit().metrics
print(f"step {last['step']}: {last['loss']:.4f}")
