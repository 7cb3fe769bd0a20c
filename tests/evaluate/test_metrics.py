"""The metrics agree with SciPy and with their definitions written out as loops."""

import inspect
import tracemalloc

import numpy as np
import pytest
from scipy.linalg import sqrtm

from st_fast.core.errors import UserError
from st_fast.evaluate import metrics
from st_fast.evaluate.metrics import (
    GaussianStats,
    InceptionScore,
    frechet,
    kernel_distance,
    precision_recall,
    squared_mmd,
)


def features(seed: int, n: int, width: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) / np.sqrt(width)
    return (rng.normal(size=(n, width)) @ mix + shift).astype(np.float32)


def scipy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.real(sqrtm(cov_a @ cov_b))
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root))


@pytest.mark.parametrize(("width", "n"), [(3, 50), (64, 400), (192, 1000)])
def test_frechet_distance_is_scipys_to_1e_6(width: int, n: int) -> None:
    a, b = features(1, n, width), features(2, 2 * n, width, shift=0.1)
    assert frechet(GaussianStats.of(a), GaussianStats.of(b)) == pytest.approx(scipy_frechet(a, b), rel=1e-6)


def test_frechet_distance_of_diagonal_gaussians_has_its_closed_form() -> None:
    a, b = GaussianStats(2, count=11), GaussianStats(2, count=11)
    a.scatter, b.scatter = 10 * np.diag([4.0, 9.0]), 10 * np.diag([1.0, 16.0])
    b.mean = np.array([3.0, 4.0])
    assert frechet(a, b) == pytest.approx(25 + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-12)


def test_frechet_distance_to_itself_is_zero_even_with_dead_features() -> None:
    x = features(3, 500, 40)
    x[:, 10:20] = 0.0
    x[:, 20:25] = x[:, 25:30]
    stats = GaussianStats.of(x)
    assert frechet(stats, stats) <= 1e-9 * np.trace(stats.covariance)


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e-6])
def test_frechet_distance_of_flat_gaussians_has_its_closed_form_at_any_scale(scale: float) -> None:
    """Covariances with the same axes, some of them without any spread."""
    axes = np.linalg.qr(np.random.default_rng(2).normal(size=(40, 40)))[0]
    lengths = np.zeros((2, 40))
    lengths[:, :25] = scale * np.random.default_rng(3).uniform(1, 3, (2, 25))
    a, b = (GaussianStats.known(np.zeros(40), (axes * length**2) @ axes.T) for length in lengths)
    b.mean[7] = 2 * scale
    expected = np.square(lengths[0] - lengths[1]).sum() + (2 * scale) ** 2
    assert frechet(a, b) == pytest.approx(expected, rel=1e-12)


def test_published_statistics_are_taken_as_they_are() -> None:
    x = features(8, 70, 5)
    known = GaussianStats.known(x.mean(0, dtype=np.float64), np.cov(x.T))
    np.testing.assert_allclose(known.covariance, np.cov(x.T), rtol=1e-12)
    assert known.mean.dtype == np.float64 and frechet(known, GaussianStats.of(x)) <= 1e-9
    with pytest.raises(UserError, match=r"shape \(5,\)"):
        GaussianStats.of(x[0])


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_streamed_statistics_equal_numpys_in_any_partition(offset: float) -> None:
    x = features(4, 5000, 12).astype(np.float64) + offset
    streamed = GaussianStats(12)
    for part in np.split(x, [1, 2, 900, 3200]):
        streamed.update(part)
    assert streamed.count == 5000
    np.testing.assert_allclose(streamed.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(streamed.covariance, np.cov(x.T), rtol=1e-8, atol=1e-10)


def test_streaming_wide_features_stays_far_below_a_gigabyte() -> None:
    """Memory doesn't depend on how many batches come, so four stand for the forty-nine of 50,000 samples."""
    rng = np.random.default_rng(5)
    batch = rng.random((1024, 2048), dtype=np.float32)
    tracemalloc.start()
    stats = GaussianStats(2048)
    for _ in range(4):
        stats.update(batch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert stats.count == 4096
    assert peak < 300e6


def loop_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    m, n = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


def test_kernel_distance_is_its_definition() -> None:
    x, y = features(6, 13, 5).astype(np.float64), features(7, 17, 5, shift=0.5).astype(np.float64)
    assert squared_mmd(x, y) == pytest.approx(loop_mmd(x, y), rel=1e-10)
    mean, spread = kernel_distance(x[:13], y[:13], subsets=5, subset_size=13)
    assert mean == pytest.approx(loop_mmd(x[:13], y[:13]), rel=1e-10)
    assert spread == pytest.approx(0.0, abs=1e-12)


def test_kernel_distance_repeats_with_its_seed_and_separates_distributions() -> None:
    x, y, z = features(8, 300, 6), features(8, 600, 6)[300:], features(8, 300, 6) + 1
    assert kernel_distance(x, y, 10, 100, seed=3) == kernel_distance(x, y, 10, 100, seed=3)
    assert kernel_distance(x, z, 10, 100)[0] > 10 * abs(kernel_distance(x, y, 10, 100)[0])


def test_the_published_settings_are_the_defaults() -> None:
    defaults = [
        [p.default for p in inspect.signature(call).parameters.values() if p.default is not p.empty]
        for call in (kernel_distance, precision_recall)
    ]
    assert defaults == [[100, 1_000, 0], [3]]


def loop_precision_recall(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    def radii(points: np.ndarray) -> list[float]:
        others = [np.delete(points, i, axis=0) for i in range(len(points))]
        return [sorted(np.linalg.norm(p - q) for q in rest)[k - 1] for p, rest in zip(points, others, strict=True)]

    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        balls = list(zip(centres, radii(centres), strict=True))
        return float(np.mean([any(np.linalg.norm(p - c) <= r for c, r in balls) for p in points]))

    return covered(samples, reference), covered(reference, samples)


@pytest.mark.parametrize(("seed", "k", "scale"), [(0, 3, 1.0), (1, 1, 1.0), (2, 9, 1e-5), (3, 9, 1e5)])
def test_precision_and_recall_are_adms_definition(
    seed: int, k: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of odd sizes."""
    monkeypatch.setattr(metrics, "ROWS", 16)
    monkeypatch.setattr(metrics, "DISTANCES", 450)
    reference, samples = scale * features(10 + seed, 60, 3), scale * features(20 + seed, 45, 3, shift=0.3)
    expected = loop_precision_recall(reference.astype(np.float64), samples.astype(np.float64), k)
    assert precision_recall(reference, samples, k) == pytest.approx(expected, abs=0)
    assert 0.05 < expected[0] < 0.98, "the case must be able to tell a wrong answer"


def test_precision_and_recall_of_equal_sets_are_one_and_of_far_sets_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("st_fast.evaluate.metrics.ROWS", 16)
    x = features(30, 90, 4) + 1e3
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(np.repeat(x[:20], 4, axis=0), np.repeat(x[:20], 4, axis=0)) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)


def test_radii_reach_the_kth_nearest_of_many_points() -> None:
    points = features(5, 1500, 2).astype(np.float64)
    distances = np.sort(np.square(points[:, None] - points[None]).sum(-1), axis=1)
    for k in (1, 200, 731):
        np.testing.assert_allclose(metrics._squared_radii(points, points.mean(0), k), distances[:, k], rtol=1e-9)


def test_distances_are_held_in_blocks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = features(1, 50, 3), features(2, 21, 3)
    expected = np.square(a[:, None].astype(np.float64) - b[None].astype(np.float64)).sum(-1)
    for rows, held, sizes in (
        (2048, 10**6, [50]),
        (20, 10**6, [20, 20, 10]),
        (20, 85, [4] * 12 + [2]),
        (20, 5, [1] * 50),
    ):
        monkeypatch.setattr(metrics, "ROWS", rows)
        monkeypatch.setattr(metrics, "DISTANCES", held)
        found = list(metrics._distance_rows(a, b, a.mean(0, dtype=np.float64)))
        assert [len(part) for _, part in found] == sizes
        np.testing.assert_allclose(np.concatenate([part for _, part in found]), expected, rtol=1e-9)


def test_inception_score_is_its_definition() -> None:
    rng = np.random.default_rng(9)
    p = rng.dirichlet(np.full(7, 0.3), size=60)
    p[0] = np.eye(7)[2]
    p[15:30, 4] = 0.0  # a class that a whole split does without
    scores = []
    for part in np.split(p, 4):
        marginal = part.mean(0)
        kl = [sum(v * np.log(v / m) for v, m in zip(row, marginal, strict=True) if v > 0) for row in part]
        scores.append(np.exp(np.mean(kl)))
    streamed = InceptionScore(7, 60, size=15)
    for part in np.split(p, [1, 14, 33]):
        streamed.update(part)
    assert streamed.read() == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-10)
    with pytest.raises(ValueError, match="61 samples; 60"):
        streamed.update(p[:1])
    for rows, expected, size in ((np.eye(10), 10.0, 10), (np.full((30, 10), 0.1), 1.0, 10), (np.eye(10)[:3], 3.0, 10)):
        score = InceptionScore(10, len(rows), size)
        score.update(rows)
        assert score.read() == pytest.approx((expected, 0.0))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: frechet(GaussianStats.of(features(1, 8, 8)), GaussianStats.of(features(1, 99, 8))), "8 samples of 8"),
        (
            lambda: frechet(GaussianStats.of(features(1, 9, 8)), GaussianStats.of(features(1, 9, 7))),
            "8 features against 7",
        ),
        (lambda: GaussianStats(3).update(np.array([[1.0, 2.0, 3.0], [0.0, 0.0, np.nan], [np.inf] * 3])), "row 1 holds"),
        (lambda: GaussianStats(3).update(np.zeros((0, 3))), "shape (0, 3)"),
        (lambda: GaussianStats(0).update(np.zeros((3, 0))), "shape (3, 0)"),
        (lambda: kernel_distance(features(1, 9, 2), features(1, 1001, 2)), "9 samples; subsets of 1000"),
        (lambda: kernel_distance(features(1, 9, 8), features(1, 9, 7), 1, 9), "8 features against 7"),
        (lambda: precision_recall(features(1, 9, 8), features(1, 9, 7)), "8 features against 7"),
        (lambda: precision_recall(features(1, 3, 8), features(1, 9, 8)), "more than k = 3"),
    ],
)
def test_too_little_or_broken_input_is_told_in_one_line(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)
