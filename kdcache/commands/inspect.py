"""`kdcache inspect`: what a cache is, how large its parts are, the teacher's predictions for a row.

Cost: the two JSON files of a sealed cache and the headers of a few shards, from which bytes a
column are scaled up; with a row, that row's shard. An unfinished cache has no manifest: each
committed shard is opened (and downloaded first, if the cache is remote) to count it.
Guarantee: nothing is written; figures that are estimated from a few shards are marked so. Each
shard is hashed, then opened in a sandboxed subprocess (`kdcache.cache.sandbox`), then here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.cache import Cache, CacheSpec, ShardEntry
from kdcache.cache.figures import domain_figures, teacher_entropy
from kdcache.cache.manifest import filtered_records, label_sums
from kdcache.cache.sandbox import Sandbox
from kdcache.cache.sealing import shard_entry
from kdcache.cache.shard import column_bytes
from kdcache.cache.spec import is_generated_at, no_cache
from kdcache.commands.inspect_result import (
    ColumnSize,
    Guess,
    InspectResult,
    PositionView,
    RowView,
)
from kdcache.commands.options import InspectOptions
from kdcache.errors import UsageError
from kdcache.humanize import score
from kdcache.loss import INDEPENDENT
from kdcache.loss.metrics import perplexity
from kdcache.rows import Row
from kdcache.storage import open_storage
from kdcache.targets import DenseTargets, SoftTargets, with_logits
from kdcache.targets.label_logprob import decode_logprobs
from kdcache.tasks import TASKS, labelled

_SAMPLED_SHARDS = 8


def inspect(options: InspectOptions) -> InspectResult:
    """Describe a cache, or a generated corpus (`GeneratedView`), finished or not.

    Raises:
        UsageError: no cache there, no such row, or a temperature that the cache does not declare.
        CorruptCacheError: its files contradict each other.
    """
    storage = open_storage(options.cache)
    if not storage.exists("spec.json"):
        raise no_cache(storage)
    if is_generated_at(storage):
        from kdcache.commands.generate.look import look

        return look(options)
    cache = Cache.resume(options.cache)
    with Sandbox() as sandbox:
        shards = cache.manifest.shards if cache.sealed else _committed(cache, sandbox)
        row = None if options.row is None else _row(cache, shards, options, sandbox)
        columns, sampled, entropy = _columns(cache, shards, sandbox)
    spec = cache.spec
    positions, answered = (sum(s.positions for s in shards), sum(s.answered for s in shards))
    total = sum(s.bytes for s in shards)
    targets = [c.bytes_per_position for c in columns if c.name.startswith("targets/")]
    sums = label_sums(shards) if spec.label_logprob else None
    nats = sums[0] / sums[1] if sums and sums[1] else None
    return InspectResult(
        cache=cache.url,
        finished=cache.sealed,
        fingerprint=spec.fingerprint,
        digest=cache.digest if cache.sealed else None,
        teachers=tuple(str(name) for name in cache.notes.get("teachers", ())),
        task=spec.task,
        codec=spec.codec,
        temperatures=tuple(spec.temperatures),
        any_temperature=cache.codec().any_temperature,
        vocab_size=spec.vocab_size,
        spans=spec.spans,
        done=len(shards),
        rows=sum(s.rows for s in shards),
        tokens=sum(s.tokens for s in shards),
        positions=positions,
        skipped=sum(s.skipped for s in shards),
        bytes=total,
        clipped_mass=sum(s.clipped_mass for s in shards) / answered if answered else None,
        teacher_cross_entropy=nats,
        teacher_perplexity=perplexity(nats),
        impossible_labels=sums[2] if sums else None,
        teacher_entropy=entropy,
        bytes_per_position=total / positions if positions else None,
        target_bytes_per_position=sum(targets) if targets else None,
        columns=columns,
        sampled_shards=sampled,
        spec=spec.without_secrets().to_dict(),
        domains=domain_figures(spec, shards),
        filtered=filtered_records(shards),
        hard_labels=sum(s.hard_labels or 0 for s in shards) if spec.positions else None,
        row=row,
    )


def _committed(cache: Cache, sandbox: Sandbox) -> tuple[ShardEntry, ...]:
    """Entries of the shards of an unfinished build."""
    entries = []
    for span, name in sorted(cache.committed().items()):
        with cache.storage.hold(f"shards/{name}") as path:
            sandbox.open(path)
            entries.append(shard_entry(cache, span, name))
    return tuple(entries)


@contextlib.contextmanager
def _tried(cache: Cache, entry: ShardEntry, sandbox: Sandbox) -> Iterator[Path]:
    """A shard that another process could open, held until it is read."""
    with cache.hold(entry) as path:
        sandbox.open(path)
        yield path


def _columns(
    cache: Cache, shards: Sequence[ShardEntry], sandbox: Sandbox
) -> tuple[tuple[ColumnSize, ...], int, float | None]:
    """Bytes per position of each dataset, from a few shards spread over the cache; how many, and
    the teacher's mean entropy in them.
    """
    full = [s for s in shards if s.positions]
    chosen = np.unique(np.linspace(0, len(full) - 1, min(len(full), _SAMPLED_SHARDS)).astype(int))
    sums: dict[str, int] = {}
    entropies: list[np.ndarray] = []
    for i in chosen:
        with _tried(cache, full[i], sandbox) as path:
            for name, stored in column_bytes(path).items():
                sums[name] = sums.get(name, 0) + stored
            by_class = TASKS[cache.spec.task].distribution and not TASKS[cache.spec.task].over_ids
            if cache.spec.entropy or by_class:
                found = teacher_entropy(cache.parse(path, full[i], targets=by_class))
                entropies += [] if found is None else [found]
    positions = sum(full[i].positions for i in chosen)
    ordered = sorted(sums.items(), key=lambda item: -item[1])
    sizes = tuple(ColumnSize(name, stored / positions) for name, stored in ordered)
    mean = float(np.concatenate(entropies).mean(dtype=np.float64)) if entropies else None
    return sizes, len(chosen), mean


# One row


def _row(
    cache: Cache, shards: Sequence[ShardEntry], options: InspectOptions, sandbox: Sandbox
) -> RowView:
    temperature = options.temperature or default_temperature(cache)
    cache.codec().check_temperature(temperature)
    number = options.row
    assert number is not None
    entry, index = _find(shards, number, cache.sealed)
    with _tried(cache, entry, sandbox) as path:
        data = cache.parse(path, entry)
    row = data.row(index)
    first, last = (int(p) for p in data.position_offsets[index : index + 2])
    labels = data.every_label[slice(*data.ends("label")[index : index + 2])]
    targets = data.targets.take(np.arange(first, last))
    task = TASKS[cache.spec.task]
    tokenizer = cache.tokenizer() if task.per_token else None
    token = _token_text(tokenizer)
    about: dict[str, Any] = {
        "row": number,
        "shard": entry.span,
        "domain": entry.domain,
        "tokens": len(row.input_ids),
        "text": _text(row, tokenizer),
        "text_pair": row.text_pair if row.source is None else _decoded(labels, tokenizer),
        "temperature": temperature,
    }
    if task.answers in INDEPENDENT:
        one = _independent(cache.spec, row, targets, temperature, options.top)
        return RowView(**about, exact=True, positions=(one,))
    name = token if task.over_ids else (cache.spec.label_names or ()).__getitem__
    guesses, rests, exact = _guesses(targets, temperature, options.top)
    logprobs = np.full(last - first, np.nan)
    if data.label_logprob is not None:
        logprobs = decode_logprobs(data.label_logprob[first:last])
    known = teacher_entropy(data, np.arange(first, last))
    entropies = [None] * (last - first) if known is None else known.tolist()
    positions = []
    for place, found, rest, logprob, entropy in zip(
        row.positions(cache.spec.task), guesses, rests, logprobs.tolist(), entropies, strict=True
    ):
        label = int(row.labels[place])
        positions.append(
            PositionView(
                place=int(place),
                token=token(int(row.input_ids[place])) if task.per_token else None,
                label=label if label >= 0 else None,
                label_text=name(label) if label >= 0 else None,
                label_logprob=logprob if math.isfinite(logprob) else None,
                guesses=tuple(Guess(i, name(i), p) for i, p in found),
                rest=rest,
                entropy=entropy,
            )
        )
    return RowView(
        **about,
        exact=exact,
        positions=tuple(positions),
        heads=task.heads,
        **(_read(row, tokenizer) if task.per_token and not task.causal else {}),
    )


def _independent(
    spec: CacheSpec, row: Row, targets: SoftTargets, temperature: float, top: int
) -> PositionView:
    """The one position of a row where answers are not a distribution."""
    found = targets.at(temperature)
    assert isinstance(found, DenseTargets), "their targets are dense"
    there = bool(labelled(row.labels, spec.task).item())
    if spec.label_names is None:
        text = score(float(row.labels[0])) if there else None
        return PositionView(0, None, None, text, None, (), 0.0, float(found.logits[0, 0]))
    names = spec.label_names
    chosen = [names[i] for i in np.flatnonzero(row.labels[0] == 1)]
    p = torch.sigmoid(found.logits[0].double() / temperature)
    best, ids = p.topk(min(top, len(p)))
    guesses = tuple(
        Guess(i, names[i], value) for i, value in zip(ids.tolist(), best.tolist(), strict=True)
    )
    text = (", ".join(chosen) or "none") if there else None
    return PositionView(0, None, None, text, None, guesses, 0.0)


def default_temperature(cache: Cache) -> float:
    """The temperature to show by default: 1 if declared, else the first declared."""
    declared = tuple(cache.spec.temperatures)
    plain = cache.codec().any_temperature or any(math.isclose(t, 1.0) for t in declared)
    return 1.0 if plain or not declared else declared[0]


def _find(shards: Sequence[ShardEntry], row: int, sealed: bool) -> tuple[ShardEntry, int]:
    """The shard of a row, and the row's index in it."""
    left = row
    for entry in shards:
        if left < entry.rows:
            return entry, left
        left -= entry.rows
    total = sum(s.rows for s in shards)
    there = "the cache has" if sealed else "the unfinished cache has so far"
    which = f"{there} {total} rows, numbered from 0" if total else f"{there} no rows"
    raise UsageError(f"--row is {row}, but {which}. Choose an existing row.")


def _guesses(
    soft: SoftTargets, temperature: float, top: int
) -> tuple[list[list[tuple[int, float]]], list[float], bool]:
    """At each position the best (id, probability) pairs and the rest of the mass; whether exact."""
    targets = with_logits(soft.at(temperature))
    pairs: list[list[tuple[int, float]]] = []
    if isinstance(targets, DenseTargets):
        p = torch.softmax(targets.logits.double() / temperature, -1)
        best, ids = p.topk(min(top, p.shape[-1]), -1)
        for chosen, values in zip(ids.tolist(), best.tolist(), strict=True):
            pairs.append(list(zip(chosen, values, strict=True)))
        return pairs, (1 - best.sum(-1)).clamp_min(0).tolist(), True
    rests = []
    mass = targets.weights.double().sum(-1) + targets.tail.double()
    columns = (targets.ids.numpy(), targets.weights.double().numpy(), mass.tolist())
    for ids_of, weights, total in zip(*columns, strict=True):
        # A sample may hold an id twice: its weights add up. Equal ones stay in order.
        found, first, where = np.unique(ids_of[weights > 0], return_index=True, return_inverse=True)
        sums = np.bincount(where, weights[weights > 0], len(found))
        order = np.lexsort((first, -sums))[:top]
        pairs.append([(int(found[i]), float(sums[i])) for i in order])
        rests.append(max(0.0, total - float(sums[order].sum())))
    return pairs, rests, targets.exact


def _text(row: Row, tokenizer: Any) -> str:
    if row.text is not None or tokenizer is None:
        return row.text or ""
    if row.words is not None:
        return " ".join(row.words)
    return _decoded(row.input_ids if row.source is None else row.source, tokenizer)


def _decoded(ids: np.ndarray, tokenizer: Any) -> str:
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def _read(row: Row, tokenizer: Any) -> dict[str, Any]:
    """Fields of a row that is read whole."""
    apart = " " in str(tokenizer.convert_tokens_to_string(["a", "b"])).strip()
    tokens = map(_token_text(tokenizer), row.input_ids.tolist())
    return {"read": tuple(tokens), "between": " " if apart else ""}


def _token_text(tokenizer: Any) -> Any:
    """A function from an id to its text inside a sentence, its leading space included."""

    def text(token: int) -> str:
        piece = tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return f"<{token}>"
        found = str(tokenizer.convert_tokens_to_string([piece]))
        # Decoders of SentencePiece vocabularies drop the space that begins a text.
        return f" {found}" if piece.startswith("\u2581") and not found.startswith(" ") else found

    return text
