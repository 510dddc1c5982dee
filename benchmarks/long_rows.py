"""Rows of 131,072 tokens: the memory of a build and of training, against shorter rows.

    python benchmarks/long_rows.py --text novels.jsonl.gz --tokenizer STORIES260K [--markdown]

The text is cut into documents a little longer than a row, so that each makes one full row and is
counted as cut: 262,144 tokens in all, two rows at the longest. The teacher is a random Llama of one
layer and one head of 16, small enough for a quarter of a million positions of attention on a CPU;
its vocabulary is the tokenizer's. Each build and each training step runs in a process of its own,
whose peak is the kernel's own high-water mark. The weights and the cache are a few megabytes, so
the rest of a peak is Python with torch, and what a row takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from results import keep, machine, memory_mib, table

LENGTHS = (16_384, 131_072)
TOKENS = 262_144
STUDENT = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": True,
    "max_position_embeddings": 131_072, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def prepare(folder: Path, text: str, tokenizer_name: str) -> None:
    """A teacher, a student's configuration, and a corpus for each length."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from kdcache.corpus import Corpus

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    config = LlamaConfig(**STUDENT, vocab_size=len(tokenizer), initializer_range=0.3)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    (folder / "student.json").write_text(json.dumps(STUDENT))
    whole: list[str] = []
    for span in Corpus.open([text], span_bytes=1 << 40).spans:
        for record in Corpus.read(span):
            whole.append(record.values["text"])
            if sum(map(len, whole)) > 8 * TOKENS:
                break
    joined = "\n".join(whole)
    places = tokenizer(
        joined, return_offsets_mapping=True, add_special_tokens=False, verbose=False
    )["offset_mapping"]
    for length in LENGTHS:
        step = length + length // 16
        cuts = [places[i * step][0] for i in range(TOKENS // length + 1)]
        lines = (json.dumps({"text": joined[a:b]}) for a, b in pairwise(cuts))
        (folder / f"{length}.jsonl").write_text("\n".join(lines) + "\n")


def one(what: str, length: int, folder: Path) -> dict[str, Any]:
    """Run a build or a training of one step in this process."""
    import kdcache
    from kdcache.commands.build.options import BuildOptions
    from kdcache.commands.train.options import TrainOptions
    from kdcache.errors import UsageError

    cache = str(folder / f"cache-{length}")
    begin = time.process_time()
    found: dict[str, Any] = {}
    options = BuildOptions(
        (str(folder / "teacher"),), (str(folder / f"{length}.jsonl"),), cache, codec="topk:8",
        max_length=length, packing="none", workers=0,
    )  # fmt: skip
    if what == "build":
        result = kdcache.build(options)
        opened = kdcache.Cache.open(cache)
        data = [opened.read(shard, targets=False) for shard in range(opened.spec.spans)]
        found = {
            "rows": sum(map(len, data)),
            "longest": max(len(d.row(i).input_ids) for d in data for i in range(len(d))),
            "spans": opened.spec.spans,
            "positions": opened.manifest.positions,
            "cut": result.truncated,
        }
    elif what == "train":
        result = kdcache.train(
            TrainOptions(
                cache=(cache,), student=str(folder / "student.json"), batch_size=1, max_steps=1,
                out=str(folder / f"run-{length}"),
            )
        )  # fmt: skip
        found = {"loss": result.loss}
    else:
        import dataclasses

        try:
            kdcache.build(dataclasses.replace(options, max_length=length + 1, out=f"{cache}-more"))
        except UsageError as error:
            found = {"refused": str(error)}
    return {**found, "seconds": time.process_time() - begin, "mib": memory_mib()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", help="JSONL file (or .gz) with a column `text`")
    parser.add_argument("--tokenizer", help="folder")
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "LENGTH", "FOLDER"))
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    options = parser.parse_args()
    if options.one:
        what, length, at = options.one
        print(json.dumps(one(what, int(length), Path(at))))
        return
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), options.text, options.tokenizer)

        def run(what: str, length: int) -> dict[str, Any]:
            command = [sys.executable, __file__, "--one", what, str(length), folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            return dict(json.loads(done.stdout.splitlines()[-1]))

        for length in LENGTHS:
            built, trained = run("build", length), run("train", length)
            assert built["longest"] == length
            lines.append(
                [
                    f"{length:,}", f"{built['spans']:,}", f"{built['rows']:,}", f"{built['cut']:,}",
                    f"{built['positions']:,}", f"{built['mib']:,.0f} MiB",
                    f"{built['seconds']:.0f} s", f"{trained['mib']:,.0f} MiB",
                    f"{trained['seconds']:.0f} s",
                ]
            )  # fmt: skip
            print(*lines[-1], flush=True)
        refused = run("more", LENGTHS[-1])["refused"]
    refused = refused.replace(folder, "")
    text = (
        f"`python benchmarks/long_rows.py --text {Path(options.text).name} --tokenizer "
        f"{Path(options.tokenizer).name}`; {machine()}. A random Llama of one layer and one head "
        "of 16; "
        "`topk:8`, `--packing none`; peaks are of whole processes, seconds of CPU time, a training "
        "is one step of one row.\n\n"
        + table(
            ["tokens a row", "spans", "rows", "documents cut", "positions", "build, peak", "build",
             "train, peak", "train"],
            lines,
        )
        + f"\n\n`--max-length {LENGTHS[-1] + 1:,}` is refused: *{refused}*"
    )  # fmt: skip
    print(text)
    if options.markdown:
        keep("long rows", text)


if __name__ == "__main__":
    main()
