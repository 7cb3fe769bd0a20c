"""A run folder with a random model of 8×8 pixels, made without training, in a fraction of a second."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from st_fast import kernels
from st_fast.core import checkpoint
from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.model import build
from st_fast.model.vae import load_vae, vae_hash
from st_fast.prepare.writing import write_shards
from st_fast.recipe import load, to_toml
from st_fast.train.supervision import Parts, create
from tests import warm
from tests.tiny import ROOT

RECIPE = """
[model]
depth = 2
width = 32
heads = 2
patch = 2
channels = 3
latent_size = 8
num_classes = 5
[data]
path = "{data}"
loader = "resident"
[run]
out = "{out}"
seed = 3
device = "cpu"
[sample]
num = 12
batch_size = 4
sampler = "heun"
steps = 3
cfg_scale = 2.0
cfg_range = [0.0, 0.7]
[[stage]]
name = "plain"
supervision = "none"
steps = 10
"""


def make_run(
    folder: Path, seed: int = 0, step: int = 10, vae: Path | None = None, supervision: str = 'supervision = "none"'
) -> Path:
    """The run folder; `seed` chooses the model's weights. Latents are pixels, or a VAE's, which lies in the data."""
    data, out = folder / "data", folder / "run"
    text = RECIPE.replace('supervision = "none"', supervision)
    if vae is not None:
        text = text.replace(
            "channels = 3", f"channels = {json.loads((vae / 'config.json').read_text())['latent_channels']}"
        )
    if not data.exists():
        channels = int(re.search(r"channels = (\d+)", text)[1])  # type: ignore[index]
        generator = torch.Generator().manual_seed(0)
        moments = torch.randn(20, 2 * channels, 8, 8, generator=generator)
        moments[:, channels:] = 0
        made_by = VaeInfo("pixels") if vae is None else VaeInfo(vae.name, vae_hash(load_vae(vae)), "vae")
        manifest = Manifest(0, (2 * channels, 8, 8), "float16", 2.0, made_by, "random", 5)
        write_shards(data, [(moments.half(), torch.arange(20) % 5)], manifest)
        if vae is not None:
            shutil.copytree(vae, data / "vae")
    (folder / "recipe.toml").write_text(text.format(data=data, out=out))
    recipe = load(folder / "recipe.toml")
    out.mkdir(exist_ok=True)
    (out / "recipe.toml").write_text(to_toml(recipe))
    config, table = recipe.for_stage(recipe.stages[0]).model, kernels.select({}, torch.device("cpu"))
    model = build(config, table, seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in model.state_dict().items()}
    meta = {"stage": "plain", "architecture": config.architecture(), "recipe": to_toml(recipe)}
    groups = {"model": tensors, "ema": tensors}
    if recipe.stages[0].method.head_layers(config):
        groups["heads"] = dict(create(recipe.stages[0], Parts(config, table, None), seed).heads.state_dict())
    checkpoint.save(out / "plain" / "checkpoints", step, groups, meta)
    return out


def command(module: str, *arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """`python -m st_fast.MODULE` in a process of its own, or under torchrun."""
    words = ("-m", f"st_fast.{module}", *map(str, arguments))
    if ranks == 1:
        return warm.run(*words)
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*torchrun, *words], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
