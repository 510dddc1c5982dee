"""What `inspect`, `report` and `verify` find in a corpus that `generate` wrote.

Cost: the two JSON files of a finished corpus, and two shards for its repeated answers and its table
of samples; a row's shard. With a model, one forward over some of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kdcache.cache.generated import GeneratedCorpus
from kdcache.cache.manifest import ShardEntry, filtered_records
from kdcache.cache.sealing import shard_entry
from kdcache.commands.inspect_result import InspectResult, PositionView, RowView
from kdcache.commands.options import InspectOptions, VerifyOptions
from kdcache.errors import UsageError
from kdcache.humanize import counted, number, percent, size
from kdcache.loss.metrics import perplexity
from kdcache.rows import Row
from kdcache.student.saved import pick_device
from kdcache.tasks import CAUSAL_LM, IGNORE
from kdcache.teacher import Teacher, TeacherFiles, TeacherOptions
from kdcache.teacher.probe import TOLERANCES

_SHARDS = 2  # that are read for repeated answers and samples
_SAMPLES = 5
_LOOPS = 4  # times that a stretch comes at the end of an answer that repeats itself
_STRETCH = 16  # tokens of it, at most
_SHOWN = 160  # characters of a text


@dataclass(frozen=True)
class Sample:
    """One answer: its row, prompt, text, tokens, mean surprise in nats, and why it ended."""

    row: int
    prompt: str
    completion: str
    tokens: int
    nats: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class GeneratedView(InspectResult):
    """What a generated corpus is: `positions` are drawn tokens, `teachers` the model that wrote.

    Attributes:
        stopped: answers that ended by themselves; the others had no room left.
        seen: answers of which the next two are shares.
        repeated: share of answers that another prompt or sample got, too.
        looping: share of answers that end in one stretch four times.
    """

    stopped: int
    seen: int
    repeated: float
    looping: float
    samples: tuple[Sample, ...]

    def facts(self) -> list[tuple[str, str]]:
        """See `InspectResult.facts`."""
        how = self.spec["sampling"]
        sampling = ", ".join(f"{name} {value}" for name, value in how.items() if value != [])
        unfinished = f"unfinished: {self.done} of {counted(self.spans, 'shard')}"
        facts: dict[str, str | None] = {
            "written by": ", ".join(self.teachers) or "-",
            "sampling": sampling,
            "state": "finished" if self.finished else unfinished,
            "shards": f"{self.done:,}",
            "prompts": f"{self.rows // how['samples']:,}",
            "answers": f"{self.rows:,}",
            "tokens": f"{self.tokens:,}, of which {self.positions:,} were drawn",
            "ended by themselves": f"{self.stopped:,}",
            "ended by length": f"{self.rows - self.stopped:,}",
            "repeated answers": f"{percent(self.repeated)} of {self.seen:,}",
            "answers that loop": f"{percent(self.looping)} of {self.seen:,}",
            "skipped records": f"{self.skipped:,}",
            "filtered records": None if self.filtered is None else f"{self.filtered:,}",
            "surprise": f"{number(self.teacher_cross_entropy)} nats a token that was drawn",
            "size": size(self.bytes),
            "fingerprint": self.fingerprint,
            "digest": self.digest,
        }
        return [(name, value) for name, value in facts.items() if value is not None]


def look(options: InspectOptions) -> GeneratedView:
    """Describe a generated corpus, finished or not.

    Raises:
        UsageError: no such row.
        CorruptCacheError: its files contradict each other.
    """
    corpus = GeneratedCorpus.resume(options.cache)
    shards = corpus.manifest.shards if corpus.sealed else _committed(corpus)
    spec, drawn = corpus.spec, sum(s.positions for s in shards)
    full = [i for i, entry in enumerate(shards) if entry.rows]
    chosen = np.unique(np.linspace(0, len(full) - 1, min(len(full), _SHARDS)).astype(int))
    firsts = np.cumsum([0, *(entry.rows for entry in shards)])
    rows = [
        (int(firsts[full[i]]) + k, row)
        for i in chosen
        for k, row in enumerate(_rows(corpus, shards[full[i]]))
    ]
    ids = [row["input_ids"][row["completion_mask"].index(1) :] for _, row in rows]
    distinct = len({tuple(answer) for answer in ids})
    picked = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLES)).astype(int))
    nats = sum(s.label_nats or 0.0 for s in shards) / drawn if drawn else None
    total = sum(s.bytes for s in shards)
    return GeneratedView(
        cache=corpus.url,
        finished=corpus.sealed,
        fingerprint=spec.fingerprint,
        digest=corpus.digest if corpus.sealed else None,
        teachers=(str(corpus.notes.get("model", "")),),
        task=CAUSAL_LM,
        codec="text",
        temperatures=(spec.drawn.temperature,),
        any_temperature=False,
        vocab_size=spec.vocab_size,
        spans=spec.spans,
        done=len(shards),
        rows=sum(s.rows for s in shards),
        tokens=sum(s.tokens for s in shards),
        positions=drawn,
        skipped=sum(s.skipped for s in shards),
        bytes=total,
        clipped_mass=None,
        teacher_cross_entropy=nats,
        teacher_perplexity=perplexity(nats),
        teacher_entropy=None,
        impossible_labels=0,
        bytes_per_position=total / drawn if drawn else None,
        target_bytes_per_position=None,
        columns=(),
        sampled_shards=len(chosen),
        spec={**spec.without_secrets().to_dict(), "teachers": [dict(spec.model)]},
        filtered=filtered_records(shards),
        row=None if options.row is None else _view(corpus, shards, options.row),
        stopped=sum(s.stopped or 0 for s in shards),
        seen=len(rows),
        repeated=1 - distinct / max(1, len(rows)),
        looping=sum(map(_loops, ids)) / max(1, len(rows)),
        samples=tuple(_sample(*rows[i]) for i in picked),
    )


def surprises(corpus: GeneratedCorpus) -> tuple[float, ...]:
    """Minus the log-probability of each drawn token of the first shard that has some."""
    first = next((entry for entry in corpus.manifest.shards if entry.rows), None)
    rows = [] if first is None else _rows(corpus, first)
    return tuple(-logprob for row in rows for logprob in row["logprobs"])


def recheck_text(corpus: GeneratedCorpus, options: VerifyOptions) -> tuple[int, float, float]:
    """Log-probabilities of some answers, by the model's forward over each text.

    Returns:
        Rows that were compared, the largest difference as a share of the logits' spread, and what
        rounding explains of it.

    Raises:
        UsageError: the model is not the one that wrote.
    """
    (name,) = options.teacher
    files = TeacherFiles.find(
        name, trust_remote_code=options.trust_remote_code, weights=False, role="model"
    )
    if files.sha256 != corpus.spec.model["sha256"]:
        raise UsageError(
            f"{name} is not the model that wrote {corpus.url}: its configuration or weights have "
            "another SHA-256. Name the one that did."
        )
    found = [row for entry in corpus.manifest.shards if entry.rows for row in _rows(corpus, entry)]
    rng = np.random.default_rng(options.seed)
    some = rng.choice(len(found), min(options.sample, len(found)), replace=False)
    teacher = Teacher(
        TeacherOptions(
            (name,),
            CAUSAL_LM,
            dtype=corpus.spec.dtype,
            device=str(pick_device("auto")),
            trust_remote_code=options.trust_remote_code,
        ),
        corpus.spec.vocab_size,
    )
    worst = 0.0
    for i in some:
        ids, mask = (np.array(found[i][key]) for key in ("input_ids", "completion_mask"))
        labels = np.where(mask[1:] == 1, ids[1:], IGNORE).astype(np.int32)
        row = Row(ids[:-1].astype(np.int32), labels)
        logits = torch.cat([z.float().cpu() for z in teacher.logits([row])])
        drawn = torch.from_numpy(ids[mask == 1].astype(np.int64))[:, None]
        live = logits.log_softmax(-1).gather(-1, drawn)[:, 0]
        gap = (live - torch.tensor(found[i]["logprobs"])).abs().max() / logits.std(-1).max()
        worst = max(worst, float(gap))
    engine = corpus.spec.model.get("engine")
    return len(some), worst, TOLERANCES["bfloat16" if engine else corpus.spec.dtype]


def _committed(corpus: GeneratedCorpus) -> tuple[ShardEntry, ...]:
    there = sorted(corpus.committed().items())
    return tuple(shard_entry(corpus, span, name) for span, name in there)


def _rows(corpus: GeneratedCorpus, entry: ShardEntry) -> list[dict]:  # type: ignore[type-arg]
    with corpus.hold(entry) as path:
        return corpus.parse(path, entry)


def _sample(number_of_row: int, row: dict) -> Sample:  # type: ignore[type-arg]
    n = len(row["logprobs"])
    nats = -sum(row["logprobs"]) / n
    prompt, text = row["prompt"][-_SHOWN:], row["completion"][:_SHOWN]
    return Sample(number_of_row, prompt, text, n, nats, row["finish_reason"])


def _loops(ids: Sequence[int]) -> bool:
    """Whether an answer ends in one stretch several times."""
    return any(
        list(ids[-size * _LOOPS :]) == list(ids[-size:]) * _LOOPS
        for size in range(1, min(_STRETCH, len(ids) // _LOOPS) + 1)
    )


def _view(corpus: GeneratedCorpus, shards: Sequence[ShardEntry], wanted: int) -> RowView:
    """One answer, with the log-probability of each token."""
    firsts = np.cumsum([0, *(entry.rows for entry in shards)])
    if wanted >= firsts[-1]:
        raise UsageError(f"--row is {wanted}, and {corpus.url} has {firsts[-1]:,} answers.")
    at = int(np.searchsorted(firsts, wanted, side="right")) - 1
    row = _rows(corpus, shards[at])[wanted - int(firsts[at])]
    tokenizer, ids = corpus.tokenizer(), row["input_ids"]
    first_drawn = row["completion_mask"].index(1)
    return RowView(
        row=wanted,
        shard=shards[at].span,
        tokens=len(ids),
        text=row["prompt"],
        text_pair=row["completion"],
        temperature=corpus.spec.drawn.temperature,
        exact=True,
        positions=tuple(
            PositionView(
                place=place,
                token=str(tokenizer.decode(ids[place : place + 1])),
                label=ids[place + 1],
                label_text=str(tokenizer.decode(ids[place + 1 : place + 2])),
                label_logprob=row["logprobs"][place + 1 - first_drawn],
                guesses=(),
                rest=1.0,
            )
            for place in range(first_drawn - 1, len(ids) - 1)
        ),
        heads=("after", "drawn"),
    )
