"""The estimate of a stage's memory, against the tensors that its trainer really holds."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import workload
from bench.workload import Setup, ours
from st_fast import kernels
from st_fast.model.compiling import recomputed
from st_fast.model.layers import run_module
from st_fast.model.sit import Block
from st_fast.recipe import Stage, cost, load
from st_fast.recipe.architecture import resolve_model
from st_fast.recipe.methods import Plain
from st_fast.recipe.schema import Model
from st_fast.recipe.token_cost import grouped_bytes


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address → bytes of the memory behind tensors, each once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def living() -> dict[int, int]:
    gc.collect()
    found = [found for found in gc.get_objects() if type(found) in (Tensor, torch.nn.Parameter)]
    found = [tensor for tensor in found if tensor.layout == torch.strided]  # another test may have made sparse ones
    return storages(t for t in found if t.device.type == "cpu")


@pytest.mark.parametrize(
    ("stage", "precision"), [("plain", "fp32"), ("stage 1", "bf16"), ("stage 2", "fp32"), ("stage 2", "bf16")]
)
def test_weights_with_their_state_gradients_and_teacher_are_what_is_held(stage, precision, monkeypatch):
    """Counted where a step keeps most: after the backward pass, before gradients become an update."""
    shipped = workload.make_recipe

    def make(setup, folder):
        recipe = shipped(setup, folder)
        return replace(recipe, run=replace(recipe.run, precision=precision))

    monkeypatch.setattr(workload, "make_recipe", make)
    before = living()
    with ours(Setup("S/2", stage, 4, torch.device("cpu"), tokens=16, depth=2, compile="off")) as loop:
        step = loop.trainer.step
        (batch,) = next(loop.iterator.steps(0, 1))
        losses = step.losses(batch, step.targets.start(0, batch))
        (losses.denoise + losses.aux).backward()
        others = storages(t for t in vars(batch).values() if isinstance(t, Tensor))
        others |= storages((loop.iterator.loader._moments, loop.iterator.loader._labels))
        now = living() | storages(p.grad for p in loop.trainer.optimizer.parameters() if p.grad is not None)
        held = sum(size for place, size in now.items() if place not in before and place not in others)
        recipe = replace(loop.recipe, stages=(loop.stage,))
        estimate, _ = cost.memory_bytes(recipe, ranks=1, bf16=precision == "bf16")
    assert held == pytest.approx(estimate, rel=0.02)
    assert cost.head_parameters(recipe.model, loop.stage.method) == sum(
        p.numel() for p in loop.trainer.method.heads.parameters()
    )


@pytest.mark.parametrize("stage", ["plain", "stage 1", "stage 2", "Self-Flow", "SRA with dual time"])
def test_activations_on_a_cpu_are_the_estimate_within_a_hundredth(stage):
    """Eagerly; the estimate is that of a compiled block on CUDA."""
    with ours(Setup("S/2", stage, 6, torch.device("cpu"), tokens=64, depth=6, compile="off")) as loop:
        model, step = loop.trainer.model, loop.trainer.step
        (batch,) = next(loop.iterator.steps(0, 1))
        target, kept = step.targets.start(0, batch), dict[int, int]()
        weights = storages((*model.parameters(), *loop.trainer.method.heads.parameters()))

        def keep(tensor: Tensor) -> Tensor:
            kept.update(storages([tensor]))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = step.losses(batch, target)
        held = sum(size for place, size in kept.items() if place not in weights)
        assert losses.denoise.isfinite()
        config, method = loop.recipe.model, loop.stage.method
        supervised = len(batch.rows.index) * cost.supervision_bytes(config, loop.stage, False, loop.recipe.run)
        # On a CPU groups attend within themselves without a copy.
        groups = method.token_groups and replace(method.token_groups, separated=False)
        estimate = 6 * (cost.activation_bytes(config, bf16=False) + grouped_bytes(config, groups, bf16=False))
        estimate += supervised
    # What an average teaches, and what is compared with it, are there at the peak, and not saved.
    assert held == pytest.approx(estimate, rel=0.015 if method.learns_from_average else 0.01)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What CUDA's scaled_dot_product_attention dispatches to for cuDNN."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[0]


def traced_bytes(model: Model, checkpointing: str, batch: int) -> int:
    """Bytes that one block of a compiled student in bf16 saves for its backward pass, by AOTAutograd's own partition.

    The block has CUDA's table of ops and cuDNN's attention. Its tensors are fake and on the CPU, because a PyTorch
    without CUDA can't differentiate fake CUDA tensors. Every storage once, weights not at all.
    """
    saved: list[torch.fx.Node] = []

    def partition(joint: Any, inputs: Any, *, num_fwd_outputs: int, **more: Any) -> Any:
        parts = min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **more)
        (outputs,) = parts[0].graph.output_node().args
        saved.extend(outputs[num_fwd_outputs:])
        return parts

    def as_it_is(graph: Any, inputs: Any) -> Any:
        return graph

    def fake(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, requires_grad=True)

    torch._dynamo.reset()
    run = recomputed(run_module) if checkpointing == "block" else run_module
    backend = aot_autograd(fw_compiler=as_it_is, bw_compiler=as_it_is, partition_fn=partition)
    tokens, width = model.tokens, model.width
    with FakeTensorMode():
        block = Block(model, kernels.select({}, torch.device("cuda")), cudnn)
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(fake(*parameter.shape).detach()))
        if checkpointing == "attention":
            block.run_attention = recomputed(run_module)
        shift, scale = fake(batch, 6 * width).chunk(6, dim=1)[:2]
        inputs = (fake(batch, tokens, width), fake(batch, tokens, width), fake(batch, 6 * width), shift, scale)
        torch.compile(run, fullgraph=True, dynamic=False, backend=backend)(block, *inputs)
    torch._dynamo.reset()
    # Not counted: weights, the next block's shift and scale, a generator's state (of uint8), seeds (scalars).
    others = {parameter.shape for parameter in block.parameters()} | {(batch, width)}
    tensors = {node: node.meta["val"] for node in saved}
    tensors = {node: tensor for node, tensor in tensors.items() if tensor.dtype != torch.uint8 and tensor.dim()}
    kept = [tensor for node, tensor in tensors.items() if node.op != "placeholder" or tensor.shape not in others]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}.values())


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize(("checkpointing", "above"), [("none", 0.05), ("attention", 0.08), ("block", 0.05)])
def test_activations_are_what_the_compiled_blocks_for_cuda_save_or_little_more(checkpointing, above, qk_norm):
    """With the one block whose activations the backward pass has just computed again.

    "attention": the compiler also computes its last projection again, which the estimate keeps.
    """
    model, batch = resolve_model(Model("SiT-XL/2", qk_norm=qk_norm)), 256
    block, whole = (traced_bytes(model, what, batch) for what in (checkpointing, "none"))
    ends = 2 * batch * model.tokens * model.width * 2  # the embedded tokens and what the first block reads
    saved = model.depth * block + (whole - block) + ends
    estimate = batch * cost.activation_bytes(model, bf16=True, checkpointing=checkpointing)
    assert saved <= estimate <= (1 + above) * saved
    if (checkpointing, qk_norm) == ("none", True):
        assert model.depth * block == pytest.approx(79.42 * 2**30, rel=1e-4)  # attention's output once, v in qkv


def test_a_micro_batchs_estimate_has_heads_rows_and_a_teacher_that_runs_beside():
    recipe = load(workload.ROOT / "recipes" / "sit_xl.toml")
    plain = replace(recipe, stages=(Stage("plain", Plain(), 1),))
    _, trunk = cost.memory_bytes(plain, ranks=1, bf16=True)
    _, before = cost.memory_bytes(recipe, ranks=1, bf16=True)
    beside = replace(recipe, run=replace(recipe.run, teacher_placement="beside"))
    assert 1.003 * trunk < before < 1.02 * trunk
    assert 1.005 * before < cost.memory_bytes(beside, ranks=1, bf16=True)[1] < 1.03 * before


@pytest.mark.parametrize("images", [1, 6, 64, 200])
def test_no_step_of_many_has_more_supervised_rows_than_the_estimate_counts(images):
    recipe = load(workload.ROOT / "recipes" / "sit_b.toml")
    method = recipe.stages[0].method
    most = cost.supervised_rows(recipe, method, images)
    drawn = np.random.default_rng(0).random((100_000, images))
    counts = ((drawn >= method.t_range[0]) & (drawn <= method.t_range[1])).sum(axis=1)
    assert counts.max() <= most <= images
    assert most <= 0.3 * images + 6 * (0.21 * images) ** 0.5 + 1
