"""A stage's batches, in order: which records, at which times, under which condition, for which rank, and their noise.

Everything but the noise is decided on the host, as a pure function of (seed, step): also which samples are
supervised, so that the device is never asked. The noise is drawn on the device from the ordinals.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from st_fast import kernels
from st_fast.core import random
from st_fast.core.errors import UserError
from st_fast.core.machine import local_count, usable_cpus
from st_fast.core.random import Purpose
from st_fast.core.ranks import Ranks
from st_fast.data.ahead import ReadAhead, RecordSet, with_std
from st_fast.data.buckets import BucketOrder, BucketSet, one_shape
from st_fast.data.features import FeatureSet, check_grid, open_features_of
from st_fast.data.held_out import OrderOfKept, sizes_of, split
from st_fast.data.loader import Loader
from st_fast.model import flow
from st_fast.model.compiling import CompiledBlocks
from st_fast.model.encoders import ImageEncoder, VisionTransformer, load_encoder
from st_fast.model.layout import Layout
from st_fast.model.side_stream import side_stream
from st_fast.prepare.features import RecordImages, open_record_images
from st_fast.recipe.schema import Recipe, Stage
from st_fast.recipe.times import with_shift
from st_fast.train.conditions import ClassLabels, Conditions, Visit
from st_fast.train.layouts import draw_layout, draw_times
from st_fast.train.profiling import named_range
from st_fast.train.supervision import Negative, NoisyBatch, Rows, select_rows
from st_fast.train.supervision.capacity import capacity, padded

T = TypeVar("T")
Answers = Iterator[tuple[Tensor, Tensor]]
NoisyLatents = Callable[[Tensor, Tensor, Tensor, int, float, str], tuple[Tensor, Tensor, Tensor, Tensor]]
"""The op `noisy_latents`, in any of its forms."""

LIVE = "live:"
"""Prefix of the digests of live features."""


class Lookahead(Generic[T]):
    """An iterator whose next item can be seen with `peek`."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items, self._next = iter(items), list[T]()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return self._next.pop() if self._next else next(self._items)

    def peek(self) -> T | None:
        """The item that `next` will return, made now; None at the end."""
        if not self._next:
            self._next.extend(islice(self._items, 1))
        return self._next[0] if self._next else None


def sent_to(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on the device; one from the host is copied through pinned memory, without waiting."""
    if tensor.device.type == device.type and device.index in (None, tensor.device.index):
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def record_order(recipe: Recipe, records: RecordSet) -> random.RecordOrder | BucketOrder | OrderOfKept:
    """Which records training sees, by ordinals: of several shapes one a batch; none that is held out."""
    seed, held_out = recipe.run.seed, recipe.validate
    kept = split(records, held_out.share, held_out.split_seed)[0] if held_out.share else None
    sizes = sizes_of(records, kept)
    if isinstance(records, BucketSet):
        order: random.RecordOrder | BucketOrder = BucketOrder(seed, sizes, recipe.optim.batch_size)
    else:
        order = random.RecordOrder(seed, sizes[0])
    return order if kept is None else OrderOfKept(order, kept)


class BatchIterator:
    """The batches of a stage for one rank, in order. `waited`: the seconds that training has waited for data.

    `features` are loaders of what else is read of a record while supervision lasts: the features of each encoder, or
    the image if encoders run live. `draw` makes the noisy latents.
    """

    def __init__(
        self, recipe: Recipe, stage: Stage, loader: Loader, records: RecordSet, ranks: Ranks,
        features: Sequence[Loader] = (), draw: NoisyLatents = kernels.noisy_latents,
        conditions: Conditions | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.stage, self.loader, self.ranks, self.features = recipe, stage, loader, ranks, features
        self.draw, self.conditions = draw, conditions or ClassLabels(recipe.model.num_classes)
        self._null = sent_to(ranks.device, self.conditions.null)
        self.records, self.order = records, record_order(recipe, records)
        self.supervises: Callable[[int], bool] = stage.method.supervises
        """Whether supervision lasts to a step, which may end sooner than the stage's settings say."""
        self._flow = with_shift(recipe.flow, recipe.model.latent_shape)
        self.waited = 0.0
        self.pass_rows = 0
        """The supervised rows of one pass if they are padded."""
        if recipe.run.padded and stage.method.selection is not None:
            part = recipe.optim.batch_size // (ranks.count * recipe.optim.accumulation)
            self.pass_rows = capacity(stage.method.selection, self._flow, recipe.optim.batch_size, part).rows
        self._side = side_stream(recipe.run, ranks.device, wanted=recipe.run.prefetch)

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

    def _visits(self, first: int, last: int) -> Iterator[Visit]:
        size = self.recipe.optim.batch_size
        for step in range(first, last):
            ordinals = np.arange(step * size, (step + 1) * size)
            records = self.order(ordinals)
            for part in self.micro_batches():
                yield ordinals[part], records[part]

    def _requests(self, first: int, last: int) -> Iterator[np.ndarray]:
        return (records for _, records in self._visits(first, last))

    def _latents(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Whose latents are read; with a contrast each sample's and, after these, the one's it is pushed from."""
        for ordinals, records in self._visits(first, last):
            negatives = [self.order(self._others(ordinals))] if self.stage.contrastive.contrast else []
            yield np.concatenate([records, *negatives])

    def _others(self, ordinals: np.ndarray) -> np.ndarray:
        return random.others(self.recipe.run.seed, ordinals, self.recipe.optim.batch_size)

    def steps(self, first: int, last: int) -> Iterator[list[NoisyBatch]]:
        """The micro-batches of steps first … last − 1.

        With `run.prefetch` those of a step are on their way to the device before the ones before it are handed out.
        """
        recipe, size = self.recipe, self.recipe.optim.batch_size
        answers = self.loader.stream(self._latents(first, last))
        conditions = self.conditions.stream(self._visits(first, last))
        stop = self.stage.method.stop_step or last  # from there on no features are read
        features = [loader.stream(self._requests(first, min(stop, last))) for loader in self.features]

        def make(step: int) -> list[NoisyBatch]:
            self.ranks.heartbeat.step = step + 1
            t = draw_times(self.stage.method.token_groups, self._flow, recipe.run.seed, step, size)
            asked = features if self.supervises(step) else []
            return [self._batch(step, part, t, answers, conditions, asked) for part in self.micro_batches()]

        self._side.follow()  # what the loader holds on the device was put there by the current stream
        later = None
        for step in range(first, last):
            now = later or self._side.start(partial(make, step))
            later = self._side.start(partial(make, step + 1)) if recipe.run.prefetch and step + 1 < last else None
            yield now()

    def _wait(self, answers: Iterator[T]) -> T:
        self.ranks.heartbeat.beat("data")
        start = time.perf_counter()
        answer = next(answers)
        self.waited += time.perf_counter() - start
        return answer

    def _batch(
        self, step: int, part: slice, t: Tensor, answers: Answers, conditions: Iterator[Tensor] | None,
        features: Sequence[Answers],
    ) -> NoisyBatch:  # fmt: skip
        recipe, method, send = self.recipe, self.stage.method, partial(sent_to, self.ranks.device)
        pushed = self.stage.contrastive.contrast > 0
        with named_range("data"):
            (moments, labels), read = self._wait(answers), tuple(self._wait(stream)[0] for stream in features)
            count = part.stop - part.start
            condition = send(labels[:count] if conditions is None else self._wait(conditions))
            ordinals = torch.arange(part.start, part.stop) + step * recipe.optim.batch_size
            chances = random.uniform(recipe.run.seed, Purpose.CLASS_DROPOUT, ordinals)[:, 0]
            index, weight = select_rows(t, part, method.selection)
            if self.pass_rows:
                index, weight = padded(index, weight, count, self.pass_rows)
            factor = method.factor(step)
            rows = Rows(send(index), send(weight if factor == 1.0 else weight * factor), self.pass_rows)
            dropped = send(chances < recipe.model.class_dropout)
            student_condition = torch.where(dropped.view(-1, *[1] * self._null.ndim), self._null, condition)
            read = tuple(send(one) for one in read)
            written, images = ((), read[0]) if method.encodes_images and read else (read, None)
            drawn = torch.cat((ordinals, torch.from_numpy(self._others(ordinals.numpy())))) if pushed else ordinals
            moments, drawn, t = send(moments), send(drawn), send(t[part])
        with named_range("noise"):
            made = self.records.manifest
            moments, first = with_std(moments, made.posterior), t if t.ndim == 1 else t[:, 0].contiguous()
            times = first.repeat(2) if pushed else first
            latents = self.draw(moments, drawn, times, recipe.run.seed, made.scale, recipe.flow.path)
            x, x_t, velocity, noise = (values[:count] for values in latents)
            pushed_from = latents[2][count:]
            layout = self._layout(step, x, drawn[:count])
            if layout is not None and t.ndim == 2:
                each = layout.pixel_times(t, self._grid(x), recipe.model.patch)
                x_t, velocity = flow.interpolate(x, noise, each, recipe.flow.path)
                if pushed:
                    pushed_from = flow.interpolate(latents[0][count:], latents[3][count:], each, recipe.flow.path)[1]
            negative = self._negative(pushed_from, dropped) if pushed else None
        return NoisyBatch(
            x, x_t, velocity, noise, t, condition, student_condition, drawn[:count], rows, written, images, layout,
            negative,
        )  # fmt: skip

    def _grid(self, x: Tensor) -> tuple[int, int]:
        return x.shape[2] // self.recipe.model.patch, x.shape[3] // self.recipe.model.patch

    def _layout(self, step: int, x: Tensor, ordinals: Tensor) -> Layout | None:
        """How the tokens of latents x (B, C, H, W) are ordered at a step; None where all run alike."""
        stage = self.stage
        if stage.method.token_groups is None and not stage.routing.runs(step) and stage.routing.route == "none":
            return None
        grid = self._grid(x)
        plan = stage.routing.plan(self.recipe.model, stage.method.token_groups, grid, step)
        if plan is not None and min(plan.lengths) < 1:
            rows, columns = grid
            raise UserError(
                f"stage.{self.stage.name}: latents of {rows} x {columns} tokens leave a group of tokens without any; "
                f"larger latents, or larger shares, are needed"
            )
        return None if plan is None else draw_layout(plan, grid, self.recipe.run.seed, ordinals)

    def _negative(self, velocity: Tensor, dropped: Tensor) -> Negative:
        contrast = self.stage.contrastive
        taking_part = torch.ones_like(dropped) if contrast.contrast_null else ~dropped
        return Negative(velocity, contrast.contrast * taking_part.float())


@dataclass(frozen=True)
class ImageFeatures:
    """A stage's image features, read from files or computed by encoders; empty where its method learns from none."""

    written: tuple[FeatureSet, ...] = ()
    encoders: tuple[ImageEncoder, ...] = ()
    images: RecordImages | None = None
    """The input of live encoders."""
    latents: str = ""
    """Digest of the latents that the features belong to."""

    @property
    def widths(self) -> tuple[int, ...]:
        """D_j of each encoder."""
        return tuple(one.manifest.shape[-1] for one in self.written) + tuple(one.width for one in self.encoders)

    @property
    def flops_beforehand(self) -> float:
        """FLOPs of writing them, before any step."""
        return sum(one.manifest.flops for one in self.written)

    @property
    def flops_an_image(self) -> float:
        """FLOPs of the live encoders for an image."""
        return 0.0 if self.images is None else sum(one.flops(self.images.manifest.shape[-1]) for one in self.encoders)

    @property
    def digests(self) -> list[str]:
        """One per encoder; it changes with the features."""
        if self.images is None:
            return [one.manifest.digest for one in self.written]
        seen = (self.images.digest, self.images.manifest.shape, self.latents)
        return [f"{LIVE}{hashlib.sha256(repr((one.hash, seen)).encode()).hexdigest()}" for one in self.encoders]

    def check_same(self, saved: Sequence[str], where: str) -> None:
        """UserError if a run was started on other features than these.

        Changing between written and live ones, which differ at least in rounding, is allowed: it needed
        `--accept-changes`.
        """
        names = [str(one.folder) for one in self.written] or [f"encoder {one.name}" for one in self.encoders]
        for old, now, name in zip(saved, self.digests, names, strict=False):
            if old != now and old.startswith(LIVE) == now.startswith(LIVE):
                raise UserError(
                    f"{name}: the features changed since {where} was written (digest {old[-64:][:12]} then, "
                    f"{now[-64:][:12]} now); restore them, or start a new run"
                )

    def loaders(self, device: torch.device) -> list[Loader]:
        """One for each set of written features, or one for the images, with as many threads as a rank has CPUs."""
        if self.images is None:
            return [ReadAhead(one, pinned=device.type == "cuda") for one in self.written]
        threads = max(2, usable_cpus() // local_count())
        return [ReadAhead(self.images, threads, depth=threads, pinned=device.type == "cuda")]

    def close(self) -> None:
        """Closes the written features' files."""
        for one in self.written:
            one.close()


def open_image_features(
    stage: Stage, recipe: Recipe, records: RecordSet, device: torch.device, dtype: torch.dtype
) -> ImageFeatures:
    """The features of a stage; UserError where something is missing or does not fit the model or the latents."""
    method, data = stage.method, recipe.data
    if method.encoder_names:
        one_shape(records, f"stage.{stage.name}, which learns from image features,")
    if not method.encodes_images:
        return ImageFeatures(written=tuple(open_features_of(stage, recipe, records)))
    images = open_record_images(Path(data.path), records, data.images, data.images_subset)
    # A folder of that name in the data folder comes first: the digits have their encoder there.
    own = {name: Path(data.path) / name for name in method.encoder_names}
    folders = (str(path) if (path / "config.json").is_file() else name for name, path in own.items())
    encoders = tuple(load_encoder(folder, device, dtype) for folder in folders)
    for one in encoders:
        grid = one.grid(images.manifest.shape[-1])
        check_grid(one.name, grid, recipe.model.grid, method.resizes_features, stage.name)
    return ImageFeatures(encoders=encoders, images=images, latents=records.digest)


def compile_encoders(features: ImageFeatures, say: Callable[[str], None]) -> None:
    """Runs the vision transformers among the live encoders compiled from now on."""
    for one in features.encoders:
        if isinstance(one, VisionTransformer):
            one.run = CompiledBlocks(say, dynamic=False)
