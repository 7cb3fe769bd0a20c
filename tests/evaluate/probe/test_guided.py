"""Guided features are those that stage 2 learns from, and the controls see through a label that was told."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from st_fast.evaluate.probe.guided import MEASURES, SCALES, Guide, guidance, pair, scales_of
from st_fast.evaluate.probe.latents import Latents, Split
from st_fast.recipe.architecture import Model
from st_fast.study.carry_out import random_model

CLASSES = 4


@pytest.fixture(scope="module")
def split() -> Split:
    """Latents whose class moves their mean a little, so that noisy ones tell some of it."""
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(CLASSES, 2, 4, 4, generator=generator)

    def part(count: int, first: int) -> Latents:
        labels = torch.randint(CLASSES, (count,), generator=generator)
        return Latents(0.8 * means[labels] + torch.randn(count, 2, 4, 4, generator=generator), labels, first)

    return Split(part(240, 0), part(160, 240), True, "", CLASSES, torch.zeros(1, 1, 1, 1), ("a",))


class Tell:
    """A network that adds a constant for the label to what it sees of the image, and nothing for none."""

    def __init__(self, size: float, gain: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(1)
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(patch=2, tokens=4, registers=0)
        self.seen = torch.randn(8, 12, generator=generator)
        self.words = size * torch.randn(CLASSES, 1, 12, generator=generator)
        self.gain = gain

    def guided_features(self, x, t, labels, block):
        null = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2) @ self.seen
        return self.gain * null + self.words[labels], null


def measured(model, split: Split) -> dict[str, list[float]]:
    found = guidance(Guide("it", model, 3, {}, {}), split, [0.5], "linear", SCALES)
    assert set(found.measures) == set(MEASURES)
    return {name: [one.value for one in rows[0]] for name, rows in found.measures.items()}


def test_features_are_the_models_own_with_the_label_and_without(split) -> None:
    config = Model(depth=3, width=24, heads=3, patch=2, channels=2, latent_size=4, num_classes=CLASSES)
    model = random_model(config, 5).eval().requires_grad_(False)
    told = split.held_out.random_labels(CLASSES)
    found = pair(Guide("it", model, 2, {}, {}), split.held_out, 0.4, "cosine", told, draw=1)
    t = torch.full((len(told),), 0.4)
    x = split.held_out.at(t, "cosine", 1)[0]
    with torch.no_grad():
        label, null = (model(x, t, one, tap=2)[1] for one in (told, torch.full_like(told, CLASSES)))
    assert not torch.equal(x, split.held_out.at(t, "cosine")[0]) and not torch.allclose(label, null, rtol=0.01)
    for scale in (0.0, 1.0, 7.5):
        pooled, tokens = found.at(scale)
        expected = null + scale * (label - null)
        np.testing.assert_allclose(tokens, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(pooled, expected.mean(1), rtol=1e-3, atol=1e-4)


def test_a_label_that_is_only_added_is_visible_and_is_told_from_what_the_image_shows(split) -> None:
    found = measured(Tell(0.5), split)
    assert found["told_true"][-1] == 1, "the label can be read off"
    assert found["between_pooled"][-1] > 0.95 > found["between_pooled"][0]
    assert found["names_told"][-1] == 1 and found["names_image"][-1] == 0
    low, high = found["told_random"][-1], found["told_random"][0]
    assert 0.35 < low < high, "a random label only hides the image's class, but a probe learns past it"
    assert found["between_random"][-1] < found["between_random"][0]
    assert found["names_image"][0] > 0.4 > found["names_told"][0]


def test_a_label_that_is_only_added_is_steady_but_not_within_a_class(split) -> None:
    found = measured(Tell(0.5), split)
    assert found["steady"] == sorted(found["steady"]) and found["steady"][-1] > found["steady"][0] + 0.2
    assert np.ptp(found["steady_within"]) < 1e-4 and 0 < found["steady_within"][0] < 1
    seen = torch.nn.functional.unfold(split.held_out.x, 2, stride=2).transpose(1, 2) @ Tell(0.5).seen
    image, noise = float(seen.var(0).sum()), 4 * float(Tell(0.5).seen.square().sum())
    assert found["steady"][0] == pytest.approx(image / (image + noise), abs=0.05), "at t = 0.5 both weigh the same"


def test_a_network_that_only_scales_what_it_sees_is_the_same_at_every_scale(split) -> None:
    found = measured(Tell(0.0, gain=1.5), split)
    for name, values in found.items():
        assert np.ptp(values) < 0.02, name
    assert 0 < found["clean"][0] < 1


def test_random_labels_are_the_same_every_time_in_range_and_foreign_to_the_images(split) -> None:
    told = split.held_out.random_labels(CLASSES)
    assert torch.equal(told, split.held_out.random_labels(CLASSES)) and told.unique().tolist() == list(range(CLASSES))
    assert abs(float((told == split.held_out.labels).float().mean()) - 1 / CLASSES) < 0.12


def test_the_students_own_scales_are_measured_too() -> None:
    guides = [Guide("a", Tell(1.0), 1, {"x": 3.0, "y": 30.0}, {}), Guide("b", Tell(1.0), 1, {"z": 1.5}, {})]
    assert scales_of(guides) == [0, 1, 1.5, 2, 3, 5, 10, 20, 30]
