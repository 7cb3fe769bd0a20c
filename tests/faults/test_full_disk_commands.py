"""FAULT: a disk that is full when a command writes: one line, exit code 1, and nothing that looks whole and is not."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from st_fast.convert.__main__ import main as convert
from st_fast.core.command import run_command
from st_fast.core.errors import EXIT_FAILED
from st_fast.core.files import write_folder
from st_fast.core.writing import save_pretrained
from st_fast.data.shards import open_data
from st_fast.prepare.repa import write_repa
from st_fast.prepare.small_vae import SmallVae, new_vae
from st_fast.recipe.schema import Model, Sample
from st_fast.sample.draw import Draw
from st_fast.sample.previews import draw_trajectory, save_png
from st_fast.sample.set import SampleSet, write_npz, write_pngs
from tests import foreign, tiny

ROOM = 256
"""Bytes that a file may have: enough for headers and folders."""
LABELS = np.arange(20)
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
BATCH = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())


class Drawn:
    """As much of a sampler as a film asks for."""

    model = SimpleNamespace(config=Model(depth=1, width=8, heads=2, patch=2, channels=4, latent_size=4, num_classes=3))
    request = SimpleNamespace(settings=Sample(num=2, steps=2))

    def draw_of(self, first: int, count: int) -> Draw:
        return Draw(torch.arange(first, first + count), torch.zeros(count, dtype=torch.int64), 0)

    def latents(self, noise: torch.Tensor, draw: Draw, watch: Callable[[torch.Tensor], None]) -> None:
        watch(noise / 2)
        watch(noise / 4)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return BATCH[: len(latents)]


def vae(folder: Path) -> None:
    with write_folder(folder / "vae") as writing:
        save_pretrained(new_vae(SmallVae((4, 4, 4), 0), 3, 16), writing)


def converted(suffix: str) -> Callable[[Path], None]:
    return lambda folder: convert([str(folder / "given" / "last.pt"), str(folder / f"out{suffix}")])


WRITERS: dict[str, Callable[[Path], object]] = {
    "npz": lambda folder: write_npz(folder / "samples.npz", (16, 16, 3), [IMAGES[:10], IMAGES[10:]], LABELS),
    "png": lambda folder: write_pngs(folder / "png", 0, IMAGES),
    "picture": lambda folder: save_png(torch.from_numpy(IMAGES[0]), folder / "grid.png"),
    "gif": lambda folder: draw_trajectory(Drawn(), folder / "film.gif", {}),  # type: ignore[arg-type]
    "batch": lambda folder: SampleSet(folder, {"num": 20, "batch_size": 20}).put(0, BATCH, torch.from_numpy(LABELS)),
    "repa": lambda folder: write_repa(open_data(folder / "given" / "data"), folder / "repa", lambda count: None),
    "vae": vae,
    ".pt": converted(".pt"),
    ".safetensors": converted(".safetensors"),
    "a stage": converted(""),
}


@pytest.mark.parametrize("what", WRITERS)
def test_what_a_command_writes_on_a_full_disk_is_one_line_and_leaves_nothing(what, tmp_path, capsys):
    """For real: the process may write no file above a size, which fails as a full disk does."""
    (tmp_path / "given").mkdir()
    foreign.repa_checkpoint(tmp_path / "given" / "last.pt")
    tiny.write_data(tmp_path / "given" / "data")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def command(arguments: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
        try:
            WRITERS[what](tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with pytest.raises(SystemExit) as ended:
        run_command(command, [])
    told = capsys.readouterr().err
    assert ended.value.code == EXIT_FAILED and told.startswith("st_fast: ") and told.count("\n") == 1, told
    assert "File too large" in told and str(tmp_path) in told
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()} == {"given"}
    WRITERS[what](tmp_path)
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()} != {"given"}
