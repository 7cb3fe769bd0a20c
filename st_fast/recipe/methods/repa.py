"""Settings of REPA, and of iREPA, which is REPA with two other values. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from st_fast.recipe.architecture import Layer, Model
from st_fast.recipe.keys import Block, Channels, Cosine, Count, Fraction, Names, NonNegative, StageStep, fixed
from st_fast.recipe.methods.base import Method, projector

DINOV2 = {"small": (12, 384), "base": (12, 768), "large": (24, 1024), "giant": (40, 1536)}
"""(depth, width) of the published sizes."""
CONVOLUTION = "projection_layer"
"""iREPA's name of the convolution in an encoder's projector."""
KERNEL = 3
"""Side of the convolution that projects to an encoder's width."""


@dataclass(frozen=True)
class Repa(Method):
    """REPA: patch features of frozen image encoders supervise a shallow block."""

    implementation: ClassVar[str] = "st_fast.train.supervision.repa:Repa"

    encoders: Names = fixed(("facebook/dinov2-base",), "Image encoders: hub names or folders, as features name them.")
    depth: Block = fixed(8, "The student's block that is supervised.")
    weight: NonNegative = fixed(0.5, "λ, the weight of the mean over encoders of their losses.")
    hidden: Channels = fixed(2048, "Hidden channels of each encoder's projector, where that is an MLP.")
    interpolate: bool = fixed(False, "Resize features whose grid differs from the tokens' (bilinear), else an error.")
    stop_step: StageStep = fixed(0, "Supervision ends after this many steps (HASTE); 0: with the stage.")
    features: Literal["written", "live"] = fixed(
        "written", "Read features written by `st_fast.prepare --features`, or make them of `data.images` in training."
    )
    projector: Literal["mlp", "conv"] = fixed(
        "mlp", "Three linear layers on every token, or one 3 x 3 convolution on their grid (iREPA)."
    )
    target_norm: Fraction = fixed(
        0.0, "γ: features less γ times their mean over tokens, over their deviation (iREPA); 0: as they are."
    )
    stop_below: Cosine | Literal["off"] = fixed(
        "off", "Supervision ends, too, once the cosine of its gradient and the denoising loss's is below this (HASTE)."
    )
    stop_every: Count = fixed(1_000, "Steps from one such comparison to the next.")

    @property
    def tap(self) -> int:
        return self.depth

    @property
    def encodes_images(self) -> bool:
        return self.features == "live"

    @property
    def reads_grid(self) -> bool:
        return self.projector == "conv"

    def head_layers(self, model: Model) -> tuple[Layer, ...]:
        widths = enumerate(encoder_width(name, model) for name in self.encoders)
        if self.projector == "conv":
            return tuple(convolution(f"projectors.{j}.{CONVOLUTION}", model, width) for j, width in widths)
        return sum((projector(f"projectors.{j}", model, self.hidden, width) for j, width in widths), ())

    def kept_channels(self, model: Model) -> int:
        hidden = 0 if self.projector == "conv" else 4 * self.hidden
        return sum(hidden + 3 * encoder_width(name, model) for name in self.encoders)


def convolution(name: str, model: Model, out: int, kernel: int = KERNEL) -> Layer:
    """A convolution on the tokens' grid as the linear layer that it is, on each token's neighbourhood."""
    return Layer(name, kernel**2 * model.width, out, model.tokens)


def encoder_width(name: str, model: Model) -> int:
    """Channels of an image encoder's features, where its name tells; else the model's width stands for it."""
    return next((width for size, (_, width) in DINOV2.items() if size in name), model.width)


def dinov2_size(name: str) -> tuple[int, int]:
    """(depth, width) of a DINOv2 by its name, such as facebook/dinov2-base; zeros where that tells nothing."""
    return next((sizes for size, sizes in DINOV2.items() if "dinov2" in name and size in name), (0, 0))
