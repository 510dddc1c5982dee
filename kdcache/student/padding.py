"""Checks that a student's logits for a row depend neither on the padding of its batch nor on later
tokens, and finds whether a language model needs its attention mask for that.

Some encoders mix padding into the rows (ConvBERT, FNet), and a masked language model reads the
labels that it is to predict. Their loss would not be that of the rows.

Causal attention never looks at the padding after a row, so most language models compute the same
without a mask, and without one the fastest attention kernels apply. The mask is left out for a
student that was tried both ways, from batches that are padded after their rows.

Cost: six forwards of at most three rows of 256 tokens; later one look at each batch's mask.

Checks that a sequence-to-sequence student's logits for a row depend neither on the padding of
its batch, of sources or of targets, nor on later tokens, and that they depend on the source.

Cost: six forwards of at most three rows of 256 tokens each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import UsageError, reason_of
from kdcache.student.wrapper import DistilledStudent
from kdcache.tasks import IGNORE, TASKS
from kdcache.teacher.probe import TOLERANCES, distance
from kdcache.teacher.projection import quiet

TOKENS = 256  # of a row that is tried


@torch.no_grad()
def check_rows(name: str, student: DistilledStudent, batch: Mapping[str, Tensor]) -> None:
    """Refuse a student that reads padding or later tokens; set its `needs_mask`.

    Args:
        name: of the student, for messages.
        student: with its weights, on any device.
        batch: a few rows of different lengths, right-padded: `input_ids`, `attention_mask`,
            `labels`. Students with inputs of another kind are not checked. Of a language model's
            rows that are equally long one is cut.

    Raises:
        UsageError: it cannot read a row, or names what its logits depend on.
    """
    mask, labels = batch.get("attention_mask"), batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if mask is None or any(value.shape != mask.shape for value in inputs.values()):
        return
    task = TASKS[student.task]
    device = next(student.parameters()).device
    lengths = mask.sum(-1).clamp_max(TOKENS if task.per_token else mask.shape[1]).tolist()
    if task.per_token and len(lengths) > 1 and min(lengths) == max(lengths) > 1:
        lengths[-1] //= 2
        inputs["attention_mask"] = mask.clone()
        inputs["attention_mask"][-1, lengths[-1] :] = 0

    def logits(rows: slice, stop: int, *, masked: bool = True, **changed: Tensor) -> Tensor:
        """Logits [rows, stop, V] or [rows, classes]."""
        given = {key: value[rows, :stop].to(device) for key, value in {**inputs, **changed}.items()}
        if not masked:
            del given["attention_mask"]
        # All places count, whether they have labels or not.
        marks = torch.zeros_like(labels[rows, :stop] if task.per_token else labels[rows]).to(device)
        found: Tensor | None = student(labels=marks, return_logits=True, **given).logits
        assert found is not None
        return found.float().cpu()

    def apart(padded: Tensor) -> float:
        """How far the rows of a padded batch are from each alone."""
        if not task.per_token:
            return distance(list(padded[:, None]), [row[None] for row in alone])
        return distance([row[:n] for row, n in zip(padded, lengths, strict=True)], alone)

    with quiet(student):
        with readable(name, student):
            alone = [logits(slice(i, i + 1), n)[0] for i, n in enumerate(lengths)]
        moved = apart(logits(slice(None), max(lengths)))
        if task.causal:
            ids = inputs["input_ids"][:1].clone()
            half = lengths[0] // 2
            ids[:, half : lengths[0]] = ids[:, : lengths[0] - half].flip(1)
            other = logits(slice(0, 1), lengths[0], input_ids=ids)[0]
            refuse_beyond(
                distance([other[:half]], [alone[0][:half]]),
                f"student {name} is not a causal language model: its logits at a position depend "
                "on later tokens, and so on the labels. Name a causal one.",
            )
        elif task.over_ids and (half := lengths[0] // 2):
            ids = inputs["input_ids"][:1].clone()
            ids[:, half : lengths[0]] = ids[:, : lengths[0] - half].flip(1)
            other = logits(slice(0, 1), lengths[0], input_ids=ids)[0]
            if not torch.equal(ids, inputs["input_ids"][:1]) and torch.equal(
                other[half - 1], alone[0][half - 1]
            ):
                raise UsageError(
                    f"student {name} is not a masked language model: its logits at a position do "
                    "not depend on later tokens. Name a masked one."
                )
        refuse_beyond(
            moved,
            f"student {name} gives other logits where its batch is padded, so its loss would be "
            "wrong. Use --batch-size 1, or a student that masks padding.",
        )
        if task.causal and min(lengths) < max(lengths):
            try:
                bare = apart(logits(slice(None), max(lengths), masked=False))
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
                return  # it cannot do without
            student.needs_mask = bare > TOLERANCES["float32"]


def without_mask(student: DistilledStudent, inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch on the host without its mask, where the student computes the same without it.

    Args:
        student: after `check_rows`, or with its mask.
        inputs: the batch; a mask that hides tokens before others stays.
    """
    mask = inputs.get("attention_mask")
    if student.needs_mask or mask is None or mask.ndim != 2 or mask.device.type != "cpu":
        return inputs
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        return inputs
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


@contextmanager
def readable(name: str, student: DistilledStudent) -> Iterator[None]:
    """What a Hugging Face student says of a row that it cannot read is a `UsageError`; whoever
    wrote another one wants to see where.
    """
    try:
        yield
    except (ValueError, IndexError) as error:
        if not type(student.student).__module__.startswith("transformers."):
            raise
        raise UsageError(
            f"student {name} cannot read a row of the cache: {reason_of(error)}."
        ) from error


def refuse_beyond(moved: float, message: str) -> None:
    """Refuse logits that have moved by more than rounding does."""
    if moved > TOLERANCES["float32"]:
        raise UsageError(f"{message} (They differ by {moved:.2g} of their spread.)")


@torch.no_grad()
def check_pairs(name: str, student: DistilledStudent, batch: Mapping[str, Tensor]) -> None:
    """Refuse a student that reads padding or later tokens, or that does not read the source.

    Args:
        name: of the student, for messages.
        student: with its weights, on any device.
        batch: a few rows, right-padded: `input_ids`, `attention_mask`, `decoder_input_ids`,
            `labels`. Where all sources or all targets are equally long one is cut.

    Raises:
        UsageError: it cannot read a row, or what its logits depend on.
    """
    device = next(student.parameters()).device
    source, decoder = batch["input_ids"], batch["decoder_input_ids"]
    labels = batch["labels"]
    sizes = [
        (min(int(s), TOKENS), min(int(t), TOKENS))
        for s, t in zip(batch["attention_mask"].sum(1), (labels != IGNORE).sum(1), strict=True)
    ]
    lengths, widths = (_different(part) for part in map(list, zip(*sizes, strict=True)))

    def logits(rows: list[int], *, ids: Tensor = source, written: Tensor = decoder) -> list[Tensor]:
        """Logits [target, V] of rows that share a batch."""
        long, wide = max(lengths[i] for i in rows), max(widths[i] for i in rows)
        mask = torch.zeros(len(rows), long, dtype=torch.long)
        marks = torch.full((len(rows), wide), IGNORE)
        for j, i in enumerate(rows):
            mask[j, : lengths[i]] = 1
            marks[j, : widths[i]] = labels[i, : widths[i]]
        given = {
            "input_ids": ids[rows, :long],
            "attention_mask": mask,
            "decoder_input_ids": written[rows, :wide],
            "labels": marks,
        }
        given = {key: value.to(device) for key, value in given.items()}
        found: Tensor | None = student(return_logits=True, **given).logits
        assert found is not None
        return [row[: widths[i]].float().cpu() for row, i in zip(found, rows, strict=True)]

    with quiet(student):
        every = list(range(len(labels)))
        with readable(name, student):
            alone = [logits([i])[0] for i in every]
        moved = distance(logits(every), alone)
        half = widths[0] // 2
        written = decoder.clone()
        written[0, half : widths[0]] = decoder[0, : widths[0] - half].flip(0)
        ahead = distance([logits([0], written=written)[0][:half]], [alone[0][:half]])
        other = source.clone()
        other[0, : lengths[0] // 2 + 1] = decoder[0, widths[0] - 1]
        unread = not torch.equal(other, source) and torch.equal(logits([0], ids=other)[0], alone[0])
    refuse_beyond(
        ahead if half else 0.0,
        f"student {name}'s logits at a position depend on later tokens, and so on the labels. Name "
        "another.",
    )
    refuse_beyond(
        moved,
        f"student {name} gives other logits where its batch is padded, so its loss would be wrong. "
        "Use --batch-size 1, or a student that masks padding.",
    )
    if unread:
        raise UsageError(
            f"student {name} gives the same logits for another source: it does not read it. Name "
            "another."
        )


def _different(sizes: list[int]) -> list[int]:
    """Sizes of which at least two differ, if there are two."""
    if len(sizes) > 1 and min(sizes) == max(sizes) > 1:
        sizes[-1] //= 2
    return sizes
