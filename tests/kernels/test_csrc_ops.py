"""The compiled CPU ops against the reference: values, gradients, strides, poison, threads, forks and bad input."""

from __future__ import annotations

import os
import shutil
import signal
import time

import pytest
import torch
from csrc_cases import Case, assert_nothing_supervised_is_nothing, cases, error, evaluate

from st_fast import kernels
from st_fast.kernels import native, reference

CASES = cases()
SLACK = 2 * torch.finfo(torch.float32).eps  # two roundings of float32: what is below is not told apart

pytestmark = pytest.mark.skipif(
    not native.available() and not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no compiler here"
)


def case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_compiled_ops_serve_the_cpu() -> None:
    assert native.available()
    assert native.isa() in ("avx512", "avx2", "baseline")
    for op in ("norm_modulate", "guided_feature_loss", "qk_norm_backward", "gelu_tanh", "swiglu", "swiglu_backward",
               "grad_norm", "adamw_ema_"):  # fmt: skip
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"st_fast::{op}", "CPU"), op


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_are_as_exact_as_eager(case: Case, dtype: torch.dtype) -> None:
    truth = evaluate(case, reference, torch.float64)
    eager, ours = evaluate(case, reference, dtype), evaluate(case, kernels, dtype)
    assert ours.keys() == truth.keys() == eager.keys()
    for name in truth:
        assert ours[name].dtype == eager[name].dtype, name
        assert error(ours[name], truth[name]) <= 2 * error(eager[name], truth[name]) + SLACK, name


@pytest.mark.parametrize("strides", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if "33x" in c.name or c.name.startswith("attention")], ids=lambda case: case.name
)
def test_gradients_may_arrive_with_any_strides(case: Case, strides: str) -> None:
    """As exact as eager; the attention's to the bit what the same numbers give side by side.

    Of one number everywhere its gradients cancel down to rounding, which instruction sets do differently.
    """
    truth = evaluate(case, reference, torch.float64, strides)
    eager, ours = (evaluate(case, ops, torch.float32, strides) for ops in (reference, kernels))
    attention = case.name.startswith("attention")
    plainly, factor = evaluate(case, kernels, torch.float32, strides, copied=True), 2
    if attention and strides == "expanded":
        factor = 4
    for name in truth:
        assert torch.equal(ours[name], plainly[name]) or not attention, name
        assert error(ours[name], truth[name]) <= factor * error(eager[name], truth[name]) + SLACK, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_element_of_every_output_is_written(case: Case) -> None:
    sizes = {value.numel() for value in evaluate(case, kernels, torch.float32).values()}
    for size in sizes:
        blocks = [torch.full((size,), torch.nan) for _ in range(12)]
        del blocks
    for name, value in evaluate(case, kernels, torch.float32).items():
        assert not value.isnan().any(), name


def test_a_weight_cut_from_a_wider_one_is_about_as_fast() -> None:
    """oneDNN's own way with it took a thousand times as long."""
    x, wide, bias = torch.randn(300, 384), torch.randn(352, 385), torch.zeros(352)

    def seconds(weight: torch.Tensor) -> float:
        found = []
        for _ in range(3):
            began = time.process_time()
            kernels.linear(x, weight, bias)
            found.append(time.process_time() - began)
        return min(found)

    assert seconds(wide[:, 1:]) < 50 * seconds(wide[:, 1:].contiguous())


def test_freed_poison_comes_back_in_new_tensors() -> None:
    blocks = [torch.full((6600,), torch.nan) for _ in range(12)]
    del blocks
    assert torch.empty(6600).isnan().any()  # otherwise the test above proves nothing


OURS = [c for c in CASES if not c.name.startswith("linear")]  # there the BLAS splits a sum by its threads


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
def test_results_do_not_depend_on_the_number_of_threads(case: Case) -> None:
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(evaluate(case, kernels, torch.float32))
    finally:
        torch.set_num_threads(before)
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name
        assert torch.equal(found[0][name], found[2][name]), name


def test_large_tensors_do_not_depend_on_the_number_of_threads() -> None:
    """Big enough that torch really splits the work."""
    torch.manual_seed(0)
    x, mod = torch.randn(4, 256, 384), torch.randn(4, 6 * 384)
    grads = [x * 0.5, x * 2]
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaf = mod.clone().requires_grad_()
            gate, shift, scale = leaf.chunk(6, 1)[:3]
            torch.autograd.backward(kernels.gate_residual_norm_modulate(x, x.sin(), gate, shift, scale), grads)
            found.append(leaf.grad)
    finally:
        torch.set_num_threads(before)
    assert found[0] is not None and found[1] is not None and torch.equal(found[0], found[1])


def large_calls(batch: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """Inputs of the ops that write tensors of x's size: 256 KB a sample, past the caches from 4 samples on."""
    torch.manual_seed(0)
    x, a, dy, dx = (torch.randn(batch, 64, 1024) for _ in range(4))
    gate, shift, scale, mean = (torch.randn(batch, n) for n in (1024, 1024, 1024, 64))
    rstd, qkv = mean.exp(), torch.randn(batch, 64, 3, 16, 64)
    vectors = torch.randn(4, 64).unbind()
    heads = torch.randn(3, batch, 16, 64, 64).unbind()
    return {  # by op; what follows its name tells its calls apart
        "norm_modulate": (x, shift, scale, 1e-6),
        "norm_modulate_backward": (dy, x, scale, mean, rstd),
        "gate_residual_norm_modulate": (x, a, gate, shift, scale, 1e-6, None),
        "gate_residual_norm_modulate_backward": (dx, dy, x, a, gate, scale, mean, rstd, torch.randn(1024)),
        "gate_residual": (x, a, gate),
        "gate_residual_backward": (dx, a, gate),
        "gate_residual_norm_modulate rms": (x, a, gate, shift, scale, 1e-6, None, None, True),
        "norm_modulate_backward rms": (dy, x, scale, torch.empty(0), rstd, None, True),
        "cfg_extrapolate": (x, a, 30.0),
        "gelu_tanh": (x, None),
        "gelu_tanh_backward": (dy, x, torch.randn(1024)),
        "swiglu": (torch.cat((x, a), -1), None),
        "swiglu_backward": (dy[..., :512], x, torch.randn(1024)),
        "qk_norm": (qkv, *vectors, 1e-6),
        "qk_norm_backward": (*heads, qkv, vectors[0], vectors[1], None, torch.rand(4, batch, 64, 16) + 0.5),
        "qk_norm rms": (qkv, vectors[0], None, vectors[1], None, 1e-6, False, "rms", torch.randn(1, 64, 64)),
        "qk_norm_backward rms": (
            *heads,
            qkv,
            vectors[0],
            vectors[1],
            None,
            torch.rand(2, batch, 64, 16) + 0.5,
            "rms",
            torch.randn(batch, 64, 64),
        ),
        "qk_norm none": (qkv, None, None, None, None, 1e-6, True, "none", torch.randn(batch, 64, 64)),
        "qk_norm_backward none": (
            *heads,
            qkv,
            None,
            None,
            None,
            torch.empty(0, batch, 64, 16),
            "none",
            torch.randn(1, 64, 64),
        ),
    }


@pytest.mark.parametrize("op", large_calls(1))
def test_a_large_batch_written_past_the_caches_is_its_samples_one_by_one(op: str) -> None:
    batch, call = 5, getattr(torch.ops.st_fast, op.partition(" ")[0])
    inputs = large_calls(batch)[op]

    def sample(value: object, b: int) -> object:
        if not isinstance(value, torch.Tensor) or batch not in value.shape:
            return value
        return value.narrow(value.shape.index(batch), b, 1).contiguous()

    def results(args: tuple[object, ...]) -> list[torch.Tensor]:
        found = call(*args)
        return [found] if isinstance(found, torch.Tensor) else list(found)

    whole = results(inputs)
    assert whole[0].nbytes > 2**20 > whole[0].nbytes // batch
    for b in range(batch):
        for of_all, alone in zip(whole, results(tuple(sample(value, b) for value in inputs)), strict=True):
            if batch in of_all.shape:  # not the sums over the batch
                assert torch.equal(sample(of_all, b), alone)


def test_mixed_dtypes_float32_stream_with_bfloat16_branch_and_modulation() -> None:
    torch.manual_seed(0)
    x, a = torch.randn(2, 40, 96), torch.randn(2, 40, 96).bfloat16()
    mod = torch.randn(2, 3 * 96).bfloat16()
    x_out, y, mean, rstd = torch.ops.st_fast.gate_residual_norm_modulate(x, a, *mod.chunk(3, 1), 1e-6, None)
    gate, shift, scale = mod.chunk(3, 1)
    want_x, want_y = reference.gate_residual_norm_modulate(x, a, gate, shift, scale, 1e-6)
    assert (x_out.dtype, y.dtype, mean.dtype) == (torch.float32,) * 3
    assert error(x_out, want_x) < 1e-6 and error(y, want_y) < 1e-6
    backward = torch.ops.st_fast.gate_residual_norm_modulate_backward
    dx, da, dmod, da_bias = backward(x, y, x_out, a, gate, scale, mean, rstd, gate[0])
    assert (dx.dtype, da.dtype, dmod.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert da_bias.dtype == torch.bfloat16 and error(da_bias, da.float().sum((0, 1))) < 1e-2


@pytest.mark.parametrize(
    ("op", "width"), [("gelu_tanh", 384), ("gelu_tanh", 1001), ("swiglu", 384), ("swiglu", 1002), ("swiglu", 4112)]
)
def test_an_activation_with_a_bias_past_the_caches_has_the_reference_gradients(op: str, width: int) -> None:
    """Rows of whole cache lines, rows that begin anywhere, and half rows of several blocks that end within a line; more
    rows than a whole number of tasks."""
    torch.manual_seed(0)
    found = []
    x, bias = torch.randn(3, 307, width), torch.randn(width)
    assert x.nbytes > 2**20 and 3 * 307 % 32
    for ops in (kernels, reference):
        leaves = x.clone().requires_grad_(), bias.clone().requires_grad_()
        y = getattr(ops, op)(*leaves)
        found.append(torch.autograd.grad(y, leaves, x[..., : y.shape[-1]].cos()))
    for one, other in zip(*found, strict=True):
        assert error(one, other) < 2e-6


@pytest.mark.parametrize("count", [0, 5, 33])
def test_a_bias_of_another_size_is_one_line(count: int) -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="bias"):
        torch.ops.st_fast.gelu_tanh_backward(x, x, torch.randn(count))
    with pytest.raises(RuntimeError, match=rf"h_bias: shape \({count}\), expected \(4\)"):
        torch.ops.st_fast.swiglu_backward(x[..., :2], x, torch.randn(count))
    mean, gate = torch.randn(2, 3), torch.randn(2, 4)
    with pytest.raises(RuntimeError, match=rf"bias: shape \({count}\), expected \(4\)"):
        torch.ops.st_fast.gate_residual_norm_modulate_backward(x, x, x, x, gate, gate, mean, mean, torch.randn(count))


FAR = (-3e38, -1e20, -1e4, -88.5, -87.5, -86.5, -31.0, 31.0, 86.5, 87.5, 88.5, 1e4, 1e20, 3e38)


def test_swiglu_far_from_zero_is_the_definition_in_float32() -> None:
    gate, found = torch.tensor(FAR), []
    for ops in (kernels, reference):
        h = torch.stack((gate, torch.full_like(gate, 0.37)), -1).requires_grad_()
        y = ops.swiglu(h)
        found.append((y, *torch.autograd.grad(y, h, torch.full_like(y, -1.9))))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-30)
    for ops in (kernels, reference):  # whatever made an infinite gate is not to be hidden
        assert ops.swiglu(torch.tensor([-torch.inf, 0.37])).isnan()


def test_swiglu_of_wrong_shapes_is_refused_before_any_memory_is_read() -> None:
    h, dy = torch.randn(2, 3, 8), torch.randn(2, 3, 4)
    ops = torch.ops.st_fast
    for wrong in (h[..., :7], h[..., :0], h[0, 0, 0]):
        with pytest.raises(RuntimeError, match=r"h: shape \(.*\), expected \(\.\.\., 2F\) with F >= 1"):
            ops.swiglu(wrong, None)
    for wrong in (dy[..., :3], dy[:1], dy[0], h, dy[0, 0, 0]):
        with pytest.raises(RuntimeError, match=r"dy: shape \(.*\), expected h's \(\.\.\., 4\)"):
            ops.swiglu_backward(wrong, h, None)


@pytest.mark.parametrize("loss", reference.FEATURE_LOSSES)
def test_no_supervised_sample_gives_zero_loss_and_zero_gradient(loss: str) -> None:
    assert_nothing_supervised_is_nothing(loss, 3, 40, 16)


@pytest.mark.parametrize("tiny", [0.0, 1e-8])
def test_vectors_shorter_than_the_bound_have_the_reference_gradient(tiny: float) -> None:
    torch.manual_seed(0)
    grads = []
    for ops in (reference, kernels):
        q = (torch.arange(2 * 3 * 8.0).sin().reshape(2, 3, 8) * tiny).requires_grad_()
        ops.align(q, torch.arange(48.0).cos().reshape(2, 3, 8), torch.ones(2)).backward()
        grads.append(q.grad)
    assert grads[0] is not None and grads[1] is not None
    assert not grads[1].isnan().any() and error(grads[1], grads[0]) < 1e-6


@pytest.mark.parametrize("name", ["norm_modulate-2x33x100", "gate_residual_norm_modulate-2x33x100", "align-2x33x100",
                                  "guided-normalized_mse-30-2x33x100", "gelu_tanh-2x33x3x64",
                                  "swiglu-2x33x100"])  # fmt: skip
def test_nan_in_gives_nan_out(name: str) -> None:
    chosen = case(name)
    first = next(iter(chosen.leaves))
    poisoned = chosen.leaves | {first: chosen.leaves[first].clone().index_fill_(0, torch.tensor([0]), torch.nan)}
    found = evaluate(Case(name, poisoned, chosen.call, chosen.frozen), kernels, torch.float32)
    for key in ("out0", f"d{first}"):
        assert found[key].isnan().any(), key


def test_rms_norm_returns_no_mean_and_its_own_deviation() -> None:
    torch.manual_seed(0)
    x, v = torch.randn(2, 40, 96) + 3, torch.randn(2, 96)
    y, mean, rstd = torch.ops.st_fast.norm_modulate(x, v, v.cos(), 1e-3, None, True)
    assert mean.shape == (0,) and mean.dtype == torch.float32
    assert error(rstd, 1 / (x.double().square().mean(-1) + 1e-3).sqrt()) < 1e-6
    assert error(torch.ops.st_fast.norm_modulate(x, v, v.cos(), 1e-3)[0], y) > 0.1


def test_float64_goes_to_the_reference() -> None:
    x, mod = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    y, mean, _ = torch.ops.st_fast.norm_modulate(x, mod, mod, 1e-6)
    assert y.dtype == mean.dtype == torch.float64
    assert error(y, reference.norm_modulate(x, mod, mod)) < 1e-15


def test_wrong_shapes_are_refused_by_name_before_any_memory_is_read() -> None:
    x, v = torch.randn(2, 3, 8), torch.randn(2, 8)
    ops = torch.ops.st_fast
    with pytest.raises(RuntimeError, match=r"shift: shape \(2, 4\), expected \(2, 8\)"):
        ops.norm_modulate(x, v[:, :4], v, 1e-6)
    with pytest.raises(RuntimeError, match=r"index\[1\] = 7: allowed are 0 to 1"):
        ops.guided_feature_loss(x, x, x, torch.ones(2), 1.0, "mse", torch.tensor([0, 7]))
    with pytest.raises(RuntimeError, match=r"index\[1\] = 0: named twice"):
        ops.guided_feature_loss(x, x, x, torch.ones(2), 1.0, "mse", torch.tensor([0, 0]))
    qkv, none = torch.randn(2, 3, 3, 1, 8), (None,) * 4
    with pytest.raises(RuntimeError, match=r"rope: shape \(2, 4, 8\), expected \(2, 3, 8\)"):
        ops.qk_norm(qkv, *none, 1e-6, False, "none", torch.randn(2, 4, 8))
    with pytest.raises(RuntimeError, match=r"stats: shape \(4, 2, 3, 1\), expected \(2, 2, 3, 1\)"):
        ops.qk_norm_backward(*[torch.randn(2, 1, 3, 8)] * 3, qkv, None, None, None, torch.ones(4, 2, 3, 1), "rms")
    with pytest.raises(RuntimeError, match="norm = 'l2': one of layer, rms, none"):
        ops.qk_norm(qkv, *none, 1e-6, False, "l2")
    with pytest.raises(RuntimeError, match="loss = 'l1': one of mse, cosine, normalized_mse"):
        ops.guided_feature_loss(x, x, x, torch.ones(2), 1.0, "l1", None)


def test_lack_of_memory_is_told_in_one_line() -> None:
    huge = torch.ones(()).expand(1 << 20, 1 << 20, 16)
    with pytest.raises(RuntimeError, match=r"can't allocate memory for a result of shape \(1048576, 1048576, 16\)"):
        torch.ops.st_fast.gate_residual(huge, huge, torch.ones(()).expand(1 << 20, 16))


def wait(child: int, seconds: float) -> int:
    """The child's status; a child that hangs is killed, and its status says so."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def test_a_forked_child_computes_the_same_and_does_not_hang() -> None:
    """OpenMP's threads stay behind in the parent; waiting for them would hang for ever."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x, v = torch.randn(8, 256, 384), torch.randn(8, 384)
        truth = torch.ops.st_fast.norm_modulate(x, v, v, 1e-6)[0]
        child = os.fork()
        if child == 0:
            same = torch.ops.st_fast.norm_modulate(x, v, v, 1e-6)[0].numpy().tobytes() == truth.numpy().tobytes()
            os._exit(0 if same else 1)
        status = wait(child, seconds=30)
    finally:
        torch.set_num_threads(before)
    assert os.waitstatus_to_exitcode(status) == 0
