"""A small set, pictures, odd ones among them, a tiny VAE and the command, for the tests of preparing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from st_fast.prepare import __main__ as prepare
from st_fast.prepare.small_vae import SmallVae, new_vae
from tests.data.conftest import class_folders, encoded, make_set, picture

__all__ = ["class_folders", "encoded", "make_set", "picture"]


def run(*arguments: object) -> None:
    prepare.main([str(argument) for argument in arguments])


@pytest.fixture
def tiny_vae(tmp_path: Path) -> Path:
    """A folder with an untrained AutoencoderKL, f = 4, latents of 4 channels."""
    torch.manual_seed(0)
    vae = new_vae(SmallVae((4, 4, 4), 0), 3, 16)
    vae.save_pretrained(tmp_path / "my vae")
    return tmp_path / "my vae"


@pytest.fixture
def odd_folder(class_folders: Path) -> Path:
    """Six good pictures, four odd but usable ones, and four that are not."""
    target = class_folders / "b c"
    (target / "gray.jpg").write_bytes(encoded(picture(20, mode="L"), "JPEG"))
    (target / "cmyk.jpg").write_bytes(encoded(picture(21, mode="CMYK"), "JPEG"))
    (target / "alpha.png").write_bytes(encoded(picture(22, mode="RGBA")))
    (target / "deep.png").write_bytes(encoded(Image.fromarray(np.full((20, 20), 40_000, np.uint16))))
    (target / "corrupt.jpg").write_bytes(encoded(picture(23, (90, 90)), "JPEG")[:-400])
    (target / "empty ü.png").write_bytes(b"")
    (target / "text.png").write_text("no picture")
    (target / "unreadable.png").symlink_to(target / "gone.png")
    return class_folders
