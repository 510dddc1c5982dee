"""A plug-in of vLLM: its CPU build over Ray, which by itself it refuses.

Ray's nodes are given GPUs that are none, and a process of the engine runs on a CPU for each.
"""


def platform() -> str:
    """The class that vLLM takes."""
    return "ray_cpu_platform.RayCpuPlatform"
