"""Checks that a sequence-to-sequence student's logits for a row depend neither on the padding of
its batch, of sources or of targets, nor on later tokens, and that they depend on the source.

Cost: six forwards of at most three rows of 256 tokens each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.student.padding import TOKENS, readable, refuse_beyond
from kdcache.student.wrapper import DistilledStudent
from kdcache.tasks import IGNORE
from kdcache.teacher.probe import distance
from kdcache.teacher.projection import quiet


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
