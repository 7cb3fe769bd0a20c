"""The digits folder is made whole, made once, and made anew when it is damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from st_fast.core.errors import UserError
from st_fast.data.shards import open_data
from st_fast.model.vae import encode_moments, load_vae, vae_hash
from st_fast.prepare import digits
from st_fast.prepare.digits import load_images, prepare_digits
from st_fast.prepare.small_vae import SmallVae
from tests import tiny


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VAE of two training steps, since how good it is doesn't matter here."""
    monkeypatch.setattr(digits, "VAE_CONFIG", SmallVae((4, 4, 4), 2))


def test_the_split_is_fixed_stratified_and_complete() -> None:
    from sklearn.datasets import load_digits

    images = load_images()
    assert images["train"].shape == (1437, 32, 32) and images["test"].shape == (360, 32, 32)
    pixels, labels = load_digits(return_X_y=True)
    both = np.concatenate([images["train_labels"], images["test_labels"]])
    assert np.array_equal(np.bincount(both), np.bincount(labels))
    assert np.bincount(images["test_labels"]).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    shrunk = [np.asarray(Image.fromarray(one).resize((8, 8), Image.Resampling.BOX)) for one in images["train"]]
    digits_of_ours = {np.rint(one / 255 * 3).astype(int).tobytes() for one in shrunk}
    assert len(digits_of_ours) > 1_400  # different pictures, not one repeated
    again = load_images()
    assert all(np.array_equal(images[name], again[name]) for name in images)
    assert pixels.max() == 16 and images["train"].max() == 255


def test_the_folder_holds_latents_vae_and_images_that_belong_together(quick: None, tmp_path: Path) -> None:
    said: list[str] = []
    prepare_digits(tmp_path / "digits", said.append)
    shards = open_data(tmp_path / "digits")
    manifest = shards.manifest
    assert (manifest.count, manifest.shape, manifest.num_classes) == (1437, (8, 8, 8), 10)
    images = load_file(tmp_path / "digits" / "images.safetensors")
    assert np.array_equal(shards.labels, images["train_labels"])
    vae = load_vae(tmp_path / "digits" / manifest.vae.path)
    assert manifest.vae.hash == vae_hash(vae) and vae.config.scaling_factor == manifest.scale
    chosen = np.array([5, 700, 1436])
    moments = encode_moments(vae, torch.from_numpy(images["train"][chosen])[:, None])
    assert torch.allclose(shards.gather(chosen)[0].float(), moments, atol=2e-3)
    everything = shards.gather(np.arange(1437))[0].float()
    mean, std = everything.chunk(2, dim=1)
    assert abs(float((manifest.scale * (mean + std * torch.randn_like(std))).std()) - 1) < 0.02
    assert len(said) == 2 and "of 255" in said[1]
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_complete_folder_is_kept_and_a_damaged_one_made_anew(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = tmp_path / "digits", []
    original = digits.train_vae
    monkeypatch.setattr(digits, "train_vae", lambda *args: made.append(1) or original(*args))
    prepare_digits(folder, lambda text: None)
    prepare_digits(folder, lambda text: None)
    assert len(made) == 1
    first = open_data(folder).digest
    for name in ("images.safetensors", "latents-00000.safetensors", "manifest.json", "vae/config.json"):
        (folder / name).unlink()
        prepare_digits(folder, lambda text: None)
        assert open_data(folder).digest == first
    assert len(made) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_what_is_not_the_digits_is_never_replaced(quick: None, tmp_path: Path) -> None:
    (tmp_path / "recipe.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    tiny.write_data(tmp_path / "latents")
    (tmp_path / "latents" / "reconstructions.png").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    before = sorted(tmp_path.rglob("*"))
    for name in ("recipe.txt", "folder", "latents", "link"):
        with pytest.raises(UserError, match="holds something else than the digits"):
            prepare_digits(tmp_path / name, pytest.fail)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "empty")
    prepare_digits(tmp_path / "elsewhere", lambda text: None)
    assert (tmp_path / "elsewhere").is_symlink() and open_data(tmp_path / "empty").manifest.count == 1437


def test_an_interrupted_preparation_leaves_nothing(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "write_shards", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_digits(tmp_path / "digits", lambda text: None)
    assert not list(tmp_path.iterdir())
