"""Sample numbers, labels and starting noise, all of which follow from (seed, sample number).

Of a network that draws from text, a sample's label is the number of its prompt.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.core.files import printable
from st_fast.core.random import Purpose, normal, uniform
from st_fast.recipe.schema import Model
from st_fast.sample.prompts import Prompts

NUMBER = re.compile(r"[0-9]{1,9}")
"""A class's; other scripts' digits are no numbers here, as in a recipe."""
NAMED = 20
"""Names of classes that a line or a caption has, at most."""
NAME_MOST = 80
"""Characters of such a name, at most."""


@dataclass(frozen=True)
class Draw:
    """Samples to draw: `ordinals` (B,) int64, the counters of their noise, and `labels` (B,) int64."""

    ordinals: Tensor
    labels: Tensor
    seed: int
    prompts: Prompts | None = None
    """What the labels number; None: classes."""
    shape: tuple[int, int, int] | None = None
    """(C, H, W) of a latent; None: the model's own."""

    @property
    def condition(self) -> Tensor:
        """(B, …) what the network is given: the labels, or their prompts' states (B, L, W)."""
        return self.labels if self.prompts is None else self.prompts.states(self.labels)

    @property
    def negative(self) -> Tensor | None:
        """(B, …) what guidance leads away from; None: the network's own null condition."""
        return None if self.prompts is None else self.prompts.negative(len(self.labels))


@dataclass(frozen=True)
class Labels:
    """The label of each sample: sample i has the i-th of `cycle`, over and over, or without a cycle a random one."""

    text: str
    num_classes: int
    cycle: tuple[int, ...]


def read_labels(text: str, num_classes: int, names: Sequence[str] = ()) -> Labels:
    """ "balanced" (label i mod classes), "random", or classes such as "0,3,cat", by number or by one of `names`.

    UserError for anything else.
    """
    if text in ("random", "balanced"):
        return Labels(text, num_classes, tuple(range(num_classes)) if text == "balanced" else ())
    parts = [
        part if NUMBER.fullmatch(part) or part not in names else str(names.index(part)) for part in _parts(text, names)
    ]
    if not all(NUMBER.fullmatch(part) and int(part) < num_classes for part in parts):
        known = f" or {', '.join(map(known_as, names[:NAMED]))}{', …' * (len(names) > NAMED)}," if names else ""
        raise UserError(
            f"--labels {text}: balanced, random, or classes of 0..{num_classes - 1}{known} with commas between"
        )
    return Labels(",".join(parts), num_classes, tuple(int(part) for part in parts))


def _parts(text: str, names: Sequence[str]) -> list[str]:
    """What stands between the commas of a text, but for those within a name, of which the longest counts."""
    pieces, found, known = text.split(","), list[str](), set(names)
    commas = sorted({name.count(",") for name in names}, reverse=True)
    while pieces:
        inside = next((n for n in commas if ",".join(pieces[: n + 1]).strip() in known), 0)
        found.append(",".join(pieces[: inside + 1]).strip())
        del pieces[: inside + 1]
    return found


def known_as(name: str) -> str:
    """A class's name as a terminal shows it, cut off where it is long."""
    return printable(name[:NAME_MOST]) + "…" * (len(name) > NAME_MOST)


def names_in_turn(labels: Sequence[int], names: Sequence[str]) -> list[str]:
    """The names of labels in their order, at most NAMED and then "…"; nothing where no class has a name."""
    if not names:
        return []
    found = [known_as(names[label]) if label < len(names) else str(label) for label in labels[:NAMED]]
    return found + ["…"] * (len(labels) > NAMED)


def draw_of(
    labels: Labels, seed: int, first: int, count: int, device: torch.device, prompts: Prompts | None = None
) -> Draw:
    """Samples number first … first + count − 1."""
    ordinals = torch.arange(first, first + count, device=device)
    if labels.cycle:
        return Draw(ordinals, torch.tensor(labels.cycle, device=device)[ordinals % len(labels.cycle)], seed, prompts)
    share = uniform(seed, Purpose.SAMPLE_LABELS, ordinals)[:, 0].double()
    drawn = (share * labels.num_classes).long().clamp_max(labels.num_classes - 1)  # a float32 uniform may be 1
    return Draw(ordinals, drawn, seed, prompts)


def balanced(
    seed: int, first: int, count: int, num_classes: int, device: torch.device, prompts: Prompts | None = None
) -> Draw:
    """Samples number first … first + count − 1; sample i has label i mod num_classes."""
    return draw_of(read_labels("balanced", num_classes), seed, first, count, device, prompts)


def starting_noise(draw: Draw, config: Model) -> Tensor:
    """(B, C, H, W) float32 noise at t = 1."""
    return normal(draw.seed, Purpose.SAMPLE_NOISE, draw.ordinals, draw.shape or config.latent_shape)


def slerp(a: Tensor, b: Tensor, count: int) -> Tensor:
    """(count, C, H, W): from noise a to noise b (C, H, W) along the sphere, both ends included (Shoemake, 1985).

    Noise between two draws of a Gaussian keeps its length this way, which a straight line would shorten.
    """
    cosine = (a.flatten() @ b.flatten() / (a.norm() * b.norm())).double().clamp(-1, 1)
    angle = torch.arccos(cosine)
    shares = torch.linspace(0, 1, count, dtype=torch.float64, device=a.device)
    if angle.sin() < 1e-6:  # the same noise twice, or its negative, which no arc joins
        from_a, from_b = 1 - shares, shares
    else:
        from_a, from_b = ((1 - shares) * angle).sin() / angle.sin(), (shares * angle).sin() / angle.sin()
    return from_a.float().view(-1, 1, 1, 1) * a + from_b.float().view(-1, 1, 1, 1) * b
