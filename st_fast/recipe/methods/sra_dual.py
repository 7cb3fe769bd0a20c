"""Settings of SRA with dual time and attention separation. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from st_fast.recipe.architecture import Layer, Model
from st_fast.recipe.keys import Block, Fraction, NonNegative, Shares, fixed
from st_fast.recipe.methods.base import Method, two_layers
from st_fast.recipe.tokens import TokenGroups


@dataclass(frozen=True)
class DualTime(Method):
    """SRA with a time for each of two groups of an image's tokens, which may attend to their own group alone."""

    implementation: ClassVar[str] = "st_fast.train.supervision.sra_dual:DualTime"
    learns_from_average: ClassVar[bool] = True
    teacher_passes: ClassVar[int] = 1

    student_depth: Block = fixed(3, "The student's block that is supervised.")
    teacher_depth: Block = fixed(8, "The average's block whose features are the target.")
    groups: Shares = fixed((0.25, 0.75), "Shares of the groups, each of random tokens with a time of its own.")
    separated: bool = fixed(True, "Whether a token attends to its own group alone, in the student and in the average.")
    full_sample_prob: Fraction = fixed(0.0, "Chance of an image to be one group, with one time.")
    teacher_time: Literal["sra", "self_flow", "same"] = fixed(
        "sra", "The average's times: max(t − u, 0) in each group, the lowest of the groups' in all, or the student's."
    )
    time_offset: Fraction = fixed(0.2, 'For "sra": u is uniform between 0 and this, drawn for each group.')
    weight: NonNegative = fixed(0.5, "λ, the weight of the feature loss.")

    @property
    def tap(self) -> int:
        return self.student_depth

    @property
    def frozen_depth(self) -> int:
        return self.teacher_depth

    @property
    def token_groups(self) -> TokenGroups:
        return TokenGroups(self.groups, self.separated, self.full_sample_prob)

    @property
    def teacher_groups(self) -> TokenGroups | None:
        """None where one time serves all tokens and all attend to all."""
        return None if self.teacher_time == "self_flow" and not self.separated else self.token_groups

    def head_layers(self, model: Model) -> tuple[Layer, ...]:
        return two_layers("ap_head", model)

    def kept_channels(self, model: Model) -> int:
        return 8 * model.width  # as of SRA, and the rows, put back into the image's order
