"""The teacher's output layer, for targets that are hidden states: made once, before the first span.

The teacher is loaded once more for it: in this process, or on a node of the cluster where the build
runs on one. Its layer is found and proved (`kdcache.teacher.output_layer`), and for `hidden:int8`
the means and deviations of its states' channels are measured on a sample of the corpus. Then all
workers read the layer from the cache: the bytes of a cache do not depend on them.

Cost: loading the teacher, and some 8,000 tokens for `int8`. A build that is resumed takes the layer
that is there.
Guarantee: on one kind of machine the layer is a pure function of the teacher, the corpus and the
row options. On another kind the measured means may differ in their last digits; that makes another
cache, and never a mixed one, since the spec has the hash of the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch

from kdcache.cache import Cache
from kdcache.cache.layer_file import layer_bytes
from kdcache.cluster import cluster_address
from kdcache.commands.build.on_ray import run_once
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.build.prepare import Prepared
from kdcache.commands.build.ranks import sampled_rows
from kdcache.rows import Row
from kdcache.rows.batches import batches
from kdcache.storage import open_storage
from kdcache.targets import Hidden, OutputLayer
from kdcache.tasks import TASKS
from kdcache.teacher import Teacher, TeacherOptions

_TOKENS = 1 << 13


def with_layer(options: BuildOptions, plan: Prepared) -> Prepared:
    """A build's plan with the output layer, where its codec needs one.

    Raises:
        UsageError: the teacher's logits are not its output layer's alone.
    """
    codec = plan.spec.make_codec()
    if not isinstance(codec, Hidden):
        return plan
    adopted = _layer_there(options.out, plan)
    if adopted is not None:
        return dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, output_layer=adopted))
    rows = _sample(plan) if codec.needs_channels else []
    arguments = (plan.teacher, plan.spec.vocab_size, rows, plan.batch_tokens)
    if options.workers != 0 and cluster_address(options.address):
        made = run_once(make_layer, *arguments, gpus=plan.gpus, address=options.address)
    else:
        made = make_layer(*arguments)
        torch.cuda.empty_cache()  # the workers' teachers need the room
    sha256 = hashlib.sha256(made).hexdigest()
    spec = dataclasses.replace(plan.spec, output_layer=sha256)
    return dataclasses.replace(plan, spec=spec, output_layer=made)


def make_layer(
    teacher: TeacherOptions, vocab_size: int, rows: Sequence[Row], batch_tokens: int
) -> bytes:
    """The file of a teacher's output layer.

    Args:
        teacher: which teacher; asked for its states.
        vocab_size: V.
        rows: by which to measure the channels; none to leave that out.
        batch_tokens: padded tokens of a batch, at most.
    """
    ids = np.arange(16, dtype=np.int32) % vocab_size
    with closing(Teacher(teacher, vocab_size)) as one:
        source = ids if TASKS[teacher.task].source else None
        one.probe(rows or [Row(ids, ids, source=source)])
        assert one.layer is not None, "states are asked for"
        return layer_bytes(measured(one, one.layer, rows, batch_tokens) if rows else one.layer)


def measured(
    teacher: Teacher, layer: OutputLayer, rows: Sequence[Row], batch_tokens: int
) -> OutputLayer:
    """A layer with the means and units of its channels, by the states of some rows."""
    count, sums = 0, torch.zeros(2, layer.width, dtype=torch.float64)
    for batch in batches([row.sizes for row in rows], batch_tokens):
        for _, states in teacher.slices([rows[i] for i in batch]):
            assert states is not None, "they are asked for"
            x = states.double()
            sums += torch.stack([x.sum(0), x.square().sum(0)]).cpu()
            count += len(x)
    mean, square = sums / max(count, 1)
    return layer.with_channels(mean, (square - mean.square()).clamp_min(0).sqrt())


def _layer_there(out: str, plan: Prepared) -> str | None:
    """Hash of the layer of a cache that this build resumes, if there is one."""
    storage = open_storage(out)
    if not storage.exists("spec.json"):
        return None
    cache = Cache.read_spec(storage)
    sha256 = cache.spec.output_layer
    same = not cache.spec.differences(dataclasses.replace(plan.spec, output_layer=sha256))
    here = sha256 is not None and storage.exists(f"output_layer-{sha256[:16]}.safetensors")
    return sha256 if same and here else None


def _sample(plan: Prepared) -> list[Row]:
    """Rows from all over the corpus, of some 8,000 tokens together."""
    rows = list(sampled_rows(plan.corpus, plan.rows, plan.tokenizer))
    tokens = sum(sum(row.sizes) for row in rows)
    wanted = min(len(rows), max(1, len(rows) * _TOKENS // max(tokens, 1)))
    return [rows[i * len(rows) // wanted] for i in range(wanted)]
