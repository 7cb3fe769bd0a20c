"""Features of image encoders: the published preprocessing, whole rows in the records' order, and damage found out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.core.errors import UserError
from st_fast.data.features import features_folder, open_features
from st_fast.data.images import load_image
from st_fast.data.shards import open_data
from st_fast.model.encoders import VisionTransformer, load_encoder, preprocess
from st_fast.prepare import __main__ as prepare
from st_fast.prepare import features as feature_module
from st_fast.prepare import writing
from tests import tiny, warm
from tests.train.supervision.encoders import Pictures, images, write_encoder, write_set

CPU = torch.device("cpu")


def cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = −0.75."""
    x, a = np.abs(distance), -0.75
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(size: int, to: int) -> np.ndarray:
    """(to, size): what bicubic resizing multiplies each axis with; pixels beyond the edge repeat it."""
    matrix = np.zeros((to, size))
    for row in range(to):
        centre = (row + 0.5) * size / to - 0.5
        for neighbour in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[row, np.clip(neighbour, 0, size - 1)] += cubic(np.array(centre - neighbour))
    return matrix


@pytest.mark.parametrize(("size", "side"), [(256, 224), (512, 448), (32, 28)])
def test_preprocessing_is_imagenets_normalisation_and_bicubic_resizing(size: int, side: int) -> None:
    pixels = images(1, size)
    normal = (pixels.numpy() / 255 - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array([0.229, 0.224, 0.225])[
        :, None, None
    ]
    matrix = resize_matrix(size, side)
    expected = np.einsum("ih,bchw,jw->bcij", matrix, normal, matrix, optimize=True)
    found = preprocess(pixels, side)
    assert found.shape == (1, 3, side, side)
    assert np.abs(found.numpy() - expected).max() < 1e-5


def test_a_grey_image_becomes_three_equal_channels() -> None:
    grey = images(2)[:, :1]
    assert torch.equal(preprocess(grey, 14), preprocess(grey.expand(-1, 3, -1, -1), 14))


@pytest.mark.parametrize("registers", [0, 3])
def test_features_are_the_patch_tokens_in_their_grid_without_cls_and_registers(registers: int, tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "dino", registers)
    encoder = load_encoder(str(path), CPU, torch.float32)
    found = encoder(images(2))
    assert isinstance(encoder, VisionTransformer) and found.shape == (2, 2, 2, 24)
    tokens = encoder.tokens.model(pixel_values=preprocess(images(2), 14)).last_hidden_state
    assert tokens.shape[1] == 1 + registers + 4
    for row in (0, 1):
        for column in (0, 1):
            assert torch.equal(found[:, row, column], tokens[:, 1 + registers + 2 * row + column])
    assert encoder.name == "dino" and str(tmp_path) not in encoder.name


def test_an_encoder_that_cant_be_had_is_told_in_one_line(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "empty").mkdir()
    transformers.ViTConfig().save_pretrained(tmp_path / "vit")
    for name, words in (("empty", "neither a folder"), ("missing", "neither a folder"), ("vit", "'vit'")):
        with pytest.raises(UserError) as refused:
            load_encoder(str(tmp_path / name), CPU, torch.float32)
        assert words in str(refused.value) and "\n" not in str(refused.value) and name in str(refused.value)
    encoder = load_encoder(str(write_encoder(tmp_path / "dino", patch=5)), CPU, torch.float32)
    with pytest.raises(UserError, match="images of 16 pixels are no multiple of its patch of 5"):
        encoder.grid(16)
    encoder = load_encoder(str(write_encoder(tmp_path / "seven", patch=14)), CPU, torch.float32)
    with pytest.raises(UserError, match="images of 24 pixels become 21, no multiple of its patch of 14"):
        encoder.grid(24)
    with pytest.raises(UserError, match="multiple of 8"):
        encoder.grid(25)


def prepared(class_folders: Path, out: Path, *options: object) -> None:
    arguments = [class_folders, out, "--size", 16, "--vae", "pixels", "--device", "cpu", "--shard-size", 4, *options]
    prepare.main([str(argument) for argument in arguments])


def write(encoder: Path, class_folders: Path, out: Path, *options: object) -> None:
    arguments = ["--features", encoder, class_folders, out, "--size", 16, "--device", "cpu", *options]
    prepare.main([str(argument) for argument in arguments])


def read(out: Path, name: str) -> np.ndarray:
    records = open_data(out)
    features = open_features(out, name, records)
    features.verify()
    rows = np.empty((len(records), *features.manifest.shape), np.float16)
    features.read_into(np.arange(len(records)), rows)
    return rows


def test_every_record_has_the_features_of_its_own_image_and_of_the_mirrored_one(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_module, "SHARD_BYTES", 5 * 2 * 2 * 24 * 2)  # five rows a shard
    out, path = tmp_path / "out", write_encoder(tmp_path / "dino")
    prepared(class_folders, out, "--flip")
    before = (out / "manifest.json").read_bytes()
    write(path, class_folders, out, "--batch-size", 3)
    encoder = load_encoder(str(path), CPU, torch.float32)
    files = sorted(class_folders.rglob("*.png"), key=lambda file: file.as_posix())
    pixels = torch.stack([torch.from_numpy(load_image(file.read_bytes(), 16, 3)) for file in files])
    rows, manifest = read(out, "dino"), open_features(out, "dino", open_data(out)).manifest
    assert np.allclose(rows[::2], encoder(pixels).numpy(), atol=2e-3)
    assert np.allclose(rows[1::2], encoder(pixels.flip(-1)).numpy(), atol=2e-3)
    assert (manifest.encoder, manifest.hash, manifest.shape) == ("dino", encoder.hash, (2, 2, 24))
    assert len(manifest.shards) == 3 and (out / "manifest.json").read_bytes() == before


def test_interrupted_writing_goes_on_and_ends_with_the_same_files(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_module, "SHARD_BYTES", 2 * 2 * 2 * 24 * 2)
    path = write_encoder(tmp_path / "dino")
    for out in (tmp_path / "a", tmp_path / "b"):
        prepared(class_folders, out)
    write(path, class_folders, tmp_path / "a")
    kept = writing.write_tensors
    calls = []

    def failing(target: Path, tensors: dict[str, np.ndarray]) -> object:
        calls.append(target.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return kept(target, tensors)

    monkeypatch.setattr(writing, "write_tensors", failing)
    with pytest.raises(KeyboardInterrupt):
        write(path, class_folders, tmp_path / "b")
    with pytest.raises(UserError, match="no complete features"):
        read(tmp_path / "b", "dino")
    write(path, class_folders, tmp_path / "b")
    assert sorted(calls) == [f"features-0000{k}.safetensors" for k in (0, 1, 1, 2)]
    ours, theirs = (features_folder(tmp_path / name, "dino") for name in "ab")
    assert {p.name: p.read_bytes() for p in ours.iterdir()} == {p.name: p.read_bytes() for p in theirs.iterdir()}
    lost, kept_bytes = ours / "features-00001.safetensors", (ours / "features-00001.safetensors").read_bytes()
    lost.write_bytes(kept_bytes[:-9])
    write(path, class_folders, tmp_path / "a")
    assert lost.read_bytes() == kept_bytes, "one that was cut off is made again"
    other = write_encoder(tmp_path / "elsewhere" / "dino", seed=1)
    with pytest.raises(UserError, match=r"begun with .* \(now "):
        write(other, class_folders, tmp_path / "b")


def test_images_that_are_not_those_of_the_latents_are_refused(class_folders: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", write_encoder(tmp_path / "dino")
    prepared(class_folders, out)
    with pytest.raises(UserError, match="--size 24: the latents are of"):
        write(path, class_folders, out, "--size", 24)
    spare = sorted(class_folders.rglob("*.png"))
    spare[0].rename(spare[-1].with_name("zz.png"))  # as many as before, one in the other class
    with pytest.raises(UserError, match="label"):
        write(path, class_folders, out)
    spare[-1].unlink()
    with pytest.raises(UserError, match="5 images"):
        write(path, class_folders, out)


def test_damage_and_swapped_rows_are_found_when_they_are_read(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", write_encoder(tmp_path / "dino"))
    shard = features_folder(folder, "dino") / "features-00000.safetensors"
    whole = bytearray(shard.read_bytes())
    row = 2 * 2 * 24 * 2
    rows = np.frombuffer(read(folder, "dino").tobytes(), np.uint8).reshape(30, row)
    first = bytes(whole).index(rows[0].tobytes())
    swapped = bytearray(whole)
    swapped[first : first + 2 * row] = whole[first + row : first + 2 * row] + whole[first : first + row]
    flipped = bytearray(whole)
    flipped[first + 3] ^= 1
    for damaged in (swapped, flipped):
        shard.write_bytes(damaged)
        features = open_features(folder, "dino", open_data(folder, verify=False))
        with pytest.raises(UserError, match="record 0"):
            features.read_into(np.array([0]), np.empty((1, 2, 2, 24), np.float16))
        with pytest.raises(UserError, match="SHA-256"):
            features.verify()
        with pytest.raises(UserError, match="SHA-256"):
            prepare.main(["--verify", str(folder)])
    shard.write_bytes(whole)
    prepare.main(["--verify", str(folder)])


def test_features_of_other_latents_are_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", write_encoder(tmp_path / "dino"))
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"random"', '"others"'))
    with pytest.raises(UserError, match="other records"):
        open_features(folder, "dino", open_data(folder))


@pytest.mark.parametrize("registers", [0, 3])
def test_the_encoders_flops_are_pytorchs_own_count(registers: int, tmp_path: Path) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    encoder = load_encoder(str(write_encoder(tmp_path / "dino", registers)), CPU, torch.float32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encoder(images(1))
    assert encoder.flops(16) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_two_processes_share_the_shards_and_the_last_one_writes_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_set(tmp_path / "whole", path := write_encoder(tmp_path / "dino"))
    shared = write_set(tmp_path / "shared")
    monkeypatch.setattr(feature_module, "SHARD_BYTES", 8 * 2 * 2 * 24 * 2)  # eight rows a shard
    encoder, pixels = load_encoder(str(path), CPU, torch.float32), images()
    for rank, last in ((1, False), (0, True)):
        records = open_data(shared)
        feature_module.write_features(shared, records, encoder, Pictures(pixels, records), share=slice(rank, None, 2))
        assert (features_folder(shared, "dino") / "manifest.json").is_file() == last
    manifest = open_features(shared, "dino", records).manifest
    assert [shard.count for shard in manifest.shards] == [8, 8, 8, 6]
    assert np.allclose(read(shared, "dino"), read(whole, "dino"), atol=2e-3)


def test_images_that_were_left_out_of_the_latents_are_left_out_of_the_features(
    class_folders: Path, tmp_path: Path
) -> None:
    out, path = tmp_path / "out", write_encoder(tmp_path / "dino")
    files = sorted(class_folders.rglob("*.png"), key=lambda file: file.as_posix())
    files[1].write_bytes(b"no picture")
    prepared(class_folders, out)
    write(path, class_folders, out)
    rows = read(out, "dino")
    pixels = [torch.from_numpy(load_image(file.read_bytes(), 16, 3)) for file in (*files[:1], *files[2:])]
    encoder = load_encoder(str(path), CPU, torch.float32)
    assert len(rows) == 5 and np.allclose(rows, encoder(torch.stack(pixels)).numpy(), atol=2e-3)


def test_without_a_network_a_hub_name_is_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = tiny.write_data(tmp_path / "set")
    command = ("-m", "st_fast.prepare", "--features", "facebook/dinov2-base", folder, folder)
    done = warm.run(*command, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "facebook/dinov2-base" in done.stderr and "can be reached" in done.stderr
