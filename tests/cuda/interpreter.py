"""Runs what inductor wrote for an H100 in Triton's interpreter, on a CPU.

Usage: python interpreter.py JOBS RESULTS. JOBS (`torch.save`) is a list of pairs: the text of a
module, and the arguments of its `call`. RESULTS gets a list of pairs: what it returned, and the
arguments afterwards, since losses work in place.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import re
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
from torch._inductor.runtime import triton_helpers, triton_heuristics
from triton.language import core
from triton.runtime.interpreter import ReduceOps, ScanOps, TensorHandle

_HEURISTICS = ("pointwise", "reduction", "persistent_reduction", "cooperative_reduction")
_kernels: dict[str, tuple[str, dict[str, Any], Any]] = {}
_numbers = itertools.count()


def _register(kind: str) -> Any:
    """In place of a heuristic, which would look for a GPU."""
    return lambda *_, **settings: (
        lambda kernel: _kernels.update({kernel.__name__: (kind, settings, kernel)})
    )


def _elementwise(function: Any) -> Any:
    """A function of the device's mathematical library, by numpy."""

    def call(x: Any, *others: Any) -> Any:
        values = x.handle.data
        rest = [other.handle.data if hasattr(other, "handle") else other for other in others]
        with np.errstate(all="ignore"):
            out = function(values, *rest).astype(values.dtype)
        return core.tensor(TensorHandle(out, x.handle.dtype), x.type)

    return staticmethod(call)


_MATH = {
    "exp": np.exp, "log": np.log, "trunc": np.trunc, "floor": np.floor, "ceil": np.ceil,
    "abs": np.abs, "fabs": np.abs, "exp2": np.exp2, "sqrt": np.sqrt, "pow": np.power,
    "log1p": np.log1p, "log2": np.log2, "tanh": np.tanh, "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip
_REDUCTIONS = {"maximum": np.maximum, "minimum": np.minimum, "any_combine": np.logical_or}


def _whole_arrays() -> None:
    """The interpreter combines element by element in Python: numpy does it a thousand times faster
    for the functions that occur."""
    slow_reduce, slow_scan = ReduceOps.generic_reduce, ScanOps.generic_scan

    def reduce(self: Any, values: Any) -> Any:
        ufunc = _REDUCTIONS.get(self.combine_fn.fn.__name__)
        if ufunc is None or len(values) > 1:
            return slow_reduce(self, values)
        found = ufunc.reduce(values[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(found.astype(values[0].handle.data.dtype), values[0].dtype)

    def scan(self: Any, values: Any) -> Any:
        if not self.combine_fn.fn.__name__.startswith("_triton_helper_fn_add"):
            return slow_scan(self, values)
        return self.cumsum(values[0])

    ReduceOps.generic_reduce, ScanOps.generic_scan = reduce, scan


class _Kernel:
    """A kernel that is launched by numbers of elements, as inductor's are."""

    def __init__(self, name: str) -> None:
        self.kind, self.settings, self.kernel = _kernels[name]

    def run(self, *arguments: Any, stream: int) -> None:
        signature = self.settings["triton_meta"]["signature"]
        hints = self.settings["size_hints"]
        given = dict(zip((n for n in signature if not n.endswith("BLOCK")), arguments, strict=True))
        blocks = {}
        if "R0_BLOCK" in signature:
            blocks["R0_BLOCK"] = min(4096, triton.next_power_of_2(hints["r0_"]))
        # Large blocks, since the interpreter's cost is by program, but none larger than inductor's
        # own: where a size is a multiple of those, the kernel has no mask.
        most = 4096 if self.kind == "pointwise" else 1024
        grid = []
        for axis in ("X", "Y"):
            size = int(given.get(f"{axis.lower()}numel", hints.get(axis.lower(), 1)))
            block = min(most, triton.next_power_of_2(size))
            grid.append(math.ceil(size / block))
            if f"{axis}BLOCK" in signature:
                blocks[f"{axis}BLOCK"] = block
        self.kernel[(*grid, 1)](**given, **blocks)


class _Compile:
    """In place of `AsyncCompile`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def triton(self, name: str, source: str, device_str: str) -> _Kernel:
        source = re.sub(
            r"from torch._inductor.runtime.triton_helpers import .*libdevice.*",
            "from kdcache_interpreted import libdevice, tl_math, math",
            source,
        )
        path = Path(self.folder, f"kernel{next(_numbers)}.py")
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        return _Kernel(name)

    def wait(self, *_: Any) -> None: ...


def _module(text: str, folder: str) -> dict[str, Any]:
    """The module with the CPU in place of a GPU."""
    swaps = {
        "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": "",
        "async_compile = AsyncCompile()": "async_compile = COMPILE",
        "empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda": "",
        "with torch.cuda._DeviceGuard(0):": "if True:",
        "torch.cuda.set_device(0)": "pass",
        "del async_compile": "",
    }
    for old, new in swaps.items():
        text = text.replace(old, new)
    text = text.replace("assert_alignment(", "NOTHING(").replace("copy_if_misaligned(", "SAME(")
    names: dict[str, Any] = {
        "COMPILE": _Compile(folder),
        "NOTHING": lambda *_: None,
        "SAME": lambda x, *_: x,
        "get_raw_stream": lambda _: 0,
        "empty_strided_cuda": lambda size, stride, dtype: torch.empty_strided(
            size, stride, dtype=dtype
        ),
        "__name__": "written",
        "__file__": "written.py",
    }
    exec(compile(text, "written.py", "exec"), names)
    return names


def main() -> None:
    jobs, results = sys.argv[1:]
    for heuristic in _HEURISTICS:
        setattr(triton_heuristics, heuristic, _register(heuristic))
    triton_helpers.set_driver_to_gpu = lambda: None
    _whole_arrays()
    library: Any = types.ModuleType("kdcache_interpreted")
    functions = {name: _elementwise(function) for name, function in _MATH.items()}
    library.libdevice = library.tl_math = library.math = type("functions", (), functions)
    sys.modules["kdcache_interpreted"] = library
    found = []
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):
        for text, arguments in torch.load(jobs):
            names = _module(text, folder)
            call = names["call"] if "call" in names else names["runner"].call
            found.append((list(call(list(arguments))), arguments))
    torch.save(found, results)


if __name__ == "__main__":
    main()
