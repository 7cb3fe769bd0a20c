"""Shards: what is written is what is read, and every kind of damage is named before training."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, json_bytes, read_header, sha256_file
from st_fast.data.manifest import Manifest, VaeInfo, check_same_data, moments_problem, read_manifest, write_manifest
from st_fast.data.shards import open_data
from st_fast.prepare.writing import write_shard, write_shards

from .conftest import MakeSet, random_moments

SHAPE = (4, 3, 5)
ONE_CLASS = Manifest(0, SHAPE, "float16", 1.0, VaeInfo("v"), "s", 1)


def shard(folder: Path, number: int = 1) -> Path:
    return folder / f"latents-{number:05d}.safetensors"


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_records_come_back_bit_for_bit_in_any_order(make_set: MakeSet, dtype: str) -> None:
    shards = open_data(make_set(dtype=dtype))
    indices = np.random.default_rng(0).permutation(50)[:31]
    moments, labels = shards.gather(indices)
    expected = random_moments(50, SHAPE).to(getattr(torch, dtype))[indices]
    assert moments.dtype == expected.dtype and torch.equal(moments, expected)
    assert labels.tolist() == (indices % 7).tolist()


def test_batches_of_any_size_are_cut_into_shards_of_one_size(tmp_path: Path) -> None:
    moments, labels = random_moments(23, SHAPE), torch.arange(23)
    batches = zip(moments.split([1, 9, 13]), labels.split([1, 9, 13]), strict=True)
    manifest = write_shards(tmp_path, batches, Manifest(0, SHAPE, "float32", 1.0, VaeInfo("v"), "s", 23), 5)
    assert [entry.count for entry in manifest.shards] == [5, 5, 5, 5, 3]
    assert manifest == read_manifest(tmp_path)
    assert torch.equal(open_data(tmp_path).gather(np.arange(23))[0], moments)
    for entry in manifest.shards:
        assert sha256_file(tmp_path / entry.file) == entry.sha256
        assert (tmp_path / entry.file).stat().st_size == entry.bytes


def test_missing_shard_is_named(make_set: MakeSet) -> None:
    folder = make_set()
    shard(folder).unlink()
    with pytest.raises(BadFile, match=r"latents-00001\.safetensors: the shard is missing; .* 16 records"):
        open_data(folder, verify=False)


def test_missing_manifest_and_missing_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadFile, match=r"empty': no manifest.json in it"):
        open_data(tmp_path / "empty")
    with pytest.raises(BadFile, match=r"nowhere': no such folder"):
        open_data(tmp_path / "nowhere")


def test_truncated_shard_tells_expected_and_actual_bytes(make_set: MakeSet) -> None:
    folder = make_set()
    size = shard(folder).stat().st_size
    os.truncate(shard(folder), size - 7)
    with pytest.raises(BadFile, match=rf"latents-00001\S+: {size - 7} bytes, the manifest says {size}"):
        open_data(folder, verify=False)


def test_shard_cut_off_while_it_is_read_is_an_error_with_its_record(make_set: MakeSet) -> None:
    folder = make_set()
    shards = open_data(folder)
    os.truncate(shard(folder), shard(folder).stat().st_size - 200)
    shards.gather(np.arange(16))
    with pytest.raises(BadFile, match=r"latents-00001\S+: record 15 \(number 31 of the set\): 120 bytes expected"):
        shards.gather(np.array([3, 31]))


@pytest.mark.parametrize("verify", [True, False])
def test_flipped_bit_in_moments_names_shard_and_record(make_set: MakeSet, verify: bool) -> None:
    folder = make_set()
    start = read_header(shard(folder))["moments"].start
    flip_bit(shard(folder), start + 5 * 120 + 17)
    with pytest.raises(BadFile, match=r"latents-00001\.safetensors: record 5 \(number 21 of the set\): its CRC-32"):
        open_data(folder, verify=verify).gather(np.arange(50))


def test_flipped_bit_in_a_label_names_shard_and_record(make_set: MakeSet) -> None:
    folder = make_set()
    path = shard(folder)
    position = read_header(path)["labels"].start + 3 * 8
    data = bytearray(path.read_bytes())
    data[position] ^= 1  # label 5 of record 19 becomes 4, within the range
    path.write_bytes(data)
    with pytest.raises(BadFile, match=r"latents-00001\.safetensors: record 3 \(number 19 of the set\): its CRC-32"):
        open_data(folder)


def test_edit_with_right_crcs_is_still_found_by_the_hash(make_set: MakeSet) -> None:
    folder = make_set()
    path = shard(folder)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    names = list(header)
    reordered = json.dumps({name: header[name] for name in reversed(names)}, separators=(",", ":")).encode()
    path.write_bytes(data[:8] + reordered.ljust(length) + data[8 + length :])
    with pytest.raises(BadFile, match=r"latents-00001\S+: SHA-256 differs"):
        open_data(folder)


@pytest.mark.parametrize("label", [-1, 7])
def test_label_out_of_range_names_record_and_range(make_set: MakeSet, label: int) -> None:
    folder = make_set()
    tensors = load_file(shard(folder))
    tensors["labels"] = tensors["labels"].copy()
    tensors["labels"][4] = label
    save_file(tensors, shard(folder))
    with pytest.raises(BadFile, match=rf"latents-00001\S+: record 4 .*: label {label}, allowed are 0 … 6"):
        open_data(folder, verify=False)


@pytest.mark.parametrize(
    ("value", "channel", "words"),
    [(np.nan, 0, "NaN or Inf"), (np.inf, 3, "NaN or Inf"), (-3e4, 1, r"up to 3e\+04"), (-0.5, 2, "std -0.5")],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_nan_inf_absurd_and_negative_std_are_refused_by_the_writer(
    tmp_path: Path, value: float, channel: int, words: str, dtype: type
) -> None:
    moments = random_moments(6, SHAPE).numpy().astype(dtype)
    moments[4, channel, 2, 2] = value
    with pytest.raises(UserError, match=f"record 4 of this shard: .*{words}"):
        write_shard(tmp_path / "x.safetensors", moments, np.zeros(6, np.int64), ONE_CLASS)
    assert not list(tmp_path.iterdir())


def test_nan_written_by_someone_else_is_found_with_its_record(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("st_fast.prepare.writing.moments_problem", lambda *_: None)
    good = random_moments(20, SHAPE)
    good[13, 0, 0, 0] = torch.nan
    folder = make_set().parent / "bad"
    write_shards(folder, [(good, torch.zeros(20))], Manifest(0, SHAPE, "float16", 1.0, VaeInfo("v"), "s", 1), 8)
    with pytest.raises(BadFile, match=r"latents-00001\S+: record 5 \(number 13 of the set\): NaN or Inf"):
        open_data(folder)


def test_ordinary_extremes_are_accepted() -> None:
    moments = np.zeros((2, 2, 1, 1), np.float16)
    moments[0, :, 0, 0] = (-1e4, 1e4)
    moments[1, 1] = -0.0
    assert moments_problem(moments) is None


def test_a_manifest_says_how_latents_are_normalised_and_reads_back_the_same(tmp_path: Path) -> None:
    vae = VaeInfo("v", "h", "", "AutoencoderKL", 16)
    told = Manifest(
        0, (2, 3, 5), "float16", 0.5, vae, "s", 1, shift=-0.25, latents_mean=(1.5, -2.0), latents_std=(0.5, 3.0),
        posterior="mean",
    )  # fmt: skip
    moments = torch.full((3, 2, 3, 5), -0.5)  # as the std of a posterior it would be refused
    write_shards(tmp_path, [(moments, torch.zeros(3))], told, 2)
    records = open_data(tmp_path)
    assert replace(records.manifest, count=0, shards=()) == told and records.manifest.channels == 2
    assert torch.equal(records.gather(np.arange(3))[0].float(), moments)


def test_a_set_without_the_newer_fields_keeps_its_digest(make_set: MakeSet) -> None:
    folder = make_set()
    content = json.loads((folder / "manifest.json").read_text())
    assert {"shift", "latents_mean", "latents_std", "posterior"}.isdisjoint(content)
    assert set(content["vae"]) == {"name", "hash", "path"}
    assert read_manifest(folder).digest == hashlib.sha256(json_bytes(content)).hexdigest()
    changed = replace(read_manifest(folder), shift=0.0)
    assert "shift" in changed.as_json() and changed.digest != read_manifest(folder).digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latents_mean": [1.0]}, "latents_mean has 1 numbers; the latents have 2 channels"),
        ({"latents_std": [1.0, 0.0]}, "latents_std = 0.0: a positive number"),
        ({"latents_std": [1.0, -1.0]}, "latents_std = -1.0: a positive number"),
        ({"latents_mean": [1.0, 2e4]}, "latents_mean = 20000.0: a number, at most"),
        ({"scale": 0.0}, "scale = 0.0: a positive number"),
        ({"shift": "a"}, "shift = 'a': a number is needed"),
        ({"posterior": "median"}, "posterior = 'median': one of sample, mean is needed"),
        ({"shape": [3, 3, 5]}, r"shape = \(3, 3, 5\): \(2C, H, W\) is needed"),
    ],
)
def test_a_wrong_normalisation_is_refused(make_set: MakeSet, changes: dict[str, object], words: str) -> None:
    folder = make_set()
    edit_manifest(folder, **changes)
    with pytest.raises(BadFile, match=words):
        read_manifest(folder)


def test_counts_that_differ_are_refused(make_set: MakeSet) -> None:
    folder = make_set()
    edit_manifest(folder, count=51)
    with pytest.raises(BadFile, match=r"manifest.json: count = 51, but its 4 shards hold 50 records"):
        open_data(folder)


def test_shard_with_another_count_than_the_manifest_says_is_refused(make_set: MakeSet) -> None:
    folder = make_set()
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[0]["count"], shards[1]["count"] = 15, 17
    edit_manifest(folder, shards=shards)
    with pytest.raises(BadFile, match=r"latents-00000\S+: holds .* the manifest asks for .*15"):
        open_data(folder)


def test_empty_set_and_one_smaller_than_a_batch_are_refused(make_set: MakeSet, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"50 records, the global batch needs 64 \(--optim\.batch_size\)"):
        open_data(make_set(), at_least=64)
    write_shards(tmp_path / "none", [], Manifest(0, SHAPE, "float16", 1.0, VaeInfo("v"), "s", 1))
    with pytest.raises(BadFile, match=r"0 records, nothing to train on"):
        open_data(tmp_path / "none")


def test_edited_data_has_another_digest_and_is_refused_on_resume(make_set: MakeSet) -> None:
    folder = make_set()
    before = open_data(folder).digest
    check_same_data(before, "runs/x/00000100", read_manifest(folder), folder)
    moments, labels = random_moments(50, SHAPE), torch.arange(50) % 7
    moments[20] += 1
    write_shards(folder, [(moments, labels)], Manifest(0, SHAPE, "float16", 0.5, VaeInfo("none"), "random", 7), 16)
    with pytest.raises(UserError, match=rf"changed since runs/x/00000100 .*{before[:12]} then"):
        check_same_data(before, "runs/x/00000100", read_manifest(folder), folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "link/shard"])
def test_manifest_can_not_lead_out_of_its_folder(make_set: MakeSet, name: str) -> None:
    folder = make_set()
    (folder / "link").symlink_to("/etc")
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[0]["file"] = name
    edit_manifest(folder, shards=shards)
    with pytest.raises(BadFile, match="must be relative and stay inside"):
        open_data(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version = 2: at most 1"),
        ({"format": "other"}, "format = 'other'"),
        ({"shape": [3, 4, 4]}, r"shape = \(3, 4, 4\)"),
        ({"dtype": "int8"}, "dtype = 'int8': one of float16, float32"),
        ({"scale": 0}, "scale = 0: a positive number"),
        ({"num_classes": "7"}, "num_classes = '7'"),
        ({"class_names": ["a"]}, "class_names has 1 names, num_classes = 7"),
        ({"colour": 1}, "the field 'colour' is unknown"),
        ({"shards": [1]}, r"shards\[0\] = 1: an object"),
        ({"shards": []}, "count = 50, but its 0 shards"),
        ({"shards": [], "count": 0}, "0 records, nothing to train on"),
        ({"shards": {}}, r"shards = \{\}: a list"),
        ({"shape": 7}, "shape = 7: a list of 3"),
        ({"shape": [4, 4]}, r"shape = \[4, 4\]: a list of 3"),
        ({"shape": [8, 4.0, 4]}, r"shape\[1\] = 4.0: a whole number"),
        ({"shape": [2**62, 2**62, 4]}, "the manifest asks for"),
        ({"count": "50"}, "count = '50': a whole number"),
        ({"count": 50.0}, "count = 50.0: a whole number"),
        ({"count": True}, "count = True: a whole number"),
        ({"scale": True}, "scale = True: a number"),
        ({"scale": "1"}, "scale = '1': a number"),
        ({"num_classes": 10**12}, "num_classes = 1000000000000: 1 to"),
        ({"vae": {"name": 3}}, "vae: name = 3: text"),
        ({"vae": []}, r"vae = \[\]: an object"),
        ({"source": None}, "source = None: text"),
        ({"flip": 1}, "flip = 1: true or false"),
        ({"class_names": [1, 2, 3, 4, 5, 6, 7]}, r"class_names\[0\] = 1: text"),
        ({"class_names": "abcdefg"}, "class_names = 'abcdefg': a list"),
    ],
)
def test_wrong_manifest_is_told_in_one_line(make_set: MakeSet, changes: dict[str, object], words: str) -> None:
    folder = make_set()
    edit_manifest(folder, **changes)
    with pytest.raises(BadFile, match=words) as caught:
        open_data(folder)
    assert "\n" not in str(caught.value)


def test_a_manifest_too_long_to_be_read_again_is_never_written(make_set: MakeSet) -> None:
    folder = make_set()
    before, sound = (folder / "manifest.json").read_bytes(), read_manifest(folder)
    many = tuple(f"{number:06d}{'x' * 700}" for number in range(100_000))
    with pytest.raises(UserError, match=r"70,600,000 are the names of classes .* shorter names") as caught:
        write_manifest(folder, replace(sound, num_classes=len(many), class_names=many))
    assert "\n" not in str(caught.value) and (folder / "manifest.json").read_bytes() == before
    short = tuple(name[:6] for name in many)
    write_manifest(folder, replace(sound, num_classes=len(short), class_names=short))
    assert read_manifest(folder).class_names == short


def test_record_number_out_of_range_is_an_index_error(make_set: MakeSet) -> None:
    shards = open_data(make_set())
    for wrong in (-1, 50):
        with pytest.raises(IndexError, match=rf"record {wrong}: .* 0 … 49"):
            shards.gather(np.array([0, wrong]))


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path / "x.safetensors", random_moments(3, SHAPE).numpy(), np.zeros(3, np.int64), ONE_CLASS)
    assert not list(tmp_path.iterdir())
