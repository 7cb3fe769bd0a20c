"""Backends: the right ones are right, the wrong ones are caught before they train anything."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from st_fast import kernels
from st_fast.core.errors import UserError
from st_fast.model import attention
from st_fast.model.sit import Attention
from st_fast.recipe.architecture import Model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "head_dim", "tokens"),
    [(name, head_dim, 50) for name in ("sdpa", "flash", "math") for head_dim in (64, 72)]
    + [("csrc", 64, 50), ("csrc", 64, 160), ("csrc", 32, 64)],
)
def test_cpu_backends_agree_with_softmax_written_out(name, head_dim, tokens):
    q, k, v = torch.randn(3, 2, 3, tokens, head_dim).unbind(0)
    expected = torch.softmax(q @ k.transpose(-1, -2) / head_dim**0.5, -1) @ v
    attend = attention.choose(name, CPU, torch.float32, head_dim, print)
    torch.testing.assert_close(attend(q, k, v), expected, atol=1e-5, rtol=1e-4)


def wrong_query_gradient(q, k, v):
    out = F.scaled_dot_product_attention(q, k, v)
    return out + (q - q.detach()).sum(-1, keepdim=True) * 0.05  # the output is right, dq is not


def test_a_backend_whose_gradient_is_wrong_is_refused_by_name():
    problem = attention.verify(wrong_query_gradient, CPU, torch.float32, 64)
    assert problem is not None and problem.startswith("dq is off by")
    assert attention.verify(F.scaled_dot_product_attention, CPU, torch.float32, 64) is None


@pytest.mark.parametrize(
    ("name", "head_dim", "words"),
    [
        ("fastest", 64, ("'fastest'", "auto", "cudnn")),
        ("cudnn", 64, ("cuda only", "available here: sdpa")),
        ("flash", 12, ("multiples of 8", "12", "available here: sdpa, math")),
        ("flash_attn", 64, ("cuda only",)),
    ],
)
def test_a_backend_that_cannot_serve_is_refused_with_those_that_can(name, head_dim, words):
    with pytest.raises(UserError) as refusal:
        attention.choose(name, CPU, torch.float32, head_dim, print)
    assert all(word in str(refusal.value) for word in words), refusal.value


def crashing(q, k, v):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand a long story")


def right_only_where_heads_are_contiguous(q, k, v):
    return F.scaled_dot_product_attention(q, k, v) * (1.0 if q.is_contiguous() else 0.5)


@pytest.mark.parametrize(
    ("attend", "words"),
    [
        (wrong_query_gradient, "dq is off by"),
        (crashing, "fails with RuntimeError: CUDA error: an illegal memory access was encountered"),
        (right_only_where_heads_are_contiguous, "output is off by"),
    ],
)
def test_a_backend_that_is_named_and_is_wrong_or_crashes_is_refused_by_name(attend, words, monkeypatch):
    backend = attention.Backend("broken", attend, ("cpu",))
    monkeypatch.setitem(attention.BACKENDS, "broken", backend)
    with pytest.raises(UserError) as refusal:
        attention.choose("broken", CPU, torch.float32, 64, print)
    text = str(refusal.value)
    assert text.startswith(f"model.attention = 'broken': {words}") and "\n" not in text
    assert text.endswith("available here: sdpa, csrc, flash, math")


def test_a_backend_that_is_wrong_at_the_models_number_of_tokens_only_is_refused(monkeypatch):
    def wrong_beyond_256(q, k, v):
        return F.scaled_dot_product_attention(q, k, v) * (1.0 if q.shape[2] <= 256 else 0.5)

    assert attention.verify(wrong_beyond_256, CPU, torch.float32, 64) is None
    assert "output is off" in attention.verify(wrong_beyond_256, CPU, torch.float32, 64, tokens=300)


def wrong_gradients_where(condition):
    """Attention whose gradients are wrong where condition(q, k, v, gradient of the output) says so, and only there."""

    def attend(q, k, v):
        out = F.scaled_dot_product_attention(q, k, v)
        if out.requires_grad:
            out.register_hook(lambda dout: dout * 1.5 if condition(q, k, v, dout) else dout)
        return out

    return attend


@pytest.mark.parametrize(
    ("condition", "layout"),
    [
        (lambda q, k, v, dout: v.is_contiguous() and not dout.is_contiguous(), "contiguous"),
        (lambda q, k, v, dout: q.stride(2) == q.shape[1] * q.shape[3], "in the order (B, N, H, d), v a view"),
        (lambda q, k, v, dout: q.stride(2) == 3 * q.shape[1] * q.shape[3], "views of the packed projection"),
    ],
)
def test_gradients_that_are_wrong_in_one_layout_of_training_only_are_caught(condition, layout):
    problem = attention.verify(wrong_gradients_where(condition), CPU, torch.float32, 64)
    assert problem.startswith("dq is off by") and f"where q, k, v are {layout}" in problem


def seen_by(attend_with):
    """The strides of q, k, v and of the gradient in every call of the attention that `attend_with` is given."""
    seen = set()

    def record(q, k, v, dout):
        seen.add((q.stride(), k.stride(), v.stride(), dout.stride()))
        return False

    attend_with(wrong_gradients_where(record))
    return seen


def test_the_layouts_checked_are_those_of_training():
    tokens, heads, head_dim = 20, 3, 64

    def train(attend):
        table = {choice: kernels.select({"qk_norm": choice}, CPU) for choice in ("fused", "heads", "reference")}
        for qk_norm, choice in ((True, "fused"), (True, "heads"), (True, "reference"), (False, "fused")):
            config = Model(width=heads * head_dim, heads=heads, qk_norm=qk_norm)
            layer = Attention(config, table[choice], attend, first=True)
            layer(torch.randn(2, tokens, heads * head_dim)).square().sum().backward()
        for qk_norm in (True, False):
            config = Model(width=heads * head_dim, heads=heads, qk_norm=qk_norm, value_residual=True)
            layer = Attention(config, table["fused"], attend, first=False)
            v1 = torch.randn(2, tokens, 3, heads, head_dim)[:, :, 2]
            layer(torch.randn(2, tokens, heads * head_dim), v1=v1).square().sum().backward()

    trained = seen_by(train)
    assert len(trained) == 5
    assert seen_by(lambda attend: attention.verify(attend, CPU, torch.float32, head_dim, tokens)) == trained


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "head_dim", "words"),
    [
        ("flash_attn", 264, "takes head sizes from 8 to 256 in multiples of 8, not 264"),
        ("flash_attn_4", 56, "takes head sizes from 64 to 128 in multiples of 8, not 56"),
        ("flash_attn_4", 136, "takes head sizes from 64 to 128 in multiples of 8, not 136"),
        ("cudnn", 264, "takes head sizes from 8 to 256 in multiples of 8, not 264"),
    ],
)
def test_head_sizes_are_refused_without_asking_the_device(name, head_dim, words):
    assert attention.BACKENDS[name].refusal(CUDA, head_dim) == words


class FakeFmha(types.ModuleType):
    """xformers.ops.fmha as far as it is asked: `able` names the passes that it has kernels for."""

    def __init__(self, able: set[str]) -> None:
        super().__init__("xformers.ops.fmha")
        self.able, self.Inputs = able, dict

    def _dispatch(self, name: str) -> str:
        if name not in self.able:
            raise NotImplementedError(f"No operator found for {name}\nand why")
        return name

    def _dispatch_fw(self, inputs, needs_gradient):
        return self._dispatch("forward")

    def _dispatch_bw(self, inputs, varlen_lse_packed):
        return self._dispatch("backward")


@pytest.mark.parametrize(("able", "serves"), [({"forward", "backward"}, True), ({"forward"}, False), (set(), False)])
def test_xformers_is_asked_for_its_kernels_and_not_only_imported(able, serves, monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", types.ModuleType("xformers.ops"))
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", FakeFmha(able))
    missing = attention.BACKENDS["xformers"].missing(CPU, 72)
    assert missing is None if serves else "has no kernel for head size 72" in missing


def test_the_order_of_auto_is_pinned_and_holds_backends_of_that_device():
    assert attention.AUTO_ORDER == {"cuda": ("cudnn", "flash", "efficient", "math"), "cpu": ("csrc", "sdpa")}
    for device, names in attention.AUTO_ORDER.items():
        assert all(device in attention.BACKENDS[name].devices for name in names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: every backend's gradients are checked there")
@pytest.mark.parametrize("name", sorted(attention.BACKENDS))
@pytest.mark.parametrize("head_dim", [64, 72])
def test_every_backend_of_a_gpu_is_right_or_says_what_it_lacks(name, head_dim):
    backend = attention.BACKENDS[name]
    refusal = backend.refusal(CUDA, head_dim)
    if refusal is not None:
        pytest.skip(f"{name}: {refusal}")
    assert attention.verify(backend.attend, CUDA, torch.bfloat16, head_dim) is None


def test_auto_passes_over_a_wrong_backend_and_says_so(monkeypatch):
    broken = attention.Backend("broken", wrong_query_gradient, ("cpu",))
    monkeypatch.setitem(attention.BACKENDS, "broken", broken)
    monkeypatch.setitem(attention.AUTO_ORDER, "cpu", ("broken", "sdpa"))
    said = []
    assert attention.choose("auto", CPU, torch.float32, 64, said.append) is attention.BACKENDS["sdpa"].attend
    assert len(said) == 1 and "broken left out: dq" in said[0]
