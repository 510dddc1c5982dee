"""The options of `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.commands.build.options import BuildOptions, WorkerOptions
from kdcache.commands.groups import EngineRunOptions, RecordOptions, TeacherRunOptions
from kdcache.commands.row_options import ChatOptions, IdOptions
from kdcache.options import Options, again, option
from kdcache.row_groups import IdGroup, LengthGroup, PromptGroup
from kdcache.tasks import Dtype, Labels


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """How answers are drawn."""

    heading = "Answers"

    samples: int = option(1, help="answers of each prompt.", metavar="N", at_least=1)
    temperature: float = option(
        1.0,
        help="logits are divided by it before a token is drawn; 0 takes the most probable one.",
        metavar="T",
        at_least=0,
    )
    top_p: float = option(
        1.0,
        help="draw among the most probable tokens that have this share of the probability.",
        metavar="SHARE",
        above=0,
        at_most=1,
    )
    top_k: int = option(
        0, help="draw among so many of the most probable tokens; 0 for all.", at_least=0
    )
    min_p: float = option(
        0.0,
        help="draw among tokens with this share of the largest probability.",
        metavar="SHARE",
        at_least=0,
        at_most=1,
    )
    max_new_tokens: int = option(
        256, help="tokens of an answer, at most.", metavar="TOKENS", at_least=1
    )
    stop: tuple[str, ...] = option(
        (),
        help="a text that ends an answer, beside the tokens that the model itself ends with; "
        "repeat it for more.",
        metavar="TEXT",
    )
    seed: int = option(0, help="seed of the noise; with `cache`, also of its codec.")


@dataclass(frozen=True)
class GenerateOptions(SamplingOptions, RecordOptions, PromptGroup, EngineRunOptions, WorkerOptions):
    """What `kdcache generate` takes: fields have the names of its options."""

    heading = ""
    first = (
        *("model", "corpus", "out", "samples", "temperature", "max_new_tokens", "prompt_tokens"),
        *("cache", "codec", "workers"),
    )

    model: str = option(
        help="folder, URL or hub id of the causal language model that writes.",
        metavar="DIR_OR_HUB_ID",
    )
    corpus: tuple[str, ...] = option(
        help="the prompts: files, folders, globs or fsspec URLs; texts, chats, prompts, or ids.",
        metavar="PATH_OR_URL_OR_GLOB",
    )
    out: str = option(
        help="folder or URL of the corpus that is written.", metavar="CORPUS", output=True
    )
    prompt_tokens: int | None = option(
        None,
        help="only the first tokens of each record are its prompt: for corpora of plain text.",
        metavar="TOKENS",
        at_least=1,
    )
    cache: str | None = option(
        None,
        help="build a cache of the corpus, too: the model is then the teacher (optional).",
        metavar="CACHE",
        output=True,
    )
    codec: str | None = again(
        BuildOptions, "codec", None, help="of the cache, as of `build`. Default: `sample:20`."
    )
    max_length: int | None = again(
        LengthGroup,
        "max_length",
        None,
        help="tokens of a prompt and its answer, at most what the model reads. Default: 1024, or "
        "what the model reads if that is less.",
    )
    labels: Labels | None = again(IdGroup, "labels", None)
    tokenizer: str | None = again(IdOptions, "tokenizer", None)
    chat: tuple[str, ...] = again(
        ChatOptions,
        "chat",
        (),
        help="`template=FILE` to use instead of the tokenizer's; more variables of a template, "
        'such as `template-kwargs={"enable_thinking": false}`.',
    )
    chat_template: str | None = again(ChatOptions, "chat_template", None)
    shard_tokens: int | None = again(
        BuildOptions,
        "shard_tokens",
        None,
        help="tokens of prompts that become one shard, about. Default: by corpus.",
    )
    dtype: Dtype = again(TeacherRunOptions, "dtype", "auto")
    batch_tokens: int | None = again(
        TeacherRunOptions,
        "batch_tokens",
        None,
        help="tokens of prompts and answers in a batch, at most. Default: 16384 on a CPU; on a GPU "
        "131072, halved where that does not fit. vLLM has its own.",
    )
    trust_remote_code: bool = again(TeacherRunOptions, "trust_remote_code", False)
    dry_run: bool = again(BuildOptions, "dry_run", False)

    def conflicts(self) -> Sequence[str]:
        """See `Options.conflicts`."""
        problems = [*WorkerOptions.conflicts(self), *self.engine_conflicts()]
        if self.codec is not None and self.cache is None:
            problems.append("--codec is of a cache. Name one with --cache, or leave it out.")
        if self.cache is not None and self.part is not None:
            problems.append(
                "--part makes a share of the corpus, and --cache needs all of it. Build the cache "
                "once all parts are made."
            )
        if "" in self.stop:
            problems.append("--stop is an empty text, which is everywhere.")
        return problems

    def build_options(self) -> BuildOptions:
        """Those of the cache of what is written."""
        shared: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                *WorkerOptions.__dataclass_fields__,
                *EngineRunOptions.__dataclass_fields__,
                *("codec", "seed", "dtype", "batch_tokens", "trust_remote_code"),
            )
        }
        assert self.cache is not None, "it was asked for"
        return BuildOptions(teacher=(self.model,), corpus=(self.out,), out=self.cache, **shared)
