"""Settings of SRA 2. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar

from st_fast.recipe.architecture import Layer, Model
from st_fast.recipe.keys import Block, Channels, NonNegative, fixed
from st_fast.recipe.methods.base import Method, projector

LAYERS = 5
"""Linear layers of the head."""


@dataclass(frozen=True)
class Sra2(Method):
    """SRA 2: a head on a shallow block has to give the clean latent, which the data has anyway; no teacher."""

    implementation: ClassVar[str] = "st_fast.train.supervision.sra2:Sra2"

    depth: Block = fixed(8, "The student's block that the head reads.")
    weight: NonNegative = fixed(1.0, "λ, the weight of the head's loss.")
    hidden: Channels = fixed(2304, "Hidden channels of the head's MLP of 5 layers.")

    @property
    def tap(self) -> int:
        return self.depth

    def head_layers(self, model: Model) -> tuple[Layer, ...]:
        return projector("projector", model, self.hidden, model.patch_values, LAYERS)

    def kept_channels(self, model: Model) -> int:
        return 2 * (LAYERS - 1) * self.hidden + 3 * model.patch_values  # prediction, target, gradient
