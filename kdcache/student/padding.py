"""Checks that a student's logits for a row do not depend on its batch's padding or on later tokens.

Some encoders mix padding into the rows (ConvBERT, FNet), and some masked language models read the
labels that they are to predict: their loss would not be that of the rows. Of a sequence-to-sequence
student, padding of sources and of targets is tried, and that the logits depend on the source.

Causal attention never looks at the padding after a row, so most language models compute the same
without a mask, and without one the fastest attention kernels apply. The mask is left out for a
student that was tried both ways, from batches that are padded after their rows.

Gradients are compared as well: those of some models are not finite next to padding (Gemma 3n),
where their logits are right.

Documents of a row that do not attend to each other have `position_ids`, which begin again at 0 with
each, and no attention mask. From these transformers makes block-diagonal masks (SDPA, flex, eager),
or calls FlashAttention for sequences of different lengths, which it does for a batch of a single
row: there the rows of a batch are laid end to end. Some architectures ignore positions in part
(state-space and linear attention, ALiBi, relative positions): their documents would leak into each
other without a word, so each student is tried.

Cost: six forwards and two backwards of at most three rows of 256 tokens, of documents six forwards
more; later one look at each batch's mask. Guarantee: none for documents unlike those tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kdcache.errors import UsageError, reason_of
from kdcache.tasks import IGNORE, TASKS
from kdcache.teacher.probe import TOLERANCES, distance
from kdcache.teacher.projection import call, logits_of, quiet, text_config

DistilledStudent: TypeAlias = Any  # its module imports this one

TOKENS = 256  # of a row that is tried
_BESIDE = 4  # tokens of padding added to a batch
_LEAST = 12  # tokens of a row that is cut into documents
_ATTENTION = "_attn_implementation"


@torch.no_grad()
def check_rows(
    name: str, student: DistilledStudent, batch: Mapping[str, Tensor], *, trains: bool = True
) -> None:
    """Refuse a student that reads padding or later tokens; set its `needs_mask`.

    Args:
        batch: a few rows of different lengths, right-padded: `input_ids`, `attention_mask`,
            `labels`. Students with inputs of another kind are not checked. Of a language model's
            rows that are equally long one is cut.
        trains: try its gradients, too.

    Raises:
        UsageError: it cannot read a row, or names what its logits or gradients depend on.
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

    def answer(rows: slice, stop: int, *, masked: bool = True, **changed: Tensor) -> Any:
        """Logits [rows, stop, V] or [rows, classes], and a loss summed over all tokens."""
        given = {key: value[rows, :stop].to(device) for key, value in {**inputs, **changed}.items()}
        if not masked:
            del given["attention_mask"]
        # All positions count, whether they have labels or not.
        marks = torch.zeros_like(labels[rows, :stop] if task.per_token else labels[rows])
        if task.per_token:
            marks[inputs["attention_mask"][rows, :stop] == 0] = IGNORE
        return _answer(student, {**given, "labels": marks.to(device)})

    def logits(rows: slice, stop: int, **how: Any) -> Tensor:
        return _plain(answer(rows, stop, **how).logits)

    def apart(padded: Tensor) -> float:
        """How far the rows of a padded batch are from each alone."""
        if not task.per_token:
            return distance(list(padded[:, None]), [row[None] for row in alone])
        return distance([row[:n] for row, n in zip(padded, lengths, strict=True)], alone)

    with quiet(student):
        with readable(name, student), torch.set_grad_enabled(trains):
            each = [answer(slice(i, i + 1), n) for i, n in enumerate(lengths)]
            whole = answer(slice(None), max(lengths) if task.per_token else mask.shape[1])
        alone = [_plain(one.logits)[0] for one in each]
        moved = apart(_plain(whole.logits))
        if task.causal:
            ids = inputs["input_ids"][:1].clone()
            half = lengths[0] // 2
            ids[:, half : lengths[0]] = ids[:, : lengths[0] - half].flip(1)
            other = logits(slice(0, 1), lengths[0], input_ids=ids)[0]
            refuse_beyond(
                student,
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
            student,
            moved,
            f"student {name} gives other logits where its batch is padded, so its loss would be "
            "wrong. Use --batch-size 1, or a student that masks padding.",
        )
        if trains:
            _check_gradients(name, student, [one.loss for one in each], whole.loss)
        if task.causal and min(lengths) < max(lengths):
            try:
                bare = apart(logits(slice(None), max(lengths), masked=False))
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
                return  # it cannot do without
            student.needs_mask = bare > tolerance(student)


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
    """What a Hugging Face student reports of a row that it cannot read is a `UsageError`; whoever
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


def _answer(student: DistilledStudent, batch: Mapping[str, Any]) -> Any:
    """What a student returns for a batch. It may be at work in a forward of its own, with its
    weights gathered: its hooks are left out, and so is the autocast that a trainer wraps it in."""
    return type(student).forward(student, count=1.0, return_logits=True, **batch)


def _plain(logits: Tensor) -> Tensor:
    return logits.detach().float().cpu()


@torch.enable_grad()
def _check_gradients(
    name: str, student: DistilledStudent, alone: Sequence[Tensor], padded: Tensor
) -> None:
    """Refuse a student if its gradients are not finite, or change where its batch is padded.

    Args:
        alone: losses of each row by itself.
        padded: that of one batch of these rows.
    """
    if not (loss := torch.stack([*alone]).sum()).isfinite():
        return
    want, got = (_traces(student, one) for one in (loss, padded))
    least = 1e-3 * max((size for size, _ in want.values()), default=0.0) + 1e-12
    for key, (size, dot) in want.items():
        moved = abs(got[key][1] - dot) / max(size, least)
        if not math.isfinite(dot):
            raise UsageError(
                f"student {name} cannot be trained: its loss is finite, its gradient of {key} "
                "is not, for rows of the cache by themselves. Name another student."
            )
        if not moved <= 10 * tolerance(student):
            what = f"moves by {moved:.2g} of its size" if moved < math.inf else "is not finite"
            raise UsageError(
                f"student {name} has other gradients where its batch is padded: that of {key} "
                f"{what}. Use --batch-size 1, or another student."
            )


def _traces(student: DistilledStudent, loss: Tensor) -> dict[str, tuple[float, float]]:
    """Of each parameter the size of its gradient, and a product with numbers from -1 to 1, which
    stands for all its entries: the gradients of all parameters are never held at once."""
    found: dict[str, tuple[float, float]] = {}

    def keep(key: str, parameter: Tensor) -> None:
        assert parameter.grad is not None, "it was just accumulated"
        gradient, parameter.grad = parameter.grad.double().flatten(), None
        numbers = torch.arange(len(gradient), device=gradient.device).double().sin()
        found[key] = (float(gradient.norm()), float(gradient @ numbers))

    with ExitStack() as hooks, torch.backends.cudnn.flags(enabled=False):  # no LSTM backward else
        for key, parameter in student.student.named_parameters():
            if parameter.requires_grad:
                add: Any = parameter.register_post_accumulate_grad_hook
                hooks.callback(add(partial(keep, key)).remove)
        loss.backward()  # type: ignore[no-untyped-call]
    return found


def check_first(student: DistilledStudent, labels: Tensor, inputs: Mapping[str, Any]) -> None:
    """`check_rows` or `check_pairs` from within a student's own forward, on up to three rows of its
    batch with padding added; gradients are not tried.

    It takes as many forwards whatever is in the rows: weights that are sharded are gathered in each
    by all processes at once.
    """
    mask = inputs["attention_mask"]
    chosen = torch.tensor(sorted({0, len(labels) // 2, len(labels) - 1}), device=mask.device)
    batch = {k: v[chosen] for k, v in {**inputs, "labels": labels}.items() if v is not None}
    columns = _BESIDE if student.reach is None else student.reach - mask.shape[1]
    if not TASKS[student.task].per_token and columns > 0:
        beside = (0, min(_BESIDE, columns))
        batch |= {k: nn.functional.pad(batch[k], beside) for k in batch if k != "labels"}
    needed, name = student.needs_mask, type(student.student).__name__
    with torch.autocast(mask.device.type, enabled=False):
        if "decoder_input_ids" in batch:
            check_pairs(name, student, batch, trains=False)
        else:
            check_rows(name, student, batch, trains=False)
    student.needs_mask = needed  # a resumed run takes the steps of one that was not stopped


def refuse_beyond(student: DistilledStudent, moved: float, message: str) -> None:
    """Refuse logits that have moved by more than rounding does."""
    if moved > tolerance(student):
        raise UsageError(f"{message} (They differ by {moved:.2g} of their spread.)")


@torch.no_grad()
def check_pairs(
    name: str, student: DistilledStudent, batch: Mapping[str, Tensor], *, trains: bool = True
) -> None:
    """Refuse a student that reads padding or later tokens, or that does not read the source.

    Args:
        batch: a few rows, right-padded: `input_ids`, `attention_mask`, `decoder_input_ids`,
            `labels`. Where all sources or all targets are equally long one is cut.
        trains: try its gradients, too.

    Raises:
        UsageError: it cannot read a row, or what its logits or gradients depend on.
    """
    device = next(student.parameters()).device
    source, decoder = batch["input_ids"], batch["decoder_input_ids"]
    labels = batch["labels"]
    sizes = [
        (min(int(s), TOKENS), min(int(t), TOKENS))
        for s, t in zip(batch["attention_mask"].sum(1), (labels != IGNORE).sum(1), strict=True)
    ]
    lengths, widths = (_different(part) for part in map(list, zip(*sizes, strict=True)))

    def answer(rows: list[int], *, ids: Tensor = source, written: Tensor = decoder) -> Any:
        """Logits [rows, target, V] of rows that share a batch, and their loss."""
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
        return _answer(student, {key: value.to(device) for key, value in given.items()})

    def logits(rows: list[int], **how: Tensor) -> list[Tensor]:
        """Logits [target, V] of each."""
        return of_rows(answer(rows, **how), rows)

    def of_rows(found: Any, rows: list[int]) -> list[Tensor]:
        return [row[: widths[i]] for row, i in zip(_plain(found.logits), rows, strict=True)]

    with quiet(student):
        every = list(range(len(labels)))
        with readable(name, student), torch.set_grad_enabled(trains):
            each, whole = [answer([i]) for i in every], answer(every)
        alone = [of_rows(one, [i])[0] for i, one in enumerate(each)]
        moved = distance(of_rows(whole, every), alone)
        half = widths[0] // 2
        written = decoder.clone()
        written[0, half : widths[0]] = decoder[0, : widths[0] - half].flip(0)
        ahead = distance([logits([0], written=written)[0][:half]], [alone[0][:half]])
        other = source.clone()
        other[0, : lengths[0] // 2 + 1] = decoder[0, widths[0] - 1]
        unread = not torch.equal(other, source) and torch.equal(logits([0], ids=other)[0], alone[0])
    refuse_beyond(
        student,
        ahead if half else 0.0,
        f"student {name}'s logits at a position depend on later tokens, and so on the labels. Name "
        "another.",
    )
    refuse_beyond(
        student,
        moved,
        f"student {name} gives other logits where its batch is padded, so its loss would be wrong. "
        "Use --batch-size 1, or a student that masks padding.",
    )
    if trains:
        with quiet(student):
            _check_gradients(name, student, [one.loss for one in each], whole.loss)
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


@torch.no_grad()
def check_documents(student: nn.Module, input_ids: Tensor) -> None:
    """Compare documents that share a row with each alone.

    Args:
        student: a causal language model.
        input_ids: int64 [B, L] of a batch, where the student wants them; some tokens are used.

    Raises:
        UsageError: they differ.
    """
    ids = input_ids[0, :TOKENS]
    ids = ids.repeat(-(-_LEAST // len(ids)))
    n = len(ids)
    rows = torch.stack([ids, ids.flip(0)])
    cuts = [(0, n // 3, n // 3 + 1, n), (0, n // 2, n)]
    position_ids = torch.stack(
        [torch.cat([torch.arange(b - a) for a, b in pairwise(at)]) for at in cuts]
    ).to(ids.device)
    documents = [(row, a, b) for row, at in enumerate(cuts) for a, b in pairwise(at)]
    with quiet(student):
        inputs = {"input_ids": rows, "position_ids": position_ids}
        together = _logits(student, in_one_row(student, inputs)).reshape(2, n, -1)
        alone = [_logits(student, {"input_ids": rows[r : r + 1, a:b]})[0] for r, a, b in documents]
    moved = distance([together[r, a:b] for r, a, b in documents], alone)
    if moved > tolerance(student):
        raise UsageError(
            f"student {type(student).__name__} lets documents of one row read each other: their "
            f"logits differ from those of each alone by {moved:.2g} of their spread. Use a cache "
            "built with --packing split or --attend row, or another architecture."
        )


def in_one_row(student: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of a batch end to end, for FlashAttention; else the batch as it is.

    The inputs have `position_ids`; padding is a document too.
    """
    implementation = getattr(text_config(getattr(student, "config", None)), _ATTENTION, None)
    if "flash" not in str(implementation):
        return dict(inputs)
    shape = inputs["position_ids"].shape
    return {
        name: value.reshape(1, -1) if isinstance(value, Tensor) and value.shape == shape else value
        for name, value in inputs.items()
    }


def _logits(student: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    found = logits_of(call(student, inputs)).float().cpu()
    return found[:, found.shape[1] - inputs["input_ids"].shape[1] :]  # prompt tuning adds tokens


def tolerance(student: nn.Module) -> float:
    """How far rounding may move a student's logits, as its weights and the settings of torch are:
    see `kdcache.teacher.probe.TOLERANCES`."""
    weight = next(student.parameters())
    dtype, device = weight.dtype, weight.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if hasattr(weight, "device_mesh"):  # sharded, and gathered in whatever dtype
        dtype = torch.bfloat16
    rough = device == "cuda" and torch.get_float32_matmul_precision() != "highest"
    if rough and dtype == torch.float32:
        dtype = torch.float16  # TF32 has as many digits
    return TOLERANCES.get(str(dtype).removeprefix("torch."), TOLERANCES["bfloat16"])


def pick(values: Tensor, at: Tensor) -> Tensor:
    """Rows [P, ...] of values [B, L, ...] at flat indices; a view if all are requested."""
    flat = values.flatten(0, 1)
    return flat if len(at) == len(flat) else flat.index_select(0, at)


def step_count(
    own: float | Tensor | None, items: float | Tensor | None, hard_labels: Tensor | None
) -> float | Tensor | None:
    """What a batch's loss is divided by: its own count, or a trainer's of the step, if it has one.

    Raises:
        UsageError: the trainer has not counted the labels that have no soft target.
    """
    if items is not None and hard_labels is not None:
        raise UsageError(
            "the trainer divides by the labels that have a soft target alone (num_items_in_batch), "
            "and this batch has others (--positions): its loss would be too large. Train on a "
            "TargetStream with kdcache's DistillationTrainer."
        )
    return own if items is None else items
