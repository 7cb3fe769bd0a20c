"""Supervision methods: losses on the student's hidden states, besides the denoising loss.

A batch comes from `BatchIterator` (train/batches.py), which also draws its noise. `Step` gives it to `Targets.start`,
which calls the method's `target`, and then gives the student's hidden states to the method's `loss`.

A method names the student block or blocks that it reads (`tap`). `target` uses nothing of the student's pass, so it may
run before or beside it, or a step ahead if nothing that it needs is trained (`run.teacher_placement`). What `loss` gets
of both has the same tokens in the same order: all of them row by row, or, where a route (recipe/routing.py) leaves
tokens out of a tapped block, those that it keeps. `on_same_tokens` sees to that, so that no method knows of routes.
Losses are sums over samples already weighted by 1 / global batch size, so those of micro-batches and ranks simply add
up.
"""

import importlib
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from st_fast.core.ranks import Ranks
from st_fast.kernels import KernelTable
from st_fast.model import DiffusionTransformer
from st_fast.model.encoders import ImageEncoder
from st_fast.model.layout import Layout
from st_fast.model.side_stream import Branches, batched
from st_fast.recipe.methods import Method, Selection
from st_fast.recipe.schema import Model, Stage
from st_fast.train.optim import EmaModel


@dataclass(frozen=True)
class Rows:
    """Which samples of a micro-batch are supervised, and with what weight in the summed loss."""

    index: Tensor
    """(M,) int64: distinct rows, ascending; with `run.supervised_rows = "padded"` followed by others of weight 0."""
    weight: Tensor
    """(M,) float32."""
    pass_rows: int = 0
    """M is a multiple of this, so that networks can run on one shape; 0: M varies."""

    def take(self, values: Tensor) -> Tensor:
        """The supervised rows of (B, …): (M, …). With M = B they are the samples in order."""
        return values if len(self.index) == len(values) else values.index_select(0, self.index)

    def passes(self, values: Tensor) -> tuple[Tensor, ...]:
        """(M, …) split into passes of `pass_rows` rows, or as one pass."""
        return values.split(self.pass_rows) if self.pass_rows else (values,)


@dataclass(frozen=True)
class Negative:
    """What contrastive flow matching pushes v̂ from: of each sample the velocity of another one of the global batch."""

    velocity: Tensor
    """(B, C, S, S) α'(t)·x̃ + σ'(t)·ε̃, with that one's latents and noise and the sample's own t."""
    weight: Tensor
    """(B,) float32: λ, 0 for samples that take no part."""


@dataclass(frozen=True)
class NoisyBatch:
    """One micro-batch of one rank, on the device, as the model and the method see it."""

    x: Tensor
    """(B, C, S, S) clean latents, scaled."""
    x_t: Tensor
    """(B, C, S, S) latents on the path from data to noise."""
    velocity: Tensor
    """(B, C, S, S) dx_t/dt."""
    noise: Tensor
    """(B, C, S, S) ε of x_t."""
    t: Tensor
    """(B,) float32; with several groups of tokens each group's, (B, G)."""
    condition: Tensor
    """(B, …) what the network is conditional on: labels (B,) int64, or the states of captions (B, L, W)."""
    student_condition: Tensor
    """(B, …) the same, some samples' replaced by the null condition."""
    ordinals: Tensor
    """(B,) int64: places in the training stream, the counters of the noise and of a method's own draws."""
    rows: Rows
    features: tuple[Tensor, ...] = ()
    """(B, h, w, D_j) of each image encoder j that supervises at this step, written beforehand, in the stored dtype."""
    images: Tensor | None = None
    """uint8 (B, 1 or 3, P, P), the latents' images, where encoders run live at this step."""
    layout: Layout | None = None
    """How the student's tokens are ordered, where they have several times or a route drops some."""
    negative: Negative | None = None
    """With a contrast."""


@dataclass(frozen=True)
class Parts:
    """All that a method may be built from."""

    config: Model
    kernels: KernelTable
    teacher: DiffusionTransformer | None
    """Frozen, in eval mode, on the device; None if the method names no teacher."""
    average: EmaModel | None = None
    """The student's own weight average; None if the method does not learn from it."""
    feature_widths: tuple[int, ...] = ()
    """D_j of each image encoder that the method names."""
    path: Literal["linear", "cosine"] = "linear"
    seed: int = 0
    """The run's seed, for a method's own draws."""
    branches: Branches = batched
    """How a guided teacher runs with the labels and with the null label."""
    encoders: tuple[ImageEncoder, ...] = ()
    """The image encoders themselves, where they run live."""
    ranks: Ranks = field(default_factory=lambda: Ranks(0, 1, torch.device("cpu")))
    """This process among those that share a batch, for a loss that compares samples."""


class Supervision:
    """One supervision method for one stage. As it stands it is none: SiT as published (arXiv 2401.08740)."""

    tap: int | tuple[int, ...]
    heads: nn.Module
    """The trainable parts, dropped after training."""

    def __init__(self, settings: Method, parts: Parts) -> None:
        self.settings, self.parts, self.kernels = settings, parts, parts.kernels
        self.tap, self.heads = settings.tap, nn.Module()

    def active(self, step: int) -> bool:
        """Whether the method supervises at this step; if not, neither `target` nor `loss` is called."""
        return self.settings.selection is not None and self.settings.supervises(step)

    def denoising_target(self, prediction: Tensor, hidden: Any, batch: NoisyBatch) -> Tensor:
        """(B, C, H, W) what the denoising loss compares the prediction with, without gradient: the path's velocity.

        prediction (B, C, H, W) and hidden (as `loss` has it) are the student's, with gradient. Called at every step,
        whether or not the method is active.
        """
        return batch.velocity

    def target(self, batch: NoisyBatch) -> tuple[Tensor, ...]:
        """The tensors that `loss` compares with, without gradient, for the supervised rows: each (M, N, …) by token."""
        return ()

    def loss(self, hidden: Any, target: tuple[Tensor, ...], batch: NoisyBatch) -> Tensor:
        """The summed, weighted loss: hidden (B, N, D) is the student's stream after block `tap`. Scalar float32.

        A tuple of blocks gives a tuple of their streams. N: of a route around the block, the tokens that it keeps.
        """
        raise NotImplementedError


def on_same_tokens(
    tap: int | tuple[int, ...], hidden: Any, target: tuple[Tensor, ...], batch: NoisyBatch
) -> tuple[Any, tuple[Tensor, ...]]:
    """`hidden` and `target`, as a method's tap and target give them, with the same tokens in the same order.

    As they are, unless the batch has a route and a tapped block lies in it: then of all of them the tokens that the
    route keeps.
    """
    layout, taps = batch.layout, tap if isinstance(tap, tuple) else (tap,)
    if layout is None or layout.route is None or not any(map(layout.route.inside, taps)):
        return hidden, target
    inside = [layout.route.inside(one) for one in taps]
    streams = hidden if isinstance(tap, tuple) else (hidden,)
    streams = tuple(s if kept else layout.take_kept(s) for s, kept in zip(streams, inside, strict=True))
    rows = replace(layout, order=batch.rows.take(layout.order))
    return streams if isinstance(tap, tuple) else streams[0], tuple(map(rows.take_kept, target))


def select_rows(t: Tensor, part: slice, selection: Selection | None) -> tuple[Tensor, Tensor]:
    """The supervised rows of a micro-batch and their weights, on the host, from all of the global batch's times.

    t (A,) float32 holds the whole global batch, or (A, G) its groups' times, of which all must lie inside; `part` is
    this micro-batch's slice of it. With m_b = t_b inside the closed range: "sample" is mean_b(m_b·ℓ_b); "sample_mean"
    is Σ m_b·ℓ_b / Σ m_b; "released" is mean(m)·mean(ℓ), as the released code's broadcasting makes it. Returns index
    (M,) int64 into the micro-batch and weight (M,) float32.
    """
    if selection is None:
        return torch.empty(0, dtype=torch.int64), torch.empty(0)
    low, high = selection.t_range
    inside = (t >= low) & (t <= high)
    inside = inside if t.ndim == 1 else inside.all(1)
    total, count = len(t), int(inside.sum())
    mine = inside[part]
    if selection.mask == "released":
        index = torch.arange(len(mine)) if count else torch.empty(0, dtype=torch.int64)
        return index, torch.full((len(index),), selection.weight * count / total**2)
    index = mine.nonzero()[:, 0]
    divisor = total if selection.mask == "sample" else max(count, 1)
    return index, torch.full((len(index),), selection.weight / divisor)


def create(stage: Stage, parts: Parts, seed: int) -> Supervision:
    """The stage's method, its heads drawn from `seed` without touching the global generator."""
    module, _, name = stage.method.implementation.partition(":")
    implementation = getattr(importlib.import_module(module), name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return implementation(stage.method, parts)
