"""The options of `train`, which check themselves.

Options of `train` that may change over a run: `--alpha 0.9:0.1`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from kdcache.commands.groups import LearningOptions, PlotOptions
from kdcache.commands.train.bilstm import WORDS, BiLstmOptions
from kdcache.commands.train.place import Place
from kdcache.domains import Named, Weights
from kdcache.errors import UsageError
from kdcache.lora import Lora
from kdcache.options import option, options_of
from kdcache.storage import redact
from kdcache.tasks import CrossMethod, Divergence, Tail


@dataclass(frozen=True)
class Schedule:
    """A number that may change linearly over a run.

    Attributes:
        start: value at the first step.
        end: value at the last step.
    """

    start: float
    end: float

    @classmethod
    def parse(cls, value: float | str | Schedule, name: str) -> Schedule:
        """Read `0.5` or `0.9:0.1`.

        Raises:
            UsageError: not one or two numbers.
        """
        if isinstance(value, Schedule):
            return value
        first, _, last = str(value).partition(":")
        try:
            start = float(first)
            end = float(last) if last else start
        except ValueError as error:
            raise UsageError(
                f"{name} is {value!r}, expected a number, or two as start:end of a linear schedule."
            ) from error
        return cls(start, end)

    def at(self, step: int, steps: int) -> float:
        """Value at step `step` (from 0) of a run of `steps`."""
        share = min(1.0, step / max(1, steps - 1))
        return self.start + (self.end - self.start) * share

    @property
    def constant(self) -> bool:
        """Whether it never changes."""
        return self.start == self.end

    def __str__(self) -> str:
        return f"{self.start:g}" if self.constant else f"{self.start:g}:{self.end:g}"


Best = Literal["loss", "hard_loss", "soft_loss", "accuracy", "f1", "micro_f1", "pearson"]

_HOTTEST = 1000.0  # temperature: times T² the rounding of float32 is 0.3 % of a loss there


@dataclass(frozen=True)
class TrainOptions(LearningOptions, BiLstmOptions, PlotOptions):
    """What a training run takes: fields have the names of the command's options."""

    cache: tuple[str, ...] = option(
        help="folder or URL of each cache; several are mixed row by row.",
        metavar="CACHE",
        decides="student",
    )
    student: str = option(
        help=(
            "HF folder or hub id, a `config.json` (random weights), `bilstm`, or `module:function`."
        ),
        metavar="DIR_OR_HUB_ID|CONFIG.json|bilstm|module:function",
        decides="student",
    )
    out: str = option(
        help="folder or URL of the run: checkpoints, logs and the finished student.",
        metavar="RUN",
        output=True,
        decides="nothing",
    )
    lora: str | None = option(
        None,
        help=(
            "train only a low-rank adapter of a Hugging Face student (kdcache[lora]), such as "
            "`r=16,alpha=32,dropout=0.05,targets=q_proj+v_proj`. Default: alpha twice r, no "
            "dropout, targets all-linear."
        ),
        metavar="r=R[,alpha=A][,targets=NAMES]",
        decides="student",
    )
    init_from: str | None = option(
        None,
        help=(
            "begin with the weights of this earlier student, which has the shape of `student`; "
            "with `lora`, an adapter of the same size. Steps and optimizer begin anew."
        ),
        metavar="RUN",
        decides="student",
    )
    cache_weight: tuple[str | Named, ...] = option(
        (),
        help=(
            "how often an epoch uses rows: a number for each cache, or a domain's name and number, "
            "such as `code=0.5`, for its rows in every cache; 0 leaves a domain out. Default: 1."
        ),
        metavar="[NAME=]WEIGHT",
        named=True,
    )
    alpha: float | str = option(
        0.5,
        help="weight of the hard loss, 0 to 1, or `start:end`; 1 trains on hard labels alone.",
        metavar="A[:B]",
    )
    temperature: float | str = option(
        1.0,
        help="temperature of the soft loss, or `start:end` (`dense` and `hidden` caches).",
        metavar="T[:U]",
    )
    divergence: Divergence | None = option(
        None,
        help="divergence of the student from the soft targets. Default: `forward-kl`, of scores "
        "`mse`; `huber` is for scores alone, and then the hard loss too.",
    )
    huber_delta: float = option(
        1.0,
        help="error from which `--divergence huber` grows linearly, in units of the score.",
        above=0,
    )
    tail: Tail = option(
        "bucket", help="for top-k caches: how the ids that are not stored are represented."
    )
    cross_tokenizer: CrossMethod | None = option(
        None,
        help="train a language model that has another tokenizer than the teacher: `likelihood` "
        "compares how likely the text between shared token boundaries is, `hybrid` also the "
        "distributions of caches with `topk`, `sample` or `anchored` there.",
        decides="student",
    )
    likelihood_temperature: float = option(
        10.0,
        help="with `cross_tokenizer`, likelihoods p are compared as p^(1/T).",
        metavar="T",
        above=0,
    )
    anchor: float | str = option(
        "auto",
        help="for anchored caches: how far the student's distribution is trusted to remove noise, "
        "0 to 1. `auto` estimates it from past steps; `off` trains on plain samples.",
        metavar="auto|off|THETA",
    )
    max_steps: int | None = option(
        None, help="steps of the run, instead of `epochs`.", at_least=1, decides="nothing"
    )
    gradient_accumulation: int = option(
        1,
        help="slices into which each worker cuts its part of a batch: less memory, the same step.",
        at_least=1,
        decides="nothing",
    )
    max_grad_norm: float = option(
        1.0, help="gradients are scaled down to this norm; 0 leaves them.", at_least=0
    )
    eval_cache: tuple[str, ...] = option(
        (),
        help=(
            "caches to evaluate on, whose codec may be another; the best checkpoint becomes the "
            "student."
        ),
        metavar="CACHE",
    )
    eval_steps: int | None = option(
        None, help="steps between evaluations. Default: an epoch.", at_least=1, decides="nothing"
    )
    eval_batch_size: int | None = option(
        None,
        help="rows of an evaluation batch. Default: `batch_size`.",
        at_least=1,
        decides="nothing",
    )
    best: Best = option(
        "loss", help="figure that selects the best checkpoint; `f1` is that of entities."
    )
    patience: int | None = option(
        None,
        help="stop after this many evaluations without an improvement.",
        at_least=1,
        decides="nothing",
    )
    save_steps: int | None = option(
        None,
        help=(
            "steps between checkpoints. Default: an epoch. With `eval_cache`, checkpoints are "
            "taken at evaluations."
        ),
        at_least=1,
        decides="nothing",
    )
    keep_checkpoints: int = option(
        2,
        help="checkpoints kept, 2 or more; the best one is always among them.",
        at_least=2,
        decides="nothing",
    )
    report_to: tuple[str, ...] = option(
        ("auto",),
        help="Hugging Face trackers such as `tensorboard` or `wandb`; `auto` is tensorboard if "
        "installed.",
        decides="nothing",
    )
    resume: str = option(
        "auto",
        help=(
            "`auto` continues from the last checkpoint in `out`, `never` refuses to; or the "
            "folder of a checkpoint."
        ),
        metavar="auto|never|PATH",
        decides="nothing",
    )
    num_workers: int | str = option(
        1,
        help="processes that train together, started through Ray Train; `4:16` is as many as there "
        "is room for, 4 at least. Leave it out where torchrun or srun starts them.",
        decides="nothing",
        metavar="N|MIN:MAX",
    )
    max_failures: int | None = option(
        None,
        help="how often workers may be lost or fail before a training on Ray gives up; announced "
        "preemptions do not count. Default: 2, on a cluster 100.",
        at_least=0,
        decides="nothing",
    )
    wait_minutes: float | None = option(
        None,
        help="give up when no Ray worker of a cluster has run for this long. Default: wait for "
        "nodes as long as it takes.",
        above=0,
        decides="nothing",
        metavar="MINUTES",
    )
    gpus_per_worker: float | None = option(
        None,
        help="GPUs per worker, 0 or 1. Default: one where there are any.",
        decides="nothing",
        at_least=0,
    )
    address: str | None = option(
        None,
        help="Ray address. Default: a Ray of this process.",
        decides="nothing",
        metavar="RAY_ADDRESS",
    )
    fsdp: bool = option(
        False,
        help=(
            "shard weights and optimizer over the workers, for Hugging Face students that need it."
        ),
    )
    gradient_checkpointing: bool = option(
        False,
        help="recompute activations in the backward pass: less memory, more time.",
        decides="nothing",
    )
    streams: int | None = option(
        None,
        help=(
            "stretches of the caches that are read side by side, each by its own worker where "
            "there are as many. The order depends on them, so a run keeps them on any number of "
            "workers. Default: the run's first number of workers, of `4:16` the larger."
        ),
        at_least=1,
    )
    shuffle_shards: int | None = option(
        None,
        help=(
            "shards of a stream whose rows are shuffled together. Default: as many as make 32 MiB "
            "of stored bytes, but 3 at least; divided by the number of streams."
        ),
        at_least=1,
    )
    prefetch: int = option(4, help="batches decoded ahead.", at_least=1, decides="nothing")
    _: KW_ONLY
    learning_rate: float | None = option(
        None,
        help="peak of the learning rate. Default: 1e-3 for the biLSTM, 5e-4 for random weights, "
        "2e-4 for an adapter, else 5e-5.",
        above=0,
    )

    def conflicts(self) -> list[str]:
        """See `Options.conflicts`."""
        wrong = [*super().conflicts(), *self.plot_problems()]
        for name, low, high in (("alpha", 0.0, 1.0), ("temperature", 0.0, _HOTTEST)):
            try:
                schedule = Schedule.parse(getattr(self, name), f"--{name}")
            except UsageError as error:
                wrong.append(str(error))
                continue
            for value in (schedule.start, schedule.end):
                inside = low <= value <= high if name == "alpha" else low < value <= high
                if not inside:
                    span = "0 to 1" if name == "alpha" else f"more than 0, {_HOTTEST:,.0f} at most"
                    wrong.append(f"--{name} is {schedule}, expected {span}.")
                    break
        try:
            _ = self.theta
        except UsageError as error:
            wrong.append(str(error))
        try:
            _ = self.adapter
        except UsageError as error:
            wrong.append(str(error))
        if self.lora is not None and self.fsdp:
            wrong.append(
                "--fsdp shards all of a student's weights: with --lora train without it, the "
                "optimizer is small."
            )
        wrong += self._cross_conflicts()
        try:
            given = len(self.weights.caches)
        except UsageError as error:
            wrong.append(str(error))
        else:
            if given and given != len(self.cache):
                wrong.append(f"{given} cache weights for {len(self.cache)} caches.")
        if not self.eval_cache and (self.patience is not None or self.eval_steps is not None):
            wrong.append("--patience and --eval-steps need an --eval-cache to evaluate on.")
        if self.eval_cache and self.save_steps is not None:
            wrong.append(
                "with --eval-cache checkpoints are taken at evaluations: use --eval-steps."
            )
        if self.gpus_per_worker not in (None, 0, 1):
            wrong.append(
                f"--gpus-per-worker is {self.gpus_per_worker:g}, expected 0 or 1: a worker trains "
                "on one GPU, and workers cannot share one."
            )
        try:
            fewest = self.workers[0]
        except UsageError as error:
            return [*wrong, str(error)]
        if self.fsdp and fewest == 1 and self.place is None:
            wrong.append(
                "--fsdp shards over workers: use it with --num-workers 2 or more, or torchrun."
            )
        return wrong

    def _cross_conflicts(self) -> list[str]:
        """What does not go with another tokenizer, or asks for one without saying how."""
        own = self.student_tokenizer
        if self.cross_tokenizer is None:
            if own is None or own in WORDS:
                return []
            return [
                f"--student-tokenizer {own} is for a language model with a tokenizer of its own. "
                "Add --cross-tokenizer likelihood or hybrid; a biLSTM has words or teacher."
            ]
        wrong = []
        if own in WORDS:
            wrong.append(
                f"--student-tokenizer is {own}, which is for a biLSTM. With --cross-tokenizer name "
                "the folder or hub id of a tokenizer."
            )
        others = (
            (self.divergence not in (None, "forward-kl"), f"--divergence {self.divergence}"),
            (self.temperatures != Schedule(1.0, 1.0), f"--temperature {self.temperatures}"),
            (self.tail != "bucket", f"--tail {self.tail}"),
            (str(self.anchor) != "auto", f"--anchor {self.anchor}"),
        )
        named = [text for given, text in others if given]
        if named:
            wrong.append(
                "--cross-tokenizer compares the probabilities of text itself, so it is without "
                f"{', '.join(named)}. Leave out what you gave, or --cross-tokenizer."
            )
        return wrong

    @property
    def place(self) -> Place | None:
        """The place of this process among those of a launcher; None where it trains by itself, or
        asks Ray for workers.
        """
        return Place.find() if self.workers == (1, 1) and self.address is None else None

    @property
    def workers(self) -> tuple[int, int]:
        """The smallest and the largest number of workers."""
        first, colon, last = str(self.num_workers).partition(":")
        if first.isdecimal() and (last.isdecimal() or not colon):
            low, high = int(first), int(last or first)
            if 1 <= low <= high:
                return low, high
        raise UsageError(
            f"--num-workers is {self.num_workers}, expected a number of at least 1, or two as "
            "min:max."
        )

    @property
    def alphas(self) -> Schedule:
        """The schedule of alpha."""
        return Schedule.parse(self.alpha, "--alpha")

    @property
    def temperatures(self) -> Schedule:
        """The schedule of the temperature."""
        return Schedule.parse(self.temperature, "--temperature")

    @property
    def theta(self) -> float | None:
        """The scale of an anchor; None to estimate it."""
        given = str(self.anchor).lower()
        if given in ("auto", "off", "false"):  # YAML reads `off` so
            return None if given == "auto" else 0.0
        try:
            theta = float(given)
        except ValueError:
            theta = math.nan
        if not 0 <= theta <= 1:
            raise UsageError(f"--anchor is {self.anchor}, expected auto, off, or 0 to 1.")
        return theta

    @property
    def adapter(self) -> Lora | None:
        """The adapter that is trained; None trains all weights."""
        return None if self.lora is None else Lora.parse(self.lora)

    @property
    def weights(self) -> Weights:
        """How often an epoch uses rows."""
        return Weights.parse(self.cache_weight)

    @property
    def hard_only(self) -> bool:
        """Whether the soft targets have no weight at all."""
        return self.alphas == Schedule(1.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return {**values, "cache_weight": self.weights.shown()}

    def shown(self) -> dict[str, Any]:
        """As `to_dict`, for people: without the credentials that URLs may hold."""
        values = self.to_dict()
        for name in ("cache", "eval_cache"):
            values[name] = [redact(url) for url in values[name]]
        values["out"] = redact(self.out)
        return values

    def decisive(self) -> dict[str, Any]:
        """The options that a resumed run may not change; caches count by their digest instead."""
        values = self.to_dict()
        values["alpha"], values["temperature"] = str(self.alphas), str(self.temperatures)
        values["lora"] = None if self.adapter is None else str(self.adapter)
        values["anchor"] = "auto" if self.theta is None else self.theta
        idle = {"cache", "eval_cache", *({"huber_delta"} if self.divergence != "huber" else ())}
        return {
            one.name: values[one.name]
            for one in options_of(type(self))
            if one.decides != "nothing" and one.name not in idle
        }
