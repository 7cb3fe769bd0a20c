"""A step on latents of three shapes against one on one shape, with as many tokens: paired, in turn, by medians.

python -m bench.shapes
python -m bench.shapes --size B/2 --batch 16 --rounds 40
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.machine import OthersLoad
from bench.measure import Effort, Row, paired
from bench.workload import Ours, Setup
from st_fast.data.ahead import RecordSet
from st_fast.data.buckets import write_index
from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.data.shards import open_data
from st_fast.prepare.writing import write_shards
from st_fast.recipe import Recipe

SIDES = (32, 32), (16, 64), (64, 16)
"""Of the latents: 256 tokens each at patch 2."""


def write_buckets(recipe: Recipe) -> RecordSet:
    """Random latents of the three shapes for the recipe, on the disk."""
    model, folder, names = recipe.model, Path(recipe.data.path), []
    generator = torch.Generator().manual_seed(0)
    for height, width in SIDES:
        names.append(f"{8 * height}x{8 * width}")
        shape = (2 * model.channels, height, width)
        moments = torch.randn(4 * recipe.optim.batch_size, *shape, generator=generator)
        moments[:, model.channels :].abs_().mul_(0.1)
        labels = torch.randint(model.num_classes, (len(moments),), generator=generator)
        manifest = Manifest(0, shape, "float16", 0.18215, VaeInfo("none"), "random", model.num_classes)
        write_shards(folder / names[-1], [(moments.half(), labels)], manifest)
    write_index(folder, names)
    return open_data(folder, verify=False)


def row(setup: Setup, effort: Effort, block: int) -> Row:
    """Milliseconds a step of both, and how many times faster the one on several shapes is."""
    others = OthersLoad()
    with tempfile.TemporaryDirectory(prefix="st_fast-bench-") as folder:
        one = Ours(setup, Path(folder) / "one")
        several = Ours(setup, Path(folder) / "several", write_buckets)
        for _ in range(3 * len(SIDES)):  # until each shape has had its positions made, and was compiled
            one()
            several()
        found = paired(one, several, "three shapes", setup.device, effort, block)
        for loop in (one, several):
            loop.trainer.close()
    return found | {"setup": setup.label, "load": round(others.read(), 2)}


def main() -> None:
    """Prints a row for plain training and one for stage 1."""
    parser = argparse.ArgumentParser("bench.shapes", description=__doc__)
    parser.add_argument("--size", default="S/2")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=240)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stages: Sequence[str] = ("plain", "stage 1")
    for stage in stages:
        setup = Setup(given.size, stage, given.batch, device, depth=given.depth).untried
        print(json.dumps(row(setup, Effort(given.rounds, given.seconds, warmup=1), block=len(SIDES))), flush=True)


if __name__ == "__main__":
    main()
