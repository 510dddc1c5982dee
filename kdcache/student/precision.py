"""The device and the precision of a training process.

A process uses one GPU; several GPUs need several processes (`--num-workers`). Weights, optimizer
and loss stay float32; bfloat16 and float16 are those of autocast.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from kdcache.errors import UsageError
from kdcache.tasks import Precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Computing:
    """What a training process computes with.

    Attributes:
        precision: "bf16", "fp16" or "float32".
        tf32: whether float32 products may round their factors to TF32.
    """

    gpu: bool
    precision: str
    tf32: bool

    @classmethod
    def choose(cls, precision: Precision, gpus: float | None = None) -> Computing:
        """What is asked for, on the devices that this process sees.

        Args:
            precision: "auto" is bfloat16 on a GPU that has it, else float32.
            gpus: GPUs that this process was given; 0 keeps it off those that it sees all the same,
                None takes one if there is one.

        Raises:
            UsageError: a GPU or a precision that this process lacks.
        """
        sees = torch.cuda.is_available()
        if gpus and not sees:
            raise UsageError(
                f"{gpus:g} GPUs were asked for, but PyTorch sees none here (torch "
                f"{torch.__version__}). Check the driver and the build of PyTorch, or use 0 to "
                "train on the CPU."
            )
        gpu = sees and gpus != 0
        modern = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "auto":
            precision = "bf16" if modern else "float32"
            return cls(gpu, precision, tf32=modern)
        if precision == "fp16" and not gpu:
            raise UsageError("fp16 needs a GPU. Use --precision auto, or bf16 on a CPU.")
        if precision == "bf16" and gpu and not modern:
            raise UsageError("this GPU has no bfloat16. Use --precision fp16 or float32.")
        return cls(gpu, precision, tf32=modern and precision != "float32")

    def arguments(self) -> dict[str, Any]:
        """The same for Hugging Face's `TrainingArguments`."""
        return {
            "use_cpu": not self.gpu,
            "bf16": self.precision == "bf16",
            "fp16": self.precision == "fp16",
        }

    def begin(self) -> None:
        """Let float32 products of this process use TF32 from now on, or no longer."""
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")


def use_one_gpu(arguments: Any, advice: str = "") -> None:
    """Keep a Trainer from wrapping its model in DataParallel where a process sees several GPUs.

    `advice` says how to use all of them; `{gpus}` is their number.
    """
    gpus = arguments.n_gpu
    if gpus > 1:
        logger.warning(
            "this process sees %d GPUs and trains on one. %s", gpus, advice.format(gpus=gpus)
        )
        arguments._n_gpu = 1


def keep_inputs_and_loss(policy: MixedPrecisionPolicy) -> MixedPrecisionPolicy:
    """accelerate's policy that rounds weights and activations to 16 bits, and nothing else.

    Inputs stay: counts and weights of targets are among them (8,199 positions would become 8,192).
    So do outputs, such as the loss, and gradients before they are summed over workers, as in DDP.
    """
    return dataclasses.replace(
        policy, output_dtype=None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def shard_over_ranks(accelerator: Accelerator, plugin_args: Mapping[str, Any]) -> None:
    """Have accelerate shard with FSDP, on a CPU too, by a policy that keeps inputs and the loss.

    accelerate leaves FSDP out on a CPU without a message, although torch shards over gloo as well.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        plugin = FullyShardedDataParallelPlugin(**plugin_args)
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.fsdp_plugin = plugin
        # Every new view of accelerate's state begins with that of PartialState.
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP
    if isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = keep_inputs_and_loss(plugin.mixed_precision_policy)
