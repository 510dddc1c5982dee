"""Adapters as PEFT saves them: small weights, and the name of the model that they change.

An adapter's folder holds `adapter_config.json`, which names the base, `adapter_model.safetensors`,
and where kdcache made it `kdcache_adapter.json`: the SHA-256 of the base as it was, and a
classifier's classes. To answer, the adapter is merged into its base, which gives a plain model of
the base's class: `W + (alpha / r) B A` for a LoRA.

Guarantee: pickled adapters, bases that were changed since, and adapters whose weights do not all
find their place are refused. No global random numbers are drawn.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from kdcache.errors import UsageError, reason_of
from kdcache.lora import ADAPTER_CONFIG, PEFT_TASKS
from kdcache.tasks import TASKS
from kdcache.teacher.trust import read_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FACTS = "kdcache_adapter.json"
_PREFIX = "base_model.model."
_HEAD = re.compile(r"(score|classifier)(\.out_proj)?\.weight")


class AdapterFolder:
    """The files of an adapter, without its base.

    Attributes:
        who: the model, for messages: "teacher NAME".
        facts: its `kdcache_adapter.json`; empty where another program made it.
    """

    def __init__(self, who: str, folder: Path) -> None:
        """Read the small files.

        Raises:
            UsageError: it has no safetensors weights, names no base, would import a module, or was
                trained with weights that are unknown.
        """
        self.who, self.folder = who, folder
        self.config = read_json(who, folder / ADAPTER_CONFIG)
        facts = folder / ADAPTER_FACTS
        self.facts = read_json(who, facts) if facts.is_file() else {}
        if not (folder / ADAPTER_WEIGHTS).is_file():
            others = sorted(path.name for path in folder.glob("*.bin"))
            pickled = f" ({others[0]} is not loaded: convert it)" if others else ""
            raise UsageError(
                f"{who} is an adapter without weights: expected {ADAPTER_WEIGHTS} in it{pickled}."
            )
        try:
            with safe_open(folder / ADAPTER_WEIGHTS, framework="numpy") as file:
                self._all_shapes = {
                    name: file.get_slice(name).get_shape()
                    for name in file.keys()  # noqa: SIM118 - not a mapping
                }
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{who}: {ADAPTER_WEIGHTS} cannot be read ({error}).") from error
        names, pad_id = self.facts.get("label_names"), self.facts.get("pad_id")
        if not (names is None or isinstance(names, list)) or type(pad_id) not in (int, type(None)):
            raise UsageError(f"{who}: invalid values in {ADAPTER_FACTS}.")
        base = self.config.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise UsageError(
                f"{who} is an adapter that names no base: write it into {ADAPTER_CONFIG} as "
                "base_model_name_or_path."
            )
        if self.config.get("megatron_config"):  # which would import a module by its name
            raise UsageError(f"{who} is an adapter for Megatron; merge it there first.")
        init = str(self.config.get("init_lora_weights"))
        if init.startswith("pissa_niter"):
            raise UsageError(
                f"{who} is an adapter with init_lora_weights {init}: what it was trained beside is "
                "the rest of a random decomposition of its base, which differs at each loading. "
                "Convert it to a usual LoRA: PEFT's save_pretrained() with "
                "path_initial_model_for_weight_conversion."
            )

    @property
    def base(self) -> str:
        """Folder or hub id of the model that it changes."""
        return str(self.config["base_model_name_or_path"])

    @property
    def task(self) -> str | None:
        """The task that it was trained for, or None if it does not say."""
        theirs, problem = self.config.get("task_type"), self.facts.get("problem_type")
        ours = [task for task, name in PEFT_TASKS.items() if name == theirs]
        named = [task for task in ours if problem and TASKS[task].problem == problem]
        return next(iter([*named, *ours]), None)

    def changes(self) -> dict[str, Any]:
        """Fields of the base's configuration that are others with the adapter."""
        if self.task is None or TASKS[self.task].over_ids:
            return {}
        found: dict[str, Any] = {}
        names = self.facts.get("label_names")
        heads = [shape[0] for name, shape in self.shapes().items() if _HEAD.fullmatch(name)]
        if names is None and heads:
            names = [f"LABEL_{i}" for i in range(heads[0])]
        if names is not None:
            names = [str(name) for name in names]
            found["id2label"] = dict(enumerate(names))
            found["label2id"] = {name: i for i, name in enumerate(names)}
        if self.facts.get("problem_type") is not None:
            found["problem_type"] = str(self.facts["problem_type"])
        if self.facts.get("pad_id") is not None:
            found["pad_token_id"] = self.facts["pad_id"]
        return found

    def shapes(self) -> dict[str, list[int]]:
        """Shapes of the tensors that replace or complete the base's own, by their names in it."""
        return {
            name.removeprefix(_PREFIX): shape
            for name, shape in self._all_shapes.items()
            if "lora_" not in name
        }

    def check_base(self, sha256: str) -> None:
        """Refuse another base than the adapter was trained on, where that is known.

        Raises:
            UsageError: it was changed.
        """
        if self.facts.get("base_sha256", sha256) != sha256:
            raise UsageError(
                f"{self.who} was trained on other weights than {self.base} has now. Put the "
                "original model back, or train the adapter again."
            )

    def merge(self, model: Any) -> Any:
        """The base with the adapter's weights in it: the same object, changed.

        Raises:
            UsageError: the adapter is of another kind or another model.
        """
        from peft import PeftConfig, get_peft_model

        with self._fitting(), torch.random.fork_rng(devices=[]):
            config = PeftConfig.from_pretrained(str(self.folder))
            config.inference_mode = True
            if config.is_prompt_learning:
                raise UsageError(
                    f"{self.who} is an adapter of kind {config.peft_type.value}, which adds "
                    "tokens and cannot be merged into its base. Use a LoRA, or a whole model."
                )
            apart = _untied(model)
            adapted = get_peft_model(model, config)
            self.fill(adapted)
            if _untie(adapted) and model.config.is_encoder_decoder:
                raise UsageError(
                    f"{self.who} is an adapter of an embedding or output layer whose weight other "
                    "layers share; of a sequence-to-sequence model such a one cannot be merged. "
                    "Adapt other layers, or use a whole model."
                )
            merged = adapted.merge_and_unload()
            if _untied(merged) and not apart:  # saved as tied, one of the two would be lost
                merged.config.get_text_config().tie_word_embeddings = False
                merged.config.tie_word_embeddings = False
            return merged

    def fill(self, adapted: Any) -> None:
        """Put the adapter's weights into a PEFT model with an adapter of the same kind.

        Raises:
            UsageError: not all of them have a place, or not all places a weight.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        with self._fitting():
            weights = load_file(self.folder / ADAPTER_WEIGHTS)
            unexpected = set_peft_model_state_dict(adapted, weights).unexpected_keys
            own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            lost = sorted({*unexpected, *(own.keys() - weights.keys())})
            if lost:
                raise UsageError(
                    f"{self.who} is an adapter that does not fit its base {self.base}: "
                    f"{lost[0]} and {len(lost) - 1} others have no counterpart."
                )

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """Errors of PEFT mean that base and adapter do not belong together."""
        try:
            with quiet_peft():
                yield
        except (
            *(AttributeError, KeyError, NotImplementedError, OSError, RuntimeError),
            *(SafetensorError, TypeError, ValueError),
        ) as error:
            raise UsageError(
                f"{self.who} is an adapter that does not fit its base {self.base}: "
                f"{reason_of(error)}."
            ) from error


def complete_adapter(folder: Path, facts: Mapping[str, Any]) -> None:
    """Complete an adapter that PEFT saved: facts next to it, and an order for the names that its
    configuration has as sets.
    """
    (folder / ADAPTER_FACTS).write_text(json.dumps(dict(facts), indent=2) + "\n")
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text())
    for name in ("target_modules", "modules_to_save"):
        if isinstance(config.get(name), list):
            config[name] = sorted(set(config[name]))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _untie(adapted: Any) -> bool:
    """Give adapted layers weights of their own: merged into one that embedding and output layer
    share, an adapter of one would change the other, too. Returns whether any was shared.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer  # which keeps both alike
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper  # has weights of its own

    shared = False
    names = Counter(id(p) for _, p in adapted.named_parameters(remove_duplicate=False))
    for layer in list(adapted.modules()):
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer):
            base = layer.get_base_layer()
            weight = getattr(base, "weight", None)
            if isinstance(weight, nn.Parameter) and names[id(weight)] > 1:
                base.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
                shared = True
        elif isinstance(layer, ModulesToSaveWrapper):
            weight = getattr(layer.original_module, "weight", None)
            shared = shared or names[id(weight)] > 1
    return shared


def _untied(model: Any) -> bool:
    """Whether a language model has an output layer with weights of its own."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(output, "weight", None)
    return isinstance(weight, Tensor) and weight is not model.get_input_embeddings().weight


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Context without PEFT's advice to those who call it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"peft\b")
        yield
