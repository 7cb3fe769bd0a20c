"""The plain loop computes what st_fast computes: the same losses, gradients and update from the same draws."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from bench import step, workload
from bench.published import Draws, plain_loop
from bench.workload import IN_RANGE, STAGES, Setup, ours

CPU = torch.device("cpu")


SIZES = ("S/2", "MMDiT-4/2")


def setup(stage: str, batch: int = 8, size: str = "S/2") -> Setup:
    depth = 2 if size == "S/2" else 0  # the text's stream goes on after the block that is supervised
    return Setup(size, stage, batch, CPU, tokens=16, depth=depth, compile="off")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_losses_gradients_and_update_are_ours(stage, size, monkeypatch):
    shipped = workload.make_recipe

    def bold(setup, folder):  # so that one step shows in the average
        recipe = shipped(setup, folder)
        return replace(recipe, optim=replace(recipe.optim, lr=1e-2, ema_decay=0.5, warmup_steps=0))

    monkeypatch.setattr(workload, "make_recipe", bold)
    with ours(setup(stage, size=size)) as loop:
        plain = plain_loop(loop)
        (batch,) = next(loop.iterator.steps(0, 1))
        draws = Draws(batch.x, batch.velocity + batch.x, batch.t, batch.condition, batch.student_condition)

        mine, theirs = (
            loop.trainer.step.losses(batch, loop.trainer.step.targets.start(0, batch)),
            plain.losses(draws),
        )
        torch.testing.assert_close(theirs[0], mine.denoise, rtol=1e-5, atol=0)
        torch.testing.assert_close(theirs[1], mine.aux, rtol=1e-4, atol=0)
        assert (mine.aux.item() > 0) == (stage != "plain")

        (mine.denoise + mine.aux).backward()
        sum(theirs).backward()
        gradients = {name: p.grad for name, p in plain.model.named_parameters()}
        trained = {name: p for name, p in loop.trainer.model.named_parameters() if p.requires_grad}
        largest = max(float(p.grad.abs().max()) for p in trained.values())
        for name, parameter in trained.items():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6 * largest, msg=name)
        plain.optimizer.zero_grad(set_to_none=True)
        for module in (loop.trainer.model, loop.trainer.method.heads):
            module.zero_grad(set_to_none=True)

        loop.trainer.step(0, [batch])
        logged = plain.step_from(draws)
        assert logged["loss"] == pytest.approx(mine.denoise.item(), rel=1e-5)
        lr, updated = loop.recipe.optim.lr, dict(plain.model.named_parameters())
        averaged, emas = dict(plain.ema.named_parameters()), loop.trainer.optimizer.state()["ema"]
        for name, parameter in trained.items():
            if name.endswith("k_norm.bias"):  # softmax takes out what all keys share: its gradient is rounding alone
                continue
            # The first step of Adam is the gradient's sign: one that is zero but for rounding may go either way.
            for theirs_now, ours_now in ((updated[name], parameter), (averaged[name], emas[name])):
                off = ((theirs_now - ours_now).abs() > 0.1 * lr).float().mean()
                assert off < 0.02, f"{name}: {off:.1%} differs"


def test_the_plain_teacher_runs_on_all_samples_and_ours_on_those_in_range():
    with ours(setup("stage 2")) as loop:
        plain = plain_loop(loop)
        seen = {"plain": 0, "ours": 0}
        plain.teacher.blocks[0].register_forward_pre_hook(lambda m, a: seen.update(plain=len(a[0])))
        loop.trainer.method.teacher.blocks[0].register_forward_pre_hook(lambda m, a: seen.update(ours=len(a[0])))
        plain.step(torch.rand(8, 8, 8, 8), torch.arange(8))
        loop()
        assert seen["plain"] == 16
        assert 2 <= seen["ours"] == 2 * loop.supervised <= 6


@pytest.mark.parametrize(("size", "stage"), [*product(SIZES, STAGES), (SIZES[1], IN_RANGE)])
def test_the_floors_products_and_attention_are_all_of_the_methods_flops(stage, size):
    with ours(setup(stage, 10, size)) as loop:
        recipe, chosen = loop.recipe, loop.stage
        supervised = 3 if size == "S/2" or stage == IN_RANGE else 10  # 0.3 of 10, or all: what the formula expects
        products = step.products(recipe, chosen, supervised)
        n, width = recipe.model.length, recipe.model.width
        attention = sum(
            count * case.batch * 4 * n * n * width * (3 if case.trained else 1)
            for case, count in step.attended(recipe, chosen, supervised).items()
        )
        counted = attention + sum(count * product.flops for product, count in products.items())
        assert counted == pytest.approx(loop.flops, rel=1e-6)
