"""Settings of SRA. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from st_fast.recipe.architecture import Layer, Model
from st_fast.recipe.keys import Block, CountOrZero, Fraction, NonNegative, fixed
from st_fast.recipe.methods.base import Method, two_layers


@dataclass(frozen=True)
class SelfRepresentation(Method):
    """SRA: a deeper block of the student's weight average, which sees less noise, supervises a shallow block."""

    implementation: ClassVar[str] = "st_fast.train.supervision.sra:SelfRepresentation"
    learns_from_average: ClassVar[bool] = True
    teacher_passes: ClassVar[int] = 1

    student_depth: Block = fixed(8, "The student's block that is supervised.")
    teacher_depth: Block = fixed(20, "The average's block whose features are the target.")
    time_offset: Fraction = fixed(0.2, "The average's time is max(t − u, 0), u uniform between 0 and this.")
    loss: Literal["smooth_l1", "cosine"] = fixed("smooth_l1", "How features are compared.")
    weight: NonNegative = fixed(0.2, "λ, the weight of the feature loss.")
    decay_start: CountOrZero = fixed(0, "The step from which on the weight decays.")
    decay_steps: CountOrZero = fixed(0, "Steps in which the weight falls by a factor of ten; 0: never.")

    @property
    def tap(self) -> int:
        return self.student_depth

    @property
    def frozen_depth(self) -> int:
        return self.teacher_depth

    def factor(self, step: int) -> float:
        if self.decay_steps == 0 or step <= self.decay_start:
            return 1.0
        return float(0.1 ** ((step - self.decay_start) / self.decay_steps))

    def head_layers(self, model: Model) -> tuple[Layer, ...]:
        return two_layers("ap_head", model)

    def kept_channels(self, model: Model) -> int:
        return 7 * model.width  # the hidden layer before and after SiLU; prediction, target, gradient
