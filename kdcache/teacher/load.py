"""Loads teachers: on one device or spread over several, with the requested attention, compiled if
requested.

Guarantee: a model without all of its weights in its files is refused; transformers would initialise
the others at random.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from transformers import PreTrainedConfig

from kdcache.errors import UsageError, reason_of
from kdcache.pretrained import UnreadableError, left_out, quiet_transformers, unreadable
from kdcache.targets.device import compiles
from kdcache.tasks import TASKS, Attention
from kdcache.teacher.files import TeacherFiles, auto_class
from kdcache.teacher.memory import HOST_SHARE, WEIGHTS_SHARE, weight_bytes
from kdcache.teacher.quirks import forget_lengths
from kdcache.teacher.trust import check_unchanged

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """How vLLM runs a teacher.

    Attributes:
        max_length: tokens of the longest row.
        version: that must be installed; None for any.
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
        weights: weight of each teacher, summing to 1.
        ensemble: `mean-probs` (of the distributions) or `mean-logits`.
        temperatures: at each of which the mean of several distributions is wanted.
        dtype: `float32`, `bfloat16` or `float16`.
        device: `cpu`; `cuda` for one GPU, or more than it where the weights do not fit; `auto` to
            spread each model over all visible GPUs, and the host's memory where they are not
            enough.
        attention: kernel of the attention; `auto` is FlashAttention 2 where it is installed and
            works, and else what transformers chooses.
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


def load_models(options: TeacherOptions) -> list[Any]:
    """Load each model on the one device, or spread over all if they do not fit it together."""
    files = [
        TeacherFiles.find(name, trust_remote_code=options.trust_remote_code, role=options.role)
        for name in options.names
    ]
    for one, sha256 in zip(files, options.identities, strict=False):
        one.check_same(sha256)
    spread = options.device == "auto"
    if options.device == "cuda":
        needed = sum(weight_bytes(one.whole, options.dtype) for one in files)
        free = torch.cuda.mem_get_info()[0]
        spread = needed > WEIGHTS_SHARE * free
        if spread:
            logger.warning(
                "the teacher's weights take %.1f GB and the GPU has %.1f GB free: they are spread "
                "over all GPUs that this worker sees and the host's memory, which is slower",
                needed / 1e9,
                free / 1e9,
            )
    models = []
    for loaded, one in enumerate(files):
        max_memory = None
        if spread:
            from accelerate.utils import get_max_memory

            max_memory = {  # those that come later need as much
                place: int((HOST_SHARE if place == "cpu" else WEIGHTS_SHARE) * free)
                // (len(files) - loaded)
                for place, free in get_max_memory().items()
            }
        models.append(_load(one, options, max_memory))
    return models


def _load(
    files: TeacherFiles, options: TeacherOptions, max_memory: dict[int | str, int] | None
) -> Any:
    """Load one model.

    Args:
        room: bytes it may take of each device that it is spread over; None for one device.
    """
    check_unchanged(files.who, files.raw_config)
    settings: dict[str, Any] = {
        "dtype": getattr(torch, options.dtype),
        "use_safetensors": True,
        "trust_remote_code": options.trust_remote_code,
    }
    if max_memory is not None:
        settings |= {"device_map": "auto", "max_memory": max_memory}
    elif options.device == "cuda":
        settings["device_map"] = {"": 0}  # from the files to the GPU, not through the host's memory
    with quiet_transformers():
        model = _with_attention(files, options, settings)
    forget_lengths(model)
    if not TASKS[options.task].per_token:
        set_pad_id(model.config, files)
    if max_memory is None:
        model.to("cuda" if options.device == "auto" else options.device)
    elif "disk" in map(str, getattr(model, "hf_device_map", {}).values()):
        raise UsageError(
            f"{files.who} does not fit the GPUs and the memory of a worker together. Use "
            "more GPUs (--worker gpus=…), or a machine with more memory."
        )
    return model.eval().requires_grad_(False)


def _with_attention(files: TeacherFiles, options: TeacherOptions, settings: dict[str, Any]) -> Any:
    from transformers.utils import is_flash_attn_2_available

    if options.attention == "auto":
        if options.flash_possible and is_flash_attn_2_available():
            with suppress(ImportError, ValueError):  # this model has no such attention
                flash = {**settings, "attn_implementation": "flash_attention_2"}
                return _from_pretrained(files, options, flash)
        return _from_pretrained(files, options, settings)
    try:
        settings = {**settings, "attn_implementation": options.attention}
        return _from_pretrained(files, options, settings)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{files.who} cannot run with --attention {options.attention}: {reason_of(error)}. "
            "Use --attention auto."
        ) from error


def _from_pretrained(files: TeacherFiles, options: TeacherOptions, settings: dict[str, Any]) -> Any:
    kind = auto_class(options.task, files.config)
    try:
        if files.adapter is not None:  # which may have other classes than its base
            settings = {**settings, "config": files.config}
        with unreadable():
            model, info = kind.from_pretrained(files.whole, output_loading_info=True, **settings)
    except ImportError as error:
        if "attn_implementation" in settings:
            raise  # tried with another one, or refused with the option's name
        raise UsageError(
            f"{files.who} needs a library that is missing: {reason_of(error)}."
        ) from error
    except UnreadableError as error:
        if "attn_implementation" in settings:
            raise
        raise UsageError(f"{files.who} cannot be loaded: {error}.") from error
    except OSError as error:
        if error.errno is not None:
            raise  # of the disk
        raise UsageError(f"{files.who} cannot be loaded: {reason_of(error)}.") from error
    if spare := left_out(model, info["unexpected_keys"]):
        raise UsageError(
            f"{files.who} has weights that its config.json has no layer for ("
            f"{', '.join(spare[:3])}; {len(spare)} in all): it would compute something else than "
            "what was trained. Use the config.json that belongs to the weights, or, to do without "
            "them, save the model again with transformers."
        )
    brought = {} if files.adapter is None else files.adapter.shapes()
    lost = sorted(set(info["missing_keys"]) - brought.keys())
    if lost:
        # Transformers would fill them at random: a teacher that knows nothing.
        missing = ", ".join(lost[:3])
        raise UsageError(
            f"{files.who} has no weights for {missing}: it was not trained for "
            f"{options.task}. Fine-tune it first (`kdcache finetune`), or name another."
        )
    name_outputs(model)
    return files.merged(model)


def name_outputs(model: Any) -> None:
    """Have a model name its outputs, and give no states or attentions that its configuration asks
    for: sdpa has none, and transformers would not save it.
    """
    for part in model.modules():
        config = getattr(part, "config", None)
        if isinstance(config, PreTrainedConfig):
            config.return_dict = True
            config.output_hidden_states = config.output_attentions = False


def set_pad_id(config: Any, files: TeacherFiles) -> None:
    """Give a classifier's configuration that names no padding id its tokenizer's.

    Decoders that classify look for the last id that is not padding.
    """
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None and files.has_tokenizer:
        text.pad_token_id = config.pad_token_id = files.tokenizer.pad_token_id


def input_device(model: Any) -> torch.device:
    """The device of a model's inputs; offloaded weights are on no device between calls."""
    devices = [str(device) for device in getattr(model, "hf_device_map", {}).values()]
    if not devices:
        return torch.device(next(model.parameters()).device)
    gpus = [device for device in devices if device not in ("cpu", "disk")]
    first = gpus[0] if gpus else "cpu"
    return torch.device("cuda", int(first)) if first.isdecimal() else torch.device(first)


@contextmanager
def kept_loaded(layer: Any) -> Iterator[None]:
    """Load a layer that accelerate keeps in the host's memory once, not at each of its calls.

    An output layer is called for each slice of positions: 128k ids of 4,096 numbers are 1 GB.
    """
    from accelerate.utils import align_module_device, has_offloaded_params

    if not has_offloaded_params(layer):
        yield
        return
    with align_module_device(layer):
        layer._hf_hook.offload = False  # what remains of it moves inputs and outputs
        try:
            yield
        finally:
            layer._hf_hook.offload = True


def compile_layers(model: Any) -> None:
    """Have a model's repeated layers compiled at the first batch: one layer's code serves all.

    A whole model would take as many times longer as it has layers, and the rest of it is small.

    Raises:
        UsageError: a compiler is missing.
    """
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        logger.warning("a teacher that is spread over devices is not compiled")
        return
    if input_device(model).type == "cuda":
        able, needs = compiles(), "Triton and a C compiler (and KDCACHE_COMPILE not 0)"
    else:
        name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        able, needs = shutil.which(name) is not None, f"a C++ compiler ({name}; CXX names another)"
    if not able:
        raise UsageError(f"--compile needs {needs} where the workers run. Leave it out.")
    for layer in _repeated_layers(model) or [model]:
        # With fixed shapes the last batch of each span would be compiled again.
        layer.compile(dynamic=True)


def _repeated_layers(model: Any) -> list[Any]:
    """The layers of the largest stack; a list inside a layer, such as its experts, is smaller."""
    stacks = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
    sizes = [sum(p.numel() for p in stack.parameters()) for stack in stacks]
    return list(stacks[int(np.argmax(sizes))]) if stacks else []
