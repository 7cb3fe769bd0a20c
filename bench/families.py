"""Where a step's time goes, by family of kernel, from torch.profiler."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

FAMILIES: tuple[tuple[str, str], ...] = (
    ("optimiser", r"adamw|grad_norm|multi_tensor|st_fast::.*(adam|norm_sum)|foreach"),
    ("attention", r"scaled_dot_product|attention|flash|fmha|sdpa|st_fast::attention"),
    ("matrix products", r"gemm|cutlass|nvjet|cublas|xmma|mkl|aten::(mm|addmm|bmm|baddbmm|linear|matmul|einsum)\b"),
    ("adaLN", r"st_fast::(norm_modulate|gate_residual)|adaln|native_layer_norm|plain_(forward|backward)"
              r"|gate_(forward|backward)|add_partials"),
    ("qk-norm", r"qk_?norm|add_rows"),
    ("feature loss", r"guided_feature|st_fast::align|extrapolate|normalized_mse"),
    ("GELU", r"gelu"),
    ("compiled", r"triton_|inductor|compiled|cpp_fused|CompiledF"),
    ("copies", r"copy_|memcpy|memset|aten::(cat|clone|contiguous|zero_|fill_|index|to)\b|_to_copy"),
)  # fmt: skip
"""Family → what its kernels' names contain, the first match counting; all else is "other elementwise"."""

OTHER = "other elementwise"


def family(name: str) -> str:
    """The family that a kernel belongs to."""
    return next((label for label, pattern in FAMILIES if re.search(pattern, name, re.IGNORECASE)), OTHER)


def seconds(run: Callable[[], object], device: torch.device, times: int) -> dict[str, float]:
    """Seconds a call of `run` by family, the longest first: device time on CUDA, the calling thread's on a CPU."""
    found: dict[str, float] = {}
    for name, spent in kernels(run, device, times).items():
        found[family(name)] = found.get(family(name), 0.0) + spent
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def kernels(run: Callable[[], object], device: torch.device, times: int) -> dict[str, float]:
    """Seconds a call of `run` by kernel (CUDA) or op (CPU), the longest first."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(times):
            run()
        if cuda:
            torch.cuda.synchronize(device)
    spent = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in profiler.key_averages()}
    return dict(sorted(((k, v / times / 1e6) for k, v in spent.items() if v > 0), key=lambda item: -item[1]))
