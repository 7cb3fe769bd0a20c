"""Writes the golden losses of this device class: `python -m tests.golden.cpu_float32`.

Run it only for a change that is meant to change the numbers, and say so in the commit.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from st_fast.recipe import load
from st_fast.train.run import run
from tests import tiny

FILE = Path(__file__).with_name("cpu_float32.json")
KEYS = ("denoise", "aux", "grad_norm")
TOLERANCE = 5e-5
"""Relative: what compilers, instruction sets and torch versions differ by after 20 steps; a real change is larger."""
VARIANTS: dict[str, tuple[str, ...]] = {
    "tiny": (),
    "reference kernels": tuple(
        f"--kernels.{op}=reference"
        for op in ("norm_modulate", "gate_residual_norm_modulate", "gate_residual", "guided_feature_loss", "qk_norm")
    ),
    "cosine path, released mask": (
        "--flow.path=cosine", "--stage.align.mask=released", "--stage.transcend.mask=released",
        "--flow.time=stratified", "--stage.transcend.loss=cosine", "--optim.warmup_steps=5",
    ),
}  # fmt: skip
"""Options over the tiny recipe. The first two must agree with one another: the kernels are the same mathematics."""


def losses(folder: Path, options: tuple[str, ...]) -> list[list[float]]:
    """Denoising loss, supervision loss and gradient norm of each of the 20 steps."""
    data = tiny.write_data(folder / "data")
    run(load(tiny.write_recipe(folder / "tiny.toml", data, folder / "out"), options))
    return [[record[key] for key in KEYS] for record in tiny.records(folder / "out", "train")]


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for name, options in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = losses(Path(folder), options)
    FILE.write_text(json.dumps({"keys": KEYS, "torch": torch.__version__, "losses": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
