"""Predicts a step's time on a GPU that is not here, part by part, and shows what was measured beside it.

    python -m bench.predict            SiT-XL/2 and B/2, all stages, batch 256
    python -m bench.predict --write    also bench/results/prediction.json, for the README's goals, and the tables into
                                       bench/GPU-DAY.md

FLOPs, bytes and launches are counted from the step's own code (`bench.counting`). What a device does with them is
assumed by `DEVICES` and `ASSUMPTIONS`, each with its reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bench import counting, machine
from bench.counting import CUDA, LATENT_SCALE, META, CompiledModule, Counter, Kernel, attend_as_cudnn, moments_shape
from bench.goals import Figure, Row, busy
from bench.published import PlainLoop
from bench.report import PREDICTION, write_blocks
from bench.tables import Columns, milliseconds, ratio, share, table
from bench.workload import STAGES, Setup
from st_fast import kernels
from st_fast.model import SiT
from st_fast.recipe import cost
from st_fast.train import supervision
from st_fast.train.supervision import Parts


@dataclass(frozen=True)
class Rates:
    """What a device does at best."""

    name: str
    """Part of the name that the device gives itself."""
    copy: float
    """Bytes a second, read and written, of a copy that is larger than the caches."""
    matmul: float
    """FLOP a second of an 8192³ product in bf16 on random data."""
    gib: float
    """Memory that PyTorch sees."""


DEVICES = (Rates("H100", 3.0e12, 790e12, 79.1), Rates("H200", 4.3e12, 790e12, 139.8))
"""Rates and memory were measured on such machines (H100 80 GB HBM3; H200), before any of this code ran on one."""

ASSUMPTIONS = {
    # Of the matmul rate. A step's products are 1,152 to 6,912 wide, so that tiles and waves do not come out even, and a
    # third of them sum over all tokens: 8192³ has neither.
    "product share": 0.78,
    # Of what a product reaches in bf16: the tensor cores' peak in TF32 is half of that in bf16 (NVIDIA's data sheets).
    "float32 share": 0.5,
    # Of the matmul rate, about 250 TFLOP/s, its recomputed scores counted. At 256 tokens a head has two tiles, and 72
    # channels fill a tile of 128 by half; published kernels reach two to three times that on long sequences.
    "attention share": 0.32,
    # Of what attention reaches in bf16: PyTorch's memory-efficient kernel is all that takes float32.
    "attention float32 share": 0.25,
    # Of the copy rate, for kernels that only move data: a copy is the ceiling, several streams of rows come near it. 85
    # to 90 % is what fused norms reach in other projects.
    "memory share": 0.88,
    # Of the time that an epilogue's further tensor takes in memory, what the product does not hide: Hopper's
    # persistent kernels write a tile while they multiply the next, but a sum of 1,152 terms is short. Without such a
    # tensor nothing of GELU shows: 0.234 → 0.189 ms on a B200 at 8192×2048×8192 (sgl-project/sglang#28168).
    "shown of an epilogue": 0.5,
    # The optimiser reads and writes long vectors alone.
    "memory share of optimiser": 0.95,
    # That a launch adds with a full queue: start, first loads, tail. 2 to 4 µs on Hopper.
    "gap, µs": 3.0,
}


REMEDIES = {
    "q and k token-major, v left in place": ("--kernels.qk_norm=heads",),
    "bias gradients in the kernels that make the gradients": ("--kernels.bias_gradients=reference",),
    "GELU in the matrix products": ("--kernels.gelu_mlp=reference",),
    "noise and latents in one kernel": ("--kernels.noisy_latents=reference",),
}
"""What takes a cost out of the step, and the options of a step without it."""
ALL = "all of these"
GAPS = "gaps between kernels"
SHORT = 1.15
"""Measured time over predicted time from which on a family is called short of its prediction."""
LEAST = 0.01
"""Of the step: families below that are shown and not judged."""

RIVALS = {"plain": False, "compile": True}
"""The published loop, eager and with its blocks compiled, as `bench.step` names them."""


CASTS: dict[Any, torch.dtype] = {
    F.linear: torch.bfloat16,
    F.conv2d: torch.bfloat16,
    F.scaled_dot_product_attention: torch.bfloat16,
    F.layer_norm: torch.float32,
}
"""What CUDA's autocast casts the inputs of, of all that the published loop calls."""


class CudaAutocast(TorchFunctionMode):
    """What autocast to bf16 does on CUDA, and the attention that PyTorch takes there, for tensors that are on "meta".

    Products and attention get bf16, layer norms float32; float32 attention goes to the memory-efficient kernel.
    """

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.enabled = enabled

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.enabled and func in CASTS:
            args = [a.to(CASTS[func]) if isinstance(a, Tensor) else a for a in args]
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        if args[0].dtype == torch.float32:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, args[0].requires_grad)[0]
        return attend_as_cudnn(*args)


def published(setup: Setup, compiled: bool) -> list[Kernel]:
    """The kernels of the published loop's step: eager, or with its blocks compiled. Its optimiser is eager in both."""
    recipe, stage = counting.recipe_of(setup)
    counter, table = Counter(), kernels.select({}, CUDA)
    with META, CudaAutocast(enabled=False), counter:
        with counter.within(None):
            model = SiT(recipe.model, table)
            teacher = SiT(recipe.model, table) if stage.method.teacher_name else None
            heads = supervision.create(stage, Parts(recipe.model, table, teacher), 1).heads
            loop = PlainLoop(recipe, stage, model, heads, teacher, LATENT_SCALE, META)
            setattr(loop, "autocast", lambda: CudaAutocast(enabled=True))  # noqa: B010
            loop.optimizer.param_groups[0]["foreach"] = True  # as on CUDA
            for parameter in loop.model.parameters():  # AdamW's state is made in its first step: not the one to count
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            loop.optimizer.step()
            loop.optimizer.zero_grad(set_to_none=True)
            networks = filter(None, (loop.model, loop.teacher)) if compiled else ()
            for modules in (kind for network in networks for kind in (network.blocks, [network.final_layer])):
                run = CompiledModule(counter)
                for module in modules:
                    setattr(module, "forward", partial(run, module))  # noqa: B010
            moments = torch.empty(recipe.optim.batch_size, *moments_shape(recipe))
            condition = loop.model.some_condition(recipe.optim.batch_size, META)
        loop.step(moments, condition)
    return counter.kernels


def seconds(kernel: Kernel, rates: Rates) -> float:
    """Of a kernel alone: the longer of its arithmetic and its traffic, without the gap that a launch adds."""
    memory = ASSUMPTIONS.get(f"memory share of {kernel.family}", ASSUMPTIONS["memory share"])
    moving = kernel.bytes / (rates.copy * memory)
    kind = "attention " if kernel.family == "attention" else ""
    reached = ASSUMPTIONS[f"{kind or 'product '}share"] * (1.0 if kernel.low else ASSUMPTIONS[f"{kind}float32 share"])
    aside = ASSUMPTIONS["shown of an epilogue"] * kernel.aside / (rates.copy * memory)
    return max(moving, kernel.flops / (rates.matmul * reached) + aside)


def part(kernel: Kernel) -> str:
    """The row of the table that a kernel belongs to."""
    if kernel.phase in ("noise", "teacher", "heads", "optimiser"):
        return kernel.phase
    if kernel.family == "compiled":
        return "bias gradients" if "sum" in kernel.name else "layout copies"
    if kernel.family in ("matrix products", "attention", "adaLN", "GELU", "SwiGLU", "qk-norm", "feature loss"):
        return kernel.family
    return "embedding, modulation, loss"


def added(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Sums by name, the largest first."""
    found: dict[str, float] = {}
    for name, value in pairs:
        found[name] = found.get(name, 0.0) + value
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def total(kernels: Sequence[Kernel], rates: Rates) -> float:
    """Seconds of a step on the device."""
    gaps = 1e-6 * ASSUMPTIONS["gap, µs"] * sum(kernel.launches for kernel in kernels)
    return sum(seconds(kernel, rates) for kernel in kernels) + gaps


@dataclass(frozen=True)
class Counted:
    """What one step launches on a device, and what the published loop does in its place, by `RIVALS`."""

    setup: Setup
    passes: int
    ours: list[Kernel]
    rivals: Mapping[str, list[Kernel]]
    host_ms: float | None = None
    """Milliseconds that the host takes to launch it, where that was measured (bench/results/launches.json)."""
    without: Mapping[str, list[Kernel]] = field(default_factory=dict)
    """The step without each of `REMEDIES`, and without all of them (`ALL`)."""

    @property
    def launches(self) -> int:
        """Of all kernels."""
        return sum(kernel.launches for kernel in self.ours)

    def work(self) -> dict[str, dict[str, float]]:
        """TFLOP, GB and launches by part."""
        columns = {
            "tflop": added((part(k), k.flops / 1e12) for k in self.ours),
            "gb": added((part(k), k.bytes / 1e9) for k in self.ours),
            "launches": added((part(k), float(k.launches)) for k in self.ours),
        }
        return {name: {column: values[name] for column, values in columns.items()} for name in columns["gb"]}

    def row(self, rates: Rates) -> dict[str, Any]:
        """Shaped like a measured row of `bench.step`, so that goals read both alike."""
        setup = self.setup
        recipe, stage = counting.recipe_of(setup)
        device = total(self.ours, rates)
        ms = {"ours": max(1e3 * device, self.host_ms or 0.0)}
        ms |= {name: 1e3 * total(kernels, rates) for name, kernels in self.rivals.items()}
        per_image = cost.stage_cost(recipe, stage).total
        speed = {name: setup.batch / value * 1e3 for name, value in ms.items()}
        gaps = {GAPS: 1e-3 * ASSUMPTIONS["gap, µs"] * self.launches}
        teacher = [k for k in self.ours if k.phase == "teacher"]
        row = {
            "size": setup.size, "stage": setup.stage, "batch": setup.batch, "tokens": setup.tokens,
            "depth": recipe.model.depth, "passes": self.passes, "launches": self.launches,
            "host_ms": self.host_ms, "ms": ms, "images_per_s": speed,
            "speedup": {name: speed["ours"] / value for name, value in speed.items() if name != "ours"},
            "mfu": {name: value * per_image / rates.matmul for name, value in speed.items()},
            "host_bound": self.host_ms is not None and self.host_ms > 1e3 * device,
            "parts": {
                "work": self.work(),
                "ms": added((part(k), 1e3 * seconds(k, rates)) for k in self.ours) | gaps,
                "families": added((k.family, seconds(k, rates)) for k in self.ours),
                "teacher": added((k.family, 1e3 * seconds(k, rates)) for k in teacher),
            },
        }  # fmt: skip
        if self.without:
            row["remedies_ms"] = {name: 1e3 * (total(left, rates) - device) for name, left in self.without.items()}
        return row


def passes_on(setup: Setup, rates: Rates) -> int:
    """How many passes `optim.micro_batch = "auto"` makes of the batch in a device's memory."""
    recipe, stage = counting.recipe_of(setup)
    room = int(rates.gib * 2**30)
    return setup.batch // cost.largest_micro_batch(replace(recipe, stages=(stage,)), 1, bf16=True, room=room)


def count(setup: Setup, folder: Path = machine.FOLDER, remedies: bool = False) -> dict[str, Counted]:
    """By device: the step and its rivals, traced; host time comes from `folder`/launches.json where it has the step.

    remedies: also the step without each of `REMEDIES`.
    """
    rivals = {name: published(setup, compiled) for name, compiled in RIVALS.items()}
    measured = machine.load(folder / "launches.json").get("steps", {}).get(setup.label, {})
    ours = cache(lambda passes, options: counting.ours(replace(setup, options=setup.options + options), passes))
    left_out = dict(REMEDIES) | {ALL: tuple(chain(*REMEDIES.values()))} if remedies else {}
    found = {}
    for rates in DEVICES:
        passes = passes_on(setup, rates)
        host_ms = measured["host_ms"] * passes / measured["passes"] if measured else None
        without = {name: ours(passes, options) for name, options in left_out.items()}
        found[rates.name] = Counted(setup, passes, ours(passes, ()), rivals, host_ms, without)
    return found


def prediction(steps: Sequence[Mapping[str, Counted]]) -> dict[str, Any]:
    """All of it as JSON: what was assumed, and for every device rows as measured ones are."""
    rows = {
        rates.name: {counted.setup.label: counted.row(rates) for step in steps if (counted := step.get(rates.name))}
        for rates in DEVICES
    }
    content = {
        "about": "Predicted by python -m bench.predict: nothing in this file was measured.",
        "assumptions": ASSUMPTIONS,
        "devices": {rates.name: {"rates": asdict(rates), "step": {"rows": rows[rates.name]}} for rates in DEVICES},
    }
    return {name: _rounded(value) for name, value in content.items()}


def _rounded(value: Any) -> Any:
    """Floats to four digits, so that the file shows what is known and not how sums are ordered."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def predicted_step(rows: Mapping[str, Row]) -> str:
    """The parts of a predicted step by device, its total, and the published loop's."""
    some = next(iter(rows.values()))
    lines = []
    for name in some["parts"]["ms"]:
        work = some["parts"]["work"].get(name, {"tflop": 0.0, "gb": 0.0})
        cells = [f"{work['tflop']:.4g}" if work["tflop"] else "–", f"{work['gb']:.3g}" if work["gb"] else "–"]
        lines.append([name, *cells, *(milliseconds(row["parts"]["ms"][name]) for row in rows.values())])
    totals: Columns = {
        "the step": lambda row: f"**{milliseconds(row['ms']['ours'])}**",
        "launches (passes)": lambda row: f"{row['launches']} ({row['passes']})",
        "images/s": lambda row: f"{row['images_per_s']['ours']:.0f}",
        "MFU": lambda row: share(row["mfu"]["ours"]),
        "the published loop": lambda row: f"{milliseconds(row['ms']['plain'])} ({ratio(row['speedup']['plain'])})",
        "the same, compiled": lambda row: f"{milliseconds(row['ms']['compile'])} ({ratio(row['speedup']['compile'])})",
    }
    lines += [[name, "", "", *map(cell, rows.values())] for name, cell in totals.items()]
    return table(["part", "TFLOP", "GB", *(f"{name}, ms" for name in rows)], lines)


def by_network(rows: Mapping[str, Row]) -> str:
    """What the teacher's forward pass costs beside all else, by family; "" without a teacher."""
    families = {name: {f: 1e3 * s for f, s in row["parts"]["families"].items()} for name, row in rows.items()}
    heads = [f"{network}, {name}" for name in rows for network in ("student", "teacher")]
    lines = []
    for family in next(iter(families.values())):
        teacher = {name: row["parts"]["teacher"].get(family, 0.0) for name, row in rows.items()}
        pairs = [(families[name][family] - teacher[name], teacher[name]) for name in rows]
        lines.append([family, *(milliseconds(value) if value else "–" for pair in pairs for value in pair)])
    if all(row["parts"]["ms"].get("teacher", 0.0) < 1 for row in rows.values()):
        return ""
    return table(["ms", *heads], lines)


def remedies(rows: Mapping[str, Row]) -> str:
    """What the step would take more without each remedy; "" where that was not counted."""
    if "remedies_ms" not in next(iter(rows.values())):
        return ""
    names = next(iter(rows.values()))["remedies_ms"]
    lines = [[name, *(milliseconds(row["remedies_ms"][name]) for row in rows.values())] for name in names]
    without = (f"**{milliseconds(row['ms']['ours'] + row['remedies_ms'][ALL])}**" for row in rows.values())
    lines.append(["the step without them", *without])
    return table(["taken out of the step", *(f"{name}, ms" for name in rows)], lines)


def beside(predicted: Row, measured: Row, doubted: bool) -> str:
    """Families of a step as predicted and as measured, and which take over `SHORT` times as long.

    A step whose machine was busy (`doubted`) is not judged, nor a family that is nearer to `SHORT` than the step's
    noise, nor one that is below the share `LEAST` of both steps.
    """
    ours, theirs = predicted["parts"]["families"], measured.get("parts", {}).get("families", {})
    pairs = {name: (1e3 * ours.get(name, 0.0), 1e3 * theirs.get(name, 0.0)) for name in [*ours, *theirs] if theirs}
    least = LEAST * min(predicted["ms"]["ours"], measured["ms"]["ours"])
    pairs["the step"] = predicted["ms"]["ours"], measured["ms"]["ours"]
    lines, short, doubtful = [], [], []
    for name, (foreseen, found) in pairs.items():
        times = found / foreseen if foreseen else float("inf")
        cell = ratio(times) if foreseen else "–"
        if max(foreseen, found) >= least:
            if not Figure(times, measured.get("noise", 0.0), doubted).judged(SHORT):
                cell = f"{cell}, not judged"
                doubtful.append(name)
            elif times > SHORT:
                cell = f"**{cell}**"
                short.append(f"{name} ({f'+{100 * (times - 1):.0f} %' if foreseen else 'not predicted'})")
        lines.append([name, milliseconds(foreseen), milliseconds(found), cell])
    verdict = f"Short by over {100 * (SHORT - 1):.0f} %: {', '.join(short) or 'nothing'}."
    verdict += f" Not judged: {', '.join(doubtful)}." if doubtful else ""
    return table(["family", "predicted, ms", "measured, ms", "measured / predicted"], lines) + f"\n\n{verdict}"


def measured_rows(folder: Path, device: str, predicted: Row) -> list[tuple[Row, Row]]:
    """(machine, row) of every results file of such a device that measured the same step."""
    found = []
    for path in machine.files(folder):
        section = machine.load(path).get("step")
        if section is not None and device in section["machine"]["device"]:
            same = ("size", "stage", "batch", "tokens", "depth")
            rows = (row for row in section["rows"].values() if all(row.get(key) == predicted[key] for key in same))
            found += [(section["machine"], row) for row in rows if "ms" in row]
    return found


def report(content: Mapping[str, Any], folder: Path) -> str:
    """A prediction's tables, each step with what was measured of it."""
    rates = ", ".join(
        f"{name}: copies {device['rates']['copy'] / 1e12:g} TB/s, multiplies {device['rates']['matmul'] / 1e12:g} "
        "TFLOP/s" for name, device in content["devices"].items()
    )  # fmt: skip
    assumed = ", ".join(f"{name} {value:g}" for name, value in content["assumptions"].items())
    texts = [f"Rates: {rates}. Assumed, as bench/predict.py says why: {assumed}."]
    devices = content["devices"]
    for label in next(iter(devices.values()))["step"]["rows"]:
        rows = {name: device["step"]["rows"][label] for name, device in devices.items()}
        texts += [f"### {label}", *filter(None, [predicted_step(rows), by_network(rows), remedies(rows)])]
        for name, row in rows.items():
            if row["host_bound"]:
                texts.append(f"{name}: host-bound: launching takes {row['host_ms']:.3g} ms, longer than the device.")
            for place, measured in measured_rows(folder, name, row):
                texts += [f"Measured on {place['device']}:", beside(row, measured, busy(measured, place))]
    return "\n\n".join(texts) + "\n"


PAGE = Path(__file__).with_name("GPU-DAY.md")
HEADLINE = "XL/2, plain, batch 256"
"""The step whose remedies are counted."""


def default_setups() -> list[Setup]:
    """SiT-XL/2 and B/2 at batch 256, all stages."""
    return [Setup(size, stage, 256, CUDA) for size in ("XL/2", "B/2") for stage in STAGES]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables and, with --write, keeps the prediction, whole or not at all."""
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--results", type=Path, default=machine.FOLDER, help="folder of what was measured")
    parser.add_argument("--write", action="store_true", help="write prediction.json there, and the page")
    given = parser.parse_args(arguments)
    gc.disable()  # a trace makes millions of objects and no garbage: looking for it takes a third of the time
    content = prediction([count(setup, given.results, setup.label == HEADLINE) for setup in default_setups()])
    text = report(content, given.results)
    if given.write:
        aside = given.results / f"prediction.{os.getpid()}.partial"
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, given.results / PREDICTION)
        write_blocks(PAGE, {"prediction": text})
    print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
