"""A word-level tokenizer, and pretrained word vectors for its words.

Tokens are runs of letters and digits (with inner apostrophes) and single other characters; CJK
characters are tokens one by one, as in BERT; white space separates and is dropped. The vocabulary
is the words of the training texts by falling count, ties by the word itself, so it depends on the
texts alone and not on their order.

The tokenizer is one of `tokenizers`: `AutoTokenizer.from_pretrained` reads it without kdcache.
Cost: the texts are read once, and counted at some 10 MB/s.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kdcache.errors import UsageError

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
            "vocabulary. Lower --min-count, or check that the cache holds the texts."
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
                        f"expected {width}. Give --embedding-size as the file has it."
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
            f"{width} numbers a word. Check the language, the case and --embedding-size."
        )
    own = [i if found[i] else ids[word.lower()] for i, word in enumerate(words)]
    return found[own], vectors[own]


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    # newline="\n": some vocabularies hold Unicode line separators inside words.
    with opener(path, "rt", encoding="utf-8", newline="\n") as file:
        yield from enumerate(file, 1)
