"""What a stage's checkpoint says beside its tensors: declared once, for the trainer, which writes it, and all readers.

It is foreign input, as the tensors are: `read_meta` checks types and ranges wherever a manifest is read, so that a
value which training can't have written counts as damage. A key that is absent, as in checkpoints of older versions, has
its default; a key that is unknown is a newer version's or another program's, and passed over.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from st_fast.core.files import BadFile, shown
from st_fast.core.latents import LatentSpace
from st_fast.core.machine import MOST_RANKS
from st_fast.core.options import ARCHITECTURE_MOST
from st_fast.core.records import record_from

LONGEST = 1e10
"""Seconds of training, three centuries: more than any stage has taken."""
WAYS = ("fused", "reference")
"""Of an op that a trial decides."""


@dataclass(frozen=True)
class MicroBatch:
    """The result of `optim.micro_batch = "auto"`: images of a pass on each of `ranks`; `halved` if memory ran out."""

    images: int
    ranks: int
    halved: bool = False


@dataclass(frozen=True)
class GraphChoice:
    """The result of "auto" for a stage: whether its steps are replayed as graphs on each of `ranks`."""

    used: bool
    ranks: int


@dataclass(frozen=True)
class SkippedSteps:
    """Steps of a stage whose gradients were not finite: all of them, and the last ones in a row."""

    total: int
    in_row: int


@dataclass(frozen=True)
class SpikeHistory:
    """Losses below the threshold, steps above it in a row, and the step that a spike began with."""

    usual: tuple[float, ...]
    high: int
    found: int | None


@dataclass(frozen=True)
class Guard:
    """What guards against bad steps and spikes have counted."""

    skips: SkippedSteps
    spikes: SpikeHistory
    rolled_back_at: int


@dataclass(frozen=True)
class FilesIdentity:
    """What tells whether files that have no hashes of their own were changed."""

    stat: str
    """SHA-256 of names, sizes and times of change; a copy has others."""
    content: str = ""
    """SHA-256 of what is in them; "" until it was read."""


@dataclass(frozen=True)
class Teacher:
    """What tells a teacher from others; `sha256` is of its weights."""

    path: str
    step: int
    weights: str
    sha256: str


@dataclass(frozen=True)
class Init:
    """The model that a stage started from: where it lay, its step and hash, and what was taken of it."""

    path: str
    layout: str
    step: int
    sha256: str
    weights: str
    heads: str
    fresh: tuple[str, ...]
    updates: int = 0
    """That AdamW's state, where it was taken over, had counted."""


@dataclass(frozen=True)
class Validated:
    """What a stage's validations have found so far."""

    step: int = 0
    """Of the last one; 0: there was none."""
    lowest: float | None = None
    """The lowest loss."""
    lowest_at: int = 0
    since: int = 0
    """Validations in a row since then that were not lower."""
    protocol: str = ""
    """Changes with the records, times, noise and weights that losses are taken of."""


@dataclass(frozen=True)
class Meta:
    """The metadata of a stage's checkpoint; `asdict` is what is written."""

    stage: str = ""
    recipe: str = ""
    """TOML."""
    architecture: Mapping[str, Any] | None = None
    dataset: str = "none"
    """The digest of the data's manifest."""
    files: FilesIdentity | None = None
    features: tuple[str, ...] = ()
    """A digest for each set of image features, in the recipe's order."""
    conditions: str = ""
    """The digest of what the network is conditional on, where that is not in the dataset."""
    latents: LatentSpace | None = None
    """What the model's latents are of; None in checkpoints of older versions."""
    teacher: Teacher | None = None
    seconds: float = 0.0
    """Of training."""
    rollbacks: int = 0
    guard: Guard = Guard(SkippedSteps(0, 0), SpikeHistory((), 0, None), 0)
    stopped_at: int = 0
    """The steps after which the method ended its supervision by itself; 0: it has not."""
    validated: Validated = Validated()
    init: Init | None = None
    micro_batch: MicroBatch | None = None
    kernels: Mapping[str, str] | None = None
    """By op that a trial decides, one of WAYS."""
    cuda_graphs: GraphChoice | None = None
    versions: Mapping[str, str] | None = None

    def check(self, step: int) -> None:
        """BadFile for values that no training of `step` steps has; types are checked already."""
        skips, spikes = self.guard.skips, self.guard.spikes
        chosen, graphs = self.micro_batch or MicroBatch(1, 1), self.cuda_graphs or GraphChoice(False, 1)
        bounds: list[tuple[str, float, float, float]] = [
            ("seconds", 0, self.seconds, LONGEST),
            ("rollbacks", 0, self.rollbacks, step),
            ("stopped_at", 0, self.stopped_at, step),
            ("guard: rolled_back_at", 0, self.guard.rolled_back_at, step),
            ("guard: skips: total", 0, skips.total, step),
            ("guard: skips: in_row", 0, skips.in_row, skips.total),
            ("guard: spikes: high", 0, spikes.high, step),
            ("guard: spikes: found", 1, 1 if spikes.found is None else spikes.found, max(step, 1)),
            ("guard: spikes: the number of usual losses", 0, len(spikes.usual), step),
            ("guard: spikes: usual", 0, min(spikes.usual, default=0), max(spikes.usual, default=0)),
            ("validated: step", 0, self.validated.step, step),
            ("validated: lowest_at", 0, self.validated.lowest_at, self.validated.step),
            ("validated: since", 0, self.validated.since, self.validated.step),
            ("init: updates", 0, self.init.updates if self.init else 0, 2**53),
            ("micro_batch: images", 1, chosen.images, 2**31),
            ("micro_batch: ranks", 1, chosen.ranks, MOST_RANKS),
            ("cuda_graphs: ranks", 1, graphs.ranks, MOST_RANKS),
        ]
        for name, low, value, high in bounds:
            if not low <= value <= high:
                raise BadFile(f"{name} = {value}: from {low} to {high} is possible at step {step}")
        for key, value in (self.architecture or {}).items():
            kinds = (int, float) if key == "mlp_ratio" else (int,)
            most = ARCHITECTURE_MOST.get(key)
            pair = key == "latent_size" and isinstance(value, list) and len(value) == 2  # height and width
            numbers = value if pair else [value]
            if most and not all(type(number) in kinds and 0 < number <= most for number in numbers):
                raise BadFile(f"architecture: {key} = {shown(value)}: a number above 0 and at most {most} is possible")
            if key == "qk_norm" and value != "rms" and type(value) is not bool:
                raise BadFile(f"architecture: qk_norm = {shown(value)}: true, false or 'rms' is needed")
        for op, way in (self.kernels or {}).items():
            if way not in WAYS:
                raise BadFile(f"kernels: {shown(op)} = {shown(way)}: one of {', '.join(WAYS)}")


def read_meta(value: Mapping[str, Any], step: int, where: str) -> Meta:
    """A checkpoint's metadata out of its manifest; `BadFile`, which begins with `where`, if it is malformed."""
    if "rollbacks" in value and "seconds" not in value:  # every version of the trainer wrote both
        raise BadFile(f"{where}: the field seconds is missing")
    meta = record_from(Meta, value, where, strict=False)
    try:
        meta.check(step)
    except BadFile as error:
        raise BadFile(f"{where}: {error}") from None
    return meta
