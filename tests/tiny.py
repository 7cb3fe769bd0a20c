"""A data set and a recipe so small that a whole run takes a second; shared by the tests of training."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from markupsafe import Markup

from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.prepare.writing import write_shards
from st_fast.recipe import load
from st_fast.train.run import run
from tests import warm

ROOT = Path(__file__).resolve().parent.parent

RECIPE = """
[model]
depth = 3
width = 32
heads = 2
patch = 2
latent_size = 4
num_classes = 5
[data]
path = "{data}"
loader = "resident"
[optim]
batch_size = 8
lr = 1e-2
ema_decay = 0.9
[run]
out = "{out}"
seed = 3
device = "cpu"
log_every = 1
save_every = 4
keep = 2
[sample]
num = 0
[[stage]]
name = "align"
supervision = "velocity_head"
steps = 10
depth = 1
hidden = 16
[[stage]]
name = "transcend"
supervision = "self_transcendence"
steps = 10
teacher = "align"
student_depth = 1
teacher_depth = 2
cfg_scale = 3.0
hidden = 16
"""


def write_data(folder: Path, count: int = 30) -> Path:
    """Random latents of five classes."""
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(count, 8, 4, 4, generator=generator)
    moments[:, 4:] = moments[:, 4:].abs() * 0.1
    manifest = Manifest(0, (8, 4, 4), "float16", 1.0, VaeInfo("none"), "random", 5)
    write_shards(folder, [(moments.half(), torch.arange(count) % 5)], manifest, shard_size=16)
    return folder


def write_recipe(path: Path, data: Path, out: Path) -> Path:
    """The recipe above for these folders."""
    path.write_text(RECIPE.format(data=data, out=out))
    return path


def run_whole(folder: Path, data: Path) -> Path:
    """Trains the recipe in this process on one thread, without an interruption; returns the run folder."""
    torch.set_num_threads(1)
    run(load(write_recipe(folder / "tiny.toml", data, folder / "out")))
    return folder / "out"


def train(recipe: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m st_fast.train` in a process of its own."""
    return warm.run("-m", "st_fast.train", recipe, *options, env=os.environ | environment)


IN_TURN = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
"""


def in_turn(commands: Sequence[Sequence[str]], cwd: Path, **environment: str) -> str:
    """Runs `python -m COMMAND …` one after another in one process, which imports torch once; what they print."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path} | environment
    done = warm.run("-c", IN_TURN, json.dumps(commands), cwd=cwd, env=environment, timeout=550)
    assert done.returncode == 0, done.stderr
    return done.stdout


def records(out: Path, kind: str) -> list[dict]:
    """The log's records of one kind."""
    return [r for r in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if r["kind"] == kind]


def without_figures(replace: Callable[[object, str, object], None]) -> None:
    """Reports of this process have empty figures from now on; `replace` as `setattr`."""
    from st_fast.report import plot

    replace(plot, "svg", lambda figure: Markup('<svg role="img" aria-label="{}"></svg>').format(figure.title))
