"""A prepared training run: options, opened and checked caches, and its folder.

Training a language model that has another tokenizer than its teacher.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.cache import Cache
from kdcache.commands.run_folder import TrainFolder, TrainProgress, TrainResult
from kdcache.commands.train.callbacks import wrong_trackers
from kdcache.commands.train.options import Schedule, TrainOptions
from kdcache.errors import UsageError
from kdcache.files import local_path
from kdcache.loss import check_loss
from kdcache.loss.metrics import are_entities
from kdcache.pretrained import UnreadableError, read_tokenizer, tokenizer_sha256
from kdcache.storage import is_remote
from kdcache.stream import TargetStream, check_caches, open_caches
from kdcache.stream.checks import check_every_position, unlike
from kdcache.student.checkpoints import check_identity, files_sha256, last_checkpoint, read_state
from kdcache.student.figures import FIGURES, figure_of
from kdcache.student.load import is_model
from kdcache.targets import SoftTargets
from kdcache.tasks import TASKS, labelled
from kdcache.teacher import TeacherFiles


def cross_problems(
    options: TrainOptions, caches: Sequence[Cache], eval_caches: Sequence[Cache]
) -> list[str]:
    """Why these caches are not for students of another tokenizer: a line each."""
    task = TASKS[caches[0].spec.task]
    if not task.causal or task.source:
        instead = (
            "A student of this cache writes with its teacher's tokens: name one that does."
            if task.source
            else "The masks of this cache are its teacher's tokens: name a student with these."
            if task.over_ids
            else "A classifier reads the texts of the cache by its own tokenizer without it."
        )
        return [f"--cross-tokenizer is for causal language models. {instead}"]
    if options.hard_only:
        return []
    wrong = [
        f"{cache.url} has no log-probabilities of its labels (label_logprob), which "
        "--cross-tokenizer compares. Build it again with this version of kdcache, or train with "
        "--alpha 1 on hard labels alone."
        for cache in (*caches, *eval_caches)
        if not cache.spec.label_logprob
    ]
    if options.cross_tokenizer == "hybrid":
        wrong += [
            f"--cross-tokenizer hybrid needs a few ids of each position, but {cache.url} is "
            f"{cache.spec.codec}. Make one with kdcache transcode --codec topk:64, or use "
            "--cross-tokenizer likelihood."
            for cache in (*caches, *eval_caches)
            if not cache.spec.codec.startswith(("topk", "sample", "anchored"))
        ]
    return wrong


def own_tokenizer(options: TrainOptions) -> Any:
    """The student's tokenizer.

    Raises:
        UsageError: there is none.
    """
    name = options.student_tokenizer
    if name is None:
        name = options.student
        if not is_model(name):
            raise UsageError(
                f"student {name} has no tokenizer of its own, and --cross-tokenizer needs one. "
                "Name the folder or hub id of a tokenizer with --student-tokenizer."
            )
    try:
        return read_tokenizer(name, trust_remote_code=options.trust_remote_code)
    except UnreadableError as error:
        whose = "" if options.student_tokenizer else " Name the student's with --student-tokenizer."
        raise UsageError(f"there is no usable tokenizer at {name} ({error}).{whose}") from error


_AUTO = "--resume auto"


@dataclass(frozen=True)
class RunPlan:
    """Options with their caches opened and checked."""

    options: TrainOptions
    caches: list[Cache]
    eval_caches: list[Cache]
    folder: TrainFolder
    on_progress: Callable[[TrainProgress], None] | None
    report: Callable[[str], None]

    @classmethod
    def make(
        cls,
        options: TrainOptions,
        on_progress: Callable[[TrainProgress], None] | None = None,
        report: Callable[[str], None] = lambda line: None,
        opened: Callable[[Sequence[str]], list[Cache]] = open_caches,
    ) -> RunPlan:
        """Open the caches and check all that needs no student.

        Args:
            options: of the run.
            on_progress: see `train`.
            report: takes what a user should know.
            opened: names to caches, for callers that make many plans of the same ones.

        Raises:
            UsageError: lists everything that is wrong.
            IncompleteError: a cache's build is unfinished.
        """
        folder = train_folder(options.out)
        caches = opened(options.cache)
        eval_caches = opened(options.eval_cache) if options.eval_cache else []
        first, problems = caches[0], wrong_trackers(options.report_to)
        task = TASKS[first.spec.task]
        # Of another task or vocabulary nothing else is worth a line: see `check_caches`.
        alike = [cache for cache in eval_caches if not unlike(cache, first)]
        if options.divergence is None:
            options = dataclasses.replace(options, divergence=task.divergences[0])
        temperatures: list[float] = []
        if options.cross_tokenizer is not None:
            problems += cross_problems(options, caches, alike)
            temperatures = [1.0] if options.cross_tokenizer == "hybrid" else []
            temperatures = [] if options.hard_only or problems else temperatures
        elif not options.hard_only:
            schedule = options.temperatures
            if not schedule.constant:
                problems += _wrong_schedule(options, caches)
            temperatures = list(dict.fromkeys((schedule.start, schedule.end)))
            for cache in (*caches, *alike):  # equal problems are reported once
                problems += _wrong_loss(options, cache, temperatures)
        elif task.answers == "score":  # its hard loss is that of the divergence, too
            problems += _wrong_loss(options, first, [1.0])
        if options.theta is not None and not first.spec.codec.startswith("anchored:"):
            problems.append(
                f"--anchor is {options.anchor}, but the cache is {first.spec.codec}. Leave it out, "
                "or build the cache with --codec anchored:N."
            )
        problems += _wrong_positions(options, caches)
        problems += check_every_position(eval_caches, "an evaluation")
        if options.cross_tokenizer is not None or options.divergence == "policy-gradient":
            given = f"--divergence {options.divergence}"
            given = given if options.cross_tokenizer is None else "--cross-tokenizer"
            problems += check_every_position(caches, given)
        figure = figure_of(first.spec.task)
        if options.best in FIGURES.values() and options.best != figure:
            problems.append(
                f"best is {options.best}, which is not a figure of {first.spec.task}. Use "
                f"{f'{figure} or ' if figure else ''}loss."
            )
        if options.best == "f1" and not (
            TASKS[first.spec.task].words and are_entities(first.spec.label_names or ())
        ):
            problems.append("best is f1, which is of entities and their tags. Use loss.")
        if options.best == "soft_loss" and options.hard_only:
            problems.append(
                "best is soft_loss, but alpha 1 trains and evaluates on hard labels alone."
            )
        problems += options.weights.problems([cache.spec.domain_names for cache in caches])
        problems += _missing_labels(options, caches, alike)
        if not task.has_temperature:
            temperatures = []  # as the loss has said
        check_caches(caches, temperatures, problems, beside=eval_caches)
        return cls(options, caches, eval_caches, folder, on_progress, report)

    @property
    def out(self) -> Path:
        """Folder of the run; of one in an object store, where this machine works on it."""
        return self.folder.path

    @property
    def shown(self) -> str:
        """The run's folder, for people."""
        return self.folder.shown

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        stream = TargetStream(
            self.caches,
            batch_size=self.options.batch_size,
            weights=self.options.weights,
            temperature=None,
        )
        return steps_of(self.options, stream)

    def mix(self, stream: TargetStream) -> dict[str, int] | None:
        """Rows of an epoch by domain, or by cache where it has no names; None without names."""
        if not any(cache.spec.domains for cache in self.caches):
            return None
        found: dict[str, int] = {}
        for (cache, domain), rows in stream.domain_rows.items():
            name = domain or self.caches[cache].url
            found[name] = found.get(name, 0) + rows
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must share; its checkpoints add its training caches."""
        digests = [cache.digest for cache in self.eval_caches]
        facts = {**self.options.decisive(), "streams": self.streams, "eval_caches": digests}
        return {**facts, **self.weights}

    @functools.cached_property
    def weights(self) -> dict[str, str]:
        """Identities of what a run begins from: the files of its student and of its embeddings,
        where this machine has them, the base of an adapter, an earlier student, a tokenizer of the
        student's own."""
        options, found = self.options, {}
        trust = options.trust_remote_code
        for name, place in (("student", options.student), ("embeddings", options.embeddings)):
            digest = files_sha256(place) if place is not None else None
            if digest is not None:
                found[f"{name}_files"] = digest
        if options.lora is not None and is_model(options.student):
            base = TeacherFiles.find(options.student, role="student", trust_remote_code=trust)
            found["base_sha256"] = base.sha256
        if options.init_from is not None:
            initial = TeacherFiles.find(options.init_from, role="run", trust_remote_code=trust)
            found["init_sha256"] = initial.sha256
        if options.cross_tokenizer is not None:
            found["tokenizer_sha256"] = tokenizer_sha256(own_tokenizer(options))
        return found

    @property
    def streams(self) -> int:
        """Streams of the run: as asked for, or those it began with."""
        if self.options.streams is not None:
            return self.options.streams
        begun: dict[str, Any] = {}
        if (document := self.folder.result()) is not None:
            begun = document.get("identity", {})
        elif (checkpoint := self.checkpoint()) is not None:
            begun = read_state(checkpoint)["identity"]
        return int(begun.get("streams", self.options.workers[1]))

    @property
    def finished_identity(self) -> dict[str, Any]:
        """What a finished run must share to count as this one, as JSON gives it back."""
        length = {"epochs": self.options.epochs, "max_steps": self.options.max_steps}
        digests = [cache.digest for cache in self.caches]
        facts = {**self.identity, **length, "caches": digests}
        return dict(json.loads(json.dumps(facts)))

    def finished(self) -> TrainResult | None:
        """The result of this very run if it was finished before.

        Raises:
            UsageError: the folder holds a finished run with other options, or something else.
        """
        document = self.folder.document()
        if document is None or not self.folder.names() & {"config.json", "adapter_config.json"}:
            return None  # with a result and no model: somebody removed it
        check_identity(document, self.finished_identity, f"the finished run in {self.shown}")
        return TrainResult(**{**document["result"], "out": self.shown, "made": False})

    def announce(self) -> None:
        """Report the checkpoint that the run continues from, and labels that it will not find."""
        if self.options.alphas != Schedule(0.0, 0.0) and not _labelled(self.caches, shards=1):
            self.report(
                "no row of the caches' first shards has a hard label: whatever --alpha says, the "
                "student learns of such rows from the teacher alone. Labels are read by build "
                "(--label-column)."
            )
        resume = self.checkpoint()
        if resume is not None:
            step = read_state(resume)["cursor"]["step"]
            self.report(f"resuming from {resume}: step {step:,} of {self.steps:,}")

    def begin(self, owner: str = "") -> None:
        """In the process that writes the folder, once it is locked: own a run in an object store,
        and bring what it resumes from.

        Args:
            owner: of a run that the caller of this process owns.
        """
        self.folder.claim(owner)
        self.folder.bring()

    def checkpoint(self) -> Path | None:
        """Where to resume.

        Raises:
            UsageError: the given checkpoint is not one, or resuming was ruled out.
        """
        resume = self.options.resume
        if resume not in ("auto", "never"):
            if not {"cursor", "identity"} <= read_state(Path(resume)).keys():
                raise UsageError(
                    f"{resume} is not a checkpoint of `kdcache train`, but of another trainer. "
                    "Name one of a run, or that model as --student."
                )
            return Path(resume)
        found = last_checkpoint(self.out)
        if found is not None and resume == "never":
            raise UsageError(
                f"{self.shown} has checkpoints, and --resume never does not continue from them. "
                "Delete them or choose another --out."
            )
        return found

    @staticmethod
    def go_on(options: TrainOptions) -> str:
        """How to resume a stopped run, and from where."""
        if options.resume not in ("auto", "never"):
            return f"The same command starts again at {options.resume}."
        text = train_folder(options.out).continues()
        return text if options.resume == "auto" else text.replace("The same command", _AUTO)


def train_folder(out: str) -> TrainFolder:
    """The folder of a run, at a path or a URL.

    Raises:
        UsageError: a URL that cannot be opened.
    """
    if not is_remote(out):
        return TrainFolder(local_path(out))
    from kdcache.commands.train.store import RunStore

    return RunStore(out)


def steps_of(options: TrainOptions, stream: TargetStream) -> int:
    """Steps of a run on a stream."""
    return options.max_steps or max(1, math.ceil(options.epochs * stream.steps))


def _missing_labels(
    options: TrainOptions, caches: Sequence[Cache], eval_caches: Sequence[Cache]
) -> list[str]:
    """What is asked of hard labels that the caches do not have: a line each."""
    wrong = []
    if options.hard_only and not _labelled(caches):
        wrong.append(
            "alpha 1 trains on hard labels alone, but the caches have none. Use a smaller --alpha, "
            "or build again with the column of the labels (--label-column)."
        )
    of_labels = options.hard_only or options.best in ("hard_loss", "f1", *FIGURES.values())
    if eval_caches and of_labels and not _labelled(eval_caches):
        wrong.append(
            "the evaluation caches have no hard labels to choose the best checkpoint by. Use "
            "--best soft_loss with an --alpha below 1, or other caches."
        )
    return wrong


def _labelled(caches: Sequence[Cache], shards: int | None = None) -> bool:
    """Whether any row has a hard label; the rows of a language model have by their nature.

    Args:
        shards: how many of each are read at most, where there is no label; all by default.
    """
    if any(TASKS[cache.spec.task].over_ids for cache in caches):
        return True
    some = ((cache, shard) for cache in caches for shard in range(cache.spec.spans)[:shards])
    return any(
        labelled(c.read(shard, targets=False).labels, c.spec.task).any() for c, shard in some
    )


def _wrong_schedule(options: TrainOptions, caches: Sequence[Cache]) -> list[str]:
    """Why caches do not know the targets at all temperatures of a schedule: a line each."""
    wrong, needs = [], f"a schedule of temperatures ({options.temperatures}) needs a dense cache"
    for cache in caches:
        codec = cache.codec()
        if codec.any_temperature:
            continue
        if codec.keeps_logits and len(cache.spec.teachers) > 1:
            wrong.append(f"{needs} of one teacher: {cache.url} has the mean of several.")
        else:
            wrong.append(f"{needs}, not {codec}.")
    return wrong


def _wrong_loss(options: TrainOptions, cache: Cache, temperatures: Sequence[float]) -> list[str]:
    """Why the loss is undefined for the targets of a cache: a line each."""
    wrong, codec = [], cache.codec()
    divergence = options.divergence or ""
    answers = TASKS[cache.spec.task].answers
    if divergence == "policy-gradient":
        return _wrong_gradient(options, cache)
    none = SoftTargets.empty(codec).at(codec.temperatures[0])
    for temperature in temperatures:
        try:
            targets = dataclasses.replace(none, temperature=temperature)
            check_loss(targets, divergence=divergence, tail=options.tail, answers=answers)
        except UsageError as error:
            wrong.append(str(error))
    return wrong


def _wrong_positions(options: TrainOptions, caches: Sequence[Cache]) -> list[str]:
    """Why positions of these caches cannot be chosen as asked: a line each."""
    if options.chosen is None:
        return []
    from kdcache.student.positions import Share, check_rule

    try:
        check_rule(Share(*options.chosen), caches[0].spec.task, options.divergence or "")
    except UsageError as error:
        return [str(error)]
    columns = {"teacher-entropy": "entropy", "surprise": "label_logprob"}
    column = columns.get(options.chosen[0])
    if options.hard_only and column == "entropy":  # which labels without a target lack
        wrong = check_every_position(caches, f"--positions {options.positions} with --alpha 1")
        if wrong:
            return wrong
    return [
        f"--positions {options.positions} needs the column {column}, and {cache.url} has none. "
        "Build it with this version of kdcache, or choose by student-entropy."
        for cache in caches
        if column is not None and column not in cache.spec.kept
    ]


def _wrong_gradient(options: TrainOptions, cache: Cache) -> list[str]:
    """Why a cache has no policy gradient: a line each."""
    wrong, rows = [], cache.spec.rows
    if options.temperatures != Schedule(1.0, 1.0):
        wrong.append("--divergence policy-gradient is at temperature 1. Leave --temperature out.")
    if not (TASKS[cache.spec.task].causal and cache.spec.label_logprob):
        wrong.append(
            f"--divergence policy-gradient needs the teacher's log-probabilities of labels "
            f"(label_logprob), and {cache.url} has none. Build it with this version of kdcache."
        )
    elif options.importance_clip and not rows.get("writer_logprob"):
        wrong.append(
            f"--divergence policy-gradient weighs tokens by the probability with which they were "
            f"drawn, and {cache.url} has none. Build it of text from kdcache generate at "
            "--temperature 1 without --top-p, --top-k or --min-p; or --importance-clip 0."
        )
    return wrong
