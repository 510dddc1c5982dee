"""Configurations and tokenizers as transformers reads them, and in one line why it cannot.

What is wrong with files of others ends there in errors of any class: a tokenizer's in a bare
`Exception`, a configuration's in that of whatever its values are first used for.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kdcache.errors import reason_of

# What a device says when it is lost; older versions of torch have no class for it.
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

    Args:
        name: its folder or hub id.
        trust_remote_code: whether code that ships with it may run.

    Raises:
        UnreadableError: there is none, or its files are broken.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UnreadableError(reason_of(error)) from error


def read_config(folder: Path, *, trust_remote_code: bool = False, **changes: Any) -> Any:
    """A model's configuration.

    Args:
        folder: with its `config.json`.
        trust_remote_code: whether code that ships with it may run.
        changes: what it shall have beside what the file says.

    Raises:
        UnreadableError: transformers does not know such a model, or the file is broken.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **changes)
    except Exception as error:
        named = json.loads((folder / "config.json").read_bytes()).get("model_type")
        if not isinstance(named, str):
            reason = "its config.json names no model_type"
        elif named not in CONFIG_MAPPING:
            reason = f"it is of type {named}, which transformers {transformers.__version__} lacks"
        else:
            reason = f"its config.json is refused by transformers: {reason_of(error)}"
        raise UnreadableError(reason) from error
