"""A module of one's own in the place of st_fast's networks: how its blocks are read, and what it costs.

Such a module is called as `module(x, t, condition)` and returns the velocity; `tap` names the blocks whose output
methods read. Or it has a parameter more, `tap`, and returns both itself, as st_fast's networks do.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from st_fast.core.checkpoint import match_strictly
from st_fast.core.errors import UserError
from st_fast.core.options import ARCHITECTURE_MOST, did_you_mean
from st_fast.kernels import KernelTable
from st_fast.model.attention import Attend
from st_fast.model.layout import Layout
from st_fast.model.side_stream import Branches, batched
from st_fast.model.transformer import DiffusionTransformer
from st_fast.recipe.schema import Model

Factory = Callable[[], nn.Module]


NO_KERNELS = cast(KernelTable, None)
"""Of a module that has none of st_fast's ops in it."""


class _Reached(Exception):
    """The block whose output is wanted has run; nothing after it need run."""


class Tapped(nn.Module):
    """A module with names for its blocks: made by `tap`. Called as `(x, t, condition, tap)`; see `OwnNetwork`."""

    def __init__(self, inner: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.inner, self.names = inner, names

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, tap: int | tuple[int, ...] = 0) -> tuple[Tensor, Any]:
        """The velocity and the output of block `tap`, counted from 1 in the order of the names; 0: None."""
        taps = tap if isinstance(tap, tuple) else (tap,)
        with self._read(taps) as found:
            velocity = self.inner(x, t, condition)
        streams = tuple(self._found(found, number) for number in taps)
        return velocity, streams if isinstance(tap, tuple) else streams[0]

    def features(self, x: Tensor, t: Tensor, condition: Tensor, depth: int) -> Tensor:
        """The output of block `depth`; what the module runs after it is not run."""
        with self._read((depth,), leave=True) as found, suppress(_Reached):
            self.inner(x, t, condition)
        return cast(Tensor, self._found(found, depth))

    def _found(self, found: dict[int, Tensor], number: int) -> Tensor | None:
        if number and number not in found:
            raise UserError(f"{type(self.inner).__name__}: its block {self.names[number - 1]} did not run")
        return found.get(number)

    @contextmanager
    def _read(self, taps: tuple[int, ...], leave: bool = False) -> Iterator[dict[int, Tensor]]:
        found: dict[int, Tensor] = {}

        def keep(number: int, module: nn.Module, inputs: Any, output: Any) -> None:
            found[number] = first_tensor(output)
            if leave:
                raise _Reached

        blocks = [(number, self.inner.get_submodule(self.names[number - 1])) for number in taps if number]
        handles = [block.register_forward_hook(partial(keep, number)) for number, block in blocks]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def tap(module: nn.Module, *names: str) -> Tapped:
    """The module with names for the blocks that methods read: block k of a recipe is the k-th name, from 1.

    The name of an `nn.ModuleList` or `nn.Sequential` stands for all that are in it. A block's output, or the first
    tensor in it, is (B, N, D) or (B, D, h, w). UserError for a name that the module does not have.
    """
    blocks, known = list[str](), dict(module.named_modules())
    for name in names:
        if name not in known or not name:
            near = did_you_mean(name, known)
            some = ", ".join(list(filter(None, known))[:20])
            raise UserError(f"tap: {type(module).__name__} has no block named {name!r}{near}; it has {some}")
        inside = isinstance(known[name], nn.ModuleList | nn.Sequential)
        blocks += [f"{name}.{key}" for key, _ in known[name].named_children()] if inside else [name]
    if not blocks:
        raise UserError('tap: no block is named; tap(module, "blocks") names all of a ModuleList')
    return Tapped(module, tuple(blocks))


def first_tensor(output: Any) -> Tensor:
    """A tensor, the first of a tuple or list, or the `sample` of diffusers' outputs."""
    while not isinstance(output, Tensor):
        output = output[0] if isinstance(output, tuple | list) and output else getattr(output, "sample", None)
        if output is None:
            raise TypeError("returned no tensor")
    return output


def tokens_of(output: Tensor) -> Tensor:
    """(B, N, D) as it is, (B, D, h, w) as (B, h·w, D)."""
    return output.flatten(2).transpose(1, 2) if output.ndim == 4 else output


@dataclass(frozen=True)
class Given:
    """A module that was given from Python: how it is made, and whether it runs under autocast in bf16."""

    make: Factory
    autocast: bool = False
    drawn: bool = False
    """It comes with weights of its own; otherwise `make` draws them."""
    seed: int = 0
    """What `make` draws from: buffers that are drawn are then alike in student, teacher and average."""
    start: Mapping[str, Tensor] = field(default_factory=dict)
    """The weights and buffers with which the run began, where they are its own."""

    def made(self) -> nn.Module:
        """A new module. UserError where it is none."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            module = self.make()
        if not isinstance(module, nn.Module):
            raise UserError(f"model: {type(module).__name__} was made; an nn.Module is needed")
        plain = module.inner if isinstance(module, Tapped) else module
        with torch.no_grad():
            for name, tensor in _tensors(plain).items() if self.start else ():
                tensor.copy_(self.start[name])
        return module


GIVEN: ContextVar[Given | None] = ContextVar("GIVEN", default=None)
"""The module that stands for `model.network = "own"` where a run is trained or read; a recipe holds no code."""


def not_here(where: str) -> UserError:
    """What to raise where nothing was given that stands for a module."""
    return UserError(
        f'{where}: somebody\'s own module (model.network = "own"), which this program does not have; from Python '
        "st_fast.open_run(folder, model=...) reads what was trained"
    )


class OwnNetwork(DiffusionTransformer):
    """The module that was given, as the trainer knows networks.

    Parameters have the module's own names. UserError where none was given.
    """

    def __init__(self, config: Model, kernels: KernelTable, attend: Attend | None = None) -> None:
        nn.Module.__init__(self)
        if (given := GIVEN.get()) is None:
            raise not_here(f"model.name = {config.name!r}")
        self.config, self.kernels = config, kernels
        self.module, self._autocast = given.made(), given.autocast

    @classmethod
    def around(cls, module: nn.Module, num_classes: int, width: int) -> Self:
        """A module that is there, for its features: of so many classes, its blocks of so many channels."""
        names = module.names if isinstance(module, Tapped) else ()
        depth = len(names) or ARCHITECTURE_MOST["depth"]
        network = cls.__new__(cls)
        nn.Module.__init__(network)
        network.config = Model(
            name=type(module).__name__, network="own", depth=depth, width=width, heads=1, patch=1,
            num_classes=num_classes, own_blocks=names,
        )  # fmt: skip
        network.module, network._autocast = module, False
        return network

    @property
    def plain(self) -> nn.Module:
        """The module as it was given to `tap`, or as it is."""
        return self.module.inner if isinstance(self.module, Tapped) else self.module

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """By the names that the module has for them."""
        return self.plain.named_parameters(*args, **kwargs)

    def get_parameter(self, target: str) -> nn.Parameter:
        """By the module's own name."""
        return self.plain.get_parameter(target)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The parameters: what is trained, averaged and saved. Buffers are as the module makes them."""
        return {name: parameter.detach() for name, parameter in self.plain.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Copies all parameters; KeyError for one that is missing."""
        for name, parameter in self.plain.named_parameters():
            parameter.copy_(state_dict[name])

    @property
    def device(self) -> torch.device:
        """The weights' device."""
        return next(self.plain.parameters()).device

    @property
    def constants(self) -> set[nn.Parameter]:
        """None: what the module does not train it says by requires_grad."""
        return set()

    def null_condition(self, count: int) -> Tensor:
        """(count,) int64: the label after the last class."""
        return torch.full((count,), self.config.num_classes, device=self.device)

    def use_null(self, null: Tensor) -> None:
        """The null label is the recipe's."""

    def forward(
        self, x: Tensor, t: Tensor, condition: Tensor, tap: int | tuple[int, ...] = 0, layout: Layout | None = None
    ) -> tuple[Tensor, Any]:
        """x (B, C, H, W), t (B,), condition (B,) → velocity (B, C, H, W) and the output of block `tap` as (B, N, D).

        Both float32. A tuple of blocks gives a tuple.
        """
        streams: Any = ()
        with self._in_precision(x):
            if tap not in (0, ()) or isinstance(self.module, Tapped):
                velocity, streams = self.module(x, t, condition, tap)
            else:
                velocity = self.module(x, t, condition)
        if isinstance(tap, tuple):
            streams = tuple(tokens_of(first_tensor(one)).float() for one in streams)
        elif tap:
            streams = tokens_of(first_tensor(streams)).float()
        return first_tensor(velocity).float(), streams

    def features(self, x: Tensor, t: Tensor, condition: Tensor, depth: int, layout: Layout | None = None) -> Tensor:
        """The output of block `depth` as (B, N, D) float32; with `tap` nothing after it is computed."""
        if not isinstance(self.module, Tapped):
            return cast(Tensor, self(x, t, condition, depth)[1])
        with self._in_precision(x):
            return tokens_of(self.module.features(x, t, condition, depth)).float()

    def guided_features(
        self, x: Tensor, t: Tensor, condition: Tensor, depth: int, branches: Branches = batched
    ) -> tuple[Tensor, Tensor]:
        """The outputs of block `depth` with the condition and with the null label, each (B, N, D)."""
        features = partial(self.features, depth=depth)
        return branches(features, x, t, condition, self.null_condition(len(condition)))

    def _not_inside(self, *args: Any, **kwargs: Any) -> Any:
        """What only st_fast's own blocks have; recipes that would ask for it are refused."""
        raise NotImplementedError(f"{type(self.plain).__name__} has none of st_fast's blocks")

    modulation_layers = norm_weights = set_run_attention = _trunk = _initialise_condition = _not_inside

    def _in_precision(self, x: Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self._autocast)


START = "start.safetensors"
"""In a run's folder: weights and buffers of a module that was given with weights of its own."""


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that a state dict leaves out."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def keep_start(model: Model, folder: Path, write: Callable[[Path, bytes], object] | None = None) -> None:
    """Takes the first weights that the folder of a run has, so that later stages start alike, or keeps them by `write`.

    Only of a module with weights of its own. UserError where what is there is of another module.
    """
    given = GIVEN.get()
    if model.network != "own" or given is None or not given.drawn:
        return
    path, module = folder / START, given.made()
    plain = module.inner if isinstance(module, Tapped) else module
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in _tensors(plain).items()}
    if path.exists():
        found = load_file(path)
        match_strictly(tensors, found, str(path))
        GIVEN.set(replace(given, start=found))
    elif write is not None:
        write(path, save(tensors))
