"""accelerate over a cache: `with_accelerate.py STEPS`, and `with_accelerate.py STEPS resume`."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from transformers import AutoModelForCausalLM

import kdcache

last_step, resume = int(sys.argv[1]), len(sys.argv) > 2
accelerator = Accelerator()
cache = kdcache.Cache.open("caches/lm")
student = kdcache.DistilledStudent(
    AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M"),
    cache.spec.task,
    alpha=0.1,
    vocab_size=cache.spec.vocab_size,
)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
stream = kdcache.TargetStream(
    cache,
    batch_size=8,
    temperature=2.0,
    rank=accelerator.process_index,
    world_size=accelerator.num_processes,
)
model, optimizer = accelerator.prepare(student, optimizer)
accelerator.register_for_checkpointing(stream)
if resume:
    accelerator.load_state("runs/accelerate")

for batch in stream.batches(epochs=3):
    loss = model(**send_to_device(batch, accelerator.device)).loss
    accelerator.backward(loss * accelerator.num_processes)  # averaged over workers
    optimizer.step()
    optimizer.zero_grad()
    step_loss = accelerator.reduce(loss.detach(), "sum").item()
    accelerator.print(f"step {stream.cursor.step}: {step_loss:.4f}")
    if stream.cursor.step == last_step:
        break
accelerator.save_state("runs/accelerate", safe_serialization=False)  # tied weights
