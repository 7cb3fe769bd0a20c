"""Every line of the table of data sources is run as it stands, on a small set of its kind."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.data.shards import open_data
from st_fast.model import vae as vaes
from st_fast.prepare import __main__ as prepare
from st_fast.prepare.small_vae import SmallVae, new_vae
from st_fast.recipe import load
from tests import autoencoders
from tests.data import foreign_latents, test_coco, test_repa
from tests.prepare import sources
from tests.tiny import ROOT, write_data

ROW = re.compile(r"^\| ([^|]+) \| `python -m st_fast\.prepare ([^`]+)` \|$", re.MULTILINE)
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## What you have, and the one command")[2].partition("\n## ")[0]
ROWS = ROW.findall(SECTION)


def vae(write: Callable[[Path, torch.Tensor], object]) -> Callable[[Path], object]:
    """A tiny autoencoder; one that is a file lies, with its statistics beside it, where it is asked for."""

    def make(path: Path) -> object:
        images = autoencoders.write_images(path.parent / "of-vaes")
        if path.suffix in (".pt", ".ckpt"):
            made = Path(str(write(path.parent / "files", images)))
            made.rename(path)
            (path.parent / "latents_stats.pt").write_bytes((path.parent / "files" / "latents_stats.pt").read_bytes())
            return path
        return write(path, images)

    return make


def plain_vae(path: Path) -> None:
    """As SD's: four channels and a scaling factor."""
    torch.manual_seed(0)
    made = new_vae(SmallVae((4, 4, 4, 4), 0), 3, 32)
    made.register_to_config(scaling_factor=0.18215)
    made.save_pretrained(path)


def coco_images(path: Path) -> None:
    sources.write({f"COCO_train2014_{n:012d}.jpg": sources.picture(n) for n in range(4)}, path)
    images = [{"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg"} for n in range(4)]
    captions = [{"id": n, "image_id": n, "caption": f"number {n}"} for n in range(4)]
    (path.parent / "captions_train2014.json").write_text(json.dumps({"images": images, "annotations": captions}))


def birds(path: Path) -> None:
    sources.img2dataset_shards(path, [{"species": name} for name in ("wren", "owl", "wren", "owl")])


MAKERS: dict[str, Callable[[Path], object]] = {
    "pictures": lambda path: autoencoders.write_images(path),
    "pets.zip": sources.class_zip,
    "photos": sources.nested_folders,
    "captioned": sources.captioned_folder,
    "train2014": coco_images,
    "ILSVRC2012_img_train.tar": sources.imagenet_train_tar,
    "imagenet-tars": sources.imagenet_tars,
    "shards": sources.webdataset_shards,
    "laion": sources.img2dataset_shards,
    "birds": birds,
    "edm-images": sources.edm_folder,
    "snapshot": sources.parquet_snapshot,
    "animals": lambda path: sources.parquet_snapshot(path, ["emu", "cat", "emu"], columns=("photo", "kind")),
    "fashion-mnist": sources.idx_files,
    "saved": sources.saved_dataset,
    "FLUX.1-dev": lambda path: vae(autoencoders.flux1)(path / "vae"),
    "FLUX.2-dev": lambda path: vae(autoencoders.flux2)(path / "vae"),
    "dc-ae-f32c32-sana-1.1-diffusers": vae(autoencoders.dc_ae),
    "vavae.pt": vae(autoencoders.va_vae),
    "kl16.ckpt": vae(autoencoders.va_vae),
    "e2e-invae-hf": vae(autoencoders.e2e),
    "RAE-dinov2-wReg-base-ViTXL-n08": vae(autoencoders.rae),
    "e2e-sdvae": plain_vae,
    "repa": test_repa.write_layout,
    "vavae_imagenet256": foreign_latents.lightningdit,
    "features": foreign_latents.fast_dit,
    "mar-cache": foreign_latents.mar,
    "uvit-features": foreign_latents.uvit,
    "coco256_features/train": test_coco.write_layout,
    "img512-sd.zip": foreign_latents.edm2,
    "speedrun": foreign_latents.speedrun,
    "maskdit-wds": foreign_latents.maskdit,
    "latent-shards": foreign_latents.webdataset,
    "data/finished": write_data,
}


def test_the_table_has_every_kind() -> None:
    lines = [line for line in SECTION.splitlines() if line.startswith("| ")]
    assert len(ROWS) == len(lines) - 1 >= 30
    named = {word for _, command in ROWS for word in shlex.split(command)}
    assert set(MAKERS) <= named


@pytest.mark.parametrize(("what", "command"), ROWS, ids=[what for what, _ in ROWS])
def test_the_line_does_what_it_says(
    what: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    plain_vae(tmp_path / "sd")
    monkeypatch.setitem(vaes.PRESETS, "sd-vae-ft-mse", str(tmp_path / "sd"))
    words = shlex.split(command)
    if "saved" in words:
        pytest.importorskip("datasets")
    if {"snapshot", "animals"} & set(words):
        pytest.importorskip("pyarrow")
    for word in words:
        if word in MAKERS:
            (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
            MAKERS[word](tmp_path / word)
    if "--vae-steps" in words:
        words[words.index("--vae-steps") + 1] = "2"  # for the test only: the set is as complete after two
    prepare.main(words)
    paths = [word for word in words if word.startswith(("data/", "repa-again"))]
    out = tmp_path / paths[-1]
    prepare.main(["--verify", str(out)])
    records = open_data(out, verify=False)
    assert len(records) >= 3 and records.manifest.num_classes == 1 + int(np.max(records.labels))
    told = capsys.readouterr().out
    if "--to-repa" not in words:
        assert "st_fast.train" in told or "--captions" in words
    if "own.toml" in words:
        assert load(tmp_path / "own.toml").model.num_classes == 1
