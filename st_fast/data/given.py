"""Latents that a program gives: tensors, or any map-style Dataset of (latent, label). Nothing of them is on a disk.

Their order is the trainer's, a pure function of the seed and their number, so that a run resumes as one on shards does,
if each item is the same whenever it is read.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from st_fast.core.errors import UserError, first_line
from st_fast.data.ahead import Answer, RecordSet, nothing
from st_fast.data.manifest import GIVEN, Manifest, ShardEntry, VaeInfo, labels_problem, moments_problem

LOOKED_AT = 64
"""Items, evenly spaced, whose content tells one Dataset from another."""


def given_records(data: Any, num_classes: int, workers: int = 0) -> RecordSet:
    """What training reads of `data`: (latents (N, C, H, W), labels (N,)), or a Dataset whose items are such pairs.

    Labels may be left out where there is one class. num_classes: how many the model has. workers: processes that read
    a Dataset ahead. UserError, in one line, for anything else, with the item where it is one's.
    """
    if isinstance(data, Tensor):
        data = (data, torch.zeros(len(data), dtype=torch.int64))
    if isinstance(data, tuple | list) and len(data) == 2 and getattr(data[0], "ndim", 0) == 4:
        return GivenTensors(torch.as_tensor(data[0]), torch.as_tensor(data[1]), num_classes)
    if isinstance(data, DataLoader):
        raise UserError("data = DataLoader: the order is the trainer's: give loader.dataset, and workers=")
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or isinstance(data, str | bytes):
        raise UserError(
            f"data = {type(data).__name__}: (latents (N, C, H, W), labels (N,)) or a map-style Dataset, which has "
            "__getitem__ and __len__, is needed; the order of training must be known beforehand"
        )
    return GivenDataset(data, num_classes, workers)


def _manifest(count: int, shape: tuple[int, ...], num_classes: int, digest: str) -> Manifest:
    where = ShardEntry("memory", count, 0, digest)
    return Manifest(
        count, cast(tuple[int, int, int], shape), "float32", 1.0, VaeInfo(GIVEN), GIVEN, num_classes, shards=(where,),
        posterior="mean",
    )  # fmt: skip


class GivenTensors(RecordSet):
    """Latents and labels in memory, with a digest of all of them."""

    def __init__(self, latents: Tensor, labels: Tensor, num_classes: int) -> None:
        self._latents = latents.detach().to("cpu", torch.float32).contiguous().numpy()
        if labels.shape != (len(latents),) or labels.is_floating_point() or labels.is_complex():
            raise UserError(
                f"data: labels {tuple(labels.shape)} of {labels.dtype}; {len(latents)} whole numbers are needed"
            )
        self.labels = labels.detach().to("cpu", torch.int64).numpy()
        if not len(latents):
            raise UserError("data: there are no latents")
        for problem in (labels_problem(self.labels, num_classes), moments_problem(self._latents, "mean")):
            if problem is not None:
                raise UserError(f"data: item {problem[0]}: {problem[1]}")
        digest = hashlib.sha256(self._latents.data)
        digest.update(self.labels.data)
        self.manifest = _manifest(len(latents), self._latents.shape[1:], num_classes, digest.hexdigest())

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Copies latents `indices` (n,) into out (n, C, H, W)."""
        np.take(self._latents, indices, axis=0, out=out)

    def verify(self, beat: Callable[[], None] = nothing) -> None:
        """All was looked at when the set was made."""

    def close(self) -> None:
        """Nothing is open."""


class GivenDataset(RecordSet):
    """A map-style Dataset, read item by item when training wants them; its length may not change."""

    labels = np.empty(0, np.int64)
    """None are known before their items are read."""

    def __init__(self, dataset: Any, num_classes: int, workers: int) -> None:
        self._dataset, self._classes, self._workers, count = dataset, num_classes, workers, len(dataset)
        self._name = type(dataset).__name__
        if count < 1:
            raise UserError(f"data: {self._name} has no items")
        shown = sorted({int(n) for n in np.linspace(0, count - 1, min(count, LOOKED_AT))})
        first, _ = self._item(shown[0])
        self.manifest = _manifest(count, tuple(first.shape), num_classes, "")
        digest = hashlib.sha256()
        for number in shown:
            latent, label = self._item(number)
            digest.update(latent.contiguous().numpy().data)
            digest.update(str(label).encode())
        self.manifest = _manifest(count, tuple(first.shape), num_classes, digest.hexdigest())

    def _item(self, number: int) -> tuple[Tensor, int]:
        """One item, checked; UserError says which one it is and what is wrong."""
        where = f"data: item {number} of {self._name}"
        try:
            found = self._dataset[number]
        except Exception as error:
            raise UserError(f"{where}: {type(error).__name__}: {first_line(error)}") from error
        pair = found if isinstance(found, tuple | list) and len(found) == 2 else (found, 0)
        latent = torch.as_tensor(pair[0]) if isinstance(pair[0], Tensor | np.ndarray) else None
        if latent is None or latent.ndim != 3 or not latent.is_floating_point():
            what = type(found).__name__ if latent is None else f"{latent.dtype} {tuple(latent.shape)}"
            raise UserError(f"{where} is {what}; (latent (C, H, W) of floats, label) is needed")
        shape = getattr(self, "manifest", None) and self.manifest.shape
        if shape and tuple(latent.shape) != shape:
            raise UserError(f"{where} is {tuple(latent.shape)}, others are {shape}")
        try:
            label = int(pair[1])
        except (TypeError, ValueError):
            raise UserError(f"{where}: its label is {type(pair[1]).__name__}; a whole number is needed") from None
        if not 0 <= label < self._classes:
            raise UserError(f"{where}: label {label}, allowed are 0 … {self._classes - 1}")
        return latent.detach().to("cpu", torch.float32), label

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self._item(number)

    def _check_length(self) -> None:
        if (now := len(self._dataset)) != self.manifest.count:
            raise UserError(
                f"data: {self._name} has {now} items now and had {self.manifest.count} when the run was started; the "
                "order of training depends on their number"
            )

    def stream(self, requests: Iterable[np.ndarray]) -> Iterator[Answer]:
        """One answer for each request (n,) of item numbers, in order, by PyTorch's DataLoader."""

        def asked() -> Iterator[list[int]]:
            for request in requests:
                self._check_length()
                yield request.tolist()

        loader = DataLoader(cast(Any, self), batch_sampler=cast(Any, asked()), num_workers=self._workers)
        yield from ((latents, labels) for latents, labels in loader)

    def gather(self, indices: np.ndarray, pinned: bool = False) -> Answer:
        """Items `indices` (n,) → latents (n, C, H, W) float32, labels (n,) int64."""
        self._check_length()
        latents, labels = zip(*(self._item(int(number)) for number in indices), strict=True)
        return torch.stack(latents), torch.tensor(labels)

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Reads items `indices` (n,) into out (n, C, H, W)."""
        out[...] = self.gather(indices)[0].numpy()

    def verify(self, beat: Callable[[], None] = nothing) -> None:
        """Each item is checked when it is read."""

    def close(self) -> None:
        """The Dataset is its owner's."""
