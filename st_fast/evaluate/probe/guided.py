"""Measures what stage 2 learns from: a teacher's features f = f_∅ + ω·(f_y − f_∅), by ω and by time.

f_y is told the label, so a classifier that names the class may have read the label off the features. Each measure of
how discriminative they are has therefore a counterpart for which the teacher is told labels drawn at random: what then
still tells the image's class comes from the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from st_fast.evaluate.probe.examine import kept_images, parts, patches
from st_fast.evaluate.probe.latents import Latents, Split
from st_fast.evaluate.probe.measures import (
    Classifier,
    Estimate,
    Floats,
    between_classes,
    image_share,
    linear_fit,
    linear_probe,
    share,
)
from st_fast.model import DiffusionTransformer

SCALES = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
"""ω: 0 is f_∅, 1 is f_y."""
MEASURES = {
    "told_true": "accuracy of a linear probe where the teacher is told the image's own class",
    "told_random": "accuracy of a linear probe on the image's class where the teacher is told a random one",
    "names_told": "share of images told another class than theirs for which that first probe names the told one",
    "names_image": "the same share for the image's own class",
    "between_pooled": "share of the variance of pooled features that lies between classes, told the image's own",
    "between_patches": "the same for every patch's features",
    "between_random": "the same for pooled features and the image's class, told a random one",
    "steady": "share of the features' variance that the image and its label decide, and not the noise",
    "steady_within": "the same within a class",
    "clean": "R² of a linear map from a patch's features to the clean latent, told the image's own class",
}
"""What each measure is, by its name in probe.json."""


@dataclass(frozen=True)
class Guide:
    """A model whose features at a block are, or could be, the target of stage 2."""

    label: str
    model: DiffusionTransformer
    block: int
    students: dict[str, float]
    """The ω of each model probed here that learnt from it at this block, by its label."""
    loaded: dict[str, object]
    """Of what was read: step, weights and their SHA-256."""


@dataclass(frozen=True)
class Guidance:
    """The MEASURES of one guide, by name, then by time, then by ω."""

    scales: list[float]
    measures: dict[str, list[list[Estimate]]] = field(default_factory=lambda: {name: [] for name in MEASURES})

    def at(self, measure: str, place: int, scale: float) -> Estimate:
        """A measure at the time of this place and one of `scales`."""
        return self.measures[measure][place][self.scales.index(scale)]


@dataclass(frozen=True)
class Pair:
    """f_∅ and f_y of the same images: pooled (n, D), and tokens of the first ones (m, N, D)."""

    pooled: tuple[Floats, Floats]
    tokens: tuple[Floats, Floats]

    def at(self, scale: float) -> tuple[Floats, Floats]:
        """f_∅ + ω·(f_y − f_∅), pooled and as tokens."""
        (a, b), (c, d) = self.pooled, self.tokens
        return a + np.float32(scale) * (b - a), c + np.float32(scale) * (d - c)


def scales_of(guides: Sequence[Guide]) -> list[float]:
    """SCALES, and those that the students used."""
    return sorted({*SCALES, *(scale for guide in guides for scale in guide.students.values())})


def guidance(guide: Guide, split: Split, times: Sequence[float], path: str, scales: Sequence[float]) -> Guidance:
    """All measures of one guide; the same latents, noise and random labels for every one."""
    found = Guidance(list(scales))
    for t in times:
        for name, values in _at_time(guide, split, t, path, scales).items():
            found.measures[name].append(values)
    return found


def _at_time(guide: Guide, split: Split, t: float, path: str, scales: Sequence[float]) -> dict[str, list[Estimate]]:
    learn, test = split.train, split.held_out
    own, image = learn.labels.numpy(), test.labels.numpy()
    told = test.random_labels(split.classes)
    true_learn, true_test = (pair(guide, part, t, path, part.labels) for part in (learn, test))
    again = pair(guide, test, t, path, test.labels, draw=1)
    random_learn = pair(guide, learn, t, path, learn.random_labels(split.classes))
    random_test, others = pair(guide, test, t, path, told), (told != test.labels).numpy()
    kept = len(true_test.tokens[0])
    goals = [patches(part.x[: kept_images(guide.model, len(part.x))], guide.model.config.patch)
             for part in (learn, test)]  # fmt: skip
    found: dict[str, list[Estimate]] = {name: [] for name in MEASURES}
    for scale in scales:
        (a, a_tokens), (b, b_tokens), (_, c_tokens) = (one.at(scale) for one in (true_learn, true_test, again))
        (d, _), (e, _) = random_learn.at(scale), random_test.at(scale)
        classify = Classifier(a, own)
        named = classify(e)[others]
        values = {
            "told_true": share(classify(b) == image),
            "told_random": linear_probe(d, own, e, image),
            "names_told": share(named == told.numpy()[others]),
            "names_image": share(named == image[others]),
            "between_pooled": between_classes(b, image),
            "between_patches": between_classes(b_tokens, image[:kept]),
            "between_random": between_classes(e, image),
            "steady": image_share(b_tokens, c_tokens),
            "steady_within": image_share(b_tokens, c_tokens, image[:kept]),
            "clean": linear_fit(a_tokens, goals[0], b_tokens, goals[1]),
        }
        for name, value in values.items():
            found[name].append(value)
    return found


@torch.no_grad()
def pair(guide: Guide, latents: Latents, t: float, path: str, labels: Tensor, draw: int = 0) -> Pair:
    """f_∅ and f_y at time t, as training computes them, told these labels (n,)."""
    model, count = guide.model, len(latents.x)
    device = model.device
    x_t, _ = latents.at(torch.full((count,), t), path, draw)
    left = kept_images(model, count)
    pooled: tuple[list[Floats], list[Floats]] = ([], [])
    tokens: tuple[list[Floats], list[Floats]] = ([], [])
    for part in parts(count, model):
        times = torch.full((len(x_t[part]),), t, device=device)
        told, null = model.guided_features(x_t[part].to(device), times, labels[part].to(device), guide.block)
        for place, stream in enumerate((null.float(), told.float())):
            pooled[place].append(stream.mean(1).cpu().numpy())
            tokens[place].append(stream[:left].cpu().numpy())
        left = max(0, left - len(times))
    both = [(np.concatenate(lists[0]), np.concatenate(lists[1])) for lists in (pooled, tokens)]
    return Pair(both[0], both[1])
