"""What experiment trackers record of a distillation, beside the arguments of the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from kdcache.stream import TargetStream


def recorded(
    stream: TargetStream, model: nn.Module, alpha: Callable[[int], float] | None, steps: int
) -> dict[str, Any]:
    """The caches, their order and the loss of a run.

    Args:
        stream: of the training.
        model: its alpha, divergence and tail are recorded if it has them.
        alpha: weight of the hard loss at each step; None for the model's.
        steps: of the whole run.

    Returns:
        Values by name, flat as MLflow needs them. A schedule is `start:end`.
    """
    spec = stream.caches[0].spec
    facts = {
        "cache_digests": [cache.digest for cache in stream.caches],
        "codec": spec.codec,
        "cache_temperatures": list(spec.temperatures),
        "temperature": _first_and_last(stream.temperature, steps),
        "alpha": _first_and_last(alpha or getattr(model, "alpha", None), steps),
        "divergence": getattr(model, "divergence", None),
        "tail": getattr(model, "tail", None),
    }
    if facts["divergence"] == "huber":
        facts["huber_delta"] = getattr(model, "huber_delta", None)
    anchor = getattr(model, "anchor", None)
    if spec.codec.startswith("anchored") and anchor is not None:
        facts["anchor"] = "estimated" if anchor.estimated else float(anchor.theta)
    if stream.cross is not None:
        facts |= {"cross_tokenizer": stream.cross.method, "likelihood_tau": stream.cross.tau}
    if stream.weights.shown():
        facts["cache_weights"] = stream.weights.shown()
    facts |= {name: getattr(stream, name) for name in ("batch_size", "seed", "streams", "group")}
    return {f"kdcache_{name}": value for name, value in facts.items()}


def _first_and_last(value: Any, steps: int) -> Any:
    if not callable(value):
        return value
    first, last = value(0), value(steps - 1)
    return first if first == last else f"{first:g}:{last:g}"
