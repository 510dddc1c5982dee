"""What a loss adds up over: a whole vocabulary, or one cut over the ranks of a process group.

Rank r of a group holds some consecutive rows of the output layer, and so the logits of some ids.
All that a loss needs beyond them is, for each position, a largest value, a few sums, and one logit
of each entry of the target, which the rank that owns the id sends. A loss asks for these here; on
the whole vocabulary (`WHOLE`) each answer is what was given, so there is one loss and not two.

Logits of a slice have spare columns behind the last of its ids, of probability 0. The ids of other
ranks stand in the last one, so nothing needs a mask, and a rank may have no id at all.

Gradients follow one rule (Shoeybi et al. 2019, "Megatron-LM", section 3): what is equal on all
ranks, such as the loss, has its whole gradient on each; what belongs to one rank has its own. So a
sum over ranks passes a gradient on as it is (`total`), and a common value that enters a rank's own
numbers adds up the gradients of all ranks (`shared`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Vocabulary:
    """The whole vocabulary on this rank: nothing is exchanged.

    Attributes:
        cut: whether other ranks hold other ids.
    """

    cut: ClassVar[bool] = False

    def most(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The largest over ranks of each of these [n, k]; no gradient passes."""
        return values

    def total(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The sum over ranks of each of these [n, k]."""
        return values

    def shared(self, value: Tensor) -> Tensor:
        """A value that is equal on all ranks, for use with a rank's own numbers."""
        return value

    def columns(self, ids: Tensor, width: int) -> Tensor:
        """Where ids stand in logits with `width` columns."""
        return ids

    def share(self, vocab_size: int) -> int:
        """How many of these ids a rank has, evenly dealt: the same number on each."""
        return vocab_size

    def rows(self, vocab_size: int) -> slice:
        """This rank's ids among those from 0 on that take part."""
        return slice(0, vocab_size)

    def widened(self, logits: Tensor) -> Tensor:
        """Logits of this rank's ids with a spare column where there are other ranks."""
        return logits

    def own(self, values: Tensor) -> Tensor:
        """Values [n, width] without the spare column."""
        return values

    def pick(self, values: Tensor, ids: Tensor) -> Tensor:
        """Values [n, width] at ids [n, k]."""
        return values.gather(-1, ids)

    def spread(self, like: Tensor, ids: Tensor, values: Tensor) -> Tensor:
        """Zeros like [n, width] with values [n, k] added at ids [n, k]."""
        return torch.zeros_like(like).scatter_add(-1, ids, values)

    def logsumexp(self, x: Tensor) -> Tensor:
        """Of [n, width]: [n, 1]."""
        return x.logsumexp(-1, keepdim=True)

    def log_softmax(self, z: Tensor) -> Tensor:
        """Of [n, width]."""
        return F.log_softmax(z, -1)


WHOLE = Vocabulary()


@dataclass(frozen=True)
class VocabSlice(Vocabulary):
    """The consecutive ids of this rank; the ranks of a group hold theirs in their order.

    Attributes:
        group: name of the process group.
        ranks: its number of processes.
        start: the first id of this rank.
        length: how many rows of the output layer it holds.
        size: rows of the whole output layer, its padding included.
    """

    group: str
    ranks: int
    start: int
    length: int
    size: int

    cut: ClassVar[bool] = True

    @classmethod
    def of(
        cls,
        group: ProcessGroup,
        length: int,
        device: torch.device | str = "cpu",
        positions: int | None = None,
    ) -> VocabSlice:
        """Ask all ranks for their lengths, which waits for the device; all ranks call it together.

        Args:
            group: of the ranks that hold the output layer together.
            length: rows of this rank.
            device: one that the group's backend reaches.
            positions: of the batch, which must be the same on all ranks.

        Raises:
            UsageError: ranks with another number of positions.
        """
        from torch import distributed

        rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
        mine = torch.tensor([length, positions or 0], device=device)
        found = [torch.empty_like(mine) for _ in range(ranks)]
        distributed.all_gather(found, mine, group=group)
        table = torch.stack(found).tolist()
        counts = sorted({n for _, n in table})
        if len(counts) > 1:
            raise UsageError(
                f"the ranks of a group hold slices of one vocabulary, but batches of {counts} "
                "positions. Give all of them the same positions: the stream's rank and world_size "
                "are those of the data-parallel dimension."
            )
        lengths = [each for each, _ in table]
        return cls(group.group_name, ranks, sum(lengths[:rank]), length, sum(lengths))

    def most(self, *values: Tensor) -> tuple[Tensor, ...]:
        """One all-reduce of all."""
        joined = _all_reduce(_joined(values).detach(), "max", self.group)
        return torch.split(joined, [value.shape[-1] for value in values], -1)

    def total(self, *values: Tensor) -> tuple[Tensor, ...]:
        """One all-reduce of all; what is given may ask for a gradient."""
        joined = _joined(values)
        if joined.requires_grad:
            joined = _TOTAL(joined, self.group)
        else:
            joined = _all_reduce(joined, "sum", self.group)
        return torch.split(joined, [value.shape[-1] for value in values], -1)

    def shared(self, value: Tensor) -> Tensor:
        """Its gradient is summed over ranks."""
        found: Tensor = _SHARED(value, self.group)
        return found

    def columns(self, ids: Tensor, width: int) -> Tensor:
        """The ids of other ranks stand in the last one."""
        at = ids - self.start
        return torch.where((at >= 0) & (at < min(self.length, width - 1)), at, width - 1)

    def share(self, vocab_size: int) -> int:
        """That of the first ranks."""
        return -(-vocab_size // self.ranks)

    def rows(self, vocab_size: int) -> slice:
        """May be empty."""
        return slice(self.start, max(min(self.start + self.length, vocab_size), self.start))

    def widened(self, logits: Tensor) -> Tensor:
        """The spare column has probability 0."""
        return F.pad(logits, (0, 1), value=-torch.inf)

    def own(self, values: Tensor) -> Tensor:
        """All but the last one."""
        return values[..., :-1]

    def pick(self, values: Tensor, ids: Tensor) -> Tensor:
        """Each comes from the rank that owns the id."""
        width = values.shape[-1]
        at = self.columns(ids, width)
        (found,) = self.total(torch.where(at < width - 1, values.gather(-1, at), 0))
        return found

    def spread(self, like: Tensor, ids: Tensor, values: Tensor) -> Tensor:
        """Those of other ranks' ids are left out."""
        at, last = self.columns(ids, like.shape[-1]), like.shape[-1] - 1
        values = torch.where(at < last, values, 0)
        return torch.zeros_like(like).scatter_add(-1, at, values)

    def logsumexp(self, x: Tensor) -> Tensor:
        """In two all-reduces."""
        (top,) = self.most(x.amax(-1, keepdim=True))
        top = torch.where(top > -torch.inf, top, 0)
        (total,) = self.total((x - top).exp().sum(-1, keepdim=True))
        return total.log() + top

    def log_softmax(self, z: Tensor) -> Tensor:
        """In two all-reduces, and one backward."""
        (top,) = self.most(z.amax(-1, keepdim=True))  # large logits count from it: no rounding
        z = z - top
        (total,) = self.total(z.exp().sum(-1, keepdim=True))
        return z - self.shared(total.log())


Cut: TypeAlias = "ProcessGroup | VocabSlice | None"
"""How a caller states that a vocabulary is cut."""


def located(outputs: Tensor, dim: int, cut: Cut, positions: int) -> tuple[Tensor, Vocabulary, int]:
    """This rank's part of an output layer or of logits.

    Args:
        outputs: with the ids in dimension `dim`: of this rank if `cut` is given, or a DTensor.
        dim: 0 or 1.
        cut: a group, or what `VocabSlice.of` said of it; None where a DTensor shows it, or nothing.
        positions: of the batch.

    Returns:
        The part as a plain tensor, the vocabulary, and the outputs of all ranks together.

    Raises:
        UsageError: a DTensor that is cut in another way, or not as `cut` has it.
    """
    outputs, found = _of_dtensor(outputs, dim)
    if found is None and cut is not None:
        length = outputs.shape[dim]
        found = (
            cut
            if isinstance(cut, VocabSlice)
            else VocabSlice.of(cut, length, outputs.device, positions)
        )
        if found.length != length:
            raise UsageError(
                f"this rank has {length} outputs, but its slice of the vocabulary has "
                f"{found.length}. Make the slice with VocabSlice.of(group, {length})."
            )
    return (outputs, WHOLE, outputs.shape[dim]) if found is None else (outputs, found, found.size)


def _of_dtensor(tensor: Tensor, dim: int) -> tuple[Tensor, VocabSlice | None]:
    """The local part of a DTensor, and its slice where it is cut; other tensors as they are."""
    if not hasattr(tensor, "placements"):
        return tensor, None
    whole: Any = tensor
    mesh, placements, size = whole.device_mesh, whole.placements, whole.shape[dim]
    local: Tensor = whole.to_local()
    if len(placements) == 1 and placements[0].is_replicate():
        return local, None
    chunk = -(-size // mesh.size())
    start = min(size, chunk * mesh.get_local_rank()) if mesh.ndim == 1 else 0
    length = min(chunk, size - start)
    if len(placements) != 1 or not placements[0].is_shard(dim) or local.shape[dim] != length:
        raise UsageError(
            f"the outputs are a DTensor with placements {tuple(placements)}; expected "
            f"(Shard({dim}),) on a mesh of one dimension, that of the vocabulary. Gather its other "
            "dimensions first."
        )
    return local, VocabSlice(mesh.get_group().group_name, mesh.size(), start, length, size)


def gathered(hidden: Tensor, over: Vocabulary, cut: Cut) -> tuple[Tensor, bool]:
    """All positions of hidden states, and whether PyTorch sums their gradient over the ranks.

    A DTensor's positions may be cut over the ranks (sequence parallelism): they are gathered, and
    its own backward pass adds up the gradients of the ranks of a cut vocabulary, each a part, and
    deals them out again. Where the output layer is whole each rank has the whole gradient.

    Args:
        hidden: [n, H].
        over: what `located` found.
        cut: as given to it.

    Raises:
        UsageError: an output layer that FSDP may have cut, over ranks that read other positions.
    """
    shared = [False]
    if hasattr(hidden, "placements"):
        from torch.distributed.tensor import Partial, Replicate

        whole: Any = hidden
        mesh = whole.device_mesh
        names = [mesh.get_group(dim).group_name for dim in range(mesh.ndim)]
        shared = [isinstance(over, VocabSlice) and name == over.group for name in names]
        whole = whole.redistribute(placements=[Replicate()] * mesh.ndim)
        grads = [Partial() if part else Replicate() for part in shared]
        hidden = whole.to_local(grad_placements=grads)
    if over.cut and cut is None and not any(shared):
        raise UsageError(
            "the output layer is a DTensor, cut over ranks, and the states are not one over these "
            "ranks: this may be tensor parallelism, where all ranks have the same positions, or "
            "FSDP, where they have not. For the former pass group=weight.device_mesh.get_group(); "
            "under FSDP take the loss inside the forward, where the weight is whole."
        )
    return hidden, any(shared)


class _Total(torch.autograd.Function):
    """Sum over ranks; its gradient is the same on all of them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: str) -> Tensor:
        return _all_reduce(value, "sum", group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Shared(torch.autograd.Function):
    """A common value; its gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: str) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradients[0], "sum", ctx.group), None


# Newer versions of torch declare their types, older ones do not.
_TOTAL: Any = _Total.apply
_SHARED: Any = _Shared.apply


def _joined(values: tuple[Tensor, ...]) -> Tensor:
    return values[0] if len(values) == 1 else torch.cat(values, -1)


def _all_reduce(value: Tensor, how: str, group: str) -> Tensor:
    """As an operation that torch.compile keeps within its graph; the value itself stays."""
    ops: Any = torch.ops._c10d_functional
    found: Tensor = ops.wait_tensor(ops.all_reduce(value.contiguous(), how, group))
    return found
