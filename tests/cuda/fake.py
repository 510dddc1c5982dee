"""CUDA without a GPU: fake tensors on `cuda`, and a compiler that believes in an H100.

Fake tensors have a shape, a dtype and a device but no memory. Operations on them follow PyTorch's
own rules, so mixed devices, wrong dtypes and waits of the host for the device show on any machine.
Under the same patches inductor writes the Triton code that it would write for an H100.

Fake tensors ask for CUDA's device guard, which a CPU build of PyTorch lacks and which looks for a
driver in the others: five lines of C++ register one that does nothing.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import include_paths

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using Impl = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Impl)
}
"""


class H100:
    """`torch.cuda.get_device_properties` of an H100 SXM."""

    name = "NVIDIA H100 80GB HBM3"
    major, minor = 9, 0
    total_memory = 80 << 30
    multi_processor_count = 132
    warp_size = 32
    regs_per_multiprocessor = 65536
    max_threads_per_multi_processor = 2048
    max_threads_per_block = 1024
    shared_memory_per_block = 49152
    shared_memory_per_block_optin = 232448
    shared_memory_per_multiprocessor = 233472
    L2_cache_size = 50 << 20
    is_integrated = 0
    gcnArchName = ""  # noqa: N815 - PyTorch's name
    pci_bus_id = 0
    uuid = "0"


@functools.cache
def _load_guard() -> None:
    """Build and load the guard, once a process; skips the test where that is impossible."""
    if torch.cuda.is_available():
        pytest.skip("this process sees a GPU: fake devices would break the real one")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is missing: fake CUDA tensors need a few lines of C++")
    library = Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        subprocess.run(
            [compiler, "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(built)]
            + [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
            + [f"-I{path}" for path in include_paths()]
            + [f"-L{library}", "-lc10"],
            check=True,
        )
        ctypes.CDLL(str(built))


@contextlib.contextmanager
def fake_cuda(devices: int = 1, *, symbolic: bool = False) -> Iterator[FakeTensorMode]:
    """In here `torch.empty(..., device="cuda")` makes fake tensors of one of `devices` H100s.

    Args:
        devices: `torch.cuda.device_count()`.
        symbolic: let the compiler make sizes that change dynamic.
    """
    _load_guard()
    worker = "torch._dynamo.device_interface.CudaInterface.Worker"
    interface = "torch._dynamo.device_interface.CudaInterface"
    fakes: dict[str, Any] = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: devices,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_properties": lambda *_: H100,
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.is_current_stream_capturing": lambda: False,
        "torch.cuda.is_initialized": lambda: False,
        "torch._subclasses.fake_tensor.init_gpu_context": lambda *_: None,
        "torch.cuda.get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": lambda *_, **__: None,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda._exchange_device": lambda *_: 0,
        "torch.cuda._maybe_exchange_device": lambda *_: 0,
        "torch.cuda._utils._get_device_index": lambda *_, **__: 0,
        "torch.cuda._get_device_properties": lambda *_: H100,
        "torch.version.cuda": "12.8",
        "torch._C._cuda_getCurrentRawStream": lambda *_: 0,
        "torch.Tensor.pin_memory": lambda tensor, *_: tensor,
        f"{interface}.is_available": staticmethod(lambda: True),
        f"{interface}.get_compute_capability": staticmethod(lambda *_: 90),
        f"{worker}.get_device_properties": staticmethod(lambda *_: H100),
        f"{worker}.current_device": staticmethod(lambda *_: 0),
        "torch.utils._triton.has_triton": lambda *_, **__: True,
        "torch.utils._triton.triton_hash_with_backend": lambda *_: "hash",
        # Patterns of attention and padding are traced on real tensors of the device.
        "torch._inductor.fx_passes.fuse_attention._sfdp_init": lambda *_, **__: None,
        "torch._inductor.fx_passes.pad_mm._pad_mm_init": lambda *_, **__: None,
        "torch._inductor.fx_passes.misc_patterns._misc_patterns_init": lambda *_, **__: None,
    }
    shapes = ShapeEnv() if symbolic else None
    with contextlib.ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch(name, fake, create=True))
        # Which of its kernels attention may take is asked of the driver.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
        yield stack.enter_context(mode)


class Waits(TorchDispatchMode):
    """Where the host waits for the device.

    Attributes:
        found: what waited, and the line of kdcache or of another library that caused it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.operations: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        on_gpu = any(isinstance(x, torch.Tensor) and x.device.type == "cuda" for x in args)
        if on_gpu:
            self.operations[str(func)] += 1
        # In inference mode operations that are made of others arrive whole.
        scalars = (aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.allclose)
        if on_gpu and func in [scalar.default for scalar in scalars]:
            self._note("item")
            truth = args[0].dtype == torch.bool or func is aten.allclose.default
            return truth or 1.0
        if on_gpu and func is aten.nonzero.default:
            self._note("nonzero")
            shape = (args[0].numel(), args[0].ndim)
            return torch.empty(shape, dtype=torch.int64, device=args[0].device)
        if on_gpu and func is aten.index.Tensor:
            if any(i is not None and i.dtype == torch.bool for i in args[1]):
                self._note("index by a mask")
                return args[0].new_empty(args[0].shape)
        elif func in (aten._to_copy.default, aten.to.device, aten.to.dtype_layout):
            there = torch.device(kwargs.get("device") or args[0].device).type
            if there != args[0].device.type and not kwargs.get("non_blocking"):
                self._note(f"copy {args[0].device.type} -> {there}")
        elif func is aten.copy_.default and args[0].device.type != args[1].device.type:
            waits = len(args) < 3 or not args[2]
            if waits:
                self._note(f"copy {args[1].device.type} -> {args[0].device.type}")
        return func(*args, **kwargs)

    def _note(self, what: str) -> None:
        lines = [
            f"{frame.filename.split('site-packages/')[-1].rpartition('/kdcache/')[2]}:{frame.name}"
            for frame in traceback.extract_stack()
            if "/torch/" not in frame.filename and "/tests/" not in frame.filename
        ]
        self.found.append((what, lines[-1]))


def on_fake_cuda(model: torch.nn.Module, dtype: torch.dtype, device: str = "cuda:0") -> Any:
    """A model made on `meta`, with fake parameters on a GPU; tied ones stay tied."""
    seen: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=dtype, device=device)
                fresh = seen.setdefault(id(parameter), torch.nn.Parameter(made))
                module._parameters[name] = fresh
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return model


def every_wait_is_seen() -> contextlib.AbstractContextManager[object]:
    """transformers leaves out its own waits while it believes to be traced."""
    return mock.patch("transformers.masking_utils.is_tracing", return_value=False)
