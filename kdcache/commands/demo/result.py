"""What came of a demo, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console

from kdcache.cli.tables import number, print_line, print_table


@dataclass(frozen=True)
class StudentScores:
    """One line of the demo's table.

    Attributes:
        name: what it learnt from, and its architecture.
        architecture: the model type of its config.
        parameters: numbers in its weights.
        cross_entropy: held out, nats a position.
        perplexity: its exponential.
        kl: KL(teacher || student) held out, nats a position, exact.
        steps: steps of its training; None for the teacher.
        train_seconds: wall time of its training.
        teacher_seconds: what the teacher would cost beside its training, at the speed of the build.
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
        plot: the PNG of the held-out losses.
        models: the teacher, then the students.
        positions: positions in the training cache.
        bytes_per_position: of its shards, rows included.
        teacher_seconds: what the build spent in the teacher, summed over workers: paid once.
        seconds: wall time of each step when it was made, by name.
        reused: names of the steps that were there already.
    """

    out: str
    plot: str
    models: tuple[StudentScores, ...]
    positions: int
    bytes_per_position: float
    teacher_seconds: float
    seconds: dict[str, float] = field(default_factory=dict)
    reused: tuple[str, ...] = ()


def render_demo(result: DemoResult, console: Console) -> None:
    """Print the comparison, and what the teacher cost."""
    header = ("model", "parameters", "CE", "perplexity", "KL", "training", "teacher beside it")
    lines = [
        (
            model.name,
            f"{model.parameters:,}",
            number(model.cross_entropy, 3),
            number(model.perplexity, 1),
            number(model.kl, 3),
            f"{model.train_seconds:.0f} s",
            "-" if model.teacher_seconds is None else f"{model.teacher_seconds:.0f} s",
        )
        for model in result.models
    ]
    title = "On held-out documents: cross-entropy and KL to the teacher in nats a token"
    print_table(console, header, lines, title=title)
    beside = sum(model.teacher_seconds or 0.0 for model in result.models)
    print_line(
        console,
        f"The cache: {result.positions:,} positions, {result.bytes_per_position:.1f} bytes a "
        f"position. Teacher: {result.teacher_seconds:.1f} s, paid once; running it beside the "
        f"distilled students would have taken {beside:.1f} s.",
    )
    print_line(console, f"Loss curves: {result.plot}")
