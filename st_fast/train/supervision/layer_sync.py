"""LayerSync (arXiv 2510.12581): a shallow block follows a deeper one of the same forward pass, without a head."""

from torch import Tensor

from st_fast.train.supervision import NoisyBatch, Supervision


class LayerSync(Supervision):
    """Σ_b weight_b · mean_n −cos(h_s, stopgrad h_t), h_s and h_t the streams after the two blocks."""

    def loss(self, hidden: tuple[Tensor, Tensor], target: tuple[Tensor, ...], batch: NoisyBatch) -> Tensor:
        shallow, deep = hidden
        return self.kernels.align(shallow, deep.detach(), batch.rows.weight).float()
