"""Our metrics of fixed features, and our FID network's features of fixed images, are torch-fidelity's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from st_fast.evaluate.inception import Inception, InceptionV3
from st_fast.evaluate.metrics import GaussianStats, InceptionScore, frechet, kernel_distance, precision_recall
from tests.golden import fidelity

KEPT = json.loads(fidelity.FILE.read_text())


@pytest.mark.parametrize("name", fidelity.CASES)
def test_every_metric_is_torch_fidelitys(name):
    real, drawn = (values.astype(np.float32) for values in fidelity.features(name))
    size = min(len(real), len(drawn))
    weights = np.exp(fidelity.logits(name))
    streamed = InceptionScore(weights.shape[1], len(weights), len(weights) // fidelity.SPLITS)
    for part in np.array_split(weights / weights.sum(axis=1, keepdims=True), 9):
        streamed.update(part)
    score, spread = streamed.read()
    precision, recall = precision_recall(real, drawn)
    found = {
        "frechet_inception_distance": frechet(GaussianStats.of(real), GaussianStats.of(drawn)),
        "kernel_inception_distance_mean": kernel_distance(real[:size], drawn[:size], 1, size)[0],
        "inception_score_mean": score,
        "inception_score_std": spread,
        "precision": precision,
        "recall": recall,
    }
    kept = KEPT[name]
    assert found == pytest.approx({key: kept[key] for key in found}, rel=1e-4)
    assert 0.02 < kept["precision"] < 0.999 and 0.02 < kept["recall"] < 0.999, "the case must be able to tell an error"


def test_the_streamed_distance_is_torch_fidelitys_too():
    real, drawn = fidelity.features("many")
    stats = GaussianStats(drawn.shape[1])
    for part in np.array_split(drawn.astype(np.float32), 7):
        stats.update(part)
    distance = frechet(stats, GaussianStats.of(real))
    assert distance == pytest.approx(KEPT["many"]["frechet_inception_distance"], rel=1e-4)


def test_the_fid_network_with_the_same_weights_is_torch_fidelitys():
    torch.set_num_threads(1)
    model = InceptionV3()
    model.load_state_dict(fidelity.weights())
    ours = Inception(model.eval(), "made up")
    for side, kept in KEPT["network"].items():
        found = ours(fidelity.images(int(side)))
        assert fidelity.shown(found.pooled, found.probabilities) == pytest.approx(kept, rel=1e-4, abs=1e-6)
