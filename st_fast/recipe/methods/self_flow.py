"""Settings of Self-Flow. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar

from st_fast.recipe.architecture import Layer, Model
from st_fast.recipe.keys import BetweenZeroAndOne, Block, NonNegative, fixed
from st_fast.recipe.methods.base import Method, two_layers
from st_fast.recipe.tokens import TokenGroups


@dataclass(frozen=True)
class SelfFlow(Method):
    """Self-Flow: tokens of one image have two times; a deeper block of the average, at the lower one, supervises."""

    implementation: ClassVar[str] = "st_fast.train.supervision.self_flow:SelfFlow"
    learns_from_average: ClassVar[bool] = True
    teacher_passes: ClassVar[int] = 1

    mask_ratio: BetweenZeroAndOne = fixed(0.25, "Share of the tokens, any of them, that have the second time.")
    student_depth: Block = fixed(8, "The student's block that is supervised.")
    teacher_depth: Block = fixed(20, "The average's block whose features are the target.")
    weight: NonNegative = fixed(0.8, "γ, the weight of the feature loss.")

    @property
    def tap(self) -> int:
        return self.student_depth

    @property
    def frozen_depth(self) -> int:
        return self.teacher_depth

    @property
    def token_groups(self) -> TokenGroups:
        return TokenGroups((1 - self.mask_ratio, self.mask_ratio))

    def head_layers(self, model: Model) -> tuple[Layer, ...]:
        return two_layers("projector", model)

    def kept_channels(self, model: Model) -> int:
        return 8 * model.width  # as of SRA, and the rows, put back into the image's order
