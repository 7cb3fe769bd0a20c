"""`st_fast.prepare`: what its command line can't mean is told in one line, before anything is made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from st_fast.core.errors import UserError
from st_fast.prepare import __main__ as prepare

from .conftest import run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{in}"], "2 paths needed, got 1"),
        (["--verify", "{in}", "{out}"], "1 path needed, got 2"),
        (["--verify", "--stats", "{out}"], "not allowed with argument"),
        (["{in}", "{out}", "--size", "0"], "--size 0: at least 1"),
        (["{in}", "--size", "7", "{out}", "--vae", "{in}"], "neither a folder with an autoencoder"),
        (["{in}", "{out}", "--size", "big"], "--size big: an integer is needed"),
        (["{in}", "{out}", "--colour", "red"], "--colour is unknown"),
        (["{in}", "{out}", "--vae", "{in}", "--size", "16"], "neither a folder with an autoencoder"),
        (["{out}", "{in}"], "no such file or folder"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(
    class_folders: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    places = {"in": str(class_folders), "out": str(tmp_path / "out")}
    with pytest.raises(UserError, match=words) as caught:
        run(*(argument.format(**places) for argument in arguments))
    assert "\n" not in str(caught.value)


def test_a_size_whose_latents_patch_2_can_not_divide_is_refused_before_a_vae_is_trained(
    class_folders: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"--size 30: .* an odd side, 15, .* give a multiple of 4"):
        run(class_folders, tmp_path / "out", "--size", 30, "--vae", "small", "--vae-factor", 2, "--device", "cpu")
    assert not (tmp_path / "out" / "vae").exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--vae", "pixels", "--vae-factor", "8"], "--vae-factor 8: is of --vae small; --vae pixels has its own"),
        (["--vae", "small", "--vae-factor", "8", "--size", "20"], "--size 20: a multiple of --vae-factor 8"),
        (
            ["--vae", "small", "--vae-factor", "8", "--size", "8"],
            "--size 8: a multiple of --vae-factor 8, at least twice",
        ),
    ],
)
def test_a_factor_that_the_vae_or_the_size_does_not_have_is_refused(options, line, tmp_path):
    with pytest.raises(UserError, match=re.escape(line)):
        prepare.main([str(tmp_path), str(tmp_path / "out"), *options])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--verify", "--flip", "x"], "^--flip: means nothing with --verify"),
        (["--text", "clip", "--unlabelled", "x"], "^--unlabelled: means nothing with --text"),
        (["--stats", "--dry-run", "x"], "^--dry-run: means nothing with --stats"),
        (["--verify", "--size", "64x96", "x"], "^--size 64x96: means nothing with --verify"),
        (["--verify", "--vae", "pixels", "x"], "--vae pixels: means nothing with --verify"),
        (["--to-repa", "--dtype", "float32", "x", "y"], "--dtype float32: means nothing with --to-repa"),
        (["--from-repa", "--size", "512", "x", "y"], "--size 512: means nothing with --from-repa"),
        (["--features", "dino", "--shard-size", "7", "x", "y"], "--shard-size 7: means nothing with --features"),
        (["--vae", "pixels", "--vae-steps", "5", "x", "y"], "--vae-steps 5: means nothing with --vae pixels"),
        (["--text", "clip", "--captions", "auto", "x"], "--captions auto: means nothing with --text"),
        (["--text-length", "9", "x", "y"], "--text-length 9: means nothing with images to encode"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(*arguments)
