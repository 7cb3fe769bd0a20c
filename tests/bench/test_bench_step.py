"""Runs that compare: --base fails beyond the noise only, and what a step is compared with."""

import contextlib
import weakref
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from bench import ablations, compare, ops, published, step
from bench.measure import Effort, Stopwatch
from bench.ops import Case, Size
from bench.published import PlainLoop, plain_loop
from bench.workload import WEIGHT_STD, Ours, Setup, ours
from st_fast.model import timed
from st_fast.model.attention import BACKENDS
from st_fast.model.layers import sincos_positions
from st_fast.train import profiling
from tests.bench.test_bench_report import MACHINE


def test_base_fails_beyond_the_spread_of_its_own_runs_and_not_within():
    base = [{"a": 1.00, "b": 1.00, "c": 1.0}, {"a": 1.01, "b": 1.20, "c": 1.0}, {"a": 1.02, "b": 1.10, "c": 1.0}]
    ours = [{"a": 1.10, "b": 1.15, "c": 1.02}, {"a": 1.11, "b": 1.25, "c": 1.02}, {"a": 1.10, "b": 1.20, "c": 1.02}]
    found = {verdict.key: verdict for verdict in compare.verdicts(ours, base)}
    assert found["a"].slower, "10 % slower where runs of the same code differ by 2 %"
    assert not found["b"].slower, "15 % slower where runs of the same code differ by 18 %"
    assert not found["c"].slower, "below the least noise that is ever assumed"
    assert "same" in str(found["c"])


def test_nothing_is_called_slower_before_it_was_measured_twice_as_often(monkeypatch):
    spells = iter([1.0, 2.0] * compare.RUNS + [1.0, 1.0] * compare.RUNS)  # base and ours by turns
    monkeypatch.setattr(compare, "worktree", lambda revision: contextlib.nullcontext(compare.ROOT))
    monkeypatch.setattr(compare, "times", lambda tree: {"a": next(spells)})
    (verdict,) = compare.compare("main")
    assert not verdict.slower and next(spells, None) is None


def test_a_base_that_can_not_be_measured_is_one_line_and_a_slower_op_is_code_1(monkeypatch, capsys):
    found = [compare.Verdict("align", 0.2, 0.05), compare.Verdict("linear", 0.0, 0.05)]
    monkeypatch.setattr(compare, "compare", lambda revision: found)
    assert compare.report("main") == 1 and "align: +20.0 % (noise 5.0 %), slower" in capsys.readouterr().out
    assert found.pop(0) and compare.report("main") == 0

    def broken(revision):
        raise RuntimeError("bench.ops in /tree: no module of that name")

    monkeypatch.setattr(compare, "compare", broken)
    assert compare.report("main") == 2 and capsys.readouterr().err.count("\n") == 1


def test_ops_that_the_base_does_not_have_are_left_out():
    assert [v.key for v in compare.verdicts([{"a": 1.0, "new": 1.0}], [{"a": 1.0}])] == ["a"]


def test_an_unknown_base_is_one_line_that_names_it():
    with pytest.raises(ValueError, match="--base no-such-revision: "), compare.worktree("no-such-revision"):
        pass


def test_the_floor_times_every_product_and_attention_of_a_step():
    cpu = torch.device("cpu")
    with ours(Setup("S/2", "stage 2", 2, cpu, tokens=16, depth=2)) as loop:
        linear, attend = loop.trainer.model.kernels.linear, BACKENDS["sdpa"].attend
        meter = step.FloorMeter(loop.recipe, loop.stage, attend, linear, cpu, torch.float32)
        seconds, flops = meter(1), meter.flops(1)
    assert seconds["products"] > 0 and seconds["attention"] > 0
    assert flops["product_flops"] > flops["attention_flops"] > 0
    assert meter.flops(2)["product_flops"] > flops["product_flops"] > meter.flops(0)["product_flops"]


def test_every_round_measures_the_floor_of_its_own_step(monkeypatch):
    """A step of twice the samples takes twice the time, and is as far from its own floor."""
    asked = []

    class Meter(step.FloorMeter):
        def __call__(self, supervised):
            asked.append(supervised)
            return {"products": 0.75 * supervised / 8, "attention": 0.25 * supervised / 8}

    def stepping(loop, block):
        def run(number, watch):
            loop()
            loop.supervised += number + 1
            watch.add("step", 1.5 * (number + 1) / 8)

        return run

    monkeypatch.setattr(step, "FloorMeter", Meter)
    monkeypatch.setattr(step, "our_variant", stepping)
    setup = Setup("S/2", "plain", 2, torch.device("cpu"), tokens=16, depth=2)
    with ours(setup) as loop:
        wanted = step.Wanted(Effort(rounds=6 // step.FLOOR_ROUNDS, seconds=60, least=1, warmup=0))
        parts = step._parts(loop, setup, wanted)
    assert asked == [1, 2, 3, 4, 5, 6] and parts["rounds"] == 6
    assert parts["times_the_floor"] == pytest.approx(1.5) and parts["noise"] == pytest.approx(0)
    assert parts["floor"]["products"] == pytest.approx(3 * parts["floor"]["attention"])


def test_the_largest_batch_is_found_by_halving_and_an_impossible_one_is_the_error_itself():
    def fits(limit):
        def run(batch):
            if batch > limit:
                raise torch.OutOfMemoryError("no room")

        return run

    assert step.largest_batch(fits(100), 256, torch.device("cpu")) == 64
    with pytest.raises(torch.OutOfMemoryError):
        step.largest_batch(fits(0), 256, torch.device("cpu"))


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        ("aten::addmm", "matrix products"), ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"), ("st_fast::linear_backward", "matrix products"),
        ("st_fast::attention_backward", "attention"), ("linear_gradient", "matrix products"),
        ("gate_residual_norm_modulate_gradient", "adaLN"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("st_fast::gate_residual_norm_modulate_backward", "adaLN"), ("st_fast::qk_norm", "qk-norm"),
        ("st_fast::adamw_ema_", "optimiser"), ("st_fast::grad_norm", "optimiser"),
        ("triton_poi_fused_gelu_0", "GELU"), ("aten::copy_", "copies"), ("aten::mul", profiling.OTHER),
        ("aten::add", profiling.OTHER),
    ],
)  # fmt: skip
def test_kernels_belong_to_their_family(kernel, family):
    assert profiling.family(kernel) == family


def test_the_plain_loop_in_a_process_of_its_own_steps_on_request_and_ends_with_its_user():
    setup = Setup("S/2", "stage 1", 2, torch.device("cpu"), tokens=16, depth=2)
    with published.in_subprocess(setup, "plain") as loop:
        watch = Stopwatch(setup.device)
        loop.variant(block=2)(0, watch)
        (seconds,) = watch.read()["step"]
        assert 0 < seconds < 60
        process = loop._process
        assert process.poll() is None
        process.kill()
        process.wait()
        with pytest.raises(RuntimeError, match="published loop's process has ended"):
            loop.step()
    assert process.poll() is not None


FEW = Effort(rounds=1, seconds=1.0, least=1, warmup=0)


def test_on_cuda_each_loop_is_timed_alone_and_the_plain_one_is_compiled_after_it_was_timed(monkeypatch):
    """Two loops of XL/2 do not fit one device. The order is that of a device's; a CPU stands in for it."""
    loops, order = [], list[str]()
    made, interleaved = step.ours, step.interleave

    @contextlib.contextmanager
    def ours(setup):
        with made(setup) as loop:
            loops.append(weakref.ref(loop.trainer))
            yield loop

    def timed(variants, device, effort):
        (name,) = variants
        order.append(name if loops[0]() is not None else f"{name} alone")
        return interleaved(variants, device, effort)

    monkeypatch.setattr(step, "ours", ours)
    monkeypatch.setattr(step, "interleave", timed)
    monkeypatch.setattr(step, "_peak_memory", lambda loop, device: 1.5)
    monkeypatch.setattr(PlainLoop, "compile", lambda self, whole: order.append("compiled"))
    setup = Setup("S/2", "stage 2", 4, torch.device("cpu"), tokens=16, depth=2)
    wanted = step.Wanted(FEW, rivals=("plain", "compile"), breakdown=False)
    with contextlib.ExitStack() as stack:
        row = step._one_by_one(setup, wanted, MACHINE, stack)
    assert order == ["ours", "plain alone", "compiled", "compile alone"]
    assert row["peak_gib"] == 1.5 and row["micro_batch"] == 4 and row["supervised"] > 0 and "notices" not in row
    assert set(row["speedup"]) == {"plain", "compile"} and set(row["first_step_s"]) == {"plain", "compile"}


def test_a_compiler_that_was_given_up_is_in_the_row(monkeypatch):
    def broken(function, **options):
        def call(*inputs):
            raise TorchDynamoException("no ptxas here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    setup = Setup("S/2", "plain", 4, torch.device("cpu"), tokens=16, depth=2, compile="on")
    row = step.measure_step(setup, step.Wanted(FEW, rivals=(), breakdown=False), MACHINE)
    assert row["notices"] == ["torch.compile failed (TorchDynamoException), going on without it: no ptxas here"]
    assert row["ok"] is False


def test_an_op_whose_rival_does_not_compile_says_so(monkeypatch):
    monkeypatch.setattr(ops, "compiled", lambda case, inputs: "torch.compile of the reference failed: no")
    case = Case("align", Size("S/2", 2, 16), torch.float32, torch.device("cpu"))
    row = ops.measure_op(case, FEW)
    assert row["notices"] == ["torch.compile of the reference failed: no"] and "compile" not in row["both"]["speedup"]


def test_a_measured_step_has_weights_none_of_which_is_zero_and_a_teacher_from_no_file(tmp_path):
    cpu = torch.device("cpu")
    with ours(Setup("S/2", "stage 2", 4, cpu, tokens=16, depth=2)) as loop:
        state, teacher = loop.trainer.optimizer.state(), loop.trainer.method.teacher.state_dict()
        assert not list(Path(loop.recipe.run.out).glob("**/*.safetensors"))
    for tensors in (state["model"], state["heads"], teacher):
        for name, tensor in tensors.items():
            scale = (tensor - 1 if name.endswith("norm.weight") else tensor).std().item()
            assert name == "pos_embed" or scale == pytest.approx(WEIGHT_STD, rel=0.5), name
    assert torch.equal(state["model"]["pos_embed"], sincos_positions(384, (4, 4)))
    assert all(torch.equal(average, state["model"][name]) for name, average in state["ema"].items())
    used = dict(loop.trainer.model.named_parameters())
    assert all(torch.equal(used[name], master) for name, master in state["model"].items())


def test_the_plain_loops_batch_fits_with_the_moments_that_its_first_step_leaves(monkeypatch):
    cpu = torch.device("cpu")
    with ours(Setup("S/2", "plain", 4, cpu, tokens=16, depth=2)) as loop:
        plain = plain_loop(loop)
    made, held = PlainLoop.step, []

    def full(self, moments, labels):
        if self.optimizer.state and len(labels) > 2:
            raise torch.OutOfMemoryError("no room beside the moments")
        held.append(len(labels))
        return made(self, moments, labels)

    monkeypatch.setattr(PlainLoop, "step", full)
    assert step._largest_batch_of(plain, 4) == 2 and held == [4, 2, 2]


def test_a_measured_step_takes_what_its_trial_decides_and_rows_that_compare_loops_make_none(monkeypatch):
    cpu, tried = torch.device("cpu"), []
    verdict = timed.Verdict(speedup=1.5, sure=True)
    monkeypatch.setattr(timed, "has_kernel", lambda op, kind: True)
    monkeypatch.setattr(timed, "_tried", lambda op, plain, size, *rest: tried.append((op, size.batch)) or verdict)
    setup = Setup("S/2", "plain", 4, cpu, tokens=16, depth=2)
    wanted = step.Wanted(FEW, rivals=(), breakdown=False)
    row = step.measure_step(setup, wanted, MACHINE)
    assert row["decided"] == ["kernels: gelu_mlp fused, 1.50x of plain at 64 x 384"] and "notices" not in row
    with ours(setup) as loop:
        assert loop.trainer.model.kernels.fuses("gelu_mlp")
    assert tried == [("gelu_mlp", 4)] * 2
    monkeypatch.setattr(ablations, "paired", lambda *loops_and_more: seen.extend(loops_and_more[:2]) or {})
    for name, fused in {"gelu_mlp fused": [False, True], "qk_norm heads": [False, False]}.items():
        seen: list[Ours] = []
        row = ablations.measure_choice(setup, name, FEW, block=1)
        assert row["ok"] and [loop.trainer.model.kernels.fuses("gelu_mlp") for loop in seen] == fused, row
    assert len(tried) == 2
