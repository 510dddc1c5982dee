"""Figures of caches and their domains, as sums over shards. Cost: reading the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kdcache.cache.cache import Cache
from kdcache.cache.manifest import COUNTS, ShardEntry, filtered_records, label_sums
from kdcache.cache.shard import ShardData
from kdcache.cache.spec import CacheSpec
from kdcache.domains import Weights
from kdcache.humanize import number, percent, size
from kdcache.targets import DenseTargets
from kdcache.targets.label_logprob import decode_entropies
from kdcache.tasks import TASKS

_ONCE = Weights()


def teacher_entropy(data: ShardData, some: np.ndarray | None = None) -> np.ndarray | None:
    """The teacher's entropy at positions of rows at T = 1, in nats: float32 [n].

    Args:
        data: the rows; where they keep no entropies, those of classes follow from the targets.
        some: int64 [n], which positions; None for all.

    Returns:
        None where it is not known, or answers are not a distribution.
    """
    if data.entropy is not None:
        return decode_entropies(data.entropy if some is None else data.entropy[some])
    targets, kind = data.targets, TASKS[data.task]
    known = kind.distribution and not kind.over_ids and targets.codec.any_temperature
    if not known or len(targets) == 0:
        return None
    found = (targets if some is None else targets.take(some)).at(1.0)
    assert isinstance(found, DenseTargets), "right at any temperature"
    p = found.logits.double().softmax(-1)
    return np.asarray(torch.special.entr(p).sum(-1).float().numpy())


def teacher_cross_entropy(caches: Sequence[Cache], weights: Weights = _ONCE) -> float | None:
    """The teacher's cross-entropy with the hard labels of sealed caches at T = 1, in nats.

    A mean over the labels that the teacher can predict. Cost: none, the manifests hold it.

    Returns:
        None where a cache does not keep it, or there is no such label.
    """
    nats = counted = 0.0
    for index, cache in enumerate(caches):
        domains: dict[str | None, list[ShardEntry]] = {}
        for shard in cache.manifest.shards:
            domains.setdefault(shard.domain, []).append(shard)
        for name, mine in domains.items():
            sums, weight = label_sums(mine), weights.of(index, name)
            if sums is None:
                return None
            nats += weight * sums[0]
            counted += weight * sums[1]
    return nats / counted if counted else None


@dataclass(frozen=True)
class DomainFigures:
    """The figures of a domain.

    Attributes:
        done: shards that are there.
        filtered: records that filters left out; None where there are no filters.
        teacher_cross_entropy: of the teacher with the hard labels at T = 1, in nats a position,
            over the labels that it can predict; None where the cache does not keep it.
    """

    name: str
    spans: int
    done: int
    rows: int
    tokens: int
    positions: int
    skipped: int
    filtered: int | None
    bytes: int
    teacher_cross_entropy: float | None


def domain_figures(spec: CacheSpec, shards: Iterable[ShardEntry]) -> tuple[DomainFigures, ...]:
    """The figures of each domain, in the order of their first spans."""
    members: dict[str, list[ShardEntry]] = {name: [] for name in spec.domain_names}
    spans = dict.fromkeys(members, 0)
    for stretch in spec.domains:
        spans[stretch["name"]] += stretch["spans"]
    for shard in shards:
        if shard.domain is not None:
            members[shard.domain].append(shard)
    found = []
    for name, mine in members.items():
        sums = label_sums(mine) if spec.label_logprob else None
        found.append(
            DomainFigures(
                name=name,
                spans=spans[name],
                done=len(mine),
                filtered=filtered_records(mine),
                teacher_cross_entropy=sums[0] / sums[1] if sums and sums[1] else None,
                **{field: sum(getattr(s, field) for s in mine) for field in COUNTS},
            )
        )
    return tuple(found)


def domain_table(domains: Sequence[DomainFigures]) -> tuple[list[str], list[tuple[str, ...]]]:
    """The header and a line for each domain, for people."""
    positions = sum(domain.positions for domain in domains)
    filtered = any(domain.filtered is not None for domain in domains)
    labelled = any(domain.teacher_cross_entropy is not None for domain in domains)
    rows = [
        (
            domain.name,
            f"{domain.rows:,}",
            f"{domain.positions:,}",
            percent(domain.positions / max(1, positions)),
            size(domain.bytes),
            f"{domain.skipped:,}",
            *([f"{domain.filtered or 0:,}"] if filtered else []),
            *([number(domain.teacher_cross_entropy)] if labelled else []),
        )
        for domain in domains
    ]
    header = ["domain", "rows", "positions", "share", "size", "skipped"]
    header += ["filtered"] if filtered else []
    return header + (["teacher's cross-entropy"] if labelled else []), rows
