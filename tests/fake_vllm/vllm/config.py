"""The part of vLLM's configuration that kdcache uses."""

from dataclasses import dataclass


@dataclass
class PoolerConfig:
    """See `vllm.config`."""

    task: str
    use_activation: bool
