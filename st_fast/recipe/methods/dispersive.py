"""Settings of Dispersive loss. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar

from st_fast.recipe.architecture import Model
from st_fast.recipe.keys import Block, NonNegative, Positive, fixed
from st_fast.recipe.methods.base import Method


@dataclass(frozen=True)
class Dispersive(Method):
    """Dispersive loss: the streams of a batch's samples after one block are pushed apart, all pairs of them."""

    implementation: ClassVar[str] = "st_fast.train.supervision.dispersive:Dispersive"
    compares_samples: ClassVar[bool] = True

    depth: Block = fixed(8, "The student's block after which samples are pushed apart; released: the last one.")
    weight: NonNegative = fixed(0.5, "λ, the weight of log mean exp(−‖z_i − z_j‖²/(d·τ)); released: 0.25.")
    temperature: Positive = fixed(0.5, "τ; released: 1.")

    @property
    def tap(self) -> int:
        return self.depth

    @property
    def reads_grid(self) -> bool:
        """Samples are compared token by token, and within a route each keeps others."""
        return True

    def kept_channels(self, model: Model) -> int:
        """The rank's own tokens in float32, centred, and everyone's where there is one rank; others' come on top."""
        return 4 * model.width
