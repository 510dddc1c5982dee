"""The options of `train`, which check themselves, schedules such as `--alpha 0.9:0.1`, and the
position of this process among those that a launcher started for one training.

torchrun and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; srun
sets SLURM_PROCID and its kin, from which the same follows. A batch script of Slurm that runs one
command without srun has no SLURM_STEP_NUM_TASKS and trains alone. Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from typing import Any, cast

from kdcache.commands.groups import LearningOptions, LoraOptions, PlotOptions, worker_range
from kdcache.commands.train.groups import (
    WORDS,
    BiLstmOptions,
    CheckpointOptions,
    CrossOptions,
    LossOptions,
    ManyOptions,
    MemoryOptions,
)
from kdcache.domains import Weights
from kdcache.errors import UsageError
from kdcache.humanize import redacted
from kdcache.options import again, option, options_of, problems_of
from kdcache.tasks import PositionFigure, check_position_share


@dataclass(frozen=True)
class Schedule:
    """A number that may change linearly over a run, from its first step to its last."""

    start: float
    end: float

    @classmethod
    def parse(
        cls, value: float | str, name: str, span: str, fits: Callable[[float], bool]
    ) -> Schedule:
        """Read `0.5` or `0.9:0.1`.

        Args:
            value: one or two numbers.
            name: of the option, for messages.
            span: what is expected, for messages.
            fits: whether a number is that.

        Raises:
            UsageError: not one or two numbers, or others than expected.
        """
        first, _, last = str(value).partition(":")
        try:
            found = cls(float(first), float(last or first))
        except ValueError as error:
            raise UsageError(
                f"{name} is {value!r}, expected a number, or two as start:end of a linear schedule."
            ) from error
        if not (fits(found.start) and fits(found.end)):
            raise UsageError(f"{name} is {found}, expected {span}.")
        return found

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


_PORTS = 15_000, 20_000  # the first, and how many: away from Ray's in examples/cluster/slurm.sh


@dataclass(frozen=True)
class Launched:
    """One of several processes.

    Attributes:
        launcher: what started them, for messages.
        world_size: how many there are, 2 or more.
        address: host of the first one, where all meet.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int

    @classmethod
    def find(cls, environment: Mapping[str, str] | None = None) -> Launched | None:
        """The place that the environment describes; None for a process by itself."""
        here = os.environ if environment is None else environment
        if int(here.get("WORLD_SIZE") or 1) > 1 and "RANK" in here:
            return cls(
                "torchrun",
                int(here["RANK"]),
                int(here["WORLD_SIZE"]),
                int(here.get("LOCAL_RANK") or 0),
                int(here.get("LOCAL_WORLD_SIZE") or 1),
                here.get("MASTER_ADDR") or "localhost",
                int(here.get("MASTER_PORT") or 29500),
            )
        if "RANK" not in here and int(here.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
            first, many = _PORTS
            step = int(here.get("SLURM_JOB_ID") or 0) + int(here.get("SLURM_STEP_ID") or 0)
            nodes = here.get("SLURM_STEP_NODELIST") or here.get("SLURM_JOB_NODELIST") or ""
            return cls(
                "srun",
                int(here["SLURM_PROCID"]),
                int(here["SLURM_STEP_NUM_TASKS"]),
                int(here["SLURM_LOCALID"]),
                _tasks_here(here),
                here.get("MASTER_ADDR") or first_host(nodes) or "localhost",
                int(here.get("MASTER_PORT") or first + step % many),
            )
        return None

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which PyTorch and its friends know the place."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def first_host(nodes: str) -> str:
    """The first of a list of hosts as Slurm writes it: `gpu[03-05,9],login` is gpu03."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found.group() if found else "")


def _tasks_here(here: Mapping[str, str]) -> int:
    """Tasks on this node, of a list such as `4(x2),3`: two nodes with four, one with three."""
    counts: list[int] = []
    for part in (here.get("SLURM_STEP_TASKS_PER_NODE") or "1").split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    node = int(here.get("SLURM_NODEID") or 0)
    return counts[min(node, len(counts) - 1)]


_HOTTEST = 1000.0  # temperature: times T² the rounding of float32 is 0.3 % of a loss there


@dataclass(frozen=True)
class TrainOptions(
    LoraOptions,
    LearningOptions,
    LossOptions,
    BiLstmOptions,
    CrossOptions,
    CheckpointOptions,
    PlotOptions,
    ManyOptions,
    MemoryOptions,
):
    """What a training run takes: fields have the names of the command's options."""

    first = (
        *("cache", "student", "out", "alpha", "temperature", "epochs", "batch_size"),
        *("learning_rate", "eval_cache", "num_workers"),
    )

    cache: tuple[str, ...] = option(
        help="folder or URL of each cache; several are mixed row by row.",
        metavar="CACHE",
        decides="student",
    )
    student: str = option(
        help=(
            "HF folder or hub id, a `config.json` (random weights), bilstm, or `module:function`."
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
    _: KW_ONLY
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
    eval_cache: tuple[str, ...] = option(
        (),
        help=(
            "caches to evaluate on, whose codec may be another; the best checkpoint becomes the "
            "student."
        ),
        metavar="CACHE",
    )
    num_workers: int | str = option(
        1,
        help="processes that train together, started through Ray Train; `4:16` is as many as there "
        "is room for, 4 at least. Leave it out where torchrun or srun starts them.",
        decides="nothing",
        metavar="N|MIN:MAX",
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
    max_steps: int | None = option(
        None, help="steps of the run, instead of `epochs`.", at_least=1, decides="nothing"
    )
    max_grad_norm: float = option(
        1.0, help="gradients are scaled down to this norm; 0 leaves them.", at_least=0
    )
    learning_rate: float | None = again(
        LearningOptions,
        "learning_rate",
        None,
        help="peak of the learning rate. Default: 1e-3 for the biLSTM, 5e-4 for random weights and "
        "`module:function` (too much for a quantised one), 2e-4 for an adapter, else 5e-5.",
    )

    def conflicts(self) -> list[str]:
        """See `Options.conflicts`."""
        wrong = [*super().conflicts(), *self.plot_problems(), *self._cross_conflicts()]
        read = (lambda: self.alphas, lambda: self.temperatures, lambda: self.theta)
        wrong += problems_of(*read, lambda: self.adapter, lambda: self.chosen)
        if self.lora is not None and self.fsdp:
            wrong.append(
                "--fsdp shards all of a student's weights: with --lora train without it, the "
                "optimizer is small."
            )
        if not (unread := problems_of(lambda: self.weights)):
            given = len(self.weights.caches)
            if given and given != len(self.cache):
                wrong.append(f"{given} cache weights for {len(self.cache)} caches.")
        wrong += unread
        if not self.eval_cache and self.patience is not None:
            wrong.append("--patience needs an --eval-cache to evaluate on.")
        if self.gpus_per_worker not in (None, 0, 1):
            wrong.append(
                f"--worker gpus is {self.gpus_per_worker:g}, expected 0 or 1: a worker trains "
                "on one GPU, and workers cannot share one."
            )
        unread = problems_of(lambda: self.workers)
        if not unread and self.fsdp and self.workers[0] == 1 and self.launched is None:
            wrong.append(
                "--fsdp shards over workers: use it with --num-workers 2 or more, or torchrun."
            )
        return [*wrong, *unread]

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
        temperature = str(self.temperature).removesuffix(".0")
        others = (
            (self.divergence not in (None, "forward-kl"), f"--divergence {self.divergence}"),
            (temperature != "1", f"--temperature {temperature}"),
            (self.tail != "bucket", f"--tail {self.tail}"),
            (str(self.anchor) != "auto", f"--anchor {self.anchor}"),
            (self.positions is not None, f"--positions {self.positions}"),
        )
        named = [text for given, text in others if given]
        if named:
            wrong.append(
                "--cross-tokenizer compares the probabilities of text itself, so it is without "
                f"{', '.join(named)}. Leave out what you gave, or --cross-tokenizer."
            )
        return wrong

    @property
    def launched(self) -> Launched | None:
        """The place of this process among those of a launcher; None where it trains by itself, or
        asks Ray for workers.
        """
        return Launched.find() if self.workers == (1, 1) and self.address is None else None

    def extras(self) -> dict[str, str]:
        """See `Options.extras`."""
        return super().extras() | ({"cluster": "--num-workers"} if self.workers[1] > 1 else {})

    @property
    def workers(self) -> tuple[int, int]:
        """The smallest and the largest number of workers."""
        return worker_range("--num-workers", self.num_workers)

    @property
    def alphas(self) -> Schedule:
        """The schedule of alpha."""
        return Schedule.parse(self.alpha, "--alpha", "0 to 1", lambda alpha: 0 <= alpha <= 1)

    @property
    def temperatures(self) -> Schedule:
        """The schedule of the temperature."""
        span = f"more than 0, {_HOTTEST:,.0f} at most"
        return Schedule.parse(self.temperature, "--temperature", span, lambda t: 0 < t <= _HOTTEST)

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
    def chosen(self) -> tuple[PositionFigure, float] | None:
        """By which figure positions are chosen, and which share of them; None for all."""
        if self.positions is None:
            return None
        figure, _, number = self.positions.partition(":")
        share = math.nan
        with suppress(ValueError):
            share = float(number)
        check_position_share(figure, share, f"--positions is {self.positions}")
        return cast(PositionFigure, figure), share

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
        """As `to_dict`, for people: without secrets."""
        return dict(redacted(self.to_dict()))

    def decisive(self) -> dict[str, Any]:
        """The options that a resumed run may not change; caches count by their digest instead."""
        values = self.to_dict()
        values["alpha"], values["temperature"] = str(self.alphas), str(self.temperatures)
        values["lora"] = None if self.adapter is None else str(self.adapter)
        values["anchor"] = "auto" if self.theta is None else self.theta
        values["positions"] = None if self.chosen is None else [*self.chosen]
        of_loss = {"huber_delta": "huber", "importance_clip": "policy-gradient"}
        others = (name for name, loss in of_loss.items() if self.divergence != loss)
        idle = {"cache", "eval_cache", *others}
        return {
            one.name: values[one.name]
            for one in options_of(type(self))
            if one.decides != "nothing" and one.name not in idle
        }
