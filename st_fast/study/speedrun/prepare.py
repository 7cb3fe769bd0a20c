"""A task's training data, made once on each machine; and a task's own files, made once for all.

The data folder holds latents of the training images alone: what scores needs, and nothing of the test images, lies in
the task.
"""

import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from st_fast.core.errors import Say, UserError
from st_fast.core.files import write_atomic, write_folder
from st_fast.core.lock import Locked, turn
from st_fast.core.progress import bar
from st_fast.core.writing import save_pretrained
from st_fast.data.images import load_image
from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.data.shards import open_data
from st_fast.data.sources import open_source
from st_fast.evaluate.classifier import RealImages, train
from st_fast.evaluate.metrics import GaussianStats, frechet
from st_fast.model.vae import decode, encode_moments, latent_shape, load_vae, vae_hash
from st_fast.prepare.digits import load_images
from st_fast.prepare.encode import own_latents
from st_fast.prepare.vaes import VAE_FOLDER, kind_of
from st_fast.prepare.writing import SHARD_SIZE, write_shards
from st_fast.recipe.document import parse_toml, read_text
from st_fast.recipe.load import to_literal
from st_fast.study.speedrun.score import load_task_classifier
from st_fast.study.speedrun.task import CLASSIFIER, FILE, LEAST, REFERENCE, WEIGHTS, Task, read_task, task_from

DIGITS = "digits"
"""The source that needs no images from a person: scikit-learn's."""
POLL = 0.5
"""Seconds between two looks whether another process has made the data."""
BATCH = 256
MADE = "# made by `python -m st_fast speedrun make`\n"
"""In task.toml: the line that divides what a person wrote from what was made of it."""
PIXELS = "pixels"
"""What encodes where the task has no VAE of its own."""

Images = NDArray[np.uint8]


def task_data(task: Task, folder: Path, source: Path | None, say: Say) -> str:
    """Makes the task's latents in `folder` unless they are there; returns the digest of what is there.

    source: the images, of a task that brings none. UserError for other images or labels than the task's, for a place
    that holds other data, and where images are needed and not given.
    """
    folder = folder.absolute()
    while not folder.exists():
        try:
            with turn(folder, say):
                if not folder.exists():
                    _write_data(task, folder, source, say)
        except Locked:  # another process makes them
            time.sleep(POLL)
    records = open_data(folder, verify=True)
    try:
        if records.manifest.source != _said(task):
            raise UserError(
                f"{folder}: holds other data than those of the task {task.name}; --data names another place"
            )
        return records.digest
    finally:
        records.close()


def _said(task: Task) -> str:
    """What the manifest says of where the latents are from: the same for the same task, wherever its images lay."""
    return f"speedrun {task.name}, images {task.images_sha256[:16]}, VAE {task.files.get(WEIGHTS, PIXELS)[:16]}"


def _write_data(task: Task, folder: Path, source: Path | None, say: Say) -> None:
    say(f"{task.name}: encoding its training images into {folder} (once)")
    images, labels = read_images(task.images, task.side, "train", source)
    if (found := images_digest(images, labels)) != task.images_sha256:
        raise UserError(
            f"{source or task.images}: the training images and their labels have SHA-256 {found[:12]}…, those of the "
            f"task {task.name} {task.images_sha256[:12]}…: other images, or another version of what decodes them"
        )
    own = WEIGHTS in task.files
    for name in task.files:  # of the VAE its settings, too
        task.path(name)
    vae = load_vae(task.path(WEIGHTS).parent if own else PIXELS)
    how, (channels, *grid) = own_latents(vae), latent_shape(vae, task.side)
    info = VaeInfo(f"speedrun-{task.name}" if own else PIXELS, vae_hash(vae), VAE_FOLDER * own, *kind_of(vae))
    manifest = Manifest(
        0, (channels * (1 + (how.posterior == "sample")), grid[0], grid[1]), "float16", how.normalisation.scale, info,
        _said(task), int(labels.max()) + 1, shift=how.normalisation.shift, posterior=how.posterior,
    )  # fmt: skip
    with write_folder(folder) as writing:
        if own:
            save_pretrained(vae, writing / VAE_FOLDER)
        parts = [
            encode_moments(vae, torch.from_numpy(images[first : first + BATCH]), how.posterior)
            for first in bar(range(0, len(images), BATCH), "encoding", -(-len(images) // BATCH), "batch")
        ]
        moments, numbers = torch.cat(parts), torch.from_numpy(labels)
        write_shards(writing, zip(moments.split(SHARD_SIZE), numbers.split(SHARD_SIZE), strict=True), manifest)


def read_images(kind: str, side: int, subset: str, source: Path | None) -> tuple[Images, NDArray[np.int64]]:
    """uint8 (n, 1 or 3, side, side) and labels (n,) of "train" or "test"; UserError where images have to be given."""
    if kind == DIGITS:
        found = load_images()
        return found[subset][:, None], found[f"{subset}_labels"]
    if source is None:
        raise UserError(f"the task's images are those of {kind}: --images FOLDER, with its training split, is needed")
    opened = open_source(source, subset)
    numbers = bar(range(len(opened.names)), f"reading {subset}", len(opened.names), "image")
    return np.stack([load_image(opened.read(number), side, 3, True) for number in numbers]), opened.labels


def images_digest(images: Images, labels: NDArray[np.int64]) -> str:
    """SHA-256 over the shape, the pixels and the labels, in their order."""
    digest = sha256(str(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(labels, np.int64).data)
    return digest.hexdigest()


def make_task(folder: Path, vae_folder: Path | None, source: Path | None, say: Say) -> Task:
    """Makes the files of the task whose task.toml is in `folder`, and writes their hashes into it.

    The VAE is copied, or there is none and pixels are the latents; a classifier is trained on the training images; what
    remains of the held-out images are the statistics of its features. Weights are rounded to float16, so that the files
    are small. Whatever task.toml has below MADE is written anew.
    """
    if not (folder / FILE).is_file():
        raise UserError(f"{folder}: no {FILE}; it says what the task is (docs/speedrun.md)")
    said = read_text(folder / FILE).partition(MADE)[0]
    known = dict.fromkeys((CLASSIFIER, REFERENCE), "")
    unmade = {"images_sha256": "", "accuracy": 0.0, "floor": 0.0, "files": known}
    task = task_from(parse_toml(said, str(folder / FILE)) | unmade, str(folder / FILE))
    images, labels = read_images(task.images, task.side, "train", source)
    held_out, held_labels = read_images(task.images, task.side, "test", source)
    if len(held_out) < LEAST["samples"]:
        raise UserError(f"{source}: {len(held_out)} held-out images; statistics of 64 features need {LEAST['samples']}")
    tensors = [torch.from_numpy(array) for array in (images, labels, held_out, held_labels)]
    real = RealImages(tensors[0], tensors[1], tensors[2], tensors[3], "")
    vae = load_vae(PIXELS if vae_folder is None else vae_folder)
    files = [CLASSIFIER, REFERENCE]
    if vae_folder is not None:
        for weight in vae.parameters():
            weight.data = weight.half().float()
        save_pretrained(vae, folder / VAE_FOLDER)
        save_file({name: tensor.half() for name, tensor in vae.state_dict().items()}, folder / WEIGHTS)
        files += [f"{VAE_FOLDER}/config.json", WEIGHTS]
    weights = train(real, say).state_dict()
    save_file({name: t.half() if t.is_floating_point() else t for name, t in weights.items()}, folder / CLASSIFIER)
    classifier = load_task_classifier(folder / CLASSIFIER, task.side, 0.0)
    statistics = GaussianStats.of(classifier.features(held_out))
    held = {"mean": statistics.mean, "covariance": statistics.covariance}
    save_file({name: torch.from_numpy(array) for name, array in held.items()}, folder / REFERENCE)
    chosen = real.train[torch.linspace(0, len(images) - 1, task.samples).long()]
    how = own_latents(vae)
    decoded = [
        decode(vae, encode_moments(vae, part, "mean") * how.normalisation.scale, how.normalisation)
        for part in chosen.split(BATCH)
    ]
    made = {
        "images_sha256": images_digest(images, labels),
        "accuracy": float((classifier.predict(held_out) == held_labels).mean()),
        "floor": frechet(GaussianStats.of(classifier.features(torch.cat(decoded))), statistics),
    }
    lines = [f"{key} = {to_literal(value)}" for key, value in made.items()]
    hashes = [f'"{name}" = "{sha256((folder / name).read_bytes()).hexdigest()}"' for name in files]
    write_atomic(folder / FILE, "\n".join([f"{said}{MADE.rstrip()}", *lines, "", "[files]", *hashes, ""]).encode())
    return read_task(str(folder))
