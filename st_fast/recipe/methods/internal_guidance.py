"""Settings of Internal Guidance. Imports no torch."""

from dataclasses import dataclass, replace
from typing import ClassVar

from st_fast.recipe.architecture import INTERNAL, Model
from st_fast.recipe.keys import Block, NonNegative, fixed
from st_fast.recipe.methods.base import Method


@dataclass(frozen=True)
class InternalGuidance(Method):
    """Internal Guidance: a second final layer on a shallow block predicts the velocity, too, and stays for sampling."""

    implementation: ClassVar[str] = "st_fast.train.supervision.internal_guidance:InternalGuidance"

    depth: Block = fixed(8, "The block that the internal head reads.")
    weight: NonNegative = fixed(0.5, "λ, the weight of the internal head's loss.")
    target_guidance: NonNegative = fixed(
        0.0, "ω: the final output learns v + ω·(final − internal output), that without gradient; 0: v."
    )

    @property
    def tap(self) -> int:
        return INTERNAL

    def network(self, model: Model) -> Model:
        return replace(model, internal_head=self.depth)

    def kept_channels(self, model: Model) -> int:
        return 3 * model.patch_values  # its velocity, the target, the loss's gradient
