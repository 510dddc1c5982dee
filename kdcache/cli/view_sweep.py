"""Prints the result of `sweep`."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console

from kdcache.cli.tables import number, percent, print_line, print_table
from kdcache.commands.sweep.results import _NAMES, SHARES, SettingScore, SweepResult
from kdcache.humanize import counted, duration


def render_sweep(result: SweepResult, console: Console) -> None:
    """Print the table of settings."""
    options = list(result.settings[0].setting)
    seeds = result.runs[0].seed is not None
    known = [name for name in _NAMES if any(name in s.mean for s in result.settings)]
    if _mixed(result):
        known.remove("loss")
    header = [*(name.replace("_", "-") for name in options), *(["seeds"] if seeds else [])]
    header += [*(result.name_of(name) for name in known), "training", "parameters"]
    rows = [
        [
            *setting.setting.values(),
            *([str(len(setting.runs))] if seeds else []),
            *(_figure(setting, name) for name in known),
            duration(setting.seconds),
            number(setting.parameters, 0),
        ]
        for setting in result.settings
    ]
    means = ", means and standard deviations over seeds" if seeds else ""
    title = f"{result.name_of(result.ranked_by)} first: {result.source}{means}"
    print_table(console, header, rows, left=len(options), title=title)
    for line in _notes(result):
        print_line(console, line)


def _mixed(result: SweepResult) -> bool:
    """Whether the runs were trained on losses that do not compare."""
    return bool({"alpha", "temperature", "loss"} & set(result.settings[0].setting))


def _notes(result: SweepResult) -> Iterable[str]:
    if _mixed(result):
        yield (
            "Soft losses can be compared only at the same temperature. The training loss, "
            "weighted with each run's alpha and T, is in the files."
        )
    if not result.evaluated:
        yield "No eval-cache was given: figures are those of the last steps of training."
    if len(result.runs) < result.combinations:
        yield (
            f"{counted(result.combinations, 'combination')} make "
            f"{counted(len(result.runs), 'run')}: the others differ "
            "only in options that do not affect the student, such as the temperature at alpha 1 or "
            "with mse."
        )
    total = duration(sum(run.seconds for run in result.runs))
    yield (
        f"{counted(len(result.runs), 'run')}, {result.made} of them now, {total} of training in "
        "all: "
        f"{result.out}/results.json, .csv, .png"
    )


def _figure(setting: SettingScore, name: str) -> str:
    value, deviation = setting.mean.get(name), setting.deviation.get(name)
    shown = percent if name in SHARES else number
    if value is None or deviation is None:
        return shown(value)
    if name in SHARES:
        return f"{100 * value:.2f}±{100 * deviation:.2f} %"
    return f"{shown(value)}±{deviation:.4f}"
