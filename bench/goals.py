"""What the project set out to reach, and what may be said of a measured figure: reached, missed, or not judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.machine import BUSY

Row = Mapping[str, Any]
Content = Mapping[str, Any]
"""A results file: {part: {"machine": …, "rows": {key: row}}}."""


def of(row: Any, *path: str) -> Any:
    """What a row has under a path of keys; None where it has nothing there."""
    for key in path:
        row = row.get(key) if isinstance(row, Mapping) else None
    return row


def every(row: Any, *path: str) -> list[Any]:
    """All that a row has under a path in which "*" is any key."""
    if not path:
        return [] if row is None else [row]
    found = row if isinstance(row, Mapping) else {}
    return [value for key in (found if path[0] == "*" else path[:1]) for value in every(found.get(key), *path[1:])]


def busy(row: Row, machine: Mapping[str, Any]) -> bool:
    """Whether other work took the machine when a row was measured: by its own load, or by that of its part."""
    return bool(row.get("load", machine.get("load", 0.0)) > BUSY)


class Figure(NamedTuple):
    """A measured value, the share of it that is noise, and whether the machine had other work."""

    value: float
    noise: float = 0.0
    busy: bool = False

    def judged(self, bound: float) -> bool:
        """Whether it tells on which side of `bound` it is: not if the machine was busy, nor nearer than its noise."""
        return not self.busy and self.noise <= abs(self.value / bound - 1)


@dataclass(frozen=True)
class Goal:
    """What every row of `part` has under `value`, a path as `every` takes it, must reach `least` or be `most` at most.

    Rows are those that have what `where` says: a value, or a tuple of allowed ones, by key; None: no such key.
    `device`: only for those whose name contains it.
    """

    kind: str
    text: str
    part: str
    where: Mapping[str, Any]
    value: tuple[str, ...]
    least: float | None = None
    most: float | None = None
    unit: str = "×"
    device: str = ""

    def applies(self, device: str) -> bool:
        """Whether it is a goal for a device of that name; "": for any that may still be measured."""
        return not device or self.device in device

    @property
    def bound(self) -> float:
        return self.least if self.least is not None else self.most or 0.0

    def figures(self, content: Content) -> list[Figure]:
        """What was measured or predicted of it by rows that are sound.

        A figure's noise is its own where a row has that, or else the row's.
        """
        section = content.get(self.part, {})
        found = []
        for row in section.get("rows", {}).values():
            if row.get("ok", True) and self._chosen(row):
                part = of(row, self.value[0])
                own = of(part, "noise_of", self.value[-1]) or of(row, "noise_of", self.value[0])
                noise = own or of(part, "noise") or row.get("noise", 0.0)
                doubted = busy(row, section.get("machine", {}))
                found += [Figure(value, noise, doubted) for value in every(row, *self.value)]
        return found

    def _chosen(self, row: Row) -> bool:
        allowed = {key: value if isinstance(value, tuple) else (value,) for key, value in self.where.items()}
        return all(row.get(key) in values for key, values in allowed.items())

    def worst(self, figures: Sequence[Figure]) -> float | None:
        """The value that decides; None of none."""
        values = [figure.value for figure in figures]
        return (min if self.least is not None else max)(values) if values else None

    def met(self, value: float) -> bool:
        """Whether such a value is on the right side of the bound."""
        return value >= self.bound if self.least is not None else value <= self.bound

    def verdict(self, figures: Sequence[Figure]) -> str:
        """Missed if one figure surely misses it; not judged if one can't be judged; reached if all surely reach it."""
        judged = [self.met(figure.value) for figure in figures if figure.judged(self.bound)]
        if not figures:
            return "not measured"
        return "**missed**" if not all(judged) else "reached" if len(judged) == len(figures) else "not judged"

    def shown(self, value: float) -> str:
        """A value in the goal's unit."""
        if self.unit == "%":
            return f"{100 * value:.0f} %" if abs(value) >= 0.1 else f"{100 * value:.1f} %"
        return f"{value:.2f}×" if self.unit == "×" else f"{value:.0f} {self.unit}"


def inputs_named(kind: str) -> str:
    """What the name of an op's row says of a kind of inputs: " by groups", " by tokens"; " rms" and whatever else."""
    return f" by {kind}" if kind in ("groups", "tokens") else f" {kind}"


NORMS = ("norm_modulate", "gate_residual_norm_modulate")
ADALN = {"op": NORMS, "kind": None}
ADALN_GROUPS = {"op": NORMS, "kind": "groups"}
"""With a modulation of each of two groups of tokens; gate_residual, alone, has its bytes as a goal."""
ADALN_RMS = {"op": NORMS, "kind": "rms"}
ADALN_XL = {**ADALN, "size": "XL/2, batch 256"}
QK_NORM_FORMS = {"op": "qk_norm", "kind": ("rms", "with rope", "rms with rope", "rope alone")}
GUIDED_S = {"op": "guided_feature_loss", "size": ("S/2, batch 8", "S/2, batch 32")}
CACHED = {"loader": ("dali", "resident"), "cache": "warm"}
"""The loaders that are offered as defaults."""


def _step(size: str, stage: str) -> dict[str, Any]:
    return {"size": size, "stage": stage, "tokens": 256}


GOALS = (
    Goal("cpu", "adaLN ops, forward + backward, against eager", "kernels", ADALN, ("both", "speedup", "eager"), 2.0),
    Goal("cpu", "adaLN ops, forward + backward, against `torch.compile`", "kernels", ADALN,
         ("both", "speedup", "compile"), 1.0),
    Goal("cpu", "gate_residual, forward + backward, share of its byte floor", "kernels",
         {"op": "gate_residual", "kind": (None, "groups")}, ("both", "of_floor"), 0.9, unit="%"),
    Goal("cpu", "adaLN ops by groups of tokens, forward + backward, against eager", "kernels", ADALN_GROUPS,
         ("both", "speedup", "eager"), 2.0),
    Goal("cpu", "the same, its time over that with one modulation a sample", "kernels",
         ADALN_GROUPS | {"op": (*NORMS, "gate_residual")},
         ("both", "times_usual"), most=1.25),
    Goal("cpu", "adaLN ops with RMSNorm, forward + backward, against eager", "kernels", ADALN_RMS,
         ("both", "speedup", "eager"), 2.0),
    Goal("cpu", "adaLN ops with RMSNorm, forward + backward, against `torch.compile`", "kernels", ADALN_RMS,
         ("both", "speedup", "compile"), 1.0),
    Goal("cpu", "qk_norm with RMSNorm or RoPE, forward + backward, against eager", "kernels", QK_NORM_FORMS,
         ("both", "speedup", "eager"), 2.0),
    Goal("cpu", "qk_norm with RMSNorm or RoPE, forward + backward, against `torch.compile`", "kernels", QK_NORM_FORMS,
         ("both", "speedup", "compile"), 1.0),
    Goal("cpu", "qk_norm with RoPE, its time over that without", "kernels",
         {"op": "qk_norm", "kind": ("with rope", "rms with rope")}, ("both", "times_usual"), most=1.1),
    Goal("cpu", "swiglu, forward + backward, against eager", "kernels", {"op": "swiglu"},
         ("both", "speedup", "eager"), 2.0),
    Goal("cpu", "swiglu, forward + backward, against `torch.compile`", "kernels", {"op": "swiglu"},
         ("both", "speedup", "compile"), 1.0),
    Goal("cpu", "guided_feature_loss at S/2, forward + backward, against eager", "kernels", GUIDED_S,
         ("both", "speedup", "eager"), 3.0),
    Goal("cpu", "adamw_ema against `AdamW(fused=True)` + clip + `_foreach_lerp_`", "kernels", {"op": "adamw_ema"},
         ("both", "speedup", "torch"), 1.25),
    Goal("cpu", "adamw_ema, share of the copy rate", "kernels", {"op": "adamw_ema"}, ("both", "of_copy_rate"), 0.85,
         unit="%"),
    Goal("cpu", "SiT-S/2, plain, its time over that of its own floor", "step", _step("S/2", "plain"),
         ("parts", "times_the_floor"), most=1.08),
    Goal("cpu", "SiT-S/2, stage 2, its time over that of its own floor", "step", _step("S/2", "stage 2"),
         ("parts", "times_the_floor"), most=1.08),
    Goal("cpu", "SiT-B/2, plain, its time over that of its own floor", "step", _step("B/2", "plain"),
         ("parts", "times_the_floor"), most=1.08),
    Goal("cpu", "SiT-B/2 with a modern block, plain, its time over that of its own floor", "step",
         _step("modern B/2", "plain"), ("parts", "times_the_floor"), most=1.08),
    Goal("cpu", "SiT-S/2, batch 8, Self-Flow's step over a plain one (FLOPs: 1.25×)", "methods", {"stage": "Self-Flow"},
         ("times_plain",), most=1.35),
    Goal("cpu", "SiT-S/2, batch 16, TREAD's step over a plain one (FLOPs: 0.69×)", "methods", {"stage": "TREAD"},
         ("times_plain",), most=0.7),
    Goal("cpu", "SiT-S/2, batch 16, SPRINT's step over a plain one (FLOPs: 0.50×)", "methods", {"stage": "SPRINT"},
         ("times_plain",), most=0.55),
    Goal("cpu", "SiT-S/2, batch 8, a step with Muon over one with AdamW (FLOPs: 1.47×)", "methods",
         {"stage": "plain, Muon", "batch": 8}, ("times_plain",), most=1.06),
    Goal("cpu", "attention within groups of 256 and 1024 tokens, forward + backward, against a mask",
         "separated attention", {}, ("speedup", "masked"), 1.0),
    Goal("cpu", "MMDiT-6/2, stage 2 in SiT's t-range, against the published loop", "step",
         _step("MMDiT-6/2", "stage 2 in range"), ("speedup", "plain"), 1.8),
    Goal("cpu", "MMDiT-6/2, stage 2 in SiT's t-range, MFU", "step", _step("MMDiT-6/2", "stage 2 in range"),
         ("mfu", "ours"), 0.8, unit="%"),
    Goal("cpu", "`make demo`, its step, beside other work, share of its fair part", "contention", {},
         ("share", "*", "st_fast"), 0.7, unit="%"),
    Goal("cpu", "the same on a quiet machine, share of what OpenMP's own settings give", "contention", {},
         ("quiet", "st_fast"), 0.98, unit="%"),
    Goal("cpu", '`make demo`, its step, against all ops set to "reference"', "demo", {}, ("speedup", "reference"), 1.0),
    Goal("cpu", "DALI and resident loader, 8×32×32, cached", "loader", {**CACHED, "shape": "8×32×32"}, ("samples/s",),
         20_000, unit="samples/s"),
    Goal("cpu", "DALI and resident loader against the published per-file loader, cached", "loader", CACHED,
         ("times per file",), 10.0),
    Goal("cpu", "SiT-S/2, sampling (Heun, guided), against the plain sampler", "sampling", {"size": "S/2"},
         ("speedup", "plain"), 1.5),
    Goal("cpu", "SiT-S/2, sampling (Heun) with Internal Guidance, its time over that without", "sampling",
         {"size": "S/2"}, ("of_unguided", "internal"), most=1.03),
    Goal("cuda", "adaLN ops at XL/2, forward, share of the copy rate", "kernels", ADALN_XL,
         ("forward", "of_copy_rate"), 0.9, unit="%"),
    Goal("cuda", "adaLN ops at XL/2, backward, share of the copy rate", "kernels", ADALN_XL,
         ("backward", "of_copy_rate"), 0.8, unit="%"),
    Goal("cuda", "adaLN ops at XL/2, backward, against `torch.compile`", "kernels", ADALN_XL,
         ("backward", "speedup", "compile"), 1.3),
    Goal("cuda", "SiT-XL/2, plain, MFU on an H100 (stretch: 70 %)", "step", _step("XL/2", "plain"), ("mfu", "ours"),
         0.57, unit="%", device="H100"),
    Goal("cuda", "SiT-XL/2, plain, on an H100", "step", _step("XL/2", "plain"), ("images_per_s", "ours"), 632,
         unit="images/s", device="H100"),
    Goal("cuda", "SiT-XL/2, plain, MFU on an H200 (stretch: 70 %)", "step", _step("XL/2", "plain"), ("mfu", "ours"),
         0.6, unit="%", device="H200"),
    Goal("cuda", "SiT-XL/2, plain, on an H200", "step", _step("XL/2", "plain"), ("images_per_s", "ours"), 666,
         unit="images/s", device="H200"),
    Goal("cuda", "SiT-XL/2, stage 2, against the published loop", "step", _step("XL/2", "stage 2"),
         ("speedup", "plain"), 3.0),
    Goal("cuda", "SiT-XL/2, stage 2, against the published loop under `torch.compile`", "step",
         _step("XL/2", "stage 2"), ("speedup", "compile"), 1.3),
    Goal("cuda", "time waited for data, share of the step", "step", _step("XL/2", "plain"), ("waited",), most=0.01,
         unit="%"),
    Goal("cuda", "first step of a warm start", "first step", {}, ("seconds", "warm", "total"), most=20, unit="s"),
)  # fmt: skip
