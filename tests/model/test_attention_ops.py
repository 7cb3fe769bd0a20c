"""Attention ops called by name: those of scaled_dot_product_attention, traceable, and cacheable once compiled."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from st_fast.model.attention import BACKENDS

KINDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
HEAD_SIZES = (8, 64, 72, 128)
CASES = [("flash", "cpu"), *((name, "cuda") for name in KINDS)]


def by_sdpa(kind):
    """Attention by scaled_dot_product_attention itself, allowed this kernel only."""

    def attend(q, k, v):
        with sdpa_kernel([kind]):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


class Called(Exception):
    """The first op that was called on q, and its other arguments with the defaults filled in."""


class StopAtFirstOp(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        arguments = [given.default_value for given in op._schema.arguments]
        arguments[: len(args)] = args
        named = {given.name: value for given, value in zip(op._schema.arguments, arguments, strict=True)} | kwargs
        if named["scale"] is None:
            named["scale"] = 1 / math.sqrt(named["query"].shape[-1])
        raise Called(op, {name: id(x) if isinstance(x, torch.Tensor) else x for name, x in named.items()})


def first_op(attend, q, k, v):
    with pytest.raises(Called) as called, StopAtFirstOp():
        attend(q, k, v)
    return called.value.args


@pytest.mark.parametrize(("name", "device"), CASES)
@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize("gradient", [False, True])
def test_the_op_and_its_arguments_are_those_of_scaled_dot_product_attention(name, device, head_dim, gradient):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, whose properties decide what scaled_dot_product_attention calls")
    q, k, v = torch.randn(3, 2, 3, 50, head_dim, device=device, dtype=torch.bfloat16).requires_grad_(gradient).unbind(0)
    backend = BACKENDS[name]
    refusal = backend.refusal(q.device, head_dim)
    if refusal is not None:
        pytest.skip(refusal)
    assert first_op(backend.attend, q, k, v) == first_op(by_sdpa(KINDS[name]), q, k, v)


@pytest.mark.parametrize("head_dim", HEAD_SIZES)
def test_flash_on_the_cpu_gives_the_same_bits(head_dim):
    dout = torch.randn(2, 50, 3, head_dim).transpose(1, 2)
    qkv = torch.randn(3, 2, 3, 50, head_dim, requires_grad=True)
    found = [attend(*qkv.unbind(0)) for attend in (BACKENDS["flash"].attend, by_sdpa(KINDS["flash"]))]
    assert torch.equal(*found)
    assert torch.equal(*(torch.autograd.grad(out, qkv, dout)[0] for out in found))


def graph_of(attend, q, k, v):
    """What a block's compiled graph holds of this attention, without a break."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(attend, backend=keep, fullgraph=True)(q, k, v)
    (graph,) = graphs
    return [node.target for node in graph.graph.nodes if node.op not in ("placeholder", "output")]


@pytest.mark.parametrize(("name", "device"), CASES)
def test_a_compiled_graph_holds_the_op_alone_so_that_autograds_cache_takes_it(name, device):
    with FakeTensorMode():
        q, k, v = torch.empty(3, 2, 3, 50, 72, device=device, dtype=torch.bfloat16).unbind(0)
        ops = [op for op in graph_of(BACKENDS[name].attend, q, k, v) if "getitem" not in str(op)]
    assert len(ops) == 1 and isinstance(ops[0], torch._ops.OpOverload | torch._ops.OpOverloadPacket), ops
    assert {"cpu": "for_cpu", "cuda": name}[device] in str(ops[0])


def test_a_kernel_chosen_by_a_setting_is_what_that_cache_refuses():
    """The reason for calling ops by name; once this fails, torch caches such graphs and the ops may go."""
    q, k, v = torch.randn(3, 2, 3, 50, 72).unbind(0)
    assert any("_sdpa_kernel" in str(op) for op in graph_of(by_sdpa(KINDS["flash"]), q, k, v))


@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_traced_in_the_shapes_of_the_inputs(name, compiled):
    attend = BACKENDS[name].attend
    if compiled:
        torch._dynamo.reset()
        attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
    qkv = torch.empty(2, 50, 3, 3, 72, device="meta", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = attend(q, k, v)
    assert out.shape == q.shape and out.dtype == q.dtype
    dout = torch.empty(2, 50, 3, 72, device="meta", dtype=torch.bfloat16).transpose(1, 2)
    assert torch.autograd.grad(out, qkv, dout)[0].shape == qkv.shape


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16, torch.bfloat16, torch.float32)])
def test_cudnn_refuses_dtypes_that_its_op_would_misread(dtypes):
    q, k, v = (torch.empty(2, 3, 50, 64, device="meta", dtype=dtype) for dtype in dtypes)
    with pytest.raises(TypeError, match="cudnn attention takes bfloat16 or float16, one for all, not torch"):
        BACKENDS["cudnn"].attend(q, k, v)
