"""The two control teachers: an untrained network, and data with shuffled labels."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from st_fast import __version__, kernels
from st_fast.core import checkpoint, random
from st_fast.core.files import write_folder
from st_fast.data.manifest import Manifest, VaeInfo, read_manifest
from st_fast.data.shards import open_data
from st_fast.model import SiT, build
from st_fast.prepare.writing import write_shards
from st_fast.recipe import Recipe, to_toml
from st_fast.recipe.schema import Model

SHUFFLE = 1 << 40
"""Added to a run's seed for the permutation of its labels, so that it is no epoch's order."""
LABEL_STD = 0.1
"""Of a random teacher's label embeddings: the label then moves its features by some hundredths of their size, as
it does a trained teacher's, so that ω means about as much."""
RECORDS = 4_096
"""Copied at a time."""


def random_model(config: Model, seed: int) -> SiT:
    """A network no layer of which is zero, drawn from `seed`.

    As published a SiT starts with every block the identity and blind to label and time, so guidance on it would be
    zero whatever ω. Here every linear layer is drawn as the others are (Xavier), and label embeddings normal.
    """
    model = build(config, kernels.select({}, torch.device("cpu")), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.normal_(model.y_embedder.embedding_table.weight, std=LABEL_STD)
    return model


def write_random_teacher(folder: Path, recipe: Recipe) -> None:
    """A run folder whose one stage is a random network at step 0 and cost nothing: recipe, log and checkpoint."""
    stage = recipe.stages[0].name
    state = random_model(recipe.model, recipe.run.seed).state_dict()
    meta = {
        "stage": stage,
        "recipe": to_toml(recipe),
        "architecture": recipe.model.architecture(),
        "dataset": "none",
        "seconds": 0.0,
        "rollbacks": 0,
        "versions": {"st_fast": __version__, "torch": torch.__version__},
    }
    end = {"kind": "end", "stage": stage, "step": 0, "seconds": 0.0, "flops": 0.0}
    with write_folder(folder, replace=True) as writing:
        checkpoint.save(writing / stage / "checkpoints", 0, {"model": state, "ema": state}, meta)
        (writing / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
        (writing / "log.jsonl").write_text(json.dumps(end) + "\n", encoding="utf-8")


def permuted(labels: np.ndarray, seed: int) -> np.ndarray:
    """The labels (n,) under a permutation that follows from the seed: as many of each class, but no sense."""
    return labels[random.epoch_order(SHUFFLE + seed, 0, len(labels))]


def write_shuffled(source: Path, folder: Path, seed: int) -> None:
    """A copy of a data folder's latents with permuted labels, unless the one for this source is there already."""
    records = open_data(source, verify=False)
    theirs = records.manifest
    said = f"labels shuffled by seed {seed}; {records.digest}"
    if (folder / "manifest.json").is_file() and read_manifest(folder).source == said:
        records.close()
        return
    labels = torch.from_numpy(permuted(records.labels, seed))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(records), RECORDS):
            rows = np.arange(start, min(start + RECORDS, len(records)))
            yield records.gather(rows)[0], labels[start : start + len(rows)]

    ours = Manifest(0, theirs.shape, theirs.dtype, theirs.scale, VaeInfo("none"), said, theirs.num_classes)
    with write_folder(folder, replace=True) as writing:
        write_shards(writing, batches(), replace(ours, flip=theirs.flip))
    records.close()
