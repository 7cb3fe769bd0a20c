"""The way of an image's tokens through the blocks: their order, those that a route drops, and what goes with each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from st_fast.kernels import KernelTable
from st_fast.model.fusion import Fusion
from st_fast.model.layers import adaln_options
from st_fast.model.layout import Groups, Layout
from st_fast.recipe.schema import Model


class Walk:
    """The image's residual stream x and modulated input y on their way through the blocks, registers in front.

    Puts the tokens into the layout's order, takes those that its route drops out and puts them back, as they were,
    behind the last block without them. With a fusion, the stream before its blocks joins what these made of it.
    `following` has the shift and scale of each block's y. What goes with each token, its angles `rope` (1 or B, N, d)
    and block 1's values `v1` (B, N, H, d), goes the same way.
    """

    def __init__(
        self, config: Model, kernels: KernelTable, layout: Layout | None, tokens: Tensor,
        following: Sequence[tuple[Tensor, Tensor]], rope: Tensor | None = None, fusion: Fusion | None = None,
        registers: Tensor | None = None,
    ) -> None:  # fmt: skip
        self._kernels, self._layout, self._following, self._fusion = kernels, layout, following, fusion
        self._adaln, self._registers = adaln_options(config), config.registers
        self._others: Tensor | None = None
        """(B, N − K, D): the tokens that are left out, while some are."""
        self._before: Tensor | None = None
        """(B, K, D) or (B, N, D): what is to be joined, within a fusion."""
        self.tapped = {0: tokens}
        self.x = tokens if layout is None else layout.ordered(tokens)
        if registers is not None:
            self.x = torch.cat((registers.to(tokens.dtype).expand(len(tokens), -1, -1), self.x), dim=1)
        if rope is not None and layout is not None:
            of_registers, of_image = rope[0].split((self._registers, rope.shape[1] - self._registers))
            rope = torch.cat((of_registers.expand(len(tokens), -1, -1), of_image[layout.order]), dim=1)
        self.rope = self._all_ropes = rope
        self.v1: Tensor | None = None
        self._all_v1: Tensor | None = None
        self.groups = None if layout is None else layout.groups
        self.y = self._modulated(0)

    def image(self, values: Tensor) -> Tensor:
        """(B, R + N, …) → the image's tokens alone."""
        return (
            values.split((self._registers, values.shape[1] - self._registers), dim=1)[1] if self._registers else values
        )

    def _split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, R + N, …) → the registers and the tokens that the route keeps (B, R + K, …), and the others."""
        assert self._layout is not None
        if not self._registers:
            return self._layout.split(values)
        registers, image = values.split((self._registers, values.shape[1] - self._registers), dim=1)
        kept, others = self._layout.split(image)
        return torch.cat((registers, kept), dim=1), others

    def _modulated(self, number: int) -> Tensor:
        options = self._adaln | of_groups(self.groups)
        y: Tensor = self._kernels.norm_modulate(self.x, *self._following[number], **options)
        return y

    def enter(self, number: int) -> None:
        """Before block `number`: where the route begins with it, x and y are those of the kept tokens from here on."""
        layout = self._layout
        if layout is not None and layout.route is not None and number == layout.route.first + 1:
            self.x, self._others = self._split(self.x)
            self.y, self.groups = self._split(self.y)[0], layout.kept_groups
            self.rope, self.v1 = (None if one is None else self._split(one)[0] for one in (self.rope, self.v1))
        if self._fusion is not None and number == self._fusion.first + 1:
            self._before = self.x

    def leave(self, number: int, x: Tensor, y: Tensor, v1: Tensor | None = None, *, tapped: bool) -> None:
        """After block `number`, whose output is x and the next input y; block 1's may have its values v1, too."""
        self.x, self.y, layout, fusion = x, y, self._layout, self._fusion
        if v1 is not None:
            self.v1 = self._all_v1 = v1
        if tapped:
            image = self.image(x)
            self.tapped[number] = image if layout is None or self._others is not None else layout.restored(image)
        back = layout is not None and layout.route is not None and number == layout.route.last
        if fusion is not None and number == fusion.last:
            assert self._before is not None
            self.x = fusion.joined(self._before, x, None if layout is None else layout.dropped)
            self._others, self._before = None if self._others is None else fusion.masked(self._others), None
        elif not back:
            return
        if back:
            assert layout is not None and self._others is not None
            joined = layout.joined(self.image(self.x), self._others)
            self.x = torch.cat((self.x[:, : self._registers], joined), dim=1) if self._registers else joined
            self.groups, self._others, self.rope, self.v1 = layout.groups, None, self._all_ropes, self._all_v1
        self.y = self._modulated(number)

    def skipped(self, number: int) -> bool:
        """Whether block `number` lies within the fusion and so need not run; its last one leaves mask tokens."""
        fusion = self._fusion
        if fusion is None or not fusion.first < number <= fusion.last:
            return False
        if number == fusion.last:
            self.x = fusion.masked(self.x)
            self.y = self._modulated(number)
        return True


def of_groups(groups: Groups | None) -> dict[str, tuple[int, ...]]:
    """What the adaLN ops are told of groups: their lengths, where there are several."""
    return {"lengths": groups.lengths} if groups is not None and len(groups.lengths) > 1 else {}
