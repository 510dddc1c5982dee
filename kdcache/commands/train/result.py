"""The progress of a training run, and its result."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TrainProgress:
    """The progress of a run.

    Attributes:
        step: steps done.
        steps: steps of the run.
        epoch: passes over the caches, with the part of the present one.
        seconds: training time so far, over all sittings of the run.
        logs: what was just logged: losses, learning rate, or metrics of an evaluation (`eval_...`).
    """

    step: int
    steps: int
    epoch: float
    seconds: float
    logs: dict[str, float]


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        out: folder of the run, and of the student.
        steps: steps of the whole run.
        epochs: passes over the caches.
        rows: rows trained on, over all epochs.
        loss: last logged training loss, alpha and T as they were then.
        hard_loss: its cross-entropy with the hard labels, a labelled position (of scores the
            error); None without labels.
        soft_loss: its T^2 times the divergence from the teacher, a position; None on hard labels
            alone and on sampled targets.
        soft_cross_entropy: on sampled targets: its T^2 times the cross-entropy with the teacher,
            which is KL plus the teacher's entropy.
        eval: metrics of the student on the evaluation caches.
        best_step: step of the checkpoint that became the student, where there were evaluations;
            None where the figure that selects it was defined in none: it is then the last one.
        seconds: wall time of training, over all sittings.
        parameters: parameters of the student.
        trained: how many of them training changes.
        vocabulary: ids of the student's own tokenizer; None where it reads the cache's ids.
        unknown: share of that tokenizer's tokens of the training texts that are unknown; None where
            its vocabulary has no unknown.
        eval_unknown: the same of the evaluation texts.
        pretrained: how many of its ids began with a vector of `embeddings`; None without these.
        teacher_cross_entropy: the teacher's, with the hard labels of the training caches at T = 1,
            as `hard_loss` is the student's; None where they do not keep it (`label_logprob`).
        eval_teacher_cross_entropy: the same of the evaluation caches.
        lost: stretches of text, in the rows trained on, that a student's own tokens do not give
            back, so without labels; None where there were none.
        cut: labels left out of the rows trained on because the student's rows would be longer than
            it reads, or than asked for; None where there were none.
        epoch_rows: rows that an epoch has of each domain, and of each cache without names; None
            where no cache has names.
        one_answer: figures of one answer for all (`kdcache.student.one_answer`), by the names of
            `eval`: on the labels of the evaluation caches, or else of the training caches.
        warning: where the student is hardly better than that: what was compared, what to change.
        task: of the caches.
        made: False where the run was finished before and nothing was done.
    """

    out: str
    steps: int
    epochs: float
    rows: int
    loss: float
    hard_loss: float | None = None
    soft_loss: float | None = None
    soft_cross_entropy: float | None = None
    eval: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    seconds: float = 0.0
    parameters: int = 0
    trained: int | None = None
    vocabulary: int | None = None
    unknown: float | None = None
    eval_unknown: float | None = None
    pretrained: int | None = None
    teacher_cross_entropy: float | None = None
    eval_teacher_cross_entropy: float | None = None
    lost: int | None = None
    cut: int | None = None
    epoch_rows: dict[str, int] | None = None
    one_answer: dict[str, float] = field(default_factory=dict)
    warning: str = ""
    task: str | None = None
    made: bool = True
