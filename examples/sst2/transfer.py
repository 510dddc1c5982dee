"""A transfer set: new texts that only the teacher labels, by the rules of Tang et al. 2019, 3.3.

Each word is replaced by `[MASK]` with probability `mask`, or else, with probability `pos`, by a
word of the same part of speech, drawn by its frequency in the corpus. Of the result an n-gram is
taken with probability `ngram`. Duplicates, and the texts of the corpus, are left out.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

MASK = "[MASK]"


@dataclass(frozen=True)
class Rules:
    """How a sentence is varied.

    Attributes:
        variants: attempts for each sentence (the paper: 20).
        mask: probability that a word is masked.
        pos: probability that it is replaced by one of the same part of speech.
        ngram: probability that only an n-gram is kept.
        shortest: words of the shortest n-gram.
        longest: words of the longest n-gram.
    """

    variants: int = 20
    mask: float = 0.1
    pos: float = 0.1
    ngram: float = 0.25
    shortest: int = 1
    longest: int = 5

    def __post_init__(self) -> None:
        shares = (self.mask, self.pos, self.ngram)
        if not all(0 <= p <= 1 for p in shares) or self.mask + self.pos > 1:
            raise ValueError("mask, pos and ngram are probabilities, mask + pos at most 1.")
        if self.variants < 1 or not 1 <= self.shortest <= self.longest:
            raise ValueError("variants must be at least 1, and 1 <= shortest <= longest.")


# The paper's corpus has every phrase of a parse tree as a row. A corpus of sentences has none, so a
# second set makes phrases alone: short texts on which a teacher is less sure than on sentences.
PAPER = Rules()
PHRASES = Rules(ngram=1.0, shortest=2, longest=10)


def transfer_set(
    sentences: Sequence[Sequence[str]],
    tags: Sequence[Sequence[str]] | None,
    rules: Rules,
    seed: int = 0,
) -> list[str]:
    """New texts, sorted: the same for the same sentences, tags, rules and seed.

    Args:
        sentences: the words of each.
        tags: the part of speech of each word; None: no word is replaced by another.
        rules: how they are varied.
        seed: of the random choices.

    Raises:
        ValueError: sentences and tags differ in length.
    """
    known = {" ".join(words) for words in sentences}
    found = set(_variants(sentences, tags, rules, random.Random(seed)))
    return sorted(found - known - {""})


def _variants(
    sentences: Sequence[Sequence[str]],
    tags: Sequence[Sequence[str]] | None,
    rules: Rules,
    rng: random.Random,
) -> Iterator[str]:
    same = None if tags is None else _by_tag(sentences, tags)
    for i, words in enumerate(sentences):
        for _ in range(rules.variants):
            new = list(words)
            for j in range(len(new)):
                x = rng.random()
                if x < rules.mask:
                    new[j] = MASK
                elif x < rules.mask + rules.pos and same is not None and tags is not None:
                    choice, weights = same[tags[i][j]]
                    new[j] = rng.choices(choice, cum_weights=weights)[0]
            if new and rng.random() < rules.ngram:
                n = min(len(new), rng.randint(rules.shortest, rules.longest))
                start = rng.randrange(len(new) - n + 1)
                new = new[start : start + n]
            yield " ".join(new)


def _by_tag(
    sentences: Sequence[Sequence[str]], tags: Sequence[Sequence[str]]
) -> dict[str, tuple[list[str], list[int]]]:
    """Words of each part of speech, with their summed counts."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for words, marks in zip(sentences, tags, strict=True):
        for word, mark in zip(words, marks, strict=True):
            counts[mark][word] += 1
    tables = {}
    for mark, words_of in counts.items():
        total, sums = 0, []
        for count in words_of.values():
            total += count
            sums.append(total)
        tables[mark] = (list(words_of), sums)
    return tables


def part_of_speech(sentences: Iterable[Sequence[str]], pipeline: str) -> list[list[str]]:
    """Fine-grained part-of-speech tags by a pipeline of spaCy.

    Args:
        sentences: the words of each; they stay as they are.
        pipeline: name or folder of one with a tagger, such as `en_core_web_sm`.
    """
    try:
        import spacy
        from spacy.tokens import Doc
    except ImportError:
        raise SystemExit("--tagger needs spaCy: pip install spacy") from None
    tagger = spacy.load(pipeline, exclude=["parser", "ner", "lemmatizer"])
    documents = (Doc(tagger.vocab, words=list(words)) for words in sentences)
    return [[word.tag_ for word in document] for document in tagger.pipe(documents)]
