"""The Triton code that inductor writes for an H100, and what can be read off it."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's own use of torch.jit
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering


_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "i64": 8, "i32": 4, "u8": 1, "i1": 1, "i8": 1}


class _Stop(Exception):  # noqa: N818 - no error
    """The code is written; there is no device to run it."""


@dataclass(frozen=True)
class Code:
    """A module that inductor wrote.

    Attributes:
        text: the whole module.
        inputs: names of the arguments of `call`, in its order: those of the function.
        shapes: of the arguments and of the result of each operation, by name.
    """

    text: str
    inputs: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]

    @property
    def kernels(self) -> dict[str, str]:
        """Source of each Triton kernel by its name."""
        found = re.findall(
            r"(\w+) = async_compile.triton\('\1', '''(.*?)''', device_str='cuda'\)", self.text, re.S
        )
        return {name: source.replace("\\\\", "\\") for name, source in found}

    @property
    def _call(self) -> str:
        start = self.text.index("def call(")
        return self.text[start : self.text.index("def benchmark_compiled_module")]

    @property
    def launches(self) -> list[tuple[str, list[str]]]:
        """Triton kernels in the order they run: name and arguments."""
        found = re.findall(r"(triton_\w+)\.run\((.*), stream=", self._call)
        return [(name, arguments.split(", ")) for name, arguments in found]

    @property
    def library_calls(self) -> list[str]:
        """Operations that are no Triton kernels, in the order they run."""
        return re.findall(r"= (torch\.ops\.\w+\.\w+|extern_kernels\.\w+)[.\w]*\(", self._call)

    @property
    def sizes(self) -> dict[str, int]:
        """Elements of each tensor with a name in `call`: those of fused operations have none."""
        named = set(re.findall(r"\w+", self._call))
        return {name: math.prod(shape) for name, shape in self.shapes.items() if name in named}

    @property
    def largest_buffer(self) -> int:
        """Elements of the largest tensor that is no argument."""
        return max((n for name, n in self.sizes.items() if name.startswith("buf")), default=0)

    def passes(self, argument: str, elements: int) -> list[str]:
        """Kernels that touch an argument and run over at least so many elements."""
        return [
            name
            for name, arguments in self.launches
            if argument in arguments and _range(arguments) >= elements
        ]

    def bytes_of(self, launch: int) -> int:
        """Bytes that a launch reads and writes: of each tensor at most as many elements as it runs
        over."""
        name, arguments = self.launches[launch]
        signature = re.findall(r"'(\w+)': '\*?(\w+)'", self._signature(name))
        tensors = [a for a in arguments if not a.isdigit()]
        over = _range(arguments)
        return sum(
            min(over, self.sizes[tensor]) * _BYTES[dtype]
            for tensor, (_, dtype) in zip(tensors, signature, strict=False)
        )

    def _signature(self, kernel: str) -> str:
        found = re.search(r"'signature': \{(.*?)\}", self.kernels[kernel])
        assert found is not None
        return found[1]

    def argument(self, *shape: int) -> str:
        """Name of the argument of a shape."""
        found = [
            name for name in self.shapes if name.startswith("arg") and self.shapes[name] == shape
        ]
        assert found, f"no argument of shape {shape}"
        return found[0]


def _range(arguments: list[str]) -> int:
    return math.prod(int(a) for a in arguments if a.isdigit())


def written_for_h100(function: Callable[..., Any], *arguments: Any) -> Code:
    """Have inductor write the code of a function for fake CUDA tensors.

    Raises:
        torch._dynamo.exc.Unsupported: it would be more than one graph.
    """
    taken: list[str] = []
    inputs: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}

    def stop(graph: GraphLowering) -> None:
        found = graph.codegen()[0]
        taken.append(getattr(found, "value", found))
        for name, one in (*graph.graph_inputs.items(), *graph.name_to_buffer.items()):
            if (size := one.maybe_get_size()) is not None:
                shapes[name] = tuple(map(int, size))
        raise _Stop

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        inputs.extend(node.name[2:-1] for node in graph.graph.nodes if node.op == "placeholder")
        return compile_fx(graph, examples)

    torch._dynamo.reset()
    settings = config.patch(
        joint_graph_constant_folding=False, fx_graph_cache=False, compile_threads=1
    )
    try:
        with settings, mock.patch.object(GraphLowering, "_compile_to_module", stop):
            torch.compile(function, backend=backend, fullgraph=True)(*arguments)
    except Exception:
        if not taken:
            raise
    finally:
        torch._dynamo.reset()
    return Code(taken[0], tuple(inputs), shapes)


@dataclass(frozen=True)
class Compiled:
    """A kernel in machine code.

    Attributes:
        kernel: name.
        shared: bytes of shared memory of a block.
        machine_code: the cubin.
    """

    kernel: str
    shared: int
    machine_code: bytes


def compiled_for_sm90(code: Code) -> list[Compiled]:
    """Each kernel of a module through Triton and ptxas, with one launch configuration."""
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    found: dict[str, tuple[str, dict[str, Any], Any]] = {}

    def register(kind: str) -> Callable[..., Any]:
        return lambda *_, **settings: (
            lambda kernel: found.update({kernel.__name__: (kind, settings, kernel)})
        )

    made = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu"))
        for kind in ("pointwise", "reduction", "persistent_reduction", "cooperative_reduction"):
            stack.enter_context(mock.patch.object(triton_heuristics, kind, register(kind)))
        for number, (name, source) in enumerate(code.kernels.items()):
            path = Path(folder, f"kernel{number}.py")  # Triton reads the source of a function
            path.write_text(source)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
            kind, settings, kernel = found[name]
            signature = dict(settings["triton_meta"]["signature"])
            hints = settings["size_hints"]
            blocks = {"XBLOCK": min(512, hints["x"]) if kind == "pointwise" else 8, "YBLOCK": 1}
            blocks["R0_BLOCK"] = min(hints.get("r0_", 1), 1024)
            fixed = {**settings["triton_meta"].get("constants", {})}
            fixed |= {k: v for k, v in blocks.items() if k in signature}
            places = {(list(signature).index(k),): v for k, v in fixed.items()}
            types = {k: "constexpr" if k in fixed else v for k, v in signature.items()}
            out = compile_kernel(
                ASTSource(kernel, types, places, settings["triton_meta"]["configs"][0]),
                target=GPUTarget("cuda", 90, 32),
                options={"num_warps": 8, "num_stages": 1},
            )
            made.append(Compiled(name, out.metadata.shared, out.asm["cubin"]))
    return made
