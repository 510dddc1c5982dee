"""How noisy are sampled targets for quantised students, and would other draws be quieter?

    RECOVERY_TEACHER=FOLDER python benchmarks/recovery_noise.py --text PASSAGES [--rows N]

The noise of a target t is E |t - p|^2 a position, p being the teacher's distribution. It follows
from the draw's probabilities, so nothing is drawn. A student is the teacher through int4 or NVFP4,
as in `recovery_real.py`, and half way back: the mean of both log-probabilities. Compared are

* `anchored:N` with inverse inclusion probabilities rounded to powers of 8^(1/4), as stored, of
  8^(1/16), and not rounded: what a finer grid could gain at most;
* sizes chosen for the quantised student q0, which is known when a cache is built: 1 - eps parts
  of |p - q0|, scaled to sum to 1, and eps of p. Their weights are exact here; each tail id would
  need one of its own in the cache.

The scale theta of the control variate is the best one of all positions: a bound for any estimate.
Needs torchao. Cost: a second of CPU time for 5 positions of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
from pathlib import Path

import recovery_fast
import torch
from recovery_real import students
from results import machine, table
from torch import Tensor
from transformers import AutoTokenizer

from kdcache.targets.device.threshold import split
from kdcache.teacher import quiet_transformers

LENGTH = 128
GRIDS = {"8^(1/4)": 8 ** (1 / 4), "8^(1/16)": 8 ** (1 / 16), "exact": 0.0}


def chances(sizes: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Which ids [n, V] of sizes [n, V], which sum to 1, are kept for certain; and of all others
    with which probability they are drawn."""
    top, ids = sizes.topk(draws, -1)
    heads, _ = split(top, sizes.scatter(1, ids, 0).sum(-1), draws)
    kept = torch.zeros_like(sizes, dtype=torch.bool)
    kept.scatter_(1, ids, torch.arange(draws) < heads[:, None])
    tail = sizes.masked_fill(kept, 0)
    left = tail.sum(-1, keepdim=True)
    drawn = (left * (draws * (1 - 1e-5))).ceil()  # rounding must not cost a draw
    return kept, (tail * drawn / left.clamp_min(1e-30)).clamp_max(1)


def variate(p: Tensor, q: Tensor, kept: Tensor, drawn: Tensor) -> Tensor:
    """c [n, V] of theta = 1 for sizes p: the package's, see `kdcache.loss.anchor`.

    Args:
        p: [n, V] the teacher.
        q: [n, V] the student.
        kept: bool [n, V], the head.
        drawn: [n, 1] how many ids of the tail are drawn.
    """
    tail, head = q.masked_fill(kept, 0), torch.minimum(p, q).masked_fill(~kept, 0)
    m_p = (1 - p.masked_fill(~kept, 0).sum(-1, keepdim=True)).clamp_min(0)
    m_q = tail.sum(-1, keepdim=True).clamp_min(1e-38)
    o = head.sum(-1, keepdim=True) + torch.minimum(m_p, m_q)
    c = o.square() * m_p * tail / m_q
    limit = 1.25 * m_p / drawn.clamp_min(1)
    return c * (limit / c.amax(-1, keepdim=True).clamp_min(1e-38)).clamp_max(1).square()


def noise(p: Tensor, c: Tensor, chance: Tensor, base: float) -> Tensor:
    """[3] sums over positions and ids: noise at theta is the first - 2 theta the second + theta^2
    the third.

    Args:
        p: [n, V].
        c: [n, V], 0 in the head.
        chance: [n, V] of being drawn; 0 in the head.
        base: inverses are rounded up or down at random to powers of this; 0: not at all.
    """
    inverse = torch.where(chance > 0, 1 / chance.clamp_min(2**-24), 1)
    cost = inverse - 1
    rounding = torch.zeros_like(cost)
    if base:
        octaves = math.log2(base)
        power = (inverse.log2() / octaves).floor()
        low, high = (power * octaves).exp2(), ((power + 1) * octaves).exp2()
        rounding = chance * (inverse - low) * (high - inverse)
    parts = p.square() * cost, p * c * cost, c.square() * (cost + rounding)
    return torch.stack([part.sum(dtype=torch.float64) for part in parts])


def schemes(p: Tensor, q0: Tensor, q: Tensor) -> dict[tuple[str, str], Tensor]:
    """[5] of each scheme and grid: `noise`, entries of the head and of the tail."""
    apart = (p - q0).abs()
    apart = apart / apart.sum(-1, keepdim=True)
    sizes = {(f"`anchored:{n}`", n): (p, GRIDS) for n in (10, 20)}
    for eps in (0.2, 0.5):
        mixed = (1 - eps) * apart + eps * p
        for n in (8, 10):
            sizes[f"sizes for q0, eps {eps}, N = {n}", n] = mixed, {"exact": 0.0}
    found = {}
    for (name, n), (size, grids) in sizes.items():
        kept, chance = chances(size, n)
        drawn = chance.sum(-1, keepdim=True).round()
        c = variate(p, q, kept, drawn) if size is p else q.masked_fill(kept, 0)
        counts = torch.stack([kept.sum(), drawn.sum()]).double()
        for grid, base in grids.items():
            found[name, grid] = torch.cat([noise(p, c, chance, base), counts])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="JSON lines, or .gz of them")
    parser.add_argument("--rows", type=int, default=4, help=f"of {LENGTH} tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = options.text.read_bytes()
    lines = (gzip.decompress(data) if options.text.suffix == ".gz" else data).splitlines()
    made = students()
    made.TEACHER = os.environ["RECOVERY_TEACHER"]
    tokenizer = AutoTokenizer.from_pretrained(made.TEACHER)
    text = "\n".join(json.loads(line)["text"] for line in lines[: 4 * options.rows])
    ids = torch.tensor(tokenizer(text)["input_ids"][: options.rows * LENGTH]).view(-1, LENGTH)
    sums: dict[tuple[str, ...], Tensor] = {}
    with quiet_transformers():
        teacher = made.teacher().eval()
        for kind in ("int4", "nvfp4"):
            student = recovery_fast.quicken(getattr(made, kind)(None), made.Nvfp4Linear).eval()
            for row in ids:
                with torch.no_grad():
                    p, q0 = (
                        m(input_ids=row[None]).logits[0].softmax(-1) for m in (teacher, student)
                    )
                half = (p.clamp_min(1e-38).log() + q0.clamp_min(1e-38).log()).div(2).softmax(-1)
                for where, q in (("at the start", q0), ("half way", half)):
                    for key, found in schemes(p, q0, q).items():
                        key = (kind, where, *key)
                        sums[key] = sums.get(key, torch.zeros(5)) + found
    rows = []
    for (kind, where, name, grid), total in sums.items():
        plain, gain, cost, heads, tails = (total / ids.numel()).tolist()
        theta = min(1.0, max(0.0, gain / cost))
        best = plain - 2 * theta * gain + theta**2 * cost
        rows.append(
            [kind, where, name, grid, f"{heads + tails:.2f}", f"{theta:.2f}", f"{best:.4f}"]
        )
    print(f"{ids.numel()} positions of {options.text.name}; {machine()}.\n")
    print(table(["student", "", "draw", "inverses", "entries", "theta", "noise"], rows))


if __name__ == "__main__":
    main()
