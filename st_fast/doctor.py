"""What this machine can do for st_fast: versions, devices, kernels, attention backends, loaders.

python -m st_fast.doctor
python -m st_fast.doctor --plan --help      step times from 1 to 64 GPUs, on paper
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence

import torch

from st_fast import __version__, kernels, plan
from st_fast.errors import UserError, run_command
from st_fast.model.attention import BACKENDS

PACKAGES = ("torch", "triton", "numpy", "safetensors", "diffusers", "nvidia-dali-cuda130", "flash-attn", "xformers")
HEAD_DIM = 64
"""Of B/2 and S/2; the head size that backends are asked about."""


def facts() -> list[tuple[str, str]]:
    """(what, how it stands) by line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    rows = [("st_fast", __version__), ("python", platform.python_version()), ("device", f"{device.type}: {name}")]
    rows += [(package, _version(package)) for package in PACKAGES]
    rows.append(("csrc (cpu)", kernels.native.isa() or "not built: the reference serves"))
    if device.type == "cuda":
        rows.append(("csrc (cuda)", "loaded" if kernels.native.available("cuda") else "not built: Triton serves"))
    rows += [
        (f"attention {backend.name}", backend.refusal(device, HEAD_DIM) or "available") for backend in BACKENDS.values()
    ]
    return rows


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(arguments: Sequence[str]) -> None:
    """The command."""
    if "--plan" in arguments:
        plan.main([argument for argument in arguments if argument != "--plan"])
        return
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    if arguments:
        raise UserError(f"{arguments[0]}: the doctor takes --plan and --help only")
    rows = facts()
    width = max(len(what) for what, _ in rows)
    print("\n".join(f"{what:<{width}}  {state}" for what, state in rows))


if __name__ == "__main__":
    run_command(main)
