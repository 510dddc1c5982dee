"""Which caches fit each other: every problem at once, before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kdcache.cache import Cache
from kdcache.errors import UsageError


def open_caches(caches: Cache | str | Sequence[Cache | str]) -> list[Cache]:
    """Sealed caches from caches and URLs."""
    listed: Sequence[Any] = [caches] if isinstance(caches, (str, Cache)) else list(caches)
    if not listed:
        raise UsageError("no cache was given. Name at least one with --cache.")
    return [cache if isinstance(cache, Cache) else Cache.open(str(cache)) for cache in listed]


def check_caches(
    caches: Sequence[Cache], temperatures: Iterable[float], problems: Sequence[str] = ()
) -> None:
    """Check that caches fit each other and declare the temperatures wanted.

    Args:
        caches: the caches to be mixed.
        temperatures: every temperature that will be asked for.
        problems: what else was found wrong, to be told in the same message.

    Raises:
        UsageError: lists everything that is wrong.
    """
    found = list(problems)
    first = caches[0]
    for cache in caches:
        for name in ("task", "vocab_size", "label_names", "tokenizer", "codec", "temperatures"):
            mine, theirs = getattr(cache.spec, name), getattr(first.spec, name)
            if mine != theirs:
                found.append(
                    f"{name} of {cache.url} is {mine}, but {first.url} has {theirs}: "
                    "caches are mixed only where these agree."
                )
        for temperature in temperatures:
            try:
                cache.codec().check_temperature(temperature)
            except UsageError as error:
                found.append(f"{cache.url}: {error}")
    if found:
        raise UsageError("\n".join(dict.fromkeys(found)))
