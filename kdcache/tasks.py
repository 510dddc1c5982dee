"""The table of a teacher's tasks, which everything else reads, and the choices of options.

A new task is a line of `TASKS`, an encoder (`kdcache.rows`) that makes its rows, and its figures
(`kdcache.commands.evaluate`). The rest of the package asks the table what a label belongs to and
what an answer is over, never which task it has.

The label that means "none", the rule for which positions have a soft target, the words that an
option accepts, and limits shared by code and command line are defined here alone. Imports nothing
heavy: options and their help read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal, TypeVar, get_args

from kdcache.errors import UsageError

Attend = Literal["row", "document"]
Documents = Literal["file", "paragraph", "line"]
Form = Literal["auto", "text", "messages", "prompt", "ids"]
Labels = Literal["token", "next", "none"]
LabelTokens = Literal["first", "all"]
MaskUnit = Literal["token", "word"]
OnError = Literal["fail", "skip"]
Reasoning = Literal["learn", "read"]
Packing = Literal["concat", "none", "split", "whole"]
MAX_RECORD_BYTES: Final = 64 << 20

Attention = Literal["auto", "sdpa", "flash_attention_2", "eager"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Engine = Literal["transformers", "vllm"]
Ensemble = Literal["mean-probs", "mean-logits"]

ClassWeights = Literal["equal", "balanced"]
CrossMethod = Literal["likelihood", "hybrid"]
Divergence = Literal["forward-kl", "reverse-kl", "jsd", "mse", "huber", "policy-gradient"]
PositionFigure = Literal["teacher-entropy", "student-entropy", "surprise"]
Precision = Literal["auto", "bf16", "fp16", "float32"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"]
Tail = Literal["bucket", "renormalize"]


Task = Literal[
    "causal-lm",
    "masked-lm",
    "seq2seq-lm",
    "sequence-classification",
    "token-classification",
    "multi-label-classification",
    "regression",
]
Answers = Literal["ids", "classes", "labels", "score"]
CAUSAL_LM: Final = "causal-lm"
MASKED_LM: Final = "masked-lm"
SEQ2SEQ_LM: Final = "seq2seq-lm"
SEQUENCE_CLASSIFICATION: Final = "sequence-classification"
TOKEN_CLASSIFICATION: Final = "token-classification"
MULTI_LABEL_CLASSIFICATION: Final = "multi-label-classification"
REGRESSION: Final = "regression"

IGNORE: Final = -100  # a label that is none: the default `ignore_index` of torch's cross-entropy
UNLABELLED: Final = -101  # of a token that has a soft target and no hard label


@dataclass(frozen=True, slots=True)
class TaskType:
    """What a task asks and how it is answered.

    Attributes:
        noun: a model for it, for messages.
        per_token: whether a label belongs to each token of a row, or one to the row as a whole.
        answers: what an answer is over: `ids`, a distribution over those of a vocabulary;
            `classes`, one over classes that have names; `labels`, a probability of each of these
            by itself; `score`, a value.
        source: whether an answer is also about a source, a text that an encoder reads whole; the
            tokens of a row are then those that the decoder reads.
        causal: whether an answer may depend on no later token than its own; the label of a token
            is then the next one.
        texts: whether a shard keeps the text of its rows, so that a student with a tokenizer of
            its own can read them.
        words: whether rows are of words that came apart, each with a label, and a shard keeps them
            for the same reason.
        auto: name of the class of transformers that loads its models.
        auto_images: name of the one that loads models which read images besides and answer it, too,
            where they are given none.
        marks: what their names in `architectures` of a `config.json` contain.
        problem: their `problem_type` in it, where one class of transformers serves several tasks.
        pipeline: its name on the model hub.
        codec: that a build takes by default.
        plans: codecs that `plan` compares by default.
        label_columns: columns of a record that hold its labels by default; it may have one of them.
        hard: name of the loss with the hard labels, and its unit.
        divergences: losses between student and teacher that it knows, the default first; besides
            "policy-gradient", which is of labels that a model drew.
        forms: of the records that its rows are made of, besides `text`.
        packing: how documents become rows by default.
        perplexity: what the exponential of its cross-entropy is called; None where that has no
            meaning.
        heads: what stands over a token that has a label, and over its label.
    """

    noun: str
    answers: Answers
    auto: str
    marks: tuple[str, ...]
    pipeline: str
    per_token: bool = False
    causal: bool = False
    texts: bool = False
    codec: str = "dense"
    plans: tuple[str, ...] = ("dense", "dense:float16")
    auto_images: str | None = None
    source: bool = False
    words: bool = False
    problem: str | None = None
    label_columns: tuple[str, ...] = ("label",)
    hard: tuple[str, str] = ("cross-entropy", "nats")
    divergences: tuple[Divergence, ...] = ("forward-kl", "reverse-kl", "jsd", "mse")
    forms: tuple[str, ...] = ()
    packing: str = "none"
    perplexity: str | None = None
    heads: tuple[str, str] = ("token", "label")

    @property
    def rereads(self) -> bool:
        """Whether a student with a tokenizer of its own can read the rows: they keep the input."""
        return self.texts or self.words

    @property
    def over_ids(self) -> bool:
        """Whether an answer is a distribution over the ids of a vocabulary."""
        return self.answers == "ids"

    @property
    def distribution(self) -> bool:
        """Whether an answer is a distribution, over ids or over classes."""
        return self.over_ids or self.answers == "classes"

    @property
    def has_temperature(self) -> bool:
        """Whether an answer is of probabilities, which a temperature changes."""
        return self.answers != "score"

    @property
    def named(self) -> bool:
        """Whether an answer is over classes that have names."""
        return self.answers in ("classes", "labels")


_IDS: dict[str, Any] = {
    "answers": "ids",
    "per_token": True,
    "codec": "sample:20",
    "plans": ("anchored:10", "anchored:20", "sample:10", "sample:20", "sample:40", "topk:64"),
}
# One class of transformers for all tasks of whole texts, which `problem` tells apart.
_TEXTS: dict[str, Any] = {
    "texts": True,
    "auto": "AutoModelForSequenceClassification",
    "marks": ("SequenceClassification",),
    "pipeline": "text-classification",
}

TASKS: Final[Mapping[str, TaskType]] = {
    CAUSAL_LM: TaskType(
        **_IDS,
        noun="causal language model",
        causal=True,
        auto="AutoModelForCausalLM",
        auto_images="AutoModelForImageTextToText",
        marks=("CausalLM", "LMHead"),
        pipeline="text-generation",
        forms=("messages", "prompt", "ids"),
        packing="concat",
        perplexity="perplexity",
        heads=("after", "next"),
    ),
    MASKED_LM: TaskType(
        **_IDS,
        noun="masked language model",
        auto="AutoModelForMaskedLM",
        marks=("MaskedLM", "XLMWithLMHead", "FlaubertWithLMHead"),
        pipeline="fill-mask",
        packing="concat",
        perplexity="pseudo-perplexity",
        heads=("reads", "was"),
    ),
    SEQ2SEQ_LM: TaskType(
        **_IDS,
        noun="sequence-to-sequence model",
        causal=True,
        source=True,
        auto="AutoModelForSeq2SeqLM",
        marks=(
            *("ConditionalGeneration", "MarianMTModel", "EncoderDecoderModel", "T5WithLMHead"),
            "ForTextToText",
        ),
        pipeline="text2text-generation",
        perplexity="perplexity",
        heads=("after", "next"),
    ),
    SEQUENCE_CLASSIFICATION: TaskType(
        **_TEXTS,
        noun="sequence classifier",
        answers="classes",
        problem="single_label_classification",
    ),
    TOKEN_CLASSIFICATION: TaskType(
        noun="token classifier",
        answers="classes",
        per_token=True,
        words=True,
        auto="AutoModelForTokenClassification",
        marks=("TokenClassification",),
        pipeline="token-classification",
        label_columns=("tags", "ner_tags", "labels"),
    ),
    MULTI_LABEL_CLASSIFICATION: TaskType(
        **_TEXTS,
        noun="multi-label classifier",
        answers="labels",
        problem="multi_label_classification",
        label_columns=("labels", "label"),
    ),
    REGRESSION: TaskType(
        **_TEXTS,
        noun="regression model",
        answers="score",
        problem="regression",
        label_columns=("label", "score"),
        hard=("error", "squared units, or Huber's"),
        divergences=("mse", "huber"),
    ),
}

OUTPUTS: Final[Mapping[Answers, str]] = {
    "ids": "ids",
    "classes": "classes",
    "labels": "classes",
    "score": "score",
}
"""What a model has an output for, by what its answers are over."""

_Labels = TypeVar("_Labels", bound=Any)


def labelled(labels: _Labels, task: str) -> _Labels:
    """Which labels are there.

    Args:
        labels: a numpy array or a tensor: integers of any shape, `IGNORE` where there is none, and
            `UNLABELLED` at a token that has a soft target alone: those of each token, or those of
            each row; for `labels` [rows, classes], 0 or 1 or `IGNORE` of each class; for a `score`
            floats [rows], NaN where there is none.

    Returns:
        bool, in the shape of `labels`; for `labels` [rows], True where a class is known.
    """
    answers = TASKS[task].answers
    if answers == "score":
        there: Any = labels == labels
    else:
        there = (labels != IGNORE) & (labels != UNLABELLED)
    found: _Labels = there.any(-1) if answers == "labels" else there
    return found


def positions(labels: _Labels, task: str) -> _Labels:
    """Which labels have a soft target.

    Returns:
        bool, as `labelled`. Of the tokens of a row, those that have a label or are `UNLABELLED` are
        positions; of rows all are. Either way a transfer set has soft targets without hard labels.
    """
    found: Any = labels != IGNORE if TASKS[task].per_token else labelled(labels, task) | True
    every: _Labels = found
    return every


def check_position_share(figure: str, share: float, given: str) -> None:
    """Refuse what is not a share of positions by a figure of theirs.

    Args:
        given: what is wrong then, the beginning of the message.

    Raises:
        UsageError: it is none.
    """
    if figure not in get_args(PositionFigure) or not 0 < share <= 1:
        raise UsageError(
            f"{given}, expected {', '.join(get_args(PositionFigure))} and a share above 0, at "
            "most 1, such as student-entropy:0.2."
        )


def share_of(number: int, share: float) -> int:
    """That share of a number, 0 to 1, rounded with a half upwards, and 1 at least.

    Of the share as it is written: in binary 0.29 of 50 falls short of 14.5.
    """
    return max(1, int(Fraction(str(float(share))) * number + Fraction(1, 2)))


def check_task(task: str) -> None:
    """Refuse a task that is none of the table.

    Raises:
        UsageError: it is not known.
    """
    if task not in TASKS:
        raise UsageError(f"the task is {task!r}, expected one of {', '.join(TASKS)}.")


def task_of(config: Mapping[str, Any]) -> str | None:
    """The task of a Hugging Face model by its `config.json`, or None if that does not say."""
    for task, kind in sorted(TASKS.items(), key=lambda item: item[1].causal - item[1].source):
        if _has_mark(config, kind) and kind.problem in (None, _problem(config)):
            return task
    return None


def could_be(config: Mapping[str, Any], task: str) -> bool:
    """Whether a Hugging Face model may be one for a task, by its `config.json`.

    One without a `problem_type` may be for several tasks, of which `task_of` names the likeliest.
    """
    kind, named = TASKS[task], config.get("problem_type")
    return _has_mark(config, kind) and (not named or kind.problem in (None, named))


def _has_mark(config: Mapping[str, Any], kind: TaskType) -> bool:
    names = " ".join(config.get("architectures") or ())
    reads_images = "vision_config" in config and not config.get("is_encoder_decoder")
    if kind.auto_images is not None and reads_images and "ConditionalGeneration" in names:
        return True
    if kind.source and not config.get("is_encoder_decoder"):
        return False  # models of images and sounds have such names, too
    return any(mark in names for mark in kind.marks)


def _problem(config: Mapping[str, Any]) -> str:
    """The `problem_type` of a classifier; without one that by which transformers would train it."""
    named = config.get("problem_type")
    if named:
        return str(named)
    labels = config.get("num_labels") or len(config.get("id2label") or ()) or 2
    return "regression" if labels == 1 else "single_label_classification"
