"""What planning a corpus of 100,000 files takes: seconds and memory of the process that does it.

    python benchmarks/planning.py --tokenizer SMOLLM2 --text novels.jsonl.gz [--markdown]

Corpora of JSONL, gzipped JSONL and Parquet files in equal parts are made of passages of the text:
more files, and longer ones. A fresh process plans each the way a build does: lists the files and
cuts them into spans, hashes both ends of each file (their identity), counts the rank table, and
puts all spans into the driver's queue.
Loading the tokenizer is not in it. The files were written just before: they lie in the kernel's
cache, and a disk or an object store adds its own time for two short reads a file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice, pairwise
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pyarrow as pa
import pyarrow.parquet as pq
from results import keep, machine, memory_mib, table
from transformers import AutoTokenizer

from kdcache.commands.build.driver import SpansLeft
from kdcache.commands.build.prepare import count_ranks
from kdcache.corpus import Corpus
from kdcache.rows import RowSpec

CORPORA = ((1_000, 1), (10_000, 1), (10_000, 10), (100_000, 1))
"""Files, and passages in each."""

SPAN_BYTES = 1 << 22


def make(folder: Path, texts: list[str], files: int, passages: int) -> int:
    """Write a corpus; returns its bytes."""
    endless = cycle(texts)
    size = 0
    for number in range(files):
        some = list(islice(endless, passages))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in some).encode()
        path = folder / f"{number:06}"
        if number % 3 == 0:
            path = path.with_suffix(".jsonl")
            path.write_bytes(lines)
        elif number % 3 == 1:
            path = path.with_suffix(".jsonl.gz")
            path.write_bytes(gzip.compress(lines, 1))
        else:
            path = path.with_suffix(".parquet")
            pq.write_table(pa.table({"text": some}), path)
        size += path.stat().st_size
    return size


def plan(folder: str, tokenizer_folder: str) -> dict[str, float]:
    """Plan a corpus in this process: seconds of each step, spans, MiB above what it had before."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    cpu = time.process_time()
    before = memory_mib(most=False)
    times = [time.perf_counter()]
    corpus = Corpus.open([folder], span_bytes=SPAN_BYTES)
    times.append(time.perf_counter())
    corpus.identity()
    times.append(time.perf_counter())
    count_ranks(corpus, RowSpec("causal-lm"), tokenizer, len(tokenizer))
    times.append(time.perf_counter())
    queue = SpansLeft(lambda span: corpus.spans[span].group)
    for span in range(len(corpus.spans)):
        queue.append(span)
    times.append(time.perf_counter())
    peak = memory_mib()
    listed, tagged, ranked, queued = (b - a for a, b in pairwise(times))
    return {
        "spans": len(corpus.spans),
        "listed": listed,
        "tagged": tagged,
        "ranked": ranked,
        "queued": queued,
        "cpu": time.process_time() - cpu,
        "memory": max(0.0, peak - before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="folder")
    parser.add_argument("--text", help="JSONL file (or .gz) with a column `text`")
    parser.add_argument("--one", help="plan this folder and print the figures as JSON")
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(plan(options.one, options.tokenizer)))
        return
    if not options.text:
        parser.error("--text is missing")
    text_spans = Corpus.open([options.text], span_bytes=1 << 40).spans
    texts = [record.values["text"] for span in text_spans for record in Corpus.read(span)]
    lines = []
    for files, passages in CORPORA:
        with tempfile.TemporaryDirectory() as folder:
            size = make(Path(folder), texts, files, passages)
            words = [sys.executable, __file__, "--tokenizer", options.tokenizer, "--one", folder]
            found = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
        seconds = [found["listed"], found["tagged"], found["ranked"], found["queued"]]
        lines.append(
            [
                f"{files:,}",
                f"{size / 1e6:,.0f} MB",
                f"{found['spans']:,}",
                *(f"{value:.2f} s" for value in (*seconds, sum(seconds), found["cpu"])),
                f"{found['memory']:.0f} MiB",
            ]
        )
    header = ["files", "size", "spans", "listed and cut", "identity", "ranks"]
    header += ["queue", "together", "its CPU", "memory"]
    text = (
        f"`python benchmarks/planning.py --tokenizer {Path(options.tokenizer).name} --text "
        f"{Path(options.text).name}`: a third each of JSONL, gzipped JSONL and Parquet; memory "
        f"above imports and tokenizer; {machine()}.\n\n{table(header, lines)}"
    )
    print(text)
    if options.markdown:
        keep("planning", text)


if __name__ == "__main__":
    main()
