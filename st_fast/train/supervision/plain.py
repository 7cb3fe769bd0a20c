"""No supervision besides the denoising loss: SiT as published (arXiv 2401.08740)."""

from torch import Tensor, nn

from st_fast.recipe import methods
from st_fast.train.supervision.protocol import NoisyBatch, Parts


class Plain:
    """Never active."""

    tap = 0

    def __init__(self, settings: methods.Plain, parts: Parts) -> None:
        self.heads: nn.Module = nn.Module()

    def active(self, step: int) -> bool:
        return False

    def target(self, batch: NoisyBatch) -> tuple[Tensor, ...]:
        return ()

    def loss(self, hidden: Tensor, target: tuple[Tensor, ...], batch: NoisyBatch) -> Tensor:
        return hidden.new_zeros(())
