"""Settings of stage 2 of Self-Transcendence. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from st_fast.recipe.architecture import Layer, Model
from st_fast.recipe.keys import (
    Block,
    Channels,
    Cosine,
    Count,
    Guidance,
    NonNegative,
    PathText,
    StageStep,
    TimeRange,
    fixed,
)
from st_fast.recipe.methods.base import Mask, Method, projector


@dataclass(frozen=True)
class SelfTranscendence(Method):
    """Stage 2: guided features of a frozen stage-1 model supervise a shallow block of a new student."""

    implementation: ClassVar[str] = "st_fast.train.supervision.self_transcendence:SelfTranscendence"
    teacher_passes: ClassVar[int] = 2  # with the label and with the null label

    teacher: PathText = fixed("", "The frozen teacher: an earlier stage, or the path of a model.")
    teacher_weights: Literal["raw", "ema"] = fixed("raw", "The teacher's raw weights or their average.")
    student_depth: Block = fixed(8, "The student's block that is supervised.")
    teacher_depth: Block = fixed(16, "The teacher's block whose features are the target.")
    cfg_scale: Guidance = fixed(30.0, "ω, the guidance of the features: f_∅ + ω·(f_y − f_∅); 1 needs no null label.")
    loss: Literal["mse", "cosine", "normalized_mse"] = fixed("mse", "How features are compared.")
    weight: NonNegative = fixed(0.5, "λ, the weight of the feature loss.")
    hidden: Channels = fixed(2048, "Hidden channels of the student's projector.")
    t_range: TimeRange = fixed((0.4, 0.7), "Times at which samples are supervised, both ends included.")
    mask: Mask = fixed("sample", "Mean over all samples, over supervised ones, or as the released code multiplies it.")
    stop_step: StageStep = fixed(0, "Supervision ends after this many steps; 0: with the stage.")
    stop_below: Cosine | Literal["off"] = fixed(
        "off", "Supervision ends, too, once the cosine of its gradient and the denoising loss's is below this (HASTE)."
    )
    stop_every: Count = fixed(1_000, "Steps from one such comparison to the next.")

    @property
    def tap(self) -> int:
        return self.student_depth

    @property
    def needs_null_class(self) -> bool:
        return self.cfg_scale != 1.0

    @property
    def frozen_depth(self) -> int:
        return self.teacher_depth

    def head_layers(self, model: Model) -> tuple[Layer, ...]:
        return projector("projectors", model, self.hidden, model.width)

    def kept_channels(self, model: Model) -> int:
        return 4 * self.hidden + 4 * model.width  # rows, both targets, the loss's gradient
