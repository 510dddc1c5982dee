"""`kdcache evaluate`: the online teachers students, on the rows of a cache or of a corpus.

Every model runs over the same batches, a slice of positions at a time. The figures are sums
(`kdcache.loss.metrics`), so memory is that of one batch whatever the size of the set.

Cost: one forward of each student over all rows, and of the teacher only if it is to run live: its
answers in a cache are read.
Guarantee: cross-entropy and KL are the loss's own (`kdcache.loss`). KL is exact for a live teacher
and for `dense` caches, and that of the coarsened distribution (one bucket for the tail) for `topk`.
The teacher's own cross-entropy with the labels is exact for a live teacher and for `dense` caches;
of others it is what the cache keeps of each label, rounded without bias
(`kdcache.targets.label_logprob`). A `sample` cache does not determine the teacher's entropy: at one
temperature a tail id's own probability is not kept, at several only its rounded share. So the soft
cross-entropy, which exceeds KL by that entropy, is reported instead: it is unbiased, and its
differences between students are differences in KL.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.align import TokenBytes
from kdcache.cache import Cache
from kdcache.cache.shard import ShardData
from kdcache.commands.evaluate.counts import Counts
from kdcache.commands.evaluate.in_bytes import InBytes, Sums, label_logprobs
from kdcache.commands.evaluate.independent import IndependentTally
from kdcache.commands.evaluate.options import EvaluateOptions
from kdcache.commands.evaluate.own_tokens import (
    by_its_own_tokens,
    other_tokenizers,
    with_aligners,
)
from kdcache.commands.evaluate.scores import Bin, DomainScores, EvaluateResult, ModelScores
from kdcache.commands.inspect.inspect import default_temperature
from kdcache.corpus import Corpus, named
from kdcache.errors import UsageError
from kdcache.loss import distillation_loss
from kdcache.loss.entities import Entities, are_entities, ratio
from kdcache.loss.metrics import BINS, Tally, f1, known, perplexity
from kdcache.rows import Row, make_encoder
from kdcache.rows.batches import batches, documents_of
from kdcache.stream.cached_rows import OPEN_ROWS
from kdcache.student.saved import LoadedModel, SavedModel, pick_device, word_reader
from kdcache.targets import DenseTargets, Sample, SoftTargets, SparseTargets, with_logits
from kdcache.targets.label_logprob import decode_logprobs, sum_logprobs
from kdcache.tasks import CAUSAL_LM, TASKS, positions
from kdcache.teacher import aligned

_WINDOW = 1024  # rows of a corpus that are sorted by length at a time
_SLICE = 256  # positions, of cached targets that no model's logits go with
_SPAN_BYTES = 1 << 60  # a file is one span: each is read once, in order


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
        from kdcache.commands.evaluate.plot import plot_evaluation

        plot_evaluation(options.plot, result)
    return result


@dataclass
class _Batch:
    """Rows, where their positions are among all that were read at a time, and what is cached of
    these: soft targets, codes of `label_logprob`."""

    rows: list[Row]
    places: np.ndarray
    targets: SoftTargets | None = None
    label_logprob: np.ndarray | None = None


@dataclass
class _Window:
    """Rows of one domain that are read at a time, and the shard with their targets if that is."""

    rows: list[Row]
    domain: str | None
    data: ShardData | None = None


class _Evaluation:
    def __init__(self, options: EvaluateOptions) -> None:
        self.options = options
        self.device = pick_device(options.device)
        trust = options.trust_remote_code
        students = [SavedModel.find(name, trust_remote_code=trust) for name in options.student]
        teacher = None
        if options.teacher is not None:
            teacher = SavedModel.find(options.teacher, role="teacher", trust_remote_code=trust)
        saved = [*([teacher] if teacher else []), *students]
        self.cache = None if options.cache is None else Cache.open(options.cache)
        self.temperature = options.temperature or 1.0
        if self.cache is not None:
            self._set_cache(self.cache, saved)
        else:
            self._set_corpus(saved)
        other = other_tokenizers(saved, self.task, self.tokenizer_sha256, self._reader, self.source)
        loaded = [
            model.load(
                self.task,
                model.vocab_size(self.task) if alone else self.vocab_size,
                dtype=options.dtype,
                device=self.device,
            ).matching(self.label_names)
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
        self.cut = 0  # texts of the corpus
        self.exact = True

    def _zero(self) -> Counts:
        """Counts of no rows."""
        answers = TASKS[self.task].answers
        classes = self.vocab_size if answers == "classes" else None
        teacher, *students = (
            Tally(classes, entities=self._entities()) for _ in range(1 + len(self.students))
        )
        independent = [
            IndependentTally(self.task, self.options.threshold)
            for _ in (teacher, *students)
            if answers in ("labels", "score")
        ]
        return Counts(teacher, students, self.no_bytes and self.no_bytes.empty(), independent)

    @property
    def in_bytes(self) -> InBytes | None:
        """Counts over chunks of text."""
        return self.counts.in_bytes

    def _set_cache(self, cache: Cache, saved: Sequence[SavedModel]) -> None:
        spec = cache.spec
        if self.options.task not in (None, spec.task):
            raise UsageError(
                f"--task is {self.options.task}, but {cache.url} is a cache for {spec.task}. "
                "Leave --task out."
            )
        self.task, self.vocab_size, self.label_names = spec.task, spec.vocab_size, spec.label_names
        self.tokenizer_sha256: str | None = spec.tokenizer
        self.max_length = spec.max_length
        self.source = cache.url
        for model in saved:
            model.check_task(self.task)
        if self.options.temperature is None:
            self.temperature = default_temperature(cache)
        if self.options.teacher is None:
            cache.codec().check_temperature(self.temperature)

    def _set_corpus(self, saved: Sequence[SavedModel]) -> None:
        options, first = self.options, saved[0]
        task = options.task or first.task
        if task is None:
            raise UsageError(
                f"{first.role} {first.name} does not say which task it was saved for. Name it "
                "with --task."
            )
        self.task, self.label_names = task, None
        for model in saved:
            model.check_task(task)
        if TASKS[task].named:
            self.label_names = first.label_names
        self.vocab_size = first.vocab_size(task)
        self.max_length = options.row_length(
            (f"{model.role} {model.name}", model.reach) for model in saved
        )
        self.source = ", ".join(map(str, options.corpus))
        self.encoder_tokenizer = first.tokenizer
        if self.encoder_tokenizer is not None:
            options.set_chat_template(self.encoder_tokenizer)
        self.tokenizer_sha256 = first.tokenizer_sha256
        if first.tokenizer is None and TASKS[task].rereads and first.is_factory:
            self.encoder_tokenizer = word_reader()
        readers = [model for model in saved if model.role == "teacher"] or saved
        without = [m for m in readers if m.tokenizer is None and not m.is_factory]
        if without or self.encoder_tokenizer is None:
            lacking = (without or [first])[0]
            raise UsageError(
                f"{lacking.role} {lacking.name} has no tokenizer to read the corpus with. Copy its "
                "tokenizer's files into its folder, or evaluate on a --cache."
            )

    def _reader(self) -> Any:
        """The tokenizer of the rows."""
        return self.encoder_tokenizer if self.cache is None else self.cache.tokenizer()

    def _in_bytes(self, others: Sequence[LoadedModel]) -> InBytes | None:
        """Figures in bytes; None for other tasks, and where the rows' tokenizer loses bytes.

        Raises:
            UsageError: it does and there are `others`, or one of theirs does.
        """
        if self.task != CAUSAL_LM:
            return None
        try:
            reader = TokenBytes(self._reader(), f"the tokenizer of {self.source}")
        except UsageError as error:
            if others:
                raise
            self.why_no_bytes = str(error)
            return None
        if self.cache is None:
            spec = self.options.row_spec(self.task, self.label_names, max_length=self.max_length)
            opens = spec.packing in OPEN_ROWS
        else:
            opens = self.cache.spec.packing in OPEN_ROWS
        same = [Sums() for _ in self.students]
        return InBytes(reader, with_aligners(reader, others), opens, self._budget, same)

    # The set

    @property
    def _budget(self) -> int:
        """Tokens of a batch."""
        return self.options.batch_tokens or (4096 if self.device == "cpu" else 32768)

    def _windows(self) -> Iterator[_Window]:
        return self._corpus_rows() if self.cache is None else self._cached_rows(self.cache)

    def _batches(self, rows: list[Row], data: ShardData | None) -> Iterator[_Batch]:
        parts = documents_of(rows)
        counts = [len(part.places(self.task)) for part in parts]
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        # Log-probabilities of the labels: the teacher's, and of each student on these rows.
        self.logprobs = np.full((1 + len(self.students), offsets[-1]), np.nan)
        for chosen in batches([len(part.input_ids) for part in parts], self._budget):
            places = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in chosen])
            batch = _Batch([parts[i] for i in chosen], places)
            if data is not None:
                batch.targets = data.targets.take(places)
                if data.label_logprob is not None:
                    batch.label_logprob = data.label_logprob[places]
            yield batch
        if data is not None and data.label_logprob is not None:
            kept = decode_logprobs(data.label_logprob[: offsets[-1]])
            self.logprobs[0] = np.where(np.isnan(self.logprobs[0]), kept, self.logprobs[0])

    def _cached_rows(self, cache: Cache) -> Iterator[_Window]:
        most = self.options.limit or cache.manifest.rows
        left = dict.fromkeys(cache.spec.domain_names or (None,), most)
        self.domains = {domain: self._zero() for domain in left}
        live = self.teacher is not None
        for entry in cache.manifest.shards:
            domain = entry.domain
            if entry.rows and left[domain] > 0:
                data = cache.read(entry.span)
                rows = [data.row(i) for i in range(min(left[domain], len(data)))]
                left[domain] -= len(rows)
                yield _Window(rows, domain, None if live else data)

    def _corpus_rows(self) -> Iterator[_Window]:
        options = self.options
        spec = options.row_spec(self.task, self.label_names, max_length=self.max_length)
        options.check_tokenizer(self.encoder_tokenizer)
        corpus = options.open_corpus(named(options.corpus), span_bytes=_SPAN_BYTES)
        self.domains = {span.file.domain: self._zero() for span in corpus.spans}
        encoder = make_encoder(spec, self.encoder_tokenizer)
        for span in corpus.spans:
            records = Corpus.read(span, columns=spec.columns, on_error=spec.on_error)
            rows = encoder.encode(records, span=span.index)
            while window := list(islice(rows, _WINDOW)):
                yield _Window(window, span.file.domain)
        self.cut = encoder.truncated

    # The figures

    def run(self) -> EvaluateResult:
        if TASKS[self.task].answers == "score" and self.temperature != 1:
            raise UsageError("a score has no temperature. Leave --temperature out.")
        for window in self._windows():
            rows, data = window.rows, window.data
            self.counts = self.domains[window.domain]
            self.counts.rows += len(rows)
            for batch in self._batches(rows, data):
                self._add(batch)
            if self.in_bytes is not None:
                teacher = self.logprobs[0]
                unknown = bool(np.isnan(teacher).any())
                self.in_bytes.add(rows, None if unknown else teacher, list(self.logprobs[1:]))
        soft = self.teacher is not None or self.cache is not None
        self.counts = self._zero().merge(self.domains.values())
        if not self.counts.rows:
            raise UsageError(f"{self.source} has no rows to evaluate on.")
        if not soft and not self._tally.labelled:
            spec = self.options.row_spec(self.task, self.label_names, max_length=self.max_length)
            columns = " or ".join(map(repr, spec.label_columns))
            raise UsageError(
                f"{self.source} has no labels (column {columns}) and there is "
                "no teacher: there is nothing to compare with. Name the column with "
                "--label-column, or a --teacher."
            )
        tally, total = self._tally, self.counts
        domains = [self._domain_scores(name, soft) for name in self.domains if name is not None]
        self.counts = total
        return EvaluateResult(
            source=self.source,
            task=self.task,
            label_names=self.label_names,
            rows=self.counts.rows,
            positions=tally.positions,
            labelled=tally.labelled,
            temperature=self.temperature,
            agreement_positions=tally.known,
            calibration_bins=BINS,
            bytes=self.in_bytes.bytes if self.in_bytes else 0,
            chunks=self.in_bytes.chunks if self.in_bytes and self.in_bytes.others else 0,
            models=self._models(soft),
            notes=tuple(self._notes(soft)),
            domains=tuple(domains),
            threshold=self.options.threshold if TASKS[self.task].answers == "labels" else None,
        )

    def _domain_scores(self, name: str, soft: bool) -> DomainScores:
        """The figures of a domain, whose counts are then those that are told."""
        self.counts = self.domains[name]
        tally = self._tally
        models = self._models(soft)
        return DomainScores(name, self.counts.rows, tally.positions, tally.labelled, models)

    def _models(self, soft: bool) -> tuple[ModelScores, ...]:
        """Scores of the teacher, where there is one (`soft`), and of the students."""
        if self.counts.independent:
            return tuple(self._independent_scores(soft))
        return (*([self._teacher_scores()] if soft else []), *self._student_scores())

    def _independent_scores(self, soft: bool) -> Iterator[ModelScores]:
        """The figures where answers are no distribution."""
        teacher, *students = self.counts.independent
        live = None if self.teacher is None else self.teacher.saved
        if soft:
            own = teacher.figures(soft=False) if live is not None or self._logits_known else {}
            name = "teacher (cached)" if live is None else live.name
            yield ModelScores(name, "teacher", None if live is None else live.parameters, **own)
        for model, tally in zip(self.students, students, strict=True):
            saved = model.saved
            yield ModelScores(saved.name, "student", saved.parameters, **tally.figures(soft=soft))

    @torch.inference_mode()
    def _add(self, batch: _Batch) -> None:
        labels = np.concatenate(
            [row.labels[positions(row.labels, self.task)] for row in batch.rows]
        )
        models = [*([self.teacher] if self.teacher else []), *self.students]
        answers: list[list[np.ndarray]] = [[] for _ in range(1 + len(self.students))]
        streams = [m.logits(batch.rows, self.tokenizer_sha256, self.max_length) for m in models]
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
                    self.logprobs[i, batch.places[part]] = label_logprobs(piece, labels[part])
            targets: DenseTargets | SparseTargets | None = None
            top = None
            logits: Sequence[Tensor] = pieces
            if self.counts.independent:
                self._add_independent(batch, part, pieces, labels[part])
                continue
            if self.teacher is not None:
                targets, logits = DenseTargets(pieces[0].float(), self.temperature), pieces[1:]
                top = self._add_teacher(targets, labels[part], None)
            elif batch.targets is not None:
                cached = batch.targets.take(np.arange(part.start, part.stop))
                targets = with_logits(cached.at(self.temperature).to(self.device))
                if (
                    self.in_bytes is not None
                    and isinstance(targets, DenseTargets)
                    and (self._logits_known)
                ):
                    places = batch.places[part]
                    self.logprobs[0, places] = label_logprobs(targets.logits, labels[part])
                top = self._add_teacher(targets, labels[part], cached)
            if top is not None:
                answers[0].append(top)
            for tally, z, found in zip(self.counts.students, logits, answers[1:], strict=True):
                predictions = self._add_student(tally, z, labels[part], targets)
                found.append(predictions)
                if top is not None:
                    tally.add_agreement(predictions, top)
        assert done == len(labels), "the models answer every position"
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

    def _entities(self) -> Entities | None:
        """Fresh counts of entities, if the classes are their tags."""
        names = self.label_names if TASKS[self.task].words else None
        return Entities(names) if names is not None and are_entities(names) else None

    def _add_independent(
        self, batch: _Batch, part: slice, pieces: Sequence[Tensor], labels: np.ndarray
    ) -> None:
        """Count answers that are no distribution, the teacher's first if it runs."""
        teacher, *tallies = self.counts.independent
        targets: Any = None
        logits: Sequence[Tensor] = pieces
        if self.teacher is not None:
            targets, logits = DenseTargets(pieces[0].float(), self.temperature), pieces[1:]
        elif batch.targets is not None:
            cached = batch.targets.take(np.arange(part.start, part.stop))
            targets = cached.at(self.temperature).to(self.device)
        if targets is not None:
            teacher.add(targets.logits, labels, None)
        for tally, z in zip(tallies, logits, strict=True):
            tally.add(z, labels, targets)

    def _add_student(
        self,
        tally: Tally,
        logits: Tensor,
        labels: np.ndarray,
        targets: DenseTargets | SparseTargets | None,
    ) -> np.ndarray:
        # Double precision costs nothing for classes, and all of the memory for a large vocabulary.
        z = logits.double() if logits.shape[-1] <= 4096 else logits.float()
        hard_only = targets is None
        parts = distillation_loss(
            z,
            torch.from_numpy(labels).to(z.device),
            DenseTargets(z, self.temperature) if targets is None else targets,
            alpha=1.0 if hard_only else 0.5,
            vocab_size=self.vocab_size,
            count=1,
        )
        tally.hard += float(parts.hard)
        if not hard_only:
            tally.soft += float(parts.soft) / self.temperature**2
            tally.soft_positions += len(labels)
        confidence, predictions = z.softmax(-1).max(-1)
        found: np.ndarray = predictions.cpu().numpy()
        tally.add_predictions(labels, found, confidence.cpu().numpy())
        return found

    def _add_teacher(
        self,
        targets: DenseTargets | SparseTargets,
        labels: np.ndarray,
        cached: SoftTargets | None,
    ) -> np.ndarray:
        """Count the teacher's own figures.

        Returns:
            Its most probable id at each position, -1 where it is not known.
        """
        tally = self.counts.teacher
        at_one = math.isclose(self.temperature, 1.0)
        if isinstance(targets, DenseTargets):
            if cached is None or cached.codec.any_temperature or at_one:
                return self._add_student(tally, targets.logits, labels, None)
            # Of a mean of probabilities only the best is known at another temperature.
            top = targets.logits.argmax(-1).cpu().numpy()
            tally.add_predictions(labels, top, None)
            return np.asarray(top)
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

    @property
    def _tally(self) -> Tally | IndependentTally:
        """Positions, of any model that read them all."""
        if self.counts.independent:
            return self.counts.independent[1]
        if self.counts.students:
            return self.counts.students[0]
        return Tally(positions=self.counts.positions, labelled=self.counts.positions)

    def _student_scores(self) -> list[ModelScores]:
        """In the order in which the students were named."""
        found = {
            id(model): self._scores(model, tally)
            for model, tally in zip(self.students, self.counts.students, strict=True)
        }
        if self.in_bytes is not None:
            found |= {id(model): by_its_own_tokens(model) for model, _ in self.in_bytes.others}
            models = [*self.students, *(model for model, _ in self.in_bytes.others)]
            for model, sums in zip(models, [*self.in_bytes.same, *self.in_bytes.own], strict=True):
                found[id(model)] = self.in_bytes.with_figures(found[id(model)], sums)
        return [found[id(model)] for model in self.all_students]

    def _scores(self, model: LoadedModel, tally: Tally) -> ModelScores:
        soft = known(ratio(tally.soft, tally.soft_positions))
        return ModelScores(
            name=model.saved.name,
            role="student",
            parameters=model.saved.parameters,
            kl=soft if self.exact else None,
            soft_cross_entropy=None if self.exact else soft,
            agreement=known(ratio(tally.agreed, tally.known)),
            **self._label_scores(tally, known(ratio(tally.hard, tally.labelled))),
        )

    def _teacher_scores(self) -> ModelScores:
        model, tally = self.teacher, self.counts.teacher
        hard = None
        if model is not None or self._logits_known:
            hard = known(ratio(tally.hard, tally.labelled))
        elif self.counts.predicted:  # sparse targets lack the probability of some labels
            hard = self.counts.label_nats / self.counts.predicted
        return ModelScores(
            name="teacher (cached)" if model is None else model.saved.name,
            role="teacher",
            parameters=None if model is None else model.saved.parameters,
            kl=None,
            soft_cross_entropy=None,
            agreement=None,
            bits_per_byte=None if self.in_bytes is None else self.in_bytes.teacher_bits,
            **self._label_scores(tally, hard),
        )

    @property
    def _dense(self) -> bool:
        return self.cache is not None and self.cache.codec().keeps_logits

    @property
    def _logits_known(self) -> bool:
        """Whether the cache tells the teacher's probabilities at T = 1."""
        if self.cache is None or not self._dense:
            return False
        return self.cache.codec().any_temperature or math.isclose(self.temperature, 1.0)

    def _label_scores(self, tally: Tally, hard: float | None) -> dict[str, Any]:
        """Figures against the hard labels, with whose cross-entropy `hard`."""
        kind = TASKS[self.task]
        return {
            "accuracy": known(ratio(tally.correct, tally.labelled)),
            "f1": None if kind.over_ids else known(f1(tally.confusion)),
            "cross_entropy": hard,
            "perplexity": perplexity(hard) if kind.perplexity else None,
            "calibration_error": known(tally.calibration.error),
            "calibration": tuple(Bin(*values) for values in tally.calibration.filled()),
            **({} if tally.entities is None else _entity_scores(tally.entities)),
        }

    def _notes(self, soft: bool) -> Iterable[str]:
        tally = self._tally
        if not self.exact and self.students:
            yield (
                "The cache holds samples of the teacher, whose entropy is unknown: soft "
                "cross-entropy is KL plus that entropy, so differences in it are differences in "
                "KL. Use --teacher to measure KL itself."
            )
        elif soft and self.teacher is None and not self._dense and self.students:
            yield (
                "The cache holds the teacher's top ids: KL compares these and the sum of all "
                "others, and is at most the full KL. Use --teacher to measure the full KL."
            )
        compared = self.students and not self.counts.independent
        if soft and compared and tally.known < tally.positions:
            yield (
                f"Agreement is over the {tally.known:,} of {tally.positions:,} positions where "
                "the cached sample determines the teacher's most probable id."
            )
        if self.cut:
            what = "sentences" if TASKS[self.task].words else "texts"
            yield f"{self.cut:,} {what} were cut at {self.max_length:,} tokens (--max-length)."
        if self.counts.impossible and not self._logits_known:
            yield (
                f"The teacher gives {self.counts.impossible:,} labels no probability: its "
                "cross-entropy leaves them out."
            )
        if self.in_bytes is not None:
            yield from self.in_bytes.notes(soft)
        elif self.why_no_bytes:
            yield f"There are no bits per byte: {self.why_no_bytes}"
        if tally.labelled < tally.positions:
            yield (
                f"{tally.positions - tally.labelled:,} of {tally.positions:,} positions have no "
                "hard label and count only in the soft figures."
            )


def _entity_scores(entities: Entities) -> dict[str, float | None]:
    return {
        "entity_f1": known(entities.f1),
        "entity_precision": known(entities.precision),
        "entity_recall": known(entities.recall),
    }


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
