"""A call profiled: seconds by kernel, which `st_fast.train.profiling` sorts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from st_fast.train import profiling


def kernels(run: Callable[[], object], device: torch.device, times: int) -> dict[str, float]:
    """Seconds a call of `run` by kernel (CUDA) or op (CPU, the calling thread's), the longest first."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(times):
            run()
        if cuda:
            torch.cuda.synchronize(device)
    return {name: spent / times for name, spent in profiling.by_kernel(profiler, device).items()}
