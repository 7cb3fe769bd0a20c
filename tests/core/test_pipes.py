"""A pipe, a socket or a device where a file is expected is told in one line, and nothing waits for it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from st_fast.core import checkpoint
from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, write_atomic
from st_fast.core.ranks import Ranks
from st_fast.core.writing import Writer, whole_file
from st_fast.data.shards import open_data
from st_fast.data.sources import open_source
from st_fast.evaluate.classifier import read_images
from st_fast.evaluate.inception import load_inception
from st_fast.evaluate.scores import open_reference
from st_fast.model.stored import read_model
from st_fast.model.vae import autoencoder_class, load_vae
from st_fast.recipe import load, load_run
from st_fast.report.collect import read_run
from st_fast.report.html import _embedded
from st_fast.sample.previews import check_replaced, png, read_record
from st_fast.sample.set import SampleSet, open_npz, read_settings
from st_fast.study.plan import read_study
from st_fast.train.continuity import Changes
from st_fast.train.log import Log
from tests import tiny

CPU = Ranks(0, 1, torch.device("cpu"))


def pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@contextmanager
def no_waiting() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def data(folder: Path, name: str) -> Path:
    tiny.write_data(folder / "data")
    (folder / "data" / name).unlink()
    return folder / "data" / name


def run_folder(folder: Path, name: str) -> Path:
    (folder / "recipe.toml").write_text("")
    (folder / "log.jsonl").write_text('{"kind": "train", "stage": "plain", "step": 1}\n')
    (folder / name).unlink()
    return folder / name


def saved(folder: Path, name: str) -> Path:
    checkpoint.save(folder, 3, {"ema": {"w": torch.zeros(2)}}, {})
    (folder / "00000003" / name).unlink()
    return folder / "00000003" / name


def pictures(folder: Path, name: str) -> Path:
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images" / "a.png")
    return folder / "images" / name


def vae(folder: Path) -> Path:
    autoencoder_class()  # its import takes a while
    (folder / "vae").mkdir()
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    return folder / "vae" / "config.json"


def part_of_a_set(path: Path) -> None:
    SampleSet(path.parent.parent, {"num": 4, "batch_size": 4}).get(0)


def in_parts(folder: Path) -> Path:
    (folder / "parts").mkdir()
    return folder / "parts" / "000000.safetensors"


Case = tuple[Callable[[Path], Path], Callable[[Path], Any]]
CASES: dict[str, Case] = {
    "recipe": (lambda folder: folder / "r.toml", load),
    "a run's recipe": (lambda folder: folder / "recipe.toml", lambda path: load_run(path.parent)),
    "study": (lambda folder: folder / "s.toml", read_study),
    "recipe of a report": (lambda folder: run_folder(folder, "recipe.toml"), lambda path: read_run(path.parent)),
    "log of a report": (lambda folder: run_folder(folder, "log.jsonl"), lambda path: read_run(path.parent)),
    "picture of a report": (lambda folder: folder / "a.png", lambda path: _embedded(path.parent, path.name, 9)),
    "log of a run": (lambda folder: folder / "log.jsonl", lambda path: Changes(False, Log(path, CPU))),
    "manifest": (lambda folder: data(folder, "manifest.json"), lambda path: open_data(path.parent, True)),
    "shard": (lambda folder: data(folder, "latents-00000.safetensors"), lambda path: open_data(path.parent, True)),
    "dataset.json": (lambda folder: pictures(folder, "dataset.json"), lambda path: open_source(path.parent)),
    "archive": (lambda folder: folder / "a.zip", open_source),
    "tar": (lambda folder: folder / "a.tar", open_source),
    "real images": (lambda folder: folder / "images.safetensors", lambda path: read_images(path.parent)),
    "checkpoint's manifest": (lambda folder: saved(folder, "manifest.json"), lambda path: latest(path)),
    "checkpoint's tensors": (lambda folder: saved(folder, "ema.safetensors"), lambda path: latest(path)),
    "checkpoint": (lambda folder: folder / "00000003", lambda path: latest(path / "x")),
    "model": (lambda folder: folder / "m.pt", lambda path: read_model(path, print)),
    "published model": (lambda folder: folder / "config.json", lambda path: read_model(path.parent, print)),
    "VAE": (vae, lambda path: load_vae(path.parent)),
    "Inception": (lambda folder: folder / "w.pth", lambda path: load_inception(path, torch.device("cpu"))),
    "reference": (lambda folder: folder / "r.npz", lambda path: open_reference(path, (8, 8, 3))),
    "samples": (lambda folder: folder / "s.npz", open_npz),
    "a set's settings": (lambda folder: folder / "sample.json", lambda path: read_settings(path.parent)),
    "a set's part": (in_parts, part_of_a_set),
    "a picture to replace": (lambda folder: folder / "a.png", lambda path: check_replaced(path, {})),
    "a GIF to replace": (lambda folder: folder / "a.gif", lambda path: check_replaced(path, {})),
}


def latest(path: Path) -> None:
    checkpoint.latest(path.parent.parent, lambda line: None)


@pytest.mark.parametrize("kind", [pipe, a_socket, device], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("case", CASES)
def test_what_is_no_file_is_told_in_one_line_without_waiting(
    case: str, kind: Callable[[Path], None], tmp_path: Path
) -> None:
    place, read = CASES[case]
    path = place(tmp_path)
    kind(path)
    with pytest.raises(UserError) as told, no_waiting():
        read(path)
    assert len(str(told.value).splitlines()) == 1 and str(tmp_path) in str(told.value)


def test_a_pipe_in_the_logs_place_costs_a_run_no_more_than_a_line(tmp_path: Path) -> None:
    said: list[str] = []
    pipe(tmp_path / "log.jsonl")
    writer = Writer(said.append)
    with no_waiting():
        writer.mend(tmp_path / "log.jsonl")
        writer.append(tmp_path / "log.jsonl", "{}\n")
    assert len(said) == 1 and "log.jsonl: cannot be written" in said[0] and writer.missing
    with pytest.raises(BadFile, match=r"log\.jsonl: not a regular file"):
        Changes(False, Log(tmp_path / "log.jsonl", CPU))


def test_a_picture_whose_settings_are_nested_too_deeply_has_none(tmp_path: Path) -> None:
    text = PngInfo()
    text.add_text("st_fast.sample", "[" * 100_000)
    Image.new("L", (4, 4)).save(tmp_path / "a.png", pnginfo=text)
    assert read_record(tmp_path / "a.png") is None
    (tmp_path / "b.png").write_bytes(png(torch.zeros(4, 4, 1, dtype=torch.uint8), record={"a": 1}))
    assert read_record(tmp_path / "b.png") == {"a": 1}


@pytest.mark.parametrize("kind", [pipe, a_socket, device], ids=lambda kind: kind.__name__)
def test_what_is_no_file_is_never_replaced_by_one(kind: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "out"
    kind(path)
    before = path.lstat()
    with pytest.raises(FileExistsError, match="never replaced"):
        write_atomic(path, b"page")
    with pytest.raises(UserError, match="never replaced"), whole_file(path) as partial:
        partial.write_bytes(b"page")
    assert os.path.samestat(path.lstat(), before) and list(tmp_path.iterdir()) == [path]
