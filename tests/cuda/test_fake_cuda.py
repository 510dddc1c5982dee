"""Build and training on fake CUDA tensors: no mixed devices, dtypes as promised, no hidden wait."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import further
from fake import Waits, every_wait_is_seen, fake_cuda, on_fake_cuda
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from kdcache.loss import Anchor, VocabSlice, fused, fused_linear_distillation
from kdcache.rows import Row
from kdcache.stream import SumOverRanks
from kdcache.student import DistilledStudent
from kdcache.student.checkpoints import Watch
from kdcache.student.positions import Share
from kdcache.student.stream_loader import Copies, host_positions
from kdcache.student.trainer import DistillationTrainer
from kdcache.targets import (
    AnchoredTargets,
    Codec,
    DenseTargets,
    Hidden,
    HiddenTargets,
    OutputLayer,
    SparseTargets,
    Targets,
)
from kdcache.targets.device import label_logprobs
from kdcache.teacher import Teacher, TeacherOptions, teacher
from kdcache.teacher.projection import Projection

CODECS = ("dense", "dense:float16", "topk:64", "sample:20", "anchored:20")
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
MIXED = hasattr(torch.ops.aten.addmm, "dtype_out")  # from PyTorch 2.8


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations one by one; what the compiler makes of them is `test_generated_code.py`'s."""
    monkeypatch.setenv("KDCACHE_COMPILE", "0")


def fake_llama(vocabulary: int, dtype: torch.dtype, device: str = "cuda:0") -> Any:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = on_fake_cuda(model, dtype, device)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 1.5), *further(((2.0,),))])
@pytest.mark.parametrize("vocabulary", [500, 50_257])
def test_every_codec_encodes_where_the_logits_are(
    codec: str, temperatures: tuple[float, ...], vocabulary: int
) -> None:
    chosen = Codec.parse(codec, temperatures, vocabulary)
    small = Codec.parse(codec, temperatures, 500)
    types = {k: v.dtype for k, v in small.encode(*logits_and_noise(500, "cpu", FLOAT32)).items()}
    with fake_cuda(2):
        for dtype, device in ((BFLOAT16, "cuda:0"), (FLOAT16, "cuda:1"), (FLOAT32, "cuda:1")):
            # The noise goes where a teacher's inputs go; a spread teacher's logits come from its
            # last device.
            logits, u = logits_and_noise(vocabulary, device, dtype)
            with Waits() as waits:
                encoded = chosen.encode(logits, u)
            assert {str(v.device) for v in encoded.values()} == {device}
            assert {len(v) for v in encoded.values()} == {len(logits)}
            assert {k: v.dtype for k, v in encoded.items()} == types
            assert not waits.found


def logits_and_noise(vocabulary: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # A view: what is left of a padded output layer.
    whole = torch.zeros(5, vocabulary + 64, dtype=dtype, device=device)
    first = "cuda:0" if device != "cpu" else "cpu"
    return whole[:, :vocabulary], torch.zeros(5, dtype=torch.float64, device=first)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "int8"])
def test_states_are_encoded_where_they_are(stored: str) -> None:
    vocabulary, width = 500, 96
    layer = OutputLayer(
        torch.zeros(vocabulary, width), mean=torch.zeros(width), unit=torch.ones(width)
    )
    chosen = Hidden(vocabulary, (1.0,), stored, layer)
    types = {k: v.dtype for k, v in chosen.encode(torch.zeros(5, width)).items()}
    with fake_cuda(2):
        for dtype, device in ((BFLOAT16, "cuda:0"), (FLOAT16, "cuda:1"), (FLOAT32, "cuda:1")):
            states = torch.zeros(5, width, dtype=dtype, device=device)
            channels = torch.zeros(width, device=device), torch.zeros(width, device=device)
            copied_before = mock.patch.object(OutputLayer, "channels", return_value=channels)
            with copied_before, Waits() as waits:
                encoded = chosen.encode(states)
            assert {str(v.device) for v in encoded.values()} == {device}
            assert {k: v.dtype for k, v in encoded.items()} == types
            assert not waits.found


@pytest.mark.parametrize("padding", [0, 64])
@pytest.mark.parametrize("temperatures", [(1.0, 2.0), *further(((2.0,),))])
@pytest.mark.parametrize("codec", ["topk:16", "sample:20", "hidden:float16", "hidden:int8"])
def test_a_batch_of_a_build_never_waits(
    codec: str, temperatures: tuple[float, ...], padding: int
) -> None:
    vocabulary = 32_000
    hidden = codec.startswith("hidden")
    options = TeacherOptions(
        ("llama",), "causal-lm", device="cuda", dtype="bfloat16", states=hidden
    )
    rows = [Row(np.zeros(n, np.int32), np.zeros(n, np.int32)) for n in (300, 256, 17)]
    chosen = Codec.parse(codec, temperatures, vocabulary)
    if isinstance(chosen, Hidden):
        layer = OutputLayer(torch.zeros(vocabulary, 64), mean=torch.zeros(64), unit=torch.ones(64))
        chosen = chosen.with_layer(layer)
    with fake_cuda(), every_wait_is_seen(), channels_on_the_device(64):
        model = fake_llama(vocabulary + padding, BFLOAT16).eval().requires_grad_(False)
        with mock.patch.object(teacher, "load_models", return_value=[model]):
            one = Teacher(options, vocabulary)
        # The probe before the first batch reads values, which fake tensors have not.
        one._probed = one.models[0].direct = True
        positions = 0
        with Waits() as waits:
            for piece in one.slices(rows):
                noise = fake_noise(len(piece.logits))
                encoded = chosen.encode(piece.read_by(chosen), noise)
                logprobs = label_logprobs(piece.logits, noise.long(), encoded)
                assert encoded["finite"].device.type == logprobs.device.type == "cuda"
                assert logprobs.dtype == FLOAT32
                positions += len(piece.logits)
            one.take_clipped_mass()
        assert positions == sum(len(row.input_ids) for row in rows)
    ours = [where for _, where in waits.found if not where.startswith("transformers/")]
    assert not ours, waits.found
    # Whether several sequences share a row is asked by transformers once a batch.
    assert [where for _, where in waits.found] == [
        "transformers/masking_utils.py:find_packed_sequence_indices"
    ]


def channels_on_the_device(width: int) -> contextlib.AbstractContextManager[object]:
    """Means and units are copied once, before the batches that are looked at."""
    channels = torch.zeros(width, device="cuda"), torch.zeros(width, device="cuda")
    return mock.patch.object(OutputLayer, "channels", return_value=channels)


def fake_noise(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64, device="cuda")


TYPES = [
    (BFLOAT16, BFLOAT16, None),
    (FLOAT32, FLOAT32, None),
    (FLOAT32, FLOAT32, BFLOAT16),  # float32 master weights under autocast
    (BFLOAT16, FLOAT32, BFLOAT16),
    (FLOAT32, FLOAT32, FLOAT16),
]


KINDS = ("sample", "topk", "anchored", "dense", "hidden", "levels")
LAYERS = ((1.0, None, 1), (2.0, 30.0, 1), (2.0, 30.0, 8))  # temperature, cap, ranks
FUSED = [(*types, kind, *layer) for kind in KINDS for layer in LAYERS for types in TYPES]
# Each kind with each layer, in turn with each of the types: of 18 forms 5 types have 3 or 4.
TYPICAL = [FUSED[5 * i + i % 5] for i in range(len(KINDS) * len(LAYERS))]


@pytest.mark.parametrize(
    ("states", "weights", "autocast", "kind", "temperature", "cap", "ranks"),
    [*TYPICAL, *further(*(one for one in FUSED if one not in TYPICAL))],
)
def test_the_fused_loss_keeps_devices_and_dtypes(
    states: torch.dtype,
    weights: torch.dtype,
    autocast: torch.dtype | None,
    kind: str,
    temperature: float,
    cap: float | None,
    ranks: int,
) -> None:
    n, width, vocabulary = 700, 32, 12_800
    rows = vocabulary + 64
    group = VocabSlice("0", ranks, 0, rows, rows) if ranks > 1 else None
    with fake_cuda(), mock.patch.object(fused, "_mixed_addmm", return_value=False):
        hidden = torch.zeros(n, width, dtype=states, device="cuda")
        weight = torch.zeros(rows, width, dtype=weights, device="cuda")
        bias = torch.zeros(rows, dtype=weights, device="cuda")
        labels = torch.zeros(n, dtype=torch.int64, device="cuda")
        targets = fake_targets(kind, n, vocabulary, temperature)
        with Waits() as waits, under(autocast):
            parts, gradients = forward_and_backward(
                hidden, weight, bias, labels, targets, cap, group
            )
    assert [(p.dtype, p.device.type, p.ndim) for p in parts] == 3 * [(FLOAT32, "cuda", 0)]
    assert [(g.dtype, g.shape, str(g.device)) for g in gradients] == [
        (x.dtype, x.shape, "cuda:0") for x in (hidden, weight, bias)
    ]
    assert not waits.found


def under(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cuda", dtype) if dtype is not None else contextlib.nullcontext()


def fake_targets(
    kind: str, n: int, vocabulary: int, temperature: float, device: str = "cuda"
) -> Targets:
    if kind in ("hidden", "levels"):
        weight = torch.zeros(vocabulary, 48, dtype=BFLOAT16, device=device)
        channels = {name: torch.ones(48, device=device) for name in ("mean", "unit")}
        bias = torch.zeros(vocabulary, device=device)
        with mock.patch.object(OutputLayer, "__post_init__"):  # which looks at the units
            layer = OutputLayer(weight, bias, scale=0.5, cap=30.0, **channels)
        if kind == "hidden":
            return HiddenTargets(torch.zeros(n, 48, device=device), layer, temperature)
        levels, steps = (torch.zeros(n, k, device=device, dtype=torch.uint8) for k in (48, 1))
        return HiddenTargets(levels, layer, temperature, steps)
    if kind == "dense":
        return DenseTargets(torch.zeros(n, vocabulary, device=device), temperature)
    columns: dict[str, Any] = {
        "ids": torch.zeros(n, 16, dtype=torch.int64, device=device),
        "weights": torch.zeros(n, 16, device=device),
        "tail": torch.zeros(n, device=device),
        "exact": kind == "topk",
        "temperature": temperature,
    }
    if kind != "anchored":
        return SparseTargets(**columns)
    heads = torch.zeros(n, dtype=torch.int64, device=device)
    return AnchoredTargets(**columns, inverse=torch.zeros(n, 16, device=device), heads=heads)


def forward_and_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    targets: Targets,
    cap: float | None,
    group: VocabSlice | None,
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Loss and gradients; the backward pass is called by hand, for the autograd engine starts a
    thread on the device."""
    kept: dict[str, Any] = {}

    class Context:
        needs_input_grad = (True, True, True)

        def save_for_backward(self, *tensors: Tensor) -> None:
            self.saved_tensors = tensors

        def mark_non_differentiable(self, *_: Tensor) -> None: ...

    def apply(*arguments: Any) -> tuple[Tensor, ...]:
        kept["context"] = Context()
        with torch.no_grad():
            return tuple(fused._Fused.forward(kept["context"], *arguments))

    anchor = Anchor()
    # As after the first step, which moves these numbers to the device.
    for name in ("theta", "_past", "_step"):
        moved = torch.zeros_like(getattr(anchor, name), device="cuda")
        setattr(anchor, name, moved)
    with mock.patch.object(fused, "_eagerly", apply):
        parts = fused_linear_distillation(
            hidden, weight, bias, labels, targets, alpha=0.5,
            vocab_size=weight.shape[0] - 64, cap=cap, rows=256, anchor=anchor, group=group,
        )  # fmt: skip
    anchor.update()
    assert anchor.theta.device.type == "cuda"
    backward = fused._Fused.backward.__wrapped__  # type: ignore[attr-defined]
    gradients = backward(kept["context"], torch.ones((), device="cuda"))
    return tuple(parts), [g for g in gradients if g is not None]


@pytest.mark.parametrize("rows", ["full", "padded", "no mask", "a share of positions"])
@pytest.mark.parametrize("autocast", [None, BFLOAT16, *further(FLOAT16)])
def test_a_training_step_waits_for_transformers_alone(
    rows: str, autocast: torch.dtype | None
) -> None:
    vocabulary, batch, length = 32_000, 4, 128
    weights = BFLOAT16 if autocast is None else FLOAT32
    tried_before = mock.patch.object(fused, "_mixed_addmm", return_value=MIXED)
    measured_before = mock.patch.object(Projection, "_measure", return_value=(1.0, None))
    with fake_cuda(), every_wait_is_seen(), tried_before, measured_before:
        model = fake_llama(vocabulary + 64, weights).train()
        rule = Share("student-entropy", 0.2) if rows.startswith("a share") else None
        student = DistilledStudent(model, "causal-lm", vocab_size=vocabulary, positions=rule)
        student.checks_padding = False  # at its first batch alone
        inputs = fake_batch(batch, length, masked=rows != "no mask")
        with Waits() as waits, under(autocast):
            output = student(**inputs)
    assert output.loss.dtype == FLOAT32
    assert str(output.loss.device) == "cuda:0"
    assert output.loss.requires_grad
    # Whether a mask hides anything, or several sequences share a row, is asked once a step.
    assert len(waits.found) == 1, waits.found
    assert waits.found[0][1].startswith("transformers/masking_utils.py:")


def test_a_loop_of_ones_own_waits_once_more() -> None:
    vocabulary = 32_000
    tried_before = mock.patch.object(fused, "_mixed_addmm", return_value=MIXED)
    measured_before = mock.patch.object(Projection, "_measure", return_value=(1.0, None))
    with fake_cuda(), every_wait_is_seen(), tried_before, measured_before:
        student = DistilledStudent(fake_llama(vocabulary, BFLOAT16), "causal-lm")
        inputs = fake_batch(2, 64, masked=False)
        del inputs["label_positions"]
        with Waits() as waits:
            student(**inputs)
    ours = [one for one in waits.found if not one[1].startswith("transformers/")]
    assert ours == [("nonzero", "student/wrapper.py:forward")]


def test_the_trainer_finds_positions_on_the_host() -> None:
    labels = torch.tensor([[5, -100, 7], [-100, 2, -100]])
    assert host_positions(labels, "causal-lm").tolist() == [0, 2, 4]  # type: ignore[union-attr]
    assert host_positions(labels, "sequence-classification") is None
    student = DistilledStudent(fake_llama(64, BFLOAT16, "meta"), "causal-lm")
    for device, sent in (("cuda", [0, 2, 4]), ("cpu", None)):
        trainer = mock.Mock(model=student)
        trainer.args.device, trainer._copies = torch.device(device), dict
        given = DistillationTrainer._prepare_inputs(trainer, {"labels": labels})
        found = given.get("label_positions")
        assert (None if found is None else found.tolist()) == sent
    with fake_cuda():
        assert host_positions(torch.zeros(2, 3, device="cuda").long(), "causal-lm") is None


class FakeStream:
    """A CUDA stream that notes what is asked of it."""

    events: list[tuple[str, str]]  # the stream and what it does, in the host's order
    current: FakeStream

    def __init__(self, name: object) -> None:
        self.name = str(name)

    def wait_stream(self, other: FakeStream) -> None:
        self.events.append((self.name, f"waits for {other.name}"))

    @classmethod
    @contextlib.contextmanager
    def use(cls, stream: FakeStream) -> Iterator[None]:
        before, cls.current = cls.current, stream
        yield
        cls.current = before

    @classmethod
    @contextlib.contextmanager
    def patched(cls) -> Iterator[list[tuple[str, str]]]:
        """In here the step has a stream, and others can be made."""
        cls.events, cls.current = [], cls("step")

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, Tensor) and out.device.type == "cuda":
                    cls.events.append((cls.current.name, func.name().removeprefix("aten::")))
                return out

        def keep(_: Tensor, stream: FakeStream) -> None:
            cls.events.append((stream.name, "keeps"))

        with (
            mock.patch("torch.cuda.Stream", cls),
            mock.patch("torch.cuda.stream", cls.use),
            mock.patch("torch.cuda.current_stream", return_value=cls.current),
            mock.patch("torch.Tensor.record_stream", keep),
            Operations(),
        ):
            yield cls.events


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_copied_while_the_step_before_runs(kind: str) -> None:
    """On a stream of its own that waits for nothing; the step waits for it and keeps its memory."""
    with fake_cuda(), FakeStream.patched() as events:
        targets = fake_targets(kind, 6, 40, 1.0, device="cpu")
        batch = {"labels": torch.zeros(2, 3).long(), "targets": targets, "count": torch.ones(())}
        host = [*(v for v in batch.values() if isinstance(v, Tensor)), *targets._tensors().values()]
        copies = Copies(torch.device("cuda:0"))
        assert not events
        with Waits() as waits:
            sent = copies(batch)
        sent["labels"] + 1
        assert all(str(tensor.device) == "cuda:0" for tensor in sent["targets"]._tensors().values())
    assert not waits.found
    n, (other,) = len(host), {name for name, _ in events} - {"step"}
    assert events == [
        *[(other, "_to_copy")] * n,
        ("step", f"waits for {other}"),
        *[("step", "keeps")] * n,
        ("step", "add.Tensor"),
    ]


def test_a_copy_that_the_step_runs_itself_is_noticed() -> None:
    with fake_cuda(), FakeStream.patched() as events:
        torch.zeros(3).to("cuda", non_blocking=True)
    assert events == [("step", "_to_copy")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_copies_a_batch_while_it_works() -> None:
    copies, labels = Copies(torch.device("cuda")), torch.arange(1000).pin_memory()
    copies({"labels": labels})
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # a second of the step before
    step = torch.cuda.Event()
    step.record()
    sent = copies({"labels": labels})
    copies._stream.synchronize()
    assert not step.query()
    assert torch.equal(sent["labels"].cpu(), labels)


def test_the_count_of_all_workers_is_summed_without_a_wait() -> None:
    distributed = mock.Mock()
    distributed.get_backend_config.return_value = "cuda:nccl"
    with (
        fake_cuda(),
        mock.patch("kdcache.stream.parallel.distributed", distributed),
        mock.patch("torch.accelerator.current_accelerator", return_value=torch.device("cuda")),
        Waits() as waits,
    ):
        total = SumOverRanks()(8199)
    assert (total.dtype, total.device.type) == (torch.int64, "cuda")
    assert not waits.found
    distributed.all_reduce.assert_called_once_with(total, group=None)


def fake_batch(batch: int, length: int, *, masked: bool) -> dict[str, Any]:
    positions = batch * length
    ids = torch.zeros(batch, length, dtype=torch.int64, device="cuda")
    return {
        "input_ids": ids,
        "labels": ids,
        "label_positions": torch.zeros(positions, dtype=torch.int64, device="cuda"),
        **({"attention_mask": ids} if masked else {}),
        "targets": fake_targets("sample", positions, 0, 1.0),
        "count": torch.zeros((), device="cuda"),
        "alpha": 0.5,
    }


def test_a_student_on_another_device_than_its_batch_is_noticed() -> None:
    # The check of this file can fail.
    with fake_cuda(2):
        layer = on_fake_cuda(nn.Linear(4, 4, device="meta"), FLOAT32, "cuda:1")
        with pytest.raises(RuntimeError, match="device"):
            layer(torch.zeros(2, 4, device="cuda:0"))


def test_a_wait_is_noticed() -> None:
    with fake_cuda(), Waits() as waits:
        x = torch.zeros(3, device="cuda")
        x[x > 0]
        x.cpu()
        float(x.sum())
    kinds = [kind for kind, _ in waits.found]
    assert "index by a mask" in kinds
    assert "copy cuda -> cpu" in kinds
    assert "item" in kinds


def test_whether_gradients_are_finite_is_found_without_a_wait() -> None:
    with fake_cuda(), every_wait_is_seen():
        model = fake_llama(64, BFLOAT16)
        watch = Watch(torch.device("cuda"))
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        loss = torch.ones((), device="cuda")
        with Waits() as waits:
            for step in range(2):
                watch.look(step, loss, model.named_parameters())
    assert waits.found == []
