"""Pictures of what was measured: how the step's cost grows, and each kernel and step under the device's ceilings."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench import machine as store
from bench import measure
from bench.goals import Content, Row, busy
from bench.ops import TOKENS, Case, Size
from bench.step import products
from bench.workload import Setup, make_recipe, make_stage
from st_fast.kernels import reference
from st_fast.recipe.architecture import resolve_model
from st_fast.recipe.schema import Model
from st_fast.report import plot
from st_fast.report.figures import Bar, Bars, Chart, Curve

SIZE = re.compile(r"(\w+/\d), batch (\d+)(?:, (\d+) tokens)?")
AXES = {"size": "plain", "batch": "a step", "tokens": "tokens", "depth": "blocks"}
"""What tells one plain step of the sweep from another, and the word after its value."""
Machine = Mapping[str, Any]


def file(results: Path, name: str) -> Path:
    """Where the picture of a results file is: beside it."""
    return results.with_name(f"{results.stem}-{name}.png")


def draw(results: Path) -> list[Path]:
    """Draws the pictures that a results file has figures for, beside it."""
    content, drawn = store.load(results), []
    for name, (title, picture) in ALL.items():
        with rc_context(plot.STYLE):
            canvas = Canvas(figsize=(9, 6), layout="constrained")
            machine = picture(content, canvas)
            if machine:
                doubt = "; BUSY MACHINE: not judged" if busy({}, machine) else ""
                canvas.suptitle(
                    f"{title}: {machine['device']}, revision {machine['commit']}, {machine['date']}{doubt}", fontsize=10
                )
                plot.save(canvas, file(results, name))
                drawn.append(file(results, name))
    return drawn


def growth(content: Content, canvas: Canvas) -> Machine | None:
    """Images/s against batch, tokens and depth, and by recipe and stage; None where nothing was measured."""
    section = content.get("sweep", {"rows": {}})
    rows = [row for row in section["rows"].values() if "images_per_s" in row]
    if not rows:
        return None
    *grid, last = canvas.subplots(2, 2).flat
    for axes, key in zip(grid, ("batch", "tokens", "depth"), strict=True):
        chosen = series([row for row in rows if row["stage"] == "plain"], key)
        if not chosen:
            axes.set_axis_off()
            continue
        curves = []
        for colour, (name, label) in enumerate((("ours", "st_fast"), ("plain", "published loop"))):
            known = [row for row in chosen if name in row["images_per_s"]]
            if known:
                x, y = [float(row[key]) for row in known], [row["images_per_s"][name] for row in known]
                curves.append(Curve(label, x, y, colour))
        title = ", ".join(f"{chosen[0][other]} {word}" for other, word in AXES.items() if other != key)
        plot.chart(axes, Chart(key, title, "", key, "number", "images/s (with MFU)", "number", False, curves))
        axes.set(xscale="log", title=title, ylim=(0, 1.08 * axes.get_ylim()[1]))
        axes.set_xticks([row[key] for row in chosen], [str(row[key]) for row in chosen])
        axes.minorticks_off()
        for row in chosen:
            place = row[key], row["images_per_s"]["ours"]
            share = f"{100 * row['mfu']['ours']:.0f} %"
            axes.annotate(share, place, (0, 6), textcoords="offset points", ha="center", fontsize=7)
        if len(curves) > 1:
            axes.legend()
    bars = recipes(rows)
    plot.bars(last, bars)
    last.set_title(bars.title)
    return section["machine"]


def recipes(rows: Sequence[Row]) -> Bars:
    """Images/s of every recipe at the batch that most of them have, the fastest size first."""
    own = [row for row in rows if row["tokens"] == 256 and row["depth"] == _model(row["size"]).depth]
    batch = _common([row["batch"] for row in own])
    own = [row for row in own if row["batch"] == batch]
    fastest = {row["size"]: max(o["images_per_s"]["ours"] for o in own if o["size"] == row["size"]) for row in own}
    own.sort(key=lambda row: (-fastest[row["size"]], row["stage"]))
    bars = [Bar(f"{row['size']}, {row['stage']}", [row["images_per_s"]["ours"]], True) for row in own]
    return Bars("recipes", f"every recipe, batch {batch}, 256 tokens", "", "number", ("images/s",), bars)


def _model(size: str) -> Model:
    return resolve_model(Model(f"SiT-{size.removeprefix('SiT-')}"))


def _common(values: Sequence[Any]) -> Any:
    """The most frequent of them; None of none."""
    return max(dict.fromkeys(values), key=values.count, default=None)


def series(rows: Sequence[Row], key: str) -> list[Row]:
    """Rows that differ in `key` alone, ascending; what else they have is what most rows have."""
    for other in AXES:
        if other != key:
            common = _common([row[other] for row in rows])
            rows = [row for row in rows if row[other] == common]
    return sorted(rows, key=lambda row: row[key])


class Counter(TorchDispatchMode):
    """Counts operations: a product's own, else one an element of each op's largest tensor; views and copies none.

    How many there are moves a kernel along the copy ceiling, not towards it: its share of that is one of bytes.
    """

    FREE = re.compile(r"view|reshape|expand|select|slice|transpose|permute|unbind|split|unsqueeze|squeeze|detach|clone"
                      r"|copy|empty|zeros|ones|full|alias|_to|chunk|t\.|as_strided|cat|stack|index|unfold")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            self.operations += formula(*args, **(kwargs or {}), out_val=result)
        elif not self.FREE.search(func.__name__):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.operations += max((tensor.numel() for tensor in tensors), default=0)
        return result


@cache
def operations_an_element(op: str, size: str) -> float:
    """Operations of an op's definition, forward and backward, an element of x ("S/2" wide); a parameter of AdamW's."""
    with Counter() as counter:
        if op == "adamw_ema":
            tensors: Any = [[torch.ones(4096)] for _ in range(5)]
            scalar = torch.ones(())
            counter.operations = 0
            norm = reference.grad_norm(tensors[1])
            reference.adamw_ema_(*tensors, [], scalar, norm, scalar, 0.9, 0.999, 1e-8, 0.0, 0.9999, 1.0)
            return counter.operations / 4096
        case = Case(op, Size(size, 2, 8), torch.float32, torch.device("cpu"))
        inputs = case.inputs(0)
        counter.operations = 0
        measure.results(case.eager, inputs)
        return counter.operations / (2 * 8 * case.size.width)


FILLED: tuple[Literal["full", "left", "none"], ...] = ("full", "left", "none")
"""How marks of one colour are told apart."""


class Point(NamedTuple):
    """Operations a byte moved, and the share of the ceiling there that was reached."""

    intensity: float
    share: float


def kernel_points(rows: Mapping[str, Row], machine: Machine) -> dict[str, Point]:
    """Each op in its usual form at its largest size, both passes; the copy ceiling is that of the same rounds."""
    found: dict[str, Point] = {}
    for row in rows.values():
        both = row.get("both")
        if both and both["gb_per_s"] and not {"form", "kind"} & {*row}:
            seconds = both["ms"]["fused"] / 1e3
            operations = operations_an_element(row["op"], row["size"].split(",")[0]) * _elements(row)
            point = Point(operations / (both["gb_per_s"] * 1e9 * seconds), both["of_copy_rate"])
            if point.intensity > machine["matmul_rate"] / machine["copy_rate"]:
                point = point._replace(share=operations / seconds / machine["matmul_rate"])
            found[row["op"]] = point  # sizes ascend: the largest stays
    return found


def _elements(row: Row) -> float:
    size = SIZE.fullmatch(row["size"])
    if size is None:  # the optimiser's
        return _model(row["size"]).parameters
    return int(size[2]) * int(size[3] or TOKENS) * _model(size[1]).width


def step_points(rows: Mapping[str, Row], machine: Machine) -> dict[str, Point]:
    """Each step, and its matrix products alone; their ceiling is the matrix product rate.

    A step's bytes are what its products read and write, the least that it could move.
    """
    found = {}
    for row in (row for row in rows.values() if "parts" in row):
        setup = Setup(row["size"], row["stage"], row["batch"], torch.device(machine["kind"]), row["tokens"])
        recipe = make_recipe(setup, Path())
        sizes = products(recipe, make_stage(setup, recipe), round(row["supervised"]))
        moved = sum(count * size.elements for size, count in sizes.items()) * (2 if machine["kind"] == "cuda" else 4)
        floor, label = row["parts"]["floor"], f"{row['size']}, {row['stage']}"
        found[label] = Point(row["gflop_per_image"] * 1e9 * row["batch"] / moved, row["mfu"]["ours"])
        alone = floor["product_flops"] / floor["products"] / machine["matmul_rate"]
        found[f"{label}: its products alone"] = Point(floor["product_flops"] / moved, alone)
    return found


def roofline(content: Content, canvas: Canvas) -> Machine | None:
    """Each op and each step under the copy and matrix product ceilings; None where neither was measured."""
    machine: Machine | None = next((content[part]["machine"] for part in ("kernels", "step") if part in content), None)
    if machine is None:
        return None
    kernels = kernel_points(content.get("kernels", {}).get("rows", {}), machine)
    points = kernels | step_points(content.get("step", {}).get("rows", {}), machine)
    copy, matmul = machine["copy_rate"], machine["matmul_rate"]
    ridge = matmul / copy
    low, high = (f(ridge, *(point.intensity for point in points.values())) for f in (min, max))
    axes = canvas.subplots()
    axes.plot([low / 2, ridge, 2 * high], [copy * low / 2, matmul, matmul], color=plot.INK)
    labels = (f"copies {copy / 1e9:,.1f} GB/s", low / 2, -4), (f"multiplies {matmul / 1e9:,.0f} GFLOP/s", ridge, 5)
    for text, place, above in labels:
        axes.annotate(text, (place, copy * place), (8, above), textcoords="offset points", color=plot.SOFT)
    for number, (name, point) in enumerate(points.items()):
        attained = point.share * min(copy * point.intensity, matmul)
        axes.plot(
            point.intensity, attained, "o" if name in kernels else "s", markersize=7, linestyle="none",
            color=plot.COLOURS[number % len(plot.COLOURS)], label=f"{name}: {100 * point.share:.0f} %",
            fillstyle=FILLED[number // len(plot.COLOURS) % len(FILLED)],
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations a byte moved", ylabel="operations a second")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    canvas.legend(loc="outside right center", title="share of the ceiling")
    return machine


ALL: dict[str, tuple[str, Callable[[Content, Canvas], Machine | None]]] = {
    "growth": ("How the step grows", growth),
    "roofline": ("Kernels and steps under the device's ceilings", roofline),
}
"""By the end of the file's name: the title, and what draws it on a canvas and returns what it was measured on."""
