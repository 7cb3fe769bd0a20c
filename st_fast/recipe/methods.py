"""Settings of the supervision methods, by the name that a stage's `supervision` key takes. Imports no torch.

A method's code is the class named in `implementation`; it is imported only when a stage starts. What a method costs is
declared here, too: its heads' linear layers, its teacher's passes and the activations that it keeps (see `cost`).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from st_fast.recipe.architecture import Layer, Model
from st_fast.recipe.error import wrong_value
from st_fast.recipe.keys import (
    Block,
    Channels,
    CountOrZero,
    Fraction,
    Guidance,
    Names,
    NonNegative,
    PathText,
    StageStep,
    TimeRange,
    fixed,
)

Mask = Literal["sample", "sample_mean", "released"]


@dataclass(frozen=True)
class Selection:
    """Which samples of a batch a method supervises (times inside t_range, by the meaning of mask) and its weight λ."""

    t_range: tuple[float, float]
    mask: Mask
    weight: float


EVERYWHERE = (0.0, 1.0)
"""The t-range of methods that supervise every sample."""

DINOV2 = {"small": (12, 384), "base": (12, 768), "large": (24, 1024), "giant": (40, 1536)}
"""(depth, width) of the published sizes."""


@dataclass(frozen=True)
class Method:
    """What every method's settings share; a method that has no such key or property has no such thing."""

    implementation: ClassVar[str]
    """The class that implements it, as module:class."""
    learns_from_average: ClassVar[bool] = False
    """Whether the student's own weight average (EMA) is the teacher."""
    teacher_passes: ClassVar[int] = 0
    """How often the teacher, or the average, runs for a supervised sample."""

    @property
    def tap(self) -> int | tuple[int, ...]:
        """The student block, counted from 1, whose output the method reads, or several; 0 where it reads none."""
        return 0

    @property
    def selection(self) -> Selection | None:
        """Which samples are supervised, by the keys t_range, mask and weight; None for a method without a weight."""
        if not hasattr(self, "weight"):
            return None
        return Selection(getattr(self, "t_range", EVERYWHERE), getattr(self, "mask", "sample"), self.weight)

    @property
    def teacher_name(self) -> str | None:
        """The stage or path that the frozen teacher comes from, the key `teacher`; None where there is no teacher."""
        return getattr(self, "teacher", None)

    @property
    def teacher_group(self) -> Literal["raw", "ema"]:
        """Which of the teacher's weights are used, the key `teacher_weights`."""
        return getattr(self, "teacher_weights", "raw")

    @property
    def needs_null_class(self) -> bool:
        """Whether the method reads predictions or features for the null label, which class dropout trains."""
        return False

    @property
    def frozen_depth(self) -> int:
        """How many of its blocks run."""
        return 0

    @property
    def encoder_names(self) -> tuple[str, ...]:
        """The image encoders whose features are the target, the key `encoders`."""
        return getattr(self, "encoders", ())

    @property
    def encodes_images(self) -> bool:
        """Whether they run during training on the latents' images; otherwise their features were written before."""
        return False

    @property
    def resizes_features(self) -> bool:
        """Whether features whose grid differs from the tokens' are resized, the key `interpolate`."""
        return getattr(self, "interpolate", False)

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

    def head_layers(self, model: Model) -> tuple[Layer, ...]:
        """The linear layers of the trained heads, which are dropped after training."""
        return ()

    def kept_channels(self, model: Model) -> int:
        """Channels a token of a supervised sample that are kept for the backward pass: heads, rows and target."""
        return 0

    def check(self, stage: str) -> None:
        """RecipeError where the settings of the stage of that name don't fit one another."""


@dataclass(frozen=True)
class Plain(Method):
    """SiT as published: the denoising loss alone."""

    implementation: ClassVar[str] = "st_fast.train.supervision:Supervision"


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
        n, d = model.tokens, model.width
        return Layer("ap_head.linear1", d, 2 * d, n), Layer("ap_head.linear2", 2 * d, d, n)

    def kept_channels(self, model: Model) -> int:
        return 7 * model.width  # the hidden layer before and after SiLU; prediction, target, gradient


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


def projector(name: str, model: Model, hidden: int, out: int) -> tuple[Layer, ...]:
    """REPA's projector, a three-layer MLP on every token."""
    sizes = ((model.width, hidden), (hidden, hidden), (hidden, out))
    return tuple(Layer(f"{name}.{2 * i}", inputs, outputs, model.tokens) for i, (inputs, outputs) in enumerate(sizes))


def encoder_width(name: str, model: Model) -> int:
    """Channels of an image encoder's features, where its name tells; else the model's width stands for it."""
    return next((width for size, (_, width) in DINOV2.items() if size in name), model.width)


def dinov2_size(name: str) -> tuple[int, int]:
    """(depth, width) of a DINOv2 by its name, such as facebook/dinov2-base; zeros where that tells nothing."""
    return next((sizes for size, sizes in DINOV2.items() if "dinov2" in name and size in name), (0, 0))
