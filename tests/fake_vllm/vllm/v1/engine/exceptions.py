"""The error of an engine whose processes are gone."""


class EngineDeadError(Exception):
    """See `vllm.v1.engine.exceptions`."""
