"""Students that a function of the user makes: `module:function`.

It gets a `StudentInfo` and returns any module, or a model of transformers, as it is or changed:
with fake-quantised weights, say. Such a model is saved as any other, so that its quantiser's own
tools load and convert it; and its `config.json` names the function, without which its weights
compute something else. Code is run only where the user names it, or trusts a folder that does.
"""

from __future__ import annotations

import copy
import importlib
import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedModel

from kdcache.errors import UsageError
from kdcache.student.tokens import StudentInfo

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_factory(name: str) -> bool:
    """Whether a student's name is that of a function, and of no file or folder."""
    return _FACTORY.fullmatch(name) is not None and not Path(name).exists()


def from_factory(name: str, info: StudentInfo) -> nn.Module:
    """What a function makes.

    Args:
        name: its own, `module:function`; modules of the working directory are found.
        info: its argument.

    Raises:
        UsageError: there is none, or it returns no module.
    """
    module, function = name.split(":")
    # A console script does not search the working directory, where a user's own students live.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        factory = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"student {name}: {error}. Run in the folder of {module}.py, or install it."
        ) from error
    except AttributeError as error:
        raise UsageError(f"student {name}: {module} has no {function}.") from error
    student = factory(info)
    if not isinstance(student, nn.Module):
        raise UsageError(
            f"student {name} returned {type(student).__name__}; it must return a torch.nn.Module."
        )
    made_by = {"factory": name, "info": _plain(info)}
    student.kdcache_factory = made_by  # type: ignore[assignment]
    student.kdcache_changed = is_changed(student)  # type: ignore[assignment]
    return student


def _plain(info: StudentInfo) -> dict[str, Any]:
    apart = ("texts", "tokenizer", "mean")
    return {f.name: getattr(info, f.name) for f in fields(info) if f.name not in apart}


def saved_factory(folder: Path, made_by: Mapping[str, Any], info: StudentInfo) -> nn.Module:
    """The same with the weights of a folder.

    Args:
        folder: that a run wrote.
        made_by: what its `config.json` states, see `factory_of`.
        info: texts and tokenizer; the rest is as it was when it was trained.
    """
    saved = StudentInfo(**{**made_by["info"], "texts": info.texts, "tokenizer": info.tokenizer})
    student = from_factory(made_by["factory"], saved)
    load_model(student, folder / "model.safetensors")
    return student


def is_changed(student: Any) -> bool:
    """Whether a model computes otherwise than transformers would make it by its configuration:
    with layers of other classes, such as those that quantise their weights in every forward pass,
    with parametrised weights, hooks or forwards of its own.
    """
    if not isinstance(student, PreTrainedModel):
        return False
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        plain = dict(type(student)(copy.deepcopy(student.config)).named_modules())
    found = dict(student.named_modules())
    return found.keys() != plain.keys() or any(_work(found[n]) != _work(plain[n]) for n in found)


def _work(module: nn.Module) -> tuple[Any, ...]:
    """What decides on a module's forward, but for its numbers."""
    own = vars(module)
    hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
    return type(module), own.get("forward"), hooks, {type(p) for p in own["_parameters"].values()}
