"""Launches a compiled Triton kernel again without Triton's own search for it.

`kernel[grid](…)` binds the arguments to names, specialises each, looks the kernel up by the text of its options, and
calls hooks that nobody has set: 18 µs of host time for a kernel with 18 arguments. Where the same kernel was launched
before with arguments of which everything it was compiled for is the same, `@launched` goes straight to the compiled
kernel. What the key holds is stricter than what Triton specialises on: pointers by dtype, device and 16-byte alignment,
integers and constants by value.

Needs torch and Triton only. Whatever is not known to be the same goes to Triton: other versions of it, hooks of a
profiler, arguments of other types, tensors on another device than the current one, and the interpreter.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime.jit import JITFunction

KNOWN = tuple(map(int, triton.__version__.split(".")[:2])) in ((3, 6), (3, 7))
"""Whether this Triton's compiled kernels are known to be called as `_Launched` does."""

MOST = 4096
"""Plans a kernel keeps; with more, all are forgotten. Batches whose size changes from step to step add some."""

Plan = tuple[Any, ...]
"""What runs a compiled kernel, its function, its metadata, and the constants that follow the arguments."""


def launched(kernel: Any) -> Any:
    """A `@triton.jit` kernel whose launches `kernel[grid](…)` are quick from the second on. Its grid is of integers,
    its constants follow its arguments and are given by name."""
    return _Launched(kernel) if KNOWN and isinstance(kernel, JITFunction) else on_gpu(kernel)


def on_gpu(kernel: Any) -> Any:
    """A `@triton.jit` kernel that refuses a CPU's tensors in a line of its own: Triton's speaks of drivers."""
    return _OnGpu(kernel) if isinstance(kernel, JITFunction) else kernel


class _OnGpu:
    """Launches `kernel`; everything else is the kernel's."""

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], /, *args: Any, **constants: Any) -> Any:
        if {argument.device.type for argument in args if isinstance(argument, torch.Tensor)} == {"cpu"}:
            raise ValueError(
                f"{self.kernel.__name__}: tensors on the CPU; Triton's kernels need a GPU, or Triton's interpreter, "
                "which TRITON_INTERPRET=1 in the environment turns on before triton is imported"
            )
        return self.kernel[grid](*args, **constants)


class _Launched(_OnGpu):
    """Launches `kernel`, by a plan if there is one."""

    def __init__(self, kernel: JITFunction[Any]) -> None:
        super().__init__(kernel)
        self.plans: dict[tuple[Any, ...], Plan] = {}

    def _launch(self, grid: tuple[int, ...], /, *args: Any, **constants: Any) -> Any:
        found = _key(args)
        if found is None or self._observed():
            return super()._launch(grid, *args, **constants)
        device, parts, values = found
        key = (device, *parts, *constants, *constants.values())
        plan = self.plans.get(key)
        if plan is None:
            return self._first(grid, args, constants, key)
        run, function, metadata, tail = plan
        last = len(grid)
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(grid[0], grid[1] if last > 1 else 1, grid[2] if last > 2 else 1, stream, function, metadata,
            None, None, None, *values, *tail)  # fmt: skip

    def _observed(self) -> bool:
        """Whether someone wants to see each launch, or a global that the kernel read may have changed."""
        runtime, kernel = knobs.runtime, self.kernel
        return bool(
            getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
            or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
            or kernel.pre_run_hooks
            or kernel.used_global_vals
        )

    def _first(
        self, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], key: tuple[Any, ...]
    ) -> Any:
        """Launches by Triton, and keeps what it found."""
        compiled = self.kernel[grid](*args, **constants)
        rest = self.kernel.arg_names[len(args) :]
        if compiled is not None and all(name in constants for name in rest):
            if len(self.plans) >= MOST:
                self.plans.clear()
            tail = tuple(constants[name] for name in rest)
            self.plans[key] = compiled.run, compiled.function, compiled.packed_metadata, tail
        return compiled


def _key(args: tuple[Any, ...]) -> tuple[int, list[Any], list[Any]] | None:
    """The current device, what a kernel is compiled for, and the arguments as the driver takes them.

    None if an argument is no integer, None or tensor on that device.
    """
    parts: list[Any] = []
    values: list[Any] = []
    here, ends = -1, 0
    for argument in args:
        kind = type(argument)
        if kind is int or argument is None:
            parts.append(argument)
            values.append(argument)
            continue
        if kind is not torch.Tensor and kind is not torch.nn.Parameter:
            return None
        device = argument.get_device()
        if device != here:
            if here >= 0 or device < 0 or device != torch._C._cuda_getDevice():
                return None
            here = device
        address = argument.data_ptr()
        ends |= address
        parts.append(argument.dtype)
        values.append(address)
    # All aligned, as a rule; else which of them are and how far the others are off.
    parts.append(tuple(value and value % 16 for value in values) if ends % 16 else None)
    return None if here < 0 else (here, parts, values)
