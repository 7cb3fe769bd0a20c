"""What every method's settings share, and the settings of none. Imports no torch."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

from st_fast.recipe.architecture import Layer, Model
from st_fast.recipe.error import wrong_value
from st_fast.recipe.tokens import TokenGroups

Mask = Literal["sample", "sample_mean", "released"]


@dataclass(frozen=True)
class Selection:
    """Which samples of a batch a method supervises (times inside t_range, by the meaning of mask) and its weight λ."""

    t_range: tuple[float, float]
    mask: Mask
    weight: float


EVERYWHERE = (0.0, 1.0)
"""The t-range of methods that supervise every sample."""
STOP_TIMES = (0.02, 0.1, 0.5, 0.8)
"""The times at which HASTE compares gradients, as published."""


@dataclass(frozen=True)
class Method:
    """What every method's settings share; a method that has no such key or property has no such thing."""

    implementation: ClassVar[str]
    """The class that implements it, as module:class."""
    learns_from_average: ClassVar[bool] = False
    """Whether the student's own weight average (EMA) is the teacher."""
    compares_samples: ClassVar[bool] = False
    """Whether the loss is of all pairs of the global batch, and so needs each rank's share in one pass."""
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

    @property
    def stop_below(self) -> float | Literal["off"]:
        """Supervision ends where the mean cosine of both losses' gradients is below this; "off": none is compared."""
        return "off"

    @property
    def stop_every(self) -> int:
        """Steps from one comparison of gradients to the next; there is none at step 0."""
        return 1

    @property
    def stop_times(self) -> tuple[float, ...]:
        """The times at which they are compared: those of STOP_TIMES at which there is supervision."""
        low, high = self.selection.t_range if self.selection else EVERYWHERE
        return tuple(t for t in STOP_TIMES if low <= t <= high)

    def compares(self, step: int) -> bool:
        """Whether gradients are compared before this step, counted from 0."""
        return self.stop_below != "off" and step > 0 and step % self.stop_every == 0 and self.supervises(step)

    def ending(self, step: int) -> Self:
        """The same settings with supervision that ends after `step` steps, for methods with the key `stop_step`."""
        changed: dict[str, Any] = {"stop_step": step}
        return replace(self, **changed)

    @property
    def reads_grid(self) -> bool:
        """Whether what the method does with its block needs all tokens on their grid, which a route does not leave."""
        return False

    @property
    def token_groups(self) -> TokenGroups | None:
        """The groups of the student's tokens that have times of their own; None where an image has one time."""
        return None

    @property
    def teacher_groups(self) -> TokenGroups | None:
        """The same of the tokens that the teacher, or the average, sees."""
        return None

    def supervises(self, step: int) -> bool:
        """Whether supervision lasts to this step, counted from 0."""
        return self.stop_step == 0 or step < self.stop_step

    def factor(self, step: int) -> float:
        """What the weight λ is multiplied with at a step, counted from 0."""
        return 1.0

    def network(self, model: Model) -> Model:
        """The network that a stage of this method trains: the recipe's, with what the method adds for good.

        Applied twice it adds nothing more.
        """
        return model

    def head_layers(self, model: Model) -> tuple[Layer, ...]:
        """The linear layers of the trained heads, which are dropped after training."""
        return ()

    def kept_channels(self, model: Model) -> int:
        """Channels a token of a supervised sample that are kept for the backward pass: heads, rows and target."""
        return 0

    def check(self, stage: str) -> None:
        """RecipeError where the settings of the stage of that name don't fit one another."""
        if self.stop_below != "off" and not self.stop_times:
            why = f"t_range has none of the times {', '.join(map(str, STOP_TIMES))} at which gradients are compared"
            raise wrong_value(f"stage.{stage}.stop_below", self.stop_below, '"off", or another t_range', why)


@dataclass(frozen=True)
class Plain(Method):
    """SiT as published: the denoising loss alone."""

    implementation: ClassVar[str] = "st_fast.train.supervision:Supervision"


def two_layers(name: str, model: Model) -> tuple[Layer, ...]:
    """SRA's head, a two-layer MLP on every token: D → 2D → D."""
    n, d = model.tokens, model.width
    return Layer(f"{name}.linear1", d, 2 * d, n), Layer(f"{name}.linear2", 2 * d, d, n)


def projector(name: str, model: Model, hidden: int, out: int, layers: int = 3) -> tuple[Layer, ...]:
    """An MLP on every token; with three layers it is REPA's projector."""
    sizes = pairwise((model.width, *[hidden] * (layers - 1), out))
    return tuple(Layer(f"{name}.{2 * i}", inputs, outputs, model.tokens) for i, (inputs, outputs) in enumerate(sizes))
