"""`prepare --features small`: an encoder of the set's own images, which no held-out image has reached."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from st_fast.core.errors import UserError
from st_fast.data.features import open_features
from st_fast.data.images import load_image
from st_fast.data.shards import open_data
from st_fast.evaluate.classifier import read_images
from st_fast.model.encoders import load_encoder
from st_fast.prepare import real_images
from st_fast.prepare.features import open_record_images
from st_fast.prepare.small_encoder import SmallEncoder, Trained, accuracy, train_encoder, training_images

from .conftest import run

CPU = torch.device("cpu")
SMALL = ("--features", "small", "--size", "8", "--device", "cpu")


def noise(number: int, label: int) -> np.ndarray:
    """Picture `number` (24, 24, 3): noise with more red (class 0) or more blue (class 1)."""
    pixels = np.random.default_rng([number, label]).integers(0, 160, (24, 24, 3))
    pixels[:, :, 2 * label] += 80
    return pixels.astype(np.uint8)


def write_noise(folder: Path, count: int) -> Path:
    for label, name in enumerate(("red", "blue")):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            file = io.BytesIO()
            Image.fromarray(noise(number, label)).save(file, "PNG")
            (folder / name / f"{number:03d}.png").write_bytes(file.getvalue())
    return folder


def prepared(tmp_path: Path, *options: str, test: int = 3, count: int = 8) -> tuple[Path, Path]:
    """A source of one folder, its latents (8×8 pixels of 3 channels), and real images with `test` held-out ones."""
    source, data = write_noise(tmp_path / "in", count), tmp_path / "out"
    run(source, data, "--size", "8", "--vae", "pixels", "--device", "cpu", *options)
    real_images.main([str(source), str(data), "--test", str(test)])
    return source, data


def test_the_command_trains_one_and_writes_its_features_on_the_grid_of_patch_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = prepared(tmp_path)
    run(*SMALL, source, data)
    told = capsys.readouterr().out
    assert "trained on 13 images; names " in told and "% of 3 held-out ones (2 classes)" in told
    kept = json.loads((data / "small-encoder" / "trained_with.json").read_text())
    assert (kept["images"], kept["held_out"]) == (13, 3) and 0 <= kept["accuracy"] <= 1
    records = open_data(data, verify=False)
    found = open_features(data, "small-encoder", records)
    found.verify()
    assert found.manifest.shape == (4, 4, 128) and len(found) == 16
    encoder = load_encoder(str(data / "small-encoder"), CPU, torch.float32)
    names = [*sorted((source / "blue").iterdir()), *sorted((source / "red").iterdir())]  # the order of the classes
    truth = encoder(torch.stack([torch.from_numpy(load_image(names[i].read_bytes(), 8, 3)) for i in (15, 2, 9)]))
    rows = np.empty((3, 4, 4, 128), np.float16)
    found.read_into(np.array([15, 2, 9]), rows)
    assert torch.allclose(torch.from_numpy(rows).float(), truth, atol=4e-3, rtol=4e-3)
    weights = (data / "small-encoder" / "model.safetensors").stat()
    run(*SMALL, source, data)
    assert (data / "small-encoder" / "model.safetensors").stat().st_ino == weights.st_ino
    assert "trained on" not in capsys.readouterr().out


def test_held_out_and_mirrored_images_are_not_trained_on(tmp_path: Path) -> None:
    source, data = prepared(tmp_path, "--flip", test=5)
    records, real = open_data(data, verify=False), read_images(data)
    images, labels = training_images(open_record_images(data, records, str(source), ""), records, real.test)
    order = np.lexsort(images.flatten(1).numpy().T)
    wanted = np.lexsort(real.train.flatten(1).numpy().T)
    assert torch.equal(images[order], real.train[wanted]) and len(images) == 11
    assert torch.equal(labels[order], real.train_labels[wanted])


def test_it_learns_what_the_classes_differ_by_and_leaves_the_random_state() -> None:
    pictures = torch.from_numpy(np.stack([noise(n, n % 2) for n in range(120)])).permute(0, 3, 1, 2).contiguous()
    labels = torch.arange(120) % 2
    config = SmallEncoder(patch=12, width=16, depth=1, heads=2, epochs=5, batch_size=16, peak_lr=1e-2, flip=True)
    state = torch.get_rng_state()
    trained = train_encoder(pictures[:70], labels[:70], config)
    assert torch.equal(state, torch.get_rng_state()) and not trained.encoder.training
    assert accuracy(trained, pictures[70:], labels[70:]) > 0.9
    other = Trained(trained.encoder, torch.nn.Linear(16, 2))
    with torch.no_grad():
        other.head.weight.zero_()
        other.head.bias.copy_(torch.tensor([0.0, 1.0]))  # always says 1
    assert accuracy(other, pictures[90:], torch.tensor([1, 0, 0] * 10)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("steps", [5, 10, 11])
def test_few_images_are_enough_whatever_the_number_of_steps(steps: int) -> None:
    pictures, labels = torch.zeros(steps, 3, 24, 24, dtype=torch.uint8), torch.arange(steps) % 2
    config = SmallEncoder(patch=12, width=16, depth=1, heads=2, epochs=1, batch_size=1)
    encoder = train_encoder(pictures, labels, config).encoder
    assert all(bool(value.isfinite().all()) for value in encoder.parameters())


def test_what_it_needs_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = prepared(tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", "0")
        with pytest.raises(UserError, match=r"--features small: .* run this without torchrun once"):
            run(*SMALL, source, data)
    with pytest.raises(UserError, match=r"no complete features of small-encoder; .* --features small IMAGES"):
        open_features(data, "small-encoder", open_data(data, verify=False))
    (data / "images.safetensors").unlink()
    with pytest.raises(UserError, match=r"images.safetensors: no such file; st-fast real-images SOURCE"):
        run(*SMALL, source, data)
    run(source, tmp_path / "one", "--size", "8", "--vae", "pixels", "--device", "cpu", "--unlabelled")
    with pytest.raises(UserError, match=r"--features small: .*one has one class"):
        run(*SMALL, source, tmp_path / "one")
    assert not (data / "small-encoder").exists()


def test_a_dry_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, data = prepared(tmp_path, count=3, test=1)
    run(*SMALL, source, data, "--dry-run")
    assert "a small encoder would be trained on the images first" in capsys.readouterr().out
    assert not (data / "small-encoder").exists() and not (data / "features").exists()
