"""The VAE of a set: a named, given or small one, known again, kept beside the latents, and never led astray."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.core.errors import UserError
from st_fast.data.images import load_image
from st_fast.data.manifest import VaeInfo, read_manifest
from st_fast.data.shards import open_data
from st_fast.model.vae import encode_moments, load_vae, vae_hash
from st_fast.prepare import commands, vaes
from st_fast.prepare.small_vae import SmallVae, new_vae
from tests.data.test_repa import write_layout

from .conftest import run


def test_a_vae_of_another_name_is_the_same_where_it_is_the_same(tmp_path: Path) -> None:
    local, out = VaeInfo("mine", "hash", "vae"), tmp_path / "out"
    hub = VaeInfo("sd-vae-ft-mse", "hash")
    for asked, made in (
        ("sd-vae-ft-mse", hub),
        ("stabilityai/sd-vae-ft-mse", hub),
        ("sd-vae-ft-mse", VaeInfo("stabilityai/sd-vae-ft-mse")),
        (str(tmp_path / "moved" / "mine"), local),
        (str(out / "vae"), local),
        ("small", VaeInfo("small", "hash", "vae")),
        ("anything", VaeInfo("")),
    ):
        found, wanted = commands.same_names(asked, made, out)
        assert found == wanted, (asked, made)
    for asked, made in (
        ("sd-vae-ft-ema", hub),
        ("mine", hub),
        ("small", local),
        ("pixels", local),
        ("org/mine", local),
    ):
        found, wanted = commands.same_names(asked, made, out)
        assert found != wanted, (asked, made)


def test_a_small_vae_is_trained_on_the_images_and_kept(class_folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [class_folders, out, "--size", 8, "--vae", "small", "--vae-steps", 2, "--device", "cpu"]
    run(*arguments)
    manifest = read_manifest(out)
    vae = load_vae(out / manifest.vae.path)
    assert manifest.vae.name == "small" and manifest.vae.hash == vae_hash(vae)
    assert manifest.scale == vae.config.scaling_factor != 0.18215
    assert manifest.shape == (8, 4, 4)
    files = sorted(class_folders.rglob("*.png"), key=lambda path: path.as_posix())
    image = torch.from_numpy(load_image(files[0].read_bytes(), 8, 3))[None]
    assert torch.allclose(open_data(out).gather(np.arange(1))[0].float(), encode_moments(vae, image), atol=2e-3)


def test_size_that_the_vae_can_not_reduce_is_refused(class_folders: Path, tiny_vae: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"size = 18: the VAE reduces by 4"):
        run(class_folders, tmp_path / "out", "--size", 18, "--vae", tiny_vae)


def test_training_images_leave_out_the_bad(odd_folder: Path) -> None:
    images = vaes.training_images(commands.open_source(odd_folder), 8)
    assert images.shape == (10, 3, 8, 8) and images.dtype == torch.uint8


def test_latents_of_another_vae_in_repas_layout_carry_that_vae(tiny_vae: Path, tmp_path: Path) -> None:
    write_layout(tmp_path / "repa")
    run("--from-repa", tmp_path / "repa", tmp_path / "plain", "--device", "cpu")
    assert read_manifest(tmp_path / "plain").vae == VaeInfo("sd-vae-ft-mse")
    arguments = ("--from-repa", tmp_path / "repa", tmp_path / "out", "--vae", tiny_vae, "--device", "cpu")
    new_vae(SmallVae((4, 4, 4), 0, latent_channels=3), 3, 16).save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match="3 channels, the latents have 4"):
        run(*arguments[:4], tmp_path / "three", *arguments[5:])
    config = json.loads((tiny_vae / "config.json").read_text())
    (tiny_vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.75}))
    run(*arguments)
    made = read_manifest(tmp_path / "out")
    assert (made.scale, made.vae.name, made.vae.path) == (0.75, "my vae", "vae")
    assert made.vae.hash == vae_hash(load_vae(tiny_vae)) == vae_hash(load_vae(made.vae.source(tmp_path / "out")))
    (tiny_vae / "config.json").write_text(json.dumps(config | {"shift_factor": 0.5}))
    with pytest.raises(UserError, match=r"has scale 0\.18215, shift 0\.5; .*repa has a place for the scale alone"):
        run("--from-repa", tmp_path / "repa", tmp_path / "x", "--vae", tiny_vae, "--device", "cpu")
    with pytest.raises(UserError, match="were made by an AutoencoderKL"):
        run("--from-repa", tmp_path / "repa", tmp_path / "x", "--vae", "pixels", "--device", "cpu")


def test_what_half_precision_encoded_has_the_vae_as_it_is(tiny_vae: Path, odd_folder: Path, tmp_path: Path) -> None:
    arguments = (odd_folder, tmp_path / "out", "--vae", tiny_vae, "--size", "16", "--device", "cpu")
    run(*arguments, "--precision", "bf16")
    made, vae = read_manifest(tmp_path / "out").vae, vae_hash(load_vae(tiny_vae))
    assert made.hash == vae == vae_hash(load_vae(made.source(tmp_path / "out")))
    run(*arguments, "--precision", "bf16")
    with pytest.raises(UserError, match="precision"):
        run(*arguments, "--precision", "fp32")


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "link", "vae/../../elsewhere"])
def test_a_manifests_vae_never_leads_out_of_its_folder(path: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="must be relative and stay inside"):
        VaeInfo("small", "", path).source(tmp_path / "set")
    for name in ("/etc", "../elsewhere", "a/b/c", "x y", ""):
        with pytest.raises(UserError, match="no name that the hub could have"):
            VaeInfo(name).source(tmp_path / "set")
    assert VaeInfo("stabilityai/sd-vae-ft-mse").source(tmp_path) == "stabilityai/sd-vae-ft-mse"
