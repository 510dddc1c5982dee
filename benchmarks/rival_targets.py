"""What others store of a teacher, against the whole distribution at the same positions.

    python benchmarks/rival_targets.py --teacher SMOLLM2_135M --corpus novels.jsonl.gz [--markdown]

The rules are written from their sources, read in 2026; nothing of theirs is run:

* SE-KD3x (arXiv 2602.01395, `offline_cache.py` of its repository): 50 draws with replacement, of
  which the 12 ids drawn most often stay, each as 17 bits of id and 7 of count / 50; on reading, the
  numbers of a position are divided by their sum. Measured: the mass of the teacher's 8 likeliest
  ids in the mean of its targets, over many draws, and in the teacher's distribution;
* speculators' FP8 hidden states (#1028): E4M3 numbers with a scale a token, its largest size / 448.
  Against `hidden:int8`: KL from the logits of the states as they are, bytes;
* Megatron-LM's ghost token (`cached_logits_loss.py`, as Model-Optimizer #1998 uses it): what the
  best 16 in float16 leave of 1, against the teacher's own mass outside of them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from results import keep, machine, table
from torch import Tensor

from kdcache import BuildOptions, Cache, InspectOptions, TargetStream, build, inspect
from kdcache.targets import HiddenTargets

DRAWS, KEPT, ID_BITS, STEPS = 50, 12, 17, 127
ROUNDS = 20


def targets_of(cache: Cache) -> list[HiddenTargets]:
    """The states of a cache, a batch at a time."""
    found = [batch["targets"] for batch in TargetStream(cache, batch_size=4, shuffle=False)]
    assert all(isinstance(one, HiddenTargets) for one in found)
    return found


def packed_sample(p: Tensor) -> tuple[Tensor, Tensor]:
    """SE-KD3x's target of some positions: ids [n, 12] as they are read, and weights."""
    drawn = torch.multinomial(p, DRAWS, replacement=True)
    counts = torch.zeros_like(p).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=p.dtype))
    kept, ids = counts.topk(KEPT, 1)
    weights = (kept / DRAWS * STEPS).round() / STEPS
    return ids & ((1 << ID_BITS) - 1), weights / weights.sum(1, keepdim=True)


def fp8(states: Tensor) -> Tensor:
    """States as E4M3 keeps them with a scale a token."""
    scale = states.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    return (states / scale).to(torch.float8_e4m3fn).float() * scale


def kl(want: Tensor, got: Tensor) -> Tensor:
    """KL of each position, from logits."""
    p, q = want.double().log_softmax(-1), got.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--limit", type=int, default=2, help="documents")
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    options = parser.parse_args()
    torch.manual_seed(0)
    caches, sizes = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for codec in ("hidden:float16", "hidden:int8"):
            out = str(Path(scratch, codec.replace(":", "-")))
            build(
                BuildOptions(
                    teacher=(options.teacher,), corpus=(options.corpus,), out=out, codec=codec,
                    max_length=256, limit=options.limit, workers=0,
                )
            )  # fmt: skip
            caches[codec] = targets_of(Cache.open(out))
            sizes[codec] = inspect(InspectOptions(cache=out)).target_bytes_per_position
    in_fp8, in_int8, likeliest, theirs, ghost, rest = ([] for _ in range(6))
    for whole, levels in zip(*caches.values(), strict=True):
        logits = whole.dense().logits
        in_fp8.append(kl(logits, whole.layer.logits(fp8(whole.states))))
        in_int8.append(kl(logits, levels.dense().logits))
        p = logits.softmax(-1)
        mass, best = p.topk(8, -1)
        likeliest.append(mass.sum(-1))
        for _ in range(ROUNDS):
            ids, weights = packed_sample(p)
            hit = (ids[:, :, None] == best[:, None]).any(-1)
            theirs.append((weights * hit).sum(-1))
        top = p.topk(16, -1).values
        rest.append(1 - top.double().sum(-1))
        ghost.append((1 - top.log().half().float().exp().sum(-1)).clamp_min(1e-8).double())
    tail, inferred = torch.cat(rest), torch.cat(ghost)
    width = f"{caches['hidden:float16'][0].layer.width + 4}"
    own = f"{sizes['hidden:int8']:.0f}"
    few = tail < 0.01
    rows = [
        ["teacher's 8 likeliest ids", f"{float(torch.cat(likeliest).mean()):.3f}", ""],
        ["the same in SE-KD3x's targets", f"{float(torch.cat(theirs).mean()):.3f}", f"{3 * KEPT}"],
        ["KL of FP8 states, a scale a token", f"{float(torch.cat(in_fp8).mean()):.2e}", width],
        ["KL of `hidden:int8`", f"{float(torch.cat(in_int8).mean()):.2e}", own],
        ["error of the ghost token's mass", f"{float((inferred - tail).abs().mean()):.1e}", ""],
        [
            "the same where the tail is below 0.01, of the tail",
            f"{float(((inferred - tail).abs() / tail)[few].median()):.1%}",
            "",
        ],
    ]  # fmt: skip
    text = (
        f"`python benchmarks/rival_targets.py --teacher {Path(options.teacher).name}`: "
        f"{len(tail):,} positions in rows of 256; {machine()}.\n\n"
        f"{table(['measured', 'mean', 'bytes a position'], rows)}\n\n"
        f"The ids of SE-KD3x have {ID_BITS} bits: {1 << ID_BITS:,} and above are read as others "
        f"({151_000:,} as {151_000 & ((1 << ID_BITS) - 1):,})."
    )
    print(text)
    if options.markdown:
        keep("rival targets", text)


if __name__ == "__main__":
    main()
