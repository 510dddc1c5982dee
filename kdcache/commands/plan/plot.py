"""The plot of `plan`: fidelity against bytes per position."""

from __future__ import annotations

from collections.abc import Sequence

from kdcache.commands.plan.result import PlannedCache
from kdcache.plots import Cloud, Panel, plot_clouds


def plot_plan(path: str, caches: Sequence[PlannedCache], *, title: str, positions: int) -> None:
    """Draw squared error, and the angle of the mean gradient, against bytes per position.

    Args:
        path: the PNG file.
        caches: a plan's grid.
        title: above the plot.
        positions: that were compared.
    """
    # Side by side, drawn targets look worse than they are: only a bias is left after many steps.
    kinds = {cache.codec.partition(":")[0] for cache in caches}
    both = "topk" in kinds and kinds & {"sample", "anchored"} != set()
    panels = [
        Panel(
            "One target, student near its teacher"
            + both * ": errors of samples average out, those of top-k stay",
            "squared error, E||t - p||²",
            _clouds(caches, "near_noise"),
        ),
        Panel(
            f"All {positions:,} together" + both * ": more positions take samples down, top-k not",
            "angle of the mean gradient (degrees)",
            _clouds(caches, "mean_angle"),
        ),
    ]
    plot_clouds(path, panels, title=title, x_label="bytes per position, targets on disk")


def _clouds(caches: Sequence[PlannedCache], name: str) -> list[Cloud]:
    """A figure of each cache against its bytes; biased ones are hollow."""
    clouds: dict[tuple[str, bool], list[tuple[float, float, str]]] = {}
    for cache in caches:
        kind, _, argument = cache.codec.partition(":")
        for fidelity in cache.fidelity:
            declared = f" of {{{_set(cache)}}}" if len(cache.temperatures) > 1 else ""
            biased = kind == "topk"
            label = f"{kind}{' (biased)' if biased else ''}, T = {fidelity.temperature:g}{declared}"
            point = (cache.bytes_per_position, getattr(fidelity, name) or 0.0, argument or kind)
            clouds.setdefault((label, biased), []).append(point)
    return [Cloud(label, tuple(points), hollow) for (label, hollow), points in clouds.items()]


def _set(cache: PlannedCache) -> str:
    return ",".join(f"{t:g}" for t in cache.temperatures)
