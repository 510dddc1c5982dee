"""What a student begins from: the identity of its files, and `--init-from` an earlier student.

Guarantee: all weights of a student begun so are the earlier one's, which has the same shape and
reads the same tokens; anything else is refused.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import UsageError
from kdcache.lora import ADAPTER_CONFIG, Lora, is_adapted
from kdcache.storage.base import sha256_file
from kdcache.student.load import load_student
from kdcache.student.tokens import HfTokenize, StudentInfo, WordTokenize, student_tokenize
from kdcache.teacher import TeacherFiles

if TYPE_CHECKING:
    from kdcache.teacher.adapter import AdapterFolder

_CONFIGS = ("config.json", ADAPTER_CONFIG)


def files_sha256(name: str) -> str | None:
    """SHA-256 of a file, or of the configuration and weights in a folder; None where this machine
    has neither, as of a hub id or a built-in student. About 1 GB/s, once for a state of the files.
    """
    path = Path(name)
    if path.is_file():
        return _sha256(path)
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted({*path.glob("*.safetensors"), *(path / one for one in _CONFIGS)}):
        if file.is_file():
            digest.update(f"{file.name} {_sha256(file)}\n".encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    facts = path.stat()
    return _of(path.resolve(), facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


@functools.lru_cache(256)
def _of(path: Path, *state: int) -> str:
    return sha256_file(path)


def begin_from(
    student: Any,
    tokenize: Any,
    source: str,
    info: StudentInfo,
    *,
    lora: Lora | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Give a student the weights of an earlier one.

    Args:
        student: what `load_student` made.
        tokenize: what `student_tokenize` gives for it.
        source: folder or hub id of the earlier one, such as a run's.
        info: the cache's side.
        lora: the adapter that is trained, whose weights are then taken from an earlier adapter.
        trust_remote_code: run code that the earlier student brings.

    Raises:
        UsageError: it has another shape, another tokenizer, or an adapter on another base.
    """
    who = f"--init-from {source}"
    files = TeacherFiles.find(source, role="run", trust_remote_code=trust_remote_code)
    if lora is not None and is_adapted(student):
        if files.adapter is None:
            raise UsageError(
                f"{who} is a whole model, and --lora trains an adapter. Name it as --student."
            )
        _check_adapter(who, files.adapter, lora, student.kdcache_adapter["base_sha256"])
        files.adapter.fill(student)
        return
    other = load_student(source, info, trust_remote_code=trust_remote_code)
    theirs = student_tokenize(other, source, info, trust_remote_code=trust_remote_code)
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
