"""What is decided by the devices that are there: pure functions and mocks of devices."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import make_tiny_lm
from fake import fake_cuda
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import Trainer, TrainingArguments

from kdcache.cache import Cache
from kdcache.commands.build import packer
from kdcache.commands.build.build import build
from kdcache.commands.build.options import BuildOptions
from kdcache.commands.finetune import trainer as finetune_module
from kdcache.commands.finetune.finetune import finetune
from kdcache.commands.finetune.options import FinetuneOptions
from kdcache.commands.sweep.sweep import on_gpus
from kdcache.commands.train import on_ray
from kdcache.commands.train import student as trainer_module
from kdcache.commands.train.options import TrainOptions
from kdcache.commands.train.train import train
from kdcache.errors import UsageError
from kdcache.loss import fused
from kdcache.rows import Row
from kdcache.student.precision import Computing, keep_inputs_and_loss, use_one_gpu
from kdcache.targets import Codec, TargetWriter
from kdcache.targets.device import compiles, run
from kdcache.teacher import Slice, Teacher, TeacherOptions, load, peak_share
from kdcache.teacher.memory import gpus_of, slice_positions


def test_the_suite_hides_gpus() -> None:
    # Otherwise `make test` would be another suite on a machine with a GPU.
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


class TestCompileSwitch:
    @pytest.fixture(autouse=True)
    def _untried(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.delenv("KDCACHE_COMPILE", raising=False)
        run._compiler_works.cache_clear()
        yield
        run._compiler_works.cache_clear()

    @pytest.mark.parametrize(
        "error",
        [
            ImportError("No module named 'triton'"),
            RuntimeError("Failed to find C compiler. Please specify via CC"),
            RuntimeError("fatal error: Python.h: No such file\ncompilation terminated"),
        ],
    )
    def test_a_compiler_that_fails_is_reported_once(
        self, error: Exception, caplog: pytest.LogCaptureFixture
    ) -> None:
        broken = mock.Mock(side_effect=error)
        with (
            fake_cuda(),
            mock.patch.object(torch, "compile", return_value=broken),
            caplog.at_level(logging.WARNING),
        ):
            assert [compiles(), compiles()] == [False, False]
        assert broken.call_count == 1
        (message,) = [record.getMessage() for record in caplog.records]
        assert str(error).splitlines()[0] in message
        assert "KDCACHE_COMPILE=0" in message

    def test_one_that_works_is_tried_once(self) -> None:
        works = mock.Mock()
        with fake_cuda(), mock.patch.object(torch, "compile", return_value=works):
            assert [compiles(), compiles()] == [True, True]
        assert works.call_count == 1

    def test_zero_turns_it_off_untried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KDCACHE_COMPILE", "0")
        with mock.patch.object(torch, "compile") as tried:
            assert not compiles()
        tried.assert_not_called()

    @pytest.mark.parametrize("works", [True, False])
    def test_the_loss_obeys_it(self, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Compiled, a pass takes its whole slice; else blocks that outlast their launches."""
        n, vocabulary = 2048, 131_072
        sizes: list[int] = []

        def note(z: torch.Tensor, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            sizes.append(len(z))
            return torch.zeros(2, device="cuda"), torch.zeros_like(x)

        monkeypatch.setattr(fused, "compiles", lambda: works)
        monkeypatch.setattr(fused, "sparse_pass", note)
        monkeypatch.setattr(fused, "compiled", lambda function: function if works else None)
        with fake_cuda():
            targets = fused.SparseTargets(
                ids=torch.zeros(n, 4, dtype=torch.int64, device="cuda"),
                weights=torch.zeros(n, 4, device="cuda"),
                tail=torch.zeros(n, device="cuda"),
                exact=False,
                temperature=1.0,
            )
            scalar = torch.zeros((), device="cuda")
            fused._logits_to_gradient_(
                torch.zeros(n, vocabulary, dtype=torch.bfloat16, device="cuda"),
                torch.zeros(n, dtype=torch.int64, device="cuda"),
                targets,
                torch.ones(n, device="cuda"),
                fused._Options(scalar, scalar, True, False),
            )
        assert sizes == ([n] if works else [512] * 4)


class TestPacking:
    def test_copies_are_waited_for_on_the_device_that_makes_them(self) -> None:
        """A teacher spread over GPUs takes its inputs on the first and encodes on the last."""
        streams = {torch.device("cuda", i): mock.Mock(name=f"stream {i}") for i in range(2)}
        event = mock.Mock()
        codec = Codec.parse("topk:4", (1.0,), 500)
        with (
            fake_cuda(2),
            mock.patch.object(torch.cuda, "Event", return_value=event) as made,
            mock.patch.object(torch.cuda, "current_stream", streams.__getitem__),
            mock.patch.object(packer.Packer, "_pack", lambda *arguments: arguments),
            packer.Packer(TargetWriter(codec), 0, 0) as packing,
        ):
            encoded = codec.encode(torch.zeros(3, 500, device="cuda:1"))
            clipped = torch.zeros((), device="cuda:1")
            _, host, copied, *_ = packing.put(encoded, clipped, mock.Mock(), 0).result()
        assert {tensor.device.type for tensor in host.values()} == {"cpu"}
        made.assert_called_once_with(blocking=True)  # else the thread would burn a core
        event.record.assert_called_once_with(streams[torch.device("cuda", 1)])
        assert copied == [event]

    @pytest.mark.parametrize(
        ("device", "cores", "threads"), [("cpu", 64, 1), ("cuda", 2, 1), ("cuda", 8, 2)]
    )
    def test_a_second_thread_packs_where_a_core_is_free(
        self, device: str, cores: int, threads: int
    ) -> None:
        assert packer.packing_threads(device, cores) == threads

    def test_a_batch_that_is_asked_again_counts_its_clipped_mass_once(
        self, small_build: BuildOptions, tiny_tokenizer: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        lm = make_tiny_lm(tiny_tokenizer, tmp_path / "padded", vocab_size=384)
        options = dataclasses.replace(small_build, teacher=(str(lm),), batch_tokens=400)
        build(options)
        own, failed = Teacher.slices, []

        def slices(self: Teacher, rows: list[Row]) -> Iterator[Slice]:
            yield from own(self, rows)
            if not failed:
                failed.append(len(rows))
                raise torch.OutOfMemoryError("after the mass was counted")

        monkeypatch.setattr(Teacher, "slices", slices)
        again = dataclasses.replace(options, out=str(tmp_path / "again"))
        build(again)
        assert failed
        one, two = (
            [shard.clipped_mass for shard in Cache.open(o.out).manifest.shards]
            for o in (options, again)
        )
        assert one[0] > 0
        assert two == pytest.approx(one, rel=1e-5)


def test_memory_is_measured_on_the_teachers_own_gpus() -> None:
    """Asking another GPU would make a context on it, and see other processes' memory."""
    with fake_cuda(4):
        layers = [torch.nn.Linear(2, 2, device=f"cuda:{i}") for i in (2, 1)]
        assert gpus_of(layers) == (torch.device("cuda", 1), torch.device("cuda", 2))
        spread = torch.nn.Linear(2, 2, device="meta")
        spread.hf_device_map = {"model.layers.0": 3, "model.layers.1": "cpu"}
        assert gpus_of([spread]) == (torch.device("cuda", 3),)
    asked: list[object] = []

    def note(answer: object) -> Any:
        return lambda *device: asked.extend(device) or answer

    with mock.patch.multiple(
        torch.cuda,
        synchronize=note(None),
        empty_cache=note(None),
        reset_peak_memory_stats=note(None),
        memory_allocated=note(10),
        max_memory_allocated=note(60),
        mem_get_info=note((100, 200)),
        device_count=note(4),
    ):
        assert peak_share(lambda: None, [torch.device("cuda", 2)]) == 0.5
    assert set(asked) == {torch.device("cuda", 2)}


class TestComputing:
    """What a training process computes with, by what it was given and what it sees."""

    @pytest.mark.parametrize(
        ("precision", "gpus", "sees", "modern", "want"),
        [
            ("auto", None, False, False, Computing(False, "float32", False)),
            ("auto", None, True, True, Computing(True, "bf16", True)),
            ("auto", None, True, False, Computing(True, "float32", False)),
            # Ray no longer hides GPUs from those that asked for none.
            ("auto", 0, True, True, Computing(False, "float32", False)),
            ("auto", 1, True, True, Computing(True, "bf16", True)),
            ("float32", None, True, True, Computing(True, "float32", False)),
            ("fp16", None, True, True, Computing(True, "fp16", True)),
            ("bf16", 0, True, True, Computing(False, "bf16", False)),
        ],
    )
    def test_it_follows_what_was_asked_for(
        self, precision: Any, gpus: float | None, sees: bool, modern: bool, want: Computing
    ) -> None:
        with cards(sees, modern):
            assert Computing.choose(precision, gpus) == want
            arguments = want.arguments()
            want.begin()
            tf32 = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        assert tf32 == ("high" if want.tf32 else "highest")
        assert arguments["use_cpu"] is not want.gpu
        assert (arguments["bf16"], arguments["fp16"]) == (
            want.precision == "bf16",
            want.precision == "fp16",
        )

    @pytest.mark.parametrize(
        ("precision", "gpus", "sees", "modern", "word"),
        [
            ("auto", 1, False, False, "PyTorch sees none here"),  # never a silent fall to the CPU
            ("fp16", None, False, False, "fp16 needs a GPU"),
            ("fp16", 0, True, True, "fp16 needs a GPU"),
            ("bf16", None, True, False, "no bfloat16"),
        ],
    )
    def test_what_is_lacking_is_refused(
        self, precision: Any, gpus: float | None, sees: bool, modern: bool, word: str
    ) -> None:
        with cards(sees, modern), pytest.raises(UsageError, match=word):
            Computing.choose(precision, gpus)

    def test_a_process_that_sees_several_gpus_trains_on_one(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        arguments = mock.Mock(n_gpu=4, _n_gpu=4)
        use_one_gpu(arguments, "--num-workers {gpus} trains on all of them.")
        assert arguments._n_gpu == 1
        (record,) = caplog.records
        assert "sees 4 GPUs and trains on one. --num-workers 4" in record.getMessage()

    @pytest.mark.parametrize("gpus", [0, 1])
    def test_one_is_no_news(self, gpus: int, caplog: pytest.LogCaptureFixture) -> None:
        arguments = mock.Mock(n_gpu=gpus, _n_gpu=gpus)
        use_one_gpu(arguments)
        assert arguments._n_gpu == gpus
        assert not caplog.records

    @pytest.mark.parametrize("command", [trainer_module, finetune_module])
    def test_no_command_wraps_its_model_in_data_parallel(
        self, command: Any, class_cache: str, student_classifier: Path, labelled_corpus: Path,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        class SeesTwo(TrainingArguments):  # type: ignore[misc]
            def __post_init__(self) -> None:
                super().__post_init__()
                self._n_gpu = 2

        made: list[Any] = []

        def stop(trainer: Any, *_: Any, **__: Any) -> None:
            made.append(trainer.args.n_gpu)
            raise UsageError("stopped")

        out = str(tmp_path / "out")
        with (
            mock.patch.object(command, "TrainingArguments", SeesTwo),
            mock.patch.object(Trainer, "train", stop),
            pytest.raises(UsageError, match="stopped"),
        ):
            if command is trainer_module:
                train(TrainOptions(cache=(class_cache,), student="bilstm", out=out))
            else:
                corpus = (str(labelled_corpus),)
                finetune(FinetuneOptions(model=str(student_classifier), corpus=corpus, out=out))
        assert made == [1]


def cards(sees: bool, modern: bool) -> Any:
    """A machine with or without a GPU, with or without bfloat16."""
    return mock.patch.multiple(
        torch.cuda,
        is_available=mock.Mock(return_value=sees),
        is_bf16_supported=mock.Mock(return_value=modern),
    )


class TestWorkers:
    def options(self, workers: int, gpus: float | None = None) -> TrainOptions:
        return TrainOptions(
            cache=("c",), student="s", out="o", num_workers=workers, gpus_per_worker=gpus
        )

    @pytest.mark.parametrize(
        ("workers", "asked", "gpus", "cpus", "want"),
        [
            (2, None, 2, 16, (1, 8)),
            (2, None, 8, 32, (1, 8)),
            (2, None, 0, 4, (0, 2)),
            (4, 0, 2, 16, (0, 4)),
        ],
    )
    def test_each_gets_its_share(
        self, workers: int, asked: float | None, gpus: float, cpus: float, want: Any
    ) -> None:
        need = on_ray.need_of(
            self.options(workers, asked), [{"GPU": gpus, "CPU": cpus}], grows=False
        )
        assert (need.gpus, need.cpus) == want
        assert need.threads({"GPU": gpus, "CPU": cpus}) == want[1]

    @pytest.mark.parametrize(
        ("workers", "asked", "gpus", "word"),
        [
            (4, None, 2, "4 workers need 4 GPUs, this machine's Ray has 2"),  # not: on the CPU
            (2, 1, 0, "2 workers need 2 GPUs"),
            (8, 0, 0, "8 workers need 8 CPUs"),
        ],
    )
    def test_too_few_are_told(
        self, workers: int, asked: float | None, gpus: float, word: str
    ) -> None:
        with pytest.raises(UsageError, match=word):
            on_ray.need_of(self.options(workers, asked), [{"GPU": gpus, "CPU": 4}], grows=False)

    @pytest.mark.parametrize(
        ("given", "want"), [(None, None), (0.0, 0.0), (0.5, 1.0), (1.0, 1.0), (2.0, 1.0)]
    )
    def test_a_run_of_a_sweep_uses_what_it_was_given(
        self, given: float | None, want: float | None
    ) -> None:
        assert on_gpus(self.options(1), given).gpus_per_worker == want

    @pytest.mark.skipif(
        not hasattr(torch.cpu.Stream, "record_event"),
        reason="this PyTorch (2.6) can't shard weights on CPUs",
    )
    def test_sharding_leaves_counts_and_weights_alone(self) -> None:
        """FSDP with bfloat16 would round them on their way into the forward."""
        seen: dict[str, torch.Tensor] = {}

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(4, 4)

            def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
                seen.update(inputs)
                return self.layer(inputs["x"].to(self.layer.weight.dtype)).sum()

        accelerate = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
        policy = keep_inputs_and_loss(accelerate)
        assert policy.param_dtype == torch.bfloat16
        assert (policy.reduce_dtype, policy.output_dtype) == (torch.float32, None)
        inputs = {
            "x": torch.randn(2, 4),
            "count": torch.tensor(8199.19),
            "target_weights": torch.full((2, 3), 0.333),
        }
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            fully_shard(Model(), mesh=mesh, mp_policy=policy)(**inputs)
        finally:
            torch.distributed.destroy_process_group()
        for name, value in inputs.items():
            assert seen[name].dtype == value.dtype, name
            assert torch.equal(seen[name], value), name


@pytest.mark.parametrize(
    ("device", "columns", "item_size", "positions"),
    [
        ("cuda", 128_256, 2, 8192),
        ("cuda", 32_000, 2, 8192),
        ("cuda", 151_936, 2, 6912),
        ("cuda", 262_144, 2, 4096),
        ("cuda", 128_256, 4, 4096),
        ("cuda", 5_000_000, 4, 107),
        ("cpu", 128_256, 4, 130),
        ("cpu", 128_256, 2, 130),
    ],
)
def test_slices_of_logits(device: str, columns: int, item_size: int, positions: int) -> None:
    found = slice_positions(device, columns, item_size)
    assert found == positions
    assert found * columns < 2**31
    assert device == "cpu" or found % 256 == 0 or found < 256


@pytest.mark.parametrize(
    ("device", "free", "placed"),
    [("cuda", 1 << 40, {"": 0}), ("cuda", 1 << 10, "auto"), ("cpu", 0, None)],
)
def test_weights_go_straight_to_where_they_are_used(
    tiny_lm: Path, device: str, free: int, placed: Any
) -> None:
    """Not through the host's memory, which a large teacher may not fit."""
    options = TeacherOptions((str(tiny_lm),), "causal-lm", device=device)
    model = mock.MagicMock(hf_device_map={})
    with (
        mock.patch.object(load, "_from_pretrained", return_value=model) as asked,
        mock.patch.object(torch.cuda, "mem_get_info", return_value=(free, free)),
        mock.patch("accelerate.utils.get_max_memory", return_value={0: free, "cpu": free}),
    ):
        load.load_models(options)
    settings = asked.call_args.args[2]
    assert settings.get("device_map") == placed


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_model_that_was_placed_is_the_same(
    task: str, tiny_lm: Path, tiny_classifier: Path
) -> None:
    folder = tiny_lm if task == "causal-lm" else tiny_classifier
    options = TeacherOptions((str(folder),), task)
    (plain,) = load.load_models(options)
    own = load._from_pretrained

    def placed(files: Any, options: Any, settings: dict[str, Any]) -> Any:
        return own(files, options, {**settings, "device_map": {"": "cpu"}})

    with mock.patch.object(load, "_from_pretrained", placed):
        (model,) = load.load_models(options)
    assert load.input_device(model) == torch.device("cpu")
    want = plain.state_dict()
    found = model.state_dict()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], value) for name, value in want.items())
