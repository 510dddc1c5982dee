"""What the sampler should cost on an H100, from the code that inductor writes: no GPU needed.

    python benchmarks/h100_estimate.py --markdown

For each codec: launches, bytes that they read and write a position, and from both a time. A launch
touches of each tensor at most as many elements as it runs over. `topk` selects by passes of 2 bits
over its input and is counted as so many reads. Memory at 85 % of 3.35 TB/s; 3 us a launch of a
slice of 8,192 positions. Not in it: the order of accesses, caches, occupancy. A measurement
far from an estimate shows where to look; the estimate shows nothing by itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from results import keep, table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "cuda"))

from fake import fake_cuda
from inductor import Code, written_for_h100

from kdcache.targets import Codec
from kdcache.targets.device import BLOCK, Rule, blocked_sample, run, topk

BANDWIDTH = 0.85 * 3.35e12
LAUNCH = 3e-6
CASES = (
    ("topk:64", (1.0,)),
    ("topk:64", (1.0, 2.0)),
    ("sample:20", (1.0,)),
    ("sample:20", (1.0, 2.0)),
    ("sample:40", (1.0,)),
)
GOALS = {("sample:20", (1.0,)): 0.30, ("sample:20", (1.0, 2.0)): 0.40}


def code_of(text: str, temperatures: tuple[float, ...], n: int, ids: int) -> tuple[Code, int]:
    """The code of an encoding, and the largest entries it looks for."""
    with fake_cuda(symbolic=True):
        logits = torch.empty(n, ids, device="cuda", dtype=torch.bfloat16)
        codec = Codec.parse(text, temperatures, ids)
        if text.startswith("topk"):
            k = int(text.partition(":")[2])
            return written_for_h100(topk._top_blocked, logits, k, temperatures), k
        rule: Rule = codec.rule  # type: ignore[attr-defined]
        u = torch.empty(n, device="cuda", dtype=torch.float64)
        return written_for_h100(blocked_sample, logits, u, rule), rule.slots(ids) - 1


def row(name: str, code: Code, k: int, n: int, ids: int, goal: float | None) -> list[str]:
    """One line of the table."""
    moved = sum(code.bytes_of(i) for i in range(len(code.launches))) / n
    if code.library_calls:  # candidates among blocks, entries among candidates; 16-bit logits
        moved += (16 // 2 + 1) * 2 * (ids / BLOCK + k * BLOCK)
    launches = len(code.launches) + len(code.library_calls)
    seconds = moved / BANDWIDTH + launches * LAUNCH / n
    reached = "" if goal is None else f"{goal:.2f}"
    return [name, str(launches), f"{moved / ids:.2f}", f"{1e6 * seconds:.3f}", reached]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    options = parser.parse_args()
    n, ids, wide = 8192, 128_256, 151_936
    rows = []
    for text, temperatures in CASES:
        code, k = code_of(text, temperatures, n, ids)
        name = f"`{text}`, T = {', '.join(f'{t:g}' for t in temperatures)}"
        rows.append(row(name, code, k, n, ids, GOALS.get((text, temperatures))))
    with fake_cuda(symbolic=True):
        logits = torch.empty(6912, wide, device="cuda", dtype=torch.bfloat16)
        code = written_for_h100(run._outside_by_blocks, logits, wide - 271)
    rows.append(row("mass of 271 padded columns, 151,936 in all", code, 0, 6912, wide, None))
    head = ["encode", "launches a slice", "bytes a logit", "µs a position, estimated", "goal, µs"]
    text = (
        f"`python benchmarks/h100_estimate.py`: {n:,} positions of {ids:,} ids in bfloat16; "
        f"PyTorch {torch.__version__}. Not measured: from launches and bytes of the code that "
        "inductor writes for an H100, at 85 % of 3.35 TB/s and 3 µs a launch.\n\n"
        + table(head, rows)
    )
    print(text)
    if options.markdown:
        keep("H100, estimated", text)


if __name__ == "__main__":
    main()
