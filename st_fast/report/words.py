"""Numbers as text, and a sentence on each supervision method."""

import math
from collections.abc import Callable

SPACE = "\u00a0"


def count(value: float) -> str:
    """12345.6 → 12,346."""
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def percent(value: float) -> str:
    """0.9412 → 94.1 %."""
    return f"{100 * value:.1f}{SPACE}%" if math.isfinite(value) else "–"


def plain(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if not math.isfinite(value):
        return "–"
    if value != 0 and not 1e-4 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def flops(value: float) -> str:
    """1.84e15 → 1.84 PFLOP."""
    if not math.isfinite(value):
        return "–"
    for power, prefix in ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g}{SPACE}{prefix}FLOP"
    return f"{value:.3g}{SPACE}FLOP"


def duration(seconds: float) -> str:
    """200 → 3 min 20 s; the two largest units."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{seconds:.2g}{SPACE}s"
    left = round(seconds)
    parts: list[tuple[int, str]] = []
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
        if left >= size or parts:
            parts.append((left // size, unit))
            left %= size
    return SPACE.join(f"{n}{SPACE}{unit}" for n, unit in parts[:2] if n)


UNITS: dict[str, Callable[[float], str]] = {
    "steps": count, "flops": flops, "seconds": duration, "percent": percent, "number": plain,
}  # fmt: skip
"""How values of a unit are written."""

METHODS = {
    "none": ("Plain training", "The denoising task alone; the others are compared with it."),
    "velocity_head": (
        "Stage 1: early velocity head",
        "A small head has to predict the target from the features of an early block; it is dropped after training.",
    ),
    "self_transcendence": (
        "Stage 2: Self-Transcendence",
        "An early block has to predict features of a frozen earlier model: unconditional + ω × (conditional − "
        "unconditional). Sampling costs nothing extra.",
    ),
    "repa": ("REPA", "An early block has to match a frozen image encoder's features of the clean image."),
    "sra": ("SRA", "An early block has to match a later block of the model's own EMA, which sees less noise."),
    "sra2": ("SRA 2", "An early block has to give the clean latent through a small head, which is dropped afterwards."),
    "sra_dual": (
        "SRA with dual time",
        "SRA where two random groups of an image's tokens have different noise and attend to themselves alone.",
    ),
    "self_flow": (
        "Self-Flow",
        "Some tokens have more noise than others; an early block has to match a later block of the model's own EMA, "
        "which sees all of them at the lower noise.",
    ),
    "internal_guidance": (
        "Internal Guidance",
        "A second final layer on an early block predicts the same as the last one; it stays, and sampling may lead "
        "away from it.",
    ),
    "dispersive": ("Dispersive loss", "The features of a batch's samples after one block are pushed apart."),
    "layer_sync": ("LayerSync", "An early block has to point the same way as a later block of the same model."),
}
"""A title and a sentence for each supervision method."""
IREPA = "iREPA"
"""The title of REPA with another projector and another normalisation of its target."""
ROUTES = {
    "tread": (
        "TREAD",
        "Blocks in the middle run on a part of the tokens in training; the others go on behind them as they were.",
    ),
    "sprint": (
        "SPRINT",
        "Blocks in the middle run on a part of the tokens in training; behind them all are fused with the result.",
    ),
}
"""A name and a sentence for each route."""
ROUTE_RATES = {"tread": 0.5, "sprint": 0.75}
"""What route_rate = "auto" is, as `st_fast.recipe.routing` has it."""
CONTRAST = "Contrastive flow matching: the velocity is pushed away from that of another sample of the batch."
