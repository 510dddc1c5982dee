"""Groups of options of `train`, each for those who need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kdcache.domains import Named
from kdcache.options import Options, option, options_of
from kdcache.tasks import CrossMethod, Divergence, Tail

Best = Literal["loss", "hard_loss", "soft_loss", "accuracy", "f1", "micro_f1", "pearson"]
WORDS = ("words", "teacher")
"""What a biLSTM may read."""


@dataclass(frozen=True, kw_only=True)
class BiLstmOptions(Options):
    """Students that read texts themselves, the built-in biLSTM among them."""

    heading = "Students that read texts themselves, the biLSTM among them"

    student_tokenizer: str | None = option(
        None,
        help="what a biLSTM reads: `words` of a vocabulary of its own, or the `teacher`'s tokens "
        "(default: words). With `cross_tokenizer`, the student's tokenizer (default: the one "
        "in its folder).",
        metavar="words|teacher|DIR_OR_HUB_ID",
        decides="student",
    )
    max_length: int | None = option(
        None,
        help="maximum tokens of a row, if the student has words or its own tokenizer.",
        at_least=1,
        decides="student",
    )
    bilstm: tuple[str, ...] = option(
        (),
        help="of the biLSTM, such as `hidden-size=512,layers=2`: embedding-size (default: that of "
        "`embeddings`, else 300), hidden-size in each direction (256), layers (1), dense-size of "
        "the ReLU layer (128), dropout (0), pooling=last or max (last), freeze-embeddings=true, "
        "min-count of a word that is known (1), max-words of the vocabulary (no bound).",
        comma=True,
        keys=True,
        metavar="KEY=VALUE",
        decides="nothing",  # but its keys, which are fields, do
    )
    embeddings: str | None = option(
        None,
        help="GloVe or word2vec text file (`.gz` too) for the biLSTM.",
        metavar="FILE",
        decides="student",
    )
    freeze_embeddings: bool = option(
        False, instead=("bilstm", "freeze-embeddings"), decides="student"
    )
    embedding_size: int | None = option(
        None, instead=("bilstm", "embedding-size"), decides="student"
    )
    hidden_size: int | None = option(None, instead=("bilstm", "hidden-size"), decides="student")
    layers: int | None = option(None, instead=("bilstm", "layers"), decides="student")
    dense_size: int | None = option(None, instead=("bilstm", "dense-size"), decides="student")
    dropout: float | None = option(None, instead=("bilstm", "dropout"), decides="student")
    pooling: Literal["last", "max"] | None = option(
        None, instead=("bilstm", "pooling"), decides="student"
    )
    min_count: int | None = option(None, instead=("bilstm", "min-count"), decides="student")
    max_words: int | None = option(None, instead=("bilstm", "max-words"), decides="student")

    @property
    def bilstm_settings(self) -> dict[str, Any]:
        """Settings of the built-in student that were given."""
        names = [o.name for o in options_of(BiLstmOptions) if o.instead]
        values = {name: getattr(self, name) for name in names}
        values["freeze_embeddings"] = self.freeze_embeddings or None
        values["tokenizer"] = self.student_tokenizer if self.student_tokenizer in WORDS else None
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class LossOptions(Options):
    """Losses, and what counts how much in them."""

    heading = "Loss"

    cache_weight: tuple[str | Named, ...] = option(
        (),
        help=(
            "how often an epoch uses rows: a number for each cache, or a domain's name and number, "
            "such as `code=0.5`, for its rows in every cache; 0 leaves a domain out. Default: 1."
        ),
        metavar="[NAME=]WEIGHT",
        named=True,
    )
    divergence: Divergence | None = option(
        None,
        help="divergence of the student from the soft targets. Default: `forward-kl`, of scores "
        "`mse`; `huber` is for scores alone, and then the hard loss too. `policy-gradient` is "
        "reverse KL by the drawn tokens of generated text.",
    )
    importance_clip: float = option(
        1.0,
        help="of `policy-gradient`: the largest importance weight of a token, its probability now "
        "by the one it was drawn with; 0 weighs all alike, as Lightning OPD.",
        at_least=0,
    )
    positions: str | None = option(
        None,
        help="of a language model: train on a share of each batch's positions, those with the "
        "largest entropy of the teacher, of the student as it is, or surprise, minus the teacher's "
        "log-probability of the label: such as `student-entropy:0.2`. Default: on all.",
        metavar="teacher-entropy|student-entropy|surprise:SHARE",
    )
    huber_delta: float = option(
        1.0,
        help="error from which `--divergence huber` grows linearly, in units of the score.",
        above=0,
    )
    tail: Tail = option(
        "bucket", help="for top-k caches: how the ids that are not stored are represented."
    )
    anchor: float | str = option(
        "auto",
        help="for anchored caches: how far the student's distribution is trusted to remove noise, "
        "0 to 1. `auto` estimates it from past steps; `off` trains on plain samples.",
        metavar="auto|off|THETA",
    )


@dataclass(frozen=True, kw_only=True)
class CrossOptions(Options):
    """Language models with another tokenizer than the teacher."""

    heading = "Students with another tokenizer"

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


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Options):
    """Evaluation on the way, and checkpoints."""

    heading = "Evaluation and checkpoints"

    save_steps: int | None = option(
        None,
        help="steps between checkpoints, and with `eval_cache` evaluations. Default: an epoch.",
        at_least=1,
        decides="nothing",
    )
    eval_steps: int | None = option(
        None, instead=("save_steps", "{}"), at_least=1, decides="nothing"
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
    keep_checkpoints: int = option(
        2,
        help="checkpoints kept, 2 or more; the best one is always among them.",
        at_least=2,
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
    report_to: tuple[str, ...] = option(
        ("auto",),
        help="Hugging Face trackers such as `tensorboard` or `wandb`; `auto` is tensorboard if "
        "installed.",
        decides="nothing",
    )


@dataclass(frozen=True, kw_only=True)
class ManyOptions(Options):
    """Training on several GPUs or machines."""

    heading = "Several GPUs or machines"

    worker: tuple[str, ...] = option(
        (),
        help="`gpus` of each worker, 0 or 1 (default: one where there are any); of Ray, "
        "`max-failures`: how often workers may be lost or fail before a training gives up, "
        "announced preemptions not counted (2, on a cluster 100), and `wait-minutes` until one "
        "without workers gives up (default: it waits for nodes as long as it takes).",
        comma=True,
        keys=True,
        metavar="KEY=VALUE",
        decides="nothing",
    )
    gpus_per_worker: float | None = option(
        None, instead=("worker", "gpus"), decides="nothing", at_least=0
    )
    address: str | None = option(
        None,
        help="Ray address. Default: a Ray of this process.",
        decides="nothing",
        metavar="RAY_ADDRESS",
    )
    max_failures: int | None = option(
        None, instead=("worker", "max-failures"), at_least=0, decides="nothing"
    )
    wait_minutes: float | None = option(
        None, instead=("worker", "wait-minutes"), above=0, decides="nothing"
    )
    fsdp: bool = option(
        False,
        help=(
            "shard weights and optimizer over the workers, for Hugging Face students that need it."
        ),
    )


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(Options):
    """What trades memory for time, and the order of rows."""

    heading = "Memory, speed and order of rows"

    gradient_accumulation: int = option(
        1,
        help="slices into which each worker cuts its part of a batch: less memory, the same step.",
        at_least=1,
        decides="nothing",
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
    read: tuple[str, ...] = option(
        (),
        help="how caches are read: `shuffle-shards`, shards of a stream whose rows are shuffled "
        "together (default: as many as make 32 MiB of stored bytes, but 3 at least; divided by the "
        "number of streams), and `prefetch=4` batches that are decoded ahead.",
        comma=True,
        keys=True,
        metavar="KEY=VALUE",
        decides="nothing",  # but its keys, which are fields, do
    )
    shuffle_shards: int | None = option(None, instead=("read", "shuffle-shards"), at_least=1)
    prefetch: int = option(4, instead=("read", "prefetch"), at_least=1, decides="nothing")
