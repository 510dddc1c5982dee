"""`kdcache env`: what a bug report needs to say of the machine and of what is installed.

Versions are read from the packages' metadata, so that a broken library is listed too; torch alone
is imported, to ask for its devices. No host, user or folder is named.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import Any

from kdcache import __version__
from kdcache.commands.options import EnvOptions
from kdcache.storage import redact

_PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "accelerate", "ray", "h5py", "numpy"),
    *("pyarrow", "fsspec", "s3fs", "gcsfs", "triton", "flash-attn", "peft", "vllm", "matplotlib"),
)


@dataclass(frozen=True)
class EnvResult:
    """What is installed here.

    Attributes:
        system: operating system and processor.
        memory_bytes: of the machine; None where the system does not tell.
        packages: version of each; None where it is not installed.
        gpus: name and memory of each GPU that PyTorch sees, or why it sees none.
        settings: variables of the environment that kdcache reads.
    """

    kdcache: str
    python: str
    system: str
    cores: int
    memory_bytes: int | None
    packages: dict[str, str | None]
    gpus: tuple[str, ...]
    settings: dict[str, str]


def env(options: EnvOptions) -> EnvResult:
    """Describe this machine."""
    usable = getattr(os, "sched_getaffinity", None)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory = None
    return EnvResult(
        kdcache=__version__,
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        cores=len(usable(0)) if usable else os.cpu_count() or 1,
        memory_bytes=memory,
        packages={name: _version(name) for name in _PACKAGES},
        gpus=_gpus(),
        settings={k: redact(v) for k, v in sorted(os.environ.items()) if k.startswith("KDCACHE_")},
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[str, ...]:
    try:
        import torch
    except Exception as error:  # a broken install is what a report is about
        return (f"torch cannot be imported: {type(error).__name__}: {error}",)
    built: Any = torch.version
    if not torch.cuda.is_available():
        return (f"none (PyTorch is built for {built.cuda or built.hip or 'the CPU'})",)
    cards = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return tuple(f"{card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards)
