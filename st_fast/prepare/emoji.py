"""The emoji set: OpenMoji's pictures, a small true VAE, captions and their text states, made once in some minutes.

`prepare_emoji` leaves a data folder with latents of the training pictures as shards, the VAE (`vae/`), captions.jsonl,
the states of all captions by a real sentence encoder, the pictures themselves (`images.safetensors`: "train" and, held
out, "test"), what each shows of a person (`attributes.json`) and a picture of reconstructions. `held_out/` is a data
folder of its own with the pictures whose combinations of skin tone, gender and role the training never sees.
"""

from contextlib import closing
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save as to_safetensors
from torch import Tensor

from st_fast.core.errors import Say, UserError
from st_fast.core.files import make_folder, write_atomic, write_folder, write_json_atomic
from st_fast.core.latents import Normalisation
from st_fast.core.writing import save_pretrained
from st_fast.data.manifest import Manifest, VaeInfo, read_manifest
from st_fast.data.shards import open_data
from st_fast.data.text import open_text
from st_fast.evaluate.attributes import FILE as ATTRIBUTES_FILE
from st_fast.evaluate.attributes import HELD_OUT
from st_fast.model.autoencoders import VAE
from st_fast.model.text_encoders import PACKAGED, TextEncoder, load_text_encoder
from st_fast.model.vae import decode, encode_moments, vae_hash
from st_fast.prepare.first_use import must_be_made, save_reconstructions
from st_fast.prepare.openmoji import Emoji, load_emoji
from st_fast.prepare.small_vae import SmallVae, latent_scale, train_vae
from st_fast.prepare.text import write_captions, write_text
from st_fast.prepare.writing import write_shards
from st_fast.recipe.architecture import Model
from st_fast.recipe.error import show

NAME = "emoji"
VAE_CONFIG = SmallVae(widths=(16, 32, 64), steps=2000, peak_lr=3e-3, kl_weight=3e-4)
"""f = 4, so 32×32 pictures have 4×8×8 latents; 0.65 M parameters."""
DOWN = 2 ** (len(VAE_CONFIG.widths) - 1)
SIZES = (32, 64)
TOKENS = 16
"""Of a caption; the longest has 15."""
SOURCE = "OpenMoji (openmoji.org, CC BY-SA 4.0)"


def size_of(model: Model) -> int:
    """The side of the pictures of the model's latents; UserError where emoji of that size can't be drawn well."""
    sides = model.latent_sides
    size = sides[0] * DOWN
    if size not in SIZES or sides[0] != sides[1]:
        known = " and ".join(f"{one} x {one} (latent_size {one // DOWN})" for one in SIZES)
        raise UserError(f"model.latent_size = {show(model.latent_size)}: data.source = 'emoji' has pictures of {known}")
    return size


def prepare_emoji(folder: Path, say: Say, size: int = 32) -> None:
    """Makes the emoji folder, size × size pixels, unless a complete one is there; a damaged one is built anew.

    Written aside and renamed, so no reader ever sees half of it. UserError for a place that holds anything else or the
    emoji at another size, and where a package is missing.
    """
    folder = folder.resolve()  # what a link leads to is replaced, never the link
    if not must_be_made(folder, NAME, lambda: _complete(folder, size)):
        return
    encoder = load_text_encoder(PACKAGED, torch.device("cpu"), torch.float32, TOKENS, mask=True)
    emoji = load_emoji(size)
    trained, held = int((~emoji.held_out).sum()), int(emoji.held_out.sum())
    missed = ", ".join(f"{count} {reason}" for reason, count in emoji.left_out.items())
    say(f"emoji: {trained} pictures to train on and {held} held out; left out: {missed}")
    say(f"emoji: training a small VAE and encoding pictures and captions into {folder} (once, some minutes)")
    pixels = torch.from_numpy(emoji.images)
    vae = train_vae(pixels[~emoji.held_out].contiguous(memory_format=torch.channels_last), VAE_CONFIG)
    with write_folder(folder, replace=True) as writing:
        error = _write(writing, emoji, vae, encoder, say)
    say(f"emoji: done; reconstruction error on held-out pictures {error:.1f} of 255 (root mean square)")


def _write(folder: Path, emoji: Emoji, vae: VAE, encoder: TextEncoder, say: Say) -> float:
    """Fills the folder; returns the reconstruction error on the held-out pictures."""
    held = emoji.held_out
    train, test = (torch.from_numpy(emoji.images[chosen]) for chosen in (~held, held))
    moments = encode_moments(vae, train)
    scale = latent_scale(moments)
    vae.register_to_config(scaling_factor=scale)
    images = {"train": train, "train_labels": _labels(train), "test": test, "test_labels": _labels(test)}
    write_atomic(folder / "images.safetensors", to_safetensors({name: one.numpy() for name, one in images.items()}))
    write_json_atomic(folder / ATTRIBUTES_FILE, _attributes(emoji))
    test_moments = encode_moments(vae, test)
    for place, split, encoded in ((folder, ~held, moments), (folder / HELD_OUT, held, test_moments)):
        make_folder(place)
        save_pretrained(vae, place / "vae")
        manifest = Manifest(
            count=0,
            shape=(encoded.shape[1], encoded.shape[2], encoded.shape[3]),
            dtype="float16",
            scale=scale,
            vae=VaeInfo(NAME, vae_hash(vae), "vae"),
            source=f"{SOURCE}, {'held-out' if place.name == HELD_OUT else 'training'} pictures",
            num_classes=1,
        )
        write_shards(place, [(encoded, _labels(encoded))], manifest)
        write_captions(place, [emoji.captions[i] for i in np.flatnonzero(split)])
        with closing(open_data(place, verify=False)) as records:
            write_text(place, records, encoder, say)
    return save_reconstructions(
        folder, test, decode(vae, test_moments.chunk(2, dim=1)[0] * scale, Normalisation(scale))
    )


def _labels(images: Tensor) -> Tensor:
    """(n,) int64: the one class that a set with captions has."""
    return torch.zeros(len(images), dtype=torch.int64)


def _attributes(emoji: Emoji) -> dict[str, object]:
    """The content of attributes.json: (tone, gender, role) of each picture of both splits, in their order."""
    every = [astuple(one) for one in emoji.attributes]
    return {
        "train": [every[i] for i in np.flatnonzero(~emoji.held_out)],
        HELD_OUT: [every[i] for i in np.flatnonzero(emoji.held_out)],
    }


def _complete(folder: Path, size: int) -> bool:
    """Whether every file is there and every byte of latents and text states as written; UserError at another size."""
    if not all((folder / name).is_file() for name in ("images.safetensors", ATTRIBUTES_FILE, "vae/config.json")):
        return False
    try:
        for place in (folder, folder / HELD_OUT):
            with (
                closing(open_data(place, verify=True)) as records,
                closing(open_text(place, PACKAGED, records)) as text,
            ):
                text.verify()
    except UserError:
        return False
    manifest = read_manifest(folder)
    pixels = manifest.shape[1] * DOWN
    if manifest.vae.name == NAME and pixels != size:
        raise UserError(
            f"data.path = {str(folder)!r}: holds the emoji at {pixels} x {pixels} pixels, {size} x {size} are asked "
            "for; name another folder as data.path"
        )
    return manifest.vae.name == NAME
