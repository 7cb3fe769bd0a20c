"""The measures agree with other people's programs, or with what must come out."""

import numpy as np
import pytest
from scipy.stats import ortho_group
from sklearn.decomposition import PCA
from sklearn.preprocessing import KernelCenterer

from st_fast.evaluate.probe.measures import cka, cosine, linear_probe, pca_colours

RNG = np.random.default_rng(0)


def test_cka_is_that_of_the_centred_gram_matrices() -> None:
    x, y = RNG.normal(size=(40, 7)) + 3, RNG.normal(size=(40, 5)) - 2
    y[:, :3] += x[:, :3]
    k, g = (KernelCenterer().fit_transform(m @ m.T) for m in (x, y))
    assert cka(x, y) == pytest.approx((k * g).sum() / np.sqrt((k * k).sum() * (g * g).sum()), rel=1e-10)


def test_cka_sees_through_rotation_shift_and_scale_and_tells_noise_apart() -> None:
    x = RNG.normal(size=(4_000, 6))
    assert cka(x, 5 * x @ ortho_group.rvs(6, random_state=1) + 7) == pytest.approx(1)
    assert cka(x, RNG.normal(size=(4_000, 6))) < 0.01
    assert np.isnan(cka(x, np.ones((4_000, 2))))


def test_cosine_is_the_mean_over_rows() -> None:
    x = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    y = np.array([[5.0, 0.0], [0.0, -1.0], [4.0, 3.0]])
    assert cosine(x, y) == pytest.approx((1 - 1 + 24 / 25) / 3)


def test_the_probe_finds_what_is_linear_and_nothing_in_noise_whatever_the_scale() -> None:
    labels = np.arange(400) % 4
    x = RNG.normal(size=(400, 8)) * np.logspace(-4, 4, 8)
    x[:, 0] += 1e-3 * labels
    x[:, 7] += 2e5 * (labels == 2)
    assert linear_probe(x[:300], labels[:300], x[300:], labels[300:]).value > 0.9
    noise = RNG.normal(size=(2_000, 3))
    names = RNG.integers(0, 4, 2_000)
    assert abs(linear_probe(noise[:1000], names[:1000], noise[1000:], names[1000:]).value - 0.25) < 0.06


def test_colours_are_the_principal_components_up_to_sign_and_range() -> None:
    tokens = RNG.normal(size=(30, 9, 6)) * [9, 5, 3, 1, 0.5, 0.1]
    colours = pca_colours(tokens)
    assert colours.shape == (30, 9, 3) and colours.min() == 0 and colours.max() == 1
    scores = PCA(3).fit_transform(tokens.reshape(-1, 6))
    for channel in range(3):
        inside = (colours[..., channel].ravel() > 0) & (colours[..., channel].ravel() < 1)
        assert inside.mean() > 0.9
        assert abs(np.corrcoef(scores[inside, channel], colours[..., channel].ravel()[inside])[0, 1]) > 0.999999
    assert np.allclose(pca_colours(tokens * 40), colours)


def test_fewer_than_three_components_leave_a_channel_dark() -> None:
    assert pca_colours(RNG.normal(size=(5, 4, 2)))[..., 2].max() == 0
