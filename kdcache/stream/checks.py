"""Checks whether caches fit each other: every problem at once, before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdcache.cache import Cache
from kdcache.domains import Weights
from kdcache.errors import UsageError


def open_caches(caches: Cache | str | Sequence[Cache | str]) -> list[Cache]:
    """Sealed caches from caches and URLs."""
    listed: Sequence[Any] = [caches] if isinstance(caches, (str, Cache)) else list(caches)
    if not listed:
        raise UsageError("no cache was given. Name at least one with --cache.")
    return [cache if isinstance(cache, Cache) else Cache.open(str(cache)) for cache in listed]


def check_caches(
    caches: Sequence[Cache],
    temperatures: Iterable[float],
    problems: Sequence[str] = (),
    *,
    beside: Sequence[Cache] = (),
) -> None:
    """Check that caches fit each other and declare the requested temperatures.

    Args:
        problems: other problems, for the same message.
        beside: caches to evaluate on, which are mixed with each other alone: their codec and
            declared temperatures may be others.

    Raises:
        UsageError: lists everything that is wrong.
    """
    found, temperatures = list(problems), list(temperatures)
    for together, cache in [(group, cache) for group in (caches, beside) for cache in group]:
        if problem := unlike(cache, caches[0]):
            found.append(problem if together is caches else f"--eval-cache: {problem}")
            continue  # whatever else differs follows from that
        found += _differences(cache, together[0], ("codec", "temperatures", "output_layer"))
        for temperature in temperatures:
            try:
                cache.codec().check_temperature(temperature)
            except UsageError as error:
                found.append(f"{cache.url}: {error}")
    if found:
        raise UsageError("\n".join(dict.fromkeys(found)))


def unlike(cache: Cache, other: Cache) -> str:
    """Why one student cannot learn from two caches, or be evaluated on one of them.

    Returns:
        A sentence with its cure; empty where it can.
    """
    mine, theirs = cache.spec, other.spec
    pairs = {
        "task": (mine.task, theirs.task),
        "classes": (_names(mine.label_names), _names(theirs.label_names)),
        "vocabulary": (f"{mine.vocab_size:,} ids", f"{theirs.vocab_size:,} ids"),
        "tokenizer": (f"SHA-256 {mine.tokenizer[:12]}", f"SHA-256 {theirs.tokenizer[:12]}"),
    }
    for name, (own, wanted) in pairs.items():
        if own != wanted:
            return (
                f"the {name} of {cache.url} is {own}, but {other.url} has {wanted}. Name a cache "
                f"of the same {name}."
            )
    return ""


def check_every_position(caches: Iterable[Cache], what: str) -> list[str]:
    """Why caches do not do for what needs the soft targets of all positions: a line each.

    Args:
        what: it is, for messages.
    """
    return [
        f"{cache.url} keeps soft targets of some positions alone (--positions), and {what} needs "
        "those of all. Build one without it."
        for cache in caches
        if cache.spec.positions is not None
    ]


def _names(names: Sequence[str] | None) -> str:
    return "unnamed" if names is None else ", ".join(names)


def checked_weights(weights: Any, caches: Sequence[Cache], problems: list[str]) -> Weights:
    """Weights of caches and domains, as `Weights.parse` reads them; adds what is wrong."""
    try:
        found = Weights.parse(weights)
    except UsageError as error:
        problems += str(error).splitlines()
        return Weights()
    wrong = found.problems([cache.spec.domain_names for cache in caches])
    problems += wrong
    return Weights() if wrong else found


def check_mix(
    weights: Weights, caches: Sequence[Cache], rows: Mapping[tuple[int, str | None], int]
) -> None:
    """Refuse the weight of a domain that an epoch would have no row of.

    Raises:
        UsageError: there is such a weight, and it is not 0.
    """
    for name, weight in weights.domains.items():
        if weight and not sum(n for (_, domain), n in rows.items() if domain == name):
            stored = sum(s.rows for c in caches for s in c.manifest.shards if s.domain == name)
            raise UsageError(
                f"--cache-weight is {name}={weight:g}, but of the {stored} rows of this domain an "
                "epoch would have none. Use a larger weight, or 0 to leave it out."
            )


def _differences(cache: Cache, other: Cache, names: Sequence[str]) -> list[str]:
    return [
        f"{name} of {cache.url} is {mine}, but {other.url} has {theirs}: "
        "caches are mixed only where these agree."
        for name in names
        if (mine := getattr(cache.spec, name)) != (theirs := getattr(other.spec, name))
    ]
