"""A teacher's files: its identity by content, its tokenizer, its vocabulary or classes.

Cost: the identity reads every weight file once, at about 1 GB/s, unless a store or the hub lists
checksums; the rest reads small files.
Guarantee: no weights are loaded, and pickled ones are refused.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from kdcache.errors import UsageError
from kdcache.storage import redact, sha256_file
from kdcache.storage.remote import Facts
from kdcache.tasks import CAUSAL_LM
from kdcache.teacher.remote import PATTERNS, WEIGHTS, RemoteModel, is_url
from kdcache.teacher.trust import check_folder

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.txt",
    "spiece.model",
)
# Arguments of loading, which transformers saves with a tokenizer's own settings.
_OF_LOADING = {
    "_commit_hash", "_from_auto", "cache_dir", "force_download", "is_local", "local_files_only",
    "name_or_path", "proxies", "revision", "subfolder", "token", "trust_remote_code",
    "use_auth_token", "use_fast", "user_agent",
}  # fmt: skip
_OF_CALLS = {"padding", "truncation"}  # settings of the last call, in tokenizer.json


@dataclass(frozen=True)
class TeacherFiles:
    """One teacher's files on disk.

    Attributes:
        name: folder, URL or hub id, as the user gave it.
        folder: local folder with `config.json`, `*.safetensors` and the tokenizer.
        trust_remote_code: whether code that ships with the model may run.
        listed: name, size and checksum of each weight file, where a store or the hub listed them.
        remote: the files at a URL, which it keeps on this machine.
    """

    name: str
    folder: Path
    trust_remote_code: bool = False
    listed: Mapping[str, Facts] | None = field(default=None, repr=False)
    remote: RemoteModel | None = field(default=None, repr=False)

    @classmethod
    def find(
        cls, name: str, *, trust_remote_code: bool = False, weights: bool = True
    ) -> TeacherFiles:
        """Locate a teacher's files; those at a URL or on the hub are fetched unless this machine
        has them.

        Args:
            name: folder, URL or hub id.
            trust_remote_code: whether code that ships with the model may run.
            weights: whether the weights will be read; without them their identity is still known.

        Raises:
            UsageError: no such model, no safetensors weights, or code that is not trusted.
        """
        folder, remote = Path(name).expanduser(), None
        listed: Mapping[str, Facts] | None = None
        if is_url(name):
            remote = RemoteModel(name, weights=weights)
            folder, listed, name = remote.folder, remote.weights, redact(name)
        elif not folder.is_dir():
            folder, listed = _download(name, weights=weights)
        if (folder / "adapter_config.json").is_file():
            base = json.loads((folder / "adapter_config.json").read_bytes())
            raise UsageError(
                f"teacher {name} is an adapter of {base.get('base_model_name_or_path')}, not a "
                "model. Merge it first: PEFT's merge_and_unload(), then save_pretrained()."
            )
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"teacher {name} has no config.json: it is not a Hugging Face model folder."
            )
        check_folder(
            f"teacher {name}", folder, trust_remote_code=trust_remote_code, elsewhere=listed or ()
        )
        return cls(name, folder, trust_remote_code, listed, remote)

    @cached_property
    def sha256(self) -> str:
        """Identity: SHA-256 over the configuration and every weight file. About 1 GB/s."""
        digest = hashlib.sha256()
        config = json.loads((self.folder / "config.json").read_bytes())
        # What says nothing about the function computed must not make two equal teachers differ.
        for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
            config.pop(key, None)
        digest.update(json.dumps(config, sort_keys=True).encode())
        for name in self._weights():
            digest.update(name.encode())
            digest.update((self._checksum(name) or sha256_file(self.folder / name)).encode())
        return digest.hexdigest()

    def _weights(self) -> list[str]:
        """Names of the weight files, here or listed."""
        return sorted({path.name for path in self.folder.glob(WEIGHTS)} | set(self.listed or ()))

    def _checksum(self, name: str) -> str | None:
        """A weight file's SHA-256, or size and checksum, where it is known without reading it."""
        facts = (self.listed or {}).get(name)
        if facts is not None and facts.checksum:
            kind, _, checksum = facts.checksum.partition(":")
            return checksum if kind == "sha256" else f"{facts.size} {facts.checksum}"
        # The hub's cache names a blob by its SHA-256: no need to read 100 GB for it.
        target = (self.folder / name).resolve().name
        return target if re.fullmatch("[0-9a-f]{64}", target) else None

    def check_same(self, sha256: str) -> None:
        """Refuse another model than a build began with, where that is known without reading it.

        Raises:
            UsageError: it has another identity.
        """
        if all(map(self._checksum, self._weights())) and self.sha256 != sha256:
            raise UsageError(
                f"teacher {self.name} was changed since this build began. Restore it and run the "
                "same command again, or build another cache."
            )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files."""
        if self.listed:
            return sum(facts.size for facts in self.listed.values())
        return sum(path.stat().st_size for path in self.folder.glob(WEIGHTS))

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        return AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        try:
            return AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise UsageError(f"teacher {self.name} has no usable tokenizer: {error}") from error

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has files of a tokenizer."""
        return any((self.folder / name).is_file() for name in TOKENIZER_FILES)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of the logits."""
        names = self.config.id2label
        return tuple(str(names[i]) for i in range(len(names)))

    def check_task(self, task: str) -> None:
        """Refuse a model whose answers are no distribution over ids or classes.

        Raises:
            UsageError: an architecture without such a head, regression, or several labels a row.
        """
        config, causal = self.config, task == CAUSAL_LM
        known = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
        own_code = self.trust_remote_code and getattr(config, "auto_map", None)
        if type(config) not in known._model_mapping and not own_code:
            raise UsageError(
                f"teacher {self.name} is of type {config.model_type}, for which transformers has "
                f"no model for {task}. Name another teacher, or another --task."
            )
        if causal:
            return
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            raise UsageError(
                f"teacher {self.name} gives several labels to a text (its problem_type is "
                "multi_label_classification): its logits are not a distribution over classes. "
                "Name a classifier with one label per text."
            )
        if problem == "regression" or len(self.label_names) < 2:
            raise UsageError(
                f"teacher {self.name} has a regression head of {len(self.label_names)} outputs, "
                "not classes. Name a classifier of two classes or more."
            )

    def vocab_size(self, task: str) -> int:
        """Width of a soft target: the classes, or the ids that tokenizer and output layer share."""
        if task != CAUSAL_LM:
            return len(self.label_names)
        known = max(self.tokenizer.get_vocab().values()) + 1
        width = int(self.config.get_text_config().vocab_size)
        return min(int(known), width)


def _download(name: str, *, weights: bool) -> tuple[Path, Mapping[str, Facts] | None]:
    """The hub's files of a model; without its weights also what the hub lists of them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        listed = None if weights else _listed_by_hub(name)
        patterns = [pattern for pattern in PATTERNS if not (listed and pattern == WEIGHTS)]
        return Path(snapshot_download(name, allow_patterns=patterns)), listed
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise UsageError(
            f"teacher {name} is neither a folder here nor a model that the hub gives "
            f"({type(error).__name__}). Check the path or the id."
        ) from error


def _listed_by_hub(name: str) -> Mapping[str, Facts] | None:
    """Size and SHA-256 of each weight file of a model; None where the hub does not tell them."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        files = HfApi().model_info(name, files_metadata=True).siblings or []
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


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Name and content of the files that rebuild a tokenizer.

    They are a part of the cache, so they hold nothing of how and where the tokenizer was loaded.
    """
    with tempfile.TemporaryDirectory(prefix="kdcache-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        found = {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}
    config, backend = "tokenizer_config.json", "tokenizer.json"
    values = json.loads(found[config])
    values = {name: value for name, value in values.items() if name not in _OF_LOADING}
    found[config] = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    state = json.loads(found.get(backend, b"{}"))
    if any(state.get(name) for name in _OF_CALLS):
        state |= dict.fromkeys(_OF_CALLS)
        found[backend] = json.dumps(state, indent=2, ensure_ascii=False).encode()
    return found


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of what a tokenizer does: its model, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        model: Any = {k: v for k, v in state.items() if k not in _OF_CALLS}
    else:
        model = sorted(tokenizer.get_vocab().items())
    facts = [model, sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items())]
    facts.append(tokenizer.chat_template)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
