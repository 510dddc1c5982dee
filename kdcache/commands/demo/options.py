"""The options of `demo`."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.options import Options, option


@dataclass(frozen=True)
class DemoOptions(Options):
    """What `kdcache demo` takes: fields have the names of its options."""

    out: str = option(
        "kdcache-demo", help="folder of everything the demo makes.", metavar="DIR", output=True
    )
    workers: int = option(2, help="Ray workers that run the teacher.", at_least=0)
    codec: str = option(
        "sample:20",
        help="codec of the caches: what is stored of each distribution of the teacher.",
        metavar="dense|topk:K|sample:N|anchored:N",
    )
    alpha: float = option(
        0.1, help="weight of the hard loss of the distilled students.", at_least=0, below=1
    )
    teacher_epochs: float = option(6.0, help="passes of the teacher over the corpus.", above=0)
    student_epochs: float = option(3.0, help="passes of each student.", above=0)
    documents: int | None = option(
        None, help="use only the first documents of the corpus. Default: all.", at_least=10
    )
    seed: int = option(0, help="seed of weights, orders and samples.", at_least=0)
