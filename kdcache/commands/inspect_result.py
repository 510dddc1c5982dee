"""What `inspect` finds: of a cache or a generated corpus, and of one of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdcache.cache.figures import DomainFigures
from kdcache.humanize import counted, number, percent, size
from kdcache.targets.label_logprob import ENTROPY_SCALE
from kdcache.tasks import OUTPUTS, TASKS


@dataclass(frozen=True)
class Guess:
    """One id and the probability that the teacher gives it."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class PositionView:
    """The teacher's predictions at one position.

    Attributes:
        place: index of the token in its row (0 for classification).
        token: the token that a label belongs to: of a causal LM the last one that the teacher had
            read; None where labels belong to rows.
        label: id of the hard label (optional).
        label_text: the token or the class of that id; of several labels a row their classes, of
            a score its value.
        label_logprob: the teacher's log-probability of the label at T = 1, where the cache keeps
            it; None also for a label that the teacher gives no probability.
        guesses: the most probable ids, falling; none of a score.
        entropy: of the teacher at T = 1, in nats, where it is known.
        rest: the mass of all ids that are not shown; of several labels a row, whose probabilities
            do not sum to 1, 0.
        score: the teacher's, where its answers are scores.
    """

    place: int
    token: str | None
    label: int | None
    label_text: str | None
    label_logprob: float | None
    guesses: tuple[Guess, ...]
    rest: float
    score: float | None = None
    entropy: float | None = None


@dataclass(frozen=True)
class RowView:
    """One row as text, with the teacher's predictions.

    Attributes:
        shard: the shard (span) that holds it.
        text: the text; decoded from the ids where the cache keeps none; words with blanks between
            them.
        text_pair: the second text, if there is one; of a source, which is then `text`, the target.
        exact: False where the weights are an unbiased sample: right on average, not one by one.
        heads: what stands over `token` and `label`.
        read: all its tokens, where the teacher read them all before each answer.
        between: what its tokenizer puts between two tokens that are not parts of a word: a blank,
            or nothing where tokens have their own.
    """

    row: int
    shard: int
    tokens: int
    text: str
    text_pair: str | None
    temperature: float
    exact: bool
    positions: tuple[PositionView, ...]
    domain: str | None = None
    heads: tuple[str, str] = ("after", "next")
    read: tuple[str, ...] = ()
    between: str = ""


@dataclass(frozen=True)
class ColumnSize:
    """Stored bytes per position of one dataset of the shards, such as `targets/ids`."""

    name: str
    bytes_per_position: float


@dataclass(frozen=True)
class InspectResult:
    """What a cache is.

    Attributes:
        finished: whether it is sealed.
        fingerprint: SHA-256 of its spec.
        digest: SHA-256 of its manifest: names the exact bytes. None where it is not finished.
        teachers: their names when the cache was built.
        temperatures: the declared temperatures; `dense` allows others too.
        any_temperature: whether temperatures that are not declared are allowed.
        vocab_size: ids or classes of a distribution.
        spans: shards of the whole cache.
        done: shards that are there; the sums from `rows` to `bytes` are over these.
        clipped_mass: mean probability a position that fell on ids outside the vocabulary.
        teacher_cross_entropy: of the teacher with the hard labels at T = 1, in nats a position,
            over the labels that it can predict; None where the cache does not keep it.
        teacher_entropy: its mean entropy at T = 1, in nats a position with a soft target, over
            `sampled_shards`; None where it is not known.
        impossible_labels: labels that the teacher gives no probability, left out of both.
        bytes_per_position: of the whole file; None if there is no position yet.
        target_bytes_per_position: of the soft targets alone.
        columns: bytes per position of each dataset.
        sampled_shards: how many shards the last two come from.
        filtered: records that filters left out; None where there are none, or it is not known.
        hard_labels: labels without a soft target, since the teacher was sure; None where each has
            one.
    """

    cache: str
    finished: bool
    fingerprint: str
    digest: str | None
    teachers: tuple[str, ...]
    task: str
    codec: str
    temperatures: tuple[float, ...]
    any_temperature: bool
    vocab_size: int
    spans: int
    done: int
    rows: int
    tokens: int
    positions: int
    skipped: int
    bytes: int
    clipped_mass: float | None
    teacher_cross_entropy: float | None
    teacher_perplexity: float | None
    teacher_entropy: float | None
    impossible_labels: int | None
    bytes_per_position: float | None
    target_bytes_per_position: float | None
    columns: tuple[ColumnSize, ...]
    sampled_shards: int
    spec: dict[str, Any]
    domains: tuple[DomainFigures, ...] = ()
    filtered: int | None = None
    hard_labels: int | None = None
    row: RowView | None = None

    @property
    def _sure(self) -> str | None:
        """Labels without a soft target, where the targets are of some positions alone."""
        if self.hard_labels is None:
            return None
        least = self.spec["positions"]["entropy_code"] ** 2 / ENTROPY_SCALE
        share = percent(self.hard_labels / max(1, self.hard_labels + self.positions))
        return f"{self.hard_labels:,} ({share}): entropy below {least:.3g} nats, no soft target"

    def facts(self) -> list[tuple[str, str]]:
        """Names and values of what a cache is, for people."""
        kind, perplexity = OUTPUTS[TASKS[self.task].answers], TASKS[self.task].perplexity
        temperatures = ", ".join(f"{t:g}" for t in self.temperatures)
        unfinished = f"unfinished: {self.done} of {counted(self.spans, 'shard')}"
        source = self.spec.get("source")
        facts: dict[str, str | None] = {
            "task": self.task,
            "teachers": ", ".join(self.teachers) or "-",
            "transcoded from": f"{source['codec']} ({source['digest']})" if source else None,
            "codec": f"{self.codec} over {self.vocab_size:,} {kind}",
            "temperatures": temperatures + (" (and any other)" if self.any_temperature else ""),
            "state": "finished" if self.finished else unfinished,
            "shards": f"{self.done:,}",
            "rows": f"{self.rows:,}",
            "tokens": f"{self.tokens:,}",
            "positions": f"{self.positions:,}",
            "labels of a sure teacher": self._sure,
            "skipped records": f"{self.skipped:,}",
            "filtered records": None if self.filtered is None else f"{self.filtered:,}",
            "clipped mass": f"{percent(self.clipped_mass, 4)} a position",
        }
        if self.teacher_cross_entropy is not None:
            shown = f"{perplexity} {number(self.teacher_perplexity, 2)}"
            nats = number(self.teacher_cross_entropy)
            facts["teacher's cross-entropy"] = f"{nats} nats a position ({shown})"
            if self.impossible_labels:
                left_out = f"{self.impossible_labels:,}, which are left out of it"
                facts["labels of no probability"] = left_out
        if self.teacher_entropy is not None:
            of_some = "" if self.hard_labels is None else " with a soft target"
            facts["teacher's entropy"] = f"{number(self.teacher_entropy)} nats a position{of_some}"
        facts |= {
            "size": size(self.bytes),
            "bytes per position": f"{number(self.bytes_per_position, 2)} of the whole files",
            "": f"{number(self.target_bytes_per_position, 2)} of the soft targets alone",
            "fingerprint": self.fingerprint,
            "digest": self.digest,
        }
        return [(name, value) for name, value in facts.items() if value is not None]
