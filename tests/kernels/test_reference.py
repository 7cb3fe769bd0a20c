"""The definitions themselves, against plain formulas and PyTorch's own optimiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from st_fast import kernels
from st_fast.kernels import reference


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_norm_modulate_is_layer_norm_times_one_plus_scale_plus_shift() -> None:
    torch.manual_seed(0)
    x, shift, scale = double(2, 3, 7), double(2, 7), double(2, 7)
    y = reference.norm_modulate(x, shift, scale, 1e-3)
    for b in range(2):
        for n in range(3):
            row = x[b, n]
            h = (row - row.mean()) / (row.var(correction=0) + 1e-3).sqrt()
            torch.testing.assert_close(y[b, n], h * (1 + scale[b]) + shift[b])


def test_with_rms_nothing_is_subtracted_before_the_division() -> None:
    torch.manual_seed(0)
    x, a, vectors = double(2, 3, 7) + 2, double(2, 3, 7), double(3, 2, 7)
    gate, shift, scale = vectors
    x_out, y = reference.gate_residual_norm_modulate(x, a, gate, shift, scale, 1e-3, norm="rms")
    for b in range(2):
        for n in range(3):
            row = x[b, n] + gate[b] * a[b, n]
            torch.testing.assert_close(x_out[b, n], row)
            h = row / ((row @ row) / 7 + 1e-3).sqrt()
            torch.testing.assert_close(y[b, n], h * (1 + scale[b]) + shift[b])


def test_swiglu_is_silu_of_the_first_half_times_the_second() -> None:
    torch.manual_seed(0)
    h = 3 * double(2, 3, 10)
    y = reference.swiglu(h)
    assert y.shape == (2, 3, 5)
    for f in range(5):
        gate, value = h[..., f], h[..., 5 + f]
        torch.testing.assert_close(y[..., f], gate / (1 + torch.exp(-gate)) * value)


@pytest.mark.parametrize("ops", [kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_without_an_eps_it_is_a_millionth(norm: str, ops: Any) -> None:
    torch.manual_seed(0)
    x, v = 1e-3 * torch.randn(2, 3, 7), torch.randn(2, 7)  # whose variance is about as large
    assert torch.equal(ops.norm_modulate(x, v, v, norm=norm), ops.norm_modulate(x, v, v, 1e-6, norm=norm))
    for one, other in zip(
        ops.gate_residual_norm_modulate(x, x, v, v, v, norm=norm),
        ops.gate_residual_norm_modulate(x, x, v, v, v, 1e-6, norm=norm),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_guidance_goes_from_the_null_features_past_the_conditional_ones() -> None:
    cond, null = double(4), double(4)
    torch.testing.assert_close(reference.cfg_extrapolate(cond, null, 0.0), null)
    torch.testing.assert_close(reference.cfg_extrapolate(cond, null, 1.0), cond)
    torch.testing.assert_close(reference.cfg_extrapolate(cond, null, 30.0), 30 * cond - 29 * null)


@pytest.mark.parametrize("loss", reference.FEATURE_LOSSES)
def test_losses_are_what_their_formulas_say(loss: str) -> None:
    torch.manual_seed(0)
    q, cond, null, weight = double(4, 3, 5), double(2, 3, 5), double(2, 3, 5), torch.tensor([0.5, 2.0])
    f = null + 3 * (cond - null)
    expected = torch.zeros((), dtype=torch.float64)
    for m, b in enumerate((3, 1)):
        if loss == "cosine":
            value = -torch.nn.functional.cosine_similarity(q[b], f[m], dim=-1).mean()
        else:
            target = f[m] / f[m].square().mean(-1, keepdim=True).sqrt() if loss == "normalized_mse" else f[m]
            value = torch.nn.functional.mse_loss(q[b], target)
        expected = expected + float(weight[m]) * value
    found = reference.guided_feature_loss(q, cond, null, weight, 3.0, loss, torch.tensor([3, 1]))
    torch.testing.assert_close(found, expected)


def test_qk_norm_is_layer_norm_of_each_head_in_attention_order() -> None:
    torch.manual_seed(0)
    qkv, (qw, qb, kw, kb) = double(2, 3, 3, 2, 5), (double(5) for _ in range(4))
    q, k, v = reference.qk_norm(qkv, qw, qb, kw, kb, 1e-5)
    norm = torch.nn.functional.layer_norm
    torch.testing.assert_close(q[1, 0, 2], norm(qkv[1, 2, 0, 0], (5,), qw, qb, 1e-5))
    torch.testing.assert_close(k[0, 1, 1], norm(qkv[0, 1, 1, 1], (5,), kw, kb, 1e-5))
    assert torch.equal(v[1, 1, 0], qkv[1, 0, 2, 1])


def test_rms_norm_of_each_head_has_no_mean() -> None:
    torch.manual_seed(0)
    qkv, (qw, kw) = 3 + double(2, 3, 3, 2, 6), (double(6) for _ in range(2))
    for weights in ((qw, kw), (None, None)):
        made = reference.qk_norm(qkv, weights[0], None, weights[1], None, 0.1, norm="rms")
        for part, weight in enumerate(weights):
            x = qkv[1, 2, part, 1]
            expected = x / (x.square().mean() + 0.1).sqrt() * (1 if weight is None else weight)
            torch.testing.assert_close(made[part][1, 1, 2], expected)


@pytest.mark.parametrize("samples", [1, 2])
def test_rope_multiplies_each_pair_of_channels_of_q_and_k_as_a_complex_number_after_the_norm(samples: int) -> None:
    torch.manual_seed(0)
    qkv, vectors = double(2, 3, 3, 2, 6), [double(6) for _ in range(4)]
    rope = double(samples, 3, 6).float()
    plain = reference.qk_norm(qkv, *vectors, 1e-3)
    turned = reference.qk_norm(qkv, *vectors, 1e-3, rope=rope)
    factor = torch.complex(rope[..., :3].double(), rope[..., 3:].double()).unsqueeze(1)  # (1 or B, 1, N, d/2)
    for before, after in zip(plain[:2], turned[:2], strict=True):
        product = torch.view_as_complex(before.unflatten(-1, (3, 2)).contiguous()) * factor
        torch.testing.assert_close(after, torch.view_as_real(product).flatten(-2))
    assert torch.equal(turned[2], plain[2])


def test_scores_after_rope_depend_on_the_difference_of_positions_alone() -> None:
    torch.manual_seed(0)
    qkv, frequencies = double(1, 1, 3, 1, 8).expand(1, 9, 3, 1, 8), torch.tensor([1.0, 0.3, 0.1, 0.01])
    angles = torch.arange(9)[:, None] * frequencies
    rope = torch.cat((angles.cos(), angles.sin()), -1).unsqueeze(0)
    q, k, _ = reference.qk_norm(qkv, norm="none", rope=rope)
    scores = (q @ k.transpose(2, 3))[0, 0]  # of one and the same q and k, at nine positions
    for apart in range(-8, 9):
        line = scores.diagonal(apart)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-6, atol=1e-6)
    assert scores[0].std() > 0.1


def test_grad_norm_is_the_norm_of_everything_in_any_order_on_any_number_of_threads() -> None:
    torch.manual_seed(0)
    grads = [torch.randn(300, 301), torch.randn(7), torch.randn(64, 1000).bfloat16()]
    norm = reference.grad_norm(grads)
    assert norm.dtype == torch.float32 and norm.shape == ()
    together = torch.cat([g.double().flatten() for g in grads])
    torch.testing.assert_close(norm.double(), together.norm(), rtol=1e-7, atol=0)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(reference.grad_norm(grads[::-1]), norm)
    finally:
        torch.set_num_threads(before)
    assert reference.grad_norm([]).item() == 0
    assert reference.grad_norm([torch.tensor([1.0, torch.nan])]).isnan()


@pytest.mark.parametrize("max_norm", [0.5, 0.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_thousand_steps_match_torch_adamw_with_clipping_and_lerp(max_norm: float, weight_decay: float) -> None:
    torch.manual_seed(0)
    plain = [torch.nn.Parameter(torch.randn(5, 7)), torch.nn.Parameter(torch.randn(3))]
    optimiser = torch.optim.AdamW(plain, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay)
    emas = [p.detach().clone() for p in plain]
    ours = [p.detach().clone() for p in plain]
    m, v, our_emas = ([torch.zeros_like(p) for p in ours], [torch.zeros_like(p) for p in ours],
                      [p.clone() for p in ours])  # fmt: skip
    copies, step, lr = [p.bfloat16() for p in ours], torch.zeros((), dtype=torch.int64), torch.tensor(1e-3)
    for _ in range(1000):
        grads = [torch.randn_like(p) + p.detach() for p in plain]
        for p, g in zip(plain, grads, strict=True):
            p.grad = g.clone()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(plain, max_norm)
        optimiser.step()
        torch._foreach_lerp_(emas, [p.detach() for p in plain], 0.01)
        reference.adamw_ema_(ours, grads, m, v, our_emas, copies, step, reference.grad_norm(grads), lr,
                             0.9, 0.99, 1e-8, weight_decay, 0.99, max_norm)  # fmt: skip
    assert step.item() == 1000
    for one, other in zip(ours + our_emas, [*plain, *emas], strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=1e-6)
    assert all(torch.equal(copy, p.bfloat16()) for copy, p in zip(copies, ours, strict=True))


@pytest.mark.parametrize(("norm", "max_norm"), [(3.0, 0.5), (0.2, 0.5), (0.2, 0.0), (3e-6, 2e-6), (3.0, -1.0)])
def test_a_fifth_step_by_its_equations(norm: float, max_norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p, g, m, v, ema = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(5))
    v = v.square()
    lists: list[Any] = [[one.clone()] for one in (p, g, m, v, ema)] + [[]]
    step, lr = torch.tensor(4.0), torch.tensor(0.02)
    reference.adamw_ema_(*lists, step, torch.tensor(norm), lr, 0.8, 0.95, 1e-3, 0.1, 0.7, max_norm)
    g = g * (min(1.0, max_norm / (float(torch.tensor(norm)) + 1e-6)) if max_norm > 0 else 1.0)
    m, v, rate = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2, float(lr)
    p = p * (1 - rate * 0.1) - rate * (m / (1 - 0.8**5)) / ((v / (1 - 0.95**5)).sqrt() + 1e-3)
    for found, expected in zip(lists, (p, None, m, v, 0.7 * ema + 0.3 * p), strict=False):
        if expected is not None:
            torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-14)
    assert step == 5


@pytest.mark.parametrize(("done", "decay"), [(0, 1 / 10), (4, 5 / 14), (12, 13 / 22), (20, 0.7), (10**6, 0.7)])
def test_the_averages_decay_warms_up_with_the_updates_made(done: int, decay: float) -> None:
    p, ema = torch.tensor([0.3, -1.7], dtype=torch.float64), torch.tensor([2.5, 0.4], dtype=torch.float64)
    lists: list[Any] = [[one.clone()] for one in (p, p, p, p.square(), ema)] + [[]]
    scalars: tuple[Any, ...] = (torch.tensor(float(done)), torch.ones(()), torch.tensor(0.02), 0.8, 0.95, 1e-3, 0.1)
    reference.adamw_ema_(*lists, *scalars, 0.7, 0.0, True)
    torch.testing.assert_close(lists[4][0], decay * ema + (1 - decay) * lists[0][0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_norm_that_is_not_finite_changes_nothing(bad: float) -> None:
    lists: list[Any] = [[torch.ones(3)] for _ in range(5)] + [[torch.ones(3).bfloat16()]]
    step = torch.zeros(())
    scalars: tuple[Any, ...] = (step, torch.tensor(bad), torch.tensor(0.1), 0.9, 0.99, 1e-8, 0.1, 0.9, 1.0)
    reference.adamw_ema_(*lists, *scalars)
    assert step.item() == 0 and all(torch.equal(tensors[0].float(), torch.ones(3)) for tensors in lists)


def test_parameters_that_require_grad_are_stepped_in_place() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    lists: list[Any] = [[p], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], [], []]
    scalars: tuple[Any, ...] = (torch.zeros(()), torch.ones(()), torch.tensor(0.1), 0.9, 0.99, 1e-8, 0.0, 0.9, 0.0)
    reference.adamw_ema_(*lists, *scalars)
    assert p.requires_grad and p.is_leaf and torch.allclose(p, torch.full((3,), 0.9))
