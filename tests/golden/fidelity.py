"""Writes what torch-fidelity says of fixed features: `python -m tests.golden.fidelity` where it is installed.

It can't be a dependency of the tests (it needs torchvision, which breaks diffusers beside a CPU torch), so its answers
are kept in `fidelity.json` with its version; only the functions that take features and the network are called.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor

from st_fast.evaluate.inception import InceptionV3

FILE = Path(__file__).with_name("fidelity.json")
CASES: dict[str, tuple[int, int, int]] = {"few": (300, 420, 16), "many": (1_000, 900, 96)}
"""Real images, samples, features."""
SPLITS = 10
SIDES = (32, 256)
"""Of the images that the network is shown: both are resized."""


def features(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Real (m, F) and drawn (n, F) features like Inception's: not negative, correlated; float64."""
    real, drawn, width = CASES[name]
    rng = np.random.default_rng(len(name))
    mix = rng.normal(size=(width, width)) / np.sqrt(width)
    sets = (rng.normal(size=(count, width)) @ mix + shift for count, shift in ((real, 0.4), (drawn, 0.5)))
    first, second = (np.maximum(values, 0.0) for values in sets)
    return first, second


def logits(name: str) -> np.ndarray:
    """What the Inception Score is taken of: (n, 40), of the drawn features."""
    drawn = features(name)[1]
    return 3 * drawn @ np.random.default_rng(7).normal(size=(drawn.shape[1], 40)) / np.sqrt(drawn.shape[1])


def weights() -> dict[str, Tensor]:
    """Made-up weights of the FID network that keep its activations of ordinary size, from a seed."""
    random, state = torch.Generator().manual_seed(0), InceptionV3().state_dict()
    for name, tensor in state.items():
        if name.endswith(("running_var", "bn.weight")):
            tensor.uniform_(0.5, 1.5, generator=random)
        elif tensor.ndim > 1:
            tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5, generator=random)
        elif tensor.is_floating_point():
            tensor.uniform_(-0.1, 0.1, generator=random)
    return state


def images(side: int) -> np.ndarray:
    """uint8 (1, side, side, 3)."""
    return np.random.default_rng(side).integers(0, 256, (1, side, side, 3)).astype(np.uint8)


def shown(pooled: np.ndarray, probabilities: np.ndarray) -> list[float]:
    """A few of the network's outputs, that stand for all."""
    return [*pooled[:, ::128].ravel().tolist(), *probabilities[:, ::100].ravel().tolist()]


def without_torchvision() -> None:
    """Lets torch-fidelity be imported; of torchvision it needs nothing for what is called here."""
    for module in (
        "torchvision",
        "torchvision.datasets",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    ):
        sys.modules.setdefault(module, MagicMock())


def network() -> dict[str, list[float]]:
    """What torch-fidelity's own network says of `images`, by their side, with our made-up weights."""
    without_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.TemporaryDirectory() as folder:
        torch.save(weights(), file := Path(folder) / "weights.pth")
        wanted = ["2048", "logits_unbiased"]
        theirs = FeatureExtractorInceptionV3("fid", wanted, feature_extractor_weights_path=str(file))
    found = {}
    for side in SIDES:
        pooled, logits = theirs(torch.from_numpy(images(side)).permute(0, 3, 1, 2))
        found[str(side)] = shown(pooled.numpy(), logits.softmax(dim=1).numpy())
    return found


def answers(name: str) -> dict[str, float]:
    """torch-fidelity's numbers. KID of one subset of everything: both programs then look at the same rows."""
    without_torchvision()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, drawn = (torch.from_numpy(values) for values in features(name))
    size = min(len(real), len(drawn))
    found = fid_statistics_to_metric(fid_features_to_statistics(real), fid_features_to_statistics(drawn), False)
    found |= kid_features_to_metric(real[:size], drawn[:size], kid_subsets=1, kid_subset_size=size, verbose=False)
    found |= isc_features_to_metric(torch.from_numpy(logits(name)), SPLITS, shuffle=False)
    found |= prc_features_to_metric(drawn, real, verbose=False)
    return {key: float(value) for key, value in found.items()}


def main() -> None:
    version = importlib.metadata.version("torch-fidelity")
    found = {name: answers(name) for name in CASES}
    FILE.write_text(json.dumps({"version": version, **found, "network": network()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
