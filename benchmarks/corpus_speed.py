"""What becomes of text before the teacher: read, tokenised and packed, against `tokenizers` alone.

    python benchmarks/corpus_speed.py --text novels.jsonl.gz --table sst2/train.tsv [--markdown]

The text is written as each kind of file: JSON lines, plain and compressed, Parquet, and its ids. A
side of ours opens the corpus, reads it, and makes rows of 512 tokens, as a worker of a build does;
the other is `tokenizers`' own fastest call (`encode_batch_fast`, batches of 256) on the same texts
in memory, ids not taken out of it. Both count the text's tokens in a second of CPU time of one
core, alternating, and the medians are compared. The table is a corpus of short texts, once as
language-model rows and once as a classifier's, where both sides add special tokens and truncate.

Left out: writing the files, and training the tokenizer (a byte-level BPE of 32,000 ids on the text
itself, unless one is named). The files lie in the kernel's cache.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
from results import keep, machine, table
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kdcache.corpus import Corpus
from kdcache.rows import RowSpec, make_encoder

GOAL = 0.85
BATCH = 256
LENGTH = 512
SPAN_BYTES = 1 << 22


def trained(texts: Sequence[str]) -> Any:
    """A byte-level BPE of 32,000 ids."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=32_000, special_tokens=["<|end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )


def write(folder: Path, texts: Sequence[str], tokenizer: Any) -> dict[str, Path]:
    """The same texts, and their ids, as files of each kind."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    ids = [np.array(e.ids, np.int32) for e in encoded(tokenizer, texts, special=False)]
    paths = {
        kind: folder / f"text.{kind}" for kind in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")
    }
    paths["jsonl"].write_bytes(lines)
    paths["jsonl.gz"].write_bytes(gzip.compress(lines, 6))
    with pa.CompressedOutputStream(str(paths["jsonl.zst"]), "zstd") as stream:
        stream.write(lines)
    pq.write_table(pa.table({"text": texts}), paths["parquet"])
    paths["ids, parquet"] = folder / "ids.parquet"
    pq.write_table(pa.table({"input_ids": [one.tolist() for one in ids]}), paths["ids, parquet"])
    paths["ids, jsonl"] = folder / "ids.jsonl"
    paths["ids, jsonl"].write_text(
        "".join(json.dumps({"input_ids": one.tolist()}) + "\n" for one in ids)
    )
    paths["ids, bin"] = folder / "ids.idx"
    write_indexed(folder / "ids", ids)
    return paths


def write_indexed(path: Path, ids: Sequence[np.ndarray]) -> None:
    """A pair `.bin` and `.idx` of uint16, as Megatron-LM writes them."""
    sizes = np.array([len(one) for one in ids])
    header = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([8])
    counts = len(ids).to_bytes(8, "little") + (len(ids) + 1).to_bytes(8, "little")
    begins = 2 * (np.cumsum(sizes) - sizes)
    documents = np.arange(len(ids) + 1)
    parts = (sizes.astype("<i4"), begins.astype("<i8"), documents.astype("<i8"))
    path.with_suffix(".idx").write_bytes(header + counts + b"".join(p.tobytes() for p in parts))
    path.with_suffix(".bin").write_bytes(np.concatenate(ids).astype("<u2").tobytes())


def encoded(tokenizer: Any, texts: Sequence[str], special: bool) -> list[Any]:
    """Encodings by the library alone."""
    library = tokenizer.backend_tokenizer
    return [
        one
        for at in range(0, len(texts), BATCH)
        for one in library.encode_batch_fast(texts[at : at + BATCH], add_special_tokens=special)
    ]


def theirs(tokenizer: Any, texts: Sequence[str], special: bool) -> Callable[[], int]:
    """The library's side; gives the tokens."""

    def run() -> int:
        library, tokens = tokenizer.backend_tokenizer, 0
        for at in range(0, len(texts), BATCH):
            found = library.encode_batch_fast(texts[at : at + BATCH], add_special_tokens=special)
            tokens += sum(map(len, found))
        return tokens

    return run


def ours(path: Path, spec: RowSpec, tokenizer: Any, columns: Sequence[str] | None) -> Any:
    """Our side; gives the tokens in rows."""

    def run() -> int:
        corpus = Corpus.open([str(path)], span_bytes=SPAN_BYTES, columns=columns)
        tokens = 0
        for span in corpus.spans:
            encoder = make_encoder(spec, tokenizer)
            rows = list(encoder.encode(Corpus.read(span, columns=spec.columns)))
            tokens += sum(len(row.input_ids) for row in rows)
        return tokens

    return run


def compare(
    ours: Callable[[], int], theirs: Callable[[], int], rounds: int, tokens: int
) -> tuple[float, float]:
    """Tokens of the text a second of CPU time on each side, the median of alternating rounds."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, times in zip((ours, theirs), seconds, strict=True):
            begin = time.process_time()
            side()
            times.append(time.process_time() - begin)
    own, other = (tokens / statistics.median(times) for times in seconds)
    return own, other


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, help="JSONL file (or .gz) with a column `text`")
    parser.add_argument("--table", required=True, help="TSV file of text and label, no header")
    parser.add_argument("--tokenizer", help="folder; default: one is trained on the text")
    parser.add_argument("--classifier", required=True, help="folder of a classifier's tokenizer")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--characters", type=int, default=3_000_000, help="of the text, about")
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    options = parser.parse_args()
    named = ("text", "label")
    texts, short = (
        [
            record.values["text"]
            for span in Corpus.open([path], span_bytes=1 << 40, columns=columns).spans
            for record in Corpus.read(span)
        ]
        for path, columns in ((options.text, None), (options.table, named))
    )
    texts = texts[: -(-len(texts) * options.characters // max(1, sum(map(len, texts))))]
    tokenizer = (
        AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else trained(texts)
    )
    classifier = AutoTokenizer.from_pretrained(options.classifier)
    plain = RowSpec("causal-lm", max_length=LENGTH)
    ids = RowSpec("causal-lm", max_length=LENGTH, record_form="ids")
    classes = RowSpec("sequence-classification", max_length=128)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            (kind, path, ids if "ids" in kind else plain, tokenizer, texts, None)
            for kind, path in write(Path(folder), texts, tokenizer).items()
        ]
        table_path = Path(options.table)
        cases += [
            ("tsv, short texts", table_path, plain, tokenizer, short, named),
            ("tsv, a classifier's", table_path, classes, classifier, short, named),
        ]
        for kind, path, spec, how, text, columns in cases:
            special = spec is classes
            other = theirs(how, text, special)
            tokens = other()
            own, library = compare(ours(path, spec, how, columns), other, options.rounds, tokens)
            ratio = own / library
            reached = "yes" if ratio >= GOAL else "**no**"
            lines.append(
                [kind, f"{own / 1e6:.2f} M", f"{library / 1e6:.2f} M", f"{ratio:.2f}", reached]
            )
            print(*lines[-1], flush=True)
    header = ["corpus", "ours, tokens/s", "tokenizers, tokens/s", "ratio", f"goal: {GOAL}"]
    of = Path(options.tokenizer).name if options.tokenizer else "a BPE of 32,000 ids"
    text = (
        f"`python benchmarks/corpus_speed.py --text {Path(options.text).name} --table "
        f"{Path(options.table).name} --classifier {Path(options.classifier).name}`: read, "
        f"tokenised and packed by one core, against `encode_batch_fast` of tokenizers "
        f"{tokenizers.__version__} on the same texts in memory ({len(texts):,} of "
        f"{sum(map(len, texts)):,} characters, {len(short):,} short ones); {of}; CPU time, "
        f"median of {options.rounds} alternating rounds; {machine()}.\n\n{table(header, lines)}"
    )
    if options.markdown:
        keep("corpus speed", text)


if __name__ == "__main__":
    main()
