"""See `ray_cpu`."""

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    """A CPU that Ray counts as a GPU."""

    ray_device_key = "GPU"
