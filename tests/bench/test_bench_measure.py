"""The clock: what it interleaves, what it calls noise, and that it feeds pytest-benchmark."""

import pytest
import torch

from bench import measure
from bench.measure import Effort, Stopwatch

CPU = torch.device("cpu")


def test_variants_take_turns_and_each_goes_first_every_other_round():
    order: list[str] = []

    def variant(name):
        def run(number: int, watch: Stopwatch) -> None:
            order.append(name)
            with watch("phase"):
                pass

        return run

    samples = measure.interleave({n: variant(n) for n in "abc"}, CPU, Effort(rounds=4, seconds=60, warmup=1))
    assert "".join(order) == "abc" + "abc" + "cba" + "abc" + "cba"
    assert {name: len(series["phase"]) for name, series in samples.items()} == dict.fromkeys("abc", 4)


def test_measuring_ends_when_its_time_is_up_but_not_before_the_least_rounds():
    def slow(number: int, watch: Stopwatch) -> None:
        with watch("phase"):
            torch.zeros(1)

    samples = measure.interleave({"slow": slow}, CPU, Effort(rounds=50, seconds=0.0, least=3, warmup=0))
    assert len(samples["slow"]["phase"]) == 3


def test_a_slow_spell_of_the_machine_leaves_the_paired_ratio_alone():
    fast, spell = [1.0, 1.1, 0.9, 1.0, 1.0, 1.1], [1, 1, 1, 5, 5, 5]
    slow = [2 * f * s for f, s in zip(fast, spell, strict=True)]
    assert measure.paired_ratio(slow, [f * s for f, s in zip(fast, spell, strict=True)]) == pytest.approx(2.0)


def test_noise_is_nothing_for_a_steady_machine_and_covers_the_difference_between_two_runs_of_the_same_code():
    assert measure.noise([2.0] * 20) == 0.0
    even_odd = [1.0, 1.2] * 10
    assert measure.noise(even_odd) >= 0.15
    draws = torch.Generator().manual_seed(0)
    runs = [(1 + 0.05 * torch.randn(30, generator=draws)).tolist() for _ in range(40)]
    within = [abs(sorted(run)[15] - 1.0) <= measure.noise(run) for run in runs]
    assert sum(within) >= 34


def test_the_copy_counts_bytes_read_and_written():
    copy = measure.Copy(CPU, bytes_each=4096)
    assert copy.moved == 8192
    copy(0, Stopwatch(CPU))
    assert bool((copy.target == 1).all())
