"""The options of `import`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Literal

from kdcache.commands.build.options import BuildOptions, WorkerOptions
from kdcache.commands.groups import RecordOptions
from kdcache.domains import Named
from kdcache.options import again, option
from kdcache.tasks import MAX_RECORD_BYTES, Attend, Labels, OnError

Layout = Literal[
    "kdcache", "axolotl", "distillkit", "open-instruct", "llamakd", "megatron", "se-kd3x", "plain"
]
_APART = ("megatron", "se-kd3x")


@dataclass(frozen=True)
class ImportOptions(WorkerOptions):
    """What `kdcache import` takes: fields have the names of its options."""

    first = (
        *("corpus", "tokenizer", "out", "layout", "format", "columns", "top", "targets", "labels"),
        "workers",
    )

    corpus: tuple[str | Named, ...] = again(BuildOptions, "corpus", MISSING)
    tokenizer: str = option(
        help="the tokenizer of the ids, that of the teacher.", metavar="DIR_OR_HUB_ID"
    )
    out: str = again(BuildOptions, "out", MISSING)
    format: str = again(RecordOptions, "format", "auto")
    from_: str | None = option(None, instead=("format", "{}"))
    layout: Layout = option(
        "kdcache",
        help="whose columns they are: those of `kdcache export`, of another program, or `plain`: "
        "`target_ids` with `target_logprobs` or `target_probs`, and --labels and --targets say "
        "where they stand.",
    )
    labels: Labels | None = option(
        None,
        help="what the columns labels and loss_mask stand beside: the `token` that they are about, "
        "or the one before it, whose `next` it is; `none` reads neither. Default: by the layout.",
    )
    targets: Literal["token", "next"] | None = option(
        None,
        help="what targets stand beside: the `token` that they are a distribution of, or the one "
        "before it, whose `next` it is. Default: by the layout.",
    )
    attend: Attend = option(
        "row",
        help="what a token attended to: all before it in its `row`, or its own `document`, as "
        "`segment_ids` or `position_ids` divide the row.",
    )
    columns: tuple[str, ...] | None = option(
        None,
        help="names of the layout for columns that have others, such as `target_ids=top_ids`.",
        comma=True,
        metavar="NAME=THEIRS",
    )
    filter: tuple[str, ...] = again(RecordOptions, "filter", ())
    split: str | None = again(RecordOptions, "split", None)
    top: int | None = option(
        None,
        help="ids to keep of each position, the most probable ones. Default: as many as the first "
        "row has.",
        metavar="K",
        at_least=1,
    )
    excess: Literal["refuse", "clip"] = option(
        "refuse",
        help="what to do with positions whose probabilities sum to more than 1: refuse their row, "
        "or scale them to 1.",
    )
    teacher: str | None = option(
        None, help="name of the teacher, for the notes of the cache (optional).", metavar="NAME"
    )
    compression_config: str | None = option(
        None,
        help="of DistillKit's compressed columns. Default: compression_config.yaml beside the "
        "first file.",
        metavar="FILE.yaml",
    )
    logits: str | None = option(
        None,
        help="of `megatron` and `se-kd3x`, which keep targets apart from the rows of --corpus: the "
        "folder of their files.",
        metavar="DIR_OR_URL",
    )
    max_length: int = option(
        1 << 17, help="tokens of the longest row; a longer one is refused.", at_least=2
    )
    read: tuple[str, ...] = again(
        RecordOptions,
        "read",
        (),
        help="`max-record-bytes` of the longest record that can be read (64 MiB).",
    )
    max_record_bytes: int = again(RecordOptions, "max_record_bytes", MAX_RECORD_BYTES)
    on_error: OnError = option("fail", help="what to do with rows that cannot be used.")
    limit: int | None = option(None, help="use only the first rows.", metavar="ROWS", at_least=1)

    def conflicts(self) -> Sequence[str]:
        """See `Options.conflicts`."""
        problems = list(WorkerOptions.conflicts(self))
        if self.layout == "plain" and self.targets is None:
            problems.append(
                "--targets is missing: with --layout plain say whether targets stand beside the "
                "`token` that they are about, or the one before it (`next`)."
            )
        if (self.logits is not None) != (self.layout in _APART):
            problems.append(f"--logits is for, and needed by, --layout {' or '.join(_APART)}.")
        if self.top is not None and self.layout == "se-kd3x":
            problems.append("--top would leave out draws; leave it out for --layout se-kd3x.")
        if self.compression_config and self.layout not in ("distillkit", "open-instruct"):
            problems.append("--compression-config is for --layout distillkit or open-instruct.")
        return problems
