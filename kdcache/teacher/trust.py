"""Finds code and pickled weights in a model's folder before it is loaded.

Refused:

* weights that are not safetensors, also if an index of safetensors names them, and those that are
  missing or cut off;
* without `--trust-remote-code`: a Python function that makes the model (`kdcache-factory`, or the
  key `kdcache_factory` in the configuration of a model of transformers), Python
  files of the folder (`auto_map`) if transformers has no such architecture, and attention kernels
  (`attn_implementation` with a `/`), which are compiled code from the hub.

transformers itself refuses any other `auto_map` without that flag, runs chat templates in a
sandbox, and reads the state of a resumed run as tensors and numbers only (`weights_only`).
`who` is the model in messages: "teacher NAME".
Cost: two small files and the headers of the weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING

from kdcache.errors import UsageError
from kdcache.files import inner

FACTORY_TYPE = "kdcache-factory"
FACTORY_KEY = "kdcache_factory"
"""In the `config.json` of a Hugging Face model that a function of the user changed after it was
made, such as one with fake-quantised weights: what `FACTORY_TYPE` has besides its type."""
_INDEX = "model.safetensors.index.json"


def check_folder(
    who: str, folder: Path, *, trust_remote_code: bool, elsewhere: Iterable[str] = ()
) -> None:
    """Refuse a folder without safetensors weights, or one that would run code without permission.

    Args:
        elsewhere: names of weight files that have not been fetched.

    Raises:
        UsageError: names the file and the reason.
    """
    remote = set(elsewhere)
    weights = [*remote, *(path.name for path in folder.glob("*.safetensors"))]
    if (folder / _INDEX).is_file():
        parts = read_json(who, folder / _INDEX).get("weight_map")
        if not isinstance(parts, dict):
            raise UsageError(f"{who}: {_INDEX} has no weight_map. Fetch the model again.")
        weights += map(inner, parts.values())
    others = sorted(name for name in weights if not name.endswith(".safetensors"))
    if others or not weights:
        others += [path.name for path in folder.glob("*.bin")]
        pickled = f" ({others[0]} is not loaded: convert it)" if others else ""
        raise UsageError(f"{who} has no weights: expected *.safetensors in it{pickled}.")
    for name in sorted(set(weights) - remote):
        check_weights(who, folder / name)
    config = read_json(who, folder / "config.json")
    check_config(who, config, trust_remote_code=trust_remote_code)


def check_weights(who: str, path: Path) -> None:
    """Refuse a file of weights that is missing, cut off or something else.

    Raises:
        UsageError: names the file.
    """
    if not path.is_file():
        raise UsageError(f"{who} lacks {path.name}, which its index names. Fetch the model again.")
    try:
        with safe_open(path, "numpy"):
            pass
    except SafetensorError as error:
        raise UsageError(
            f"{who}: {path.name} is cut off or damaged ({error}). Fetch it, or make it, again."
        ) from error


def check_config(who: str, config: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Refuse a configuration that would run code without permission.

    Raises:
        UsageError: names the reason.
    """
    kind, kernels = config.get("model_type"), sorted(_kernels(config))
    reason, made_by = None, factory_of(config)
    if made_by is not None:
        reason = f"is made by the Python function {made_by.get('factory')}"
    elif "auto_map" in config and kind not in CONFIG_MAPPING:
        reason = "brings its own code (auto_map)"
    elif kernels:
        reason = f"asks for the attention kernel {kernels[0]} from the hub"
    if reason is not None and not trust_remote_code:
        raise UsageError(
            f"{who} {reason}, as its configuration says, and that code would run here. Give "
            "--trust-remote-code if you trust it."
        )


def factory_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The Python function that makes a model, `factory`, and its argument, `info`, by the object in
    its `config.json`; None of models that transformers makes, and of those that a quantiser has
    converted: their configuration keeps the key, and their weights need no function.
    """
    if config.get("model_type") == FACTORY_TYPE:
        return config
    found = None if config.get("quantization_config") else config.get(FACTORY_KEY)
    return found if isinstance(found, Mapping) else None


def check_unchanged(who: str, config: Mapping[str, Any]) -> None:
    """Refuse a model that a function of the user changes after transformers has made it.

    Raises:
        UsageError: it is one, such as a student with fake-quantised weights.
    """
    made_by = factory_of(config)
    if made_by is not None:
        raise UsageError(
            f"{who} is made by the Python function {made_by.get('factory')}, without which its "
            "weights compute something else. Convert it with the tools of its quantiser, and name "
            "what they write."
        )


def _kernels(value: Any, key: str = "") -> Iterator[str]:
    """Attention implementations that are named like a repository, in nested configurations too."""
    if isinstance(value, Mapping):
        for inner, below in value.items():
            # A mapping of sub-models to implementations has their names as keys.
            yield from _kernels(below, key if "attn_implementation" in key else inner)
    elif isinstance(value, list):
        for below in value:
            yield from _kernels(below, key)
    elif "attn_implementation" in key and "/" in str(value):
        yield str(value)


def read_json(who: str, path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model, which a download that was cut off may have spoilt.

    Raises:
        UsageError: it holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{who}: {path.name} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UsageError(f"{who}: {path.name} is not a JSON object.")
    return value
