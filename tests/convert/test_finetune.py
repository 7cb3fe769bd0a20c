"""The three commands of docs/convert.md, as they stand there, on a REPA checkpoint and REPA latents."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.core import checkpoint
from st_fast.model.vae import tensors_hash
from st_fast.prepare.small_vae import SmallVae, new_vae
from tests import foreign, tiny

PAGE = (tiny.ROOT / "docs" / "convert.md").read_text(encoding="utf-8")
COMMANDS = re.search(r"in three commands:\n\n```sh\n(.*?)```", PAGE, re.S)[1].splitlines()
SMALL = shlex.split(
    "--optim.batch_size=8 --stage.finetune.steps=3 --stage.finetune.student_depth=1 --stage.finetune.teacher_depth=2 "
    "--stage.finetune.stop_step=2 --stage.finetune.hidden=16 --sample.steps=2 --sample.num=4 --run.precision=fp32 "
    "--run.log_every=1"
)
"""What makes a run of the recipe fit a test; the model's size is appended as the first command prints it."""


def write_latents(folder: Path) -> None:
    """Latents of five classes in REPA's layout, written as its preprocessing does."""
    generator, labels = np.random.default_rng(0), []
    (folder / "vae-sd" / "00000").mkdir(parents=True)
    for number in range(12):
        name = f"00000/img-mean-std-{number:08d}.npy"
        mean, std = generator.normal(size=(4, 4, 4)), generator.uniform(0.01, 0.1, size=(4, 4, 4))
        np.save(folder / "vae-sd" / name, np.concatenate([mean, std]).astype(np.float32))
        labels.append([name, number % 5])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))


def write_vae(hub: Path) -> None:
    """A tiny VAE where the hub's cache has the one that REPA's latents come from."""
    root = hub / "models--stabilityai--sd-vae-ft-mse"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new_vae(SmallVae((4,), 0), 3, 4).save_pretrained(root / "snapshots" / ("0" * 40), safe_serialization=True)


def test_a_repa_checkpoint_is_fine_tuned_with_self_transcendence_in_three_commands(tmp_path):
    pytest.importorskip("diffusers")
    content = foreign.repa_checkpoint(tmp_path / "last.pt")
    write_latents(tmp_path / "data" / "repa")
    write_vae(tmp_path / "hub")
    shutil.copytree(tiny.ROOT / "recipes", tmp_path / "recipes")
    assert [command.split()[:3] for command in COMMANDS] == [
        ["python", "-m", f"st_fast.{name}"] for name in ("convert", "train", "sample")
    ]
    convert, train, sample = (shlex.split(command)[2:] for command in COMMANDS)
    hub = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    size = re.findall(r"--model\.\S+", tiny.in_turn([convert], tmp_path, **hub))
    text = tiny.in_turn([[*train, *size, *SMALL], sample], tmp_path, **hub)
    out = tmp_path / "runs" / "finetune"
    found = checkpoint.latest(out / "finetune" / "checkpoints", pytest.fail)
    said = found.meta["init"]
    trunk = {key: tensor for key, tensor in content["ema"].items() if not key.startswith("projectors")}
    assert said["sha256"] == tensors_hash(trunk) and said["path"] == "./models/repa" and found.step == 3
    moved = max((found.groups["model"][key] - tensor).abs().max() for key, tensor in trunk.items())
    assert 0 < moved < 1e-3  # from there, by three warm-up steps
    losses = [record["aux"] for record in tiny.records(out, "train")]
    assert losses[0] + losses[1] > 0 and losses[2] == 0  # taught, up to stop_step
    assert (tmp_path / text.strip().splitlines()[-1]).stat().st_size > 100
    assert "isn't recorded" in html.unescape((out / "report.html").read_text())  # what the imported model cost
