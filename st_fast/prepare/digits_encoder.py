"""A small image encoder for the digits, so that REPA runs on them without any download: a DINOv2 of 0.2 M parameters.

It is trained in some seconds to tell the training digits' classes from the mean of its patch tokens: unlike a true
DINOv2 it has seen labels, but no held-out digits, and it is another network than the classifier of `st_fast.evaluate`.
Its own training is not counted as cost, as nobody counts a published encoder's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_fast.core.files import FolderWrite
from st_fast.data.features import features_folder
from st_fast.data.manifest import FILE_NAME
from st_fast.data.shards import open_shards
from st_fast.evaluate.classifier import RealImages, read_images
from st_fast.model.encoders import input_side, load_encoder, preprocess, quiet_transformers
from st_fast.prepare.digits import SIZE
from st_fast.prepare.feature_job import write_features
from st_fast.recipe.schema import Recipe

NAME = "digits-encoder"
"""What a recipe names it; it lies in the digits' folder under this name."""
EPOCHS, BATCH, SEED, PATCH = 20, 64, 0, 7

Say = Callable[[str], None]


def prepare_features(recipe: Recipe, say: Say) -> None:
    """Trains the encoder and writes its features, if a stage names it and they are not there.

    A stage that runs it live gets no features written.
    """
    folder = Path(recipe.data.path)
    asking = [stage.method for stage in recipe.stages if NAME in stage.method.encoder_names]
    if not asking:
        return
    real = read_images(folder)
    if not (folder / NAME).is_dir():
        say("digits: training a small image encoder (once, some seconds)")
        with FolderWrite(folder / NAME) as write:
            train_encoder(real).save_pretrained(write.path, safe_serialization=True)
    written = (features_folder(folder, NAME) / FILE_NAME).is_file()
    if written or all(method.encodes_images for method in asking):
        return
    say("digits: writing the encoder's features (once, some seconds)")
    encoder = load_encoder(str(folder / NAME), torch.device("cpu"), torch.float32)
    records = open_shards(folder, verify=False)
    write_features(folder, records, encoder, lambda numbers: real.train[torch.from_numpy(numbers)], SIZE, batch=256)
    records.close()


def new_encoder(seed: int = SEED) -> Any:
    """An untrained one: 4 × 4 patches of 7 pixels, as many as the digits recipe's model has tokens."""
    transformers = quiet_transformers(NAME)
    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=4, image_size=input_side(SIZE, PATCH),
        patch_size=PATCH, layerscale_value=1.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.Dinov2Model(config)


def train_encoder(real: RealImages) -> Any:
    """Trains one to name the digits; the same images and thread count give the same weights."""
    encoder = new_encoder()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        head = nn.Linear(encoder.config.hidden_size, real.num_classes)
    generator = torch.Generator().manual_seed(SEED)
    pixels = preprocess(real.train, input_side(SIZE, PATCH))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.01)
    encoder.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(pixels), generator=generator).split(BATCH):
            tokens: Tensor = encoder(pixel_values=pixels[rows]).last_hidden_state[:, 1:]
            loss = F.cross_entropy(head(tokens.mean(1)), real.train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return encoder.eval()
