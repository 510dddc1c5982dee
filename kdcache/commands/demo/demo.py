"""The demo's steps: corpus, tokenizer, teacher, caches, students, evaluation and plot.

    pydoc_data.topics -> train.jsonl, heldout.jsonl -> tokenizer -> teacher
    build (Ray, two workers) -> train-cache; build (this process) -> heldout-cache
    train x 3 from train-cache -> evaluate on heldout-cache and teacher -> table, losses.png

The steps call `build`, `train` and `evaluate` with their options; the demo does nothing that the
commands cannot.

Cost: a few minutes on one core (two while building), half of it the teacher's training.
Guarantee: the three students see the same rows in the same order for as many steps, and each is its
best evaluation by held-out cross-entropy; the first two also begin with the same weights. Finished
steps are kept: the same command resumes after the last of them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdcache.commands.build.build import build
from kdcache.commands.build.make import BuildResult
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.demo.teacher import (
    TeacherSizes,
    documents,
    make_teacher,
    make_tokenizer,
    read_jsonl,
    write_jsonl,
)
from kdcache.commands.evaluate.evaluate import evaluate
from kdcache.commands.evaluate.scores import EvaluateResult
from kdcache.commands.options import DemoOptions, EvaluateOptions
from kdcache.commands.run_folder import RunFolder, TrainResult, read_metrics
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.errors import UsageError, install_command, installed
from kdcache.files import alone, local_path, try_output, write_json
from kdcache.humanize import counted, duration, size
from kdcache.plots import Chart, Level, Line, plot_charts
from kdcache.teacher import quiet_transformers


@dataclass(frozen=True)
class StudentScores:
    """One line of the demo's table.

    Attributes:
        name: what it was trained on, and its architecture.
        cross_entropy: held out, nats per position.
        kl: KL(teacher || student) held out, nats per position, exact.
        steps: of its training; None for the teacher.
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
        folders: in it, the training cache and the students.
        plot: the PNG of the held-out losses; None without matplotlib.
        models: the teacher, then the students.
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


Report = Callable[[str], None]

_STATE_FILE = "demo.json"
_MAX_LENGTH = 128
_VOCAB_SIZE = 1024
_BATCH_ROWS = 4
# The best of seven from 5e-4 to 8e-3 for the student on hard labels: a rate that does not suit it
# (twice this) triples what distillation seems to gain.
_RATE = 2e-3
_EVALUATIONS = 10
_LLAMA = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": _MAX_LENGTH,
    "tie_word_embeddings": True,
}
_GPT_NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": _MAX_LENGTH,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class _Student:
    folder: str
    name: str
    config: dict[str, Any]
    distilled: bool


_STUDENTS = (
    _Student("student-hard", "hard labels (Llama)", _LLAMA, False),
    _Student("student-distilled", "distilled (Llama)", _LLAMA, True),
    _Student("student-distilled-neox", "distilled (GPT-NeoX)", _GPT_NEOX, True),
)


def demo(options: DemoOptions, report: Report = lambda line: None) -> DemoResult:
    """Make a teacher, cache it once, train three students from the cache, and compare them.

    Args:
        report: called with a line of text as the steps go.

    Raises:
        UsageError: the folder holds something else, a demo with other options, or another one
            is at work in it.
        IncompleteError: the build was interrupted; the same call resumes.
    """
    threads = torch.get_num_threads()
    # Matrices this small gain little from threads, and lose tenfold where another process wants
    # the cores too: the threads wait for each other in every product.
    torch.set_num_threads(1)
    try:
        with quiet_transformers():
            job = _Demo(options, report)
            with alone(job.out, "demo"):
                return job.run()
    finally:
        torch.set_num_threads(threads)


class _Demo:
    def __init__(self, options: DemoOptions, report: Report) -> None:
        self.options = options
        self.report = report
        self.out = local_path(options.out)
        try_output(options.out)
        self.reused: list[str] = []
        self.train_texts, self.held_out_texts = documents(options.documents)
        self.state = self._open()

    def _open(self) -> dict[str, Any]:
        """The state of a folder that was made for the same options and corpus, or a new one.

        The corpus counts as well: it changes with the version of Python.
        """
        wanted = {k: v for k, v in asdict(self.options).items() if k not in ("out", "workers")}
        wanted["characters"] = sum(map(len, self.train_texts + self.held_out_texts))
        state = RunFolder(self.out, _STATE_FILE, "a demo").document()
        if state is not None:
            then = state["options"]
            changed = [f"{k} {then.get(k)} -> {v}" for k, v in wanted.items() if then.get(k) != v]
            if changed:
                raise UsageError(
                    f"{self.out} holds a demo with other options ({', '.join(changed)}). "
                    "Use the same ones to continue, or another --out."
                )
            return state
        return {"options": wanted, "seconds": {}, "teacher_seconds": 0.0}

    def _save(self) -> None:
        write_json(self.out / _STATE_FILE, self.state)

    def _path(self, name: str) -> str:
        return str(self.out / name)

    @contextmanager
    def _step(self, name: str, *, done: bool) -> Iterator[None]:
        """Time a step; a finished one keeps its recorded time."""
        if done:
            self.reused.append(name)
            yield
            return
        started = time.perf_counter()
        yield
        self.state["seconds"][name] = time.perf_counter() - started
        self._save()

    def _tell(self, step: int, name: str, text: str) -> None:
        took = "reused" if name in self.reused else duration(self.state["seconds"][name])
        self.report(f"{step}/6 {name}: {text} ({took})")

    def run(self) -> DemoResult:
        self.state = self._open()  # another demo may have ended here since
        self._save()
        self._corpus()
        self._tokenizer()
        self._teacher()
        cache = self._caches()
        # Every step is of as many rows, and the last step is an evaluation.
        rounds = math.ceil(cache.rows / _BATCH_ROWS * self.options.student_epochs / _EVALUATIONS)
        students = [self._student(student, rounds) for student in _STUDENTS]
        return self._compare(cache, students)

    def _corpus(self) -> None:
        train_file, held_out_file = self.out / "train.jsonl", self.out / "heldout.jsonl"
        # A teacher and caches of an earlier sitting were made from these files: they stay.
        done = train_file.is_file() and held_out_file.is_file()
        with self._step("corpus", done=done):
            if not done:
                write_jsonl(train_file, self.train_texts)
                write_jsonl(held_out_file, self.held_out_texts)
        self.train_texts, self.held_out_texts = read_jsonl(train_file), read_jsonl(held_out_file)
        self._tell(
            1,
            "corpus",
            f"the Python language reference, {len(self.train_texts)} documents "
            f"({size(train_file.stat().st_size)}) to learn from, {len(self.held_out_texts)} "
            f"({size(held_out_file.stat().st_size)}) held out",
        )

    def _tokenizer(self) -> None:
        folder = self.out / "tokenizer"
        done = folder.is_dir()
        with self._step("tokenizer", done=done):
            if not done:
                make_tokenizer(self.train_texts, folder, vocab_size=_VOCAB_SIZE)
        self._tell(2, "tokenizer", f"byte-level BPE, {_VOCAB_SIZE:,} ids")

    def _teacher(self) -> None:
        folder = self.out / "teacher"
        sizes = TeacherSizes(
            vocab_size=_VOCAB_SIZE,
            max_length=_MAX_LENGTH,
            hidden=192,
            layers=2,
            heads=6,
            epochs=self.options.teacher_epochs,
            seed=self.options.seed,
        )

        def progress(step: int, steps: int, loss: float) -> None:
            self.report(f"3/6 teacher: step {step} of {steps}, held-out cross-entropy {loss:.3f}")

        done = folder.is_dir()
        with self._step("teacher", done=done):
            if not done:
                make_teacher(
                    self.train_texts,
                    self.held_out_texts,
                    self.out / "tokenizer",
                    folder,
                    sizes,
                    progress,
                )
        self._tell(3, "teacher", f"Llama, {sizes.layers} layers of {sizes.hidden}")

    def _caches(self) -> BuildResult:
        train_cache = self._cache("train", self.options.workers)
        # So few documents are done here before a worker has started.
        self._cache("heldout", 0)
        return train_cache

    def _cache(self, name: str, workers: int) -> BuildResult:
        folder = self.out / f"{name}-cache"
        done = (folder / "manifest.json").is_file()
        with self._step(f"{name} cache", done=done):
            result = build(
                BuildOptions(
                    teacher=(self._path("teacher"),),
                    corpus=(self._path(f"{name}.jsonl"),),
                    out=str(folder),
                    codec=self.options.codec,
                    max_length=_MAX_LENGTH,
                    workers=min(workers, os.cpu_count() or 1),
                    gpus_per_worker=0,
                    dtype="float32",
                    seed=self.options.seed,
                )
            )
            if name == "train" and result.made:
                # The part of an earlier, interrupted run is unknown.
                share = result.made / result.spans
                self.state["teacher_seconds"] = result.teacher_seconds / share
        self._tell(
            4,
            f"{name} cache",
            f"{self.options.codec}, {result.positions:,} positions in "
            f"{counted(result.spans, 'shard')}, {result.bytes_per_position:.1f} B per "
            f"position",
        )
        return result

    def _student(self, student: _Student, eval_steps: int) -> TrainResult:
        config = self.out / f"{student.folder}.json"
        config.write_text(json.dumps(student.config, indent=1) + "\n")
        run = self.out / student.folder
        done = (run / "train.json").is_file()
        with self._step(student.name, done=done):
            result = train(
                TrainOptions(
                    cache=(self._path("train-cache"),),
                    student=str(config),
                    out=str(run),
                    alpha=self.options.alpha if student.distilled else 1.0,
                    batch_size=_BATCH_ROWS,
                    max_steps=eval_steps * _EVALUATIONS,
                    learning_rate=_RATE,
                    lr_scheduler="cosine",
                    warmup=0.05,
                    eval_cache=(self._path("heldout-cache"),),
                    save_steps=eval_steps,
                    eval_batch_size=32,
                    best="hard_loss",
                    report_to=("none",),
                    seed=self.options.seed,
                )
            )
        self._tell(
            5,
            student.name,
            f"{result.steps} steps, held-out cross-entropy {result.eval['hard_loss']:.3f}",
        )
        return result

    def _compare(self, cache: BuildResult, students: list[TrainResult]) -> DemoResult:
        result: EvaluateResult
        with self._step("evaluation", done=False):
            result = evaluate(
                EvaluateOptions(
                    student=tuple(student.out for student in students),
                    cache=self._path("heldout-cache"),
                    teacher=self._path("teacher"),  # live: sparse targets do not give KL
                )
            )
        a_pass = self.state["teacher_seconds"]
        rows: list[tuple[str, str, int | None, float, float | None]] = [
            ("teacher (Llama)", "llama", None, self.state["seconds"]["teacher"], None)
        ]
        for plan, run in zip(_STUDENTS, students, strict=True):
            beside = a_pass * run.rows / cache.rows if plan.distilled else 0.0
            rows.append((plan.name, plan.config["model_type"], run.steps, run.seconds, beside))
        models = []
        for (name, architecture, *own), found in zip(rows, result.models, strict=True):
            nats, many = found.cross_entropy, found.parameters
            assert nats is not None
            assert many is not None
            figures: tuple[Any, ...] = (many, nats, math.exp(nats), found.kl, *own)
            models.append(StudentScores(name, architecture, *figures))
        plot = self.out / "losses.png"
        drawn = f"plot in {plot}"
        if installed("plot"):
            self._plot(plot, models[0].cross_entropy)
        else:
            drawn = f"no plot without matplotlib ({install_command('plot')})"
        self._tell(6, "evaluation", f"{result.positions:,} held-out positions, {drawn}")
        return DemoResult(
            out=str(self.out),
            plot=str(plot) if plot.exists() else None,
            models=tuple(models),
            positions=cache.positions,
            bytes_per_position=cache.bytes_per_position,
            teacher_seconds=a_pass,
            seconds=dict(self.state["seconds"]),
            reused=tuple(self.reused),
            folders=tuple(map(self._path, ("train-cache", *(s.folder for s in _STUDENTS)))),
        )

    def _plot(self, path: Path, teacher: float) -> None:
        lines = []
        for student in _STUDENTS:
            logged = read_metrics(self.out / student.folder)
            points = [(x["step"], x["eval_hard_loss"]) for x in logged if "eval_hard_loss" in x]
            steps, values = zip(*points, strict=True)
            lines.append(Line(f"{student.name}: {values[-1]:.3f}", steps, values))
        chart = Chart(
            "",
            f"step ({_BATCH_ROWS} rows of {_MAX_LENGTH} tokens each)",
            "held-out cross-entropy (nats per token)",
            lines,
            [Level(f"teacher (Llama): {teacher:.3f}", teacher)],
        )
        plot_charts(path, [chart], title="Three students from one cache")
