"""Build a cache, look into it, train a student from it, and evaluate it: the commands from Python.

python examples/python_api.py --teacher HuggingFaceTB/SmolLM2-135M --corpus 'text/*.jsonl'
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kdcache import BuildOptions, Cache, EvaluateOptions, TrainOptions, build, evaluate, train

CONFIG = Path(__file__).parent / "config" / "student-llama.json"


def main(teacher: str, corpus: str, student: str, out: Path, max_length: int) -> None:
    built = build(
        BuildOptions(
            teacher=(teacher,),
            corpus=(corpus,),
            out=str(out / "cache"),
            codec="topk:32",
            temperatures=(1.0, 2.0),
            max_length=max_length,
            workers=0,  # in this process; None asks Ray for as many as there is room
        )
    )
    print(f"{built.positions:,} positions, {built.bytes_per_position:.1f} bytes each")

    cache = Cache.open(built.cache)
    tokenizer = cache.tokenizer()
    shard = cache.read(0)
    first = shard.targets.at(1.0)
    print("after", repr(tokenizer.decode(shard.row(0).input_ids[:1])), "the teacher expects")
    for i, p in zip(first.ids[0, :5].tolist(), first.weights[0, :5].tolist(), strict=True):
        print(f"  {p:6.2%}  {tokenizer.decode([i])!r}")

    trained = train(
        TrainOptions(
            cache=(built.cache,),
            student=student,
            out=str(out / "student"),
            alpha=0.1,
            temperature=2.0,
            batch_size=8,
        )
    )
    print(f"{trained.steps} steps, soft loss {trained.soft_loss:.4f}")

    result = evaluate(EvaluateOptions(student=(trained.out,), cache=built.cache))
    for model in result.models:
        if model.cross_entropy is not None and model.kl is not None:
            print(f"{model.name}: cross-entropy {model.cross_entropy:.4f}, KL {model.kl:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--corpus", default="text/*.jsonl")
    parser.add_argument("--student", default=str(CONFIG))
    parser.add_argument("--out", type=Path, default=Path("runs/python-api"))
    parser.add_argument("--max-length", type=int, default=512)
    main(**vars(parser.parse_args()))
