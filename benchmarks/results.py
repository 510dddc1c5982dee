"""Where benchmarks keep what came out: one section each in RESULTS.md."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers

RESULTS = Path(__file__).parent / "RESULTS.md"


def keep(heading: str, text: str) -> None:
    """Replace one section, and nothing else, in RESULTS.md.

    Args:
        heading: without the `## ` before it.
        text: markdown below it.
    """
    old = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
    first, *sections = old.split("\n## ")
    new = f"{heading}\n\n{text.strip()}\n"
    places = [i for i, section in enumerate(sections) if section.split("\n")[0] == heading]
    if places:
        sections[places[0]] = new
    else:
        sections.append(new)
    RESULTS.write_text("\n## ".join(part.rstrip() + "\n" for part in [first, *sections]))


def machine() -> str:
    """Card or processor and versions, in one line."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} cores of a shared {platform.machine()} machine, "
        f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    )
    return (
        f"{device}; Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def memory_mib(most: bool = True) -> float:
    """Resident memory of this process (Linux): the most that it ever had, or what it has now.

    Not `ru_maxrss`, which begins with the peak of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:" if most else "VmRSS:")[1].split()[0]) / 1024


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kept_table(heading: str) -> list[dict[str, str]]:
    """The first table of a section of RESULTS.md: a dictionary a row, by the table's header."""
    (section,) = (
        part for part in RESULTS.read_text().split("\n## ") if part.startswith(f"{heading}\n")
    )
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header, _, *rows = cells
    return [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]
