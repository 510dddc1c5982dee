"""The spec of a cache: a frozen, JSON-able statement of which bytes the cache should hold.

`spec.json` and `manifest.json` are JSON objects. Their last field, on a line of its own, is
`sha256`: the hash of all bytes before this line. So a flipped bit anywhere in the file is detected
before a value is used.

Cost: a hash and a parse; one line an item, so that 100,000 shards take well under a second.
Guarantee: what `from_text` returns was written whole by `to_text`, or forged on purpose. JSON with
repeated names, NaN or unbounded numbers is refused; the caller checks types.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NoReturn

from kdcache.domains import is_name
from kdcache.errors import CorruptCacheError, UsageError
from kdcache.humanize import redacted
from kdcache.storage import LocalStorage, Storage, redact
from kdcache.targets import Codec, Dense
from kdcache.tasks import CAUSAL_LM, TASKS

FORMAT = 1
GENERATED = "generated"
"""The `kind` in the `spec.json` of a corpus that `generate` wrote; caches have none."""


def is_generated(spec: Any) -> bool:
    """Whether the values of a `spec.json` are of a generated corpus."""
    return isinstance(spec, dict) and spec.get("kind") == GENERATED


def is_generated_at(storage: Storage) -> bool:
    """Whether a folder has the `spec.json` of a generated corpus; damaged ones are caches."""
    try:
        return is_generated(json.loads(storage.read("spec.json"))["spec"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, CorruptCacheError):
        return False


class Spec(ABC):
    """What the shards of a folder should hold: equal specs make the same bytes."""

    spans: int
    label_logprob: bool

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""

    @abstractmethod
    def without_secrets(self) -> Spec:
        """As it is written: with none of the secrets that an engine may have been given."""

    def in_form_of(self, begun: Any) -> Spec:
        """What continues a folder of this spec that an earlier version has begun."""
        return self

    @property
    def domain_names(self) -> tuple[str, ...]:
        """The domains in the order of their first spans; none where corpora have no names."""
        return ()

    def domain_of(self, span: int) -> str | None:
        """The domain of a span and its shard; None where corpora have no names."""
        return None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the spec in canonical JSON."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def differences(self, other: Spec) -> list[str]:
        """One line a field in which `other` differs: `name: this -> other`."""
        mine, theirs = (_flat(one.without_secrets().to_dict()) for one in (self, other))
        keys = [*mine, *(k for k in theirs if k not in mine)]
        return [
            f"{k}: {_short(mine.get(k))} -> {_short(theirs.get(k))}"
            for k in keys
            if mine.get(k) != theirs.get(k)
        ]


@dataclass(frozen=True)
class CacheSpec(Spec):
    """What bytes a cache should hold; two builds with equal specs make the same cache.

    Attributes:
        teachers: one entry a teacher: `sha256` of its configuration and weights, its `weight`, and
            `engine` if that is not transformers: `name`, `version`, `quantization` and `args`.
        ensemble: how several teachers become one: `mean-probs` or `mean-logits`.
        tokenizer: SHA-256 of the tokenizer's files.
        vocab_size: ids the teacher can predict (classes for classification).
        pad_id: id that fills rows up in a batch.
        label_names: the classes in the teacher's order, or None where answers have no names.
        corpus: one entry a file: name, size, content tag.
        rows: how records become rows (`RowSpec` as a dictionary).
        reading: how the files are read and cut into spans (`Corpus.settings`).
        codec: canonical codec text, such as `topk:64`.
        ranks: SHA-256 of `ranks.u32`, by which ids are stored as frequency ranks; None where they
            are stored as they are.
        levels: whether a `topk` codec stores levels of one byte; imports and earlier versions store
            floats.
        label_logprob: whether shards keep the teacher's log-probability of each label.
        answer_logprob: whether they keep the sum of its log-probabilities of each row's answer.
        source: `codec` and `digest` of the cache whose targets were encoded anew; None of a build.
        output_layer: SHA-256 of the file of the teacher's output layer, where targets are hidden
            states; else None.
        domains: where corpora have names: `name` and number of `spans` of each stretch of spans.
        positions: where soft targets are kept of some positions alone, `entropy_code`, the least
            code of their teacher's entropy, and the `share` that was asked for; else None.
    """

    task: str
    teachers: tuple[Mapping[str, Any], ...]
    ensemble: str
    dtype: str
    tokenizer: str
    vocab_size: int
    pad_id: int
    eos_id: int | None
    label_names: tuple[str, ...] | None
    corpus: tuple[Mapping[str, Any], ...]
    rows: Mapping[str, Any]
    reading: Mapping[str, Any]
    spans: int
    codec: str
    temperatures: tuple[float, ...]
    seed: int
    format: int = FORMAT
    ranks: str | None = None
    levels: bool = False
    label_logprob: bool = False
    entropy: bool = False
    answer_logprob: bool = False
    source: Mapping[str, Any] | None = None
    output_layer: str | None = None
    domains: tuple[Mapping[str, Any], ...] = ()
    positions: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values; fields that not every cache has only where they say something."""
        values = dict(json.loads(json.dumps(dataclasses.asdict(self))))
        return {k: v for k, v in values.items() if k not in _OPTIONAL or v}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CacheSpec:
        """From `to_dict`'s values.

        Raises:
            CorruptCacheError: a field is missing, unknown or of another kind than it must be, or
            another format version.
        """
        if not isinstance(values, dict):
            raise CorruptCacheError("spec.json cannot be read: its spec is not a JSON object.")
        if values.get("format") != FORMAT:
            raise CorruptCacheError(
                f"the cache has format version {values.get('format')}; this kdcache reads {FORMAT}."
            )
        names = {f.name for f in dataclasses.fields(cls)} - _OPTIONAL | values.keys() & _OPTIONAL
        if names != set(values):
            odd = ", ".join(sorted(names ^ set(values)))
            raise CorruptCacheError(f"spec.json has missing or unknown fields: {odd}.")
        wrong = [name for name, kind in _KINDS.items() if not kind(values.get(name))]
        if not wrong and not _independent(values):
            wrong = ["vocab_size", "label_names", "codec", "temperatures"]
        if not wrong and values.get("positions"):
            whole = values.get("entropy") and values.get("label_logprob")
            wrong = [] if whole and TASKS[values["task"]].causal else ["positions"]
        if not wrong and values.get("answer_logprob"):
            summed = values.get("label_logprob") and values["task"] == CAUSAL_LM
            wrong = [] if summed else ["answer_logprob"]
        if wrong:
            odd = ", ".join(f"{name} is {_short(values.get(name))}" for name in wrong)
            raise CorruptCacheError(f"invalid values in spec.json: {odd}.")
        listed = ("teachers", "label_names", "corpus", "temperatures", "domains")
        fields: dict[str, Any] = dict(values)
        for name in listed:
            if fields.get(name) is not None:
                fields[name] = tuple(fields[name])
        spec = cls(**fields)
        if spec.domains and spec._ends[-1] != spec.spans:
            raise CorruptCacheError(
                f"spec.json names the domains of {spec._ends[-1]} spans, and has {spec.spans}."
            )
        return spec

    @cached_property
    def _ends(self) -> list[int]:
        """The span after the last of each stretch of `domains`."""
        return list(accumulate(stretch["spans"] for stretch in self.domains))

    def domain_of(self, span: int) -> str | None:
        """The domain of a span and its shard; None where corpora have no names."""
        if not self.domains:
            return None
        return str(self.domains[bisect_right(self._ends, span)]["name"])

    @property
    def domain_names(self) -> tuple[str, ...]:
        """The domains in the order of their first spans; none where corpora have no names."""
        return tuple(dict.fromkeys(str(stretch["name"]) for stretch in self.domains))

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return int(self.rows["max_length"])

    @property
    def packing(self) -> str:
        """How documents become rows: `concat`, `none` or `split`."""
        return str(self.rows["packing"])

    @property
    def apart(self) -> bool:
        """Whether the documents of a row do not attend to each other."""
        return self.rows.get("attend") == "document"

    @property
    def kept(self) -> set[str]:
        """The columns of rows that its shards have besides those of their task."""
        chosen = {
            "label_logprob": self.label_logprob,
            "entropy": self.entropy,
            "answer_logprob": self.answer_logprob,
            "starts": self.apart,
            "hard_labels": self.positions is not None,
        }
        return {name for name, is_kept in chosen.items() if is_kept}

    @property
    def num_labels(self) -> int | None:
        """Outputs of a classifier: its classes, 1 of a score; None where answers are over ids."""
        return None if TASKS[self.task].over_ids else self.vocab_size

    @property
    def engine(self) -> Mapping[str, Any] | None:
        """What ran the one teacher, if not transformers: its name, version and settings."""
        found = self.teachers[0].get("engine") if self.teachers else None
        return found if isinstance(found, Mapping) else None

    def make_codec(self) -> Codec:
        """The codec that reads and writes this cache's targets."""
        codec = Codec.parse(self.codec, self.temperatures, self.vocab_size)
        codec = codec if self.levels else codec.in_floats()
        means = len(self.teachers) > 1 and self.ensemble == "mean-probs"
        means = means or not TASKS[self.task].has_temperature
        return replace(codec, declared_only=True) if means and isinstance(codec, Dense) else codec

    def without_secrets(self) -> CacheSpec:
        """As it is written: with none of the secrets that an engine may have been given."""
        return replace(self, teachers=tuple(redacted(self.teachers)))

    def in_form_of(self, begun: CacheSpec) -> CacheSpec:
        """See `Spec.in_form_of`."""
        later = ("levels", "entropy", "answer_logprob")
        return replace(self, **{n: getattr(self, n) and getattr(begun, n) for n in later})


_FLAGS = ("levels", "label_logprob", "entropy", "answer_logprob")
_OPTIONAL = {*_FLAGS, "ranks", "source", "output_layer", "domains", "positions"}


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _list(item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(item, value))


def _object(**kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and all(kind(value.get(name)) for name, kind in kinds.items())
    )


def _none_or(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or kind(value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "task": lambda value: value in TASKS,
    "teachers": _list(_object(sha256=_text, weight=_number)),
    "ensemble": _text,
    "dtype": _text,
    "tokenizer": _text,
    "vocab_size": _count,
    "pad_id": _count,
    "eos_id": _none_or(_count),
    "label_names": _none_or(_list(_text)),
    "corpus": _list(_object(name=_text)),
    "rows": _object(
        max_length=_count, packing=_text, attend=lambda value: value in (None, "row", "document")
    ),
    "reading": _object(),
    "spans": _count,
    "codec": _text,
    "temperatures": _list(_number),
    "seed": lambda value: type(value) is int and abs(value) < 1 << 63,
    "ranks": _none_or(_text),
    **dict.fromkeys(_FLAGS, lambda value: value is None or value is True),
    "source": _none_or(_object(codec=_text, digest=_text)),
    "output_layer": _none_or(_text),
    "positions": _none_or(_object(share=_number, entropy_code=_count)),
    "domains": _none_or(
        _list(_object(name=is_name, spans=lambda value: _count(value) and value > 0))
    ),
}


def _independent(values: Mapping[str, Any]) -> bool:
    """Whether a spec is one of its task, where answers are not a distribution."""
    kind, width = TASKS[values["task"]], values["vocab_size"]
    if kind.distribution:
        return True
    dense = values["codec"].partition(":")[0] == "dense"
    if not kind.named:
        said = (width, values["label_names"], values["temperatures"])
        return bool(dense and said == (1, None, [1.0]))
    return bool(dense and len(values["label_names"] or ()) == width)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items: Iterable[tuple[str, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        items = ((str(i), v) for i, v in enumerate(value))
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def to_text(values: Mapping[str, Any]) -> bytes:
    """The text of an object of JSON-able values; one line a field, and one an inner item."""
    lines = (f" {json.dumps(name)}: {_value(value)},\n" for name, value in values.items())
    body = ("{\n" + "".join(lines)).encode()
    return body + _seal(body)


def from_text(data: bytes, name: str) -> dict[str, Any]:
    """The object of a text, without its hash.

    Raises:
        CorruptCacheError: the hash is not that of the text, or the text is not plain JSON.
    """
    body = data[: len(data) - len(_seal(b""))]
    if body + _seal(body) != data:
        raise CorruptCacheError(
            f"{name} has a wrong checksum: the file was changed or cut off. Restore it from a "
            "copy, or try `kdcache repair`."
        )
    try:
        values = json.loads(data, object_pairs_hook=_unique_keys, parse_constant=_refuse)
    except ValueError as error:
        raise CorruptCacheError(f"{name} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise CorruptCacheError(f"{name} cannot be read: it is not a JSON object.")
    del values["sha256"]
    return values


def _seal(body: bytes) -> bytes:
    return f' "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _value(value: Any) -> str:
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(name)}: {json.dumps(inner)}" for name, inner in value.items()]
        return "{\n  " + ",\n  ".join(items) + "\n }"
    if isinstance(value, list) and value:
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
    return json.dumps(value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name is repeated")
    return values


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not allowed")


# Files by which the other folders that kdcache makes are known, the surest first.
_KNOWN = {
    "sweep.json": "sweep",
    "train.json": "run",
    "finetune.json": "model",
    "_kdcache.json": "export",
    "config.json": "model",
    "adapter_config.json": "model",
    "metrics.jsonl": "run",
}
_CURE = {"sweep": " `kdcache report` shows it.", "run": " `kdcache report` shows it."}


def is_missing(storage: Storage) -> bool:
    """Whether there is not even a folder; object stores have no empty ones."""
    if isinstance(storage, LocalStorage):
        return not storage.root.is_dir()
    return storage.empty()


def no_cache(storage: Storage) -> UsageError:
    """The error of a place without a `spec.json`: states what is there instead."""
    url = redact(storage.url)
    if is_missing(storage):
        return UsageError(f"there is no folder {url}: expected a cache. Check the path.")
    entries = storage.entries()
    kind = next((kind for name, kind in _KNOWN.items() if name in entries), None)
    if kind is None and any(name.startswith("checkpoint-") for name in entries):
        kind = "run"
    if kind is not None:
        article = "an" if kind == "export" else "a"
        return UsageError(
            f"{url} is the folder of {article} {kind}, not of a cache.{_CURE.get(kind, '')}"
        )
    lacks = "it has no spec.json" if entries else "it is empty"
    return UsageError(f"{url} is not a kdcache cache: {lacks}.")
