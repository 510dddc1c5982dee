"""What others do with a teacher's distributions, for `train_step.py` to compare with, and reading.

    python benchmarks/rivals.py --distillkit PATH [--markdown]

Theirs are called as their trainers call them, on the same student, rows and optimizer as ours:

* DistillKit's KL on sparse log-probabilities, beside the model's own cross-entropy. PATH is a
  checkout of https://github.com/arcee-ai/DistillKit;
* TRL's `GKDTrainer.generalized_jsd_loss` on the teacher's logits, which are in memory already (its
  trainer would make them in every step). Without hard labels, as there;
* Liger's `LigerFusedLinearJSDLoss`, on hidden states of a teacher as wide as the student. It makes
  the teacher's logits, too, in chunks of an eighth of the positions, 1,024 at most.

The last two at beta = 0, which is forward KL, ours: a mixture of both costs them more.

On its own this file compares reading: DistillKit's decompression of its recommended configuration
and of its smallest with all of `TargetStream` on `sample:20`, each by one thread, in microseconds
of CPU time a position.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from results import keep, machine, table
from torch import Tensor

from kdcache.targets import SparseTargets

DISTILLKIT, TRL, LIGER = "DistillKit, sparse KL", "TRL GKD, cached logits", "Liger, chunked JSD"
NEEDS = {
    DISTILLKIT: ("distillkit.lossfuncs.kl", "--distillkit PATH, a checkout of DistillKit"),
    TRL: ("trl.experimental.gkd", "pip install trl"),
    LIGER: ("liger_kernel.chunked_loss", "pip install liger-kernel"),
}
# https://github.com/arcee-ai/DistillKit, README: k, exact ones, terms of the polynomial.
CONFIGS = {"recommended": (128, 16, [0, 1, 2, 3, 4, "sqrt"]), "budget": (50, 1, [0, 1, "sqrt"])}


def installed(distillkit: str | None) -> list[str]:
    """The rivals that can be imported; a line on stderr for each that can't."""
    if distillkit:
        sys.path.insert(0, str(Path(distillkit).resolve()))
    found = []
    for name, (module, cure) in NEEDS.items():
        try:
            importlib.import_module(module)
            found.append(name)
        except ImportError as error:
            print(f"left out: {name} ({error}). It needs {cure}.", file=sys.stderr)
    return found


def loss_of(
    name: str, model: Any, inputs: Tensor, labels: Tensor, targets: SparseTargets
) -> Callable[[], Tensor]:
    """The loss of a student's step, as one of them computes it.

    Args:
        name: one of `NEEDS`.
        model: a causal language model of transformers.
        inputs: ids of tokens, [rows, length].
        labels: the next ones, [rows, length].
        targets: of the rows' positions, [rows * length].
    """
    t, vocab, width = targets.temperature, model.config.vocab_size, model.config.hidden_size
    device, dtype, n = inputs.device, model.dtype, labels.numel()
    module: Any = importlib.import_module(NEEDS[name][0])
    if name == DISTILLKIT:
        signals: Any = importlib.import_module("distillkit.signals")
        signal = signals.SparseSignal(
            sparse_ids=targets.ids.view(*inputs.shape, -1),
            sparse_values=targets.weights.log().view(*inputs.shape, -1),
            log_values=True,
            generation_temperature=t,
            hidden_states=None,
            vocab_size=vocab,
        )
        divergence = module.KLDLoss(t)

        def distillkit() -> Tensor:
            out = model(input_ids=inputs, labels=inputs, use_cache=False)
            both: Tensor = 0.5 * out.loss + 0.5 * divergence(out, signal, mask=labels >= 0)
            return both

        return distillkit
    if name == TRL:
        cached = torch.randn(*inputs.shape, vocab, device=device, dtype=dtype)

        def gkd() -> Tensor:
            logits = model(input_ids=inputs, use_cache=False).logits
            loss: Tensor = module.GKDTrainer.generalized_jsd_loss(
                logits, cached, labels=labels, beta=0, temperature=t
            )
            return loss

        return gkd
    states = torch.randn(n, width, device=device, dtype=dtype)
    layer = torch.randn(vocab, width, device=device, dtype=dtype)
    chunk = min(1024, n // 8)
    fused = module.LigerFusedLinearJSDLoss(
        beta=0.0, temperature=t, chunk_size=chunk, compiled=device.type == "cuda"
    )

    def liger() -> Tensor:
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        loss: Tensor = fused(hidden, model.lm_head.weight, states, layer, labels.flatten())
        return loss

    return liger


def reading(options: argparse.Namespace) -> str:
    """A table: microseconds and bytes a position of theirs and of `sample:20`."""
    import stream

    from kdcache.cache import Cache
    from kdcache.stream import TargetStream
    from kdcache.targets import Codec
    from kdcache.targets.soft import read_ranks

    compression: Any = importlib.import_module("distillkit.compression")
    ranks = stream.rank_table(options)
    lines: list[list[Any]] = []
    codec = Codec.parse("sample:20", (1.0,), options.vocab)
    targets = stream.make_targets(codec, read_ranks(ranks, options.vocab), options)
    with tempfile.TemporaryDirectory() as scratch:
        shards = (stream.make_shard(targets, options.shard, seed) for seed in range(2))
        url = stream.make_cache(Path(scratch, "cache"), codec, shards, ranks, 2)
        manifest = Cache.open(url).manifest
        cpu, _ = stream.best(lambda: stream.run(id, TargetStream(url, batch_size=32)), 3)
        micros = cpu / manifest.positions * 1e6
        size = manifest.bytes / manifest.positions
        lines.append(["all of `TargetStream`, `sample:20`", f"{size:.1f}, with its rows", micros])
    logits = torch.cat([*islice(stream.teacher(options), 4)])
    for name, (k, exact, terms) in CONFIGS.items():
        compressor = compression.LogprobCompressor(
            compression.DistributionQuantizationConfig(
                d=options.vocab,
                k=k,
                exact_k=exact,
                exact_dtype="bfloat16",
                polynomial_terms=terms,
                term_dtype="float32",
                residual_bins=[],
                delta_encoding=False,
            )
        )
        row = compressor.compress(logits.log_softmax(-1).view(8, -1, options.vocab))
        cpu, _ = stream.best(lambda c=compressor, r=row: c.decompress_to_sparse(r), 5)  # type: ignore[misc]
        size = sum(part.numel() for part in row.values()) / len(logits)
        lines.append([f"DistillKit, {name}: {k} entries", f"{size:.0f}", cpu / len(logits) * 1e6])
    ours = lines[0][-1]
    return table(
        ["reading", "bytes", "µs a position", "of ours"],
        [[what, size, f"{us:.2f}", f"{us / ours:.0f}x"] for what, size, us in lines],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--distillkit", required=True, help="folder of a checkout")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    options = parser.parse_args(namespace=argparse.Namespace(logits=None, positions=2048, draws=4))
    options.shard = 262144
    torch.set_num_threads(1)
    if DISTILLKIT not in installed(options.distillkit):
        raise SystemExit(2)
    text = f"{machine()}; {options.vocab:,} ids, made-up logits\n\n{reading(options)}"
    print(text)
    if options.markdown:
        keep("reading, beside others", f"`python benchmarks/rivals.py`: {text}")


if __name__ == "__main__":
    main()
