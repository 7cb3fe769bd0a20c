"""Registers ops with PyTorch: schema, kernels by device, fake, autocast and gradient; and what is to be known of each.

One op name for every device: CPU → csrc if it is built (`linear`: oneDNN), CUDA → Triton (csrc for the optimiser if it
is built), anything else → the family's `definition.py`.

Autocast: the ops are precise as they are, because they compute in float32 whatever comes in. So under autocast the
inputs keep their dtypes, the outputs have the dtypes the schema promises, and nothing inside is cast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._ops import add_op_namespace_prefix, ops
from .trial import Draw, Inputs, Size

LIBRARY = torch.library.Library(add_op_namespace_prefix("")[:-2], "DEF")
IN_PLAIN_PYTORCH = torch.library.Library(LIBRARY.ns + "_reference", "DEF")
"""The same ops by their definitions on every device: where csrc and CUDA send float64."""

SCHEMAS: dict[str, str] = {}
"""Every registered op's schema."""

UNREAD: dict[str, tuple[str, float]] = {}
"""An argument that an op does not read, or not all of: its name, and the share that stays unread."""

LAUNCHERS: dict[str, str] = {}
"""The module whose function of the op's name launches it on CUDA; imported at the first call, so that a CPU run never
imports Triton."""

ON_CUDA: dict[str, Callable[..., Any]] = {}
"""What is registered for CUDA, of ops that no compiled library serves there."""

Context = Any
"""autograd's context object: attributes are set and read freely."""

Grad = Optional[Tensor]
"""Gradients that never arrive are None, not zeros that someone has to write and read."""


@dataclass(frozen=True)
class Kind:
    """Inputs of another kind that an op takes, beside those of its `trial`."""

    trial: Callable[[Draw, Size], Inputs]
    vectors: Callable[[Size], int] = lambda size: 1
    """Modulation vectors of a sample."""
    statistics: Callable[[Size], int] | None = None
    """As the op's own, where they are others."""
    floor: tuple[int, int] | None = None
    """As the op's own, where it is another."""
    usual: str = ""
    """The kind that measurements compare it with; "": the op's usual inputs."""


@dataclass(frozen=True)
class Op:
    """One op as users call it, with what the choice between implementations, tests and measurements need to know."""

    call: Callable[..., Any]
    """The public function."""
    definition: Callable[..., Any]
    """The same in plain PyTorch, with the same signature."""
    trial: Callable[[Draw, Size], Inputs] | None = None
    """Inputs of one forward and backward pass, as training has them; None for ops that are tried by other means."""
    floor: tuple[float, float] = (0, 0)
    """What the mathematics must read and write, forward and backward, in elements a value of x (B·N·D)."""
    moved: tuple[float, float] | None = None
    """What the op's interface reads and writes of such elements, where that is more."""
    vectors: tuple[int, int] = (0, 0)
    """Modulation vectors (B, D) that are read forward; read and written backward."""
    statistics: Callable[[Size], int] = lambda size: 0
    """float32 numbers a token that the forward pass writes and the backward pass reads."""
    instead: Callable[[Any], Callable[..., Any]] | None = None
    """What a model runs without the op, from its table's others, if which is faster takes a trial of both: a kernel's
    being there says too little, and "auto" is the reference until then."""
    free_backward_on_cpu: bool = False
    """Whether the backward pass hands on a gradient as it is, which the CPU can see to be right."""
    data: Callable[[Size, int], float] | None = None
    """Bytes that an op moves which makes data, at an element's size: it has no backward pass."""
    forms: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Other fused forms that a recipe can choose by these names (the family's FORMS)."""
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    """Other kinds of inputs, by names for tests and measurements."""

    def trials(self) -> tuple[Callable[[Draw, Size], Inputs], ...]:
        """The trial, if there is one, and those of the other kinds."""
        return (*(() if self.trial is None else (self.trial,)), *(kind.trial for kind in self.kinds.values()))

    def bytes(
        self, size: Size, itemsize: int, device_type: str, kind: str = ""
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """Bytes (forward, backward) that the mathematics must move, and those that the op's interface moves.

        The modulation of other kinds of inputs is among the former, too: it may be as large as x.
        """
        if self.data is not None:
            moved = self.data(size, itemsize), 0.0
            return moved, moved
        unit = size.batch * size.tokens * size.width * itemsize
        other = self.kinds[kind] if kind else None
        vector = size.batch * size.width * itemsize * (other.vectors(size) if other else 1)
        needed = vector if other else 0
        statistics, floor = (other and other.statistics) or self.statistics, (other and other.floor) or self.floor
        kept = 4 * statistics(size) * size.batch * size.tokens
        forward, backward = self.moved or floor
        if device_type == "cpu" and self.free_backward_on_cpu:
            backward = 0
        return (floor[0] * unit + self.vectors[0] * needed, floor[1] * unit + self.vectors[1] * needed), (
            forward * unit + kept + self.vectors[0] * vector,
            backward * unit + kept + self.vectors[1] * vector,
        )


def new(like: Tensor) -> Tensor:
    """A fake of an output: contiguous, whatever the strides of what it is like."""
    return like.new_empty(like.shape)


def statistic(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A fake of statistics or losses: in the computing dtype."""
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def fake_bias_gradient(like: Tensor, bias: Grad) -> Tensor:
    """A fake of a bias's gradient; without a bias it is empty, in the computing dtype."""
    return statistic(like, (0,)) if bias is None else new(bias)


def wants_gradient(bias: Grad) -> Grad:
    """The bias of the layer before an op, if its gradient has to be summed."""
    return bias if bias is not None and bias.requires_grad and torch.is_grad_enabled() else None


def define(
    name: str, schema: str, plain: Callable[..., Any], fake: Callable[..., Any], launcher: str | None = None,
    unread: tuple[str, float] | None = None,
) -> None:  # fmt: skip
    """Register an op: its schema's arguments and results, its plain form for every device, its fake, and for CUDA the
    module whose function `name` launches it. Kernels of a compiled library that is loaded already come first."""
    full = add_op_namespace_prefix(name)
    SCHEMAS[name] = schema
    if unread is not None:
        UNREAD[name] = unread
    for library in (LIBRARY, IN_PLAIN_PYTORCH):
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
        library.impl(name, plain, "CompositeExplicitAutograd")
    if launcher is not None:
        LAUNCHERS[name] = launcher
        if not torch._C._dispatch_has_kernel_for_dispatch_key(full, "CUDA"):
            ON_CUDA[name] = _on_cuda(launcher, name)
            LIBRARY.impl(name, ON_CUDA[name], "CUDA")
    op = getattr(ops, name).default
    LIBRARY.impl(name, _without_autocast(op, "cpu"), "AutocastCPU")
    LIBRARY.impl(name, _without_autocast(op, "cuda"), "AutocastCUDA")
    torch.library.register_fake(full, fake, lib=LIBRARY)


def differentiate(name: str, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Register an op's gradient. `<name>_backward`, where there is such an op, refuses to be differentiated."""

    def refuse(ctx: Context, *grads: Grad) -> None:
        raise no_second_derivative(name)

    _register_autograd(name, save, backward)
    if f"{name}_backward" in SCHEMAS:
        _register_autograd(f"{name}_backward", lambda ctx, inputs, output: None, refuse)


PRIVATE = (
    "_AutoDispatchBelowAutograd", "_after_autograd_keyset", "_after_ADInplaceOrView_keyset", "_any_requires_grad",
)  # fmt: skip
"""What `_register_autograd` takes from torch._C, as torch.library does."""


def _register_autograd(name: str, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """What `torch.library.register_autograd` does for ops without keyword-only arguments, at half the cost of a call.

    That one fills in the schema's defaults at every call; ours are those of the functions, too. Where nothing but the
    CUDA kernel is left to be called (no dispatch mode, no fake or wrapped tensor) and that is in Python, too, it is
    called without another way through the dispatcher.
    """
    op = getattr(ops, name).default
    if not all(hasattr(torch._C, part) for part in PRIVATE):
        torch.library.register_autograd(add_op_namespace_prefix(name), backward, setup_context=save, lib=LIBRARY)
        return

    after, backends = torch._C._after_autograd_keyset, torch._C._after_ADInplaceOrView_keyset
    cuda, on_cuda = torch._C.DispatchKey.CUDA, ON_CUDA.get(name)

    def below(keyset: Any, args: tuple[Any, ...]) -> Any:
        if on_cuda is not None and (keyset & backends).highestPriorityTypeId() == cuda:
            return on_cuda(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & after, *args)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Context, keyset: Any, *args: Any) -> Any:
            output = below(keyset, args)
            save(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Context, *grads: Grad) -> Any:
            found = backward(ctx, *grads)
            return (None, *found) if isinstance(found, tuple) else (None, found)

    def call(keyset: Any, *args: Any) -> Any:
        if forward_mode():
            raise no_forward_mode(name)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Function.apply(keyset, *args)
        return below(keyset, args)

    Function.__name__ = Function.__qualname__ = f"{name}_gradient"
    LIBRARY.impl(name, call, "Autograd", with_keyset=True)


def has_kernel(name: str, device_type: str) -> bool:
    """Whether the op has a kernel of its own for a kind of device ("cpu", "cuda")."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return bool(key and torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix(name), key))


def forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken (`torch.func.jvp`), which the ops do not have."""
    return forward_ad._current_level >= 0


def no_forward_mode(name: str) -> NotImplementedError:
    """What a forward-mode derivative is answered with."""
    return NotImplementedError(f"{LIBRARY.ns}.{name}: there is no forward-mode derivative; use the reference ops")


def no_second_derivative(name: str) -> NotImplementedError:
    """What a second derivative is answered with."""
    return NotImplementedError(f"{LIBRARY.ns}.{name}: there is no second derivative; use the reference ops for it")


def zeros_if_none(grad: Grad, like: Tensor) -> Tensor:
    """A gradient that the backward pass computes with even if it never arrived."""
    return torch.zeros_like(like) if grad is None else grad


def _on_cuda(module: str, name: str) -> Callable[..., Any]:
    """The Triton launcher of an op, run on the device of its first tensor; float64 stays with plain PyTorch."""
    found: list[Callable[..., Any]] = []

    def launch(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        if first.dtype == torch.float64:
            return getattr(getattr(torch.ops, IN_PLAIN_PYTORCH.ns), name)(*args)
        if not found:
            found.append(getattr(import_module(module), name))
        if first.get_device() == torch._C._cuda_getDevice():
            return found[0](*args)
        with torch.cuda.device(first.device):
            return found[0](*args)

    return launch


def _without_autocast(op: torch._ops.OpOverload, device_type: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return op(*args)

    return call
