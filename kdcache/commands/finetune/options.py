"""The options of `finetune`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from kdcache.commands.groups import LearningOptions, LoraOptions, form_problems
from kdcache.commands.row_options import ChatOptions, IdOptions, PairRowOptions
from kdcache.options import again, option, problems_of
from kdcache.row_groups import ChatGroup, IdGroup, LengthGroup
from kdcache.tasks import SEQUENCE_CLASSIFICATION, TASKS, ClassWeights, Task


@dataclass(frozen=True)
class FinetuneOptions(LoraOptions, LearningOptions, PairRowOptions):
    """What a fine-tuning takes: fields have the names of the command's options."""

    first = (
        *("model", "corpus", "eval_corpus", "out", "task", "max_length", "epochs", "batch_size"),
        *("learning_rate", "lora"),
    )
    unused = (ChatGroup, ChatOptions, IdGroup, IdOptions)  # of language models

    model: str = option(
        help="folder or hub id of the encoder, or of a sequence-to-sequence model.",
        metavar="DIR_OR_HUB_ID",
    )
    corpus: tuple[str, ...] = option(
        help="files, folders, globs or URLs with texts and labels.", metavar="PATH_OR_URL_OR_GLOB"
    )
    out: str = option(help="folder of the teacher.", metavar="TEACHER", output=True)
    eval_corpus: tuple[str, ...] = option(
        (),
        help="files to evaluate on after each epoch; the best epoch becomes the teacher.",
        metavar="PATH_OR_URL_OR_GLOB",
    )
    _: KW_ONLY
    task: Task = option(
        SEQUENCE_CLASSIFICATION,
        help="the task: what the teacher predicts.",
        metavar="sequence-classification|multi-label-classification|regression|"
        "token-classification|seq2seq-lm",
    )
    label_names: tuple[str, ...] | None = option(
        None,
        help="the classes in order. Default: as found in the corpus, numbers in their order, names "
        "in alphabetical order.",
        metavar="NAME",
        comma=True,
    )
    max_length: int | None = again(
        LengthGroup,
        "max_length",
        None,
        help="tokens of the longest row, at most what the model reads. Default: 128, or what the "
        "model reads if that is less.",
    )
    epochs: float = again(LearningOptions, "epochs", 3.0)
    learning_rate: float | None = again(
        LearningOptions,
        "learning_rate",
        None,
        help="peak. Default: 5e-5, or 1e-3 with `train_last`, 2e-4 for an adapter.",
    )
    warmup: float = again(LearningOptions, "warmup", 0.1)
    patience: int | None = option(
        None,
        help="stop after so many epochs without a better one on `eval_corpus` (optional).",
        at_least=1,
    )
    class_weights: ClassWeights = option(
        "equal",
        help="weights of the classes in the loss; `balanced`: each class counts the same, however "
        "many rows it has.",
    )
    freeze: int | None = option(
        None,
        help="leave the embeddings and this many of the encoder's first layers as they are "
        "(optional; 0: the embeddings alone).",
        at_least=0,
    )
    train_last: int | None = option(
        None,
        help="train only the head and this many of the encoder's last parameter tensors.",
        at_least=0,
    )
    head_width: int | None = option(
        None,
        help="units of a ReLU layer before the classes. Default: the architecture's own head.",
        at_least=1,
    )
    head_dropout: float = option(
        0.1, help="dropout before the layers of that head.", at_least=0, below=1
    )

    def conflicts(self) -> list[str]:
        """See `Options.conflicts`."""
        problems = form_problems(self.record_form, self.task)
        kind = TASKS[self.task]
        if kind.over_ids and not kind.source:
            problems.append(
                f"--task is {self.task}, and finetune trains classifiers, scorers and "
                "sequence-to-sequence models. Train a language model with transformers or TRL, and "
                "name its folder as --teacher."
            )
        if kind.source:
            given = {
                "--head-width": self.head_width,
                "--train-last": self.train_last,
                "--freeze": self.freeze,
            }
            problems += [
                f"{flag} is for encoders with a head. Leave it out for {self.task}."
                for flag, value in given.items()
                if value is not None
            ]
        if TASKS[self.task].words and self.head_width is not None:
            problems.append("--head-width is for classifiers of whole texts. Leave it out.")
        if TASKS[self.task].answers != "classes" and self.class_weights != "equal":
            problems.append("--class-weights is for one class a text or word. Leave it out.")
        if not TASKS[self.task].named and self.label_names is not None:
            what = "a score" if kind.answers == "score" else "a text that is written"
            problems.append(f"--label-names is for classes, and {what} has none. Leave it out.")
        if self.patience is not None and not self.eval_corpus:
            problems.append("--patience waits for a better epoch on --eval-corpus: name one.")
        if self.freeze is not None and self.train_last is not None:
            problems.append("--freeze and --train-last choose what is trained: give one of them.")
        problems += problems_of(lambda: self.adapter)
        if self.lora is not None and (self.freeze, self.train_last) != (None, None):
            problems.append("--lora freezes all of the encoder: leave out --freeze, --train-last.")
        if self.lora is not None and self.head_width is not None:
            problems.append(
                "--head-width makes another model than its base, and an adapter needs the base as "
                "it is: leave out --lora or --head-width."
            )
        return problems
