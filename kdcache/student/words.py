"""A word-level vocabulary, and pretrained word vectors for it.

Tokens are runs of letters and digits (with inner apostrophes) and single other characters; white
space separates and is dropped. The vocabulary is the words of the training texts by falling count,
ties by the word itself, so it depends on the texts alone and not on their order.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kdcache.errors import UsageError

PAD, UNKNOWN, SEPARATOR = "<pad>", "<unk>", "<sep>"
_WORD = re.compile("\\w+(?:['\u2019]\\w+)*|[^\\w\\s]")


@dataclass(frozen=True)
class Vocabulary:
    """Words and their ids (their index in `words`); id 0 pads, 1 is any unknown word, 2 separates a
    pair of texts.

    Attributes:
        words: all words, the three special ones first.
        lower: whether texts are lower-cased before they are looked up.
        max_length: longest row in tokens; longer ones are cut at the end.
    """

    words: tuple[str, ...]
    lower: bool = True
    max_length: int = 512

    def __post_init__(self) -> None:
        if self.words[:3] != (PAD, UNKNOWN, SEPARATOR):
            raise UsageError(
                f"a vocabulary starts with {PAD}, {UNKNOWN}, {SEPARATOR}, not {self.words[:3]}."
            )
        if self.max_length < 1:
            raise UsageError(f"max_length is {self.max_length}; a row needs at least one token.")
        object.__setattr__(self, "_ids", {word: i for i, word in enumerate(self.words)})

    @classmethod
    def build(
        cls,
        texts: Iterable[str],
        *,
        min_count: int = 1,
        max_size: int | None = None,
        lower: bool = True,
        max_length: int = 512,
    ) -> Vocabulary:
        """Collect the words of `texts`.

        Args:
            texts: training texts; read once.
            min_count: rarer words become unknown.
            max_size: keep at most so many words, the special ones included.
            lower: fold case.
            max_length: see the class.

        Raises:
            UsageError: no word is left.
        """
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(split_words(text, lower))
        kept = sorted(
            (w for w, n in counts.items() if n >= min_count), key=lambda w: (-counts[w], w)
        )
        if max_size is not None:
            kept = kept[: max(max_size - 3, 0)]
        if not kept:
            raise UsageError(
                f"no word occurs {min_count} times or more in the training texts, so there is no "
                "vocabulary. Lower min_count, or check that the cache holds the texts."
            )
        return cls((PAD, UNKNOWN, SEPARATOR, *kept), lower=lower, max_length=max_length)

    def __len__(self) -> int:
        return len(self.words)

    def ids(self, text: str, pair: str | None = None) -> list[int]:
        """Token ids of a text, or of two with a separator between: from 1 to `max_length`."""
        table: dict[str, int] = self._ids  # type: ignore[attr-defined]
        ids = [table.get(word, 1) for word in split_words(text, self.lower)]
        if pair is not None:
            ids += [2, *(table.get(word, 1) for word in split_words(pair, self.lower))]
        return ids[: self.max_length] or [1]

    def __call__(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Tokenise a batch.

        Returns:
            ``input_ids`` int64 [B, L], right-padded with 0, and ``attention_mask`` int64 [B, L].
        """
        rows = [self.ids(text, None if pairs is None else pairs[i]) for i, text in enumerate(texts)]
        input_ids = torch.zeros((len(rows), max(map(len, rows), default=1)), dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return {"input_ids": input_ids, "attention_mask": mask}

    def save(self, path: str | Path) -> None:
        """Write `vocab.json`: readable, one object."""
        value = {"lower": self.lower, "max_length": self.max_length, "words": self.words}
        Path(path).write_text(
            json.dumps(value, ensure_ascii=False, indent=0) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read what `save` wrote.

        Raises:
            UsageError: the file is not one.
        """
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(tuple(value["words"]), lower=value["lower"], max_length=value["max_length"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path} is not a vocabulary of kdcache ({error}). Train the student again."
            ) from error


def split_words(text: str, lower: bool = True) -> list[str]:
    """Words and single punctuation marks of a text."""
    return _WORD.findall(text.lower() if lower else text)


def read_embeddings(
    path: str | Path, words: Sequence[str], size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Read the vectors of `words` from a GloVe or word2vec text file (plain or .gz).

    A line is a word and its numbers, separated by blanks; word2vec's first line "count size" is
    optional. A word may itself contain blanks (GloVe 840B has some): the numbers are taken from the
    right. The first vector of a word counts.

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
    found = torch.zeros(len(words), dtype=torch.bool)
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
                        f"expected {width}. Give --embedding-size as the file has it."
                    )
                if size is None and width < 2:
                    raise UsageError(
                        f"{path} is not a text file of word vectors: line {number} is "
                        f"{line[:60]!r}."
                    )
                vectors = torch.zeros((len(words), width))
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
            f"{width} numbers a word. Check the language, the case and --embedding-size."
        )
    return found, vectors


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    # newline="\n": some vocabularies hold Unicode line separators inside words.
    with opener(path, "rt", encoding="utf-8", newline="\n") as file:
        yield from enumerate(file, 1)
