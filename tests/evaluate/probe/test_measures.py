"""The measures agree with other people's programs, or with what must come out."""

import numpy as np
import pytest
from scipy.stats import ortho_group
from sklearn.decomposition import PCA
from sklearn.feature_selection import f_classif
from sklearn.linear_model import Ridge
from sklearn.preprocessing import KernelCenterer

from st_fast.evaluate.probe.measures import (
    RIDGE,
    between_classes,
    cka,
    cosine,
    explained,
    image_share,
    linear_fit,
    linear_probe,
    pca_colours,
    share,
)

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


def test_the_error_of_a_share_is_the_binomial_one_and_that_of_a_difference_is_of_the_images_that_differ() -> None:
    one, other = RNG.random(500) < 0.7, RNG.random(500) < 0.4
    a, b = share(one), share(other)
    assert a.value == one.mean()
    assert a.error == pytest.approx(np.sqrt(a.value * (1 - a.value) / 499), rel=1e-12)
    gains, losses = (one & ~other).sum(), (other & ~one).sum()
    found = a.over(b)
    assert found.value == pytest.approx((gains - losses) / 500)
    variance = (gains + losses) / 500 - found.value**2  # McNemar's
    assert found.error == pytest.approx(np.sqrt(variance / 499), rel=1e-9)
    assert a.exceeds(b) and not b.exceeds(a) and not a.exceeds(a)
    assert not share(np.ones(9, bool)).over(share(np.ones(9, bool))).above()


def test_the_error_of_a_ratio_is_that_of_drawing_the_images_again() -> None:
    total = RNG.gamma(2.0, size=300)
    left = total * RNG.uniform(0.1, 0.6, size=300)
    found = explained(left, total)
    assert found.value == pytest.approx(1 - left.sum() / total.sum())
    draws = RNG.integers(0, 300, (4_000, 300))
    again = 1 - left[draws].sum(axis=1) / total[draws].sum(axis=1)
    assert found.error == pytest.approx(again.std(), rel=0.06)
    assert np.isnan(explained(np.zeros(3), np.zeros(3)).value)


def test_what_an_image_adds_is_what_leaving_it_out_takes_away() -> None:
    total = RNG.gamma(2.0, size=300)
    left, right = total * RNG.uniform(0.1, 0.6, size=300), RNG.random(300) < 0.7
    for measure, values in ((explained, (left, total)), (share, (right,))):
        found = measure(*values)
        without = [measure(*(np.delete(one, n) for one in values)).value for n in range(300)]
        np.testing.assert_allclose(found.parts, 299 * (found.value - np.array(without)), rtol=0.05, atol=1e-9)


def test_variance_between_classes_is_that_of_the_f_statistic() -> None:
    labels = RNG.integers(0, 6, 200)
    x = RNG.normal(size=(200, 1)) * 3 + np.array([0, 1, 4, -2, 7, 0.5])[labels][:, None] + 40
    (f,), _ = f_classif(x, labels)
    eta = 5 * f / (5 * f + 194)
    assert between_classes(x, labels).value == pytest.approx(1 - (1 - eta) * 199 / 194, rel=1e-9)


def test_variance_between_classes_is_the_ratio_that_was_built_in_and_nothing_for_foreign_labels() -> None:
    labels = np.arange(3_000) % 30
    x = 2 * RNG.normal(size=(30, 5, 8))[labels] + 3 * RNG.normal(size=(3_000, 5, 8)) + RNG.normal(size=(5, 8)) * 50
    assert between_classes(x, labels).value == pytest.approx(4 / 13, abs=0.03)
    foreign = [between_classes(x[:60], RNG.integers(0, 30, 60)).value for _ in range(40)]
    assert abs(np.mean(foreign)) < 0.03
    alone = between_classes(x[:30], labels[:30])
    assert np.isnan(alone.value) and np.isnan(alone.error), "one member a class"


def test_the_images_share_is_the_ratio_that_was_built_in_whatever_the_place_and_class_add() -> None:
    labels = np.arange(2_000) % 10
    image, places = 2 * RNG.normal(size=(2_000, 4, 3)), 100 * RNG.normal(size=(4, 3))
    classes = 5 * RNG.normal(size=(10, 4, 3))[labels]
    one, other = (image + places + RNG.normal(size=image.shape) for _ in range(2))
    assert image_share(one, other).value == pytest.approx(4 / 5, abs=0.01)
    assert image_share(one + classes, other + classes).value > 0.93
    assert image_share(one + classes, other + classes, labels).value == pytest.approx(4 / 5, abs=0.01)
    assert abs(image_share(one - image, other - image).value) < 0.05
    few = np.mean(
        [image_share(one[n : n + 20], other[n : n + 20], labels[n : n + 20]).value for n in range(0, 400, 20)]
    )
    assert few == pytest.approx(4 / 5, abs=0.02), "two of each class: the means that are removed are counted"


def test_the_linear_fit_is_scikit_learns_ridge_on_standardised_features() -> None:
    features = RNG.normal(size=(90, 4, 6)) * np.logspace(-2, 3, 6) + RNG.normal(size=(4, 6)) * 9
    goals = features @ (RNG.normal(size=(6, 3)) / np.logspace(-2, 3, 6)[:, None]) + RNG.normal(size=(90, 4, 3))
    learn, test = slice(0, 60), slice(60, 90)
    shift, centre = features[learn].mean(axis=0), goals[learn].mean(axis=0)
    x = (features - shift)[learn].reshape(-1, 6)
    model = Ridge(alpha=RIDGE * len(x), fit_intercept=False)
    model.fit(x / x.std(axis=0), (goals - centre)[learn].reshape(-1, 3))
    missed = (goals - centre)[test].reshape(-1, 3) - model.predict(
        (features - shift)[test].reshape(-1, 6) / x.std(axis=0)
    )
    expected = 1 - np.square(missed).sum() / np.square((goals - centre)[test]).sum()
    found = linear_fit(features[learn], goals[learn], features[test], goals[test])
    assert found.value == pytest.approx(expected, rel=1e-6) and found.value > 0.5
    noise = RNG.normal(size=goals.shape)
    assert linear_fit(features[learn], noise[learn], features[test], noise[test]).value < 0.05
