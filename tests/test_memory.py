"""The estimate of a stage's memory, against the tensors that its trainer really holds."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import workload
from bench.workload import Setup, ours
from st_fast import flops


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address → bytes of the memory behind tensors, each once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def living() -> dict[int, int]:
    gc.collect()
    found = [found for found in gc.get_objects() if type(found) in (Tensor, torch.nn.Parameter)]
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
        (batch,) = next(loop.feed.steps(0, 1))
        lesson = step.targets.lesson(0, batch)
        noised, losses = lesson.noised, step.losses(lesson.noised, lesson.target)
        (losses.denoise + losses.aux).backward()
        others = storages(t for t in (*vars(batch).values(), *vars(noised).values()) if isinstance(t, Tensor))
        others |= storages((loop.feed.loader._moments, loop.feed.loader._labels))
        now = living() | storages(p.grad for p in loop.trainer.optimizer.parameters() if p.grad is not None)
        held = sum(size for place, size in now.items() if place not in before and place not in others)
        recipe = replace(loop.recipe, stages=(loop.stage,))
        estimate, _ = flops.memory_bytes(recipe, ranks=1, bf16=precision == "bf16")
    assert held == pytest.approx(estimate, rel=0.02)
    assert flops.head_parameters(recipe.model, loop.stage.method) == sum(
        p.numel() for p in loop.trainer.method.heads.parameters()
    )


def test_activations_of_an_image_are_the_estimate_but_for_the_heads():
    with ours(Setup("S/2", "stage 2", 4, torch.device("cpu"), tokens=64, depth=6, compile="off")) as loop:
        model, step = loop.trainer.model, loop.trainer.step
        (batch,) = next(loop.feed.steps(0, 1))
        lesson, kept = step.targets.lesson(0, batch), dict[int, int]()
        weights = storages((*model.parameters(), *loop.trainer.method.heads.parameters()))

        def keep(tensor: Tensor) -> Tensor:
            kept.update(storages([tensor]))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = step.losses(lesson.noised, lesson.target)
        an_image = sum(size for place, size in kept.items() if place not in weights) / 4
        assert losses.denoise.isfinite()
        estimate = flops.activation_bytes(loop.recipe.model, bf16=False)
    assert estimate <= an_image <= 1.1 * estimate
