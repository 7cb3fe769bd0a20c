"""`st_fast.prepare`: true content, odd input named and counted, interrupted work continued, nothing half-made."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from st_fast.core.errors import RunFailed, UserError
from st_fast.core.progress import bar
from st_fast.data.images import load_image
from st_fast.data.manifest import read_manifest, write_manifest
from st_fast.data.shards import open_data
from st_fast.model.vae import decode, load_vae, vae_hash
from st_fast.prepare import job
from tests import warm

from .conftest import encoded, picture, run

ROOT = Path(__file__).resolve().parents[2]
PIXELS = ["--size", "16", "--vae", "pixels", "--shard-size", "2", "--device", "cpu"]


def command(arguments: Sequence[object], **options: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "st_fast.prepare", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload,no-any-return]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_moments_are_those_of_the_vae_on_the_cropped_images(
    class_folders: Path, tiny_vae: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(class_folders, out, "--size", 16, "--vae", tiny_vae, "--batch-size", 4, "--dtype", "float32", "--flip")
    shards = open_data(out)
    vae = load_vae(tiny_vae)
    files = sorted(class_folders.rglob("*.png"), key=lambda path: path.as_posix())
    images = torch.stack([torch.from_numpy(load_image(file.read_bytes(), 16, 3)) for file in files])
    moments, labels = shards.gather(np.arange(12))
    assert labels.tolist() == [0] * 6 + [1] * 6
    for kept, expected in ((moments[::2], images), (moments[1::2], images.flip(-1))):
        distribution = vae.encode(expected / 127.5 - 1).latent_dist
        assert torch.allclose(kept, torch.cat((distribution.mean, distribution.std), 1), atol=1e-5)
    manifest = shards.manifest
    assert manifest.flip and manifest.class_names == ("b c", "été 中文") and manifest.shape == (8, 4, 4)
    assert manifest.vae.path == "vae" and manifest.vae.hash == vae_hash(load_vae(out / "vae")) == vae_hash(vae)
    assert str(tmp_path) not in (out / "manifest.json").read_text()


def test_pixels_as_latents_are_lossless(class_folders: Path, tmp_path: Path) -> None:
    run(class_folders, tmp_path / "out", *PIXELS)
    shards = open_data(tmp_path / "out")
    moments, _ = shards.gather(np.arange(6))
    made = shards.manifest
    assert (made.posterior, made.shape, made.scale) == ("mean", (3, 16, 16), 2.0)
    again = decode(load_vae("pixels"), moments.float() * made.scale, made.normalisation)
    files = sorted(class_folders.rglob("*.png"), key=lambda path: path.as_posix())
    assert np.array_equal(again.numpy(), np.stack([load_image(file.read_bytes(), 16, 3) for file in files]))


def test_interrupted_work_continues_and_ends_with_the_same_files(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(class_folders, tmp_path / "whole", *PIXELS)
    original, made = job.write_shard, []

    def killed_at_second(path: Path, *rest: object) -> object:
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(path.name)
        return original(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(job, "write_shard", killed_at_second)
    with pytest.raises(KeyboardInterrupt):
        run(class_folders, tmp_path / "cut", *PIXELS)
    assert not (tmp_path / "cut" / "manifest.json").exists()
    monkeypatch.setattr(job, "write_shard", lambda path, *rest: made.append(path.name) or original(path, *rest))
    run(class_folders, tmp_path / "cut", *PIXELS)
    assert made == ["latents-00000.safetensors", "latents-00001.safetensors", "latents-00002.safetensors"]
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--flip"], "flip False (now True)"),
        (["--dtype", "float32"], "dtype float16 (now float32)"),
        (["--size", "8"], "size 16 (now 8)"),
        (["--size", "8", "--shard-size", "4"], "size 16 (now 8), shard_size 2 (now 4)"),
        (["--vae", "pixels-gray"], "VAE pixels (now pixels-gray)"),
        (["--vae", "small", "--vae-factor", "4"], "VAE pixels (now small)"),
        (["--dry-run", "--flip"], "flip False (now True)"),
    ],
)
def test_a_finished_set_is_not_taken_for_one_of_other_options(
    class_folders: Path, tmp_path: Path, options: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(class_folders, tmp_path / "out", *PIXELS)
    before = content(tmp_path / "out")
    capsys.readouterr()
    run(class_folders, tmp_path / "out", *PIXELS)
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(UserError) as refusal:
        run(class_folders, tmp_path / "out", *PIXELS, *options)
    assert f"complete, but made with {line}; use th" in str(refusal.value)
    assert str(refusal.value).endswith("or name another folder to write")
    assert content(tmp_path / "out") == before


def more_images(folder: Path) -> str:
    (folder / "b c" / "new.png").write_bytes(encoded(picture(77)))
    return r"images \w+ \(now \w+\), count 6 \(now 7\), content \w+ \(now \w+\)"


def another_name(folder: Path) -> str:
    (folder / "b c").rename(folder / "b d")
    return r"images \w+ \(now \w+\), class_names .*b c.* \(now .*b d.*\)"


def an_edited_image(folder: Path) -> str:
    (folder / "b c" / "picture 0 ü.png").write_bytes(encoded(picture(99)))
    return r"content \w+ \(now \w+\)"


def a_class_less(folder: Path) -> str:
    for path in (folder / "b c").iterdir():
        path.unlink()
    return r"count 6 \(now 3\), .*num_classes 2 \(now 1\)"


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", [more_images, another_name, an_edited_image, a_class_less])
def test_neither_finished_nor_unfinished_work_goes_on_with_other_images(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], str], finished: bool
) -> None:
    if not finished:
        monkeypatch.setattr(job, "_finish", lambda *rest: None)
    run(class_folders, tmp_path / "out", *PIXELS)
    before, words = content(tmp_path / "out"), change(class_folders)
    for options in ([], ["--dry-run"]):
        with pytest.raises(UserError, match=words):
            run(class_folders, tmp_path / "out", *PIXELS, *options)
    assert content(tmp_path / "out") == before


def test_a_moved_source_is_the_same_source(
    class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(class_folders, tmp_path / "out", *PIXELS)
    run(class_folders.rename(tmp_path / "moved"), tmp_path / "out", *PIXELS)
    assert "complete already" in capsys.readouterr().out


def test_a_finished_folder_of_an_older_version_tells_what_its_manifest_does(
    class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(class_folders, out, *PIXELS)
    (out / "job.json").unlink()
    table = json.loads((out / "manifest.json").read_text())
    table["source"] = table["source"].replace("upright, ", "")
    (out / "manifest.json").write_text(json.dumps(table))
    run(class_folders, out, *PIXELS)
    assert "complete already" in capsys.readouterr().out
    for options, words in ((["--flip"], "flip False"), (["--size", "8"], "size 16"), (["--dtype", "float32"], "dtype")):
        with pytest.raises(UserError, match=words):
            run(class_folders, out, *PIXELS, *options)
    more_images(class_folders)
    with pytest.raises(UserError, match=r"count 6 \(now 7\)"):
        run(class_folders, out, *PIXELS)


def test_continuing_with_other_settings_is_refused(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_finish", lambda *rest: None)
    run(class_folders, tmp_path / "out", *PIXELS)
    with pytest.raises(UserError, match=r"begun with size 16 \(now 8\); use those, or"):
        run(class_folders, tmp_path / "out", *PIXELS, "--size", 8)
    for more in ((), ("--dry-run",)):  # before one is trained
        with pytest.raises(UserError, match=r"begun with another VAE \(now small\); use that, or"):
            run(class_folders, tmp_path / "out", *PIXELS, "--vae", "small", *more)
        assert not (tmp_path / "out" / "vae").exists()
    (tmp_path / "out" / "job.json").unlink()
    with pytest.raises(UserError, match="it holds shards of something else"):
        run(class_folders, tmp_path / "out", *PIXELS)


@pytest.mark.parametrize("out", ["/dev/null", "file"])
def test_a_place_that_is_no_folder_is_a_wrong_place_and_no_full_disk(
    class_folders: Path, tmp_path: Path, out: str
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"(null|file): can't be written: File exists$") as told:
        run(class_folders, tmp_path / out, *PIXELS)
    assert told.type is UserError and (tmp_path / "file").read_text() == "mine"


def test_several_processes_share_the_work_and_the_last_one_writes_the_manifest(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(class_folders, tmp_path / "one", *PIXELS)
    for rank in (1, 0):
        assert not (tmp_path / "two" / "manifest.json").exists()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        run(class_folders, tmp_path / "two", *PIXELS)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_bad_images_are_skipped_by_name_and_counted(
    odd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(odd_folder, tmp_path / "out", *PIXELS, "--max-bad", 4)
    said = capsys.readouterr()
    for name in ("corrupt.jpg", "text.png", "unreadable.png", "empty"):
        assert f"{name}" in said.out
    assert "No such file" in said.out and "truncated" in said.out
    assert "10 records" in said.out and "4 images skipped" in said.out
    shards = open_data(tmp_path / "out")
    assert len(shards) == 10 and np.bincount(shards.labels).tolist() == [7, 3]


def test_more_bad_images_than_allowed_fail_with_the_first_name(odd_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"4 images can't be used, --max-bad allows 3; the first is b c/\w+"):
        run(odd_folder, tmp_path / "out", *PIXELS, "--max-bad", 3, "--shard-size", 50)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_nothing_but_bad_images_is_no_set(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "x.png").write_bytes(b"x")
    with pytest.raises(UserError, match="not one usable image"):
        run(tmp_path / "in", tmp_path / "out", *PIXELS)


def test_a_full_disk_is_told_and_the_work_continues_once_there_is_room(class_folders: Path, tmp_path: Path) -> None:
    """A file-size limit stops the shard's write half-way, as a full disk does."""
    for number in range(40):
        (class_folders / "b c" / f"{number}.png").write_bytes(encoded(picture(number)))
    arguments = [class_folders, tmp_path / "out", *PIXELS, "--shard-size", "40"]

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    failed = command(arguments, preexec_fn=small_files)
    assert failed.returncode == 1, failed.stderr
    assert "0 of 2 shards are complete and stay, and the same command goes on" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["job.json"]
    run(*arguments)
    assert len(open_data(tmp_path / "out")) == 46


def test_a_disk_that_fails_to_write_is_told(
    class_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *rest: object) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job, "write_shard", full)
    with pytest.raises(RunFailed, match=r"No space left on device; 0 of 3 shards"):
        run(class_folders, tmp_path / "out", *PIXELS)


def test_dry_run_says_what_would_be_made_and_writes_nothing(
    class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(class_folders, tmp_path / "out", *PIXELS, "--flip", "--dry-run")
    said = capsys.readouterr().out
    assert "6 images of 2 classes" in said and "12 records of float16 3×16×16" in said and "6 shards" in said
    assert not (tmp_path / "out").exists()


def test_verify_and_stats(class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run(class_folders, out, *PIXELS)
    run("--verify", out)
    run("--stats", out)
    said = capsys.readouterr().out
    assert "6 records in 3 shards verified" in said
    run(class_folders, tmp_path / "one", *PIXELS, "--shard-size", 6)
    run("--verify", tmp_path / "one")
    told = capsys.readouterr()
    assert (
        "6 records in 1 shard: latents of 3 × 16 × 16, 2 classes\n" in told.out + told.err
        and "6 records in 1 shard verified" in told.out
    )
    moments = 2 * open_data(out).gather(np.arange(6))[0].double()
    for channel in range(3):
        values = moments[:, channel]
        assert f"{channel:7d}  {values.mean():8.4f}  {values.std(unbiased=False):8.4f}" in said
    whole = moments.std(unbiased=False)
    assert f"    all  {moments.mean():8.4f}  {whole:8.4f}  with scale {2 / whole:.5f} the std would be 1" in said
    assert "classes: b c 3, été 中文 3" in said
    assert Image.open(io.BytesIO((out / "stats.png").read_bytes())).width > 100


def test_stats_and_the_recipe_need_no_vae_and_another_can_draw_the_picture(
    class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe = tmp_path / "out", tmp_path / "own.toml"
    run(class_folders, out, *PIXELS)
    made = read_manifest(out)
    write_manifest(out, replace(made, vae=replace(made.vae, name=str(tmp_path / "gone"), hash="")))
    with pytest.raises(UserError, match=r"no picture: .*gone.*--vae VAE names one"):
        run("--stats", out, "--recipe", recipe)
    said = capsys.readouterr().out
    assert "classes: b c 3, été 中文 3" in said and f"train: python -m st_fast.train {recipe}" in said
    assert recipe.is_file() and not (out / "stats.png").exists()
    run("--stats", out, "--vae", "pixels")
    assert (out / "stats.png").is_file()


def test_the_bar_of_slow_work_says_seconds_a_step() -> None:
    with bar(None, "drawing", 10, "step") as shown:
        assert "1.70s/step]" in shown.format_meter(1, 10, 1.7, unit=shown.unit)


def test_control_characters_of_class_names_reach_no_terminal(
    class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (class_folders / "b c").rename(class_folders / "b\x1b[2J")
    run(class_folders, tmp_path / "out", *PIXELS)
    names = ("b\x1b[2J", "été 中文")  # as a manifest written by somebody else has them
    write_manifest(tmp_path / "out", replace(read_manifest(tmp_path / "out"), class_names=names))
    run("--stats", tmp_path / "out")
    said = capsys.readouterr()
    assert "6 images of 2 classes: b\\x1b[2J, été 中文" in said.out and "classes: b\\x1b[2J 3" in said.out
    assert "\x1b" not in said.out + said.err


def test_the_command_line_works_as_typed(class_folders: Path, tmp_path: Path) -> None:
    made = command([class_folders, tmp_path / "out", *PIXELS])
    assert made.returncode == 0, made.stderr
    assert "6 records in 3 shards" in made.stdout
    path = tmp_path / "out" / "latents-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    damaged = command(["--verify", tmp_path / "out"])
    assert damaged.returncode == 2
    assert damaged.stderr.startswith("st_fast: ") and len(damaged.stderr.splitlines()) == 1
    assert "latents-00001.safetensors: record 1 (number 3 of the set)" in damaged.stderr


def test_kill_9_leaves_whole_shards_or_none(class_folders: Path, tmp_path: Path) -> None:
    """Killed between the second shard's write and its rename, then run again."""
    script = (
        "import os, sys; from st_fast.prepare import __main__ as prepare; rename, done = os.rename, []\n"
        "def kill(a, b):\n"
        "    done.append(b); str(b).endswith('00001.safetensors') and os.kill(os.getpid(), 9); rename(a, b)\n"
        "os.rename = kill; prepare.main(sys.argv[1:])"
    )
    arguments = [str(argument) for argument in (class_folders, tmp_path / "out", *PIXELS)]
    killed = warm.run("-c", script, *arguments)
    assert killed.returncode == -9, killed.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "latents-00000.safetensors" in names and "latents-00001.safetensors" not in names
    run(*arguments)
    run("--verify", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["count"] == 6
    assert not [path for path in (tmp_path / "out").iterdir() if ".partial" in path.name]


def test_a_folder_with_nothing_in_it_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=r"in': no image in it .*; it holds nothing"):
        run(tmp_path / "in", tmp_path / "out", *PIXELS)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_an_image_without_permission_is_skipped_by_name(
    class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (class_folders / "b c" / "picture 1 ü.png").chmod(0)
    run(class_folders, tmp_path / "out", *PIXELS)
    said = capsys.readouterr().out
    assert "picture 1 ü.png" in said and "Permission denied" in said and "5 records" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_can_not_be_written_is_told(class_folders: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(RunFailed, match="Permission denied"):
        run(class_folders, tmp_path / "locked" / "out", *PIXELS)
