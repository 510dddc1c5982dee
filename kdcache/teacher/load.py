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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from kdcache.errors import UsageError, reason_of
from kdcache.pretrained import UnreadableError, left_out, quiet_transformers, unreadable
from kdcache.targets.device import compiles
from kdcache.tasks import TASKS
from kdcache.teacher.files import TeacherFiles, auto_class
from kdcache.teacher.memory import fits_one_gpu, room_for_weights, weight_bytes
from kdcache.teacher.options import TeacherOptions
from kdcache.teacher.quirks import forget_lengths
from kdcache.teacher.trust import check_unchanged

logger = logging.getLogger(__name__)


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
        spread = not fits_one_gpu(needed, free)
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

            max_memory = room_for_weights(get_max_memory(), len(files) - loaded)
        models.append(_load(one, options, max_memory))
    return models


def _load(
    files: TeacherFiles, options: TeacherOptions, max_memory: dict[int | str, int] | None
) -> Any:
    """Load one model.

    Args:
        files: the model.
        options: how.
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
