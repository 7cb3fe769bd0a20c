"""Other projects' latents: recognised, read as float64 has them, converted to the same, or refused in one line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile
from st_fast.core.records import log_records
from st_fast.data.labels import MAX_CLASSES
from st_fast.data.layouts import recognise
from st_fast.data.layouts.webdataset import WebdatasetSet
from st_fast.data.manifest import VaeInfo, read_manifest
from st_fast.data.shards import open_data, read_any_manifest
from st_fast.prepare import __main__ as prepare
from st_fast.prepare.small_vae import SmallVae, new_vae
from st_fast.recipe import load
from st_fast.train.continuity import file_differences
from st_fast.train.run import run
from tests import tiny
from tests.autoencoders import ldm_table

from . import foreign_latents
from .foreign_latents import SIDES, Truth, normal, npy, object_array, tars

MAKERS: dict[str, tuple[str, Callable[[Path], Truth]]] = {
    "LightningDiT": ("LightningDiT", lambda path: foreign_latents.lightningdit(path / "set")),
    "LightningDiT in half": ("LightningDiT", lambda path: foreign_latents.lightningdit(path / "set", dtype=np.float16)),
    "fast-DiT": ("fast-DiT", lambda path: foreign_latents.fast_dit(path / "set")),
    "MAR": ("MAR", lambda path: foreign_latents.mar(path / "set")),
    "U-ViT": ("U-ViT's ImageNet", lambda path: foreign_latents.uvit(path / "set")),
    "U-ViT today": ("U-ViT's ImageNet", lambda path: foreign_latents.uvit(path / "set", old=False)),
    "EDM2's zip": ("EDM2 and SpeedrunDiT", lambda path: foreign_latents.edm2(path / "set.zip")),
    "EDM2, packed": (
        "EDM2 and SpeedrunDiT", lambda path: foreign_latents.edm2(path / "set.zip", packing=zipfile.ZIP_DEFLATED)
    ),
    "EDM2's folder": ("EDM2 and SpeedrunDiT", lambda path: foreign_latents.edm2(path / "set")),
    "REPA's in a zip": ("EDM2 and SpeedrunDiT", lambda path: foreign_latents.edm2(path / "set.zip", unit=False)),
    "SpeedrunDiT": ("EDM2 and SpeedrunDiT", lambda path: foreign_latents.speedrun(path / "set")),
    "MaskDiT": ("webdataset", lambda path: foreign_latents.maskdit(path / "set")),
}  # fmt: skip


def new_vae_folder(path: Path, channels: int = 4, levels: int = 3, **config: float) -> Path:
    """An untrained AutoencoderKL that halves an image levels - 1 times."""
    torch.manual_seed(0)
    vae = new_vae(SmallVae((4,) * levels, 0, latent_channels=channels), 3, 16)
    vae.register_to_config(**config)
    vae.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", MAKERS)
def test_a_layout_is_recognised_and_read_in_place_as_float64_has_it(name: str, tmp_path: Path) -> None:
    layout, make = MAKERS[name]
    truth = make(tmp_path)
    found = recognise(truth.path)
    assert found is not None and found.name == layout
    with closing(open_data(truth.path, at_least=len(truth.labels))) as records:
        made = records.manifest
        assert (made.scale, made.vae.name, made.vae.factor, made.posterior, made.flip, made.shift) == (
            truth.scale, truth.vae, truth.factor, truth.posterior, truth.flip, 0.0,
        )  # fmt: skip
        assert (made.dtype, made.shape, made.count) == ("float32", truth.records.shape[1:], len(truth.labels))
        assert made.class_names == truth.names and made.num_classes == 1 + max(truth.labels)
        np.testing.assert_allclose(made.latents_mean, truth.mean)
        np.testing.assert_allclose(made.latents_std, truth.std)
        chosen = np.array([5, 0, len(truth.labels) - 1, 5, 2])
        read, labels = records.gather(chosen)
        np.testing.assert_allclose(read.numpy(), truth.records[chosen], rtol=2e-6, atol=2e-6)
        if truth.posterior == "sample":  # also the smallest stds, whose log-variance was clamped
            half = len(truth.records[0]) // 2
            np.testing.assert_allclose(read.numpy()[:, half:], truth.records[chosen, half:], rtol=1e-5)
        assert labels.tolist() == [truth.labels[index] for index in chosen]
        assert records.labels.tolist() == truth.labels
    assert read_any_manifest(truth.path) == made
    with pytest.raises(RuntimeError):  # it was closed
        records.gather(chosen)


@pytest.mark.parametrize("name", MAKERS)
def test_converting_gives_the_records_that_are_read_in_place(name: str, tmp_path: Path) -> None:
    truth, out = MAKERS[name][1](tmp_path), tmp_path / "out"
    command = ["--from-latents", str(truth.path), str(out), "--dtype", "float32", "--shard-size", "4"]
    prepare.main([*command, "--dry-run"])
    assert not out.exists()
    prepare.main(command)
    prepare.main(command)
    with closing(open_data(truth.path)) as here, closing(open_data(out)) as there:
        every = np.arange(len(here))
        for mine, other in zip(here.gather(every), there.gather(every), strict=True):
            assert torch.equal(mine, other)
        said = [vars(records.manifest) | {"shards": ()} for records in (here, there)]
        assert said[0] == said[1] and len(there.manifest.shards) > 1


@pytest.mark.parametrize("name", ["LightningDiT", "fast-DiT", "EDM2's zip"])
def test_training_on_latents_as_they_lie_is_training_on_their_shards(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_latents, "SIDES", (4, 4))
    torch.set_num_threads(1)
    truth = MAKERS[name][1](tmp_path)
    prepare.main(["--from-latents", str(truth.path), str(tmp_path / "shards"), "--dtype", "float32"])
    channels = truth.records.shape[1] // (1 if truth.posterior == "mean" else 2)
    losses = []
    for data in (truth.path, tmp_path / "shards"):
        text = tiny.RECIPE.partition('[[stage]]\nname = "transcend"')[0].replace("steps = 10", "steps = 3")
        text = text.replace("[data]", f"channels = {channels}\n[data]").replace("batch_size = 8", "batch_size = 4")
        text = text.replace("num_classes = 5", f"num_classes = {1 + max(truth.labels)}")
        (tmp_path / "tiny.toml").write_text(text.format(data=data, out=tmp_path / f"run of {data.name}"))
        run(load(tmp_path / "tiny.toml"))
        log = list(log_records(tmp_path / f"run of {data.name}" / "log.jsonl"))
        losses.append([record["loss"] for record in log if "loss" in record])
    assert losses[0] == losses[1] and len(losses[0]) == 3 and np.isfinite(losses[0]).all()


def test_images_from_0_to_1_keep_their_black(tmp_path: Path) -> None:
    for unit, black in ((True, 0.0), (False, -1.0)):
        truth = foreign_latents.edm2(tmp_path / f"{unit}.zip", unit=unit)
        prepare.main(["--from-latents", str(truth.path), str(tmp_path / f"{unit}")])
        assert read_manifest(tmp_path / f"{unit}").vae.black == read_any_manifest(truth.path).vae.black == black
    pytest.importorskip("diffusers")
    vae, truth = new_vae_folder(tmp_path / "mine", levels=4), foreign_latents.edm2(tmp_path / "again.zip")
    prepare.main(["--from-latents", str(truth.path), str(tmp_path / "named"), "--vae", str(vae)])
    made = read_manifest(tmp_path / "named")
    assert (made.vae.name, made.vae.black, made.latents_mean) == ("mine", 0.0, truth.mean)


@pytest.mark.parametrize("name", ["fast-DiT", "U-ViT"])
def test_labels_in_many_small_files_are_read_in_blocks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from st_fast.data.layouts import npy as layout_npy

    monkeypatch.setattr(layout_npy, "BLOCK", 3)
    truth = MAKERS[name][1](tmp_path)
    with closing(open_data(truth.path, verify=False)) as records:
        assert records.labels.tolist() == truth.labels


def test_a_set_of_one_file_and_one_class_is_read(tmp_path: Path) -> None:
    path = foreign_latents.lightningdit(tmp_path / "set").path
    (path / "latents_rank01_shard000.safetensors").unlink()
    rewrite("*", labels=np.zeros(4, np.int64))(path)
    with closing(open_data(path)) as records:
        assert records.labels.tolist() == [0] * 8 and records.manifest.num_classes == 1


@pytest.mark.parametrize(
    ("make", "channels"),
    [
        (foreign_latents.lightningdit, 4), (foreign_latents.mar, 4), (foreign_latents.speedrun, 4),
        (foreign_latents.fast_dit, 3), (foreign_latents.uvit, 3), (foreign_latents.maskdit, 3),
    ],
)  # fmt: skip
def test_latents_of_other_channels_than_the_projects_are_of_no_vae_that_is_known(
    make: Callable[..., Truth], channels: int, tmp_path: Path
) -> None:
    path = make(tmp_path / "set", channels=channels).path
    layout = recognise(path)
    assert layout is not None
    with closing(layout.open(path)) as records:
        assert records.manifest.channels == channels and records.manifest.vae == VaeInfo("") and records.unknown()
    with pytest.raises(BadFile, match="by which VAE"):
        open_data(path)


def test_the_folder_above_fast_dits_latents_may_have_a_name_like_theirs(tmp_path: Path) -> None:
    assert read_any_manifest(foreign_latents.fast_dit(tmp_path / "dit_features").path).count == 12
    (tmp_path / "set_labels").mkdir()
    assert read_any_manifest(foreign_latents.fast_dit(tmp_path / "set").path).count == 12


def test_mars_files_may_be_packed_and_have_others_beside_their_folders(tmp_path: Path) -> None:
    truth = foreign_latents.mar(tmp_path / "set")
    for file in truth.path.rglob("*.npz"):
        with np.load(file) as stored:
            arrays = dict(stored)
        np.savez_compressed(file, **arrays)
    (truth.path / "00 notes.txt").write_text("x")
    (truth.path / ".hidden").mkdir()
    with closing(open_data(truth.path)) as records:
        read, labels = records.gather(np.arange(len(truth.labels)))
        np.testing.assert_allclose(read.numpy(), truth.records, rtol=1e-5, atol=2e-6)
        assert labels.tolist() == truth.labels


def test_uvits_headers_may_be_of_version_2(tmp_path: Path) -> None:
    truth = foreign_latents.uvit(tmp_path / "set", old=False)
    for file in truth.path.glob("*.npy"):
        data = file.read_bytes()
        file.write_bytes(data[:6] + b"\2\0" + data[8:10] + b"\0\0" + data[10:])
    with closing(open_data(truth.path)) as records:
        read, labels = records.gather(np.arange(11))
        np.testing.assert_allclose(read.numpy(), truth.records, rtol=1e-5, atol=2e-6)
        assert labels.tolist() == truth.labels


def test_fast_dits_set_of_one_record_is_read(tmp_path: Path) -> None:
    truth = foreign_latents.fast_dit(tmp_path / "set")
    for file in truth.path.rglob("*.npy"):
        if file.name != "0.npy":
            file.unlink()
    with closing(open_data(truth.path)) as records:
        np.testing.assert_allclose(records.gather(np.array([0]))[0].numpy(), truth.records[:1], rtol=2e-6)


def test_safetensors_without_latents_in_them_are_no_layout(tmp_path: Path) -> None:
    save_file({"moments": normal(1, 4, 8, *SIDES), "labels": np.arange(4)}, tmp_path / "weights.safetensors")
    assert recognise(tmp_path) is None


def test_fast_dits_model_sees_what_is_stored(tmp_path: Path) -> None:
    truth = foreign_latents.fast_dit(tmp_path / "set")
    with closing(open_data(truth.path)) as records:
        seen = records.gather(np.array([3]))[0][0] * records.manifest.scale
    stored = np.load(truth.path / "imagenet256_features" / "3.npy")[0]
    np.testing.assert_allclose(seen.numpy(), stored, rtol=2e-7)


def test_a_scale_is_honoured_where_the_layout_has_none_and_refused_where_it_says_another(tmp_path: Path) -> None:
    truth = foreign_latents.lightningdit(tmp_path / "l")
    command = ["--from-latents", str(truth.path), str(tmp_path / "scaled"), "--scale", "0.75"]
    prepare.main(command)
    assert read_manifest(tmp_path / "scaled").scale == 0.75
    with pytest.raises(UserError, match=r"made with normalisation scale 0\.75, .*\(now scale 1, "):
        prepare.main(command[:3])
    fast = foreign_latents.fast_dit(tmp_path / "f")
    with pytest.raises(UserError, match=r"--scale 0\.5: the latents in .* have 0\.18215; leave it out"):
        prepare.main(["--from-latents", str(fast.path), str(tmp_path / "x"), "--scale", "0.5"])
    prepare.main(["--from-latents", str(fast.path), str(tmp_path / "same"), "--scale", "0.18215"])
    with pytest.raises(UserError, match="--scale 0: at least"):
        prepare.main(["--from-latents", str(truth.path), str(tmp_path / "x"), "--scale", "0"])
    for path, given in ((truth.path, "stats.pt"), (fast.path, "auto")):
        with pytest.raises(UserError, match=rf"--latents-stats {given}: the latents in .* have scale .* already"):
            prepare.main(["--from-latents", str(path), str(tmp_path / "x"), "--latents-stats", given])


def test_a_variant_without_a_vae_is_refused(tmp_path: Path) -> None:
    truth = foreign_latents.uvit(tmp_path / "u")
    with pytest.raises(UserError, match="--vae-variant fp16: is of the VAE that --vae names"):
        prepare.main(["--from-latents", str(truth.path), str(tmp_path / "x"), "--vae-variant", "fp16"])


def test_a_named_vae_decodes_what_it_can_have_made_and_no_other(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    vae = new_vae_folder(tmp_path / "mine", levels=4, scaling_factor=0.625)
    uvit, odd = foreign_latents.uvit(tmp_path / "u"), foreign_latents.lightningdit(tmp_path / "l", channels=4)
    prepare.main(["--from-latents", str(uvit.path), str(tmp_path / "out"), "--vae", str(vae)])
    made = read_manifest(tmp_path / "out")
    assert (made.vae.name, made.vae.path, made.vae.factor, made.scale) == ("mine", "vae", 8, 0.18215)
    four = new_vae_folder(tmp_path / "four", levels=3)
    with pytest.raises(UserError, match=r"reduces an image by 4, the latents' VAE by 8 \(sd-vae-ft-ema\)"):
        prepare.main(["--from-latents", str(uvit.path), str(tmp_path / "x"), "--vae", str(four)])
    with pytest.raises(UserError, match="4 channels, the latents have 16"):
        mar = foreign_latents.mar(tmp_path / "m")
        prepare.main(["--from-latents", str(mar.path), str(tmp_path / "x"), "--vae", str(vae)])
    with pytest.raises(UserError, match="latents of 4 channels, and it doesn't say by which VAE"):
        open_data(odd.path)
    prepare.main(["--from-latents", str(odd.path), str(tmp_path / "known"), "--vae", str(vae)])
    known = read_manifest(tmp_path / "known")
    assert known.scale == 1.0 and known.latents_std == odd.std, "its own statistics, not the VAE's factor"
    with pytest.raises(UserError, match="were made by an AutoencoderKL"):
        prepare.main(["--from-latents", str(odd.path), str(tmp_path / "x"), "--vae", "pixels"])


@pytest.mark.parametrize("suffix", ["npy", "latent.npy", "moments.npy"])
@pytest.mark.parametrize("json_labels", [False, True])
def test_webdatasets_arrays_need_their_vae_and_say_by_its_channels_what_they_are(
    suffix: str, json_labels: bool, tmp_path: Path
) -> None:
    pytest.importorskip("diffusers")
    truth = foreign_latents.webdataset(tmp_path / "set", suffix, json_labels=json_labels)
    with pytest.raises(BadFile, match=rf"KEY\.{suffix} of .*nothing says by which VAE: .*--from-latents .* --vae VAE"):
        open_data(truth.path)
    command = ["--from-latents", str(truth.path), str(tmp_path / "out"), "--dtype", "float32"]
    with pytest.raises(UserError, match="nothing says by which VAE"):
        prepare.main(command)
    vae = new_vae_folder(tmp_path / "mine", scaling_factor=0.625)
    prepare.main([*command, "--vae", str(vae)])
    with closing(open_data(tmp_path / "out")) as records:
        made = records.manifest
        assert (made.scale, made.posterior, made.vae.path) == (0.625, truth.posterior, "vae")
        read, labels = records.gather(np.arange(len(truth.labels)))
        np.testing.assert_allclose(read.numpy(), truth.records, rtol=1e-6)
        assert labels.tolist() == truth.labels
    prepare.main([*command[:2], str(tmp_path / "scaled"), "--vae", str(vae), "--scale", "0.375"])
    assert read_manifest(tmp_path / "scaled").scale == 0.375


def test_what_the_vae_takes_off_its_latents_is_taken_off_webdatasets(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    truth = foreign_latents.webdataset(tmp_path / "set", "moments.npy")
    vae = new_vae_folder(tmp_path / "mine", scaling_factor=0.625, shift_factor=0.25)
    command = ["--from-latents", str(truth.path), str(tmp_path / "out"), "--dtype", "float32", "--vae", str(vae)]
    prepare.main(command)
    expected = truth.records.copy()
    expected[:, :4] -= 0.25
    with closing(open_data(tmp_path / "out")) as records:
        assert records.manifest.shift == 0.25 and records.manifest.scale == 0.625
        np.testing.assert_allclose(records.gather(np.arange(7))[0].numpy(), expected, rtol=1e-5, atol=1e-6)
    mean, std = np.array([1.0, -2.0, 0.5, 3.0]), np.array([2.0, 0.5, 4.0, 1.5])
    (tmp_path / "stats.json").write_text(json.dumps({"mean": mean.tolist(), "std": std.tolist()}))
    given = ["--latents-stats", str(tmp_path / "stats.json")]
    prepare.main([*command[:2], str(tmp_path / "stats"), *command[3:], *given])
    by = np.tile(std, 2)[:, None, None]
    expected = truth.records / by
    expected[:, :4] -= (mean / std)[:, None, None]
    with closing(open_data(tmp_path / "stats")) as records:
        assert records.manifest.scale == 1.0 and records.manifest.latents_mean == tuple(mean)
        np.testing.assert_allclose(records.gather(np.arange(7))[0].numpy(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="measures images"):
        prepare.main([*command, "--latents-stats", "auto"])


def test_a_vae_that_says_nothing_of_a_normalisation_needs_one(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    truth = foreign_latents.webdataset(tmp_path / "set", "latent.npy")
    save_file({name: value.numpy() for name, value in ldm_table(channels=4).items()}, tmp_path / "va.safetensors")
    command = ["--from-latents", str(truth.path), str(tmp_path / "out"), "--vae", str(tmp_path / "va.safetensors")]
    with pytest.raises(UserError, match=r"nothing says how its latents are normalised: --latents-stats FILE"):
        prepare.main(command)
    prepare.main([*command, "--scale", "1"])
    assert read_manifest(tmp_path / "out").scale == 1.0


def test_an_array_with_twice_the_vaes_channels_holds_moments(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    truth = foreign_latents.webdataset(tmp_path / "set", "npy", moments=True)
    vae = new_vae_folder(tmp_path / "mine", scaling_factor=0.625)
    command = ["--from-latents", str(truth.path), str(tmp_path / "out"), "--dtype", "float32", "--vae", str(vae)]
    prepare.main(command)
    with closing(open_data(tmp_path / "out")) as records:
        assert records.manifest.posterior == "sample" and records.manifest.channels == 4
        np.testing.assert_allclose(records.gather(np.arange(7))[0].numpy(), truth.records, rtol=1e-6)
    eight = new_vae_folder(tmp_path / "eight", channels=8)
    prepare.main([*command[:2], str(tmp_path / "drawn"), "--vae", str(eight)])
    assert read_manifest(tmp_path / "drawn").posterior == "mean"
    with pytest.raises(UserError, match="3 channels, the latents have 8"):
        three = new_vae_folder(tmp_path / "three", channels=3)
        prepare.main([*command[:2], str(tmp_path / "x"), "--vae", str(three)])


@pytest.mark.parametrize("suffix", ["npy", "moments.npy"])
def test_log_variances_in_webdatasets_arrays_become_stds(suffix: str, tmp_path: Path) -> None:
    mean, log_variance = normal(1, 7, 4, *SIDES), foreign_latents.log_variances(2, 7, 4, *SIDES)
    rows = np.concatenate((mean, log_variance), 1)
    tars(tmp_path / "set", [{suffix: npy(row[None] if suffix == "npy" else row), "cls": b"1"} for row in rows])
    layout = recognise(tmp_path / "set")
    assert layout is not None
    with closing(layout.open(tmp_path / "set")) as records:
        assert isinstance(records, WebdatasetSet)
        records.take_channels(4)
        assert records.manifest.posterior == "sample" and records.manifest.channels == 4
        read = records.gather(np.arange(7))[0].numpy()
    assert np.array_equal(read[:, :4], mean)
    np.testing.assert_allclose(read[:, 4:], foreign_latents.stds_of(log_variance), rtol=1e-5)


def test_two_latents_in_one_of_webdatasets_arrays_are_not_one(tmp_path: Path) -> None:
    rows = [normal(number, *(2,) * (number == 2), 4, *SIDES) for number in range(7)]
    tars(tmp_path / "set", [{"latent.npy": npy(row), "cls": b"1"} for row in rows])
    layout = recognise(tmp_path / "set")
    assert layout is not None
    with closing(layout.open(tmp_path / "set")) as records:
        with pytest.raises(BadFile, match=r"0000002\.latent\.npy.*float32 \(2, 4, 3, 5\); the first of the set has"):
            records.gather(np.array([1, 2]))
        assert np.array_equal(records.gather(np.array([1]))[0][0].numpy(), rows[1])


def spoil(name: str, change: Callable[[Path], object], words: str) -> object:
    return pytest.param(name, change, words, id=f"{name}: {words[:40]}")


def rewrite(pattern: str, **changes: np.ndarray | None) -> Callable[[Path], None]:
    """Another tensor, or none, in the first safetensors file that fits."""

    def change(path: Path) -> None:
        file = sorted(path.glob(pattern))[0]
        tensors = {**load_file(file), **changes}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)

    return change


def saved(place: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.save(path / place, array)


def stats(**tensors: torch.Tensor) -> Callable[[Path], None]:
    return lambda path: torch.save(tensors, path / "latents_stats.pt")


def cut(pattern: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path if path.is_file() else sorted(path.rglob(pattern))[-1]
        os.truncate(file, file.stat().st_size - (5 if file.suffix != ".tar" else 9_000))  # behind its end is padding

    return change


def moments_in(path: Path, place: str, **arrays: np.ndarray) -> None:
    np.savez(path / place, **arrays)


def relabel(path: Path) -> None:
    table = json.loads((path / "vae-in" / "dataset.json").read_text())
    (path / "vae-in" / "dataset.json").write_text(json.dumps({"labels": table["labels"][1:]}))


def flip_bits(path: Path) -> None:
    """In the zip's first member."""
    data = bytearray(path.read_bytes())
    data[400] ^= 8
    path.write_bytes(data)


class Bomb:
    """Would make a folder if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def bomb(path: Path) -> None:
    array = np.empty(2, object)
    array[0], array[1] = Bomb(path / "boom"), 1
    np.save(path / "0.npy", array, allow_pickle=True)


def first_holds(*values: object) -> Callable[[Path], None]:
    """Moments and these in U-ViT's first file."""

    def change(path: Path) -> None:
        array = np.empty(1 + len(values), object)
        array[:] = [normal(1, 8, *SIDES), *values]
        np.save(path / "0.npy", array, allow_pickle=True)

    return change


BAD = np.full((4, *SIDES), np.nan)
DIFFERENT = normal(9, 8, SIDES[0], SIDES[1] + 1)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        spoil("LightningDiT", lambda path: (path / "latents_stats.pt").unlink(), "latents without latents_stats.pt"),
        spoil("LightningDiT", rewrite("*", latents_flip=None), "no latents_flip in it"),
        spoil("LightningDiT", rewrite("*", labels=np.arange(9)), "these do not fit each other"),
        spoil("LightningDiT", rewrite("*", labels=np.arange(4) - 1), r"labels\[0\]: label -1"),
        spoil("LightningDiT", rewrite("*", **{key: normal(1, 4, 32, 3, 4) for key in ("latents", "latents_flip")}),
              r"latents of \(32, 3, 5\), those of latents_rank00.* are \(32, 3, 4\)"),
        spoil("LightningDiT", cut("*.safetensors"), "expected .* bytes, found"),
        spoil("LightningDiT", stats(mean=torch.ones(32)), "no tensor std"),
        spoil("LightningDiT", stats(mean=torch.ones(5), std=torch.ones(5)), "the latents have 32 channels"),
        spoil("LightningDiT", stats(mean=torch.ones(32), std=torch.zeros(32)), "latents_std = 0.0"),
        spoil("LightningDiT", lambda path: (path / "latents_stats.pt").write_bytes(pickle.dumps(Bomb(path / "boom"))),
              "refused, nothing executed"),
        spoil("LightningDiT", stats(mean=torch.ones(32), std=torch.ones(4, 8)), r"std is \(4, 8\); the latents"),
        spoil("LightningDiT", stats(mean=torch.ones(32).int(), std=torch.ones(32)), "no tensor mean"),
        spoil("LightningDiT", rewrite("*", latents_flip=normal(1, 4, 32, *SIDES).astype(np.float16)), "do not fit"),
        spoil("LightningDiT", rewrite("*", labels=np.arange(4, dtype=np.int32)), "these do not fit each other"),
        spoil("LightningDiT", rewrite("*01*", latents_flip=np.float32([[[[np.nan]]]]) + normal(1, 3, 32, *SIDES)),
              r"latents_rank01_shard000.safetensors: latents_flip\[0\]: NaN"),
        spoil("LightningDiT", rewrite("*", **{key: np.zeros((4, 32, *SIDES)) for key in ("latents", "latents_flip")}),
              r"latents: F64 \(4, 32, 3, 5\); F32, F16, BF16 \(N, C, H, W\) is needed"),
        spoil("LightningDiT", rewrite("*", **{key: normal(1, 4, *SIDES) for key in ("latents", "latents_flip")}),
              r"latents: F32 \(4, 3, 5\); F32, F16"),
        spoil("LightningDiT", rewrite("*", **{key: normal(1, 4, 0, *SIDES) for key in ("latents", "latents_flip")}),
              r"latents: F32 \(4, 0, 3, 5\); F32, F16"),
        spoil("LightningDiT", lambda path: [file.unlink() for file in path.glob("*.safetensors")], "but no .*latents"),
        spoil("fast-DiT", lambda path: shutil.rmtree(path / "imagenet256_labels"), "no folder 'imagenet256_labels'"),
        spoil("fast-DiT", lambda path: shutil.copytree(path / "imagenet256_features", path / "other_features"),
              "'imagenet256_features', 'other_features': fast-DiT's latents of one set"),
        spoil("fast-DiT", lambda path: (path / "imagenet256_labels" / "4.npy").unlink(),
              "12 latents, 11 labels: imagenet256_labels/4.npy is missing"),
        spoil("fast-DiT", lambda path: (path / "imagenet256_features" / "4.npy").unlink(), "_features/4.npy"),
        spoil("fast-DiT", saved("imagenet256_features/0.npy", normal(1, 4, *SIDES)), r"\(1, C, H, W\) is needed"),
        spoil("fast-DiT", saved("imagenet256_features/0.npy", normal(1, 2, 4, *SIDES)), r"0.npy: .*\(1, C, H, W\) is"),
        spoil("fast-DiT", saved("imagenet256_features/0.npy", normal(1, 1, *SIDES)), r"0.npy: .*\(1, C, H, W\) is"),
        spoil("fast-DiT", saved("imagenet256_labels/0.npy", np.array([1.0])), r"float64 \(1,\); one whole number"),
        spoil("fast-DiT", saved("imagenet256_labels/0.npy", np.array([1, 2])), r"int64 \(2,\); one whole number"),
        spoil("fast-DiT", saved("imagenet256_features/7.npy", normal(1, 1, 4, 4, 4)), "7.npy: .* the first file"),
        spoil("fast-DiT", saved("imagenet256_labels/7.npy", np.array([-2])), "7.npy: label -2"),
        spoil("fast-DiT", saved("imagenet256_labels/7.npy", np.array([MAX_CLASSES])), f"7.npy: label {MAX_CLASSES};"),
        spoil("fast-DiT", saved("imagenet256_labels/7.npy", np.array([1.0])), "7.npy: another header"),
        spoil("fast-DiT", saved("imagenet256_labels/7.npy", np.array([1, 2])), "7.npy: 144 bytes, 136 expected"),
        spoil("fast-DiT", saved("imagenet256_features/7.npy", np.float32(BAD)[None]), "7.npy: NaN"),
        spoil("MAR", lambda path: moments_in(path, "n01440764/n01440764_1.JPEG.npz", moments=normal(1, 32, *SIDES)),
              "_1.JPEG.npz: no moments_flip in it"),
        spoil("MAR", lambda path: moments_in(path, "n01440764/n01440764_1.JPEG.npz", moments=DIFFERENT,
                                             moments_flip=DIFFERENT), "_1.JPEG.npz: moments: float32"),
        spoil("MAR", lambda path: moments_in(path, "n01440764/n01440764_1.JPEG.npz",
                                             moments=np.abs(normal(1, 32, *SIDES)),
                                             moments_flip=np.abs(normal(1, 32, *SIDES))), "files of two kinds"),
        spoil("MAR", lambda path: (path / "n0").mkdir(), "n0: no .npz in it, and each folder is a class"),
        spoil("MAR", cut("*.npz"), "not a sound zip"),
        spoil("MAR", lambda path: [file.rename(path / file.name) for file in path.rglob("*.npz")], "in no folder of"),
        spoil("U-ViT", lambda path: (path / "4.npy").unlink(), "4.npy: missing, with 10 files"),
        spoil("U-ViT", cut("*.npy"), "9.npy: .* bytes, .* expected, as 0.npy has"),
        spoil("U-ViT", lambda path: (path / "3.npy").write_bytes(
            object_array(normal(1, 8, *SIDES), np.int64(-1), True)), "3.npy: label -1"),
        spoil("U-ViT", lambda path: (path / "3.npy").write_bytes(
            object_array(normal(1, 8, *SIDES[::-1]), np.int64(1), True)), r"3.npy: float32 \(8, 5, 3\) and a label at"),
        spoil("U-ViT", lambda path: (path / "3.npy").write_bytes(bytes((path / "3.npy").stat().st_size)),
              "3.npy: not an array of Python objects"),
        spoil("U-ViT", first_holds(5), r"0.npy: not \(moments, label\)"),
        spoil("U-ViT", first_holds(np.float64(5)), r"0.npy: its label is float64 \(\); one whole number"),
        spoil("U-ViT", first_holds(np.array([5, 6])), r"0.npy: its label is int64 \(2,\); one whole number"),
        spoil("U-ViT", first_holds(np.int64(5), np.int64(5)), r"0.npy: not \(moments, label\)"),
        spoil("U-ViT", bomb, "refused, nothing executed"),
        spoil("U-ViT", saved("0.npy", normal(1, 1, 4, *SIDES)), r"without labels \(0.npy is \(1, 4, 3, 5\)\)"),
        spoil("U-ViT", lambda path: (path / "3.npy").write_bytes(
            object_array(np.concatenate((normal(1, 4, *SIDES), np.full((4, *SIDES), 90, np.float32) - 120)),
                         np.int64(1), False)), "3.npy: .* bytes, .* expected"),
        spoil("U-ViT", lambda path: (path / "3.npy").write_bytes(
            object_array(np.full((8, *SIDES), -200, np.float32), np.int64(1), True)), "neither std"),
        spoil("EDM2's zip", flip_bits, "is damaged"),
        spoil("EDM2's zip", cut(""), "not a sound zip"),
        spoil("EDM2's folder", lambda path: (path / "dataset.json").unlink(), "but no dataset.json"),
        spoil("EDM2's folder", lambda path: (path / "dataset.json").write_text('{"labels": null}'), '"labels" is null'),
        spoil("EDM2's folder", saved("00000/img-mean-std-00000002.npy", DIFFERENT), "00002.npy: float32"),
        spoil("EDM2's folder", saved("00000/img-mean-std-00000002.npy", np.ones((8, *SIDES))), "2.npy: float64"),
        spoil("EDM2's folder", saved("00000/img-mean-std-00000000.npy", normal(1, 7, *SIDES)),
              r"00000.npy: shape = \(7, 3, 5\): \(2C, H, W\) is needed"),
        spoil("EDM2's folder", saved("00000/img-mean-std-00000000.npy", normal(1, 8, 0, 5)),
              r"00000.npy: shape = \(8, 0, 5\): three positive"),
        spoil("EDM2's folder", lambda path: path.rename(path.parent / "vae-sd"), "REPA's latents; name the"),
        spoil("SpeedrunDiT", saved("vae-in/00000/img-latents-00000000.npy", normal(1, 2, 32, *SIDES)),
              r"00000.npy: float32 \(2, 32, 3, 5\); float16 or float32 \(C, H, W\) is needed"),
        spoil("SpeedrunDiT", saved("vae-in/00000/img-latents-00000002.npy", normal(1, 2, 32, *SIDES)),
              r"00002.npy: float32 \(2, 32, 3, 5\)"),
        spoil("SpeedrunDiT", relabel, "7 latents, 6 labels: '00000/img-latents-00000000.npy' has no label"),
        spoil("MaskDiT", cut("*.tar"), "not a sound tar"),
        spoil("MaskDiT", lambda path: tars(path / "more", [{"npy": npy(BAD), "cls": b"1"}])
              or (path / "more" / "latent-0000.tar").rename(path / "x.tar"), r"KEY\.latent and KEY\.npy: one kind"),
        spoil("MaskDiT", lambda path: shutil.rmtree(path) or tars(path, [{"latent": pickle.dumps(Bomb(path))}]),
              "has no KEY.cls or KEY.json"),
        spoil("MaskDiT", lambda path: shutil.rmtree(path)
              or tars(path, [{"latent": pickle.dumps(Bomb(path / "boom")), "cls": b"1"}]), "refused, nothing executed"),
        spoil("MaskDiT", lambda path: shutil.rmtree(path)
              or tars(path, [{"latent": b"", "json": b'{"label": %s}' % label} for label in (b"1", b"null")]),
              r"001\.json': its label is null; every latent needs one"),
    ],
)  # fmt: skip
def test_what_is_almost_a_layout_is_refused_in_one_line(
    name: str, change: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    path = MAKERS[name][1](tmp_path).path
    change(path)
    path = path if path.exists() else path.parent / "vae-sd"
    with pytest.raises(UserError, match=words) as caught:
        prepare.main(["--verify", str(path)])
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value) and len(str(caught.value)) < 900
    with pytest.raises(UserError):
        prepare.main(["--from-latents", str(path), str(tmp_path / "out")])
    assert not list(tmp_path.rglob("boom"))


def test_what_can_not_be_read_is_named_with_what_to_do(tmp_path: Path) -> None:
    for name, words in (("data.mdb", "LMDB, .*lmdb2wds.py"), ("repae.h5", "HDF5, .*h5py")):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(b"x")
        with pytest.raises(BadFile, match=words):
            open_data(tmp_path / name)
    (tmp_path / "lmdb").mkdir()
    (tmp_path / "data.mdb").rename(tmp_path / "lmdb" / "train")
    with pytest.raises(BadFile, match=r"lmdb: 'train/data\.mdb' is an LMDB"):
        open_data(tmp_path / "lmdb")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "x.txt").write_text("x")
    with pytest.raises(BadFile, match=r"none': no manifest.json in it; .*REPA .*LightningDiT .*webdataset") as caught:
        open_data(tmp_path / "none")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no latents that can be read: REPA"):
        prepare.main(["--from-latents", str(tmp_path / "none"), str(tmp_path / "out")])
    with pytest.raises(UserError, match="no such file or folder"):
        prepare.main(["--from-latents", str(tmp_path / "gone"), str(tmp_path / "out")])
    with pytest.raises(BadFile, match="fast-DiT's latents; name the folder above"):
        open_data(foreign_latents.fast_dit(tmp_path / "f").path / "imagenet256_features")
    prepare.main(["--from-latents", str(tmp_path / "f"), str(tmp_path / "ours")])
    with pytest.raises(UserError, match="a set of ours already"):
        prepare.main(["--from-latents", str(tmp_path / "ours"), str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("fast-DiT", "imagenet256_features/0.npy"),
        ("EDM2's folder", "00000/img-mean-std-00000000.npy"),
        ("MAR", "n01440764/n01440764_0.JPEG.npz"),
        ("U-ViT today", "0.npy"),
    ],
)
def test_a_first_file_that_claims_more_than_it_holds_takes_no_memory(name: str, place: str, tmp_path: Path) -> None:
    def claiming(*shape: int) -> bytes:
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
        return buffer.getvalue() + bytes(64)

    path = MAKERS[name][1](tmp_path).path
    if place.endswith("npz"):
        with zipfile.ZipFile(path / place, "w") as archive:
            archive.writestr("moments.npy", claiming(32, 2**18, 2**18))
    elif name == "U-ViT today":
        data = (path / place).read_bytes()
        (path / place).write_bytes(data.replace(b"K\x08K\x03K\x05", b"K\x08K\xf3K\xf5"))
    else:
        (path / place).write_bytes(claiming(*(1, 4) if name == "fast-DiT" else (8,), 2**18, 2**18))
    with pytest.raises(BadFile, match=rf"{path / place}.* \d+ bytes"):
        open_data(path)


def with_means(path: Path, means: np.ndarray, numbers: tuple[int, ...] = tuple(range(7))) -> None:
    """Gives the channels of these records other means."""
    for number in numbers:
        file = next(path.rglob(f"*{number:08d}.npy"))
        stored = np.load(file)
        stored[:4] = np.float32(means)[:, None, None]
        np.save(file, stored)


UNIT, SIGNED = np.array(foreign_latents.EDM2[0]), np.array((0.865, -0.278, 0.216, 0.374))


def test_means_that_fit_neither_range_of_pixels_are_refused_with_what_to_do(tmp_path: Path) -> None:
    """They must be twice as near to the one as to the other."""
    truth = foreign_latents.edm2(tmp_path / "set")
    for part, scale in ((1 / 3.5, 1.0), (2.5 / 3.5, 0.18215)):
        with_means(truth.path, UNIT + part * (SIGNED - UNIT))
        assert read_any_manifest(truth.path).scale == scale
    for part in (1.9 / 2.9, 1 / 2.9):
        with_means(truth.path, UNIT + part * (SIGNED - UNIT))
        with pytest.raises(BadFile, match=r"channels' means \[.*in a folder named vae-sd"):
            open_data(truth.path)
    (tmp_path / "repa").mkdir()
    truth.path.rename(tmp_path / "repa" / "vae-sd")
    assert read_any_manifest(tmp_path / "repa").scale == 0.18215


def test_the_range_of_pixels_is_told_by_a_few_records_from_the_first_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from st_fast.data.layouts import edm

    monkeypatch.setattr(edm, "SAMPLED", 2)
    path = foreign_latents.edm2(tmp_path / "set").path
    with_means(path, SIGNED, (0, 6))
    assert read_any_manifest(path).scale == 0.18215


def test_edms_files_may_lie_flat_and_be_of_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_latents, "COUNT", 1)
    for truth in (foreign_latents.edm2(tmp_path / "edm"), foreign_latents.speedrun(tmp_path / "speedrun")):
        with closing(open_data(truth.path)) as records:
            np.testing.assert_allclose(records.gather(np.array([0]))[0].numpy(), truth.records, rtol=2e-6, atol=2e-6)
    name = "img-mean-std-00000000.npy"
    (tmp_path / "edm" / "00000" / name).rename(tmp_path / "edm" / name)
    (tmp_path / "edm" / "dataset.json").write_text(json.dumps({"labels": [[name, 0]]}))
    assert read_any_manifest(tmp_path / "edm").count == 1
    (tmp_path / "edm" / "dataset.json").unlink()
    with pytest.raises(BadFile, match=r"latents as EDM2 and REPA write them in 'img-mean.*, but no"):
        open_data(tmp_path / "edm")


def test_a_zips_long_names_and_extra_fields_are_passed_over(tmp_path: Path) -> None:
    truth = foreign_latents.edm2(tmp_path / "plain.zip")
    names, folder = [], "f" * 300
    with zipfile.ZipFile(truth.path) as old, zipfile.ZipFile(tmp_path / "set.zip", "w") as new:
        for name in sorted(old.namelist())[:-1]:
            info = zipfile.ZipInfo(f"{folder}/{name}")
            info.extra = b"\xfe\xca" + (300).to_bytes(2, "little") + bytes(300)
            new.writestr(info, old.read(name))
            names.append(info.filename)
        new.writestr("dataset.json", json.dumps({"labels": list(zip(names, truth.labels, strict=True))}))
    with closing(open_data(tmp_path / "set.zip")) as records:
        read, labels = records.gather(np.arange(7))
        np.testing.assert_allclose(read.numpy(), truth.records, rtol=2e-6, atol=2e-6)
        assert labels.tolist() == truth.labels


def test_a_zips_members_that_are_encrypted_or_too_large_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from st_fast.data.layouts import edm

    path = foreign_latents.edm2(tmp_path / "stored.zip").path
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "encrypted.zip").write_bytes(data)
    with pytest.raises(BadFile, match=r"encrypted\.zip.* is encrypted"):
        open_data(tmp_path / "encrypted.zip")
    packed = foreign_latents.edm2(tmp_path / "packed.zip", packing=zipfile.ZIP_DEFLATED).path
    monkeypatch.setattr(edm, "FILE_BYTES", 100)  # dataset.json may have more
    with pytest.raises(BadFile, match=r"\.npy' would unpack to 608 bytes, at most 100 are allowed"):
        open_data(packed)


def test_a_zip_of_pictures_with_labels_holds_no_latents(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("dataset.json", "{}")
        archive.writestr("img00000000.png", b"x")
    assert recognise(tmp_path / "pictures.zip") is None


def test_one_tar_is_a_set(tmp_path: Path) -> None:
    truth = foreign_latents.maskdit(tmp_path / "set")
    with closing(open_data(truth.path / "latent-0001.tar")) as records:
        np.testing.assert_allclose(records.gather(np.arange(3))[0].numpy(), truth.records[4:], rtol=1e-5, atol=2e-6)


def test_every_record_is_verified_in_blocks_with_a_sign_of_progress_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from st_fast.data.layouts import records as layout_records

    monkeypatch.setattr(layout_records, "BLOCK", 5)
    path = foreign_latents.fast_dit(tmp_path / "set").path
    beats: list[int] = []
    with closing(open_data(path, verify=False)) as records:
        records.verify(lambda: beats.append(1))
        whole = records.gather(np.arange(12))[0].numpy().tobytes()
        assert len(beats) == 3 and records.files and records.files.content == hashlib.sha256(whole).hexdigest()
    for number in range(12):
        file = path / "imagenet256_features" / f"{number}.npy"
        sound = np.load(file)
        np.save(file, np.where(sound == sound.max(), np.float32("nan"), sound))
        with closing(open_data(path, verify=False)) as records, pytest.raises(BadFile, match=rf"/{number}\.npy: NaN"):
            records.verify()
        np.save(file, sound)


def test_a_record_of_another_kind_is_found_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from st_fast.data.layouts import records as layout_records

    monkeypatch.setattr(layout_records, "SAMPLED", 2)
    truth = foreign_latents.mar(tmp_path / "set")
    positive = np.abs(normal(1, 32, *SIDES))
    np.savez(truth.path / "n01443537" / "n01443537_1.JPEG.npz", moments=positive, moments_flip=positive)
    with (
        closing(open_data(truth.path, verify=False)) as records,
        pytest.raises(BadFile, match=r"n01443537_1\.JPEG\.npz: moments: \(mean, std\), but .* files of two kinds"),
    ):
        records.gather(np.arange(6, 8))


@pytest.mark.parametrize("number", [0, 3, 6])
def test_one_record_of_another_kind_is_found_when_edms_files_are_opened(number: int, tmp_path: Path) -> None:
    path = foreign_latents.edm2(tmp_path / "set").path
    file = next(path.rglob(f"*{number:08d}.npy"))
    np.save(file, np.concatenate((np.load(file)[:4], -np.ones((4, *SIDES), np.float32))))
    with pytest.raises(BadFile, match="files of two kinds in one folder"):
        open_data(path, verify=False)


def test_a_label_that_changes_after_the_set_was_opened_is_noticed(tmp_path: Path) -> None:
    truth = foreign_latents.uvit(tmp_path / "set")
    with closing(open_data(truth.path)) as records:
        moments = np.concatenate((normal(1, 4, *SIDES), foreign_latents.log_variances(1, 4, *SIDES)))
        (truth.path / "3.npy").write_bytes(object_array(moments, np.int64(truth.labels[3] + 1), True))
        with pytest.raises(BadFile, match=r"3\.npy: its label is another than when the set was opened"):
            records.gather(np.array([3]))


@pytest.mark.parametrize(
    ("name", "file"),
    [("LightningDiT", "latents_stats.pt"), ("fast-DiT", "imagenet256_features/2.npy"), ("MaskDiT", "latent-0001.tar")],
)
def test_a_resume_looks_at_files_of_another_time_again(name: str, file: str, tmp_path: Path) -> None:
    truth = MAKERS[name][1](tmp_path)
    with closing(open_data(truth.path)) as records:
        before = records.files
    os.utime(truth.path / file, (1, 1))
    with closing(open_data(truth.path, verify=False)) as records:
        assert records.files and before and records.files.stat != before.stat
        assert file_differences(before, records) == []


def test_the_digest_follows_labels_and_statistics(tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        with closing(open_data(path, verify=False)) as records:
            return records.digest

    fast, lightning = foreign_latents.fast_dit(tmp_path / "f").path, foreign_latents.lightningdit(tmp_path / "l").path
    before = digest(fast), digest(lightning)
    np.save(fast / "imagenet256_labels" / "0.npy", np.array([1]))
    stats(mean=torch.ones(32), std=torch.ones(32))(lightning)
    assert digest(fast) != before[0] and digest(lightning) != before[1]


def test_a_million_files_are_not_read_to_open_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fast-DiT's latents only the first is opened, and of MAR's as many as tell the kind."""
    truth = foreign_latents.fast_dit(tmp_path / "f")
    for number in range(1, 12):
        (truth.path / "imagenet256_features" / f"{number}.npy").write_bytes(b"")
    found = open_data(truth.path, verify=False)
    assert found.labels.tolist() == truth.labels
    found.close()
    from st_fast.data.layouts import records as layout_records

    monkeypatch.setattr(layout_records, "SAMPLED", 1)
    mar = foreign_latents.mar(tmp_path / "m")
    for file in sorted(mar.path.rglob("*.npz"))[1:]:
        file.write_bytes(b"")
    found = open_data(mar.path, verify=False)
    assert found.labels.tolist() == mar.labels
    found.close()


def test_stats_of_moments_in_a_zip_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from st_fast.prepare import commands

    truth = foreign_latents.edm2(tmp_path / "set.zip")
    monkeypatch.setattr(commands, "decoder", lambda *_: lambda latents: torch.zeros(len(latents), 3, 4, 4).byte())
    prepare.main(["--stats", str(truth.path), "--device", "cpu"])
    assert (tmp_path / "set.zip.stats.png").is_file()


def test_repas_layout_has_no_place_for_latents_drawn_once_or_normalised_by_channel(tmp_path: Path) -> None:
    for truth, words in (
        (foreign_latents.fast_dit(tmp_path / "f"), "drawn once"),
        (foreign_latents.edm2(tmp_path / "e.zip"), "mean and std of each channel"),
    ):
        with pytest.raises(UserError, match=words):
            prepare.main(["--to-repa", str(truth.path), str(tmp_path / "repa")])
