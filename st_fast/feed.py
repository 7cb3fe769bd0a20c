"""Brings a stage's batches to the device: which records, at which times, with which labels, for which rank.

Everything but the noise is decided here on the host, as a pure function of (seed, step): also which samples are
supervised, so that the device is never asked. The noise is drawn on the device from the ordinals.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from st_fast import flow, streams
from st_fast.data.loader import Loader
from st_fast.parallel import Ranks
from st_fast.ranges import named
from st_fast.recipe.schema import Recipe, Stage
from st_fast.streams import Purpose
from st_fast.supervision.protocol import Rows, select_rows


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, on the device."""

    moments: Tensor
    """(B, 2C, S, S): concat(mean, std) as stored."""
    labels: Tensor
    student_labels: Tensor
    """(B,) int64, with class dropout applied."""
    ordinals: Tensor
    """(B,) int64: places in the training stream, the counters of the noise."""
    t: Tensor
    """(B,) float32."""
    rows: Rows
    features: tuple[Tensor, ...] = ()
    """(B, h, w, D_j) of each image encoder that supervises at this step, in the stored dtype."""


class Feed:
    """The batches of a stage for one rank, in order. `waited` is the time in seconds that training waited for data."""

    def __init__(
        self, recipe: Recipe, stage: Stage, loader: Loader, records: int, ranks: Ranks, features: Sequence[Loader] = ()
    ) -> None:
        self.recipe, self.stage, self.loader, self.ranks, self.features = recipe, stage, loader, ranks, features
        self.order = streams.RecordOrder(recipe.run.seed, records)
        self.waited = 0.0

    def micro_batches(self) -> list[slice]:
        """This rank's parts of the global batch, one for each accumulation step."""
        optim = self.recipe.optim
        size = optim.batch_size // (self.ranks.count * optim.accumulation)
        start = self.ranks.rank * size * optim.accumulation
        return [slice(start + i * size, start + (i + 1) * size) for i in range(optim.accumulation)]

    def samples(self, step: int, ranks: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ordinals and record indices that these ranks (none: all of them) see at a step, counted from 0."""
        size = self.recipe.optim.batch_size
        share = size // self.ranks.count
        ordinals = np.concatenate([np.arange(share) + rank * share for rank in ranks or range(self.ranks.count)])
        ordinals += step * size
        return ordinals.tolist(), self.order(ordinals).tolist()

    def _requests(self, first: int, last: int) -> Iterator[np.ndarray]:
        size = self.recipe.optim.batch_size
        for step in range(first, last):
            records = self.order(np.arange(step * size, (step + 1) * size))
            for part in self.micro_batches():
                yield records[part]

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """The micro-batches of steps first … last − 1."""
        answers = self.loader.stream(self._requests(first, last))
        stop = self.stage.method.stop_step or last  # from there on no features are read
        features = [loader.stream(self._requests(first, min(stop, last))) for loader in self.features]
        for step in range(first, last):
            self.ranks.place.step = step + 1
            with named("data"):
                t, asked = self._times(step), features if step < stop else []
                batches = [
                    self._batch(step, part, t, *self._wait(answers), tuple(self._wait(stream)[0] for stream in asked))
                    for part in self.micro_batches()
                ]
            yield batches

    def _wait(self, answers: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        self.ranks.place.mark("data")
        start = time.perf_counter()
        answer = next(answers)
        self.waited += time.perf_counter() - start
        return answer

    def _times(self, step: int) -> Tensor:
        recipe, size = self.recipe, self.recipe.optim.batch_size
        return flow.sample_times(recipe.run.seed, step, np.arange(size), size, recipe.flow.time, recipe.flow.path)

    def _batch(
        self, step: int, part: slice, t: Tensor, moments: Tensor, labels: Tensor, features: tuple[Tensor, ...]
    ) -> Batch:
        recipe, device = self.recipe, self.ranks.device
        ordinals = torch.arange(part.start, part.stop) + step * recipe.optim.batch_size
        dropped = streams.uniform(recipe.run.seed, Purpose.CLASS_DROPOUT, ordinals)[:, 0] < recipe.model.class_dropout
        index, weight = select_rows(t, part, self.stage.method.selection)
        factor = self.stage.method.factor(step)
        weight = weight if factor == 1.0 else weight * factor

        def send(tensor: Tensor) -> Tensor:
            return tensor if tensor.device == device else tensor.pin_memory().to(device, non_blocking=True)

        labels = send(labels)
        student_labels = torch.where(send(dropped), recipe.model.num_classes, labels)
        rows = Rows(send(index), send(weight))
        sent = tuple(send(one) for one in features)
        return Batch(send(moments), labels, student_labels, send(ordinals), send(t[part]), rows, sent)
