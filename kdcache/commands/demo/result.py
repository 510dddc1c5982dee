"""The result of a demo."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StudentScores:
    """One line of the demo's table.

    Attributes:
        name: what it was trained on, and its architecture.
        architecture: the model type of its config.
        parameters: numbers in its weights.
        cross_entropy: held out, nats per position.
        perplexity: its exponential.
        kl: KL(teacher || student) held out, nats per position, exact.
        steps: steps of its training; None for the teacher.
        train_seconds: wall time of its training.
        teacher_seconds: cost of running the teacher during its training, at the speed of the build.
    """

    name: str
    architecture: str
    parameters: int
    cross_entropy: float
    perplexity: float
    kl: float | None
    steps: int | None
    train_seconds: float
    teacher_seconds: float | None


@dataclass(frozen=True)
class DemoResult:
    """The outcome of a demo.

    Attributes:
        out: its folder.
        folders: in it, the training cache and the students.
        plot: the PNG of the held-out losses; None without matplotlib.
        models: the teacher, then the students.
        positions: positions in the training cache.
        bytes_per_position: of its shards, rows included.
        teacher_seconds: what the build spent in the teacher, summed over workers: paid once.
        seconds: wall time of each step when it was made, by name.
        reused: names of the steps that were there already.
    """

    out: str
    plot: str | None
    models: tuple[StudentScores, ...]
    positions: int
    bytes_per_position: float
    teacher_seconds: float
    seconds: dict[str, float] = field(default_factory=dict)
    reused: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
