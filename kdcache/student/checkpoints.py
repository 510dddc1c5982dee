"""Checkpoints of the HF Trainer that are whole or do not count.

A checkpoint's `kdcache_state.json` is its seal: written when all its files are on the disk, removed
before any of them. The Trainer itself overwrites files, and deletes the oldest checkpoint before
the newest is complete; here the newest is sealed first.

Guarantee: a run that was killed at any moment resumes from a checkpoint exactly as it was saved. A
checkpoint that was changed since is refused. Cost: saving and resuming read its files once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kdcache.errors import UsageError
from kdcache.files import inner, sync_folder, sync_tree, write_json
from kdcache.humanize import redacted
from kdcache.lora import ADAPTER_CONFIG
from kdcache.storage.base import sha256_file

STATE_FILE = "kdcache_state.json"
_PREFIX = "checkpoint-"
_CONFIGS = ("config.json", ADAPTER_CONFIG)


def _seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Declare a folder whole: write its seal, with these facts and size and sum of every file."""
    sync_tree(folder)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    sums = {file: _crc(folder / file) for file in files}
    write_json(folder / STATE_FILE, {**facts, "files": files, "crc32": sums})


def _read_seal(folder: Path, *, contents: bool = False) -> dict[str, Any]:
    """The facts of a sealed folder.

    Args:
        folder: the folder.
        contents: read every file, and compare its sum where the seal has one.

    Raises:
        ValueError: the folder is not whole; states what is wrong.
    """
    try:
        document = json.loads((folder / STATE_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"has no {STATE_FILE}") from None
    if not isinstance(document, dict) or not isinstance(document.get("files"), dict):
        raise ValueError(f"has a {STATE_FILE} without a list of files")
    sums = document.pop("crc32", {})
    for file, size in document.pop("files").items():
        path = folder / inner(file)
        if not path.is_file():  # a device, to which a link may lead, has no end
            raise ValueError(f"lacks {file}")
        if (found := path.stat().st_size) != size:
            raise ValueError(f"has {found} bytes of {file} instead of {size}")
        if contents and file in sums and _crc(path) != sums[file]:
            raise ValueError(f"has a damaged {file}: its bytes are not those that were written")
    return dict(document)


def _crc(path: Path) -> int:
    """CRC-32 of a file, at the speed of a disk."""
    found = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found = zlib.crc32(part, found)
    return found


def _discard(folder: Path) -> None:
    """Remove a sealed folder, its seal first; no error where there is none."""
    if folder.is_dir():
        (folder / STATE_FILE).unlink(missing_ok=True)
        sync_folder(folder)
        shutil.rmtree(folder)


def read_state(checkpoint: Path, *, contents: bool = False) -> dict[str, Any]:
    """What the seal of a checkpoint states: cursor and identity of the run.

    Args:
        checkpoint: its folder.
        contents: compare the bytes of its files with what was written, before they are loaded.

    Raises:
        UsageError: it is not a whole checkpoint.
    """
    try:
        return _read_seal(checkpoint, contents=contents)
    except ValueError as error:
        raise UsageError(
            f"{checkpoint} {error}: it is not a whole checkpoint of kdcache. Name another one, "
            "delete it to continue from the one before, or start over with another --out."
        ) from error


def last_checkpoint(out: Path) -> Path | None:
    """The last whole checkpoint of a run, or None."""
    for folder in sorted(checkpoints(out), key=step_of, reverse=True):
        if is_whole(folder):
            return folder
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has its seal and every file that it lists."""
    try:
        _read_seal(checkpoint)
    except ValueError:
        return False
    return True


# Known only on machines that have these files.
_WHERE_THEY_ARE = ("student_files", "embeddings_files", "model_files")


def checkpoint_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"{_PREFIX}{step}"


def continues(out: Path) -> str:
    """How the same command continues a run that was stopped, and from where."""
    return continues_from(last_checkpoint(out))


def continues_from(checkpoint: Path | str | None) -> str:
    """As `continues`, from the path or address of the last checkpoint."""
    if checkpoint is None:
        return "There is no checkpoint yet: the same command starts over."
    return f"The same command continues from step {step_of(Path(checkpoint))} ({checkpoint})."


def files_sha256(name: str) -> str | None:
    """SHA-256 of a file, or of the configuration and weights in a folder; None where this machine
    has neither, as of a hub id or a built-in student. About 1 GB/s, once for a state of the files.
    """
    path = Path(name)
    if path.is_file():
        return _sha256(path)
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted({*path.glob("*.safetensors"), *(path / one for one in _CONFIGS)}):
        if file.is_file():
            digest.update(f"{file.name} {_sha256(file)}\n".encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    facts = path.stat()
    return _of(path.resolve(), facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


@functools.lru_cache(256)
def _of(path: Path, *state: int) -> str:
    return sha256_file(path)


def check_identity(state: Mapping[str, Any], identity: Mapping[str, Any], where: str) -> None:
    """Refuse to resume with other caches or options than a checkpoint's.

    Raises:
        UsageError: names what differs, then and now.
    """
    then, identity = redacted(state["identity"]), redacted(identity)
    changed = [
        f"{name}: {then.get(name)} -> {identity.get(name)}"
        for name in sorted({*then, *identity})
        if then.get(name) != identity.get(name)
        and not (name in _WHERE_THEY_ARE and None in (then.get(name), identity.get(name)))
    ]
    if changed:
        raise UsageError(
            f"{where} was made with other caches or options:\n  "
            + "\n  ".join(changed)
            + "\nUse the same ones to continue, or another --out to start over."
        )


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was taken."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, in no order."""
    found = out.glob(f"{_PREFIX}*")
    return [path for path in found if path.name.removeprefix(_PREFIX).isdecimal()]


def better(line: Mapping[str, Any], args: TrainingArguments, state: TrainerState) -> bool:
    """Whether an evaluation is better than the best one so far. Where both are equally good, the
    lower loss decides; a figure that is not defined, such as the correlation of equal scores, is
    no better than any.

    Args:
        args: with the name of the figure, and whether it rises.
        state: with all figures that were logged, and the step of the best.
    """
    name = str(args.metric_for_best_model)

    def rank(found: Mapping[str, Any]) -> tuple[float, float]:
        value = found.get(name, math.nan)
        return value if args.greater_is_better else -value, -found.get("eval_loss", math.nan)

    best = [x for x in state.log_history if name in x and x["step"] == state.best_global_step]
    return rank(line) > (rank(best[0]) if best else (-math.inf, 0.0))


_NAMES = 1 << 20  # more than a model has parameters


class Watch:
    """Finds the first step of a loss or gradients that are not finite; the host never waits.

    Cost: a pass over the gradients a step, in a few launches.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with a step that is good."""
        self._first = torch.full((), -1, dtype=torch.int64, device=device)
        self._names: list[str] = []

    def look(self, step: int, loss: Tensor, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take note of a step.

        Args:
            step: its number, from 1.
            loss: of its last batch.
            parameters: with the gradients of the whole step.
        """
        grads = {name: p.grad for name, p in parameters if p.grad is not None}
        local = {name: getattr(g, "_local_tensor", g) for name, g in grads.items()}
        local = {name: g for name, g in local.items() if g.numel()}  # a shard may have nothing
        self._names = ["", *local]
        sizes = [loss.detach(), *torch._foreach_norm(list(local.values()), math.inf)]
        bad = ~torch.stack([size.to(loss.device, torch.float32) for size in sizes]).isfinite()
        new = bad.any() & (self._first < 0)  # a tensor: the host must not wait at every step
        self._first = torch.where(new, bad.int().argmax() + step * _NAMES, self._first)

    def found(self, gather: Callable[[Tensor], Tensor]) -> tuple[int, str] | None:
        """The step and the name of its first parameter, empty if the loss is not finite either;
        None where all is well. The host waits.

        Args:
            gather: the values of all processes, from those of this one.
        """
        bad = [one for one in gather(self._first[None]).tolist() if one >= 0]
        return (min(bad) // _NAMES, self._names[min(bad) % _NAMES]) if bad else None


class CheckpointingTrainer(Trainer):  # type: ignore[misc]
    """The HF Trainer with checkpoints that are whole or absent, of finite weights.

    `bring_checkpoint` brings the checkpoint of a step to this machine, where it may be missing.
    """

    bring_checkpoint: Callable[[int], None] = staticmethod(lambda step: None)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer, which prints nothing by itself."""
        super().__init__(*args, **kwargs)
        for noisy in (PrinterCallback, ProgressCallback):
            self.remove_callback(noisy)
        self.add_callback(_FolderCallback(self))
        self._watch = Watch(self.args.device)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer; the scaler of fp16 finds overflowing gradients and skips their step."""
        loss: Tensor = super().training_step(model, *args, **kwargs)
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:
            self._watch.look(self.state.global_step + 1, loss, model.named_parameters())
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer, of a training that goes well."""
        self._check_finite()
        super().log(logs, *args, **kwargs)

    def rows_of(self, step: int) -> str:
        """Which rows a step was of, for messages; for subclasses."""
        return ""

    def _check_finite(self) -> None:
        """End a training if its loss or gradients were not finite.

        Raises:
            UsageError: names the step, its rows, and the first parameter.
        """
        found = self._watch.found(self.accelerator.gather)
        if found is None:
            return
        step, name = found
        name = re.sub(r"^(module\.|_orig_mod\.|student\.)+", "", name)
        good = last_checkpoint(Path(self.args.output_dir))
        raise UsageError(
            f"training diverged at step {step}{self.rows_of(step)}: "
            + (f"the gradient of {name}" if name else "the loss")
            + " is not finite. Nothing was saved after it; "
            + (f"{good} is whole. " if good else "no checkpoint was taken before. ")
            + "Use another --out with a lower --learning-rate, or --precision float32; where it is "
            "at the first steps already, --batch-size 1 or another model."
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not Path(checkpoint, "scheduler.pt").is_file():
            raise UsageError(
                f"{checkpoint} was saved without the optimizer: training cannot continue from it. "
                "Name another one, or start over."
            )
        super()._load_optimizer_and_scheduler(checkpoint)

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """The batches of one step; none where a resumed run has nothing left to do."""
        if self.control.should_training_stop:
            return [], None
        samples, count = super().get_batch_samples(*args)
        return samples, count

    def checkpoint_facts(self) -> dict[str, Any]:
        """What a checkpoint's seal holds besides its files; for subclasses."""
        return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        found = better(metrics, self.args, self.state)
        if found:
            self.state.best_metric = metrics[str(self.args.metric_for_best_model)]
            self.state.best_global_step = self.state.global_step
        return found

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_finite()
        out = Path(self._get_output_dir(trial=trial))
        folder = out / checkpoint_name(self.state.global_step)
        if self.args.should_save:
            _discard(folder)  # of a sitting that was killed, with other files perhaps
        self.accelerator.wait_for_everyone()
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _seal(folder, self.checkpoint_facts())
        except Exception:
            if self.args.should_save:  # a full disk needs the room
                with contextlib.suppress(OSError):
                    _discard(folder)
            raise
        finally:
            self.args.save_total_limit = keep
        if self.args.should_save and keep:
            self._rotate(out, keep)

    def _rotate(self, out: Path, keep: int) -> None:
        """Delete the oldest checkpoints but `keep`, the best and the newest being among these; what
        a killed sitting half wrote or half deleted; and any later than now, which an earlier
        sitting took before this one went back."""
        now, found = self.state.global_step, {step_of(path): path for path in checkpoints(out)}
        sealed = {step for step, path in found.items() if (path / STATE_FILE).is_file()}
        kept = sealed & {now, self.state.best_global_step}
        others = sorted((s for s in sealed - kept if s < now), reverse=True)
        kept.update(others[: max(0, keep - len(kept))])
        for step in found.keys() - kept:
            _discard(found[step])


class _FolderCallback(TrainerCallback):  # type: ignore[misc]
    """Finds the best checkpoint again where a run's folder has moved, and leaves it tidy.

    The Trainer notes an absolute path, and where that is gone it ends with the last weights.
    """

    def __init__(self, trainer: CheckpointingTrainer) -> None:
        self._trainer = trainer

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if args.should_save and args.save_total_limit:
            self._trainer._rotate(Path(args.output_dir), args.save_total_limit)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._trainer._watch = Watch(args.device)
        if not (args.load_best_model_at_end and state.best_global_step):
            return
        here = Path(args.output_dir, checkpoint_name(state.best_global_step))
        noted = Path(state.best_model_checkpoint or here)
        best = here if here.is_dir() else noted
        read_state(best, contents=True)
        state.best_model_checkpoint = str(best)
