"""Pictures of what was measured: how the step's cost grows, and each kernel and step under the device's ceilings."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import machine as results
from bench import measure as gate
from bench import step as floor
from bench.cases import TOKENS, Case, Size
from bench.goals import Content, Row
from bench.workload import Setup, make_recipe, make_stage
from st_fast.kernels import reference
from st_fast.recipe.architecture import resolve_model
from st_fast.recipe.schema import Model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {"ours": "st_fast", "plain": "published loop, plainly"}
SIZE = re.compile(r"(\w+/\d), batch (\d+)(?:, (\d+) tokens)?")
COLORS = {"plain": "#4878a8", "stage 1": "#e08a3c", "stage 2": "#5a9a5a"}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, machine: Mapping[str, Any], title: str, path: Path) -> None:
    busy = "; MACHINE BUSY: not results" if machine["load"] > results.BUSY else ""
    figure.suptitle(f"{title}: {machine['device']}, revision {machine['commit']}, {machine['date']}{busy}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def growth(content: Content, path: Path) -> bool:
    """Images/s against batch, tokens and depth, and by recipe and stage; False where nothing was measured."""
    section = content.get("sweep", {"rows": {}})
    rows = [row for row in section["rows"].values() if "images_per_s" in row]
    if not rows:
        return False
    figure = _figure(11, 7)
    (by_batch, by_tokens), (by_depth, by_recipe) = figure.subplots(2, 2)
    plain = [row for row in rows if row["stage"] == "plain"]
    for axis, key in ((by_batch, "batch"), (by_tokens, "tokens"), (by_depth, "depth")):
        chosen = series(plain, key)
        for name, label in NAMES.items():
            values = [(row[key], row["images_per_s"][name]) for row in chosen if name in row["images_per_s"]]
            if values:
                axis.plot(*zip(*values, strict=True), marker="o", label=label)
        for row in chosen:
            axis.annotate(
                f"{100 * row['mfu']['ours']:.0f} %", (row[key], row["images_per_s"]["ours"]),
                textcoords="offset points", xytext=(0, 6), ha="center", fontsize=7,
            )  # fmt: skip
        fixed = [f"{value} {name}" for name, value in _fixed(chosen, key).items()]
        axis.margins(y=0.15)
        axis.set(xlabel=key, ylabel="images/s", xscale="log", ylim=(0, None), title=", ".join(fixed))
        axis.title.set_fontsize(8)
        axis.set_xticks([row[key] for row in chosen], [str(row[key]) for row in chosen])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    if by_batch.lines:
        by_batch.legend(title="% of the matrix product rate (MFU)", fontsize=7, title_fontsize=7)
    _recipes(by_recipe, rows)
    _save(figure, section["machine"], "How the step grows", path)
    return True


def _recipes(axis: Axes, rows: list[Row]) -> None:
    """Images/s of every recipe at the batch that most of them have."""
    own = [row for row in rows if row["tokens"] == 256 and row["depth"] == own_depth(row["size"])]
    batch = _common([row["batch"] for row in own])
    bars = sorted((row for row in own if row["batch"] == batch), key=lambda row: (-_rate(row, own), row["stage"]))
    places = range(len(bars))
    axis.bar(places, [row["images_per_s"]["ours"] for row in bars], color=[COLORS[row["stage"]] for row in bars])
    for place, row in zip(places, bars, strict=True):
        rate = row["images_per_s"]["ours"]
        axis.annotate(f"{rate:.2g}", (place, rate), ha="center", va="bottom", fontsize=7)
    axis.set_xticks(list(places), [f"{row['size']}\n{row['stage']}" for row in bars], fontsize=7)
    axis.set(ylabel="images/s", title=f"every recipe, batch {batch}, 256 tokens")
    axis.title.set_fontsize(8)
    axis.margins(y=0.12)


def _rate(row: Row, rows: list[Row]) -> float:
    """The fastest of a size, by which sizes are ordered."""
    return max(other["images_per_s"]["ours"] for other in rows if other["size"] == row["size"])


def own_depth(size: str) -> int:
    """Blocks of the published size."""
    return resolve_model(Model(f"SiT-{size}")).depth


def _common(values: list[Any]) -> Any:
    """The most frequent of them; None of none."""
    return max(dict.fromkeys(values), key=values.count, default=None)


AXES = ("size", "batch", "tokens", "depth")


def series(rows: list[Row], key: str) -> list[Row]:
    """Rows that differ in `key` alone, ascending; what else they have is what most rows have."""
    for other in AXES:
        if other != key:
            common = _common([row[other] for row in rows])
            rows = [row for row in rows if row[other] == common]
    return sorted(rows, key=lambda row: row[key])


def _fixed(rows: list[Row], key: str) -> dict[str, Any]:
    names = {"size": "plain", "batch": "a step", "tokens": "tokens", "depth": "blocks"}
    return {names[other]: rows[0][other] for other in AXES if other != key} if rows else {}


class Counter(TorchDispatchMode):
    """Counts operations as eager PyTorch names them: one an element of each op's largest tensor; views and copies none.

    How many there are moves a kernel along the copy ceiling, not towards it: its share of that is one of bytes.
    """

    FREE = re.compile(r"view|reshape|expand|select|slice|transpose|permute|unbind|split|unsqueeze|squeeze|detach|clone"
                      r"|copy|empty|zeros|ones|full|alias|_to|chunk|t\.|as_strided|cat|stack|index|unfold")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.FREE.search(func.__name__):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.operations += max((tensor.numel() for tensor in tensors), default=0)
        return result


@cache
def operations_an_element(op: str) -> float:
    """Operations of an op's definition, forward and backward, an element of x."""
    case = Case(op, Size("S/2", 2, 8), torch.float32, torch.device("cpu"))
    inputs = case.inputs(0)
    with Counter() as counter:
        gate.results(case.eager, inputs)
    return counter.operations / case.elements


@cache
def update_operations() -> float:
    """Operations of the optimiser's definition for one parameter."""
    count = 4096
    tensors = [[torch.ones(count)] for _ in range(5)]
    scalar = torch.ones(())
    with Counter() as counter:
        norm = reference.grad_norm(tensors[1])
        reference.adamw_ema_(*tensors, [], scalar, norm, scalar, 0.9, 0.999, 1e-8, 0.0, 0.9999, 1.0)
    return counter.operations / count


@dataclass(frozen=True)
class Point:
    """Operations a byte moved, and the share of the ceiling there that was reached."""

    intensity: float
    share: float


def kernel_points(rows: Mapping[str, Row]) -> dict[str, Point]:
    """Each op at its largest size, forward and backward; its ceiling is the copy rate of the same rounds."""
    found: dict[str, Point] = {}
    for row in rows.values():
        both = row.get("both")
        if both and both["gb_per_s"]:
            moved = both["gb_per_s"] * 1e9 * both["ms"]["fused"] / 1e3
            found[row["op"]] = Point(_operations(row) / moved, both["of_copy_rate"])  # sizes ascend: the largest stays
    return found


def _operations(row: Row) -> float:
    if row["op"] == "adamw_ema":
        return update_operations() * resolve_model(Model(row["size"])).parameters
    name, batch, tokens = SIZE.fullmatch(row["size"]).groups()  # type: ignore[union-attr]
    size = Size(name, int(batch), int(tokens or TOKENS))
    return operations_an_element(row["op"]) * size.batch * size.tokens * size.width


def step_points(rows: Mapping[str, Row], machine: Mapping[str, Any]) -> dict[str, Point]:
    """Each step, and its matrix products alone; their ceiling is the matrix product rate.

    A step's bytes are what its products read and write, the least that it could move.
    """
    found = {}
    for row in rows.values():
        if "parts" not in row:
            continue
        setup = Setup(row["size"], row["stage"], row["batch"], torch.device(machine["kind"]), row["tokens"])
        recipe = make_recipe(setup, Path())
        products = floor.products(recipe, make_stage(setup, recipe), round(row["supervised"]))
        moved = sum(count * product.elements for product, count in products.items())
        moved *= 2 if machine["kind"] == "cuda" else 4
        part, done = row["parts"]["floor"], row["gflop_per_image"] * 1e9 * row["batch"]
        label = f"{row['size']}, {row['stage']}"
        found[label] = Point(done / moved, row["mfu"]["ours"])
        alone = part["product_flops"] / part["products"] / machine["matmul_rate"]
        found[f"{label}: its products alone"] = Point(part["product_flops"] / moved, alone)
    return found


def roofline(content: Content, path: Path) -> bool:
    """Each op and each step under the copy and matrix product ceilings; False where neither was measured."""
    machine = next((content[part]["machine"] for part in ("kernels", "step") if part in content), None)
    if machine is None:
        return False
    kernels = kernel_points(content.get("kernels", {}).get("rows", {}))
    steps = step_points(content.get("step", {}).get("rows", {}), machine)
    copy, matmul = machine["copy_rate"], machine["matmul_rate"]
    ridge = matmul / copy
    places = [point.intensity for point in (*kernels.values(), *steps.values())]
    low, high = min(*places, ridge) / 3, max(*places, ridge) * 5
    figure = _figure(9, 6)
    axis = figure.subplots()
    axis.plot([low, ridge, high], [copy * low, matmul, matmul], "k-")
    axis.annotate(f"copy rate: {copy / 1e9:,.1f} GB/s", (3 * low, 3 * copy * low), fontsize=8, ha="right",
                  xytext=(-8, 4), textcoords="offset points")  # fmt: skip
    axis.annotate(f"matrix product rate: {matmul / 1e9:,.0f} GFLOP/s", (ridge, matmul), fontsize=8, xytext=(4, 4),
                  textcoords="offset points")  # fmt: skip
    for number, (name, point) in enumerate(kernels.items()):
        _mark(axis, name, point, copy * point.intensity, marker="o", color=f"C{number}")
    for name, point in steps.items():
        color = COLORS[name.split(", ")[1].split(":")[0]]
        alone = {"markerfacecolor": "none"} if ":" in name else {}
        _mark(axis, name, point, matmul, marker="s", color=color, **alone)
    axis.set(xscale="log", yscale="log", xlabel="operations a byte moved", ylabel="operations a second")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7, loc="lower right", title="share of the ceiling", title_fontsize=7)
    _save(figure, machine, "Under the ceilings", path)
    return True


def _mark(axis: Axes, name: str, point: Point, ceiling: float, **style: Any) -> None:
    label = f"{name}: {100 * point.share:.0f} %"
    axis.plot(point.intensity, point.share * ceiling, linestyle="none", markersize=7, label=label, **style)


ALL: dict[str, Callable[[Content, Path], bool]] = {"growth": growth, "roofline": roofline}
"""By the end of the file's name."""
