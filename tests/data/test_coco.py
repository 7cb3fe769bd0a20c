"""U-ViT's layout of COCO is read in place and converted, and log-variances are never taken for standard deviations."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile
from st_fast.data.layouts import coco
from st_fast.data.layouts import records as layout_records
from st_fast.data.layouts.coco import CocoSet
from st_fast.data.layouts.records import CLAMP, kind_of
from st_fast.data.shards import open_data, read_any_manifest
from st_fast.data.text import open_text, read_captions, read_text_manifest
from st_fast.model.text_encoders import check_encoder, load_text_encoder
from st_fast.prepare import __main__ as prepare
from st_fast.train.continuity import file_differences
from tests.tiny_text import write_text_encoder

from .conftest import random_moments

SHAPE, LENGTH, WIDTH, IMAGES = (8, 4, 6), 5, 7, 12
ENCODER = "openai/clip-vit-large-patch14"


def write_layout(folder: Path, log_variance: bool = False, words: bool = True, moments_of: type = np.float32) -> Path:
    """As the projects' scripts leave it: 1 to 3 captions an image, and the empty one's states above the folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    np.save(folder.parent / "empty_context.npy", rng.normal(size=(LENGTH, WIDTH)).astype(np.float32))
    for image, row in enumerate(random_moments(IMAGES, SHAPE).numpy()):
        if log_variance:
            row[4:] = rng.uniform(-45, 3, row[4:].shape)  # U-ViT's aren't clamped
        np.save(folder / f"{image}.npy", row.astype(moments_of))
        lines = [f"image {image}, caption {k} 👩🏽‍🚒" for k in range(1 + image % 3)]
        for k in range(len(lines)):
            np.save(folder / f"{image}_{k}.npy", rng.normal(size=(LENGTH, WIDTH)).astype(np.float32))
        if words:
            (folder / f"{image}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / f"{image}.png").write_bytes(b"not read")
    return folder


def moments(folder: Path) -> np.ndarray:
    return np.stack([np.load(folder / f"{image}.npy") for image in range(IMAGES)])


def states(folder: Path, image: int, caption: int) -> torch.Tensor:
    return torch.from_numpy(np.load(folder / f"{image}_{caption}.npy"))


def check_text(data: Path, folder: Path, words: bool, tolerance: float) -> None:
    """The states and captions of `data` are those of the files in `folder`."""
    records = open_data(data)
    text = open_text(data, "", records)
    text.verify()
    made = text.manifest
    assert (made.encoder, made.hash, made.mask, made.shape) == (ENCODER, "", False, (1, LENGTH, WIDTH))
    assert made == read_text_manifest(data, ENCODER) and made.latents == records.digest
    empty = torch.from_numpy(np.load(folder.parent / "empty_context.npy"))
    torch.testing.assert_close(text.null().float(), empty, atol=tolerance, rtol=tolerance)
    captions, _ = read_captions(data)
    for image in (11, 0, 4):
        for caption in range(1 + image % 3):
            rows = text.rows_of(np.array([image]), np.array([(caption + 0.5) / (1 + image % 3)]))
            found = text.states(rows)[0].float()
            torch.testing.assert_close(found, states(folder, image, caption), atol=tolerance, rtol=tolerance)
            assert captions[image][caption] == f"image {image}, caption {caption} 👩🏽‍🚒" * words
    assert [len(line) for line in captions] == [1 + image % 3 for image in range(IMAGES)]
    several = text.states(text.rows_of(np.array([7, 2, 9, 2]), np.zeros(4))).float()
    expected = torch.stack([states(folder, image, 0) for image in (7, 2, 9, 2)])
    torch.testing.assert_close(several, expected, atol=tolerance, rtol=tolerance)
    text.close()


@pytest.mark.parametrize("words", [True, False])
def test_means_and_stds_are_read_in_place_with_the_captions_states(words: bool, tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "train", words=words)
    records = open_data(folder)
    made = records.manifest
    assert (made.scale, made.vae.name, made.num_classes) == (0.18215, "sd-vae-ft-ema", 1)
    assert read_any_manifest(folder) == made
    chosen = np.array([7, 0, 11, 7])
    assert np.array_equal(records.gather(chosen)[0].numpy(), moments(folder)[chosen])
    check_text(folder, folder, words, 0)
    if not words:
        pytest.importorskip("transformers")
        clip = write_text_encoder(tmp_path / "clip", "clip")
        with pytest.raises(UserError, match="captions without their words"):
            prepare.main(["--text", str(clip), str(folder)])


def test_what_lies_beside_the_latents_counts(tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "train")
    before = open_data(folder)
    with pytest.raises(UserError, match="no complete text states of google/t5"):
        open_text(folder, "google/t5", before)
    np.save(folder / "empty_context.npy", np.ones((LENGTH, WIDTH), np.float32))
    assert open_text(folder, "", before).null().eq(1).all(), "the folder's own before the one above"
    (folder.parent / "empty_context.npy").unlink()
    assert open_text(folder, ENCODER, before).null().eq(1).all()
    np.save(folder / "6_1.npy", np.zeros((LENGTH, WIDTH), np.float32))
    assert open_data(folder).digest != before.digest, "one caption more"
    assert coco.is_coco(folder)
    (folder / "manifest.json").write_text("{}")
    assert not coco.is_coco(folder)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_log_variances_are_refused_with_the_command_that_converts_them(dtype: type, tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "train", log_variance=True, moments_of=dtype)
    with pytest.raises(BadFile) as refused:
        open_data(folder)
    told = str(refused.value)
    assert "(mean, log-variance) found" in told and "\n" not in told
    command = told.partition("st_fast.prepare ")[2].removesuffix(" converts it").replace("OUT", str(tmp_path / "out"))
    prepare.main([*command.split(), "--dtype", "float32", "--shard-size", "5"])
    found = open_data(tmp_path / "out").gather(np.arange(IMAGES))[0].numpy()
    kept = moments(folder).astype(np.float64)
    assert np.array_equal(found[:, :4], kept[:, :4].astype(np.float32))
    expected = np.exp(np.clip(kept[:, 4:], *CLAMP)) ** 0.5
    assert CLAMP == (-30, 20) and (kept[:, 4:] < -30).any()
    np.testing.assert_allclose(found[:, 4:], expected, rtol=1e-5 if dtype == np.float32 else 1e-3, atol=6e-8)


@pytest.mark.parametrize("words", [True, False])
def test_the_conversion_keeps_everything_and_goes_on_where_it_was_stopped(
    words: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from st_fast.prepare import text as text_module

    monkeypatch.setattr(text_module, "SHARD_BYTES", 10 * LENGTH * WIDTH * 2)
    folder, out = write_layout(tmp_path / "train", words=words), tmp_path / "out"
    command = ["--from-coco", str(folder), str(out), "--shard-size", "5"]
    prepare.main([*command, "--dry-run"])
    assert "24 captions, with" in capsys.readouterr().out and not out.exists()

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(text_module, "write_noted", stop)
        prepare.main(command)
    prepare.main(command)
    prepare.main(command)
    records = open_data(out)
    assert len(records.manifest.shards) == 3 and len(read_text_manifest(out, "").shards) == 3
    np.testing.assert_allclose(records.gather(np.arange(IMAGES))[0].numpy(), moments(folder), rtol=1e-3, atol=6e-8)
    check_text(out, folder, words, 1e-3)
    prepare.main(["--verify", str(out)])
    assert f"text: {ENCODER} of 24 captions verified" in capsys.readouterr().out
    if words:
        (folder / "0.txt").write_text("another\n")
        with pytest.raises(UserError, match=r"captions\.jsonl: other captions than those found now"):
            prepare.main(command)
        check_text(out, folder, words, 1e-3)


def damage(name: str, array: np.ndarray | None) -> object:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        if array is not None:
            np.save(folder / name, array)

    return pytest.param(change, name, id=f"{name} {None if array is None else array.dtype.str + str(array.shape)}")


def shorten(folder: Path) -> None:
    os.truncate(folder / "5_1.npy", (folder / "5_1.npy").stat().st_size - 4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        damage("9.npy", None), damage("11.npy", None), damage("8_1.npy", None),
        damage("11_2.npy", np.where(np.eye(LENGTH, WIDTH) * np.arange(WIDTH) == 3, np.nan, 1).astype(np.float32)),
        damage("../empty_context.npy", None),
        damage("5.npy", -np.ones(SHAPE, np.float32)), damage("5.npy", np.full(SHAPE, -1e3, np.float32)),
        damage("5.npy", np.full(SHAPE, np.nan, np.float32)), damage("5.npy", np.ones((8, 4, 5), np.float32)),
        damage("5.npy", np.array({"a": 1})), damage("8_1.npy", np.zeros((LENGTH, WIDTH + 1), np.float32)),
        damage("8_1.npy", np.full((LENGTH, WIDTH), np.inf, np.float32)),
        damage("../empty_context.npy", np.zeros(LENGTH, np.float32)), pytest.param(shorten, "5_1.npy", id="cut"),
        pytest.param(lambda folder: (folder / "8.txt").write_text("one\n"), "8.txt", id="a line too few"),
        pytest.param(lambda folder: (folder / "8.txt").write_text("1\n2\n3\n4\n"), "8.txt", id="a line too many"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_in_one_line(change, named, tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "train")
    change(folder)
    with pytest.raises(UserError) as refused:
        prepare.main(["--verify", str(folder)])
    told = str(refused.value)
    assert Path(named).name in told and "\n" not in told and len(told) < 400
    with pytest.raises(UserError, match=Path(named).name):
        prepare.main(["--from-coco", str(folder), str(tmp_path / "out")])


def test_a_file_of_the_other_kind_is_found_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_layout(tmp_path / "train")
    other, own = -np.ones(SHAPE, np.float32), moments(folder)
    for number, named in ((0, 1), (IMAGES - 1, IMAGES - 1), (5, 5)):
        np.save(folder / f"{number}.npy", other)
        with pytest.raises(BadFile, match=rf"/{named}\.npy: \(mean, .*, but 0\.npy is .* files of two kinds"):
            open_data(folder, verify=False)
        np.save(folder / f"{number}.npy", own[number])
    np.save(folder / "5.npy", other)
    monkeypatch.setattr(layout_records, "SAMPLED", 2)
    records = open_data(folder, verify=False)
    with pytest.raises(BadFile, match=r"5\.npy: \(mean, log-variance\), but 0\.npy is \(mean, std\)"):
        records.gather(np.array([4, 5]))


@pytest.mark.parametrize("name", ["1.npy", "1_0.npy", "11_2.npy", "empty_context.npy"])
def test_a_resume_notices_a_changed_file_of_moments_or_states_but_takes_a_copy(name: str, tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "coco")
    with closing(CocoSet(folder)) as records:
        records.verify()
        before = records.files
    copy = Path(shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile))
    with closing(CocoSet(copy)) as records:
        assert records.files and before and records.files.stat != before.stat
        assert file_differences(before, records) == []
    changed = next(path for path in (copy / name, copy.parent / name) if path.exists())
    np.save(changed, np.load(changed) + np.float32(0.25))
    with closing(CocoSet(copy)) as records:
        (told,) = file_differences(before, records)
    assert told.startswith("data.path: its files were")


def test_the_kind_follows_from_sign_and_range() -> None:
    row, path = np.zeros((4, 2, 2), np.float32), Path("x.npy")
    assert kind_of(row, path) == "std"
    for second, kind in ((3.0, "std"), (-1e-3, "log-variance"), (-45.0, "log-variance")):
        row[3, 1, 1] = second
        assert kind_of(row, path) == kind
    row[2, 0, 0] = 60
    with pytest.raises(BadFile, match=r"x\.npy: beside the mean it has -45 to 60: neither"):
        kind_of(row, path)
    for low, high in ((-100, 50), (-100, -90), (-1, 50)):
        row[2, 0, 0], row[3, 1, 1] = low, high
        assert kind_of(row, path) == "log-variance"
    for low, high in ((-101, 50), (-100, 51), (-np.inf, 1), (-1, np.nan)):
        row[2, 0, 0], row[3, 1, 1] = low, high
        with pytest.raises(BadFile, match="neither std" if np.isfinite(low + high) else r"x\.npy: NaN or Inf"):
            kind_of(row, path)
    row[0] = -100  # the mean may be anything
    row[2:] = 1
    assert kind_of(row, path) == "std"


def test_a_folder_of_something_else_is_refused_and_an_encoder_without_a_hash_goes_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not U-ViT's layout: 0\.npy and 0_0\.npy are needed"):
        prepare.main(["--from-coco", str(tmp_path), str(tmp_path / "out")])
    pytest.importorskip("transformers")
    folder = write_text_encoder(tmp_path / "clip-vit-large-patch14", "clip")
    encoder = load_text_encoder(str(folder), torch.device("cpu"), torch.float32)
    check_encoder(encoder, ENCODER, "")
    with pytest.raises(UserError, match="the training's captions were encoded by 'google/t5'"):
        check_encoder(encoder, "google/t5", "")
