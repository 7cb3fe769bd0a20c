"""What each supervision method does, for a reader who never saw the paper: plain words and a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from st_fast.report.arms import Arm
from st_fast.report.collect import Record


@dataclass(frozen=True)
class Card:
    """One method: a title, the stages that used it, a paragraph, and a drawing where there is one."""

    title: str
    stages: str
    text: str
    drawing: Markup | None


def cards(arms: Sequence[Arm]) -> list[Card]:
    """One card for each method and its depths, in the order of their first use."""
    groups: dict[tuple[str, str], list[Arm]] = {}
    for arm in arms:
        card = _card(arm)
        groups.setdefault((card[0], card[1]), []).append(arm)
    return [
        Card(title, ", ".join(dict.fromkeys(a.stage.name for a in group)), text, _drawing(group[0]))
        for (title, text), group in groups.items()
    ]


def _card(arm: Arm) -> tuple[str, str]:
    entry, depth = arm.stage.entry, _depth(arm)
    method = arm.stage.method
    if method == "none":
        return "Plain training", (
            "The model sees real images mixed with noise and learns which way the image lies. Nothing else: this is "
            "the yardstick for the others."
        )
    if method == "velocity_head":
        answer = "the clean image" if entry.get("target") == "latent" else "the same answer"
        return "Stage 1: knowing early", (
            f"The usual task, and one thing more: a small helper reads block {_n(entry, 'depth')} of {depth} and has "
            f"to give {answer} already there. So the first blocks learn to see the image early. The helper is thrown "
            "away afterwards; the model serves as the teacher of stage 2."
        )
    if method == "self_transcendence":
        return "Stage 2: learning from oneself", (
            f"A new model starts from nothing. The finished model “{arm.stage.teacher}”, frozen, looks at the same "
            "noisy image twice: once told the class, once not. The difference is what the class adds. Taken at the "
            f"teacher's block {_n(entry, 'teacher_depth')} and added {_n(entry, 'cfg_scale')}-fold, it makes a target "
            f"that the new model's block {_n(entry, 'student_depth')} of {depth} has to predict beside the usual task. "
            "No outside network is involved, and drawing samples later costs nothing extra."
        )
    known = OTHERS.get(method)
    return known or (f"Method {method}", "The usual task with another kind of help; see the recipe below.")


OTHERS = {
    "repa": (
        "REPA: learning from an image encoder",
        "Beside the usual task, an early block has to match the features that a large frozen image encoder, trained "
        "elsewhere on other images, gives for the clean image.",
    ),
    "sra": (
        "SRA: learning from one's own average",
        "Beside the usual task, an early block has to match a late block of the model's own running average, which "
        "sees a slightly less noisy image.",
    ),
    "layer_sync": (
        "LayerSync: early blocks follow late ones",
        "Beside the usual task, an early block has to point the same way as a late block of the same model.",
    ),
}


def _n(entry: Record, key: str) -> str:
    value = entry.get(key)
    return f"{value:g}" if isinstance(value, int | float) else "…"


def _depth(arm: Arm) -> str:
    return _n(arm.run.recipe.get("model", {}) if isinstance(arm.run.recipe.get("model"), dict) else {}, "depth")


MOST_BLOCKS, X0, PITCH, SIZE = 12, 112, 20, 15


def _drawing(arm: Arm) -> Markup | None:
    """A row of blocks from noise to answer, with the block that is read marked; None for methods without one here."""
    entry, depth = arm.stage.entry, arm.run.recipe.get("model", {})
    total = depth.get("depth") if isinstance(depth, dict) else None
    if not isinstance(total, int) or total < 1:
        return None
    blocks = min(MOST_BLOCKS, total)
    if arm.stage.method == "velocity_head":
        return _stage_1(blocks, _place(entry.get("depth"), total))
    if arm.stage.method == "self_transcendence":
        student, teacher = (_place(entry.get(key), total) for key in ("student_depth", "teacher_depth"))
        return _stage_2(blocks, student, teacher, _n(entry, "cfg_scale"))
    return None


def _place(block: object, total: int) -> int:
    """Which of the drawn blocks, from 0, stands for a block of the network counted from 1."""
    known = block if isinstance(block, int) else 1
    drawn = min(MOST_BLOCKS, total)
    return max(0, min(drawn, round(known / total * drawn)) - 1)


def _stage_1(blocks: int, tap: int) -> Markup:
    x = X0 + PITCH * tap + SIZE / 2
    return _frame(
        112,
        "A helper reads an early block and gives the answer there already",
        [
            _row(30, blocks, tap, "noisy image", "answer"),
            Markup('<path class="flow hot-line" d="M{x} 52 V78 H{to}"/>').format(x=x, to=x + 26),
            Markup('<rect class="helper" x="{}" y="66" width="64" height="24" rx="5"/>').format(x + 26),
            _label(x + 58, 82, "helper", "middle", "in-box"),
            Markup('<path class="flow" d="M{} 78 h22"/>').format(x + 90),
            _label(x + 118, 82, "the answer, early", "start"),
        ],
    )


def _stage_2(blocks: int, student: int, teacher: int, scale: str) -> Markup:
    width = PITCH * MOST_BLOCKS - (PITCH - SIZE)
    x_t, x_s = X0 + PITCH * teacher + SIZE / 2, X0 + PITCH * student + SIZE / 2
    return _frame(
        216,
        "The frozen teacher's exaggerated features are the target of an early block of the student",
        [
            _label(2, 14, "frozen teacher, told the class and not told", "start"),
            _row(50, teacher + 1, teacher, "noisy image", ""),
            Markup('<path class="flow hot-line" d="M{x} 72 V92"/>').format(x=x_t),
            Markup('<rect class="helper" x="{}" y="92" width="{}" height="26" rx="5"/>').format(X0, width),
            _label(X0 + width / 2, 109, f"not told + {scale} × (told − not told)", "middle", "in-box"),
            Markup('<path class="flow hot-line" d="M{x} 148 V119"/>').format(x=x_s),
            _label(x_s + 9, 138, "has to predict", "start"),
            _row(170, blocks, student, "noisy image", "answer"),
            _label(2, 210, "new model, from nothing", "start"),
        ],
    )


def _row(y: float, blocks: int, marked: int, source: str, result: str) -> Markup:
    parts = [_label(2, y + 4, source, "start"), Markup('<path class="flow" d="M{} {} h12"/>').format(X0 - 17, y)]
    block = Markup('<rect class="{}" x="{}" y="{}" width="{}" height="44" rx="3"/>')
    for n in range(blocks):
        parts.append(block.format("block hot" if n == marked else "block", X0 + PITCH * n, y - 22, SIZE))
    if result:
        parts.append(Markup('<path class="flow" d="M{} {} h14"/>').format(X0 + PITCH * blocks, y))
        parts.append(_label(X0 + PITCH * blocks + 21, y + 4, result, "start"))
    return Markup("").join(parts)


def _label(x: float, y: float, text: str, anchor: str, css: str = "note") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(css, x, y, anchor, text)


def _frame(height: int, label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="drawing" viewBox="0 0 440 {}" role="img" aria-label="{}">{}</svg>').format(
        height, label, Markup("").join(parts)
    )
