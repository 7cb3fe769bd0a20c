"""Backends: the right ones are right, the wrong ones are caught before they train anything."""

import pytest
import torch
import torch.nn.functional as F

from st_fast.errors import UserError
from st_fast.model import attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["sdpa", "flash", "math"])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_cpu_backends_agree_with_softmax_written_out(name, head_dim):
    q, k, v = torch.randn(3, 2, 3, 50, head_dim).unbind(0)
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
        ("flash", 12, ("multiples of 8", "12")),
        ("flash_attn", 64, ("cuda only",)),
    ],
)
def test_a_backend_that_cannot_serve_is_refused_with_those_that_can(name, head_dim, words):
    with pytest.raises(UserError) as refusal:
        attention.choose(name, CPU, torch.float32, head_dim, print)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_auto_passes_over_a_wrong_backend_and_says_so(monkeypatch):
    broken = attention.Backend("broken", wrong_query_gradient, ("cpu",), 512, 1, lambda: None)
    monkeypatch.setitem(attention.BACKENDS, "broken", broken)
    monkeypatch.setitem(attention.AUTO_ORDER, "cpu", ("broken", "sdpa"))
    said = []
    assert attention.choose("auto", CPU, torch.float32, 64, said.append) is attention.BACKENDS["sdpa"].attend
    assert len(said) == 1 and "broken left out: dq" in said[0]
