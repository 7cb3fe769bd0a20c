"""Small real digits as pixels, with held-out images for the classifier, and a study of them that takes seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from sklearn.datasets import load_digits

from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.model.vae import encode_moments, load_vae
from st_fast.prepare.writing import write_shards

RECIPE = """
[model]
depth = 3
width = 32
heads = 2
patch = 2
channels = 1
latent_size = 8
num_classes = 10
[data]
path = "{data}"
[optim]
batch_size = 16
lr = 2e-3
ema_decay = 0.9
[run]
device = "cpu"
log_every = 4
save_every = 4
[sample]
sampler = "euler"
steps = 2
num = 10
cfg_scale = 2.0
cfg_range = [0.0, 1.0]
[[stage]]
name = "align"
supervision = "velocity_head"
steps = 8
depth = 1
hidden = 16
[[stage]]
name = "transcend"
supervision = "self_transcendence"
steps = 8
teacher = "align"
student_depth = 1
teacher_depth = 2
cfg_scale = 3.0
hidden = 16
"""
STUDY = """
recipe = "base.toml"
title = "Tiny"
notes = "As small as it gets."
seeds = [0, 1]
baseline = "plain"
reference = "omega5"
teacher_steps = 4
student_steps = 8
[common.evaluate]
classifier = true
every = 4
num = 70
[[teacher]]
name = "stage1"
stage = "align"
[[teacher]]
name = "random"
stage = "align"
steps = 0
[[arm]]
name = "plain"
title = "plain SiT"
supervision = "none"
[[arm]]
name = "omega5"
title = "ω = 5"
panel = "ω"
stage = "transcend"
teacher = "stage1"
cfg_scale = 5.0
[[arm]]
name = "random"
panel = "teacher"
stage = "transcend"
teacher = "random"
"""


def write_data(folder: Path, train: int = 240, test: int = 100) -> Path:
    """scikit-learn's 8×8 digits: `train` as latents, `test` held out, all as images beside them."""
    source = load_digits()
    order = np.random.default_rng(0).permutation(len(source.images))[: train + test]
    images = (source.images[order] * (255 / 16)).astype(np.uint8)
    labels = source.target[order].astype(np.int64)
    moments = encode_moments(load_vae("pixels-gray"), torch.from_numpy(images[:train])[:, None])
    manifest = Manifest(0, (2, 8, 8), "float16", 2.0, VaeInfo("pixels-gray"), "digits 8×8", 10)
    write_shards(folder, [(moments, torch.from_numpy(labels[:train]))], manifest)
    tensors = {
        "train": images[:train], "train_labels": labels[:train], "test": images[train:], "test_labels": labels[train:],
    }  # fmt: skip
    (folder / "images.safetensors").write_bytes(save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))
    return folder


def write_study(folder: Path, data: Path) -> Path:
    """The study above with its base recipe, in a folder of their own; returns the study file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.toml").write_text(RECIPE.format(data=data), encoding="utf-8")
    (folder / "tiny.toml").write_text(STUDY, encoding="utf-8")
    return folder / "tiny.toml"
