"""Settings of stage 1 of Self-Transcendence. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from st_fast.recipe.architecture import Layer, Model
from st_fast.recipe.keys import Block, Channels, NonNegative, TimeRange, fixed
from st_fast.recipe.methods.base import Mask, Method, projector


@dataclass(frozen=True)
class VelocityHead(Method):
    """Stage 1: a head on a shallow block predicts the velocity, or the clean latent, from the tokens."""

    implementation: ClassVar[str] = "st_fast.train.supervision.velocity_head:VelocityHead"

    depth: Block = fixed(2, "The student's block that the head reads.")
    target: Literal["velocity", "latent"] = fixed("velocity", "Velocity (released code) or clean latent (paper).")
    weight: NonNegative = fixed(0.5, "λ, the weight of the head's loss.")
    hidden: Channels = fixed(2048, "Hidden channels of the head's MLP.")
    t_range: TimeRange = fixed((0.4, 0.7), "Times at which samples are supervised, both ends included.")
    mask: Mask = fixed("sample", "Mean over all samples, over supervised ones, or as the released code multiplies it.")

    @property
    def tap(self) -> int:
        return self.depth

    def head_layers(self, model: Model) -> tuple[Layer, ...]:
        final = Layer("projectors_final.linear", model.width, model.patch_values, model.tokens)
        return *projector("projectors", model, self.hidden, model.width), final

    def kept_channels(self, model: Model) -> int:
        return 4 * self.hidden + 3 * model.width  # rows, LayerNorm's input and output
