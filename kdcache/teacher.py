"""The teacher: one or several Hugging Face models that turn rows into logits, a slice of positions
at a time.

`TeacherFiles` is what can be known without loading weights (identity, tokenizer, vocabulary or
classes); the driver of a build needs no more. `Teacher` holds the models of one worker.

Cost: one forward of the base model a batch; the vocabulary is projected in slices of positions,
only where a position is wanted, so `[positions, vocabulary]` never exists whole.
Guarantee: ids outside the tokenizer's vocabulary (padded output layers) are cut off before any
normaliser sees them, and non-finite logits raise.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from kdcache.errors import UsageError
from kdcache.head import HEAD_FILE, HeadedClassifier
from kdcache.memory import fits_one_gpu, room_for_weights, weight_bytes
from kdcache.rows import IGNORE, Row
from kdcache.sampling import compiles
from kdcache.storage import sha256_file

logger = logging.getLogger(__name__)

Attention = Literal["auto", "sdpa", "flash_attention_2", "eager"]
_CAUSAL = "causal-lm"
_SLICE_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}


@dataclass(frozen=True)
class TeacherFiles:
    """One teacher as it lies on disk.

    Attributes:
        name: folder or hub id, as the user gave it.
        folder: local folder with `config.json`, `*.safetensors` and the tokenizer.
        trust_remote_code: whether code that ships with the model may run.
    """

    name: str
    folder: Path
    trust_remote_code: bool = False

    @classmethod
    def find(cls, name: str, *, trust_remote_code: bool = False) -> TeacherFiles:
        """Locate a teacher's files; a hub id is downloaded unless it is cached already.

        Raises:
            UsageError: no such folder or model, or it has no safetensors weights.
        """
        folder = Path(name).expanduser()
        if not folder.is_dir():
            folder = _download(name)
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"teacher {name} has no config.json: it is not a Hugging Face model folder."
            )
        if not any(folder.glob("*.safetensors")):
            pickled = (
                " (pickled weights are not loaded: convert them)"
                if any(folder.glob("*.bin"))
                else ""
            )
            raise UsageError(
                f"teacher {name} has no weights: expected *.safetensors in it{pickled}."
            )
        return cls(name, folder, trust_remote_code)

    @cached_property
    def sha256(self) -> str:
        """Identity: SHA-256 over the configuration and every weight file. About 1 GB/s."""
        digest = hashlib.sha256()
        config = json.loads((self.folder / "config.json").read_bytes())
        # What says nothing about the function computed must not make two equal teachers differ.
        for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
            config.pop(key, None)
        digest.update(json.dumps(config, sort_keys=True).encode())
        for path in sorted(self.folder.glob("*.safetensors")):
            digest.update(path.name.encode())
            # The hub's cache names a blob by its SHA-256: no need to read 100 GB for it.
            target = path.resolve().name
            digest.update(
                (target if re.fullmatch("[0-9a-f]{64}", target) else sha256_file(path)).encode()
            )
        return digest.hexdigest()

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        return AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        try:
            return AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise UsageError(f"teacher {self.name} has no usable tokenizer: {error}") from error

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of the logits."""
        names = self.config.id2label
        return tuple(str(names[i]) for i in range(len(names)))

    def vocab_size(self, task: str) -> int:
        """Width of a soft target: the classes, or the ids that tokenizer and output layer share."""
        if task != _CAUSAL:
            return len(self.label_names)
        known = max(self.tokenizer.get_vocab().values()) + 1
        width = int(self.config.get_text_config().vocab_size)
        return min(int(known), width)


@dataclass(frozen=True)
class TeacherOptions:
    """How a worker loads its teachers.

    Attributes:
        names: folder or hub id of each teacher.
        task: `causal-lm` or `sequence-classification`.
        weights: weight of each teacher, summing to 1.
        ensemble: `mean-probs` (of the distributions) or `mean-logits`.
        dtype: `float32`, `bfloat16` or `float16`.
        device: `cpu`; `cuda` for one GPU, or more than it where the weights do not fit; `auto` to
            spread each model over all visible GPUs, and the host's memory where they are not
            enough.
        trust_remote_code: whether code that ships with a model may run.
        attention: kernel of the attention; `auto` is FlashAttention 2 where it is installed and
            works, and else what transformers chooses.
        compile: run the models through `torch.compile`.

    Raises:
        UsageError: an attention that the device or the dtype rules out.
    """

    names: tuple[str, ...]
    task: str
    weights: tuple[float, ...] = (1.0,)
    ensemble: str = "mean-probs"
    dtype: str = "float32"
    device: str = "cpu"
    trust_remote_code: bool = False
    attention: Attention = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
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
        """Whether device and dtype are what FlashAttention is written for."""
        return self.device != "cpu" and self.dtype in ("bfloat16", "float16")


class Teacher:
    """The loaded models of one worker, seen as one."""

    def __init__(self, options: TeacherOptions, vocab_size: int) -> None:
        """Load the models.

        Args:
            options: which models, and how.
            vocab_size: width of the logits to give: output columns beyond it are cut off.
        """
        self.options = options
        self.vocab_size = vocab_size
        self._models = _load_all(options)
        self._direct = [options.task == _CAUSAL and _head_is_plain(model) for model in self._models]
        if options.compile:
            for model in self._models:
                _compile(model)
        self.device = input_device(self._models[0])
        self._clipped_mass = torch.zeros((), device=self.device)

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row]) -> Iterator[Tensor]:
        """Logits of all positions of one batch of rows, in row-major order.

        Args:
            rows: the batch; rows of similar length waste the least.

        Yields:
            [n, vocab_size] slices on the teacher's device, together one row a position.
        """
        batch = self._batch(rows)
        if len(self._models) == 1:
            yield from self._slices(0, batch)
            return
        parts = [self._slices(i, batch) for i in range(len(self._models))]
        for slices in zip(*parts, strict=True):
            yield self._mean(slices)

    def _mean(self, slices: tuple[Tensor, ...]) -> Tensor:
        weights = self.options.weights
        slices = tuple(z.to(slices[0].device) for z in slices)
        if self.options.ensemble == "mean-logits":
            return torch.stack([w * z.float() for w, z in zip(weights, slices, strict=True)]).sum(0)
        # Log of the mean probability serves as logits: their softmax at T = 1 is that mean.
        logs = [z.float().log_softmax(-1) + np.log(w) for w, z in zip(weights, slices, strict=True)]
        return torch.logsumexp(torch.stack(logs), 0)

    def take_clipped_mass(self) -> Tensor:
        """Probability the teacher gave to ids beyond the vocabulary since the last call, summed.

        Returns:
            A float32 scalar on the teacher's device: reading it waits for all batches so far.
        """
        total = self._clipped_mass
        self._clipped_mass = torch.zeros((), device=self.device)
        return total

    def _batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Right-padded tensors on the device; `wanted` indexes the positions of the flat batch."""
        width = max(len(row.input_ids) for row in rows)
        input_ids = np.zeros((len(rows), width), np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        type_ids = np.zeros((len(rows), width), np.int64)
        wanted = np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            length = len(row.input_ids)
            input_ids[i, :length] = row.input_ids
            mask[i, :length] = 1
            if self.options.task == _CAUSAL:
                wanted[i, :length] = row.labels != IGNORE
            if row.type_ids is not None:
                type_ids[i, :length] = row.type_ids
        # Indexing by a mask would make the host wait for the device to count it.
        batch = {"input_ids": input_ids, "wanted": np.flatnonzero(wanted)}
        if self.options.task != _CAUSAL:
            batch["attention_mask"] = mask
        if rows[0].type_ids is not None:
            batch["token_type_ids"] = type_ids
        return {name: self.to_device(torch.from_numpy(a)) for name, a in batch.items()}

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy to where inputs go, without waiting for what the device has still to do."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _slices(self, index: int, batch: dict[str, Tensor]) -> Iterator[Tensor]:
        model = self._models[index]
        inputs = {name: value for name, value in batch.items() if name != "wanted"}
        if self.options.task != _CAUSAL:
            yield model(**inputs).logits[:, : self.vocab_size]
            return
        # Rows are padded on the right, where causal attention never looks: no mask is needed, and
        # without one the fastest attention kernels apply.
        if not self._direct[index]:
            logits = model(**inputs, use_cache=False).logits
            wanted = batch["wanted"].to(logits.device)
            yield self._cut(logits.flatten(0, 1).index_select(0, wanted))
            return
        hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        # The layers of a model that is spread move what they are given to their own devices; the
        # last one may live on another than the first.
        hidden = hidden.flatten(0, 1).index_select(0, batch["wanted"].to(hidden.device))
        step = max(1, _SLICE_BYTES[hidden.device.type] // (4 * head.weight.shape[0]))
        for start in range(0, len(hidden), step):
            yield self._cut(head(hidden[start : start + step]))

    def _cut(self, logits: Tensor) -> Tensor:
        if logits.shape[-1] <= self.vocab_size:
            return logits
        inside, outside = logits[:, : self.vocab_size], logits[:, self.vocab_size :]
        total = torch.logsumexp(logits.float(), -1)
        mass = (torch.logsumexp(outside.float(), -1) - total).exp().sum()
        self._clipped_mass += mass.to(self._clipped_mass.device)
        return inside


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise UsageError(
            f"teacher {name} is neither a folder here nor a model that the hub gives "
            f"({type(error).__name__}). "
            "Check the path or the id."
        ) from error


def _load_all(options: TeacherOptions) -> list[Any]:
    """Load each model on the one device, or spread over all where they do not fit it together."""
    files = [
        TeacherFiles.find(name, trust_remote_code=options.trust_remote_code)
        for name in options.names
    ]
    spread = options.device == "auto"
    if options.device == "cuda":
        needed = sum(weight_bytes(one.folder, options.dtype) for one in files)
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
    for place, one in enumerate(files):
        room = None
        if spread:
            from accelerate.utils import get_max_memory

            room = room_for_weights(get_max_memory(), len(files) - place)
        models.append(_load(one, options, room))
    return models


def _load(files: TeacherFiles, options: TeacherOptions, room: dict[int | str, int] | None) -> Any:
    """Load one model.

    Args:
        files: the model.
        options: how.
        room: bytes it may take of each device that it is spread over; None for one device.
    """
    settings: dict[str, Any] = {
        "dtype": getattr(torch, options.dtype),
        "use_safetensors": True,
        "trust_remote_code": options.trust_remote_code,
    }
    if options.task != _CAUSAL and (files.folder / HEAD_FILE).is_file():
        room = None  # a head of ours on an encoder: small enough for any GPU
    if room is not None:
        settings |= {"device_map": "auto", "max_memory": room}
    with quiet_transformers():
        model = _with_attention(files, options, settings)
    if room is None:
        model.to("cuda" if options.device == "auto" else options.device)
    elif "disk" in map(str, getattr(model, "hf_device_map", {}).values()):
        raise UsageError(
            f"teacher {files.name} does not fit the GPUs and the memory of a worker together. Use "
            "more --gpus-per-worker, or a machine with more memory."
        )
    return model.eval().requires_grad_(False)


def _with_attention(files: TeacherFiles, options: TeacherOptions, settings: dict[str, Any]) -> Any:
    from transformers.utils import is_flash_attn_2_available

    if options.attention == "auto":
        if options.flash_possible and is_flash_attn_2_available():
            with suppress(ImportError, ValueError):  # this model has no such attention
                flash = {**settings, "attn_implementation": "flash_attention_2"}
                return _from_pretrained(files, options.task, flash)
        return _from_pretrained(files, options.task, settings)
    try:
        settings = {**settings, "attn_implementation": options.attention}
        return _from_pretrained(files, options.task, settings)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"teacher {files.name} cannot run with --attention {options.attention}: {reason} "
            "Use --attention auto."
        ) from error


def _from_pretrained(files: TeacherFiles, task: str, settings: dict[str, Any]) -> Any:
    if task != _CAUSAL and (files.folder / HEAD_FILE).is_file():
        return HeadedClassifier.from_pretrained(files.folder, **settings)
    kind = AutoModelForCausalLM if task == _CAUSAL else AutoModelForSequenceClassification
    model, info = kind.from_pretrained(files.folder, output_loading_info=True, **settings)
    if info["missing_keys"]:
        # Transformers would fill them at random: a teacher that knows nothing.
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise UsageError(
            f"teacher {files.name} has no weights for {missing}: it was not trained for "
            f"{task}. Fine-tune it first (`kdcache finetune`), or name another."
        )
    return model


def input_device(model: Any) -> torch.device:
    """Where a model wants its inputs; weights that are offloaded lie on no device between calls."""
    places = [str(place) for place in getattr(model, "hf_device_map", {}).values()]
    if not places:
        return torch.device(next(model.parameters()).device)
    gpus = [place for place in places if place not in ("cpu", "disk")]
    first = gpus[0] if gpus else "cpu"
    return torch.device("cuda", int(first)) if first.isdecimal() else torch.device(first)


def _compile(model: Any) -> None:
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
        # With fixed shapes the last batch of each span would be compiled anew.
        layer.compile(dynamic=True)


def _repeated_layers(model: Any) -> list[Any]:
    """The layers of the largest stack; lists inside a layer, such as experts, are shorter or in
    it."""
    stacks = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
    sizes = [sum(p.numel() for p in stack.parameters()) for stack in stacks]
    return list(stacks[int(np.argmax(sizes))]) if stacks else []


class quiet_transformers:  # noqa: N801 - used like a function
    """Context without transformers' progress bars and loading reports."""

    def __enter__(self) -> None:
        from transformers.utils import logging as hf

        self._bars, self._level = hf.is_progress_bar_enabled(), hf.get_verbosity()
        hf.disable_progress_bar()
        hf.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as hf

        if self._bars:
            hf.enable_progress_bar()
        hf.set_verbosity(self._level)


@torch.inference_mode()
def _head_is_plain(model: Any) -> bool:
    """Whether logits are the output layer applied to the decoder's last hidden state, and no more.

    Soft-capping (Gemma 2) and logit scaling (Granite, Cohere) happen after the layer: found by
    comparing with the model's own forward on a few ids, rather than from a list of architectures.
    """
    with suppress(AttributeError, NotImplementedError):
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        if decoder is None or head is None or decoder is model:
            return False
        device = input_device(model)
        ids = torch.arange(8, device=device)[None] % int(model.config.get_text_config().vocab_size)
        want = model(input_ids=ids, use_cache=False).logits.float()
        got = head(decoder(input_ids=ids, use_cache=False).last_hidden_state)
        got = got.float().to(want.device)
        # A broken model gives NaN here too: the build says so later, with the place.
        scale = float(want.nan_to_num(0, 0, 0).abs().max())
        plain = torch.allclose(got, want, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)
        if not plain:
            logger.info(
                "%s changes logits after its output layer: its own forward is used", type(model)
            )
        return plain
    return False


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Name and content of the files that rebuild a tokenizer."""
    with tempfile.TemporaryDirectory(prefix="kdcache-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        return {
            path.name: path.read_bytes()
            for path in sorted(Path(folder).iterdir())
            if path.is_file()
        }


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of what a tokenizer does: its model, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Truncation and padding are settings of the last call, not of the tokenizer.
        model: Any = {k: v for k, v in state.items() if k not in ("truncation", "padding")}
    else:
        model = sorted(tokenizer.get_vocab().items())
    facts = [model, sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items())]
    facts.append(tokenizer.chat_template)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
