"""Settings of REPA. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from st_fast.recipe.architecture import Layer, Model
from st_fast.recipe.keys import Block, Channels, Names, NonNegative, StageStep, fixed
from st_fast.recipe.methods.base import Method, projector

DINOV2 = {"small": (12, 384), "base": (12, 768), "large": (24, 1024), "giant": (40, 1536)}
"""(depth, width) of the published sizes."""


@dataclass(frozen=True)
class Repa(Method):
    """REPA: patch features of frozen image encoders supervise a shallow block."""

    implementation: ClassVar[str] = "st_fast.train.supervision.repa:Repa"

    encoders: Names = fixed(("facebook/dinov2-base",), "Image encoders: hub names or folders, as features name them.")
    depth: Block = fixed(8, "The student's block that is supervised.")
    weight: NonNegative = fixed(0.5, "λ, the weight of the mean over encoders of their losses.")
    hidden: Channels = fixed(2048, "Hidden channels of each encoder's projector.")
    interpolate: bool = fixed(False, "Resize features whose grid differs from the tokens' (bilinear), else an error.")
    stop_step: StageStep = fixed(0, "Supervision ends after this many steps (HASTE); 0: with the stage.")
    features: Literal["written", "live"] = fixed(
        "written", "Read features written by `st_fast.prepare --features`, or make them of `data.images` in training."
    )

    @property
    def tap(self) -> int:
        return self.depth

    @property
    def encodes_images(self) -> bool:
        return self.features == "live"

    def head_layers(self, model: Model) -> tuple[Layer, ...]:
        widths = enumerate(encoder_width(name, model) for name in self.encoders)
        return sum((projector(f"projectors.{j}", model, self.hidden, width) for j, width in widths), ())

    def kept_channels(self, model: Model) -> int:
        return sum(4 * self.hidden + 3 * encoder_width(name, model) for name in self.encoders)


def encoder_width(name: str, model: Model) -> int:
    """Channels of an image encoder's features, where its name tells; else the model's width stands for it."""
    return next((width for size, (_, width) in DINOV2.items() if size in name), model.width)


def dinov2_size(name: str) -> tuple[int, int]:
    """(depth, width) of a DINOv2 by its name, such as facebook/dinov2-base; zeros where that tells nothing."""
    return next((sizes for size, sizes in DINOV2.items() if "dinov2" in name and size in name), (0, 0))
