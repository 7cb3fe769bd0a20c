"""Muon: hidden matrices move by their orthogonalised momentum (Jordan, kellerjordan.github.io/posts/muon, 2024).

The mathematics of `torch.optim.Muon`, of gradients that are clipped: m ← m + (1 − μ)(g − m), u = g + μ(m − g)
(Nesterov), O = five steps of Newton and Schulz on u, which bring its singular values near 1, then
p ← p·(1 − lr·wd) − lr·s·O with s = √max(1, rows/columns), or s = 0.2·√max(rows, columns) after arXiv 2502.16982.
Beside it matrices of one shape are multiplied in one batch, parts of a fused matrix can be orthogonalised one by one
(`optim.muon_split`), and of several ranks each orthogonalises its share of the matrices, then all get all updates.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from st_fast.core.errors import UserError
from st_fast.core.ranks import Ranks, rows, sharded
from st_fast.recipe.muon_cost import fused
from st_fast.recipe.schema import Optim
from st_fast.train.adamw import clip_factor, update_emas
from st_fast.train.parallel import mesh_of_shards

COEFFICIENTS, STEPS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
"""torch.optim.Muon's: x ← a·x + (b·A + c·A²)·x with A = x·xᵀ, how often, and the least norm that x is divided by."""
GRAM_STEPS, GRAM_ASPECT = (3, 2), 1.5
"""How many steps are made on A before x is multiplied, and the long side over the short one from which that is less.

All five on one A would be less still, but A's small eigenvalues drown in float32's rounding, which every step enlarges
12 times: the error was up to seven times that of steps on x, and is up to twice that with these.
"""
ROUND = {"cpu": 2**22, "cuda": 2**26}
"""Elements that are updated at a time for each rank: on a CPU they fit its last cache, on a GPU they fill it."""


@dataclass(frozen=True)
class Matrix:
    """A matrix that Muon updates, and into how many parts of as many rows it is cut for that."""

    position: int
    """In the lists that `Muon.update` is given."""
    rows: int
    columns: int
    parts: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of what is orthogonalised: (parts, rows, columns)."""
        return self.parts, self.rows // self.parts, self.columns

    @property
    def macs(self) -> int:
        """Multiply-adds of a step of Newton and Schulz, up to a constant factor: for sharing the work among ranks."""
        parts, short, long = self.parts, *sorted(self.shape[1:])
        return parts * short * short * (2 * long + short)

    def factor(self, adjust: str) -> float:
        """s, of the learning rate; of each part's shape."""
        _, height, width = self.shape
        return math.sqrt(max(1.0, height / width)) if adjust == "original" else 0.2 * math.sqrt(max(height, width))

    def elements(self, rank: int, count: int) -> int:
        """Of the rows that a rank has where the matrix lies in shards."""
        start, stop = rows(self.rows, rank, count)
        return (stop - start) * self.columns


def updated(module: nn.Module, settings: Optim) -> list[str]:
    """The names of a model's parameters that Muon updates, in their order; UserError where there is none.

    Trained 2-D weights within the blocks, without adaLN's unless `muon_adaln`, and a fusion's projection.
    """
    if settings.name != "muon":
        return []
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad and p.ndim == 2]
    names = [name for name, _ in trained if settings.muon_updates(name)]
    if not names:
        raise UserError(f"optim.name = 'muon': none of the model's {len(trained)} trained matrices lies in a block")
    return names


def orthogonalized(x: Tensor) -> Tensor:
    """(K, R, C) float32 or bfloat16 → the same with singular values near 1, each matrix for itself.

    Works on the short side, as torch does. All factors are polynomials of A = x·xᵀ, so that steps on a long matrix need
    A alone: with P = a + b·A + c·A², Q ← P·Q and A ← P·A·P, and at last Q·x. bfloat16 is too coarse for that.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalized(x.mT).mT
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min_(EPS)
    if x.dtype != torch.float32 or x.shape[2] < GRAM_ASPECT * x.shape[1]:
        for _ in range(STEPS):
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    for steps in GRAM_STEPS:
        gram, product = torch.bmm(x, x.mT), torch.empty(0)
        for step in range(steps):
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            polynomial.diagonal(dim1=1, dim2=2).add_(a)
            product = torch.bmm(polynomial, product) if step else polynomial
            if step < steps - 1:
                gram = torch.bmm(torch.bmm(polynomial, gram), polynomial)
        x = torch.bmm(product, x)
    return x


def shared_out(matrices: Sequence[Matrix], count: int, most: int) -> list[list[list[Matrix]]]:
    """Rounds of at most `most` elements (or one matrix); of each round what each of `count` ranks orthogonalises.

    The dearest first, each to the rank with least to do; equal shapes of a rank lie side by side.
    """
    rounds, loads, room = list[list[list[Matrix]]](), [0] * count, 0
    for matrix in sorted(matrices, key=lambda one: (-one.macs, one.shape)):
        size = matrix.rows * matrix.columns
        if size > room:
            rounds.append([[] for _ in range(count)])
            loads, room = [0] * count, most
        owner = loads.index(min(loads))
        rounds[-1][owner].append(matrix)
        loads[owner] += matrix.macs
        room -= size
    return rounds


class Muon:
    """Updates matrices, which several ranks have whole, or each its shard of; `names` and `masters` belong together."""

    def __init__(self, names: Sequence[str], masters: Sequence[Tensor], settings: Optim, ranks: Ranks | None) -> None:
        self.names, self.settings = names, settings
        self.momentum_buffers = [torch.zeros_like(master.detach()) for master in masters]
        """float32, sharded as the masters are."""
        first = masters[0]
        self._in_shards, self._ranks, self._group = sharded(first), ranks, None
        self._rank, self._count = (ranks.rank, ranks.count) if ranks is not None else (0, 1)
        if sharded(first):
            mesh = mesh_of_shards(first)
            self._rank, self._count, self._group = mesh.get_local_rank(), mesh.size(), mesh.get_group()
        precision = {"fp32": torch.float32, "bf16": torch.bfloat16}
        self._dtype = precision.get(settings.muon_precision, precision["bf16" if first.is_cuda else "fp32"])
        matrices = [
            Matrix(at, height, width, fused(name, width, height) if settings.muon_split else 1)
            for at, (name, (height, width)) in enumerate(zip(names, (m.shape for m in masters), strict=True))
        ]
        self._rounds = shared_out(matrices, self._count, self._count * ROUND[first.device.type])
        self._factors = [
            torch.tensor([m.factor(settings.muon_adjust) for owner in owners for m in owner], device=first.device)
            for owners in self._rounds
        ]

    def __str__(self) -> str:
        """Which matrices they are, without the blocks' numbers."""
        kinds = dict.fromkeys(re.sub(r"^(joint_)?blocks\.[0-9]+\.|\.weight$", "", name) for name in self.names)
        millions = sum(buffer.numel() for buffer in self.momentum_buffers) / 1e6
        return f"Muon updates {len(self.names)} matrices ({', '.join(kinds)}; {millions:.2f} M parameters)"

    @torch.no_grad()
    def update(
        self, masters: Sequence[Tensor], grads: Sequence[Tensor], buffers: Sequence[Tensor], emas: Sequence[Tensor],
        copies: Sequence[Tensor], step: Tensor, grad_norm: Tensor, rate: Tensor,
    ) -> None:  # fmt: skip
        """One step in place, then ema += (1 − decay)·(p − ema), and the copies; this rank's part of every tensor.

        grads float32 or bfloat16; emas and copies one a matrix, or copies empty; step the number of updates with this
        one (0-dim); grad_norm the global norm, which clips; rate the learning rate (0-dim float32). If grad_norm is not
        finite nothing changes, and nothing waits for it.
        """
        settings = self.settings
        finite = torch.isfinite(grad_norm).float()
        clip, rate = clip_factor(grad_norm, settings.grad_clip), rate * finite
        for owners, factors in zip(self._rounds, self._factors, strict=True):
            at = [matrix.position for owner in owners for matrix in owner]
            params, momentum = [masters[i] for i in at], [buffers[i] for i in at]
            flat = torch.cat([grads[i].reshape(-1) for i in at]).float()
            if settings.grad_clip > 0:
                flat.mul_(clip)
            flat.nan_to_num_(0.0, 0.0, 0.0)  # of a step that is skipped: its weight is 0, and 0·NaN would be NaN
            mixed = _views(flat, params)
            torch._foreach_lerp_(momentum, mixed, [finite * (1 - settings.muon_momentum)] * len(at))
            torch._foreach_lerp_(mixed, momentum, settings.muon_momentum)
            updates = _views(self._directions(flat.to(self._dtype), owners), params)
            if settings.muon_weight_decay > 0:
                torch._foreach_mul_(params, 1 - rate * settings.muon_weight_decay)
            for param, update, factor in zip(params, updates, (rate * factors).unbind(), strict=True):
                param.addcmul_(update.float(), factor, value=-1)
            averages = [emas[i] for i in at]
            update_emas(params, averages, step, grad_norm, settings.ema_decay, settings.ema_warmup)
            if copies:
                torch._foreach_copy_([copies[i] for i in at], params)

    def _directions(self, flat: Tensor, owners: list[list[Matrix]]) -> Tensor:
        """The matrices' orthogonalised updates, end to end as `flat` has what they are of: this rank's parts."""
        if self._in_shards:
            return self._of_shards(flat, owners)
        sizes = [sum(matrix.rows * matrix.columns for matrix in owner) for owner in owners]
        mine = flat.split(sizes)[self._rank]
        _orthogonalize(mine, owners[self._rank])
        if self._count > 1:
            assert self._ranks is not None
            padded = flat.new_zeros(max(sizes))
            padded[: len(mine)] = mine
            found = self._ranks.gather(padded).chunk(self._count)
            flat = torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])
        return flat

    def _of_shards(self, flat: Tensor, owners: list[list[Matrix]]) -> Tensor:
        """The same of shards: their rows travel to the owners, and what is made of them back."""
        mine, ranks = owners[self._rank], range(self._count)
        given = [sum(matrix.elements(self._rank, self._count) for matrix in owner) for owner in owners]
        taken = [[matrix.elements(rank, self._count) for matrix in mine] for rank in ranks]
        sums = [sum(sizes) for sizes in taken]
        found = flat.new_empty(sum(sums))
        dist.all_to_all_single(found, flat, sums, given, group=self._group)
        by_rank = [part.split(sizes) for part, sizes in zip(found.split(sums), taken, strict=True)]
        whole = torch.cat([by_rank[rank][i] for i in range(len(mine)) for rank in ranks] or [found])
        _orthogonalize(whole, mine)
        pieces = iter(whole.split([taken[rank][i] for i in range(len(mine)) for rank in ranks]))
        by_matrix = [[next(pieces) for _ in ranks] for _ in mine]
        back = torch.cat([of[rank] for rank in ranks for of in by_matrix] or [found])
        result = torch.empty_like(flat)
        dist.all_to_all_single(result, back, given, sums, group=self._group)
        return result


def _orthogonalize(flat: Tensor, matrices: Sequence[Matrix]) -> None:
    """Whole matrices end to end, in place; those of one shape in one batch."""
    at = 0
    for shape, group in groupby(matrices, lambda matrix: matrix.shape):
        parts, height, width = shape
        count = parts * len(list(group))
        batch = flat[at : at + count * height * width].view(count, height, width)
        batch.copy_(orthogonalized(batch))
        at += batch.numel()


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of `flat` as tensors of these shapes."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
