"""What the project set out to reach, and how far the measured rows are: each goal with its verdict, none left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Content = Mapping[str, Any]
"""A results file: {part: {"machine": …, "rows": {key: row}}}."""


@dataclass(frozen=True)
class Goal:
    """`value` of every row of `part` that is `chosen` must reach `least` (or stay below `most`)."""

    kind: str
    text: str
    part: str
    chosen: Callable[[Row], bool]
    value: Callable[[Row], float | None]
    least: float | None = None
    most: float | None = None
    unit: str = "×"
    device: str = ""
    """Only for devices whose name contains this."""

    def applies(self, device: str) -> bool:
        """Whether it is a goal for a device of that name; "": for any that may still be measured."""
        return not device or self.device in device

    def value_in(self, content: Content) -> float | None:
        """The worst of the chosen rows that are sound, measured or predicted; None where there is none."""
        rows = [row for row in content.get(self.part, {}).get("rows", {}).values() if row.get("ok", True)]
        values = [value for row in rows if self.chosen(row) and (value := self.value(row)) is not None]
        return (min(values) if self.least is not None else max(values)) if values else None

    def met(self, value: float) -> bool:
        """Whether such a value reaches the goal."""
        return value >= self.least if self.least is not None else value <= (self.most or 0.0)

    def shown(self, value: float) -> str:
        """A value in the goal's unit."""
        if self.unit == "%":
            return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.1f} %"
        return f"{value:.2f}×" if self.unit == "×" else f"{value:.0f} {self.unit}"


def _op(*names: str, size: str = "") -> Callable[[Row], bool]:
    return lambda row: row.get("op") in names and size in row["size"]


def _figure(phase: str, *path: str) -> Callable[[Row], float | None]:
    """A figure of an op's row, None where it has none."""

    def value(row: Row) -> float | None:
        found: Any = row.get(phase, {})
        for name in path:
            found = found.get(name) if found else None
        return found

    return value


def _step(size: str, stage: str) -> Callable[[Row], bool]:
    return lambda row: row.get("size") == size and row.get("stage") == stage and row.get("tokens") == 256


def _of(*path: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        found: Any = row
        for name in path:
            found = found.get(name) if found else None
        return found

    return value


def _loader(shape: str, cache: str) -> Callable[[Row], bool]:
    """The loaders that are offered as defaults; an empty shape means every one."""
    return lambda row: (
        row.get("loader") in ("dali", "resident") and shape in str(row.get("shape")) and row.get("cache") == cache
    )


ADALN = ("norm_modulate", "gate_residual_norm_modulate")

GOALS = (
    Goal("cpu", "adaLN ops, forward + backward, against eager", "kernels", _op(*ADALN),
         _figure("both", "speedup", "eager"), 2.0),
    Goal("cpu", "adaLN ops, forward + backward, against `torch.compile`", "kernels", _op(*ADALN),
         _figure("both", "speedup", "compile"), 1.0),
    Goal("cpu", "guided_feature_loss, forward + backward, against eager", "kernels", _op("guided_feature_loss"),
         _figure("both", "speedup", "eager"), 3.0),
    Goal("cpu", "adamw_ema against `AdamW(fused=True)` + clip + `_foreach_lerp_`", "kernels", _op("adamw_ema"),
         _figure("both", "speedup", "torch"), 1.25),
    Goal("cpu", "adamw_ema, share of the copy rate", "kernels", _op("adamw_ema"),
         _figure("both", "of_copy_rate"), 0.85, unit="%"),
    Goal("cpu", "SiT-S/2, stage 2, against the published loop", "step", _step("S/2", "stage 2"),
         _of("speedup", "plain"), 2.0),
    Goal("cpu", "SiT-S/2, plain, against the published loop", "step", _step("S/2", "plain"),
         _of("speedup", "plain"), 1.4),
    Goal("cpu", "SiT-S/2, plain, share of the sgemm rate (stretch)", "step", _step("S/2", "plain"),
         _of("mfu", "ours"), 0.8, unit="%"),
    Goal("cpu", '`make demo`, its step, against all ops set to "reference"', "demo", lambda row: True,
         _of("speedup", "reference"), 1.0),
    Goal("cpu", "DALI and resident loader, 8×32×32, cached", "loader", _loader("8×32×32", "warm"),
         _of("samples/s"), 20_000, unit="samples/s"),
    Goal("cpu", "DALI and resident loader against the published per-file loader, cached", "loader",
         _loader("", "warm"), _of("times per file"), 10.0),
    Goal("cpu", "SiT-S/2, sampling (Heun, guided), against the plain sampler", "sampling",
         lambda row: row.get("size") == "S/2", _of("speedup", "plain"), 1.5),
    Goal("cuda", "adaLN ops at XL/2, forward, share of the copy rate", "kernels", _op(*ADALN, size="XL/2, batch 256"),
         _figure("forward", "of_copy_rate"), 0.9, unit="%"),
    Goal("cuda", "adaLN ops at XL/2, backward, share of the copy rate", "kernels", _op(*ADALN, size="XL/2, batch 256"),
         _figure("backward", "of_copy_rate"), 0.8, unit="%"),
    Goal("cuda", "adaLN ops at XL/2, backward, against `torch.compile`", "kernels", _op(*ADALN, size="XL/2, batch 256"),
         _figure("backward", "speedup", "compile"), 1.3),
    Goal("cuda", "SiT-XL/2, plain, MFU on an H100 (stretch: 70 %)", "step", _step("XL/2", "plain"),
         _of("mfu", "ours"), 0.57, unit="%", device="H100"),
    Goal("cuda", "SiT-XL/2, plain, on an H100", "step", _step("XL/2", "plain"), _of("images_per_s", "ours"), 632,
         unit="images/s", device="H100"),
    Goal("cuda", "SiT-XL/2, plain, MFU on an H200 (stretch: 70 %)", "step", _step("XL/2", "plain"),
         _of("mfu", "ours"), 0.6, unit="%", device="H200"),
    Goal("cuda", "SiT-XL/2, plain, on an H200", "step", _step("XL/2", "plain"), _of("images_per_s", "ours"), 666,
         unit="images/s", device="H200"),
    Goal("cuda", "SiT-XL/2, stage 2, against the published loop", "step", _step("XL/2", "stage 2"),
         _of("speedup", "plain"), 3.0),
    Goal("cuda", "SiT-XL/2, stage 2, against the published loop under `torch.compile`", "step",
         _step("XL/2", "stage 2"), _of("speedup", "compile"), 1.3),
    Goal("cuda", "time waited for data, share of the step", "step", _step("XL/2", "plain"),
         _of("waited"), most=0.01, unit="%"),
    Goal("cuda", "first step of a warm start", "first step", lambda row: True,
         _of("seconds", "warm", "total"), most=20, unit="s"),
)  # fmt: skip
