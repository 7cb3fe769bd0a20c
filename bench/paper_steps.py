"""The kernels of a training step on CUDA, counted without one: st_fast's own step and the published loop's.

Both run as they are, on the "meta" device: a change of their code changes what is counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bench.fusion import Kernel
from bench.published import PlainLoop
from bench.trace import CompiledModule, Counter
from bench.workload import Setup, make_recipe, make_stage
from st_fast import kernels
from st_fast.core.ranks import Ranks
from st_fast.model import SiT
from st_fast.recipe.batch import images_a_pass
from st_fast.recipe.schema import Recipe, Stage
from st_fast.train import adamw, profiling, supervision
from st_fast.train.batches import noisy_latents
from st_fast.train.optim import Optimizer
from st_fast.train.step import Step
from st_fast.train.supervision import NoisyBatch, Parts, Rows, select_rows

aten = torch.ops.aten
META, CUDA = torch.device("meta"), torch.device("cuda")
LATENT_SCALE = 0.18215


def recipe_of(setup: Setup) -> tuple[Recipe, Stage]:
    """The recipe and the stage of a step, on CUDA; nothing is read from or written to the disk but the recipe."""
    recipe = make_recipe(setup, Path("unused"))
    return recipe, make_stage(setup, recipe)


def ours(setup: Setup) -> list[Kernel]:
    """The kernels of st_fast's step with the defaults for CUDA: bf16, blocks compiled, t stratified."""
    recipe, stage = recipe_of(setup)
    counter, table = Counter(), kernels.select({}, CUDA)
    with META:
        model = SiT(recipe.model, table, _attend)
        model.run_block = CompiledModule(counter)
        teacher = _frozen(recipe, table, counter) if stage.method.teacher_name else None
        method = supervision.create(stage, Parts(recipe.model, table, teacher), 1)
        update = adamw.choose(recipe.optim.implementation, CUDA)
        optimizer = Optimizer(model, method.heads, recipe.optim, torch.bfloat16, update.update, update.norm)
        step = Step(model, method, optimizer, recipe, Ranks(0, 1, META))
        if optimizer.heads.parameters:
            counter.hook(method.heads, "heads")
        rows = _rows(recipe, stage)
        moments, whole, times = _inputs(recipe)
        with profiling.recording_ranges(counter.within), counter:
            latents = [noisy_latents(recipe, LATENT_SCALE, moments, whole, times) for _ in rows]
            step(0, [NoisyBatch(*xs, times, whole, whole, whole, r) for xs, r in zip(latents, rows, strict=True)])
    return counter.kernels


def _frozen(recipe: Recipe, table: kernels.KernelTable, counter: Counter) -> SiT:
    teacher = SiT(recipe.model, table, _attend).to(torch.bfloat16).eval().requires_grad_(False)
    teacher.run_block = CompiledModule(counter)
    return teacher


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as cuDNN has it, the first of the pinned order; its output is laid out like q."""
    out: Tensor = aten._scaled_dot_product_cudnn_attention(q, k, v, None, q.requires_grad, 0.0, False, False)[0]
    return out


def _rows(recipe: Recipe, stage: Stage) -> list[Rows]:
    """The supervised rows of a step's micro-batches, at stratified times."""
    total, size = recipe.optim.batch_size, images_a_pass(recipe.optim, ranks=1)
    with torch.device("cpu"):
        t = (torch.arange(total) + 0.5) / total
        rows = [select_rows(t, slice(first, first + size), stage.method.selection) for first in range(0, total, size)]
    return [Rows(index.to(META), weight.to(META)) for index, weight in rows]


def _inputs(recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Moments, integers (labels, ordinals) and times of one micro-batch."""
    model, size = recipe.model, images_a_pass(recipe.optim, ranks=1)
    moments = torch.empty(size, 2 * model.channels, model.latent_size, model.latent_size, dtype=torch.float16)
    return moments, torch.empty(size, dtype=torch.int64), torch.empty(size)


CASTS: dict[Any, torch.dtype] = {
    F.linear: torch.bfloat16,
    F.conv2d: torch.bfloat16,
    F.scaled_dot_product_attention: torch.bfloat16,
    F.layer_norm: torch.float32,
}
"""What CUDA's autocast casts the inputs of, of all that the published loop calls."""


class CudaAutocast(TorchFunctionMode):
    """What autocast to bf16 does on CUDA, and the attention that PyTorch takes there, for tensors that are on "meta".

    Products and attention get bf16, layer norms float32; float32 attention goes to the memory-efficient kernel.
    """

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.enabled = enabled

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.enabled and func in CASTS:
            args = [a.to(CASTS[func]) if isinstance(a, Tensor) else a for a in args]
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        if args[0].dtype == torch.float32:
            return aten._scaled_dot_product_efficient_attention(*args, None, args[0].requires_grad)[0]
        return _attend(*args)


class CountedLoop(PlainLoop):
    """The published loop as it runs on CUDA."""

    def autocast(self) -> AbstractContextManager[object]:
        return CudaAutocast(enabled=True)


def published(setup: Setup, compiled: bool) -> list[Kernel]:
    """The kernels of the published loop's step: eager, or with its blocks compiled. Its optimiser is eager in both."""
    recipe, stage = recipe_of(setup)
    counter, table = Counter(), kernels.select({}, CUDA)
    with META, CudaAutocast(enabled=False), counter:
        with counter.pause():
            model = SiT(recipe.model, table)
            teacher = SiT(recipe.model, table) if stage.method.teacher_name else None
            heads = supervision.create(stage, Parts(recipe.model, table, teacher), 1).heads
            loop = CountedLoop(recipe, stage, model, heads, teacher, LATENT_SCALE, META)
            loop.optimizer.param_groups[0]["foreach"] = True  # as on CUDA
            _make_moments(loop)
            if compiled:
                for network in filter(None, (loop.model, loop.teacher)):
                    _compile((network.blocks, [network.final_layer]), counter)
            shape = (recipe.optim.batch_size, 2 * recipe.model.channels, *[recipe.model.latent_size] * 2)
            moments, labels = torch.empty(shape), torch.empty(shape[0], dtype=torch.int64)
        loop.step(moments, labels)
    return counter.kernels


def _make_moments(loop: PlainLoop) -> None:
    """AdamW's state is made in its first step, which is not the one to count."""
    for parameter in loop.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    loop.optimizer.step()
    loop.optimizer.zero_grad(set_to_none=True)


def _compile(kinds: Iterable[Iterable[nn.Module]], counter: Counter) -> None:
    for modules in kinds:
        run = CompiledModule(counter)
        for module in modules:
            setattr(module, "forward", partial(run, module))  # noqa: B010
