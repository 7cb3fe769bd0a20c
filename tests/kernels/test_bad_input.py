"""Wrong arguments: one line that names the op, the argument, what came and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from st_fast import kernels

B, N, D = 2, 3, 8


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


X, V, W, RUNS = ones(B, N, D), ones(B, D), ones(B), ones(B, 2, D)
HALF, DOUBLE, INT = torch.bfloat16, torch.float64, torch.int32
GRAD: dict[str, Any] = {"requires_grad": True}
META: dict[str, Any] = {"device": "meta"}
QKV, E = ones(B, N, 3, 2, 4), ones(4)

Wrong = list[tuple[str, tuple[Any, ...], str]]

MODULATION: Wrong = [
    ("norm_modulate", (ones(N, D), V, V), r"x has shape \(3, 8\); \(B, N, D\) is needed"),
    ("norm_modulate", (ones(B, 0, D), V, V), r"x has shape \(2, 0, 8\)"),
    ("norm_modulate", (X, ones(B, 4), V), r"shift has shape \(2, 4\); x's \(B, D\) = \(2, 8\) is needed"),
    ("norm_modulate", (X, V, ones(1, D)), r"scale has shape \(1, 8\)"),
    ("norm_modulate", (X.to(INT), V, V), "x has dtype torch.int32; allowed are torch.float32"),
    ("norm_modulate", (X, V, V.to(HALF)), "scale has dtype torch.bfloat16; shift's, torch.float32, is needed"),
    ("norm_modulate", (X, V.to(DOUBLE), V.to(DOUBLE)), "shift has dtype torch.float64, but x torch.float32"),
    ("norm_modulate", (X, ones(B, D, **META), V), "shift is on meta; it must be on x's device, cpu"),
    ("norm_modulate", (X, 0.5, V), "shift is a float; a tensor is needed"),
    ("norm_modulate", (X, V, V, 0.0), "eps = 0.0; a finite number > 0"),
    ("norm_modulate", (X, V, V, float("nan")), "eps = nan"),
    ("norm_modulate", (X, V, V, 1e-6, None, "l2"), "norm = 'l2'; one of layer, rms is needed"),
    ("gate_residual_norm_modulate", (X, X, V, V, V, 1e-6, None, None, "batch"), "norm = 'batch'; one of layer, rms"),
    ("gate_residual", (X, ones(B, 4, D), V), r"a has shape \(2, 4, 8\); x's \(B, N, D\) = \(2, 3, 8\)"),
    ("gate_residual", (X, X, ones(B)), r"gate has shape \(2,\)"),
    ("gate_residual_norm_modulate", (X, X, V, V, ones(B, D + 1)), r"scale has shape \(2, 9\)"),
    ("gate_residual_norm_modulate", (X, X, V, V, V, float("inf")), "eps = inf"),
    ("gate_residual_norm_modulate", (X, X, V, V, V, 1e-6, ones(N)), r"a_bias has shape \(3,\); a's \(D,\) = \(8,\)"),
    ("gate_residual_norm_modulate", (X, X, V, V, V, 1e-6, ones(D).to(DOUBLE)), "a_bias has dtype torch.float64, but a"),
    ("norm_modulate", (X, RUNS, RUNS, 1e-6, (1, 1)), "lengths sum to 2; x's N = 3 is needed"),
    ("norm_modulate", (X, RUNS, RUNS, 1e-6, (3, 0)), r"lengths\[1\] = 0; an integer ≥ 1 is needed"),
    ("norm_modulate", (X, RUNS, RUNS, 1e-6, (-1, 4)), r"lengths\[0\] = -1; an integer ≥ 1"),
    ("norm_modulate", (X, RUNS, RUNS, 1e-6, (1.5, 1.5)), r"lengths\[0\] = 1.5; an integer ≥ 1"),
    ("norm_modulate", (X, RUNS, RUNS, 1e-6, torch.tensor([1, 2])), "lengths is a Tensor; a tuple or list of integers"),
    ("norm_modulate", (X, RUNS, RUNS, 1e-6, ()), "lengths sum to 0; x's N = 3"),
    ("norm_modulate", (X, RUNS, RUNS, 1e-6, (1, 1, 1)), r"shift has shape \(2, 2, 8\); .* \(B, G, D\) = \(2, 3, 8\)"),
    ("norm_modulate", (X, V, V, 1e-6, (1, 2)), r"shift has shape \(2, 8\); .* \(B, G, D\) = \(2, 2, 8\) is needed"),
    ("norm_modulate", (X, RUNS, RUNS), r"shift has shape \(2, 2, 8\); without lengths x's \(B, N, D\) = \(2, 3, 8\)"),
    ("norm_modulate", (X, X, V), r"scale has shape \(2, 8\); without lengths x's \(B, N, D\) = \(2, 3, 8\) is needed"),
    ("norm_modulate", (X, V, X), r"scale has shape \(2, 3, 8\); x's \(B, D\) = \(2, 8\) is needed"),
    ("gate_residual", (X, X, RUNS, (2, 2)), "lengths sum to 4; x's N = 3 is needed"),
    ("gate_residual", (X, X, ones(B, 4, D)), r"gate has shape \(2, 4, 8\); without lengths x's \(B, N, D\)"),
    ("gate_residual_norm_modulate", (X, X, RUNS, RUNS, X, 1e-6, None, [1, 2]), r"scale has shape \(2, 3, 8\)"),
    ("gelu_tanh", (X, V), r"x_bias has shape \(2, 8\); x's \(D,\) = \(8,\) is needed"),
    ("gelu_tanh", (X, ones(D).to(INT)), "x_bias has dtype torch.int32; allowed are torch.float32"),
    ("gelu_tanh", (X, 0.5), "x_bias is a float; a tensor is needed"),
    ("gelu_tanh", (X, ones(D, **META)), "x_bias is on meta; it must be on x's device, cpu"),
    ("swiglu", (X[..., :7],), r"h has shape \(2, 3, 7\); \(…, 2F\) with F ≥ 1 is needed"),
    ("swiglu", (X[..., :0],), r"h has shape \(2, 3, 0\); \(…, 2F\) with F ≥ 1 is needed"),
    ("swiglu", (X[0, 0, 0],), r"h has shape \(\); \(…, 2F\)"),
    ("swiglu", (X.to(INT),), "h has dtype torch.int32; allowed are torch.float32"),
    ("swiglu", (X, ones(D // 2)), r"h_bias has shape \(4,\); h's \(D,\) = \(8,\) is needed"),
    ("swiglu", (X, ones(D).to(DOUBLE)), "h_bias has dtype torch.float64, but h torch.float32"),
]
LOSSES: Wrong = [
    ("align", (X, ones(B, N, 4), W), r"f has shape \(2, 3, 4\)"),
    ("align", (X, ones(1, N, D), ones(1)), r"f has shape \(1, 3, 8\); q's \(B, N, D\) = \(2, 3, 8\)"),
    ("align", (X, X, ones(B, 1)), r"weight has shape \(2, 1\); f's \(M,\) = \(2,\)"),
    ("align", (X, ones(B, N, D, **GRAD), W), r"f requires grad.*pass f.detach\(\)"),
    ("align", (X, X, ones(B, **GRAD)), "weight requires grad"),
    ("guided_feature_loss", (X, X, ones(1, N, D), W, 1.0), r"f_null has shape \(1, 3, 8\)"),
    ("guided_feature_loss", (X, X[:1], X[:1], W[:1], 1.0), r"f_cond has shape \(1, 3, 8\).*no index"),
    ("guided_feature_loss", (X, X, X, W, float("nan")), "cfg_scale = nan; a finite number"),
    ("guided_feature_loss", (X, X, X, W, 1.0, "l1"), "loss = 'l1'; one of mse, cosine, normalized_mse"),
    ("guided_feature_loss", (X, X, X, W, 1.0, "mse", torch.tensor([0, 1]).int()), "index has dtype torch.int32"),
    ("guided_feature_loss", (X, X, X, W, 1.0, "mse", torch.tensor([0])), r"index has shape \(1,\); f_cond's \(M,\)"),
    ("guided_feature_loss", (X[:1], X, X, W, 1.0, "mse", torch.tensor([0, 0])), "index names 2 samples; q has 1"),
    ("guided_feature_loss", (X, X, ones(B, N, D, **GRAD), W, 1.0), "f_null requires grad"),
    ("cfg_extrapolate", (X, V, 1.0), r"f_null has shape \(2, 8\)"),
    ("cfg_extrapolate", (X, X, float("inf")), "cfg_scale = inf"),
]
FREE = (1e-6, None, "tokens", "layer")
RMS_BIAS, NO_NORM = (E, E, E, None, *FREE[:3], "rms"), (None, None, None, None, *FREE[:3], "none")
QK: Wrong = [
    ("qk_norm", (ones(B, N, 2, 2, 4), E, E, E, E), r"qkv has shape \(2, 3, 2, 2, 4\); \(B, N, 3, H, d\)"),
    ("qk_norm", (QKV[0], E, E, E, E), r"qkv has shape \(3, 3, 2, 4\)"),
    ("qk_norm", (QKV, E, ones(8), E, E), r"q_bias has shape \(8,\); qkv's \(d,\) = \(4,\)"),
    ("qk_norm", (QKV, E, E, E.to(HALF), E), "k_weight has dtype torch.bfloat16; q_weight's"),
    ("qk_norm", (QKV, E, E, E, E, -1.0), "eps = -1.0"),
    ("qk_norm", (QKV, E, E, E, E, 1e-6, None, "tokens", "l2"), "norm = 'l2'; one of layer, rms, none is needed"),
    (
        "qk_norm",
        (QKV, E, None, E, E),
        "norm = 'layer' with q_weight, k_weight, k_bias; q_weight, q_bias, k_weight, k_b",
    ),
    ("qk_norm", (QKV, *RMS_BIAS), "norm = 'rms' with q_weight, q_bias, k_weight; q_weight, k_weight or none is needed"),
    ("qk_norm", (QKV, E, *NO_NORM[1:]), "norm = 'none' with q_weight; no vector is needed"),
    ("qk_norm", (QKV, E, E, E, E, *FREE, ones(B, N, 4).to(HALF)), "rope has dtype torch.bfloat16; torch.float32"),
    ("qk_norm", (QKV, *NO_NORM, ones(N, 4)), r"rope has shape \(3, 4\); \(1 or B, N, d\) = \(1 or 2, 3, 4\) is"),
    ("qk_norm", (QKV, *NO_NORM, ones(B, N, 2)), r"rope has shape \(2, 3, 2\)"),
    ("qk_norm", (QKV, *NO_NORM, ones(3, N, 4)), r"rope has shape \(3, 3, 4\)"),
    ("qk_norm", (QKV[..., :3], *NO_NORM, ones(B, N, 3)), "rope turns pairs of channels, but qkv's d = 3; an even d is"),
    ("qk_norm", (QKV, *NO_NORM, ones(B, N, 4, **GRAD)), r"rope requires grad.*pass rope.detach\(\)"),
    ("qk_norm", (QKV, *NO_NORM, ones(1, N, 4, **META)), "rope is on meta; it must be on qkv's device, cpu"),
    ("qk_norm", (QKV, *NO_NORM, 10_000.0), "rope is a float; a tensor is needed"),
    ("grad_norm", ([X, X.to(INT)],), r"grads\[1\] has dtype torch.int32"),
]
M, AT = ones(B, 6, 4, 4), torch.arange(B)
LATENTS: Wrong = [
    ("noisy_latents", (M[0], AT, W, 0, 1.0, "linear"), r"moments has shape \(6, 4, 4\); \(B, 2C, H, W\) is needed"),
    ("noisy_latents", (M[:, :5], AT, W, 0, 1.0, "linear"), r"moments has shape \(2, 5, 4, 4\); an even number"),
    ("noisy_latents", (M, AT.int(), W, 0, 1.0, "linear"), "ordinals has dtype torch.int32; torch.int64 is needed"),
    ("noisy_latents", (M, AT, W.double(), 0, 1.0, "linear"), "t has dtype torch.float64; torch.float32 is needed"),
    ("noisy_latents", (M, AT[:1], W, 0, 1.0, "linear"), r"ordinals has shape \(1,\); moments' \(B,\) = \(2,\)"),
    ("noisy_latents", (M, AT, ones(B, **META), 0, 1.0, "linear"), "t is on meta; it must be on moments' device, cpu"),
    ("noisy_latents", (M, AT, W, 0, float("nan"), "linear"), "scale = nan; a finite number"),
    ("noisy_latents", (M, AT, W, 0, 1.0, "curved"), "path = 'curved'; one of linear, cosine is needed"),
    ("noisy_latents", (ones(B, 6, 4, 4, **GRAD), AT, W, 0, 1.0, "linear"), "moments requires grad"),
]
MLP: Wrong = [
    (
        "gelu_mlp",
        (X, ones(16, 4), ones(16), ones(D, 16), ones(D)),
        r"x has shape \(2, 3, 8\); \(…, 4\), fc1_weight's D",
    ),
    ("gelu_mlp", (X, ones(16, D), ones(8), ones(D, 16), ones(D)), r"fc1_bias has shape \(8,\); fc1_weight's \(M,\)"),
    (
        "gelu_mlp",
        (X, ones(16, D), ones(16), ones(D, 8), ones(D)),
        r"fc2_weight has shape \(8, 8\); \(D', fc1_weight's M\)",
    ),
    ("gelu_mlp", (X, ones(16, D), ones(16), ones(4, 16), ones(D)), r"fc2_bias has shape \(8,\); fc2_weight's \(D',\)"),
    ("gelu_mlp", (X, ones(16, D), ones(16), ones(D, 16).to(HALF), ones(D)), "fc2_weight has dtype torch.bfloat16; x's"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), MODULATION + LOSSES + QK + MLP + LATENTS)
def test_a_wrong_argument_is_named(name: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: {message}") as caught:
        getattr(kernels, name)(*arguments)
    assert "\n" not in str(caught.value)


def step(**changed: Any) -> None:
    """A step on one parameter of four elements, with some arguments changed."""
    arguments: dict[str, Any] = {name: [ones(4)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas")}
    arguments |= {"copies": [], "step": torch.zeros(()), "grad_norm": torch.ones(()), "lr": torch.tensor(0.1)}
    constants = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "ema_decay": 0.9, "max_norm": 1.0}
    kernels.adamw_ema_(**(arguments | constants | changed))


def test_the_step_that_is_changed_below_is_taken_unchanged() -> None:
    count = torch.zeros(())
    step(step=count)
    assert count.item() == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"params": []}, "params is empty"),
        ({"grads": []}, "grads has 0 tensors; 1, one a parameter"),
        ({"emas": [ones(4), ones(4)]}, "emas has 2 tensors"),
        ({"exp_avgs": [ones(5)]}, r"exp_avgs\[0\] has shape \(5,\); the shape of params\[0\] = \(4,\)"),
        ({"params": [ones(4, dtype=torch.bfloat16)]}, r"params\[0\] has dtype torch.bfloat16; allowed: torch.float32"),
        ({"grads": [ones(4, dtype=torch.float16)]}, r"grads\[0\] has dtype torch.float16"),
        ({"copies": [ones(4)]}, r"copies\[0\] has dtype torch.float32; allowed: torch.bfloat16, torch.float16"),
        ({"exp_avg_sqs": [ones(8)[::2]]}, r"exp_avg_sqs\[0\] has strides \(2,\); it is written"),
        ({"emas": [ones(4, device="meta")]}, r"emas\[0\] is on meta"),
        ({"lr": torch.ones(1)}, r"lr has shape \(1,\)"),
        ({"step": torch.zeros((), dtype=torch.int32)}, "step has dtype torch.int32; allowed"),
        ({"grad_norm": torch.zeros((), dtype=torch.float64)}, "grad_norm has dtype torch.float64"),
    ],
)
def test_a_wrong_argument_of_the_optimiser_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^adamw_ema_: {message}"):
        step(**changed)
