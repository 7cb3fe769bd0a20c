"""Predicts a step's time on a GPU that is not here, part by part, and shows what was measured beside it.

    python -m bench.predict            SiT-XL/2 and B/2, all stages, batch 256
    python -m bench.predict --write    also bench/results/prediction.json, for the README's goals

FLOPs, bytes and launches are counted from the step's own code (`bench.counting`). What a device does with them is
assumed by `DEVICES` and `ASSUMPTIONS`, each with its reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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
from bench.report import PREDICTION
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


DEVICES = (Rates("H100", 3.0e12, 790e12), Rates("H200", 4.3e12, 790e12))
"""Both rates were measured on such machines (H100 80 GB HBM3; H200), before any of this code ran on one."""

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
    # The optimiser reads and writes long vectors alone.
    "memory share of optimiser": 0.95,
    # That a launch adds with a full queue: start, first loads, tail. 2 to 4 µs on Hopper.
    "gap, µs": 3.0,
}
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
            labels = torch.empty(recipe.optim.batch_size, dtype=torch.int64)
        loop.step(moments, labels)
    return counter.kernels


def seconds(kernel: Kernel, rates: Rates) -> float:
    """Of a kernel alone: the longer of its arithmetic and its traffic, without the gap that a launch adds."""
    memory = ASSUMPTIONS.get(f"memory share of {kernel.family}", ASSUMPTIONS["memory share"])
    moving = kernel.bytes / (rates.copy * memory)
    kind = "attention " if kernel.family == "attention" else ""
    reached = ASSUMPTIONS[f"{kind or 'product '}share"] * (1.0 if kernel.low else ASSUMPTIONS[f"{kind}float32 share"])
    return max(moving, kernel.flops / (rates.matmul * reached))


def part(kernel: Kernel) -> str:
    """The row of the table that a kernel belongs to."""
    if kernel.phase in ("noise", "teacher", "heads", "optimiser"):
        return kernel.phase
    if kernel.family == "compiled":
        return "bias gradients" if "sum" in kernel.name else "layout copies"
    if kernel.family in ("matrix products", "attention", "adaLN", "GELU", "qk-norm", "feature loss"):
        return kernel.family
    return "embedding, modulation, loss"


def added(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Sums by name, the largest first."""
    found: dict[str, float] = {}
    for name, value in pairs:
        found[name] = found.get(name, 0.0) + value
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def total(kernels: Sequence[Kernel], rates: Rates, launches: int | None = None) -> float:
    """Seconds of a step on the device; `launches` where they were counted better."""
    gaps = sum(kernel.launches for kernel in kernels) if launches is None else launches
    return sum(seconds(kernel, rates) for kernel in kernels) + 1e-6 * ASSUMPTIONS["gap, µs"] * gaps


@dataclass(frozen=True)
class Counted:
    """What one step launches, and what the published loop does in its place, by `RIVALS`."""

    setup: Setup
    ours: list[Kernel]
    rivals: Mapping[str, list[Kernel]]
    launches: int
    host_ms: float | None
    """Milliseconds that the host takes to launch it, where that was measured (bench/results/launches.json)."""

    def parts(self) -> dict[str, dict[str, float]]:
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
        device = total(self.ours, rates, self.launches)
        ms = {"ours": max(1e3 * device, self.host_ms or 0.0)}
        ms |= {name: 1e3 * total(kernels, rates) for name, kernels in self.rivals.items()}
        per_image = cost.stage_cost(recipe, stage).total
        speed = {name: setup.batch / value * 1e3 for name, value in ms.items()}
        gaps = {"gaps between kernels": 1e-3 * ASSUMPTIONS["gap, µs"] * self.launches}
        return {
            "size": setup.size, "stage": setup.stage, "batch": setup.batch, "tokens": setup.tokens,
            "depth": recipe.model.depth, "ms": ms, "images_per_s": speed,
            "speedup": {name: speed["ours"] / value for name, value in speed.items() if name != "ours"},
            "mfu": {name: value * per_image / rates.matmul for name, value in speed.items()},
            "host_bound": self.host_ms is not None and self.host_ms > 1e3 * device,
            "parts": {
                "ms": added((part(k), 1e3 * seconds(k, rates)) for k in self.ours) | gaps,
                "families": added((k.family, seconds(k, rates)) for k in self.ours),
            },
        }  # fmt: skip


def count(setup: Setup, folder: Path = machine.FOLDER) -> Counted:
    """Traces the step and its rivals; launches and host time come from `folder`/launches.json where it has the step."""
    ours = counting.ours(setup)
    rivals = {name: published(setup, compiled) for name, compiled in RIVALS.items()}
    measured = machine.load(folder / "launches.json").get("steps", {}).get(setup.label, {})
    launches = measured.get("launches", sum(kernel.launches for kernel in ours))
    return Counted(setup, ours, rivals, launches, measured.get("host_ms"))


def prediction(steps: Sequence[Counted]) -> dict[str, Any]:
    """All of it as JSON: what was counted, what was assumed, and for every device rows as measured ones are."""
    content = {
        "about": "Predicted by python -m bench.predict: nothing in this file was measured.",
        "assumptions": ASSUMPTIONS,
        "counted": {
            step.setup.label: {"parts": step.parts(), "launches": step.launches, "host_ms": step.host_ms}
            for step in steps
        },
        "devices": {
            rates.name: {
                "rates": asdict(rates), "step": {"rows": {step.setup.label: step.row(rates) for step in steps}},
            }
            for rates in DEVICES
        },
    }  # fmt: skip
    return {name: _rounded(value) for name, value in content.items()}


def _rounded(value: Any) -> Any:
    """Floats to four digits, so that the file shows what is known and not how sums are ordered."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def predicted_step(counted: Row, rows: Mapping[str, Row]) -> str:
    """The parts of a predicted step by device, its total, and the published loop's."""
    rest = {"tflop": 0.0, "gb": 0.0, "launches": counted["launches"]}
    lines = []
    for name in next(iter(rows.values()))["parts"]["ms"]:
        work = counted["parts"].get(name, rest)
        cells = [f"{work['tflop']:.4g}" if work["tflop"] else "–", f"{work['gb']:.3g}" if work["gb"] else "–"]
        times = (milliseconds(row["parts"]["ms"][name]) for row in rows.values())
        lines.append([name, *cells, f"{work['launches']:.0f}", *times])
    totals: Columns = {
        "the step": lambda row: f"**{milliseconds(row['ms']['ours'])}**",
        "images/s": lambda row: f"{row['images_per_s']['ours']:.0f}",
        "MFU": lambda row: share(row["mfu"]["ours"]),
        "the published loop": lambda row: f"{milliseconds(row['ms']['plain'])} ({ratio(row['speedup']['plain'])})",
        "the same, compiled": lambda row: f"{milliseconds(row['ms']['compile'])} ({ratio(row['speedup']['compile'])})",
    }
    lines += [[name, "", "", "", *map(cell, rows.values())] for name, cell in totals.items()]
    return table(["part", "TFLOP", "GB", "launches", *(f"{name}, ms" for name in rows)], lines)


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
    texts = [f"# Predicted, not measured\n\nRates: {rates}. Assumed, as bench/predict.py says why: {assumed}."]
    for label, counted in content["counted"].items():
        rows = {name: device["step"]["rows"][label] for name, device in content["devices"].items()}
        texts += [f"## {label}", predicted_step(counted, rows)]
        for name, row in rows.items():
            if row["host_bound"]:
                texts.append(
                    f"{name}: host-bound: launching takes {counted['host_ms']:.3g} ms, longer than the device."
                )
            for place, measured in measured_rows(folder, name, row):
                texts += [f"Measured on {place['device']}:", beside(row, measured, busy(measured, place))]
    return "\n\n".join(texts) + "\n"


def default_setups() -> list[Setup]:
    """SiT-XL/2 and B/2 at batch 256, all stages."""
    return [Setup(size, stage, 256, CUDA) for size in ("XL/2", "B/2") for stage in STAGES]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables and, with --write, keeps the prediction, whole or not at all."""
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--results", type=Path, default=machine.FOLDER, help="folder of what was measured")
    parser.add_argument("--write", action="store_true", help="write prediction.json there")
    given = parser.parse_args(arguments)
    gc.disable()  # a trace makes millions of objects and no garbage: looking for it takes a third of the time
    content = prediction([count(setup, given.results) for setup in default_setups()])
    if given.write:
        aside = given.results / f"prediction.{os.getpid()}.partial"
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, given.results / PREDICTION)
    print(report(content, given.results), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
