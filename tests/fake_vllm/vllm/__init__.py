"""A stand-in for vLLM's public API: states by transformers, in this process.

It knows the names and arguments that kdcache uses and no others. `FAULT` is what is wrong with its
answers.
"""

import asyncio
import os
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from vllm.config import PoolerConfig
from vllm.v1.engine.exceptions import EngineDeadError

MADE: list["AsyncEngineArgs"] = []
SHUT: list["AsyncLLMEngine"] = []
FAULT = os.environ.get("FAKE_VLLM_FAULT", "")


@dataclass
class AsyncEngineArgs:
    """See `vllm`."""

    model: str
    runner: str
    convert: str
    pooler_config: PoolerConfig
    dtype: str
    max_model_len: int
    enable_prefix_caching: bool
    tensor_parallel_size: int
    pipeline_parallel_size: int
    quantization: str | None
    trust_remote_code: bool
    skip_tokenizer_init: bool
    disable_log_stats: bool
    enforce_eager: bool = False
    distributed_executor_backend: str | None = None
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 8
    kv_cache_dtype: str = "auto"
    seed: int = 0
    hf_token: str | None = None
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None


@dataclass
class PoolingParams:
    """See `vllm`."""

    task: str
    use_activation: bool


@dataclass
class AsyncLLMEngine:
    """See `vllm`."""

    decoder: Any
    longest: int
    waiting: int = 0
    most_waiting: int = 0
    asked: list[int] = field(default_factory=list)

    @classmethod
    def from_engine_args(cls, args: AsyncEngineArgs) -> "AsyncLLMEngine":
        """Load the model."""
        import torch
        from transformers import AutoModelForCausalLM

        MADE.append(args)
        if FAULT == "refuses":
            raise ValueError("head size 8 is not\nsupported")
        if FAULT == "no start":
            raise RuntimeError("Engine core initialization failed.")
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        return cls(model.get_decoder().eval(), args.max_model_len)

    async def encode(self, prompt: dict[str, Any], params: PoolingParams, request_id: str) -> Any:
        """The states of one row, at its own time."""
        import torch

        assert params == PoolingParams("token_embed", False)
        ids = prompt["prompt_token_ids"]
        assert len(ids) <= self.longest
        self.asked.append(len(ids))
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        await asyncio.sleep(0)
        if FAULT == "dies" and len(self.asked) > 40:
            raise EngineDeadError("EngineCore encountered an issue.")
        with torch.inference_mode():
            states = self._states(torch.tensor([ids]))
        self.waiting -= 1
        said = ids[1:] if FAULT == "other ids" else ids
        yield SimpleNamespace(outputs=SimpleNamespace(data=states), prompt_token_ids=said)

    def _states(self, ids: Any) -> Any:
        output = self.decoder(input_ids=ids, use_cache=False, output_hidden_states=True)
        states = output.last_hidden_state[0].float()
        if FAULT == "short":
            return states[1:]
        if FAULT == "not normed":
            return output.hidden_states[-2][0].float()
        if FAULT == "not causal":
            return (states + states.mean(0)) / 2
        if FAULT == "random":
            import torch

            return states + states.std() * torch.randn_like(states)
        if FAULT == "nan" and len(self.asked) > 40:
            states[-1, 0] = float("nan")
        return states

    def shutdown(self) -> None:
        """Nothing to end."""
        SHUT.append(self)
