"""Lightning over a cache: `with_lightning.py STEPS [CHECKPOINT]`."""

import sys

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

import kdcache

last_step, checkpoint = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
cache = kdcache.Cache.open("caches/lm")


class Distillation(lightning.LightningModule):
    """A student whose forward is its loss."""

    def __init__(self):
        super().__init__()
        self.student = kdcache.DistilledStudent(
            AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M"),
            cache.spec.task,
            alpha=0.1,
            vocab_size=cache.spec.vocab_size,
        )

    def train_dataloader(self):
        """The stream: this process's share of each step."""
        return kdcache.TargetStream(
            cache,
            batch_size=8,
            temperature=2.0,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            accumulation=self.trainer.accumulate_grad_batches,
        )

    def training_step(self, batch, index):
        """A slice's part of the step's loss."""
        loss = self.student(**batch).loss
        print(f"step {self.global_step + 1}: {loss:.4f}")
        # Averaged over workers and accumulated slices.
        return loss * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def configure_optimizers(self):
        """AdamW on all weights."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


trainer = lightning.Trainer(
    max_steps=last_step,
    accelerator="auto" if torch.cuda.is_available() else "cpu",
    callbacks=[ModelCheckpoint("runs/lightning", "{step}", every_n_train_steps=3, save_top_k=-1)],
    logger=False,
    enable_progress_bar=False,
)
trainer.fit(Distillation(), ckpt_path=checkpoint, weights_only=False)
