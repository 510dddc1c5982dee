"""`kdcache evaluate`: the online teachers students, on the rows of a cache or of a corpus.

Every model runs over the same batches, a slice of positions at a time. The figures are sums
(`kdcache.loss.metrics`), so memory is that of one batch whatever the size of the set.

Cost: one forward of each student over all rows, and of the teacher only if it is to run live: its
answers in a cache are read.
Guarantee: cross-entropy and KL are the loss's own (`kdcache.loss`). KL is exact for a live teacher
and for `dense` caches, and that of the coarsened distribution (one bucket for the tail) for `topk`.
The teacher's own cross-entropy with the labels is exact for a live teacher and for `dense` caches;
of others it is what the cache keeps of each label, rounded without bias
(`kdcache.targets.label_logprob`). Samples do not determine the teacher's entropy. At T = 1 the one
that the cache keeps is subtracted: KL is unbiased. At others, and of older caches, the soft
cross-entropy, which exceeds KL by that entropy, is reported instead: its differences between
students are differences in KL.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdcache.align import TokenBytes
from kdcache.cache.shard import ShardData
from kdcache.commands.evaluate.in_bytes import (
    InBytes,
    Sums,
    label_logprobs,
    other_tokenizers,
    with_aligners,
)
from kdcache.commands.evaluate.rows import EvaluationRows
from kdcache.commands.evaluate.scores import EvaluateResult
from kdcache.commands.evaluate.tally import Counts, Figures, make_tally, tally_of
from kdcache.commands.options import EvaluateOptions
from kdcache.errors import UsageError
from kdcache.loss.metrics import BINS
from kdcache.rows import Row
from kdcache.rows.batches import batches, documents_of
from kdcache.student.one_answer import OneAnswer
from kdcache.student.saved import LoadedModel, SavedModel, pick_device
from kdcache.targets import DenseTargets, Sample, SoftTargets, SparseTargets, with_logits
from kdcache.targets.label_logprob import decode_entropies, decode_logprobs, sum_logprobs
from kdcache.tasks import CAUSAL_LM, TASKS, positions
from kdcache.teacher import aligned

_SLICE = 256  # positions, of cached targets that no model's logits go with


def evaluate(options: EvaluateOptions) -> EvaluateResult:
    """Evaluate students, and their teacher where there is one.

    Raises:
        UsageError: a model that does not fit the set or the task, no labels and no teacher, a
            temperature that the cache does not declare, or unreadable input.
        IncompleteError: the cache is not finished.
    """
    options.check_plot()
    result = _Evaluation(options).run()
    if options.plot is not None:
        from kdcache.commands.evaluate.scores import plot_evaluation

        plot_evaluation(options.plot, result)
    return result


@dataclass
class _Batch:
    """Rows, where their positions are among all that were read at a time, and what is cached of
    these: soft targets, codes of `label_logprob` and of entropies."""

    rows: list[Row]
    numbers: np.ndarray
    targets: SoftTargets | None = None
    label_logprob: np.ndarray | None = None
    entropy: np.ndarray | None = None


class _Evaluation:
    def __init__(self, options: EvaluateOptions) -> None:
        self.options = options
        self.device = pick_device(options.device)
        self.budget = options.budget(self.device)  # tokens of a batch
        trust = options.trust_remote_code
        students = [SavedModel.find(name, trust_remote_code=trust) for name in options.student]
        teacher = None
        if options.teacher is not None:
            teacher = SavedModel.find(options.teacher, role="teacher", trust_remote_code=trust)
        saved = [*([teacher] if teacher else []), *students]
        self.rows = EvaluationRows(options, saved)
        self.task, self.temperature = self.rows.task, self.rows.temperature
        other = other_tokenizers(saved, self.rows)
        loaded = [
            model.load(
                self.task,
                model.vocab_size(self.task) if alone else self.rows.vocab_size,
                dtype=options.dtype,
                device=self.device,
            ).matching(self.rows.label_names)
            for model, alone in zip(saved, other, strict=True)
        ]
        self.teacher = loaded[0] if teacher else None
        self.all_students = loaded[1:] if teacher else loaded
        # Those that read the rows as they are.
        alone = other[1:] if teacher else other
        self.students = [m for m, own in zip(self.all_students, alone, strict=True) if not own]
        others = [m for m, own in zip(self.all_students, alone, strict=True) if own]
        self.why_no_bytes = ""
        self.no_bytes = self._in_bytes(others)
        self.counts = self._zero()  # of the rows that are read or told now
        self.domains: dict[str | None, Counts] = {}
        self.exact = True

    def _zero(self) -> Counts:
        """Counts of no rows."""
        make = functools.partial(
            make_tally,
            self.task,
            self.rows.vocab_size,
            self.rows.label_names,
            self.options.threshold,
        )
        in_bytes = self.no_bytes and self.no_bytes.empty()
        one = OneAnswer(self.task, self.rows.vocab_size, self.rows.label_names)
        return Counts(make(), [make() for _ in self.students], one, in_bytes)

    @property
    def in_bytes(self) -> InBytes | None:
        """Counts over chunks of text."""
        return self.counts.in_bytes

    def _in_bytes(self, others: Sequence[LoadedModel]) -> InBytes | None:
        """Figures in bytes; None for other tasks, and where the rows' tokenizer loses bytes.

        Raises:
            UsageError: it does and there are `others`, or one of theirs does.
        """
        if self.task != CAUSAL_LM:
            return None
        try:
            reader = TokenBytes(self.rows.tokenizer(), f"the tokenizer of {self.rows.reader}")
        except UsageError as error:
            if others:
                raise
            self.why_no_bytes = str(error)
            return None
        same = [Sums() for _ in self.students]
        return InBytes(reader, with_aligners(reader, others), self.rows.kind, self.budget, same)

    def _batches(self, rows: list[Row], data: ShardData | None) -> Iterator[_Batch]:
        parts = documents_of(rows)
        counts = [len(part.positions(self.task)) for part in parts]
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        # Log-probabilities of the labels: the teacher's, and of each student on these rows.
        self.logprobs = np.full((1 + len(self.students), offsets[-1]), np.nan)
        for chosen in batches([part.sizes for part in parts], self.budget):
            numbers = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in chosen])
            batch = _Batch([parts[i] for i in chosen], numbers)
            if data is not None:
                batch.targets = data.targets.take(numbers)
                if data.label_logprob is not None:
                    batch.label_logprob = data.label_logprob[numbers]
                if data.entropy is not None and self.rows.entropies_known:
                    batch.entropy = data.entropy[numbers]
            yield batch
        if data is not None and data.label_logprob is not None:
            kept = decode_logprobs(data.label_logprob[: offsets[-1]])
            self.logprobs[0] = np.where(np.isnan(self.logprobs[0]), kept, self.logprobs[0])

    def run(self) -> EvaluateResult:
        if not TASKS[self.task].has_temperature and self.temperature != 1:
            raise UsageError("a score has no temperature. Leave --temperature out.")
        self.domains = {name: self._zero() for name in self.rows.domains()}
        for window in self.rows.windows(targets=self.teacher is None):
            rows, data = window.rows, window.data
            self.counts = self.domains[window.domain]
            self.counts.rows += len(rows)
            for batch in self._batches(rows, data):
                self._add(batch)
            if self.in_bytes is not None:
                teacher = self.logprobs[0]
                unknown = bool(np.isnan(teacher).any())
                self.in_bytes.add(rows, None if unknown else teacher, list(self.logprobs[1:]))
        total = self._zero().merge(self.domains.values())
        models = self.teacher, self.students, self.all_students
        figures = Figures(self.rows, *models, self.exact)
        tally = tally_of(total)
        if not total.rows:
            raise UsageError(f"{self.rows.source} has no rows to evaluate on.")
        if not figures.soft and not tally.labelled:
            columns = " or ".join(map(repr, self.rows.spec.label_columns))
            raise UsageError(
                f"{self.rows.source} has no labels (column {columns}) and there is "
                "no teacher: there is nothing to compare with. Name the column with "
                "--label-column, or a --teacher."
            )
        named = {name: counts for name, counts in self.domains.items() if name is not None}
        in_bytes = total.in_bytes
        return EvaluateResult(
            source=self.rows.source,
            task=self.task,
            label_names=self.rows.label_names,
            rows=total.rows,
            positions=tally.positions,
            labelled=tally.labelled,
            temperature=self.temperature,
            agreement_positions=tally.known,
            calibration_bins=BINS,
            bytes=in_bytes.bytes if in_bytes else 0,
            chunks=in_bytes.chunks if in_bytes and in_bytes.others else 0,
            models=figures.of(total),
            one_answer=figures.one_answer(total),
            little_learnt=tuple(figures.little_learnt(total)),
            notes=tuple(figures.notes(total, self.why_no_bytes)),
            domains=tuple(figures.of_domain(name, counts) for name, counts in named.items()),
            threshold=self.options.threshold if TASKS[self.task].answers == "labels" else None,
        )

    @torch.inference_mode()
    def _add(self, batch: _Batch) -> None:
        labels = np.concatenate(
            [row.labels[positions(row.labels, self.task)] for row in batch.rows]
        )
        self.counts.one.add(labels)
        models = [*([self.teacher] if self.teacher else []), *self.students]
        answers: list[list[np.ndarray]] = [[] for _ in range(1 + len(self.students))]
        read_by = self.rows.tokenizer_sha256, self.rows.max_length
        streams = [m.logits(batch.rows, *read_by) for m in models]
        if batch.label_logprob is not None:
            nats, impossible = sum_logprobs(batch.label_logprob)
            self.counts.label_nats += nats
            self.counts.impossible += impossible
            self.counts.predicted += len(batch.label_logprob) - impossible
        done = 0
        for size, pieces in _slices(streams, len(labels)):
            part = slice(done, done + size)
            done = part.stop
            if self.in_bytes is not None:
                first = 0 if self.teacher is not None else 1
                for i, piece in enumerate(pieces, first):
                    self.logprobs[i, batch.numbers[part]] = label_logprobs(piece, labels[part])
            targets: DenseTargets | SparseTargets | None = None
            top = None
            logits: Sequence[Tensor] = pieces
            if self.teacher is not None:
                targets, logits = DenseTargets(pieces[0].float(), self.temperature), pieces[1:]
                top = self._add_teacher(targets, labels[part], None)
            elif batch.targets is not None:
                cached = batch.targets.take(np.arange(part.start, part.stop))
                targets = with_logits(cached.at(self.temperature).to(self.device))
                known = self.rows.logits_known and self.in_bytes is not None
                if known and isinstance(targets, DenseTargets):
                    numbers = batch.numbers[part]
                    self.logprobs[0, numbers] = label_logprobs(targets.logits, labels[part])
                top = self._add_teacher(targets, labels[part], cached)
            if top is not None:
                answers[0].append(top)
            for tally, z, found in zip(self.counts.students, logits, answers[1:], strict=True):
                predictions = tally.add(z, labels[part], targets)
                if predictions is not None:
                    found.append(predictions)
                    if top is not None:
                        tally.add_agreement(predictions, top)
        assert done == len(labels), "the models answer every position"
        if not self.exact and batch.entropy is not None:
            # Against samples, a cross-entropy was summed: it exceeds KL by the teacher's entropy.
            nats = float(decode_entropies(batch.entropy).sum(dtype=np.float64))
            for tally in self.counts.students:
                tally.soft -= nats
        self.counts.positions += len(labels)
        if TASKS[self.task].words:
            self._add_words(batch.rows, labels, answers)

    def _add_words(
        self, rows: Sequence[Row], labels: np.ndarray, answers: Sequence[Sequence[np.ndarray]]
    ) -> None:
        """Count the entities of a batch; the first tokens of words are their answers."""
        marked = [positions(row.labels, self.task) for row in rows]
        firsts = [row.first for row in rows if row.first is not None]
        words = np.concatenate([first[at] for first, at in zip(firsts, marked, strict=True)])
        counts = np.array([int(at.sum()) for at in marked])
        for tally, found in zip((self.counts.teacher, *self.counts.students), answers, strict=True):
            if found:
                tally.add_entities(labels, np.concatenate(found), counts, words)

    def _add_teacher(
        self,
        targets: DenseTargets | SparseTargets,
        labels: np.ndarray,
        cached: SoftTargets | None,
    ) -> np.ndarray | None:
        """Count the teacher's own figures.

        Returns:
            Its most probable id at each position, -1 where it is not known; None where answers
            have none.
        """
        tally = self.counts.teacher
        at_one = math.isclose(self.temperature, 1.0)
        if isinstance(targets, DenseTargets):
            if cached is None or cached.codec.any_temperature or at_one:
                return tally.add(targets.logits, labels, None)
            # Of a mean of probabilities only the best is known at another temperature.
            return tally.add_best(targets.logits, labels)
        self.exact = self.exact and targets.exact
        best, slot = targets.weights.max(-1)
        top = targets.ids.gather(-1, slot[:, None])[:, 0].cpu().numpy()
        assert cached is not None, "sparse targets come from a cache"
        if targets.exact:
            tally.add_predictions(labels, top, best.cpu().numpy() if at_one else None)
            return np.asarray(top)
        codec = cached.codec
        assert isinstance(codec, Sample), "the one codec whose targets are samples"
        return np.where(_leads(targets.weights, codec), top, -1)


def _slices(
    streams: Sequence[Iterable[Tensor]], positions: int
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Slices of logits and their lengths; of no model slices without logits."""
    if streams:
        yield from ((len(pieces[0]), pieces) for pieces in aligned(streams))
        return
    for start in range(0, positions, _SLICE):
        yield min(_SLICE, positions - start), ()


def _leads(weights: Tensor, codec: Sample) -> np.ndarray:
    """Where the largest weight of a sample is certain to be that of the most probable id.

    A mass that was kept is known to one unit; an id that was drawn, or was not, has at most 1/N.
    """
    best = torch.nn.functional.pad(weights, (0, 1)).topk(2, -1).values.double().cpu().numpy()
    unit = 1 / codec.rule.units
    clear = best[:, 0] - best[:, 1] >= 2 * unit - 1e-6
    return np.asarray(clear & (best[:, 0] >= 1 / codec.draws + unit - 1e-6))
