"""The order in which a network runs an image's tokens, where groups of them have their own time or a route drops some.

A sample's tokens are put into that order once, after their positions were added: group by group, and in each group
those first that a route keeps. So groups and kept tokens are slices of fixed lengths: no op reads a mask or an index,
shapes do not change from step to step, and attention within a group is attention over a slice.

Shapes: B samples, N tokens of an image, K kept ones, G groups, D channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """What a block knows of its tokens' groups, which follow one another."""

    lengths: tuple[int, ...]
    """Tokens of each group; the modulation is (B, G, …) where there are several."""
    separated: bool = False
    """Whether a token attends to its own group alone."""
    whole: Tensor | None = None
    """(B,) bool: samples of which every token attends to all."""


@dataclass(frozen=True)
class Route:
    """Blocks first + 1 … last run on a part of the tokens: the first `kept` ones of each group."""

    first: int
    last: int
    kept: tuple[int, ...]

    def inside(self, tap: int) -> bool:
        """Whether the stream after this block is that of the kept tokens alone."""
        return self.first < tap <= self.last


@dataclass(frozen=True)
class Layout:
    """How the tokens of a batch are ordered and grouped, and which of them a route drops."""

    order: Tensor
    """(B, N) int64: the place in the image, row by row, of each token in turn."""
    lengths: tuple[int, ...]
    """Tokens of each group, N in all."""
    separated: bool = False
    """Whether a token attends to its own group alone."""
    whole: Tensor | None = None
    """(B,) bool: samples of which every token attends to all the same."""
    route: Route | None = None
    dropped: Tensor | None = None
    """(B,) bool: samples that go on without what the blocks within a fusion made of them."""

    @property
    def dense(self) -> "Layout":
        """The same groups where all tokens run and no path is dropped, as a teacher has it."""
        return replace(self, route=None, dropped=None)

    @property
    def groups(self) -> Groups:
        """Of all tokens."""
        return Groups(self.lengths, self.separated, self.whole)

    @property
    def kept_groups(self) -> Groups:
        """Of the tokens that the route keeps."""
        return self.groups if self.route is None else self.groups._replace(lengths=self.route.kept)

    @property
    def kept(self) -> Tensor:
        """(B, K) int64: the places in the image of the tokens that the route keeps, in their order."""
        return _alternate(self.order, self)[0]

    def ordered(self, tokens: Tensor) -> Tensor:
        """(B, N, D) row by row → in this order."""
        moved: Tensor = _Moved.apply(tokens, self.order, self.order.argsort(dim=1))
        return moved

    def restored(self, tokens: Tensor) -> Tensor:
        """(B, N, D) in this order → row by row."""
        moved: Tensor = _Moved.apply(tokens, self.order.argsort(dim=1), self.order)
        return moved

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, D) in this order → the kept tokens (B, K, D) and the others (B, N − K, D)."""
        return _alternate(tokens, self)

    def joined(self, kept: Tensor, others: Tensor) -> Tensor:
        """The kept tokens (B, K, D) and the others (B, N − K, D) → (B, N, D) in this order."""
        lengths, parts = self._kept_lengths, list[Tensor]()
        others_of = others.split([n - k for n, k in zip(self.lengths, lengths, strict=True)], dim=1)
        for pair in zip(kept.split(list(lengths), dim=1), others_of, strict=True):
            parts += pair
        return torch.cat(parts, dim=1)

    def take_kept(self, tokens: Tensor) -> Tensor:
        """(B, N, …) row by row → those of the tokens that the route keeps, (B, K, …), in their order."""
        kept = self.kept
        return tokens.flatten(0, 1).index_select(0, _rows(kept, tokens.shape[1])).unflatten(0, kept.shape)

    def pixel_times(self, t: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
        """Times of the groups (B, G) → the time of each pixel of the latent (B, 1, H, W)."""
        columns = zip(t.split(1, dim=1), self.lengths, strict=True)
        each = torch.cat([column.expand(-1, length) for column, length in columns], dim=1)  # (B, N) in this order
        image = torch.empty_like(each).scatter_(1, self.order, each).unflatten(1, grid)
        return image.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]

    @property
    def _kept_lengths(self) -> tuple[int, ...]:
        return self.lengths if self.route is None else self.route.kept


def _alternate(values: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """(B, N, …) in the layout's order → the kept (B, K, …) and the others (B, N − K, …).

    One split, whose backward is one concatenation: slices would each fill a gradient of the whole size.
    """
    lengths = [n for of, kept in zip(layout.lengths, layout._kept_lengths, strict=True) for n in (kept, of - kept)]
    parts = values.split(lengths, dim=1)
    return _cat(parts[::2]), _cat(parts[1::2])


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=1)


def _rows(order: Tensor, tokens: int) -> Tensor:
    """Places (B, K) within samples of so many tokens → (B·K,) rows of all samples' tokens."""
    first = torch.arange(0, len(order) * tokens, tokens, device=order.device)
    return (order + first[:, None]).flatten()


class _Moved(torch.autograd.Function):
    """Rows moved by a permutation of each sample's tokens; the gradient moves back, where indexing would add it up."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return tokens.flatten(0, 1).index_select(0, _rows(order, tokens.shape[1])).view_as(tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        (moved,) = gradients
        return moved.flatten(0, 1).index_select(0, _rows(inverse, moved.shape[1])).view_as(moved), None, None
