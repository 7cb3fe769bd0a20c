"""Profiles some steps of a stage, by `[profile]` of the recipe: for nsys, or by torch.profiler with a table of its own.

The parts of a step are named ranges, which cost nothing without a profiler. A profiled step computes the same, only
more slowly.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from st_fast.core.errors import UserError, first_line
from st_fast.core.ranks import Ranks
from st_fast.recipe import schema
from st_fast.train.log import Clock, Log

T = TypeVar("T")
Opener = Callable[[str], AbstractContextManager[object]]

UNDER_NSYS = "NSYS_PROFILING_SESSION_ID"
"""nsys sets this variable in the processes that it starts."""
OUTSIDE = "outside kernels"
"""Time of a step in which nothing ran: the device waiting for work, or Python between two ops."""
STEP = "step"
"""The range of one whole step; the others lie within it."""
RANGES = ("data", "noise", "teacher", "student forward", "loss", "backward", "all-reduce", "optimiser")
"""The ranges within a step, in the order of the plain schedule."""

_opener: Opener | None = None
_NOTHING = nullcontext()


def named_range(name: str) -> AbstractContextManager[object]:
    """A range of that name in the profile, if one is recorded. Not for use inside compiled code."""
    return _NOTHING if _opener is None else _opener(name)


@contextmanager
def recording_ranges(opener: Opener) -> Iterator[None]:
    """Within the block ranges are opened by `opener`: `torch.cuda.nvtx.range` or `torch.profiler.record_function`."""
    global _opener
    before, _opener = _opener, opener
    try:
        yield
    finally:
        _opener = before


def choose_tool(settings: schema.Profile, device: torch.device) -> Literal["nsys", "torch"]:
    """What profiles. UserError where "nsys" is asked for without CUDA, whose calls tell it when to begin."""
    if settings.tool == "nsys" and device.type != "cuda":
        raise UserError(f'profile.tool = "nsys": needs CUDA, this run is on {device}; "torch" works here')
    if settings.tool == "auto":
        return "nsys" if device.type == "cuda" and os.environ.get(UNDER_NSYS) else "torch"
    return settings.tool


class StageProfile:
    """The profile of one stage: `watch` its batches, and say when a step is `stepped`.

    By torch.profiler on the first rank alone, into `folder`; by nsys on each rank that it started.
    """

    def __init__(
        self, settings: schema.Profile, ranks: Ranks, log: Log, stage: schema.Stage, folder: Path, clock: Clock
    ) -> None:
        self.settings, self.ranks, self.log, self.stage = settings, ranks, log, stage.name
        self.folder, self.clock = folder, clock
        self._steps, self.last = stage.steps, min(settings.start + settings.steps - 1, stage.steps)
        self.tool = choose_tool(settings, ranks.device)
        self._open = ExitStack()  # the profiler
        self._step = ExitStack()  # the range of the whole step

    def watch(self, batches: Iterator[T], first: int) -> Iterator[T]:
        """The same batches, of the steps after `first`; a step's range begins before its batch is ready."""
        if 0 < self.settings.start <= first:
            self.log.say(
                f"{self.stage}: profile.start = {self.settings.start} is already past; continuing at step {first + 1}"
            )
        with self._open, self._step:
            for number in range(first + 1, self._steps + 1):
                if number == self.settings.start and (self.tool == "nsys" or self.ranks.first):
                    with self.clock.paused():
                        self._open.enter_context(self._nsys() if self.tool == "nsys" else self._torch())
                self._step.enter_context(named_range(STEP))
                yield next(batches)

    def stepped(self, step: int) -> None:
        """To be called when a step's work is launched; ends the profile after its last step."""
        self._step.close()
        if self.settings.start and step == self.last:
            self._open.close()

    @contextmanager
    def _nsys(self) -> Iterator[None]:
        torch.cuda.synchronize(self.ranks.device)
        torch.cuda.profiler.start()
        try:
            with recording_ranges(torch.cuda.nvtx.range):
                yield
        finally:
            torch.cuda.synchronize(self.ranks.device)
            torch.cuda.profiler.stop()

    @contextmanager
    def _torch(self) -> Iterator[None]:
        device, cuda = self.ranks.device, self.ranks.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities, acc_events=True) as profiler, recording_ranges(record_function):
            start = time.perf_counter()
            yield
            if cuda:
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
        with self.clock.paused():
            self._report(profiler, seconds)

    def _report(self, profiler: profile, seconds: float) -> None:
        first, last, device = self.settings.start, self.last, self.ranks.device
        count, path = last - first + 1, self.folder / f"steps-{first}-{last}.json"
        problem = export(profiler, path)
        found = by_family(by_kernel(profiler, device))
        found[OUTSIDE] = max(0.0, seconds - busy(profiler, device))
        each = {name: spent / count for name, spent in found.items()}
        host = {name: spent / count for name, spent in annotated(profiler).items()}
        ranges = {name: host[name] for name in RANGES if name in host}
        self.log.write("profile", self.stage, last, first=first, file=path.name, families=each, stretches=ranges)
        where = f"no trace ({problem})" if problem else f"trace in {path}"
        self.log.say(f"{self.stage}: steps {first} to {last} profiled, {where}")
        self.log.say(table("family of kernel", each, seconds / count))
        self.log.say(table("range, on the host", ranges, host[STEP]))


def export(profiler: profile, path: Path) -> str:
    """Writes the trace; what went wrong, if anything did: nothing is left of it then, and training goes on."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(partial))
        with partial.open("rb") as file:  # its writer does not tell that the disk was full
            file.seek(-min(2, partial.stat().st_size), os.SEEK_END)
            if not file.read().rstrip().endswith(b"}"):
                raise OSError(f"{path}: cut off while it was written")
        os.rename(partial, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        return first_line(error)
    return ""


def table(title: str, seconds: Mapping[str, float], whole: float) -> str:
    """Milliseconds and shares of `whole`, one line per name."""
    rows = [*seconds.items(), ("the step, as profiled", whole)]
    width = max(len(title), *(len(name) for name, _ in rows))
    lines = [f"  {title:<{width}}  ms a step  share"]
    lines += [f"  {name:<{width}}  {1e3 * spent:>9.3f}  {100 * spent / whole:>4.0f} %" for name, spent in rows]
    return "\n".join(lines)


FAMILIES: tuple[tuple[str, str], ...] = (
    ("all-reduce", r"nccl|c10d|gloo|all_?reduce|all_?gather|reduce_?scatter"),
    # Named after all that was fused into them; GELU has no other kernel on a GPU, so it is looked for below.
    ("compiled", r"^triton_(?!tem_|.*gelu)|inductor|compiled|cpp_fused"),
    ("optimiser", r"adamw|grad_norm|multi_tensor|st_fast::.*(adam|norm_sum|prepare|update|_of_sum|sum_of)|foreach"),
    ("attention", r"scaled_dot_product|attention|flash|fmha|sdpa|st_fast::attention"),
    ("matrix products", r"gemm|cutlass|nvjet|cublas|xmma|mkl|triton_tem|st_fast::linear|linear_gradient"
                        r"|aten::(mm|addmm|bmm|baddbmm|linear|matmul|einsum)\b"),
    ("adaLN", r"norm_modulate|gate_residual|adaln|native_layer_norm|add_partials"),
    ("qk-norm", r"qk_?norm"),
    ("feature loss", r"guided_feature|feature_loss|st_fast::align|extrapolate|normalized_mse"),
    ("GELU", r"gelu|bias_add"),
    ("SwiGLU", r"swiglu"),
    ("copies", r"copy_|memcpy|memset|aten::(cat|clone|contiguous|zero_|fill_|index|to)\b|_to_copy"),
)  # fmt: skip
"""Family → a pattern of its kernels' names. The first match counts; the rest is "other elementwise"."""

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
    """Seconds that the host spent in each named range."""
    return {
        event.key: event.cpu_time_total / 1e6
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU and event.is_user_annotation
    }


def busy(profiler: profile, device: torch.device) -> float:
    """Seconds in which at least one kernel (CUDA) or op (CPU) ran; overlapping ones count once."""
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
