"""Randomness is a pure function of (seed, purpose, ordinal), with the right distributions."""

import numpy as np
import pytest
import torch
from scipy import stats

from st_fast.core import random
from st_fast.core.random import Purpose
from st_fast.kernels.noise import definition

# Salmon et al. (SC 2011), known-answer vectors of Philox4x32-10 in Random123's kat_vectors: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    words = definition.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def test_a_draw_depends_on_its_ordinal_alone_not_on_the_batch_around_it():
    together = random.normal(7, Purpose.NOISE, torch.tensor([3, 99, 2**40]), (4, 5))
    for row, ordinal in enumerate([3, 99, 2**40]):
        assert torch.equal(together[row], random.normal(7, Purpose.NOISE, torch.tensor([ordinal]), (4, 5))[0])


@pytest.mark.parametrize("other", [(8, Purpose.NOISE, 3), (7, Purpose.POSTERIOR, 3), (7, Purpose.NOISE, 3 + 2**32)])
def test_seed_purpose_and_high_ordinal_bits_all_change_the_draw(other):
    seed, purpose, ordinal = other
    here = random.uniform(7, Purpose.NOISE, torch.tensor([3]), 64)
    there = random.uniform(seed, purpose, torch.tensor([ordinal]), 64)
    assert (here != there).float().mean() > 0.99


def test_uniforms_and_normals_have_their_distributions():
    u = random.uniform(1, Purpose.TIME, torch.arange(2000), 50).flatten().numpy()
    z = random.normal(1, Purpose.NOISE, torch.arange(2000), (5, 10)).flatten().numpy()
    assert u.min() > 0 and u.max() < 1
    assert random.uniform(1, Purpose.TIME, torch.arange(3)).shape == (3, 1)
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.kstest(z, "norm").pvalue > 1e-3
    neighbours = np.corrcoef(z[:-1], z[1:])[0, 1]
    assert abs(neighbours) < 4 / len(z) ** 0.5


EDGES = sorted(
    {
        (at + step) % 2**32
        for at in (0, 2**8, 2**23, 2**24, 2**29, 2**30, 2**31, 2**31 + 2**30, 2**32 - 2**8, 2**32 - 2**9)
        for step in range(-300, 301)
    }
)
"""Words around 0, 2³², every quarter of a turn, and where float32 stops holding a word or its bin's middle."""


def test_a_uniform_lies_inside_the_open_interval_for_every_word():
    words = torch.tensor(sorted({*EDGES, *range(0, 2**32, 65_521)}))
    u = definition.open_uniform(words)
    assert u.dtype == torch.float32
    assert u[0] == 2.0**-25 and u[-1] == 1 - 2.0**-24
    assert (u.diff() >= 0).all()  # so that what holds at both ends holds between them
    assert random.uniform(0, Purpose.TIME, torch.tensor([4968444]), 4)[0, 0] == 1 - 2.0**-24
    # Only where 1 came out before, a draw is another one than in older runs.
    before = (words >> 8).float() * 2.0**-24 + 2.0**-25
    assert torch.equal(before != u, words >> 8 == 2**24 - 1) and (before[before != u] == 1).all()


def test_normals_are_finite_and_bounded_for_every_edge_word():
    radius, angle = torch.meshgrid(torch.tensor(EDGES), torch.tensor(EDGES[::41]), indexing="ij")
    for z in definition.box_muller(radius, angle):
        assert z.isfinite().all() and z.abs().max() < 6.7
    log = definition.minus_two_log(torch.tensor(EDGES))
    truth = -2 * np.log((np.array(EDGES, dtype=np.uint64) | np.uint64(1)).astype(np.longdouble) / 2**32)
    assert (log >= 0).all()
    assert np.abs(log.numpy() - truth.astype(np.float64)).max() < 4e-6


def test_every_epoch_visits_every_record_once_in_another_order():
    first, second = random.epoch_order(5, 0, 1000), random.epoch_order(5, 1, 1000)
    assert sorted(first) == sorted(second) == list(range(1000))
    assert (first == second).mean() < 0.02
    assert np.array_equal(first, random.epoch_order(5, 0, 1000))


def test_the_epoch_order_is_frozen_across_versions():
    # Written down once: a change would silently change what every resumed run sees.
    assert random.epoch_order(0, 0, 8).tolist() == [4, 6, 2, 7, 5, 0, 3, 1]
    assert random.epoch_order(2**63 + 5, 3, 8).tolist() == [0, 2, 7, 1, 6, 5, 4, 3]


def test_streams_keep_the_numbers_that_stand_in_the_format():
    """Another number would silently change what a resumed run draws."""
    numbers = {"NOISE": 1, "POSTERIOR": 2, "TIME": 3, "CLASS_DROPOUT": 4, "FLIP": 5, "STRATA": 6, "ORDER": 7,
               "SAMPLE_NOISE": 8, "SAMPLE_LABELS": 9, "SAMPLE_PATH": 10, "TEACHER_TIME": 11, "CAPTION": 12,
               "BUCKETS": 13, "TOKEN_ORDER": 14, "WHOLE_SAMPLE": 15, "GROUP_TIME": 16, "NEGATIVE": 17,
               "PATH_DROP": 18, "VALIDATION": 19, "VALIDATION_TIME": 20, "HELD_OUT": 21}  # fmt: skip
    assert {purpose.name: purpose.value for purpose in Purpose} == numbers


@pytest.mark.parametrize("draw", [random.epoch_order, random.strata])
def test_orders_follow_from_a_seeds_lowest_64_bits_and_differ_by_purpose(draw):
    for seed in (5, -1, 2**63 + 1):
        assert draw(seed, 3, 50).tolist() == draw(seed + 2**64, 3, 50).tolist() != draw(seed + 2**32, 3, 50).tolist()
    assert draw(5, 3, 50).tolist() != draw(3, 5, 50).tolist() and draw(5, 3, 50).tolist() != draw(5, 4, 50).tolist()


def test_batches_cross_epoch_edges_without_dropping_or_repeating():
    order = random.RecordOrder(3, 10)
    seen = np.concatenate([order(np.arange(start, start + 4)) for start in range(0, 40, 4)])
    for epoch in range(4):
        assert sorted(seen[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert np.array_equal(random.RecordOrder(3, 10)(np.arange(17, 23)), seen[17:23])
