"""Runs that compare: --base fails beyond the noise only, and what a step is compared with."""

import contextlib

import pytest
import torch

from bench import against, apart, floor, step_times
from bench.timing import Effort, Stopwatch
from bench.workload import Setup, ours
from st_fast import families
from st_fast.model.attention import BACKENDS


def test_base_fails_beyond_the_spread_of_its_own_runs_and_not_within():
    base = [{"a": 1.00, "b": 1.00, "c": 1.0}, {"a": 1.01, "b": 1.20, "c": 1.0}, {"a": 1.02, "b": 1.10, "c": 1.0}]
    ours = [{"a": 1.10, "b": 1.15, "c": 1.02}, {"a": 1.11, "b": 1.25, "c": 1.02}, {"a": 1.10, "b": 1.20, "c": 1.02}]
    found = {verdict.key: verdict for verdict in against.verdicts(ours, base)}
    assert found["a"].slower, "10 % slower where runs of the same code differ by 2 %"
    assert not found["b"].slower, "15 % slower where runs of the same code differ by 18 %"
    assert not found["c"].slower, "below the least noise that is ever assumed"
    assert "same" in str(found["c"])


def test_nothing_is_called_slower_before_it_was_measured_twice_as_often(monkeypatch):
    spells = iter([1.0, 2.0] * against.RUNS + [1.0, 1.0] * against.RUNS)  # base and ours by turns
    monkeypatch.setattr(against, "worktree", lambda revision: contextlib.nullcontext(against.ROOT))
    monkeypatch.setattr(against, "times", lambda tree: {"a": next(spells)})
    (verdict,) = against.compare("main")
    assert not verdict.slower and next(spells, None) is None


def test_ops_that_the_base_does_not_have_are_left_out():
    assert [v.key for v in against.verdicts([{"a": 1.0, "new": 1.0}], [{"a": 1.0}])] == ["a"]


def test_an_unknown_base_is_one_line_that_names_it():
    with pytest.raises(ValueError, match="--base no-such-revision: "), against.worktree("no-such-revision"):
        pass


def test_the_floor_times_every_product_and_attention_of_a_step():
    effort, cpu = Effort(rounds=2, seconds=0.1, least=1, warmup=0), torch.device("cpu")
    with ours(Setup("S/2", "stage 2", 2, cpu, tokens=16, depth=2)) as loop:
        linear, attend = loop.trainer.model.kernels.linear, BACKENDS["sdpa"].attend
        least = floor.measure(loop.recipe, loop.stage, 1, attend, linear, cpu, torch.float32, effort)
    assert least.products > 0 and least.attention > 0
    assert least.product_flops > least.attention_flops > 0


def test_the_largest_batch_is_found_by_halving_and_an_impossible_one_is_the_error_itself():
    def fits(limit):
        def run(batch):
            if batch > limit:
                raise torch.OutOfMemoryError("no room")

        return run

    assert step_times.largest_batch(fits(100), 256, torch.device("cpu")) == 64
    with pytest.raises(torch.OutOfMemoryError):
        step_times.largest_batch(fits(0), 256, torch.device("cpu"))


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        ("aten::addmm", "matrix products"), ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"), ("st_fast::linear_backward", "matrix products"),
        ("st_fast::attention_backward", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("st_fast::gate_residual_norm_modulate_backward", "adaLN"), ("st_fast::qk_norm", "qk-norm"),
        ("st_fast::adamw_ema_", "optimiser"), ("st_fast::grad_norm", "optimiser"),
        ("triton_poi_fused_gelu_0", "GELU"), ("aten::copy_", "copies"), ("aten::mul", families.OTHER),
        ("aten::add", families.OTHER),
    ],
)  # fmt: skip
def test_kernels_belong_to_their_family(kernel, family):
    assert families.family(kernel) == family


def test_the_plain_loop_in_a_process_of_its_own_steps_on_request_and_ends_with_its_user():
    setup = Setup("S/2", "stage 1", 2, torch.device("cpu"), tokens=16, depth=2)
    with apart.plain(setup, "plain") as loop:
        watch = Stopwatch(setup.device)
        loop.variant(block=2)(0, watch)
        (seconds,) = watch.read()["step"]
        assert 0 < seconds < 60
        process = loop._process
        assert process.poll() is None
        process.kill()
        process.wait()
        with pytest.raises(RuntimeError, match="plain loop's process has ended"):
            loop.step()
    assert process.poll() is not None
