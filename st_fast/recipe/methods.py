"""Settings of the supervision methods, by the name that a stage's `supervision` key takes. Imports no torch.

A method's code is the class named in `implementation`; it is imported only when a stage starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from st_fast.recipe.limits import Block, Count, NonNegative, StageStep, TimeRange

Mask = Literal["sample", "sample_mean", "released"]


@dataclass(frozen=True)
class Selection:
    """Which samples of a batch a method supervises (times inside t_range, by the meaning of mask) and its weight λ."""

    t_range: tuple[float, float]
    mask: Mask
    weight: float


@dataclass(frozen=True)
class Method:
    """What every method's settings share: the class that implements it and the block it reads (0: none)."""

    implementation: ClassVar[str]

    @property
    def tap(self) -> int:
        """The student block, counted from 1, whose output is supervised; 0 where none is."""
        return 0

    @property
    def selection(self) -> Selection | None:
        """Which samples are supervised; None where none is."""
        return None

    @property
    def teacher_name(self) -> str | None:
        """The stage or path that the frozen teacher comes from; None where there is no teacher."""
        return None

    @property
    def teacher_group(self) -> Literal["raw", "ema"]:
        """Which of the teacher's weights are used."""
        return "raw"

    @property
    def needs_null_class(self) -> bool:
        """Whether the method reads predictions or features for the null label, which class dropout trains."""
        return False


@dataclass(frozen=True)
class Plain(Method):
    """SiT as published: the denoising loss alone."""

    implementation: ClassVar[str] = "st_fast.supervision.plain:Plain"


@dataclass(frozen=True)
class VelocityHead(Method):
    """Stage 1: a head on a shallow block predicts the velocity, or the clean latent, from the tokens."""

    implementation: ClassVar[str] = "st_fast.supervision.velocity_head:VelocityHead"

    depth: Block = 2
    target: Literal["velocity", "latent"] = "velocity"
    weight: NonNegative = 0.5
    hidden: Count = 2048
    t_range: TimeRange = (0.4, 0.7)
    mask: Mask = "sample"

    @property
    def tap(self) -> int:
        return self.depth

    @property
    def selection(self) -> Selection:
        return Selection(self.t_range, self.mask, self.weight)


@dataclass(frozen=True)
class SelfTranscendence(Method):
    """Stage 2: guided features of a frozen stage-1 model supervise a shallow block of a new student."""

    implementation: ClassVar[str] = "st_fast.supervision.self_transcendence:SelfTranscendence"

    teacher: str = ""
    teacher_weights: Literal["raw", "ema"] = "raw"
    student_depth: Block = 8
    teacher_depth: Block = 16
    cfg_scale: NonNegative = 30.0
    loss: Literal["mse", "cosine", "normalized_mse"] = "mse"
    weight: NonNegative = 0.5
    hidden: Count = 2048
    t_range: TimeRange = (0.4, 0.7)
    mask: Mask = "sample"
    stop_step: StageStep = 0
    """Supervision ends after this many steps; 0 keeps it for the whole stage."""

    @property
    def tap(self) -> int:
        return self.student_depth

    @property
    def selection(self) -> Selection:
        return Selection(self.t_range, self.mask, self.weight)

    @property
    def teacher_name(self) -> str | None:
        return self.teacher

    @property
    def teacher_group(self) -> Literal["raw", "ema"]:
        return self.teacher_weights

    @property
    def needs_null_class(self) -> bool:
        return self.cfg_scale != 1.0


METHODS: dict[str, type[Method]] = {
    "none": Plain,
    "velocity_head": VelocityHead,
    "self_transcendence": SelfTranscendence,
}


def supervision_name(method: Method) -> str:
    """The name that a stage's `supervision` key takes for this method; KeyError where it is not registered."""
    for name, cls in METHODS.items():
        if type(method) is cls:
            return name
    raise KeyError(f"{type(method).__name__} is not in METHODS; it has {', '.join(METHODS)}")
