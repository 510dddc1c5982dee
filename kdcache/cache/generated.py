"""A generated corpus: shards of prompts and what a model wrote, with its log-probabilities.

The folder is that of a cache but for its shards, which are Parquet: any tool reads them, and
`kdcache build` does with no further option (`as_written` in `kdcache.commands.row_options`).

Cost: opening reads two JSON files. Guarantee: the bytes of a shard follow from the spec, the
answers and the version of pyarrow.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.cache.cache import Cache
from kdcache.cache.manifest import ShardEntry
from kdcache.cache.shard import ShardCounts
from kdcache.cache.spec import FORMAT, GENERATED, Spec, is_generated, is_generated_at
from kdcache.cache.store import ShardStore
from kdcache.errors import CorruptCacheError, UsageError, doing
from kdcache.humanize import redacted
from kdcache.rows.spec import Answer, Sampling, text_of
from kdcache.storage import Storage

_FACTS = b"kdcache"
_SCHEMA = pa.schema(
    [
        ("record", pa.int32()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("completion_mask", pa.list_(pa.uint8())),
        ("logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
    ]
)


@dataclass(frozen=True)
class GeneratedSpec(Spec):
    """What a generated corpus should hold.

    Attributes:
        model: `sha256` of its configuration and weights, and `engine` if that is not transformers.
        ends: ids that end an answer.
        corpus: of the prompts, one entry a file: name, size, content tag.
        max_length: tokens of a prompt and its answer.
        prompt_tokens: tokens of a record that are its prompt; None for all.
    """

    model: Mapping[str, Any]
    dtype: str
    tokenizer: str
    vocab_size: int
    ends: tuple[int, ...]
    corpus: tuple[Mapping[str, Any], ...]
    rows: Mapping[str, Any]
    reading: Mapping[str, Any]
    spans: int
    max_length: int
    prompt_tokens: int | None
    sampling: Mapping[str, Any]
    kind: str = GENERATED
    format: int = FORMAT

    label_logprob = True
    domains = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return dict(json.loads(json.dumps(dataclasses.asdict(self))))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GeneratedSpec:
        """From `to_dict`'s values.

        Raises:
            CorruptCacheError: they cannot be, or are of another version.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if values.get("format") != FORMAT or set(values) != names:
            odd = ", ".join(sorted(names ^ set(values))) or f"format {values.get('format')}"
            raise CorruptCacheError(f"spec.json has missing or unknown fields: {odd}.")
        kinds: dict[str, tuple[type, ...]] = {
            **dict.fromkeys(("model", "rows", "reading", "sampling"), (dict,)),
            **dict.fromkeys(("ends", "corpus"), (list,)),
            **dict.fromkeys(("vocab_size", "spans", "max_length"), (int,)),
            **dict.fromkeys(("dtype", "tokenizer"), (str,)),
        }
        wrong = [name for name, kind in kinds.items() if not isinstance(values[name], kind)]
        known = {field.name for field in dataclasses.fields(Sampling)}
        if wrong or set(values["sampling"]) != known or not 0 <= values["spans"] < 1 << 31:
            raise CorruptCacheError(f"invalid values in spec.json: {', '.join(wrong) or 'spans'}.")
        listed = {name: tuple(values[name]) for name in ("ends", "corpus")}
        return cls(**{**values, **listed})

    def without_secrets(self) -> GeneratedSpec:
        """See `Spec.without_secrets`."""
        return dataclasses.replace(self, model=cast("dict[str, Any]", redacted(self.model)))

    @property
    def drawn(self) -> Sampling:
        """How its answers are drawn."""
        values = dict(self.sampling)
        return Sampling(**{**values, "stop": tuple(values["stop"])})


@dataclass
class GeneratedCorpus(ShardStore[GeneratedSpec]):
    """A generated corpus that is being made (`create_or_resume`) or read (`open`)."""

    kind = "generated corpus"
    command = "generate"
    suffix = "parquet"

    @classmethod
    def parse_spec(cls, values: Any, url: str) -> GeneratedSpec:
        """See `ShardStore.parse_spec`."""
        if not is_generated(values):
            raise UsageError(f"{url} is a cache, not a corpus that kdcache generate wrote.")
        return GeneratedSpec.from_dict(values)

    def read_facts(self, path: Path) -> tuple[ShardCounts, dict[str, Any]]:
        """See `ShardStore.read_facts`."""
        try:
            facts = json.loads(pq.read_schema(path).metadata[_FACTS])
            counts = facts.pop("counts")
            return ShardCounts(*(int(number) for number in counts)), facts
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise CorruptCacheError(f"{path.name} is not a shard of a generated corpus.") from error

    def commit(
        self,
        span: int,
        prompts: Sequence[npt.NDArray[np.int32]],
        answers: Sequence[Answer],
        tokenizer: Any,
        *,
        skipped: int = 0,
        filtered: int | None = None,
    ) -> ShardEntry:
        """Write a span's shard and make it appear; safe to call again for the same span.

        Args:
            answers: `samples` of each prompt, prompt by prompt.
            skipped: records that were left out, empty or broken.
            filtered: records that filters left out; None where there are no filters.
        """
        samples = self.spec.drawn.samples
        asked = [prompt for prompt in prompts for _ in range(samples)]
        stop = self.spec.drawn.stop
        columns = [
            [i for i in range(len(prompts)) for _ in range(samples)],
            [k for _ in prompts for k in range(samples)],
            [text for text in tokenizer.batch_decode(prompts) for _ in range(samples)],
            [text_of(tokenizer, answer.ids, stop) for answer in answers],
            [np.concatenate(pair) for pair in zip(asked, (a.ids for a in answers), strict=True)],
            [
                np.repeat(np.array([0, 1], np.uint8), [len(prompt), len(answer.ids)])
                for prompt, answer in zip(asked, answers, strict=True)
            ],
            [answer.logprobs for answer in answers],
            [answer.reason for answer in answers],
        ]
        written = sum(len(answer.ids) for answer in answers)
        counts = (len(answers), sum(map(len, asked)) + written, written)
        facts: dict[str, Any] = {
            "skipped": skipped,
            "clipped_mass": 0.0,
            "label_nats": max(0.0, -sum(float(a.logprobs.sum(dtype=np.float64)) for a in answers)),
            "impossible_labels": 0,
            "stopped": sum(answer.reason == "stop" for answer in answers),
        }
        if filtered is not None:
            facts["filtered"] = filtered
        said = {"fingerprint": self.spec.fingerprint, "index": span, "counts": counts}
        said |= {**facts, "sampling": dict(self.spec.sampling)}
        schema = _SCHEMA.with_metadata({_FACTS: json.dumps(said)})
        arrays = [pa.array(c, kind) for c, kind in zip(columns, _SCHEMA.types, strict=True)]
        content = io.BytesIO()
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), content, compression="zstd")
        return self.put(span, content.getvalue(), counts, facts)

    def answers(self, name: str, prompts: Sequence[npt.NDArray[np.int32]]) -> bool:
        """Whether a committed shard has answers to these prompts."""
        with self.storage.hold(f"shards/{name}") as path:
            rows = pq.read_table(path, columns=["input_ids", "completion_mask"]).to_pylist()
        samples = self.spec.drawn.samples
        asked = [row["input_ids"][: row["completion_mask"].index(1)] for row in rows[::samples]]
        return len(rows) == samples * len(prompts) and all(
            prompt.tolist() == own for prompt, own in zip(prompts, asked, strict=True)
        )

    def read(self, span: int) -> list[dict[str, Any]]:
        """The rows of one shard.

        Raises:
            CorruptCacheError: the file is missing, damaged, or not the one of the manifest.
        """
        entry = self.manifest.shards[span]
        with doing(f"reading {entry.name} of {self.url}"), self.hold(entry) as path:
            return self.parse(path, entry)

    def check_shard(self, entry: ShardEntry) -> None:
        """Check the bytes of a shard, then what it holds.

        Raises:
            CorruptCacheError: it is not the one of the manifest, or not what a shard must be.
        """
        with self.hold(entry, fresh=True) as path:
            rows = self.parse(path, entry)
            _, facts = self.read_facts(path)
        nats = -sum(sum(row["logprobs"]) for row in rows)
        stopped = sum(row["finish_reason"] == "stop" for row in rows)
        if {**facts, "sampling": None} != self.stated(
            entry.span, {**entry.facts, "sampling": None}
        ):
            raise CorruptCacheError(f"it belongs to another corpus ({facts}).")
        if stopped != entry.stopped or abs(nats - (entry.label_nats or 0.0)) > 1e-3 * (1 + nats):
            raise CorruptCacheError("its answers are not those that the manifest counts.")
        known = self.spec.vocab_size
        if any(not 0 <= i < known for row in rows for i in row["input_ids"]):
            raise CorruptCacheError("it holds ids that the tokenizer does not have.")

    def parse(self, path: Path, entry: ShardEntry) -> list[dict[str, Any]]:
        """The rows of a shard's file.

        Raises:
            CorruptCacheError: it is not such a shard, or has other counts than its entry.
        """
        counts, facts = self.read_facts(path)
        try:
            rows: list[dict[str, Any]] = pq.read_table(path, schema=_SCHEMA).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise CorruptCacheError(f"{entry.name} cannot be read: {error}.") from error
        written = sum(len(row["logprobs"]) for row in rows)
        found = ShardCounts(len(rows), sum(len(row["input_ids"]) for row in rows), written)
        whole = all(
            len(row["input_ids"]) == len(row["completion_mask"])
            and sum(row["completion_mask"]) == len(row["logprobs"])
            for row in rows
        )
        if not whole or not found == counts == entry.counts or facts.get("index") != entry.span:
            raise CorruptCacheError(f"{entry.name} has other rows than its counts say.")
        return rows


def store_at(storage: Storage) -> type[Cache] | type[GeneratedCorpus]:
    """What a folder with a `spec.json` is."""
    return GeneratedCorpus if is_generated_at(storage) else Cache
