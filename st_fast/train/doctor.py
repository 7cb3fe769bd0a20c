"""Lists what this machine offers: versions, devices, kernels, attention, loaders and profilers, or why it does not.

python -m st_fast doctor
python -m st_fast doctor --measure          also the rates that MFU and kernels are compared with; takes seconds
python -m st_fast doctor --json             the same as JSON
python -m st_fast doctor --plan --help      step times on 1 to 64 GPUs, estimated
"""

from st_fast.core.command import command_parser, compile_nothing_for_help, run_command

if __name__ == "__main__":
    compile_nothing_for_help()

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shutil
from collections.abc import Sequence

import torch

from st_fast import __version__, kernels
from st_fast.core.machine import cpu_name, cpu_quota
from st_fast.core.streams import show
from st_fast.data.loader import dali_missing
from st_fast.kernels.table import auto
from st_fast.model.attention import AUTO_ORDER, BACKENDS, verify
from st_fast.model.fp8 import LEAST_CAPABILITY
from st_fast.train import adamw, log, memory, plan
from st_fast.train.profiling import UNDER_NSYS

Rows = dict[str, str]
"""Name → state."""

PACKAGES = (
    "torch", "triton", "numpy", "safetensors", "DALI", "flash-attn", "flash-attn-4", "xformers", "torchao", "diffusers",
    "transformers", "torchdiffeq", "datasets", "tensorboard", "wandb", "trackio",
)  # fmt: skip
DALI = "nvidia-dali-cuda130"
"""Its name on the package index; the others are called so there."""
HEAD_SIZES = (64, 72)
"""Of S/2, B/2 and L/2; of XL/2."""


def versions() -> Rows:
    """What is installed."""
    rows = {"st_fast": __version__, "python": platform.python_version()}
    rows |= {name: _version(DALI if name == "DALI" else name) or "not installed" for name in PACKAGES}
    rows["torch"] += f", CUDA {torch.version.cuda}" if torch.version.cuda else ", built without CUDA"
    rows["apex"] = adamw.apex_refusal(torch.device("cuda")) or "its fused Adam is there"
    here = "" if _version("kernels") else "; in this repository's root `import kernels` gives an empty module"
    rows["kernels (Hugging Face)"] = (_version("kernels") or "not installed") + here
    return rows


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> Rows:
    """The host, and every GPU with its memory and what it multiplies."""
    gibibytes = memory.capacity(torch.device("cpu")) / 2**30
    quota = f" (CPU quota {cpu_quota():g})" if cpu_quota() < math.inf else ""
    rows = {f"cpu: {cpu_name()}": f"{torch.get_num_threads()} threads of {os.cpu_count()}{quota}, {gibibytes:.1f} GiB"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        fp8 = "fp8" if capability >= LEAST_CAPABILITY else "no fp8 (needs 8.9)"
        size = f"{properties.total_memory / 2**30:.1f} GiB"
        rows[f"cuda:{index}: {properties.name}"] = "{}, compute capability {}.{}, {}".format(size, *capability, fp8)
    if not torch.cuda.device_count():
        rows["cuda"] = "no GPU found: fp8, CUDA graphs and side streams need one"
    return rows


def implementations(device: torch.device) -> Rows:
    """csrc, and what "auto" takes for each op on this device."""
    isa = kernels.native.isa()
    rows = {"csrc, cpu": f"loaded, {isa}" if isa else "not built: the reference serves"}
    if device.type == "cuda":
        rows["csrc, cuda"] = "loaded" if kernels.native.available("cuda") else "not built: Triton serves"
    else:
        rows["csrc, cuda"] = "needs a GPU and nvcc"
    fused = "csrc" if device.type == "cpu" else "Triton"
    served = {"fused": f"fused ({fused})", "reference": "reference (PyTorch)"}
    rows |= {switch: served[auto(switch, device)] for switch in kernels.SWITCHES if switch != "adamw_ema"}
    compiled = kernels.native.available(device.type)
    rows["adamw_ema"] = "fused (csrc)" if compiled else "fused (Triton)" if device.type == "cuda" else "PyTorch"
    return rows


def attention(device: torch.device) -> Rows:
    """Every backend at both head sizes, compared with float64 as before training, and the one that "auto" takes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = {}
    for head in HEAD_SIZES:
        problems = {
            name: backend.refusal(device, head) or verify(backend.attend, device, dtype, head)
            for name, backend in BACKENDS.items()
        }
        taken = next((name for name in AUTO_ORDER[device.type] if problems[name] is None), None)
        for name, problem in problems.items():
            rows[f"{name}, head size {head}"] = problem or ("right, taken by auto" if name == taken else "right")
    return rows


def loaders(device: torch.device) -> Rows:
    """Which loaders can be used."""
    missing = dali_missing()
    where = "the GPU's" if device.type == "cuda" else "the host's"
    return {
        "resident": f"available, in {where} memory",
        "dali": f"not usable: {missing}" if missing else f"available, on {device.type}",
        "torch": "available",
    }


def step(device: torch.device) -> Rows:
    """What may overlap, capture and profile a step."""
    cuda = device.type == "cuda"
    nsys = shutil.which("nsys") or "not found: --profile.tool=torch"
    return {
        "teacher on a side stream": "available" if cuda else "needs CUDA (the same order on one queue)",
        "CUDA graphs": "available" if cuda else "needs CUDA",
        "torch.compile": "on by default" if cuda else "off by default here (--run.compile=on)",
        "nsys": nsys + (", this process runs under it" if os.environ.get(UNDER_NSYS) else ""),
        "ncu": shutil.which("ncu") or "not found",
    }


def rates(device: torch.device) -> Rows:
    """The measured rates that MFU and kernels are compared with."""
    dtypes = (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,)
    rows = {"copy, read + written": f"{log.copy_rate(device) / 1e9:,.1f} GB/s"}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        rows[f"matrix product, {name}"] = f"{log.matmul_rate(device, dtype) / 1e9:,.0f} GFLOP/s"
    return rows


def findings(measure: bool) -> dict[str, Rows]:
    """Everything, by section."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sections = {
        "versions": versions(),
        "devices": devices(),
        f"kernels on {device.type}": implementations(device),
        f"attention on {device.type}": attention(device),
        "loaders": loaders(device),
        "the step": step(device),
    }
    return sections | ({f"measured on {device.type}": rates(device)} if measure else {})


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("doctor", __doc__)
    parser.add_argument("--measure", action="store_true", help="measure the copy and matrix product rates")
    parser.add_argument("--json", action="store_true", help="print JSON: {section: {what: how it stands}}")
    parser.add_argument("--plan", nargs=argparse.REMAINDER, help="estimate a recipe's step on 1 to 64 GPUs; see above")
    return parser


def main(arguments: Sequence[str]) -> None:
    """The command."""
    given = parser().parse_args(list(arguments))
    if given.plan is not None:
        plan.main(given.plan)
        return
    found = findings(given.measure)
    if given.json:
        show(json.dumps(found, indent=1, ensure_ascii=False))
        return
    width = max(len(what) for rows in found.values() for what in rows)
    for title, rows in found.items():
        show(f"{title}\n" + "\n".join(f"  {what:<{width}}  {state}" for what, state in rows.items()))


if __name__ == "__main__":
    run_command(main)
