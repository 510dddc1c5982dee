"""Reads tokenizers and configurations with transformers; a file it cannot read is a one-line error.

Faulty files raise errors of any class: a tokenizer's a bare `Exception`, a configuration's that of
whatever its values are first used for. Progress bars and advice of transformers are silenced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kdcache.errors import reason_of

logger = logging.getLogger(__name__)

PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
"""Names of the files of a model that are fetched."""
WEIGHTS = "*.safetensors"

# Arguments of loading, which transformers saves with a tokenizer's own settings.
_OF_LOADING = {
    "_commit_hash", "_from_auto", "cache_dir", "force_download", "is_local", "local_files_only",
    "name_or_path", "proxies", "revision", "subfolder", "token", "trust_remote_code",
    "use_auth_token", "use_fast", "user_agent",
}  # fmt: skip
_OF_CALLS = {"padding", "truncation"}  # settings of the last call, in tokenizer.json
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_AHEAD = ("num_nextn_predict_layers", "num_mtp_layers")  # in configurations
# What a device reports when it is lost; older versions of torch have no class for it.
_LOST = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)


class UnreadableError(ValueError):
    """Why files cannot be read, in one line without a full stop."""


@contextlib.contextmanager
def unreadable() -> Iterator[None]:
    """Errors by which transformers refuses the files of a model become `UnreadableError`; those of
    a missing library, the disk or a device are not about the files, and stay.
    """
    try:
        yield
    except (ImportError, OSError, torch.OutOfMemoryError, _LOST):
        raise
    except Exception as error:
        raise UnreadableError(reason_of(error)) from error


def read_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer.

    Raises:
        UnreadableError: there is none, or its files are broken.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UnreadableError(reason_of(error)) from error


def generation_ends(folder: Path) -> set[int]:
    """Ids that end a text, by a model's generation settings, or else by its configuration."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        if found is not None:
            return set(map(int, found if isinstance(found, list) else [found]))
    return set()


def tokenizer_of(files: Mapping[str, bytes]) -> PreTrainedTokenizerBase:
    """A tokenizer from the content of its files, by name; code that it names is never run.

    Raises:
        UnreadableError: they are none.
    """
    with tempfile.TemporaryDirectory(prefix="kdcache-tokenizer-") as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        try:
            return read_tokenizer(folder)
        except UnreadableError as error:
            raise UnreadableError(str(error).replace(folder, "tokenizer")) from error


def read_config(folder: Path, *, trust_remote_code: bool = False, **changes: Any) -> Any:
    """A model's configuration.

    Args:
        folder: with its `config.json`.
        changes: what it shall have besides what the file states.

    Raises:
        UnreadableError: transformers does not know such a model, or the file is broken.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **changes)
        if not isinstance(config.get_text_config(), PreTrainedConfig):
            raise ValueError(f"a {config.model_type} has no part for its text")
        return config
    except Exception as error:
        named = json.loads((folder / "config.json").read_bytes()).get("model_type")
        if not isinstance(named, str):
            reason = "its config.json names no model_type"
        elif named not in CONFIG_MAPPING:
            reason = f"it is of type {named}, which transformers {transformers.__version__} lacks"
        else:
            reason = f"its config.json is refused by transformers: {reason_of(error)}"
        raise UnreadableError(reason) from error


def left_out(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Weights in the files of a model that it has no place for, but has one for others like them:
    those of further layers, and a bias where the layer has none. Without them it computes something
    else than what was trained. Heads and towers for other uses, layers behind the last that
    predict further tokens, and buffers that older versions saved, are not such weights.

    Args:
        unexpected: names of weights that were found in its files and not loaded.
    """
    own = {name for name, _ in model.named_parameters()}
    kinds = {_LAYER.sub("#", name) for name in own}
    prefix = f"{model.base_model_prefix}."
    config = model.config.get_text_config()
    last = getattr(config, "num_hidden_layers", None) or 0
    ahead = {str(last + i) for i in range(max(getattr(config, name, 0) or 0 for name in _AHEAD))}

    def is_one(key: str) -> bool:
        if ahead & {*_LAYER.findall(key)[:1]}:
            return False
        layer, _, part = key.rpartition(".")
        biased = part == "bias" and f"{layer}.weight" in own
        return biased or _LAYER.sub("#", key) in kinds

    return sorted(
        key
        for key in unexpected
        if any(map(is_one, (key, prefix + key, key.removeprefix(prefix))))  # with or without a head
    )


def warn_of_left_out(who: str, model: Any, unexpected: Iterable[str]) -> None:
    """Warn of such weights where a model is only begun from, and may well have fewer layers."""
    spare = left_out(model, unexpected)
    if spare:
        logger.warning(
            "%s begins without the weights that its config.json has no layer for (%s; %d in all)",
            who, ", ".join(spare[:3]), len(spare),
        )  # fmt: skip


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Context without transformers' progress bars and loading reports."""
    from transformers.utils import logging as hf

    bars, level = hf.is_progress_bar_enabled(), hf.get_verbosity()
    hf.disable_progress_bar()
    hf.set_verbosity_error()
    try:
        yield
    finally:
        if bars:
            hf.enable_progress_bar()
        hf.set_verbosity(level)


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Name and content of the files that rebuild a tokenizer.

    They are a part of the cache, so they hold nothing of how and where the tokenizer was loaded.
    """
    with tempfile.TemporaryDirectory(prefix="kdcache-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        found = {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}
    config, backend = "tokenizer_config.json", "tokenizer.json"
    values = json.loads(found[config])
    values = {name: value for name, value in values.items() if name not in _OF_LOADING}
    found[config] = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    state = json.loads(found.get(backend, b"{}"))
    if any(state.get(name) for name in _OF_CALLS):
        state |= dict.fromkeys(_OF_CALLS)
        found[backend] = json.dumps(state, indent=2, ensure_ascii=False).encode()
    return found


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of what a tokenizer does: its model, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        model: Any = {k: v for k, v in state.items() if k not in _OF_CALLS}
    else:
        model = sorted(tokenizer.get_vocab().items())
    facts = [model, sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items())]
    facts.append(tokenizer.chat_template)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
