"""What a recipe must know of somebody's own module, found by running it: shapes, multiply-adds, memory."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from st_fast.core.errors import UserError, first_line
from st_fast.model.own import NO_KERNELS, OwnNetwork, Tapped
from st_fast.recipe.schema import Model


def described(model: Model, blocks: Sequence[int]) -> Model:
    """The [model] of a recipe with what its module, which was given, is found to be.

    blocks: the numbers of the blocks that the recipe's methods read. The module runs a few times, on a CPU, on noise.
    UserError, in one line, for a block that is not there, outputs of a wrong shape, or a buffer that training changes.
    """
    network, again = OwnNetwork(model, NO_KERNELS), OwnNetwork(model, NO_KERNELS)
    if {id(parameter) for parameter in network.parameters()} & {id(parameter) for parameter in again.parameters()}:
        raise UserError(
            f"{type(network.plain).__name__}: the function that was given as model returns the same module each time; "
            "give the module itself, which is copied, or a function that makes a new one"
        )
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(
            f"{type(network.plain).__name__}: none of its parameters is trained; requires_grad_() changes it"
        )
    # What is compiled runs as it was written: a compiler hides products from the counter.
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(0)
        name, module = type(network.plain).__name__, network.module
        names = module.names if isinstance(module, Tapped) else ()
        if isinstance(module, Tapped) and (beyond := [b for b in blocks if b > len(names)]):
            raise UserError(
                f"{name}: the recipe reads block {beyond[0]}, but {len(names)} are named: {', '.join(names)}"
            )
        if not isinstance(module, Tapped) and blocks and "tap" not in inspect.signature(module.forward).parameters:
            raise UserError(
                f"{name}: the recipe reads block {blocks[0]}, but forward has no parameter tap; "
                f'st_fast.tap(module, "blocks") names the blocks of one that has not'
            )
        return _examined(replace(model, own_blocks=names), network, name, sorted(set(blocks)))


def _examined(model: Model, network: OwnNetwork, name: str, blocks: list[int]) -> Model:
    network.config = model
    network.to("cpu").train()
    x, t = torch.randn(2, *model.latent_shape), torch.tensor([0.25, 0.75])
    labels = torch.tensor([0, model.num_classes])  # a class, and the null label
    buffers = {key: value.clone() for key, value in network.plain.named_buffers()}
    kept = _KeptBytes(network)
    velocity, streams = _called(name, lambda: kept.of(lambda: network(x, t, labels, tuple(blocks))), labels)
    if velocity.shape != x.shape:
        raise UserError(f"{name}: the velocity is {tuple(velocity.shape)}, of latents {tuple(x.shape)}; they are alike")
    for key, value in network.plain.named_buffers():
        if not torch.equal(value, buffers[key]):
            raise UserError(
                f"{name}: its buffer {key} changes in training (BatchNorm?); only parameters are averaged and saved"
            )
    width, patch = _shape_of(name, model, network, blocks, streams)
    macs = [_macs(lambda: network(x, t, labels)) // 2]
    if isinstance(network.module, Tapped):
        depths = range(1, len(model.own_blocks) + 1)
        macs = [*(_macs(partial(network.features, x, t, labels, depth)) // 2 for depth in depths), *macs]
    else:
        macs = macs * (max(blocks, default=0) + 1)
    return replace(
        model, name=name, depth=len(macs) - 1, width=width, patch=patch, heads=1, own_macs=tuple(macs),
        own_bytes=kept.bytes // 2, own_parameters=sum(parameter.numel() for parameter in network.plain.parameters()),
    )  # fmt: skip


def _called(name: str, call: Callable[[], Any], labels: Tensor) -> Any:
    try:
        return call()
    except UserError:
        raise
    except IndexError as error:
        classes = f"labels are 0 … {int(labels.max())}, of which the last stands for none"
        raise UserError(f"{name}: forward raised IndexError: {first_line(error)}; {classes}") from error
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{name}: forward(x, t, condition) raised {what}") from error


def _shape_of(
    name: str, model: Model, network: OwnNetwork, blocks: list[int], streams: tuple[Tensor, ...]
) -> tuple[int, int]:
    """The width and the patch of the blocks that are read, which must be alike."""
    found = dict[tuple[int, int], str]()
    height, breadth = model.latent_sides
    for number, stream in zip(blocks, streams, strict=True):
        block = model.own_blocks[number - 1] if model.own_blocks else f"block {number}"
        if stream.ndim != 3:
            raise UserError(f"{name}: {block} gives {tuple(stream.shape)}; (B, N, D) or (B, D, h, w) is needed")
        tokens, width = stream.shape[1:]
        patch = round((height * breadth / tokens) ** 0.5)
        if patch < 1 or height % patch or breadth % patch or height * breadth != tokens * patch**2:
            raise UserError(
                f"{name}: {block} gives {tokens} tokens, which are no grid of a latent of {height} x {breadth}; "
                "a block that gives one token a patch is needed, without class tokens"
            )
        found.setdefault((width, patch), block)
    if len(found) > 1:
        told = " and ".join(
            f"{block} has {width} channels of {patch} x {patch}" for (width, patch), block in found.items()
        )
        raise UserError(f"{name}: {told}; blocks that are read must be alike")
    return next(iter(found), (0, 1))


class _KeptBytes:
    """Counts what a forward keeps for its backward, but for the parameters."""

    def __init__(self, network: OwnNetwork) -> None:
        self.bytes, self._seen = 0, {parameter.untyped_storage().data_ptr() for parameter in network.plain.parameters()}

    def of(self, call: Callable[[], Any]) -> Any:
        """Runs it."""
        with saved_tensors_hooks(self._pack, lambda tensor: tensor):
            return call()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


@torch.no_grad()
def _macs(call: Callable[[], Any]) -> int:
    """Multiply-adds of matrix products and convolutions; attention is computed as products so that it counts."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2
