"""The loss of one rank's slice of a vocabulary against the same slice as a vocabulary of its own.

    python benchmarks/cut_loss.py --markdown

One process stands for one of `--ranks`: it has a slice of the output layer, and its all-reduces
are those of a group of one, so what is timed is the rank's own work and the launches, not the
wires. Ids of targets and labels are the slice's, so both ways must give the same loss, which is
checked. Beside them: the whole vocabulary on one rank.

A step is forward and backward, into hidden states and weight. Time: the median of `--steps`, ways
taking turns; CUDA events on a GPU, wall time of one thread on a CPU. Memory, on a GPU: the peak of
the allocator beyond the inputs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from results import keep, machine, table
from torch import Tensor, distributed

from kdcache.loss import VocabSlice, fused_linear_distillation
from kdcache.targets import SparseTargets


def inputs(options: argparse.Namespace, ids: int) -> tuple[Tensor, Tensor, Tensor, SparseTargets]:
    """Hidden states, weight of so many ids, labels and a sample of them."""
    torch.manual_seed(0)
    n, device = options.positions, options.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(n, options.hidden, device=device, dtype=dtype)
    weight = torch.randn(ids, options.hidden, device=device, dtype=dtype) / options.hidden**0.5
    own = options.vocab // options.ranks
    weights = torch.full((n, options.entries), 1 / options.entries, device=device)
    entries = torch.randint(own, weights.shape, device=device)
    rest = torch.zeros(n, device=device)
    targets = SparseTargets(entries, weights, rest, False, options.temperature)
    labels = torch.randint(own, (n,), device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, targets


def ways(options: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """A step of each, which returns the loss."""
    own = options.vocab // options.ranks
    group: Any = distributed.group.WORLD
    cut = VocabSlice(group.group_name, options.ranks, 0, own, options.vocab)
    slice_, whole = inputs(options, own), inputs(options, options.vocab)

    def way(given: tuple[Tensor, Tensor, Tensor, SparseTargets], group: Any) -> Any:
        hidden, weight, labels, targets = given

        def step() -> Tensor:
            hidden.grad = weight.grad = None
            parts = fused_linear_distillation(
                hidden, weight, None, labels, targets, alpha=0.5, group=group
            )
            parts.total.backward()
            return parts.total.detach()

        return step

    return {
        "the slice as a whole vocabulary": way(slice_, None),
        "the slice, cut (`VocabSlice`)": way(slice_, cut),
        "the slice, cut, asked for in each call (group)": way(slice_, group),
        "the whole vocabulary on one rank": way(whole, None),
    }


def seconds(step: Callable[[], Tensor], device: str) -> tuple[float, float, Tensor]:
    """Of one step: its time, its peak of GiB, its loss."""
    if device != "cuda":
        start = time.perf_counter()
        loss = step()
        return time.perf_counter() - start, 0.0, loss
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    event: Any = torch.cuda.Event
    begin, end = (event(enable_timing=True) for _ in range(2))
    begin.record()
    loss = step()
    end.record()
    end.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return begin.elapsed_time(end) / 1e3, peak, loss


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if cuda else "cpu")
    parser.add_argument("--vocab", type=int, default=131072, help="of all ranks")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096 if cuda else 1024)
    parser.add_argument("--positions", type=int, default=8192 if cuda else 256)
    parser.add_argument("--entries", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=20 if cuda else 7)
    parser.add_argument("--markdown", metavar="HEADING", nargs="?", const="cut vocabulary: cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if options.device == "cuda" else "gloo"
        distributed.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        steps = ways(options)
        times: dict[str, list[float]] = {name: [] for name in steps}
        memory = dict.fromkeys(steps, 0.0)
        losses = {name: step() for name, step in steps.items()}
        for _ in range(options.steps):
            for name, step in steps.items():
                took, peak, losses[name] = seconds(step, options.device)
                times[name].append(took)
                memory[name] = max(memory[name], peak)
        distributed.destroy_process_group()
    base, *cut, _ = losses.values()
    for loss in cut:
        torch.testing.assert_close(loss, base, rtol=1e-4, atol=1e-4)
    median = {name: statistics.median(each) for name, each in times.items()}
    first, gpu = next(iter(median.values())), options.device == "cuda"
    rows = [
        [
            name,
            f"{median[name] * 1e3:.1f}",
            f"{median[name] / first:.3f}",
            *([f"{memory[name]:.2f}"] if gpu else []),
        ]
        for name in steps
    ]
    text = (
        f"`python benchmarks/cut_loss.py`. {machine()}. {options.vocab:,} ids over "
        f"{options.ranks} ranks, hidden {options.hidden:,}, {options.positions:,} positions, "
        f"{options.entries} entries at T = {options.temperature:g}; one process, "
        f"median of {options.steps} steps.\n\n"
        + table(
            ["one rank's loss, forward and backward", "ms", "of the first", *["GiB"] * gpu], rows
        )
    )
    print(text)
    if options.markdown:
        keep(options.markdown, text)


if __name__ == "__main__":
    main()
