"""The digits set: scikit-learn's 1,797 real handwritten digits with a small true VAE, made once in about a minute.

`prepare_digits` leaves a folder with latents of the training split as shards, the VAE (`vae/`, diffusers' layout),
the images themselves (`images.safetensors`, for the classifier) and a picture of reconstructions.

`prepare_features` adds a small image encoder and its features, so that REPA runs without any download: a DINOv2 of
0.2 M parameters, trained in some seconds to classify the training digits from the mean of its patch tokens. Unlike a
published DINOv2 it has seen labels, but neither the held-out digits nor the classifier, which is another network. Its
training is not counted as cost, as a published encoder's never is.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save as to_safetensors

from st_fast.core.errors import Say, UserError
from st_fast.core.files import write_atomic, write_folder
from st_fast.core.latents import Normalisation
from st_fast.core.writing import save_pretrained
from st_fast.data.features import features_folder
from st_fast.data.manifest import FILE_NAME, Manifest, VaeInfo
from st_fast.data.shards import open_data
from st_fast.evaluate.classifier import read_images
from st_fast.model.autoencoders import VAE
from st_fast.model.encoders import load_encoder
from st_fast.model.vae import decode, encode_moments, vae_hash
from st_fast.prepare.features import KeptImages, write_features
from st_fast.prepare.first_use import must_be_made, save_reconstructions
from st_fast.prepare.small_encoder import SmallEncoder, train_encoder
from st_fast.prepare.small_vae import SmallVae, latent_scale, train_vae
from st_fast.prepare.writing import write_shards
from st_fast.recipe.schema import Recipe

SIZE = 32
TEST = 360
VAE_CONFIG = SmallVae(widths=(8, 16, 32), steps=400)
"""f = 4, so 32×32 images have 4×8×8 latents; 0.16 M parameters."""
ENCODER = "digits-encoder"
"""The encoder's name in recipes; it lies in the digits' folder under this name."""
ENCODER_CONFIG = SmallEncoder(
    patch=7, width=64, epochs=20, batch_size=64, peak_lr=1e-3, weight_decay=0.01, one_cycle=False
)
"""It sees 4 × 4 patches, as many as the digits recipe's model has tokens."""


def load_images() -> dict[str, np.ndarray]:
    """The digits at 32×32: uint8 "train" (1437, 32, 32) and "test" (360, 32, 32), int64 "…_labels".

    The split is stratified and fixed.
    """
    from sklearn.datasets import load_digits  # here, since it takes a second and most runs need no digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    small = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    resized = [Image.fromarray(one).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for one in small]
    images = np.stack([np.asarray(one) for one in resized])
    train, test, train_labels, test_labels = train_test_split(
        images, labels.astype(np.int64), test_size=TEST, stratify=labels, random_state=0
    )
    return {"train": train, "train_labels": train_labels, "test": test, "test_labels": test_labels}


def prepare_digits(folder: Path, say: Say) -> None:
    """Makes the digits folder unless a complete one is there; a damaged or half-made one is built anew.

    Written aside and renamed, so no reader ever sees half of it. UserError for a place that holds anything else.
    """
    folder = folder.resolve()  # what a link leads to is replaced, never the link
    if not must_be_made(folder, "digits", lambda: _complete(folder)):
        return
    say(f"digits: training a small VAE and encoding 1,437 digits into {folder} (once, about a minute)")
    images = load_images()
    vae = train_vae(torch.from_numpy(images["train"])[:, None], VAE_CONFIG)
    with write_folder(folder, replace=True) as writing:
        error = _write(writing, images, vae)
    say(f"digits: done; reconstruction error on held-out digits {error:.1f} of 255 (root mean square)")


def _write(folder: Path, images: dict[str, np.ndarray], vae: VAE) -> float:
    """Fills the folder; returns the reconstruction error on the test split."""
    train, test = (torch.from_numpy(images[name])[:, None] for name in ("train", "test"))
    moments = encode_moments(vae, train)
    scale = latent_scale(moments)
    vae.register_to_config(scaling_factor=scale)
    save_pretrained(vae, folder / "vae")
    write_atomic(folder / "images.safetensors", to_safetensors(images))
    again = decode(vae, encode_moments(vae, test, "mean") * scale, Normalisation(scale))
    manifest = Manifest(
        count=0,
        shape=(8, SIZE // 4, SIZE // 4),
        dtype="float16",
        scale=scale,
        vae=VaeInfo("digits", vae_hash(vae), "vae"),
        source="scikit-learn load_digits, training split, 32×32",
        num_classes=10,
        class_names=tuple("0123456789"),
    )
    write_shards(folder, [(moments, torch.from_numpy(images["train_labels"]))], manifest)
    return save_reconstructions(folder, test, again)


def _complete(folder: Path) -> bool:
    """Whether the folder holds everything and every byte of the latents is as written."""
    if not all((folder / name).is_file() for name in ("images.safetensors", "vae/config.json")):
        return False
    try:
        records = open_data(folder, verify=True)
    except UserError:
        return False
    records.close()
    return records.manifest.vae.name == "digits"


def prepare_features(recipe: Recipe, say: Say) -> None:
    """Trains the encoder and writes its features, if a stage names it and they are not there.

    A stage that runs it live gets no features written.
    """
    folder = Path(recipe.data.path)
    asking = [stage.method for stage in recipe.stages if ENCODER in stage.method.encoder_names]
    if not asking:
        return
    if not (folder / ENCODER).is_dir():
        say("digits: training a small image encoder (once, some seconds)")
        real = read_images(folder)
        with write_folder(folder / ENCODER) as writing:
            save_pretrained(train_encoder(real.train, real.train_labels, ENCODER_CONFIG).encoder, writing)
    written = (features_folder(folder, ENCODER) / FILE_NAME).is_file()
    if written or all(method.encodes_images for method in asking):
        return
    say("digits: writing the encoder's features (once, some seconds)")
    encoder = load_encoder(str(folder / ENCODER), torch.device("cpu"), torch.float32)
    records = open_data(folder, verify=False)
    write_features(folder, records, encoder, KeptImages(folder, records), batch=256)
    records.close()
