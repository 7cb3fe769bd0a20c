"""Files of other people, damaged and forged: read, or refused in one line, at no cost in memory or time."""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from st_fast.core import checkpoint
from st_fast.core.limits import Zip, tar_members
from st_fast.data.captions import coco_captions
from st_fast.data.cards import names_on_card
from st_fast.data.shards import open_data
from st_fast.data.sources import open_source
from st_fast.data.text import captions_bytes, open_text, read_captions
from st_fast.model.formats import import_file
from st_fast.model.stored import read_model
from st_fast.recipe.schema import Model
from st_fast.sample.set import open_npz, write_npz
from st_fast.sample.source import find_source
from tests import foreign, tiny, tiny_shapes
from tests.core.checkpoint.test_checkpoint_fuzz import ODD_VALUES, damaged_bytes, damaged_value
from tests.data import foreign_latents, test_coco
from tests.data.conftest import encoded, picture
from tests.data.foreign_latents import Truth
from tests.data.test_captions import TEXTS, write_coco
from tests.data.test_cards import BY_NUMBER
from tests.data.test_repa import write_layout
from tests.fuzz import blocks, watched
from tests.prepare.sources import idx_files, write_tar

SMALL = Model(depth=1, width=8, heads=2, patch=2, channels=4, latent_size=4, num_classes=3)
SMALL_TEXT = replace(foreign.TINY_TEXT, depth=1, width=8, heads=2)
AT_ONCE = 25


@dataclass(frozen=True)
class Kind:
    """A sound file or folder, what is done to it, and how it is read."""

    make: Callable[[Path], Path]
    spoil: Callable[[Path, random.Random], None]
    read: Callable[[Path], object]
    full: int
    """Blocks of the full run."""


def spoil_bytes(path: Path, draw: random.Random) -> None:
    path.write_bytes(damaged_bytes(path.read_bytes(), draw))


def spoil_json(path: Path, draw: random.Random) -> None:
    path.write_text(json.dumps(damaged_value(json.loads(path.read_text()), draw)))


def spoil_pickle(path: Path, draw: random.Random) -> None:
    """The pickle inside a sound zip is damaged."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    records[name] = damaged_bytes(records[name], draw)
    with zipfile.ZipFile(path, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def odd_tensors() -> list[Any]:
    one = torch.zeros(1)
    return [
        one, one.expand(10**12), torch.zeros(0), torch.zeros(3, dtype=torch.int8), one.to(torch.complex64), "text",
        torch.full((2, 2), float("nan")), one.expand(1, 4, 8), torch.zeros(2, 2).t(), torch.zeros(1, 4, 8).half(), [],
        torch.zeros(2**16).expand(64, -1), torch.tensor(1), 3, {"x": one}, None, {},
    ]  # fmt: skip


def spoil_content(path: Path, draw: random.Random) -> None:
    """One or two entries of a checkpoint's tables, optimiser or args are replaced, renamed or left out."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    for _ in range(draw.randint(1, 2)):
        place: Any = content
        while isinstance(place, (dict, argparse.Namespace)) and draw.random() < 0.7:
            table = vars(place) if isinstance(place, argparse.Namespace) else place
            if not (inner := [value for value in table.values() if isinstance(value, (dict, argparse.Namespace))]):
                break
            place = draw.choice(inner)
        table = vars(place) if isinstance(place, argparse.Namespace) else place
        if not table:
            continue
        key = draw.choice(list(table))
        value = table.pop(key)
        names = ["blocks.99999999.x", "blocks.0.x", "é\n", "y_embedder.embedding_table.weight", 7, "module.pos_embed",
                 "joint_blocks.99999999.x", "context_embedder.weight", "null_context"]  # fmt: skip
        table[draw.choice(names) if draw.random() < 0.3 else key] = draw.choice(
            [*odd_tensors(), value, *(odd for odd in ODD_VALUES if odd != "\ud800" and not isinstance(odd, dict))]
        )
    torch.save(content, path, _use_new_zipfile_serialization=draw.random() < 0.7)


def make_model(folder: Path) -> Path:
    foreign.repa_checkpoint(folder / "in.pt", SMALL, steps=1)
    return folder / "in.pt"


class Settings:
    """A class that is not read."""


def make_model_with_arguments(folder: Path) -> Path:
    """Arguments of every kind that is read, and one that is left out."""
    content = foreign.repa_checkpoint(folder / "in.pt", SMALL, steps=1)
    vars(content["args"]).update(
        lr=np.float64(1e-4), steps=np.int64(5), yes=np.bool_(True), out=Path("a") / "b", own=Settings(),
        more=SimpleNamespace(path=Path("c"), counts=defaultdict(dict, a=1)),
    )  # fmt: skip
    torch.save(content, folder / "in.pt")
    return folder / "in.pt"


def make_pipeline(folder: Path) -> Path:
    """What drawing needs of a diffusers folder, but for the VAE."""
    from st_fast.model.load import DIFFUSERS_WEIGHTS, Published, write_pretrained

    (folder / "out" / "transformer").mkdir(parents=True)
    write_pretrained(folder / "out" / "transformer", foreign.trunk(SMALL, 1), Published(SMALL), DIFFUSERS_WEIGHTS)
    index = {
        "sampler": "heun",
        "num_inference_steps": 5,
        "guidance_scale": 1.5,
        "guidance_low": 0.1,
        "guidance_high": 0.9,
    }
    (folder / "out" / "model_index.json").write_text(json.dumps(index))
    return folder / "out"


def spoil_pipeline(path: Path, draw: random.Random) -> None:
    spoil_json(path / draw.choice(["model_index.json", "model_index.json", "transformer/config.json"]), draw)


def find_source_at(path: Path) -> object:
    options = {"stage": None, "weights": "ema", "layout": None, "heads": None, "num_classes": None, "data": None}
    options["internal_head"] = None
    return find_source(argparse.Namespace(run=path, **options))


def make_text_model(folder: Path) -> Path:
    foreign.repa_checkpoint(folder / "in.pt", SMALL_TEXT, steps=1)
    return folder / "in.pt"


def make_stage(folder: Path) -> Path:
    """A checkpoint of ours with every field that training writes into its meta."""
    weights = foreign.trunk(SMALL, 1)
    meta = {
        "stage": "a", "architecture": SMALL.architecture(), "flow": "linear", "recipe": "[flow]\npath = 'linear'",
        "dataset": "x", "seconds": 1.0, "rollbacks": 0, "features": [], "init": None, "kernels": {}, "versions": {},
    }  # fmt: skip
    optim = {"model.step": torch.tensor(1.0), "model.exp_avg.pos_embed": weights["pos_embed"],
             "model.exp_avg_sq.pos_embed": weights["pos_embed"]}  # fmt: skip
    return checkpoint.save(folder, 5, {"model": weights, "ema": weights, "optim": optim}, meta)


def spoil_meta(path: Path, draw: random.Random) -> None:
    """Other metadata, under a digest that fits."""
    from st_fast.core.checkpoint.store import digest_of

    content = json.loads((path / "manifest.json").read_text())
    content["meta"] = damaged_value(content["meta"], draw)
    (path / "manifest.json").write_text(json.dumps(content | {"digest": digest_of(content)}))


def make_folders(folder: Path) -> Path:
    """Class folders in a tar, some as webdataset's files, and a dataset.json."""
    with tarfile.open(folder / "in.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(6):
            for name, data in (
                (f"c{number % 2}/{number}.png", encoded(picture(number, (8, 8)))),
                (f"{number}.txt", b"1"),
            ):
                info = tarfile.TarInfo(name * (1 + number * 12 * (number == 5)))
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return folder / "in.tar"


def make_tars(folder: Path) -> Path:
    """Two tars of ImageNet's files in a tar."""
    inner = {}
    for wnid in ("n00000001", "n00000002"):
        files = {f"{wnid}_{n}.JPEG": encoded(picture(n, (8, 8))) for n in range(2)}
        inner[f"{wnid}.tar"] = write_tar(files, folder / "part.tar").read_bytes()
    return write_tar(inner, folder / "in.tar")


def make_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(6):
            archive.writestr(f"c{number % 2}/{number}.png", encoded(picture(number, (8, 8))))
    return folder / "in.zip"


def read_zip(path: Path) -> None:
    with Zip(path) as archive:
        for info in archive.infolist():
            archive.member(info)


def make_samples(folder: Path) -> Path:
    write_npz(folder / "in.npz", (4, 4, 3), iter([np.zeros((6, 4, 4, 3), np.uint8)]), np.arange(6))
    return folder / "in.npz"


def spoil_repa(path: Path, draw: random.Random) -> None:
    spoil_bytes(draw.choice(sorted(path.rglob("*.npy"))), draw)


def spoil_labels(path: Path, draw: random.Random) -> None:
    spoil_json(path / "vae-sd" / "dataset.json", draw)


def make_published(folder: Path) -> Path:
    from st_fast.model.load import Published, write_pretrained

    (folder / "out").mkdir()
    write_pretrained(folder / "out", foreign.trunk(SMALL, 1), Published(SMALL))
    return folder / "out"


def make_repa(folder: Path) -> Path:
    write_layout(folder / "repa", 3)
    return folder / "repa"


def make_coco(folder: Path) -> Path:
    return test_coco.write_layout(folder / "train")


def spoil_coco(path: Path, draw: random.Random) -> None:
    spoil_bytes(draw.choice(sorted(file for file in path.rglob("*") if file.suffix in (".npy", ".txt"))), draw)


def read_coco(path: Path) -> None:
    with closing(open_data(path)) as records, closing(open_text(path, "", records)) as text:
        text.verify()


def make_captions(folder: Path) -> Path:
    return write_coco(folder / "captions.json", ["a/1.jpg", "2.jpg"], TEXTS[:2])


def read_captions_of(path: Path) -> None:
    names = ["1.jpg", "b/a/1.jpg", "2.jpg"]
    captions = coco_captions(path, names)
    assert all(isinstance(text, str) and text for number in range(3) for text in captions(number))


def make_card(folder: Path) -> Path:
    (folder / "README.md").write_text(BY_NUMBER, encoding="utf-8")
    return folder / "README.md"


def make_lines(folder: Path) -> Path:
    (folder / "captions.jsonl").write_bytes(captions_bytes(TEXTS))
    return folder


def read_model_at(path: Path) -> object:
    return read_model(path, print, number_of_heads=2)


def any_file(path: Path, draw: random.Random) -> None:
    """One file of a folder, or the file itself, is damaged."""
    spoil_bytes(draw.choice(sorted(file for file in [path, *path.rglob("*")] if file.is_file())), draw)


def latents(make: Callable[[Path], Truth], full: int = 4) -> Kind:
    """Another project's latents, of which any file is damaged."""
    return Kind(lambda folder: make(folder / "set").path, any_file, lambda path: open_data(path).close(), full)


KINDS = {
    "foreign .pt, content": Kind(make_model, spoil_content, import_file, 16),
    "foreign .pt of text, content": Kind(make_text_model, spoil_content, read_model_at, 8),
    "foreign .pt, pickle": Kind(make_model, spoil_pickle, import_file, 10),
    "foreign .pt, arguments": Kind(make_model_with_arguments, spoil_pickle, import_file, 10),
    "diffusers folder": Kind(make_pipeline, spoil_pipeline, find_source_at, 6),
    "checkpoint to draw from": Kind(make_stage, spoil_meta, find_source_at, 6),
    "foreign .pt, bytes": Kind(make_model, spoil_bytes, import_file, 6),
    "checkpoint meta": Kind(make_stage, spoil_meta, read_model_at, 8),
    "data manifest": Kind(lambda folder: tiny.write_data(folder / "data", 4),
                          lambda path, draw: spoil_json(path / "manifest.json", draw),
                          lambda path: open_data(path, verify=False).close(), 10),
    "index of buckets": Kind(lambda folder: tiny_shapes.write_data(folder / "data", "96x96", "144x64"),
                             lambda path, draw: spoil_json(path / "buckets.json", draw),
                             lambda path: open_data(path, verify=False).close(), 6),
    "published config": Kind(make_published, lambda path, draw: spoil_json(path / "config.json", draw),
                             read_model_at, 6),
    "tar": Kind(make_folders, spoil_bytes, lambda path: list(tar_members(path)), 8),
    "tar of tars": Kind(make_tars, spoil_bytes, open_source, 8),
    "IDX file": Kind(lambda folder: idx_files(folder, "") / "train-images-idx3-ubyte", spoil_bytes, open_source, 4),
    "IDX file, packed": Kind(lambda folder: idx_files(folder) / "train-images-idx3-ubyte.gz", spoil_bytes,
                             open_source, 4),
    "zip of images": Kind(make_zip, spoil_bytes, read_zip, 6),
    "npz of samples": Kind(make_samples, spoil_bytes, lambda path: list(open_npz(path).blocks(4)), 6),
    "npy of latents": Kind(make_repa, spoil_repa, lambda path: open_data(path).close(), 4),
    "npy and txt of COCO": Kind(make_coco, spoil_coco, read_coco, 8),
    "COCO's captions": Kind(make_captions, spoil_json, read_captions_of, 8),
    "COCO's captions, bytes": Kind(make_captions, spoil_bytes, read_captions_of, 4),
    "captions.jsonl": Kind(make_lines, lambda path, draw: spoil_bytes(path / "captions.jsonl", draw), read_captions, 4),
    "LightningDiT's latents": latents(foreign_latents.lightningdit),
    "fast-DiT's latents": latents(foreign_latents.fast_dit),
    "MAR's latents": latents(foreign_latents.mar),
    "U-ViT's latents, pickles": latents(foreign_latents.uvit, 8),
    "EDM2's zip": latents(lambda path: foreign_latents.edm2(path.with_suffix(".zip"))),
    "EDM2's folder": latents(foreign_latents.edm2),
    "SpeedrunDiT's latents": latents(foreign_latents.speedrun),
    "MaskDiT's tars, pickles": latents(foreign_latents.maskdit, 8),
    "card of a data set": Kind(make_card, spoil_bytes, names_on_card, 6),
    "dataset.json": Kind(make_repa, spoil_labels, lambda path: open_data(path, verify=False).close(), 6),
}  # fmt: skip


@pytest.mark.parametrize(("name", "block"), [(name, n) for name, kind in KINDS.items() for n in blocks(1, kind.full)])
def test_a_spoilt_file_is_read_or_refused_in_one_line(name: str, block: int, tmp_path: Path) -> None:
    kind = KINDS[name]
    path = kind.make(tmp_path)
    good = {file: file.read_bytes() for file in [path, *path.rglob("*")] if file.is_file()}
    for number in range(AT_ONCE):
        seed = 10_000 * block + number
        kind.spoil(path, random.Random(seed))
        with watched(name, sum(file.stat().st_size for file in good)):
            try:
                kind.read(path)
            except Exception as error:
                error.add_note(f"{name}, seed {seed}")
                raise
        for file, data in good.items():
            file.write_bytes(data)
