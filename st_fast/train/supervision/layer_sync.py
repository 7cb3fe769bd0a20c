"""LayerSync (arXiv 2510.12581): a shallow block follows a deeper one of the same forward pass, without a head."""

from torch import Tensor, nn

from st_fast.recipe import methods
from st_fast.train.supervision.protocol import NoisyBatch, Parts


class LayerSync:
    """Σ_b weight_b · mean_n −cos(h_s, stopgrad h_t), h_s and h_t the streams after the two blocks."""

    def __init__(self, settings: methods.LayerSync, parts: Parts) -> None:
        self.tap, self.kernels = settings.tap, parts.kernels
        self.heads: nn.Module = nn.Module()

    def active(self, step: int) -> bool:
        return True

    def target(self, batch: NoisyBatch) -> tuple[Tensor, ...]:
        return ()

    def loss(self, hidden: tuple[Tensor, Tensor], target: tuple[Tensor, ...], batch: NoisyBatch) -> Tensor:
        shallow, deep = hidden
        return self.kernels.align(shallow, deep.detach(), batch.rows.weight).float()
