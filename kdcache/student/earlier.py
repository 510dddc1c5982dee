"""`--init-from`: a student that begins with the weights of an earlier one.

Guarantee: all of its weights are the earlier one's, which has the same shape and reads the same
tokens; anything else is refused.
"""

from __future__ import annotations

from typing import Any

from kdcache.errors import UsageError
from kdcache.lora import Lora
from kdcache.student.adapter import is_adapted
from kdcache.student.info import StudentInfo
from kdcache.student.load import find_files, load_student
from kdcache.student.tokenize import HfTokenize, WordTokenize, student_tokenize
from kdcache.teacher.adapter import AdapterFolder


def begin_from(
    student: Any,
    tokenize: Any,
    earlier: str,
    info: StudentInfo,
    *,
    lora: Lora | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Give a student the weights of an earlier one.

    Args:
        student: what `load_student` made.
        tokenize: what `student_tokenize` gives for it.
        earlier: folder or hub id of the earlier one, such as a run's.
        info: the cache's side.
        lora: the adapter that is trained, whose weights are then taken from an earlier adapter.
        trust_remote_code: run code that the earlier student brings.

    Raises:
        UsageError: it has another shape, another tokenizer, or an adapter on another base.
    """
    who = f"--init-from {earlier}"
    files = find_files(earlier, "run", trust_remote_code=trust_remote_code)
    if lora is not None and is_adapted(student):
        if files.adapter is None:
            raise UsageError(
                f"{who} is a whole model, and --lora trains an adapter. Name it as --student."
            )
        _check_adapter(who, files.adapter, lora, student.kdcache_adapter["base_sha256"])
        files.adapter.fill(student)
        return
    other = load_student(earlier, info, trust_remote_code=trust_remote_code)
    theirs = student_tokenize(other, earlier, info, trust_remote_code=trust_remote_code)
    if _ids(theirs) != _ids(tokenize):
        raise UsageError(
            f"{who} reads other tokens than the student. Name it as --student, which keeps its own "
            "tokenizer."
        )
    try:
        student.load_state_dict(other.state_dict())
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise UsageError(
            f"{who} has another shape than the student: {' '.join(lines[:1])[:300].rstrip('.')}. "
            "Name it as --student to keep its shape."
        ) from error


def _check_adapter(who: str, adapter: AdapterFolder, lora: Lora, base_sha256: str) -> None:
    config = adapter.config
    adapter.check_base(base_sha256)
    plain = not any(config.get(name) for name in ("use_rslora", "use_dora", "rank_pattern"))
    same = (config.get("r"), config.get("lora_alpha")) == (lora.r, lora.alpha)
    if config.get("peft_type") != "LORA" or not plain or not same:
        raise UsageError(
            f"{who} is an adapter of r={config.get('r')}, alpha={config.get('lora_alpha')}"
            f"{'' if plain else ' and another kind'}, the new one is {lora}. Give the same --lora, "
            "or name it as --student without --lora, which merges it."
        )


def _ids(tokenize: Any) -> Any:
    """What a tokenizer makes of words; None for the cache's own."""
    own = isinstance(tokenize, HfTokenize | WordTokenize)
    return tokenize.tokenizer.get_vocab() if own else None
