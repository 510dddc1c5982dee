"""A teacher's files: its identity by content, its tokenizer, its vocabulary or classes.

Cost: the identity reads every weight file once, at about 1 GB/s, unless a store or the hub lists
checksums; the rest reads small files.
Guarantee: no weights are loaded, and pickled ones are refused.
"""

from __future__ import annotations

import fnmatch
import hashlib
import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers import PreTrainedTokenizerBase

from kdcache.errors import UsageError, require
from kdcache.lora import ADAPTER_CONFIG
from kdcache.pretrained import PATTERNS, WEIGHTS, UnreadableError, read_config, read_tokenizer
from kdcache.storage import redact
from kdcache.storage.disk import once_here, sha256_here
from kdcache.tasks import MASKED_LM, REGRESSION, TASKS, task_of
from kdcache.teacher.quirks import reach
from kdcache.teacher.trust import check_folder, check_unchanged, read_json

if TYPE_CHECKING:
    from kdcache.storage.remote import Facts
    from kdcache.teacher.adapter import AdapterFolder
    from kdcache.teacher.remote import RemoteModel

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.txt",
    "spiece.model",
)
_OF_FILES = (
    *("_name_or_path", "transformers_version", "torch_dtype", "dtype"),
    *("base_model_name_or_path", "revision", "peft_version"),
)


@dataclass(frozen=True)
class TeacherFiles:
    """One teacher's files on disk.

    Attributes:
        folder: local folder with `config.json`, `*.safetensors` and the tokenizer; or that of an
            adapter, which has its own files.
        listed: name, size and checksum of each weight file, where a store or the hub listed them.
        remote: the files at a URL, which it keeps on this machine.
        adapter: of an adapter, its own files.
        base: of an adapter, the files of the model that it changes.
        role: what the model is in messages: a student's files are found and loaded as well.
    """

    name: str
    folder: Path
    trust_remote_code: bool = False
    listed: Mapping[str, Facts] | None = field(default=None, repr=False)
    remote: RemoteModel | None = field(default=None, repr=False)
    adapter: AdapterFolder | None = field(default=None, repr=False)
    base: TeacherFiles | None = field(default=None, repr=False)
    role: str = "teacher"

    @property
    def who(self) -> str:
        """The model in messages."""
        return f"{self.role} {self.name}"

    @classmethod
    def find(
        cls,
        name: str,
        *,
        trust_remote_code: bool = False,
        weights: bool = True,
        role: str = "teacher",
    ) -> TeacherFiles:
        """Locate a teacher's files; those at a URL or on the hub are fetched unless this machine
        has them.

        Args:
            weights: whether the weights will be read; without them their identity is still known.

        Raises:
            UsageError: no such model, no safetensors weights, code that is not trusted, or an
                adapter without PEFT.
        """
        found = _locate(name, role, weights=weights)
        if not (found.folder / ADAPTER_CONFIG).is_file():
            found.check(trust_remote_code)
            return replace(found, trust_remote_code=trust_remote_code)
        if found.listed:  # those of an adapter are small, and tell its classes
            found = _locate(name, role, weights=True)
        from kdcache.teacher.adapter import AdapterFolder

        require({"lora": f"{found.who}, an adapter,"} if weights else {})
        adapter = AdapterFolder(found.who, found.folder)
        base = _base(adapter, trust_remote_code=trust_remote_code, weights=weights)
        return replace(found, trust_remote_code=trust_remote_code, adapter=adapter, base=base)

    def check(self, trust_remote_code: bool) -> None:
        """Refuse a folder that is not a whole model, or brings code that is not trusted."""
        if not (self.folder / "config.json").is_file():
            raise UsageError(
                f"{self.who} has no config.json: it is not a Hugging Face model folder."
            )
        check_folder(
            self.who,
            self.folder,
            trust_remote_code=trust_remote_code,
            elsewhere=self.listed or (),
        )

    @cached_property
    def sha256(self) -> str:
        """Identity: SHA-256 over the configuration and every weight file, of an adapter over those
        of its base as well. About 1 GB/s.

        Raises:
            UsageError: the base of an adapter was changed.
        """
        digest = hashlib.sha256()
        if self.adapter is not None and self.base is not None:
            self.adapter.check_base(self.base.sha256)
            digest.update(self.base.sha256.encode())
            config = {**self.adapter.config, **self.adapter.changes()}
        else:
            config = json.loads((self.folder / "config.json").read_bytes())
        # What states nothing about the function computed must not make two equal teachers differ.
        for key in _OF_FILES:
            config.pop(key, None)
        digest.update(json.dumps(config, sort_keys=True).encode())
        for name in self._weights():
            digest.update(name.encode())
            digest.update(self._checksum(name).encode())
        return digest.hexdigest()

    def _weights(self) -> list[str]:
        """Names of the weight files, here or listed."""
        return sorted({path.name for path in self.folder.glob(WEIGHTS)} | set(self.listed or ()))

    def _checksum(self, name: str) -> str:
        """A weight file's SHA-256; or its size and checksum, where a store lists these."""
        facts = (self.listed or {}).get(name)
        if facts is None or not facts.checksum:
            return sha256_here(self.folder / name)
        kind, _, checksum = facts.checksum.partition(":")
        return checksum if kind == "sha256" else f"{facts.size} {facts.checksum}"

    def check_same(self, sha256: str) -> None:
        """Refuse another model than a build began with. Its files are read once a machine.

        Raises:
            UsageError: it has another identity.
        """

        def check() -> None:
            if self.sha256 != sha256:
                raise UsageError(
                    f"{self.who} was changed since this build began. Restore it and run the "
                    "same command again, or build another cache."
                )

        for folder in {self.folder, self.whole}:
            for path in (*folder.glob("*config.json"), *folder.glob(WEIGHTS)):
                once_here(path, sha256, check)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files."""
        base = 0 if self.base is None else self.base.weight_bytes
        if self.listed:
            return base + sum(facts.size for facts in self.listed.values())
        return base + sum(path.stat().st_size for path in self.folder.glob(WEIGHTS))

    @property
    def whole(self) -> Path:
        """The folder of a whole model: its own, or that of an adapter's base."""
        return self.folder if self.base is None else self.base.folder

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """`config.json` as it is, with what an adapter changes in that of its base."""
        raw = read_json(self.who, self.whole / "config.json")
        if self.adapter is None:
            return raw
        if self.adapter.task is not None:
            raw["architectures"] = [f"AdaptedFor{TASKS[self.adapter.task].marks[0]}"]
        return {**raw, **json.loads(json.dumps(self.adapter.changes()))}

    @cached_property
    def config(self) -> Any:
        """The model's configuration.

        Raises:
            UsageError: this transformers does not know such a model, or the file is broken.
        """
        changes = {} if self.adapter is None else self.adapter.changes()
        trust = self.trust_remote_code
        try:
            return read_config(self.whole, trust_remote_code=trust, **changes)
        except UnreadableError as error:
            raise UsageError(
                f"{self.who} cannot be used: {error}. Upgrade transformers if it is older than the "
                "model, or name another."
            ) from error

    def check_whole(self, what: str) -> None:
        """Refuse an adapter.

        Args:
            what: what needs a whole model: "--engine vllm".
        """
        if self.adapter is not None:
            raise UsageError(
                f"{self.who} is an adapter of {self.adapter.base}, and {what} needs a "
                "whole model. Merge it first: PEFT's merge_and_unload(), then save_pretrained()."
            )

    def merged(self, model: Any) -> Any:
        """A model that was loaded from `whole`, with the adapter in it if there is one.

        Raises:
            UsageError: the adapter does not fit, or its base was changed.
        """
        if self.adapter is None or self.base is None:
            return model
        if "base_sha256" in self.adapter.facts:
            self.adapter.check_base(self.base.sha256)
        return self.adapter.merge(model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; an adapter's own, or that of its base."""
        if self.base is not None and not self._own_tokenizer:
            return self.base.tokenizer
        try:
            return read_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)
        except UnreadableError as error:
            raise UsageError(f"{self.who} has no usable tokenizer: {error}.") from error

    @property
    def tuned(self) -> dict[str, int]:
        """`max_length` and `max_source_length` of the rows that `finetune` gave it, if it did."""
        path = self.folder / "finetune.json"
        document = read_json(self.who, path) if path.is_file() else {}
        known = document.get("result")
        known = known if isinstance(known, dict) else {}  # the file may be somebody else's
        names = ("max_length", "max_source_length")
        return {n: known[n] for n in names if type(known.get(n)) is int and known[n] > 1}

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder, or that of an adapter's base, has files of a tokenizer."""
        return self._own_tokenizer or (self.base is not None and self.base.has_tokenizer)

    @property
    def _own_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in TOKENIZER_FILES)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of the logits."""
        names = self.config.id2label
        return tuple(str(names[i]) for i in range(len(names)))

    def check_task(self, task: str) -> None:
        """Refuse a model that does not answer a task.

        Raises:
            UsageError: an architecture without such a head, one that was trained for another task,
                or one with fewer or more outputs than an answer has.
        """
        check_unchanged(self.who, self.raw_config)
        config = self.config
        known = auto_class(task, config)
        own_code = self.trust_remote_code and getattr(config, "auto_map", None)
        if type(config) not in known._model_mapping and not own_code:
            raise UsageError(
                f"{self.who} is of type {config.model_type}, for which transformers has "
                f"no model for {task}. Name another {self.role}, or another --task."
            )
        named = task_of(self.raw_config)
        if TASKS[task].words and named not in (None, task):
            # Heads of other tasks may have the names and shapes of its own.
            raise UsageError(
                f"{self.who} is a {TASKS[named].noun}: it was not trained for {task}. "
                "Fine-tune it first (`kdcache finetune`), or name another."
            )
        kind, outputs = TASKS[task], len(self.label_names)
        if kind.over_ids:
            self._check_saved_for(task)
        if kind.over_ids or kind.per_token:
            return
        problem = getattr(config, "problem_type", None)
        if problem is None and outputs == 1 and kind.answers == "classes":
            problem = TASKS[REGRESSION].problem  # as transformers would train it
        if problem not in (None, kind.problem):
            others = [name for name, one in TASKS.items() if one.problem == problem]
            cure = f"Use --task {others[0]}, or name" if others else "Name"
            raise UsageError(
                f"{self.who} is not a model for {task}: its head of {outputs} outputs is "
                f"for {problem} (problem_type of its config.json). {cure} a {kind.noun}."
            )
        if (kind.answers == "classes" and outputs < 2) or (kind.answers == "score" and outputs > 1):
            wanted = "one output" if kind.answers == "score" else "two classes or more"
            raise UsageError(
                f"{self.who} has {outputs} outputs, and a {kind.noun} has {wanted}. Name "
                f"another {self.role}, or another --task."
            )

    def _check_saved_for(self, task: str) -> None:
        """Refuse a classifier or another kind of language model by the name it was saved with."""
        saved = task_of(self.raw_config)
        encoder = type(self.config) in auto_class(MASKED_LM, self.config)._model_mapping
        if saved is None and TASKS[task].causal and encoder and not self.config.is_decoder:
            head = "A classifier's head comes from `kdcache finetune`."
            raise UsageError(f"{self.who} is an encoder without a head: which --task? {head}")
        if saved not in (None, task):
            name = self.raw_config["architectures"][0]
            raise UsageError(
                f"{self.who} is not a {TASKS[task].noun}: it was saved as {name}. Use "
                f"--task {saved}, or name another."
            )

    def reach(self, task: str) -> int | None:
        """The most tokens of a row that it reads, or None if its configuration names no bound."""
        config = self.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if TASKS[task].source:  # the decoder's; see `source_reach`
            positions = getattr(config, "max_decoder_position_embeddings", positions)
        bounds = [_stretched(config, positions), self.table]
        if not TASKS[task].causal:
            bounds.append(int(self.tokenizer.model_max_length))
        # XLNet names -1, since it has no bound.
        return min((bound for bound in bounds if bound and bound > 0), default=None)

    @cached_property
    def table(self) -> int | None:
        """The most tokens that its table of positions holds; None without one."""
        return reach(self.config, trust_remote_code=self.trust_remote_code)

    @property
    def source_reach(self) -> int | None:
        """The most tokens of a source that an encoder reads; None if there is no bound."""
        config = self.config.get_text_config()
        own = getattr(config, "max_encoder_position_embeddings", None)
        found = own or getattr(config, "max_position_embeddings", None)
        return None if found is None else int(found)

    @cached_property
    def decoder_start(self) -> int:
        """What the decoder reads first; see `kdcache.teacher.quirks`."""
        from kdcache.teacher.quirks import decoder_start_of

        return decoder_start_of(self.config, self.who, trust_remote_code=self.trust_remote_code)

    def vocab_size(self, task: str) -> int:
        """Width of a soft target: the classes, or the ids that tokenizer and output layer share."""
        if not TASKS[task].over_ids:
            return len(self.label_names)
        known = max(self.tokenizer.get_vocab().values()) + 1
        width = int(self.config.get_text_config().vocab_size)
        return min(int(known), width)


def auto_class(task: str, config: Any) -> Any:
    """The class of transformers that loads a model of a task.

    Args:
        config: the model's configuration. Where transformers has no class of the text model alone
            of one that reads images, too, it is loaded whole.
    """
    kind, own = TASKS[task], type(config)
    first = getattr(transformers, kind.auto)
    if kind.auto_images is None or own in first._model_mapping or config.is_encoder_decoder:
        return first
    second = getattr(transformers, kind.auto_images)
    return second if own in second._model_mapping and _reads_text(second, own) else first


def _reads_text(kind: Any, config: type) -> bool:
    """Whether a model that reads images reads a text without one."""
    inputs = list(inspect.signature(kind._model_mapping[config].forward).parameters.values())
    needed = {
        one.name for one in inputs[1:] if one.default is one.empty and one.kind < one.VAR_POSITIONAL
    }
    return needed <= {"input_ids"}


def _stretched(config: Any, length: int | None) -> int | None:
    """A length times the factor of rotary positions that are scaled to reach further, unless the
    configuration counts it in.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    scaled = rope.get("rope_type") in ("linear", "dynamic", "yarn")
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if not (length and scaled and factor):
        return length
    return max(length, int((original or length) * factor))


def _base(adapter: AdapterFolder, *, trust_remote_code: bool, weights: bool) -> TeacherFiles:
    """The model that an adapter changes.

    Raises:
        UsageError: it is not where the adapter states, or is an adapter itself.
    """
    try:
        revision = adapter.config.get("revision")
        base = _locate(adapter.base, "model", weights=weights, revision=revision)
        if (base.folder / ADAPTER_CONFIG).is_file():
            raise UsageError("it is an adapter, too, and must be merged first.")
        base.check(trust_remote_code)
    except UsageError as error:
        reason = str(error).removeprefix("model ")
        raise UsageError(
            f"{adapter.who} is an adapter, and its base {adapter.base} cannot be used: {reason} "
            f"(Its {ADAPTER_CONFIG} names the base.)"
        ) from error
    return replace(base, trust_remote_code=trust_remote_code)


def _locate(name: str, role: str, *, weights: bool, revision: str | None = None) -> TeacherFiles:
    """The folder of a model, fetched if it is elsewhere; nothing in it has been checked."""
    folder = Path(name).expanduser()
    if "://" in name:
        from kdcache.teacher.remote import RemoteModel

        remote = RemoteModel(name, role, weights=weights)
        listed: Mapping[str, Facts] | None = remote.weights
        return TeacherFiles(redact(name), remote.folder, listed=listed, remote=remote, role=role)
    if folder.is_dir():
        return TeacherFiles(name, folder, role=role)
    folder, listed = _download(name, role, weights=weights, revision=revision)
    return TeacherFiles(name, folder, listed=listed, role=role)


def _download(
    name: str, role: str, *, weights: bool, revision: str | None
) -> tuple[Path, Mapping[str, Facts] | None]:
    """The hub's files of a model; without its weights also what the hub lists of them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        listed = None if weights else _listed_by_hub(name, revision)
        patterns = [pattern for pattern in PATTERNS if not (listed and pattern == WEIGHTS)]
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns)
        return Path(folder), listed
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise UsageError(
            f"{role} {name} is neither a folder here nor a model that the hub gives "
            f"({type(error).__name__}). Check the path or the id."
        ) from error


def _listed_by_hub(name: str, revision: str | None) -> Mapping[str, Facts] | None:
    """Size and SHA-256 of each weight file of a model; None where the hub does not tell them."""
    from huggingface_hub import HfApi, constants

    from kdcache.storage.remote import Facts

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        files = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or []
    except Exception as error:  # of several libraries; without a network a copy here serves, too
        logger.info("the hub does not list %s: %s", name, error)
        return None
    listed = {}
    for one in files:
        if fnmatch.fnmatch(one.rfilename, WEIGHTS) and "/" not in one.rfilename:
            if one.lfs is None:
                return None
            listed[one.rfilename] = Facts(int(one.size or 0), f"sha256:{one.lfs.sha256}", "")
    return listed or None
