"""How a worker loads its teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from kdcache.errors import UsageError
from kdcache.tasks import TASKS, Attention


@dataclass(frozen=True)
class EngineOptions:
    """How vLLM runs a teacher.

    Attributes:
        max_length: tokens of the longest row.
        version: that must be installed; None for any.
        tensor_parallel: processes that share each layer.
        pipeline_parallel: groups of them that share the layers.
        quantization: of the weights, as vLLM names it; None for what the checkpoint states.
        args: further arguments of the engine; `encode_inside=false` is for kdcache.
        encoder: class that joins the engine's workers so that they can encode; None for none.
    """

    max_length: int
    version: str | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    quantization: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    encoder: str | None = None

    @property
    def gpus(self) -> int:
        """GPUs that it needs, where it runs on GPUs."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def over_ray(self) -> bool:
        """Whether its processes are actors of the cluster, which may be on several nodes."""
        return self.args.get("distributed_executor_backend") == "ray"


@dataclass(frozen=True)
class TeacherOptions:
    """How a worker loads its teachers.

    Attributes:
        names: folder, URL or hub id of each teacher.
        task: one of `kdcache.tasks.TASKS`.
        weights: weight of each teacher, summing to 1.
        ensemble: `mean-probs` (of the distributions) or `mean-logits`.
        temperatures: at each of which the mean of several distributions is wanted.
        dtype: `float32`, `bfloat16` or `float16`.
        device: `cpu`; `cuda` for one GPU, or more than it where the weights do not fit; `auto` to
            spread each model over all visible GPUs, and the host's memory where they are not
            enough.
        trust_remote_code: whether code that ships with a model may run.
        attention: kernel of the attention; `auto` is FlashAttention 2 where it is installed and
            works, and else what transformers chooses.
        compile: run the models through `torch.compile`.
        identities: SHA-256 of each teacher as the build began with it; empty for any.
        states: whether slices carry the output layer's input as well as the logits (one language
            model only).
        engine: how vLLM runs the one language model; None for transformers.
        role: what the models are in messages.

    Raises:
        UsageError: an attention that the device or the dtype rules out, or states that there are
            none of.
    """

    names: tuple[str, ...]
    task: str
    weights: tuple[float, ...] = (1.0,)
    ensemble: str = "mean-probs"
    temperatures: tuple[float, ...] = (1.0,)
    dtype: str = "float32"
    device: str = "cpu"
    trust_remote_code: bool = False
    attention: Attention = "auto"
    compile: bool = False
    identities: tuple[str, ...] = ()
    states: bool = False
    engine: EngineOptions | None = None
    role: str = "teacher"

    def __post_init__(self) -> None:
        if self.states:
            check_states(self.names, self.task)
        if self.attention not in get_args(Attention):
            expected = ", ".join(get_args(Attention))
            raise UsageError(f"--attention is {self.attention!r}, expected one of {expected}.")
        if self.attention == "flash_attention_2" and not self.flash_possible:
            raise UsageError(
                f"--attention flash_attention_2 needs a GPU and bfloat16 or float16; this teacher "
                f"runs on {self.device} in {self.dtype}. Use --attention auto."
            )

    @property
    def flash_possible(self) -> bool:
        """Whether FlashAttention supports device and dtype."""
        return self.device != "cpu" and self.dtype in ("bfloat16", "float16")


def check_states(names: Sequence[str], task: str) -> None:
    """Refuse hidden states of anything but one language model.

    Raises:
        UsageError: several teachers, or a classifier.
    """
    if len(names) > 1 or not TASKS[task].over_ids:
        raise UsageError(
            "--codec hidden keeps the states of one language model. For several teachers "
            "use --codec sample:N, for a classifier --codec dense."
        )
