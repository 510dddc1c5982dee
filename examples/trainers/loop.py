"""A loop of your own over a cache: alone or under torchrun, the same steps.

python loop.py STEPS, or torchrun --nproc-per-node 2 loop.py STEPS. With more steps it continues.
"""

import os
import sys

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import kdcache

last_step, checkpoint = int(sys.argv[1]), "runs/plain-loop.pt"
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    distributed.init_process_group()

cache = kdcache.Cache.open("caches/lm")
student = kdcache.DistilledStudent(
    AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M"),
    cache.spec.task,
    alpha=0.1,
    vocab_size=cache.spec.vocab_size,
)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
stream = kdcache.TargetStream(
    cache, batch_size=8, temperature=2.0, rank=rank, world_size=world, accumulation=2
)
if os.path.exists(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    student.load_state_dict(saved["student"])
    optimizer.load_state_dict(saved["optimizer"])
    stream.load_state_dict(saved["stream"])
model = DistributedDataParallel(student) if world > 1 else student

batches = stream.batches(epochs=3)
while stream.cursor.step < last_step:
    total = torch.zeros(())
    for _ in range(stream.accumulation):
        loss = model(**next(batches)).loss
        (loss * world).backward()  # DDP averages over workers
        total += loss.detach()
    if world > 1:
        distributed.all_reduce(total)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {stream.cursor.step}: {total:.4f}")
batches.close()
if rank == 0:
    state = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
    os.makedirs("runs", exist_ok=True)
    torch.save({**state, "stream": stream.state_dict()}, checkpoint)
if world > 1:
    del model  # before its group: with gloo, DDP ends the group under Python's lock and may hang
    distributed.destroy_process_group()
