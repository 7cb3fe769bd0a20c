"""Settings of the supervision methods, by the name that a stage's `supervision` key takes. Imports no torch.

A method's code is the class named in `implementation`; it is imported only when a stage starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from st_fast.recipe.limits import Block, Count, CountOrZero, Fraction, Names, NonNegative, StageStep, TimeRange

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
    def tap(self) -> int | tuple[int, ...]:
        """The student block, counted from 1, whose output the method reads, or several; 0 where it reads none."""
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

    @property
    def learns_from_average(self) -> bool:
        """Whether the student's own weight average (EMA) is the teacher."""
        return False

    @property
    def frozen_depth(self) -> int:
        """How many blocks of the teacher, or of the average, run; 0 where there is none."""
        return 0

    @property
    def encoder_names(self) -> tuple[str, ...]:
        """The image encoders whose features are the target."""
        return ()

    @property
    def encodes_images(self) -> bool:
        """Whether they run during training on the latents' images; otherwise their features were written before."""
        return False

    @property
    def resizes_features(self) -> bool:
        """Whether features whose grid differs from the tokens' are resized."""
        return False

    @property
    def stop_step(self) -> int:
        """Supervision ends after this many steps; 0 keeps it for the whole stage."""
        return 0

    def supervises(self, step: int) -> bool:
        """Whether supervision lasts to this step, counted from 0."""
        return self.stop_step == 0 or step < self.stop_step

    def factor(self, step: int) -> float:
        """What the weight λ is multiplied with at a step, counted from 0."""
        return 1.0


EVERYWHERE = (0.0, 1.0)
"""The t-range of methods that supervise every sample."""


@dataclass(frozen=True)
class Plain(Method):
    """SiT as published: the denoising loss alone."""

    implementation: ClassVar[str] = "st_fast.train.supervision.plain:Plain"


@dataclass(frozen=True)
class VelocityHead(Method):
    """Stage 1: a head on a shallow block predicts the velocity, or the clean latent, from the tokens."""

    implementation: ClassVar[str] = "st_fast.train.supervision.velocity_head:VelocityHead"

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

    implementation: ClassVar[str] = "st_fast.train.supervision.self_transcendence:SelfTranscendence"

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

    @property
    def frozen_depth(self) -> int:
        return self.teacher_depth


@dataclass(frozen=True)
class LayerSync(Method):
    """A shallow block of the student is pulled towards a deeper one of the same forward pass."""

    implementation: ClassVar[str] = "st_fast.train.supervision.layer_sync:LayerSync"

    student_depth: Block = 8
    teacher_depth: Block = 16
    weight: NonNegative = 0.2

    @property
    def tap(self) -> tuple[int, int]:
        return self.student_depth, self.teacher_depth

    @property
    def selection(self) -> Selection:
        return Selection(EVERYWHERE, "sample", self.weight)


@dataclass(frozen=True)
class SelfRepresentation(Method):
    """SRA: a deeper block of the student's weight average, which sees less noise, supervises a shallow block."""

    implementation: ClassVar[str] = "st_fast.train.supervision.sra:SelfRepresentation"

    student_depth: Block = 8
    teacher_depth: Block = 20
    time_offset: Fraction = 0.2
    """The teacher's time is max(t − u, 0), u uniform between 0 and this."""
    loss: Literal["smooth_l1", "cosine"] = "smooth_l1"
    weight: NonNegative = 0.2
    decay_start: CountOrZero = 0
    decay_steps: CountOrZero = 0
    """From step decay_start on the weight falls by a factor of ten in this many steps; 0: never."""

    @property
    def tap(self) -> int:
        return self.student_depth

    @property
    def selection(self) -> Selection:
        return Selection(EVERYWHERE, "sample", self.weight)

    @property
    def learns_from_average(self) -> bool:
        return True

    @property
    def frozen_depth(self) -> int:
        return self.teacher_depth

    def factor(self, step: int) -> float:
        if self.decay_steps == 0 or step <= self.decay_start:
            return 1.0
        return float(0.1 ** ((step - self.decay_start) / self.decay_steps))


@dataclass(frozen=True)
class Repa(Method):
    """REPA: patch features of frozen image encoders supervise a shallow block."""

    implementation: ClassVar[str] = "st_fast.train.supervision.repa:Repa"

    encoders: Names = ("facebook/dinov2-base",)
    """Hub names or folders; with written features each as it was given to `python -m st_fast.prepare --features`."""
    depth: Block = 8
    weight: NonNegative = 0.5
    """λ of the mean over encoders."""
    hidden: Count = 2048
    interpolate: bool = False
    """Resize features whose grid differs from the tokens' (bilinear); otherwise that is an error."""
    stop_step: StageStep = 0
    """Supervision ends after this many steps (HASTE); 0 keeps it for the whole stage."""
    features: Literal["written", "live"] = "written"
    """Read as they were written beside the latents, or made while training of the latents' images (`data.images`)."""

    @property
    def tap(self) -> int:
        return self.depth

    @property
    def encoder_names(self) -> tuple[str, ...]:
        return self.encoders

    @property
    def encodes_images(self) -> bool:
        return self.features == "live"

    @property
    def resizes_features(self) -> bool:
        return self.interpolate

    @property
    def selection(self) -> Selection:
        return Selection(EVERYWHERE, "sample", self.weight)


METHODS: dict[str, type[Method]] = {
    "none": Plain,
    "velocity_head": VelocityHead,
    "self_transcendence": SelfTranscendence,
    "layer_sync": LayerSync,
    "sra": SelfRepresentation,
    "repa": Repa,
}


def supervision_name(method: Method) -> str:
    """The name that a stage's `supervision` key takes for this method; KeyError where it is not registered."""
    for name, cls in METHODS.items():
        if type(method) is cls:
            return name
    raise KeyError(f"{type(method).__name__} is not in METHODS; it has {', '.join(METHODS)}")
