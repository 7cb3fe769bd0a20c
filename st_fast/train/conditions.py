"""What samples are drawn under: class labels, which come with the latents, or captions, whose states are read beside.

The trainer knows a condition as a tensor (B, …) with a null (…) that stands for none. A third kind is one more class
here, and a network that embeds it.
"""

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from st_fast.core import random
from st_fast.core.errors import Say, UserError
from st_fast.core.random import Purpose
from st_fast.core.ranks import Ranks
from st_fast.data.ahead import RecordSet
from st_fast.data.loader import kept_bytes, make_loader
from st_fast.data.text import TextSet, open_text
from st_fast.recipe import cost
from st_fast.recipe.schema import Recipe

Visit = tuple[np.ndarray, np.ndarray]
"""Ordinals of the training stream (n,) and the records that are seen there (n,)."""


class Conditions(Protocol):
    """Gives each visit's condition."""

    null: Tensor
    """(…): what stands for no condition; on the host."""
    digest: str
    """Changes with what is read beside the latents; "" where nothing is."""

    def open(self, device: torch.device, say: Say) -> None:
        """Begins to read, for `stream`."""
        ...

    def kept(self, device: torch.device) -> tuple[int, int]:
        """Bytes that stay on the device once it is open, at least and at most."""
        ...

    def stream(self, visits: Iterable[Visit]) -> Iterator[Tensor] | None:
        """A condition (n, …) for each visit, in order; None where the records' labels are it."""
        ...

    def close(self) -> None:
        """Ends reading."""
        ...


class ClassLabels:
    """The labels of the latents; one more stands for none."""

    digest = ""

    def __init__(self, num_classes: int) -> None:
        self.null = torch.tensor(num_classes)

    def open(self, device: torch.device, say: Say) -> None:
        """Nothing is read beside the latents."""

    def kept(self, device: torch.device) -> tuple[int, int]:
        """Nothing."""
        return 0, 0

    def stream(self, visits: Iterable[Visit]) -> Iterator[Tensor] | None:
        """The labels come with the latents."""
        return None

    def close(self) -> None:
        """Nothing was opened."""


class Captions:
    """The states of a record's captions, of which each visit draws one; the empty caption's stand for none."""

    def __init__(self, texts: TextSet, seed: int, loader: str) -> None:
        self._texts, self._seed, self._name = texts, seed, loader
        self.null, self.digest = texts.null(), texts.digest

    def open(self, device: torch.device, say: Say) -> None:
        """Reads as latents are read."""
        self._loader = make_loader(
            self._name, self._texts, device, lambda line: say(line.replace("data:", "captions:", 1))
        )

    def kept(self, device: torch.device) -> tuple[int, int]:
        """The states of all captions, or none."""
        return kept_bytes(self._name, self._texts, device)

    def rows(self, visit: Visit) -> np.ndarray:
        """(n,) the rows of the text set that a visit sees: the same for the same seed and ordinals."""
        ordinals, records = visit
        share = random.uniform(self._seed, Purpose.CAPTION, torch.from_numpy(ordinals))[:, 0]
        return self._texts.rows_of(records, share.double().numpy())

    def stream(self, visits: Iterable[Visit]) -> Generator[Tensor, None, None]:
        """(n, L, W) for each visit."""
        for states, _ in self._loader.stream(map(self.rows, visits)):
            yield states[:, 0]

    def close(self) -> None:
        """Ends the loader and closes the files."""
        if hasattr(self, "_loader"):
            self._loader.close()
        self._texts.close()


def open_conditions(recipe: Recipe, records: RecordSet) -> Conditions:
    """What the recipe's network is conditional on; UserError where the data lack it or its shape is another."""
    model, data = recipe.model, Path(recipe.data.path)
    if model.by_class:
        return ClassLabels(model.num_classes)
    texts = open_text(data, recipe.data.text, records)
    found = texts.manifest
    if (found.length, found.width) != (model.text_length, model.text_width):
        raise UserError(
            f"{texts.folder}: states of {found.length} tokens of {found.width} channels, the model has "
            f"model.text_length = {model.text_length} and model.text_width = {model.text_width}"
        )
    return Captions(texts, recipe.run.seed, recipe.data.loader)


def kept_on_device(recipe: Recipe, records: RecordSet, ranks: Ranks) -> tuple[int, int]:
    """Bytes beside the model that stay on the device, at least and at most.

    These are the latents and their conditions, and on a CPU also the copy that checkpoints are written from.
    """
    device, conditions = ranks.device, open_conditions(recipe, records)
    both = kept_bytes(recipe.data.loader, records, device), conditions.kept(device)
    conditions.close()
    least, most = map(sum, zip(*both, strict=True))
    copy = cost.saved_bytes(recipe, ranks.count) if device.type == "cpu" else 0
    return least + copy, most + copy


def check_same_conditions(saved: str, where: str, conditions: Conditions) -> None:
    """UserError if a run was started on other captions or states than these."""
    if saved != conditions.digest:
        raise UserError(
            f"the captions or their states changed since {where} was written (digest {saved[:12] or 'none'} then, "
            f"{conditions.digest[:12] or 'none'} now); restore them, or start a new run"
        )
