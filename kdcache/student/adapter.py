"""A student of which only a low-rank adapter is trained, and a classifier's head.

PEFT makes the adapter and saves it. Which layers it changes is decided here: a head with random
weights must be trained and saved as a whole, or a loaded student would answer by another head, and
PEFT knows heads by two names only.

Guarantee: whatever of the student is not in its base's files is in the adapter's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kdcache.errors import UsageError, reason_of
from kdcache.lora import ALL_LINEAR, PEFT_TASKS, Lora
from kdcache.student.tokens import StudentInfo, label_config
from kdcache.tasks import TASKS
from kdcache.teacher import TeacherFiles
from kdcache.teacher.adapter import quiet_peft

_PEFTS_HEADS = ("classifier", "score")  # that PEFT trains as a whole without being asked
_SHOWN = 8


def refuse_second(name: str, files: TeacherFiles) -> None:
    """Refuse an adapter as the base of another.

    Raises:
        UsageError: it is one.
    """
    if files.adapter is not None:
        raise UsageError(
            f"student {name} is an adapter of {files.adapter.base}, and --lora would add another. "
            "Name its base, or train without --lora, which merges it and trains all weights."
        )


def with_lora(
    student: Any,
    lora: Lora,
    name: str,
    files: TeacherFiles,
    info: StudentInfo,
    new: Collection[str] = (),
) -> nn.Module:
    """Freeze a Hugging Face student but for a new adapter, and the head of a classifier.

    The adapter's random weights come from torch's global state.

    Args:
        new: names of the student's weights that its files lack.

    Returns:
        The PEFT model.

    Raises:
        UsageError: the student has no such layers.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    over_ids = TASKS[info.task].over_ids
    loose = sorted(n for n in new if "." not in n)
    if loose:
        raise UsageError(
            f"--lora cannot adapt {files.who}: its files lack {loose[0]}, which belongs to no "
            "layer and would not be saved. Train without --lora."
        )
    saved = sorted({*([] if over_ids else _heads(student)), *(n.rpartition(".")[0] for n in new)})
    saved = [one for one in saved if not any(one.startswith(f"{other}.") for other in saved)]
    targets = _targets(student, lora, files.who, saved, over_ids)
    config = LoraConfig(
        task_type=TaskType[PEFT_TASKS[info.task]],
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=saved or None,
    )
    try:
        with quiet_peft():
            adapted = get_peft_model(student, config)
    except (AttributeError, TypeError, ValueError) as error:
        said = reason_of(error)
        raise UsageError(f"--lora {lora} cannot adapt {files.who}: {said}.") from error
    local = Path(name).expanduser()
    config.base_model_name_or_path = str(local.resolve()) if local.is_dir() else files.name
    # PEFT would ask the hub whether embeddings are the base's.
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    labels = {} if over_ids else label_config(info)
    adapted.kdcache_adapter = {
        "base_sha256": files.sha256,
        "label_names": None if over_ids else list(info.label_names or ()) or None,
        "pad_id": getattr(student.config, "pad_token_id", None),
        **({"problem_type": labels["problem_type"]} if "problem_type" in labels else {}),
    }
    return adapted  # type: ignore[no-any-return]


def trained_weights(student: nn.Module) -> dict[str, Tensor]:
    """The weights of an adapted student that training changes, by their names."""
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def _heads(student: Any) -> list[str]:
    """The parts of a classifier outside of its body."""
    return [
        name
        for name, part in student.named_children()
        if name != student.base_model_prefix and next(part.parameters(), None) is not None
    ]


def _targets(student: Any, lora: Lora, who: str, saved: Iterable[str], over_ids: bool) -> list[str]:
    """Names for PEFT of the layers to adapt: short ones where they mean just these."""
    output = student.get_output_embeddings() if lora.targets == (ALL_LINEAR,) else None
    every = dict(student.named_modules())
    # PEFT trains these as a whole as well, by the ends of their names.
    whole = [*saved, *(path for path in every if not over_ids and path.endswith(_PEFTS_HEADS))]
    free = [
        path
        for path, module in every.items()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not output
        and not any(part == path or path.startswith(f"{part}.") for part in whole)
    ]
    found = set()
    for target in lora.targets:
        own = [path for path in free if target == ALL_LINEAR or _names(target, path)]
        if not own:
            known = sorted({path.rpartition(".")[2] for path in free})
            raise UsageError(
                f"--lora: {who} has no linear layer {target} to adapt; its layers are "
                f"{', '.join(known[:_SHOWN])}."
            )
        found |= set(own)
    short = sorted({path.rpartition(".")[2] for path in found})
    meant = {path for path in every if any(_names(one, path) for one in short)}
    return short if meant == found else sorted(found)


def _names(target: str, path: str) -> bool:
    return path == target or path.endswith(f".{target}")
