"""Training a language model that has another tokenizer than its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcache.cache import Cache
from kdcache.commands.train.options import TrainOptions
from kdcache.errors import UsageError
from kdcache.pretrained import UnreadableError, read_tokenizer
from kdcache.stream import CrossTokenizer
from kdcache.student.load import is_model
from kdcache.tasks import TASKS


def cross_problems(
    options: TrainOptions, caches: Sequence[Cache], eval_caches: Sequence[Cache]
) -> list[str]:
    """Why these caches are not for students of another tokenizer: a line each."""
    task = TASKS[caches[0].spec.task]
    if not task.causal or task.source:
        instead = (
            "A student of this cache writes with its teacher's tokens: name one that does."
            if task.source
            else "The masks of this cache are its teacher's tokens: name a student with these."
            if task.over_ids
            else "A classifier reads the texts of the cache by its own tokenizer without it."
        )
        return [f"--cross-tokenizer is for causal language models. {instead}"]
    if options.hard_only:
        return []
    wrong = [
        f"{cache.url} has no log-probabilities of its labels (label_logprob), which "
        "--cross-tokenizer compares. Build it again with this version of kdcache, or train with "
        "--alpha 1 on hard labels alone."
        for cache in (*caches, *eval_caches)
        if not cache.spec.label_logprob
    ]
    if options.cross_tokenizer == "hybrid":
        wrong += [
            f"--cross-tokenizer hybrid needs a few ids of each position, but {cache.url} is "
            f"{cache.spec.codec}. Make one with kdcache transcode --codec topk:64, or use "
            "--cross-tokenizer likelihood."
            for cache in (*caches, *eval_caches)
            if not cache.spec.codec.startswith(("topk", "sample", "anchored"))
        ]
    return wrong


def own_tokenizer(options: TrainOptions) -> Any:
    """The student's tokenizer.

    Raises:
        UsageError: there is none.
    """
    name = options.student_tokenizer
    if name is None:
        name = options.student
        if not is_model(name):
            raise UsageError(
                f"student {name} has no tokenizer of its own, and --cross-tokenizer needs one. "
                "Name the folder or hub id of a tokenizer with --student-tokenizer."
            )
    try:
        return read_tokenizer(name, trust_remote_code=options.trust_remote_code)
    except UnreadableError as error:
        whose = "" if options.student_tokenizer else " Name the student's with --student-tokenizer."
        raise UsageError(f"there is no usable tokenizer at {name} ({error}).{whose}") from error


def cross_tokenizer(options: TrainOptions, cache: Cache, tokenizer: Any) -> CrossTokenizer:
    """What reads the cache for this student.

    Args:
        options: of the run.
        cache: one of the run's.
        tokenizer: the student's.

    Raises:
        UsageError: one of the tokenizers loses bytes of a text.
    """
    assert options.cross_tokenizer is not None, "the caller asked"
    return CrossTokenizer(
        cache,
        tokenizer,
        options.cross_tokenizer,
        tau=options.likelihood_temperature,
        max_length=options.max_length,
    )
