"""What a student knows about its cache, and how one with its own tokenizer reads texts or words.

Tokens of the word-level tokenizer are runs of letters and digits (with inner apostrophes) and
single other characters; CJK characters are tokens one by one, as in BERT; white space separates and
is dropped. The vocabulary is the words of the training texts by falling count, ties by the word
itself, so it does not depend on the order of the texts. Word vectors are read from text files.

The tokenizer is one of `tokenizers`: `AutoTokenizer.from_pretrained` reads it without kdcache.
Cost: the texts are read once, and counted at some 10 MB/s.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from kdcache.errors import UsageError
from kdcache.pretrained import UnreadableError, read_tokenizer
from kdcache.rows.batches import padded
from kdcache.tasks import TASKS, check_task, task_of
from kdcache.teacher.quirks import reach
from kdcache.teacher.trust import factory_of

if TYPE_CHECKING:
    from kdcache.rows.words import ReadWords, WordReader


@dataclass(frozen=True)
class StudentInfo:
    """What a student must know about its cache.

    Attributes:
        vocab_size: ids of the cache's tokenizer.
        num_labels: outputs: classes of a classifier, 1 of a score.
        pad_id: id of padding in the cache's batches.
        texts: training texts for a word vocabulary; read once.
        tokenizer: the cache's tokenizer, to compare with a student's own.
        across: whether vocabulary and tokenizer are the student's and not the cache's.
        decoder_start: of a sequence-to-sequence cache: what its teacher's decoder reads first.
        mean: of scores: what a new head answers before it has learnt.
    """

    task: str
    vocab_size: int
    num_labels: int | None = None
    label_names: tuple[str, ...] | None = None
    pad_id: int = 0
    bos_id: int | None = None
    eos_id: int | None = None
    max_length: int = 512
    texts: Iterable[str] | None = None
    tokenizer: Any = None
    across: bool = False
    seed: int = 0
    decoder_start: int | None = None
    mean: float | None = None

    def __post_init__(self) -> None:
        check_task(self.task)
        if not TASKS[self.task].over_ids and not self.num_labels:
            raise UsageError("a classification student needs the number of classes (num_labels).")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the outputs as transformers has them, which names those without one, too."""
        return self.label_names or tuple(f"LABEL_{i}" for i in range(self.num_labels or 0))

    @classmethod
    def saved(cls, name: str, config: Mapping[str, Any]) -> StudentInfo:
        """The same from the `config.json` of a student that was trained.

        Raises:
            UsageError: it is not the folder of one.
        """
        made_by = factory_of(config)
        if made_by is not None:
            return cls(**made_by["info"])
        task = task_of(config)
        if task is None or not Path(name).is_dir():
            raise UsageError(
                f"{name} is not the folder of a trained student: its config.json names none of "
                f"the tasks {', '.join(TASKS)}. Name the --out of a kdcache train."
            )
        if TASKS[task].over_ids:
            text = config.get("text_config", config)
            start = config.get("decoder_start_token_id") if TASKS[task].source else None
            pad_id = text.get("pad_token_id") or 0
            return cls(task, int(text["vocab_size"]), pad_id=pad_id, decoder_start=start)
        names = {int(i): str(label) for i, label in config.get("id2label", {}).items()}
        labels = tuple(names[i] for i in sorted(names)) or ("LABEL_0", "LABEL_1")
        shown = labels if TASKS[task].named else None
        return cls(task, 0, len(labels), shown, config.get("pad_token_id") or 0)


def label_config(info: StudentInfo) -> dict[str, Any]:
    """What a classifier's `config.json` states of its outputs.

    `problem_type` only where that is not the default of as many outputs: what was written before
    other tasks existed stays the same.
    """
    kind = TASKS[info.task]
    if kind.over_ids:
        return {}
    found: dict[str, Any] = {
        "id2label": dict(enumerate(info.names)),
        "label2id": {name: i for i, name in enumerate(info.names)},
    }
    return found if kind.answers == "classes" else {**found, "problem_type": kind.problem}


_NO_BOUND = 1 << 20  # tokenizers without a longest row have a model_max_length beyond it

Tokenize = Callable[[Sequence[Any], Sequence[str] | None], Mapping[str, Tensor]]
"""Texts of a batch (and second texts) to tensors [B, L]; or sentences, each a list of words, to
tensors with a `first_tokens` bool [B, L] among them: the first token of each word."""


def student_tokenize(
    student: nn.Module, name: str, info: StudentInfo, *, trust_remote_code: bool = False
) -> Tokenize | None:
    """How a student turns texts or words into tensors, or None if it uses the cached ids.

    A module may bring a method `tokenize`, a new bilstm its words, a folder its tokenizer (none is
    needed if it is the cache's).

    """
    if not TASKS[info.task].rereads:
        return None
    own = getattr(student, "tokenize", None)
    if own is not None:
        return own  # type: ignore[no-any-return]
    tokenizer = getattr(student, "tokenizer", None) or tokenizer_of(name, trust_remote_code)
    if tokenizer is None or same_tokenizer(tokenizer, info.tokenizer):
        return None
    most = reach(student) or _NO_BOUND
    if TASKS[info.task].words:
        return WordTokenize(tokenizer, most)
    if tokenizer.pad_token_id is None:
        raise UsageError(
            f"the tokenizer of student {name} has no padding token, which batches of texts need. "
            "Set pad_token in its tokenizer_config.json, and pad_token_id in config.json."
        )
    return HfTokenize(tokenizer, min(info.max_length, most))


@dataclass(frozen=True)
class HfTokenize:
    """A Hugging Face tokenizer as a function from texts to padded tensors; longer rows are cut."""

    tokenizer: Any
    max_length: int

    def __call__(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> Mapping[str, Tensor]:
        """Tokenise a batch; int64 [B, L] each."""
        second = None if pairs is None else list(pairs)
        out = self.tokenizer(
            list(texts),
            second,
            truncation=True,
            max_length=self.max_length,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        return dict(out)


@dataclass(frozen=True)
class WordTokenize:
    """A fast tokenizer as a function from sentences of words to padded tensors.

    No row is cut, since each word has a target: one beyond the student's `reach` is refused.
    """

    tokenizer: Any
    reach: int = _NO_BOUND

    @cached_property
    def _reader(self) -> WordReader:
        from kdcache.rows.words import WordReader

        return WordReader(self.tokenizer)

    def read(self, sentences: Sequence[Sequence[str]]) -> list[ReadWords]:
        """The tokens of each sentence.

        Raises:
            UsageError: a word has no token, or a row is longer than the model's longest.
        """
        found: list[ReadWords] = []
        most = min(self.reach, self.tokenizer.model_max_length)
        for words, one in zip(sentences, self._reader.read(sentences), strict=True):
            if isinstance(one, str):
                raise UsageError(f"the student cannot read {words[:20]}: {one}.")
            if len(one.ids) > most:
                raise UsageError(
                    f"the student reads at most {most} tokens, and a row has {len(one.ids)} of its "
                    "tokens. Build with a smaller --max-length."
                )
            found.append(one)
        return found

    def __call__(
        self, sentences: Sequence[Sequence[str]], pairs: Sequence[str] | None = None
    ) -> Mapping[str, Tensor]:
        """Tokenise a batch; int64 [B, L] each, and `first_tokens` bool [B, L]."""
        rows = self.read(sentences)
        lengths = np.array([len(row.ids) for row in rows])

        def pad(columns: Sequence[np.ndarray], fill: int) -> Tensor:
            return torch.from_numpy(padded(np.concatenate(columns), lengths, fill))

        batch = {
            "input_ids": pad([row.ids for row in rows], self.tokenizer.pad_token_id or 0),
            "attention_mask": pad([np.ones(n, np.int64) for n in lengths], 0),
            "first_tokens": pad([row.first for row in rows], 0).bool(),
        }
        types = [row.type_ids for row in rows if row.type_ids is not None]
        if types:
            batch["token_type_ids"] = pad(types, 0)
        return batch


def tokenizer_of(name: str, trust: bool) -> Any:
    """The tokenizer of a folder, or None; a hub id's is not fetched for the comparison alone."""
    if not any(
        (Path(name) / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")
    ):
        return None
    try:
        return read_tokenizer(name, trust_remote_code=trust)
    except UnreadableError as error:
        raise UsageError(f"student {name} has no usable tokenizer: {error}.") from error


def same_tokenizer(a: Any, b: Any) -> bool:
    """Whether two tokenizers give the same ids."""
    if b is None:
        return False
    sample = "The Quick-brown fox, isn't it? Naïve 123."
    return bool(a.get_vocab() == b.get_vocab() and a(sample)["input_ids"] == b(sample)["input_ids"])


PAD, UNKNOWN, SEPARATOR = SPECIAL = ("<pad>", "<unk>", "<sep>")
_WORD = r"\w+(?:['\u2019]\w+)*|[^\w\s]"
_BATCH = 1024


def word_tokenizer(
    texts: Iterable[str],
    *,
    min_count: int = 1,
    max_words: int | None = None,
    lower: bool = True,
    max_length: int | None = 512,
    apart: bool = False,
) -> Any:
    """A tokenizer of the words of `texts`.

    Args:
        texts: training texts; read once.
        min_count: rarer words become unknown.
        max_words: keep at most so many words, the special ones included.
        lower: fold case.
        max_length: longest row in tokens; longer ones are cut.
        apart: each text is one word, whatever is in it; rows are lists of words.

    Returns:
        A `PreTrainedTokenizerFast`: id 0 pads, 1 is any unknown word, 2 separates a pair of texts.

    Raises:
        UsageError: no word is left.
    """
    words = Tokenizer(WordLevel(unk_token=UNKNOWN))
    words.normalizer = BertNormalizer(
        clean_text=False, handle_chinese_chars=not apart, strip_accents=False, lowercase=lower
    )
    if not apart:
        words.pre_tokenizer = Split(Regex(_WORD), "removed", invert=True)
    words.post_processor = TemplateProcessing(
        single="$A", pair=f"$A {SEPARATOR} $B:0", special_tokens=[(SEPARATOR, 2)]
    )
    trainer = WordLevelTrainer(
        vocab_size=2**31 if max_words is None else max(max_words, len(SPECIAL)),
        min_frequency=min_count,
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    words.train_from_iterator(texts, trainer)
    if words.get_vocab_size() == len(SPECIAL):
        raise UsageError(
            f"no word occurs {min_count} times or more in the training texts, so there is no "
            "vocabulary. Lower --bilstm min-count, or check that the cache holds the texts."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNKNOWN,
        sep_token=SEPARATOR,
        padding_side="right",
        **({} if max_length is None else {"model_max_length": max_length}),
        model_input_names=["input_ids", "attention_mask"],
        split_special_tokens=True,  # a text that spells <pad> out means the characters
    )


def unknown_share(tokenizer: Any, texts: Iterable[str]) -> float | None:
    """Share of a tokenizer's tokens of `texts` that are unknown; None where none can be."""
    unknown, total = 0, 0
    if tokenizer.unk_token_id is None:
        return None
    rest = iter(texts)
    while batch := list(islice(rest, _BATCH)):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            unknown += ids.count(tokenizer.unk_token_id)
            total += len(ids)
    return unknown / max(total, 1)


def read_embeddings(
    path: str | Path, words: Sequence[str], size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Read the vectors of `words` from a GloVe or word2vec text file (plain or .gz).

    A line is a word and its numbers, separated by blanks; word2vec's first line "count size" is
    optional. A word may itself contain blanks (GloVe 840B has some): the numbers are taken from the
    right. The first vector of a word counts. A word that is not in the file, such as one with a
    capital where the vectors are of lower-cased text, has the vector of its lower case.

    Args:
        path: the file.
        words: the vocabulary; all other words are passed over without parsing their numbers.
        size: expected numbers a word. Default: what the first line has.

    Returns:
        found bool [words], and vectors float32 [words, size], zero where not found.

    Raises:
        UsageError: no such file, not such a file, another size, or none of the words in it.
    """
    ids = {word: i for i, word in enumerate(words)}
    lowered = sorted({low for word in words if (low := word.lower()) not in ids})
    ids |= {word: len(words) + i for i, word in enumerate(lowered)}
    found = torch.zeros(len(ids), dtype=torch.bool)
    vectors: Tensor | None = None
    try:
        for number, line in _lines(path):
            parts = line.rstrip().split(" ")
            if number == 1 and len(parts) == 2 and all(p.isdigit() for p in parts):
                continue
            if vectors is None:
                width = len(parts) - 1 if size is None else size
                if len(parts) - 1 < max(width, 1):
                    raise UsageError(
                        f"{path}, line {number}: {len(parts) - 1} numbers after the word, "
                        f"expected {width}. Give --bilstm embedding-size as the file has it."
                    )
                if size is None and width < 2:
                    raise UsageError(
                        f"{path} is not a text file of word vectors: line {number} is "
                        f"{line[:60]!r}."
                    )
                vectors = torch.zeros((len(ids), width))
            index = ids.get(" ".join(parts[: -vectors.shape[1]]))
            if index is None or found[index]:
                continue
            vectors[index] = torch.tensor([float(p) for p in parts[-vectors.shape[1] :]])
            found[index] = True
    except FileNotFoundError as error:
        raise UsageError(f"embeddings {path}: no such file.") from error
    except (ValueError, gzip.BadGzipFile, EOFError) as error:
        raise UsageError(
            f"embeddings {path}: not a GloVe or word2vec text file ({error})."
        ) from error
    if vectors is None or not found.any():
        width = 0 if vectors is None else vectors.shape[1]
        raise UsageError(
            f"embeddings {path}: none of the {len(words)} words of the vocabulary is in it with "
            f"{width} numbers a word. Check the language, the case and --bilstm embedding-size."
        )
    own = [i if found[i] else ids[word.lower()] for i, word in enumerate(words)]
    return found[own], vectors[own]


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    # newline="\n": some vocabularies hold Unicode line separators inside words.
    with opener(path, "rt", encoding="utf-8", newline="\n") as file:
        yield from enumerate(file, 1)
