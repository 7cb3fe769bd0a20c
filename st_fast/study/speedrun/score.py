"""How samples of a task are scored: a Fréchet distance in the features of the task's own classifier."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from st_fast.core.files import BadFile
from st_fast.evaluate.classifier import Classifier, ConvNet
from st_fast.evaluate.metrics import GaussianStats, frechet
from st_fast.study.speedrun.task import CLASSIFIER, REFERENCE, Task


def load_task_classifier(path: Path, side: int, accuracy: float) -> Classifier:
    """The network whose float16 weights are at `path`, for images of `side` pixels; `BadFile` for other weights."""
    try:
        weights = {name: t.float() if t.is_floating_point() else t for name, t in load_file(path).items()}
        model = ConvNet(weights["blocks.0.0.weight"].shape[1], len(weights["head.bias"]))
        model.load_state_dict(weights)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise BadFile(f"{path}: not the weights of a classifier ({str(error).splitlines()[0]})") from None
    return Classifier(model, (side, side), accuracy, "")


@dataclass(frozen=True)
class Score:
    """Of one seed's samples."""

    distance: float
    accuracy: float
    """The share that is classified as what it was drawn for."""


class Scorer:
    """The task's classifier, with the held-out images' statistics in its features."""

    def __init__(self, task: Task) -> None:
        self.classifier = load_task_classifier(task.path(CLASSIFIER), task.side, task.accuracy)
        held = load_file(task.path(REFERENCE))
        self.reference = GaussianStats.known(held["mean"].numpy(), held["covariance"].numpy())

    @property
    def classes(self) -> int:
        """How many it tells apart."""
        return self.classifier.num_classes

    def __call__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Score:
        """Of uint8 images (n, 1 or 3, H, W) drawn for labels (n,), n more than the classifier's features."""
        distance = frechet(GaussianStats.of(self.classifier.features(images)), self.reference)
        return Score(distance, float((self.classifier.predict(images) == labels).mean()))
