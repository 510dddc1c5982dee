"""A saved model of any kind, for evaluation and prediction: rows in, logits out.

Hugging Face folders, the biLSTM's among them, are run by `kdcache.teacher.Teacher`, which projects
the vocabulary in slices and only at positions; students of a `module:function` by their own
forward, whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from kdcache.errors import UsageError
from kdcache.pretrained import tokenizer_sha256
from kdcache.rows import Row
from kdcache.rows.batches import pad_rows, padded
from kdcache.rows.spec import no_label
from kdcache.rows.words import tagged_row
from kdcache.student import (
    DistilledStudent,
    StudentInfo,
    load_student,
    word_tokenizer,
)
from kdcache.student.tokens import Tokenize, WordTokenize
from kdcache.tasks import (
    IGNORE,
    SEQUENCE_CLASSIFICATION,
    TASKS,
    could_be,
    positions,
    task_of,
)
from kdcache.teacher import Teacher, TeacherFiles, TeacherOptions
from kdcache.teacher.quirks import check_reach
from kdcache.teacher.trust import factory_of


def pick_device(name: str) -> str:
    """`auto` is the GPU if there is one, else the CPU."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class SavedModel:
    """The files of a student (or teacher) that was saved, before its weights are loaded.

    Attributes:
        name: as the user gave it.
    """

    name: str
    files: TeacherFiles

    @property
    def role(self) -> str:
        """`student` or `teacher`."""
        return self.files.role

    @property
    def who(self) -> str:
        """The model in messages."""
        return self.files.who

    @classmethod
    def find(
        cls, name: str, *, role: str = "student", trust_remote_code: bool = False
    ) -> SavedModel:
        """Locate a model: its folder, which may be that of a run, or a hub id.

        Raises:
            UsageError: there is none, or it has no safetensors weights.
        """
        files = TeacherFiles.find(name, role=role, trust_remote_code=trust_remote_code)
        return cls(name, files)

    @property
    def raw_config(self) -> dict[str, Any]:
        """`config.json` as it is."""
        return self.files.raw_config

    @property
    def steps(self) -> int | None:
        """Steps of the run that it is the student of; None of other models."""
        path = Path(self.files.folder) / "train.json"
        return int(json.loads(path.read_text())["result"]["steps"]) if path.is_file() else None

    @property
    def is_factory(self) -> bool:
        """Whether a `module:function` of the user makes this student."""
        return factory_of(self.raw_config) is not None

    @property
    def _info(self) -> dict[str, Any]:
        """What that function was given."""
        return dict((factory_of(self.raw_config) or {})["info"])

    @cached_property
    def task(self) -> str | None:
        """The task of the model, or None if its configuration does not say."""
        return str(self._info["task"]) if self.is_factory else task_of(self.raw_config)

    def check_task(self, task: str) -> None:
        """Refuse a model of another task."""
        other = self.task not in (None, task)
        if other and (self.is_factory or not could_be(self.raw_config, task)):
            raise UsageError(
                f"{self.who} was saved for {self.task}, but {task} is asked for. "
                f"Name a model for {task}."
            )
        if not self.is_factory:
            self.files.check_task(task)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The classes in the order of the logits."""
        if self.is_factory:
            info = self._info
            return tuple(map(str, info["label_names"] or range(info["num_labels"])))
        return self.files.label_names

    def vocab_size(self, task: str) -> int:
        """Number of its logits that are ids or classes."""
        if not TASKS[task].over_ids:
            return len(self.label_names)
        if self.is_factory:
            return int(self._info["vocab_size"])
        # Without a tokenizer padding and ids cannot be distinguished: all columns count.
        wide = int(self.files.config.get_text_config().vocab_size)
        return wide if self.tokenizer is None else self.files.vocab_size(task)

    def check_width(self, task: str, wanted: int) -> None:
        """Refuse a model that does not share the targets' ids or classes."""
        wide = self.vocab_size(task)
        over_ids = TASKS[task].over_ids
        if not self.is_factory and over_ids:
            wide = int(self.files.config.get_text_config().vocab_size)
        if wide < wanted or (not over_ids and wide > wanted):
            what = "ids" if over_ids else "classes" if TASKS[task].named else "outputs"
            raise UsageError(
                f"{self.who} knows {wide} {what}, the targets are over {wanted}. "
                "Both must share one vocabulary or one set of classes."
            )

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer, or None if it reads another model's ids."""
        return self.files.tokenizer if self.files.has_tokenizer else None

    @cached_property
    def tokenizer_sha256(self) -> str | None:
        """Identity of the tokenizer."""
        return None if self.tokenizer is None else tokenizer_sha256(self.tokenizer)

    @property
    def reach(self) -> int | None:
        """The most tokens that the model can read, or None if unbounded."""
        bounds = [self._named_length, None if self.is_factory else self.files.table]
        return min((bound for bound in bounds if bound), default=None)

    @property
    def _named_length(self) -> int | None:
        """The length that the configuration names, unless positions continue beyond it."""
        config = self.raw_config.get("encoder", self.raw_config)
        # Rotary positions continue beyond the trained ones; a table of positions ends.
        if any(name.startswith("rope_") for name in config):
            return None
        length = config.get("max_position_embeddings")
        length = config.get("max_decoder_position_embeddings") or length
        if not length and "relative_attention_num_buckets" not in config:
            length = config.get("n_positions")  # which a T5 names, and has no table of
        return None if not length else int(length)

    @cached_property
    def parameters(self) -> int:
        """Numbers in the saved weights; tied weights are saved once."""
        shapes: dict[str, list[int]] = {}
        for path in self.files.whole.glob("*.safetensors"):
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    shapes[key] = file.get_slice(key).get_shape()
        if self.files.adapter is not None:
            shapes |= self.files.adapter.shapes()
        return sum(math.prod(shape) for shape in shapes.values())

    def _own_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UsageError(
                f"{self.who} has no tokenizer: it reads the teacher's ids. "
                "Copy the teacher's tokenizer files into its folder."
            )
        return self.tokenizer

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int | None = None
    ) -> list[Row]:
        """Rows of texts, without labels, by the model's own tokenizer; cut to what it can read."""
        # Made by a function it tokenises by itself, if at all: only the lengths count.
        alone = self.tokenizer is None and self.is_factory
        own = word_reader() if alone else self._own_tokenizer()
        bounds = [n for n in (max_length, self.reach, own.model_max_length) if n is not None]
        encoded = own(
            list(texts),
            None if pairs is None else list(pairs),
            truncation=True,
            max_length=min([1 << 20, *bounds]),
            padding=False,
            return_attention_mask=False,
        )
        types = encoded.get("token_type_ids")
        nothing = no_label(self.task or SEQUENCE_CLASSIFICATION)
        # A text without tokens is one token to a model: that which begins a text, ends it or pads.
        special = (own.bos_token_id, own.eos_token_id, own.pad_token_id, 0)
        empty = next(token for token in special if token is not None)
        return [
            Row(
                input_ids=np.asarray(ids or [empty], np.int32),
                labels=nothing,
                type_ids=None if types is None else np.asarray(types[i] or [0], np.uint8),
                text=texts[i],
                text_pair=None if pairs is None else pairs[i],
            )
            for i, ids in enumerate(encoded["input_ids"])
        ]

    def encode_words(
        self, sentences: Sequence[Sequence[str]], labels: Sequence[np.ndarray]
    ) -> list[Row]:
        """Rows of words by the model's own tokenizer, whole.

        Args:
            sentences: the words of each row.
            labels: int32 [words] of each row, for their first tokens.

        Raises:
            UsageError: the model has no tokenizer, a word no token, or a row is too long.
        """
        read = WordTokenize(self._own_tokenizer()).read(sentences)
        return [
            tagged_row(words, own, found)
            for words, own, found in zip(sentences, labels, read, strict=True)
        ]

    def load(self, task: str, vocab_size: int, *, dtype: str, device: str) -> LoadedModel:
        """Load the weights.

        Args:
            task: what to load it for.
            vocab_size: width of the logits: columns beyond it are cut off.
            dtype: `float32`, `bfloat16` or `float16`.
            device: `cpu` or a CUDA device.

        Raises:
            UsageError: it gives fewer ids or classes than that.
        """
        self.check_task(task)
        self.check_width(task, vocab_size)
        if self.is_factory:
            info = StudentInfo(**self._info)
            trust = self.files.trust_remote_code
            student = load_student(str(self.files.folder), info, trust_remote_code=trust)
            tokenize = getattr(student, "tokenize", None)
            return LoadedModel(self, _own_forward(student, task, tokenize, device, vocab_size))
        options = self.loading(task, dtype=dtype, device=device)
        return LoadedModel(self, Teacher(options, vocab_size).logits)

    def loading(self, task: str, *, dtype: str, device: str) -> TeacherOptions:
        """How its weights are loaded, see `load`, by whatever loads those of teachers."""
        return TeacherOptions(
            names=(str(self.files.folder),),
            task=task,
            dtype=dtype,
            device=device,
            trust_remote_code=self.files.trust_remote_code,
            role=self.role,
        )


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model: rows in, logits out.

    Attributes:
        run: rows to slices of logits, one row a position in row-major order.
        order: which of its classes is each of the targets' classes; None where they agree.
    """

    saved: SavedModel
    run: Callable[[Sequence[Row]], Iterator[Tensor]]
    order: tuple[int, ...] | None = None

    def matching(self, names: Sequence[str] | None) -> LoadedModel:
        """This model with its classes in the order of `names`, if those are its own names."""
        own = self.saved.label_names if names is not None else ()
        if names is None or own == tuple(names) or set(own) != set(names):
            return self
        return replace(self, order=tuple(own.index(name) for name in names))

    def logits(
        self, rows: Sequence[Row], tokenizer: str | None, max_length: int
    ) -> Iterator[Tensor]:
        """Logits of all positions.

        Args:
            rows: a batch, encoded by any tokenizer.
            tokenizer: identity of that tokenizer; a classifier with another one reads the texts
                anew.
            max_length: most tokens of a row that is made anew.

        Raises:
            UsageError: a row is longer than the model's table of positions.
        """
        saved = self.saved
        own = saved.tokenizer is not None and saved.tokenizer_sha256 != tokenizer
        if own and rows[0].words is not None:
            rows = saved.encode_words(*_at_words(saved, rows))
        elif own and rows[0].text is not None:
            pairs = None if rows[0].text_pair is None else [row.text_pair or "" for row in rows]
            rows = saved.encode([row.text or "" for row in rows], pairs, max_length)
        longest = max(len(row.input_ids) for row in rows)
        source = max(0 if row.source is None else len(row.source) for row in rows)
        most = saved.files.source_reach if source and not saved.is_factory else None
        check_reach(saved.who, (longest, saved.reach), (source, most))
        for piece in self.run(rows):
            yield piece if self.order is None else piece[:, list(self.order)]


def _at_words(
    saved: SavedModel, rows: Sequence[Row]
) -> tuple[list[tuple[str, ...]], list[np.ndarray]]:
    """Words and labels of rows, for a model with a tokenizer of its own."""
    if any((row.labels[~_first(row)] != IGNORE).any() for row in rows):
        raise UsageError(
            f"{saved.who} has a tokenizer of its own, and the rows have targets at "
            "all tokens of a word (--label-tokens all). Use rows with those of the first alone."
        )
    return [row.words or () for row in rows], [row.labels[_first(row)] for row in rows]


def _first(row: Row) -> np.ndarray:
    assert row.first is not None, "rows of words mark their first tokens"
    return row.first


def word_reader() -> Any:
    """A stand-in for a tokenizer, for encoders of which only texts and labels are used."""
    return word_tokenizer(("a",))


def _own_forward(
    student: nn.Module,
    task: str,
    tokenize: Tokenize | None,
    device: str,
    vocab_size: int | None = None,
) -> Callable[[Sequence[Row]], Iterator[Tensor]]:
    """Run a student by its own forward, which gives the logits of all tokens of a batch."""
    whole = DistilledStudent(student, task).eval().to(device)
    per_token = TASKS[task].per_token

    @torch.inference_mode()
    def run(rows: Sequence[Row]) -> Iterator[Tensor]:
        inputs = {name: torch.from_numpy(ids) for name, ids in pad_rows(rows, 0).items()}
        if not per_token:
            nothing = torch.from_numpy(no_label(task, vocab_size))
            labels = nothing.repeat(len(rows), *[1] * (nothing.ndim - 1))
        else:
            lengths = np.array([len(row.labels) for row in rows])
            every = np.concatenate([row.labels for row in rows])
            labels = torch.from_numpy(padded(every, lengths, IGNORE))
        if tokenize is not None and rows[0].words is not None:
            inputs = dict(tokenize([row.words for row in rows], None))
            first = inputs.pop("first_tokens")
            labels = torch.full(first.shape, IGNORE)
            labels[first] = torch.from_numpy(
                np.concatenate([r.labels[_first(r)] for r in rows])
            ).long()
        elif tokenize is not None and rows[0].text is not None:
            pairs = None if rows[0].text_pair is None else [row.text_pair or "" for row in rows]
            inputs = dict(tokenize([row.text or "" for row in rows], pairs))
        inputs = {name: value.to(device) for name, value in inputs.items()}
        logits = whole(labels=labels.to(device), return_logits=True, **inputs).logits
        wanted = positions(labels, task).to(device)
        yield logits[wanted][:, :vocab_size] if per_token else logits

    return run
