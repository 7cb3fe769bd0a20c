"""Where time goes, by family of kernel: the classification, and what a torch.profiler has seen, read by it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch._C._autograd import DeviceType
from torch.profiler import profile

FAMILIES: tuple[tuple[str, str], ...] = (
    ("all-reduce", r"nccl|c10d|gloo|all_?reduce|all_?gather|reduce_?scatter"),
    # Named after all that was fused into them; GELU has no other kernel on a GPU, so it is looked for below.
    ("compiled", r"^triton_(?!tem_|.*gelu)|inductor|compiled|cpp_fused"),
    ("optimiser", r"adamw|grad_norm|multi_tensor|st_fast::.*(adam|norm_sum|prepare|update|_of_sum|sum_of)|foreach"),
    ("attention", r"scaled_dot_product|attention|flash|fmha|sdpa|st_fast::attention"),
    ("matrix products", r"gemm|cutlass|nvjet|cublas|xmma|mkl|triton_tem|st_fast::linear"
                        r"|aten::(mm|addmm|bmm|baddbmm|linear|matmul|einsum)\b"),
    ("adaLN", r"st_fast::(norm_modulate|gate_residual)|adaln|native_layer_norm|add_partials"),
    ("qk-norm", r"qk_?norm|add_rows"),
    ("feature loss", r"guided_feature|feature_loss|st_fast::align|extrapolate|normalized_mse"),
    ("GELU", r"gelu"),
    ("copies", r"copy_|memcpy|memset|aten::(cat|clone|contiguous|zero_|fill_|index|to)\b|_to_copy"),
)  # fmt: skip
"""Family → what its kernels' names contain, the first match counting; all else is "other elementwise"."""

OTHER = "other elementwise"


def family(name: str) -> str:
    """The family that a kernel belongs to."""
    return next((label for label, pattern in FAMILIES if re.search(pattern, name, re.IGNORECASE)), OTHER)


def by_family(kernels: Mapping[str, float]) -> dict[str, float]:
    """Seconds by family, the longest first, of seconds by kernel."""
    found: dict[str, float] = {}
    for name, spent in kernels.items():
        found[family(name)] = found.get(family(name), 0.0) + spent
    return _longest_first(found)


def by_kernel(profiler: profile, device: torch.device) -> dict[str, float]:
    """Seconds by kernel (CUDA) or op (CPU, its own time without the ops inside it), the longest first."""
    cuda = device.type == "cuda"
    spent = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        for event in profiler.key_averages()
        if event.device_type == _kind(device) and not event.is_user_annotation
    }
    return _longest_first({name: seconds for name, seconds in spent.items() if seconds > 0})


def annotated(profiler: profile) -> dict[str, float]:
    """Seconds that the host spent in each stretch that was named (`st_fast.train.ranges`)."""
    return {
        event.key: event.cpu_time_total / 1e6
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU and event.is_user_annotation
    }


def busy(profiler: profile, device: torch.device) -> float:
    """Seconds in which at least one kernel (CUDA) or op (CPU) ran: those beside one another count once."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == _kind(device) and not event.is_user_annotation
    )
    total, reached = 0.0, 0.0
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6


def _kind(device: torch.device) -> DeviceType:
    return DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU


def _longest_first(spent: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(spent.items(), key=lambda item: -item[1]))
