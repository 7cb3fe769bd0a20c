"""Settings of LayerSync. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar

from st_fast.recipe.architecture import Model
from st_fast.recipe.error import wrong_value
from st_fast.recipe.keys import Block, NonNegative, fixed
from st_fast.recipe.methods.base import Method


@dataclass(frozen=True)
class LayerSync(Method):
    """A shallow block of the student is pulled towards a deeper one of the same forward pass."""

    implementation: ClassVar[str] = "st_fast.train.supervision.layer_sync:LayerSync"

    student_depth: Block = fixed(8, "The shallow block, which is supervised.")
    teacher_depth: Block = fixed(16, "The deeper block, which is the target.")
    weight: NonNegative = fixed(0.2, "λ, the weight of the feature loss.")

    @property
    def tap(self) -> tuple[int, int]:
        return self.student_depth, self.teacher_depth

    def kept_channels(self, model: Model) -> int:
        return 2 * model.width

    def check(self, stage: str) -> None:
        """A block that follows another of the same pass lies below it: from itself it would learn nothing."""
        if self.teacher_depth <= self.student_depth:
            allowed = f"a block above student_depth = {self.student_depth}"
            raise wrong_value(f"stage.{stage}.teacher_depth", self.teacher_depth, allowed)
